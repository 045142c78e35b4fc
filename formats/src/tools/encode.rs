//! Copies a disk into a new image in compressed form: `convert -c`.
//!
//! ```text
//! walk ─▶ units that hold bytes ─ read, many in flight ─▶ batch ─ encoded by all cores ─▶ written
//! ```
//! While a batch is encoded the kernel reads for the next one.

use std::ops::Range;

use futures_util::stream::{self, Stream, TryStreamExt};

use super::copy::Copied;
use super::walk::{Depth, Walk};
use super::{CHUNK, IN_FLIGHT, Progress, chunk};
use crate::codec;
use crate::driver::Encoding;
use crate::error::{Error, ErrorKind};
use crate::file::Buf;
use crate::volume::Volume;

/// Bytes that are encoded at a time: enough for many cores.
const BATCH_BYTES: u64 = 16 << 20;
/// Units that are encoded at a time, at least: what a format wastes at the end of a batch is then little.
const BATCH_UNITS: u64 = 32;

/// Who encodes units, on as many threads as it likes.
pub trait Encoder {
    /// The encoded form of each unit; `None` where it is longer than the image takes.
    fn encode(&self, encoding: &Encoding, units: &[&[u8]]) -> Vec<Option<Vec<u8>>>;
}

/// One thread: the caller's.
impl Encoder for () {
    fn encode(&self, encoding: &Encoding, units: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        units.iter().map(|unit| codec::encode(encoding.method, unit, encoding.encoded_max)).collect()
    }
}

/// The units of a disk that hold bytes, in order, several at a time.
struct Units<'a> {
    walk: Walk<'a>,
    unit: u64,
    per_step: u64,
    /// Numbers of those that are known and not given yet.
    rest: Range<u64>,
}

impl Units<'_> {
    /// Offset and bytes of the next ones, which lie in a row.
    async fn next(&mut self) -> Result<Option<(u64, u64)>, Error> {
        while self.rest.is_empty() {
            let Some(span) = self.walk.next().await? else { return Ok(None) };
            if span.is_data() {
                let first = (span.start / self.unit).max(self.rest.end);
                self.rest = first..span.end().div_ceil(self.unit).max(first);
            }
        }
        let start = self.rest.start;
        // Up to the same borders wherever a stretch begins.
        self.rest.start = self.rest.end.min((start / self.per_step + 1) * self.per_step);
        Ok(Some((start * self.unit, (self.rest.start - start) * self.unit)))
    }
}

/// Copies all of `source` into `target`, which is new and at least as large, compressed as its format does it. Units that do not get
/// shorter are written as they are. The result is in the target's files, not yet durable.
///
/// # Errors
/// The target takes nothing compressed, or is too small; what reading and writing answered.
pub async fn copy_encoded(
    source: &Volume,
    target: &Volume,
    encoder: &dyn Encoder,
    progress: &dyn Progress,
) -> Result<Copied, Error> {
    let Some(encoding) = target.layers().first().and_then(|top| top.driver.encoding()) else {
        let message = "images of this type, with these options, cannot be compressed: qcow2 and qcow can";
        return Err(Error::new(ErrorKind::Unsupported, message));
    };
    let size = source.size();
    if size > target.size() {
        let target = target.size();
        return Err(Error::invalid(format!("{size} bytes do not fit a disk of {target} bytes")));
    }
    progress.begin(size);
    let unit = encoding.unit;
    let step = CHUNK.max(unit);
    let walk = Walk::new(source, Depth::Chain, 0..size);
    let units = Units { walk, unit, per_step: step / unit, rest: 0..0 };
    let in_flight = ((BATCH_BYTES / step) as usize).clamp(2, IN_FLIGHT);
    let reads = stream::try_unfold(units, |mut units| async move {
        let next = units.next().await?;
        Ok::<_, Error>(next.map(|next| (next, units)))
    })
    .map_ok(|(at, len)| async move { Ok((at, chunk::read(source, at, len as usize).await?)) })
    .try_buffered(in_flight);
    let mut reads = std::pin::pin!(reads);
    let mut done = 0;
    let mut data = 0;
    loop {
        let batch = next_batch(reads.as_mut(), BATCH_BYTES.max(unit * BATCH_UNITS)).await?;
        let Some((last, bytes)) = batch.last() else { break };
        let upto = (last + bytes.len() as u64).min(size);
        data += write_batch(target, &encoding, encoder, &batch).await?;
        progress.advance(upto - done);
        done = upto;
    }
    progress.advance(size - done);
    Ok(Copied { data, zero: size - data })
}

async fn next_batch(
    mut reads: std::pin::Pin<&mut impl Stream<Item = Result<(u64, Buf), Error>>>,
    wanted: u64,
) -> Result<Vec<(u64, Buf)>, Error> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < wanted
        && let Some(read) = reads.try_next().await?
    {
        bytes += read.1.len() as u64;
        batch.push(read);
    }
    Ok(batch)
}

/// Writes what is not zero; returns how many bytes of the disk that were.
async fn write_batch(
    target: &Volume,
    encoding: &Encoding,
    encoder: &dyn Encoder,
    batch: &[(u64, Buf)],
) -> Result<u64, Error> {
    let unit = encoding.unit;
    let units =
        batch.iter().flat_map(|(at, bytes)| (*at..).step_by(unit as usize).zip(bytes.chunks(unit as usize)));
    let (places, units): (Vec<u64>, Vec<&[u8]>) =
        units.filter(|(_, bytes)| !crate::file::is_zero(bytes)).unzip();
    let encoded = encoder.encode(encoding, &units);
    let mut shorter = Vec::with_capacity(units.len());
    let (mut data, mut plain) = (0, Vec::new());
    for ((at, bytes), encoded) in places.into_iter().zip(units).zip(encoded) {
        let inside = unit.min(target.size() - at);
        data += inside;
        match encoded {
            Some(encoded) => shorter.push((at, encoded)),
            None => plain.push((at, &bytes[..inside as usize])),
        }
    }
    target.write_encoded(shorter).await?;
    let writes = plain.into_iter().map(|(at, bytes)| Ok(chunk::write(target, at, Buf::copy_of(bytes))));
    stream::iter(writes).try_for_each_concurrent(IN_FLIGHT, |write| write).await?;
    Ok(data)
}
