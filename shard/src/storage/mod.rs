//! The kernel boundary of a shard: the operations that it asks of the kernel, the ring that carries them, the memory that they
//! move, and the side threads for the calls that io_uring lacks.
//!
//! This is one of the two homes of `unsafe`. Everything above speaks of descriptors, offsets and [`pool::Buf`] handles and is
//! generic over [`Kernel`], so that the simulator can stand in for Linux.
//!
//! Invariant: memory named by an [`Op`] stays valid and in place from [`Kernel::push`] until its completion has been
//! taken. Buffers belong to the pool, which never moves or unmaps them; socket message headers live in boxes of their
//! connection, which is not freed before its operations have completed.
#![allow(unsafe_code)]

pub mod grants;
pub mod message;
pub mod pool;
pub mod side;
pub mod uring;

use std::os::fd::RawFd;

use crate::clock::{MICROSECOND, Nanos};
use side::{SideDone, SideJob};

/// One operation for the kernel. Addresses are of memory that outlives the operation (see the module's invariant).
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// pread into `addr`.
    Read {
        /// File.
        fd: RawFd,
        /// Destination.
        addr: usize,
        /// Bytes.
        len: u32,
        /// File offset in bytes.
        offset: u64,
        /// What cannot be done without waiting for the store is not done (RWF_NOWAIT of preadv2(2)): -EAGAIN, or fewer bytes;
        /// -EOPNOTSUPP where the file cannot tell. Else the kernel gives such work to one of its bounded workers.
        nowait: bool,
    },
    /// pwrite from `addr`.
    Write {
        /// File.
        fd: RawFd,
        /// Source.
        addr: usize,
        /// Bytes.
        len: u32,
        /// File offset in bytes.
        offset: u64,
        /// What cannot be done without waiting for the store is not done (RWF_NOWAIT of preadv2(2)): -EAGAIN, or fewer bytes;
        /// -EOPNOTSUPP where the file cannot tell. Else the kernel gives such work to one of its bounded workers.
        nowait: bool,
    },
    /// fdatasync.
    Fdatasync {
        /// File.
        fd: RawFd,
    },
    /// fallocate with `mode` as in fallocate(2).
    Fallocate {
        /// File.
        fd: RawFd,
        /// FALLOC_FL_*.
        mode: i32,
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// recv of whatever is there, at most `len` bytes.
    Recv {
        /// Socket.
        fd: RawFd,
        /// Destination.
        addr: usize,
        /// Bytes.
        len: u32,
    },
    /// recvmsg; `header` is the address of a `libc::msghdr`.
    RecvMsg {
        /// Socket.
        fd: RawFd,
        /// Message header.
        header: usize,
    },
    /// sendmsg of everything (MSG_WAITALL); `header` is the address of a `libc::msghdr`.
    SendMsg {
        /// Socket.
        fd: RawFd,
        /// Message header.
        header: usize,
    },
    /// sendmsg of what the socket takes at once. When that is everything there is no completion: the operation has ended when
    /// the [`Kernel::enter`] that submitted it returns. Else it completes with the bytes that were taken, or -EAGAIN.
    SendNow {
        /// Socket.
        fd: RawFd,
        /// Message header.
        header: usize,
    },
    /// Poll for readability, once: it completes at once when the file is readable already.
    Poll {
        /// File.
        fd: RawFd,
    },
    /// Multishot poll for readability.
    PollMulti {
        /// File.
        fd: RawFd,
    },
    /// Cancels the operation with that user data; both complete.
    Cancel {
        /// User data of the operation.
        target: u64,
    },
}

/// A completion: user data of the operation, its result (negative errno on failure), and whether a multishot operation goes on.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    /// As given to [`Kernel::push`].
    pub user_data: u64,
    /// Bytes or negative errno.
    pub result: i32,
    /// More completions of this operation will come.
    pub more: bool,
}

/// User data of the completions that [`Kernel::set_timer`] makes.
pub const TIMER: u64 = u64::MAX;

/// The longest that [`Kernel::enter`] waits for more completions when it has one.
pub const BATCH_WAIT: Nanos = 50 * MICROSECOND;

/// What a shard needs of its surroundings: a clock, a ring, side threads. Linux in [`uring::Uring`], or the simulator.
pub trait Kernel {
    /// The time.
    fn now(&self) -> Nanos;

    /// Queues an operation; it starts at the next [`Kernel::enter`] at the latest.
    fn push(&mut self, user_data: u64, op: Op);

    /// Does a receive ([`Op::Recv`], [`Op::RecvMsg`]) at once and not through the ring. Returns what its completion would say;
    /// -EAGAIN when nothing is there, or now and then although something is.
    fn receive_now(&mut self, op: Op) -> i32;

    /// Asks for a completion with user data [`TIMER`] at `at` or soon after; replaces the earlier wish.
    fn set_timer(&mut self, at: Nanos);

    /// Submits what is queued and collects completions. Blocks until there are `want` of them (not at all for 0), or one at least and
    /// [`BATCH_WAIT`] has passed, or for no reason. A kernel that cannot wait for several waits for one.
    fn enter(&mut self, want: u32) -> std::io::Result<()>;

    /// Everything that was pushed before the last [`Kernel::enter`] has reached the kernel.
    fn all_submitted(&self) -> bool;

    /// The next collected completion.
    fn next_completion(&mut self) -> Option<Completion>;

    /// Runs a job on a side thread; its result comes from [`Kernel::next_side`].
    fn side(&mut self, job: SideJob);

    /// The next finished side job.
    fn next_side(&mut self) -> Option<SideDone>;

    /// Number of io_uring_enter calls so far.
    fn enters(&self) -> u64;

    /// Number of completion-queue overflows so far.
    fn overflows(&self) -> u64;
}
