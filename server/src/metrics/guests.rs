//! Per device of a guest, and per client that shares memory without Xen: `blktapd_guest_*`. Nothing of it is there while there are none.

use std::sync::Arc;

use prometheus::proto::MetricType;
use shard::blkif::GuestCounters;

use super::text::TextFamily;
use crate::daemon::Daemon;
use crate::guests;
use crate::guests::counters::{self, Kind};
use crate::model::GuestDevice;

/// Writes all families of guests.
pub fn write(daemon: &Arc<Daemon>, out: &mut String) {
    if let Some(guests) = daemon.guests.get() {
        let mut up = TextFamily::new(
            out,
            "blktapd_xenstore_up",
            "1 while XenStore answers and nothing keeps guests from being served.",
            MetricType::GAUGE,
        );
        up.value(&[("xenstore", "host")], f64::from(u8::from(guests.problem().is_none())));
    }
    let devices: Vec<(GuestDevice, Arc<GuestCounters>)> = guests::all(daemon)
        .into_iter()
        .filter_map(|(device, counters)| counters.map(|counters| (device, counters)))
        .collect();
    if devices.is_empty() {
        return;
    }
    let mut info = TextFamily::new(
        out,
        "blktapd_guest_info",
        "A guest's device: its disk, domain, name in the guest, and how far its connection is.",
        MetricType::GAUGE,
    );
    for (device, _) in &devices {
        let domain = device.domain.to_string();
        let labels = [
            ("device", device.device.as_str()),
            ("disk", device.disk.as_deref().unwrap_or_default()),
            ("domain", &domain),
            ("link", &device.link),
            ("vdev", &device.vdev),
        ];
        info.value(&labels, 1.0);
    }
    for (name, help, kind, read) in counters::SCALARS {
        let name = format!("blktapd_guest_{name}");
        let kind = match kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
        };
        let mut family = TextFamily::new(out, &name, help, kind);
        for (device, counters) in &devices {
            family.value(&[("device", &device.device)], read(counters) as f64);
        }
    }
    let mut requests = TextFamily::new(
        out,
        "blktapd_guest_requests_total",
        "Requests of a guest that passed the checks, by operation.",
        MetricType::COUNTER,
    );
    for (device, counters) in &devices {
        for (op, value) in counters::by_operation(counters) {
            requests.value(&[("device", &device.device), ("op", op)], value as f64);
        }
    }
    let mut refused = TextFamily::new(
        out,
        "blktapd_guest_requests_refused_total",
        "Requests of a guest that did not pass the checks, by reason.",
        MetricType::COUNTER,
    );
    for (device, counters) in &devices {
        for (reason, value) in counters::by_reason(counters) {
            refused.value(&[("device", &device.device), ("reason", reason)], value as f64);
        }
    }
}
