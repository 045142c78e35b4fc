//! Flush by group commit: at most one fdatasync of a file is in the kernel; who comes while it runs waits for the next one,
//! because the running one may have passed its data already.
//!
//! A failed fdatasync is never repeated into a success: the kernel reports a lost write once and then forgets it, so the next
//! fdatasync would lie.

use super::{Action, Ctx, Disk};
use crate::api::{Backend, DiskState, ErrorPolicy};
use crate::request::{Kind, Phase, ReqKey};

/// What a failed fdatasync means, and what an operator does.
const IN_DOUBT: &str = "data that was acknowledged since the last flush may be lost: check the store, then \
                        `resume --data-in-doubt`, or `fail`";

/// Requests that wait for fdatasync.
#[derive(Debug, Default)]
pub(super) struct SyncGroup {
    /// Served by the fdatasync that is in the kernel.
    running: Vec<ReqKey>,
    /// Served by the next one.
    next: Vec<ReqKey>,
    in_flight: bool,
}

impl Disk {
    pub(super) fn start_flush(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        self.join_sync(ctx, key);
    }

    /// Answers the request when an fdatasync that starts from now on has succeeded.
    pub(super) fn join_sync(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        // A RAM disk has no store that could lose what it holds; a read-only disk has nothing to lose.
        if self.config.read_only || !matches!(self.config.backend, Backend::File(_)) {
            return self.finish(ctx, key, 0);
        }
        if self.flush_failed {
            return self.refuse_sync(ctx, key);
        }
        ctx.requests[key].phase = Phase::Sync;
        self.sync.next.push(key);
        self.launch_sync(ctx);
    }

    /// A request asks for what a failed fdatasync stands in the way of.
    pub(super) fn refuse_sync(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        // It may have failed where the state could not tell: while the disk was paused, or on another shard.
        self.tell_failed_sync(ctx, format!("an fdatasync failed before; {IN_DOUBT}"));
        if self.holds_failed(ctx, key) {
            self.hold_failed(ctx, key);
        } else {
            self.finish(ctx, key, libc::EIO);
        }
    }

    /// fdatasync of a raw disk at rest, before another image takes its place. [`Disk::is_syncing`] until it is done.
    pub fn sync_at_rest(&mut self, ctx: &mut Ctx<'_>) {
        let held = matches!(self.config.backend, Backend::File(_)) && !self.config.read_only;
        if held && !self.flush_failed && !self.sync.in_flight {
            self.sync.in_flight = true;
            ctx.out.push(Action::Sync);
        }
    }

    /// An fdatasync is in the kernel, or on its way there.
    pub fn is_syncing(&self) -> bool {
        self.sync.in_flight
    }

    fn launch_sync(&mut self, ctx: &mut Ctx<'_>) {
        if !self.sync.in_flight && !self.sync.next.is_empty() {
            self.sync.in_flight = true;
            std::mem::swap(&mut self.sync.running, &mut self.sync.next);
            ctx.out.push(Action::Sync);
        }
    }

    /// The policy for a request that a failed fdatasync stands in the way of is to hold it. A command is always told.
    fn holds_failed(&self, ctx: &Ctx<'_>, key: ReqKey) -> bool {
        self.config.on_error == ErrorPolicy::Pause
            && !matches!(self.state, DiskState::Failed | DiskState::Zombie)
            && !matches!(ctx.requests[key].kind, Kind::SetLength { .. })
    }

    /// An fdatasync has failed: no flush succeeds until an operator accepts it. Returns the reason to show.
    pub fn note_failed_sync(&mut self, errno: i32) -> String {
        self.flush_failed = true;
        self.config.counters.flush_failures.add(1);
        self.config.counters.storage_errors.add(1);
        let what = nix::errno::Errno::from_raw(errno).desc();
        format!("fdatasync failed: {what}; {IN_DOUBT}")
    }

    /// The state that a failed fdatasync leaves the disk in.
    fn tell_failed_sync(&mut self, ctx: &mut Ctx<'_>, reason: String) {
        match self.state {
            DiskState::Failed | DiskState::Zombie => {}
            // It stays so, and does not run on before somebody accepts it.
            DiskState::Paused => {
                self.set_state(DiskState::Paused, &reason);
                ctx.out.push(Action::State);
            }
            _ => self.enter_state(ctx, DiskState::StorageError, reason),
        }
    }

    /// An fdatasync of a file of the disk's image has failed, whoever asked for it: the mark is the disk's, since the files change.
    pub fn on_file_sync_failed(&mut self, ctx: &mut Ctx<'_>, errno: i32) {
        if !self.flush_failed {
            let reason = self.note_failed_sync(errno);
            self.tell_failed_sync(ctx, reason);
        }
    }

    /// A request of an image failed because an fdatasync of its files has.
    pub(super) fn on_volume_sync_failed(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, errno: i32) {
        if self.holds_failed(ctx, key) {
            self.hold_failed(ctx, key);
        } else {
            self.finish(ctx, key, errno);
        }
    }

    /// An operator accepted that data may be lost: flushes are tried again.
    pub fn accept_doubt(&mut self) {
        self.flush_failed = false;
        if self.state == DiskState::StorageError {
            self.set_state(DiskState::Running, "");
        }
    }

    /// fdatasync is done: 0 or an errno.
    pub fn on_sync(&mut self, ctx: &mut Ctx<'_>, errno: i32) {
        self.sync.in_flight = false;
        let mut waiters = std::mem::take(&mut self.sync.running);
        if errno == 0 {
            // Before the answers, so that a request which they let start joins the next one.
            self.launch_sync(ctx);
            for key in waiters.drain(..) {
                self.finish(ctx, key, 0);
            }
            return;
        }
        let reason = self.note_failed_sync(errno);
        waiters.append(&mut self.sync.next);
        self.tell_failed_sync(ctx, reason);
        for key in waiters {
            if self.holds_failed(ctx, key) {
                self.hold_failed(ctx, key);
            } else {
                self.finish(ctx, key, errno);
            }
        }
    }
}
