//! The client side of one NBD connection: negotiation (blocking, with a deadline), then requests and simple replies over a
//! non-blocking socket. Source of all numbers: doc/proto.md of the NetworkBlockDevice project.
//!
//! | part | bytes |
//! |---|---|
//! | request | magic u32 0x25609513, flags u16, type u16, handle u64, offset u64, length u32 |
//! | simple reply | magic u32 0x67446698, error u32, handle u64; then the data of a read without error |
//!
//! The server is trusted no further than a peer in a bench deserves: lengths are bounded, a wrong magic or handle is an error.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::servers::Endpoint;

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FLAGS_FIXED_NO_ZEROES: u32 = 3;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
/// Bytes of a request's header.
const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply's header.
const REPLY_LEN: usize = 16;
/// No reply to an option that this client sends is longer.
const OPTION_REPLY_MAX: u32 = 4096;
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(30);

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Op {
    /// NBD_CMD_READ.
    Read,
    /// NBD_CMD_WRITE.
    Write,
}

/// A reply that arrived completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// The handle of the request.
    pub handle: u64,
    /// NBD error number, 0 for success.
    pub error: u32,
}

/// An open connection in transmission phase.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Size of the export in bytes.
    pub size_bytes: u64,
    unsent: Vec<u8>,
    sent: usize,
    parser: ReplyParser,
}

impl Client {
    /// Connects and negotiates NBD_OPT_GO for the endpoint's export, with simple replies.
    pub fn open(endpoint: &Endpoint, op: Op, block_bytes: u32) -> Result<Self> {
        let mut stream = UnixStream::connect(&endpoint.socket)
            .with_context(|| format!("cannot connect to {}", endpoint.socket.display()))?;
        stream.set_read_timeout(Some(NEGOTIATION_TIMEOUT))?;
        stream.set_write_timeout(Some(NEGOTIATION_TIMEOUT))?;
        let size_bytes = negotiate(&mut stream, &endpoint.export).with_context(|| {
            format!("negotiation for export {:?} at {}", endpoint.export, endpoint.socket.display())
        })?;
        ensure!(
            size_bytes >= u64::from(block_bytes),
            "export {:?} has {size_bytes} bytes, less than one block of {block_bytes}",
            endpoint.export
        );
        stream.set_nonblocking(true)?;
        let payload = if op == Op::Read { u64::from(block_bytes) } else { 0 };
        Ok(Self { stream, size_bytes, unsent: Vec::new(), sent: 0, parser: ReplyParser::new(payload) })
    }

    /// The socket, to be polled.
    pub fn socket(&self) -> &UnixStream {
        &self.stream
    }

    /// Queues a request; [`Client::flush`] sends it. `payload` is the data of a write and is empty for a read.
    pub fn queue(&mut self, op: Op, handle: u64, offset: u64, length: u32, payload: &[u8]) {
        let kind = match op {
            Op::Read => 0,
            Op::Write => 1,
        };
        self.queue_header(kind, handle, offset, length);
        self.unsent.extend_from_slice(payload);
    }

    /// Queues NBD_CMD_FLUSH on a connection for writes.
    pub fn queue_flush(&mut self, handle: u64) {
        self.queue_header(CMD_FLUSH, handle, 0, 0);
    }

    fn queue_header(&mut self, kind: u16, handle: u64, offset: u64, length: u32) {
        let mut header = [0; REQUEST_LEN];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&kind.to_be_bytes());
        header[8..16].copy_from_slice(&handle.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..28].copy_from_slice(&length.to_be_bytes());
        self.unsent.extend_from_slice(&header);
    }

    /// Sends what is queued; false when the socket is full and must be polled for room.
    pub fn flush(&mut self) -> Result<bool> {
        while self.sent < self.unsent.len() {
            match self.stream.write(&self.unsent[self.sent..]) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot send to the server"),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Receives what is there, through `scratch`, and reports each complete reply.
    pub fn receive(&mut self, scratch: &mut [u8], mut reply: impl FnMut(Reply) -> Result<()>) -> Result<()> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(n) => {
                    self.parser.feed(&scratch[..n], &mut reply)?;
                    if n < scratch.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot receive from the server"),
            }
        }
    }

    /// Says good-bye, so that the server does not report a lost client. A full socket is no reason to wait.
    pub fn disconnect(mut self) {
        self.queue_header(CMD_DISC, 0, 0, 0);
        let _ = self.flush();
    }
}

/// Splits a byte stream into simple replies; the data of reads is dropped.
#[derive(Debug)]
struct ReplyParser {
    header: [u8; REPLY_LEN],
    have: usize,
    payload_of_reply: u64,
    payload_left: u64,
    current: Option<Reply>,
}

impl ReplyParser {
    fn new(payload_of_reply: u64) -> Self {
        Self { header: [0; REPLY_LEN], have: 0, payload_of_reply, payload_left: 0, current: None }
    }

