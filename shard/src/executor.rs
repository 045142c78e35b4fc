//! Starts shards: the one module that names glommio.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::api::{Envelope, Event};
use crate::stats::ShardCounters;

/// How a ring is set up, best first; what the kernel or a policy refuses degrades to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RingFlavour {
    /// SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1).
    Deferred = 0,
    /// COOP_TASKRUN.
    Cooperative = 1,
    /// No flags.
    Plain = 2,
}

/// How to start one shard.
#[derive(Debug, Clone)]
pub struct ShardOptions {
    /// Number of the shard, from 0.
    pub index: usize,
    /// CPU to pin to; `None` leaves the thread unpinned.
    pub cpu: Option<usize>,
    /// Best ring set-up to try.
    pub ring: RingFlavour,
    /// Bytes of I/O buffers that the shard's connections share.
    pub buffer_budget_bytes: usize,
    /// Accept [`crate::api::Command::InjectPanic`].
    pub fault_commands: bool,
}

/// Where shards send their events: one channel for all, and an eventfd that becomes readable.
#[derive(Debug, Clone)]
pub struct EventSender {
    pub(crate) tx: crossbeam::channel::Sender<(usize, Event)>,
    pub(crate) wake: Arc<OwnedFd>,
}

/// The control thread's end of [`EventSender`].
#[derive(Debug)]
pub struct EventReceiver {
    /// Shard index and event.
    pub rx: crossbeam::channel::Receiver<(usize, Event)>,
    /// An eventfd, non-blocking: readable when `rx` may hold something. Read it, then drain `rx`.
    pub wake: Arc<OwnedFd>,
}

/// A running shard.
#[derive(Debug)]
pub struct ShardHandle {
    /// Its number.
    pub index: usize,
    /// The CPU that it is pinned to.
    pub cpu: Option<usize>,
    /// Its counters.
    pub counters: Arc<ShardCounters>,
}

/// The shard's thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("shard {0} has ended; restart the daemon and report its log")]
pub struct ShardGone(pub usize);

/// Why a shard could not start: a sentence for the operator, with what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

/// The channel on which every shard reports.
pub fn event_channel() -> std::io::Result<(EventSender, EventReceiver)> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Starts a shard on its own thread and waits until its ring works.
pub fn start(_options: ShardOptions, _events: EventSender) -> Result<ShardHandle, StartError> {
    Err(StartError("not built".into()))
}

impl ShardHandle {
    /// Sends a command; the reply comes as an event with the same tag.
    pub fn send(&self, _envelope: Envelope) -> Result<(), ShardGone> {
        Err(ShardGone(self.index))
    }

    /// Waits for the thread to end (after [`crate::api::Command::Stop`]).
    pub fn join(self) {}
}

/// Tries to set up a small ring and the operations that a shard needs; the error is a sentence for an operator that says
/// what is missing (io_uring absent, forbidden by sysctl or seccomp, locked-memory or descriptor limit too low) and what to do.
pub fn probe_ring(_best: RingFlavour) -> Result<RingFlavour, StartError> {
    Err(StartError("not built".into()))
}
