//! The XenStore protocol as bytes, without I/O: requests out, replies and events in.
//!
//! ```text
//! message = type u32 | request id u32 | transaction id u32 | length u32 | payload      (little endian as the host, 16 bytes of header)
//! ```
//! Invariants: a message that this module encodes is at most [`MESSAGE_MAX`] long in all; no text in it holds a NUL; a decoder holds
//! at most one partial message. Sources: `xen/include/public/io/xs_wire.h`, `docs/misc/xenstore.txt`.

use std::fmt;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// Bytes that a payload may have in the protocol; the store hangs up on more.
pub const PAYLOAD_MAX: usize = 4096;

/// Bytes of a whole message that we send. `/dev/xen/xenbus` takes header and payload together in a buffer of this size; the
/// socket would take 16 bytes more, and nothing that we write comes near either.
pub const MESSAGE_MAX: usize = 4096;

/// Message types that we use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Op {
    /// Names below a node.
    Directory = 1,
    /// The value of a node.
    Read = 2,
    /// Tell when a node or one below it changes.
    Watch = 4,
    /// No longer.
    Unwatch = 5,
    /// A transaction's number.
    TransactionStart = 6,
    /// Commit or give up.
    TransactionEnd = 7,
    /// Set a value; makes the node and its parents.
    Write = 11,
    /// Make a node without a value.
    Mkdir = 12,
    /// Remove a node and all below it.
    Rm = 13,
    /// Set permissions.
    SetPerms = 14,
    /// From the store: a watch fired.
    WatchEvent = 15,
    /// From the store: the request failed.
    Error = 16,
    /// Does the domain exist for the store?
    IsDomainIntroduced = 17,
    /// Names below a node, in parts (since Xen 4.9).
    DirectoryPart = 22,
}

impl Op {
    /// The type of a number, if it is one that we use.
    pub fn from_number(number: u32) -> Option<Op> {
        use Op::*;
        let all = [
            Directory,
            Read,
            Watch,
            Unwatch,
            TransactionStart,
            TransactionEnd,
            Write,
            Mkdir,
            Rm,
            SetPerms,
            WatchEvent,
            Error,
            IsDomainIntroduced,
            DirectoryPart,
        ];
        all.into_iter().find(|op| *op as u32 == number)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Directory | Op::DirectoryPart => "listing",
            Op::Read => "reading",
            Op::Watch => "watching",
            Op::Unwatch => "no longer watching",
            Op::TransactionStart => "starting a transaction",
            Op::TransactionEnd => "ending a transaction",
            Op::Write => "writing",
            Op::Mkdir => "making",
            Op::Rm => "removing",
            Op::SetPerms => "setting permissions of",
            Op::WatchEvent => "an event of",
            Op::Error => "an error of",
            Op::IsDomainIntroduced => "asking for domain",
        })
    }
}

/// Why the store refused a request, by the name that it answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Errno {
    /// No such node.
    NoEntry,
    /// The transaction met a change by somebody else, or the store is busy.
    Again,
    /// Not permitted.
    Access,
    /// The node exists.
    Exists,
    /// The answer does not fit.
    TooBig,
    /// The request is unknown to this store.
    NotImplemented,
    /// Malformed in the store's eyes.
    Invalid,
    /// A quota is used up.
    NoSpace,
    /// Any other name.
    Other(String),
}

impl Errno {
    /// The error of a name.
    pub fn from_name(name: &str) -> Errno {
        match name {
            "ENOENT" => Errno::NoEntry,
            "EAGAIN" => Errno::Again,
            "EACCES" | "EPERM" => Errno::Access,
            "EEXIST" => Errno::Exists,
            "E2BIG" => Errno::TooBig,
            "ENOSYS" => Errno::NotImplemented,
            "EINVAL" => Errno::Invalid,
            "ENOSPC" | "EQUOTA" => Errno::NoSpace,
            other => Errno::Other(shown(other.as_bytes())),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Errno::NoEntry => f.write_str("there is no such node (ENOENT)"),
            Errno::Again => f.write_str("it changed meanwhile (EAGAIN)"),
            Errno::Access => f.write_str(
                "this is not permitted (EACCES): run the daemon as root in the domain that owns the node",
            ),
            Errno::Exists => f.write_str("it exists (EEXIST)"),
            Errno::TooBig => f.write_str("the answer is too long (E2BIG)"),
            Errno::NotImplemented => f.write_str("this xenstored does not know the request (ENOSYS)"),
            Errno::Invalid => f.write_str("xenstored calls the request malformed (EINVAL)"),
            Errno::NoSpace => f.write_str("a quota of xenstored is used up (ENOSPC)"),
            Errno::Other(name) => write!(f, "xenstored answered {name}"),
        }
    }
}

