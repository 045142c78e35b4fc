//! One NBD connection in its transmission phase, on the shard of its disk.
//!
//! ```text
//! socket -> input -> header -> [payload -> buffer] -> Request -> disk -> answer -> replies -> socket
//! ```
//! A connection is one byte stream: it is read ahead up to [`REQUESTS_MAX`] requests and [`HELD_MAX`] bytes of payload, and not
//! further; so a client that sends without reading costs that much and no more. Payload is received straight into the
//! buffer that goes to the disk. Replies of a turn leave in one message.
//!
//! Reads and writes above one piece are cut. In the structured style every piece is a chunk of its own, in the order of its
//! completion. In the simple style the pieces of one read stand behind one header, in order, and nothing comes between
//! them; if one fails after the header has gone, the only honest answer is to close.

#[cfg(test)]
mod audit;
mod park;
mod receive;
mod send;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use ring_bridge::nbd::{Handoff, ReplyStyle, ReplyTo, Request as NbdRequest, TlsSession, Transmission};
use smallvec::SmallVec;

use crate::clock::Nanos;
use crate::request::{Client, Origin, Request};
use crate::storage::message::Message;
use crate::storage::pool::{Buf, Pool};

pub use park::ParkedConn;

/// Requests of one connection that may be unanswered.
pub const REQUESTS_MAX: u32 = 128;
/// Bytes of payload that one connection may hold.
pub const HELD_MAX: u64 = 4 << 20;
/// Replies that wait to be sent while requests are still read.
const REPLIES_MAX: usize = 2 * REQUESTS_MAX as usize;
/// Steps that one connection may take in one turn (a read takes two, a write four) and bytes that it may start.
pub const TURN_STEPS: u32 = 256;
/// See [`TURN_STEPS`].
pub const TURN_BYTES: u64 = 1 << 20;
/// Bytes of requests that are received at once.
const INPUT: usize = 4096;
/// Replies of one message.
const BATCH: usize = 48;

/// Data of a reply or of a request between shards.
#[derive(Debug)]
enum Data {
    None,
    /// The first bytes of a pool buffer.
    Pool(Buf, u32),
    Bytes(Vec<u8>),
}

impl Data {
    fn len(&self) -> usize {
        match self {
            Data::None => 0,
            Data::Pool(_, len) => *len as usize,
            Data::Bytes(bytes) => bytes.len(),
        }
    }

    fn address(&self, pool: &Pool) -> usize {
        match self {
            Data::None => 0,
            Data::Pool(buf, _) => pool.address(buf),
            Data::Bytes(bytes) => bytes.as_ptr() as usize,
        }
    }
}

/// A reply: header and data.
#[derive(Debug)]
struct Reply {
    head: SmallVec<[u8; 40]>,
    data: Data,
}

/// A command of the client that has not been answered.
#[derive(Debug)]
struct Command {
    request: NbdRequest,
    /// Requests to the disk that are out.
    left: u32,
    /// No further requests will be made for it.
    issued: bool,
    /// First error, as errno.
    errno: i32,
    /// Pieces that wait for their turn in an ordered reply: offset and data. `None` for unordered ones.
    ordered: Option<Ordered>,
}

#[derive(Debug)]
struct Ordered {
    /// Offset of the next byte to be sent.
    next: u64,
    ready: Vec<(u64, Data)>,
    header_sent: bool,
}

impl Command {
    fn to(&self) -> ReplyTo {
        self.request.reply_to()
    }
}

/// What the next bytes of the stream are.
#[derive(Debug)]
enum Rx {
    Header,
    /// A read that is not yet completely cut into requests; `next` is where to go on.
    Reading {
        command: u32,
        next: u64,
    },
    /// A write whose next piece starts at `next` and has no buffer yet.
    Writing {
        command: u32,
        next: u64,
    },
    /// A piece of a write, filled up to `filled` bytes.
    Payload {
        command: u32,
        offset: u64,
        data: Data,
        filled: u32,
        len: u32,
    },
    /// Payload that nobody wants.
    Skip {
        left: u32,
    },
    /// The client said goodbye or is gone.
    Done,
}

/// Why reading stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Bytes of the socket are needed.
    Input,
    /// Requests have to be answered first.
    Room,
    /// A buffer is needed.
    Buffer,
    /// The share of the turn is used up.
    Turn,
    /// Nothing more will be read.
    End,
}

