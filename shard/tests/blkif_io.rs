//! Guests' requests from a frontend's ring to a disk and back, on real shards.
//!
//! Goal: what a guest writes it reads again, whatever its layout, number of queues, size of ring, kind of request and way of transfer; each
//! request is answered once, with the right status.
//! Method: the library's frontend over shared memory (it fails at any response that Linux's would not accept) with a random load that
//! compares every byte with a model, one thread for each queue.

mod blkif_rig;

use blkif_rig::load::Load;
use blkif_rig::*;
use ring_bridge::blkif::frontend;
use ring_bridge::blkif::request::{Reason, Status};
use ring_bridge::blkif::wire::{Abi, WireSegment};
use ring_bridge::grants::budget::Budget;
use shard::api::{Backend, Command, Reply};

/// Runs a verified load on every queue of a guest at once, each on its own part of the disk.
fn load_all(guest: &mut Guest, size_bytes: u64, requests: usize, seed: u64, keeps: bool) {
    let kind = guest.kind.clone();
    let part = size_bytes / 512 / kind.queues as u64 / 8 * 8;
    std::thread::scope(|scope| {
        for (number, queue) in guest.queues.iter_mut().enumerate() {
            let kind = &kind;
            scope.spawn(move || {
                let mut load = Load::new(number as u64 * part, part, kind, seed + number as u64);
                if !keeps {
                    load = load.forgetful();
                }
                load.run(queue, requests);
            });
        }
    });
}

fn verified(backend: Backend, size_bytes: u64, kind: Kind, requests: usize, seed: u64) {
    let keeps = !matches!(backend, Backend::Null);
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, backend, size_bytes);
    let mut guest = Guest::new(7, kind.clone());
    let in_use = rig.connect(0, disk, guest.connect()).expect("connected");
    assert_eq!(in_use.limits.sectors, size_bytes / 512);
    assert_eq!(in_use.entries, vec![32 * kind.ring_pages; kind.queues]);
    load_all(&mut guest, size_bytes, requests, seed, keeps);
    let counters = guest.counters.clone();
    let counted: u64 = counters.requests.iter().map(|cell| cell.get()).sum();
    assert_eq!(counted, (requests * kind.queues) as u64);
    assert_eq!((counters.errors.get(), counters.segment_faults.get()), (0, 0));
    match &kind.persistent {
        Some(budget) => assert!(counters.segments_mapped.get() > 0 && budget.pages() > 0),
        None => assert!(counters.segments_copied.get() > 0),
    }
    if kind.segments > 11 {
        assert!(counters.indirect.get() > 0);
    }
    rig.disconnect(0, disk, &guest);
    let counts = rig.grants(0);
    assert_eq!((counts.mappings, counts.pages, counts.ports, counts.unmap_failures), (0, 0, 0, 0));
    assert_eq!((counters.in_flight.get(), counters.rings.get(), counters.persistent_pages.get()), (0, 0, 0));
    if let Some(budget) = kind.persistent {
        assert_eq!((budget.pages(), budget.mappings()), (0, 0));
    }
    rig.remove(0, disk);
    rig.stop();
}

#[test]
fn a_ram_disk_by_both_layouts() {
    for (abi, seed) in [(Abi::X86_64, 1), (Abi::X86_32, 2)] {
        verified(ram(4 << 20), 4 << 20, Kind { abi, ..Kind::default() }, 3000, seed);
    }
}

#[test]
fn a_raw_file_by_both_layouts() {
    for (abi, seed) in [(Abi::X86_64, 3), (Abi::X86_32, 4)] {
        verified(file(4 << 20), 4 << 20, Kind { abi, ..Kind::default() }, 1500, seed);
    }
}

#[test]
fn a_null_disk() {
    verified(Backend::Null, 64 << 20, Kind::default(), 5000, 5);
}

