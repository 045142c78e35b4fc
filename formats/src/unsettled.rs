//! Clusters whose mapping was changed and is not safe against the death of the process yet. A write in place must not be acknowledged
//! before its mapping is safe, so a driver does not call them in place: such a write is planned, and its commit waits along.

use std::cell::RefCell;
use std::collections::HashMap;

/// See the module. Clusters by their number or offset on the disk, with the number of commits that will make them safe.
#[derive(Debug, Default)]
pub(crate) struct Unsettled(RefCell<HashMap<u64, u32, foldhash::fast::FixedState>>);

/// Clusters that are unsettled; those of a commit that did not end stay so.
pub(crate) struct Commit<'a> {
    all: &'a Unsettled,
    clusters: Vec<u64>,
}

impl Unsettled {
    /// Entries of these clusters are about to change.
    pub fn begin(&self, clusters: Vec<u64>) -> Commit<'_> {
        let mut all = self.0.borrow_mut();
        clusters.iter().for_each(|cluster| *all.entry(*cluster).or_default() += 1);
        Commit { all: self, clusters }
    }

    /// A cluster is not settled.
    pub fn has(&self, cluster: u64) -> bool {
        let all = self.0.borrow();
        !all.is_empty() && all.contains_key(&cluster)
    }
}

impl Commit<'_> {
    /// They are settled.
    pub fn settled(self) {
        let mut all = self.all.0.borrow_mut();
        for cluster in &self.clusters {
            if let Some(commits) = all.get_mut(cluster) {
                *commits -= 1;
                if *commits == 0 {
                    all.remove(cluster);
                }
            }
        }
    }
}
