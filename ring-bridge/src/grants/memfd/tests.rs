//! Clients in the place of domains, through the interface that a shard uses.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use proptest::prelude::*;

use super::*;
use crate::grants::Domains;
use crate::memory::{MemoryError, RingMemory, SharedRegion};

/// A shard's side with one client: domain 7 with `pages` pages and `channels` event channels.
struct Pair {
    domains: Domains,
    /// The client's view of its memory.
    memory: SharedRegion,
    /// The client's memory.
    file: OwnedFd,
    channels: Vec<ClientChannel>,
    permissions: Arc<Permissions>,
}

fn pair(pages: u32, channels: usize) -> Pair {
    let mut domains = Domains::open_memfd().expect("descriptors");
    let file = make_client_memory(pages).expect("memory");
    let memory = SharedRegion::map(&file, pages as usize * PAGE_BYTES).expect("map");
    let permissions = Permissions::new(pages).expect("map");
    let theirs = file.try_clone().expect("dup");
    let admitted = ClientMemory::admit(theirs, CLIENT_BYTES_DEFAULT).expect("fit");
    let admitted = admitted.with_permissions(permissions.clone());
    let (ours, channels) = (0..channels).map(|_| channel().expect("descriptors")).unzip();
    domains.clients().expect("memfd").add(7, admitted, ours).expect("free");
    Pair { domains, memory, file, channels, permissions }
}

fn segment(gref: Gref, offset: u16, local: &mut [u8], direction: Direction) -> GrantCopy {
    let len = local.len() as u16;
    let local = NonNull::new(local.as_mut_ptr()).expect("a slice");
    // SAFETY: the slices of these tests live until the copy has been made and are not looked at meanwhile.
    unsafe { GrantCopy::new(7, gref, offset, len, direction, local) }
}

/// Which notifications a client sees.
fn is_called(channel: &ClientChannel) -> bool {
    let mut events = [EpollEvent::empty()];
    let set = Epoll(channel.call.try_clone().expect("dup"));
    set.wait(&mut events, EpollTimeout::ZERO).expect("wait") == 1
}

fn kick(channel: &ClientChannel) {
    assert_eq!(nix::unistd::write(&channel.kick, &1u64.to_ne_bytes()), Ok(8));
}

fn drained(domains: &mut Domains) -> Vec<u64> {
    let mut events = Vec::new();
    while domains.drain(&mut events) {}
    let mut tokens: Vec<u64> = events.iter().map(|event| event.token).collect();
    tokens.sort_unstable();
    tokens
}

// Goal: one call moves many segments both ways, each at its place, and reports each by itself.
// Method: two pages in, two out, between them bad domains, pages and permissions; bytes compared on the client's side.
#[test]
fn many_segments_in_one_call_each_with_its_status() {
    let mut pair = pair(8, 0);
    pair.memory.copy_in(3 * PAGE_BYTES + 100, b"written by the client").expect("inside");
    pair.permissions.set(4, Some(Protection::ReadOnly));
    pair.permissions.set(5, None);
    let (mut a, mut b) = (vec![0; 21], b"from the server".to_vec());
    let mut scratch = [[9u8; 16]; 5];
    let [s0, s1, s2, s3, s4] = &mut scratch;
    let mut batch = vec![
        segment(3, 100, &mut a, Direction::FromDomain),
        segment(8, 0, s0, Direction::FromDomain),
        segment(4, 0, s1, Direction::ToDomain),
        segment(4, 0, s2, Direction::FromDomain),
        segment(5, 0, s3, Direction::FromDomain),
        segment(6, 4090, s4, Direction::ToDomain),
        segment(2, 4081, &mut b, Direction::ToDomain),
    ];
    assert_eq!(pair.domains.copy(&mut batch), 7);
    let failed = CopyStatus::Failed;
    let statuses: Vec<CopyStatus> = batch.iter().map(GrantCopy::status).collect();
    let expected = [
        CopyStatus::Done,
        failed(GrantFault::BadGref),
        failed(GrantFault::Permission),
        CopyStatus::Done,
        failed(GrantFault::BadGref),
        failed(GrantFault::BadRange),
        CopyStatus::Done,
    ];
    assert_eq!(statuses, expected);
    drop(batch);
    assert_eq!(a, b"written by the client");
    assert_eq!((scratch[0], scratch[2], scratch[3]), ([9; 16], [0; 16], [9; 16]));
    let mut seen = [0; 15];
    pair.memory.copy_out(2 * PAGE_BYTES + 4081, &mut seen).expect("inside");
    assert_eq!(&seen, b"from the server");
    let counts = pair.domains.accounts().counts();
    assert_eq!((counts.copy_calls, counts.copy_segments, counts.copy_failures), (1, 7, 4));
    // A domain that does not exist.
    let mut byte = [0u8];
    let local = NonNull::new(byte.as_mut_ptr()).expect("a slice");
    // SAFETY: the byte is there until the end of the test.
    let mut other = [unsafe { GrantCopy::new(8, 0, 0, 1, Direction::FromDomain, local) }];
    pair.domains.copy(&mut other);
    assert_eq!(other[0].status(), failed(GrantFault::BadDomain));
}

