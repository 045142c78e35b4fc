//! What a disk may hold, byte by byte, when many requests are in flight and the daemon may die: the oracle of the tests
//! that write at random.
//!
//! The rule: a byte holds what some request wrote there, or what it held before all of them, unless *another* request that
//! changed it came in between for certain: that one was sent after the answer to the first, and was itself answered
//! before anybody looked. Requests in flight together may take effect in either order; one that was never answered may
//! have taken effect in whole, in part or not at all. A trim may zero its range or leave it alone, so it never rules
//! another request out.

use std::ops::Range;

use super::nbd_client::{STATE_HOLE, STATE_ZERO};

/// A moment: how many requests and answers went before.
pub type Tick = u64;

/// What a request leaves in its range.
#[derive(Debug, Clone)]
pub enum Effect {
    Bytes(Vec<u8>),
    Zeroes,
    /// Zeroes, or nothing.
    Trim,
}

#[derive(Debug)]
struct Change {
    range: Range<u64>,
    effect: Effect,
    sent: Tick,
    answered: Option<Tick>,
}

impl Change {
    fn byte(&self, position: u64) -> u8 {
        match &self.effect {
            Effect::Bytes(bytes) => bytes[(position - self.range.start) as usize],
            Effect::Zeroes | Effect::Trim => 0,
        }
    }

    fn surely_before(&self, moment: Tick) -> bool {
        !matches!(self.effect, Effect::Trim) && self.answered.is_some_and(|answered| answered < moment)
    }
}

/// The bytes of a disk and the changes since they were known for certain.
pub struct Model {
    base: Vec<u8>,
    changes: Vec<Change>,
    now: Tick,
}

impl Model {
    /// A disk that holds these bytes.
    pub fn new(base: Vec<u8>) -> Model {
        Model { base, changes: Vec::new(), now: 0 }
    }

    /// The bytes, which [`Model::settle`] has made certain.
    pub fn into_bytes(self) -> Vec<u8> {
        assert!(self.changes.is_empty(), "settled");
        self.base
    }

    pub fn size(&self) -> u64 {
        self.base.len() as u64
    }

    /// A moment later than all before.
    pub fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    /// A change is about to be sent; returns its number for [`Model::answered`].
    pub fn sent(&mut self, range: Range<u64>, effect: Effect) -> usize {
        let sent = self.tick();
        self.changes.push(Change { range, effect, sent, answered: None });
        self.changes.len() - 1
    }

    /// The answer to a change came: it was done.
    pub fn answered(&mut self, change: usize) {
        let now = self.tick();
        self.changes[change].answered = Some(now);
    }

    /// How many changes have no answer.
    pub fn unanswered(&self) -> usize {
        self.changes.iter().filter(|change| change.answered.is_none()).count()
    }

    /// Checks bytes that were read at `offset` by a request that was sent at `sent` and is answered now.
    pub fn check(&self, offset: u64, data: &[u8], sent: Tick) -> Result<(), String> {
        self.each_segment(offset..offset + data.len() as u64, sent, |segment, base, candidates| {
            for position in segment {
                let found = data[(position - offset) as usize];
                let as_before = base && self.base[position as usize] == found;
                if !as_before && !candidates.iter().any(|change| change.byte(position) == found) {
                    let before = self.base[position as usize];
                    return Err(format!(
                        "byte {position} is {found:#04x}; it was {before:#04x}{}, and may be of {:?}",
                        if base { "" } else { ", which was overwritten" },
                        candidates.iter().map(|c| (&c.range, c.sent, c.answered)).collect::<Vec<_>>(),
                    ));
                }
            }
            Ok(())
        })
    }

    /// Checks extents of a block status at `offset`: they cover the disk's range in order, and what is said to be zero
    /// may be zero.
    pub fn check_extents(&self, range: Range<u64>, extents: &[(u32, u32)], sent: Tick) -> Result<(), String> {
        let mut position = range.start;
        for &(length, state) in extents {
            let end = position + u64::from(length);
            if length == 0 || position >= range.end || end > self.size() {
                return Err(format!("extents {extents:?} for {range:?}"));
            }
            if state & STATE_HOLE != 0 && state & STATE_ZERO == 0 {
                return Err(format!("a hole at {position} that does not read as zero"));
            }
            if state & STATE_ZERO != 0 {
                let zeroes = vec![0; length as usize];
                self.check(position, &zeroes, sent).map_err(|why| format!("said to be zero: {why}"))?;
            }
            position = end;
        }
        if extents.is_empty() { Err("no extents".into()) } else { Ok(()) }
    }

    /// Nothing is in flight any more and this is the whole disk: checks it and begins a new history.
    pub fn settle(&mut self, data: Vec<u8>) -> Result<(), String> {
        if data.len() != self.base.len() {
            return Err(format!("the disk has {} bytes, not {}", data.len(), self.base.len()));
        }
        let now = self.tick();
        self.check(0, &data, now)?;
        self.changes.clear();
        self.base = data;
        Ok(())
    }

    /// Calls `visit` for pieces of `range` that the same changes cover, with whether the bytes before them all are
    /// possible and the changes that are.
    fn each_segment(
        &self,
        range: Range<u64>,
        sent: Tick,
        mut visit: impl FnMut(Range<u64>, bool, &[&Change]) -> Result<(), String>,
    ) -> Result<(), String> {
        let overlaps = |change: &&Change| change.range.start < range.end && range.start < change.range.end;
        let near: Vec<&Change> = self.changes.iter().filter(overlaps).collect();
        let borders = near.iter().flat_map(|change| [change.range.start, change.range.end]);
        let mut borders: Vec<u64> = borders.filter(|border| range.contains(border)).collect();
        borders.extend([range.start, range.end]);
        borders.sort_unstable();
        borders.dedup();
        for pair in borders.windows(2) {
            let segment = pair[0]..pair[1];
            let here: Vec<&Change> =
                near.iter().copied().filter(|change| change.range.contains(&segment.start)).collect();
            let certain: Vec<&Change> = here.iter().copied().filter(|c| c.surely_before(sent)).collect();
            // The latest certain change by the time it was sent rules out all that were answered before that.
            let line = certain.iter().map(|change| change.sent).max();
            let ruled_out = |change: &Change| {
                line.is_some_and(|line| change.answered.is_some_and(|answered| answered < line))
            };
            let candidates: Vec<&Change> = here.into_iter().filter(|change| !ruled_out(change)).collect();
            visit(segment, line.is_none(), &candidates)?;
        }
        Ok(())
    }
}
