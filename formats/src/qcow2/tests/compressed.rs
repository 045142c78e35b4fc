//! Goal: compressed clusters are read, replaced, given back and written as QEMU does it; damaged ones harm only who asks for them.
//! Method: images that `qemu-img convert -c` made over types, sizes of clusters and versions, changed at random by both and judged by
//! both; ours over the same matrix, read and checked by QEMU; entries and bytes that were damaged on purpose.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use futures_lite::future::block_on;

use super::rig::*;
use crate::codec::{self, Method};
use crate::driver::{Budget, Create, Erase, Format};
use crate::error::ErrorKind;
use crate::file::ImageFile;
use crate::qcow2::Qcow2;
use crate::tools::encode::copy_encoded;
use crate::tools::layers::{self, LayerFiles};
use crate::volume::{Memory, Volume, Window};

/// Size in KiB, options.
const MATRIX: &[(u64, &str)] = &[
    (3000, "compat=0.10"),
    (3000, "compression_type=zlib"),
    (3001, "compression_type=zstd"),
    (700, "compression_type=zlib,cluster_size=512"),
    (700, "compression_type=zstd,cluster_size=512,refcount_bits=64"),
    (2000, "compression_type=zlib,cluster_size=4k,refcount_bits=1"),
    (2000, "compression_type=zstd,cluster_size=8k,refcount_bits=2"),
    (9000, "compression_type=zlib,cluster_size=2M"),
    (9000, "compression_type=zstd,cluster_size=2M"),
    (3000, "compression_type=zlib,extended_l2=on"),
    (3000, "compression_type=zstd,extended_l2=on,cluster_size=16k"),
];

/// What a file system might hold: text, noise, zeroes, in stretches of some kilobytes.
pub(crate) fn contents(size: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = Vec::with_capacity(size + (1 << 16));
    while bytes.len() < size {
        let len = 512 * (1 + rng.u64(0..100)) as usize;
        match rng.u64(0..4) {
            0 => bytes.resize(bytes.len() + len, 0),
            1 => bytes.extend(std::iter::repeat_with(|| rng.u8(..)).take(len)),
            _ => {
                let words: Vec<u64> = (0..8).map(|_| rng.u64(..)).collect();
                bytes.extend((0..len / 8).flat_map(|_| words[rng.u64(0..8) as usize].to_le_bytes()));
            }
        }
    }
    bytes.truncate(size);
    bytes
}

/// A compressed image of some contents, made by QEMU.
fn of_qemu(folder: &Path, size_kib: u64, options: &str, seed: u64) -> Vec<u8> {
    let model = contents(size_kib as usize * 1024, seed);
    std::fs::write(folder.join("a.raw"), &model).unwrap();
    must_run(
        folder,
        &["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2"],
    );
    model
}

/// A compressed image of some contents, made by us.
fn of_ours(folder: &Path, size_kib: u64, options: &str, seed: u64) -> Vec<u8> {
    let model = contents(size_kib as usize * 1024, seed);
    std::fs::write(folder.join("a.raw"), &model).unwrap();
    let options: Vec<(String, String)> = options
        .split(',')
        .filter_map(|option| option.split_once('='))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect();
    let file: Rc<dyn ImageFile> = DiskFile::open(&folder.join("a.qcow2"), true);
    let create = Create { size: Some(model.len() as u64), backing: None, options, key: None };
    block_on(async {
        Qcow2.create(file.clone(), Vec::new(), &create).await?;
        let raw: Rc<dyn ImageFile> = DiskFile::open(&folder.join("a.raw"), false);
        let budget = Budget::new(1 << 20);
        let images = |format, file| [LayerFiles { format, files: vec![file], snapshot: None, key: None }];
        let source =
            layers::open(&images(crate::registry::format("raw").unwrap(), raw), false, &budget).await?;
        let target = layers::open(&images(&Qcow2, file), true, &budget).await?;
        copy_encoded(&source, &target, &(), &()).await?;
        layers::finish(&target).await
    })
    .unwrap();
    model
}

