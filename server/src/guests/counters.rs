//! What guests' devices did, by name: for `ctl guests --json` and for metrics.

use std::collections::BTreeMap;

use ring_bridge::blkif::request::Reason;
use shard::blkif::{GuestCounters, GuestOp};

/// Whether a number only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It does.
    Counter,
    /// It is how things are now.
    Gauge,
}

type Read = fn(&GuestCounters) -> u64;

/// Numbers of one device: name, help, kind, value.
pub const SCALARS: &[(&str, &str, Kind, Read)] = {
    use Kind::{Counter, Gauge};
    &[
        ("indirect_requests_total", "Requests with indirect segments.", Counter, |c| c.indirect.get()),
        ("errors_total", "Requests answered with an error after they had passed the checks.", Counter, |c| {
            c.errors.get()
        }),
        ("events_total", "Events taken from the guest's ports.", Counter, |c| c.events.get()),
        ("events_spurious_total", "Events with nothing in the ring.", Counter, |c| c.events_spurious.get()),
        (
            "events_damped_total",
            "Times that a port was kept quiet because its events meant nothing.",
            Counter,
            |c| c.events_damped.get(),
        ),
        ("notifications_total", "Batches of responses that the guest was notified of.", Counter, |c| {
            c.notifications.get()
        }),
        (
            "notifications_saved_total",
            "Batches of responses that the guest did not want to be notified of.",
            Counter,
            |c| c.notifications_saved.get(),
        ),
        ("ring_full_total", "Times that a look at a ring took its last free entry.", Counter, |c| {
            c.ring_full.get()
        }),
        ("segments_copied_total", "Segments copied by the hypervisor.", Counter, |c| c.segments_copied.get()),
        ("segments_mapped_total", "Segments moved through persistent mappings.", Counter, |c| {
            c.segments_mapped.get()
        }),
        ("segment_faults_total", "Requests of which a segment could not be had.", Counter, |c| {
            c.segment_faults.get()
        }),
        ("rings_broken_total", "Rings stopped because the guest broke them.", Counter, |c| {
            c.rings_broken.get()
        }),
        ("persistent_pages", "Pages of the guest that are mapped persistently.", Gauge, |c| {
            c.persistent_pages.get()
        }),
        ("requests_in_flight", "Requests taken and not answered.", Gauge, |c| c.in_flight.get()),
        ("flushes_held", "Flushes that failed and are not answered.", Gauge, |c| c.flushes_held.get()),
        ("rings", "Rings served.", Gauge, |c| c.rings.get()),
    ]
};

/// Requests that passed the checks, by operation.
pub fn by_operation(counters: &GuestCounters) -> impl Iterator<Item = (&'static str, u64)> {
    GuestOp::ALL.into_iter().map(|op| (op.label(), counters.requests[op as usize].get()))
}

/// Requests that did not, by reason.
pub fn by_reason(counters: &GuestCounters) -> impl Iterator<Item = (&'static str, u64)> {
    Reason::ALL.into_iter().map(|reason| (reason.name(), counters.refused[reason as usize].get()))
}

/// Everything, flat.
pub fn totals(counters: &GuestCounters) -> BTreeMap<String, u64> {
    let scalars =
        SCALARS.iter().map(|(name, _, _, read)| (name.trim_end_matches("_total").to_owned(), read(counters)));
    let operations = by_operation(counters).map(|(op, value)| (format!("{op}_requests"), value));
    let refused = by_reason(counters).map(|(reason, value)| (format!("refused_{reason}"), value));
    scalars.chain(operations).chain(refused).collect()
}
