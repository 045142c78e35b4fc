//! Compressed units of an image: decoding with hard bounds, encoding, and what was decoded last.
//!
//! What is encoded comes from images, and images are hostile. So a unit is decoded into memory of its own length and not a byte
//! more, whatever the stream says of itself; the states of the decoders have a fixed size ([`Method::Zstd`] needs no window, since
//! it decodes straight into that memory); and the work is bounded by both lengths. A stream that has more or fewer bytes than its
//! unit is damaged, and so is one without its end. Bytes behind the end are nobody's affair: some formats tell lengths in sectors.
//!
//! One state of each decoder and encoder is kept per thread: making one costs as much as decoding a small unit.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{self, CCtx, DCtx};

mod cache;

pub use cache::{Decoded, TURN_BYTES};

/// The largest unit that is decoded, in bytes: bounds memory and time of a request. (The largest of qcow2 is 2 MiB.)
pub const UNIT_MAX: usize = 4 << 20;

/// Readers of qcow and qcow2 look back so far, as a power of two: longer matches are errors to them.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// How bytes are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Deflate (RFC 1951) without a wrapper, with matches of at most 4 KiB: qcow, and qcow2's `zlib`.
    Deflate,
    /// Deflate in zlib's wrapper (RFC 1950), with its checksum: grains of VMDK.
    Zlib,
    /// Frames of Zstandard (RFC 8878): qcow2's `zstd`.
    Zstd,
}

/// Why encoded bytes cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damaged {
    /// They hold more than the unit.
    #[error("they hold more than {0} bytes")]
    TooMuch(usize),
    /// They hold less than the unit.
    #[error("they hold {found} bytes instead of {expected}")]
    TooLittle {
        /// Bytes that they hold.
        found: usize,
        /// Bytes of the unit.
        expected: usize,
    },
    /// They end before the stream does.
    #[error("they end within the compressed stream")]
    CutOff,
    /// They are no stream of the method.
    #[error("they are no sound {0} stream: {1}")]
    Broken(&'static str, String),
    /// The unit is larger than any that is decoded.
    #[error("{0} bytes in one piece are more than the {UNIT_MAX} that are decoded")]
    TooLarge(usize),
}

thread_local! {
    static INFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static UNZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static ZLIB: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
}

/// Decodes a unit of exactly `len` bytes. `encoded` may go on behind the end of the stream.
///
/// # Errors
/// The stream is damaged, or has another length.
pub fn decode(method: Method, encoded: &[u8], len: usize) -> Result<Vec<u8>, Damaged> {
    let bytes = decode_up_to(method, encoded, len)?;
    if bytes.len() < len {
        return Err(Damaged::TooLittle { found: bytes.len(), expected: len });
    }
    Ok(bytes)
}

/// Decodes a unit of at most `len` bytes, for formats whose last unit may be a part of one.
///
/// # Errors
/// The stream is damaged, or longer.
pub fn decode_up_to(method: Method, encoded: &[u8], len: usize) -> Result<Vec<u8>, Damaged> {
    if len > UNIT_MAX {
        return Err(Damaged::TooLarge(len));
    }
    match method {
        Method::Deflate => inflate(false, encoded, len),
        Method::Zlib => inflate(true, encoded, len),
        Method::Zstd => unzstd(encoded, len),
    }
}

fn inflate(zlib_header: bool, encoded: &[u8], len: usize) -> Result<Vec<u8>, Damaged> {
    let name = if zlib_header { "zlib" } else { "deflate" };
    INFLATE.with_borrow_mut(|state| {
        let state = state.get_or_insert_with(|| Decompress::new(zlib_header));
        state.reset(zlib_header);
        // One byte more than the unit has shows whether the stream goes on. (`decompress_vec` fills the capacity, which may be larger.)
        let mut bytes = Vec::with_capacity(len + 1);
        let status = state.decompress_vec(encoded, &mut bytes, FlushDecompress::Finish);
        match status {
            _ if bytes.len() > len => Err(Damaged::TooMuch(len)),
            Ok(Status::StreamEnd) => Ok(bytes),
            Ok(Status::Ok | Status::BufError) => Err(Damaged::CutOff),
            Err(error) => Err(Damaged::Broken(name, error.to_string())),
        }
    })
}

fn unzstd(encoded: &[u8], len: usize) -> Result<Vec<u8>, Damaged> {
    let broken = |code| Damaged::Broken("zstd", zstd_safe::get_error_name(code).to_owned());
    UNZSTD.with_borrow_mut(|state| {
        let no_memory = || Damaged::Broken("zstd", "there is no memory for a decoder".to_owned());
        let state = match state {
            Some(state) => state,
            None => state.insert(DCtx::try_create().ok_or_else(no_memory)?),
        };
        let mut bytes = vec![0; len];
        let (mut read, mut written) = (0, 0);
        // Writers may put several frames into a unit. What is behind the last one that is needed is not looked at.
        while written < len && read < encoded.len() {
            let frame = zstd_safe::find_frame_compressed_size(&encoded[read..]).map_err(broken)?;
            let end = (read + frame).min(encoded.len());
            let result = state.decompress(&mut bytes[written..], &encoded[read..end]);
            written += result.map_err(|code| match zstd_safe::get_error_name(code) {
                // The library has no other name for it; a test sees to it that it keeps this one.
                "Destination buffer is too small" => Damaged::TooMuch(len),
                _ => broken(code),
            })?;
            read = end;
        }
        bytes.truncate(written);
        Ok(bytes)
    })
}

/// Encodes a unit into at most `room` bytes; `None` when that does not do.
pub fn encode(method: Method, bytes: &[u8], room: usize) -> Option<Vec<u8>> {
    match method {
        Method::Deflate => {
            let window = DEFLATE_WINDOW_BITS;
            let new = || Compress::new_with_window_bits(Compression::default(), false, window);
            DEFLATE.with_borrow_mut(|state| deflate(state, new, bytes, room))
        }
        Method::Zlib => {
            let new = || Compress::new(Compression::default(), true);
            ZLIB.with_borrow_mut(|state| deflate(state, new, bytes, room))
        }
        Method::Zstd => ZSTD.with_borrow_mut(|state| {
            let state = match state {
                Some(state) => state,
                None => state.insert(CCtx::try_create()?),
            };
            let mut out = vec![0; room];
            let len = state.compress(&mut out[..], bytes, zstd::DEFAULT_COMPRESSION_LEVEL).ok()?;
            out.truncate(len);
            Some(out)
        }),
    }
}

fn deflate(
    kept: &mut Option<Compress>,
    new: impl FnOnce() -> Compress,
    bytes: &[u8],
    room: usize,
) -> Option<Vec<u8>> {
    let state = kept.get_or_insert_with(new);
    state.reset();
    let mut out = Vec::with_capacity(room);
    let status = state.compress_vec(bytes, &mut out, FlushCompress::Finish);
    if !matches!(status, Ok(Status::StreamEnd)) {
        // The library (zlib-rs 0.6) does not reset a stream that was left in the middle rightly: the next one would fail.
        *kept = None;
        return None;
    }
    (out.len() <= room).then_some(out)
}

/// Bytes that the encoded form of `len` bytes has at most, whatever they are and whatever the method.
pub fn encoded_max(len: usize) -> usize {
    // Deflate with a small window is the longest: it cannot always store what it cannot compress (zlib's `deflateBound`).
    len + len / 8 + len / 128 + 128
}

#[cfg(test)]
mod tests;
