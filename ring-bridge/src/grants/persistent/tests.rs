//! The cache against a fake mapper and a naive model: what is mapped, what the budget says, and what may go.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use nix::errno::Errno;
use proptest::prelude::*;

use super::*;

/// What the fake hypervisor has mapped: number of mappings of each page.
#[derive(Debug, Default)]
struct Table {
    pages: RefCell<HashMap<Gref, usize>>,
    mappings: Cell<usize>,
    attempts: Cell<usize>,
}

#[derive(Debug)]
struct FakePages {
    table: Rc<Table>,
    grefs: Vec<Gref>,
}

impl Drop for FakePages {
    fn drop(&mut self) {
        let mut pages = self.table.pages.borrow_mut();
        for gref in &self.grefs {
            let count = pages.get_mut(gref).expect("unmapped what is mapped");
            *count -= 1;
            if *count == 0 {
                pages.remove(gref);
            }
        }
        self.table.mappings.set(self.table.mappings.get() - 1);
    }
}

/// Grefs from 1000 on are bad.
#[derive(Debug, Default, Clone)]
struct FakeMapper(Rc<Table>);

const BAD: Gref = 1000;

impl Mapper for FakeMapper {
    type Mapped = FakePages;

    fn map_pages(&mut self, domid: Domid, grefs: &[Gref]) -> Result<FakePages, GrantError> {
        self.0.attempts.set(self.0.attempts.get() + 1);
        if let Some(&first) = grefs.iter().find(|&&gref| gref >= BAD) {
            return Err(GrantError::Map { domid, first, count: grefs.len(), errno: Errno::EINVAL });
        }
        let mut pages = self.0.pages.borrow_mut();
        for &gref in grefs {
            *pages.entry(gref).or_default() += 1;
        }
        self.0.mappings.set(self.0.mappings.get() + 1);
        Ok(FakePages { table: self.0.clone(), grefs: grefs.to_vec() })
    }
}

fn new(pages_max: usize, budget: &Arc<Budget>) -> (FakeMapper, Cache<FakePages>) {
    (FakeMapper::default(), Cache::new(5, pages_max, budget.clone()))
}

fn lease(
    cache: &mut Cache<FakePages>,
    mapper: &mut FakeMapper,
    grefs: &[Gref],
    now: Nanos,
) -> Result<Vec<Lease<FakePages>>, NotMapped> {
    let mut leases = Vec::new();
    cache.lease(mapper, grefs, now, &mut leases).map(|()| leases)
}

const SECOND: Nanos = 1_000_000_000;

// Goal: pages are mapped once and found again, each lease naming its own page, duplicates included.
// Method: overlapping requests; number of attempts and the grefs behind the leases.
#[test]
fn pages_are_mapped_once() {
    let budget = Budget::new(100, 100);
    let (mut mapper, mut cache) = new(8, &budget);
    for (grefs, attempts) in [(&[1, 2, 3, 2][..], 1), (&[3, 1], 1), (&[3, 4, 5], 2), (&[5, 4, 3, 2, 1], 2)] {
        let leases = lease(&mut cache, &mut mapper, grefs, 0).expect("room");
        let found: Vec<Gref> = leases.iter().map(|lease| lease.mapped().grefs[lease.page()]).collect();
        assert_eq!(found, grefs);
        assert_eq!(mapper.0.attempts.get(), attempts);
    }
    assert_eq!((cache.pages(), cache.mappings(), budget.pages(), budget.mappings()), (5, 2, 5, 2));
    let counts = cache.counts();
    assert_eq!((counts.misses, counts.hits), (5, 9));
}

// Goal: the ring's limit and the host's budget both hold; least recently used goes first; what is leased or was just used stays.
// Method: a ring of 4 pages in steps of virtual time.
#[test]
fn the_least_recently_used_goes_unless_it_is_leased_or_warm() {
    let budget = Budget::new(100, 100);
    let (mut mapper, mut cache) = new(4, &budget);
    let held = lease(&mut cache, &mut mapper, &[1, 2], 0).expect("room");
    drop(lease(&mut cache, &mut mapper, &[3], 1).expect("room"));
    drop(lease(&mut cache, &mut mapper, &[4], 2).expect("room"));
    assert_eq!(lease(&mut cache, &mut mapper, &[5], 3).err(), Some(NotMapped::RingFull), "all warm");
    drop(lease(&mut cache, &mut mapper, &[5], 2 * SECOND).expect("3 goes: 1 and 2 are older but leased"));
    let mapped = |mapper: &FakeMapper| mapper.0.pages.borrow().keys().copied().collect::<HashSet<_>>();
    assert_eq!(mapped(&mapper), HashSet::from([1, 2, 4, 5]));
    drop(held);
    drop(lease(&mut cache, &mut mapper, &[6], 2 * SECOND + 1).expect("the bundle of 1 and 2 goes"));
    assert_eq!(mapped(&mapper), HashSet::from([4, 5, 6]));
    assert_eq!(
        lease(&mut cache, &mut mapper, &[10, 11, 12, 13, 14], 9 * SECOND).err(),
        Some(NotMapped::RingFull)
    );
    assert_eq!(cache.counts().evictions, 3);
}

