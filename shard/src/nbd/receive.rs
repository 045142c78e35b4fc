//! From bytes to requests.

use ring_bridge::nbd::proto::command_flag;
use ring_bridge::nbd::{DecodeError, NbdError, PlainRead, Request as NbdRequest, RequestKind};

use super::*;
use crate::request::{Kind, PIECE};
use crate::storage::Op;

/// Extents of one block status answer: what fits a reply that is built at once.
const EXTENTS: usize = 512;

impl Tls {
    pub(super) fn new(session: Box<TlsSession>) -> Box<Tls> {
        Box::new(Tls { session, input: Vec::new(), pending: 0..0, output: Vec::new() })
    }
}

impl Conn {
    /// Bytes that arrived before the shard did.
    pub(super) fn preload(&mut self, unread: &[u8]) {
        // Negotiation bounds what it reads ahead; a client may have sent a whole write behind its last option.
        if unread.len() > INPUT {
            self.input = vec![0; unread.len()].into_boxed_slice();
        }
        self.input[..unread.len()].copy_from_slice(unread);
        self.input_end = unread.len();
    }

    fn buffered(&self) -> usize {
        self.input_end - self.input_start
    }

    fn consume(&mut self, bytes: usize) {
        self.input_start += bytes;
        if self.input_start == self.input_end {
            self.input_start = 0;
            self.input_end = 0;
        }
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.requests < REQUESTS_MAX && (self.held == 0 || self.held + bytes <= HELD_MAX)
    }

    /// Reads as far as bytes, room and the share of this turn go.
    pub fn advance(&mut self, ctx: &mut ConnCtx<'_>) -> Stop {
        loop {
            if self.closing.is_some() || matches!(self.rx, Rx::Done) {
                return Stop::End;
            }
            // A read that was taken is answered to its end.
            if self.stopped && !self.is_reading() {
                return Stop::Room;
            }
            if ctx.steps == 0 || ctx.bytes == 0 {
                return Stop::Turn;
            }
            let before = ctx.out.len();
            let step = match self.rx {
                Rx::Header => self.header(ctx),
                Rx::Reading { command, next } => self.read_piece(ctx, command, next),
                Rx::Writing { command, next } => self.write_piece(ctx, command, next),
                Rx::Payload { .. } => self.payload(ctx),
                Rx::Skip { .. } => self.skip(),
                Rx::Done => Some(Stop::End),
            };
            for request in &ctx.out[before..] {
                ctx.bytes = ctx.bytes.saturating_sub(request.len.min(u64::from(PIECE)).max(512));
            }
            ctx.steps -= 1;
            match step {
                // TLS may hold decrypted bytes.
                Some(Stop::Input) if self.decrypt() => ctx.steps += 1,
                // And ciphertext that its session has no room for until its output has been sent.
                Some(Stop::Input) if self.tls.as_ref().is_some_and(|tls| !tls.pending.is_empty()) => {
                    return Stop::Room;
                }
                Some(stop) => return stop,
                None => {}
            }
        }
    }

    /// Moves plaintext into the input; whether there was any.
    fn decrypt(&mut self) -> bool {
        self.make_space();
        let Some(tls) = &mut self.tls else { return false };
        if self.input_end == self.input.len() {
            return false;
        }
        loop {
            match tls.session.read_plain(&mut self.input[self.input_end..]) {
                Ok(PlainRead::Bytes(0) | PlainRead::WouldBlock) => {
                    if tls.pending.is_empty() {
                        return false;
                    }
                    let taken = tls.session.feed(&tls.input[tls.pending.clone()]);
                    tls.pending.start += taken;
                    if taken == 0 {
                        return false;
                    }
                }
                Ok(PlainRead::Bytes(n)) => {
                    self.input_end += n;
                    return true;
                }
                Ok(PlainRead::Closed) => {
                    self.end_of_input();
                    return false;
                }
                Err(error) => {
                    self.close(&error.to_string());
                    return false;
                }
            }
        }
    }

    fn make_space(&mut self) {
        if self.input_start > 0 {
            self.input.copy_within(self.input_start..self.input_end, 0);
            self.input_end -= self.input_start;
            self.input_start = 0;
        }
    }

    fn header(&mut self, ctx: &mut ConnCtx<'_>) -> Option<Stop> {
        if self.buffered() < self.agreed.header_bytes() {
            return Some(Stop::Input);
        }
        // Refusals and hints are answered without a request: who does not take these replies is not read further either.
        let replies = self.out.len() + self.deferred.len();
        if !self.has_room(0) || replies >= REPLIES_MAX {
            return Some(Stop::Room);
        }
        let decoded = self.agreed.decode(&self.input[self.input_start..self.input_end]);
        self.consume(self.agreed.header_bytes());
        match decoded {
            Ok(request) => self.take(ctx, request),
            Err(DecodeError::Refuse(refused)) => {
                self.reply_error(refused.reply_to, refused.refusal.error, refused.refusal.reason);
                self.rx = Rx::Skip { left: refused.payload };
            }
            Err(DecodeError::Drop(violation)) => self.close(&violation.to_string()),
        }
        None
    }

