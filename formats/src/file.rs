//! A file of an image as a driver sees it: positions, whole answers, explicit order. The seam at which tests record, delay,
//! tear and refuse single operations.
//!
//! Contract of every implementation:
//! 1. Any offset and length will do. Where the store wants whole blocks the implementation reads, merges and writes them,
//!    serialised with all other I/O of that block, the guest's payload included.
//! 2. An operation begins when its future is *made*, not when it is first polled, and goes on when the future is dropped: the
//!    kernel may have it already. It owns its memory until it has ended.
//! 3. Operations in flight are not ordered. What was answered before [`ImageFile::flush`] began is durable when that flush has
//!    succeeded. A flush that failed is never turned into a success later: every later flush of this object fails too.
//! 4. Bytes behind the end of the file read as zero. [`ImageFile::write`] extends a regular file.

use std::any::Any;
use std::ops::{Deref, DerefMut, Range};
use std::pin::Pin;

use crate::error::Error;

/// Alignment of a [`Buf`] in memory, in bytes: enough for O_DIRECT on every store.
pub const BUF_ALIGN: usize = 4096;

/// The answer of an operation that takes its time. Not `Send`: one core owns everything.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + 'a>>;

/// Memory of I/O: owned by whoever works on it, aligned to [`BUF_ALIGN`], and it stays in place when it is moved.
pub struct Buf {
    memory: Memory,
    len: usize,
}

enum Memory {
    /// The bytes begin at `start`.
    Own {
        bytes: Vec<u8>,
        start: usize,
    },
    Lent(Box<dyn Lent>),
}

/// Memory of a store's that the bytes of a [`Buf`] lie in, aligned to [`BUF_ALIGN`]. The store has it back when it is dropped, or when the
/// [`Buf`] is written to a file of it: then nothing is copied.
pub trait Lent: Any {
    /// All of it.
    fn bytes(&self) -> &[u8];

    /// All of it, to be changed.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl Buf {
    /// `len` zeroes.
    pub fn zeroed(len: usize) -> Buf {
        let bytes = vec![0u8; len + BUF_ALIGN];
        let start = bytes.as_ptr().align_offset(BUF_ALIGN);
        // A Vec that is not resized does not move its bytes. (align_offset may give up in const evaluation only.)
        Buf { memory: Memory::Own { start: start.min(BUF_ALIGN), bytes }, len }
    }

    /// A copy of some bytes.
    pub fn copy_of(source: &[u8]) -> Buf {
        // As in `zeroed`, without writing every byte twice: the capacity is there, so that nothing moves.
        let mut bytes: Vec<u8> = Vec::with_capacity(source.len() + BUF_ALIGN);
        let start = bytes.as_ptr().align_offset(BUF_ALIGN).min(BUF_ALIGN);
        bytes.resize(start, 0);
        bytes.extend_from_slice(source);
        Buf { memory: Memory::Own { start, bytes }, len: source.len() }
    }

    /// The bytes of a store's memory.
    pub fn lent(memory: Box<dyn Lent>) -> Buf {
        Buf { len: memory.bytes().len(), memory: Memory::Lent(memory) }
    }

    /// The memory that a store has lent, if its bytes are in such; else the same again.
    ///
    /// # Errors
    /// The bytes, which are in memory of their own.
    pub fn into_lent(self) -> Result<Box<dyn Lent>, Buf> {
        match self.memory {
            Memory::Lent(memory) => Ok(memory),
            own => Err(Buf { memory: own, len: self.len }),
        }
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.memory {
            Memory::Own { bytes, start } => &bytes[*start..*start + self.len],
            Memory::Lent(memory) => &memory.bytes()[..self.len],
        }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Own { bytes, start } => &mut bytes[*start..*start + self.len],
            Memory::Lent(memory) => &mut memory.bytes_mut()[..self.len],
        }
    }
}

impl Clone for Buf {
    fn clone(&self) -> Buf {
        Buf::copy_of(self)
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Comparing slices is the fastest that safe code can do.
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|part| *part == ZEROES[..part.len()])
}

/// A file of an image, opened. See the module for the contract.
pub trait ImageFile: std::fmt::Debug {
    /// Its path, for messages.
    fn name(&self) -> &str;

    /// Length in bytes now, counting what [`ImageFile::extend`] and writes have added.
    fn length(&self) -> u64;

    /// A block device: its length is given, and nothing is known of what it holds.
    fn is_device(&self) -> bool;

    /// Changes are allowed.
    fn is_writable(&self) -> bool;

    /// Reads exactly `len` bytes.
    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf>;

    /// As [`ImageFile::read`]; the bytes may be in memory of the store ([`Lent`]), so whoever has them gives them up soon.
    fn read_lent(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.read(offset, len)
    }

    /// Writes all of `data`.
    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()>;

    /// Makes everything durable that was answered before this call, length included.
    fn flush(&self) -> Pending<'static, ()>;

    /// Makes the file at least `length` bytes long; what is new reads as zero. Does nothing if it is that long. Fails on a device
    /// that is too short.
    fn extend(&self, length: u64) -> Pending<'static, ()>;

    /// All of this range, which is inside of the file, will be written soon: the store may give it space at once, which is cheaper than piece by
    /// piece. It reads as before. Returns whether that was done; writes work without.
    fn reserve(&self, _range: Range<u64>) -> Pending<'static, bool> {
        Box::pin(std::future::ready(Ok(false)))
    }

    /// Cuts the file to `length` bytes. Does nothing on a device.
    fn truncate(&self, length: u64) -> Pending<'static, ()>;

    /// Makes a range read as zero, giving its space back where the store can do that.
    fn zero(&self, range: Range<u64>) -> Pending<'static, ()>;

    /// What the store has from `offset` on: how many bytes are alike (never 0), and whether it has bytes there at all. False: a hole,
    /// which reads as zero. Only a hint about cost where it is true; behind the end of the file there is a hole without an end.
    fn data_run(&self, _offset: u64) -> Pending<'static, (u64, bool)> {
        Box::pin(std::future::ready(Ok((u64::MAX, true))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: memory of any length is aligned, zero or a copy, and stays in place when it is moved. Method: lengths around the unit.
    #[test]
    fn memory_is_aligned_and_holds_what_it_was_given() {
        for len in [0, 1, 511, 4095, 4096, 4097, 300_000] {
            let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8 + 1).collect();
            for (buf, expected) in [(Buf::copy_of(&bytes), bytes.clone()), (Buf::zeroed(len), vec![0; len])] {
                let place = buf.as_ptr();
                assert!(place.align_offset(BUF_ALIGN) == 0, "{len} bytes at {place:?}");
                let mut moved = buf;
                assert_eq!((moved.as_ptr(), &moved[..]), (place, &expected[..]));
                moved.truncate(len / 2);
                assert_eq!(moved[..], expected[..len / 2]);
            }
        }
    }
}
