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
//!
//! A compressed entry has, with clusters of `1 << n` bytes: bits 0 to 69-n the offset of the encoded bytes, which may begin anywhere; the
//! bits from there to 61 how many sectors they reach into behind the first. They may go on into the next cluster of the file,
//! and clusters of the file may hold the bytes of several entries: each of them is a reference.

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
    /// Where the bytes are when they are compressed; then there is nothing else.
    pub compressed: Option<Compressed>,
}

/// A place of compressed bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Compressed {
    /// First byte.
    pub offset: u64,
    /// Bytes up to the end of the last sector: the stream ends somewhere in it.
    pub len: u64,
}

impl Compressed {
    /// The clusters of the file that hold it, by number.
    pub fn clusters(&self, geometry: &Geometry) -> std::ops::Range<u64> {
        self.offset >> geometry.cluster_bits..((self.offset + self.len - 1) >> geometry.cluster_bits) + 1
    }

    /// Bits of the offset.
    fn offset_bits(geometry: &Geometry) -> u32 {
        62 - (geometry.cluster_bits - 8)
    }

    /// The place of `len` bytes at `offset`, if an entry can name it.
    pub fn of_stream(geometry: &Geometry, offset: u64, len: u64) -> Option<Compressed> {
        let sectors = (offset + len).div_ceil(512) - offset / 512;
        let bits = Compressed::offset_bits(geometry);
        let fits = len > 0 && offset < 1 << bits && sectors <= 1 << (62 - bits);
        fits.then_some(Compressed { offset, len: (offset / 512 + sectors) * 512 - offset })
    }

    /// The entry.
    fn encode(&self, geometry: &Geometry) -> u64 {
        let sectors = (self.offset + self.len) / 512 - self.offset / 512;
        COMPRESSED | (sectors - 1) << Compressed::offset_bits(geometry) | self.offset
    }
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
        let offset_bits = Compressed::offset_bits(geometry);
        let offset = word & ((1 << offset_bits) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> offset_bits) + 1;
        let behind = (offset & !511) + sectors * 512;
        if geometry.data_file {
            return Err("is compressed, which a data file excludes");
        }
        if word & COPIED != 0 || bitmap != 0 {
            return Err("is compressed and has flags that exclude that");
        }
        if offset < geometry.cluster() {
            return Err("points to compressed bytes in the header");
        }
        // The last sectors may lie behind the end of the file, but not behind its last cluster: writers round up to sectors.
        if behind > end {
            return Err("points behind the end of the file");
        }
        Ok(Entry { compressed: Some(Compressed { offset, len: behind - offset }), ..Entry::default() })
    }

    /// As it lies in the file; the second word belongs to extended entries only.
    pub fn encode(&self, geometry: &Geometry) -> [u8; 16] {
        if let Some(compressed) = &self.compressed {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&compressed.encode(geometry).to_be_bytes());
            return bytes;
        }
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
        if self.compressed.is_some() {
            return State::Compressed;
        }
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
    /// Its bytes are encoded, with those of all others of the cluster.
    Compressed,
}

/// The bits of the subclusters `first..end`.
pub(super) fn mask(first: u32, end: u32) -> u32 {
    let below = |bit: u32| if bit >= 32 { u32::MAX } else { (1 << bit) - 1 };
    below(end) & !below(first)
}

#[cfg(test)]
mod tests {
    //! Goal: entries of compressed clusters say what was put into them, and hostile ones nothing that is not in the file. Method: places
    //! around the borders of sectors and clusters, for all sizes of clusters; words with all kinds of bits.

    use super::*;
    use proptest::prelude::*;

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry { version: 3, cluster_bits, refcount_order: 4, extended_l2: false, data_file: false }
    }

    proptest! {
        #[test]
        fn compressed_entries_there_and_back(bits in 9u32..22, at in 0u64..1 << 30, len in 1u64..1 << 21) {
            let geometry = geometry(bits);
            let (offset, len) = (geometry.cluster() + at, len.min(geometry.cluster() - 1));
            let place = Compressed::of_stream(&geometry, offset, len).unwrap();
            prop_assert!(place.len >= len && place.len < len + 512 && (offset + place.len) % 512 == 0);
            let entry = Entry { compressed: Some(place), ..Entry::default() };
            let bytes = entry.encode(&geometry);
            let end = geometry.round_up(offset + len);
            prop_assert_eq!(Entry::decode(&geometry, &bytes[..8], 0, end), Ok(entry));
            prop_assert!(Entry::decode(&geometry, &bytes[..8], 0, end - geometry.cluster()).is_err());
            let clusters = place.clusters(&geometry);
            prop_assert_eq!(clusters.start, offset / geometry.cluster());
            prop_assert_eq!(clusters.end, (offset + len).div_ceil(geometry.cluster()));
        }

        #[test]
        fn hostile_entries_name_places_in_the_file(bits in 9u32..22, word in any::<u64>(), end in 0u64..1 << 40) {
            let geometry = geometry(bits);
            let end = geometry.round_up(end);
            if let Ok(Entry { compressed: Some(place), .. }) =
                Entry::decode(&geometry, &(word | COMPRESSED).to_be_bytes(), 0, end)
            {
                prop_assert!(place.offset >= geometry.cluster() && place.offset + place.len <= end);
                prop_assert!(place.clusters(&geometry).count() <= 3);
            }
        }
    }
}
