//! Goal: QEMU and we mean the same by a qcow image, whoever made and wrote it. Method: images over the matrix of options, made by both,
//! compressed ones too; random changes by both in turn; each reads what the other wrote.

use std::path::{Path, PathBuf};

use futures_lite::future::block_on;

use super::*;
use crate::qcow2::tests::compressed::contents;
use crate::qcow2::tests::rig::{change, have_qemu, must_run, open, read_all, same, write};
use crate::testing::programs::{qemu_reads, run};
use crate::tools::encode::copy_encoded;
use crate::tools::layers::{self as chain, LayerFiles};

/// Changes by us and by QEMU.
fn used(folder: &Path, layers: &[(&str, Vec<PathBuf>)], mut model: Vec<u8>, what: &str, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    same(&format!("{what}: we read it"), &read_all(&open(layers, false)), &model);
    for round in 0..2 {
        let volume = open(layers, true);
        for step in 0..60 {
            change(&volume, &mut model, &mut rng);
            if step % 17 == 3 {
                block_on(volume.flush()).unwrap();
            }
        }
        same(&format!("{what}, round {round}: we read ours"), &read_all(&volume), &model);
        block_on(volume.close()).unwrap();
        drop(volume);
        is_sound(&layers[0].1[0], what);
        let theirs = qemu_reads(folder, "qcow", "a.qcow", None);
        same(&format!("{what}, round {round}: QEMU reads ours"), &theirs, &model);
        let mut arguments = vec!["qemu-io".to_owned(), "-f".into(), "qcow".into()];
        for _ in 0..10 {
            let at = rng.u64(0..model.len() as u64 / 1024 - 40);
            let (len, byte) = (1 + rng.u64(0..40), 1 + rng.u64(0..255));
            arguments.extend(["-c".into(), format!("write -P {byte} {at}k {len}k")]);
            model[at as usize * 1024..(at + len) as usize * 1024].fill(byte as u8);
        }
        arguments.push("a.qcow".into());
        must_run(folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        same(&format!("{what}, round {round}: we read QEMU's"), &read_all(&open(layers, false)), &model);
    }
}

#[test]
fn images_of_qemu() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    must_run(folder.path(), &["qemu-img", "create", "-q", "-f", "qcow", "a.qcow", "5M"]);
    used(folder.path(), &layers(folder.path()), vec![0; 5 << 20], "plain", 3);
    // Compressed: its `convert` ends with an error here though the image is whole, since it cannot tell the image's size.
    let folder = tempfile::tempdir().unwrap();
    let model = contents(3 << 20, 5);
    std::fs::write(folder.path().join("a.raw"), &model).unwrap();
    run(folder.path(), &["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow", "a.raw", "a.qcow"]);
    same("compressed by QEMU, read by QEMU", &qemu_reads(folder.path(), "qcow", "a.qcow", None), &model);
    assert!(is_encoded(&layers(folder.path())), "nothing is compressed");
    used(folder.path(), &layers(folder.path()), model, "compressed", 5);
}

fn is_encoded(layers: &[(&str, Vec<PathBuf>)]) -> bool {
    let volume = open(layers, false);
    let driver = &volume.layers()[0].driver;
    block_on(driver.load(0, 1 << 20)).unwrap();
    let mut extents = Vec::new();
    driver.map(0, 1 << 20, &mut extents).unwrap();
    extents.iter().any(|extent| extent.place == crate::driver::Place::Encoded)
}

#[test]
fn images_of_ours() {
    if !have_qemu() {
        return;
    }
    let matrix = [
        "",
        "extended=off",
        "cluster_size=512",
        "cluster_size=64k",
        "cluster_size=1k,extended=off",
        "preallocation=full",
    ];
    for (number, options) in matrix.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        create(&folder.path().join("a.qcow"), 3001 << 10, None, options).unwrap();
        used(folder.path(), &layers(folder.path()), vec![0; 3001 << 10], options, 13 + number as u64);
    }
}

