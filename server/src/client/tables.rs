//! Answers as tables that a person likes to read.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use formats::size::format_size;

use crate::limit_change::LimitChange;
use crate::model::{Disk, DiskStats, Event, Group, GuestDevice, Quantiles, Reload, Shard, ShardState};

/// A table without lines; columns whose index is in `right` are numbers.
fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt() + "\n"
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// `ctl guests`.
pub fn guests(guests: &[GuestDevice]) -> String {
    if guests.is_empty() {
        return "no devices of guests; `blktapd ctl attach NAME TYPE:PATH --domain DOM --vdev xvda` makes one\n".into();
    }
    let rows = guests.iter().map(|guest| {
        let states = format!("{}/{}", or_dash(guest.backend_state), or_dash(guest.frontend_state));
        vec![
            guest.device.clone(),
            guest.domain.to_string(),
            guest.vdev.clone(),
            or_dash(guest.disk.as_ref()),
            if guest.served { guest.link.clone() } else { "not served".into() },
            states,
            or_dash(guest.queues),
            or_dash(guest.ring_entries),
            guest.persistent.map_or("-", |yes| if yes { "yes" } else { "no" }).into(),
        ]
    });
    let header = ["DEVICE", "DOMAIN", "VDEV", "DISK", "LINK", "STATES", "QUEUES", "RING", "PERSISTENT"];
    let mut text = table(&header, &[1, 6, 7], rows.collect());
    for guest in guests {
        if let Some(reason) = &guest.reason {
            let _ = writeln!(text, "{}: {reason}", guest.device);
        }
    }
    text
}

/// `ctl list`.
pub fn disks(disks: &[Disk]) -> String {
    if disks.is_empty() {
        return "no disks; `blktapd ctl attach NAME raw:PATH --nbd` attaches one\n".into();
    }
    let rows = disks.iter().map(|disk| {
        vec![
            disk.name.clone(),
            disk.state.name().into(),
            or_dash(disk.shard),
            disk.size_bytes.map_or_else(|| "-".into(), format_size),
            if disk.read_only { "ro".into() } else { "rw".into() },
            disk.clients.to_string(),
            limits(&disk.limits),
            disk.image.clone(),
        ]
    });
    let header = ["NAME", "STATE", "SHARD", "SIZE", "MODE", "CLIENTS", "LIMITS", "IMAGE"];
    let mut text = table(&header, &[2, 3, 5], rows.collect());
    for disk in disks {
        if let Some(reason) = &disk.reason {
            let _ = writeln!(text, "{}: {reason}", disk.name);
        }
        if disk.data_in_doubt > 0 {
            let _ = writeln!(
                text,
                "{}: data that was acknowledged may have been lost (resumed in doubt)",
                disk.name
            );
        }
    }
    text
}

/// `ctl show`.
pub fn disk(disk: &Disk) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<14}{value}");
    };
    line("name", disk.name.clone());
    line("state", disk.state.name().into());
    if let Some(reason) = &disk.reason {
        line("reason", reason.clone());
    }
    if let Some(seconds) = disk.retry_in_s {
        line("tried again", format!("in {}", duration(seconds)));
    }
    line("image", disk.image.clone());
    line("mode", if disk.read_only { "read-only".into() } else { "read-write".into() });
    if let Some(size) = disk.size_bytes {
        line("size", format!("{} ({size} bytes)", format_size(size)));
    }
    if let Some(allocated) = disk.allocated_bytes {
        line("allocated", format!("{} bytes", allocated));
    }
    line("shard", or_dash(disk.shard));
    for frontend in &disk.frontends {
        line(&frontend.kind, frontend.uri.clone());
    }
    line("limits", limits(&disk.limits));
    line("groups", if disk.groups.is_empty() { "-".into() } else { disk.groups.join(", ") });
    line("on-error", format!("{:?}", disk.on_error).to_lowercase());
    line("on-enospc", format!("{:?}", disk.on_enospc).to_lowercase());
    line("in flight", disk.io_now.to_string());
    line("data in doubt", disk.data_in_doubt.to_string());
    line("attached", format!("{} ago", duration(disk.age_s)));
    for client in disk.connections.iter().flatten() {
        let value =
            format!("{}, {} in flight, for {}", client.peer, client.in_flight, duration(client.age_s));
        line("client", value);
    }
    text
}

