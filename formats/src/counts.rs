//! How often each cluster of a file is referred to, for as many clusters at a time as memory allows: for the checks of qcow2 and qcow.

use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters of a page of counts.
pub(crate) const PAGE: u64 = 1024;
/// Pages of counts in memory (4 KiB each).
const PAGES_MAX: usize = 32768;

/// A count of references, and what they are.
pub(crate) type Word = u32;
pub(crate) const COUNT: Word = 0x00ff_ffff;
/// A table that may be referred to once only.
pub(crate) const TABLE: Word = 1 << 31;
/// An L2 table.
pub(crate) const L2: Word = 1 << 30;
/// Bytes of the disk.
pub(crate) const DATA: Word = 1 << 29;
/// Referred to by the active state.
pub(crate) const ACTIVE: Word = 1 << 28;

/// Counts of the clusters of one window.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) pages: BTreeMap<u64, Box<[Word; PAGE as usize]>>,
    /// First page of this window.
    pub(crate) first: u64,
    /// First page behind it, once memory ended.
    pub(crate) end: Option<u64>,
}

impl Counts {
    /// Adds a reference to each cluster of a range.
    pub(crate) fn add_range(&mut self, clusters: Range<u64>, kind: Word) {
        let mut cluster = clusters.start.max(self.first.saturating_mul(PAGE));
        while cluster < clusters.end && self.contains(cluster) {
            self.add(cluster, kind, 1);
            cluster += 1;
        }
    }

    /// Adds `times` references to a cluster; returns what was known of it before, if the cluster is in the window.
    pub(crate) fn add(&mut self, cluster: u64, kind: Word, times: u32) -> Option<Word> {
        let page = cluster / PAGE;
        if page < self.first || self.end.is_some_and(|end| page >= end) {
            return None;
        }
        let words = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
        let word = &mut words[(cluster % PAGE) as usize];
        let old = *word;
        *word = (old & !COUNT) | kind | (old & COUNT).saturating_add(times).min(COUNT);
        if self.pages.len() > PAGES_MAX
            && let Some((last, _)) = self.pages.pop_last()
        {
            self.end = Some(last);
        }
        Some(old)
    }

    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let page = cluster / PAGE;
        page >= self.first && self.end.is_none_or(|end| page < end)
    }

    /// Where the next window begins; `None` when this was the last.
    pub fn next(&self) -> Option<u64> {
        self.end
    }

    /// All clusters with references, ascending.
    pub fn used(&self) -> impl Iterator<Item = (u64, u64)> {
        self.pages.iter().flat_map(|(page, words)| {
            let used = words.iter().enumerate().filter(|(_, word)| **word & COUNT > 0);
            used.map(move |(at, word)| (page * PAGE + at as u64, u64::from(word & COUNT)))
        })
    }

    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let word = self.pages.get(&(cluster / PAGE)).map_or(0, |page| page[(cluster % PAGE) as usize]);
        u64::from(word & COUNT)
    }

    /// References to the clusters of a page, if there are any.
    pub(crate) fn page(&self, page: u64) -> Option<&[Word; PAGE as usize]> {
        self.pages.get(&page).map(Box::as_ref)
    }
}