proptest! {
    // Goal: whatever numbers a guest puts into segments: a status, the right one, and bytes move only if it says so.
    // Method: random segments in one call against a model of the memory and the permissions.
    #[test]
    fn hostile_segments_have_an_exact_status(
        segments in prop::collection::vec((hostile_gref(), 0..4200u16, 0..4200u16, any::<bool>()), 1..40),
    ) {
        const PAGES: u32 = 6;
        let mut pair = pair(PAGES, 0);
        pair.permissions.set(2, Some(Protection::ReadOnly));
        pair.permissions.set(3, None);
        let mut model = vec![0u8; PAGES as usize * PAGE_BYTES];
        let mut locals: Vec<Vec<u8>> = (0..segments.len()).map(|i| vec![i as u8 + 1; 4200]).collect();
        let mut batch: Vec<GrantCopy> = segments
            .iter()
            .zip(&mut locals)
            .map(|(&(gref, offset, len, to_domain), local)| {
                let direction = if to_domain { Direction::ToDomain } else { Direction::FromDomain };
                segment(gref, offset, &mut local[..usize::from(len)], direction)
            })
            .collect();
        prop_assert_eq!(pair.domains.copy(&mut batch), segments.len());
        let statuses: Vec<CopyStatus> = batch.iter().map(GrantCopy::status).collect();
        drop(batch);
        for (i, (&(gref, offset, len, to_domain), local)) in segments.iter().zip(&locals).enumerate() {
            let (offset, len) = (usize::from(offset), usize::from(len));
            let expected = if len == 0 || offset + len > PAGE_BYTES {
                CopyStatus::Failed(GrantFault::BadRange)
            } else if gref >= PAGES || gref == 3 {
                CopyStatus::Failed(GrantFault::BadGref)
            } else if gref == 2 && to_domain {
                CopyStatus::Failed(GrantFault::Permission)
            } else {
                CopyStatus::Done
            };
            prop_assert_eq!(statuses[i], expected);
            let mut own = vec![i as u8 + 1; 4200];
            if expected == CopyStatus::Done {
                let at = gref as usize * PAGE_BYTES + offset;
                if to_domain {
                    model[at..at + len].copy_from_slice(&own[..len]);
                } else {
                    own[..len].copy_from_slice(&model[at..at + len]);
                }
            }
            prop_assert_eq!(local, &own);
        }
        let mut seen = vec![0; model.len()];
        pair.memory.copy_out(0, &mut seen).expect("inside");
        prop_assert_eq!(seen, model);
    }
}

fn hostile_gref() -> impl Strategy<Value = Gref> {
    prop_oneof![8 => 0..8u32, 1 => any::<u32>(), 1 => Just(u32::MAX)]
}

// Goal: a call is bounded, whatever it is given, and the rest is done by the next ones.
#[test]
fn a_call_is_sliced() {
    let mut pair = pair(4, 0);
    pair.domains.set_copy_segments_max(10);
    let mut local = [0u8; 8];
    let mut batch: Vec<GrantCopy> =
        (0..25).map(|_| segment(0, 0, &mut local, Direction::FromDomain)).collect();
    let mut done = 0;
    for expected in [10, 10, 5, 0] {
        let now = pair.domains.copy(&mut batch[done..]);
        assert_eq!(now, expected);
        done += now;
        let pending = batch.iter().filter(|copy| copy.status() == CopyStatus::Pending).count();
        assert_eq!(pending, 25 - done);
    }
}

