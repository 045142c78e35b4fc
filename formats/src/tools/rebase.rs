//! Gives an image another layer below without changing what the disk reads: what the new layer has differently is copied up.
//!
//! Only then the reference is changed ([`crate::driver::Format::set_backing`]): an interrupted rebase leaves an image over its old
//! parent, with some bytes of its own that equal the parent's.

use std::cell::Cell;

use futures_util::stream::{self, TryStreamExt};

use super::walk::{self, Depth, State, Walk};
use super::{CHUNK, IN_FLIGHT, Progress, chunk};
use crate::error::Error;
use crate::file::Buf;
use crate::volume::Volume;

/// A range that the image itself does not have, cut into chunks.
struct Gaps<'a> {
    walk: Walk<'a>,
    /// What is left of the last gap.
    start: u64,
    end: u64,
}

impl Gaps<'_> {
    async fn next(&mut self, progress: &dyn Progress) -> Result<Option<(u64, u64)>, Error> {
        while self.start >= self.end {
            let Some(span) = self.walk.next().await? else { return Ok(None) };
            match span.state {
                State::Absent => (self.start, self.end) = (span.start, span.end()),
                _ => progress.advance(span.len),
            }
        }
        let start = self.start;
        self.start = self.end.min(start + CHUNK - start % CHUNK);
        Ok(Some((start, self.start - start)))
    }
}

/// Copies into the top layer of `image`, which is opened writable over its old chain, whatever would read differently over `below`
/// (or over nothing). Returns the bytes that were copied. Not yet durable.
///
/// # Errors
/// What reading and writing answered.
pub async fn rebase(image: &Volume, below: Option<&Volume>, progress: &dyn Progress) -> Result<u64, Error> {
    // Who has this image below reads the same afterwards.
    image.layers()[0].driver.keep_identity();
    progress.begin(image.size());
    let copied = Cell::new(0);
    let gaps = Gaps { walk: Walk::new(image, Depth::Top, 0..image.size()), start: 0, end: 0 };
    stream::try_unfold(gaps, |mut gaps| async move {
        let gap = gaps.next(progress).await?;
        Ok::<_, Error>(gap.map(|gap| (gap, gaps)))
    })
    .try_for_each_concurrent(IN_FLIGHT, |(at, len)| {
        let copied = &copied;
        async move {
            let bytes = copy_up(image, below, at, len).await?;
            copied.set(copied.get() + bytes);
            progress.advance(len);
            Ok(())
        }
    })
    .await?;
    Ok(copied.get())
}

async fn copy_up(image: &Volume, below: Option<&Volume>, at: u64, len: u64) -> Result<u64, Error> {
    let new_zeroes = match below {
        Some(below) => walk::zero_run(below, at, len).await?,
        None => len,
    };
    if new_zeroes == len && walk::zero_run(image, at, len).await? == len {
        return Ok(0);
    }
    let old = chunk::read(image, at, len as usize).await?;
    let new = match below {
        Some(below) if new_zeroes < len => chunk::read(below, at, len as usize).await?,
        _ => Buf::zeroed(len as usize),
    };
    let mut copied = 0;
    let runs = chunk::runs(at, old.len(), chunk::unit_of(image), |run| old[run.clone()] == new[run]);
    for (run, _) in runs.into_iter().filter(|(_, same)| !same) {
        // Also zeroes are written as bytes: over the old layer a driver may take them for nothing new.
        let start = at + run.start as u64;
        copied += run.len() as u64;
        chunk::write(image, start, Buf::copy_of(&old[run])).await?;
    }
    Ok(copied)
}
