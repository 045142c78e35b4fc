//! Commands of a ring: their stages, the requests that they are cut into, and their answers.
//!
//! ```text
//! read, write:  data                       flush:   flush ─▶ [data]
//! discard:      erase, or zeroes           barrier: flush ─▶ [data ─▶ flush]
//! ```
//! A flush that fails is held: see the rules of [`crate::blkif`].

use super::*;

/// What a command is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The flush before the data, or without any.
    Flush,
    /// Data of a read, write, flush or barrier.
    Data,
    /// The flush behind the data of a barrier.
    Settle,
    /// A discard.
    Erase,
    /// A discard that overwrites with zeroes.
    Wipe,
}

/// A request of the guest that was handed out.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) token: Token,
    pub(super) operation: Operation,
    /// Bytes on the disk.
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) stage: Stage,
    /// Its flush failed: it waits for a resume.
    pub(super) held: bool,
    /// Bytes of this stage that were issued.
    pub(super) next: u64,
    /// All of this stage was issued.
    pub(super) issued: bool,
    /// Requests at the disk, and pieces on their way to the guest.
    pub(super) left: u32,
    /// First error, as errno.
    pub(super) errno: i32,
}

/// What comes next of a ring's commands.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "made for each request, which must not allocate")]
pub enum Next {
    /// A request for the disk; of a write, with a buffer that the guest's data has to be copied to (see [`GuestRing::copy_in`]).
    Piece(Piece),
    /// Nothing is left.
    Nothing,
    /// Answers have to come first.
    Room,
    /// A buffer is needed.
    Buffer,
}

/// A request for the disk.
#[derive(Debug)]
pub struct Piece {
    /// The request.
    pub request: Request,
    /// Command that it belongs to.
    pub(super) command: u16,
    /// Byte of the command.
    pub(super) at: u64,
    /// Its data is the guest's.
    pub(super) guests_data: bool,
}

impl GuestRing {
    pub(super) fn enter(&mut self, Taking { token, body }: Taking) {
        let stage = match body.operation {
            Operation::Read | Operation::Write => Stage::Data,
            Operation::Flush | Operation::Barrier => Stage::Flush,
            Operation::Discard { secure: false } => Stage::Erase,
            Operation::Discard { secure: true } => Stage::Wipe,
        };
        self.counters.requests[GuestOp::of(body.operation) as usize].add(1);
        let Some(place) = self.commands.get_mut(usize::from(token.slot)) else { return };
        debug_assert!(place.is_none(), "the engine handed a slot out twice");
        *place = Some(Command {
            token,
            operation: body.operation,
            offset: body.offset_bytes(),
            len: body.len_bytes(),
            stage,
            held: false,
            next: 0,
            issued: false,
            left: 0,
            errno: 0,
        });
        self.open += 1;
        self.enqueue(token.slot);
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.held == 0 || self.held + bytes <= HELD_MAX
    }

    /// Bytes of the next piece of a command, and whether it is data.
    fn piece_of(command: &Command) -> (u64, bool) {
        let from = command.offset + command.next;
        match command.stage {
            Stage::Flush | Stage::Settle => (0, false),
            Stage::Erase => (command.len, false),
            Stage::Data | Stage::Wipe => (piece_end(from, command.offset + command.len) - from, true),
        }
    }

    /// A command that overwrites does one piece after the other.
    fn waits_for_itself(command: &Command) -> bool {
        command.stage == Stage::Wipe && command.left > 0
    }

    /// Something is to be issued and there is room for it.
    pub(super) fn can_go_on(&self) -> bool {
        let commands = self.queue_of.iter().map(|&slot| self.commands[usize::from(slot)].as_ref());
        let first = commands.flatten().find(|command| !Self::waits_for_itself(command));
        first.map(Self::piece_of).is_some_and(|(len, moves)| !moves || self.has_room(len))
    }

