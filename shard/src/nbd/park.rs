//! A connection between two shards: everything of it that is not a kernel operation or a buffer of the pool.

use super::*;

/// A connection that was taken off a shard. Owns its memory; can be sent.
#[derive(Debug)]
pub struct ParkedConn {
    fd: OwnedFd,
    peer: String,
    since: Nanos,
    agreed: Transmission,
    tls: Option<Box<Tls>>,
    input: Vec<u8>,
    rx: Rx,
    writes: bool,
    commands: slab::Slab<Command>,
    requests: u32,
    held: u64,
    out: VecDeque<Reply>,
    streaming: Option<u32>,
    deferred: VecDeque<Reply>,
    slot: u32,
    generation: u32,
}

impl ParkedConn {
    /// Slot and generation that requests of this connection name as their origin.
    pub fn origin(&self) -> (Client, u32) {
        (Client::Conn(self.slot), self.generation)
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &str {
        &self.peer
    }
}

impl Data {
    fn detach(self, pool: &mut Pool) -> Data {
        match self {
            Data::Pool(buf, len) => {
                let bytes = pool.bytes(&buf)[..len as usize].to_vec();
                pool.give(buf);
                Data::Bytes(bytes)
            }
            other => other,
        }
    }
}

impl Conn {
    /// Whether nothing of it is in the kernel.
    pub fn can_park(&self) -> bool {
        self.recv_op.is_none() && self.send_op.is_none()
    }

    /// Takes the connection apart. Nothing of it may be in the kernel, and its requests at the disk must be unstarted.
    pub fn park(mut self, pool: &mut Pool) -> ParkedConn {
        // What the kernel did not take of the last message goes first.
        let mut sent = self.sending.iter().map(|r| r.head.len() + r.data.len()).sum::<usize>();
        sent = sent.saturating_sub(self.send_message.remaining());
        let mut out = VecDeque::new();
        if let Some(tls) = &mut self.tls {
            let rest = self.send_message.remaining();
            tls.output.drain(..tls.output.len() - rest.min(tls.output.len()));
        }
        for reply in self.sending.drain(..) {
            let mut data = reply.data.detach(pool);
            let mut head = reply.head;
            let skip = sent.min(head.len());
            head.drain(..skip);
            sent -= skip;
            if let Data::Bytes(bytes) = &mut data {
                let skip = sent.min(bytes.len());
                bytes.drain(..skip);
                sent -= skip;
                self.held -= skip as u64;
            }
            out.push_back(Reply { head, data });
        }
        let detach =
            |pool: &mut Pool, reply: Reply| Reply { head: reply.head, data: reply.data.detach(pool) };
        for reply in self.out {
            out.push_back(detach(pool, reply));
        }
        let deferred = self.deferred.into_iter().map(|reply| detach(pool, reply)).collect();
        for (_, command) in &mut self.commands {
            if let Some(ordered) = &mut command.ordered {
                ordered.ready = ordered.ready.drain(..).map(|(at, data)| (at, data.detach(pool))).collect();
            }
        }
        let rx = match self.rx {
            Rx::Payload { command, offset, data, filled, len } => {
                Rx::Payload { command, offset, data: data.detach(pool), filled, len }
            }
            rx => rx,
        };
        ParkedConn {
            fd: self.fd,
            peer: self.peer,
            since: self.since,
            agreed: self.agreed,
            tls: self.tls,
            input: self.input[self.input_start..self.input_end].to_vec(),
            rx,
            writes: self.writes,
            commands: self.commands,
            requests: self.requests,
            held: self.held,
            out,
            streaming: self.streaming,
            deferred,
            slot: self.slot,
            generation: self.generation,
        }
    }

    /// Puts a connection together on this shard. A half received payload gets its buffer when the connection is first served.
    pub fn unpark(parked: ParkedConn, disk: u32, slot: u32, generation: u32, now: Nanos) -> Conn {
        let mut conn = Conn::with(parked.fd, parked.agreed, parked.peer, disk, slot, generation, now);
        conn.since = parked.since;
        conn.preload(&parked.input);
        conn.writes = parked.writes;
        conn.commands = parked.commands;
        conn.requests = parked.requests;
        conn.held = parked.held;
        conn.out = parked.out;
        conn.streaming = parked.streaming;
        conn.deferred = parked.deferred;
        conn.rx = parked.rx;
        conn.tls = parked.tls;
        if let Some(tls) = &mut conn.tls
            && !tls.output.is_empty()
        {
            conn.send_message = Message::new(1);
            conn.send_message.push(tls.output.as_ptr() as usize, tls.output.len());
        }
        conn
    }
}
