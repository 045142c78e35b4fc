//! What an image means: codecs and grammar, one driver per format, chains of images, the logic of the offline tools.
//!
//! May import: no executor, no sockets, nothing of the project. Must never: touch a guest's payload other than through
//! [`volume::Payload`], or know who asks. A new driver is one folder and one line of [`registry`]; `GUIDE.md` shows how.

#![cfg_attr(test, allow(clippy::unwrap_used))] // a failed test is what an unwrap in it is for

pub mod allocation_log;
pub mod blocking;
pub mod codec;
mod counts;
pub mod crypt;
pub mod driver;
pub mod error;
pub mod file;
mod late;
pub mod locks;
pub mod metadata;
pub mod qcow;
pub mod qcow2;
pub mod raw;
pub mod raw_driver;
pub mod registry;
pub mod size;
pub mod spec;
mod tail;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tools;
mod unsettled;
pub mod vhd;
pub mod volume;
#[cfg(test)]
mod volume_tests;