// Goal: a spent budget of the host makes a ring copy; it is used again when others give back, sooner when it is scarce.
// Method: two rings; the first takes all, the second is refused until the first has swept.
#[test]
fn a_spent_budget_is_shared_by_idle_rings() {
    let budget = Budget::new(8, 8);
    let (mut mapper, mut first) = new(8, &budget);
    let mut second = Cache::new(6, 8, budget.clone());
    drop(lease(&mut first, &mut mapper, &[1, 2, 3, 4, 5, 6, 7, 8], 0).expect("room"));
    assert_eq!(lease(&mut second, &mut mapper, &[1], 1).err(), Some(NotMapped::BudgetSpent));
    assert!(!first.sweep(IDLE_SCARCE - 1));
    assert_eq!(first.pages(), 8, "not idle yet");
    assert!(!first.sweep(IDLE_SCARCE));
    assert_eq!(first.counts().expirations, 8);
    drop(lease(&mut second, &mut mapper, &[1], IDLE_SCARCE).expect("room again"));
    assert!(!second.sweep(IDLE_SCARCE + IDLE - 1));
    assert_eq!(second.pages(), 1, "enough is left, so it stays for a minute");
    second.sweep(IDLE_SCARCE + IDLE);
    assert_eq!((second.pages(), budget.pages(), budget.mappings()), (0, 0, 0));
}

// Goal: XSA-365: a mapping that failed leaves nothing to unmap and nothing reserved; bad grefs cost one attempt a second, whatever
// the guest does.
// Method: a request with a bad gref a thousand times within a second.
#[test]
fn xsa_365_refused_mappings_leave_nothing_and_wait() {
    let budget = Budget::new(8, 8);
    let (mut mapper, mut cache) = new(8, &budget);
    drop(lease(&mut cache, &mut mapper, &[1], 0).expect("room"));
    assert_eq!(lease(&mut cache, &mut mapper, &[2, BAD], 1).err(), Some(NotMapped::Refused));
    for now in 2..1002 {
        assert_eq!(lease(&mut cache, &mut mapper, &[2], now).err(), Some(NotMapped::Waiting));
        drop(lease(&mut cache, &mut mapper, &[1], now).expect("what is mapped is found all the same"));
    }
    assert_eq!((mapper.0.attempts.get(), budget.pages()), (2, 1));
    drop(lease(&mut cache, &mut mapper, &[2], 1 + RETRY).expect("room"));
    assert_eq!(budget.pages(), 2);
}

// Goal: pages that come one by one share a mapping; one that nobody joins is mapped after a while all the same; a large request
// waits for nobody, and takes pages that waited with it.
// Method: a ring of the usual size; 4 KiB requests over 40 pages, then one page again and again, then 64 pages at once.
#[test]
fn single_pages_are_gathered() {
    let budget = Budget::new(2000, 100);
    let (mut mapper, mut cache) = new(RING_PAGES_DEFAULT, &budget);
    for gref in 0..BUNDLE as Gref - 1 {
        assert_eq!(lease(&mut cache, &mut mapper, &[gref], 5).err(), Some(NotMapped::Gathering));
        assert_eq!(
            lease(&mut cache, &mut mapper, &[gref], 5).err(),
            Some(NotMapped::Gathering),
            "twice is once"
        );
    }
    drop(lease(&mut cache, &mut mapper, &[31, 3], 5).expect("there are 32 now"));
    assert_eq!((cache.pages(), cache.mappings(), mapper.0.attempts.get()), (32, 1, 1));
    assert_eq!(lease(&mut cache, &mut mapper, &[3, 50], 5).err(), Some(NotMapped::Gathering));
    assert_eq!(lease(&mut cache, &mut mapper, &[50], 4 + GATHER).err(), Some(NotMapped::Gathering));
    drop(lease(&mut cache, &mut mapper, &[50], 5 + GATHER).expect("it has waited"));
    assert_eq!((cache.pages(), cache.mappings()), (33, 2));
    assert_eq!(lease(&mut cache, &mut mapper, &[60], SECOND).err(), Some(NotMapped::Gathering));
    let large: Vec<Gref> = (55..119).collect();
    drop(lease(&mut cache, &mut mapper, &large, SECOND).expect("large enough"));
    assert_eq!((cache.pages(), cache.mappings(), cache.gathered.len()), (97, 3, 0));
    let counts = cache.counts();
    assert_eq!(counts.hits + counts.misses, 2 + 1 + 64);
}

// Goal: a sweep's work is bounded, and nothing is forgotten.
#[test]
fn a_sweep_is_bounded() {
    let budget = Budget::new(1000, 1000);
    let (mut mapper, mut cache) = new(500, &budget);
    for gref in 0..100 {
        assert_eq!(lease(&mut cache, &mut mapper, &[gref], 0).err(), Some(NotMapped::Gathering));
        drop(lease(&mut cache, &mut mapper, &[gref], GATHER).expect("it has waited"));
    }
    assert_eq!(cache.mappings(), 100);
    let sweeps = 1 + (0..10).take_while(|_| cache.sweep(GATHER + IDLE)).count();
    assert_eq!(sweeps, 100usize.div_ceil(SWEEP_MAX));
    assert_eq!((cache.pages(), mapper.0.mappings.get(), budget.pages()), (0, 0, 0));
}

