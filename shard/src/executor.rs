//! Starts shards: the one module that names glommio.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use glommio::{CpuSet, LocalExecutorBuilder, Placement};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::api::{Envelope, Event};
use crate::reactor::{EventSink, Shard, ShardParts};
use crate::stats::ShardCounters;
use crate::storage::pool::Pool;
use crate::storage::side::signal;
use crate::storage::uring::{NEEDED, Uring, best_ring};

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
    /// Memory for tables of images (VHD, qcow2), shared by the shard's disks, in bytes.
    pub table_budget_bytes: usize,
    /// Accept [`crate::api::Command::InjectPanic`] and its like.
    pub fault_commands: bool,
}

/// Where shards send their events: one channel for all, and an eventfd that becomes readable.
#[derive(Debug, Clone)]
pub struct EventSender {
    tx: Sender<(usize, Event)>,
    wake: Arc<OwnedFd>,
}

/// The control thread's end of [`EventSender`].
#[derive(Debug)]
pub struct EventReceiver {
    /// Shard index and event.
    pub rx: Receiver<(usize, Event)>,
    /// An eventfd, non-blocking: readable when `rx` may hold something. Read it, then drain `rx`.
    pub wake: Arc<OwnedFd>,
}

/// A running shard.
#[derive(Debug)]
pub struct ShardHandle {
    /// Its number.
    pub index: usize,
    /// The CPU that it is pinned to; `None` when it could not be.
    pub cpu: Option<usize>,
    /// Its counters.
    pub counters: Arc<ShardCounters>,
    tx: Sender<Envelope>,
    /// The shard's end, so that what it leaves behind when it ends is not lost.
    inbox: Receiver<Envelope>,
    wake: Arc<OwnedFd>,
    thread: glommio::ExecutorJoinHandle<()>,
}

/// The shard's thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("shard {0} has ended; restart the daemon and report its log")]
pub struct ShardGone(pub usize);

/// Why a shard could not start: a sentence for the operator, with what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

fn eventfd() -> std::io::Result<Arc<OwnedFd>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(Arc::new(OwnedFd::from(EventFd::from_flags(flags)?)))
}

/// The channel on which every shard reports.
///
/// # Errors
/// No descriptor for the eventfd.
pub fn event_channel() -> std::io::Result<(EventSender, EventReceiver)> {
    let (tx, rx) = unbounded();
    let wake = eventfd()?;
    Ok((EventSender { tx, wake: wake.clone() }, EventReceiver { rx, wake }))
}

/// Starts a shard on its own thread and waits until its ring works. A CPU that the thread may not use leaves it unpinned, with a
/// warning.
///
/// # Errors
/// A sentence that says what is missing: see [`probe_ring`].
pub fn start(options: ShardOptions, events: EventSender) -> Result<ShardHandle, StartError> {
    probe_ring(options.ring)?;
    let descriptors =
        |error| StartError(format!("cannot make an eventfd: {error}; raise the limit of open files"));
    let wake = eventfd().map_err(descriptors)?;
    let (tx, inbox) = unbounded();
    let counters = Arc::new(ShardCounters::default());
    // glommio asks /sys for the processors before it pins, and a chroot need not have one.
    let processors = CpuSet::online();
    if let Err(error) = &processors {
        warn_unpinned(options.index, options.cpu, &format!("/sys does not tell the processors: {error}"));
    }
    let placements = match options.cpu {
        Some(cpu) if processors.is_ok() => {
            vec![(Placement::Fixed(cpu), Some(cpu)), (Placement::Unbound, None)]
        }
        _ => vec![(Placement::Unbound, None)],
    };
    let mut failure = String::new();
    for (placement, cpu) in placements {
        let (ready_tx, ready_rx) = bounded(1);
        let seed = Seed {
            options: options.clone(),
            inbox: inbox.clone(),
            wake: wake.clone(),
            events: events.clone(),
            counters: counters.clone(),
            ready: ready_tx,
        };
        let spawned = LocalExecutorBuilder::new(placement)
            .name(&format!("shard-{}", options.index))
            // The data path has its own buffers: glommio's registered ones would only be locked memory.
            .io_memory(64 << 10)
            .ring_depth(128)
            .preempt_timer(NEVER)
            .spawn(move || async move { run(seed) });
        let thread = match spawned {
            Ok(thread) => thread,
            Err(error) => {
                failure = format!("glommio cannot start an executor: {error}");
                warn_unpinned(options.index, cpu, &failure);
                continue;
            }
        };
        match ready_rx.recv() {
            Ok(Ok(())) => {
                return Ok(ShardHandle { index: options.index, cpu, counters, tx, inbox, wake, thread });
            }
            Ok(Err(error)) => return Err(error),
            // The thread ended before it ran us: it could not be pinned.
            Err(_) => {
                failure = thread.join().err().map_or_else(String::new, |error| error.to_string());
            }
        }
        warn_unpinned(options.index, cpu, &failure);
    }
    Err(StartError(format!("shard {} cannot start: {failure}", options.index)))
}

