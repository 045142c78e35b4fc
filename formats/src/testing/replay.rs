//! Crash states: what the files may hold when the host or the process dies at some moment of a recorded run.
//!
//! *Power loss.* By the contract of [`crate::file`] exactly this is durable: operations that were answered before a flush of their
//! file began, once that flush has succeeded. Of all others each has landed, or not, or (a write) in part, sector by sector. What
//! has landed did so at some moment between submission and answer (not answered: any later one), so two writes of the same
//! bytes keep their order when the second was submitted after the first was answered. Allocation logs are lost.
//!
//! *A flush that failed* may have lost some of what was not flushed: that is never durable, and may be gone at once.
//!
//! *Process death.* All that was answered is there, in the order in which it landed; what was in flight has landed, or not, or in
//! part. Allocation logs are kept.

use std::collections::{BTreeMap, VecDeque};

use super::pages::Pages;
use super::record::{Change, Event, Record};
use crate::allocation_log::LogEntry;

/// What died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The host: what was not flushed may be lost, and allocation logs are.
    PowerLoss,
    /// The process: the kernel and the allocation logs go on.
    ProcessDeath,
}

/// What is left after a crash.
#[derive(Debug, Clone)]
pub struct Crash {
    /// Events of the record that had happened.
    pub at: usize,
    /// What died.
    pub cause: Cause,
    /// The files of the store.
    pub files: Vec<Pages>,
    /// The allocation logs of the store; empty after power loss.
    pub logs: Vec<Vec<LogEntry>>,
}

#[derive(Debug, Clone)]
struct Undurable {
    file: usize,
    change: Change,
    submitted: usize,
    completed: Option<usize>,
}

/// Walks along a record and makes crash states of where it stands.
#[derive(Debug)]
pub struct Replayer<'a> {
    record: &'a Record,
    at: usize,
    /// What power loss cannot take away.
    durable: Vec<Pages>,
    /// What the kernel shows.
    visible: Vec<Pages>,
    /// Changes that are not in `durable`, by number.
    undurable: BTreeMap<u64, Undurable>,
    /// Entries, and the position behind the last.
    logs: Vec<(VecDeque<LogEntry>, u64)>,
}

