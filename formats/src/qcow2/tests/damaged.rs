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
        let mut rng = fastrand::Rng::with_seed(12);
        for _ in 0..30 {
            change(&volume, &mut model, &mut rng);
        }
        block_on(volume.close()).unwrap();
        if options[0].1 != "4096" {
            block_on(crate::qcow2::create_snapshot(open_of(&[&path], true), "one")).unwrap();
        }
        seeds.push(std::fs::read(&path).unwrap());
    }
    let mut bytes = seeds[1].clone();
    add_bitmaps(&mut bytes, &[Table { entries: 4, bits: 1 }]);
    let path = folder.path().join("seed.qcow2");
    std::fs::write(&path, &bytes).unwrap();
    check(&[&path], Some(crate::driver::Repair::All));
    let found = check(&[&path], None);
    assert_eq!((found.corruptions, found.leaks), (Vec::new(), Vec::new()), "the bitmap's clusters count");
    seeds.push(std::fs::read(&path).unwrap());
    seeds
}

/// A table of a bitmap: its entries, of which the first `bits` have a cluster.
#[derive(Clone, Copy)]
struct Table {
    entries: u64,
    bits: u64,
}

/// Appends zeroes up to the next cluster and a stretch of `len` zeroes; returns where that begins.
fn append(bytes: &mut Vec<u8>, len: u64) -> u64 {
    let cluster = 1 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let start = bytes.len().next_multiple_of(cluster);
    bytes.resize((start + len as usize).next_multiple_of(cluster), 0);
    start as u64
}

fn put(bytes: &mut [u8], at: u64, value: &[u8]) {
    bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
}

/// Where the extension that names the bitmaps is in the header: its data.
fn bitmaps_extension(bytes: &[u8]) -> Option<u64> {
    let mut at = u32::from_be_bytes(bytes.get(100..104)?.try_into().unwrap()) as usize;
    loop {
        let kind = u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().unwrap());
        let len = u32::from_be_bytes(bytes.get(at + 4..at + 8)?.try_into().unwrap()) as usize;
        match kind {
            0x2385_2875 => return Some(at as u64 + 8),
            0 => return None,
            _ => at = at.checked_add(8)?.checked_add(len.next_multiple_of(8))?,
        }
    }
}

/// Gives an image bitmaps as the specification lays them out; their refcounts stay zero. Returns the offset of the first table.
fn add_bitmaps(bytes: &mut Vec<u8>, tables: &[Table]) -> u64 {
    let mut places = Vec::new();
    for table in tables {
        let at = append(bytes, table.entries * 8);
        for entry in 0..table.bits {
            let bits = append(bytes, 1);
            put(bytes, at + entry * 8, &bits.to_be_bytes());
        }
        places.push((at, table.entries));
    }
    add_directory(bytes, &places);
    places[0].0
}

/// Writes a directory of bitmaps with these tables (offset, entries), and names it in the header.
fn add_directory(bytes: &mut Vec<u8>, tables: &[(u64, u64)]) {
    let directory = append(bytes, tables.len() as u64 * 32);
    for (number, (offset, entries)) in (0u64..).zip(tables) {
        let at = directory + number * 32;
        put(bytes, at, &offset.to_be_bytes());
        put(bytes, at + 8, &(*entries as u32).to_be_bytes());
        // Auto; dirty tracking of 64 KiB; a name of eight bytes.
        put(bytes, at + 12, &[0, 0, 0, 2, 1, 16, 0, 8]);
        put(bytes, at + 24, format!("bits{number:04}").as_bytes());
    }
    let mut at = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    while bytes[at..at + 4] != [0; 4] {
        at += 8 + u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap()).next_multiple_of(8) as usize;
    }
    let mut extension = Vec::new();
    extension.extend_from_slice(&0x2385_2875u32.to_be_bytes());
    extension.extend_from_slice(&24u32.to_be_bytes());
    extension.extend_from_slice(&(tables.len() as u32).to_be_bytes());
    extension.extend_from_slice(&[0; 4]);
    extension.extend_from_slice(&(tables.len() as u64 * 32).to_be_bytes());
    extension.extend_from_slice(&directory.to_be_bytes());
    put(bytes, at as u64, &extension);
    // Autoclear: they are consistent.
    bytes[95] |= 1;
}

/// A check, and the opening of an image that was not closed, of hostile bytes: answered with damage, and read no more often than
/// a sound image of this length would be.
fn refused_soon(path: &std::path::Path, bytes: &mut [u8], what: &str) {
    // Dirty, so that it is repaired when it is opened.
    bytes[79] |= 1;
    std::fs::write(path, &*bytes).unwrap();
    let length = bytes.len() as u64;
    let file = DiskFile::open(path, true);
    let open = || crate::driver::Open { files: vec![file.clone()], ..open_of(&[], true) };
    let found = block_on(Qcow2.check(open(), None)).unwrap();
    assert!(found.corruptions_total > 0, "{what}: nothing is found");
    assert!(found.corruptions_total <= 10_000, "{what}: {} corruptions", found.corruptions_total);
    assert!(file.read_bytes.get() < 4 * length, "{what}: {} bytes of {length} read", file.read_bytes.get());
    file.read_bytes.set(0);
    let error = block_on(Qcow2.open(open())).err().unwrap();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{what}: {error}");
    assert!(file.read_bytes.get() < 8 * length, "{what}: {} bytes of {length} read", file.read_bytes.get());
}

