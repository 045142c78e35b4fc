//! The real devices: to be run in dom0 of a Xen host, where a domain may grant pages and offer ports to itself.
//!
//! `cargo test -p ring-bridge --no-run` makes the program; in dom0, with the modules xen-gntdev, xen-gntalloc and xen-evtchn:
//! `PROGRAM xen_selftest --ignored --nocapture --test-threads=1`. With BLKTAPD_TEST_DISK=/dev/... (its first 64 KiB are
//! overwritten) zero-copy I/O on mapped pages is tried as well.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::stat::Mode;

use super::budget::Budget;
use super::evtchn::EvtChn;
use super::persistent::{Cache, NotMapped, RETRY};
use super::*;
use crate::memory::RingMemory;

/// ALLOC_GREF of xen/gntalloc.h: `{ domid u16 @0, flags u16 @2, count u32 @4, index u64 @8 (answer), grefs u32[] @16 (answer) }`; the
/// header's type has one gref and 24 bytes.
#[repr(C)]
struct AllocGref<const N: usize> {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    grefs: [u32; N],
}

/// DEALLOC_GREF: `{ index u64 @0, count u32 @8 }`, 16 bytes.
#[repr(C)]
struct DeallocGref {
    index: u64,
    count: u32,
}

const ALLOC_GREF: libc::Ioctl = ((size_of::<AllocGref<1>>() << 16) | 0x4705) as libc::Ioctl;
const DEALLOC_GREF: libc::Ioctl = ((size_of::<DeallocGref>() << 16) | 0x4706) as libc::Ioctl;

/// Pages that dom0 grants to itself: the frontend's side.
struct Granted {
    file: Arc<OwnedFd>,
    index: u64,
    grefs: Vec<Gref>,
    pages: Pages,
}

fn grant(file: &Arc<OwnedFd>, writable: bool) -> Granted {
    const COUNT: usize = 16;
    let flags = u16::from(writable);
    let mut call = AllocGref::<COUNT> { domid: 0, flags, count: COUNT as u32, index: 0, grefs: [0; COUNT] };
    // SAFETY: ALLOC_GREF writes the head and `count` grefs of a structure that is ours.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), ALLOC_GREF, &raw mut call) };
    Errno::result(result).expect("granted");
    let bytes = NonZeroUsize::new(COUNT * PAGE_BYTES).expect("not zero");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start =
        unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, file.as_ref(), call.index as i64) };
    let start = start.expect("mapped").cast();
    let accounts = Arc::new(Accounts::default());
    // SAFETY: mapped just now; `Source::File` means that nothing is to be told after munmap.
    let pages = unsafe {
        Pages::from_mapping(start, COUNT, Protection::ReadWrite, super::pages::Source::File, accounts)
    }
    .expect("pages");
    Granted { file: file.clone(), index: call.index, grefs: call.grefs.to_vec(), pages }
}

impl Granted {
    /// Ends the grants.
    fn revoke(self) -> Result<(), Errno> {
        let mut call = DeallocGref { index: self.index, count: self.grefs.len() as u32 };
        drop(self.pages);
        // SAFETY: DEALLOC_GREF reads a structure that is ours.
        Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), DEALLOC_GREF, &raw mut call) }).map(drop)
    }
}

fn gntalloc() -> Arc<OwnedFd> {
    Arc::new(
        open("/dev/xen/gntalloc", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).expect("xen-gntalloc"),
    )
}

fn is_ready(domains: &Domains) -> bool {
    let mut fds = [PollFd::new(domains.event_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(200u8)).expect("poll") == 1
}

/// A page-aligned buffer.
fn buffer(pages: usize) -> &'static mut [u8] {
    let layout = std::alloc::Layout::from_size_align(pages * PAGE_BYTES, PAGE_BYTES).expect("a layout");
    // SAFETY: the layout is not empty; the memory is zeroed, and never freed.
    unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc_zeroed(layout), pages * PAGE_BYTES) }
}

fn segment(gref: Gref, offset: u16, local: &mut [u8], direction: Direction) -> GrantCopy {
    let len = local.len() as u16;
    let local = NonNull::new(local.as_mut_ptr()).expect("a slice");
    // SAFETY: the buffers of these tests are never freed, and not looked at during a copy.
    unsafe { GrantCopy::new(0, gref, offset, len, direction, local) }
}

