//! Goal: whatever a file holds, the driver neither panics nor hangs nor changes what was opened read-only, and says what is wrong.
//! Method: small images of several kinds, with random bytes in header and tables; opened, read, checked; a time limit is the test
//! runner's. Known damage has known answers.

use std::rc::Rc;

use futures_lite::future::block_on;

use super::rig::*;
use crate::driver::Format;
use crate::error::ErrorKind;
use crate::qcow2::Qcow2;
use crate::volume::{Memory, Window};

/// Small images with everything in them, as bytes.
fn seeds(folder: &tempfile::TempDir) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for options in [
        &[("cluster_size", "512")][..],
        &[("cluster_size", "4096"), ("refcount_bits", "1")],
        &[("cluster_size", "16384"), ("extended_l2", "on")],
    ] {
        let path = folder.path().join("seed.qcow2");
        let _ = std::fs::remove_file(&path);
        create(&path, 200 << 10, None, options).unwrap();
        let volume = open(&[("qcow2", vec![path.clone()])], true);
        let mut model = vec![0; 200 << 10];
        let mut rng = Rng(12);
        for _ in 0..30 {
            change(&volume, &mut model, &mut rng);
        }
        block_on(volume.close()).unwrap();
        if options[0].1 != "4096" {
            block_on(crate::qcow2::create_snapshot(open_of(&[&path], true), "one")).unwrap();
        }
        seeds.push(std::fs::read(&path).unwrap());
    }
    seeds
}

/// Changes some bytes, mostly where tables are.
fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let len = bytes.len() as u64;
        let at = match rng.below(4) {
            0 => rng.below(112),
            1 => rng.below(len.div_ceil(8)) * 8,
            _ if len > 128 => {
                // A table that the header names.
                let field = [40, 48, 64][rng.below(3) as usize];
                let offset = u64::from_be_bytes(bytes[field..field + 8].try_into().unwrap());
                (offset.wrapping_add(rng.below(96))) % len
            }
            _ => rng.below(len),
        } as usize;
        let at = at.min(bytes.len() - 1);
        match rng.below(4) {
            0 => bytes[at] = rng.next() as u8,
            1 => bytes[at] ^= 1 << rng.below(8),
            2 => {
                let end = (at + 8).min(bytes.len());
                let value = [0, u64::MAX, 1 << 63 | 512, 1 << 62, len, len.saturating_sub(512), 1 << 40]
                    [rng.below(7) as usize]
                    .to_be_bytes();
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
            _ if rng.below(8) == 0 => bytes.truncate(at.max(1)),
            _ => bytes[at] = 0,
        }
    }
}

#[test]
fn mutated_images_are_answered_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let seeds = seeds(&folder);
    let rounds = std::env::var("QCOW2_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(400u64);
    let mut opened = 0;
    for round in 0..rounds {
        let mut rng = Rng(0x9e37_79b9 + round * 7919);
        let mut bytes = seeds[(round % 3) as usize].clone();
        mutate(&mut bytes, &mut rng);
        std::fs::write(&path, &bytes).unwrap();
        let file = DiskFile::open(&path, false);
        let described = block_on(Qcow2.describe(file.clone()));
        if let Ok(volume) = try_open(&[("qcow2", vec![path.clone()])], false, None) {
            opened += 1;
            assert!(described.is_ok());
            let end = volume.size().min(1 << 20);
            let memory = Memory::new(4096);
            for at in (0..end.saturating_sub(4096)).step_by(4096) {
                let _ = block_on(volume.read(at, 4096, &Window { memory: &memory, volume: &volume, at: 0 }));
            }
        }
        let _ = try_open(&[("qcow2", vec![path.clone()])], false, Some("one"));
        let _ = block_on(Qcow2.check(open_of(&[&path], false), None));
        assert_eq!(file.forbidden.get(), 0);
        assert!(std::fs::read(&path).unwrap() == bytes, "round {round}: a read-only image was changed");
        // Writable: errors are fine, panics and endless work are not.
        if let Ok(volume) = try_open(&[("qcow2", vec![path.clone()])], true, None) {
            for _ in 0..20 {
                let at = rng.below(volume.size().min(1 << 20) / 512) * 512;
                let memory = Memory::new(1024);
                let window = Window { memory: &memory, volume: &volume, at: 0 };
                if at + 1024 <= volume.size() {
                    let _ = block_on(volume.write(at, 1024, &window));
                    let _ = block_on(volume.erase(at, 1024, crate::driver::Erase::Discard));
                }
            }
            let _ = block_on(volume.close());
        }
        let _ = block_on(Qcow2.check(open_of(&[&path], true), Some(crate::driver::Repair::All)));
    }
    assert!(
        opened > rounds / 4,
        "only {opened} of {rounds} mutated images opened: the test looks at nothing"
    );
}