/// Limits in a few words: `500/s, read 10MiB/s`.
pub fn limits(limits: &LimitChange) -> String {
    let mut parts = Vec::new();
    let mut add = |name: &str, rate: Option<u64>, bursts: [Option<u64>; 2], bytes: bool| {
        let Some(rate) = rate else { return };
        let show = |n: u64| if bytes { format_size(n) } else { n.to_string() };
        let mut text = format!("{name}{}/s", show(rate));
        if let Some(burst) = bursts[0] {
            let _ = write!(text, " burst {}", show(burst));
        }
        if let Some(burst) = bursts[1] {
            let _ = write!(text, " once {}", show(burst));
        }
        parts.push(text);
    };
    let l = limits;
    add("", l.iops, [l.iops_burst, l.iops_one_time_burst], false);
    add("read ", l.iops_read, [l.iops_read_burst, l.iops_read_one_time_burst], false);
    add("write ", l.iops_write, [l.iops_write_burst, l.iops_write_one_time_burst], false);
    add("", l.bps, [l.bps_burst, l.bps_one_time_burst], true);
    add("read ", l.bps_read, [l.bps_read_burst, l.bps_read_one_time_burst], true);
    add("write ", l.bps_write, [l.bps_write_burst, l.bps_write_one_time_burst], true);
    if let Some(size) = l.iops_size {
        parts.push(format!("one per {}", format_size(size)));
    }
    if l.dry_run == Some(true) {
        parts.push("dry run".into());
    }
    if parts.is_empty() { "-".into() } else { parts.join(", ") }
}

/// `ctl qos NAME`.
pub fn limits_of_disk(disk: &Disk) -> String {
    let groups = if disk.groups.is_empty() { "-".into() } else { disk.groups.join(", ") };
    table(&["NAME", "LIMITS", "GROUPS"], &[], vec![vec![disk.name.clone(), limits(&disk.limits), groups]])
}

/// `ctl groups`.
pub fn groups(groups: &[Group]) -> String {
    if groups.is_empty() {
        return "no groups; `blktapd ctl qos --group NAME --iops N` makes one\n".into();
    }
    let rows = groups.iter().map(|group| {
        let from = if group.configured { "configuration" } else { "ctl" };
        let disks = if group.disks.is_empty() { "-".into() } else { group.disks.join(", ") };
        vec![group.name.clone(), limits(&group.limits), from.into(), disks]
    });
    table(&["GROUP", "LIMITS", "FROM", "DISKS"], &[], rows.collect())
}

/// `ctl stats`.
pub fn stats(stats: &[DiskStats]) -> String {
    let mut rows = Vec::new();
    for disk in stats {
        let operations: BTreeSet<&String> = disk.ops.keys().chain(disk.latency.keys()).collect();
        let mut name = disk.name.clone();
        for operation in operations {
            let totals = disk.ops.get(operation).copied().unwrap_or_default();
            let latency = disk.latency.get(operation);
            if totals.completed == 0 && totals.errors == 0 && latency.is_none() {
                continue;
            }
            let [p50, p99, p999, max] = latencies(latency);
            rows.push(vec![
                std::mem::take(&mut name),
                operation.clone(),
                // What waits is counted with its operation; its own row has only times.
                if disk.ops.contains_key(operation) {
                    totals.completed
                } else {
                    latency.map_or(0, |l| l.count)
                }
                .to_string(),
                totals.bytes.to_string(),
                totals.errors.to_string(),
                totals.throttled.to_string(),
                p50,
                p99,
                p999,
                max,
            ]);
        }
        if !name.is_empty() {
            rows.push(vec![name, "-".into()]);
        }
    }
    let header = ["NAME", "OP", "DONE", "BYTES", "ERRORS", "THROTTLED", "P50", "P99", "P99.9", "MAX"];
    table(&header, &[2, 3, 4, 5, 6, 7, 8, 9], rows)
}

/// The disks of `ctl top`.
pub fn rates(rows: impl Iterator<Item = Vec<String>>) -> String {
    let header = [
        "NAME",
        "STATE",
        "SHARD",
        "READS/S",
        "WRITES/S",
        "READ MIB/S",
        "WRITTEN MIB/S",
        "NOW",
        "LIMITED",
        "READ P50/P99/P99.9/MAX",
        "WRITE P50/P99/P99.9/MAX",
    ];
    table(&header, &[2, 3, 4, 5, 6, 7, 8, 9, 10], rows.collect())
}

