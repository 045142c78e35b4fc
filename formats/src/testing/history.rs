//! What a guest did to a disk, and so which bytes it may find there after a crash.
//!
//! The disk is 512-byte blocks. Every write fills each of its blocks with a stamp of its own, so that a block tells which write it
//! is of, and of which block it was. A block may hold any value that was written to it (or its initial one), except values that
//! were *superseded*: a later write began after that one had ended, and that later write was durable. A write is durable
//! - for power loss, when it was answered before a flush began that was answered before the crash;
//! - for the death of the process, when it was answered before the crash.
//!
//! The size of the disk is a value like that of a block.
//!
//! When a flush has failed and that was accepted ([`History::doubt`]) what was answered since the last good one is never durable, and
//! a block that shares a granule with it may be zero, or hold anything that it ever held: its place may be one where it was before.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use super::replay::Cause;
use super::store::Store;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 512;
const STAMP: u64 = 0x7374_616d_7065_6421;

/// What a guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Stamps are written.
    Write,
    /// The blocks become zero.
    Zero,
    /// The blocks become zero or stay as they are.
    Discard,
}

#[derive(Debug)]
struct Entry {
    deed: Deed,
    blocks: Range<u64>,
    began: usize,
    /// When it was answered; `None` when it never was.
    ended: Option<usize>,
    ok: bool,
}

#[derive(Debug)]
struct Resize {
    bytes: u64,
    began: usize,
    ended: Option<usize>,
    ok: bool,
}

#[derive(Debug, Default)]
struct Inner {
    entries: Vec<Entry>,
    resizes: Vec<Resize>,
    /// Numbers of the entries that touch a block.
    by_block: Vec<Vec<u32>>,
    /// Begin and (successful) end of each flush.
    flushes: Vec<(usize, Option<usize>)>,
    doubts: Vec<Doubt>,
}

/// What was answered at one of these moments is in doubt, and with it the granules of this many blocks that it touched.
#[derive(Debug)]
struct Doubt {
    moments: Range<usize>,
    granule: u64,
    /// What was lost does not read as something that was there before: it is decrypted.
    noise: bool,
}

impl Doubt {
    fn holds(&self, entry: &Entry) -> bool {
        entry.began < self.moments.end && entry.ended.is_none_or(|ended| ended >= self.moments.start)
    }
}

/// See the module.
#[derive(Debug)]
pub struct History {
    store: Rc<Store>,
    initial: Vec<u8>,
    inner: RefCell<Inner>,
}

/// The bytes of block `block` as write number `entry` leaves them.
pub fn stamp(entry: u64, block: u64) -> [u8; BLOCK_BYTES] {
    let mut bytes = [(entry.wrapping_mul(31) ^ block) as u8 | 1; BLOCK_BYTES];
    for (at, word) in [STAMP, entry, block].into_iter().enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// What a block looks like, in words.
fn describe(bytes: &[u8]) -> String {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at * 8 + byte]));
    if bytes.iter().all(|byte| *byte == 0) {
        "zeroes".to_string()
    } else if word(0) == STAMP && stamp(word(1), word(2)) == bytes {
        format!("write {} of block {}", word(1), word(2))
    } else {
        format!("bytes {:02x?}...", &bytes[..16])
    }
}

impl Inner {
    /// The doubts about granules that a block is in, if it was not durably written since: that began at `before` at the latest.
    fn doubts_of(&self, block: u64, before: usize) -> impl Iterator<Item = &Doubt> {
        self.doubts.iter().filter(move |doubt| doubt.moments.end > before).filter(move |doubt| {
            let start = block / doubt.granule * doubt.granule;
            let near = (start..start + doubt.granule).filter_map(|block| self.by_block.get(block as usize));
            near.flatten().any(|number| doubt.holds(&self.entries[*number as usize]))
        })
    }
}