    fn take(&mut self, ctx: &mut ConnCtx<'_>, request: NbdRequest) {
        self.writes = request.kind == RequestKind::Write;
        if let Err(refusal) = self.agreed.check(&request) {
            self.reply_error(request.reply_to(), refusal.error, refusal.reason);
            self.rx = Rx::Skip { left: request.payload };
            return;
        }
        let df = request.has(command_flag::DF);
        if df && request.length > u64::from(PIECE) {
            let message = "an unfragmented read is limited to 256 KiB";
            return self.reply_error(request.reply_to(), NbdError::Eoverflow, message);
        }
        let fua = request.fua();
        let kind = match request.kind {
            RequestKind::Disconnect => {
                self.rx = Rx::Done;
                return;
            }
            RequestKind::Read => {
                let ordered = (self.style == ReplyStyle::Simple && request.length > u64::from(PIECE))
                    .then(|| Ordered { next: request.offset, ready: Vec::new(), header_sent: false });
                let command = self.add_command(request, ordered);
                self.rx = Rx::Reading { command, next: request.offset };
                return;
            }
            RequestKind::Write => {
                let command = self.add_command(request, None);
                self.rx = Rx::Writing { command, next: request.offset };
                return;
            }
            RequestKind::Flush => Kind::Flush,
            RequestKind::Trim => Kind::Discard { fua },
            RequestKind::WriteZeroes => Kind::WriteZeroes {
                fua,
                no_hole: request.has(command_flag::NO_HOLE),
                fast: request.has(command_flag::FAST_ZERO),
            },
            RequestKind::BlockStatus => Kind::Extents { max: EXTENTS },
            // Data is not cached here (O_DIRECT), so there is nothing to prefetch; the command is a hint.
            RequestKind::Cache => return self.reply_done(request.reply_to()),
        };
        let command = self.add_command(request, None);
        self.commands[command as usize].issued = true;
        self.issue(ctx, command, kind, request.offset, request.length, 1, None);
    }

    fn add_command(&mut self, request: NbdRequest, ordered: Option<Ordered>) -> u32 {
        self.commands.insert(Command { request, left: 0, issued: false, errno: 0, ordered }) as u32
    }

    #[expect(clippy::too_many_arguments, reason = "a request has these properties")]
    fn issue(
        &mut self,
        ctx: &mut ConnCtx<'_>,
        command: u32,
        kind: Kind,
        offset: u64,
        len: u64,
        operations: u32,
        payload: Option<Buf>,
    ) {
        let mut request = Request::new(self.disk, kind, offset, len, self.origin(command), ctx.now);
        request.operations = operations;
        request.payload = payload;
        self.commands[command as usize].left += 1;
        self.requests += 1;
        ctx.out.push(request);
    }

    /// End of the piece that starts at `next`: whole where it can be, and such that later pieces start on a 4 KiB border.
    fn piece_end(next: u64, end: u64) -> u64 {
        if end - next <= u64::from(PIECE) {
            return end;
        }
        (next + u64::from(PIECE)) & !4095
    }

    fn read_piece(&mut self, ctx: &mut ConnCtx<'_>, command: u32, next: u64) -> Option<Stop> {
        let Command { request, left, .. } = self.commands[command as usize];
        let end = request.offset + request.length;
        let stop = Self::piece_end(next, end);
        let len = stop - next;
        // Replies that wait behind this one must not keep it from going on.
        let first = self.streaming == Some(command) && left == 0;
        if !first && !self.has_room(len) {
            return Some(Stop::Room);
        }
        if !first && !ctx.may_take && self.held > 0 {
            return Some(Stop::Buffer);
        }
        self.held += len;
        self.issue(ctx, command, Kind::Read, next, len, u32::from(next == request.offset), None);
        if stop == end {
            self.commands[command as usize].issued = true;
            self.rx = Rx::Header;
        } else {
            self.rx = Rx::Reading { command, next: stop };
        }
        None
    }

    fn write_piece(&mut self, ctx: &mut ConnCtx<'_>, command: u32, next: u64) -> Option<Stop> {
        let request = self.commands[command as usize].request;
        let stop = Self::piece_end(next, request.offset + request.length);
        let len = stop - next;
        if !self.has_room(len) {
            return Some(Stop::Room);
        }
        if !ctx.may_take && self.buffers > 0 {
            return Some(Stop::Buffer);
        }
        let Some(buf) = ctx.pool.take(len as usize, self.buffers == 0) else {
            return Some(Stop::Buffer);
        };
        self.note_buffer(&buf);
        self.held += len;
        self.rx = Rx::Payload {
            command,
            offset: next,
            data: Data::Pool(buf, len as u32),
            filled: 0,
            len: len as u32,
        };
        None
    }

