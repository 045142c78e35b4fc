//! [`Kernel`] on Linux: one io_uring instance that the shard's thread blocks in.
//!
//! Set-up follows measurements: SINGLE_ISSUER and DEFER_TASKRUN where the kernel has them, no registered eventfd (completions
//! raised from inside an eventfd wake-up get lost on such a ring), one long-lived timeout instead of a timeout per wait.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::{Receiver, unbounded};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags, SubmitArgs, TimeoutFlags, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::side::{self, SideDone, SideJob, SideReply};
use super::{BATCH_WAIT, Completion, Kernel, Op, TIMER};
use crate::clock::{MICROSECOND, Nanos, SECOND};
use crate::executor::RingFlavour;

const ENTRIES: u32 = 1024;
const CQ_ENTRIES: u32 = 8192;
/// Completions that nobody waits for: of cancels' timer updates.
const IGNORED: u64 = u64::MAX - 1;
/// IORING_RECVSEND_POLL_FIRST of linux/io_uring.h: the socket was just found empty, or is expected to be, so do not look before it is
/// readable.
const POLL_FIRST: u16 = 1;
/// Kernel threads for operations that block (bounded: regular files and devices; unbounded: sockets and the like). The reactor
/// lets no more than a quarter of the bounded ones work for one store, and no I/O take one unasked (`nowait`).
pub const IOWQ_WORKERS: [u32; 2] = [64, 64];

/// The operations that a shard cannot do without.
pub const NEEDED: [u8; 9] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::Recv::CODE,
    opcode::RecvMsg::CODE,
    opcode::SendMsg::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// The ring of a shard.
pub struct Uring {
    ring: IoUring,
    flavour: RingFlavour,
    /// Timespecs that queued timeout entries point to: one for the timeout, one for its update.
    timespecs: Box<[Timespec; 2]>,
    /// When the timeout that is in the kernel (or queued) fires.
    armed: Option<Nanos>,
    side_reply: SideReply,
    side_done: Receiver<SideDone>,
    enters: u64,
    /// Nothing was left in the submission queue after the last enter.
    all_submitted: bool,
    overflows: u64,
    /// The kernel can wait for several completions, and for fewer after a time (Linux 6.12).
    waits_for_many: bool,
    completions: VecDeque<Completion>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("flavour", &self.flavour).finish_non_exhaustive()
    }
}

/// Sets up an io_uring of the given flavour with room for `entries` submissions.
pub fn build_ring(flavour: RingFlavour, entries: u32, cq_entries: u32) -> std::io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(cq_entries).setup_clamp();
    match flavour {
        RingFlavour::Deferred => builder.setup_single_issuer().setup_defer_taskrun(),
        RingFlavour::Cooperative => builder.setup_coop_taskrun(),
        RingFlavour::Plain => &mut builder,
    };
    builder.build(entries)
}

/// The best flavour from `best` downwards that the kernel grants, with its ring.
pub fn best_ring(
    best: RingFlavour,
    entries: u32,
    cq_entries: u32,
) -> std::io::Result<(IoUring, RingFlavour)> {
    let flavours = [RingFlavour::Deferred, RingFlavour::Cooperative, RingFlavour::Plain];
    let mut last = None;
    for flavour in flavours.into_iter().filter(|&f| f >= best) {
        match build_ring(flavour, entries, cq_entries) {
            Ok(ring) => return Ok((ring, flavour)),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other("no ring set-up to try")))
}

impl Uring {
    /// Sets up the ring of this thread. `wake` is the shard's eventfd: side threads write to it.
    pub fn new(best: RingFlavour, wake: Arc<OwnedFd>) -> std::io::Result<Uring> {
        let (ring, flavour) = best_ring(best, ENTRIES, CQ_ENTRIES)?;
        // Refused before Linux 5.15 only; the default there is bounded as well.
        let _ = ring.submitter().register_iowq_max_workers(&mut IOWQ_WORKERS.clone());
        let (tx, side_done) = unbounded();
        Ok(Uring {
            waits_for_many: ring.params().is_feature_min_timeout(),
            ring,
            flavour,
            timespecs: Box::new([Timespec::new(), Timespec::new()]),
            armed: None,
            side_reply: SideReply { tx, wake },
            side_done,
            enters: 0,
            all_submitted: true,
            overflows: 0,
            completions: VecDeque::with_capacity(1024),
        })
    }

