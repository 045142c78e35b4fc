//! A small NBD client that keeps many requests in flight and tells when each was answered; the tools that we did not
//! write tell only when they are done.
//!
//! Numbers are those of `doc/proto.md` of the NetworkBlockDevice project, written here a second time so that a mistake in
//! the daemon's is found. Two threads serve the socket, so that neither side ever waits for the other's full buffer.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::PATIENCE;

const OPTION_MAGIC: &[u8] = b"IHAVEOPT";
const REQUEST_MAGIC: u32 = 0x2560_9513;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;

/// `NBD_CMD_FLAG_FUA`.
pub const FUA: u16 = 1 << 0;
/// `NBD_CMD_FLAG_NO_HOLE`.
pub const NO_HOLE: u16 = 1 << 1;
/// Bit of an extent of `base:allocation`: nothing is allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// Bit of an extent of `base:allocation`: it reads as zero.
pub const STATE_ZERO: u32 = 1 << 1;

/// What a request does; the values are the protocol's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

/// One answered request.
#[derive(Debug)]
pub struct Reply {
    /// The number that [`Client::send`] gave the request.
    pub cookie: u64,
    /// NBD's number of the error; 0 for none.
    pub error: u32,
    /// Of a read without error: all its bytes.
    pub data: Vec<u8>,
    /// Of a block status: lengths and states of the extents.
    pub extents: Vec<(u32, u32)>,
}

/// A connection in the transmission phase.
pub struct Client {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    replies: Receiver<Reply>,
    requests: Option<Sender<(Partial, Vec<u8>)>>,
    next_cookie: u64,
    /// Answers that have been taken.
    answered: u64,
    socket: UnixStream,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Connects to a disk's own socket, with structured replies and `base:allocation`.
    pub fn connect(socket: &Path) -> io::Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let size_bytes = negotiate(&mut stream)?;
        stream.set_read_timeout(None)?;
        let (requests, to_send) = unbounded();
        let (answer, replies) = unbounded();
        let (sent, expected) = unbounded();
        let (reader, writer) = (stream.try_clone()?, stream.try_clone()?);
        let threads = vec![
            std::thread::spawn(move || send_all(writer, &to_send, &sent)),
            std::thread::spawn(move || receive_all(reader, &expected, &answer)),
        ];
        Ok(Client {
            size_bytes,
            replies,
            requests: Some(requests),
            next_cookie: 0,
            answered: 0,
            socket: stream,
            threads,
        })
    }

    /// Sends a request; `data` is the payload of a write. Returns its number.
    pub fn send(&mut self, op: Op, flags: u16, offset: u64, length: u32, data: &[u8]) -> u64 {
        self.next_cookie += 1;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend((op as u16).to_be_bytes());
        bytes.extend(self.next_cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        // A connection that ended shows at the end of the replies.
        let data = vec![0; if op == Op::Read { length as usize } else { 0 }];
        let reply = Reply { cookie: self.next_cookie, error: 0, data, extents: Vec::new() };
        let _ = self
            .requests
            .as_ref()
            .expect("open")
            .send((Partial { reply, offset, pieces: Vec::new() }, bytes));
        self.next_cookie
    }

    /// Where answers arrive, to wait for on several connections at once.
    pub fn replies(&self) -> &Receiver<Reply> {
        &self.replies
    }

    /// The next answer; `None` when the connection has ended.
    pub fn receive(&mut self) -> Option<Reply> {
        match self.replies.recv_timeout(PATIENCE) {
            Ok(reply) => {
                self.answered += 1;
                Some(reply)
            }
            Err(RecvTimeoutError::Timeout) => panic!("no answer within {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    /// Takes the answers to everything that was sent and has none yet.
    pub fn finish_all(&mut self) -> Vec<Reply> {
        (self.answered..self.next_cookie).map(|_| self.receive().expect("the connection lives")).collect()
    }

    /// One request alone: sends it and waits for its answer.
    pub fn call(&mut self, op: Op, flags: u16, offset: u64, length: u32, data: &[u8]) -> Reply {
        assert!(self.finish_all().is_empty(), "alone");
        self.send(op, flags, offset, length, data);
        self.finish_all().remove(0)
    }

    /// Reads bytes; fails the test on an error.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(length);
        while data.len() < length {
            let part = (length - data.len()).min(1 << 20);
            let reply = self.call(Op::Read, 0, offset + data.len() as u64, part as u32, &[]);
            assert_eq!(reply.error, 0, "read of {part} bytes at {offset}");
            data.extend(reply.data);
        }
        data
    }

    /// Runs a request that changes the disk; fails the test on an error.
    #[track_caller]
    pub fn change(&mut self, op: Op, flags: u16, offset: u64, length: u32, data: &[u8]) {
        let reply = self.call(op, flags, offset, length, data);
        assert_eq!(reply.error, 0, "{op:?} of {length} bytes at {offset}");
    }

    /// Writes bytes; fails the test on an error.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.change(Op::Write, 0, offset, data.len() as u32, data);
    }

    /// Flushes; fails the test on an error.
    #[track_caller]
    pub fn flush(&mut self) {
        self.change(Op::Flush, 0, 0, 0, &[]);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.requests = None;
        let _ = self.socket.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the protocol was broken, see above");
        }
    }
}