/// p50, p99, p99.9 and maximum as text.
pub fn latencies(quantiles: Option<&Quantiles>) -> [String; 4] {
    match quantiles {
        Some(q) => [q.p50_us, q.p99_us, q.p999_us, q.max_us].map(microseconds),
        None => std::array::from_fn(|_| "-".into()),
    }
}

/// `85us`, `1.2ms`, `3.4s`.
pub fn microseconds(us: u64) -> String {
    match us {
        0..=999 => format!("{us}us"),
        1_000..=999_999 => format!("{:.1}ms", us as f64 / 1e3),
        _ => format!("{:.1}s", us as f64 / 1e6),
    }
}

/// `ctl shards`.
pub fn shards(shards: &[Shard]) -> String {
    let rows = shards.iter().map(|shard| {
        vec![
            shard.index.to_string(),
            or_dash(shard.cpu),
            shard_state(shard.state).into(),
            shard.ring.clone(),
            shard.disks.to_string(),
            shard.clients.to_string(),
            format!("{:.1}%", shard.busy_ratio * 100.0),
            shard.ops_in_flight.to_string(),
            format_size(shard.buffer_bytes),
            shard.slow_turns.to_string(),
            format!("{}ms", shard.heartbeat_age_ms),
        ]
    });
    let header = [
        "SHARD",
        "CPU",
        "STATE",
        "RING",
        "DISKS",
        "CLIENTS",
        "BUSY",
        "IN FLIGHT",
        "BUFFERS",
        "TURNS>10MS",
        "LAST TURN",
    ];
    let mut text = table(&header, &[0, 1, 4, 5, 6, 7, 8, 9, 10], rows.collect());
    for shard in shards {
        if let Some(reason) = &shard.reason {
            let _ = writeln!(text, "shard {} has ended: {reason}", shard.index);
        }
    }
    text
}

/// The word for a shard's state.
pub fn shard_state(state: ShardState) -> &'static str {
    match state {
        ShardState::Running => "running",
        ShardState::Stalled => "stalled",
        ShardState::Ended => "ended",
    }
}

/// `ctl events`.
pub fn events(events: &[Event]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64);
    let rows = events.iter().map(|event| {
        let age = duration(now.saturating_sub(event.unix_ms) / 1000);
        let level = format!("{:?}", event.level).to_lowercase();
        vec![
            event.seq.to_string(),
            format!("{age} ago"),
            level,
            event.disk.clone().unwrap_or_else(|| "-".into()),
            event.message.clone(),
        ]
    });
    table(&["SEQ", "WHEN", "LEVEL", "DISK", "WHAT"], &[0], rows.collect())
}

/// `ctl reload`.
pub fn reload(report: &Reload) -> String {
    let list = |items: &[String]| if items.is_empty() { "nothing".into() } else { items.join("; ") };
    let mut text = format!("in effect: {}\n", list(&report.applied));
    if !report.restart.is_empty() {
        let _ = writeln!(text, "changed, and needs a restart: {}", list(&report.restart));
    }
    text
}

/// `45s`, `12m`, `3h05m`, `2d3h`.
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..=59 => format!("{seconds}s"),
        60..=3599 => format!("{minutes}m"),
        3600..=86_399 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: tables show what matters and have no ragged edges. Method: known answers.

    use super::*;

    #[test]
    fn limits_in_words() {
        let change = LimitChange {
            iops: Some(500),
            iops_burst: Some(100),
            bps_read: Some(10 << 20),
            dry_run: Some(true),
            ..LimitChange::default()
        };
        assert_eq!(limits(&change), "500/s burst 100, read 10MiB/s, dry run");
        assert_eq!(limits(&LimitChange::default()), "-");
    }

    #[test]
    fn times_in_words() {
        assert_eq!([0, 59, 61, 3700, 90_000].map(duration), ["0s", "59s", "1m", "1h01m", "1d1h"]);
        assert_eq!([85, 1234, 2_500_000].map(microseconds), ["85us", "1.2ms", "2.5s"]);
    }

    #[test]
    fn a_table_is_aligned_and_has_no_trailing_blanks() {
        let rows = vec![vec!["a".into(), "1".into()], vec!["long".into(), "100".into()]];
        assert_eq!(table(&["N", "V"], &[1], rows), "N       V\na       1\nlong  100\n");
    }
}
