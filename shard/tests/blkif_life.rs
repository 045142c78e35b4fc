//! Guests and what happens to their disks: pauses, moves, other images, failures, force, broken rings, many connects.
//!
//! Goal: none of it loses, repeats or mixes up a request, disturbs another guest, or leaves anything behind.
//! Method: verified load (see `blkif_rig::load`) on real shards while the control side acts; then the books: mappings, ports,
//! descriptors.

mod blkif_rig;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blkif_rig::load::Load;
use blkif_rig::*;
use ring_bridge::blkif::request::Status;
use ring_bridge::blkif::wire::{REQ_PROD, RSP_PROD};
use ring_bridge::grants::budget::Budget;
use ring_bridge::memory::RingMemory;
use shard::api::{CacheMode, Command, DiskId, DiskState, ErrorPolicy, Event, Reply, ShardErrorKind};

/// Runs a verified load on all queues, again and again until `act` has ended.
fn under_load(guest: &mut Guest, size_bytes: u64, seed: u64, act: impl FnOnce()) {
    let kind = guest.kind.clone();
    let part = size_bytes / 512 / kind.queues as u64 / 8 * 8;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (number, queue) in guest.queues.iter_mut().enumerate() {
            let (kind, stop) = (&kind, &stop);
            scope.spawn(move || {
                let mut load = Load::new(number as u64 * part, part, kind, seed + number as u64);
                while !stop.load(Ordering::Relaxed) {
                    load.run(queue, 100);
                }
                load.run(queue, 300);
            });
        }
        // Also when it panics, or the threads would never end.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn nothing_is_left(rig: &Rig) {
    for shard in 0..rig.shards.len() {
        let counts = rig.grants(shard);
        assert_eq!((counts.mappings, counts.pages, counts.ports, counts.unmap_failures), (0, 0, 0, 0));
    }
}