/// Bytes of somebody else, fit for a message: at most 60 characters, nothing that acts on a terminal.
pub fn shown(bytes: &[u8]) -> String {
    let mut text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).escape_debug().collect();
    if bytes.len() > 60 {
        text.push('…');
    }
    text
}

/// A message cannot be sent or understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Ours is longer than the store takes.
    #[error("a request of {0} bytes is longer than XenStore's limit of {MESSAGE_MAX}")]
    TooLong(usize),
    /// A NUL inside of a path or a name would end it early.
    #[error("a path or name for XenStore contains a NUL")]
    Nul,
    /// The store's is longer than the protocol allows: the stream is out of step.
    #[error("XenStore sent a message of {0} bytes, more than {PAYLOAD_MAX}: the connection is out of step")]
    Oversized(usize),
    /// A watch event without its two strings.
    #[error("XenStore sent a watch event that is no path and token")]
    BadEvent,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Names below `path`.
    Directory(String),
    /// Names below `path`, from byte `.1` of the listing on.
    DirectoryPart(String, usize),
    /// The value of a node.
    Read(String),
    /// Sets a value.
    Write(String, Vec<u8>),
    /// Makes a node.
    Mkdir(String),
    /// Removes a tree.
    Rm(String),
    /// Sets permissions: the owner first, then others (`n5`, `r0`, `b3`).
    SetPerms(String, Vec<String>),
    /// Watches a path under a token.
    Watch(String, String),
    /// Ends that.
    Unwatch(String, String),
    /// Starts a transaction.
    TransactionStart,
    /// Ends it: true commits.
    TransactionEnd(bool),
    /// Is there such a domain?
    IsDomainIntroduced(u16),
}

impl Request {
    /// Its type.
    pub fn op(&self) -> Op {
        match self {
            Request::Directory(_) => Op::Directory,
            Request::DirectoryPart(..) => Op::DirectoryPart,
            Request::Read(_) => Op::Read,
            Request::Write(..) => Op::Write,
            Request::Mkdir(_) => Op::Mkdir,
            Request::Rm(_) => Op::Rm,
            Request::SetPerms(..) => Op::SetPerms,
            Request::Watch(..) => Op::Watch,
            Request::Unwatch(..) => Op::Unwatch,
            Request::TransactionStart => Op::TransactionStart,
            Request::TransactionEnd(_) => Op::TransactionEnd,
            Request::IsDomainIntroduced(_) => Op::IsDomainIntroduced,
        }
    }

    /// What it is about, for messages: a path, or nothing.
    pub fn subject(&self) -> String {
        match self {
            Request::Directory(path)
            | Request::DirectoryPart(path, _)
            | Request::Read(path)
            | Request::Write(path, _)
            | Request::Mkdir(path)
            | Request::Rm(path)
            | Request::SetPerms(path, _)
            | Request::Watch(path, _)
            | Request::Unwatch(path, _) => path.clone(),
            Request::IsDomainIntroduced(domid) => domid.to_string(),
            Request::TransactionStart | Request::TransactionEnd(_) => String::new(),
        }
    }

    /// The message, with the ids given.
    pub fn encode(&self, request_id: u32, transaction: u32) -> Result<Vec<u8>, WireError> {
        // Every string of a payload ends with a NUL, except the value of a WRITE.
        let (strings, value): (Vec<&str>, &[u8]) = match self {
            Request::Directory(path) | Request::Read(path) | Request::Mkdir(path) | Request::Rm(path) => {
                (vec![path], b"")
            }
            Request::Write(path, value) => (vec![path], value),
            Request::SetPerms(path, perms) => {
                (std::iter::once(path.as_str()).chain(perms.iter().map(String::as_str)).collect(), b"")
            }
            Request::Watch(path, token) | Request::Unwatch(path, token) => (vec![path, token], b""),
            Request::TransactionStart => (vec![""], b""),
            Request::TransactionEnd(commit) => (vec![if *commit { "T" } else { "F" }], b""),
            Request::DirectoryPart(path, offset) => {
                return message(self.op(), request_id, transaction, &[path, &offset.to_string()], b"");
            }
            Request::IsDomainIntroduced(domid) => {
                return message(self.op(), request_id, transaction, &[&domid.to_string()], b"");
            }
        };
        message(self.op(), request_id, transaction, &strings, value)
    }
}

