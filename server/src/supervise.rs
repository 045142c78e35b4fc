//! Starting the shards, and carrying their events to the fleet.

use std::sync::Arc;

use shard::executor::{self, EventReceiver, ShardOptions};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;

use crate::config::Settings;
use crate::fleet::{Fleet, Notice, Shard};
use crate::problem::Problem;

/// The running shards, what they say by themselves, and the end at which their events arrive.
pub type Started = (Arc<Fleet>, mpsc::UnboundedReceiver<Notice>, EventReceiver);

/// Starts a shard on each CPU. Blocks until all their rings work.
///
/// The signals that end or reload the daemon must be blocked in the calling thread: shards inherit that.
pub fn start_shards(settings: &Settings) -> Result<Started, Problem> {
    let cpus = cpus(settings);
    executor::probe_ring(settings.ring).map_err(|error| Problem::failed(error.to_string()))?;
    let (sender, receiver) = executor::event_channel()
        .map_err(|error| Problem::failed(format!("the shards' event channel cannot be made: {error}")))?;
    let mut shards = Vec::new();
    for (index, cpu) in cpus.into_iter().enumerate() {
        let options = ShardOptions {
            index,
            cpu,
            ring: settings.ring,
            buffer_budget_bytes: settings.buffer_budget_bytes,
            table_budget_bytes: 32 << 20,
            fault_commands: settings.fault_commands,
        };
        let handle = executor::start(options, sender.clone())
            .map_err(|error| Problem::failed(format!("shard {index} cannot start: {error}")))?;
        tracing::info!(shard = index, cpu = handle.cpu, "started");
        shards.push(Shard::new(index, handle.cpu, handle.counters.clone(), Box::new(handle)));
    }
    let (fleet, notices) = Fleet::new(shards);
    Ok((fleet, notices, receiver))
}

/// One entry for each shard. core_affinity tells which CPUs this process may use; it must be asked before anything is pinned.
fn cpus(settings: &Settings) -> Vec<Option<usize>> {
    let allowed: Vec<usize> =
        core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect();
    let wanted = match &settings.cpus {
        Some(cpus) => cpus.clone(),
        None if allowed.is_empty() => {
            tracing::warn!("the allowed CPUs cannot be found out: one unpinned shard is started");
            return vec![None];
        }
        None => allowed.clone(),
    };
    wanted
        .into_iter()
        .map(|cpu| {
            if allowed.contains(&cpu) {
                Some(cpu)
            } else {
                tracing::warn!(
                    "CPU {cpu} is not one that this process may use (allowed: {allowed:?}); its shard runs unpinned; \
                     correct --cpus, the affinity or the cpuset"
                );
                None
            }
        })
        .collect()
}

/// Carries events to the fleet until the process ends.
pub async fn deliver_events(fleet: Arc<Fleet>, events: EventReceiver) {
    // tokio's safe way to wait for a descriptor of another kind: an eventfd is readable and read like a pipe.
    let wake = events.wake.try_clone().and_then(Receiver::from_owned_fd_unchecked);
    let wake = match wake {
        Ok(wake) => wake,
        Err(error) => return tracing::error!("the shards' events cannot be waited for: {error}"),
    };
    while wake.readable().await.is_ok() {
        // The count does not matter; reading resets it, and events that come later set it again.
        match wake.try_read(&mut [0; 8]) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                return tracing::error!("the shards' eventfd cannot be read: {error}");
            }
            _ => {}
        }
        while let Ok((shard, event)) = events.rx.try_recv() {
            fleet.deliver(shard, event);
        }
    }
}
