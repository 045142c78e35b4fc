//! Grain directories and grain tables as they are in the file: reading them in long pieces, and the walk that checks every place
//! against every other.
//!
//! ```text
//!  directory[i] ─▶ table i: entry ─▶ grain          0: not here   1: zero (with that flag)   else: first sector
//!  redundant[i] ─▶ copy of table i, entry by entry the same
//! ```
//! The first directory counts; the redundant one is a copy, which is written along. A crash between the two leaves them different: the
//! header's mark of an unclean end says that this may be, and whoever opens the extent for writing next makes them equal
//! ([`make_equal`]). Nothing but damage makes anybody read the copy (`check`).
//!
//! When an extent is opened for writing all of its tables are walked once: two grains at one place are damage that no look-up would
//! notice, and what nobody refers to is space for new grains.

use std::ops::Range;
use std::rc::Rc;

use super::header::{SECTOR, Shape};
use crate::driver::Findings;
use crate::error::Error;
use crate::file::{Buf, ImageFile};

/// Bytes of tables that are read at a time.
const READ_BYTES: u64 = 256 << 10;
/// Ranges of free space that are remembered.
const FREE_MAX: usize = 64 << 10;
/// Places that a walk tells apart, one bit each.
const PLACES_MAX: u64 = 512 << 20;

/// The entries of both grain directories: 4 bytes for every 512 grains. First sectors of tables; 0 for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    /// The one that counts.
    pub first: Vec<u32>,
    /// The copy; empty without one.
    pub copy: Vec<u32>,
}

/// Little-endian numbers of a piece of a table.
pub fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|entry| entry.try_into().map_or(0, u32::from_le_bytes))
}

impl Directory {
    /// Reads both.
    pub async fn read(file: &Rc<dyn ImageFile>, shape: &Shape) -> Result<Directory, Error> {
        let bytes = (shape.tables() * 4) as usize;
        let first = numbers(&file.read(shape.directory.get(), bytes).await?).collect();
        let copy = match shape.redundant.get() {
            Some(at) => numbers(&file.read(at, bytes).await?).collect(),
            None => Vec::new(),
        };
        Ok(Directory { first, copy })
    }

    /// Where a table of `bytes` bytes is that an entry names, if it is in the file.
    ///
    /// # Errors
    /// It is not; which one, and where it is said to be.
    pub fn place(entry: Option<&u32>, bytes: u64, length: u64) -> Result<Option<u64>, u32> {
        match entry {
            None | Some(0) => Ok(None),
            Some(&sector) => {
                let at = u64::from(sector) * SECTOR;
                if at + bytes <= length.next_multiple_of(SECTOR) { Ok(Some(at)) } else { Err(sector) }
            }
        }
    }
}

/// Reads the tables that `directory` names and that are in the file: calls `each` with the number of the first grain and the entries of a
/// piece. What is behind the last grain is left out.
pub async fn for_each_piece(
    file: &Rc<dyn ImageFile>,
    shape: &Shape,
    directory: &[u32],
    mut each: impl FnMut(u64, &mut dyn Iterator<Item = u32>),
) -> Result<(), Error> {
    let bytes = shape.table_bytes();
    let place = |index: usize| Directory::place(directory.get(index), bytes, file.length()).ok().flatten();
    let mut index = 0;
    while index < directory.len() {
        let Some(at) = place(index) else {
            index += 1;
            continue;
        };
        // Tables that follow each other are read together.
        let follows = |count: &u64| place(index + *count as usize) == Some(at + count * bytes);
        let count = 1 + (1..READ_BYTES / bytes).take_while(follows).count();
        let piece = file.read(at, count * bytes as usize).await?;
        let first = index as u64 * shape.entries;
        let grains = shape.grains().saturating_sub(first).min(count as u64 * shape.entries);
        each(first, &mut numbers(&piece).take(grains as usize));
        index += count;
    }
    Ok(())
}

