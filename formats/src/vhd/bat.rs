//! The block allocation table (BAT): for each block of the disk the sector of the file at which its bitmap begins, its data
//! right behind. 32-bit big-endian numbers; all ones for a block that is not there.
//!
//! The table is walked once when an image is opened ([`walk`]): entries have to be checked against *each other*, since two blocks
//! at one place are damage that no single look-up would notice. What is kept is small: the places nobody uses, and which
//! blocks are damaged.

use std::ops::Range;
use std::rc::Rc;

use super::blocks::BlockSet;
use super::footer::SECTOR;
use super::layout::Shape;
use crate::error::Error;
use crate::file::ImageFile;

/// Entry of a block that is not there.
pub const UNUSED: u32 = u32::MAX;
/// Bytes of the table that are read at a time.
const READ_BYTES: u64 = 256 << 10;
/// Free places that are remembered.
const FREE_MAX: usize = 64 << 10;

/// What is wrong with the place of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// It reaches behind the end of the blocks. `lost`: not even its first sector is in the file.
    BehindEnd {
        /// The file ends before it.
        lost: bool,
    },
    /// It lies on this part of the file, which holds something else.
    OnMetadata(Range<u64>),
    /// Another block's place overlaps it.
    Overlaps(u32),
}

/// A damaged entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which block.
    pub block: u32,
    /// Its entry.
    pub entry: u32,
    /// What is wrong.
    pub problem: Problem,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Damage { block, entry, problem } = self;
        write!(f, "block {block} is said to be at sector {entry:#x}, ")?;
        match problem {
            Problem::BehindEnd { lost: true } => write!(f, "which is behind the end of the file"),
            Problem::BehindEnd { lost: false } => {
                write!(f, "which reaches into the footer or behind the end")
            }
            Problem::OnMetadata(range) => {
                write!(f, "which is on the headers or tables at {}..{}", range.start, range.end)
            }
            Problem::Overlaps(other) => write!(f, "which overlaps block {other}"),
        }
    }
}

/// What a walk over the table found.
#[derive(Debug, Default)]
pub struct Walk {
    /// Blocks that are there, damaged ones included.
    pub used: u32,
    /// First byte of all blocks; `None` when there are none.
    pub first: Option<u64>,
    /// First byte behind all blocks and metadata.
    pub end: u64,
    /// Sectors of places between blocks that could hold a block and that nothing refers to.
    pub free: Vec<u32>,
    /// Damaged blocks.
    pub damaged: BlockSet,
    /// The first of them, at most as many as were asked for.
    pub damages: Vec<Damage>,
}

/// Reads entries of the table: calls `each` with the number of the first block and the entries of a piece.
pub async fn for_each_piece(
    file: &Rc<dyn ImageFile>,
    shape: &Shape,
    blocks: Range<u32>,
    mut each: impl FnMut(u32, &mut dyn Iterator<Item = u32>),
) -> Result<(), Error> {
    let (mut at, end) = (shape.entry_offset(blocks.start), shape.entry_offset(blocks.end));
    let mut block = blocks.start;
    while at < end {
        let len = (end - at).min(READ_BYTES);
        let bytes = file.read(at, len as usize).await?;
        let entries = bytes.chunks_exact(4).map(|entry| entry.try_into().map_or(UNUSED, u32::from_be_bytes));
        each(block, &mut { entries });
        at += len;
        block += (len / 4) as u32;
    }
    Ok(())
}

