//! Goal: a replay brings a file to the last value of every word from every state that a death may leave, and touches nothing when one
//! word holds anything else. And tables with a log never let the file get ahead of it. Method: tables of chains and values; random
//! changes, partly written, against a model; tables of random changes that die at random moments, with logs of any size.

use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::driver::{Budget, Order};
use crate::metadata::Tables;
use crate::testing::{Abandon, Change, Event, Fault, Kind, MemFile, Pages, Rule, Store};

fn word(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

fn entry(file: u16, offset: u64, old: u64, new: u64) -> LogEntry {
    LogEntry { file: FileIndex(file), offset, old: word(old), new: word(new) }
}

/// A store with files of these words.
fn store(files: &[Vec<u64>]) -> (Rc<Store>, Vec<Rc<dyn ImageFile>>) {
    let store = Store::new(1);
    let files = files.iter().enumerate().map(|(number, words)| {
        let bytes: Vec<u8> = words.iter().flat_map(|value| word(*value)).collect();
        store.add(&format!("file {number}"), Pages::of(&bytes)) as Rc<dyn ImageFile>
    });
    let files = files.collect();
    (store, files)
}

fn words(store: &Rc<Store>, file: usize) -> Vec<u64> {
    let pages = store.pages(file);
    let bytes = pages.bytes(0..pages.length());
    bytes.chunks_exact(8).map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn every_value_of_a_chain_becomes_the_last() {
    let log =
        [entry(0, 8, 1, 2), entry(0, 16, 9, 8), entry(0, 8, 2, 3), entry(0, 8, 3, 1), entry(0, 8, 1, 4)];
    for found in [1, 2, 3, 4] {
        let (store, files) = store(&[vec![7, found, 9, 7]]);
        store.run(replay(&log, &files)).unwrap();
        assert_eq!(words(&store, 0), [7, 4, 8, 7], "from {found}");
        store.run(replay(&log, &files)).unwrap();
        assert_eq!(words(&store, 0), [7, 4, 8, 7], "again");
    }
}

#[test]
fn a_foreign_value_stops_everything() {
    let log = [entry(0, 0, 1, 2), entry(1, 4096, 5, 6), entry(0, 0, 2, 3)];
    let mut second = vec![0; 513];
    second[512] = 7;
    let (store, files) = store(&[vec![1, 1], second]);
    let error = store.run(replay(&log, &files)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt);
    for part in ["file 1", "offset 4096", "0x0000000000000007", "0x0000000000000005", "0x0000000000000006"] {
        assert!(error.message.contains(part), "{part}: {error}");
    }
    assert_eq!(words(&store, 0), [1, 1], "no word was written");
}

#[test]
fn logs_that_make_no_sense_are_refused() {
    for (log, part) in [
        (vec![entry(1, 0, 1, 2)], "file 1"),
        (vec![entry(0, 4, 1, 2)], "offset 4"),
        (vec![entry(0, 0, 1, 2), entry(0, 0, 3, 4)], "entry 1"),
    ] {
        let (store, files) = store(&[vec![1; 4]]);
        let error = store.run(replay(&log, &files)).unwrap_err();
        assert!(error.message.contains(part), "{error}");
        assert_eq!(words(&store, 0), [1; 4]);
    }
}

#[test]
fn what_is_mapped_is_durable_before_its_mapping_and_that_before_the_end() {
    let (store, files) = store(&[vec![1; 4]]);
    store.start_record();
    store.run(replay(&[entry(0, 8, 1, 2)], &files)).unwrap();
    let flushes: Vec<bool> = store
        .take_record()
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Submit { change, .. } => Some(*change == Change::Flush),
            _ => None,
        })
        .collect();
    assert_eq!(flushes, [true, false, true]);
    // A flush that fails is an error, before and after.
    for nth in 0..2 {
        let (store, files) = self::store(&[vec![1; 4]]);
        store.inject(Rule::when(Fault::EIO, |op| op.kind == Kind::Flush).skipping(nth).at_most(1));
        store.run(replay(&[entry(0, 8, 1, 2)], &files)).unwrap_err();
        assert_eq!(words(&store, 0)[1], if nth == 0 { 1 } else { 2 });
    }
}

