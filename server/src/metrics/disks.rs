//! Per disk: `blktapd_disk_*`.

use std::sync::Arc;

use prometheus::proto::MetricType;
use shard::limits::{Limits, Rate};
use shard::stats::{DiskCounters, OpClass};

use super::text::TextFamily;
use crate::daemon::Daemon;
use crate::model::{self, State};

/// A disk at the moment of the scrape.
struct Sample {
    info: model::Disk,
    limits: Limits,
    counters: Arc<DiskCounters>,
}

/// One number of one disk; nothing when it is not known.
type Read = fn(&Sample) -> Option<f64>;

/// Families with one value for each disk.
const SCALARS: &[(&str, &str, MetricType, Read)] = {
    use MetricType::{COUNTER, GAUGE};
    use OpClass::{Discard, Flush, Read, Write, WriteZeroes};
    &[
        ("reads_completed_total", "Reads answered without error.", COUNTER, |s| completed(s, Read)),
        ("writes_completed_total", "Writes answered without error.", COUNTER, |s| completed(s, Write)),
        ("flush_requests_total", "Flushes answered without error.", COUNTER, |s| completed(s, Flush)),
        ("discards_completed_total", "Discards answered without error.", COUNTER, |s| completed(s, Discard)),
        ("write_zeroes_completed_total", "Zeroings answered without error.", COUNTER, |s| {
            completed(s, WriteZeroes)
        }),
        ("read_bytes_total", "Bytes read.", COUNTER, |s| bytes(s, Read)),
        ("written_bytes_total", "Bytes written.", COUNTER, |s| bytes(s, Write)),
        ("discarded_bytes_total", "Bytes discarded.", COUNTER, |s| bytes(s, Discard)),
        ("zeroed_bytes_total", "Bytes zeroed by requests to do so.", COUNTER, |s| bytes(s, WriteZeroes)),
        ("read_time_seconds_total", "Time that reads took, waiting included.", COUNTER, |s| time(s, Read)),
        ("write_time_seconds_total", "Time that writes took, waiting included.", COUNTER, |s| time(s, Write)),
        ("flush_requests_time_seconds_total", "Time that flushes took, waiting included.", COUNTER, |s| {
            time(s, Flush)
        }),
        ("discard_time_seconds_total", "Time that discards took, waiting included.", COUNTER, |s| {
            time(s, Discard)
        }),
        ("io_now", "Requests taken and not answered.", GAUGE, |s| Some(s.counters.io_now.get() as f64)),
        ("throttled_now", "Requests that wait for a limit.", GAUGE, |s| {
            Some(s.counters.throttled_now.get() as f64)
        }),
        ("throttled_requests_total", "Requests that waited for a limit.", COUNTER, |s| {
            Some(s.counters.ops.iter().map(|op| op.throttled.get()).sum::<u64>() as f64)
        }),
        ("throttled_seconds_total", "Time that requests waited for limits.", COUNTER, |s| {
            Some(s.counters.ops.iter().map(|op| op.throttled_ns.get()).sum::<u64>() as f64 / 1e9)
        }),
        (
            "would_throttle_requests_total",
            "Requests that a dry-run limit would have delayed.",
            COUNTER,
            |s| Some(s.counters.ops.iter().map(|op| op.would_throttle.get()).sum::<u64>() as f64),
        ),
        ("clients", "Connected clients.", GAUGE, |s| Some(s.counters.clients.get() as f64)),
        ("up", "1 while the disk serves, 0 in every other state.", GAUGE, |s| Some(is(s, State::Running))),
        ("paused", "1 while requests are held by `ctl pause`.", GAUGE, |s| Some(is(s, State::Paused))),
        ("size_bytes", "Size that clients see.", GAUGE, |s| s.info.size_bytes.map(|n| n as f64)),
        ("allocated_bytes", "Bytes that the image occupies in its store.", GAUGE, |s| {
            s.info.allocated_bytes.map(|n| n as f64)
        }),
        ("storage_errors_total", "Times that the store failed and requests were held.", COUNTER, |s| {
            Some(s.counters.storage_errors.get() as f64)
        }),
        ("flush_failures_total", "Failed fdatasyncs.", COUNTER, |s| {
            Some(s.counters.flush_failures.get() as f64)
        }),
        ("quarantines_total", "Failures of the disk's own code.", COUNTER, |s| {
            Some(s.counters.quarantines.get() as f64)
        }),
        (
            "data_in_doubt_total",
            "Times that acknowledged data was declared in doubt, over all restarts.",
            COUNTER,
            |s| Some(s.info.data_in_doubt as f64),
        ),
    ]
};

fn completed(sample: &Sample, class: OpClass) -> Option<f64> {
    Some(sample.counters.ops[class as usize].completed.get() as f64)
}

fn bytes(sample: &Sample, class: OpClass) -> Option<f64> {
    Some(sample.counters.ops[class as usize].bytes.get() as f64)
}

fn time(sample: &Sample, class: OpClass) -> Option<f64> {
    let op = &sample.counters.ops[class as usize];
    Some((op.service.read().1 + op.queue.read().1) as f64 / 1e9)
}

