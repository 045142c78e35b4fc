//! The load generator: many NBD connections on one thread (epoll), closed loop (so many requests always in flight) or open
//! loop (so many requests per second, whatever the server does).
//!
//! Invariants: an open-loop latency counts from the moment at which the request was *due*, so a stalled server cannot hide
//! behind requests that were not sent; what could not be sent is counted, never forgotten; memory is bounded by connections
//! × (in flight + waiting).

mod blkif;
pub mod client;
mod engine;
pub mod ring;
mod schedule;
pub mod sweep;
mod vhost;

use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::servers::Endpoint;
pub use client::{Client, Op};

/// Where requests go on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Uniformly random blocks.
    Random,
    /// One block after the other, from the start again at the end.
    Sequential,
}

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many in flight on each connection, always.
    Closed {
        /// Requests in flight per connection.
        depth: u32,
    },
    /// So many per second on each connection, at fixed intervals from a random phase.
    Open {
        /// Operations per second and connection.
        per_second: f64,
    },
}

/// One load.
#[derive(Debug, Clone)]
pub struct Job {
    /// One connection is opened to each.
    pub endpoints: Vec<Endpoint>,
    /// Reads or writes.
    pub op: Op,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Where they go.
    pub pattern: Pattern,
    /// When they go.
    pub pace: Pace,
    /// Load before the window that is measured.
    pub warmup: Duration,
    /// The window that is measured.
    pub window: Duration,
    /// Seed of offsets and phases: equal seeds give equal requests.
    pub seed: u64,
}

/// The two ends of the measured window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The window begins.
    Begin,
    /// The window ends.
    End,
}

/// What happened in the window.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Requests completed inside the window.
    pub completed: u64,
    /// Requests answered with an error, over the whole load.
    pub errors: u64,
    /// Open loop: requests due in the window that were not answered one second after its end, or not even sent because too
    /// many were waiting.
    pub unanswered: u64,
    /// How long the window really was.
    pub window: Duration,
    /// Latencies in nanoseconds of the requests that were sent (closed loop) or due (open loop) in the window.
    pub latency_ns: Histogram<u64>,
}

impl Outcome {
    /// Operations per second.
    pub fn iops(&self) -> f64 {
        self.completed as f64 / self.window.as_secs_f64()
    }

    /// A percentile of the latency in microseconds.
    pub fn percentile_us(&self, percentile: f64) -> f64 {
        self.latency_ns.value_at_percentile(percentile) as f64 / 1000.0
    }
}

/// Runs a load to its end; `at` is called on the load's thread at both edges of the window.
pub fn run(job: &Job, at: &mut dyn FnMut(Edge) -> Result<()>) -> Result<Outcome> {
    let (outcome, clients) = run_and_keep(job, at)?;
    clients.into_iter().for_each(Client::disconnect);
    Ok(outcome)
}

/// As [`run`], but the connections stay open and are handed back, idle unless the server did not answer in time.
pub fn run_and_keep(job: &Job, at: &mut dyn FnMut(Edge) -> Result<()>) -> Result<(Outcome, Vec<Client>)> {
    engine::Engine::new(job)?.run(at)
}