/// One connection.
#[derive(Debug)]
pub struct Conn {
    fd: OwnedFd,
    /// Slot of its disk.
    pub disk: u32,
    /// Guards against answers for an earlier connection of the same slot.
    pub generation: u32,
    slot: u32,
    peer: String,
    since: Nanos,
    agreed: Transmission,
    style: ReplyStyle,
    tls: Option<Box<Tls>>,
    /// Received and not yet looked at: `input[input_start..input_end]`.
    input: Box<[u8]>,
    input_start: usize,
    input_end: usize,
    rx: Rx,
    /// The last command carried payload: receive no further than the next header.
    writes: bool,
    commands: slab::Slab<Command>,
    /// Requests that are at the disk.
    requests: u32,
    /// Bytes of payload at the disk or on their way to the client.
    held: u64,
    /// Bytes of pool buffers that it really has.
    buffers: u64,
    out: VecDeque<Reply>,
    /// The command whose ordered reply has begun.
    streaming: Option<u32>,
    /// Replies that wait for the end of that one.
    deferred: VecDeque<Reply>,
    /// Replies in the message that the kernel has.
    sending: Vec<Reply>,
    send_message: Message,
    recv_message: Message,
    /// Operation of the reactor that receives; `None` when there is none.
    pub recv_op: Option<u64>,
    /// The socket did not take everything at once: wait for it with the next message.
    blocked: bool,
    /// Operation of the reactor that sends.
    pub send_op: Option<u64>,
    /// When the client last gave bytes.
    received_at: Nanos,
    /// When the client last took bytes, or had all of them.
    sent_at: Nanos,
    /// The end of the TLS session has been said.
    said_goodbye: bool,
    /// Its operations have been cancelled.
    pub cancelled: bool,
    /// Takes no more input: being parked or drained.
    pub stopped: bool,
    /// Starts no more sends: about to be parked. What is not sent goes along.
    pub parking: bool,
    /// Why it is to end; `None` while it lives.
    closing: Option<String>,
}

/// TLS of a connection with its ciphertext on the way.
#[derive(Debug)]
struct Tls {
    session: Box<TlsSession>,
    /// Ciphertext being received.
    input: Vec<u8>,
    /// Ciphertext that the session had no room for: `input[pending]`.
    pending: std::ops::Range<usize>,
    /// Ciphertext being sent.
    output: Vec<u8>,
}

const TLS_INPUT: usize = 16 << 10;

/// What a connection may use.
pub struct ConnCtx<'a> {
    /// The time of this turn.
    pub now: Nanos,
    /// Buffers of the shard.
    pub pool: &'a mut Pool,
    /// The disk's connections may take buffers (a disk may hold half of the budget; the first piece of a connection is always
    /// allowed).
    pub may_take: bool,
    /// Steps (a request, or a piece of one) that the connection may still take in this turn.
    pub steps: u32,
    /// Bytes that it may still start in this turn.
    pub bytes: u64,
    /// New requests for the disk.
    pub out: &'a mut Vec<Request>,
}

impl Conn {
    /// Takes a negotiated connection over.
    pub fn new(handoff: Handoff, disk: u32, slot: u32, generation: u32, now: Nanos) -> Conn {
        let mut conn =
            Conn::with(handoff.fd, handoff.transmission, handoff.peer, disk, slot, generation, now);
        conn.tls = handoff.tls.map(Tls::new);
        conn.preload(&handoff.unread);
        conn
    }

    fn with(
        fd: OwnedFd,
        agreed: Transmission,
        peer: String,
        disk: u32,
        slot: u32,
        generation: u32,
        now: Nanos,
    ) -> Conn {
        Conn {
            fd,
            disk,
            generation,
            slot,
            peer,
            since: now,
            style: agreed.reply_style(),
            agreed,
            tls: None,
            input: vec![0; INPUT].into_boxed_slice(),
            input_start: 0,
            input_end: 0,
            rx: Rx::Header,
            writes: false,
            commands: slab::Slab::new(),
            requests: 0,
            held: 0,
            buffers: 0,
            out: VecDeque::new(),
            streaming: None,
            deferred: VecDeque::new(),
            sending: Vec::new(),
            send_message: Message::new(0),
            recv_message: Message::new(2),
            recv_op: None,
            blocked: false,
            send_op: None,
            received_at: now,
            sent_at: now,
            said_goodbye: false,
            cancelled: false,
            stopped: false,
            parking: false,
            closing: None,
        }
    }

    /// The socket.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The shard has failed: ends the connection and leaves its memory to operations that the kernel may still have.
    pub fn abandon(self: Box<Self>) {
        // The kernel's operations keep the socket open; without this the client would see its end only after them.
        let _ = nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        let conn = std::mem::ManuallyDrop::new(self);
        // The one descriptor that the connection owns, and it is not dropped any more.
        let _ = nix::unistd::close(conn.fd.as_raw_fd());
    }