// Goal: a ring of 16 pages of another side is one piece here, in order, and both sides see each other's bytes and words.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_ring_pages() {
    let mut domains = Domains::open_xen().expect("Xen");
    let granted = grant(&gntalloc(), true);
    let order: Vec<Gref> = granted.grefs.iter().rev().copied().collect();
    let ring = domains.map_ring(0, &order).expect("mapped");
    for page in 0..16usize {
        granted.pages.copy_in((15 - page) * PAGE_BYTES + 17, &[page as u8; 9]).expect("inside");
        let mut seen = [0; 9];
        ring.copy_out(page * PAGE_BYTES + 17, &mut seen).expect("inside");
        assert_eq!(seen, [page as u8; 9], "page {page}");
        ring.store(page * PAGE_BYTES + 4, page as u32 + 1).expect("a word");
        assert_eq!(granted.pages.load((15 - page) * PAGE_BYTES + 4), Ok(page as u32 + 1));
    }
    println!("map_ring: {:?}", domains.accounts().counts());
    drop(domains);
    ring.copy_in(0, b"the mapping holds the device").expect("inside");
    drop(ring);
    granted.revoke().expect("revoked");
}

// Goal: many segments of one call, good and bad, both ways, each with its status.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_copy() {
    let mut domains = Domains::open_xen().expect("Xen");
    let (writable, read_only) = (grant(&gntalloc(), true), grant(&gntalloc(), false));
    for page in 0..16usize {
        writable.pages.copy_in(page * PAGE_BYTES, &[page as u8 + 1; PAGE_BYTES]).expect("inside");
    }
    let (local, other) = (buffer(16), buffer(2));
    let mut batch: Vec<GrantCopy> = local
        .chunks_mut(PAGE_BYTES)
        .zip(&writable.grefs)
        .map(|(local, &gref)| segment(gref, 0, local, Direction::FromDomain))
        .collect();
    let bad = [
        segment(0x00ff_ffff, 0, &mut other[..8], Direction::FromDomain),
        segment(read_only.grefs[0], 0, &mut other[8..16], Direction::ToDomain),
    ];
    batch.splice(5..5, bad);
    let local_end = NonNull::new(other[16..].as_mut_ptr()).expect("a slice");
    // SAFETY: never freed.
    batch.push(unsafe { GrantCopy::new(0x7fee, 1, 0, 8, Direction::FromDomain, local_end) });
    // A buffer that crosses a page.
    batch.push(segment(
        read_only.grefs[1],
        100,
        &mut other[PAGE_BYTES - 50..PAGE_BYTES + 50],
        Direction::FromDomain,
    ));
    read_only.pages.copy_in(PAGE_BYTES + 100, &[0xaa; 100]).expect("inside");
    let total = batch.len();
    assert_eq!(domains.copy(&mut batch), total);
    for (i, copy) in batch.iter().enumerate() {
        println!("copy {i}: {:?}", copy.status());
        let expect_done = !matches!(i, 5 | 6) && i != total - 2;
        assert_eq!(copy.status() == CopyStatus::Done, expect_done, "segment {i}");
    }
    drop(batch);
    for (page, bytes) in local.chunks(PAGE_BYTES).enumerate() {
        assert!(bytes.iter().all(|&byte| byte == page as u8 + 1), "page {page}");
    }
    assert_eq!(&other[PAGE_BYTES - 50..PAGE_BYTES + 50], &[0xaa; 100]);
    // To the domain, at odd offsets.
    let mut back = [segment(writable.grefs[3], 1001, &mut local[..77], Direction::ToDomain)];
    domains.copy(&mut back);
    assert_eq!(back[0].status(), CopyStatus::Done);
    let mut seen = [0; 77];
    writable.pages.copy_out(3 * PAGE_BYTES + 1001, &mut seen).expect("inside");
    assert_eq!(seen, [1; 77]);
    println!("copy: {:?}", domains.accounts().counts());
    writable.revoke().expect("revoked");
    read_only.revoke().expect("revoked");
}

// Goal: a refused mapping is an error with the kernel's reason, and leaves no record; a grant for reading maps for reading.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_refused_mappings() {
    let mut domains = Domains::open_xen().expect("Xen");
    let read_only = grant(&gntalloc(), false);
    let bad = [read_only.grefs[0], 0x00ff_ffff, read_only.grefs[1]];
    println!("a bad gref: {}", domains.map(0, &bad, Protection::ReadOnly).expect_err("refused"));
    println!("no such domain: {}", domains.map(0x7fee, &[1], Protection::ReadOnly).expect_err("refused"));
    match domains.map(0, &read_only.grefs, Protection::ReadWrite) {
        Err(error) => println!("read-only, mapped for writing: {error}"),
        Ok(_) => panic!("a grant for reading was mapped for writing"),
    }
    for _ in 0..500 {
        assert!(domains.map(0, &bad, Protection::ReadOnly).is_err());
    }
    let pages = domains.map(0, &read_only.grefs, Protection::ReadOnly).expect("for reading");
    read_only.pages.copy_in(5, b"xyz").expect("inside");
    let mut seen = [0; 3];
    pages.copy_out(5, &mut seen).expect("inside");
    assert_eq!(&seen, b"xyz");
    let counts = domains.accounts().counts();
    assert_eq!((counts.mappings, counts.map_failures, counts.unmap_failures), (1, 503, 0));
    drop(pages);
    read_only.revoke().expect("revoked");
}

