//! The bytes of one simulated file: sparse, cheap to copy, as a regular file (what was never written is zero) or as a block device
//! (its length is given, and what was never written is junk).
//!
//! Invariants: a regular file has no bytes behind its length that are not zero (so that growing it shows zeroes); pages are
//! shared between copies until one of them is written.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// The largest file, in bytes.
pub const LENGTH_MAX_BYTES: u64 = 64 << 40;

type Page = Rc<[u8; PAGE_BYTES as usize]>;

/// Contents of a file.
#[derive(Debug, Clone, Default)]
pub struct Pages {
    length: u64,
    pages: BTreeMap<u64, Page>,
    /// Seed of the junk of a device; `None` for a regular file.
    junk: Option<u64>,
}

impl Pages {
    /// An empty regular file.
    pub fn empty() -> Pages {
        Pages::default()
    }

    /// A regular file that holds `bytes`.
    pub fn of(bytes: &[u8]) -> Pages {
        let mut pages = Pages::empty();
        pages.write(0, bytes);
        pages
    }

    /// A block device of `length` bytes full of junk that depends on `seed`.
    pub fn device(length: u64, seed: u64) -> Pages {
        Pages { length, pages: BTreeMap::new(), junk: Some(seed) }
    }

    /// A regular file with the contents of a real one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load(path: &Path) -> std::io::Result<Pages> {
        let mut file = std::fs::File::open(path)?;
        let mut pages = Pages::empty();
        let mut chunk = vec![0u8; 1 << 20];
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            for piece in chunk[..count].chunks(PAGE_BYTES as usize) {
                if piece.iter().any(|byte| *byte != 0) {
                    pages.write(pages.length, piece);
                } else {
                    pages.length += piece.len() as u64;
                }
            }
        }
        Ok(pages)
    }

    /// Writes the contents into a real file (made or replaced), with holes where nothing was written.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        let mut file = std::fs::File::create(path)?;
        file.set_len(self.length)?;
        for (number, page) in &self.pages {
            let start = number * PAGE_BYTES;
            let len = PAGE_BYTES.min(self.length - start);
            file.seek(SeekFrom::Start(start))?;
            file.write_all(&page[..len as usize])?;
        }
        Ok(())
    }

    /// Bytes of the file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.junk.is_some()
    }

    /// Bytes that take space, in whole pages.
    pub fn allocated_bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE_BYTES
    }

    /// Space that writing `range` would add, in bytes.
    pub fn growth_bytes(&self, range: &Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let numbers = range.start / PAGE_BYTES..=(range.end - 1) / PAGE_BYTES;
        let all = numbers.end() - numbers.start() + 1;
        (all - self.pages.range(numbers).count() as u64) * PAGE_BYTES
    }

    /// Fills `out` from `offset` on; bytes behind the end are zero.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let end = (offset + out.len() as u64).min(self.length);
        let mut at = offset;
        while at < end {
            let (number, within) = (at / PAGE_BYTES, (at % PAGE_BYTES) as usize);
            let len = (end - at).min(PAGE_BYTES - within as u64) as usize;
            let target = &mut out[(at - offset) as usize..][..len];
            match self.pages.get(&number) {
                Some(page) => target.copy_from_slice(&page[within..within + len]),
                None if self.junk.is_some() => {
                    target.copy_from_slice(&self.fresh(number)[within..within + len])
                }
                None => {}
            }
            at += len as u64;
        }
    }

    /// The bytes of a range, as a vector.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut out = vec![0; (range.end - range.start) as usize];
        self.read(range.start, &mut out);
        out
    }

    /// All of them, of a small file.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes(0..self.length)
    }

    /// Writes `data` at `offset`; a regular file grows with it, a device takes what lies inside.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut end = offset + data.len() as u64;
        if self.is_device() {
            end = end.min(self.length);
        } else {
            self.length = self.length.max(end);
        }
        let mut at = offset;
        while at < end {
            let (number, within) = (at / PAGE_BYTES, (at % PAGE_BYTES) as usize);
            let len = (end - at).min(PAGE_BYTES - within as u64) as usize;
            self.page(number)[within..within + len].copy_from_slice(&data[(at - offset) as usize..][..len]);
            at += len as u64;
        }
    }

    /// Makes the part of `range` that lies inside the file read as zero; whole pages of a regular file are given back.
    pub fn zero(&mut self, range: Range<u64>) {
        let end = range.end.min(self.length);
        if range.start >= end {
            return;
        }
        if !self.is_device() {
            // Only pages that exist have anything to lose, however large the range.
            let numbers = range.start / PAGE_BYTES..=(end - 1) / PAGE_BYTES;
            let found: Vec<u64> = self.pages.range(numbers).map(|(number, _)| *number).collect();
            for number in found {
                self.zero_in_page(number, range.start, end);
            }
        } else {
            (range.start / PAGE_BYTES..=(end - 1) / PAGE_BYTES)
                .for_each(|number| self.zero_in_page(number, range.start, end));
        }
    }

    fn zero_in_page(&mut self, number: u64, start: u64, end: u64) {
        let base = number * PAGE_BYTES;
        let (from, to) = (start.max(base) - base, end.min(base + PAGE_BYTES) - base);
        if to - from == PAGE_BYTES && !self.is_device() {
            self.pages.remove(&number);
        } else {
            self.page(number)[from as usize..to as usize].fill(0);
        }
    }

    /// Makes a regular file at least `length` bytes long.
    pub fn extend(&mut self, length: u64) {
        if !self.is_device() {
            self.length = self.length.max(length);
        }
    }

    /// Cuts a regular file to at most `length` bytes.
    pub fn truncate(&mut self, length: u64) {
        if !self.is_device() && length < self.length {
            self.zero(length..self.length);
            self.pages.split_off(&length.div_ceil(PAGE_BYTES));
            self.length = length;
        }
    }

    /// The first byte in which two files differ, their length counted as content.
    pub fn first_difference(&self, other: &Pages) -> Option<u64> {
        let numbers = self.pages.keys().chain(other.pages.keys()).copied();
        let differs = |number: &u64| match (self.pages.get(number), other.pages.get(number)) {
            (Some(a), Some(b)) if Rc::ptr_eq(a, b) => false,
            (a, b) => {
                let of = |file: &Pages, page: Option<&Page>| {
                    page.map_or_else(|| file.fresh(*number), |page| **page)
                };
                of(self, a) != of(other, b)
            }
        };
        let page = numbers.filter(differs).min().map(|number| {
            let start = number * PAGE_BYTES;
            let range = || start..start + PAGE_BYTES;
            let (a, b) = (self.bytes(range()), other.bytes(range()));
            start + a.iter().zip(&b).position(|(a, b)| a != b).unwrap_or(0) as u64
        });
        let length = (self.length != other.length).then(|| self.length.min(other.length));
        page.into_iter().chain(length).min()
    }

    /// The page as it was before it was written.
    fn fresh(&self, number: u64) -> [u8; PAGE_BYTES as usize] {
        let mut page = [0; PAGE_BYTES as usize];
        if let Some(seed) = self.junk {
            fastrand::Rng::with_seed(seed ^ (number << 20)).fill(&mut page);
        }
        page
    }

    fn page(&mut self, number: u64) -> &mut [u8; PAGE_BYTES as usize] {
        if !self.pages.contains_key(&number) {
            let fresh = Rc::new(self.fresh(number));
            self.pages.insert(number, fresh);
        }
        let page = self.pages.entry(number).or_insert_with(|| Rc::new([0; PAGE_BYTES as usize]));
        Rc::make_mut(page)
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the sparse file is a byte array. Method: random changes against a vector, for files and devices.

    use super::*;

    #[test]
    fn equals_a_byte_array() {
        for seed in 0..20 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let device = seed % 2 == 1;
            let mut pages = if device { Pages::device(50_000, seed) } else { Pages::empty() };
            let mut model = pages.bytes(0..pages.length());
            for _ in 0..200 {
                let (start, len) = (rng.u64(..60_000), rng.usize(1..20_000));
                let end = start + len as u64;
                match rng.u8(..5) {
                    0 | 1 => {
                        let data = vec![rng.u8(..); len];
                        pages.write(start, &data);
                        if !device && (end as usize) > model.len() {
                            model.resize(end as usize, 0);
                        }
                        let stop = model.len().min(end as usize);
                        if (start as usize) < stop {
                            model[start as usize..stop].copy_from_slice(&data[..stop - start as usize]);
                        }
                    }
                    2 => {
                        pages.zero(start..end);
                        let stop = model.len().min(end as usize);
                        if (start as usize) < stop {
                            model[start as usize..stop].fill(0);
                        }
                    }
                    3 if !device => {
                        pages.extend(start);
                        model.resize(model.len().max(start as usize), 0);
                    }
                    4 if !device => {
                        pages.truncate(start);
                        model.truncate(start as usize);
                    }
                    _ => {}
                }
                assert_eq!(pages.length(), model.len() as u64);
                let mut wanted = model.clone();
                wanted.resize(90_000, 0);
                assert!(pages.bytes(0..90_000) == wanted, "seed {seed}");
            }
            let other = if device { Pages::device(50_000, seed) } else { Pages::of(&model) };
            let same = other.bytes(0..90_000) == pages.bytes(0..90_000) && other.length() == pages.length();
            assert_eq!(pages.first_difference(&other).is_none(), same);
        }
    }
}
