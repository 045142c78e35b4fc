//! Goal: requests that work on one cluster at a time, each on subclusters of its own, do not undo each other. Method: two requests in a
//! simulated store, one of them held where it has looked at the entry that both change; what each of them was answered is read
//! afterwards.

use std::rc::Rc;
use std::task::Poll;

use crate::driver::{Budget, Erase, Format, Open, SnapshotChange};
use crate::error::Error;
use crate::file::ImageFile;
use crate::qcow2::Qcow2;
use crate::testing::rig::{Case, LayerCase, Rig, read, read_all, write};
use crate::testing::run::Task;
use crate::testing::{Kind, Op};

const CLUSTER: u64 = 16 << 10;
const SUB: u64 = CLUSTER / 32;
const SIZE: u64 = 256 << 10;

fn case() -> Case {
    let options = [("extended_l2", "on"), ("cluster_size", "16k")];
    Case::new("subclusters", vec![LayerCase::new(&Qcow2, &options, SIZE)])
}

/// What a request on another subcluster is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Other {
    Write,
    Erase(Erase),
}

const OTHERS: [Other; 4] =
    [Other::Write, Other::Erase(Erase::Zero), Other::Erase(Erase::ZeroKeep), Other::Erase(Erase::Discard)];

impl Other {
    async fn run(self, volume: &crate::volume::Volume, sub: u64) -> Result<(), Error> {
        match self {
            Other::Write => write(volume, sub * SUB, &[0xee; SUB as usize]).await,
            Other::Erase(how) => volume.erase(sub * SUB, SUB, how).await,
        }
    }

    fn leaves(self) -> u8 {
        if self == Other::Write { 0xee } else { 0 }
    }
}

fn is_full_of(rig: &Rig, volume: &crate::volume::Volume, sub: u64, value: u8) -> bool {
    let found = rig.store.run(read(volume, sub * SUB, SUB)).unwrap();
    found.iter().all(|byte| *byte == value)
}

#[test]
fn a_full_log_loses_no_subcluster() {
    for other in OTHERS {
        for seed in 0..6 {
            let rig = Rig::create(&case().logged(3), seed).unwrap();
            let volume = rig.open(true).unwrap();
            let sub = async |sub: u64, value: u8| write(&volume, sub * SUB, &[value; SUB as usize]).await;
            rig.store.run(sub(9, 9)).unwrap();
            rig.store.run(volume.flush()).unwrap();
            let log = rig.log().unwrap();
            for number in 1.. {
                if log.entries().len() >= 2 {
                    break;
                }
                rig.store.run(sub(number, number as u8)).unwrap();
            }
            // No room for an entry: who commits now waits for a round, after a look at the entry.
            let tasks: Vec<Task<'_>> = vec![
                Box::pin(async { sub(20, 20).await.unwrap() }),
                Box::pin(async { other.run(&volume, 9).await.unwrap() }),
                Box::pin(async { sub(30, 30).await.unwrap() }),
            ];
            rig.store.run_all(tasks);
            for (sub, value) in [(1, 1), (9, other.leaves()), (20, 20), (30, 30)] {
                assert!(is_full_of(&rig, &volume, sub, value), "{other:?}, seed {seed}: subcluster {sub}");
            }
            rig.store.run(volume.close()).unwrap();
            rig.check_sound().unwrap();
        }
    }
}

/// An image whose first cluster has data, 1 in all bytes, and an L2 table of its own.
fn filled() -> Rig {
    let rig = Rig::create(&case(), 5).unwrap();
    let volume = rig.open(true).unwrap();
    rig.store.run(write(&volume, 0, &[1; CLUSTER as usize])).unwrap();
    rig.store.run(volume.close()).unwrap();
    rig
}

fn open_of(rig: &Rig, snapshot: Option<&str>) -> Open {
    Open {
        files: vec![rig.store.open(rig.files(0)[0], snapshot.is_none()) as Rc<dyn ImageFile>],
        writable: snapshot.is_none(),
        below_size: None,
        budget: Budget::new(64 << 10),
        log: None,
        snapshot: snapshot.map(str::to_owned),
        key: None,
    }
}

