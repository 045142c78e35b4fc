//! What shards say by themselves: changes of state, zombies that ended, clients that left, and the end of a shard.

use std::sync::Arc;

use shard::api::{DiskState, Event, Reply};
use tokio::sync::mpsc;

use super::Daemon;
use super::disk::Standing;
use crate::fleet::Notice;
use crate::model::Level;

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
            Event::Stopped { error } => self.shard_ended(shard, error).await,
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

    /// The disks of a shard that ended are listed as failed; those of others go on.
    async fn shard_ended(self: &Arc<Self>, shard: usize, error: Option<String>) {
        let reason = error.unwrap_or_else(|| "it was stopped".into());
        if self.fleet.is_stopping() {
            tracing::debug!(shard, "ended: {reason}");
            return;
        }
        self.events.record(
            Level::Error,
            None,
            format!("shard {shard} has ended: {reason}; its disks are not served"),
        );
        for disk in self.all_disks() {
            if disk.place().is_none_or(|(_, place)| place != shard) {
                continue;
            }
            let removed = !matches!(disk.standing(), Standing::Live | Standing::Down);
            let message = format!("shard {shard}, which served it, has ended ({reason}): restart the daemon");
            let Some(live) = disk.go_down(&message) else { continue };
            drop(live.listener);
            disk.reset_gauges();
            // Operations of the kernel may still be out, so the image is not opened again; closing it waits for them.
            self.images.release(live.image, &disk.name).await;
            if removed {
                self.remove(&disk);
            }
        }
    }
}