    /// The next request for the disk. `may_take`: the disk may have more of the pool.
    pub fn next(&mut self, pool: &mut Pool, may_take: bool, now: Nanos) -> Next {
        if self.stopped {
            return Next::Nothing;
        }
        // Each is looked at once, or ends.
        let mut waiting = 0;
        while waiting < self.queue_of.len() {
            let Some(&slot) = self.queue_of.front() else { break };
            let Some(command) = self.commands[usize::from(slot)].as_mut() else {
                self.queue_of.pop_front();
                continue;
            };
            if command.errno != 0 {
                // The rest of it is not wanted any more.
                command.issued = true;
                self.unqueue();
                self.settle(slot);
                continue;
            }
            if Self::waits_for_itself(command) {
                self.queue_of.rotate_left(1);
                waiting += 1;
                continue;
            }
            let (stage, operation, at) = (command.stage, command.operation, command.next);
            let (len, moves) = Self::piece_of(command);
            let kind = match stage {
                Stage::Flush | Stage::Settle => Kind::Flush,
                Stage::Erase => Kind::Discard { fua: false },
                Stage::Data if operation == Operation::Read => Kind::Read,
                Stage::Data | Stage::Wipe => Kind::Write { fua: false },
            };
            let mut payload = None;
            if moves {
                if !self.has_room(len) {
                    return Next::Room;
                }
                let has_some = if kind == Kind::Read { self.held > 0 } else { self.buffers > 0 };
                if !may_take && has_some {
                    return Next::Buffer;
                }
                if kind != Kind::Read {
                    let Some(buf) = pool.take(len as usize, self.buffers == 0) else { return Next::Buffer };
                    self.note_buffer(&buf);
                    payload = Some(buf);
                }
                self.held += len;
            }
            if let Some(buf) = payload.as_ref().filter(|_| stage == Stage::Wipe) {
                pool.bytes_mut(buf)[..len as usize].fill(0);
            }
            let origin =
                Origin { client: self.client(), generation: self.generation, command: u32::from(slot) };
            let Some(command) = self.commands[usize::from(slot)].as_mut() else { continue };
            let offset = if kind == Kind::Flush { 0 } else { command.offset + at };
            let mut request = Request::new(self.disk, kind, offset, len, Some(origin), now);
            request.operations = u32::from(at == 0);
            request.payload = payload;
            command.next += len;
            command.left += 1;
            command.issued = !moves || command.next == command.len;
            if command.issued {
                self.unqueue();
            }
            self.requests += 1;
            let guests_data = stage == Stage::Data && kind != Kind::Read;
            return Next::Piece(Piece { request, command: slot, at, guests_data });
        }
        Next::Nothing
    }

    /// Puts a command in line.
    fn enqueue(&mut self, slot: u16) {
        self.wiping += usize::from(self.wipes(slot));
        self.queue_of.push_back(slot);
    }

    /// Takes the first command out of the line.
    fn unqueue(&mut self) {
        if let Some(slot) = self.queue_of.pop_front() {
            self.wiping -= usize::from(self.wipes(slot));
        }
    }

    fn wipes(&self, slot: u16) -> bool {
        self.commands[usize::from(slot)].as_ref().is_some_and(|command| command.stage == Stage::Wipe)
    }

    /// A request to the disk has been answered, or will not be made.
    pub fn on_answer(&mut self, pool: &mut Pool, command: u32, mut request: Request) {
        self.requests -= 1;
        let moves = matches!(request.kind, Kind::Read | Kind::Write { .. });
        let payload = request.payload.take();
        let slot = command as u16;
        let Some(command) = self.commands.get_mut(command as usize).and_then(Option::as_mut) else {
            debug_assert!(false, "an answer to no command");
            return payload.into_iter().for_each(|buf| self.give(pool, buf));
        };
        if command.errno == 0 {
            command.errno = request.errno;
        }
        match payload {
            Some(buf) if request.kind == Kind::Read && request.errno == 0 && self.broken.is_none() => {
                let at = request.offset - command.offset;
                self.outgoing.push(Outgoing { command: slot, at, len: request.len, buf });
            }
            payload => {
                command.left -= 1;
                self.held -= if moves { request.len } else { 0 };
                payload.into_iter().for_each(|buf| self.give(pool, buf));
                self.settle(slot);
            }
        }
    }

