//! From answers to bytes.

use ring_bridge::nbd::proto::state;
use ring_bridge::nbd::{NbdError, RequestKind, SLOT_BYTES, Slot, StatusBuilder};

use super::*;
use crate::storage::Op;

impl Conn {
    fn put(&mut self, command: Option<u32>, head: &[u8], data: Data) {
        let reply = Reply { head: SmallVec::from_slice(head), data };
        match self.streaming {
            Some(streaming) if command != Some(streaming) => self.deferred.push_back(reply),
            _ => self.out.push_back(reply),
        }
    }

    fn put_slot(&mut self, fill: impl FnOnce(ReplyStyle, &mut Slot) -> usize) {
        let mut slot: Slot = [0; SLOT_BYTES];
        let len = fill(self.style, &mut slot);
        self.put(None, &slot[..len], Data::None);
    }

    pub(super) fn reply_error(&mut self, to: ReplyTo, error: NbdError, message: &str) {
        self.put_slot(|style, slot| style.error(slot, to, error, message));
    }

    pub(super) fn reply_done(&mut self, to: ReplyTo) {
        self.put_slot(|style, slot| style.done(slot, to));
    }

    /// A request to the disk has been answered. Its payload belongs to the connection when it is a read that succeeded;
    /// else the caller has kept it.
    pub fn on_answer(&mut self, pool: &mut Pool, key: u32, mut request: Request) {
        self.requests -= 1;
        if matches!(request.kind, crate::request::Kind::Write { .. }) {
            self.held = self.held.saturating_sub(request.len);
        }
        let command = &mut self.commands[key as usize];
        command.left -= 1;
        if command.errno == 0 {
            command.errno = request.errno;
        }
        let kind = command.request.kind;
        match kind {
            RequestKind::Read => {
                let data = match request.payload.take() {
                    Some(buf) if request.errno == 0 => Data::Pool(buf, request.len as u32),
                    Some(buf) => {
                        self.give(pool, buf);
                        Data::None
                    }
                    None => Data::None,
                };
                if matches!(data, Data::None) {
                    self.held = self.held.saturating_sub(request.len);
                }
                self.answer_read(pool, key, &request, data);
            }
            RequestKind::BlockStatus => {
                let command = self.commands.remove(key as usize);
                self.answer_status(&command, &request);
            }
            _ => {
                if command.left == 0 && command.issued {
                    let command = self.commands.remove(key as usize);
                    match command.errno {
                        0 => self.reply_done(command.to()),
                        errno => self.reply_errno(&command, errno),
                    }
                }
            }
        }
        if let Some(buf) = request.payload.take() {
            self.give(pool, buf);
        }
    }

    fn reply_errno(&mut self, command: &Command, errno: i32) {
        let message = nix::errno::Errno::from_raw(errno).desc();
        self.reply_error(command.to(), NbdError::from_errno(errno), message);
    }

    fn answer_read(&mut self, pool: &mut Pool, key: u32, request: &Request, data: Data) {
        let command = &mut self.commands[key as usize];
        if let Some(ordered) = &mut command.ordered {
            ordered.ready.push((request.offset, data));
            return self.stream(pool, key);
        }
        let last = command.issued && command.left == 0;
        let to = command.to();
        let (style, offset, len) = (self.style, request.offset, request.len as u32);
        let mut slot: Slot = [0; SLOT_BYTES];
        let head = if request.errno == 0 {
            style.data(&mut slot, to, offset, len, last)
        } else {
            let error = NbdError::from_errno(request.errno);
            let message = nix::errno::Errno::from_raw(request.errno).desc();
            style
                .error_at(&mut slot, to, error, offset, message, last)
                .unwrap_or_else(|| style.error(&mut slot, to, error, message))
        };
        if last {
            self.commands.remove(key as usize);
        }
        self.put(None, &slot[..head], data);
    }