    fn feed(&mut self, mut bytes: &[u8], reply: &mut impl FnMut(Reply) -> Result<()>) -> Result<()> {
        while !bytes.is_empty() {
            if self.current.is_none() {
                let take = bytes.len().min(REPLY_LEN - self.have);
                self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
                self.have += take;
                bytes = &bytes[take..];
                if self.have < REPLY_LEN {
                    return Ok(());
                }
                self.have = 0;
                let parsed = parse_reply(&self.header)?;
                self.payload_left = if parsed.error == 0 { self.payload_of_reply } else { 0 };
                self.current = Some(parsed);
            }
            let skip = self.payload_left.min(bytes.len() as u64);
            self.payload_left -= skip;
            bytes = &bytes[skip as usize..];
            if self.payload_left == 0
                && let Some(done) = self.current.take()
            {
                reply(done)?;
            }
        }
        Ok(())
    }
}

fn parse_reply(header: &[u8; REPLY_LEN]) -> Result<Reply> {
    let magic = be32(header, 0);
    ensure!(
        magic == REPLY_MAGIC,
        "the server sent magic {magic:#x} where a simple reply ({REPLY_MAGIC:#x}) must be"
    );
    Ok(Reply { error: be32(header, 4), handle: be64(header, 8) })
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Greeting, client flags, NBD_OPT_GO. Returns the size of the export.
fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).context("no greeting")?;
    ensure!(
        be64(&greeting, 0) == NBD_MAGIC && be64(&greeting, 8) == OPTION_MAGIC,
        "this is no newstyle NBD server"
    );
    let flags = u32::from(be16(&greeting, 16)) & FLAGS_FIXED_NO_ZEROES;

    let data_len = 4 + export.len() + 2;
    let mut message = Vec::with_capacity(20 + data_len);
    message.extend_from_slice(&flags.to_be_bytes());
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&OPT_GO.to_be_bytes());
    message.extend_from_slice(&(data_len as u32).to_be_bytes());
    message.extend_from_slice(&(export.len() as u32).to_be_bytes());
    message.extend_from_slice(export.as_bytes());
    message.extend_from_slice(&0u16.to_be_bytes());
    stream.write_all(&message)?;

    let mut size = None;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).context("no reply to NBD_OPT_GO")?;
        ensure!(be64(&header, 0) == OPTION_REPLY_MAGIC, "a reply to an option has the wrong magic");
        let (kind, length) = (be32(&header, 12), be32(&header, 16));
        ensure!(length <= OPTION_REPLY_MAX, "a reply to NBD_OPT_GO has {length} bytes");
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match kind {
            REP_ACK => return size.context("NBD_OPT_GO was acknowledged without a size"),
            REP_INFO if data.len() >= 12 && be16(&data, 0) == INFO_EXPORT => size = Some(be64(&data, 2)),
            REP_INFO => {}
            other => bail!("NBD_OPT_GO was answered {other:#x}: {}", String::from_utf8_lossy(&data)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(handle: u64, error: u32, payload: usize) -> Vec<u8> {
        let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&error.to_be_bytes());
        bytes.extend_from_slice(&handle.to_be_bytes());
        bytes.resize(bytes.len() + payload, 0x67);
        bytes
    }

    // Goal: replies are found however the stream is cut, and an error carries no data. Method: three replies, every cut size.
    #[test]
    fn replies_survive_any_cut() {
        let stream = [reply(7, 0, 512), reply(8, 5, 0), reply(9, 0, 512)].concat();
        for cut in 1..stream.len() {
            let mut parser = ReplyParser::new(512);
            let mut seen = Vec::new();
            for piece in stream.chunks(cut) {
                parser
                    .feed(piece, &mut |r: Reply| {
                        seen.push((r.handle, r.error));
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(seen, [(7, 0), (8, 5), (9, 0)], "cut {cut}");
        }
    }

    // Goal: a stream that lost its step is an error, not a count. Method: one byte too many before a reply.
    #[test]
    fn wrong_magic_is_an_error() {
        let stream = [vec![0], reply(7, 0, 0)].concat();
        assert!(ReplyParser::new(0).feed(&stream, &mut |_| Ok(())).is_err());
    }

    // Goal: a server that announces an absurd reply is refused before memory is taken. Method: a scripted server.
    #[test]
    fn absurd_option_reply_is_refused() {
        struct Scripted(std::io::Cursor<Vec<u8>>);
        impl Read for Scripted {
            fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(buf)
            }
        }
        impl Write for Scripted {
            fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
                Ok(buf.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut bytes = NBD_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&3u16.to_be_bytes());
        bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&OPT_GO.to_be_bytes());
        bytes.extend_from_slice(&REP_INFO.to_be_bytes());
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        let error = negotiate(&mut Scripted(std::io::Cursor::new(bytes)), "x").unwrap_err();
        assert!(error.to_string().contains("4294967295"), "{error}");
    }
}
