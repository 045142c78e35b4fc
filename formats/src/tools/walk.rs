//! Going through a disk: which layer has what where, without reading a byte of it.

use std::collections::VecDeque;
use std::ops::Range;

use crate::driver::{Extent, Place};
use crate::error::{Error, ErrorKind};
use crate::volume::{FileId, Volume};

/// Bytes of the disk whose extents are asked for at a time: bounds the memory they take, at one extent per 512 bytes.
const ASK: u64 = 32 << 20;

/// Attempts to have the tables of one place in memory.
const LOADS_MAX: usize = 256;
/// Bytes of a disk that [`zero_run`] should be asked about at a time.
pub const ZERO_RUN: u64 = ASK;

/// A stretch of a disk that is alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// The layer that says so, 0 is the top. Of [`State::Absent`], the lowest one that was asked.
    pub layer: u16,
    /// What is there.
    pub state: State,
}

/// What a layer has for a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Bytes in a file.
    Data {
        /// Which.
        file: FileId,
        /// Byte offset of the start.
        offset: u64,
    },
    /// A place in a file where the store has a hole: reads as zero.
    Hole {
        /// Which.
        file: FileId,
        /// Byte offset of the start.
        offset: u64,
    },
    /// Encoded bytes.
    Encoded,
    /// Zero, because the layer says so.
    Zero {
        /// The image holds space for them.
        allocated: bool,
    },
    /// No layer that was asked has it. If all were, it reads as zero.
    Absent,
}

impl Span {
    /// First byte behind it.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Bytes have to be read to know them.
    pub fn is_data(&self) -> bool {
        matches!(self.state, State::Data { .. } | State::Encoded)
    }

    /// The span behind the first `len` bytes.
    pub(super) fn after(&self, len: u64) -> Span {
        let state = match self.state {
            State::Data { file, offset } => State::Data { file, offset: offset + len },
            State::Hole { file, offset } => State::Hole { file, offset: offset + len },
            other => other,
        };
        Span { start: self.start + len, len: self.len - len, layer: self.layer, state }
    }

    /// Takes `next` in, if it continues this span; else gives false.
    pub fn join(&mut self, next: &Span) -> bool {
        let continues = self.end() == next.start && self.layer == next.layer && {
            let here = Span { start: self.start, len: self.len + next.len, ..*self };
            here.after(self.len).state == next.state
        };
        if continues {
            self.len += next.len;
        }
        continues
    }
}

/// Which layers a walk asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All.
    Chain,
    /// The top layer alone.
    Top,
}

/// Goes through a range of a disk, span by span. Neighbours may be alike.
#[derive(Debug)]
pub struct Walk<'a> {
    volume: &'a Volume,
    depth: Depth,
    at: u64,
    end: u64,
    spans: VecDeque<Span>,
    /// The last stretch of a file that the store was asked about, and whether it has bytes there.
    known: Option<(FileId, Range<u64>, bool)>,
}

