//! Metrics for Prometheus: one collector that reads the shards' counters when somebody scrapes.
//!
//! Names follow node_exporter's diskstats with the prefix `blktapd_disk_` and one stable label, `disk`; what else is known about
//! a disk is in `blktapd_disk_info`. Histograms of an operation appear with its first request, so that idle disks cost little.
//! What there is for each disk is written directly (`text`), everything else through the collector.
//! A scrape runs on a thread of its own and touches no shard: counters have one writer and are read without locks.

mod disks;
mod family;
mod guests;
mod process;
mod shards;
mod text;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Registry, TextEncoder};

use crate::daemon::{Daemon, lock};
use crate::problem::Problem;

/// The registry and its collector.
pub struct Metrics {
    registry: Registry,
    source: Source,
    /// Size of the last scrape, about.
    last_bytes: AtomicUsize,
}

/// Where the collector finds the daemon during a scrape.
#[derive(Clone, Default)]
struct Source(Arc<Mutex<Option<Arc<Daemon>>>>);

struct DaemonCollector {
    description: Desc,
    source: Source,
}

impl Collector for DaemonCollector {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.description]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(daemon) = lock(&self.source.0).clone() else { return Vec::new() };
        let mut families = shards::collect(&daemon);
        families.extend(process::collect());
        families
    }
}

impl Metrics {
    /// The metrics of one daemon at a time.
    pub fn new() -> Result<Metrics, Problem> {
        let failed =
            |error: prometheus::Error| Problem::failed(format!("the metrics cannot be set up: {error}"));
        let source = Source::default();
        let description = Desc::new(
            "blktapd_build_info".into(),
            "The program: its version.".into(),
            vec!["version".into()],
            std::collections::HashMap::new(),
        )
        .map_err(failed)?;
        let registry = Registry::new();
        registry
            .register(Box::new(DaemonCollector { description, source: source.clone() }))
            .map_err(failed)?;
        Ok(Metrics { registry, source, last_bytes: AtomicUsize::new(0) })
    }

    /// The text of a scrape.
    pub async fn scrape(self: &Arc<Self>, daemon: Arc<Daemon>) -> Result<String, Problem> {
        let metrics = self.clone();
        tokio::task::spawn_blocking(move || metrics.render(&daemon))
            .await
            .unwrap_or_else(|error| Err(Problem::failed(format!("the scrape failed: {error}"))))
    }

    fn render(&self, daemon: &Arc<Daemon>) -> Result<String, Problem> {
        *lock(&self.source.0) = Some(daemon.clone());
        let families = self.registry.gather();
        let mut text = String::with_capacity(self.last_bytes.load(Ordering::Relaxed));
        disks::write(daemon, &mut text);
        guests::write(daemon, &mut text);
        TextEncoder::new()
            .encode_utf8(&families, &mut text)
            .map_err(|error| Problem::failed(format!("the metrics cannot be written: {error}")))?;
        // Room for a few lines more, so that the next one need not grow.
        self.last_bytes.store(text.len() + text.len() / 8, Ordering::Relaxed);
        Ok(text)
    }
}
