//! Guests that write whatever they like to the memory that they share with us.
//!
//! Goal: no panic, no hang, no effect on another guest, nothing left behind.
//! Method: from seeds: valid requests, wrong ones, indices, entries, pages of segments and data that change while we look at them, notifications
//! without an end; a ring that was stopped is connected anew, by consent or by force. Meanwhile a neighbour on the same shard runs a verified
//! load, and the slowest of its requests is told.

mod blkif_rig;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blkif_rig::load::Load;
use blkif_rig::*;
use ring_bridge::blkif::frontend;
use ring_bridge::blkif::hostile::Hostile;
use ring_bridge::blkif::request::Status;
use ring_bridge::blkif::wire::{self, Abi, Decoded, PAGE_BYTES, REQ_PROD, RSP_PROD, WireSegment, entry_at};
use ring_bridge::grants::budget::Budget;
use ring_bridge::memory::RingMemory;
use shard::api::{Command, Event, Reply};

/// One second of a hostile guest: writes to everything until its ring is stopped, or `stop`.
fn attack(hostile: &mut Hostile, queue: &Queue, abi: Abi, sectors: u64, stop: &AtomicBool) {
    let ring = queue.frontend.memory();
    let entries = queue.frontend.entries();
    let pages = queue.memory_pages();
    for round in 0..5_000u32 {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let index = ring.load(REQ_PROD).expect("inside");
        let room = index.wrapping_sub(ring.load(RSP_PROD).expect("inside")) < entries - 2;
        let page = |hostile: &mut Hostile| pages.start + hostile.rng().usize(0..pages.len());
        match hostile.rng().u32(0..100) {
            0..70 if !room && round % 64 > 0 => {}
            0..70 => {
                // A request that may run, on pages that change.
                let rng = hostile.rng();
                let count = rng.usize(1..=11);
                let segments: Vec<WireSegment> = (0..count)
                    .map(|_| WireSegment {
                        gref: (pages.start + rng.usize(0..pages.len())) as u32,
                        first: 0,
                        last: 7,
                    })
                    .collect();
                let sector = rng.u64(0..sectors - 100);
                let message = match rng.u32(0..10) {
                    0..4 => frontend::read(sector, &segments),
                    4..7 => frontend::write(sector, &segments),
                    7 => frontend::indirect(true, sector, rng.u16(1..300), &[segments[0].gref]),
                    8 => frontend::discard(sector, rng.u64(1..100), rng.bool()),
                    _ => frontend::barrier(sector, &segments),
                };
                let entry = wire::encode(abi, &Decoded { id: u64::from(index), message }, &segments);
                let at = entry_at(abi, entries, index);
                ring.copy_in(at, &entry[..abi.entry_bytes()]).expect("inside");
                ring.store(REQ_PROD, index.wrapping_add(1)).expect("inside");
            }
            70..85 => {
                let page = page(hostile);
                hostile.hit_page(&&**queue.memory(), page * PAGE_BYTES).expect("inside");
            }
            85..97 => {
                hostile.hit_entry(ring, abi, entries).expect("inside");
            }
            97..99 if round % 8 == 0 => {
                hostile.hit_event(ring).expect("inside");
            }
            _ if round % 256 == 0 => {
                hostile.hit_producer(ring, entries).expect("inside");
            }
            _ => {}
        }
        queue.kick_once();
        // Not more requests than the ring has room for, most of the time.
        if round % 16 == 0 {
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

#[test]
fn hostile_guests_hurt_nobody() {
    const TIME: Duration = Duration::from_secs(6);
    let rig = Rig::with_budget(1, 4 << 20);
    let disk = rig.add(0, 1, ram(4 << 20), 4 << 20);
    let other = rig.add(0, 2, file(4 << 20), 4 << 20);
    let mut neighbour = Guest::new(1, Kind { segments: 32, queues: 2, ..Kind::default() });
    rig.connect(0, other, neighbour.connect()).expect("connected");
    let (kind, stop) = (neighbour.kind.clone(), AtomicBool::new(false));
    let mut slowest = Duration::ZERO;
    let budget = Budget::new(500, 100);
    let (mut connects, mut broken) = (0u32, 0);
    let (mut ran, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        let (first, second) = neighbour.queues.split_at_mut(1);
        scope.spawn(|| {
            let mut load = Load::new(0, 4096, &kind, 1);
            while !stop.load(Ordering::Relaxed) {
                load.run(&mut first[0], 100);
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                assert_eq!(second[0].run(READ, 4096, 4096, None).0, Status::Okay);
                slowest = slowest.max(start.elapsed());
            }
        });
        let act = || {
            let start = Instant::now();
            while start.elapsed() < TIME {
                connects += 1;
                let abi = if connects % 2 == 0 { Abi::X86_64 } else { Abi::X86_32 };
                let persistent = (connects % 3 == 0).then(|| budget.clone());
                let ring_pages = [1, 2, 16][connects as usize % 3];
                let kind = Kind { abi, ring_pages, segments: 16, persistent, ..Kind::default() };
                let guest = Guest::new(2 + connects as u16, kind);
                rig.connect_in_turn(0, disk, &guest);
                let enough = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    for seed in 0..2 {
                        let (queue, enough) = (&guest.queues[0], &enough);
                        let seed = u64::from(connects) * 2 + seed;
                        scope.spawn(move || attack(&mut Hostile::new(seed), queue, abi, 8192, enough));
                    }
                    let until = Instant::now() + Duration::from_millis(300);
                    while guest.counters.rings_broken.get() == 0 && Instant::now() < until {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    enough.store(true, Ordering::Relaxed);
                });
                let (domid, devid) = (guest.domid, guest.devid);
                let force = connects % 4 == 0;
                let reply = rig.call(0, Command::DisconnectGuest { disk, domid, devid, force });
                let expected =
                    matches!(reply, Ok(Reply::Done)) || force && matches!(reply, Ok(Reply::Zombie { .. }));
                assert!(expected, "{reply:?}");
                assert_eq!((budget.pages(), guest.counters.in_flight.get()), (0, 0));
                // Only now: until here the shard was free to take what the attack had left in the ring.
                broken += guest.counters.rings_broken.get();
                ran += guest.counters.requests.iter().map(|cell| cell.get()).sum::<u64>();
                refused += guest.counters.refused.iter().map(|cell| cell.get()).sum::<u64>();
            }
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    println!(
        "{connects} connects, {broken} rings stopped, {ran} requests run, {refused} refused, the neighbour's slowest read took {slowest:?}"
    );
    assert!(broken > 0 && ran > 0 && refused > 0, "nothing was hit");
    let told =
        rig.news.borrow().iter().filter(|event| matches!(event, Event::RingBroken { .. })).count() as u64;
    assert_eq!(told, broken);
    rig.disconnect(0, other, &neighbour);
    for disk in [disk, other] {
        rig.remove(0, disk);
    }
    let counts = rig.grants(0);
    assert_eq!((counts.mappings, counts.ports, counts.unmap_failures), (0, 0, 0));
    rig.stop();
}