impl History {
    /// Of a disk that holds `initial` (durably); moments are those of the recording of `store`.
    pub fn new(store: &Rc<Store>, initial: Vec<u8>) -> History {
        History { store: store.clone(), initial, inner: RefCell::default() }
    }

    /// What happened to a block, in words: what, when it began and ended.
    pub fn tell(&self, block: u64) -> String {
        let inner = self.inner.borrow();
        let numbers = inner.by_block.get(block as usize).map_or(&[][..], |numbers| &numbers[..]);
        let of = |number: &u32| {
            let Entry { deed, blocks, began, ended, ok } = &inner.entries[*number as usize];
            format!("{number}: {deed:?} of {blocks:?}, began {began}, ended {ended:?}, ok {ok}")
        };
        numbers.iter().map(of).collect::<Vec<_>>().join("\n")
    }

    /// The present moment, for [`History::judge_read`].
    pub fn moment(&self) -> usize {
        self.store.mark()
    }

    /// Something begins; the answer is its number.
    pub fn begin(&self, deed: Deed, blocks: Range<u64>) -> u64 {
        let began = self.store.mark();
        let mut inner = self.inner.borrow_mut();
        let number = inner.entries.len();
        if inner.by_block.len() < blocks.end as usize {
            inner.by_block.resize(blocks.end as usize, Vec::new());
        }
        inner.by_block[blocks.start as usize..blocks.end as usize]
            .iter_mut()
            .for_each(|list| list.push(number as u32));
        inner.entries.push(Entry { deed, blocks, began, ended: None, ok: false });
        number as u64
    }

    /// The bytes that write `number` is to write.
    pub fn data(&self, number: u64) -> Vec<u8> {
        let blocks = self.inner.borrow().entries[number as usize].blocks.clone();
        blocks.flat_map(|block| stamp(number, block)).collect()
    }

    /// It was answered.
    pub fn end(&self, number: u64, ok: bool) {
        let ended = self.store.mark();
        let entry = &mut self.inner.borrow_mut().entries[number as usize];
        (entry.ended, entry.ok) = (Some(ended), ok);
    }

    /// A flush begins; the answer is its number.
    pub fn begin_flush(&self) -> usize {
        let began = self.store.mark();
        let flushes = &mut self.inner.borrow_mut().flushes;
        flushes.push((began, None));
        flushes.len() - 1
    }

    /// A flush was answered.
    pub fn end_flush(&self, number: usize, ok: bool) {
        let ended = self.store.mark();
        self.inner.borrow_mut().flushes[number].1 = ok.then_some(ended);
    }

    /// It was accepted that what no good flush has covered may be lost: blocks that were written, and those that share a granule of
    /// `granule` blocks with them. They may then hold anything when they are `encrypted`, and what they held at some time when not.
    pub fn doubt(&self, granule: u64, encrypted: bool) {
        let now = self.store.mark();
        let mut inner = self.inner.borrow_mut();
        let good = inner.flushes.iter().filter(|(_, ended)| ended.is_some());
        let last = good.map(|(began, _)| *began).max().unwrap_or(0);
        inner.doubts.push(Doubt { moments: last..now, granule, noise: encrypted });
    }

    /// The blocks of the writes that are in doubt.
    pub fn doubtful_writes(&self) -> Vec<Range<u64>> {
        let inner = self.inner.borrow();
        let held =
            |entry: &&Entry| entry.deed == Deed::Write && inner.doubts.iter().any(|doubt| doubt.holds(entry));
        inner.entries.iter().filter(held).map(|entry| entry.blocks.clone()).collect()
    }

    /// The disk is about to get another size; the answer is the number of that.
    pub fn begin_resize(&self, bytes: u64) -> usize {
        let began = self.store.mark();
        let resizes = &mut self.inner.borrow_mut().resizes;
        resizes.push(Resize { bytes, began, ended: None, ok: false });
        resizes.len() - 1
    }

    /// A resize was answered.
    pub fn end_resize(&self, number: usize, ok: bool) {
        let ended = self.store.mark();
        let resize = &mut self.inner.borrow_mut().resizes[number];
        (resize.ended, resize.ok) = (Some(ended), ok);
    }