/// The root task is alone and never yields, so glommio has nobody to preempt it for. A timer that goes off between glommio's
/// set-up and the first poll of the root task (on a busy host a millisecond passes there) would make glommio park with the
/// root task runnable, and nothing would ever wake it.
const NEVER: Duration = Duration::from_secs(24 * 3600);

fn warn_unpinned(shard: usize, cpu: Option<usize>, failure: &str) {
    if let Some(cpu) = cpu {
        tracing::warn!(
            shard,
            cpu,
            "cannot pin the shard ({failure}); it runs unpinned: check the cpuset of the daemon or --cpus"
        );
    }
}

struct Seed {
    options: ShardOptions,
    inbox: Receiver<Envelope>,
    wake: Arc<OwnedFd>,
    events: EventSender,
    counters: Arc<ShardCounters>,
    ready: Sender<Result<(), StartError>>,
}

/// The shard's thread: the root task of its executor, which never yields. glommio's own scheduler has a lost wake-up when it
/// parks, so the only place where this thread waits is the shard's ring.
fn run(seed: Seed) {
    let Seed { options, inbox, wake, events, counters, ready } = seed;
    // Before the ring, whose workers are made in this thread's likeness.
    let flusher = rustix::process::configure_io_flusher_behavior(true);
    counters.io_flusher.set(u64::from(flusher.is_ok()));
    let kernel = match Uring::new(options.ring, wake.clone()) {
        Ok(kernel) => kernel,
        Err(error) => {
            let _ = ready.send(Err(StartError(ring_sentence(&error))));
            return;
        }
    };
    counters.ring_flavour.set(kernel.flavour() as u64);
    let pool = match Pool::new(options.buffer_budget_bytes, options.buffer_budget_bytes * 3 + (64 << 20)) {
        Ok(pool) => pool,
        Err(error) => {
            let _ = ready.send(Err(StartError(error.to_string())));
            return;
        }
    };
    let sink = EventSink { tx: events.tx, wake: events.wake, shard: options.index };
    let mut shard = Shard::new(ShardParts {
        kernel,
        pool,
        inbox,
        inbox_wake: wake,
        events: sink.clone(),
        counters,
        table_budget_bytes: options.table_budget_bytes,
        fault_commands: options.fault_commands,
    });
    let _ = ready.send(Ok(()));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        loop {
            match shard.turn() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(format!("io_uring_enter failed: {error}")),
            }
        }
    }));
    let error =
        result.unwrap_or_else(|_| Some("the shard's own code panicked; its log has the place".to_owned()));
    if error.is_some() {
        // Should that panic as well, then the images are still held, and the disks stay failed.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| shard.abandon()));
    }
    sink.send(Event::Stopped { error });
}

impl ShardHandle {
    /// Sends a command; the reply comes as an event with the same tag. One that comes too late for a shard that ends is kept for
    /// [`ShardHandle::take_back`].
    pub fn send(&self, envelope: Envelope) {
        // We have a receiver ourselves, so there is always one.
        if self.tx.send(envelope).is_ok() {
            signal(&self.wake);
        }
    }

    /// The commands that the shard had not taken when it ended: to be called when [`Event::Stopped`] has come.
    pub fn take_back(&self) -> Vec<Envelope> {
        self.inbox.try_iter().collect()
    }

    /// Waits for the thread to end (after [`crate::api::Command::Stop`]).
    pub fn join(self) {
        // Its own account of why it ended has come as an event.
        let _ = self.thread.join();
    }
}

fn ring_sentence(error: &std::io::Error) -> String {
    let what = match error.raw_os_error() {
        Some(libc::ENOSYS) => {
            "io_uring is missing: this kernel lacks it or a seccomp filter hides it; use Linux 6.1 or newer and allow the \
             io_uring system calls"
        }
        Some(libc::EPERM) => {
            "io_uring is forbidden: check `sysctl kernel.io_uring_disabled` (0 allows it) and the seccomp filter of the service"
        }
        Some(libc::ENOMEM) => {
            "io_uring cannot lock its memory: raise the limit (LimitMEMLOCK=infinity, or ulimit -l) or give CAP_IPC_LOCK"
        }
        Some(libc::EMFILE | libc::ENFILE) => {
            "no descriptor is left for io_uring: raise LimitNOFILE (ulimit -n)"
        }
        _ => "io_uring cannot be set up",
    };
    format!("{what} ({error})")
}

/// Tries to set up a small ring and the operations that a shard needs. Returns the best set-up that works.
///
/// # Errors
/// A sentence for an operator that says what is missing (io_uring absent, forbidden by sysctl or seccomp, locked-memory or
/// descriptor limit too low, operations missing) and what to do.
pub fn probe_ring(best: RingFlavour) -> Result<RingFlavour, StartError> {
    let (ring, flavour) = best_ring(best, 8, 16).map_err(|error| StartError(ring_sentence(&error)))?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|error| StartError(ring_sentence(&error)))?;
    let missing: Vec<String> =
        NEEDED.iter().filter(|&&code| !probe.is_supported(code)).map(|code| code.to_string()).collect();
    if missing.is_empty() {
        return Ok(flavour);
    }
    Err(StartError(format!(
        "io_uring of this kernel lacks operations {} (numbers of io_uring.h): use Linux 6.1 or newer",
        missing.join(", ")
    )))
}
