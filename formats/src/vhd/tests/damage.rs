//! Goal: a damaged image is refused by name or read as far as it is sound; nothing panics, nothing is written unless it was asked
//! for, and `check` finds what is wrong. Method: every byte of headers and tables changed, one at a time; each kind of damage
//! made by hand; every repair followed by a clean check and a look at the bytes.

use std::rc::Rc;

use super::*;
use crate::error::ErrorKind;
use crate::vhd::bat::UNUSED;
use crate::vhd::footer::Footer;
use zerocopy::big_endian::U32;

/// A small image with three of its eight blocks, and its bytes.
fn image(options: &[(&str, &str)]) -> (Pages, Vec<u8>) {
    let mem = mem(&Pages::empty(), true);
    let file: Rc<dyn ImageFile> = mem.clone();
    let size = 8u64 << 12;
    let all = [&[("block_size", "4096"), ("max_size", "64k")][..], options].concat();
    create(&file, Some(size), None, &all);
    let disk = volume(&file, true);
    let mut bytes = vec![0; size as usize];
    for block in [1u64, 4, 6] {
        let data = nonzero(&mut fastrand::Rng::with_seed(block), 4096);
        write(&disk, block << 12, &data).unwrap();
        bytes[(block << 12) as usize..][..4096].copy_from_slice(&data);
    }
    block_on(disk.close()).unwrap();
    drop(disk);
    let made = mem.pages();
    (made, bytes)
}

fn read_only(bytes: &Pages) -> Rc<dyn ImageFile> {
    mem(bytes, false)
}

fn writable(bytes: &Pages) -> (Rc<MemFile>, Rc<dyn ImageFile>) {
    let mem = mem(bytes, true);
    (mem.clone(), mem)
}

/// Where the block table's entry of a block is in [`image`].
fn entry_at(block: u64) -> u64 {
    1536 + block * 4
}

fn entry(bytes: &Pages, block: u64) -> u32 {
    let mut entry = [0; 4];
    bytes.read(entry_at(block), &mut entry);
    u32::from_be_bytes(entry)
}

/// Opens, describes, checks and reads everything that opens; returns the first error.
fn try_all(bytes: &Pages, expected: &[u8]) -> Option<String> {
    let file = read_only(bytes);
    let described = block_on(Vhd.describe(file.clone()));
    let checked = block_on(Vhd.check(open_of(&file, false, None), None));
    let opened = layer(&file, false, None);
    let error = described.err().or(checked.err());
    let layer = match opened {
        Ok(layer) => layer,
        Err(opened) => {
            assert!(opened.message.contains("mem.vhd"), "{opened}");
            return Some(error.unwrap_or(opened).message);
        }
    };
    let disk = Volume::new(vec![layer]).unwrap();
    let mut first = None;
    for at in (0..disk.size().min(1 << 20)).step_by(512) {
        match read(&disk, at, 512) {
            Ok(found) if at < expected.len() as u64 => {
                let same = found == expected[at as usize..at as usize + 512];
                // Damage that no checksum covers may move blocks, but only to other data of the file.
                first = first.or((!same).then(|| "other data".to_owned()));
            }
            Ok(_) => {}
            Err(error) => first = first.or(Some(error.message)),
        }
    }
    first
}

#[test]
fn every_byte_of_headers_and_tables() {
    let (bytes, expected) = image(&[]);
    assert_eq!(try_all(&bytes, &expected), None);
    let end = bytes.length();
    let places = (0..1536 + 64).chain(end - 512..end);
    for at in places {
        for flip in [0x01, 0x80, 0xff] {
            let mut byte = [0];
            bytes.read(at, &mut byte);
            let mut damaged = bytes.clone();
            damaged.write(at, &[byte[0] ^ flip]);
            let problem = try_all(&damaged, &expected);
            match at {
                // The header has no copy.
                512..1536 => assert!(problem.is_some_and(|text| text.contains("dynamic header")), "{at}"),
                // One of two footers.
                0..512 => assert_eq!(problem, None, "{at}"),
                _ if at >= end - 512 => assert_eq!(problem, None, "{at}"),
                // The block table.
                _ => {}
            }
        }
    }
}