    /// Goes on with a command of which a stage may have ended.
    pub(super) fn settle(&mut self, slot: u16) {
        let Some(command) = self.commands[usize::from(slot)].as_mut() else { return };
        if command.left > 0 || !command.issued {
            return;
        }
        let next = match (command.stage, command.errno) {
            (Stage::Flush | Stage::Settle, errno) if errno != 0 => {
                command.errno = 0;
                (command.issued, command.held) = (false, true);
                self.open -= 1;
                self.held_flushes += 1;
                self.flush_news = true;
                return;
            }
            (Stage::Flush, _) if command.len > 0 => Stage::Data,
            (Stage::Data, 0) if command.operation == Operation::Barrier => Stage::Settle,
            (_, errno) => {
                let (token, discard) = (command.token, command.stage == Stage::Erase);
                return self.answer(token, errno, discard);
            }
        };
        (command.stage, command.next, command.issued) = (next, 0, false);
        self.enqueue(slot);
    }

    /// The one place that maps errors to those of the protocol.
    fn answer(&mut self, token: Token, errno: i32, discard: bool) {
        let status = match errno {
            0 => Status::Okay,
            libc::EOPNOTSUPP if discard => Status::NotSupported,
            _ => Status::Error,
        };
        self.counters.errors.add(u64::from(status != Status::Okay));
        self.commands[usize::from(token.slot)] = None;
        self.open -= 1;
        let answered = self.engine.answer(token, status);
        self.note(answered);
    }

    /// Flushes that failed are tried again: the disk was resumed.
    pub fn retry_flushes(&mut self) {
        for (slot, command) in (0u16..).zip(self.commands.iter_mut()) {
            if let Some(command) = command.as_mut().filter(|command| command.held) {
                command.held = false;
                self.queue_of.push_back(slot); // none of them overwrites
                self.open += 1;
                self.held_flushes -= 1;
            }
        }
    }

    /// After the ring was broken: what was not begun is forgotten, mappings go.
    pub fn give_up(&mut self) {
        self.queue_of.clear();
        self.wiping = 0;
        self.fetches.clear();
        self.counters.rings_broken.add(1);
        for slot in 0..self.commands.len() as u16 {
            let Some(command) = self.commands[usize::from(slot)].as_mut() else { continue };
            if std::mem::take(&mut command.held) {
                self.open += 1;
                self.held_flushes -= 1;
            }
            // Not a flush that could be held again.
            command.stage = Stage::Data;
            command.issued = true;
            if command.errno == 0 {
                command.errno = libc::EIO;
            }
            self.settle(slot);
        }
        if let Some(cache) = &mut self.cache {
            cache.clear();
        }
    }
}

/// End of the piece that starts at `next`: whole where it can be, and such that later pieces start on a 4 KiB border.
fn piece_end(next: u64, end: u64) -> u64 {
    if end - next <= u64::from(PIECE) { end } else { (next + u64::from(PIECE)) & !4095 }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: pieces are bounded, cover a request, and all but the first begin on a page of the disk.
    #[test]
    fn pieces_cover_a_request() {
        for (start, len) in
            [(0u64, 1 << 20), (512, 1 << 20), (3584, 300 << 10), (4096, 262_144), (512, 262_144)]
        {
            let (mut at, end) = (start, start + len);
            while at < end {
                let next = piece_end(at, end);
                assert!(next > at && next - at <= u64::from(PIECE));
                assert!(at == start || at % 4096 == 0);
                at = next;
            }
            assert_eq!(at, end);
        }
    }
}