/// Walks over the entries of `blocks` blocks and checks every place against the file's `metadata`, its end of blocks `data_end`,
/// and the other places. Keeps at most `damages_max` descriptions.
pub async fn walk(
    file: &Rc<dyn ImageFile>,
    shape: &Shape,
    blocks: u32,
    metadata: &[Range<u64>],
    data_end: u64,
    damages_max: usize,
) -> Result<Walk, Error> {
    // Sector in the high half, block in the low one: sorted by place. Bounded by the number of entries, 64 MiB at most.
    let mut places: Vec<u64> = Vec::new();
    for_each_piece(file, shape, 0..blocks, |first, entries| {
        let used = entries.enumerate().filter(|(_, entry)| *entry != UNUSED);
        places.extend(used.map(|(index, entry)| u64::from(entry) << 32 | (u64::from(first) + index as u64)));
    })
    .await?;
    places.sort_unstable();
    let first = places.first().map(|place| (place >> 32) * SECTOR);
    let mut metadata = metadata.to_vec();
    metadata.sort_unstable_by_key(|range| range.start);
    let mut found = Walk { damaged: BlockSet::new(blocks), first, ..Walk::default() };
    found.used = places.len() as u32;
    found.end = metadata.iter().map(|range| range.end).max().unwrap_or(0);
    let mut damage = |block: u32, entry: u32, problem: Problem| {
        found.damaged.insert(block);
        if found.damages.len() < damages_max {
            found.damages.push(Damage { block, entry, problem });
        }
    };
    let mut last: Option<(u64, u32)> = None;
    let mut cursor = 0;
    for place in places {
        let (entry, block) = ((place >> 32) as u32, place as u32);
        let start = u64::from(entry) * SECTOR;
        let end = start + shape.stored();
        if end > data_end {
            damage(block, entry, Problem::BehindEnd { lost: start >= file.length() });
            continue;
        }
        // Places ascend, so the ranges that end before this one are done with.
        while metadata.get(cursor).is_some_and(|range| range.end <= start) {
            cursor += 1;
        }
        let on = metadata[cursor.min(metadata.len())..]
            .iter()
            .find(|range| range.start < end && start < range.end);
        if let Some(range) = on {
            damage(block, entry, Problem::OnMetadata(range.clone()));
            continue;
        }
        if let Some((last_end, last_block)) = last
            && start < last_end
        {
            damage(block, entry, Problem::Overlaps(last_block));
            damage(last_block, ((last_end - shape.stored()) / SECTOR) as u32, Problem::Overlaps(block));
        } else {
            note_free(&mut found.free, shape, last.map(|(end, _)| end), start, &metadata);
        }
        found.end = found.end.max(end);
        last = Some((end, block));
    }
    Ok(found)
}

/// Notes the places between two blocks that could hold others.
fn note_free(free: &mut Vec<u32>, shape: &Shape, from: Option<u64>, to: u64, metadata: &[Range<u64>]) {
    // Before the first block: behind the last of the tables there.
    let tables_end = || metadata.iter().map(|range| range.end).filter(|end| *end <= to).max().unwrap_or(to);
    let from = from.unwrap_or_else(tables_end);
    let mut data = first_data(shape, from);
    while data + shape.block <= to && free.len() < FREE_MAX {
        let (start, end) = (data - shape.bitmap, data + shape.block);
        if !metadata.iter().any(|range| range.start < end && start < range.end) {
            free.push((start / SECTOR) as u32);
        }
        data = first_data(shape, end);
    }
}

/// Where the data of a new block begins whose bitmap may begin at `from` at the earliest: on a 4 KiB boundary when blocks are that
/// large, so that guests' pages are the store's.
pub fn first_data(shape: &Shape, from: u64) -> u64 {
    let align = if shape.block < 4096 { SECTOR } else { 4096 };
    (from + shape.bitmap).next_multiple_of(align)
}

#[cfg(test)]
mod tests {
    //! Goal: new blocks lie on 4 KiB boundaries. Method: known places.

    use super::*;

    #[test]
    fn data_is_aligned() {
        let shape = |block| Shape {
            table_offset: 1536,
            block,
            bitmap: (block / 512u64).div_ceil(8).next_multiple_of(512),
            low_bits_first: false,
        };
        for (block, from, data) in [
            (2 << 20, 2560, 4096),
            (2 << 20, 4096, 8192),
            (2 << 20, 3584, 4096),
            (16 << 20, 4096, 8192),
            (512, 2048, 2560),
            (4096, 2048, 4096),
        ] {
            assert_eq!(first_data(&shape(block), from), data, "{block} {from}");
        }
    }
}
