//! Random requests on several connections, many in flight on each, every answer checked against the model.
//!
//! One seed gives the same requests; which of them meet in flight is the daemon's timing.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crossbeam::channel::Select;

use super::model::{Effect, Model, Tick};
use super::nbd_client::{Client, FUA, NO_HOLE, Op, Reply};
use super::{PATIENCE, Random};

/// Requests in flight on one connection.
const WINDOW: usize = 24;
/// Half of all requests fall into a range of this size, so that they meet.
const HOT_BYTES: u64 = 64 << 10;

/// What an answer will mean.
enum Waiting {
    Change(usize),
    Read { offset: u64, sent: Tick },
    Status { range: Range<u64>, sent: Tick },
    Flush,
}

/// Connections under load.
pub struct Load {
    clients: Vec<(Client, HashMap<u64, Waiting>)>,
    pub model: Model,
    random: Random,
    /// Answers may be errors: the daemon is about to stop. What such a change did is not known.
    pub errors_allowed: bool,
    /// No request asks for durability.
    pub never_flushes: bool,
}

impl Load {
    /// Opens `connections` connections to a disk that `model` describes.
    pub fn new(socket: &Path, connections: usize, model: Model, seed: u64) -> Load {
        let connect = |_| (Client::connect(socket).expect("connects"), HashMap::new());
        let clients: Vec<_> = (0..connections).map(connect).collect();
        assert_eq!(clients[0].0.size_bytes, model.size(), "size of the disk");
        Load { clients, model, random: Random(seed), errors_allowed: false, never_flushes: false }
    }

    /// Sends `count` requests and takes answers whenever a connection has enough in flight.
    pub fn run(&mut self, count: u32) {
        for _ in 0..count {
            let connection = self.random.below(self.clients.len() as u64) as usize;
            while self.clients[connection].1.len() >= WINDOW {
                self.take_answer().expect("an answer");
            }
            self.send_one(connection);
        }
    }

    /// Takes all answers that are still to come.
    pub fn drain(&mut self) {
        while self.clients.iter().any(|(_, waiting)| !waiting.is_empty()) {
            self.take_answer().expect("an answer");
        }
    }

    /// Drains, reads the whole disk, and makes that the state that the model knows.
    pub fn settle(mut self) -> Model {
        self.drain();
        let whole = self.clients[0].0.read(0, self.model.size() as usize);
        self.model.settle(whole).unwrap_or_else(|why| panic!("the disk after a load: {why}"));
        self.model
    }

    /// The daemon is gone: takes the answers that had come.
    pub fn abandon(mut self) -> Model {
        while self.take_answer().is_some() {}
        self.model
    }

    /// Waits for one answer on any connection; `None` when all have ended.
    fn take_answer(&mut self) -> Option<()> {
        let mut open: Vec<usize> = (0..self.clients.len()).collect();
        while !open.is_empty() {
            let mut select = Select::new();
            for &connection in &open {
                select.recv(self.clients[connection].0.replies());
            }
            let index = select.ready_timeout(PATIENCE).expect("an answer before the deadline");
            let connection = open[index];
            match self.clients[connection].0.receive() {
                Some(reply) => {
                    self.answered(connection, reply);
                    return Some(());
                }
                None => _ = open.swap_remove(index),
            }
        }
        None
    }

    fn answered(&mut self, connection: usize, reply: Reply) {
        let waiting = self.clients[connection].1.remove(&reply.cookie).expect("it was asked");
        if reply.error != 0 {
            assert!(self.errors_allowed, "error {} for a request that is right", reply.error);
            return;
        }
        let checked = match waiting {
            Waiting::Change(change) => {
                self.model.answered(change);
                Ok(())
            }
            Waiting::Read { offset, sent } => self.model.check(offset, &reply.data, sent),
            Waiting::Status { range, sent } => self.model.check_extents(range, &reply.extents, sent),
            Waiting::Flush => Ok(()),
        };
        checked.unwrap_or_else(|why| panic!("{why}"));
    }

    fn send_one(&mut self, connection: usize) {
        let range = self.range();
        let (offset, length) = (range.start, (range.end - range.start) as u32);
        let (model, random) = (&mut self.model, &mut self.random);
        let (op, flags, data, waiting) = match random.below(100) {
            0..30 => (Op::Read, 0, Vec::new(), Waiting::Read { offset, sent: model.tick() }),
            30..75 => {
                let data = random.bytes(length as usize);
                let flags = if random.below(8) == 0 { FUA } else { 0 };
                let change = model.sent(range, Effect::Bytes(data.clone()));
                (Op::Write, flags, data, Waiting::Change(change))
            }
            75..83 => {
                let flags = [0, NO_HOLE, FUA, FUA | NO_HOLE][random.below(4) as usize];
                (Op::WriteZeroes, flags, Vec::new(), Waiting::Change(model.sent(range, Effect::Zeroes)))
            }
            83..90 => (Op::Trim, 0, Vec::new(), Waiting::Change(model.sent(range, Effect::Trim))),
            90..96 => (Op::BlockStatus, 0, Vec::new(), Waiting::Status { range, sent: model.tick() }),
            _ => (Op::Flush, 0, Vec::new(), Waiting::Flush),
        };
        if self.never_flushes && op == Op::Flush {
            return;
        }
        let flags = if self.never_flushes { flags & !FUA } else { flags };
        let (offset, length) = if op == Op::Flush { (0, 0) } else { (offset, length) };
        let (client, in_flight) = &mut self.clients[connection];
        let cookie = client.send(op, flags, offset, length, &data);
        in_flight.insert(cookie, waiting);
    }

    /// A range of the disk: of any length and at any place, or of sectors, or of blocks; some touch the end.
    fn range(&mut self) -> Range<u64> {
        let (size, random) = (self.model.size(), &mut self.random);
        let unit = [1, 1, 512, 512, 4096][random.below(5) as usize];
        let units = match random.below(20) {
            0 => 1 + random.below((128 << 10) / unit),
            1..6 => 1 + random.below((16 << 10) / unit),
            _ => 1 + random.below(((4 << 10) / unit).max(2)),
        };
        let length = (units * unit).min(size);
        let room = if random.below(2) == 0 { size.min(HOT_BYTES + length) } else { size } - length;
        let start = match random.below(16) {
            0 => size - length,
            _ => random.below(room + 1) / unit * unit,
        };
        start..start + length
    }
}
