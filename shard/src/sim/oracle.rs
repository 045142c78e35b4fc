//! What a disk may hold: a byte model that knows every write, acknowledged or not.
//!
//! Each change has a *stamp*. The bytes of a write are a function of its stamp and of their place on the disk, so data tell who
//! wrote them. Time is the count of the oracle's events (`instant`). A piece of the disk has a list of stamps that its bytes
//! may come from; beside these, every change that was in flight during a read (or after a flush was asked for) may be seen.

use std::collections::BTreeMap;

use super::random::mix;

pub type Stamp = u32;
/// Not answered yet.
const OPEN: u64 = u64::MAX;

#[derive(Debug, Clone, Copy)]
struct Change {
    start: u64,
    end: u64,
    zero: bool,
    sent: u64,
    ended: u64,
}

/// How a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The range holds it.
    Stored,
    /// The range may or may not hold it: a failed write, a trim, a client that went away.
    Unknown,
}

/// The state of a disk at one instant, to be compared with later.
#[derive(Debug, Clone)]
pub struct Snapshot {
    at: u64,
    pieces: Vec<(u64, u64, Vec<Stamp>)>,
}

/// One disk.
#[derive(Debug)]
pub struct Model {
    size: u64,
    changes: Vec<Change>,
    /// Start of each piece, with its candidates; it ends where the next one starts.
    pieces: BTreeMap<u64, Vec<Stamp>>,
    open: Vec<Stamp>,
    /// When an fdatasync last failed: what was sent before may be lost.
    pub doubt: u64,
    /// Whatever is written reads as zeroes.
    pub forgets: bool,
}

/// Stamp of zeroes that were there from the start, and of the other initial contents.
pub const INITIAL_ZERO: Stamp = 0;
pub const INITIAL_DATA: Stamp = 1;