fn layers_of(folder: &Path) -> [(&'static str, Vec<PathBuf>); 1] {
    [("qcow2", vec![folder.join("a.qcow2")])]
}

/// Clusters of the image that are encoded.
fn encoded_bytes(volume: &Volume) -> u64 {
    let mut extents = Vec::new();
    let mut at = 0;
    let mut encoded = 0;
    let driver = &volume.layers()[0].driver;
    while at < volume.size() {
        extents.clear();
        let covered = driver.map(at, volume.size() - at, &mut extents).unwrap();
        if covered == 0 {
            block_on(driver.load(at, 512)).unwrap();
        }
        at += covered;
        let coded = extents.iter().filter(|extent| extent.place == crate::driver::Place::Encoded);
        encoded += coded.map(|extent| extent.len).sum::<u64>();
    }
    encoded
}

fn is_sound(folder: &Path, what: &str) {
    qemu_finds_nothing(folder, "a.qcow2");
    let found = check(&[&folder.join("a.qcow2")], None);
    assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{what}");
}

/// Random changes by us, and by QEMU, each read and judged by both; with a snapshot of the state at the beginning.
fn used(folder: &Path, mut model: Vec<u8>, what: &str, seed: u64) {
    let before = model.clone();
    let mut rng = fastrand::Rng::with_seed(seed);
    let with_snapshot = seed.is_multiple_of(2) && !["=1", "=2"].iter().any(|bits| what.ends_with(bits));
    {
        let volume = open(&layers_of(folder), false);
        assert!(encoded_bytes(&volume) > model.len() as u64 / 8, "{what}: little of it is compressed");
        same(&format!("{what}: we read it"), &read_all(&volume), &model);
    }
    is_sound(folder, what);
    if with_snapshot {
        must_run(folder, &["qemu-img", "snapshot", "-c", "one", "a.qcow2"]);
    }
    for round in 0..2 {
        let volume = open(&layers_of(folder), true);
        for step in 0..60 {
            change(&volume, &mut model, &mut rng);
            if step % 17 == 3 {
                block_on(volume.flush()).unwrap();
                block_on(volume.tidy()).unwrap();
            }
        }
        same(&format!("{what}, round {round}: we read ours"), &read_all(&volume), &model);
        block_on(volume.close()).unwrap();
        drop(volume);
        is_sound(folder, what);
        same(
            &format!("{what}, round {round}: QEMU reads ours"),
            &qemu_reads("a.qcow2", folder, None),
            &model,
        );
        let mut arguments = vec!["qemu-io".to_owned(), "-f".into(), "qcow2".into()];
        for _ in 0..10 {
            let at = rng.u64(0..model.len() as u64 / 1024 - 40);
            let (len, byte) = (1 + rng.u64(0..40), 1 + rng.u64(0..255));
            arguments.extend(["-c".into(), format!("write -P {byte} {at}k {len}k")]);
            model[at as usize * 1024..(at + len) as usize * 1024].fill(byte as u8);
        }
        arguments.push("a.qcow2".into());
        must_run(folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        same(
            &format!("{what}, round {round}: we read QEMU's"),
            &read_all(&open(&layers_of(folder), false)),
            &model,
        );
    }
    if with_snapshot {
        let snapshot = try_open(&layers_of(folder), false, Some("one")).unwrap();
        same(&format!("{what}: the snapshot"), &read_all(&snapshot), &before);
        drop(snapshot);
        block_on(crate::qcow2::delete_snapshot(open_of(&[&folder.join("a.qcow2")], true), "one")).unwrap();
        is_sound(folder, what);
    }
    // Everything is given back in the end.
    let volume = open(&layers_of(folder), true);
    block_on(volume.erase(0, volume.size(), Erase::Discard)).unwrap();
    assert_eq!(encoded_bytes(&volume), 0);
    block_on(volume.close()).unwrap();
    let found = check(&[&folder.join("a.qcow2")], None);
    assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{what}");
    // A cluster in which the disk ends may stay.
    assert!(found.allocated_bytes < 64 << 10, "{what}: {} bytes are left", found.allocated_bytes);
}

#[test]
fn images_of_qemu() {
    if !have_qemu() {
        return;
    }
    for (number, (size_kib, options)) in MATRIX.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let model = of_qemu(folder.path(), *size_kib, options, 11 + number as u64);
        used(folder.path(), model, options, 40 + number as u64);
    }
}

#[test]
fn images_of_ours() {
    if !have_qemu() {
        return;
    }
    for (number, (size_kib, options)) in MATRIX.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let model = of_ours(folder.path(), *size_kib, options, 31 + number as u64);
        same(&format!("{options}: QEMU reads it"), &qemu_reads("a.qcow2", folder.path(), None), &model);
        let ours = std::fs::metadata(folder.path().join("a.qcow2")).unwrap().len();
        used(folder.path(), model, options, 61 + number as u64);
        let other = tempfile::tempdir().unwrap();
        of_qemu(other.path(), *size_kib, options, 31 + number as u64);
        let theirs = std::fs::metadata(other.path().join("a.qcow2")).unwrap().len();
        assert!(ours < theirs + theirs / 8 + (4 << 20), "{options}: {ours} bytes, QEMU needs {theirs}");
    }
}

#[test]
fn a_disk_that_ends_within_a_compressed_cluster_grows_and_shrinks() {
    if !have_qemu() {
        return;
    }
    for options in ["compression_type=zstd", "compression_type=zlib,extended_l2=on", "compat=0.10"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let mut model = vec![7; 100 << 10];
        std::fs::write(path.join("a.raw"), &model).unwrap();
        must_run(
            path,
            &["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2"],
        );
        block_on(crate::qcow2::shrink(open_of(&[&path.join("a.qcow2")], true), 70 << 10)).unwrap();
        let volume = open(&layers_of(path), true);
        block_on(volume.resize(200 << 10)).unwrap();
        block_on(volume.close()).unwrap();
        model.truncate(70 << 10);
        model.resize(200 << 10, 0);
        same(options, &read_all(&open(&layers_of(path), false)), &model);
        same(options, &qemu_reads("a.qcow2", path, None), &model);
        is_sound(path, options);
    }
}