    /// Checks the size and the contents of the whole disk after a crash behind `at` events.
    ///
    /// # Errors
    /// Says which size is wrong, or names the first block that holds what it must not, and what it may hold.
    pub fn judge(&self, at: usize, cause: Cause, disk: &[u8]) -> Result<(), String> {
        let durable_before = match cause {
            Cause::PowerLoss => {
                let inner = self.inner.borrow();
                let done = inner.flushes.iter().filter(|(_, ended)| ended.is_some_and(|ended| ended < at));
                done.map(|(began, _)| *began).max().unwrap_or(0)
            }
            Cause::ProcessDeath => at,
        };
        self.judge_size(disk.len() as u64, at, durable_before)?;
        self.judge_blocks(0, disk, at, durable_before)
    }

    /// As [`History::judge_blocks`], of the size.
    fn judge_size(&self, bytes: u64, seen_before: usize, durable_before: usize) -> Result<(), String> {
        let inner = self.inner.borrow();
        let began = || inner.resizes.iter().filter(|resize| resize.began < seen_before);
        let is_durable =
            |resize: &&Resize| resize.ok && resize.ended.is_some_and(|ended| ended < durable_before);
        let before = began().filter(is_durable).map(|resize| resize.began).max();
        let live =
            |resize: &&Resize| resize.ended.is_none_or(|ended| before.is_none_or(|before| ended >= before));
        let mut legal: Vec<u64> = began().filter(live).map(|resize| resize.bytes).collect();
        if before.is_none() {
            legal.push(self.initial.len() as u64);
        }
        match legal.contains(&bytes) {
            true => Ok(()),
            false => Err(format!("the disk has {bytes} bytes; legal are: {legal:?}")),
        }
    }

    /// Checks what a read found that began at the moment `began` (see [`Store::mark`]) and is just over.
    ///
    /// # Errors
    /// As [`History::judge`].
    pub fn judge_read(&self, began: usize, first_block: u64, bytes: &[u8]) -> Result<(), String> {
        self.judge_blocks(first_block, bytes, self.store.mark(), began)
    }

