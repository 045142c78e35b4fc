//! What changed, as one mark for each watch and not as a queue: a guest that writes a watched node a million times costs one
//! mark (advisory XSA-349), and whoever waits reads the node as it is now.
//!
//! A watch with a depth also notes *which* nodes changed, down to that many levels below it, so that one recursive watch over all
//! devices does not mean looking at all of them. Beyond [`NOTED_MAX`] names, or when an event names the watched node itself, the note
//! becomes "all".

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::daemon::lock;

/// Names that one watch notes at most.
pub const NOTED_MAX: usize = 4096;

/// What changed since the last look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Anything may have.
    pub all: bool,
    /// Paths below the watched one, cut to the watch's depth: `5/51712`, or `5` when that node itself changed.
    pub below: BTreeSet<String>,
}

impl Changes {
    fn is_empty(&self) -> bool {
        !self.all && self.below.is_empty()
    }
}

/// One watch.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) path: String,
    depth: usize,
    changes: Mutex<Changes>,
    wake: Notify,
}

impl Mark {
    /// Marks everything.
    pub(super) fn all(&self) {
        let mut changes = lock(&self.changes);
        changes.all = true;
        changes.below.clear();
        drop(changes);
        self.wake.notify_one();
    }

    /// Notes an event.
    fn note(&self, event: &str) {
        let below = event.strip_prefix(self.path.as_str()).and_then(|rest| rest.strip_prefix('/'));
        let Some(below) = below.filter(|_| self.depth > 0) else { return self.all() };
        let mut changes = lock(&self.changes);
        if changes.all {
            return;
        }
        if changes.below.len() >= NOTED_MAX {
            drop(changes);
            return self.all();
        }
        changes.below.insert(cut(below, self.depth).to_owned());
        drop(changes);
        self.wake.notify_one();
    }

    /// Waits for a change. Safe to drop.
    pub(super) async fn changed(&self) -> Changes {
        loop {
            let changes = std::mem::take(&mut *lock(&self.changes));
            if !changes.is_empty() {
                return changes;
            }
            self.wake.notified().await;
        }
    }
}

/// The first `depth` parts of a path, or all of it.
fn cut(path: &str, depth: usize) -> &str {
    path.match_indices('/').nth(depth - 1).map_or(path, |(end, _)| &path[..end])
}

/// All watches of a client, by number. The token of a watch is its number.
#[derive(Debug, Default)]
pub(super) struct Marks {
    next: u64,
    by_id: HashMap<u64, Arc<Mark>>,
}

impl Marks {
    pub(super) fn add(&mut self, path: String, depth: usize) -> (u64, Arc<Mark>) {
        self.next += 1;
        let mark = Arc::new(Mark { path, depth, changes: Mutex::default(), wake: Notify::new() });
        mark.all();
        self.by_id.insert(self.next, mark.clone());
        (self.next, mark)
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.by_id.remove(&id);
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Mark>> {
        self.by_id.get(&id).cloned()
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        self.by_id.keys().copied().collect()
    }

    /// Notes an event; one for a watch that has ended is dropped.
    pub(super) fn event(&self, path: &str, token: &str) {
        if let Some(mark) = parse_token(token).and_then(|id| self.by_id.get(&id)) {
            mark.note(path);
        }
    }

    pub(super) fn mark_all(&self) {
        self.by_id.values().for_each(|mark| mark.all());
    }
}

/// The token of a watch.
pub(super) fn token(id: u64) -> String {
    format!("blktapd-{id}")
}

fn parse_token(token: &str) -> Option<u64> {
    token.strip_prefix("blktapd-")?.parse().ok()
}

#[cfg(test)]
mod tests {
    //! Goal: marks coalesce, their memory is bounded, and nothing is lost. Method: events by hand, and many of them.

    use super::*;

    async fn take(mark: &Mark) -> Changes {
        tokio::time::timeout(std::time::Duration::from_secs(5), mark.changed()).await.unwrap()
    }

    #[tokio::test]
    async fn events_become_names_of_the_right_depth() {
        let mut marks = Marks::default();
        let (id, mark) = marks.add("/be/vbd3".into(), 2);
        assert!(take(&mark).await.all, "a new watch has seen nothing");
        let token = token(id);
        for path in ["/be/vbd3/5/51712/state", "/be/vbd3/5/51712", "/be/vbd3/6/768/a/b", "/be/vbd3/7"] {
            marks.event(path, &token);
        }
        let changes = take(&mark).await;
        assert!(!changes.all);
        assert_eq!(changes.below.into_iter().collect::<Vec<_>>(), ["5/51712", "6/768", "7"]);
        for path in ["/be/vbd3", "/elsewhere", "/be/vbd31/5"] {
            marks.event(path, &token);
            assert!(take(&mark).await.all, "{path}");
        }
        marks.event("/be/vbd3/1/2", "blktapd-99");
        marks.event("/be/vbd3/1/2", "rubbish");
        assert!(lock(&mark.changes).is_empty());
    }

    #[tokio::test]
    async fn a_flood_is_one_mark() {
        let mut marks = Marks::default();
        let (state, flat) = marks.add("/fe/state".into(), 0);
        let (dir, deep) = marks.add("/be".into(), 2);
        take(&flat).await;
        take(&deep).await;
        for n in 0..100_000 {
            marks.event("/fe/state", &token(state));
            marks.event(&format!("/be/{n}/{n}"), &token(dir));
            assert!(lock(&deep.changes).below.len() <= NOTED_MAX);
        }
        assert_eq!(take(&flat).await, Changes { all: true, below: BTreeSet::new() });
        assert_eq!(take(&deep).await, Changes { all: true, below: BTreeSet::new() });
        assert!(lock(&flat.changes).is_empty());
    }
}
