//! Goal: space that is not there, or not wanted any more, is dealt with. A store that is full for long costs no place; what is
//! discarded goes back to the store at once. Method: a simulated store that refuses some kind of operation thousands of times, and
//! then none; the space that files take there.

use crate::driver::Erase;
use crate::error::ErrorKind;
use crate::testing::rig::{Case, LayerCase, Rig, read, write};
use crate::testing::{Fault, Kind, Op};
use crate::vhd::Vhd;

/// Attempts of a guest that does not give up: more than there are places of [`BLOCK`] bytes in a VHD.
const ATTEMPTS: u64 = 17_000;
const BLOCK: u64 = 128 << 20;
/// Behind headers and tables.
const TABLES_END: u64 = 1 << 16;

fn rig(size: u64, block_size: &str) -> Rig {
    let options = [("block_size", block_size)];
    Rig::create(&Case::new("vhd", vec![LayerCase::new(&Vhd, &options, size)]), 3).unwrap()
}

/// `attempts` writes that fail while operations are refused for which `refused` is true, then some that must not.
fn insist(what: &str, attempts: u64, refused: impl Fn(&Op) -> bool + 'static) {
    let rig = rig(16 * BLOCK, "128M");
    let volume = rig.open(true).unwrap();
    rig.store.set_turns_max(100_000_000);
    rig.store.run(write(&volume, 0, &[1; 4096])).unwrap();
    rig.inject_on_top(Fault::ENOSPC, refused);
    let mut failed = 0;
    for attempt in 0..attempts {
        // Block after block, and each of them again and again.
        let at = (1 + attempt % 8) * BLOCK + attempt % 100 * 4096;
        match rig.store.run(write(&volume, at, &[9; 4096])) {
            Err(error) if error.kind == ErrorKind::NoSpace => failed += 1,
            other => other.unwrap(),
        }
    }
    assert!(failed > attempts - 100, "{what}: only {failed} requests failed");
    assert_eq!(rig.store.run(read(&volume, 0, 4096)).unwrap()[..], [1; 4096]);
    rig.store.heal();
    for block in 1..16 {
        rig.store
            .run(write(&volume, block * BLOCK + 4096, &[block as u8; 512]))
            .unwrap_or_else(|error| panic!("{what}: with room again: {error}"));
    }
    let length = rig.store.length(rig.files(0)[0]);
    assert!(length < 64 * BLOCK, "{what}: the file of a disk of 16 blocks has {length} bytes");
    for block in 1..16 {
        let found = rig.store.run(read(&volume, block * BLOCK, 100 * 4096)).unwrap();
        let (before, after) = (&found[..4096], &found[4096 + 512..]);
        assert_eq!(found[4096..4096 + 512], [block as u8; 512], "{what}");
        assert!(
            before.iter().chain(after).all(|byte| *byte == 0),
            "{what}: what failed shows in block {block}"
        );
    }
    rig.store.run(volume.close()).unwrap();
    rig.check_sound().unwrap();
    let length = rig.store.length(rig.files(0)[0]);
    assert!(length < 40 * BLOCK, "{what}: the file has {length} bytes after its close");
}

fn is_write(op: &Op, bytes: std::ops::RangeInclusive<u64>) -> bool {
    op.kind == Kind::Write && op.range.start > TABLES_END && bytes.contains(&(op.range.end - op.range.start))
}

#[test]
fn footers_cannot_be_written_for_long() {
    insist("footers", ATTEMPTS, |op| is_write(op, 512..=512));
}

#[test]
fn bitmaps_cannot_be_written_for_long() {
    insist("bitmaps", ATTEMPTS / 10, |op| is_write(op, 32 << 10..=32 << 10));
}

#[test]
fn payload_cannot_be_written_for_long() {
    insist("payload", ATTEMPTS / 10, |op| is_write(op, 4096..=4096));
}

/// Places are not lost to flushes that fail, either; but a store whose flushes fail serves no new block until it is opened again.
#[test]
fn a_flush_that_failed_leaves_places() {
    let rig = rig(16 * BLOCK, "128M");
    let volume = rig.open(true).unwrap();
    rig.store.set_turns_max(100_000_000);
    rig.inject_on_top(Fault::EIO, |op| op.kind == Kind::Flush);
    for _ in 0..ATTEMPTS / 10 {
        rig.store.run(write(&volume, 0, &[1; 4096])).unwrap_err();
    }
    let length = rig.store.length(rig.files(0)[0]);
    assert!(length < 64 * BLOCK, "the file has {length} bytes");
}

#[test]
fn discarded_blocks_go_back_to_the_store() {
    let rig = rig(4 << 20, "64k");
    let volume = rig.open(true).unwrap();
    rig.store.run(write(&volume, 0, &[7; 2 << 20])).unwrap();
    rig.store.run(volume.flush()).unwrap();
    let before = rig.store.allocated_bytes();
    rig.store.run(volume.erase(64 << 10, 1 << 20, Erase::Discard)).unwrap();
    let after = rig.store.allocated_bytes();
    assert!(after + (1 << 20) <= before + 4096, "{before} bytes, {after} after a discard of 1 MiB");
    rig.store.run(volume.erase(1 << 20, 1 << 20, Erase::Zero)).unwrap();
    let zeroed = rig.store.allocated_bytes();
    assert!(zeroed + (900 << 10) <= after, "{after} bytes, {zeroed} after 1 MiB of zeroes");
    let found = rig.store.run(read(&volume, 0, 4 << 20)).unwrap();
    assert!(
        found[..64 << 10].iter().all(|byte| *byte == 7) && found[64 << 10..].iter().all(|byte| *byte == 0)
    );
    rig.store.run(volume.close()).unwrap();
    rig.check_sound().unwrap();
    // The next opening knows of no data there either, and takes the places again.
    let volume = rig.open(true).unwrap();
    assert!(rig.store.allocated_bytes() <= zeroed + (64 << 10));
    rig.store.run(write(&volume, 64 << 10, &[8; 128 << 10])).unwrap();
    let found = rig.store.run(read(&volume, 0, 256 << 10)).unwrap();
    assert!(
        found[64 << 10..192 << 10].iter().all(|byte| *byte == 8)
            && found[192 << 10..].iter().all(|byte| *byte == 0)
    );
    rig.store.run(volume.close()).unwrap();
    rig.check_sound().unwrap();
}

#[test]
fn a_device_is_not_zeroed_by_a_discard() {
    let layer =
        LayerCase { device_bytes: Some(8 << 20), ..LayerCase::new(&Vhd, &[("block_size", "64k")], 4 << 20) };
    let rig = Rig::create(&Case::new("vhd on a device", vec![layer]), 3).unwrap();
    let volume = rig.open(true).unwrap();
    rig.store.run(write(&volume, 0, &[7; 1 << 20])).unwrap();
    rig.store.start_record();
    rig.store.run(volume.erase(0, 1 << 20, Erase::Discard)).unwrap();
    let record = rig.store.take_record();
    assert_eq!(record.count(|change| matches!(change, crate::testing::Change::Zero(_))), 0);
    assert!(rig.store.run(read(&volume, 0, 1 << 20)).unwrap().iter().all(|byte| *byte == 0));
}
