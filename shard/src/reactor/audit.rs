//! The books of a shard, for tests: every counter of a budget against what it counts.
//!
//! Connections, disks and the shard count bytes and operations as these come and go. A count that is too high starves somebody in
//! the end, one that is too low lets a client hold more than its share; neither shows in an answer. So the simulator adds
//! everything up from scratch, between turns.

use std::collections::HashMap;

use super::ops::OpKind;
use super::*;
use crate::request::Client;
use crate::storage::pool::Buf;

fn check(what: impl FnOnce() -> String, counted: u64, real: u64) -> Result<(), String> {
    if counted == real { Ok(()) } else { Err(format!("{}: counted {counted}, really {real}", what())) }
}

impl<K: Kernel> Shard<K> {
    /// Compares every counter with what it counts.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn audit(&self) -> Result<(), String> {
        let mut in_pool = 0;
        // Requests, bytes held and bytes of buffers, by connection.
        let mut ours = HashMap::<(Client, u32), (u64, u64, u64)>::new();
        for (_, request) in self.requests.iter() {
            let capacity = |buf: &Option<Buf>| buf.as_ref().map_or(0, Buf::capacity);
            let payload = capacity(&request.payload);
            in_pool += payload + capacity(&request.bounce);
            if let Some(origin) = request.origin {
                let sums = ours.entry((origin.client, origin.generation)).or_default();
                sums.0 += 1;
                sums.1 += request.held_bytes();
                sums.2 += payload as u64;
            }
        }
        for (_, conn) in &self.conns {
            let own = conn.count();
            in_pool += own.buffers as usize;
            let (requests, held, buffers) =
                ours.get(&(Client::Conn(conn.slot()), conn.generation)).copied().unwrap_or_default();
            let counted = conn.counted();
            check(|| format!("requests of {}", conn.peer()), u64::from(conn.requests()), requests)?;
            check(|| format!("bytes held by {}", conn.summary()), counted.held, own.held + held)?;
            check(|| format!("buffers of {}", conn.summary()), counted.buffers, own.buffers + buffers)?;
        }
        for (_, ring) in &self.rings.slab {
            let (counted_requests, held, buffers, own_held, own_buffers) = ring.counted();
            in_pool += own_buffers as usize;
            let (requests, bytes, payloads) =
                ours.get(&(ring.client(), ring.generation)).copied().unwrap_or_default();
            let name = |what: &str| format!("{what} of queue {} of domain {}", ring.queue, ring.domid);
            check(|| name("requests"), counted_requests, requests)?;
            check(|| name("bytes held"), held, own_held + bytes)?;
            check(|| name("buffers"), buffers, own_buffers + payloads)?;
        }
        check(|| "bytes of the pool".into(), self.pool.used() as u64, in_pool as u64)?;
        check(|| "free chunks are lost".into(), 1, u64::from(in_pool > 0 || self.pool.is_whole()))?;
        self.audit_disks()?;
        self.audit_gates()
    }

    /// Ports of guests have something to say.
    pub fn ports_are_ready(&mut self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let Some(opened) = self.rings.host.get(crate::blkif::Realm::Shared) else { return false };
        let mut fds = [PollFd::new(opened.domains.event_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(1)
    }

    /// What is held of guests: mappings, ports.
    pub fn grants(&self) -> (u64, u64) {
        let counts = self.counters.grants.get(crate::blkif::Realm::Shared).map(|accounts| accounts.counts());
        counts.map_or((0, 0), |counts| (counts.mappings, counts.ports))
    }

    /// The address space of the pool is spent until [`Shard::give_buffers_back`].
    pub fn take_buffers_away(&mut self) {
        self.pool.hide_free_chunks();
    }

    /// There is address space again.
    pub fn give_buffers_back(&mut self) {
        self.pool.show_free_chunks();
    }

    /// Files of images whose fdatasync has failed, as these remember it.
    pub fn marked_files(&self) -> usize {
        let marked =
            |entry: &Entry| entry.owner.is_some() && entry.disk.as_ref().is_some_and(Disk::flush_failed);
        self.disks.iter().filter(|(_, entry)| marked(entry)).count()
    }

    /// Requests whose data came along with a disk and wait for a buffer.
    pub fn carried(&self) -> usize {
        self.requests.iter().filter(|(_, request)| request.carried.is_some()).count()
    }

    fn audit_disks(&self) -> Result<(), String> {
        let mut bounces = 0;
        for (slot, entry) in &self.disks {
            let what = |what: &'static str| move || format!("{what} of disk {}", entry.id.0);
            let requests = || self.requests.iter().filter(|(_, r)| r.disk == slot as u32).map(|(_, r)| r);
            let count = requests().count() as u64;
            let throttled = requests().filter(|r| r.throttled != 0).count() as u64;
            let own_bounces = requests().filter(|r| r.bounce.is_some()).count() as u64;
            let ours = |request: &Request| request.via.is_some_and(|via| via.disk() == slot as u32);
            let on_files = self.requests.iter().filter(|(_, request)| ours(request)).count();
            let ops = self.ops.iter().filter(|op| op.disk() == Some(slot as u32)).count() + on_files;
            bounces += own_bounces;
            check(what("requests"), u64::from(entry.requests), count)?;
            check(what("bounce buffers"), u64::from(entry.bounces), own_bounces)?;
            check(what("kernel operations"), u64::from(entry.ops), ops as u64)?;
            if let Some(disk) = &entry.disk {
                let counters = &disk.config().counters;
                check(what("io_now"), counters.io_now.get(), count)?;
                check(what("clients"), counters.clients.get(), entry.clients())?;
                if !entry.quarantined {
                    check(what("throttled_now"), counters.throttled_now.get(), throttled)?;
                    let (waiting, started) = disk.counts();
                    check(what("requests in its queues"), (waiting + started) as u64, count)?;
                }
            }
        }
        check(|| "bounce buffers of the shard".into(), u64::from(self.bounces), bounces)
    }

    fn audit_gates(&self) -> Result<(), String> {
        let mut out = HashMap::<u64, u64>::new();
        for op in self.ops.iter() {
            let gated = match op {
                OpKind::Io(io) => io.gated,
                kind => matches!(kind, OpKind::Sync { .. } | OpKind::Fallocate { .. }),
            };
            if gated && let Some(store) = op.disk().and_then(|disk| self.disks.get(disk as usize)?.store) {
                *out.entry(store).or_default() += 1;
            }
        }
        for (store, gate) in &self.gates {
            let real = out.remove(store).unwrap_or_default();
            check(|| format!("punted work of store {store}"), u64::from(gate.in_flight()), real)?;
        }
        check(|| "punted work of stores without a gate".into(), 0, out.values().sum())
    }

    /// Connections that still have to do with something: who they are, and how they stand. One whose client has had every answer
    /// is none of them.
    pub fn busy_conns(&self) -> Vec<(&str, String)> {
        let busy = self.conns.iter().filter(|(_, conn)| {
            // A send that the kernel did not complain of is counted as done at the beginning of the next turn.
            let sent = self.sent_now.iter().any(|&(_, op)| conn.send_op == Some(op));
            !conn.is_idle_but_for_input(sent)
        });
        busy.map(|(_, conn)| (conn.peer(), conn.summary())).collect()
    }
}
