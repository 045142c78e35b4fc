//! Goal: plans that are out at the same time share blocks, and plans that are given up leave nothing behind. Method: plans made by
//! hand against the driver.

use std::rc::Rc;

use super::*;
use crate::driver::{Driver, Place};
use crate::testing::{Fault, Kind, Op, Rule};

fn disk(size: u64) -> (Rc<dyn ImageFile>, Rc<dyn Driver>) {
    let file = empty();
    create(&file, Some(size), None, &[("block_size", "8192")]);
    let driver = layer(&file, true, None).unwrap().driver;
    (file, driver)
}

fn place(driver: &Rc<dyn Driver>, offset: u64) -> Place {
    let mut extents = Vec::new();
    while driver.map(offset, 512, &mut extents).unwrap() == 0 {
        block_on(driver.load(offset, 512)).unwrap();
    }
    extents[0].place
}

#[test]
fn plans_of_one_block_share_its_place() {
    let (file, driver) = disk(1 << 20);
    let first = block_on(driver.plan_write(0, 512)).unwrap();
    let second = block_on(driver.plan_write(1024, 512)).unwrap();
    assert_eq!(first.fills[0].offset + 1024, second.fills[0].offset);
    assert_eq!(place(&driver, 0), Place::Zero { allocated: false });
    for plan in [&first, &second] {
        block_on(file.write(plan.fills[0].offset, Buf::copy_of(&[7; 512]))).unwrap();
    }
    let offset = second.fills[0].offset;
    block_on(driver.commit(second)).unwrap();
    // The block is there, and the first plan's sectors are zero until it has ended, or as they are being written.
    assert!(matches!(place(&driver, 1024), Place::Data { offset: at, .. } if at == offset));
    driver.abort(first);
    let third = block_on(driver.plan_write(4096, 512)).unwrap();
    assert_eq!(third.fills[0].offset, offset + 3072);
    block_on(driver.commit(third)).unwrap();
    block_on(driver.close()).unwrap();
    assert_clean(&file);
}

#[test]
fn a_place_that_was_given_up_is_for_its_own_block_only() {
    let (file, driver) = disk(1 << 20);
    let plan = block_on(driver.plan_write(0, 8192)).unwrap();
    let given_up = plan.fills[0].offset;
    // Its payload arrives late.
    driver.abort(plan);
    block_on(file.write(given_up, Buf::copy_of(&[0xee; 8192]))).unwrap();
    for block in 1..100u64 {
        let plan = block_on(driver.plan_write(block * 8192, 512)).unwrap();
        assert_ne!(plan.fills[0].offset, given_up);
        block_on(driver.commit(plan)).unwrap();
    }
    // Cleaned before it is used.
    let plan = block_on(driver.plan_write(0, 512)).unwrap();
    assert_eq!(plan.fills[0].offset, given_up);
    assert_eq!(block_on(file.read(given_up, 8192)).unwrap()[..], [0; 8192]);
    driver.abort(plan);
    block_on(file.write(given_up, Buf::copy_of(&[0xee; 8192]))).unwrap();
    block_on(driver.close()).unwrap();
    // The next opening cleans it, too.
    let volume = volume(&file, true);
    for block in (0..1).chain(100..128u64) {
        write(&volume, block * 8192, &[1; 512]).unwrap();
        assert_eq!(read(&volume, block * 8192 + 512, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn an_error_fails_one_write_only() {
    // Every change of the file fails from the N-th on, then works again: nothing is lost, the disk goes on.
    for changes in 0..40 {
        let file = mem(&Pages::empty(), true);
        let image: Rc<dyn ImageFile> = file.clone();
        create(&image, Some(1 << 20), None, &[("block_size", "8192")]);
        let disk = volume(&image, true);
        let mut written = Vec::new();
        let is_change = |op: &Op| !matches!(op.kind, Kind::Read | Kind::Flush);
        file.store().inject(Rule::when(Fault::ENOSPC, is_change).skipping(changes));
        for block in 0..6u64 {
            if write(&disk, block * 8192, &[block as u8 + 1; 512]).is_ok() {
                written.push(block);
            }
        }
        file.store().heal();
        for block in 6..12u64 {
            write(&disk, block * 8192, &[block as u8 + 1; 512]).unwrap();
            written.push(block);
        }
        for block in &written {
            assert_eq!(read(&disk, block * 8192, 512).unwrap(), [*block as u8 + 1; 512], "{changes}");
            assert_eq!(read(&disk, block * 8192 + 512, 512).unwrap(), [0; 512], "{changes}");
        }
        block_on(disk.close()).unwrap();
        assert_clean(&image);
    }
}

#[test]
fn nobody_overtakes_zeroes_whose_writer_went_away() {
    use crate::driver::Erase;
    use crate::testing::rig::{Case, LayerCase, Rig, read, write};

    let raw = LayerCase::new(&crate::raw_driver::Raw, &[], 64 << 10);
    let vhd = LayerCase::new(&Vhd, &[("block_size", "8192")], 64 << 10);
    for (layers, how) in [
        (vec![vhd.clone()], Some(Erase::Zero)),
        (vec![vhd.clone()], Some(Erase::ZeroKeep)),
        (vec![vhd.clone(), raw.clone()], Some(Erase::Zero)),
        // A write of a part of a sector whose bit is clear: the driver zeroes the sector first.
        (vec![vhd.clone(), raw.clone()], None),
    ] {
        let rig = Rig::create(&Case::new("vhd", layers), 4).unwrap();
        let volume = rig.open(true).unwrap();
        let sector = 3 * 512;
        rig.store.run(write(&volume, 0, &[1; 512])).unwrap();
        if how.is_some() {
            rig.store.run(write(&volume, sector, &[1; 512])).unwrap();
        }
        rig.store.run(volume.flush()).unwrap();
        let is_zero = move |op: &Op| {
            let of_sector = op.range.end - op.range.start == 512 && op.range.start >= 4096;
            of_sector && op.kind == if how.is_some() { Kind::Zero } else { Kind::Write }
        };
        rig.store.hold(is_zero);
        let future: crate::file::Pending<'_, ()> = match how {
            Some(how) => Box::pin(volume.erase(sector, 512, how)),
            None => Box::pin(write(&volume, sector + 100, &[2; 100])),
        };
        // It gets no further, and is dropped.
        rig.store.try_run(future).unwrap_err();
        let held = rig.store.in_flight().iter().find(|op| is_zero(op)).map(|op| op.id).unwrap();
        rig.store.hold(move |op| op.id == held);
        let whole = || write(&volume, sector, &[7; 512]);
        rig.store.try_run(whole()).unwrap_err();
        rig.store.release();
        rig.store.run(whole()).unwrap();
        rig.store.settle();
        assert_eq!(rig.store.run(read(&volume, sector, 512)).unwrap()[..], [7; 512], "{how:?}");
        rig.store.run(volume.close()).unwrap();
        rig.check_sound().unwrap();
    }
}
