//! Another image for a paused disk: what a live snapshot does at its one instant.
//!
//! ```text
//! at rest ─▶ close the old image ─▶ open the new one ─▶ Done
//!               └ failed               └ failed
//!               └──────────────────────┴─▶ open the old one again ─▶ the error
//! ```
//! A raw file is closed by an fdatasync; when that fails nothing has changed but the mark of the disk (`disk::sync`), which also
//! stays when one fails behind that, or of the files of an image. Connections and requests that wait are not touched; the disk is
//! paused before and after.

use super::*;
use crate::api::{Reply, ShardError, ShardErrorKind};

/// A swap under way.
#[derive(Debug)]
pub(super) struct Swap {
    pub tag: u64,
    /// The raw file that the disk has was asked to make everything durable.
    synced: bool,
    /// The new image, until it takes the place of the old one.
    to: Option<Backend>,
    /// The old image, from then on.
    back: Option<Backend>,
    /// Why there is no new one: the old one is being opened again.
    error: Option<String>,
}

fn refused(message: String) -> ShardError {
    ShardError { kind: ShardErrorKind::WrongState, message }
}

/// The very same image, not one that looks like it.
fn is_same(a: &Backend, b: &Backend) -> bool {
    match (a, b) {
        (Backend::File(a), Backend::File(b)) => Arc::ptr_eq(a, b),
        (Backend::Image(a), Backend::Image(b)) => Arc::ptr_eq(a, b),
        (Backend::Ram(a), Backend::Ram(b)) => Arc::ptr_eq(a, b),
        (Backend::Null, Backend::Null) => true,
        _ => false,
    }
}

impl<K: Kernel> Shard<K> {
    /// Begins to give a paused disk another image. The one that it has is not touched: so a caller who does not know how far an
    /// earlier swap came can always ask for the one that it wants.
    pub(super) fn swap(&mut self, slot: u32, tag: u64, to: Backend) -> Result<Option<Reply>, ShardError> {
        let entry = &mut self.disks[slot as usize];
        let state = entry.disk.as_ref().map(Disk::state);
        let busy = entry.pending.is_some()
            || entry.swap.is_some()
            || entry.doubt.is_some()
            || entry.zombie
            || entry.opening();
        if state != Some(DiskState::Paused) || busy {
            return Err(refused("only a paused disk at rest can be given another image".to_owned()));
        }
        if self.backend(slot).is_some_and(|has| is_same(has, &to)) {
            return Ok(Some(Reply::Done));
        }
        self.disks[slot as usize].swap =
            Some(Swap { tag, synced: false, to: Some(to), back: None, error: None });
        self.unsettled.push(slot);
        Ok(None)
    }

    /// Goes on with a swap when nothing of the disk is in the kernel. False when there is none.
    pub(super) fn settle_swap(&mut self, slot: u32) -> bool {
        let entry = &mut self.disks[slot as usize];
        let Some(swap) = &entry.swap else { return false };
        if entry.ops > 0 || entry.quarantined {
            return true;
        }
        let replaced = swap.back.is_some();
        if !replaced && !self.let_go(slot) {
            return true;
        }
        let Some(swap) = &mut self.disks[slot as usize].swap else { return true };
        let next = match (swap.to.take(), &swap.error) {
            (Some(to), _) => to,
            // The new image could not be opened.
            (None, Some(_)) => match swap.back.take() {
                Some(back) => back,
                None => return true,
            },
            (None, None) => return true,
        };
        self.remove_engine(slot);
        self.set_backend(slot, next);
        true
    }

    /// Brings everything that the disk's image holds into its files. False while that is under way, and when it has failed.
    fn let_go(&mut self, slot: u32) -> bool {
        if !matches!(self.backend(slot), Some(Backend::File(_))) {
            return self.close_engine(slot);
        }
        let Some(swap) = &mut self.disks[slot as usize].swap else { return false };
        if !std::mem::replace(&mut swap.synced, true) {
            self.with_disk(slot, |disk, ctx| disk.sync_at_rest(ctx));
        }
        let Some(disk) = &self.disks[slot as usize].disk else { return false };
        if disk.is_syncing() {
            return false;
        }
        if disk.flush_failed() {
            // Nobody could find out later: the next fdatasync of the file succeeds.
            let message = format!("the disk keeps the image that it has: {}", disk.reason());
            if let Some(swap) = self.disks[slot as usize].swap.take() {
                self.reply(swap.tag, Err(ShardError { kind: ShardErrorKind::DataInDoubt, message }));
            }
            return false;
        }
        true
    }

    fn set_backend(&mut self, slot: u32, backend: Backend) {
        let entry = &mut self.disks[slot as usize];
        let Some(disk) = &mut entry.disk else { return };
        entry.store = match &backend {
            Backend::File(file) => Some(file.store),
            Backend::Ram(_) | Backend::Image(_) | Backend::Null => None,
        };
        entry.punts = false;
        let old = disk.set_backend(backend.clone());
        if let Some(swap) = &mut entry.swap
            && swap.error.is_none()
        {
            swap.back = Some(old);
        }
        match backend {
            Backend::Image(chain) => self.start_engine(slot, &chain, None),
            _ => {
                // An image that could not be opened may have been there before.
                self.hold_disk(slot, false);
                self.swap_opened(slot);
            }
        }
    }

    /// The image of a disk in a swap is open.
    pub(super) fn swap_opened(&mut self, slot: u32) {
        // One that has not begun goes on when the disk is at rest.
        let replaced = |swap: &mut Swap| swap.to.is_none();
        let Some(swap) = self.disks[slot as usize].swap.take_if(replaced) else { return };
        let result = match swap.error {
            None => Ok(Reply::Done),
            Some(message) => Err(ShardError { kind: ShardErrorKind::Failed, message }),
        };
        self.reply(swap.tag, result);
    }

    /// The image of a disk in a swap could not be opened. True when the old one is tried again.
    pub(super) fn swap_failed(&mut self, slot: u32, message: &str) -> bool {
        let entry = &mut self.disks[slot as usize];
        let Some(swap) = &mut entry.swap else { return false };
        if swap.error.is_none() {
            swap.error = Some(message.to_owned());
            self.unsettled.push(slot);
            return true;
        }
        let error = swap.error.take().unwrap_or_default();
        let tag = swap.tag;
        entry.swap = None;
        let message = format!("{error}; and the image that it had cannot be opened again: {message}");
        self.reply(tag, Err(ShardError { kind: ShardErrorKind::Failed, message }));
        false
    }

    /// The image of a disk in a swap could not be closed, and is being opened again; the swap is answered when it is.
    pub(super) fn swap_not_closed(&mut self, slot: u32, message: &str) {
        if let Some(swap) = &mut self.disks[slot as usize].swap {
            (swap.to, swap.error) = (None, Some(message.to_owned()));
        }
    }

    /// Ends a swap that cannot go on.
    pub(super) fn end_swap(&mut self, slot: u32, why: &str) {
        if let Some(swap) = self.disks[slot as usize].swap.take() {
            let error = ShardError { kind: ShardErrorKind::Interrupted, message: why.to_owned() };
            self.reply(swap.tag, Err(error));
        }
    }
}