#[test]
fn fields_that_make_no_sense() {
    // With right checksums: what is left to notice is the value.
    let (bytes, expected) = image(&[]);
    let sum_again = |bytes: &mut Pages, from: u64, len: usize, at: usize| {
        let mut structure = vec![0; len];
        bytes.read(from, &mut structure);
        structure[at..at + 4].fill(0);
        let sum = crate::vhd::footer::checksum(&structure);
        bytes.write(from + at as u64, &sum.to_be_bytes());
    };
    for (at, value, part) in [
        (512 + 16, vec![0xff; 8], "block table is said"),
        (512 + 16, vec![0, 0, 0, 0, 0, 0, 2, 0], "block table is said"),
        (512 + 16, vec![0, 0, 0, 0, 0, 0, 6, 1], "block table is said"),
        (512 + 24, vec![0, 2, 0, 0], "version"),
        (512 + 28, vec![0, 0, 0, 2], "less than the disk"),
        (512 + 28, vec![0xff; 4], "up to 8388608"),
        (512 + 32, vec![0; 4], "block size of 0"),
        (512 + 32, vec![0, 0, 0x18, 0], "powers of two"),
        (512 + 32, vec![0x80, 0, 0, 0], "powers of two"),
    ] {
        let mut damaged = bytes.clone();
        damaged.write(at, &value);
        sum_again(&mut damaged, 512, 1024, 36);
        let problem = try_all(&damaged, &expected).unwrap();
        assert!(problem.contains(part), "{at}: {problem}");
    }
    let footer = |change: &dyn Fn(&mut Footer)| {
        let mut copy = [0; 512];
        bytes.read(0, &mut copy);
        let mut footer = Footer::parse(&copy).unwrap();
        change(&mut footer);
        let mut damaged = bytes.clone();
        damaged.write(0, &footer.to_bytes());
        damaged.write(bytes.length() - 512, &footer.to_bytes());
        try_all(&damaged, &expected).unwrap()
    };
    assert!(footer(&|footer| footer.disk_type = U32::new(5)).contains("disk type 5"));
    assert!(footer(&|footer| footer.version = U32::new(0x20000)).contains("version"));
    assert!(footer(&|footer| footer.cookie = *b"v_poison").contains("disabled"));
    assert!(footer(&|footer| footer.data_offset = u64::MAX.into()).contains("dynamic header"));
    assert!(footer(&|footer| footer.current_size = 0.into()).contains("0 bytes"));
    assert!(footer(&|footer| footer.current_size = (1 << 60).into()).contains("2040 GiB"));
    assert!(footer(&|footer| footer.disk_type = U32::new(4)).contains("parent"));
    assert!(
        footer(&|footer| {
            footer.disk_type = U32::new(2);
            footer.current_size = (1 << 30).into();
        })
        .contains("before it")
    );
}

#[test]
fn files_that_are_no_vhd() {
    for bytes in [vec![], vec![0; 511], vec![0; 512], nonzero(&mut fastrand::Rng::with_seed(1), 100_000)] {
        let error = layer(&read_only(&Pages::of(&bytes)), false, None).err().unwrap();
        assert_eq!(error.kind, ErrorKind::WrongFormat);
        assert!(!Vhd.recognises(&bytes[..bytes.len().min(65536)], &bytes[bytes.len().saturating_sub(512)..]));
    }
    // A guest of a fixed disk can write what it likes at offset 0.
    let file = empty();
    create(&file, Some(1 << 20), None, &[("type", "fixed")]);
    let (sparse, _) = image(&[]);
    write(&volume(&file, true), 0, &sparse.to_vec()[..8192]).unwrap();
    assert_eq!(describe(&file).size, 1 << 20);
    let fixed_footer = block_on(file.read(1 << 20, 512)).unwrap();
    block_on(file.write(0, fixed_footer)).unwrap();
    block_on(file.truncate(1 << 20)).unwrap();
    assert_eq!(layer(&file, false, None).err().map(|error| error.kind), Some(ErrorKind::WrongFormat));
}