fn message(
    op: Op,
    request_id: u32,
    transaction: u32,
    strings: &[&str],
    value: &[u8],
) -> Result<Vec<u8>, WireError> {
    let len = strings.iter().map(|text| text.len() + 1).sum::<usize>() + value.len();
    if HEADER_BYTES + len > MESSAGE_MAX {
        return Err(WireError::TooLong(HEADER_BYTES + len));
    }
    if strings.iter().any(|text| text.as_bytes().contains(&0)) {
        return Err(WireError::Nul);
    }
    let mut out = Vec::with_capacity(HEADER_BYTES + len);
    for word in [op as u32, request_id, transaction, len as u32] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    for text in strings {
        out.extend_from_slice(text.as_bytes());
        out.push(0);
    }
    out.extend_from_slice(value);
    Ok(out)
}

/// What the store sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The answer to a request.
    Reply {
        /// Of the request; 0 from `/dev/xen/xenbus` for watches, which the kernel answers by itself.
        request_id: u32,
        /// The type, as a number: that of the request, or an error.
        op: u32,
        /// The payload, or why not.
        result: Result<Vec<u8>, Errno>,
    },
    /// A watch fired.
    Event {
        /// The node that changed, or the watched one itself.
        path: String,
        /// Of the watch.
        token: String,
    },
}

/// Makes messages of a stream of bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were given out.
    done: usize,
}

impl Decoder {
    /// Takes bytes as they come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.done);
        self.done = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message. An error means that the stream is of no use any more.
    pub fn next_message(&mut self) -> Result<Option<Message>, WireError> {
        let rest = &self.buffer[self.done..];
        let Some(header) = rest.get(..HEADER_BYTES) else { return Ok(None) };
        let word = |n: usize| {
            u32::from_ne_bytes([header[4 * n], header[4 * n + 1], header[4 * n + 2], header[4 * n + 3]])
        };
        let (op, request_id, len) = (word(0), word(1), word(3) as usize);
        if len > PAYLOAD_MAX {
            return Err(WireError::Oversized(len));
        }
        let Some(payload) = rest.get(HEADER_BYTES..HEADER_BYTES + len) else { return Ok(None) };
        let message = if op == Op::WatchEvent as u32 {
            let mut strings = payload.split(|byte| *byte == 0);
            let (Some(path), Some(token)) = (strings.next(), strings.next()) else {
                return Err(WireError::BadEvent);
            };
            Message::Event {
                path: String::from_utf8_lossy(path).into_owned(),
                token: String::from_utf8_lossy(token).into_owned(),
            }
        } else if op == Op::Error as u32 {
            let name = payload.split(|byte| *byte == 0).next().unwrap_or_default();
            let errno = Errno::from_name(&String::from_utf8_lossy(name));
            Message::Reply { request_id, op, result: Err(errno) }
        } else {
            Message::Reply { request_id, op, result: Ok(payload.to_vec()) }
        };
        self.done += HEADER_BYTES + len;
        Ok(Some(message))
    }
}

