//! How the bytes of a ring's segments reach us: by copies, by mappings that persist, or by a mapping per request; and the cache of
//! those that persist.
//!
//! # The rule ([`choose`])
//! * A frontend with `feature-persistent` uses the same granted pages again and again and copies its data to them itself. Those pages
//!   are mapped once and kept: in steady state a request costs no hypercall at all, and the kernel can read and write the
//!   pages in place. So: **persistent if the frontend offers it.**
//! * Every other frontend grants for one request and revokes afterwards. Mapping and unmapping costs two hypercalls and a
//!   flush of address translations on all cores, which is what made many busy guests slower the more they were; a copy by
//!   the hypervisor is one call for many segments of many requests. So: **copy otherwise.**
//! * A mapping for each request is made only if the setting asks for it ([`Setting::Map`]): to measure, or for very large requests.
//! * A page of a frontend that did not offer persistence is never kept mapped, whatever the setting: it could not revoke it.
//! * What to do with a mapped page, I/O in place or one memcpy, is decided by the disk: see [`Lease::address`].
//! * Whatever was chosen, copying always works; it is the way out when the budget is spent or a mapping is refused.
//!
//! # The cache ([`Cache`], one per ring)
//! Pages are mapped in bundles, since the driver's lists and the process's memory areas are per mapping: with thousands of mappings of
//! one page each, the driver's walk through its list makes the next one a hundred times as dear as a page in a bundle
//! (`xen_selftest_price_of_mappings`). A request with many missing pages makes a bundle of its own; a few pages are copied and
//! gathered first, until there are [`BUNDLE`] or the first of them has waited for [`GATHER`].
//!
//! A bundle goes when none of its pages was used for [`IDLE`] (for [`IDLE_SCARCE`] when the host's budget is nearly spent), or,
//! least recently used first, when its ring needs the room; one that was used in the last [`RECENT`] does not go for that, since
//! a guest that uses more pages than may be mapped would make us map and unmap all the time: its other pages are copied. After a refused mapping the ring copies for [`RETRY`], so that bad grefs (the copy says which) do not cost
//! an attempt each.
//!
//! Invariants: the cache and all leases together never hold more pages than the ring's limit and the host's [`Budget`] allow, except
//! that leases outlive their ring's cache; a page that is leased stays mapped and where it is, even if its cache is dropped;
//! dropping the cache and all leases unmaps everything and gives the whole budget back (XSA-371).

use std::collections::HashMap;
use std::sync::Arc;

use slab::Slab;

use super::budget::{Budget, Reservation};
use super::{Domid, GrantError, Gref, MAP_PAGES_MAX, Nanos, PAGE_BYTES, Pages};

#[cfg(test)]
mod tests;

/// Most pages of one ring: as many as a ring of 32 requests with 32 segments each and one indirect page needs.
pub const RING_PAGES_DEFAULT: usize = 1056;
/// A bundle that was not used for so long is unmapped.
pub const IDLE: Nanos = 60_000_000_000;
/// The same when the host's budget is nearly spent.
pub const IDLE_SCARCE: Nanos = 5_000_000_000;
/// A bundle that was used so recently is not unmapped for another one.
pub const RECENT: Nanos = 1_000_000_000;
/// So long a ring copies after a mapping was refused.
pub const RETRY: Nanos = 1_000_000_000;
/// So many missing pages are mapped at once; fewer wait for others.
pub const BUNDLE: usize = 32;
/// The longest that they wait.
pub const GATHER: Nanos = 100_000_000;
/// Most bundles that one [`Cache::sweep`] unmaps.
pub const SWEEP_MAX: usize = 32;

/// What the operator wants.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// The rule of this module.
    #[default]
    Auto,
    /// Always copy.
    Copy,
    /// A mapping per request.
    Map,
}

impl Setting {
    /// Whether to tell the frontend that we can keep its pages mapped (`feature-persistent`).
    pub fn offers_persistent(self) -> bool {
        self == Setting::Auto
    }
}

/// How a ring's data moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// [`super::Domains::copy`] to and from our buffers.
    Copy,
    /// [`Cache::lease`]; if that says no, as `Copy`.
    Persistent,
    /// [`super::Domains::map`], unmapped after the request.
    Map,
}