impl<'a> Walk<'a> {
    /// A walk through `range`, which lies inside the disk or is cut there.
    pub fn new(volume: &'a Volume, depth: Depth, range: Range<u64>) -> Walk<'a> {
        let end = range.end.min(volume.size());
        Walk { volume, depth, at: range.start, end, spans: VecDeque::new(), known: None }
    }

    /// The next span; `None` at the end.
    ///
    /// # Errors
    /// Damaged tables, and what files answered.
    pub async fn next(&mut self) -> Result<Option<Span>, Error> {
        if self.spans.is_empty() {
            if self.at >= self.end {
                return Ok(None);
            }
            self.ask().await?;
        }
        let Some(span) = self.spans.pop_front() else {
            return Err(Error::new(ErrorKind::Corrupt, format!("nothing is known of byte {}", self.at)));
        };
        self.split_at_hole(span).await.map(Some)
    }

    /// Fills the queue from `at` on.
    async fn ask(&mut self) -> Result<(), Error> {
        let len = (self.end - self.at).min(ASK);
        let mut found = Vec::new();
        // Other work may push tables out between a load and the look at them.
        for _ in 0..LOADS_MAX {
            found.clear();
            let covered = self.map(0, self.at, len, &mut found)?;
            if covered > 0 {
                self.spans.extend(found);
                self.at += covered;
                return Ok(());
            }
            self.load(self.at, len).await?;
        }
        let message = format!("the tables for byte {} do not stay in memory", self.at);
        Err(Error::new(ErrorKind::Corrupt, message))
    }

    fn layers(&self) -> usize {
        match self.depth {
            Depth::Chain => self.volume.layers().len(),
            Depth::Top => 1,
        }
    }

    /// Appends spans from `offset` on, from what is in memory; returns how many bytes they cover.
    fn map(&self, layer: usize, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<u64, Error> {
        let absent =
            |start, len| Span { start, len, layer: (self.layers() - 1) as u16, state: State::Absent };
        if layer >= self.layers() {
            out.push(absent(offset, len));
            return Ok(len);
        }
        let driver = &self.volume.layers()[layer].driver;
        let inside = driver.size().saturating_sub(offset).min(len);
        if inside > 0 {
            let mut extents = Vec::new();
            driver.map(offset, inside, &mut extents)?;
            let mut done = 0;
            for extent in &extents {
                match self.one(layer, extent, out) {
                    // What is before the damage is known.
                    Err(_) if done > 0 => return Ok(done),
                    covered => {
                        let covered = covered?;
                        done += covered;
                        if covered < extent.len {
                            return Ok(done);
                        }
                    }
                }
            }
            if done < inside {
                return Ok(done);
            }
        }
        if inside < len {
            out.push(absent(offset + inside, len - inside));
        }
        Ok(len)
    }

    fn one(&self, layer: usize, extent: &Extent, out: &mut Vec<Span>) -> Result<u64, Error> {
        let state = match extent.place {
            Place::Data { file, offset, .. } => {
                State::Data { file: FileId { layer: layer as u16, file }, offset }
            }
            Place::Zero { allocated } => State::Zero { allocated },
            Place::Encoded => State::Encoded,
            Place::Absent => return self.map(layer + 1, extent.start, extent.len, out),
        };
        out.push(Span { start: extent.start, len: extent.len, layer: layer as u16, state });
        Ok(extent.len)
    }

    /// Reads the tables that [`Walk::map`] misses at `offset`.
    async fn load(&self, offset: u64, mut len: u64) -> Result<(), Error> {
        for layer in &self.volume.layers()[..self.layers()] {
            let driver = &layer.driver;
            len = len.min(driver.size().saturating_sub(offset));
            if len == 0 {
                return Ok(());
            }
            let mut extents = Vec::new();
            if driver.map(offset, len, &mut extents)? == 0 {
                driver.load(offset, len).await?;
                extents.clear();
                driver.map(offset, len, &mut extents)?;
            }
            match extents.first() {
                Some(Extent { place: Place::Absent, len: absent, .. }) => len = *absent,
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Cuts a span of data where the store begins or ends to have bytes; the rest goes back into the queue.
    async fn split_at_hole(&mut self, span: Span) -> Result<Span, Error> {
        let State::Data { file: id, offset } = span.state else { return Ok(span) };
        if self.volume.cipher(id.layer).is_some() {
            // A hole is no zeroes when it is decrypted.
            return Ok(span);
        }
        let is_known = |(file, range, _): &(FileId, Range<u64>, bool)| *file == id && range.contains(&offset);
        if !self.known.as_ref().is_some_and(is_known) {
            let Some(file) = self.volume.file(id) else { return Ok(span) };
            let (len, has_bytes) = file.data_run(offset).await?;
            self.known = Some((id, offset..offset.saturating_add(len.max(1)), has_bytes));
        }
        let Some((_, range, has_bytes)) = &self.known else { return Ok(span) };
        let len = span.len.min(range.end - offset);
        if len < span.len {
            self.spans.push_front(span.after(len));
        }
        let state = if *has_bytes { span.state } else { State::Hole { file: id, offset } };
        Ok(Span { len, state, ..span })
    }
}

/// How many bytes from `offset` on are known to read as zero (at most `len`), without reading any.
///
/// # Errors
/// As for [`Walk::next`].
pub async fn zero_run(volume: &Volume, offset: u64, len: u64) -> Result<u64, Error> {
    let end = offset.saturating_add(len);
    let mut walk = Walk::new(volume, Depth::Chain, offset..end);
    while let Some(span) = walk.next().await? {
        if span.is_data() {
            return Ok(span.start - offset);
        }
    }
    // Behind the end of the disk there is nothing.
    Ok(len)
}
