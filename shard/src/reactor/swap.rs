//! Another image for a paused disk: what a live snapshot does at its one instant.
//!
//! ```text
//! at rest ─▶ close the old image ─▶ open the new one ─▶ Done
//!               └ failed ─▶ it stays        └ failed ─▶ open the old one again ─▶ the error
//! ```
//! Connections and requests that wait are not touched; the disk is paused before and after.

use super::*;
use crate::api::{Reply, ShardError, ShardErrorKind};

/// A swap under way.
#[derive(Debug)]
pub(super) struct Swap {
    pub tag: u64,
    /// The new image, until it takes the place of the old one.
    to: Option<Backend>,
    /// The old image, from then on.
    back: Option<Backend>,
    /// Why the new one could not be opened: the old one is being opened again.
    error: Option<String>,
}

fn refused(message: String) -> ShardError {
    ShardError { kind: ShardErrorKind::WrongState, message }
}

impl<K: Kernel> Shard<K> {
    /// Begins to give a paused disk another image.
    pub(super) fn swap(&mut self, slot: u32, tag: u64, to: Backend) -> Result<Option<Reply>, ShardError> {
        let entry = &mut self.disks[slot as usize];
        let state = entry.disk.as_ref().map(Disk::state);
        let busy = entry.pending.is_some() || entry.swap.is_some() || entry.zombie || entry.opening();
        if state != Some(DiskState::Paused) || busy {
            return Err(refused("only a paused disk at rest can be given another image".to_owned()));
        }
        entry.swap = Some(Swap { tag, to: Some(to), back: None, error: None });
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
        if !replaced && !self.close_engine(slot) {
            return true;
        }
        let entry = &mut self.disks[slot as usize];
        let Some(swap) = &mut entry.swap else { return true };
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

    fn set_backend(&mut self, slot: u32, backend: Backend) {
        let entry = &mut self.disks[slot as usize];
        let Some(disk) = &mut entry.disk else { return };
        entry.store = match &backend {
            Backend::File(file) => Some(file.store),
            Backend::Ram(_) | Backend::Image(_) | Backend::Null => None,
        };
        let old = disk.set_backend(backend.clone());
        if let Some(swap) = &mut entry.swap
            && swap.error.is_none()
        {
            swap.back = Some(old);
        }
        match backend {
            Backend::Image(chain) => self.start_engine(slot, &chain, None),
            _ => self.swap_opened(slot),
        }
    }

    /// The image of a disk in a swap is open.
    pub(super) fn swap_opened(&mut self, slot: u32) {
        // One that has not begun goes on when the disk is at rest.
        let replaced = |swap: &mut Swap| swap.to.is_none();
        let Some(swap) = self.disks[slot as usize].swap.take_if(replaced) else { return };
        let Swap { tag, back, error, .. } = swap;
        // The control side closes its files when it has the answer.
        drop(back);
        let result = match error {
            None => Ok(Reply::Done),
            Some(message) => Err(ShardError { kind: ShardErrorKind::Failed, message }),
        };
        self.reply(tag, result);
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

    /// Ends a swap that cannot go on.
    pub(super) fn end_swap(&mut self, slot: u32, why: &str) {
        if let Some(swap) = self.disks[slot as usize].swap.take() {
            let error = ShardError { kind: ShardErrorKind::Interrupted, message: why.to_owned() };
            self.reply(swap.tag, Err(error));
        }
    }
}