// Goal: mapped pages are the client's, in the order asked for, and refuse what is outside, withheld or read-only.
// Method: grefs forwards, backwards and twice; stores from both sides; errors by kind.
#[test]
fn pages_are_mapped_in_order() {
    let mut pair = pair(32, 0);
    let grefs = [9, 10, 3, 2, 1, 3, 31];
    let pages = pair.domains.map_ring(7, &grefs).expect("granted");
    for (page, &gref) in grefs.iter().enumerate() {
        let tag = [gref as u8 + 100; 4];
        pair.memory.copy_in(gref as usize * PAGE_BYTES + 5, &tag).expect("inside");
        let mut seen = [0; 4];
        pages.copy_out(page * PAGE_BYTES + 5, &mut seen).expect("inside");
        assert_eq!(seen, tag);
    }
    pages.store(2 * PAGE_BYTES + 8, 0x0102_0304).expect("a word");
    let mut seen = [0; 4];
    pair.memory.copy_out(3 * PAGE_BYTES + 8, &mut seen).expect("inside");
    assert_eq!(u32::from_ne_bytes(seen), 0x0102_0304);
    assert_eq!(pages.load(5 * PAGE_BYTES + 8), Ok(0x0102_0304), "mapped twice");
    for (offset, len) in [(7 * PAGE_BYTES, 1), (7 * PAGE_BYTES - 1, 2), (usize::MAX, 2)] {
        assert!(pages.copy_out(offset, &mut vec![0; len]).is_err());
        assert!(pages.copy_in(offset, &vec![0; len]).is_err());
    }
    assert!(pages.load(2).is_err() && pages.load(7 * PAGE_BYTES - 2).is_err());
    let bad = |pair: &mut Pair, grefs: &[Gref]| pair.domains.map(7, grefs, Protection::ReadWrite).err();
    pair.permissions.set(12, Some(Protection::ReadOnly));
    let refused = |first, count| Some(GrantError::Map { domid: 7, first, count, errno: Errno::EINVAL });
    assert_eq!(bad(&mut pair, &[1, 32]), refused(32, 2));
    assert_eq!(bad(&mut pair, &[12]), refused(12, 1));
    assert_eq!(bad(&mut pair, &[u32::MAX, 1]), refused(u32::MAX, 2));
    assert_eq!(bad(&mut pair, &[]), Some(GrantError::PageCount { found: 0, max: 256 }));
    assert!(matches!(bad(&mut pair, &[1; 257]), Some(GrantError::PageCount { .. })));
    assert!(pair.domains.map_ring(7, &[1; 17]).is_err());
    assert!(pair.domains.map(6, &[1], Protection::ReadOnly).is_err());
    let read_only = pair.domains.map(7, &[12, 1], Protection::ReadOnly).expect("for reading");
    assert!(read_only.copy_in(0, &[1]).is_err() && read_only.store(0, 1).is_err(), "an error, not a signal");
    read_only.copy_out(0, &mut [0; 8192]).expect("inside");
}

// Goal: without permissions all pages are granted, and not one more: the page behind the end would be a signal.
#[test]
fn the_end_of_the_memory_is_the_last_gref() {
    let mut domains = Domains::open_memfd().expect("descriptors");
    let memory = ClientMemory::admit(make_client_memory(4).expect("memory"), 1 << 20).expect("fit");
    assert_eq!(memory.pages(), 4);
    domains
        .clients()
        .expect("memfd")
        .add(7, memory, Vec::<std::sync::Arc<crate::grants::memfd::Channel>>::new())
        .expect("free");
    let second = ClientMemory::admit(make_client_memory(1).expect("memory"), 1 << 20).expect("fit");
    let taken = domains.clients().expect("memfd").add(
        7,
        second,
        Vec::<std::sync::Arc<crate::grants::memfd::Channel>>::new(),
    );
    assert_eq!(taken, Err(MemoryRefused::DomainInUse { domid: 7 }));
    let mut locals = [[0u8; 8]; 2];
    let [first, second] = &mut locals;
    let mut batch =
        [segment(3, 4088, first, Direction::ToDomain), segment(4, 0, second, Direction::FromDomain)];
    domains.copy(&mut batch);
    assert_eq!(batch.map(|copy| copy.status()), [CopyStatus::Done, CopyStatus::Failed(GrantFault::BadGref)]);
    assert!(domains.map(7, &[3], Protection::ReadWrite).is_ok());
    assert!(domains.map(7, &[3, 4], Protection::ReadOnly).is_err());
}