// Goal: events go both ways between two ends, come masked, and again after the unmask; what is unbound is silent.
// Method: this domain offers a port to itself on another descriptor.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_events() {
    let mut domains = Domains::open_xen().expect("Xen");
    let mut guest = EvtChn::open(Arc::default()).expect("Xen");
    let offered = guest.offer(0, 1).expect("offered");
    let port = domains.bind(0, offered, 42).expect("bound");
    println!("twice: {}", domains.bind(0, offered, 43).expect_err("one other end"));
    println!("none: {}", domains.bind(0, 0x1_0000, 43).expect_err("no such port"));
    let mut events = Vec::new();
    assert!(is_ready(&domains), "pending since it was bound");
    assert!(!domains.drain(&mut events));
    assert_eq!(events, [Event { port, token: 42 }]);
    guest.notify(offered);
    assert!(!is_ready(&domains), "masked");
    domains.unmask(&[port, 9999]);
    assert!(is_ready(&domains), "what came meanwhile is kept");
    events.clear();
    domains.drain(&mut events);
    assert_eq!(events, [Event { port, token: 42 }]);
    domains.unmask(&[port]);
    assert!(!is_ready(&domains));
    domains.notify(port);
    domains.notify(port);
    domains.notify(9999);
    let mut theirs = Vec::new();
    for _ in 0..100 {
        guest.drain(&mut theirs);
        if !theirs.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(theirs, [Event { port: offered, token: 1 }]);
    // XSA-331: the event is in the kernel's list when the port goes.
    guest.notify(offered);
    assert!(is_ready(&domains));
    domains.unbind(port);
    events.clear();
    domains.drain(&mut events);
    assert_eq!(events, []);
    domains.unmask(&[port]);
    // The other end is unbound again and can be bound once more, as after a restart.
    let again = domains.bind(0, offered, 44).expect("bound again");
    assert!(is_ready(&domains));
    domains.drain(&mut events);
    assert_eq!(events, [Event { port: again, token: 44 }]);
    println!("events: {:?}", domains.accounts().counts());
}

// Goal: the persistent cache over real grants: hits, eviction, refusal of bad grefs, nothing left.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_persistent() {
    let mut domains = Domains::open_xen().expect("Xen");
    let granted = grant(&gntalloc(), true);
    let budget = Budget::of_host(12);
    let mut cache = Cache::new(0, 12, budget.clone());
    for round in 0..200u64 {
        let mut leases = Vec::new();
        let first = round as usize % 3;
        cache.lease(&mut domains, &granted.grefs[first..first + 4], 0, &mut leases).expect("room");
        for (i, lease) in leases.iter().enumerate() {
            granted.pages.copy_in((first + i) * PAGE_BYTES, &[round as u8]).expect("inside");
            let mut seen = [0];
            lease.mapped().copy_out(lease.page() * PAGE_BYTES, &mut seen).expect("inside");
            assert_eq!(seen, [round as u8]);
        }
    }
    assert_eq!((cache.pages(), domains.accounts().counts().maps), (6, 3));
    let refused = cache.lease(&mut domains, &[granted.grefs[0], 0x00ff_ffff], 0, &mut Vec::new());
    assert_eq!(refused, Err(NotMapped::Refused));
    let later = 10 * RETRY;
    let mut leases = Vec::new();
    cache.lease(&mut domains, &granted.grefs[6..16], later, &mut leases).expect("older ones go");
    assert!(cache.counts().evictions > 0);
    drop((cache, leases));
    let counts = domains.accounts().counts();
    println!("persistent: {counts:?}");
    assert_eq!((counts.mappings, budget.pages(), budget.mappings()), (0, 0, 0));
    granted.revoke().expect("revoked");
}

// Goal: a thousand connects leave no mapping, record or port.
// Method: offer, grant, map, bind, notify and drop in changing order; every fourth shard is dropped with all of it; the accounts, the
// process's memory areas, and that the granter can end its grants.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_a_thousand_connects_leave_nothing() {
    let file = gntalloc();
    let granted = grant(&file, true);
    let mut guest = EvtChn::open(Arc::default()).expect("Xen");
    let mut domains = Domains::open_xen().expect("Xen");
    for round in 0..1000u32 {
        let offered = guest.offer(0, 0).expect("offered");
        let ring = domains.map_ring(0, &granted.grefs[..4]).expect("mapped");
        let data = domains.map(0, &granted.grefs[4..], Protection::ReadWrite).expect("mapped");
        let port = domains.bind(0, offered, 7).expect("bound");
        domains.notify(port);
        let accounts = domains.accounts().clone();
        if round % 4 == 0 {
            drop(std::mem::replace(&mut domains, Domains::open_xen().expect("Xen")));
            drop((ring, data));
        } else {
            domains.unbind(port);
            drop((data, ring));
        }
        guest.unbind(offered);
        let counts = accounts.counts();
        assert_eq!((counts.mappings, counts.pages, counts.ports, counts.unmap_failures), (0, 0, 0, 0));
    }
    let areas = std::fs::read_to_string("/proc/self/maps").expect("proc");
    assert!(!areas.contains("gntdev"), "{areas}");
    granted.revoke().expect("nobody has them mapped");
}

