//! Goal: check finds and repairs what is wrong; snapshots are what QEMU means by them.
//! Method: damage of one kind at a time, made in the bytes or by QEMU; both checkers afterwards. Snapshots made by one side, read by the
//! other.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use futures_lite::future::block_on;

use super::rig::*;
use crate::driver::Repair;
use crate::qcow2::{apply_snapshot, create_snapshot, delete_snapshot, list_snapshots};

fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

fn peek(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// An image with some data: 64 KiB clusters, refcounts of 16 bits.
fn sample(folder: &tempfile::TempDir, options: &[(&str, &str)]) -> (PathBuf, Vec<u8>) {
    let path = folder.path().join("a.qcow2");
    create(&path, 16 << 20, None, options).unwrap();
    let mut model = vec![0; 16 << 20];
    let volume = open(&[("qcow2", vec![path.clone()])], true);
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..60 {
        change(&volume, &mut model, &mut rng);
    }
    write(&volume, 0, &[9; 4096]);
    model[..4096].fill(9);
    block_on(volume.close()).unwrap();
    (path, model)
}

#[test]
fn damage_is_found_and_repaired() {
    // Field to damage; what is written; corruption is expected (else a leak).
    type Damage = fn(&Path);
    let cases: &[(&str, Damage, bool)] = &[
        ("a refcount too low", |path| poke(path, peek(path, peek(path, 48)) + 2 * 4, &[0, 0]), true),
        ("a refcount too high", |path| poke(path, peek(path, peek(path, 48)) + 2 * 4, &[0, 7]), false),
        ("a leak", |path| poke(path, peek(path, peek(path, 48)) + 2 * 20_000, &[0, 1]), false),
        ("no refcount block", |path| poke(path, peek(path, 48), &[0; 8]), true),
        (
            "a refcount block that is no place",
            |path| poke(path, peek(path, 48), &[0, 0, 0, 0, 0, 0, 2, 0]),
            true,
        ),
        (
            "a refcount block on the L1 table",
            |path| poke(path, peek(path, 48), &peek(path, 40).to_be_bytes()),
            true,
        ),
        (
            "a flag of an L1 entry",
            |path| {
                let entry = peek(path, peek(path, 40)) & !(1 << 63);
                poke(path, peek(path, 40), &entry.to_be_bytes());
            },
            true,
        ),
        (
            "a flag of an L2 entry",
            |path| {
                let table = peek(path, peek(path, 40)) & 0x00ff_ffff_ffff_fe00;
                let entry = peek(path, table) & !(1 << 63);
                poke(path, table, &entry.to_be_bytes());
            },
            true,
        ),
        (
            "the mark dirty, and a refcount too low",
            |path| {
                poke(path, 79, &[1]);
                poke(path, peek(path, peek(path, 48)) + 2 * 4, &[0, 0]);
            },
            true,
        ),
        ("the mark corrupt", |path| poke(path, 79, &[2]), false),
    ];
    for (name, damage, corrupt) in cases {
        let folder = tempfile::tempdir().unwrap();
        let (path, model) = sample(&folder, &[]);
        damage(&path);
        let before = std::fs::read(&path).unwrap();
        let found = check(&[&path], None);
        assert_eq!(std::fs::read(&path).unwrap(), before, "{name}: a check changes nothing");
        assert_eq!(found.corruptions_total > 0, *corrupt, "{name}: {found:?}");
        if *name == "a leak" {
            assert!(found.leaks_total > 0, "{name}: {found:?}");
        }
        check(&[&path], Some(Repair::All));
        let left = check(&[&path], None);
        assert_eq!((left.corruptions, left.leaks), (vec![], vec![]), "{name}");
        if have_qemu() {
            qemu_finds_nothing(folder.path(), "a.qcow2");
        }
        let volume = open(&[("qcow2", vec![path])], true);
        same(name, &read_all(&volume), &model);
    }
}

#[test]
fn damage_that_cannot_be_repaired_stays_and_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (path, model) = sample(&folder, &[]);
    let table = peek(&path, peek(&path, 40)) & 0x00ff_ffff_ffff_fe00;
    let first = peek(&path, table);
    // Two offsets with one cluster, and one that points behind the end.
    poke(&path, table + 8 * 200, &first.to_be_bytes());
    poke(&path, table + 8 * 201, &(1u64 << 63 | 1 << 40).to_be_bytes());
    let found = check(&[&path], Some(Repair::All));
    assert!(found.corruptions.iter().any(|line| line.contains("another offset")), "{found:?}");
    assert!(found.corruptions.iter().any(|line| line.contains("behind the end")), "{found:?}");
    let again = check(&[&path], None);
    assert!(again.corruptions_total >= 2, "{again:?}");
    // The rest is served, writable.
    let volume = open(&[("qcow2", vec![path])], true);
    same("the sound part", &read(&volume, 0, 12 << 20), &model[..12 << 20]);
    let memory = crate::volume::Memory::new(512);
    let window = crate::volume::Window { memory: &memory, volume: &volume, at: 0 };
    let error = block_on(volume.read(201 << 16, 512, &window)).unwrap_err();
    assert_eq!(error.kind, crate::error::ErrorKind::Corrupt);
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_writable_only() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mut model) = sample(&folder, &[("lazy_refcounts", "on")]);
    poke(&path, 79, &[1]);
    poke(&path, peek(&path, peek(&path, 48)) + 2 * 4, &[0, 0]);
    let before = std::fs::read(&path).unwrap();
    let layers = [("qcow2", vec![path.clone()])];
    same("read-only", &read_all(&open(&layers, false)), &model);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let volume = open(&layers, true);
    let mut rng = fastrand::Rng::with_seed(8);
    for _ in 0..20 {
        change(&volume, &mut model, &mut rng);
    }
    block_on(volume.close()).unwrap();
    assert_eq!(check(&[&path], None).corruptions, Vec::<String>::new());
    same("afterwards", &read_all(&open(&layers, false)), &model);
    // The other mark: read-only only, with the reason.
    poke(&path, 79, &[2]);
    let error = try_open(&layers, true, None).unwrap_err();
    assert!(
        error.kind == crate::error::ErrorKind::Corrupt && error.message.contains("marked corrupt"),
        "{error}"
    );
    same("marked corrupt", &read_all(&open(&layers, false)), &model);
}

