//! One core of blktapd: reactor, storage ring, disks, limits, in-flight accounting and histograms.
//!
//! May import: `formats`, `ring-bridge`, glommio (module [`executor`] only) and io-uring (module `storage` only). Must never: block
//! outside the ring, open a path, or share memory with another shard except through a named hand-over (mailbox,
//! [`park::ParkedDisk`], [`ram::RamDisk`], [`limits::Group`]).
//!
//! A shard catches panics of a disk's work, so it must be built with unwinding panics.

#[cfg(not(panic = "unwind"))]
compile_error!("a disk's panic must not end the process: build with panic = \"unwind\"");

pub mod alog;
pub mod api;
pub mod blkif;
pub mod clock;
pub mod disk;
pub mod executor;
mod image;
pub mod limits;
pub mod nbd;
pub mod offline;
pub mod park;
pub mod ram;
pub mod reactor;
pub mod request;
#[cfg(test)]
mod sim;
pub mod stats;
pub mod storage;
