//! Copies a range of one disk to another: `convert`, `dd`, and with the top layer alone `coalesce`.

use std::cell::Cell;
use std::ops::Range;

use futures_util::stream::{self, TryStreamExt};

use super::chunk;
use super::walk::{Depth, Span, State, Walk};
use super::{CHUNK, IN_FLIGHT, Progress};
use crate::driver::Erase;
use crate::error::Error;
use crate::file::{Buf, is_zero};
use crate::volume::{Source, Volume};

/// Bytes of zeroes in one step, at most.
const ZERO_STEP: u64 = 1 << 30;
/// Bytes that get their space at once, at most.
const ROOM: u64 = 64 << 20;

/// What the target holds where nothing is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Zeroes: it is new.
    New,
    /// Anything: zeroes have to be made.
    Used,
}

/// What a copy has done, in bytes of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Written as data.
    pub data: u64,
    /// Zero in the source.
    pub zero: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
    /// Not in the layers that are copied.
    Absent,
}

/// A stretch of the source to be worked on at once.
#[derive(Debug, Clone, Copy)]
struct Step {
    start: u64,
    len: u64,
    kind: Kind,
}

/// Gives data of a new target their space before they are written, where they have their place already: a store that has to find space for
/// each write does one after the other. What turns out to be zero gives its space back; when that is much of the data no more is given.
struct Room<'a> {
    target: &'a Volume,
    /// Bytes of the target before this may have space.
    end: Cell<u64>,
    /// Bytes of data that were written, and that were zero.
    data: Cell<u64>,
    zero: Cell<u64>,
}

impl Room<'_> {
    /// Data are to come at `at`.
    async fn make(&self, at: u64, len: u64) -> Result<(), Error> {
        let mut pieces = Vec::new();
        let len = len.min(ROOM);
        let wanted = at >= self.end.get() && self.zero.get() <= self.data.get() / 8;
        if !wanted || !self.target.map_write(at, len, &mut pieces) {
            return Ok(());
        }
        for piece in pieces {
            if let Source::File { id, offset } = piece.source
                && let Some(file) = self.target.file(id)
                && file.reserve(offset..offset + piece.len).await?
            {
                self.end.set(at + len);
            }
        }
        Ok(())
    }
}

/// Puts spans together to steps that do not cross a border of [`CHUNK`] in the target.
struct Steps<'a> {
    walk: Walk<'a>,
    depth: Depth,
    /// What is added to an offset in the source to have the one in the target.
    shift: i128,
    rest: Option<Span>,
    /// Of a new target.
    room: Option<&'a Room<'a>>,
}

impl Steps<'_> {
    fn kind(&self, span: &Span) -> Kind {
        match span.state {
            State::Data { .. } | State::Encoded => Kind::Data,
            State::Hole { .. } | State::Zero { .. } => Kind::Zero,
            State::Absent if self.depth == Depth::Chain => Kind::Zero,
            State::Absent => Kind::Absent,
        }
    }

    /// Where a step that begins at `start` ends at the latest.
    fn border(&self, start: u64, kind: Kind) -> u64 {
        let step = if kind == Kind::Data { CHUNK } else { ZERO_STEP };
        let in_target = (i128::from(start) + self.shift) as u64;
        start + (step - in_target % step)
    }

    async fn next(&mut self) -> Result<Option<Step>, Error> {
        let mut step: Option<Step> = None;
        loop {
            let span = match self.rest.take() {
                Some(span) => Some(span),
                None => self.walk.next().await?,
            };
            let Some(span) = span else { return Ok(step) };
            let kind = self.kind(&span);
            if let Some(room) = self.room.filter(|_| kind == Kind::Data) {
                room.make((i128::from(span.start) + self.shift) as u64, span.len).await?;
            }
            let start = step.map_or(span.start, |step| step.start);
            let border = self.border(start, step.map_or(kind, |step| step.kind));
            if step.is_some_and(|step| step.kind != kind) || span.start >= border {
                self.rest = Some(span);
                return Ok(step);
            }
            let end = span.end().min(border);
            step = Some(Step { start, len: end - start, kind });
            if end < span.end() {
                self.rest = Some(span.after(end - span.start));
                return Ok(step);
            }
        }
    }
}

/// Copies `range` of `source` to `target` from `to` on: what the layers of `depth` have. Zeroes are not written where the target
/// has them. The result is in the target's files, not yet durable.
///
/// # Errors
/// What reading and writing answered; a range that does not fit.
pub async fn copy(
    source: (&Volume, Depth),
    range: Range<u64>,
    target: (&Volume, Target),
    to: u64,
    progress: &dyn Progress,
) -> Result<Copied, Error> {
    let len = range.end.saturating_sub(range.start);
    if range.end > source.0.size() || to.checked_add(len).is_none_or(|end| end > target.0.size()) {
        return Err(Error::invalid(format!(
            "{len} bytes at {} of a disk of {} bytes do not fit at {to} of a disk of {} bytes",
            range.start,
            source.0.size(),
            target.0.size()
        )));
    }
    progress.begin(len);
    let shift = i128::from(to) - i128::from(range.start);
    let walk = Walk::new(source.0, source.1, range);
    let room = Room { target: target.0, end: Cell::new(0), data: Cell::new(0), zero: Cell::new(0) };
    let room_of_new = (target.1 == Target::New).then_some(&room);
    let steps = Steps { walk, depth: source.1, shift, rest: None, room: room_of_new };
    let zero = Cell::new(0);
    stream::try_unfold(steps, |mut steps| async move {
        let step = steps.next().await?;
        Ok::<_, Error>(step.map(|step| (step, steps)))
    })
    .try_for_each_concurrent(IN_FLIGHT, |step| {
        let (room, zero) = (&room, &zero);
        async move {
            let at = (i128::from(step.start) + shift) as u64;
            match step.kind {
                Kind::Data => {
                    let bytes = chunk::read(source.0, step.start, step.len as usize).await?;
                    let written = write(target, at, bytes, room.end.get()).await?;
                    room.data.set(room.data.get() + written);
                    room.zero.set(room.zero.get() + step.len - written);
                }
                Kind::Zero => {
                    if target.1 == Target::Used {
                        target.0.erase(at, step.len, Erase::Zero).await?;
                    }
                    zero.set(zero.get() + step.len);
                }
                Kind::Absent => {}
            }
            progress.advance(step.len);
            Ok(())
        }
    })
    .await?;
    Ok(Copied { data: room.data.get(), zero: zero.get() + room.zero.get() })
}

/// Writes bytes except zeroes; returns how many were written as data. Bytes of the target before `room` may have space already.
async fn write(target: (&Volume, Target), at: u64, bytes: Buf, room: u64) -> Result<u64, Error> {
    let unit = chunk::unit_of(target.0);
    let runs = chunk::runs(at, bytes.len(), unit, |run| is_zero(&bytes[run]));
    if let [(run, false)] = &runs[..] {
        let len = run.len() as u64;
        chunk::write(target.0, at, bytes).await?;
        return Ok(len);
    }
    let mut written = 0;
    for (run, is_zero) in runs {
        let (start, len) = (at + run.start as u64, run.len() as u64);
        if !is_zero {
            chunk::write(target.0, start, Buf::copy_of(&bytes[run])).await?;
            written += len;
        } else if target.1 == Target::Used || start < room {
            target.0.erase(start, len, Erase::Zero).await?;
        }
    }
    Ok(written)
}