/// Writes the tables that count over their copies where these differ. A table that has no sound entries is not spread.
pub async fn make_equal(
    file: &Rc<dyn ImageFile>,
    shape: &Shape,
    directory: &Directory,
) -> Result<u64, Error> {
    let mut changed = 0;
    for (first, copy) in directory.first.iter().zip(&directory.copy) {
        let place = |entry| Directory::place(Some(entry), shape.table_bytes(), file.length()).ok().flatten();
        let (Some(from), Some(to)) = (place(first), place(copy)) else { continue };
        let bytes = shape.table_bytes() as usize;
        let (right, other) = (file.read(from, bytes), file.read(to, bytes));
        let (right, other) = (right.await?, other.await?);
        let sound = |entry| Place::of(shape, entry, file.length()).is_ok();
        if right[..] != other[..] && from != to && numbers(&right).all(sound) {
            file.write(to, Buf::copy_of(&right)).await?;
            changed += 1;
        }
    }
    Ok(changed)
}

/// What an entry of a grain table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The grain is not in this extent.
    Absent,
    /// It is zero.
    Zero,
    /// It begins at this byte of the file.
    At(u64),
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// It points behind the end of the file.
    BehindEnd,
    /// It points to headers or tables.
    OnTables,
    /// Another grain's place overlaps it.
    Overlaps,
    /// The table itself is not in the file.
    NoTable,
    /// Two tables, or a table and something else, are at one place.
    TablesOverlap,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Problem::BehindEnd => "which is behind the end of the file",
            Problem::OnTables => "which is on the header, the descriptor or tables",
            Problem::Overlaps => "which overlaps another grain's place",
            Problem::NoTable => "where the file has no grain table",
            Problem::TablesOverlap => "which overlaps what is before it",
        })
    }
}

impl Place {
    /// What an entry says in a file of `length` bytes.
    ///
    /// # Errors
    /// It cannot be believed.
    pub fn of(shape: &Shape, entry: u32, length: u64) -> Result<Place, Problem> {
        match u64::from(entry) * SECTOR {
            0 => Ok(Place::Absent),
            SECTOR if shape.zeroed => Ok(Place::Zero),
            at if at < shape.data_start() => Err(Problem::OnTables),
            at if at >= length => Err(Problem::BehindEnd),
            at => Ok(Place::At(at)),
        }
    }
}

/// A damaged entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// Number of the grain; of the grain directory's entry for [`Problem::NoTable`].
    pub number: u64,
    /// The entry.
    pub entry: u32,
    /// What is wrong.
    pub problem: Problem,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Damage { number, entry, problem } = self;
        match problem {
            Problem::TablesOverlap => write!(f, "a table is said to be at sector {entry:#x}, {problem}"),
            Problem::NoTable => {
                write!(f, "grain table {number} is said to be at sector {entry:#x}, {problem}")
            }
            _ => write!(f, "grain {number} is said to be at sector {entry:#x}, {problem}"),
        }
    }
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Walk {
    /// Grains that have a place.
    pub used: u64,
    /// First byte behind everything that is referred to.
    pub end: u64,
    /// Space between grains, in whole grains, that nothing refers to.
    pub free: Vec<Range<u64>>,
    /// Damaged entries, at most [`Findings::LINES_MAX`].
    pub damages: Vec<Damage>,
    /// All of them.
    pub damages_total: u64,
}

impl Walk {
    fn damage(&mut self, number: u64, entry: u32, problem: Problem) {
        self.damages_total += 1;
        if self.damages.len() < Findings::LINES_MAX {
            self.damages.push(Damage { number, entry, problem });
        }
    }
}