#[test]
fn many_queues_and_large_rings() {
    for (queues, ring_pages, depth, seed) in [(2, 16, 100, 10), (4, 1, 32, 20), (4, 2, 64, 30)] {
        let kind = Kind { queues, ring_pages, depth, ..Kind::default() };
        verified(ram(16 << 20), 16 << 20, kind, 1500, seed);
    }
}

#[test]
fn indirect_segments() {
    let kind = Kind { segments: 256, depth: 12, ..Kind::default() };
    verified(ram(32 << 20), 32 << 20, kind.clone(), 600, 40);
    verified(file(32 << 20), 32 << 20, kind, 200, 41);
}

#[test]
fn persistent_grants() {
    let budget = Budget::new(10_000, 10_000);
    let kind = Kind { segments: 40, persistent: Some(budget), queues: 2, ..Kind::default() };
    verified(ram(16 << 20), 16 << 20, kind, 1500, 50);
}

// Goal: a budget of mappings that is far too small changes the way of transfer and nothing else.
#[test]
fn persistent_grants_beyond_the_budget() {
    let budget = Budget::new(40, 5);
    let kind = Kind { segments: 20, persistent: Some(budget.clone()), ..Kind::default() };
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, ram(8 << 20), 8 << 20);
    let mut guest = Guest::new(7, kind);
    rig.connect(0, disk, guest.connect()).expect("connected");
    load_all(&mut guest, 8 << 20, 2000, 60, true);
    assert!(guest.counters.segments_copied.get() > 0 && guest.counters.segments_mapped.get() > 0);
    assert!(guest.counters.persistent_pages.get() <= 40);
    rig.disconnect(0, disk, &guest);
    assert_eq!((budget.pages(), budget.mappings(), rig.grants(0).pages), (0, 0, 0));
    rig.remove(0, disk);
    rig.stop();
}

// Goal: logical blocks of 4096 bytes: what is aligned works, what is not is refused.
#[test]
fn blocks_of_4096_bytes() {
    let kind = Kind { block_bytes: 4096, ..Kind::default() };
    verified(ram(4 << 20), 4 << 20, kind.clone(), 1000, 70);
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, ram(4 << 20), 4 << 20);
    let mut guest = Guest::new(7, kind);
    rig.connect(0, disk, guest.connect()).expect("connected");
    let queue = &mut guest.queues[0];
    assert_eq!(queue.run(WRITE, 1, 4096, Some(&[1; 4096])).0, Status::Error);
    assert_eq!(queue.run(WRITE, 8, 512, Some(&[1; 512])).0, Status::Error);
    assert_eq!(queue.run(WRITE, 8, 4096, Some(&[1; 4096])).0, Status::Okay);
    assert_eq!(guest.counters.refused[Reason::Alignment as usize].get(), 2);
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    rig.stop();
}

// Goal: a pool that is much smaller than what guests ask for at once slows them down and nothing else, and each guest gets on.
// Method: a budget of 1 MiB, two disks, a guest with large requests on each, both verified to the end.
#[test]
fn a_small_pool_is_shared() {
    let rig = Rig::with_budget(1, 1 << 20);
    let disks = [rig.add(0, 1, ram(32 << 20), 32 << 20), rig.add(0, 2, file(32 << 20), 32 << 20)];
    let kind = Kind { segments: 256, depth: 10, queues: 2, ..Kind::default() };
    let mut guests = [Guest::new(7, kind.clone()), Guest::new(8, kind)];
    for (guest, disk) in guests.iter().zip(disks) {
        rig.connect(0, disk, guest.connect()).expect("connected");
    }
    std::thread::scope(|scope| {
        for (seed, guest) in guests.iter_mut().enumerate() {
            scope.spawn(move || load_all(guest, 32 << 20, 150, 80 + 10 * seed as u64, true));
        }
    });
    for (guest, disk) in guests.iter().zip(disks) {
        rig.disconnect(0, disk, guest);
        rig.remove(0, disk);
    }
    rig.stop();
}