// Goal: the kernel reads and writes files straight into mapped pages, by O_DIRECT and io_uring.
#[test]
#[ignore = "needs dom0 of a Xen host and a disk (BLKTAPD_TEST_DISK)"]
fn xen_selftest_zero_copy() {
    use io_uring::{IoUring, opcode, types};
    let Ok(disk) = std::env::var("BLKTAPD_TEST_DISK") else {
        println!("zero copy: not tried, BLKTAPD_TEST_DISK is not set");
        return;
    };
    let flags = OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
    let disk = open(disk.as_str(), flags, Mode::empty()).expect("the disk");
    let mut domains = Domains::open_xen().expect("Xen");
    let granted = grant(&gntalloc(), true);
    let pages = domains.map(0, &granted.grefs, Protection::ReadWrite).expect("mapped");
    let mut ring = IoUring::new(8).expect("io_uring");
    let mut run = |entry: io_uring::squeue::Entry| {
        // SAFETY: the memory of the entry is `pages`, which outlives the operation: it is waited for here.
        unsafe { ring.submission().push(&entry) }.expect("room");
        ring.submit_and_wait(1).expect("submitted");
        ring.completion().next().expect("a completion").result()
    };
    let fd = types::Fd(disk.as_raw_fd());
    for round in 1..20u8 {
        granted.pages.copy_in(0, &[round; 16 * PAGE_BYTES]).expect("inside");
        let address = pages.address() as *mut u8;
        let len = pages.len() as u32;
        assert_eq!(run(opcode::Write::new(fd, address, len).offset(0).build()), len as i32, "written");
        granted.pages.copy_in(0, &[0; 16 * PAGE_BYTES]).expect("inside");
        // Backwards, page by page and from the middle of a page.
        let half = 2048u32;
        assert_eq!(
            run(opcode::Read::new(fd, (pages.address() + 512) as *mut u8, half).offset(0).build()),
            half as i32
        );
        let mut seen = vec![0; PAGE_BYTES];
        granted.pages.copy_out(0, &mut seen).expect("inside");
        assert!(seen[512..2560].iter().all(|&byte| byte == round), "read");
        assert!(seen[..512].iter().chain(&seen[2560..]).all(|&byte| byte == 0));
    }
    println!("zero copy: io_uring with O_DIRECT on mapped pages works");
    drop(pages);
    granted.revoke().expect("revoked");
}

/// "N maptrack frames" of each domain, as the hypervisor prints it; empty without xl.
fn maptrack_frames() -> String {
    let xl = |args: &[&str]| std::process::Command::new("xl").args(args).output();
    let _ = xl(&["debug-keys", "g"]);
    let console = xl(&["dmesg", "-c"]).map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    console.unwrap_or_default().lines().filter(|line| line.contains("maptrack")).collect()
}

// Goal: what a mapped page costs in Xen's table, and what one more mapping costs when there are many: for the budget's default and
// for bundles. Measures and prints; checks only that all of it goes away.
#[test]
#[ignore = "needs dom0 of a Xen host"]
fn xen_selftest_price_of_mappings() {
    let file = gntalloc();
    let granted: Vec<Granted> = (0..32).map(|_| grant(&file, true)).collect();
    let grefs: Vec<Gref> = granted.iter().flat_map(|granted| granted.grefs.iter().copied()).collect();
    let mut domains = Domains::open_xen().expect("Xen");
    println!("before: {}", maptrack_frames());
    for per_mapping in [256, 32, 1] {
        let mut held = Vec::new();
        let start = std::time::Instant::now();
        while held.len() * per_mapping < 8192 {
            let first = held.len() * per_mapping % grefs.len();
            let some = &grefs[first..first + per_mapping];
            held.push(domains.map(0, some, Protection::ReadWrite).expect("mapped"));
            if (held.len() * per_mapping).is_multiple_of(2048) {
                println!("{} pages, {per_mapping} each: {:?}", held.len() * per_mapping, start.elapsed());
            }
        }
        println!("{}", maptrack_frames());
        let start = std::time::Instant::now();
        held.clear();
        println!("unmapped in {:?}", start.elapsed());
    }
    assert_eq!(domains.accounts().counts().pages, 0);
    granted.into_iter().for_each(|granted| granted.revoke().expect("revoked"));
}