/// The strings of a listing.
pub fn strings(payload: &[u8]) -> Vec<String> {
    payload
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    //! Goal: bytes are those of the specification, and no input makes the decoder panic, grow or lose step.
    //! Method: messages written by hand from the specification; the same stream cut at every place; random bytes.

    use super::*;

    fn header(op: u32, id: u32, tx: u32, len: u32) -> Vec<u8> {
        [op, id, tx, len].iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn raw(op: u32, id: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = header(op, id, 0, payload.len() as u32);
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn requests_are_as_specified() {
        let cases: Vec<(Request, u32, &[u8])> = vec![
            (Request::Directory("/a".into()), 1, b"/a\0"),
            (Request::DirectoryPart("/a".into(), 4000), 22, b"/a\x004000\0"),
            (Request::Read("a/b".into()), 2, b"a/b\0"),
            (Request::Write("a".into(), b"val".to_vec()), 11, b"a\0val"),
            (Request::Write("a".into(), b"".to_vec()), 11, b"a\0"),
            (Request::Mkdir("a".into()), 12, b"a\0"),
            (Request::Rm("a".into()), 13, b"a\0"),
            (Request::SetPerms("a".into(), vec!["n5".into(), "r0".into()]), 14, b"a\0n5\0r0\0"),
            (Request::Watch("a".into(), "t".into()), 4, b"a\0t\0"),
            (Request::Unwatch("a".into(), "t".into()), 5, b"a\0t\0"),
            (Request::TransactionStart, 6, b"\0"),
            (Request::TransactionEnd(true), 7, b"T\0"),
            (Request::TransactionEnd(false), 7, b"F\0"),
            (Request::IsDomainIntroduced(7), 17, b"7\0"),
        ];
        for (request, op, payload) in cases {
            let mut expected = header(op, 9, 3, payload.len() as u32);
            expected.extend_from_slice(payload);
            assert_eq!(request.encode(9, 3).unwrap(), expected, "{request:?}");
        }
    }

    #[test]
    fn what_the_store_would_hang_up_on_is_not_sent() {
        let fits = Request::Write("a".into(), vec![b'x'; MESSAGE_MAX - HEADER_BYTES - 2]);
        assert_eq!(fits.encode(1, 0).unwrap().len(), MESSAGE_MAX);
        let long = Request::Write("a".into(), vec![b'x'; MESSAGE_MAX - HEADER_BYTES - 1]);
        assert_eq!(long.encode(1, 0), Err(WireError::TooLong(MESSAGE_MAX + 1)));
        assert_eq!(Request::Read("a\0b".into()).encode(1, 0), Err(WireError::Nul));
    }

    #[test]
    fn a_stream_may_be_cut_anywhere() {
        let mut stream = raw(2, 5, b"value");
        stream.extend(raw(15, 0, b"backend/vbd3/1\0tok\0"));
        stream.extend(raw(16, 6, b"EAGAIN\0"));
        stream.extend(raw(7, 7, b"OK\0"));
        let expected = [
            Message::Reply { request_id: 5, op: 2, result: Ok(b"value".to_vec()) },
            Message::Event { path: "backend/vbd3/1".into(), token: "tok".into() },
            Message::Reply { request_id: 6, op: 16, result: Err(Errno::Again) },
            Message::Reply { request_id: 7, op: 7, result: Ok(b"OK\0".to_vec()) },
        ];
        for cut in 0..=stream.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                decoder.push(part);
                while let Some(message) = decoder.next_message().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, expected, "cut at {cut}");
        }
    }

    #[test]
    fn rubbish_ends_the_stream_and_nothing_else() {
        let mut decoder = Decoder::default();
        decoder.push(&header(2, 1, 0, 4097));
        assert_eq!(decoder.next_message(), Err(WireError::Oversized(4097)));
        let mut decoder = Decoder::default();
        decoder.push(&raw(15, 0, b"no token"));
        assert_eq!(decoder.next_message(), Err(WireError::BadEvent));
        let mut random = fastrand::Rng::with_seed(4);
        for _ in 0..2000 {
            let mut decoder = Decoder::default();
            let mut bytes: Vec<u8> = (0..random.usize(0..200)).map(|_| random.u8(..)).collect();
            if bytes.len() >= HEADER_BYTES {
                bytes[12..16].copy_from_slice(&random.u32(0..64).to_ne_bytes());
            }
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_message() {}
            assert!(decoder.buffer.len() <= 200);
        }
    }

    #[test]
    fn text_of_others_is_harmless() {
        assert_eq!(shown(b"a\x1b[2Jb"), "a\\u{1b}[2Jb");
        assert!(shown(&[b'x'; 5000]).chars().count() <= 61);
        assert_eq!(strings(b"a\0bc\0"), ["a", "bc"]);
        assert_eq!(Errno::from_name("EPERM"), Errno::Access);
    }
}
