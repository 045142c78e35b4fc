//! What an image means: pure codecs and grammar, one driver per format.
//!
//! May import: no executor, no sockets, nothing of the project. Must never: move a guest's payload, or know who asks.

#![cfg_attr(test, allow(clippy::unwrap_used))] // a failed test is what an unwrap in it is for

pub mod allocation_log;
pub mod blocking;
pub mod driver;
pub mod error;
pub mod file;
pub mod locks;
pub mod metadata;
pub mod qcow2;
pub mod raw;
pub mod raw_driver;
pub mod registry;
pub mod size;
pub mod spec;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tools;
pub mod vhd;
pub mod volume;
