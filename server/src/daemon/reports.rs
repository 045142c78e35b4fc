//! What shards say by themselves: changes of state, zombies that ended, clients that left, and the end of a shard.

use std::sync::Arc;

use shard::api::{DiskState, Event, Reply};
use tokio::sync::mpsc;

use super::disk::{Removal, Standing};
use super::{Daemon, Disk};
use crate::fleet::Notice;
use crate::model::Level;
use crate::xen::backend::Report;

impl Daemon {
    /// Handles notices until the fleet is gone.
    pub async fn handle_notices(self: Arc<Self>, mut notices: mpsc::UnboundedReceiver<Notice>) {
        while let Some(Notice { shard, event }) = notices.recv().await {
            self.handle(shard, event).await;
        }
    }

    async fn handle(self: &Arc<Self>, shard: usize, event: Event) {
        match event {
            Event::State { disk, state, reason } => {
                let Some(disk) = self.disk_by_id(disk) else { return };
                disk.inner().reason = (!reason.is_empty()).then(|| reason.clone());
                let level = match state {
                    DiskState::StorageError | DiskState::Failed => Level::Error,
                    DiskState::Quarantined => Level::Error,
                    _ => Level::Info,
                };
                let name = crate::model::State::from_counter(state as u64).name();
                let message = if reason.is_empty() { name.to_owned() } else { format!("{name}: {reason}") };
                self.events.record(level, Some(&disk.name), message);
            }
            Event::ZombieGone { config } => {
                let Some(disk) = self.disk_by_id(config.id) else { return };
                drop(config);
                self.finish(&disk).await;
            }
            Event::ImageError { disk, message } => {
                let name = self.disk_by_id(disk).map(|disk| disk.name.clone());
                self.events.record(Level::Warning, name.as_deref(), message);
            }
            Event::ClientGone { disk, peer, reason } => {
                let name = self.disk_by_id(disk).map(|disk| disk.name.clone());
                if reason.is_empty() {
                    tracing::debug!(disk = name.as_deref(), "client {peer} left");
                } else {
                    self.events.record(Level::Warning, name.as_deref(), format!("client {peer}: {reason}"));
                }
            }
            Event::RingBroken { disk, domid, queue, reason, .. } => {
                let Some(disk) = self.disk_by_id(disk) else { return };
                let message = format!("queue {queue} of its guest was stopped: {reason}");
                disk.sharers.end(domid, &message);
                self.events.record(Level::Error, Some(&disk.name), message.clone());
                self.report_to_guest(&disk, Report::RingBroken(message));
            }
            Event::FlushHeld { disk, .. } => {
                let Some(disk) = self.disk_by_id(disk) else { return };
                let message = "a flush of its guest failed and waits: an error would tell the guest that it needs no flushes";
                self.events.record(Level::Error, Some(&disk.name), message);
            }
            Event::Stopped { error } => self.shard_ended(shard, error),
            // The caller of a command has gone, which flows do not do; what the answer carries is dropped, not lost: the
            // table still has the disk.
            Event::Reply { result: Ok(Reply::Parked(_)), .. } => {
                self.events.record(
                    Level::Error,
                    None,
                    format!("shard {shard} parked a disk that nobody waits for"),
                );
            }
            Event::Reply { result, .. } => tracing::debug!(shard, "an answer came too late: {result:?}"),
        }
    }

    /// A shard has ended by itself: its disks go to the shards that are left.
    ///
    /// Why that is safe although the kernel may still carry out operations of the dead shard: they hold the open file
    /// description that they were begun on, and with it the description's locks and fence. The image is released here and opened
    /// anew, so the file table makes another description, and that one is not served before nobody holds the fence
    /// (`Files::open`, as after a crash of the whole daemon). A disk shares a description only with readers, and operations
    /// that only read change nothing whenever they end.
    fn shard_ended(self: &Arc<Self>, shard: usize, error: Option<String>) {
        let reason = error.unwrap_or_else(|| "it was stopped".into());
        if self.fleet.is_stopping() {
            tracing::debug!(shard, "ended: {reason}");
            return;
        }
        let rest = if self.fleet.all_ended() {
            self.no_shard_left.notify_one();
            "no shard is left"
        } else {
            "its disks are brought up on other shards"
        };
        self.events.record(Level::Error, None, format!("shard {shard} has ended: {reason}; {rest}"));
        for disk in self.all_disks() {
            if disk.place().is_some_and(|(_, place)| place == shard) {
                tokio::spawn(self.clone().leave_dead_shard(disk, shard, reason.clone()));
            }
        }
    }

    /// Takes a disk off a shard that ended, and brings it up elsewhere unless it was being detached.
    async fn leave_dead_shard(self: Arc<Self>, disk: Arc<Disk>, shard: usize, reason: String) {
        // A move that is under way has the disk in its hands: it knows where the disk is when it ends.
        let place = disk.place.clone().write_owned().await;
        if disk.place().is_none_or(|(_, place)| place != shard) {
            return;
        }
        let message =
            format!("shard {shard}, which served it, has ended ({reason}); it is brought up on another");
        let Some(live) = disk.go_down(&message) else { return };
        if super::control::device_of(&disk).is_some() {
            // Its rings went with the shard: the guest waits until it connects anew.
            disk.inner().awaiting = true;
            self.report_to_guest(&disk, Report::RingBroken(message.clone()));
        }
        drop(live.listeners);
        disk.reset_gauges();
        self.close(&disk, live.image).await;
        drop(place);
        if disk.standing() == Standing::Gone {
            self.remove(&disk);
            disk.removed.send_replace(Some(Removal::Gone));
        } else {
            self.bring_back(disk, "served again, by another shard").await;
        }
    }
}
