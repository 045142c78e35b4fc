//! Goal: defects that the suites found, each as the shortest case that shows it. Method: a test here fails as long as its defect is
//! there and is ignored meanwhile; who mends one removes its `ignore`.

use std::rc::Rc;

use super::fault::Kind;
use super::rig::{Case, LayerCase, Rig, read_all, write};
use super::toy::{self, Toy};
use super::{Abandon, Pages, Store};
use crate::allocation_log::{AllocationLog, replay};
use crate::driver::{Budget, FileIndex, Order};
use crate::file::ImageFile;
use crate::metadata::{SLICE_BYTES, Tables};
use crate::raw_driver::Raw;
use crate::registry;

static TOY: Toy = Toy(None);

fn tables(store: &Rc<Store>, log: Option<Rc<dyn AllocationLog>>) -> Rc<Tables> {
    let file: Rc<dyn ImageFile> = store.open(0, true);
    Tables::new(file.clone(), FileIndex(0), vec![file], SLICE_BYTES, &Budget::new(1 << 20), log)
}

/// A write is answered that lies in place over a mapping which is neither in the file nor in a log: the process dies, and the
/// write is gone with the mapping. Promise 2.
#[test]
fn a_write_in_place_is_answered_before_its_mapping_is_safe() {
    let rig = Rig::create(&Case::new("toy", vec![LayerCase::new(&TOY, &[], 1 << 20)]), 1).unwrap();
    let volume = rig.open(true).unwrap();
    // The tables never reach the file.
    rig.store.hold(|op| op.kind == Kind::Write && op.range.start < toy::FIRST);
    let mut second = None;
    let first = write(&volume, 0, &[1; 512]);
    let both = async {
        // The first write gets as far as it can: its mapping is seen, and not safe.
        let mut first = Box::pin(first);
        std::future::poll_fn(|context| {
            let _ = first.as_mut().poll(context);
            let mut extents = Vec::new();
            let _ = volume.layers()[0].driver.map(0, 512, &mut extents);
            let mapped = extents.iter().any(|e| matches!(e.place, crate::driver::Place::Data { .. }));
            if mapped { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        second = Some(write(&volume, 512, &[2; 512]).await);
    };
    // Correct is: the second write waits (and so nothing moves any more), or what it wrote is there after a death.
    let answered = rig.store.try_run(both).is_ok() && second == Some(Ok(()));
    let after = rig.copy(1);
    let volume = after.open(false).unwrap();
    let disk = after.store.run(read_all(&volume)).unwrap();
    assert!(!answered || disk[512..1024] == [2; 512], "an answered write is gone");
}

/// A change that finds the log full is written back while the log still has an older change of the same bytes: what the file holds
/// then is unknown to the log, and a death at that moment leaves the disk failed.
#[test]
fn a_full_log_does_not_know_what_the_file_holds() {
    let store = Store::new(1);
    store.add("a", Pages::of(&[0; 4096]));
    let log = store.add_log(1);
    store.start_record();
    let tables = tables(&store, Some(log));
    store
        .run(async {
            tables.update(0, &[1; 8], Order::Anytime).await?;
            tables.settle().await?;
            tables.update(0, &[2; 8], Order::Anytime).await?;
            tables.settle().await
        })
        .unwrap();
    let record = store.take_record();
    let mut replayer = super::replay::Replayer::new(&record);
    let mut rng = fastrand::Rng::with_seed(1);
    for at in 0..=record.events.len() {
        replayer.advance(at);
        let mut crash = replayer.crash(super::replay::Cause::ProcessDeath, &mut rng);
        let after = Store::new(1);
        let file: Rc<dyn ImageFile> = after.add("a", crash.files.remove(0));
        after.run(replay(&crash.logs[0], &[file])).unwrap();
    }
}

/// A round of writing back is dropped while the kernel writes a slice; the next round writes the same slice again, and the older
/// write lands last: a change that was reported as settled is not in the file.
#[test]
fn a_dropped_round_undoes_a_later_one() {
    let store = Store::new(1);
    store.add("a", Pages::of(&[0; 4096]));
    let tables = tables(&store, None);
    store.run(tables.update(0, &[1], Order::Anytime)).unwrap();
    let first = store.submitted();
    store.hold(move |op| op.id == first);
    store.run(Abandon::after(1, tables.write_back()));
    // The second round may wait for the first one's write; then it is let go.
    let second = async {
        tables.update(8, &[2], Order::Anytime).await?;
        tables.settle().await
    };
    let settled = store.try_run(second).is_ok();
    store.release();
    store.settle();
    assert!(!settled || store.pages(0).bytes(8..9) == [2], "the settled change is gone");
}

/// `create` on a block device leaves the junk that was there, and growing after shrinking shows what was cut off.
#[test]
fn raw_on_a_device_is_not_zero() {
    let device = LayerCase { device_bytes: Some(65_536), ..LayerCase::new(&Raw, &[], 65_536) };
    let rig = Rig::create(&Case::new("raw", vec![device]), 1).unwrap();
    let volume = rig.open(true).unwrap();
    let disk = rig.store.run(async {
        write(&volume, 32_768, &[7; 512]).await?;
        volume.resize(32_768).await?;
        volume.resize(65_536).await?;
        read_all(&volume).await
    });
    assert!(disk.unwrap()[32_768..].iter().all(|byte| *byte == 0));
}

/// A disk has whole sectors.
#[test]
fn raw_takes_odd_sizes() {
    let rig = Rig::create(&Case::new("raw", vec![LayerCase::new(&Raw, &[], 4096)]), 1).unwrap();
    let volume = rig.open(true).unwrap();
    let result = rig.store.run(volume.resize(5000));
    assert!(result.is_err() && volume.size() == 4096, "the disk has {} bytes", volume.size());
}

/// The entry of a refcount table is a number near 2^64: an overflow, which is a panic in debug builds and a wild offset in
/// others. (Found by the fuzz run of hostile qcow2 images, seeds 82, 200, 282.)
#[test]
fn qcow2_refcount_block_near_the_end_of_numbers() {
    let format = registry::format("qcow2").unwrap();
    let layer = LayerCase::new(format, &[("cluster_size", "512")], 1 << 20);
    let rig = Rig::create(&Case::new("qcow2", vec![layer]), 1).unwrap();
    rig.store.alter(0, |pages| {
        let table = u64::from_be_bytes(pages.bytes(48..56).try_into().unwrap());
        for entry in 0..64 {
            pages.write(table + 8 * entry, &0xffff_ffff_ffff_fe00_u64.to_be_bytes());
        }
    });
    // An error is right, a panic is not.
    let _ = rig.open(true).and_then(|volume| rig.store.run(write(&volume, 0, &[1; 512])));
}

/// QEMU's name of the format is `vpc`: it cannot open a qcow2 image whose backing format is called `vhd`.
#[test]
fn qcow2_over_vhd_is_readable_by_qemu() {
    let layer = |name: &str| LayerCase::new(registry::format(name).unwrap(), &[], 4 << 20);
    let rig = Rig::create(&Case::new("qcow2 on vhd", vec![layer("qcow2"), layer("vhd")]), 1).unwrap();
    super::oracle::judge(&rig).unwrap();
}