#[test]
fn compressed_images_of_ours() {
    if !have_qemu() {
        return;
    }
    for (number, options) in ["", "cluster_size=512", "cluster_size=64k,extended=off"].into_iter().enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        let model = contents(3001 << 10, 31 + number as u64);
        std::fs::write(folder.path().join("a.raw"), &model).unwrap();
        create(&folder.path().join("a.qcow"), 3001 << 10, None, options).unwrap();
        block_on(async {
            let file = |name: &str, writable| {
                DiskFile::open(&folder.path().join(name), writable) as Rc<dyn ImageFile>
            };
            let budget = Budget::new(1 << 20);
            let images = |format, file| [LayerFiles { format, files: vec![file], snapshot: None, key: None }];
            let raw = crate::registry::format("raw").unwrap();
            let source = chain::open(&images(raw, file("a.raw", false)), false, &budget).await?;
            let target = chain::open(&images(&Qcow, file("a.qcow", true)), true, &budget).await?;
            copy_encoded(&source, &target, &(), &()).await?;
            chain::finish(&target).await
        })
        .unwrap();
        assert!(is_encoded(&layers(folder.path())), "nothing is compressed");
        is_sound(&folder.path().join("a.qcow"), options);
        used(folder.path(), &layers(folder.path()), model, options, 41 + number as u64);
    }
}

#[test]
fn backing_files() {
    if !have_qemu() {
        return;
    }
    for (number, (below_kib, options)) in
        [(4096, ""), (3001, "extended=off"), (1000, "")].into_iter().enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        let mut model = contents(below_kib << 10, 71 + number as u64);
        std::fs::write(folder.path().join("below"), &model).unwrap();
        let layers =
            [("qcow", vec![folder.path().join("a.qcow")]), ("raw", vec![folder.path().join("below")])];
        if number == 2 {
            must_run(
                folder.path(),
                &["qemu-img", "create", "-q", "-f", "qcow", "-b", "below", "-F", "raw", "a.qcow", "4M"],
            );
        } else {
            create(&folder.path().join("a.qcow"), 4 << 20, Some(("below", "raw")), options).unwrap();
            let said =
                block_on(Qcow.describe(DiskFile::open(&layers[0].1[0], false))).unwrap().backing.unwrap();
            assert_eq!((said.paths, said.format), (vec!["below".to_owned()], Some("raw".to_owned())));
        }
        model.resize(4 << 20, 0);
        used(folder.path(), &layers, model, options, 81 + number as u64);
    }
}

#[test]
fn a_disk_grows() {
    if !have_qemu() {
        return;
    }
    for options in ["", "extended=off,cluster_size=512", "cluster_size=64k"] {
        let folder = tempfile::tempdir().unwrap();
        create(&folder.path().join("a.qcow"), 500 << 10, None, options).unwrap();
        let mut model = vec![0; 500 << 10];
        let mut rng = fastrand::Rng::with_seed(9);
        let volume = open(&layers(folder.path()), true);
        for size in [510u64 << 10, 3001 << 10, 40 << 20] {
            for _ in 0..20 {
                change(&volume, &mut model, &mut rng);
            }
            block_on(volume.resize(size)).unwrap();
            model.resize(size as usize, 0);
            model.truncate(4 << 20);
            let read = crate::qcow2::tests::rig::read(&volume, 0, model.len() as u64);
            same("after growing", &read, &model);
        }
        write(&volume, (40 << 20) - 512, &[6; 512]);
        assert!(block_on(volume.resize(512)).is_err());
        block_on(volume.close()).unwrap();
        is_sound(&folder.path().join("a.qcow"), options);
        let theirs = qemu_reads(folder.path(), "qcow", "a.qcow", None);
        same("QEMU after growing", &theirs[..model.len()], &model);
        assert_eq!((theirs.len(), &theirs[(40 << 20) - 512..]), (40 << 20, &[6; 512][..]));
    }
}
