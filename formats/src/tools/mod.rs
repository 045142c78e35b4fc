//! The offline tools: what can be done with images that nobody else uses. Pure futures over [`Volume`](crate::volume::Volume)s
//! and [`ImageFile`](crate::file::ImageFile)s: they open nothing, lock nothing and print nothing.
//!
//! ```text
//! layers ─▶ volume ─▶ walk (where is what) ─▶ copy · encode · compare · coalesce · rebase · measure · map
//! ```
//! - Nothing is read that is known to be zero, and nothing is written that is zero already.
//! - Many chunks are in flight at a time ([`IN_FLIGHT`] of at most [`CHUNK`] bytes), so memory is bounded whatever an image says.
//! - No tool ends with a success before its changes are durable. An interrupted tool that changes an image in place (copy onto an
//!   existing image, coalesce, rebase) can be run again, and then ends as if it had not been interrupted.

mod chunk;
pub mod coalesce;
pub mod compare;
pub mod copy;
pub mod encode;
pub mod layers;
pub mod map;
pub mod measure;
pub mod rebase;
pub mod snapshot;
#[cfg(test)]
mod space_tests;
#[cfg(test)]
mod tests;
pub mod walk;

/// Bytes of the disk that one step of a tool works on, at most: what the storage ring moves in one piece, without a copy.
pub const CHUNK: u64 = 256 << 10;
/// Steps that are under way at a time, at most.
pub const IN_FLIGHT: usize = 64;

/// Who wants to know how far a tool is.
pub trait Progress {
    /// The work is to go through so many bytes of a disk.
    fn begin(&self, total: u64);

    /// So many more of them are done, or need nothing to be done.
    fn advance(&self, bytes: u64);
}

/// Nobody does.
impl Progress for () {
    fn begin(&self, _total: u64) {}
    fn advance(&self, _bytes: u64) {}
}
