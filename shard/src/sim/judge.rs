//! Whether an answer is allowed, and whether a silence has an excuse.

use ring_bridge::nbd::NbdError;

use super::client::{Answer, Ask, Asked, Life};
use super::kernel::What;
use super::operator::{Kind, Place};
use super::scenario::Sim;
use crate::api::{CacheMode, ErrorPolicy};

/// Most bytes of one place that is compared after a flush.
const SAMPLE: u64 = 256;

impl Sim {
    /// An answer has come.
    pub fn judge(&mut self, number: usize, answer: Answer, now: u64) {
        let Answer { asked, error } = answer;
        let disk = self.clients[number].disk;
        {
            let mut world = self.world.borrow_mut();
            world.trace([6 | (number as u64) << 4, u64::from(error), asked.offset]);
            world.say(format_args!(
                "client {number} disk {disk}: answer {error} to {} {}+{}",
                name(&asked.ask),
                asked.offset,
                asked.len
            ));
        }
        self.count(format!("{} {}", name(&asked.ask), if error == 0 { "done" } else { "failed" }));
        if let Ask::Change { stamp, .. } = asked.ask {
            let outcome = asked.outcome(error);
            self.disks[disk].model.end(now, stamp, outcome);
        }
        if let Ask::Bad { error: expected } = asked.ask {
            assert_eq!(error, expected, "client {number}: a bad request got another error");
            return;
        }
        if error == 0 {
            return self.judge_success(number, &asked);
        }
        let (start, end) = (asked.offset, asked.offset + asked.len);
        self.disks[disk].reported.push((asked.sent, start, end));
        if let Err(why) = self.justify(disk, &asked, error) {
            self.describe();
            panic!("client {number} of disk {disk}: error {error} for {asked:?}: {why}");
        }
    }

    /// The disks learn of the fdatasyncs that failed in the turn that was just made.
    pub fn note_failed_syncs(&mut self) {
        let mut world = self.world.borrow_mut();
        let failures = std::mem::take(&mut world.new_failures);
        for failure in failures {
            drop(world);
            self.count(format!("kernel {:?} errno {}", failure.what, failure.errno));
            world = self.world.borrow_mut();
            if failure.what == What::Sync {
                let disk = &mut self.disks[world.files[failure.file].disk];
                disk.sync_failed = Some(failure.at);
                disk.sync_failed_now = true;
                disk.model.doubt = failure.at;
            }
            world.failures.push(failure);
        }
    }

    fn judge_success(&mut self, number: usize, asked: &Asked) {
        let disk = self.clients[number].disk;
        let d = &self.disks[disk];
        let own;
        let (since, range) = match &asked.ask {
            Ask::Flush { since } => (since, None),
            Ask::Change { stamp, fua: true, trim: false, .. } => {
                own = d.model.own(*stamp);
                (&own, Some((asked.offset, asked.offset + asked.len)))
            }
            _ => return,
        };
        if let Some(at) = d.sync_failed {
            let refused = asked.sent > at
                && !self.orders.values().any(|o| o.disk == disk && o.kind == Kind::ResumeInDoubt);
            assert!(!refused, "client {number} of disk {disk}: success after a failed fdatasync: {asked:?}");
        }
        let (from, to) = range.unwrap_or((0, d.size));
        let samples = (0..6).map(|_| {
            let start = self.rng.between(from, to - 1);
            start..(start + SAMPLE).min(to)
        });
        let samples: Vec<_> = samples.collect();
        let world = self.world.borrow();
        let Some(durable) = d.durable(&world, &samples) else { return };
        for (range, durable) in samples.iter().zip(durable) {
            if let Err(message) = d.model.check_durable(since, range.start, &durable) {
                drop(world);
                self.describe();
                panic!("client {number} of disk {disk}: not durable after {}: {message}", name(&asked.ask));
            }
        }
    }

    /// After a detach everything is durable.
    pub fn check_durable_all(&mut self, disk: usize) {
        let now = self.instant();
        let d = &self.disks[disk];
        let since = d.model.snapshot(now, 0, d.size);
        let all = 0..d.size;
        let Some(durable) = d.durable(&self.world.borrow(), &[all]) else { return };
        if let Err(message) = d.model.check_durable(&since, 0, &durable[0]) {
            self.describe();
            panic!("disk {disk} was detached and is not durable: {message}");
        }
    }

    /// Whether an error has a cause of its own.
    fn justify(&self, disk: usize, asked: &Asked, error: u32) -> Result<(), String> {
        let d = &self.disks[disk];
        if error == NbdError::Eio.code() && (d.failed || asked.sent < d.attached_at) {
            return Ok(());
        }
        if matches!(asked.ask, Ask::Change { fast: true, .. }) && error == NbdError::Enotsup.code() {
            return Ok(());
        }
        let through = d.image.cache == CacheMode::Writethrough;
        let synced = match asked.ask {
            Ask::Flush { .. } => true,
            Ask::Change { fua, .. } => fua || through,
            _ => false,
        };
        let doubted = d.sync_failed.is_some() || d.doubts.iter().any(|&(_, end)| end >= asked.sent);
        // Any change of an image may need a flush of its tables.
        let synced = synced || (d.is_image() && matches!(asked.ask, Ask::Change { .. }));
        if synced && doubted && d.on_error == ErrorPolicy::Report {
            return Ok(());
        }
        let world = self.world.borrow();
        let align = 4096;
        let (start, end) = (asked.offset / align * align, (asked.offset + asked.len).next_multiple_of(align));
        let cause = world.failures.iter().filter(|failure| failure.at >= asked.sent).find(|failure| {
            let kind = match (&asked.ask, failure.what) {
                (Ask::Read { .. }, What::Read) | (Ask::Status { .. }, What::Extents) => true,
                (Ask::Change { .. }, What::Read | What::Write | What::Space) => true,
                (_, What::Sync) => synced,
                // Whatever is asked of an image, its tables may be read and written.
                _ => d.is_image(),
            };
            let policy = match failure.errno {
                libc::ENOSPC => d.on_enospc,
                _ => d.on_error,
            };
            kind && world.files[failure.file].disk == disk
                && (failure.what == What::Sync
                    || d.is_image()
                    || (failure.start < end && start < failure.end))
                && NbdError::from_errno(failure.errno).code() == error
                && (policy == ErrorPolicy::Report || d.failed)
        });
        if cause.is_none() {
            return Err("no operation of it failed, or the policy is to hold it".into());
        }
        Ok(())
    }

