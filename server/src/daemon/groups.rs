//! Groups by name. A group exists from the moment somebody mentions it; without limits it limits nothing.
//!
//! A group that the configuration names has its limits from there at every start and reload; `ctl qos --group` changes them
//! until then. The limits of all others are kept in the state.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use shard::limits::{Group, Limits};

use super::lock;
use crate::fleet::monotonic_now;

/// All groups.
#[derive(Debug, Default)]
pub struct Groups(Mutex<BTreeMap<String, Entry>>);

#[derive(Debug)]
struct Entry {
    group: Arc<Group>,
    limits: Limits,
    configured: bool,
}

impl Groups {
    /// The groups of these names, made where there are none.
    pub fn resolve(&self, names: &[String]) -> Vec<Arc<Group>> {
        let mut groups = lock(&self.0);
        names.iter().map(|name| entry(&mut groups, name).group.clone()).collect()
    }

    /// Takes over the groups of the configuration. Returns the names of those whose limits changed.
    pub fn configure(&self, configured: &BTreeMap<String, Limits>) -> Vec<String> {
        let mut groups = lock(&self.0);
        let mut changed = Vec::new();
        for (name, entry) in groups.iter_mut() {
            entry.configured = configured.contains_key(name);
        }
        for (name, limits) in configured {
            let entry = entry(&mut groups, name);
            entry.configured = true;
            if entry.limits != *limits {
                entry.set(*limits);
                changed.push(name.clone());
            }
        }
        changed
    }

    /// Limits from the state; the configuration's stand.
    pub fn restore(&self, name: &str, limits: Limits) {
        let mut groups = lock(&self.0);
        let entry = entry(&mut groups, name);
        if !entry.configured {
            entry.set(limits);
        }
    }

    /// Changes the limits of a group.
    pub fn set(&self, name: &str, limits: Limits) {
        entry(&mut lock(&self.0), name).set(limits);
    }

    /// The limits of a group.
    pub fn limits(&self, name: &str) -> Option<Limits> {
        lock(&self.0).get(name).map(|entry| entry.limits)
    }

    /// The configuration names it.
    pub fn is_configured(&self, name: &str) -> bool {
        lock(&self.0).get(name).is_some_and(|entry| entry.configured)
    }

    /// Forgets a group.
    pub fn remove(&self, name: &str) {
        lock(&self.0).remove(name);
    }

    /// Names and limits of all, and whether the configuration names them.
    pub fn list(&self) -> Vec<(String, Limits, bool)> {
        lock(&self.0).iter().map(|(name, entry)| (name.clone(), entry.limits, entry.configured)).collect()
    }
}

impl Entry {
    fn set(&mut self, limits: Limits) {
        self.limits = limits;
        self.group.set(limits, monotonic_now());
    }
}

fn entry<'a>(groups: &'a mut BTreeMap<String, Entry>, name: &str) -> &'a mut Entry {
    groups.entry(name.to_owned()).or_insert_with(|| Entry {
        group: Arc::new(Group::new(name, Limits::default())),
        limits: Limits::default(),
        configured: false,
    })
}
