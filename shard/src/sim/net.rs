//! The simulated kernel, sockets: receives and sends that end when bytes or room are there, or the client is gone.

use std::os::fd::RawFd;

use super::kernel::{Event, InFlight, Running, World};
use super::memory;
use super::socket::Gone;
use crate::clock::MICROSECOND;

impl World {
    /// Lets the operations of a socket go on if they can.
    pub fn kick(&mut self, sock: usize) {
        let socket = &self.sockets[sock];
        let gone = socket.client_gone != Gone::No;
        let receive = socket.recv.filter(|_| gone || !socket.to_server.is_empty());
        let send = socket.send.filter(|_| gone || socket.to_client.len() < socket.room);
        for id in [receive, send].into_iter().flatten() {
            if let Some(running) = self.running.get_mut(&id)
                && let InFlight::Recv { scheduled, .. } | InFlight::Send { scheduled, .. } = &mut running.what
                && !std::mem::replace(scheduled, true)
            {
                let after = self.rng.between(MICROSECOND, 60 * MICROSECOND);
                self.schedule(after, Event::Op(id));
            }
        }
    }

    pub(super) fn try_receive(&mut self, id: u64) {
        let Some(Running { what: InFlight::Recv { sock, ranges, scheduled }, .. }) =
            self.running.get_mut(&id)
        else {
            return;
        };
        *scheduled = false;
        let (sock, ranges) = (*sock, ranges.clone());
        if let Some(result) = self.receive(sock, &ranges) {
            self.sockets[sock].recv = None;
            self.finish(id, result);
        }
    }

    /// A receive that does not wait.
    pub(super) fn receive_now(&mut self, fd: RawFd, ranges: &[(usize, usize)]) -> i32 {
        let sock = self.socket(fd);
        assert!(self.sockets[sock].recv.is_none(), "two operations of one direction on one socket");
        // Bytes may arrive just after it has looked.
        let early = self.rng.chance(300);
        let result = if early { None } else { self.receive(sock, ranges) }.unwrap_or(-libc::EAGAIN);
        self.trace([2, sock as u64, result as u64]);
        result
    }

    /// What a receive gets from a socket; `None` when nothing is there.
    fn receive(&mut self, sock: usize, ranges: &[(usize, usize)]) -> Option<i32> {
        let socket = &mut self.sockets[sock];
        let total: usize = ranges.iter().map(|range| range.1).sum();
        assert!(total > 0, "receive of nothing");
        let mut count = total.min(socket.to_server.len());
        if self.rng.chance(socket.faults) {
            return Some(if self.rng.chance(500) { -libc::EINTR } else { -libc::EAGAIN });
        }
        if count == 0 {
            return match socket.client_gone {
                Gone::No => None,
                Gone::Eof => Some(0),
                Gone::Reset => Some(-libc::ECONNRESET),
            };
        }
        if self.rng.chance(200) {
            count = self.rng.between(1, count as u64) as usize;
        }
        let bytes: Vec<u8> = socket.to_server.drain(..count).collect();
        let mut rest = &bytes[..];
        for &(addr, len) in ranges {
            let (now, later) = rest.split_at(len.min(rest.len()));
            memory::store(addr, now);
            rest = later;
        }
        let client = socket.client;
        self.wake_client(client);
        Some(count as i32)
    }

    pub(super) fn try_send(&mut self, id: u64) {
        let Some(Running { what: InFlight::Send { sock, ranges, done, scheduled }, .. }) =
            self.running.get_mut(&id)
        else {
            return;
        };
        *scheduled = false;
        let sock = *sock;
        let socket = &mut self.sockets[sock];
        let total: usize = ranges.iter().map(|range| range.1).sum();
        let client = socket.client;
        if socket.client_gone != Gone::No {
            let errno = if socket.client_gone == Gone::Eof { -libc::EPIPE } else { -libc::ECONNRESET };
            let result = if *done > 0 { *done as i32 } else { errno };
            socket.send = None;
            return self.finish(id, result);
        }
        let mut moved = 0;
        let room = socket.room.saturating_sub(socket.to_client.len());
        let (mut skip, mut left) = (*done, room.min(total - *done));
        for &(addr, len) in ranges.iter() {
            let start = skip.min(len);
            skip -= start;
            let step = left.min(len - start);
            if step > 0 {
                let mut bytes = vec![0; step];
                memory::load(addr + start, &mut bytes);
                socket.to_client.extend(bytes);
                left -= step;
                moved += step;
            }
        }
        *done += moved;
        let done = *done;
        // A signal may end it early.
        let ends = done == total || (done > 0 && self.rng.chance(30));
        if moved > 0 {
            self.wake_client(client);
        }
        if ends {
            self.sockets[sock].send = None;
            self.finish(id, done as i32);
        } else {
            self.kick(sock);
        }
    }

    /// Lets a client act soon; one event at a time.
    pub fn wake_client(&mut self, client: usize) {
        if !self.clients_due.insert(client) {
            return;
        }
        let after = self.rng.between(MICROSECOND, 80 * MICROSECOND);
        self.schedule(after, Event::Client(client));
    }
}