    /// Each block must hold something that began before `seen_before`, and that was not superseded by something that ended before
    /// `durable_before`.
    fn judge_blocks(
        &self,
        first: u64,
        bytes: &[u8],
        seen_before: usize,
        durable_before: usize,
    ) -> Result<(), String> {
        let inner = self.inner.borrow();
        for (block, found) in (first..).zip(bytes.chunks(BLOCK_BYTES)) {
            let numbers = inner.by_block.get(block as usize).map_or(&[][..], |numbers| &numbers[..]);
            let entry = |number: u32| &inner.entries[number as usize];
            let began = numbers.iter().copied().filter(|number| entry(*number).began < seen_before);
            let is_durable = |entry: &Entry| {
                entry.ok
                    && entry.deed != Deed::Discard
                    && entry.ended.is_some_and(|ended| ended < durable_before)
                    && !inner.doubts.iter().any(|doubt| doubt.holds(entry))
            };
            // The latest begin of a durable write: whatever had ended before it is superseded.
            let before =
                began.clone().map(entry).filter(|entry| is_durable(entry)).map(|entry| entry.began).max();
            let live =
                |entry: &Entry| entry.ended.is_none_or(|ended| before.is_none_or(|before| ended >= before));
            let value = |number: u32| match entry(number).deed {
                Deed::Write => stamp(u64::from(number), block),
                Deed::Zero | Deed::Discard => [0; BLOCK_BYTES],
            };
            let legal = began.filter(|number| live(entry(*number))).map(value);
            let initial = self.initial.chunks(BLOCK_BYTES).nth(block as usize).unwrap_or(&[0; BLOCK_BYTES]);
            if (before.is_none() && found == initial) || legal.clone().any(|value| value == found) {
                continue;
            }
            let mut ever =
                numbers.iter().copied().filter(|number| entry(*number).began < seen_before).map(value);
            let old =
                found == initial || found.iter().all(|byte| *byte == 0) || ever.any(|value| value == found);
            if inner.doubts_of(block, before.unwrap_or(0)).any(|doubt| old || doubt.noise) {
                continue;
            }
            let mut legal: Vec<String> = legal.map(|value| describe(&value)).collect();
            if before.is_none() {
                legal.push(format!("initial {}", describe(initial)));
            }
            return Err(format!("block {block} holds {}; legal are: {}", describe(found), legal.join(", ")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the judge lets pass what is legal and nothing else. Method: one block with a written history, judged at each moment.

    use super::*;
    use crate::testing::{Pages, Store};

    #[test]
    fn one_block() {
        let store = Store::new(1);
        store.add("a", Pages::empty());
        store.start_record();
        let history = History::new(&store, vec![0; 1024]);
        let a = history.begin(Deed::Write, 0..1); // event 0
        history.end(a, true); // 1
        let flush = history.begin_flush(); // 2
        let b = history.begin(Deed::Write, 0..1); // 3
        history.end_flush(flush, true); // 4
        history.end(b, true); // 5
        let zero = || [0; 512].to_vec();
        let size = |bytes, at| history.judge_size(bytes, at, at).is_ok();
        assert!(size(1024, 5) && !size(512, 5));
        let judge = |at, cause, first: Vec<u8>| history.judge(at, cause, &[first, zero()].concat()).is_ok();
        let (a, b) = (stamp(a, 0).to_vec(), stamp(b, 0).to_vec());
        // Before the flush was answered the write may be lost; afterwards not.
        assert!(judge(2, Cause::PowerLoss, zero()) && judge(2, Cause::PowerLoss, a.clone()));
        assert!(!judge(2, Cause::ProcessDeath, zero()) && judge(2, Cause::ProcessDeath, a.clone()));
        assert!(!judge(5, Cause::PowerLoss, zero()) && judge(5, Cause::PowerLoss, a.clone()));
        // The second write may have landed before it was answered, and must not have before it began.
        assert!(judge(5, Cause::PowerLoss, b.clone()) && !judge(3, Cause::PowerLoss, b.clone()));
        // It was not flushed, but the process knows that it was answered.
        assert!(judge(6, Cause::PowerLoss, a.clone()) && !judge(6, Cause::ProcessDeath, a.clone()));
        // Another block's bytes are never legal.
        let foreign = [stamp(0, 1).to_vec(), zero()].concat();
        let error = history.judge(6, Cause::PowerLoss, &foreign).unwrap_err();
        assert!(error.contains("write 0 of block 1"), "{error}");
    }

    #[test]
    fn sizes() {
        let store = Store::new(1);
        store.add("a", Pages::empty());
        store.start_record();
        let history = History::new(&store, vec![0; 1024]);
        let grown = history.begin_resize(2048); // event 0
        history.end_resize(grown, true); // 1
        let flush = history.begin_flush(); // 2
        history.end_flush(flush, true); // 3
        let refused = history.begin_resize(4096); // 4
        history.end_resize(refused, false); // 5
        let legal = |at, cause| {
            let is_legal = |sectors: &usize| history.judge(at, cause, &vec![0; *sectors * 512]).is_ok();
            (1..10).filter(is_legal).collect::<Vec<_>>()
        };
        assert_eq!(legal(0, Cause::ProcessDeath), [2]);
        assert_eq!(legal(1, Cause::PowerLoss), [2, 4]);
        assert_eq!((legal(2, Cause::PowerLoss), legal(2, Cause::ProcessDeath)), (vec![2, 4], vec![4]));
        assert_eq!(legal(4, Cause::PowerLoss), [4]);
        // What failed may have happened.
        assert_eq!(legal(6, Cause::PowerLoss), [4, 8]);
    }
}
