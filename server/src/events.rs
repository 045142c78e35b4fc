//! What happened lately, for `ctl events`: a bounded ring, fed by the flows and by the shards' own reports.
//!
//! Each event is also a line of the log. Rates are bounded by those who record: shards report changes of state, not requests.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::model::{Event, Level};

/// Events that are kept.
pub const EVENTS_MAX: usize = 1024;

/// The ring.
#[derive(Debug, Default)]
pub struct EventLog {
    ring: Mutex<(u64, VecDeque<Event>)>,
}

impl EventLog {
    /// Records an event and logs it.
    pub fn record(&self, level: Level, disk: Option<&str>, message: impl Into<String>) {
        let message = message.into();
        let name = disk.unwrap_or("");
        match level {
            Level::Info => tracing::info!(disk = name, "{message}"),
            Level::Warning => tracing::warn!(disk = name, "{message}"),
            Level::Error => tracing::error!(disk = name, "{message}"),
        }
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64);
        let mut ring = self.ring.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        ring.0 += 1;
        let event = Event { seq: ring.0, unix_ms, level, disk: disk.map(str::to_owned), message };
        if ring.1.len() == EVENTS_MAX {
            ring.1.pop_front();
        }
        ring.1.push_back(event);
    }

    /// Events after number `after`, the newest `limit` of them, oldest first.
    pub fn after(&self, after: u64, limit: usize) -> Vec<Event> {
        let ring = self.ring.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let matching = ring.1.iter().filter(|event| event.seq > after).count();
        ring.1
            .iter()
            .filter(|event| event.seq > after)
            .skip(matching.saturating_sub(limit))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the ring is bounded and numbers are stable. Method: overfill it.

    use super::*;

    #[test]
    fn the_oldest_go_first() {
        let log = EventLog::default();
        for n in 0..EVENTS_MAX + 10 {
            log.record(Level::Info, Some("d"), format!("{n}"));
        }
        let all = log.after(0, usize::MAX);
        assert_eq!(all.len(), EVENTS_MAX);
        assert_eq!(all[0].seq, 11);
        assert_eq!(log.after(EVENTS_MAX as u64 + 8, 10).len(), 2);
        assert_eq!(log.after(0, 1)[0].seq, EVENTS_MAX as u64 + 10);
    }
}