#[test]
fn damaged_entries_are_found_and_their_blocks_not_served() {
    let (bytes, expected) = image(&[]);
    let (one, four) = (entry(&bytes, 1), entry(&bytes, 4));
    for (block, value, part, repaired) in [
        (0u64, 0u32, "headers or tables", false),
        (0, 3, "headers or tables", false),
        (0, four, "overlaps block", false),
        (0, one + 1, "overlaps block", false),
        (0, (bytes.length() / 512) as u32 - 2, "footer", false),
        (0, (bytes.length() / 512) as u32 + 100, "behind the end", true),
        (0, UNUSED - 1, "behind the end", true),
    ] {
        let mut damaged = bytes.clone();
        damaged.write(entry_at(block), &value.to_be_bytes());
        let (mem, file) = writable(&damaged);
        let findings = check(&file, None);
        assert!(findings.corruptions.iter().any(|line| line.contains(part)), "{value:#x}: {findings:?}");
        // Not to be written, to be read where it is sound.
        let error = layer(&file, true, None).err().unwrap();
        assert!(error.kind == ErrorKind::Corrupt && error.message.contains("read-only"), "{error}");
        let disk = volume(&read_only(&damaged), false);
        assert_eq!(read(&disk, block << 12, 512).unwrap_err().kind, ErrorKind::Corrupt);
        assert_eq!(read(&disk, 6 << 12, 4096).unwrap(), expected[6 << 12..7 << 12]);
        let before = mem.pages().to_vec();
        let findings = check(&file, Some(Repair::All));
        assert_eq!(findings.repaired_total > 0, repaired, "{value:#x}: {findings:?}");
        if repaired {
            assert_clean(&file);
            assert_eq!(read(&volume(&file, true), 0, 8 << 12).unwrap(), expected);
        } else {
            assert_eq!(mem.pages().to_vec(), before, "what cannot be repaired is left alone");
        }
    }
}

#[test]
fn a_locator_behind_the_end_takes_no_space() {
    let mem = mem(&Pages::empty(), true);
    let file: Rc<dyn ImageFile> = mem.clone();
    let link = Link { paths: vec!["p.img".to_owned()], format: Some("raw".to_owned()), identity: None };
    create(&file, Some(1 << 20), Some((link, 1 << 20)), &[("block_size", "4096")]);
    let good = mem.pages();
    // The last one begins in the file.
    for offset in [8u64 << 40, u64::MAX - 4096, good.length() + 512, good.length() - 100] {
        let mut header = crate::vhd::header::Header::parse(&{
            let mut bytes = [0; 1024];
            good.read(512, &mut bytes);
            bytes
        })
        .unwrap();
        let last = header.locators.iter().rposition(|entry| entry.platform != [0; 4]).unwrap();
        header.locators[last].offset = offset.into();
        header.locators[last].len = U32::new(4000);
        header.locators[last].space = U32::new(4096);
        let mut damaged = good.clone();
        damaged.write(512, &header.to_bytes());
        let (mem, file) = writable(&damaged);
        assert!(check(&file, None).corruptions.iter().any(|line| line.contains("is not in the file")));
        let driver = layer(&file, true, Some(1 << 20)).unwrap();
        let parent = read_only(&Pages::of(&[0; 1 << 20]));
        let open = open_of(&parent, false, None);
        let below = block_on(crate::raw_driver::Raw.open(open)).unwrap();
        let disk = Volume::new(vec![driver, Layer { driver: below, files: vec![parent] }]).unwrap();
        write(&disk, 8192, &[7; 4096]).unwrap();
        block_on(disk.close()).unwrap();
        let length = mem.pages().length();
        assert!(length < good.length() + (64 << 10), "locator at {offset}: the file has {length} bytes");
        assert_eq!(read(&disk, 8192, 512).unwrap(), [7; 512]);
        assert!(check(&file, None).corruptions.iter().all(|line| line.contains("parent locator")));
        assert!(layer(&file, true, Some(1 << 20)).is_ok());
    }
}

#[test]
fn footers_are_restored_from_each_other() {
    let (bytes, expected) = image(&[]);
    let last = bytes.length() - 512;
    let cut = {
        let mut cut = Pages::empty();
        cut.write(0, &bytes.to_vec()[..last as usize]);
        cut
    };
    let zeroed = |at: u64| {
        let mut damaged = bytes.clone();
        damaged.write(at, &[0; 512]);
        damaged
    };
    // Without the one at the end it is as a crash may leave it, and nothing is damaged.
    for (damaged, corruptions) in [(cut, 0), (zeroed(last), 0), (zeroed(0), 1)] {
        let (_, file) = writable(&damaged);
        let findings = check(&file, None);
        let remarked = findings.remarks.iter().any(|line| line.contains("its copy at 0 is used"));
        assert_eq!((findings.corruptions_total, findings.leaks_total), (corruptions, 0));
        assert_eq!(remarked, corruptions == 0);
        assert_eq!(read(&volume(&read_only(&damaged), false), 0, 8 << 12).unwrap(), expected);
        assert_eq!(check(&file, Some(Repair::All)).repaired_total, corruptions);
        assert_clean(&file);
        assert_eq!(check(&file, None).remarks, Vec::<String>::new());
        assert_eq!(read(&volume(&file, false), 0, 8 << 12).unwrap(), expected);
        // Without a repair, the next block that is allocated brings both back.
        let (_, file) = writable(&damaged);
        let disk = volume(&file, true);
        write(&disk, 0, &[1; 512]).unwrap();
        block_on(disk.close()).unwrap();
        assert_clean(&file);
    }
}

