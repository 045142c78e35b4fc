//! What a guest's requests cost in calls of the kernel.
//!
//! Goal: at 32 requests at a time few system calls, calls of the grant device and notifications for each request.
//! Method: a null disk, whose shard does nothing else; a guest that sends 32 requests of 4 KiB, waits for all and sends the next, and one that
//! sends a new one for each answer. The shard's own accounts count every call that it makes (a run under strace agrees): entering its ring,
//! taking and unmasking events, copies, notifications. On Xen a copy is an ioctl; here, where it is a memcpy, it is counted as if it were one.

mod blkif_rig;

use std::time::Duration;

use blkif_rig::*;
use ring_bridge::blkif::request::Status;
use ring_bridge::grants::budget::Budget;
use shard::api::Backend;

const DEPTH: usize = 32;

/// Calls for each request.
#[derive(Debug)]
struct Price {
    enters: f64,
    events: f64,
    unmasks: f64,
    copies: f64,
    notifications: f64,
    /// Of the guest.
    kicks: f64,
}

impl Price {
    fn all(&self) -> f64 {
        self.enters + self.events + self.unmasks + self.copies + self.notifications
    }
}

fn price(persistent: bool, ask: impl Fn(&mut Queue)) -> Price {
    let rig = Rig::new(1);
    let disk = rig.add(0, 1, Backend::Null, 1 << 20);
    let budget = persistent.then(|| Budget::new(10_000, 10_000));
    let mut guest = Guest::new(7, Kind { segments: 1, persistent: budget, ..Kind::default() });
    rig.connect(0, disk, guest.connect()).expect("connected");
    let queue = &mut guest.queues[0];
    // Warm: persistent pages that are few are mapped when they have waited for others.
    for _ in 0..4 {
        ask(queue);
        std::thread::sleep(Duration::from_millis(120));
    }
    let counters = rig.shards[0].counters.clone();
    let before = (rig.grants(0), counters.ring_enters.get(), queue.requests, queue.notifies);
    for _ in 0..20 {
        ask(queue);
    }
    std::thread::sleep(Duration::from_millis(50));
    let after = (rig.grants(0), counters.ring_enters.get(), queue.requests, queue.notifies);
    let requests = after.2 - before.2;
    let each = |after: u64, before: u64| (after - before) as f64 / requests as f64;
    let price = Price {
        enters: each(after.1, before.1),
        events: each(after.0.drains, before.0.drains),
        unmasks: each(after.0.unmasks, before.0.unmasks),
        copies: each(after.0.copy_calls, before.0.copy_calls),
        notifications: each(after.0.notifications, before.0.notifications),
        kicks: each(after.3, before.3),
    };
    rig.disconnect(0, disk, &guest);
    rig.remove(0, disk);
    rig.stop();
    price
}

fn send(queue: &mut Queue, what: u8) {
    let layout = queue.lay_out(4096, |_| 0);
    queue.submit(what, 0, &layout, None);
}

fn take(queue: &mut Queue) -> usize {
    queue.wait();
    let done = std::mem::take(&mut queue.completions);
    for completion in &done {
        assert_eq!(completion.status, Status::Okay);
        queue.release(completion.index);
    }
    done.len()
}

/// 32 at once, fifty times.
fn in_batches(what: u8) -> impl Fn(&mut Queue) {
    move |queue| {
        for _ in 0..50 {
            for _ in 0..DEPTH {
                send(queue, what);
            }
            queue.publish();
            while queue.frontend.pending() > 0 {
                take(queue);
            }
        }
    }
}

/// Always 32, sixteen hundred in all.
fn in_a_window(what: u8) -> impl Fn(&mut Queue) {
    move |queue| {
        let mut left = 50 * DEPTH;
        while left > 0 || queue.frontend.pending() > 0 {
            while left > 0 && queue.frontend.pending() < DEPTH {
                send(queue, what);
                left -= 1;
            }
            queue.publish();
            take(queue);
        }
    }
}

#[test]
fn few_calls_for_each_request() {
    for what in [READ, WRITE] {
        for persistent in [false, true] {
            let batches = price(persistent, in_batches(what));
            let window = price(persistent, in_a_window(what));
            println!(
                "operation {what}, persistent {persistent}: in batches {:.3} calls, {batches:.3?}",
                batches.all()
            );
            println!(
                "operation {what}, persistent {persistent}: in a window {:.3} calls, {window:.3?}",
                window.all()
            );
            for price in [batches, window] {
                assert!(price.all() <= 0.5, "{price:?}");
                assert!(price.notifications <= 0.15 && price.kicks <= 0.15, "{price:?}");
                assert!(price.copies <= if persistent { 0.0 } else { 0.15 }, "{price:?}");
            }
        }
    }
}