/// Polls a future until an operation for which `which` is true is in flight.
async fn until_in_flight(
    rig: &Rig,
    future: &mut (impl Future<Output = Result<(), Error>> + Unpin),
    which: impl Fn(&Op) -> bool,
) {
    std::future::poll_fn(|context| {
        let begun = std::pin::Pin::new(&mut *future).poll(context);
        assert!(begun.is_pending(), "it is over before what it was to wait for");
        match rig.store.in_flight().iter().any(&which) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
}

#[test]
fn what_is_erased_beside_a_copy_stays_erased() {
    for other in OTHERS {
        let rig = filled();
        let change = SnapshotChange::Create("one".into());
        rig.store.run(Qcow2.change_snapshots(open_of(&rig, None), &change)).unwrap();
        let volume = rig.open(true).unwrap();
        // So that the table is not shared any more, only the cluster is.
        rig.store.run(write(&volume, 5 * CLUSTER, &[5; 512])).unwrap();
        let is_copy = |op: &Op| op.kind == Kind::Write && op.range.end - op.range.start == CLUSTER;
        rig.store.hold(is_copy);
        rig.store.run(async {
            let mut first = Box::pin(write(&volume, 3 * SUB, &[3; SUB as usize]));
            until_in_flight(&rig, &mut first, is_copy).await;
            if matches!(other, Other::Write | Other::Erase(Erase::ZeroKeep)) {
                // It needs the copy, too: space that is shared cannot be kept.
                rig.store.release();
                let (first, other) = futures_lite::future::zip(first, other.run(&volume, 9)).await;
                return first.and(other).unwrap();
            }
            other.run(&volume, 9).await.unwrap();
            rig.store.release();
            first.await.unwrap();
        });
        for (sub, value) in [(2, 1), (3, 3), (9, other.leaves()), (10, 1)] {
            assert!(is_full_of(&rig, &volume, sub, value), "{other:?}: subcluster {sub}");
        }
        rig.store.run(volume.close()).unwrap();
        rig.check_sound().unwrap();
        let snapshot = rig.store.run(Qcow2.open(open_of(&rig, Some("one")))).unwrap();
        let layer = crate::volume::Layer { driver: snapshot, files: open_of(&rig, Some("one")).files };
        let disk = rig.store.run(read_all(&crate::volume::Volume::new(vec![layer]).unwrap())).unwrap();
        assert!(disk[..CLUSTER as usize].iter().all(|byte| *byte == 1), "the snapshot has changed");
    }
}

#[test]
fn a_reader_keeps_the_cluster_that_a_copy_replaces() {
    // A crash between the steps of a snapshot leaves flags that say "shared" although the refcount is one.
    let rig = filled();
    let word = |pages: &crate::testing::Pages, at: u64| {
        u64::from_be_bytes(pages.bytes(at..at + 8).try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    let mut host = 0;
    rig.store.alter(0, |pages| {
        let entry = word(pages, word(pages, word(pages, 40)));
        let table = word(pages, word(pages, 40));
        host = entry;
        pages.write(table, &entry.to_be_bytes());
    });
    let volume = rig.open(true).unwrap();
    let held = host + 20 * SUB..host + 21 * SUB;
    let is_read = move |op: &Op| op.kind == Kind::Read && op.range == held;
    rig.store.hold(is_read.clone());
    rig.store.run(async {
        let mut reader = Box::pin(async {
            let found = read(&volume, 20 * SUB, SUB).await?;
            assert!(found.iter().all(|byte| *byte == 1), "the reader sees {}", found[0]);
            Ok(())
        });
        until_in_flight(&rig, &mut reader, is_read).await;
        write(&volume, 3 * SUB, &[3; SUB as usize]).await.unwrap();
        volume.tidy().await.unwrap();
        volume.tidy().await.unwrap();
        rig.store.release();
        reader.await.unwrap();
    });
    assert!(is_full_of(&rig, &volume, 3, 3) && is_full_of(&rig, &volume, 4, 1));
    rig.store.run(volume.close()).unwrap();
    assert_eq!(rig.check_sound().unwrap().leaks, Vec::<String>::new());
}

#[test]
fn nobody_overtakes_zeroes_whose_writer_went_away() {
    for seed in 0..8 {
        let rig = Rig::create(&case(), seed).unwrap();
        let volume = rig.open(true).unwrap();
        rig.store.run(write(&volume, 0, &[1; CLUSTER as usize])).unwrap();
        // Two subclusters that nobody writes without a plan.
        rig.store.run(volume.erase(7 * SUB, SUB, Erase::Zero)).unwrap();
        rig.store.run(volume.erase(12 * SUB, SUB, Erase::Zero)).unwrap();
        rig.store.settle();
        // A part of a subcluster whose old bytes are under it: the driver zeroes it first.
        let is_zero = |op: &Op| op.kind == Kind::Zero;
        rig.store.hold(is_zero);
        rig.store.try_run(write(&volume, 7 * SUB + 100, &[2; 100])).unwrap_err();
        // Its caller went away.
        assert!(rig.store.in_flight().iter().any(is_zero), "seed {seed}: no zeroes are held");
        let answered = std::cell::Cell::new(false);
        let tasks: Vec<Task<'_>> = vec![
            Box::pin(async { write(&volume, 12 * SUB, &[12; SUB as usize]).await.unwrap() }),
            Box::pin(async {
                write(&volume, 7 * SUB, &[7; SUB as usize]).await.unwrap();
                answered.set(true);
            }),
        ];
        rig.store.try_run_all(tasks).unwrap_err();
        assert!(!answered.get(), "seed {seed}: the zeroes will land on what was answered");
        rig.store.release();
        rig.store.run(write(&volume, 7 * SUB, &[7; SUB as usize])).unwrap();
        rig.store.settle();
        assert!(is_full_of(&rig, &volume, 7, 7), "seed {seed}");
        rig.store.run(volume.close()).unwrap();
        rig.check_sound().unwrap();
    }
}
