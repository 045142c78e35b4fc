//! The end: no new work, every disk drained and flushed, shards stopped. Attachments stay for the next start.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use shard::api::{Command, Reply};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::control::device_of;
use super::disk::{Removal, Standing};
use super::{Daemon, Disk};
use crate::model::{Level, State};
use crate::xen::device::DeviceId;

/// How long a removal by force may take after the drain's time is over.
const FORCE_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two looks whether clients that share memory have gone.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

impl Daemon {
    /// From now on commands and clients are refused.
    pub fn begin_stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Drains and flushes all disks until `deadline`, then removes them by force. Returns the names of those that were not
    /// flushed: an acknowledged write without a flush may be lost there when the host fails.
    pub async fn drain(self: &Arc<Self>, deadline: Instant) -> Vec<String> {
        let mut removals = JoinSet::new();
        for disk in self.all_disks() {
            let daemon = self.clone();
            removals.spawn(async move {
                let clean = daemon.drain_disk(&disk, deadline).await;
                (disk.name.to_string(), clean)
            });
        }
        let mut unflushed = Vec::new();
        while let Some(result) = removals.join_next().await {
            match result {
                Ok((_, true)) => {}
                Ok((name, false)) => unflushed.push(name),
                Err(error) => tracing::error!("a drain failed: {error}"),
            }
        }
        unflushed.sort();
        unflushed
    }

    async fn drain_disk(self: &Arc<Self>, disk: &Arc<Disk>, deadline: Instant) -> bool {
        disk.sharers.end_all("the daemon is stopping");
        while !disk.sharers.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        // A move that is under way ends first, or the wrong shard is told. One that does not end leaves the disk where it was.
        let _place = disk.whole_place(deadline).await;
        let Some((id, shard)) = disk.place() else { return true };
        if disk.standing() != Standing::Live {
            // A detach is under way, or a zombie is left of one.
            let mut removed = disk.removed.subscribe();
            let gone = removed.wait_for(|outcome| matches!(outcome, Some(Removal::Gone)));
            return matches!(tokio::time::timeout_at(deadline, gone).await, Ok(Ok(_)));
        }
        let listeners = disk.inner().live.as_mut().map(|live| std::mem::take(&mut live.listeners));
        drop(listeners);
        if let Some(DeviceId { domid, devid, .. }) = device_of(disk) {
            // What its guest was promised is kept; what it sends from now on waits in its rings. XenStore is left as it is.
            // What a disk holds it would never answer: the tables of requests in flight keep it.
            let force = disk.state() != State::Running;
            let command = Command::DisconnectGuest { disk: id, domid, devid, force };
            let _ = tokio::time::timeout_at(deadline, self.fleet.call(shard, command)).await;
        }
        let removal = self.fleet.call(shard, Command::RemoveDisk { disk: id, force: false });
        let clean = match tokio::time::timeout_at(deadline, removal).await {
            Ok(Ok(Reply::Removed(_))) => true,
            Ok(Ok(_)) => false,
            Ok(Err(error)) => {
                self.events.record(Level::Error, Some(&disk.name), format!("not flushed: {error}"));
                false
            }
            Err(_) => {
                self.events.record(Level::Error, Some(&disk.name), "not flushed in time");
                false
            }
        };
        if !clean {
            let force = self.fleet.call(shard, Command::RemoveDisk { disk: id, force: true });
            let _ = tokio::time::timeout(FORCE_TIMEOUT, force).await;
        }
        if let Some(live) = disk.go_down("the daemon is stopping") {
            self.images.release(live.image, &disk.name).await;
        }
        clean
    }
}