    fn payload(&mut self, ctx: &mut ConnCtx<'_>) -> Option<Stop> {
        let Rx::Payload { command, offset, data, filled, len } = &mut self.rx else { return None };
        let (command, offset, len) = (*command, *offset, *len);
        if let Data::Bytes(bytes) = data {
            // It came from another shard, where it had its place in the budget.
            let Some(buf) = ctx.pool.take(bytes.len(), true) else { return Some(Stop::Buffer) };
            ctx.pool.bytes_mut(&buf)[..bytes.len()].copy_from_slice(bytes);
            self.buffers += buf.capacity() as u64;
            *data = Data::Pool(buf, len);
        }
        let Data::Pool(buf, _) = data else {
            self.close("a payload without a buffer");
            return None;
        };
        let missing = (len - *filled) as usize;
        let at_hand = missing.min(self.input_end - self.input_start);
        if at_hand > 0 {
            let from = &self.input[self.input_start..self.input_start + at_hand];
            ctx.pool.bytes_mut(buf)[*filled as usize..][..at_hand].copy_from_slice(from);
            *filled += at_hand as u32;
        }
        let complete = *filled == len;
        if at_hand > 0 {
            self.consume(at_hand);
        }
        if !complete {
            return Some(Stop::Input);
        }
        let request = self.commands[command as usize].request;
        let next = offset + u64::from(len);
        let more = next < request.offset + request.length;
        let rx = if more { Rx::Writing { command, next } } else { Rx::Header };
        self.commands[command as usize].issued = !more;
        let Rx::Payload { data: Data::Pool(buf, _), .. } = std::mem::replace(&mut self.rx, rx) else {
            return None;
        };
        let kind = Kind::Write { fua: request.fua() };
        let operations = u32::from(offset == request.offset);
        self.issue(ctx, command, kind, offset, u64::from(len), operations, Some(buf));
        None
    }

    fn skip(&mut self) -> Option<Stop> {
        let Rx::Skip { left } = self.rx else { return None };
        let step = self.buffered().min(left as usize);
        self.consume(step);
        let left = left - step as u32;
        if left == 0 {
            self.rx = Rx::Header;
            return None;
        }
        self.rx = Rx::Skip { left };
        Some(Stop::Input)
    }

    /// The operation that receives what is needed next.
    pub fn receive_op(&mut self, pool: &Pool) -> Op {
        let fd = self.raw_fd();
        if let Some(tls) = &mut self.tls {
            tls.input.resize(TLS_INPUT, 0);
            return Op::Recv { fd, addr: tls.input.as_ptr() as usize, len: TLS_INPUT as u32 };
        }
        self.make_space();
        let room = self.input.len() - self.input_end;
        // Not beyond the next header when writes come: their payload shall land in its own buffer.
        let ahead = if self.writes { room.min(self.agreed.header_bytes()) } else { room };
        let input = self.input[self.input_end..].as_ptr() as usize;
        if let Rx::Payload { data: Data::Pool(buf, _), filled, len, .. } = &self.rx {
            self.recv_message.clear();
            self.recv_message.push(pool.address(buf) + *filled as usize, (len - filled) as usize);
            self.recv_message.push(input, ahead);
            return Op::RecvMsg { fd, header: self.recv_message.prepare() };
        }
        let wanted = match self.rx {
            Rx::Header if self.writes => self.agreed.header_bytes() - self.buffered(),
            _ => room,
        };
        Op::Recv { fd, addr: input, len: wanted as u32 }
    }

    /// The receive operation is done: bytes, 0 at the end, or a negative errno.
    pub fn on_received(&mut self, result: i32, now: Nanos) {
        self.recv_op = None;
        match result {
            0 => {
                if self.closing.is_none() && !self.commands.is_empty() {
                    self.close("closed by the client with requests in flight");
                }
                self.end_of_input();
            }
            n if n > 0 => {
                self.received_at = now;
                self.received(n as usize);
            }
            errno if -errno == libc::ECANCELED || -errno == libc::EINTR || -errno == libc::EAGAIN => {}
            errno if -errno == libc::ECONNRESET => self.close("connection reset by the client"),
            errno => {
                let what = nix::errno::Errno::from_raw(-errno).desc();
                self.close(&format!("receiving failed: {what}"));
            }
        }
    }

    fn end_of_input(&mut self) {
        if matches!(self.rx, Rx::Payload { .. }) {
            self.close("closed by the client in the middle of a write");
        } else {
            self.rx = Rx::Done;
        }
    }

    fn received(&mut self, bytes: usize) {
        if let Some(tls) = &mut self.tls {
            let taken = tls.session.feed(&tls.input[..bytes]);
            tls.pending = taken..bytes;
            return;
        }
        let mut rest = bytes;
        if let Rx::Payload { filled, len, .. } = &mut self.rx {
            let step = rest.min((*len - *filled) as usize);
            *filled += step as u32;
            rest -= step;
        }
        self.input_end += rest;
    }
}