    /// Sends what is in order of an ordered reply, if it is its turn.
    fn stream(&mut self, pool: &mut Pool, key: u32) {
        if self.streaming.is_some_and(|streaming| streaming != key) {
            return;
        }
        loop {
            let Some(command) = self.commands.get_mut(key as usize) else { return };
            let (to, length, style) = (command.to(), command.request.length as u32, self.style);
            let (errno, finished) = (command.errno, command.issued && command.left == 0);
            let Some(ordered) = &mut command.ordered else { return };
            if errno != 0 && ordered.header_sent {
                return self.close(
                    "a read failed after its header had been sent, which the simple reply style cannot say",
                );
            }
            if errno != 0 {
                // Nothing was sent: wait for the other pieces, then say the error.
                for (_, data) in std::mem::take(&mut ordered.ready) {
                    self.discard(pool, data);
                }
                if finished {
                    let command = self.commands.remove(key as usize);
                    self.reply_errno(&command, errno);
                }
                return;
            }
            let Some(index) = ordered.ready.iter().position(|(offset, _)| *offset == ordered.next) else {
                return;
            };
            let (_, data) = ordered.ready.swap_remove(index);
            ordered.next += data.len() as u64;
            let first = !std::mem::replace(&mut ordered.header_sent, true);
            let complete = finished && ordered.ready.is_empty();
            let mut slot: Slot = [0; SLOT_BYTES];
            let head = if first { style.data(&mut slot, to, to.offset, length, true) } else { 0 };
            self.streaming = Some(key);
            self.put(Some(key), &slot[..head], data);
            if complete {
                self.commands.remove(key as usize);
                self.end_streaming(pool);
                return;
            }
        }
    }

    fn end_streaming(&mut self, pool: &mut Pool) {
        self.streaming = None;
        self.out.append(&mut self.deferred);
        // Others may have had their first piece, or their error, ready behind this one.
        let ordered: Vec<_> =
            self.commands.iter().filter(|(_, c)| c.ordered.is_some()).map(|(key, _)| key).collect();
        for key in ordered {
            if self.streaming.is_none() {
                self.stream(pool, key as u32);
            }
        }
    }

    fn answer_status(&mut self, command: &Command, request: &Request) {
        if request.errno != 0 {
            return self.reply_errno(command, request.errno);
        }
        let mut buffer = vec![0u8; 64 + 16 * (request.extents.len() + 1)];
        let Some(mut builder) = StatusBuilder::new(&mut buffer, &self.agreed, &command.request) else {
            return self.reply_errno(command, libc::EINVAL);
        };
        for extent in &request.extents {
            let flags = if extent.hole { state::HOLE | state::ZERO } else { 0 };
            if !builder.push(extent.len, flags) {
                break;
            }
        }
        let len = builder.finish();
        self.put(None, &buffer[..len], Data::None);
    }

    /// The operation that sends what is ready; `None` when there is nothing or a message is on its way.
    pub fn send_op(&mut self, pool: &mut Pool) -> Option<Op> {
        if self.send_op.is_some() || self.closing.is_some() || self.parking || !self.has_output() {
            return None;
        }
        let fd = self.raw_fd();
        if self.send_message.remaining() == 0 {
            self.fill_message(pool);
            if self.closing.is_some() || self.send_message.remaining() == 0 {
                return None;
            }
        }
        let header = self.send_message.prepare();
        // Sockets mostly take a message at once, and then the turn that its completion would cost is saved. Not when somebody
        // waits for the end of it.
        let at_once = !self.blocked && !self.stopped && !matches!(self.rx, Rx::Done);
        Some(if at_once { Op::SendNow { fd, header } } else { Op::SendMsg { fd, header } })
    }

    /// Something is to be sent; at the end of a TLS session its goodbye.
    fn has_output(&mut self) -> bool {
        let last = matches!(self.rx, Rx::Done) && self.commands.is_empty() && self.deferred.is_empty();
        let replies = !self.out.is_empty() || self.send_message.remaining() > 0;
        let Some(tls) = &mut self.tls else { return replies };
        if last && !replies && !std::mem::replace(&mut self.said_goodbye, true) {
            tls.session.close();
        }
        replies || tls.session.output_len() > 0
    }