// Goal: nothing leaks: a thousand clients that connect, map, bind, talk and go leave no mapping, port or descriptor.
// Method: the accounts, the process's memory areas of memfds and its descriptors before and after; half of the clients are removed
// with everything still mapped and bound.
#[test]
fn xsa_371_a_thousand_connects_leave_nothing() {
    let mut domains = Domains::open_memfd().expect("descriptors");
    let before = domains.accounts().counts();
    for round in 0..1000u32 {
        let file = make_client_memory(20).expect("memory");
        let memory = ClientMemory::admit(file, CLIENT_BYTES_DEFAULT).expect("fit");
        let (ours, theirs) = channel().expect("descriptors");
        domains.clients().expect("memfd").add(1, memory, vec![ours]).expect("free");
        let ring = domains.map_ring(1, &[0, 1, 5, 4]).expect("granted");
        let data = domains.map(1, &[7, 9], Protection::ReadOnly).expect("granted");
        let port = domains.bind(1, 0, u64::from(round)).expect("free");
        assert_eq!(
            domains.bind(1, 0, 0).err(),
            Some(GrantError::Bind { domid: 1, remote: 0, errno: Errno::EINVAL })
        );
        assert!(domains.bind(1, 1, 0).is_err() && domains.bind(2, 0, 0).is_err());
        kick(&theirs);
        domains.notify(port);
        assert!(is_called(&theirs));
        let counts = domains.accounts().counts();
        assert_eq!((counts.mappings, counts.pages, counts.ports), (2, 6, 1));
        if round % 2 == 0 {
            domains.unbind(port);
            drop((ring, data));
        }
        domains.clients().expect("memfd").remove(1);
        assert_eq!(drained(&mut domains), [0u64; 0], "nobody's events are reported");
    }
    let after = domains.accounts().counts();
    assert_eq!((after.mappings, after.pages, after.ports), (before.mappings, before.pages, before.ports));
    assert_eq!((after.maps, after.unmap_failures), (2000, 0));
    // Other tests of this process have a few of their own.
    let areas = std::fs::read_to_string("/proc/self/maps").expect("proc");
    assert!(areas.matches("memfd:blktapd-client").count() < 300);
    assert!(std::fs::read_dir("/proc/self/fd").expect("proc").count() < 500);
}

// Goal: events arrive once, with the owner's token; a fresh port is pending; a held port is silent and loses nothing.
// Method: kicks on three channels in several orders.
#[test]
fn events_arrive_with_their_tokens() {
    let mut pair = pair(1, 3);
    let ports: Vec<Port> =
        (0..3).map(|i| pair.domains.bind(7, i, 10 + u64::from(i)).expect("free")).collect();
    assert_eq!(drained(&mut pair.domains), [10, 11, 12], "pending since they were bound");
    assert_eq!(drained(&mut pair.domains), [0u64; 0]);
    kick(&pair.channels[2]);
    kick(&pair.channels[0]);
    kick(&pair.channels[0]);
    assert_eq!(drained(&mut pair.domains), [10, 12], "two kicks before the drain are one event");
    pair.domains.unmask(&ports);
    assert_eq!(drained(&mut pair.domains), [0u64; 0], "an unmask makes no event");
    pair.domains.hold(ports[1]);
    kick(&pair.channels[1]);
    kick(&pair.channels[2]);
    assert_eq!(drained(&mut pair.domains), [12], "the held one is silent");
    pair.domains.unmask(&ports);
    assert_eq!(drained(&mut pair.domains), [11], "and says then what it had to say");
    assert_eq!(pair.channels.iter().map(is_called).collect::<Vec<_>>(), [false; 3]);
    pair.domains.notify(ports[1]);
    pair.domains.notify(ports[1]);
    pair.domains.notify(9999);
    assert_eq!(pair.channels.iter().map(is_called).collect::<Vec<_>>(), [false, true, false]);
    assert!(!is_called(&pair.channels[1]), "taken once");
    pair.domains.notify(ports[1]);
    assert!(is_called(&pair.channels[1]), "and again");
}