/// The rule: see the module's text. `frontend_persistent`: the frontend wrote `feature-persistent` = 1.
pub fn choose(setting: Setting, frontend_persistent: bool) -> Transfer {
    match setting {
        Setting::Auto if frontend_persistent => Transfer::Persistent,
        Setting::Auto | Setting::Copy => Transfer::Copy,
        Setting::Map => Transfer::Map,
    }
}

/// Who maps pages: [`super::Domains`], or a fake.
pub trait Mapper {
    /// Mapped pages; dropping them unmaps them.
    type Mapped;

    /// Maps `grefs` (1 to [`MAP_PAGES_MAX`]) in one piece, readable and writable.
    ///
    /// # Errors
    /// Any; nothing is mapped then.
    fn map_pages(&mut self, domid: Domid, grefs: &[Gref]) -> Result<Self::Mapped, GrantError>;
}

/// Why a request's pages are not mapped; it is copied instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotMapped {
    /// The request has no page, or more than one mapping can hold.
    Size,
    /// The ring has its share, all of it in use.
    RingFull,
    /// The host's budget is spent, and this ring has nothing idle to give.
    BudgetSpent,
    /// The mapping was refused just now: at least one gref is bad, or the host is out of something.
    Refused,
    /// One was refused a moment ago.
    Waiting,
    /// Its missing pages wait for others to be mapped with.
    Gathering,
}

/// What the cache did, for metrics.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct CacheCounts {
    /// Pages that were mapped already when they were asked for.
    pub hits: u64,
    /// Pages that were mapped for a request.
    pub misses: u64,
    /// Pages unmapped to make room.
    pub evictions: u64,
    /// Pages unmapped because they were idle.
    pub expirations: u64,
    /// Requests that had to be copied.
    pub refusals: u64,
}

#[derive(Debug)]
struct Bundle<M> {
    mapped: M,
    /// Given back after `mapped` was dropped: fields are dropped in this order.
    _reservation: Reservation,
}

/// Mapped pages of a request: keeps them mapped until it is dropped, which must be after the kernel's last access.
#[derive(Debug)]
#[must_use = "the page may be unmapped as soon as this is dropped"]
pub struct Lease<M> {
    bundle: Arc<Bundle<M>>,
    page: usize,
}

impl<M> Lease<M> {
    /// The mapping that the page is in.
    pub fn mapped(&self) -> &M {
        &self.bundle.mapped
    }

    /// Number of the page in that mapping.
    pub fn page(&self) -> usize {
        self.page
    }
}

impl Lease<Pages> {
    /// Address of the page for operations of the kernel. Fit for O_DIRECT on local block devices and the file systems on them. A store
    /// that may still send from the page after it has reported completion (network storage) needs a private copy, unless
    /// the toolstack says `direct-io-safe`; and so does whoever looks at the bytes twice, since the guest may change them.
    pub fn address(&self) -> usize {
        self.bundle.mapped.address() + self.page * PAGE_BYTES
    }
}

/// Where a page is mapped at the moment.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Key of the entry.
    key: usize,
    /// Page in its mapping.
    page: usize,
}

#[derive(Debug)]
struct Entry<M> {
    bundle: Arc<Bundle<M>>,
    grefs: Box<[Gref]>,
    used: Nanos,
}

impl<M> Entry<M> {
    /// A lease has a reference of its own, and only this thread makes leases of a bundle in the cache.
    fn is_leased(&self) -> bool {
        Arc::strong_count(&self.bundle) > 1
    }
}

/// The mapped pages of one ring. `M` is what the [`Mapper`] gives.
#[derive(Debug)]
pub struct Cache<M> {
    domid: Domid,
    budget: Arc<Budget>,
    pages_max: usize,
    pages: usize,
    entries: Slab<Entry<M>>,
    /// Where a gref is mapped. Guests choose grefs, so they could have many of them meet in one bucket; there are at most `pages_max`, and
    /// it is their requests that would take longer.
    places: HashMap<Gref, Place, foldhash::fast::FixedState>,
    /// Of a request that is being leased.
    found: Vec<Place>,
    /// Missing pages of the request at hand.
    missing: Vec<Gref>,
    /// Missing pages of requests before, fewer than `bundle`, none of them mapped.
    gathered: Vec<Gref>,
    /// When the first of them came.
    gathering_since: Nanos,
    /// So many missing pages are mapped at once.
    bundle: usize,
    retry_at: Nanos,
    counts: CacheCounts,
}

