//! Entries of L1 tables: bits 9 to 55 are the offset of an L2 table, bit 63 says that its refcount is exactly one (in the active
//! table only), the rest is reserved.

use super::header::Geometry;

/// The refcount of what the entry points to is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bits of an offset in L1 and L2 entries.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A checked L1 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct L1Entry {
    /// Offset of the L2 table; 0: there is none.
    pub table: u64,
    /// The table belongs to this L1 table alone.
    pub copied: bool,
}

impl L1Entry {
    /// Decodes and checks; `end` is the end of the file in whole clusters.
    pub fn decode(geometry: &Geometry, word: u64, end: u64) -> Result<L1Entry, &'static str> {
        let table = word & OFFSET_MASK;
        if word & !(OFFSET_MASK | COPIED) != 0 {
            return Err("has reserved bits set");
        }
        if !geometry.is_aligned(table) {
            return Err("points to no start of a cluster");
        }
        if table + geometry.cluster() > end && table != 0 {
            return Err("points behind the end of the file");
        }
        Ok(L1Entry { table, copied: word & COPIED != 0 && table != 0 })
    }

    /// As it lies in the file.
    pub fn encode(self) -> u64 {
        self.table | if self.copied { COPIED } else { 0 }
    }
}
