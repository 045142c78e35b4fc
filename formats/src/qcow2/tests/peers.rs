//! Goal: QEMU and we mean the same by an image, whoever made and wrote it.
//! Method: images over the matrix of options, made by QEMU and by us; random writes by both in turn; each reads what the other wrote,
//! both checkers find nothing.

use std::path::PathBuf;

use futures_lite::future::block_on;

use super::rig::*;

/// Name, size in KiB, options of `qemu-img create`.
const MATRIX: &[(&str, u64, &str)] = &[
    ("plain", 8192, ""),
    ("v2", 8192, "compat=0.10"),
    ("tiny clusters", 1023, "cluster_size=512"),
    ("small clusters", 4096, "cluster_size=4k,refcount_bits=1"),
    ("wide refcounts", 2048, "cluster_size=1k,refcount_bits=64"),
    ("odd size", 3001, "cluster_size=32k,refcount_bits=2"),
    ("large clusters", 9000, "cluster_size=2M,refcount_bits=8"),
    ("lazy", 4096, "lazy_refcounts=on,refcount_bits=32"),
    ("subclusters", 8192, "extended_l2=on"),
    ("small subclusters", 3000, "extended_l2=on,cluster_size=16k,refcount_bits=4"),
    ("large subclusters", 9000, "extended_l2=on,cluster_size=2M"),
    ("metadata", 4096, "preallocation=metadata"),
    ("falloc", 4096, "preallocation=falloc,cluster_size=8k"),
    ("full", 2048, "preallocation=full,extended_l2=on"),
    ("data file", 4096, "data_file=data.raw"),
    ("raw data file", 4096, "data_file=data.raw,data_file_raw=on"),
    ("data file, subclusters", 4096, "data_file=data.raw,extended_l2=on"),
];

fn files(folder: &tempfile::TempDir, options: &str) -> Vec<PathBuf> {
    let mut files = vec![folder.path().join("a.qcow2")];
    if options.contains("data_file") {
        files.push(folder.path().join("data.raw"));
    }
    files
}

/// Some writes by QEMU, also zeroes and discards.
fn qemu_writes(folder: &tempfile::TempDir, image: &str, size_kib: u64, rng: &mut fastrand::Rng) {
    let mut commands: Vec<String> = Vec::new();
    for _ in 0..12 {
        let at = rng.u64(..size_kib);
        let len = (1 + rng.u64(..200)).min(size_kib - at);
        commands.push(match rng.u64(..4) {
            0 => format!("write -z {at}k {len}k"),
            1 => format!("discard {at}k {len}k"),
            _ => format!("write -P {} {at}k {len}k", 1 + rng.u64(..255)),
        });
    }
    let mut arguments = vec!["qemu-io", "-t", "unsafe", "-d", "unmap", "-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command.as_str()]));
    arguments.push(image);
    must_run(folder.path(), &arguments);
}

fn round_trip(
    folder: &tempfile::TempDir,
    name: &str,
    options: &str,
    size_kib: u64,
    below: Option<(&str, PathBuf)>,
    seed: u64,
) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut layers = vec![("qcow2", files(folder, options))];
    if let Some((format, path)) = below {
        layers.push((format, vec![path]));
    }
    qemu_finds_nothing(folder.path(), "a.qcow2");
    for round in 0..2 {
        qemu_writes(folder, "a.qcow2", size_kib, &mut rng);
        let mut model = qemu_reads("a.qcow2", folder.path(), None);
        let volume = open(&layers, true);
        same(&format!("{name}, round {round}: we read QEMU's"), &read_all(&volume), &model);
        for step in 0..40 {
            change(&volume, &mut model, &mut rng);
            match step % 13 {
                5 => block_on(volume.flush()).unwrap(),
                11 => block_on(volume.tidy()).unwrap(),
                _ => {}
            }
        }
        same(&format!("{name}, round {round}: we read ours"), &read_all(&volume), &model);
        block_on(volume.close()).unwrap();
        drop(volume);
        qemu_finds_nothing(folder.path(), "a.qcow2");
        same(
            &format!("{name}, round {round}: QEMU reads ours"),
            &qemu_reads("a.qcow2", folder.path(), None),
            &model,
        );
        let paths: Vec<&std::path::Path> = layers[0].1.iter().map(PathBuf::as_path).collect();
        let found = check(&paths, None);
        assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{name}, round {round}");
        if options.contains("data_file_raw") {
            let data = std::fs::read(folder.path().join("data.raw")).unwrap();
            same(&format!("{name}: the data file by itself"), &data[..model.len()], &model);
        }
    }
}