/// Fills a buffer with the pattern of a write; `at` is the place of its first byte on the disk.
pub fn pattern(stamp: Stamp, at: u64, bytes: &mut [u8]) {
    let seed = mix(u64::from(stamp) | 1 << 40);
    let mut position = at;
    let mut rest = bytes;
    while !rest.is_empty() {
        let word = (seed ^ (position / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
        let from = (position % 8) as usize;
        let step = (8 - from).min(rest.len());
        let (now, later) = rest.split_at_mut(step);
        now.copy_from_slice(&word[from..from + step]);
        rest = later;
        position += step as u64;
    }
}

impl Model {
    pub fn new(size: u64) -> Model {
        let change = |zero| Change { start: 0, end: size, zero, sent: 0, ended: 0 };
        Model {
            size,
            changes: vec![change(true), change(false)],
            pieces: BTreeMap::from([(0, vec![INITIAL_ZERO])]),
            open: Vec::new(),
            doubt: 0,
            forgets: false,
        }
    }

    /// The disk is larger from now on, or maybe; what is new reads as zero.
    pub fn grow(&mut self, size: u64) {
        if size > self.size {
            self.pieces.insert(self.size, vec![INITIAL_ZERO]);
            self.size = size;
            self.changes[INITIAL_ZERO as usize].end = size;
        }
    }

    /// The range holds [`INITIAL_DATA`] from the start.
    pub fn set_initial(&mut self, start: u64, end: u64) {
        self.split(start);
        self.split(end);
        for (_, stamps) in self.pieces.range_mut(start..end) {
            *stamps = vec![INITIAL_DATA];
        }
    }

    fn split(&mut self, at: u64) {
        if at >= self.size || self.pieces.contains_key(&at) {
            return;
        }
        if let Some((_, stamps)) = self.pieces.range(..at).next_back() {
            let stamps = stamps.clone();
            self.pieces.insert(at, stamps);
        }
    }

    /// A change is sent.
    pub fn begin(&mut self, now: u64, start: u64, end: u64, zero: bool) -> Stamp {
        let stamp = self.changes.len() as Stamp;
        let zero = zero || self.forgets;
        self.changes.push(Change { start, end, zero, sent: now, ended: OPEN });
        self.open.push(stamp);
        stamp
    }

    /// A change is over.
    pub fn end(&mut self, now: u64, stamp: Stamp, outcome: Outcome) {
        let index = self.open.iter().position(|&open| open == stamp).expect("a change ends once");
        self.open.swap_remove(index);
        self.changes[stamp as usize].ended = now;
        let Change { start, end, sent, .. } = self.changes[stamp as usize];
        self.split(start);
        self.split(end);
        let changes = &self.changes;
        for (_, stamps) in self.pieces.range_mut(start..end) {
            if outcome == Outcome::Stored {
                stamps.retain(|&other| changes[other as usize].ended > sent);
            } else {
                // Zeroes look alike: of many the first (which an fdatasync may have lost) and the last count.
                let zeroes: Vec<_> = stamps.iter().copied().filter(|&s| changes[s as usize].zero).collect();
                if changes[stamp as usize].zero && zeroes.len() > 4 {
                    stamps.retain(|other| zeroes[0] == *other || !zeroes.contains(other));
                }
            }
            stamps.push(stamp);
        }
    }

    /// The candidates of a range now.
    pub fn snapshot(&self, now: u64, start: u64, end: u64) -> Snapshot {
        let first = self.pieces.range(..=start).next_back().map_or(0, |(&at, _)| at);
        let mut pieces: Vec<(u64, u64, Vec<Stamp>)> = Vec::new();
        for (&at, stamps) in self.pieces.range(first..end) {
            if let Some(last) = pieces.last_mut() {
                last.1 = at;
            }
            pieces.push((at.max(start), end, stamps.clone()));
        }
        Snapshot { at: now, pieces }
    }

    /// What may be durable when a change that asked for it is answered: itself, or what was in flight beside it.
    pub fn own(&self, stamp: Stamp) -> Snapshot {
        let Change { start, end, sent, .. } = self.changes[stamp as usize];
        Snapshot { at: sent, pieces: vec![(start, end, vec![stamp])] }
    }

    /// The candidates of each part of `[start, end)`: those of the snapshot, and of every change that was in flight since.
    fn candidates(&self, since: &Snapshot, start: u64, end: u64) -> Vec<(u64, u64, Vec<Stamp>)> {
        let later: Vec<Stamp> = (2..self.changes.len())
            .filter(|&stamp| {
                let change = &self.changes[stamp];
                change.ended > since.at && change.start < end && start < change.end
            })
            .map(|stamp| stamp as Stamp)
            .collect();
        let mut out = Vec::new();
        for (from, to, stamps) in &since.pieces {
            let (from, to) = ((*from).max(start), (*to).min(end));
            if from >= to {
                continue;
            }
            let mut cuts = vec![from, to];
            for &stamp in &later {
                let change = &self.changes[stamp as usize];
                cuts.extend([change.start, change.end].into_iter().filter(|&cut| cut > from && cut < to));
            }
            cuts.sort_unstable();
            cuts.dedup();
            for cut in cuts.windows(2) {
                let mut all = stamps.clone();
                all.extend(later.iter().filter(|&&stamp| {
                    let change = &self.changes[stamp as usize];
                    change.start <= cut[0] && cut[1] <= change.end && !stamps.contains(&stamp)
                }));
                out.push((cut[0], cut[1], all));
            }
        }
        out
    }

    fn check(&self, candidates: &[(u64, u64, Vec<Stamp>)], start: u64, bytes: &[u8]) -> Result<(), String> {
        for (from, to, stamps) in candidates {
            let found = &bytes[(from - start) as usize..(to - start) as usize];
            let mut expected = vec![0; found.len()];
            let mut matched = vec![false; found.len()];
            let mut whole = false;
            for &stamp in stamps.iter().rev() {
                if self.changes[stamp as usize].zero {
                    expected.fill(0);
                } else {
                    pattern(stamp, *from, &mut expected);
                }
                if expected == found {
                    whole = true;
                    break;
                }
                for (index, matched) in matched.iter_mut().enumerate() {
                    *matched |= expected[index] == found[index];
                }
            }
            if !whole && let Some(bad) = matched.iter().position(|&matched| !matched) {
                let at = from + bad as u64;
                let changes: Vec<_> = stamps.iter().map(|&s| (s, self.changes[s as usize])).collect();
                return Err(format!(
                    "byte {at} is {:#04x} (in {from}..{to}), which none of these wrote: {changes:?}; {}",
                    found[bad],
                    self.explain(at, found[bad]),
                ));
            }
        }
        Ok(())
    }

    /// Who may have written a byte, for the message.
    fn explain(&self, at: u64, byte: u8) -> String {
        let wrote = |stamp: &usize| {
            let change = &self.changes[*stamp];
            let mut expected = [0];
            if !change.zero {
                pattern(*stamp as Stamp, at, &mut expected);
            }
            change.start <= at && at < change.end && expected[0] == byte
        };
        let wrote: Vec<_> =
            (0..self.changes.len()).filter(wrote).map(|stamp| (stamp, self.changes[stamp])).collect();
        format!("the byte looks like one of {wrote:?}")
    }

    /// Checks what a read (asked for at the snapshot) found at `start`.
    pub fn check_read(&self, since: &Snapshot, start: u64, bytes: &[u8]) -> Result<(), String> {
        self.check(&self.candidates(since, start, start + bytes.len() as u64), start, bytes)
    }

    /// Whether a range may read as zeroes.
    pub fn may_be_zero(&self, since: &Snapshot, start: u64, end: u64) -> bool {
        let any_zero = |stamps: &Vec<Stamp>| stamps.iter().any(|&stamp| self.changes[stamp as usize].zero);
        self.candidates(since, start, end).iter().all(|(_, _, stamps)| any_zero(stamps))
    }

    /// Checks what is durable in a range after a flush that was asked for at the snapshot. What an earlier failed fdatasync may
    /// have lost is left out.
    pub fn check_durable(&self, since: &Snapshot, start: u64, bytes: &[u8]) -> Result<(), String> {
        let mut candidates = self.candidates(since, start, start + bytes.len() as u64);
        candidates.retain(|(_, _, stamps)| {
            stamps
                .iter()
                .all(|&stamp| stamp < 2 && self.doubt == 0 || self.changes[stamp as usize].sent > self.doubt)
        });
        self.check(&candidates, start, bytes)
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the model accepts what the rules allow and nothing else. Method: the cases of the rules, one by one.
    use super::*;

    fn bytes(stamp: Stamp, start: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        pattern(stamp, start, &mut bytes);
        bytes
    }

    #[test]
    fn a_read_sees_the_last_write_or_one_in_flight() {
        let mut model = Model::new(4096);
        let first = model.begin(1, 512, 1024, false);
        model.end(2, first, Outcome::Stored);
        let since = model.snapshot(3, 0, 4096);
        assert!(model.check_read(&since, 512, &bytes(first, 512, 512)).is_ok());
        assert!(model.check_read(&since, 512, &[0; 512]).is_err(), "an acknowledged write was lost");
        let second = model.begin(4, 600, 700, false);
        let mut mixed = bytes(first, 512, 512);
        mixed[88..188].copy_from_slice(&bytes(second, 600, 100));
        assert!(model.check_read(&since, 512, &mixed).is_ok(), "in flight during the read");
        model.end(5, second, Outcome::Stored);
        assert!(model.check_read(&since, 512, &bytes(first, 512, 512)).is_ok(), "the read began before");
        let since = model.snapshot(6, 0, 4096);
        assert!(model.check_read(&since, 512, &bytes(first, 512, 512)).is_err(), "the second write is lost");
    }

    #[test]
    fn failed_and_concurrent_changes_leave_both() {
        let mut model = Model::new(4096);
        let (a, b) = (model.begin(1, 0, 512, false), model.begin(2, 0, 512, false));
        model.end(3, b, Outcome::Stored);
        model.end(4, a, Outcome::Stored);
        let c = model.begin(5, 0, 512, true);
        model.end(6, c, Outcome::Unknown);
        let since = model.snapshot(7, 0, 512);
        for stamp in [a, b] {
            assert!(model.check_read(&since, 0, &bytes(stamp, 0, 512)).is_ok());
        }
        assert!(model.may_be_zero(&since, 0, 512));
        let d = model.begin(8, 0, 512, false);
        model.end(9, d, Outcome::Stored);
        let since = model.snapshot(10, 0, 512);
        assert!(
            !model.may_be_zero(&since, 0, 512) && model.check_read(&since, 0, &bytes(a, 0, 512)).is_err()
        );
    }
}
