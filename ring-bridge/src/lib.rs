//! What a guest says: sans-I/O engines of the protocols that guests and clients speak, and the memory they share with us.
//!
//! May import: nothing of the project. Must never: wait, open an image, know a disk, or trust a byte that it has not copied.
//! This crate is the trust boundary, and one of the two homes of `unsafe` (shared memory).
//!
//! The engines themselves are safe code; what they stand on is checked by
//! ```text
//! RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --target x86_64-unknown-linux-gnu -p ring-bridge --lib --test 'blkif_*'
//! ```
//! The seeded tests take longer or shorter runs by `BLKIF_MODEL_SEEDS`, `BLKIF_CRASH_SEEDS` and `BLKIF_HOSTILE_SEEDS`; each failure names its seed.

pub mod blkif;
pub mod grants;
pub mod memory;
pub mod nbd;
