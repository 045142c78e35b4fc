//! Per shard and for the whole daemon.

use std::sync::Arc;

use prometheus::proto::{MetricFamily, MetricType};

use super::family::Family;
use crate::daemon::Daemon;
use crate::fleet::Shard;
use crate::model::ShardState;

type Read = fn(&Shard) -> f64;

/// Families with one value for each shard.
const SCALARS: &[(&str, &str, MetricType, Read)] = {
    use MetricType::{COUNTER, GAUGE};
    &[
        ("up", "1 while the shard turns, 0 when it is stalled or has ended.", GAUGE, |s| {
            f64::from(u8::from(s.state() == ShardState::Running))
        }),
        ("busy_seconds_total", "Time spent working, outside the kernel's wait.", COUNTER, |s| {
            s.counters.busy_ns.get() as f64 / 1e9
        }),
        ("heartbeat_age_seconds", "Time since the last turn of the loop.", GAUGE, |s| {
            s.heartbeat_age() as f64 / 1e9
        }),
        ("disks", "Disks served.", GAUGE, |s| s.counters.disks.get() as f64),
        ("clients", "Connections served.", GAUGE, |s| s.counters.clients.get() as f64),
        ("operations_in_flight", "Operations that the kernel has.", GAUGE, |s| {
            s.counters.ops_in_flight.get() as f64
        }),
        ("buffer_bytes", "Bytes of I/O buffers in use.", GAUGE, |s| s.counters.buffer_bytes.get() as f64),
        ("buffer_waits_total", "Requests that waited for a buffer.", COUNTER, |s| {
            s.counters.buffer_waits.get() as f64
        }),
        ("ring_operations_total", "Operations handed to io_uring.", COUNTER, |s| {
            s.counters.ring_ops.get() as f64
        }),
        ("ring_enters_total", "Calls of io_uring_enter.", COUNTER, |s| s.counters.ring_enters.get() as f64),
        ("ring_overflows_total", "Overflows of the completion queue.", COUNTER, |s| {
            s.counters.ring_overflows.get() as f64
        }),
    ]
};

/// All families of shards and of the daemon.
pub fn collect(daemon: &Arc<Daemon>) -> Vec<MetricFamily> {
    let shards: Vec<(String, Arc<Shard>)> =
        daemon.fleet.shards().iter().map(|shard| (shard.index.to_string(), shard.clone())).collect();
    let mut families = Vec::new();
    for (name, help, kind, read) in SCALARS {
        let mut family = Family::new(&format!("blktapd_shard_{name}"), help, *kind);
        for (index, shard) in &shards {
            family.value(&[("shard", index)], read(shard));
        }
        families.push(family);
    }
    let mut turns = Family::new(
        "blktapd_shard_turn_duration_seconds",
        "Time of one turn of the shard's loop: a long one makes its other disks wait.",
        MetricType::HISTOGRAM,
    );
    let mut info = Family::new(
        "blktapd_shard_info",
        "The CPU that the shard is pinned to; empty when it is not.",
        MetricType::GAUGE,
    );
    for (index, shard) in &shards {
        turns.histogram(&[("shard", index)], [&shard.counters.turns]);
        let cpu = shard.cpu.map(|cpu| cpu.to_string()).unwrap_or_default();
        info.value(&[("cpu", &cpu), ("shard", index)], 1.0);
    }
    families.extend([turns, info]);
    families.extend(whole(daemon));
    families.extend(groups(daemon));
    families.into_iter().filter_map(Family::finish).collect()
}

fn whole(daemon: &Daemon) -> Vec<Family> {
    let gauge = |name: &str, help: &str, value: f64| {
        let mut family = Family::new(name, help, MetricType::GAUGE);
        family.value(&[], value);
        family
    };
    let mut build = Family::new("blktapd_build_info", "The program: its version.", MetricType::GAUGE);
    build.value(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    let budget = daemon.images.ram_budget();
    let mut families = vec![
        build,
        gauge("blktapd_disks", "Disks that are attached.", daemon.all_disks().len() as f64),
        gauge(
            "blktapd_nbd_negotiations",
            "NBD clients that have not chosen an export.",
            daemon.nbd.negotiating() as f64,
        ),
        gauge("blktapd_ram_used_bytes", "Memory of all RAM disks.", budget.used_bytes() as f64),
    ];
    if budget.limit_bytes() < u64::MAX {
        families.push(gauge(
            "blktapd_ram_limit_bytes",
            "Limit on the memory of all RAM disks.",
            budget.limit_bytes() as f64,
        ));
    }
    families
}

fn groups(daemon: &Daemon) -> [Family; 2] {
    let mut iops = Family::new(
        "blktapd_group_qos_limit_iops",
        "Limit of a group on operations per second, by direction; absent when there is none.",
        MetricType::GAUGE,
    );
    let mut bps = Family::new(
        "blktapd_group_qos_limit_bytes_per_second",
        "Limit of a group on bytes per second, by direction; absent when there is none.",
        MetricType::GAUGE,
    );
    for (name, limits, _) in daemon.groups.list() {
        let rates = [
            ("total", limits.iops_total, limits.bps_total),
            ("read", limits.iops_read, limits.bps_read),
            ("write", limits.iops_write, limits.bps_write),
        ];
        for (direction, operations, bytes) in rates {
            let labels = [("direction", direction), ("group", name.as_str())];
            if operations.per_second > 0 {
                iops.value(&labels, operations.per_second as f64);
            }
            if bytes.per_second > 0 {
                bps.value(&labels, bytes.per_second as f64);
            }
        }
    }
    [iops, bps]
}
