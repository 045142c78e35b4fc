//! The proof machinery of format drivers: a simulated store, a recorder, a replayer of crashes, and the suites that every driver
//! passes. Compiled for tests, and under the feature `testing` for the tests of other crates.
//!
//! ```text
//! Store (seed) ── MemFile ◀── driver under test          Record ──▶ replay ──▶ crash state ──▶ open, check, read, qemu-img
//!    │ completes, holds, fails, tears                      ▲                                       │
//!    └───────── submissions, completions, log, marks ──────┘      History ──── which bytes are legal ┘
//! ```

pub mod at_once;
pub mod conformance;
mod disk_file;
pub mod dm_log;
pub mod fault;
pub mod fuzz;
pub mod history;
#[cfg(test)]
mod known_defects;
pub mod log;
mod mem_file;
pub mod oracle;
pub mod pages;
pub mod programs;
pub mod record;
pub mod replay;
pub mod rig;
pub mod run;
pub mod store;
pub mod toy;

pub use disk_file::DiskFile;
pub use fault::{Fault, Kind, Landed, Op, Rule};
pub use log::MemLog;
pub use mem_file::MemFile;
pub use pages::Pages;
pub use record::{Change, Event, Record};
pub use run::Abandon;
pub use store::{Store, Stuck};

/// A size of a test: the environment variable `name`, else `default`.
pub fn size_of_run(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