proptest! {
    #[test]
    fn states_of_a_death_are_carried_out(
        changes in proptest::collection::vec((0usize..2, 0usize..3000, 0u64..4), 1..200),
        landed in proptest::collection::vec(0usize..200, 6000),
    ) {
        let mut memory = vec![vec![0u64; 3000]; 2];
        // All values that a word had, in order.
        let mut history = vec![vec![vec![0u64]; 3000]; 2];
        let mut log = Vec::new();
        for (file, at, value) in changes {
            let old = std::mem::replace(&mut memory[file][at], value);
            if old != value {
                log.push(entry(file as u16, at as u64 * 8, old, value));
                history[file][at].push(value);
            }
        }
        let mut left = landed.into_iter();
        let found: Vec<Vec<u64>> = history
            .iter()
            .map(|file| file.iter().map(|values| values[left.next().unwrap() % values.len()]).collect())
            .collect();
        let (store, files) = store(&found);
        store.run(replay(&log, &files)).unwrap();
        prop_assert_eq!(words(&store, 0), &memory[0][..]);
        prop_assert_eq!(words(&store, 1), &memory[1][..]);
    }

    #[test]
    fn tables_die_and_are_what_was_settled(
        seed: u64,
        capacity in 65usize..200,
        steps in proptest::collection::vec((0u64..4096, 1usize..40, any::<u8>(), 0u8..8, any::<bool>()), 1..80),
        dies_after in 0usize..80,
    ) {
        let store = Store::new(seed);
        let file = store.add("tables", Pages::of(&[0; 4096]));
        let log = store.add_log(capacity);
        let mut model = vec![0u8; 4096];
        {
            let budget = Budget::new(1 << 20);
            let tables = Tables::new(
                file.clone(), FileIndex(0), vec![file.clone()], 512, &budget, Some(log.clone()),
            );
            for (offset, len, value, then, hides) in steps.into_iter().take(dies_after) {
                let len = len.min(4096 - offset as usize);
                let order = if hides { Order::AfterData } else { Order::Anytime };
                let bytes = vec![value; len];
                store.run(tables.update(offset, &bytes, order)).unwrap();
                model[offset as usize..][..len].copy_from_slice(&bytes);
                match then {
                    0 => store.run(tables.write_back()).unwrap(),
                    // A round that its caller gives up, with writes in flight.
                    1 => {
                        store.run(Abandon::after(2, tables.write_back()));
                    }
                    _ => store.run(tables.settle()).unwrap(),
                }
            }
        }
        store.settle();
        prop_assert_eq!(store.overlaps(), 0);
        let entries = log.entries();
        let files = [file.clone() as Rc<dyn ImageFile>];
        store.run(replay(&entries, &files)).unwrap();
        prop_assert_eq!(store.pages(0).bytes(0..4096), model);
    }
}

#[test]
fn a_full_log_makes_changes_wait_and_a_failing_store_makes_them_fail() {
    let store = Store::new(3);
    let file: Rc<MemFile> = store.add("tables", Pages::of(&[0; 4096]));
    let log = store.add_log(65);
    let tables =
        Tables::new(file.clone(), FileIndex(0), vec![file], 512, &Budget::new(1 << 20), Some(log.clone()));
    store.run(tables.update(0, &[1; 512], Order::AfterData)).unwrap();
    assert_eq!((log.room(), tables.pending()), (1, 1));
    store.run(tables.load(1024)).unwrap();
    assert!(!tables.set(1024, &[2; 16], Order::AfterData), "two words have no room");
    assert_eq!(tables.get(1024, 16, <[u8]>::to_vec), Some(vec![0; 16]), "and were not changed");
    store.inject(Rule::when(Fault::EIO, |op| op.kind == Kind::Write));
    store.run(tables.update(1024, &[2; 16], Order::AfterData)).unwrap_err();
    store.heal();
    assert_eq!(log.room(), 1, "what is not in the file stays in the log");
    store.run(tables.update(1024, &[2; 16], Order::AfterData)).unwrap();
    assert_eq!((log.room(), store.pages(0).bytes(0..512)), (63, vec![1; 512]));
}
