//! Entries of L2 tables: where a cluster of the disk is.
//!
//! | bits | standard entry (8 bytes) |
//! |---|---|
//! | 0 | reads as zero, whatever the place holds (version 3, not with extended entries) |
//! | 1-8, 56-61 | reserved |
//! | 9-55 | offset of the cluster; 0: none |
//! | 62 | compressed: the other bits are a byte offset and a number of sectors |
//! | 63 | the refcount is exactly one |
//!
//! An extended entry has eight bytes more: bits 0-31 say which of 32 subclusters are allocated, bits 32-63 which read as zero.
//! We treat a standard entry as one with a single subcluster, so that all code has one path.

use super::header::Geometry;
use super::l1::{COPIED, OFFSET_MASK};

const ZERO: u64 = 1;
const COMPRESSED: u64 = 1 << 62;

/// A checked L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    /// Where the cluster is.
    pub host: Option<u64>,
    /// It belongs to this entry alone.
    pub copied: bool,
    /// Subclusters whose bytes are at `host`.
    pub data: u32,
    /// Subclusters that read as zero.
    pub zero: u32,
    /// Start and bytes of compressed data, whole sectors.
    pub compressed: Option<(u64, u64)>,
}

impl Entry {
    /// Decodes and checks one entry of `bytes` (8 or 16). `guest` is the offset on the disk, `end` the end of the file in whole
    /// clusters.
    #[inline]
    pub fn decode(geometry: &Geometry, bytes: &[u8], guest: u64, end: u64) -> Result<Entry, &'static str> {
        let number = |at: usize| u64::from_be_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|index| bytes[at + index]));
        let word = number(0);
        let bitmap = if geometry.extended_l2 { number(8) } else { 0 };
        if word == 0 && bitmap == 0 {
            return Ok(Entry::default());
        }
        if word & COMPRESSED != 0 {
            return Entry::decode_compressed(geometry, word, bitmap, end);
        }
        let offset = word & OFFSET_MASK;
        let zero_flag = word & ZERO != 0;
        if word & !(OFFSET_MASK | COPIED | ZERO) != 0
            || (zero_flag && (geometry.extended_l2 || geometry.version < 3))
        {
            return Err("has reserved bits set");
        }
        if offset & (geometry.cluster() - 1) != 0 {
            return Err("points to no start of a cluster");
        }
        let copied = word & COPIED != 0;
        // The first cluster of a data file is at 0: there the flag says that it is allocated.
        let host = (offset != 0 || (geometry.data_file && copied)).then_some(offset);
        if geometry.data_file {
            if host.is_some_and(|host| host != guest) {
                return Err("points to another place of the data file than its own");
            }
        } else if offset + geometry.cluster() > end && offset != 0 {
            return Err("points behind the end of the file");
        }
        let (data, zero) = if geometry.extended_l2 {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else {
            (u32::from(host.is_some() && !zero_flag), u32::from(zero_flag))
        };
        if data & zero != 0 {
            return Err("calls subclusters allocated and zero at once");
        }
        if data != 0 && host.is_none() {
            return Err("calls subclusters allocated and has no cluster");
        }
        Ok(Entry { host, copied: copied && host.is_some(), data, zero, compressed: None })
    }

    fn decode_compressed(
        geometry: &Geometry,
        word: u64,
        bitmap: u64,
        end: u64,
    ) -> Result<Entry, &'static str> {
        let offset_bits = 62 - (geometry.cluster_bits - 8);
        let offset = word & ((1 << offset_bits) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> offset_bits) + 1;
        let start = offset & !511;
        if geometry.data_file {
            return Err("is compressed, which a data file excludes");
        }
        if word & COPIED != 0 || bitmap != 0 {
            return Err("is compressed and has flags that exclude that");
        }
        // The last sectors may lie behind the end: writers round up.
        if offset == 0 || start >= end {
            return Err("points behind the end of the file");
        }
        Ok(Entry { compressed: Some((start, sectors * 512)), ..Entry::default() })
    }

    /// As it lies in the file; the second word belongs to extended entries only.
    pub fn encode(&self, geometry: &Geometry) -> [u8; 16] {
        let mut word = self.host.unwrap_or(0) | if self.copied { COPIED } else { 0 };
        if !geometry.extended_l2 && self.zero != 0 {
            word |= ZERO;
        }
        let bitmap = u64::from(self.data) | u64::from(self.zero) << 32;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&word.to_be_bytes());
        bytes[8..].copy_from_slice(&bitmap.to_be_bytes());
        bytes
    }

    /// What a subcluster is.
    #[inline]
    pub fn state(&self, subcluster: u32) -> State {
        match (self.data >> subcluster & 1, self.zero >> subcluster & 1) {
            (1, _) => State::Data,
            (_, 1) => State::Zero,
            _ => State::Absent,
        }
    }

    /// Number of subclusters from `first` on, below `end`, in the same state.
    #[inline]
    pub fn run(&self, first: u32, end: u32) -> u32 {
        let state = self.state(first);
        (first + 1..end).find(|next| self.state(*next) != state).unwrap_or(end) - first
    }
}

/// What a subcluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Its bytes are in the cluster.
    Data,
    /// It reads as zero.
    Zero,
    /// The layer below has it.
    Absent,
}

/// The bits of the subclusters `first..end`.
pub(super) fn mask(first: u32, end: u32) -> u32 {
    let below = |bit: u32| if bit >= 32 { u32::MAX } else { (1 << bit) - 1 };
    below(end) & !below(first)
}