// Goal: XSA-331: what is unbound is not reported, also if its event was there before, and its number is nobody else's.
#[test]
fn xsa_331_events_of_unbound_ports_are_ignored() {
    let mut pair = pair(1, 1);
    let port = pair.domains.bind(7, 0, 1).expect("free");
    kick(&pair.channels[0]);
    pair.domains.unbind(port);
    pair.domains.unbind(port);
    assert_eq!(drained(&mut pair.domains), [0u64; 0]);
    let again = pair.domains.bind(7, 0, 2).expect("free again");
    assert_ne!(again, port);
    assert_eq!(drained(&mut pair.domains).into_iter().collect::<HashSet<_>>(), HashSet::from([2]));
    assert_eq!(pair.domains.accounts().counts().ports, 1);
}

// Goal: XSA-332: a client that notifies without end causes no more events than the damper lets through.
// Method: a thread kicks all the time; the shard's loop drains, handles and holds or unmasks, in virtual time of 10 us per turn.
#[test]
fn xsa_332_a_storm_of_kicks_is_damped() {
    use crate::grants::storm::{Damper, Unmask};
    let mut pair = pair(1, 1);
    let port = pair.domains.bind(7, 0, 1).expect("free");
    let stop = AtomicBool::new(false);
    let theirs = pair.channels.remove(0);
    let mut handled = 0u64;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                kick(&theirs);
            }
        });
        let (mut damper, mut unmask_at) = (Damper::default(), 0);
        for turn in 0..20_000u64 {
            let now = turn * 10_000;
            if unmask_at > 0 && now >= unmask_at {
                unmask_at = 0;
                pair.domains.unmask(&[port]);
            }
            for _ in drained(&mut pair.domains) {
                handled += 1;
                if let Unmask::After(delay) = damper.handled(false) {
                    pair.domains.hold(port);
                    unmask_at = now + delay;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    // 200 ms of virtual time: the free ones, the steps, one in 10 ms.
    assert!((1..=40).contains(&handled), "{handled} events");
}

// Goal: a client that tries to make our calls wait cannot: a full counter and a descriptor made blocking are its own trouble.
// Method: the client fills the kick's counter and takes O_NONBLOCK off both descriptors; then we bind, drain and notify.
#[test]
fn a_client_cannot_block_us() {
    let mut pair = pair(1, 1);
    let theirs = &pair.channels[0];
    nix::unistd::write(&theirs.kick, &(u64::MAX - 1).to_ne_bytes()).expect("the largest value");
    for fd in [&theirs.kick, &theirs.call] {
        fcntl(fd, FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).expect("its own descriptor");
    }
    let port = pair.domains.bind(7, 0, 1).expect("free");
    assert!(drained(&mut pair.domains).contains(&1));
    for _ in 0..1000 {
        pair.domains.notify(port);
        assert!(is_called(&pair.channels[0]));
    }
    pair.domains.hold(port);
    pair.domains.unmask(&[port]);
    assert_eq!(drained(&mut pair.domains), [1], "a counter that is not zero is an event after a hold");
    assert_eq!(pair.domains.accounts().counts().notify_failures, 0);
}

// Goal: only memory is admitted that its owner cannot use to kill or starve us, and the refusal says what to do.
// Method: memory with one fault each.
#[test]
fn unfit_memory_is_refused() {
    let admit = |file: OwnedFd| ClientMemory::admit(file, 1 << 20).map(|memory| memory.pages());
    let make = |flags: MFdFlags, bytes: i64, seal: bool| {
        let file = memfd_create(c"unfit", flags | MFdFlags::MFD_CLOEXEC).expect("memfd");
        ftruncate(&file, bytes).expect("size");
        if seal {
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("seal");
        }
        file
    };
    assert_eq!(admit(make_client_memory(3).expect("memory")), Ok(3));
    let seals = MFdFlags::MFD_ALLOW_SEALING;
    let unsealed = admit(make(seals, 4096, false)).expect_err("unsealed");
    assert_eq!(unsealed, MemoryRefused::Memory(MemoryError::NotSealed { found: 0 }));
    let hole = make(seals, 8192, true);
    fallocate(&hole, FallocateFlags::empty(), 0, 4096).expect("half of it");
    let refused = admit(hole).expect_err("a hole");
    assert_eq!(refused, MemoryRefused::Holes { found: 4096, expected: 8192 });
    assert!(refused.to_string().contains("fallocate"));
    for bytes in [0, 1, 4095, 4097, (1 << 20) + 4096, 1 << 44] {
        assert!(matches!(admit(make(seals, bytes, true)), Err(MemoryRefused::Size { .. })), "{bytes}");
    }
    let file = OwnedFd::from(std::fs::File::open("/proc/self/exe").expect("own program"));
    assert_eq!(admit(file).expect_err("a file"), MemoryRefused::Memory(MemoryError::NoMemfd));
    if let Ok(huge) = memfd_create(c"huge", seals | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_CLOEXEC) {
        ftruncate(&huge, 2 << 20).expect("size");
        fcntl(&huge, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("seal");
        assert_eq!(ClientMemory::admit(huge, 1 << 30).map(|_| ()), Err(MemoryRefused::HugePages));
    }
}

// Goal: what a client does to its memory while we use it does not kill us: truncation is impossible, a punched hole reads as zeroes.
// Method: a thread that truncates and punches without end, while pages are copied and mapped pages are touched.
#[test]
fn truncation_and_holes_do_not_kill() {
    let mut pair = pair(16, 0);
    let mapped = pair.domains.map(7, &[0, 1, 2, 3, 4, 5, 6, 7], Protection::ReadWrite).expect("granted");
    pair.memory.copy_in(0, &[7; 16 * PAGE_BYTES]).expect("inside");
    let stop = AtomicBool::new(false);
    let (file, domains) = (&pair.file, &mut pair.domains);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            while !stop.load(Ordering::Relaxed) {
                for len in [0, 1, 4096, 5000] {
                    assert_eq!(ftruncate(file, len), Err(Errno::EPERM));
                }
                fallocate(file, punch, 0, 16 * PAGE_BYTES as i64).expect("holes");
            }
        });
        let mut local = vec![0u8; PAGE_BYTES];
        for round in 0..3000u32 {
            let direction = if round % 2 == 0 { Direction::FromDomain } else { Direction::ToDomain };
            local.fill(7);
            let mut batch = [segment(round % 16, 0, &mut local, direction)];
            assert_eq!(domains.copy(&mut batch), 1);
            assert_eq!(batch[0].status(), CopyStatus::Done);
            assert!(local.iter().all(|&byte| byte == 0 || byte == 7));
            mapped.copy_in(round as usize % 8 * PAGE_BYTES, &local).expect("inside");
            mapped.copy_out(round as usize % 8 * PAGE_BYTES, &mut local).expect("inside");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

// Goal: a persistent cache over real memory leases pages whose addresses hold the client's bytes.
#[test]
fn leases_lead_to_the_clients_bytes() {
    use crate::grants::budget::Budget;
    use crate::grants::persistent::Cache;
    let mut pair = pair(64, 0);
    let budget = Budget::of_host(100);
    let mut cache = Cache::new(7, 10, budget.clone());
    let mut leases = Vec::new();
    cache.lease(&mut pair.domains, &[5, 6, 2], 0, &mut leases).expect("room");
    cache.lease(&mut pair.domains, &[6, 9], 0, &mut leases).expect("room");
    for (lease, gref) in leases.iter().zip([5usize, 6, 2, 6, 9]) {
        pair.memory.copy_in(gref * PAGE_BYTES, &[gref as u8]).expect("inside");
        let mut seen = [0];
        lease.mapped().copy_out(lease.page() * PAGE_BYTES, &mut seen).expect("inside");
        assert_eq!(seen, [gref as u8]);
        assert_eq!(lease.address() % PAGE_BYTES, 0);
        assert_eq!(lease.address(), lease.mapped().address() + lease.page() * PAGE_BYTES);
    }
    drop(cache);
    assert_eq!(pair.domains.accounts().counts().pages, 4, "leased pages outlive the cache");
    drop(leases);
    let counts = pair.domains.accounts().counts();
    assert_eq!((counts.pages, counts.mappings, budget.pages()), (0, 0, 0));
}
