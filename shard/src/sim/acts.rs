//! What clients do when they may: read and judge, ask, send, fall silent, leave.

use super::client::{Ask, Life};
use super::kernel::Event as Happening;
use super::operator::Place;
use super::oracle::Outcome;
use super::scenario::Sim;
use super::socket::Gone;
use crate::clock::{MILLISECOND, SECOND};

impl Sim {
    /// A client reads, asks and writes as far as it can and likes.
    pub(super) fn act(&mut self, number: usize) {
        if self.clients[number].life == Life::Gone {
            return;
        }
        self.listen(number);
        if self.clients[number].life == Life::Gone {
            return;
        }
        let rude = self.plan.faults && !self.closing && self.rng.chance(2);
        if rude {
            let gone = if self.rng.chance(500) { Gone::Eof } else { Gone::Reset };
            return self.vanish(number, gone);
        }
        let client = &self.clients[number];
        if self.plan.faults && !self.closing && !client.deaf && !client.mute && self.rng.chance(4) {
            let client = &mut self.clients[number];
            (client.deaf, client.mute) =
                self.rng.pick(&[(true, false), (true, false), (false, true), (true, true)]);
            // Long enough, at times, to be thrown out for keeping what others need.
            let longest = if self.rng.chance(100) { 100 * SECOND } else { 100 * MILLISECOND };
            let after = self.rng.between(MILLISECOND, longest);
            self.world.borrow_mut().schedule(after, Happening::Read(number));
        }
        for _ in 0..4 {
            let client = &self.clients[number];
            if !client.wants() {
                break;
            }
            let now = self.instant();
            let client = &mut self.clients[number];
            client.ask(&mut self.disks[client.disk].model, now);
        }
        if self.plan.faults && self.rng.chance(3) && self.clients[number].life == Life::Talks && !self.closing
        {
            self.clients[number].leave();
        }
        self.speak(number);
    }

    /// Takes what the server sent and judges it.
    pub(super) fn listen(&mut self, number: usize) {
        let mut world = self.world.borrow_mut();
        let client = &mut self.clients[number];
        let socket = &mut world.sockets[client.sock];
        if !client.deaf {
            let step = client.habits.step.min(socket.to_client.len());
            client.inbox.extend(socket.to_client.drain(..step));
            let sock = client.sock;
            if step > 0 {
                world.kick(sock);
            }
        }
        drop(world);
        loop {
            let now = self.instant();
            let client = &mut self.clients[number];
            let disk = client.disk;
            match client.next_answer(&self.disks[disk].model) {
                Ok(Some(answer)) => self.judge(number, answer, now),
                Ok(None) => break,
                Err(message) => {
                    self.describe();
                    panic!("client {number} of disk {disk}: {message}");
                }
            }
        }
        let client = &self.clients[number];
        let over = {
            let world = self.world.borrow();
            let socket = &world.sockets[client.sock];
            socket.server_gone && (socket.to_client.is_empty() || client.deaf)
        };
        if over {
            let cut = client.ended_well && !client.deaf && !client.inbox.is_empty();
            assert!(!cut, "client {number}: the connection ended in the middle of a reply");
            self.vanish(number, Gone::Eof);
        }
    }

    pub(super) fn speak(&mut self, number: usize) {
        let mut world = self.world.borrow_mut();
        let client = &mut self.clients[number];
        let socket = &mut world.sockets[client.sock];
        let room = socket.room.saturating_sub(socket.to_server.len());
        let step = if client.mute { 0 } else { room.min(client.habits.step).min(client.outbox.len()) };
        socket.to_server.extend(client.outbox.drain(..step));
        let more_room = socket.room > socket.to_server.len();
        let readable = !client.deaf && !socket.to_client.is_empty();
        let sock = client.sock;
        if step > 0 {
            world.kick(sock);
        }
        if readable || client.wants() || (more_room && !client.mute && !client.outbox.is_empty()) {
            world.wake_client(number);
        }
    }

    /// A client is gone; what it asked for may still happen.
    pub(super) fn vanish(&mut self, number: usize, gone: Gone) {
        let mut world = self.world.borrow_mut();
        let client = &mut self.clients[number];
        world.say(format_args!("client {number} of disk {} is gone", client.disk));
        world.trace([5, number as u64, client.asked.len() as u64]);
        client.life = Life::Gone;
        world.sockets[client.sock].client_gone = gone;
        world.kick(client.sock);
        let disk = &mut self.disks[client.disk];
        for (_, asked) in std::mem::take(&mut client.asked) {
            if let Ask::Change { stamp, .. } = asked.ask {
                disk.orphans.push(stamp);
            }
            disk.lost_requests = true;
        }
    }

    /// Changes of clients that have gone are over when nothing of the disk is in flight.
    pub fn settle_orphans(&mut self) {
        let now = self.instant();
        for index in 0..self.disks.len() {
            let idle = !self.world.borrow().is_busy(index);
            let disk = &mut self.disks[index];
            if idle && disk.counters.io_now.get() == 0 && !matches!(disk.place, Place::Moving(..)) {
                for stamp in std::mem::take(&mut disk.orphans) {
                    disk.model.end(now, stamp, Outcome::Unknown);
                }
            }
        }
    }
}
