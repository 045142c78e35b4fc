//! The simulated kernel, sockets: receives and sends that end when bytes or room are there, or the client is gone.

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
        let sock = *sock;
        let socket = &mut self.sockets[sock];
        let total: usize = ranges.iter().map(|range| range.1).sum();
        let mut count = total.min(socket.to_server.len());
        let result = if self.rng.chance(socket.faults) {
            if self.rng.chance(500) { -libc::EINTR } else { -libc::EAGAIN }
        } else if count == 0 {
            match socket.client_gone {
                Gone::No => return,
                Gone::Eof => 0,
                Gone::Reset => -libc::ECONNRESET,
            }
        } else {
            if self.rng.chance(200) {
                count = self.rng.between(1, count as u64) as usize;
            }
            let bytes: Vec<u8> = socket.to_server.drain(..count).collect();
            let mut rest = &bytes[..];
            for &(addr, len) in ranges.iter() {
                let (now, later) = rest.split_at(len.min(rest.len()));
                memory::store(addr, now);
                rest = later;
            }
            count as i32
        };
        socket.recv = None;
        let client = socket.client;
        if result > 0 {
            self.wake_client(client);
        }
        self.finish(id, result);
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
