//! The simulator of a shard: one seed is one run of two shards with their disks, clients, operator and a store that
//! misbehaves, under a virtual clock.
//!
//! ```text
//!  acts.rs, client.rs ── socket.rs ──▶ ┌────────────┐ ──▶ kernel.rs ── store.rs, file.rs
//!   (ask, check, leave)                │ Shard (×2) │      (delays, faults, cancels; net.rs)
//!  operator.rs ─────────── commands ─▶ └────────────┘
//!        judge.rs, oracle.rs: is every answer allowed, has every silence an excuse?
//! ```
//! The code of the shard is the one that runs on Linux; only [`crate::storage::Kernel`] is replaced. The driver
//! (`scenario.rs`) takes one event after the other from the kernel's queue and lets the shards turn until they would
//! block. The shards share nothing but RAM disks, at whose blocks they meet in real life; here the disk invents the meetings.
//! Some disks are images (`image.rs`): overlays of the toy format, which the operator puts on and takes away while clients wait.
//! Whenever nothing is left that happens by itself (no operation, no client that wants to act), every request and
//! command that is unanswered must have an excuse: a store that hangs, an operator's pause, a limit, a client that does not
//! read. So a lost wake-up is found without waiting for it.
//!
//! `SIM_SEEDS=10000 cargo test --release -p shard sim::` runs many seeds, `SIM_SEED=n` one, and `SIM_VERBOSE=1` tells what
//! happens in it.

mod acts;
mod client;
mod file;
mod guests;
mod image;
mod image_tests;
mod judge;
mod kernel;
mod memory;
mod net;
mod operator;
mod oracle;
mod random;
mod scenario;
mod socket;
mod store;
mod tests;