/// Ranges of the file that hold headers, descriptor, directories and tables: sorted, adjacent ones together. Two that overlap are damage.
fn metadata(
    file: &Rc<dyn ImageFile>,
    shape: &Shape,
    directory: &Directory,
    walk: &mut Walk,
) -> Vec<Range<u64>> {
    let header = 0..if shape.cowd { super::header::COWD_HEADER_BYTES } else { SECTOR };
    let mut ranges = vec![header, shape.descriptor.clone()];
    for at in [Some(shape.directory.get()), shape.redundant.get()].into_iter().flatten() {
        ranges.push(at..at + shape.directory_bytes());
    }
    let tables = [(0, &directory.first), (shape.tables(), &directory.copy)];
    for (number, entry) in tables.iter().flat_map(|(base, list)| (*base..).zip(list.iter())) {
        match Directory::place(Some(entry), shape.table_bytes(), file.length()) {
            Ok(Some(at)) => ranges.push(at..at + shape.table_bytes()),
            Ok(None) => {}
            Err(_) => walk.damage(number, *entry, Problem::NoTable),
        }
    }
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => {
                if range.start < last.end {
                    walk.damage(0, (range.start / SECTOR) as u32, Problem::TablesOverlap);
                }
                last.end = last.end.max(range.end);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Walks over all tables. Memory: one bit for each place of the file that a grain can be at.
pub async fn walk(file: &Rc<dyn ImageFile>, shape: &Shape, directory: &Directory) -> Result<Walk, Error> {
    // Grains mostly lie at multiples of their size. Where they do not, places are told apart more finely.
    let mut unit = shape.grain;
    loop {
        if file.length() / unit > PLACES_MAX {
            let what =
                format!("grains at multiples of {unit} bytes in a file of {}: convert it", file.length());
            return Err(Error::unsupported(file.name(), what));
        }
        match walk_in(file, shape, directory, unit).await? {
            Ok(walk) => return Ok(walk),
            Err(finer) => unit = finer,
        }
    }
}

/// [`walk`] with places at multiples of `unit` bytes; else a unit that will do.
async fn walk_in(
    file: &Rc<dyn ImageFile>,
    shape: &Shape,
    directory: &Directory,
    unit: u64,
) -> Result<Result<Walk, u64>, Error> {
    let length = file.length();
    let mut walk = Walk::default();
    let metadata = metadata(file, shape, directory, &mut walk);
    let mut places = vec![0u64; (length.div_ceil(unit) + shape.grain / unit).div_ceil(64) as usize];
    let mut finer = unit;
    for_each_piece(file, shape, &directory.first, |first, entries| {
        for (number, entry) in (first..).zip(entries) {
            let at = match Place::of(shape, entry, length) {
                Ok(Place::At(at)) => at,
                Ok(_) => continue,
                Err(problem) => {
                    walk.damage(number, entry, problem);
                    continue;
                }
            };
            if !at.is_multiple_of(finer) {
                finer = 1 << at.trailing_zeros();
                continue;
            }
            let near = metadata.partition_point(|range| range.end <= at);
            if metadata.get(near).is_some_and(|range| range.start < at + shape.grain) {
                walk.damage(number, entry, Problem::OnTables);
                continue;
            }
            let mut overlaps = false;
            for place in at / unit..(at + shape.grain) / unit {
                let (word, bit) = (&mut places[(place / 64) as usize], 1 << (place % 64));
                overlaps |= *word & bit != 0;
                *word |= bit;
            }
            if overlaps {
                walk.damage(number, entry, Problem::Overlaps);
            }
            walk.used += 1;
            walk.end = walk.end.max(at + shape.grain);
        }
    })
    .await?;
    if finer < unit {
        return Ok(Err(finer));
    }
    walk.end = walk.end.max(metadata.last().map_or(0, |range| range.end)).max(shape.data_start());
    for place in metadata.iter().flat_map(|range| range.start / unit..range.end.div_ceil(unit)) {
        if let Some(word) = places.get_mut((place / 64) as usize) {
            *word |= 1 << (place % 64);
        }
    }
    walk.free = free(&places, unit, shape, walk.end.min(length));
    Ok(Ok(walk))
}

/// Whole grains before `end` of which no place is taken, neighbours together.
fn free(places: &[u64], unit: u64, shape: &Shape, end: u64) -> Vec<Range<u64>> {
    let mut free: Vec<Range<u64>> = Vec::new();
    let mut at = shape.data_start().next_multiple_of(shape.grain);
    while at + shape.grain <= end && free.len() < FREE_MAX {
        let place = at / unit;
        if unit == shape.grain
            && place.is_multiple_of(64)
            && places.get((place / 64) as usize) == Some(&u64::MAX)
        {
            at += 64 * unit;
            continue;
        }
        let taken =
            |place: u64| places.get((place / 64) as usize).is_none_or(|word| word >> (place % 64) & 1 == 1);
        if !(at / unit..(at + shape.grain) / unit).any(taken) {
            match free.last_mut() {
                Some(last) if last.end == at => last.end += shape.grain,
                _ => free.push(at..at + shape.grain),
            }
        }
        at += shape.grain;
    }
    free
}