    /// The set-up that is in use.
    pub fn flavour(&self) -> RingFlavour {
        self.flavour
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the memory that an entry names outlives the operation (invariant of the module `storage`).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The submission queue is full: hand it over. Errors (EBUSY: take completions first) are met by collecting.
            if self.call_enter(0).is_err() {
                self.collect();
            }
        }
    }

    fn call_enter(&mut self, want: u32) -> std::io::Result<()> {
        const GETEVENTS: u32 = 1;
        const EXT_ARG: u32 = 1 << 3;
        let queued = self.ring.submission().len() as u32;
        self.enters += 1;
        let submitter = self.ring.submitter();
        let result = if want > 1 && self.waits_for_many {
            let patience = SubmitArgs::new().min_wait_usec((BATCH_WAIT / MICROSECOND) as u32);
            // SAFETY: entries in the queue name memory that outlives them; the argument is what EXT_ARG says it is.
            unsafe { submitter.enter(queued, want, GETEVENTS | EXT_ARG, Some(&patience)) }
        } else {
            // SAFETY: as above; no signal mask is given.
            unsafe { submitter.enter::<libc::sigset_t>(queued, want.min(1), GETEVENTS, None) }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn collect(&mut self) {
        let queue = self.ring.completion();
        self.overflows = u64::from(queue.overflow());
        for entry in queue {
            let user_data = entry.user_data();
            if user_data == IGNORED {
                continue;
            }
            if user_data == TIMER {
                self.armed = None;
            }
            let more = io_uring::cqueue::more(entry.flags());
            self.completions.push_back(Completion { user_data, result: entry.result(), more });
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic() -> Nanos {
    // clock_gettime of CLOCK_MONOTONIC cannot fail on Linux.
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .unwrap_or_else(|_| nix::sys::time::TimeSpec::new(0, 0));
    time.tv_sec() as u64 * SECOND + time.tv_nsec() as u64
}

impl Kernel for Uring {
    fn now(&self) -> Nanos {
        monotonic()
    }

    fn push(&mut self, user_data: u64, op: Op) {
        let entry = match op {
            Op::Read { fd, addr, len, offset, nowait } => {
                let read = opcode::Read::new(Fd(fd), addr as *mut u8, len).offset(offset);
                read.rw_flags(if nowait { libc::RWF_NOWAIT } else { 0 }).build()
            }
            Op::Write { fd, addr, len, offset, nowait } => {
                let write = opcode::Write::new(Fd(fd), addr as *const u8, len).offset(offset);
                write.rw_flags(if nowait { libc::RWF_NOWAIT } else { 0 }).build()
            }
            Op::Fdatasync { fd } => opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build(),
            Op::Fallocate { fd, mode, offset, len } => {
                opcode::Fallocate::new(Fd(fd), len).offset(offset).mode(mode).build()
            }
            Op::Recv { fd, addr, len } => {
                opcode::Recv::new(Fd(fd), addr as *mut u8, len).ioprio(POLL_FIRST).build()
            }
            // In the middle of a write: a client sends payload right behind its header, so one more look may save a sleep.
            Op::RecvMsg { fd, header } => opcode::RecvMsg::new(Fd(fd), header as *mut libc::msghdr).build(),
            Op::SendMsg { fd, header } => opcode::SendMsg::new(Fd(fd), header as *const libc::msghdr)
                .flags((libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32)
                .build(),
            Op::SendNow { fd, header } => opcode::SendMsg::new(Fd(fd), header as *const libc::msghdr)
                .flags((libc::MSG_DONTWAIT | libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32)
                .build()
                .flags(squeue::Flags::SKIP_SUCCESS),
            Op::Poll { fd } => opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).build(),
            Op::PollMulti { fd } => opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build(),
            Op::Cancel { target } => opcode::AsyncCancel2::new(CancelBuilder::user_data(target)).build(),
        };
        self.push_entry(&entry.user_data(user_data));
    }

    fn receive_now(&mut self, op: Op) -> i32 {
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the memory that an operation names is valid and not in use (invariant of the module `storage`); the call
        // is done with it when it returns.
        let result = unsafe {
            match op {
                Op::Recv { fd, addr, len } => libc::recv(fd, addr as *mut libc::c_void, len as usize, flags),
                Op::RecvMsg { fd, header } => libc::recvmsg(fd, header as *mut libc::msghdr, flags),
                _ => return -libc::EINVAL,
            }
        };
        if result >= 0 { result as i32 } else { -nix::errno::Errno::last_raw() }
    }

    fn set_timer(&mut self, at: Nanos) {
        let time = Timespec::new().sec(at / SECOND).nsec((at % SECOND) as u32);
        match self.armed {
            // Firing early is harmless: the reactor looks at its own list of deadlines and asks again.
            Some(armed) if armed <= at => {}
            Some(_) => {
                self.timespecs[1] = time;
                let update = opcode::TimeoutUpdate::new(TIMER, &self.timespecs[1] as *const Timespec)
                    .flags(TimeoutFlags::ABS)
                    .build();
                self.push_entry(&update.user_data(IGNORED));
                self.armed = Some(at);
            }
            None => {
                self.timespecs[0] = time;
                let timeout = opcode::Timeout::new(&self.timespecs[0] as *const Timespec)
                    .flags(TimeoutFlags::ABS)
                    .build();
                self.push_entry(&timeout.user_data(TIMER));
                self.armed = Some(at);
            }
        }
    }

    fn enter(&mut self, want: u32) -> std::io::Result<()> {
        self.collect();
        self.call_enter(if self.completions.is_empty() { want } else { 0 })?;
        self.all_submitted = self.ring.submission().is_empty();
        self.collect();
        Ok(())
    }

    fn all_submitted(&self) -> bool {
        self.all_submitted
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    fn side(&mut self, job: SideJob) {
        side::run(job, self.side_reply.clone());
    }

    fn next_side(&mut self) -> Option<SideDone> {
        self.side_done.try_recv().ok()
    }

    fn enters(&self) -> u64 {
        self.enters
    }

    fn overflows(&self) -> u64 {
        self.overflows
    }
}