/// An image of ours with 16 compressed clusters of 4 KiB; its bytes, and the offset of the L2 table.
fn small(folder: &Path) -> (Vec<u8>, Vec<u8>, usize) {
    let file: Rc<dyn ImageFile> = DiskFile::open(&folder.join("a.qcow2"), true);
    let options = vec![("cluster_size".to_owned(), "4k".to_owned())];
    block_on(Qcow2.create(
        file,
        Vec::new(),
        &Create { size: Some(1 << 20), backing: None, options, key: None },
    ))
    .unwrap();
    let volume = open(&layers_of(folder), true);
    let mut model = vec![0; 1 << 20];
    let units = (0..16u64).map(|number| {
        let mut rng = fastrand::Rng::with_seed(number + 1);
        let bytes: Vec<u8> = (0..4096).map(|_| rng.u8(..) & 0x3f).collect();
        model[number as usize * 4096..][..4096].copy_from_slice(&bytes);
        (number * 4096, codec::encode(Method::Deflate, &bytes, 4095).unwrap())
    });
    let units = units.collect();
    block_on(volume.write_encoded(units)).unwrap();
    block_on(volume.close()).unwrap();
    let bytes = std::fs::read(folder.join("a.qcow2")).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = be64(be64(40) as usize) & 0x00ff_ffff_ffff_fe00;
    (bytes, model, table as usize)
}

#[test]
fn damage_is_an_error_for_its_own_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let (good, model, table) = small(folder.path());
    let word = u64::from_be_bytes(good[table + 24..table + 32].try_into().unwrap());
    let (offset_bits, sector) = (62 - 4, 1u64 << 58);
    let offset = (word & ((1 << offset_bits) - 1)) as usize;
    let bomb = codec::encode(Method::Deflate, &vec![0; 1 << 20], 4095).unwrap();
    let short = codec::encode(Method::Deflate, &[1; 4000], 4095).unwrap();
    // What becomes of the bytes or the entry of the fourth cluster; a word of the message.
    let entry = |word: u64| (table + 24, word.to_be_bytes().to_vec());
    let cases: Vec<((usize, Vec<u8>), &str)> = vec![
        ((offset, vec![0xff; 40]), "no sound deflate stream"),
        ((offset, bomb), "more than 4096 bytes"),
        ((offset, short), "4000 bytes instead of 4096"),
        (entry(word & !(0xf * sector)), "end within"),
        (entry((1 << 62) | (0xf * sector) | (good.len() as u64 - 100)), "behind the end"),
        (entry(word | 1 << 50), "behind the end"),
        (entry(1 << 62 | 8), "in the header"),
        (entry(1 << 62 | table as u64 | 100), "compressed"),
        (entry(word | 1 << 63), "flags that exclude"),
    ];
    for (change, expected) in cases {
        let mut bytes = good.clone();
        let (at, new) = change;
        // Streams that are longer than the one that was there harm their neighbour, too: only the fourth is looked at.
        bytes[at..at + new.len()].copy_from_slice(&new);
        std::fs::write(&path, &bytes).unwrap();
        let volume = open(&layers_of(folder.path()), true);
        let memory = Memory::new(4096);
        let window = Window { memory: &memory, volume: &volume, at: 0 };
        let error = block_on(volume.read(3 * 4096, 512, &window)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Corrupt, "{expected}: {error}");
        assert!(error.message.contains("a.qcow2") && error.message.contains("12288"), "{error}");
        assert!(error.message.contains(expected), "{error} lacks {expected:?}");
        // A write of a part needs the rest; everything else goes on.
        let part = block_on(volume.write(3 * 4096, 512, &window));
        assert_eq!(part.unwrap_err().kind, ErrorKind::Corrupt, "{expected}");
        same(expected, &read(&volume, 0, 3 * 4096), &model[..3 * 4096]);
        if at == table + 24 {
            same(expected, &read(&volume, 4 * 4096, 12 * 4096), &model[4 * 4096..16 * 4096]);
        }
        write(&volume, 7 * 4096, &[9; 512]);
        block_on(volume.close()).unwrap();
        assert_eq!(read(&open(&layers_of(folder.path()), false), 7 * 4096, 512), [9; 512]);
    }
}

#[test]
fn a_wrong_type_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let (good, ..) = small(folder.path());
    for (kind, bit, word) in [(1, 0, "zstd"), (0, 8, "zlib")] {
        let mut bytes = good.clone();
        bytes[104] = kind;
        bytes[79] |= bit;
        std::fs::write(&path, &bytes).unwrap();
        let error = try_open(&layers_of(folder.path()), false, None).unwrap_err();
        assert!(error.kind == ErrorKind::Corrupt && error.message.contains(word), "{error}");
    }
}
