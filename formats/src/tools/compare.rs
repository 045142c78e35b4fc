//! Compares two disks, byte by byte as far as they have bytes.

use futures_util::future::try_join;
use futures_util::stream::{self, TryStreamExt};

use super::walk::{self, ZERO_RUN};
use super::{CHUNK, IN_FLIGHT, Progress, chunk};
use crate::error::Error;
use crate::volume::Volume;

/// The first difference of two disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// This byte.
    Byte(u64),
    /// The number of bytes, which was asked to be the same.
    Size,
}

/// Finds the first difference. A disk that is shorter reads as zero behind its end, unless `strict` wants the sizes to be the same.
///
/// # Errors
/// What reading answered.
pub async fn compare(
    one: &Volume,
    two: &Volume,
    strict: bool,
    progress: &dyn Progress,
) -> Result<Option<Difference>, Error> {
    if strict && one.size() != two.size() {
        return Ok(Some(Difference::Size));
    }
    let end = one.size().max(two.size());
    progress.begin(end);
    // In order, so that what is found first is first.
    let found = stream::try_unfold(0, |mut at| async move {
        loop {
            if at >= end {
                return Ok::<_, Error>(None);
            }
            let ask = (end - at).min(ZERO_RUN);
            let zeroes = match walk::zero_run(one, at, ask).await? {
                0 => 0,
                zeroes => walk::zero_run(two, at, zeroes).await?,
            };
            at += zeroes;
            progress.advance(zeroes);
            if zeroes < ask {
                let len = (CHUNK - at % CHUNK).min(end - at);
                return Ok(Some(((at, len), at + len)));
            }
        }
    })
    .map_ok(|(at, len)| async move {
        let len_bytes = len as usize;
        let (first, second) =
            try_join(chunk::read(one, at, len_bytes), chunk::read(two, at, len_bytes)).await?;
        progress.advance(len);
        if *first == *second {
            return Ok(None);
        }
        let place = first.iter().zip(second.iter()).position(|(a, b)| a != b);
        Ok(place.map(|place| at + place as u64))
    })
    .try_buffered(IN_FLIGHT)
    .try_filter_map(|difference| std::future::ready(Ok(difference)));
    let first = Box::pin(found).try_next().await?;
    Ok(first.map(Difference::Byte))
}