impl<'a> Replayer<'a> {
    /// Stands before the first event.
    pub fn new(record: &'a Record) -> Replayer<'a> {
        Replayer {
            record,
            at: 0,
            durable: record.initial.clone(),
            visible: record.initial.clone(),
            undurable: BTreeMap::new(),
            logs: record
                .logs
                .iter()
                .map(|(entries, position)| (entries.iter().copied().collect(), *position))
                .collect(),
        }
    }

    /// Events that have happened.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Goes on until `at` events have happened.
    pub fn advance(&mut self, at: usize) {
        let record = self.record;
        while self.at < at.min(record.events.len()) {
            self.take(&record.events[self.at]);
            self.at += 1;
        }
    }

    fn take(&mut self, event: &Event) {
        let at = self.at;
        match event {
            Event::Submit { op, file, change } => {
                let undurable =
                    Undurable { file: *file, change: change.clone(), submitted: at, completed: None };
                self.undurable.insert(*op, undurable);
            }
            Event::Complete { op, ok, landed } => {
                let Some(undurable) = self.undurable.get_mut(op) else { return };
                if let Some(landed) = landed {
                    undurable.change = landed.clone();
                }
                undurable.completed = Some(at);
                undurable.change.apply(&mut self.visible[undurable.file]);
                if undurable.change == Change::Flush
                    || (landed.is_some() && !ok && is_nothing(&undurable.change))
                {
                    let (file, began, flush) =
                        (undurable.file, undurable.submitted, undurable.change == Change::Flush);
                    self.undurable.remove(op);
                    if flush && *ok {
                        self.make_durable(file, began);
                    }
                }
            }
            Event::Append { log, entries } => {
                self.logs[*log].0.extend(entries);
                self.logs[*log].1 += entries.len() as u64;
            }
            Event::Release { log, position } => {
                let (entries, end) = &mut self.logs[*log];
                let first = *end - entries.len() as u64;
                entries.drain(..position.saturating_sub(first) as usize);
            }
            Event::Lose { file, ops, gone } => self.lose(*file, ops, *gone),
            Event::Mark => {}
        }
    }

    /// Changes of `file` will never be durable; they are forgotten, or seen as long as nobody looks from outside.
    fn lose(&mut self, file: usize, ops: &[u64], gone: bool) {
        for op in ops {
            self.undurable.remove(op);
        }
        if gone {
            let mut pages = self.durable[file].clone();
            let mut left: Vec<&Undurable> = self
                .undurable
                .values()
                .filter(|change| change.file == file && change.completed.is_some())
                .collect();
            left.sort_unstable_by_key(|change| change.completed);
            left.iter().for_each(|change| change.change.apply(&mut pages));
            pages.extend(self.visible[file].length());
            self.visible[file] = pages;
        }
    }

    /// A flush of `file` that began at `began` has succeeded.
    fn make_durable(&mut self, file: usize, began: usize) {
        let covered =
            |change: &Undurable| change.file == file && change.completed.is_some_and(|end| end < began);
        let mut numbers: Vec<(Option<usize>, u64)> = self
            .undurable
            .iter()
            .filter(|(_, change)| covered(change))
            .map(|(number, change)| (change.completed, *number))
            .collect();
        numbers.sort_unstable();
        for (_, number) in numbers {
            if let Some(change) = self.undurable.remove(&number) {
                change.change.apply(&mut self.durable[file]);
            }
        }
    }

    /// One of the states that a crash may leave here, chosen by `rng`.
    pub fn crash(&self, cause: Cause, rng: &mut fastrand::Rng) -> Crash {
        let mut files = match cause {
            Cause::PowerLoss => self.durable.clone(),
            Cause::ProcessDeath => self.visible.clone(),
        };
        let open: Vec<&Undurable> = match cause {
            Cause::PowerLoss => self.undurable.values().collect(),
            Cause::ProcessDeath => {
                self.undurable.values().filter(|change| change.completed.is_none()).collect()
            }
        };
        let chosen = choose(open.len(), rng);
        let mut landed: Vec<(usize, &Undurable)> = Vec::new();
        for (change, _) in open.into_iter().zip(chosen).filter(|(_, chosen)| *chosen) {
            landed.push((rng.usize(change.submitted..=change.completed.unwrap_or(self.at)), change));
        }
        landed.sort_by_key(|(moment, _)| *moment);
        let tears = rng.u8(..3) == 0;
        for (_, change) in landed {
            if tears && rng.u8(..4) == 0 {
                change.change.torn(rng).apply(&mut files[change.file]);
            } else {
                change.change.apply(&mut files[change.file]);
            }
        }
        let logs = match cause {
            Cause::PowerLoss => vec![Vec::new(); self.logs.len()],
            Cause::ProcessDeath => {
                self.logs.iter().map(|(entries, _)| entries.iter().copied().collect()).collect()
            }
        };
        Crash { at: self.at, cause, files, logs }
    }

    /// Changes that power loss could take away here.
    pub fn undurable_len(&self) -> usize {
        self.undurable.len()
    }
}

fn is_nothing(change: &Change) -> bool {
    matches!(change, Change::Pieces(pieces) if pieces.is_empty())
}

/// Which of `len` changes have landed: the corners, all but one, one alone, and random shares.
fn choose(len: usize, rng: &mut fastrand::Rng) -> Vec<bool> {
    if len == 0 {
        return Vec::new();
    }
    let one = rng.usize(..len);
    match rng.u8(..10) {
        0 => vec![false; len],
        1 => vec![true; len],
        2 => (0..len).map(|number| number == one).collect(),
        3 => (0..len).map(|number| number != one).collect(),
        // In order of submission, up to some point: what a store without a cache does.
        4 => (0..len).map(|number| number < one).collect(),
        5 => (0..len).map(|_| rng.u8(..8) == 0).collect(),
        6 => (0..len).map(|_| rng.u8(..8) != 0).collect(),
        _ => (0..len).map(|_| rng.bool()).collect(),
    }
}

/// Makes `states` crash states of a record, in the order of their moments, and shows each to `judge`. About half are at the ends
/// of flushes (all of them, when there are fewer), the others at moments of any kind; two of three are power losses.
///
/// # Errors
/// The first error of `judge`, with words on the state before it.
pub fn crashes(
    record: &Record,
    states: usize,
    seed: u64,
    judge: impl FnMut(&Crash, u64) -> Result<(), String>,
) -> Result<(), String> {
    crashes_behind(record, 0, states, seed, judge)
}

/// As [`crashes`], at moments behind the first `from` events only.
///
/// # Errors
/// As [`crashes`].
pub fn crashes_behind(
    record: &Record,
    from: usize,
    states: usize,
    seed: u64,
    mut judge: impl FnMut(&Crash, u64) -> Result<(), String>,
) -> Result<(), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut moments = record.flush_ends();
    moments.retain(|moment| *moment >= from);
    rng.shuffle(&mut moments);
    moments.truncate(states / 2);
    while moments.len() < states {
        moments.push(rng.usize(from..=record.events.len()));
    }
    moments.sort_unstable();
    let mut replayer = Replayer::new(record);
    for (number, moment) in moments.into_iter().enumerate() {
        replayer.advance(moment);
        let cause = if rng.u8(..3) == 0 { Cause::ProcessDeath } else { Cause::PowerLoss };
        let crash = replayer.crash(cause, &mut rng);
        judge(&crash, rng.u64(..)).map_err(|error| {
            let of = record.events.len();
            format!("seed {seed}, state {number}: {cause:?} behind event {moment} of {of}: {error}")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Goal: the replayer makes every legal state and no illegal one. Method: small runs whose legal states are listed by hand;
    //! and a protocol with a missing flush that must be caught, the right one that must not.

    use std::collections::BTreeSet;

    use super::*;
    use crate::file::{Buf, ImageFile};
    use crate::testing::{Pages, Store};

    fn sector(fill: u8) -> Buf {
        Buf::copy_of(&[fill; 512])
    }

    /// All values of the first two sectors that 400 crashes at the end of the record give.
    fn outcomes(record: &Record, cause: Cause) -> BTreeSet<(u8, u8)> {
        let mut replayer = Replayer::new(record);
        replayer.advance(usize::MAX);
        let mut rng = fastrand::Rng::with_seed(1);
        (0..400)
            .map(|_| {
                let bytes = replayer.crash(cause, &mut rng).files[0].bytes(0..1024);
                (bytes[0], bytes[512])
            })
            .collect()
    }

    #[test]
    fn unflushed_writes_land_or_not_and_flushed_ones_stay() {
        let store = Store::new(1);
        let file = store.add("a", Pages::of(&[9; 1024]));
        store.start_record();
        store
            .run(async {
                file.write(0, sector(1)).await?;
                file.flush().await?;
                file.write(0, sector(2)).await?;
                file.write(0, sector(3)).await?;
                file.write(512, sector(4)).await
            })
            .unwrap();
        let record = store.take_record();
        // Sector 0: flushed 1, then 2 or 3, 3 never under 2 (it was answered before 3 began).
        let legal: BTreeSet<_> = [1, 2, 3].iter().flat_map(|a| [(*a, 9), (*a, 4)]).collect();
        assert_eq!(outcomes(&record, Cause::PowerLoss), legal);
        assert_eq!(outcomes(&record, Cause::ProcessDeath), BTreeSet::from([(3, 4)]));
    }

    #[test]
    fn a_flush_covers_only_what_was_answered_before_it_began() {
        let store = Store::new(2);
        let file = store.add("a", Pages::of(&[9; 1024]));
        store.start_record();
        let late = file.write(512, sector(2));
        store.hold(|op| op.range.start == 512);
        store
            .run(async {
                file.write(0, sector(1)).await?;
                file.flush().await
            })
            .unwrap();
        store.release();
        // Dropped: the kernel goes on.
        drop(late);
        store.settle();
        let record = store.take_record();
        assert_eq!(outcomes(&record, Cause::PowerLoss), BTreeSet::from([(1, 9), (1, 2)]));
        assert_eq!(outcomes(&record, Cause::ProcessDeath), BTreeSet::from([(1, 2)]));
    }

    /// A page and a pointer to it: a reader that finds the pointer must find the page.
    fn pointer_protocol(flush_between: bool) -> Result<(), String> {
        let store = Store::new(3);
        let file = store.add("a", Pages::of(&[0; 8192]));
        store.start_record();
        store
            .run(async {
                for number in 1..4u8 {
                    file.write(4096, Buf::copy_of(&[number; 4096])).await?;
                    if flush_between {
                        file.flush().await?;
                    }
                    file.write(0, sector(number)).await?;
                    file.flush().await?;
                }
                Ok::<(), crate::error::Error>(())
            })
            .unwrap();
        crashes(&store.take_record(), 300, 4, |crash, _| {
            let (pointer, page) = (crash.files[0].bytes(0..1)[0], crash.files[0].bytes(4096..8192));
            match page.iter().all(|byte| *byte >= pointer) {
                true => Ok(()),
                false => Err(format!("pointer {pointer} to a page of {}", page[0])),
            }
        })
    }

    #[test]
    fn a_missing_flush_is_found() {
        pointer_protocol(true).unwrap();
        let error = pointer_protocol(false).unwrap_err();
        assert!(error.contains("PowerLoss"), "{error}");
    }

    #[test]
    fn lengths_are_lost_and_kept() {
        let store = Store::new(5);
        let file = store.add("a", Pages::of(&[7; 4096]));
        store.start_record();
        store
            .run(async {
                file.extend(10_000).await?;
                file.flush().await?;
                file.truncate(2000).await
            })
            .unwrap();
        let record = store.take_record();
        let mut replayer = Replayer::new(&record);
        replayer.advance(usize::MAX);
        let mut rng = fastrand::Rng::with_seed(6);
        let lengths: BTreeSet<u64> =
            (0..50).map(|_| replayer.crash(Cause::PowerLoss, &mut rng).files[0].length()).collect();
        assert_eq!(lengths, BTreeSet::from([2000, 10_000]));
    }

    #[test]
    fn a_failed_flush_makes_nothing_durable_and_stays_failed() {
        let store = Store::new(7);
        let file = store.add("a", Pages::of(&[9; 1024]));
        store.start_record();
        store.inject(crate::testing::Rule::when(crate::testing::Fault::EIO, |op| {
            op.kind == crate::testing::Kind::Flush
        }));
        store.run(async {
            file.write(0, sector(1)).await.unwrap();
            file.flush().await.unwrap_err();
        });
        store.heal();
        store.run(file.flush()).unwrap_err();
        let record = store.take_record();
        assert_eq!(outcomes(&record, Cause::PowerLoss), BTreeSet::from([(1, 9), (9, 9)]));
        // Another object of the same file may flush again.
        store.run(store.open(0, true).flush()).unwrap();
    }
}
