//! Entries of L2 tables: where a cluster of the disk is.
//!
//! | bits | meaning, with clusters of `1 << n` bytes |
//! |---|---|
//! | 63 clear | the other bits are the offset of the cluster; 0: none |
//! | 63 set | compressed: bits 0 to 62-n the offset of the bytes, which may begin anywhere, and n bits above them their number |

use super::header::Geometry;

const COMPRESSED: u64 = 1 << 63;

/// A checked L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// There is nothing.
    Absent,
    /// The cluster is at this offset.
    Data(u64),
    /// Its encoded bytes are there.
    Compressed {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl Entry {
    /// Decodes an entry of a file of `length` bytes.
    #[inline]
    pub fn decode(geometry: &Geometry, word: u64, length: u64) -> Result<Entry, &'static str> {
        if word == 0 {
            return Ok(Entry::Absent);
        }
        if word & COMPRESSED == 0 {
            if word & (geometry.cluster() - 1) != 0 {
                return Err("points to no start of a cluster");
            }
            // The last cluster of a file may be a part of one.
            let end = length.next_multiple_of(geometry.cluster());
            let inside = word.checked_add(geometry.cluster()).is_some_and(|behind| behind <= end);
            return if inside { Ok(Entry::Data(word)) } else { Err("points behind the end of the file") };
        }
        let bits = 63 - geometry.cluster_bits;
        let (offset, len) = (word & ((1 << bits) - 1), word >> bits & (geometry.cluster() - 1));
        if len == 0 || offset == 0 {
            return Err("is compressed and has no bytes");
        }
        if offset + len > length {
            return Err("points behind the end of the file");
        }
        Ok(Entry::Compressed { offset, len })
    }

    /// As it lies in the file.
    pub fn encode(self, geometry: &Geometry) -> u64 {
        match self {
            Entry::Absent => 0,
            Entry::Data(offset) => offset,
            Entry::Compressed { offset, len } => COMPRESSED | len << (63 - geometry.cluster_bits) | offset,
        }
    }

    /// An entry can say that.
    pub fn fits(self, geometry: &Geometry) -> bool {
        match self {
            Entry::Compressed { offset, len } => {
                offset < 1 << (63 - geometry.cluster_bits) && (1..geometry.cluster()).contains(&len)
            }
            Entry::Absent | Entry::Data(_) => true,
        }
    }
}