#[test]
fn snapshots_of_ours_and_of_qemu() {
    if !have_qemu() {
        return;
    }
    for (number, options) in
        ["", "compat=0.10", "extended_l2=on", "cluster_size=512,refcount_bits=8"].iter().enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow2");
        let list: Vec<(&str, &str)> =
            options.split(',').filter_map(|option| option.split_once('=')).collect();
        create(&path, 3 << 20, None, &list).unwrap();
        let layers = [("qcow2", vec![path.clone()])];
        let mut model = vec![0; 3 << 20];
        let mut rng = fastrand::Rng::with_seed(40 + number as u64);
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..4 {
            let volume = open(&layers, true);
            for _ in 0..30 {
                change(&volume, &mut model, &mut rng);
            }
            block_on(volume.close()).unwrap();
            qemu_finds_nothing(folder.path(), "a.qcow2");
            let name = format!("s{round}");
            match round % 2 {
                0 => drop(block_on(create_snapshot(open_of(&[&path], true), &name)).unwrap()),
                _ => drop(must_run(folder.path(), &["qemu-img", "snapshot", "-c", &name, "a.qcow2"])),
            }
            kept.push((name, model.clone()));
            qemu_finds_nothing(folder.path(), "a.qcow2");
            let found = check(&[&path], None);
            assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{options}, round {round}");
        }
        let names: Vec<String> = block_on(list_snapshots(DiskFile::open(&path, false)))
            .unwrap()
            .into_iter()
            .map(|one| one.name)
            .collect();
        assert_eq!(names, ["s0", "s1", "s2", "s3"]);
        for (name, bytes) in &kept {
            let volume = try_open(&layers, false, Some(name)).unwrap();
            same(name, &read_all(&volume), bytes);
            same(name, &qemu_reads("a.qcow2", folder.path(), Some(name)), bytes);
        }
        assert!(try_open(&layers, true, Some("s0")).is_err());
        assert!(try_open(&layers, false, Some("none")).is_err());
        // Back to an old state, on with it; deletes by both.
        block_on(apply_snapshot(open_of(&[&path], true), "s1")).unwrap();
        model = kept[1].1.clone();
        qemu_finds_nothing(folder.path(), "a.qcow2");
        let volume = open(&layers, true);
        same("applied", &read_all(&volume), &model);
        for _ in 0..30 {
            change(&volume, &mut model, &mut rng);
        }
        block_on(volume.close()).unwrap();
        block_on(delete_snapshot(open_of(&[&path], true), "s0")).unwrap();
        qemu_finds_nothing(folder.path(), "a.qcow2");
        must_run(folder.path(), &["qemu-img", "snapshot", "-d", "s3", "a.qcow2"]);
        block_on(delete_snapshot(open_of(&[&path], true), "s1")).unwrap();
        same("s2 after deletes", &qemu_reads("a.qcow2", folder.path(), Some("s2")), &kept[2].1);
        block_on(delete_snapshot(open_of(&[&path], true), "s2")).unwrap();
        qemu_finds_nothing(folder.path(), "a.qcow2");
        let found = check(&[&path], None);
        assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{options}");
        same("at the end", &qemu_reads("a.qcow2", folder.path(), None), &model);
    }
}

#[test]
fn bitmaps_stay_consistent() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    must_run(path, &["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
    must_run(path, &["qemu-img", "bitmap", "--add", "-g", "64k", "a.qcow2", "live"]);
    must_run(path, &["qemu-img", "bitmap", "--add", "--disable", "a.qcow2", "frozen"]);
    must_run(path, &["qemu-io", "-f", "qcow2", "-c", "write 1M 1M", "a.qcow2"]);
    let layers = [("qcow2", vec![path.join("a.qcow2")])];
    let before = std::fs::read(path.join("a.qcow2")).unwrap();
    let volume = open(&layers, true);
    read_all(&volume);
    block_on(volume.close()).unwrap();
    assert_eq!(
        std::fs::read(path.join("a.qcow2")).unwrap(),
        before,
        "nothing was written, nothing is marked"
    );
    let volume = open(&layers, true);
    write(&volume, 4 << 20, &[1; 512]);
    assert_eq!(block_on(volume.resize(9 << 20)).unwrap_err().kind, crate::error::ErrorKind::Unsupported);
    block_on(volume.close()).unwrap();
    qemu_finds_nothing(path, "a.qcow2");
    let found = check(&[&path.join("a.qcow2")], None);
    assert_eq!((found.corruptions, found.leaks_total), (vec![], 0));
    let info = must_run(path, &["qemu-img", "info", "--output=json", "a.qcow2"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    let flags = |name: &str| {
        let one = bitmaps.iter().find(|one| one["name"] == name).unwrap();
        one["flags"]
            .as_array()
            .unwrap()
            .iter()
            .map(|flag| flag.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert!(flags("live").contains(&"in-use".to_owned()), "{bitmaps:?}");
    assert!(!flags("frozen").contains(&"in-use".to_owned()), "{bitmaps:?}");
}
