//! Looking at disks, groups, shards and figures. Nothing here changes anything but the cache of measured sizes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use shard::api::{Command, Reply};
use shard::stats::{BUCKETS_NS, OpClass};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Daemon, Disk, lock};
use crate::limit_change::LimitChange;
use crate::model::{self, Frontend, Health, OpTotals, Quantiles, ShardState};
use crate::problem::{Problem, ProblemKind};

/// Sizes are measured again when they are older than this and somebody looks.
const MEASURE_EVERY: Duration = Duration::from_secs(10);
/// Files that are measured at a time.
const MEASURE_CONCURRENT: usize = 16;
/// A turn of a shard that is longer makes others wait noticeably.
const SLOW_TURN_NS: u64 = 10_000_000;

impl Daemon {
    /// A disk without its connections.
    pub fn describe(&self, disk: &Disk) -> model::Disk {
        let state = disk.state();
        let settings = self.settings();
        let inner = disk.inner();
        let attachment = &inner.attachment;
        let live = inner.live.as_ref();
        let mut frontends = Vec::new();
        if attachment.request.nbd {
            let socket = settings.nbd_socket(&disk.name).display().to_string();
            let uri = format!("nbd+unix:///{}?socket={}", disk.name, percent_encoded(&socket));
            frontends.push(Frontend { kind: "nbd".into(), uri, socket: Some(socket) });
        }
        if attachment.request.blkif {
            let socket = settings.blkif_socket(&disk.name).display().to_string();
            let uri = format!("blkif+unix:///{}?socket={}", disk.name, percent_encoded(&socket));
            frontends.push(Frontend { kind: "blkif".into(), uri, socket: Some(socket) });
        }
        if let Some(device) = &attachment.device {
            frontends.push(Frontend { kind: "xen".into(), uri: format!("xen:{device}"), socket: None });
        }
        model::Disk {
            name: disk.name.to_string(),
            state,
            reason: inner.reason.clone(),
            image: attachment.image.to_string(),
            read_only: attachment.request.read_only,
            size_bytes: live.map(|live| live.image.size_bytes),
            allocated_bytes: inner.allocated_bytes,
            shard: live.map(|live| live.seat.shard().index),
            frontends,
            clients: disk.counters.clients.get(),
            connections: None,
            io_now: disk.counters.io_now.get(),
            limits: LimitChange::from(&attachment.limits),
            groups: attachment.groups.clone(),
            on_error: attachment.on_error,
            on_enospc: attachment.on_enospc,
            data_in_doubt: attachment.data_in_doubt,
            retry_in_s: inner.retry_at.map(|at| at.saturating_duration_since(Instant::now()).as_secs()),
            age_s: disk.since.elapsed().as_secs(),
        }
    }

    /// A disk with its connections.
    pub async fn show(self: &Arc<Self>, name: &str) -> Result<model::Disk, Problem> {
        let disk = self.disk(name)?;
        self.measure();
        let connections = self.clients(&disk).await.unwrap_or_default();
        let connections = connections.into_iter().map(|client| model::Connection {
            peer: client.peer,
            in_flight: client.in_flight,
            age_s: client.age_s,
        });
        Ok(model::Disk { connections: Some(connections.collect()), ..self.describe(&disk) })
    }

    /// All disks.
    pub fn list(self: &Arc<Self>) -> Vec<model::Disk> {
        self.measure();
        self.all_disks().iter().map(|disk| self.describe(disk)).collect()
    }

    /// Figures of one disk.
    pub async fn stats(&self, disk: &Disk) -> model::DiskStats {
        let mut latency = BTreeMap::new();
        let place = disk.place();
        if let Some((id, shard)) = place {
            let call = self.fleet.call(shard, Command::Stats { disk: id });
            if let Ok(Ok(Reply::Stats(stats))) = tokio::time::timeout(Duration::from_secs(2), call).await {
                let histograms = [
                    ("read", stats.read_us),
                    ("write", stats.write_us),
                    ("flush", stats.flush_us),
                    ("queue", stats.queue_us),
                ];
                for (name, histogram) in histograms {
                    if let Some(quantiles) = histogram.as_ref().and_then(quantiles) {
                        latency.insert(name.to_owned(), quantiles);
                    }
                }
            }
        }
        let counters = &disk.counters;
        let ops = OpClass::ALL.iter().map(|class| {
            let op = &counters.ops[*class as usize];
            let totals = OpTotals {
                completed: op.completed.get(),
                bytes: op.bytes.get(),
                errors: op.errors.get(),
                throttled: op.throttled.get(),
                throttled_seconds: op.throttled_ns.get() as f64 / 1e9,
                would_throttle: op.would_throttle.get(),
            };
            (class.label().to_owned(), totals)
        });
        model::DiskStats {
            name: disk.name.to_string(),
            state: disk.state(),
            shard: place.map(|(_, shard)| shard),
            clients: counters.clients.get(),
            io_now: counters.io_now.get(),
            throttled_now: counters.throttled_now.get(),
            ops: ops.collect(),
            latency,
            at_us: self.uptime_us(),
        }
    }