    fn fill_message(&mut self, pool: &mut Pool) {
        debug_assert!(self.sending.is_empty());
        if self.tls.is_some() {
            return self.encrypt(pool);
        }
        let count = self.out.len().min(BATCH);
        // The vector keeps its memory from message to message; an idle connection has none.
        self.sending.extend(self.out.drain(..count));
        if self.send_message.is_small(2 * count) {
            self.send_message = Message::new(if count > 4 { 2 * BATCH } else { 8 });
        }
        self.send_message.clear();
        for reply in &self.sending {
            if !reply.head.is_empty() {
                self.send_message.push(reply.head.as_ptr() as usize, reply.head.len());
            }
            if reply.data.len() > 0 {
                self.send_message.push(reply.data.address(pool), reply.data.len());
            }
        }
    }

    /// Encrypts replies until a message is full.
    fn encrypt(&mut self, pool: &mut Pool) {
        while let Some(mut reply) = self.out.pop_front() {
            let Some(tls) = &mut self.tls else { return };
            let data = match &reply.data {
                Data::None => &[][..],
                Data::Pool(buf, len) => &pool.bytes(buf)[..*len as usize],
                Data::Bytes(bytes) => bytes,
            };
            let mut taken = [0; 2];
            for (part, taken) in [&reply.head[..], data].into_iter().zip(&mut taken) {
                match tls.session.write_plain(part) {
                    Ok(n) => *taken = n,
                    Err(error) => self.closing = Some(error.to_string()),
                }
                if *taken < part.len() {
                    break;
                }
            }
            // The session's output is full: the rest of this reply is first in the next message.
            let rest = data[taken[1]..].to_vec();
            reply.head.drain(..taken[0]);
            let data = std::mem::replace(&mut reply.data, Data::None);
            self.discard(pool, data);
            if !rest.is_empty() || !reply.head.is_empty() {
                self.held += rest.len() as u64;
                reply.data = Data::Bytes(rest);
                self.out.push_front(reply);
                break;
            }
        }
        let Some(tls) = &mut self.tls else { return };
        tls.session.swap_output(&mut tls.output);
        if self.send_message.is_small(1) {
            self.send_message = Message::new(1);
        }
        self.send_message.clear();
        self.send_message.push(tls.output.as_ptr() as usize, tls.output.len());
    }

    /// More replies or requests wait for the end of the send.
    pub fn awaits_send(&self) -> bool {
        !self.out.is_empty() || self.recv_op.is_none()
    }

    /// A [`Op::SendNow`] has taken everything.
    pub fn on_sent_all(&mut self, pool: &mut Pool, now: Nanos) {
        let all = self.send_message.remaining() as i32;
        self.on_sent(pool, all, now);
    }

    /// The send operation is done: bytes or a negative errno.
    pub fn on_sent(&mut self, pool: &mut Pool, result: i32, now: Nanos) {
        self.send_op = None;
        self.blocked = result != self.send_message.remaining() as i32;
        if result < 0 {
            match -result {
                libc::ECANCELED | libc::EINTR | libc::EAGAIN => {}
                libc::EPIPE | libc::ECONNRESET => {
                    self.close("closed by the client with replies on their way")
                }
                errno => {
                    let what = nix::errno::Errno::from_raw(errno).desc();
                    self.close(&format!("sending failed: {what}"));
                }
            }
            return;
        }
        self.sent_at = now;
        self.send_message.advance(result as usize);
        if self.send_message.remaining() > 0 {
            return;
        }
        self.finish_sending(pool);
    }

    fn finish_sending(&mut self, pool: &mut Pool) {
        self.send_message.clear();
        let mut sent = std::mem::take(&mut self.sending);
        for reply in sent.drain(..) {
            self.discard(pool, reply.data);
        }
        self.sending = sent;
    }

    /// Gives memory for large batches back when the connection has been idle.
    pub fn shrink(&mut self) {
        let nothing = self.send_message.remaining() == 0 && self.sending.is_empty() && self.out.is_empty();
        if self.send_op.is_none() && nothing {
            self.out.shrink_to(4);
            self.deferred.shrink_to_fit();
            self.sending.shrink_to_fit();
            if !self.send_message.is_small(9) {
                self.send_message = Message::new(0);
            }
            if let Some(tls) = &mut self.tls {
                tls.output.clear();
                tls.output.shrink_to_fit();
            }
        }
    }
}