#[test]
fn images_of_qemu() {
    if !have_qemu() {
        return;
    }
    for (number, (name, size_kib, options)) in MATRIX.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("{size_kib}k");
        let mut arguments = vec!["qemu-img", "create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend(["a.qcow2", &size]);
        must_run(folder.path(), &arguments);
        round_trip(&folder, name, options, *size_kib, None, 77 + number as u64);
    }
}

#[test]
fn images_of_ours() {
    if !have_qemu() {
        return;
    }
    for (number, (name, size_kib, options)) in MATRIX.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let list: Vec<(&str, &str)> =
            options.split(',').filter_map(|option| option.split_once('=')).collect();
        create(&folder.path().join("a.qcow2"), size_kib * 1024, None, &list).unwrap();
        round_trip(&folder, name, options, *size_kib, None, 177 + number as u64);
    }
}

#[test]
fn backing_files() {
    if !have_qemu() {
        return;
    }
    // Size of the layer below in KiB against 4096 of the top: longer, shorter, odd.
    let cases = [
        ("raw", "", 4096),
        ("raw", "compat=0.10", 8192),
        ("qcow2", "extended_l2=on", 1001),
        ("qcow2", "cluster_size=512", 3000),
        ("qcow2", "data_file=data.raw", 4096),
        ("raw", "cluster_size=2M", 5000),
    ];
    for (number, (format, options, below_kib)) in cases.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("{below_kib}k");
        must_run(folder.path(), &["qemu-img", "create", "-q", "-f", format, "below", &size]);
        let half = format!("write -P 99 0 {}k", below_kib / 2 + 1);
        let tail = format!("write -P 98 {}k 1k", below_kib - 1);
        must_run(folder.path(), &["qemu-io", "-f", format, "-c", &half, "-c", &tail, "below"]);
        let ours = number % 2 == 0;
        if ours {
            let list: Vec<(&str, &str)> =
                options.split(',').filter_map(|option| option.split_once('=')).collect();
            create(
                &folder.path().join("a.qcow2"),
                4096 << 10,
                Some((std::path::Path::new("below"), format)),
                &list,
            )
            .unwrap();
        } else {
            let mut arguments = vec!["qemu-img", "create", "-q", "-f", "qcow2", "-b", "below", "-F", format];
            if !options.is_empty() {
                arguments.extend(["-o", options]);
            }
            arguments.extend(["a.qcow2", "4M"]);
            must_run(folder.path(), &arguments);
        }
        let below = folder.path().join("below");
        round_trip(
            &folder,
            &format!("over {format}, {options}"),
            options,
            4096,
            Some((format, below)),
            277 + number as u64,
        );
    }
}

#[test]
fn a_disk_grows() {
    if !have_qemu() {
        return;
    }
    for (number, options) in
        ["cluster_size=512", "extended_l2=on", "compat=0.10", "data_file=data.raw,data_file_raw=on"]
            .iter()
            .enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        must_run(
            folder.path(),
            &["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "500k"],
        );
        let layers = [("qcow2", files(&folder, options))];
        let mut rng = fastrand::Rng::with_seed(5 + number as u64);
        let mut model = vec![0; 500 << 10];
        let volume = open(&layers, true);
        for size in [510u64 << 10, 3001 << 10, 40 << 20] {
            for _ in 0..20 {
                change(&volume, &mut model, &mut rng);
            }
            block_on(volume.resize(size)).unwrap();
            model.resize(size as usize, 0);
            for _ in 0..20 {
                change(&volume, &mut model, &mut rng);
            }
            same("after growing", &read_all(&volume), &model);
        }
        assert!(block_on(volume.resize(512)).is_err());
        block_on(volume.close()).unwrap();
        qemu_finds_nothing(folder.path(), "a.qcow2");
        same("QEMU after growing", &qemu_reads("a.qcow2", folder.path(), None), &model);
        if number == 3 {
            continue;
        }
        let shrunk = open_of(&[&layers[0].1[0]], true);
        block_on(crate::qcow2::shrink(shrunk, 1000 << 10)).unwrap();
        model.truncate(1000 << 10);
        qemu_finds_nothing(folder.path(), "a.qcow2");
        same("QEMU after shrinking", &qemu_reads("a.qcow2", folder.path(), None), &model);
    }
}