    /// How it stands, in one line. For tests.
    #[cfg(test)]
    pub fn summary(&self) -> String {
        format!(
            "{}: {:?} requests {} held {} buffers {} out {} deferred {} streaming {:?} receives {} sends {} stopped {} closing {:?}",
            self.peer,
            self.rx,
            self.requests,
            self.held,
            self.buffers,
            self.out.len(),
            self.deferred.len(),
            self.streaming,
            self.recv_op.is_some(),
            self.send_op.is_some(),
            self.stopped,
            self.closing,
        )
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// When it came to this process.
    pub fn since(&self) -> Nanos {
        self.since
    }

    /// Requests at the disk.
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// Its slot in the reactor.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Bytes of pool buffers that it has.
    pub fn buffers(&self) -> u64 {
        self.buffers
    }

    /// A request of it was given a buffer.
    pub fn note_buffer(&mut self, buf: &Buf) {
        self.buffers += buf.capacity() as u64;
    }

    fn give(&mut self, pool: &mut Pool, buf: Buf) {
        self.buffers = self.buffers.saturating_sub(buf.capacity() as u64);
        pool.give(buf);
    }

    /// Gives the memory of a reply back.
    fn discard(&mut self, pool: &mut Pool, data: Data) {
        self.held = self.held.saturating_sub(data.len() as u64);
        if let Data::Pool(buf, _) = data {
            self.give(pool, buf);
        }
    }

    /// Keeps buffers and has done nothing about it for `patience`.
    pub fn is_stalled(&self, now: Nanos, patience: Nanos) -> bool {
        let receives_nothing = self.send_op.is_some() && now > self.sent_at + patience;
        let sends_nothing =
            matches!(self.rx, Rx::Payload { data: Data::Pool(..), .. }) && now > self.received_at + patience;
        receives_nothing || (sends_nothing && !self.stopped)
    }

    /// Has neither sent nor received for `time`.
    pub fn is_idle(&self, now: Nanos, time: Nanos) -> bool {
        now > self.sent_at + time && now > self.received_at + time
    }

    /// Whether a piece of a read may have a buffer although the budget is spent: when the connection has no other, or when the
    /// piece is the next one of a reply that has to be sent in order, behind which all others wait.
    pub fn may_always_have(&self, command: u32, offset: u64) -> bool {
        let is_next =
            |command: &Command| command.ordered.as_ref().is_some_and(|ordered| ordered.next == offset);
        self.buffers == 0 || self.commands.get(command as usize).is_some_and(is_next)
    }

    /// Ends the connection when the kernel has let go of its memory.
    pub fn close(&mut self, reason: &str) {
        if self.closing.is_none() {
            self.closing = Some(reason.to_owned());
            self.rx_done();
        }
    }

    /// Why it ends, if it does.
    pub fn closing(&self) -> Option<&str> {
        self.closing.as_deref()
    }

    /// Said goodbye, and everything is answered and sent.
    pub fn is_finished(&self) -> bool {
        matches!(self.rx, Rx::Done)
            && self.commands.is_empty()
            && self.out.is_empty()
            && self.deferred.is_empty()
            && self.send_op.is_none()
            && self.send_message.remaining() == 0
            && (self.tls.is_none() || self.said_goodbye)
    }

    /// Every reply has been sent.
    pub fn is_sent(&self) -> bool {
        let sending = self.send_op.is_some() || self.send_message.remaining() > 0;
        self.out.is_empty() && self.deferred.is_empty() && !sending
    }

    /// A large read was taken, and not all of it is at the disk yet.
    pub fn is_reading(&self) -> bool {
        matches!(self.rx, Rx::Reading { .. }) && self.closing.is_none()
    }

    fn rx_done(&mut self) {
        // A half received payload stays in `rx` until `release`, because the kernel may be writing to it.
        if !matches!(self.rx, Rx::Payload { .. }) {
            self.rx = Rx::Done;
        }
    }

    fn origin(&self, command: u32) -> Option<Origin> {
        Some(Origin { client: Client::Conn(self.slot), generation: self.generation, command })
    }

    /// Gives all buffers back; the kernel must be done with them.
    pub fn release(&mut self, pool: &mut Pool) {
        self.buffers = 0;
        let mut give = |data: Data| {
            if let Data::Pool(buf, _) = data {
                pool.give(buf);
            }
        };
        for reply in self.out.drain(..).chain(self.deferred.drain(..)).chain(self.sending.drain(..)) {
            give(reply.data);
        }
        if let Rx::Payload { data, .. } = std::mem::replace(&mut self.rx, Rx::Done) {
            give(data);
        }
        for mut command in self.commands.drain() {
            if let Some(ordered) = command.ordered.take() {
                ordered.ready.into_iter().for_each(|(_, data)| give(data));
            }
        }
    }
}