impl<M> Cache<M> {
    /// An empty cache for a ring of `domid` that may hold `pages_max` pages ([`RING_PAGES_DEFAULT`]) of the host's budget.
    pub fn new(domid: Domid, pages_max: usize, budget: Arc<Budget>) -> Cache<M> {
        Cache {
            domid,
            budget,
            pages_max,
            pages: 0,
            entries: Slab::new(),
            places: HashMap::default(),
            found: Vec::new(),
            missing: Vec::new(),
            gathered: Vec::new(),
            gathering_since: 0,
            bundle: BUNDLE.min(pages_max / 8).max(1),
            retry_at: 0,
            counts: CacheCounts::default(),
        }
    }

    /// Pages that are mapped by it.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Mappings that they are in.
    pub fn mappings(&self) -> usize {
        self.entries.len()
    }

    /// What it did.
    pub fn counts(&self) -> CacheCounts {
        self.counts
    }

    /// Appends the place of each of `grefs`, in order, to `places`, and maps those that are not mapped yet, or lets them wait for others.
    /// A gref may occur twice. The places are for [`Cache::page`] at once: any later call may unmap them.
    ///
    /// # Errors
    /// [`NotMapped`]: nothing was appended; copy.
    pub fn find(
        &mut self,
        mapper: &mut impl Mapper<Mapped = M>,
        grefs: &[Gref],
        now: Nanos,
        places: &mut Vec<Place>,
    ) -> Result<(), NotMapped> {
        if grefs.is_empty() || grefs.len() > MAP_PAGES_MAX {
            self.counts.refusals += 1;
            return Err(NotMapped::Size);
        }
        self.missing.clear();
        if !self.look_up(grefs, now, places) {
            let mut mapped = self.map_missing(mapper, grefs, now);
            if mapped.is_ok() && !self.look_up(grefs, now, places) {
                debug_assert!(false, "what was missing has been mapped, and what was used now stays");
                mapped = Err(NotMapped::Refused);
            }
            if let Err(reason) = mapped {
                self.counts.refusals += 1;
                return Err(reason);
            }
        }
        self.counts.misses += self.missing.len() as u64;
        self.counts.hits += (grefs.len() - self.missing.len()) as u64;
        Ok(())
    }

    /// The mapping that a place is in, and the number of its page there; `None` when it was unmapped since it was found.
    pub fn page(&self, place: Place) -> Option<(&M, usize)> {
        Some((&self.entries.get(place.key)?.bundle.mapped, place.page))
    }

    /// Appends a lease for each of `grefs`, in order, to `leases`, as [`Cache::find`] does with places: for whoever needs the pages longer.
    ///
    /// # Errors
    /// [`NotMapped`]: nothing was appended; copy.
    pub fn lease(
        &mut self,
        mapper: &mut impl Mapper<Mapped = M>,
        grefs: &[Gref],
        now: Nanos,
        leases: &mut Vec<Lease<M>>,
    ) -> Result<(), NotMapped> {
        let mut found = std::mem::take(&mut self.found);
        let result = self.find(mapper, grefs, now, &mut found);
        leases.extend(found.drain(..).filter_map(|Place { key, page }| {
            Some(Lease { bundle: self.entries.get(key)?.bundle.clone(), page })
        }));
        self.found = found;
        result
    }

    /// Appends the places of all pages; appends nothing and says false when one of them is not mapped.
    fn look_up(&mut self, grefs: &[Gref], now: Nanos, places: &mut Vec<Place>) -> bool {
        let before = places.len();
        for gref in grefs {
            let Some(&place) = self.places.get(gref) else {
                places.truncate(before);
                return false;
            };
            self.entries[place.key].used = now;
            places.push(place);
        }
        true
    }

    /// Maps what is missing, which is in `missing` afterwards.
    fn map_missing(
        &mut self,
        mapper: &mut impl Mapper<Mapped = M>,
        grefs: &[Gref],
        now: Nanos,
    ) -> Result<(), NotMapped> {
        for gref in grefs {
            match self.places.get(gref) {
                // Used now, so that making room for the others does not unmap it.
                Some(place) => self.entries[place.key].used = now,
                None if self.missing.contains(gref) => {}
                None => self.missing.push(*gref),
            }
        }
        if now < self.retry_at {
            return Err(NotMapped::Waiting);
        }
        if self.missing.len() >= self.bundle {
            let missing = std::mem::take(&mut self.missing);
            let result = self.map_bundle(mapper, &missing, now);
            self.missing = missing;
            return result;
        }
        self.gather(now)?;
        let gathered = std::mem::take(&mut self.gathered);
        self.map_bundle(mapper, &gathered, now)
    }

