//! What a guest says: sans-I/O engines of the protocols that guests and clients speak, and the memory they share with us.
//!
//! May import: nothing of the project. Must never: wait, open an image, know a disk, or trust a byte that it has not copied.
//! This crate is the trust boundary, and one of the two homes of `unsafe` (shared memory).

pub mod memory;
pub mod nbd;