    /// Figures of all disks.
    pub async fn all_stats(self: &Arc<Self>) -> Vec<model::DiskStats> {
        let mut looks = JoinSet::new();
        for disk in self.all_disks() {
            let daemon = self.clone();
            looks.spawn(async move { daemon.stats(&disk).await });
        }
        let mut all = looks.join_all().await;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// All shards.
    pub fn shards(&self) -> Vec<model::Shard> {
        let describe = |shard: &Arc<crate::fleet::Shard>| {
            let counters = &shard.counters;
            let (counts, _) = counters.turns.read();
            let slow = BUCKETS_NS.iter().filter(|bound| **bound <= SLOW_TURN_NS).count();
            model::Shard {
                index: shard.index,
                cpu: shard.cpu,
                state: shard.state(),
                reason: shard.ended().map(str::to_owned),
                ring: match counters.ring_flavour.get() {
                    0 => "deferred",
                    1 => "cooperative",
                    _ => "plain",
                }
                .into(),
                io_flusher: counters.io_flusher.get() != 0,
                disks: counters.disks.get(),
                clients: counters.clients.get(),
                ops_in_flight: counters.ops_in_flight.get(),
                buffer_bytes: counters.buffer_bytes.get(),
                buffer_waits: counters.buffer_waits.get(),
                busy_seconds: counters.busy_ns.get() as f64 / 1e9,
                busy_ratio: shard.busy_permille() as f64 / 1000.0,
                turns: counts.iter().sum(),
                slow_turns: counts[slow..].iter().sum(),
                heartbeat_age_ms: shard.heartbeat_age() / 1_000_000,
            }
        };
        self.fleet.shards().iter().map(describe).collect()
    }

    /// One group.
    pub fn describe_group(&self, name: &str) -> Result<model::Group, Problem> {
        self.all_groups().into_iter().find(|group| group.name == name).ok_or_else(|| {
            let shown: String = name.chars().take(80).collect();
            Problem::new(
                ProblemKind::NotFound,
                format!("there is no group {shown:?}: `blktapd ctl groups` shows them"),
            )
        })
    }

    /// All groups.
    pub fn all_groups(&self) -> Vec<model::Group> {
        let mut members: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for disk in self.all_disks() {
            for group in &disk.inner().attachment.groups {
                members.entry(group.clone()).or_default().push(disk.name.to_string());
            }
        }
        let groups = self.groups.list().into_iter();
        groups
            .map(|(name, limits, configured)| model::Group {
                disks: members.remove(&name).unwrap_or_default(),
                limits: LimitChange::from(&limits),
                configured,
                name,
            })
            .collect()
    }

    /// Whether every shard turns. A disk that failed is its own matter.
    pub fn health(&self) -> Health {
        let mut problems: Vec<String> = Vec::new();
        for shard in self.fleet.shards() {
            match shard.state() {
                ShardState::Running => {}
                ShardState::Stalled => problems.push(format!(
                    "shard {} has not turned for {} s",
                    shard.index,
                    shard.heartbeat_age() / 1_000_000_000
                )),
                ShardState::Ended => {
                    problems.push(format!(
                        "shard {} has ended: {}",
                        shard.index,
                        shard.ended().unwrap_or_default()
                    ));
                }
            }
        }
        if self.is_stopping() {
            problems.push("the daemon is stopping".into());
        }
        Health { healthy: problems.is_empty(), problems }
    }

    /// Starts to measure the space of all images, unless that was done just now. Those who look get what was measured last.
    pub fn measure(self: &Arc<Self>) {
        {
            let mut measured = lock(&self.measured);
            if measured.is_some_and(|at| at.elapsed() < MEASURE_EVERY) {
                return;
            }
            *measured = Some(Instant::now());
        }
        let daemon = self.clone();
        tokio::spawn(async move {
            let slots = Arc::new(tokio::sync::Semaphore::new(MEASURE_CONCURRENT));
            for disk in daemon.all_disks() {
                let Some(image) = disk.inner().live.as_ref().map(|live| live.image.measure()) else {
                    continue;
                };
                let Ok(slot) = slots.clone().acquire_owned().await else { return };
                let daemon = daemon.clone();
                tokio::spawn(async move {
                    let bytes = daemon.images.allocated_bytes(&image).await;
                    let mut inner = disk.inner();
                    inner.allocated_bytes = bytes.or(inner.allocated_bytes);
                    drop(slot);
                });
            }
        });
    }
}

fn quantiles(histogram: &Histogram<u32>) -> Option<Quantiles> {
    (!histogram.is_empty()).then(|| Quantiles {
        count: histogram.len(),
        p50_us: histogram.value_at_quantile(0.5),
        p99_us: histogram.value_at_quantile(0.99),
        p999_us: histogram.value_at_quantile(0.999),
        max_us: histogram.max(),
    })
}

/// A path as the value of a URI's query (RFC 3986): what is not plain there becomes %XX.
fn percent_encoded(path: &str) -> String {
    use std::fmt::Write;
    path.bytes().fold(String::new(), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~/:@".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}
