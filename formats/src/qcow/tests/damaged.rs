//! Goal: what is refused is refused by name, and damage harms nothing else. Method: a sound image, and one field, entry or stream of it
//! changed at a time.

use futures_lite::future::block_on;

use super::*;
use crate::codec::{self, Method};
use crate::error::ErrorKind;
use crate::qcow2::tests::rig::{open, read, same, try_open, write};
use crate::volume::{Memory, Window};

#[test]
fn what_is_refused_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow");
    create(&path, 4 << 20, None, "").unwrap();
    let good = std::fs::read(&path).unwrap();
    // Offset, bytes, kind, a word of the message.
    let cases: &[(usize, &[u8], ErrorKind, &str)] = &[
        (0, b"QFX", ErrorKind::WrongFormat, "no qcow image"),
        (4, &[0, 0, 0, 2], ErrorKind::Unsupported, "qcow2:"),
        (4, &[0, 0, 0, 9], ErrorKind::Unsupported, "version 9"),
        (8, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 5], ErrorKind::Corrupt, "backing file"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 9, 0], ErrorKind::Corrupt, "backing file"),
        (24, &[0; 8], ErrorKind::Corrupt, "disk has 0 bytes"),
        (24, &[0x7f; 8], ErrorKind::Corrupt, "disk has"),
        (32, &[8], ErrorKind::Corrupt, "cluster bits are 8"),
        (32, &[40], ErrorKind::Corrupt, "cluster bits are 40"),
        (33, &[3], ErrorKind::Corrupt, "L2 bits 3"),
        (36, &[0, 0, 0, 1], ErrorKind::Unsupported, "AES"),
        (36, &[0, 0, 0, 7], ErrorKind::Unsupported, "encryption method 7"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 8], ErrorKind::Corrupt, "L1 table of 16 bytes is at 8"),
        (40, &[0xff; 8], ErrorKind::Corrupt, "L1 table"),
        (40, &[0, 0, 0, 0, 0, 0, 16, 4], ErrorKind::Corrupt, "L1 table"),
    ];
    for (offset, bytes, kind, word) in cases {
        let mut bad = good.clone();
        bad[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        let error = try_open(&layers(folder.path()), false, None).unwrap_err();
        assert_eq!(error.kind, *kind, "{error}");
        assert!(error.message.contains(word) && error.message.contains("a.qcow"), "{error} lacks {word:?}");
    }
    std::fs::write(&path, &good).unwrap();
    for (options, word) in [
        ("cluster_size=3k", "power of two"),
        ("compat=1", "cluster_size, extended"),
        ("extended=2", "on or off"),
    ] {
        let error = create(&folder.path().join("b"), 1 << 20, None, options).unwrap_err();
        assert!(error.kind == ErrorKind::Invalid && error.message.contains(word), "{error} lacks {word:?}");
    }
    assert!(create(&folder.path().join("b"), 1 << 50, None, "").unwrap_err().message.contains("up to"));
}

#[test]
fn damage_is_an_error_for_its_own_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow");
    create(&path, 4 << 20, None, "").unwrap();
    let volume = open(&layers(folder.path()), true);
    write(&volume, 0, &[3; 8192]);
    let bytes: Vec<u8> = (0..4096u32).map(|at| (at * at / 7) as u8 & 0x3f).collect();
    let unit = |number: u64| (number * 4096, codec::encode(Method::Deflate, &bytes, 4095).unwrap());
    block_on(volume.write_encoded(vec![unit(2), unit(3)])).unwrap();
    block_on(volume.close()).unwrap();
    let good = std::fs::read(&path).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let table = be64(4096) as usize;
    let (first, word) = (be64(table), be64(table + 24));
    let (offset, len) = ((word & ((1 << 51) - 1)) as usize, 1u64 << 51);
    let bomb = codec::encode(Method::Deflate, &vec![0; 1 << 20], 4095).unwrap();
    let entry = |word: u64| (table + 24, word.to_be_bytes().to_vec());
    // What is changed for the fourth cluster, what the message says, and whether a check sees it.
    let cases = [
        ((offset, vec![0xff; 30]), "no sound deflate stream", false),
        ((offset, bomb), "", false),
        (entry(word - len), "end within", false),
        (entry(word & !(0xfff * len)), "has no bytes", true),
        (entry(word | 1 << 45), "behind the end", true),
        (entry(1 << 40), "behind the end", true),
        (entry(4096), "points to metadata", true),
        (entry(table as u64), "points to metadata", true),
        (entry(first + 512), "no start of a cluster", true),
    ];
    for ((at, new), expected, is_seen) in cases {
        let mut bytes = good.clone();
        bytes.resize((at + new.len()).max(good.len()), 0);
        bytes[at..at + new.len()].copy_from_slice(&new);
        std::fs::write(&path, &bytes).unwrap();
        let volume = open(&layers(folder.path()), true);
        let memory = Memory::new(4096);
        let window = Window { memory: &memory, volume: &volume, at: 0 };
        let error = block_on(volume.read(3 * 4096, 512, &window)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Corrupt, "{expected}: {error}");
        assert!(
            error.message.contains("12288") && error.message.contains(expected),
            "{error} lacks {expected:?}"
        );
        assert_eq!(read(&volume, 0, 8192), [3; 8192]);
        write(&volume, 1 << 20, &[9; 512]);
        block_on(volume.close()).unwrap();
        assert_eq!(check(&path, None).corruptions_total > 0, is_seen, "{expected}");
    }
    // Two entries with one place: only a check can see that.
    let mut bytes = good.clone();
    bytes[table + 8..table + 16].copy_from_slice(&first.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let found = check(&path, None);
    assert!(found.corruptions[0].contains("used otherwise"), "{:?}", found.corruptions);
    // Two L1 entries with one table, and a table behind the end.
    for (word, expected) in [(table as u64, "lies on that"), (1 << 40, "names no place")] {
        let mut bytes = good.clone();
        bytes[4104..4112].copy_from_slice(&word.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let found = check(&path, None);
        assert!(found.corruptions[0].contains(expected), "{:?}", found.corruptions);
    }
}

#[test]
fn what_a_crash_left_is_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow");
    create(&path, 4 << 20, None, "").unwrap();
    let volume = open(&layers(folder.path()), true);
    write(&volume, 5000, &[3; 8192]);
    // Nobody closes it.
    block_on(volume.flush()).unwrap();
    drop(volume);
    let found = check(&path, None);
    assert!(found.leaks_total > 0 && found.corruptions_total == 0, "{:?}", found.corruptions);
    let repaired = check(&path, Some(Repair::Leaks));
    assert_eq!(repaired.repaired_total, found.leaks_total);
    is_sound(&path, "repaired");
    same("repaired", &read(&open(&layers(folder.path()), false), 5000, 8192), &[3; 8192]);
}