#[test]
fn what_is_refused_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(&path, 1 << 20, None, &[]).unwrap();
    let good = std::fs::read(&path).unwrap();
    // Offset, bytes, kind, a word of the message.
    let cases: &[(usize, &[u8], ErrorKind, &str)] = &[
        (0, b"QFX", ErrorKind::WrongFormat, "no qcow2 image"),
        (4, &[0, 0, 0, 1], ErrorKind::Unsupported, "version 1"),
        (4, &[0, 0, 0, 9], ErrorKind::Unsupported, "version 9"),
        (20, &[0, 0, 0, 8], ErrorKind::Corrupt, "cluster bits are 8"),
        (20, &[0, 0, 0, 40], ErrorKind::Corrupt, "cluster bits are 40"),
        (32, &[0, 0, 0, 1], ErrorKind::Unsupported, "AES"),
        (32, &[0, 0, 0, 2], ErrorKind::Unsupported, "LUKS"),
        (24, &[0x7f; 8], ErrorKind::Corrupt, "disk has"),
        (24, &[0, 0, 1, 0, 0, 0, 0, 0], ErrorKind::Corrupt, "L1 table has 1 entries"),
        (40, &[0, 0, 0, 0, 0, 0, 2, 0], ErrorKind::Corrupt, "L1 table is at 512"),
        (48, &[0, 0, 0, 0, 0, 0, 0, 0], ErrorKind::Corrupt, "refcount table is at 0"),
        (56, &[0, 0, 0, 0], ErrorKind::Corrupt, "no refcount table"),
        (60, &[0, 2, 0, 0], ErrorKind::Corrupt, "snapshots"),
        (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], ErrorKind::Unsupported, "bit 63"),
        (96, &[0, 0, 0, 7], ErrorKind::Corrupt, "refcount order is 7"),
        (100, &[0, 0, 0, 8], ErrorKind::Corrupt, "header has 8 bytes"),
        (104, &[3], ErrorKind::Unsupported, "compression type is 3"),
        (112 + 4, &[0xff; 4], ErrorKind::Corrupt, "extension"),
    ];
    for (offset, bytes, kind, word) in cases {
        let mut bad = good.clone();
        bad[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        let error = try_open(&[("qcow2", vec![path.clone()])], false, None).unwrap_err();
        assert_eq!(error.kind, *kind, "{error}");
        assert!(error.message.contains(word) && error.message.contains("a.qcow2"), "{error} lacks {word:?}");
    }
    // A feature with a name in the table is refused by that name.
    let mut bad = good.clone();
    let at = bad.windows(9).position(|window| window == b"dirty bit").unwrap() - 2;
    bad[at..at + 12].copy_from_slice(b"\x00\x09time loop\x00");
    bad[78] = 2;
    std::fs::write(&path, &bad).unwrap();
    let error = try_open(&[("qcow2", vec![path.clone()])], false, None).unwrap_err();
    assert!(error.message.contains("time loop"), "{error}");
    // Compatible and autoclear features that nobody knows do not matter; the first change clears the latter.
    let mut odd = good.clone();
    odd[80] = 0x80;
    odd[88] = 0x80;
    std::fs::write(&path, &odd).unwrap();
    let volume = open(&[("qcow2", vec![path.clone()])], true);
    assert_eq!(std::fs::read(&path).unwrap()[88], 0x80);
    write(&volume, 0, &[1; 512]);
    block_on(volume.close()).unwrap();
    let after = std::fs::read(&path).unwrap();
    assert_eq!((after[80], after[88]), (0x80, 0));
}

#[test]
fn backing_names_are_plain_paths() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    for (name, word) in
        [("json:{\"file\":1}", "json:"), ("nbd://host/x", "protocol"), ("ssh:host", "protocol")]
    {
        // As long as a name that we write, so that it can be put in its place.
        let stand_in: String = "x".repeat(name.len());
        create(&path, 1 << 20, Some((std::path::Path::new(&stand_in), "raw")), &[]).unwrap();
        let error = create(&path, 1 << 20, Some((std::path::Path::new(name), "raw")), &[]).unwrap_err();
        assert!(error.message.contains(word), "{error}");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(stand_in.len()).rposition(|window| window == stand_in.as_bytes()).unwrap();
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let error = block_on(Qcow2.describe(DiskFile::open(&path, false))).unwrap_err();
        assert!(error.kind == ErrorKind::Unsupported && error.message.contains(word), "{error}");
    }
    create(&path, 1 << 20, Some((std::path::Path::new("../b:c.raw"), "raw")), &[]).unwrap();
    let link = block_on(Qcow2.describe(DiskFile::open(&path, false))).unwrap().backing.unwrap();
    assert_eq!((link.paths, link.format), (vec!["../b:c.raw".to_owned()], Some("raw".to_owned())));
    // An image with a backing file is not opened without it.
    let mut open = open_of(&[&path], false);
    open.below_size = None;
    assert_eq!(block_on(Qcow2.open(open)).err().unwrap().kind, ErrorKind::Missing);
}

#[test]
fn bad_options_are_refused_with_the_known_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("cluster-size", "1")], "cluster_size, compat"),
        (&[("cluster_size", "3k")], "power of two"),
        (&[("cluster_size", "4M")], "512 to 2M"),
        (&[("refcount_bits", "3")], "1, 2, 4"),
        (&[("compat", "2")], "0.10 or 1.1"),
        (&[("compat", "0.10"), ("extended_l2", "on")], "compat=1.1"),
        (&[("extended_l2", "on"), ("cluster_size", "8k")], "16k"),
        (&[("data_file_raw", "on")], "needs data_file"),
        (&[("lazy_refcounts", "maybe")], "on or off"),
        (&[("preallocation", "some")], "metadata"),
    ];
    for (options, word) in cases {
        let error = create(&path, 1 << 20, None, options).unwrap_err();
        assert!(error.kind == ErrorKind::Invalid && error.message.contains(word), "{error} lacks {word:?}");
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "a refused create writes nothing");
    assert!(
        create(&path, 64 << 40, None, &[("cluster_size", "512")]).unwrap_err().message.contains("too large")
    );
    create(&path, 64 << 40, None, &[]).unwrap();
    let volume = open(&[("qcow2", vec![path.clone()])], true);
    write(&volume, (64 << 40) - 4096, &[6; 4096]);
    assert_eq!(read(&volume, (64 << 40) - 4096, 4096), vec![6; 4096]);
    block_on(volume.close()).unwrap();
    assert_eq!(check(&[&path], None).corruptions_total, 0);
    let file: Rc<DiskFile> = DiskFile::open(&path, false);
    assert_eq!(block_on(Qcow2.describe(file)).unwrap().size, 64 << 40);
}
