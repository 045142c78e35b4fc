//! A file of the simulated store: contents, what of them is durable, holes, length, and how the store misbehaves.

use super::kernel::What;
use super::random::Random;

/// Unit of allocation in bytes.
pub const BLOCK: u64 = 4096;

/// How a store misbehaves; chances in one of a thousand.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub eio: u64,
    pub enospc: u64,
    pub short: u64,
    pub again: u64,
    /// What is not to wait would have to.
    pub wait: u64,
    pub slow: u64,
    pub sync: u64,
    pub side: u64,
}

/// A file.
#[derive(Debug)]
pub struct File {
    /// Of which disk.
    pub disk: usize,
    /// Room up to the size that clients see.
    pub data: Vec<u8>,
    /// What a power loss would leave.
    pub durable: Vec<u8>,
    pub length: u64,
    /// One per [`BLOCK`].
    pub allocated: Vec<bool>,
    /// Ranges that no fdatasync has begun to write out; a failed one forgets them, as Linux does.
    dirty: Vec<(u64, u64)>,
    pub align: u64,
    pub memory_align: u64,
    pub is_block: bool,
    pub can_punch: bool,
    pub can_zero: bool,
    pub faults: Faults,
    /// Operations that are to fail: the how-manieth of its kind from now on.
    pub plots: Vec<(What, u32)>,
    /// Its store.
    pub store: u64,
    /// It does not know whether an operation would have to wait.
    pub cannot_tell: bool,
    /// New operations do not end before somebody releases the store.
    pub hung: bool,
    /// No operation may start: the disk was reported as paused or parked.
    pub frozen: bool,
    /// Operations in flight.
    pub busy: u32,
    pub syncs: u32,
    pub fallocates: u32,
}

/// Data on its way to durability: start and bytes.
pub type Writeback = Vec<(u64, Vec<u8>)>;

impl File {
    /// A file that holds these bytes.
    pub fn of(disk: usize, bytes: Vec<u8>) -> File {
        File {
            disk,
            durable: bytes.clone(),
            length: bytes.len() as u64,
            allocated: vec![true; bytes.len().div_ceil(BLOCK as usize)],
            data: bytes,
            dirty: Vec::new(),
            align: 1,
            memory_align: 1,
            is_block: false,
            can_punch: true,
            can_zero: true,
            faults: Faults::default(),
            plots: Vec::new(),
            store: 0,
            cannot_tell: false,
            hung: false,
            frozen: false,
            busy: 0,
            syncs: 0,
            fallocates: 0,
        }
    }

    /// A raw disk, with data here and there to be.
    pub fn new(disk: usize, length: u64, size: u64, rng: &mut Random) -> File {
        let blocks = size.div_ceil(BLOCK) as usize;
        let mut allocated = Vec::with_capacity(blocks);
        let mut on = rng.chance(500);
        while allocated.len() < blocks {
            let run = rng.between(1, 1 + blocks as u64 / 4) as usize;
            allocated.extend(std::iter::repeat_n(on, run.min(blocks - allocated.len())));
            on = !on;
        }
        File { length, allocated, ..File::of(disk, vec![0; size as usize]) }
    }

    /// Grows or cuts the file.
    pub fn set_length(&mut self, length: u64) {
        for bytes in [&mut self.data, &mut self.durable] {
            bytes.resize(length as usize, 0);
        }
        self.allocated.resize(length.div_ceil(BLOCK) as usize, false);
        self.dirty.retain(|range| range.1 <= length);
        self.length = length;
    }

    /// Whether the next operation of a kind is one that is to fail.
    pub fn is_plotted(&mut self, what: What) -> bool {
        let mut now = false;
        self.plots.retain_mut(|(kind, left)| {
            *left -= u32::from(*kind == what);
            now |= *left == 0;
            *left > 0
        });
        now
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        if bytes.is_empty() {
            return;
        }
        assert!(end <= self.data.len() as u64, "write behind the served size: {offset}+{}", bytes.len());
        self.data[offset as usize..end as usize].copy_from_slice(bytes);
        self.length = self.length.max(end);
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            self.allocated[block as usize] = true;
        }
        self.dirty.push((offset, end));
    }

    /// Zeroes a range; with `punch` whole blocks become holes.
    pub fn erase(&mut self, offset: u64, len: u64, punch: bool) {
        let end = (offset + len).min(self.length);
        if end <= offset {
            return;
        }
        self.data[offset as usize..end as usize].fill(0);
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let whole = block * BLOCK >= offset && (block + 1) * BLOCK <= end;
            if !punch {
                self.allocated[block as usize] = true;
            } else if whole {
                self.allocated[block as usize] = false;
            }
        }
        self.dirty.push((offset, end));
    }

    /// fdatasync begins: what it will make durable.
    pub fn begin_sync(&mut self) -> Writeback {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in dirty {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        merged
            .into_iter()
            .map(|(start, end)| (start, self.data[start as usize..end as usize].to_vec()))
            .collect()
    }

    pub fn end_sync(&mut self, writeback: Writeback) {
        for (start, bytes) in writeback {
            self.durable[start as usize..start as usize + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// Data and holes, as SEEK_DATA and SEEK_HOLE tell: (length, hole).
    pub fn extents(&self, offset: u64, len: u64, max: usize) -> Vec<(u64, bool)> {
        let end = offset + len;
        let mut out: Vec<(u64, bool)> = Vec::new();
        let mut at = offset;
        while at < end {
            let stop = ((at / BLOCK + 1) * BLOCK).min(end);
            let hole = at >= self.length || !self.allocated[(at / BLOCK) as usize];
            let full = out.len() == max;
            match out.last_mut() {
                Some(last) if last.1 == hole => last.0 += stop - at,
                _ if full => break,
                _ => out.push((stop - at, hole)),
            }
            at = stop;
        }
        out
    }
}