fn is(sample: &Sample, state: State) -> f64 {
    f64::from(u8::from(sample.info.state == state))
}

/// Writes all families of disks.
pub fn write(daemon: &Arc<Daemon>, out: &mut String) {
    let samples: Vec<Sample> = daemon
        .all_disks()
        .iter()
        .map(|disk| Sample {
            info: daemon.describe(disk),
            limits: disk.inner().attachment.limits,
            counters: disk.counters.clone(),
        })
        .collect();
    for (name, help, kind, read) in SCALARS {
        let name = format!("blktapd_disk_{name}");
        let mut family = TextFamily::new(out, &name, help, *kind);
        for sample in &samples {
            if let Some(value) = read(sample) {
                family.value(&[("disk", &sample.info.name)], value);
            }
        }
    }
    errors(&samples, out);
    info(&samples, out);
    states(&samples, out);
    durations(&samples, out);
    queue_durations(&samples, out);
    limits(&samples, out);
}

fn errors(samples: &[Sample], out: &mut String) {
    let mut family = TextFamily::new(
        out,
        "blktapd_disk_io_errors_total",
        "Requests answered with an error, by operation.",
        MetricType::COUNTER,
    );
    for sample in samples {
        for class in OpClass::ALL {
            let errors = sample.counters.ops[class as usize].errors.get();
            family.value(&[("disk", &sample.info.name), ("op", class.label())], errors as f64);
        }
    }
}

fn durations(samples: &[Sample], out: &mut String) {
    let mut family = TextFamily::new(
        out,
        "blktapd_disk_request_duration_seconds",
        "Time from the first operation of the kernel to the answer, by operation; waiting before that is \
         blktapd_disk_queue_duration_seconds.",
        MetricType::HISTOGRAM,
    );
    for sample in samples {
        for class in OpClass::ALL {
            if has_done(sample, class) {
                let labels = [("disk", sample.info.name.as_str()), ("op", class.label())];
                family.histogram(&labels, [&sample.counters.ops[class as usize].service]);
            }
        }
    }
}

fn has_done(sample: &Sample, class: OpClass) -> bool {
    let op = &sample.counters.ops[class as usize];
    op.completed.get() + op.errors.get() > 0
}

/// Not by operation: that would double the size of a scrape, and which limit delays whom is told by `ctl stats`.
fn queue_durations(samples: &[Sample], out: &mut String) {
    let mut family = TextFamily::new(
        out,
        "blktapd_disk_queue_duration_seconds",
        "Time from the arrival of a request to the first operation of the kernel (limits, pauses, budgets), all operations.",
        MetricType::HISTOGRAM,
    );
    for sample in samples {
        if OpClass::ALL.iter().any(|class| has_done(sample, *class)) {
            family.histogram(&[("disk", &sample.info.name)], sample.counters.ops.iter().map(|op| &op.queue));
        }
    }
}

fn info(samples: &[Sample], out: &mut String) {
    let mut family = TextFamily::new(
        out,
        "blktapd_disk_info",
        "What is known about a disk besides its name: image, type, frontend, mode, groups.",
        MetricType::GAUGE,
    );
    for Sample { info, .. } in samples {
        let (kind, path) = info.image.split_once(':').unwrap_or((&info.image, ""));
        let mode = if info.read_only { "ro" } else { "rw" };
        let frontend = info.frontends.first().map_or("", |frontend| frontend.kind.as_str());
        let shard = info.shard.map(|shard| shard.to_string()).unwrap_or_default();
        let labels = [
            ("disk", info.name.as_str()),
            ("frontend", frontend),
            ("groups", &info.groups.join(",")),
            ("mode", mode),
            ("path", path),
            ("shard", &shard),
            ("type", kind),
        ];
        family.value(&labels, 1.0);
    }
}

fn states(samples: &[Sample], out: &mut String) {
    let mut family =
        TextFamily::new(out, "blktapd_disk_state", "1 for the state that the disk is in.", MetricType::GAUGE);
    for Sample { info, .. } in samples {
        family.value(&[("disk", &info.name), ("state", info.state.name())], 1.0);
    }
}

fn limits(samples: &[Sample], out: &mut String) {
    type Get = fn(&Rate, &Rate) -> u64;
    let families: [(&str, &str, Get); 2] = [
        (
            "blktapd_disk_qos_limit_iops",
            "Limit on operations per second, by direction; absent when there is none.",
            |iops, _| iops.per_second,
        ),
        (
            "blktapd_disk_qos_limit_bytes_per_second",
            "Limit on bytes per second, by direction; absent when there is none.",
            |_, bps| bps.per_second,
        ),
    ];
    for (name, help, get) in families {
        let mut family = TextFamily::new(out, name, help, MetricType::GAUGE);
        for Sample { info, limits, .. } in samples {
            let rates = [
                ("total", get(&limits.iops_total, &limits.bps_total)),
                ("read", get(&limits.iops_read, &limits.bps_read)),
                ("write", get(&limits.iops_write, &limits.bps_write)),
            ];
            for (direction, per_second) in rates {
                if per_second > 0 {
                    family.value(&[("disk", &info.name), ("direction", direction)], per_second as f64);
                }
            }
        }
    }
}