// Goal: wrong requests are answered by what the protocol has for them, are counted, and hurt nobody else.
// Method: one of each kind; after each, a good one.
#[test]
fn wrong_requests_are_answered() {
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, ram(1 << 20), 1 << 20);
    let mut guest = Guest::new(7, Kind { segments: 16, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    let queue = &mut guest.queues[0];
    let bad_page = |i: u32| WireSegment { gref: 1_000_000 + i, first: 0, last: 7 };
    let wrong = [
        (frontend::direct(4, 0, &[]), vec![], Status::NotSupported),
        (frontend::direct(READ, 0, &[]), vec![], Status::Error),
        (frontend::read(2041, &[bad_page(0)]), vec![bad_page(0)], Status::Error),
        (frontend::read(0, &[bad_page(0)]), vec![bad_page(0)], Status::Error),
        (frontend::write(0, &[bad_page(0)]), vec![bad_page(0)], Status::Error),
        (frontend::flush(0, &[bad_page(0)]), vec![bad_page(0)], Status::Error),
        (frontend::barrier(0, &[bad_page(0)]), vec![bad_page(0)], Status::Error),
        (frontend::indirect(true, 0, 20, &[1_000_000]), vec![], Status::Error),
        (frontend::indirect(true, 0, 257, &[0]), vec![], Status::Error),
        (frontend::discard(2040, 9, false), vec![], Status::Error),
        (frontend::discard(u64::MAX, 9, false), vec![], Status::Error),
    ];
    for (round, (message, segments, status)) in wrong.into_iter().enumerate() {
        let index = queue.submit_message(message, &segments);
        queue.publish();
        assert_eq!(queue.status_of(index), status, "{message:?}");
        queue.release(index);
        let data = vec![round as u8 + 1; 8192];
        assert_eq!(queue.run(WRITE, 16, 8192, Some(&data)).0, Status::Okay);
        assert_eq!(queue.run(READ, 16, 8192, None), (Status::Okay, data));
    }
    let counters = &guest.counters;
    assert_eq!(counters.refused[Reason::UnknownOperation as usize].get(), 1);
    assert_eq!(counters.refused[Reason::OutOfRange as usize].get(), 3);
    assert_eq!(counters.refused[Reason::IndirectPage as usize].get(), 1);
    assert_eq!(counters.segment_faults.get(), 5);
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    rig.stop();
}

// Goal: a read-only guest changes nothing; discards are not offered to it; a larger disk is larger for the guest at once.
#[test]
fn read_only_and_resize() {
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, file(1 << 20), 1 << 20);
    let mut guest = Guest::new(7, Kind::default());
    rig.connect(0, disk, guest.connect()).expect("connected");
    let queue = &mut guest.queues[0];
    assert_eq!(queue.run(WRITE, 2048, 512, Some(&[1; 512])).0, Status::Error, "behind the end");
    let reply = rig.call(0, Command::Resize { disk, size_bytes: 2 << 20 });
    assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
    assert_eq!(queue.run(WRITE, 2048, 512, Some(&[1; 512])).0, Status::Okay);
    rig.disconnect(0, disk, &guest);

    let mut guest = Guest::new(8, Kind::default());
    let mut connect = guest.connect();
    connect.offer.read_only = true;
    let in_use = rig.connect(0, disk, connect).expect("connected");
    assert!(in_use.limits.read_only && !in_use.limits.discard && !in_use.limits.secure_discard);
    let queue = &mut guest.queues[0];
    assert_eq!(queue.run(READ, 2048, 512, None), (Status::Okay, vec![1; 512]));
    assert_eq!(queue.run(WRITE, 2048, 512, Some(&[2; 512])).0, Status::Error);
    assert_eq!(queue.run_message(frontend::discard(0, 8, false)), Status::NotSupported);
    assert_eq!(queue.run(FLUSH, 0, 0, None).0, Status::Okay);
    assert_eq!(queue.run(READ, 2048, 512, None), (Status::Okay, vec![1; 512]));
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    rig.stop();
}