    /// Nothing happens by itself any more: who waits must have a reason.
    pub fn check_quiet(&mut self) {
        self.settle_orphans();
        for number in 0..self.clients.len() {
            let client = &self.clients[number];
            if client.life == Life::Gone || client.deaf || client.mute || client.asked.is_empty() {
                continue;
            }
            if !self.is_excused(client.disk, number) {
                self.describe();
                panic!(
                    "client {number} of disk {} waits for {:?}",
                    client.disk,
                    client.asked.values().next()
                );
            }
        }
        for (tag, order) in &self.orders {
            let d = &self.disks[order.disk];
            let hung = self.world.borrow().is_hung(order.disk);
            let deaf = self.clients.iter().any(|c| c.disk == order.disk && c.deaf && c.life != Life::Gone);
            let throttled = self.is_throttled(order.disk);
            let excused = match order.kind {
                Kind::Pause | Kind::Park | Kind::Add | Kind::Unpark | Kind::Swap | Kind::Resize => {
                    hung || self.shares_hung_store(order.disk)
                }
                Kind::Remove => hung || deaf || throttled || self.shares_hung_store(order.disk),
                _ => false,
            };
            if !excused {
                self.describe();
                panic!("{:?} of disk {} (tag {tag}, {:?}) has no reply", order.kind, order.disk, d.id);
            }
        }
        self.check_told();
        self.check_rest();
    }

    /// A connection whose client waits for nothing holds nothing.
    fn check_rest(&self) {
        for shard in &self.shards {
            for (peer, summary) in shard.busy_conns() {
                let number: usize = peer.trim_start_matches("client ").parse().expect("a client's number");
                let client = &self.clients[number];
                let at_rest = client.life == Life::Talks
                    && !(client.deaf || client.mute)
                    && client.asked.is_empty()
                    && client.outbox.is_empty();
                if at_rest {
                    self.describe();
                    panic!("client {number} waits for nothing, and its connection is not at rest: {summary}");
                }
            }
        }
    }

    /// An error of the kernel that is to be reported must have reached somebody.
    fn check_told(&mut self) {
        for index in 0..self.disks.len() {
            let at_rest = self.clients.iter().all(|c| c.disk != index || c.asked.is_empty());
            if !at_rest {
                return;
            }
        }
        let failures = std::mem::take(&mut self.world.borrow_mut().failures);
        for failure in failures {
            let d = &self.disks[self.world.borrow().files[failure.file].disk];
            let policy = if failure.errno == libc::ENOSPC { d.on_enospc } else { d.on_error };
            let not_asked = d.lost_requests || d.is_image();
            if policy == ErrorPolicy::Pause || not_asked || d.failed || failure.what == What::Sync {
                continue;
            }
            let told = d.reported.iter().any(|&(sent, start, end)| {
                let (start, end) = (start / 4096 * 4096, end.next_multiple_of(4096));
                sent <= failure.at && failure.start < end && start < failure.end
            });
            assert!(told, "disk {}: nobody was told of {failure:?}", failure.file);
        }
        for d in &mut self.disks {
            d.reported.clear();
        }
    }

    fn is_throttled(&self, disk: usize) -> bool {
        self.disks[disk].counters.throttled_now.get() > 0
    }

    /// The store of a disk hangs, maybe because of another disk on it: its share of the kernel's workers may be used up.
    fn shares_hung_store(&self, disk: usize) -> bool {
        let store = self.disks[disk].image.store;
        let world = self.world.borrow();
        (0..self.disks.len()).any(|other| self.disks[other].image.store == store && world.is_hung(other))
    }

    fn is_excused(&self, disk: usize, client: usize) -> bool {
        let d = &self.disks[disk];
        let holds = d.on_error == ErrorPolicy::Pause || d.on_enospc == ErrorPolicy::Pause;
        // A detach reads no more requests, and may wait for a limit.
        let going = self.orders.values().any(|order| order.disk == disk && order.kind == Kind::Remove);
        if !matches!(d.place, Place::Shard(_)) || going || d.paused || (d.storage_error && holds) {
            return true;
        }
        if self.shares_hung_store(disk) {
            return true;
        }
        // A write limit is no excuse for a connection that only reads.
        let only_reads =
            self.clients[client].asked.values().all(|asked| !matches!(asked.ask, Ask::Change { .. }));
        let l = &d.limits;
        let read_limits =
            [l.iops_total, l.iops_read, l.bps_total, l.bps_read].iter().any(|rate| rate.per_second > 0);
        if only_reads && !read_limits && !d.grouped {
            return false;
        }
        self.is_throttled(disk)
    }
}

fn name(ask: &Ask) -> &'static str {
    match ask {
        Ask::Read { .. } => "read",
        Ask::Change { trim: true, .. } => "trim",
        Ask::Change { .. } => "change",
        Ask::Flush { .. } => "flush",
        Ask::Status { .. } => "status",
        Ask::Bad { .. } => "nonsense",
        Ask::Hint => "hint",
    }
}
