//! Flush by group commit: at most one fdatasync of a file is in the kernel; who comes while it runs waits for the next one,
//! because the running one may have passed its data already.
//!
//! A failed fdatasync is never repeated into a success: the kernel reports a lost write once and then forgets it, so the next
//! fdatasync would lie.

use super::{Action, Ctx, Disk};
use crate::api::{Backend, DiskState, ErrorPolicy};
use crate::request::{Phase, ReqKey};

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
            return if self.holds_failed() {
                self.hold_failed(ctx, key)
            } else {
                self.finish(ctx, key, libc::EIO)
            };
        }
        ctx.requests[key].phase = Phase::Sync;
        self.sync.next.push(key);
        self.launch_sync(ctx);
    }

    fn launch_sync(&mut self, ctx: &mut Ctx<'_>) {
        if !self.sync.in_flight && !self.sync.next.is_empty() {
            self.sync.in_flight = true;
            std::mem::swap(&mut self.sync.running, &mut self.sync.next);
            ctx.out.push(Action::Sync);
        }
    }

    /// The policy for a request that a failed fdatasync stands in the way of is to hold it.
    fn holds_failed(&self) -> bool {
        self.config.on_error == ErrorPolicy::Pause
            && !matches!(self.state, DiskState::Failed | DiskState::Zombie)
    }

    /// An fdatasync has failed: no flush succeeds until an operator accepts it. Returns the reason to show.
    pub fn note_failed_sync(&mut self, errno: i32) -> String {
        self.flush_failed = true;
        self.config.counters.flush_failures.add(1);
        self.config.counters.storage_errors.add(1);
        let what = nix::errno::Errno::from_raw(errno).desc();
        format!(
            "fdatasync failed: {what}; data that was acknowledged since the last flush may be lost: check the store, then \
             `resume --data-in-doubt`, or `fail`"
        )
    }

    /// A request of an image failed because an fdatasync of its files has.
    pub(super) fn on_volume_sync_failed(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, errno: i32) {
        if !self.flush_failed {
            let reason = self.note_failed_sync(errno);
            if !matches!(self.state, DiskState::Failed | DiskState::Zombie) {
                self.enter_state(ctx, DiskState::StorageError, reason);
            }
        }
        if self.holds_failed() {
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
        let hold = self.holds_failed();
        if !matches!(self.state, DiskState::Failed | DiskState::Zombie) {
            self.enter_state(ctx, DiskState::StorageError, reason);
        }
        for key in waiters {
            if hold {
                self.hold_failed(ctx, key);
            } else {
                self.finish(ctx, key, errno);
            }
        }
    }
}