    /// Lets the missing pages wait for others. `Ok`: no longer.
    fn gather(&mut self, now: Nanos) -> Result<(), NotMapped> {
        if self.gathered.is_empty() {
            self.gathering_since = now;
        }
        for gref in &self.missing {
            if !self.gathered.contains(gref) {
                self.gathered.push(*gref);
            }
        }
        let waited = now.saturating_sub(self.gathering_since) >= GATHER;
        if self.gathered.len() >= self.bundle || waited { Ok(()) } else { Err(NotMapped::Gathering) }
    }

    /// Maps pages, none of which is mapped, in one piece.
    fn map_bundle(
        &mut self,
        mapper: &mut impl Mapper<Mapped = M>,
        grefs: &[Gref],
        now: Nanos,
    ) -> Result<(), NotMapped> {
        let reservation = self.make_room(grefs.len(), now)?;
        let Ok(mapped) = mapper.map_pages(self.domid, grefs) else {
            self.retry_at = now.saturating_add(RETRY);
            return Err(NotMapped::Refused);
        };
        let bundle = Arc::new(Bundle { mapped, _reservation: reservation });
        let key = self.entries.insert(Entry { bundle, grefs: grefs.into(), used: now });
        self.places.extend(grefs.iter().enumerate().map(|(page, &gref)| (gref, Place { key, page })));
        self.pages += grefs.len();
        self.gathered.retain(|gref| !self.places.contains_key(gref));
        Ok(())
    }

    /// Reserves room for `count` pages, if need be by unmapping what was not used for longest.
    fn make_room(&mut self, count: usize, now: Nanos) -> Result<Reservation, NotMapped> {
        if count > self.pages_max {
            return Err(NotMapped::RingFull);
        }
        while self.pages + count > self.pages_max {
            if !self.evict_oldest(now) {
                return Err(NotMapped::RingFull);
            }
        }
        loop {
            if let Some(reservation) = self.budget.reserve(count) {
                return Ok(reservation);
            }
            if !self.evict_oldest(now) {
                return Err(NotMapped::BudgetSpent);
            }
        }
    }

    /// Unmaps the bundle that was not used for longest, if there is one that may go.
    fn evict_oldest(&mut self, now: Nanos) -> bool {
        let oldest = self.oldest(now, RECENT);
        if let Some(key) = oldest {
            self.counts.evictions += self.remove(key) as u64;
        }
        oldest.is_some()
    }

    /// The bundle that was not used for longest, of those that are not leased and were not used for `idle`.
    fn oldest(&self, now: Nanos, idle: Nanos) -> Option<usize> {
        self.entries
            .iter()
            .filter(|(_, entry)| now.saturating_sub(entry.used) >= idle && !entry.is_leased())
            .min_by_key(|(_, entry)| entry.used)
            .map(|(key, _)| key)
    }

    /// Unmaps a bundle that is not leased; returns its number of pages.
    fn remove(&mut self, key: usize) -> usize {
        let entry = self.entries.remove(key);
        for gref in &entry.grefs {
            self.places.remove(gref);
        }
        self.pages -= entry.grefs.len();
        entry.grefs.len()
    }

    /// Unmaps bundles that have been idle, at most [`SWEEP_MAX`]; called about once a second. Returns whether more are.
    pub fn sweep(&mut self, now: Nanos) -> bool {
        let idle = if self.budget.is_scarce() { IDLE_SCARCE } else { IDLE };
        for _ in 0..SWEEP_MAX {
            let Some(key) = self.oldest(now, idle) else {
                return false;
            };
            self.counts.expirations += self.remove(key) as u64;
        }
        self.oldest(now, idle).is_some()
    }

    /// Unmaps everything that is not leased: at a disconnect, or when pages shall no longer be held.
    pub fn clear(&mut self) {
        let free: Vec<usize> =
            self.entries.iter().filter(|(_, entry)| !entry.is_leased()).map(|(key, _)| key).collect();
        for key in free {
            self.remove(key);
        }
    }
}