#[test]
fn hostile_tables_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(&path, 1 << 20, None, &[("cluster_size", "4096")]).unwrap();
    let good = std::fs::read(&path).unwrap();
    // A directory without an end.
    for directory_bytes in [1u64 << 36, 1 << 62, u64::MAX, u64::MAX - 4095] {
        let mut bytes = good.clone();
        add_bitmaps(&mut bytes, &[Table { entries: 4, bits: 1 }]);
        let at = bitmaps_extension(&bytes).unwrap() + 8;
        put(&mut bytes, at, &directory_bytes.to_be_bytes());
        refused_soon(&path, &mut bytes, &format!("a directory of {directory_bytes} bytes"));
        // Read-only it is served: nothing there is needed for that.
        let volume = open(&[("qcow2", vec![path.clone()])], false);
        assert_eq!(read(&volume, 0, 4096), vec![0; 4096]);
    }
    // Thousands of bitmaps with one table.
    let mut bytes = good.clone();
    let table = append(&mut bytes, 4096);
    for entry in 0..512 {
        put(&mut bytes, table + entry * 8, &table.to_be_bytes());
    }
    add_directory(&mut bytes, &vec![(table, 512); 3000]);
    refused_soon(&path, &mut bytes, "3000 bitmaps of one table");
    // One bitmap whose bits are all in one place.
    let mut bytes = good.clone();
    let table = add_bitmaps(&mut bytes, &[Table { entries: 512, bits: 1 }]);
    let bits = bytes[table as usize..table as usize + 8].to_vec();
    (1..512).for_each(|entry| put(&mut bytes, table + entry * 8, &bits));
    refused_soon(&path, &mut bytes, "a bitmap with one cluster");
    // Hundreds of snapshots whose L1 tables overlap.
    let mut bytes = good.clone();
    let first = append(&mut bytes, 1 << 20);
    let snapshots = append(&mut bytes, 400 * 64);
    for number in 0..400 {
        let at = snapshots + number * 64;
        put(&mut bytes, at, &(first + number % 200 * 4096).to_be_bytes());
        put(&mut bytes, at + 8, &16384u32.to_be_bytes());
        put(&mut bytes, at + 12, &[0, 4, 0, 4]);
        put(&mut bytes, at + 36, &16u32.to_be_bytes());
        put(&mut bytes, at + 40 + 8, &(1u64 << 20).to_be_bytes());
        put(&mut bytes, at + 56, format!("{number:04}{number:04}").as_bytes());
    }
    put(&mut bytes, 60, &400u32.to_be_bytes());
    put(&mut bytes, 64, &snapshots.to_be_bytes());
    refused_soon(&path, &mut bytes, "400 snapshots with overlapping tables");
}

/// Changes some bytes, mostly where tables are.
fn mutate(bytes: &mut Vec<u8>, rng: &mut fastrand::Rng) {
    for _ in 0..1 + rng.u64(..3) {
        let len = bytes.len() as u64;
        let at = match rng.u64(..4) {
            0 => rng.u64(..112),
            1 => rng.u64(..len.div_ceil(8)) * 8,
            _ if len > 128 => {
                // A table that the header names.
                let fields =
                    [Some(40), Some(48), Some(64), bitmaps_extension(bytes).map(|at| at as usize + 16)];
                let field = fields[rng.u64(..4) as usize].filter(|at| at + 8 <= bytes.len()).unwrap_or(40);
                let offset = u64::from_be_bytes(bytes[field..field + 8].try_into().unwrap());
                (offset.wrapping_add(rng.u64(..96))) % len
            }
            _ => rng.u64(..len),
        } as usize;
        let at = at.min(bytes.len() - 1);
        match rng.u64(..4) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes[at] ^= 1 << rng.u64(..8),
            2 => {
                let end = (at + 8).min(bytes.len());
                let value = [0, u64::MAX, 1 << 63 | 512, 1 << 62, len, len.saturating_sub(512), 1 << 40]
                    [rng.u64(..7) as usize]
                    .to_be_bytes();
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
            _ if rng.u64(..8) == 0 => bytes.truncate(at.max(1)),
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
        let mut rng = fastrand::Rng::with_seed(0x9e37_79b9 + round * 7919);
        let mut bytes = seeds[(round % seeds.len() as u64) as usize].clone();
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
                let at = rng.u64(..=volume.size().min(1 << 20) / 512) * 512;
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
        (32, &[0, 0, 0, 1], ErrorKind::Missing, "no key was given"),
        (32, &[0, 0, 0, 2], ErrorKind::Corrupt, "LUKS"),
        (32, &[0, 0, 0, 3], ErrorKind::Unsupported, "encryption method is 3"),
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