#[test]
fn pause_and_resume_under_load() {
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, file(8 << 20), 8 << 20);
    let mut guest = Guest::new(7, Kind { queues: 2, segments: 32, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    under_load(&mut guest, 8 << 20, 1, || {
        for _ in 0..30 {
            let reply = rig.call(0, Command::Pause { disk });
            assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
            let reply = rig.call(0, Command::Resume { disk, data_in_doubt: false });
            assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
        }
    });
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    nothing_is_left(&rig);
    rig.stop();
}

// Goal: a move is invisible to the guest, with copies and with persistent mappings, whatever is under way; also one that is taken back.
#[test]
fn moves_under_load() {
    for (budget, seed) in [(None, 10), (Some(Budget::new(10_000, 10_000)), 20)] {
        let rig = Rig::new(2);
        let disk = rig.add(0, 1, file(8 << 20), 8 << 20);
        let kind = Kind { queues: 2, segments: 32, persistent: budget.clone(), ..Kind::default() };
        let mut guest = Guest::new(7, kind);
        rig.connect(0, disk, guest.connect()).expect("connected");
        under_load(&mut guest, 8 << 20, seed, || {
            for round in 0..20 {
                let (from, to) = (round % 2, 1 - round % 2);
                if round % 5 == 4 {
                    let park = rig.send(from, Command::Park { disk });
                    // Refused when the disk has left already.
                    let _ = rig.call(from, Command::CancelPark { disk });
                    if let Ok(Reply::Parked(parked)) = rig.answer(park) {
                        assert!(matches!(rig.call(from, Command::Unpark(parked)), Ok(Reply::Done)));
                    }
                }
                rig.move_disk(disk, from, to);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        assert!(rig.news.borrow().is_empty(), "{:?}", rig.news.borrow());
        assert_eq!(guest.counters.rings.get(), 2);
        rig.disconnect(0, disk, &guest);
        rig.remove(0, disk);
        nothing_is_left(&rig);
        assert_eq!(budget.map_or(0, |budget| budget.pages()), 0);
        rig.stop();
    }
}

// Goal: a disk that is paused, with requests waiting, goes to another shard and they run there.
#[test]
fn requests_that_wait_travel() {
    let rig = Rig::new(2);
    let disk = rig.add(0, 1, ram(1 << 20), 1 << 20);
    let mut guest = Guest::new(7, Kind { segments: 20, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    assert!(matches!(rig.call(0, Command::Pause { disk }), Ok(Reply::Done)));
    let queue = &mut guest.queues[0];
    let mut indices = Vec::new();
    for i in 0..10u8 {
        let layout = queue.lay_out(20 * 4096, |_| 0);
        indices.push(queue.submit(WRITE, u64::from(i) * 160, &layout, Some(&vec![i + 1; 20 * 4096])));
    }
    indices.push(queue.submit(BARRIER, 0, &[], None));
    queue.publish();
    assert!(!queue.wait_within(Duration::from_millis(100)), "it is paused");
    rig.move_disk(disk, 0, 1);
    let queue = &mut guest.queues[0];
    assert!(!queue.wait_within(Duration::from_millis(100)), "it is still paused");
    assert!(matches!(rig.call(1, Command::Resume { disk, data_in_doubt: false }), Ok(Reply::Done)));
    for index in indices {
        assert_eq!(queue.status_of(index), Status::Okay);
        queue.release(index);
    }
    for i in 0..10u8 {
        assert_eq!(queue.run(READ, u64::from(i) * 160, 4096, None), (Status::Okay, vec![i + 1; 4096]));
    }
    rig.disconnect(1, disk, &guest);
    rig.remove(1, disk);
    nothing_is_left(&rig);
    rig.stop();
}

// Goal: another image in the place of the old one, as a snapshot does it, is invisible to the guest.
// Method: the same file, opened twice.
#[test]
fn another_image_under_load() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path).expect("open");
        file.set_len(8 << 20).expect("size");
        image(file.into(), 8 << 20, CacheMode::Writeback)
    };
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, open(), 8 << 20);
    let mut guest = Guest::new(7, Kind { queues: 2, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    under_load(&mut guest, 8 << 20, 30, || {
        for _ in 0..10 {
            assert!(matches!(rig.call(0, Command::Pause { disk }), Ok(Reply::Done)));
            let reply = rig.call(0, Command::Swap { disk, backend: open() });
            assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
            let reply = rig.call(0, Command::Resume { disk, data_in_doubt: false });
            assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
        }
    });
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    rig.stop();
}

// Goal: a panic of the disk's code is not seen by its guest: what was not answered runs again.
#[test]
fn quarantine_under_load() {
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, file(8 << 20), 8 << 20);
    let mut guest = Guest::new(7, Kind { queues: 2, segments: 32, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    under_load(&mut guest, 8 << 20, 40, || {
        std::thread::sleep(Duration::from_millis(20));
        rig.call(0, Command::InjectPanic { disk }).expect("a panic");
        std::thread::sleep(Duration::from_millis(20));
    });
    rig.wait_news("the quarantine", |event| matches!(event, Event::State { .. }));
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    nothing_is_left(&rig);
    rig.stop();
}

// Goal: a shard that dies under load costs its guests nothing but time: another one goes on from the tables of requests in flight, answers
// each request once and loses none.
// Method: panics in the reactor; the control side adds the disk (in memory, so that nothing of the dead shard can land) to the next shard and
// hands the same rings over, to be recovered.
#[test]
fn another_shard_recovers_the_rings_of_a_dead_one() {
    const SHARDS: usize = 6;
    let rig = Rig::new(SHARDS);
    let backend = ram(8 << 20);
    let disk = rig.add(0, 1, backend.clone(), 8 << 20);
    let mut guest = Guest::new(7, Kind { queues: 2, segments: 32, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    let mut recovers: Vec<_> = (1..SHARDS).map(|_| guest.connect()).collect();
    let mut begun_again = 0;
    let counters = guest.counters.clone();
    // A dead shard takes nothing back that it had counted.
    let mut counted_by_the_dead = 0;
    under_load(&mut guest, 8 << 20, 45, || {
        for shard in 1..SHARDS {
            std::thread::sleep(Duration::from_millis(20));
            if shard % 2 == 0 {
                assert!(matches!(rig.call(shard - 1, Command::Pause { disk }), Ok(Reply::Done)));
                wait_until("requests wait", || counters.in_flight.get() > counted_by_the_dead);
            }
            rig.send(shard - 1, Command::InjectShardPanic);
            let is_end = |event: &Event| matches!(event, Event::Stopped { error: Some(_) });
            rig.wait_news("the end", is_end);
            rig.news.borrow_mut().retain(|event| !is_end(event));
            assert_eq!(rig.grants(shard - 1).ports, 0, "the dead shard has let go");
            counted_by_the_dead = counters.in_flight.get();
            rig.add(shard, 1, backend.clone(), 8 << 20);
            let mut connect = recovers.remove(0);
            connect.recover = true;
            begun_again += rig.connect(shard, disk, connect).expect("recovered").begun_again;
        }
    });
    assert!(begun_again > 0);
    rig.disconnect(SHARDS - 1, disk, &guest);
    rig.remove(SHARDS - 1, disk);
    nothing_is_left(&rig);
    rig.stop();
}

/// A disk whose fdatasync always fails: a device that takes data and has no such call.
fn unsyncable() -> shard::api::Backend {
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/zero").expect("/dev/zero");
    image(file.into(), 1 << 20, CacheMode::Writeback)
}

// Goal: a flush that failed is not answered, whatever the policy; reads and writes go on by the policy; `resume --data-in-doubt` runs it
// again, `fail` answers everything else with errors and tells the control side.
#[test]
fn a_failed_flush_is_held() {
    for policy in [ErrorPolicy::Pause, ErrorPolicy::Report] {
        let rig = Rig::new(1);
        let disk = rig.add_as(0, 1, unsyncable(), 1 << 20, policy);
        let mut guest = Guest::new(7, Kind::default());
        rig.connect(0, disk, guest.connect()).expect("connected");
        let queue = &mut guest.queues[0];
        assert_eq!(queue.run(WRITE, 0, 4096, Some(&[1; 4096])).0, Status::Okay);
        let flush = queue.submit(FLUSH, 0, &[], None);
        let barrier = queue.submit(BARRIER, 0, &[], None);
        queue.publish();
        assert!(!queue.wait_within(Duration::from_millis(200)), "{:?}", queue.completions);
        if policy == ErrorPolicy::Report {
            rig.wait_news("the flush is held", |event| matches!(event, Event::FlushHeld { domid: 7, .. }));
            assert_eq!(guest.counters.flushes_held.get(), 1);
        } else {
            let held = |event: &Event| matches!(event, Event::State { state: DiskState::StorageError, .. });
            rig.wait_news("the disk holds its requests", held);
        }
        let reply = rig.call(0, Command::Resume { disk, data_in_doubt: true });
        assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
        let queue = &mut guest.queues[0];
        assert!(!queue.wait_within(Duration::from_millis(200)), "tried again, and failed again");
        assert!(matches!(rig.call(0, Command::Fail { disk }), Ok(Reply::Done)));
        rig.wait_news("the flush is held", |event| matches!(event, Event::FlushHeld { domid: 7, .. }));
        let queue = &mut guest.queues[0];
        assert!(!queue.wait_within(Duration::from_millis(200)), "{:?}", queue.completions);
        wait_until(&format!("{flush} and {barrier} are held"), || guest.counters.in_flight.get() == 2);
        rig.disconnect(0, disk, &guest);
        rig.remove(0, disk);
        nothing_is_left(&rig);
        rig.stop();
    }
    // Reads and writes of a disk that was given up.
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, ram(1 << 20), 1 << 20);
    let mut guest = Guest::new(7, Kind::default());
    rig.connect(0, disk, guest.connect()).expect("connected");
    assert!(matches!(rig.call(0, Command::Fail { disk }), Ok(Reply::Done)));
    let queue = &mut guest.queues[0];
    assert_eq!(queue.run(READ, 0, 4096, None).0, Status::Error);
    assert_eq!(queue.run(WRITE, 0, 4096, Some(&[1; 4096])).0, Status::Error);
    // So many that the shard expects their answers to bring it back to the ring.
    for _ in 0..12 {
        queue.submit(FLUSH, 0, &[], None);
    }
    queue.publish();
    assert!(!queue.wait_within(Duration::from_millis(100)), "{:?}", queue.completions);
    for _ in 0..3 {
        assert_eq!(queue.run(READ, 0, 4096, None).0, Status::Error, "others are answered meanwhile");
    }
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    rig.stop();
}

/// A disk that never answers: reads of an empty pipe. With its other end.
fn stuck() -> (shard::api::Backend, std::os::fd::OwnedFd) {
    let (read, write) = nix::unistd::pipe().expect("a pipe");
    (image(read, 1 << 20, CacheMode::Writeback), write)
}

// Goal: force does not wait for a store that is stuck: the guest goes at once and leaves nothing; nobody can connect while its requests are
// out, and afterwards somebody can. The same for the disk itself. A neighbour is not disturbed.
#[test]
fn force_with_stuck_io() {
    let rig = Rig::new(1);
    let (backend, pipe) = stuck();
    let disk = rig.add(0, 1, backend, 1 << 20);
    let other = rig.add(0, 2, ram(4 << 20), 4 << 20);
    let mut guest = Guest::new(7, Kind::default());
    let mut neighbour = Guest::new(8, Kind::default());
    rig.connect(0, disk, guest.connect()).expect("connected");
    rig.connect(0, other, neighbour.connect()).expect("connected");
    let queue = &mut guest.queues[0];
    for sector in 0..5 {
        let layout = queue.lay_out(4096, |_| 0);
        queue.submit(READ, sector * 8, &layout, None);
    }
    queue.publish();
    assert!(!queue.wait_within(Duration::from_millis(200)), "it is stuck");
    wait_until("all are at the store", || guest.counters.in_flight.get() == 5);
    let (domid, devid) = (guest.domid, guest.devid);
    let polite = rig.send(0, Command::DisconnectGuest { disk, domid, devid, force: false });
    assert!(rig.answer_within(polite, Duration::from_millis(100)).is_none());
    let reply = rig.call(0, Command::RemoveDisk { disk, force: false });
    assert_eq!(reply.expect_err("a guest uses it").kind, ShardErrorKind::WrongState);
    under_load(&mut neighbour, 4 << 20, 50, || {
        let reply = rig.call(0, Command::DisconnectGuest { disk, domid, devid, force: true });
        assert!(matches!(reply, Ok(Reply::Zombie { in_flight: 5 })), "{reply:?}");
    });
    assert_eq!(rig.answer(polite).expect_err("overtaken").kind, ShardErrorKind::Interrupted);
    assert_eq!((rig.grants(0).ports, rig.grants(0).mappings), (1, 1), "the neighbour's");
    let again = Guest::new(9, Kind::default());
    let error = rig.connect(0, disk, again.connect()).expect_err("requests are out");
    assert_eq!(error.kind, ShardErrorKind::WrongState);
    nix::unistd::write(&pipe, &[7; 5 * 4096]).expect("the store comes back");
    rig.connect_in_turn(0, disk, &again);
    let mut again = again;
    let queue = &mut again.queues[0];
    let layout = queue.lay_out(4096, |_| 0);
    queue.submit(READ, 0, &layout, None);
    queue.publish();
    assert!(!queue.wait_within(Duration::from_millis(100)), "it is stuck again");
    wait_until("it is at the store", || again.counters.in_flight.get() == 1);
    let reply = rig.call(0, Command::RemoveDisk { disk, force: true });
    assert!(matches!(reply, Ok(Reply::Zombie { .. })), "{reply:?}");
    assert_eq!((rig.grants(0).ports, rig.grants(0).mappings), (1, 1), "the neighbour's");
    drop(pipe);
    rig.wait_news("the zombie's end", |event| matches!(event, Event::ZombieGone { .. }));
    rig.disconnect(0, other, &neighbour);
    rig.remove(0, other);
    nothing_is_left(&rig);
    rig.stop();
}

// Goal: a guest that breaks the index of one of its rings loses that ring, and nothing else happens to anybody.
#[test]
fn a_broken_ring_stops_alone() {
    let rig = Rig::new(2);
    let disk = rig.add(0, 1, ram(8 << 20), 8 << 20);
    let other = rig.add(0, 2, ram(4 << 20), 4 << 20);
    let mut guest = Guest::new(7, Kind { queues: 2, ..Kind::default() });
    let mut neighbour = Guest::new(8, Kind::default());
    rig.connect(0, disk, guest.connect()).expect("connected");
    rig.connect(0, other, neighbour.connect()).expect("connected");
    let (broken, good) = guest.queues.split_at_mut(1);
    let (broken, good) = (&mut broken[0], &mut good[0]);
    assert_eq!(broken.run(WRITE, 0, 4096, Some(&[1; 4096])).0, Status::Okay);
    under_load(&mut neighbour, 4 << 20, 60, || {
        let memory = broken.frontend.memory();
        let index = memory.load(REQ_PROD).expect("inside");
        memory.store(REQ_PROD, index.wrapping_add(33)).expect("inside");
        broken.kick();
        rig.wait_news("the ring is broken", |event| {
            matches!(event, Event::RingBroken { domid: 7, queue: 0, reason, .. } if reason.contains("req_prod"))
        });
        for sector in 0..50 {
            assert_eq!(good.run(WRITE, 64 + sector, 512, Some(&[sector as u8; 512])).0, Status::Okay);
            assert_eq!(good.run(READ, 64 + sector, 512, None), (Status::Okay, vec![sector as u8; 512]));
        }
    });
    assert_eq!((guest.counters.rings_broken.get(), rig.grants(0).ports), (1, 2));
    let told = || rig.news.borrow().iter().filter(|event| matches!(event, Event::RingBroken { .. })).count();
    assert_eq!(told(), 1, "once");
    // It does not come back by a move, the other one goes along.
    rig.move_disk(disk, 0, 1);
    assert_eq!(rig.grants(1).ports, 1);
    assert_eq!(guest.queues[1].run(READ, 64, 512, None), (Status::Okay, vec![0; 512]));
    rig.disconnect(1, disk, &guest);
    rig.disconnect(0, other, &neighbour);
    rig.remove(1, disk);
    rig.remove(0, other);
    nothing_is_left(&rig);
    rig.stop();
}

// Goal: a guest that takes no responses, kicks without an end, and writes to indices that are not its own costs its neighbour nothing, and
// can be disconnected.
#[test]
fn a_guest_that_takes_nothing_and_kicks() {
    let rig = Rig::with_budget(1, 1 << 20);
    let disk = rig.add(0, 1, ram(8 << 20), 8 << 20);
    let other = rig.add(0, 2, file(4 << 20), 4 << 20);
    let mut guest = Guest::new(7, Kind { segments: 64, ..Kind::default() });
    let mut neighbour = Guest::new(8, Kind { segments: 64, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    rig.connect(0, other, neighbour.connect()).expect("connected");
    let counters = guest.counters.clone();
    let queue = &mut guest.queues[0];
    while queue.has_room() {
        let layout = queue.lay_out(64 * 4096, |_| 0);
        queue.submit(READ, 0, &layout, None);
    }
    queue.publish();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                queue.kick();
                queue.frontend.memory().store(RSP_PROD, 12345).expect("inside");
            }
        });
        let act = || {
            std::thread::sleep(Duration::from_millis(300));
            wait_until("the storm is damped", || counters.events_damped.get() > 0);
            wait_until("everything was answered", || counters.in_flight.get() == 0);
        };
        let act = || under_load(&mut neighbour, 4 << 20, 70, act);
        // Also when it panics, or the storm would never end.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    rig.disconnect(0, disk, &guest);
    rig.disconnect(0, other, &neighbour);
    rig.remove(0, disk);
    rig.remove(0, other);
    nothing_is_left(&rig);
    rig.stop();
}

// Goal: a connect that fails names the key and the number at fault, and leaves nothing.
#[test]
fn wrong_connects_are_explained_and_undone() {
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, ram(1 << 20), 1 << 20);
    let kind = Kind { queues: 2, ring_pages: 2, ..Kind::default() };
    let guest = Guest::new(7, kind);
    let fails = |what: &str, change: &dyn Fn(&mut shard::blkif::GuestConnect)| {
        let mut connect = guest.connect();
        change(&mut connect);
        let error = rig.connect(0, disk, connect).expect_err(what);
        assert_eq!(error.kind, ShardErrorKind::Guest, "{error}");
        assert!(error.message.contains(what), "{what}: {error}");
        nothing_is_left(&rig);
    };
    fails("queue-1/ring-ref1 = 1000000", &|connect| connect.queues[1].grefs[1] = 1_000_000);
    fails("queue-1/event-channel = 9", &|connect| connect.queues[1].port = 9);
    fails("queue-1/event-channel = 0", &|connect| connect.queues[1].port = 0);
    fails("ring-page-order", &|connect| connect.queues[0].grefs.push(0));
    fails("multi-queue-num-queues is 0", &|connect| connect.queues.clear());
    fails("sector-size is 8192", &|connect| connect.offer.block_bytes = 8192);
    fails("queue 1", &|connect| connect.queues[1].table = short_table());
    fails("queue 0", &|connect| {
        guest.memory.store(connect.queues[0].grefs[0] as usize * 4096 + REQ_PROD, 77).expect("inside");
    });
    let mut fresh = Guest::new(7, Kind::default());
    rig.connect(0, disk, fresh.connect()).expect("the number is free");
    let error = rig.connect(0, disk, Guest::new(7, Kind::default()).connect()).expect_err("twice");
    assert_eq!(error.kind, ShardErrorKind::WrongState);
    assert_eq!(fresh.queues[0].run(READ, 0, 512, None).0, Status::Okay);
    rig.disconnect(0, disk, &fresh);
    let reply = rig.call(0, Command::DisconnectGuest { disk, domid: 7, devid: 51712, force: false });
    assert_eq!(reply.expect_err("gone").kind, ShardErrorKind::Guest);
    rig.remove(0, disk);
    rig.stop();
}

fn short_table() -> ring_bridge::memory::SharedRegion {
    let file =
        nix::sys::memfd::memfd_create(c"short", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::ftruncate(&file, 4096).expect("size");
    ring_bridge::memory::SharedRegion::map(&file, 4096).expect("map")
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

fn areas() -> usize {
    std::fs::read_to_string("/proc/self/maps").expect("proc").lines().count()
}

// Goal: nothing grows by connects: mappings, ports, descriptors, memory areas.
// Method: 1,000 guests connect, one after the other, do something and go: most politely, some by force with requests under way, some with
// their disk moved in between. The books of the first rounds and of the last. Other tests run beside this one in the same process, so what
// is counted for the process may move, but not by one for each guest.
#[test]
fn a_thousand_connects_leave_nothing() {
    let rig = Rig::new(2);
    let disk: DiskId = rig.add(0, 1, ram(1 << 20), 1 << 20);
    let budget = Budget::new(1000, 1000);
    let mut before = (0, 0);
    for round in 0..1000usize {
        if round == 20 {
            before = (descriptors(), areas());
        }
        let persistent = (round % 3 == 0).then(|| budget.clone());
        let kind = Kind { queues: 1 + round % 2, depth: 4, persistent, ..Kind::default() };
        let mut guest = Guest::new(round as u16, kind);
        rig.connect_in_turn(0, disk, &guest);
        let queue = &mut guest.queues[0];
        assert_eq!(queue.run(WRITE, 0, 4096, Some(&[round as u8; 4096])).0, Status::Okay);
        assert_eq!(queue.run(READ, 0, 4096, None), (Status::Okay, vec![round as u8; 4096]));
        match round % 10 {
            7 => {
                queue.submit(READ, 0, &[(0, 7)], None);
                queue.publish();
                let (domid, devid) = (guest.domid, guest.devid);
                let reply = rig.call(0, Command::DisconnectGuest { disk, domid, devid, force: true });
                assert!(matches!(reply, Ok(Reply::Done | Reply::Zombie { .. })), "{reply:?}");
            }
            8 => {
                rig.move_disk(disk, 0, 1);
                assert_eq!(guest.queues[0].run(READ, 0, 512, None).0, Status::Okay);
                rig.move_disk(disk, 1, 0);
                rig.disconnect(0, disk, &guest);
            }
            _ => rig.disconnect(0, disk, &guest),
        }
    }
    nothing_is_left(&rig);
    assert_eq!((budget.pages(), budget.mappings()), (0, 0));
    let after = (descriptors(), areas());
    assert!(after.0 < before.0 + 200 && after.1 < before.1 + 200, "{before:?} before, {after:?} after");
    rig.remove(0, disk);
    rig.stop();
}
