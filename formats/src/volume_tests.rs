//! Goal: what a volume promises by itself, whatever the driver. Method: toy images in the simulated store.

use std::task::{Context, Waker};

use crate::driver::Erase;
use crate::testing::fault::{Fault, Kind, Rule};
use crate::testing::rig::{Case, LayerCase, Rig, read, write};
use crate::testing::toy::{FIRST, Toy};

static TOY: Toy = Toy(None);

fn rig(size: u64) -> Rig {
    let case = Case::new("toy", vec![LayerCase::new(&TOY, &[], size)]).with_budget(4 << 20);
    Rig::create(&case, 1).expect("it is made")
}

/// The map knows a place before the file does, when writing the table has failed; what is then written there, and acknowledged,
/// must be found all the same after the death of the process.
#[test]
fn a_write_over_a_commit_that_failed_survives_the_process() {
    let rig = rig(1 << 20);
    let volume = rig.open(true).expect("it opens");
    let table = Rule::when(Fault::EIO, |op| op.kind == Kind::Write && op.range.start < FIRST);
    rig.store.inject(table.at_most(1));
    assert!(rig.store.run(write(&volume, 0, &[1; 4096])).is_err(), "its table cannot be written");
    for (offset, value) in [(512, 2), (8192, 3)] {
        rig.store.run(write(&volume, offset, &[value; 512])).expect("it can again");
        let after = rig.after_death(2).expect("it can be opened");
        let found = after.store.run(read(&after.open(false).expect("it opens"), offset, 512));
        assert!(found.expect("it is read").iter().all(|byte| *byte == value), "at {offset}");
    }
}

/// An erase of a disk where nothing takes time lets others go first all the same.
#[test]
fn an_erase_yields() {
    let rig = rig(64 << 20);
    let volume = rig.open(true).expect("it opens");
    // The tables are in memory from here on.
    rig.store.run(volume.erase(0, 64 << 20, Erase::Discard)).expect("there is nothing");
    for (len, polls) in [(64 << 20, 4), (1 << 20, 1)] {
        let mut erase = std::pin::pin!(volume.erase(0, len, Erase::Discard));
        let mut context = Context::from_waker(Waker::noop());
        let mut count = 1;
        while erase.as_mut().poll(&mut context).is_pending() {
            count += 1;
            assert!(count < 1000);
        }
        assert_eq!(count, polls, "for {len} bytes");
    }
}