fn negotiate(stream: &mut UnixStream) -> io::Result<u64> {
    let greeting = take::<18>(stream)?;
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT", "the greeting");
    stream.write_all(&3_u32.to_be_bytes())?;
    option(stream, OPT_STRUCTURED_REPLY, &[])?;
    let context = b"base:allocation";
    let mut query = 0_u32.to_be_bytes().to_vec(); // length of the export's name: empty
    query.extend(1_u32.to_be_bytes());
    query.extend((context.len() as u32).to_be_bytes());
    query.extend(context);
    option(stream, OPT_SET_META_CONTEXT, &query)?;
    let infos = option(stream, OPT_GO, &[0; 6])?;
    let export = infos.iter().find(|info| info.starts_with(&[0, 0])).expect("NBD_INFO_EXPORT");
    Ok(u64::from_be_bytes(export[2..10].try_into().expect("8 bytes")))
}

/// Sends an option and collects the payloads of its replies up to the acknowledgement.
fn option(stream: &mut UnixStream, number: u32, data: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut bytes = OPTION_MAGIC.to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes)?;
    let mut payloads = Vec::new();
    loop {
        let header = take::<20>(stream)?;
        let mut payload = vec![0; be32(&header[16..]) as usize];
        stream.read_exact(&mut payload)?;
        match be32(&header[12..]) {
            1 => return Ok(payloads),
            kind if kind >> 31 != 0 => {
                let said = String::from_utf8_lossy(&payload).into_owned();
                return Err(io::Error::other(format!("option {number}: error {kind:#x}: {said}")));
            }
            _ => payloads.push(payload),
        }
    }
}

/// A request whose answer has not come completely.
struct Partial {
    reply: Reply,
    offset: u64,
    /// Starts and ends of the pieces of a read that have come, within its data.
    pieces: Vec<(usize, usize)>,
}

fn send_all(mut socket: UnixStream, requests: &Receiver<(Partial, Vec<u8>)>, sent: &Sender<Partial>) {
    for (partial, bytes) in requests {
        if sent.send(partial).is_err() || socket.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn receive_all(mut socket: UnixStream, sent: &Receiver<Partial>, answers: &Sender<Reply>) {
    let mut open: Vec<Partial> = Vec::new();
    while let Ok(header) = take::<20>(&mut socket) {
        assert_eq!(be32(&header), STRUCTURED_MAGIC, "magic of a chunk");
        let (done, kind) = (header[5] & 1 != 0, u16::from_be_bytes([header[6], header[7]]));
        let cookie = u64::from_be_bytes(header[8..16].try_into().expect("8 bytes"));
        let mut payload = vec![0; be32(&header[16..]) as usize];
        if socket.read_exact(&mut payload).is_err() {
            return;
        }
        open.extend(sent.try_iter());
        let index = open.iter().position(|partial| partial.reply.cookie == cookie);
        let index = index.unwrap_or_else(|| panic!("an answer to {cookie}, which was not asked or has one"));
        open[index].take_chunk(kind, &payload);
        if done && answers.send(open.swap_remove(index).finish()).is_err() {
            return;
        }
    }
}

impl Partial {
    fn take_chunk(&mut self, kind: u16, payload: &[u8]) {
        match kind {
            0 => {}
            // Data, or a hole: an offset, then the bytes or their number.
            1 | 2 => {
                let offset = u64::from_be_bytes(payload[..8].try_into().expect("8 bytes"));
                let start = (offset - self.offset) as usize;
                let data =
                    if kind == 1 { payload[8..].to_vec() } else { vec![0; be32(&payload[8..]) as usize] };
                self.reply.data[start..start + data.len()].copy_from_slice(&data);
                self.pieces.push((start, start + data.len()));
            }
            // Block status: the number of the context, then pairs.
            5 => {
                let pairs = payload[4..].chunks_exact(8);
                self.reply.extents.extend(pairs.map(|pair| (be32(pair), be32(&pair[4..]))));
            }
            _ if kind >> 15 != 0 => self.reply.error = be32(payload),
            _ => panic!("chunk of the unknown kind {kind}"),
        }
    }

    /// The answer; of a read without error, every byte must have come once.
    fn finish(mut self) -> Reply {
        self.pieces.sort_unstable();
        let end = self.pieces.iter().try_fold(0, |end, piece| (piece.0 == end).then_some(piece.1));
        assert!(
            self.reply.error != 0 || end == Some(self.reply.data.len()),
            "pieces of a read of {} bytes: {:?}",
            self.reply.data.len(),
            self.pieces
        );
        self.reply
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("4 bytes"))
}

fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