// Goal: the rule is what the module's text says.
#[test]
fn the_rule() {
    assert_eq!(choose(Setting::default(), true), Transfer::Persistent);
    assert_eq!(choose(Setting::Auto, false), Transfer::Copy);
    for persistent in [false, true] {
        assert_eq!(choose(Setting::Copy, persistent), Transfer::Copy);
        assert_eq!(choose(Setting::Map, persistent), Transfer::Map);
    }
    assert!(Setting::Auto.offers_persistent());
    assert!(!Setting::Copy.offers_persistent() && !Setting::Map.offers_persistent());
}

#[derive(Debug, Clone)]
enum Step {
    Lease { ring: usize, grefs: Vec<Gref> },
    Release(usize),
    Wait(Nanos),
    Sweep(usize),
    Clear(usize),
    Reconnect(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let gref = prop_oneof![40 => 0..60u32, 1 => BAD..BAD + 2];
    let grefs = prop::collection::vec(gref, 0..12);
    prop_oneof![
        8 => (0..2usize, grefs).prop_map(|(ring, grefs)| Step::Lease { ring, grefs }),
        6 => (0..50usize).prop_map(Step::Release),
        3 => (0..4 * SECOND).prop_map(Step::Wait),
        1 => (0..70u64).prop_map(|seconds| Step::Wait(seconds * SECOND)),
        2 => (0..2usize).prop_map(Step::Sweep),
        1 => (0..2usize).prop_map(Step::Clear),
        1 => (0..2usize).prop_map(Step::Reconnect),
    ]
}

proptest! {
    // Goal: XSA-371 and the budget, on every path: never over the ring's or the host's limit, what is leased is mapped, and after
    // the end nothing is mapped and nothing reserved.
    // Method: two rings on one budget go through random requests, releases, time, sweeps, disconnects with leases still out; after each
    // step the fake's table, the cache's counts and the budget are compared.
    #[test]
    fn xsa_371_nothing_leaks_on_any_path(steps in prop::collection::vec(step(), 1..120)) {
        const RING: usize = 32;
        let budget = Budget::new(48, 9);
        let mut bad_seen = false;
        let mut mapper = FakeMapper::default();
        let mut rings = [Cache::new(1, RING, budget.clone()), Cache::new(2, RING, budget.clone())];
        let mut held: Vec<(Vec<Gref>, Vec<Lease<FakePages>>)> = Vec::new();
        let mut now = 0;
        for step in steps {
            match step {
                Step::Lease { ring, grefs } => {
                    let before = mapper.0.attempts.get();
                    bad_seen |= grefs.iter().any(|&gref| gref >= BAD);
                    match lease(&mut rings[ring], &mut mapper, &grefs, now) {
                        Ok(leases) => {
                            prop_assert_eq!(leases.len(), grefs.len());
                            held.push((grefs, leases));
                        }
                        Err(NotMapped::Size) => prop_assert!(grefs.is_empty()),
                        Err(NotMapped::Refused) => prop_assert!(bad_seen),
                        Err(_) => prop_assert_eq!(mapper.0.attempts.get(), before, "no room, no attempt"),
                    }
                }
                Step::Release(which) if !held.is_empty() => drop(held.swap_remove(which % held.len())),
                Step::Release(_) => {}
                Step::Wait(time) => now += time,
                Step::Sweep(ring) => drop(rings[ring].sweep(now)),
                Step::Clear(ring) => rings[ring].clear(),
                Step::Reconnect(ring) => rings[ring] = Cache::new(ring as Domid + 1, RING, budget.clone()),
            }
            let mapped: usize = mapper.0.pages.borrow().values().sum();
            prop_assert_eq!((mapped, mapper.0.mappings.get()), (budget.pages(), budget.mappings()));
            prop_assert!(mapped <= 48 && mapper.0.mappings.get() <= 9);
            for ring in &rings {
                prop_assert!(ring.pages() <= RING);
                let pages: usize = ring.entries.iter().map(|(_, entry)| entry.grefs.len()).sum();
                prop_assert_eq!((ring.pages(), ring.places.len()), (pages, pages));
                prop_assert!(ring.gathered.iter().all(|gref| !ring.places.contains_key(gref)));
                prop_assert!(ring.gathered.len() < ring.bundle);
            }
            for (grefs, leases) in &held {
                for (gref, lease) in grefs.iter().zip(leases) {
                    prop_assert_eq!(lease.mapped().grefs[lease.page()], *gref);
                    prop_assert!(mapper.0.pages.borrow().contains_key(gref));
                }
            }
        }
        drop(held);
        drop(rings);
        prop_assert_eq!((mapper.0.mappings.get(), budget.pages(), budget.mappings()), (0, 0, 0));
    }
}