#[test]
fn footers_that_differ() {
    let (bytes, _) = image(&[]);
    let mut copy = [0; 512];
    bytes.read(0, &mut copy);
    let mut footer = Footer::parse(&copy).unwrap();
    footer.hidden = 1;
    let mut damaged = bytes.clone();
    damaged.write(0, &footer.to_bytes());
    let (_, file) = writable(&damaged);
    assert!(check(&file, None).corruptions[0].contains("differ"));
    assert_eq!(check(&file, Some(Repair::All)).repaired_total, 1);
    assert_clean(&file);
    assert!(
        !describe(&file).properties.iter().any(|(name, _)| *name == "hidden"),
        "the one at the end counts"
    );
}

#[test]
fn leaks_are_given_back() {
    let (bytes, expected) = image(&[]);
    let mut leaky = bytes.clone();
    let mut footer = [0; 512];
    bytes.read(0, &mut footer);
    leaky.write(bytes.length() + 50_000 / 512 * 512, &footer);
    leaky.write(entry_at(10), &7u32.to_be_bytes());
    let (_, file) = writable(&leaky);
    let findings = check(&file, None);
    assert_eq!((findings.corruptions_total, findings.leaks_total), (0, 2), "{findings:?}");
    assert_eq!(check(&file, Some(Repair::Leaks)).repaired_total, 2);
    assert_clean(&file);
    assert_eq!(file.length(), bytes.length());
    assert_eq!(read(&volume(&file, false), 0, 8 << 12).unwrap(), expected);
}

#[test]
fn batmaps() {
    // Blocks whose bit is set are kept when they are erased; lies and damage are found, and replaced by an empty one.
    let file = empty();
    create(&file, Some(8 << 20), None, &[("max_size", "8M")]);
    write_and_close(&file, 2 << 20);
    let header = 1536 + 512;
    let mut map = Buf::zeroed(512);
    let set = |map: &Buf, sum: u32| {
        block_on(file.write(header + 512, map.clone())).unwrap();
        block_on(file.write(header + 24, Buf::copy_of(&sum.to_be_bytes()))).unwrap();
    };
    map[0] = 0x40;
    set(&map, !0x40);
    assert_clean(&file);
    let disk = volume(&file, true);
    block_on(disk.erase(0, 8 << 20, crate::driver::Erase::Discard)).unwrap();
    assert_eq!(read(&disk, 2 << 20, 512).unwrap(), [0; 512]);
    block_on(disk.close()).unwrap();
    assert_clean(&file);
    assert_ne!(block_on(file.read(1536 + 4, 4)).unwrap()[..], [0xff; 4], "the block is still there");
    for (byte, sum, part) in [(0x80u8, !0x80u32, "complete"), (0x40, 0, "checksum")] {
        map[0] = byte;
        set(&map, sum);
        let findings = check(&file, None);
        assert!(findings.corruptions.iter().any(|line| line.contains(part)), "{findings:?}");
        assert_eq!(check(&file, Some(Repair::All)).repaired_total, 1);
        assert_clean(&file);
    }
}

fn write_and_close(file: &Rc<dyn ImageFile>, offset: u64) {
    let disk = volume(file, true);
    write(&disk, offset, &[5; 512]).unwrap();
    block_on(disk.close()).unwrap();
}

#[test]
fn random_damage_never_panics() {
    let (bytes, expected) = image(&[]);
    let mut rng = fastrand::Rng::with_seed(77);
    for _ in 0..2000 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + rng.u64(..4) {
            let at = rng.u64(..3) * (bytes.length() - 2048) / 2 + rng.u64(..2048);
            damaged.write(at.min(bytes.length() - 1), &[rng.u8(..)]);
        }
        if rng.u64(..4) == 0 {
            let len = rng.u64(..bytes.length());
            damaged = Pages::of(&damaged.to_vec()[..len as usize]);
        }
        try_all(&damaged, &expected);
        let (_, file) = writable(&damaged);
        let _ = block_on(Vhd.check(open_of(&file, true, None), Some(Repair::All)));
    }
}
