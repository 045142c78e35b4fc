//! The program `blktapd`: command line, configuration, control thread, file table, placement, metrics and supervision.
//!
//! ```text
//! main ─▶ serve ─▶ supervise (starts shards) ──▶ fleet ◀── mailboxes ──▶ shards
//!                    │                              ▲
//!                    └▶ daemon (flows: attach, detach, move, …; state; events)
//!                          ▲             ▲             ▲
//!                  http (API) ◀─ client  │          metrics
//!                          nbd (listeners, negotiation)
//! main ─▶ image (the offline tools)
//! ```
//!
//! May import: `shard`; of `ring-bridge` and `formats` what control work needs (negotiation, grammar). Must never: touch a
//! request, or wait for a path on the control thread. Everything here runs on one tokio thread; what may block runs on
//! bounded pools. Locks are `std::sync::Mutex`, held for a few instructions and never over an `await`.

#![cfg_attr(test, allow(clippy::unwrap_used))] // a failed test is what an unwrap in it is for

pub mod args;
pub mod client;
pub mod config;
pub mod daemon;
pub mod events;
pub mod files;
pub mod fleet;
pub mod generate;
pub mod guests;
pub mod http;
pub mod image;
pub mod images;
pub mod keys;
pub mod limit_change;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod nbd;
pub mod placement;
pub mod problem;
pub mod ram_dir;
pub mod rundir;
pub mod serve;
pub mod state;
pub mod supervise;
pub mod systemd;
pub mod xen;
