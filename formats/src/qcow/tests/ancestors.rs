//! Goal: blktap's images are read, and what its extended header says stays true when we write. Method: images put together byte by
//! byte as blktap made them: L1 tables in both orders of bytes, all clusters of a table allocated together, right and wrong checksums.

use futures_lite::future::block_on;

use super::*;
use crate::qcow::header;
use crate::qcow2::tests::rig::{open, read_all, same, write};

const SIZE: u64 = 4 << 20;

/// An image with 4 KiB clusters in which the second L2 table and all its clusters exist, and what it holds.
fn image(big_endian: bool, checksum_is_right: bool) -> (Vec<u8>, Vec<u8>) {
    let mut bytes = vec![0u8; 8192];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
    bytes[24..32].copy_from_slice(&SIZE.to_be_bytes());
    (bytes[32], bytes[33]) = (12, 9);
    bytes[40..48].copy_from_slice(&4096u64.to_be_bytes());
    bytes[48..52].copy_from_slice(b"XEN\xfb");
    bytes[56..60].copy_from_slice(&512u32.to_be_bytes());
    bytes[60..64].copy_from_slice(&(1 | if big_endian { 2 } else { 0u32 }).to_be_bytes());
    // The second entry of two.
    let table = 8192u64;
    bytes[4104..4112].copy_from_slice(&if big_endian { table.to_be_bytes() } else { table.to_le_bytes() });
    let sum = header::checksum(&[[0; 8], table.to_be_bytes()].concat());
    bytes[52..56].copy_from_slice(&if checksum_is_right { sum } else { sum ^ 1 }.to_be_bytes());
    let mut model = vec![0; SIZE as usize];
    bytes.resize(8192 + 4096 + 512 * 4096, 0);
    for number in 0..512u64 {
        let place = 12288 + number * 4096;
        bytes[(8192 + number * 8) as usize..][..8].copy_from_slice(&place.to_be_bytes());
        bytes[place as usize..][..4096].fill(number as u8 | 1);
        model[((2 << 20) + number * 4096) as usize..][..4096].fill(number as u8 | 1);
    }
    (bytes, model)
}

#[test]
fn the_checksum_is_that_of_blktap() {
    // MD5 of eight zeroes begins with 7d ea 36 2b.
    assert_eq!(header::checksum(&[0; 8]), 0x2b36_ea7d);
}

#[test]
fn images_of_blktap_are_read_and_written() {
    for (big_endian, right) in [(true, true), (false, true), (true, false), (false, false)] {
        let what = format!("big-endian {big_endian}, checksum right {right}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow");
        let (bytes, mut model) = image(big_endian, right);
        std::fs::write(&path, &bytes).unwrap();
        let volume = open(&layers(folder.path()), false);
        same(&what, &read_all(&volume), &model);
        block_on(volume.close()).unwrap();
        let remarks = check(&path, None).remarks.join(" ");
        assert_eq!(remarks.contains("checksum"), big_endian && !right, "{what}: {remarks}");
        is_sound(&path, &what);
        assert!(std::fs::read(&path).unwrap() == bytes, "{what}: reading changed it");
        // A table of ours does not have its clusters behind it.
        let volume = open(&layers(folder.path()), true);
        write(&volume, 8192, &[77; 512]);
        write(&volume, 3 << 20, &[78; 512]);
        model[8192..8704].fill(77);
        model[3 << 20..][..512].fill(78);
        same(&what, &read_all(&volume), &model);
        block_on(volume.close()).unwrap();
        let after = std::fs::read(&path).unwrap();
        let be32 = |at: usize| u32::from_be_bytes(after[at..at + 4].try_into().unwrap());
        let l1 = u64::from_be_bytes(after[40..48].try_into().unwrap()) as usize;
        assert_eq!((be32(48), be32(56), be32(60) & 2, l1 % 4096), (header::XEN_MAGIC, 1, 2, 0), "{what}");
        assert_eq!(be32(52), header::checksum(&after[l1..l1 + 16]), "{what}");
        same(&what, &read_all(&open(&layers(folder.path()), false)), &model);
        let found = check(&path, None);
        assert_eq!(
            (found.corruptions_total, found.remarks.iter().any(|line| line.contains("checksum"))),
            (0, false),
            "{what}"
        );
    }
}

#[test]
fn a_death_while_the_table_is_turned_leaves_one_or_the_other() {
    use crate::testing::replay::crashes;
    use crate::testing::rig::{Case, LayerCase, Rig, read_all as read_rig, write as write_rig};
    let rig = Rig::create(&Case::new("blktap", vec![LayerCase::new(&Qcow, &[], SIZE)]), 1).unwrap();
    let (bytes, model) = image(false, true);
    rig.store.alter(0, |pages| *pages = crate::testing::Pages::of(&bytes));
    rig.store.start_record();
    let volume = rig.open(true).unwrap();
    rig.store.run(write_rig(&volume, 0, &[5; 4096])).unwrap();
    let record = rig.store.take_record();
    let mut states = 0;
    crashes(&record, 60, 3, |crash, _| -> Result<(), String> {
        let after = rig.from_crash(crash, 1)?;
        let volume = after.open(false).map_err(|error| error.message)?;
        let disk = after.store.run(read_rig(&volume)).map_err(|error| error.message)?;
        same("after a crash", &disk[4096..], &model[4096..]);
        states += 1;
        Ok(())
    })
    .unwrap();
    assert!(states > 10);
}
