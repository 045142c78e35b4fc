//! How a local client hands its memory over and gets its event channels: the protocol of the socket, for programs that want to be served
//! by blkif without Xen.
//!
//! A Unix socket of type SOCK_SEQPACKET; each message is one packet of at most [`MESSAGE_BYTES_MAX`] bytes of UTF-8:
//!
//! ```text
//! blktapd-share 1 KIND\n          the protocol's version is 1
//! key=value\n                     any number up to KEYS_MAX; a key is [a-z0-9/-], at most 64 bytes, and occurs once
//! ```
//!
//! | message | from | descriptors | keys |
//! |---|---|---|---|
//! | `open` | client | its memfd | `disk`: the name of an attached disk; `queues`: event channels wanted, 1 to 8 |
//! | `offer` | server | per channel: kick, call | what a backend writes before InitWait: `max-ring-page-order`, `feature-...` |
//! | `connect` | client | | what a frontend writes: `ring-ref` or `ring-page-order` and `ring-ref0`..., `event-channel`, or the same under `queue-N/`; `protocol`, `feature-persistent` |
//! | `connected` | server | | what a backend writes at Connected: `sectors`, `sector-size`, `info`, ...; again when one of them changes |
//! | `error` | server | | `reason`: a sentence; the server closes the socket after it |
//!
//! Keys and values are those of XenStore for the same thing, so that both go through the same checks. A gref is the number of a 4 KiB page
//! in the memfd, an `event-channel` the number of a channel in the order of the offer, from 0. The memfd is sealed by F_SEAL_SHRINK, of
//! ordinary pages and fallocated; see [`super::memfd`] for why, and [`make_client_memory`](super::memfd::make_client_memory).
//! To notify, the client writes eight bytes (a 1) to `kick`; it is notified when `call` is readable, and takes it by epoll_wait(2).
//! The end of the connection is the end of the domain: the server answers nothing more and lets go of the memory.
//!
//! This file has the packets; who listens, accepts and waits is the control thread. Nothing here waits.
//!
//! Invariant: a descriptor that was received is owned at once, so no message, however wrong, leaks one.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::GrantError;
use super::memfd::{Channel, ClientChannel, ClientMemory, MemoryRefused, channel};

/// Longest message.
pub const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Most keys in a message.
pub const KEYS_MAX: usize = 256;
/// Most event channels of a client.
pub const CHANNELS_MAX: usize = 8;
const KEY_BYTES_MAX: usize = 64;
/// Most descriptors that the kernel carries in one message; with room for so many, none is cut off and lost.
const FDS_MAX: usize = 253;
const GREETING: &str = "blktapd-share 1 ";

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The client begins.
    Open,
    /// The server's features, and the channels.
    Offer,
    /// The client's rings.
    Connect,
    /// The disk's properties.
    Connected,
    /// The end, with a reason.
    Error,
}

const KINDS: [(Kind, &str); 5] = [
    (Kind::Open, "open"),
    (Kind::Offer, "offer"),
    (Kind::Connect, "connect"),
    (Kind::Connected, "connected"),
    (Kind::Error, "error"),
];

/// Why a message could not be sent, received or used.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Nothing to receive now, or no room to send: poll the socket.
    #[error("the socket is not ready")]
    NotReady,
    /// The peer has gone.
    #[error("the peer has closed the connection")]
    Closed,
    /// It is not a message of this protocol.
    #[error("not a message of blktapd-share 1: {0}")]
    Malformed(&'static str),
    /// It is one, but not what comes now.
    #[error("`{found}` came where `{expected}` was expected")]
    Unexpected {
        /// The kind that came.
        found: &'static str,
        /// The kind that was expected.
        expected: &'static str,
    },
    /// A key is missing or has a value that it cannot have.
    #[error("the key `{0}` is missing or has no valid value")]
    Key(&'static str),
    /// Another number of descriptors than the message has.
    #[error("{found} descriptors came with the message, {expected} belong to it")]
    Descriptors {
        /// Came.
        found: usize,
        /// Belong to it.
        expected: usize,
    },
    /// The memory is not fit.
    #[error("client memory refused: {0}")]
    Memory(#[from] MemoryRefused),
    /// No descriptors left here.
    #[error(transparent)]
    Grants(#[from] GrantError),
    /// The kernel refused.
    #[error("{0}")]
    Kernel(Errno),
}

/// A message without its descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: Kind,
    /// Its keys.
    pub keys: BTreeMap<String, String>,
}

impl Kind {
    fn name(self) -> &'static str {
        KINDS.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

impl Message {
    /// A message with these keys.
    pub fn new(kind: Kind, keys: impl IntoIterator<Item = (String, String)>) -> Message {
        Message { kind, keys: keys.into_iter().collect() }
    }

    /// The bytes of the packet.
    ///
    /// # Errors
    /// [`ShareError::Malformed`] for keys or values that [`Message::decode`] would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, ShareError> {
        let mut text = format!("{GREETING}{}\n", self.kind.name());
        for (key, value) in &self.keys {
            check_pair(key, value)?;
            text.extend([key, "=", value, "\n"]);
        }
        if text.len() > MESSAGE_BYTES_MAX || self.keys.len() > KEYS_MAX {
            return Err(ShareError::Malformed("too long"));
        }
        Ok(text.into_bytes())
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// [`ShareError::Malformed`].
    pub fn decode(packet: &[u8]) -> Result<Message, ShareError> {
        let text = std::str::from_utf8(packet).map_err(|_| ShareError::Malformed("not UTF-8"))?;
        let text = text.strip_suffix('\n').ok_or(ShareError::Malformed("no newline at the end"))?;
        let mut lines = text.split('\n');
        let name = lines.next().and_then(|line| line.strip_prefix(GREETING));
        let name = name.ok_or(ShareError::Malformed("another greeting"))?;
        let kind = KINDS.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind);
        let kind = kind.ok_or(ShareError::Malformed("unknown kind"))?;
        let mut keys = BTreeMap::new();
        for line in lines {
            let (key, value) = line.split_once('=').ok_or(ShareError::Malformed("a line without ="))?;
            check_pair(key, value)?;
            if keys.len() == KEYS_MAX || keys.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(ShareError::Malformed("too many keys, or one twice"));
            }
        }
        Ok(Message { kind, keys })
    }

    fn expect(self, expected: Kind) -> Result<Message, ShareError> {
        if self.kind == expected {
            return Ok(self);
        }
        Err(ShareError::Unexpected { found: self.kind.name(), expected: expected.name() })
    }
}

fn check_pair(key: &str, value: &str) -> Result<(), ShareError> {
    let of_key =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'/';
    if key.is_empty() || key.len() > KEY_BYTES_MAX || !key.bytes().all(of_key) {
        return Err(ShareError::Malformed("a key with other bytes than a-z, 0-9, - and /"));
    }
    if value.chars().any(char::is_control) {
        return Err(ShareError::Malformed("a control character in a value"));
    }
    Ok(())
}

/// Sends a message. Does not wait.
///
/// # Errors
/// [`ShareError::NotReady`], [`ShareError::Closed`], [`ShareError::Malformed`], [`ShareError::Kernel`].
pub fn send(socket: impl AsFd, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), ShareError> {
    let packet = message.encode()?;
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(&packet)], rights, flags, None)
        .map(drop)
        .map_err(from_kernel)
}

/// Receives a message and its descriptors. Does not wait.
///
/// # Errors
/// [`ShareError::NotReady`], [`ShareError::Closed`], [`ShareError::Malformed`], [`ShareError::Kernel`].
pub fn receive(socket: impl AsFd) -> Result<(Message, Vec<OwnedFd>), ShareError> {
    // One byte more, to see that a packet was longer.
    let mut packet = vec![0; MESSAGE_BYTES_MAX + 1];
    let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut slices = [IoSliceMut::new(&mut packet)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut slices, Some(&mut control), flags)
        .map_err(from_kernel)?;
    let mut fds = Vec::new();
    for message in received.cmsgs().map_err(ShareError::Kernel)? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for this message; nobody else knows their numbers.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let bytes = received.bytes;
    match bytes {
        0 => Err(ShareError::Closed),
        _ if bytes > MESSAGE_BYTES_MAX => Err(ShareError::Malformed("too long")),
        _ => Ok((Message::decode(&packet[..bytes])?, fds)),
    }
}

fn from_kernel(errno: Errno) -> ShareError {
    match errno {
        Errno::EAGAIN | Errno::EINTR => ShareError::NotReady,
        Errno::EPIPE | Errno::ECONNRESET => ShareError::Closed,
        other => ShareError::Kernel(other),
    }
}

/// What a client asked for by `open`, for [`super::memfd::SharedDomains::add`], and what belongs into the `offer`.
#[derive(Debug)]
pub struct Opened {
    /// Name of the disk.
    pub disk: String,
    /// Its memory, found fit.
    pub memory: ClientMemory,
    /// Our ends of its channels.
    pub channels: Vec<Channel>,
    /// Its ends: send them by [`send_offer`].
    pub theirs: Vec<ClientChannel>,
}

/// Looks at a client's first message. `bytes_max`: most memory, see [`ClientMemory::admit`].
///
/// # Errors
/// Any of [`ShareError`]; its text is fit for the `reason` of an `error`.
pub fn accept_open(message: Message, fds: Vec<OwnedFd>, bytes_max: u64) -> Result<Opened, ShareError> {
    let mut message = message.expect(Kind::Open)?;
    let disk = message.keys.remove("disk").filter(|name| !name.is_empty()).ok_or(ShareError::Key("disk"))?;
    let queues = message.keys.get("queues").and_then(|text| text.parse::<usize>().ok());
    let queues = queues.filter(|n| (1..=CHANNELS_MAX).contains(n)).ok_or(ShareError::Key("queues"))?;
    let [memory] = <[OwnedFd; 1]>::try_from(fds)
        .map_err(|fds| ShareError::Descriptors { found: fds.len(), expected: 1 })?;
    let memory = ClientMemory::admit(memory, bytes_max)?;
    let pairs = (0..queues).map(|_| channel()).collect::<Result<Vec<_>, GrantError>>()?;
    let (channels, theirs) = pairs.into_iter().unzip();
    Ok(Opened { disk, memory, channels, theirs })
}

/// Sends the server's answer to `open`.
///
/// # Errors
/// As [`send`].
pub fn send_offer(
    socket: impl AsFd,
    keys: impl IntoIterator<Item = (String, String)>,
    theirs: &[ClientChannel],
) -> Result<(), ShareError> {
    let fds: Vec<BorrowedFd<'_>> =
        theirs.iter().flat_map(|channel| [channel.kick.as_fd(), channel.call.as_fd()]).collect();
    send(socket, &Message::new(Kind::Offer, keys), &fds)
}

/// The client's side: what an `offer` has.
///
/// # Errors
/// [`ShareError::Unexpected`]: also an `error` of the server's; [`ShareError::Descriptors`].
pub fn accept_offer(
    message: Message,
    fds: Vec<OwnedFd>,
) -> Result<(BTreeMap<String, String>, Vec<ClientChannel>), ShareError> {
    let message = message.expect(Kind::Offer)?;
    let found = fds.len();
    let mut fds = fds.into_iter();
    let mut channels = Vec::with_capacity(found / 2);
    while let (Some(kick), Some(call)) = (fds.next(), fds.next()) {
        channels.push(ClientChannel { kick, call });
    }
    if found == 0 || found % 2 == 1 {
        return Err(ShareError::Descriptors { found, expected: 2 * channels.len().max(1) });
    }
    Ok((message.keys, channels))
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use proptest::prelude::*;

    use super::*;
    use crate::grants::memfd::{CLIENT_BYTES_DEFAULT, make_client_memory};
    use crate::grants::{Domains, Protection};

    fn sockets() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a pair")
    }

    fn open(queues: &str) -> Message {
        let keys = [("disk", "a"), ("queues", queues)];
        Message::new(Kind::Open, keys.map(|(key, value)| (key.to_owned(), value.to_owned())))
    }

    // Goal: a client and a server that have only a socket in common end up with shared pages and working channels.
    // Method: both sides of the protocol in one process, then bytes and notifications both ways, then the client's end.
    #[test]
    fn a_client_connects_over_a_socket() {
        let (ours, theirs) = sockets();
        let memory = make_client_memory(8).expect("memory");
        send(&theirs, &open("2"), &[memory.as_fd()]).expect("sent");
        let (message, fds) = receive(&ours).expect("received");
        let opened = accept_open(message, fds, CLIENT_BYTES_DEFAULT).expect("fit");
        assert_eq!((opened.disk.as_str(), opened.channels.len()), ("a", 2));
        send_offer(&ours, [("feature-persistent".to_owned(), "1".to_owned())], &opened.theirs).expect("sent");
        drop(opened.theirs);
        let mut domains = Domains::open_memfd().expect("descriptors");
        domains.clients().expect("memfd").add(3, opened.memory, opened.channels).expect("free");
        let (message, fds) = receive(&theirs).expect("received");
        let (keys, channels) = accept_offer(message, fds).expect("an offer");
        assert_eq!((keys["feature-persistent"].as_str(), channels.len()), ("1", 2));
        let port = domains.bind(3, 1, 77).expect("free");
        let mut events = Vec::new();
        domains.drain(&mut events);
        nix::unistd::write(&channels[1].kick, &1u64.to_ne_bytes()).expect("a kick");
        domains.drain(&mut events);
        assert_eq!(events.len(), 2);
        domains.notify(port);
        let mut call = [nix::poll::PollFd::new(channels[1].call.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut call, nix::poll::PollTimeout::ZERO), Ok(1), "pollable");
        let pages = domains.map(3, &[2], Protection::ReadWrite).expect("granted");
        pages.copy_in(7, b"hello").expect("inside");
        let mut seen = [0; 5];
        nix::sys::uio::pread(&memory, &mut seen, 2 * 4096 + 7).expect("its own memory");
        assert_eq!(&seen, b"hello");
        assert!(matches!(receive(&ours), Err(ShareError::NotReady)));
        drop(theirs);
        assert!(matches!(receive(&ours), Err(ShareError::Closed)));
    }

    // Goal: no first message, however wrong, is accepted, waits, or leaks a descriptor.
    // Method: messages with one fault each, many of them with descriptors; the number of open descriptors at the end.
    #[test]
    fn wrong_messages_are_refused_and_leak_nothing() {
        let count = || std::fs::read_dir("/proc/self/fd").expect("proc").count();
        let (ours, theirs) = sockets();
        let memory = make_client_memory(1).expect("memory");
        let before = count();
        let try_open = |message: &Message, fds: &[BorrowedFd<'_>]| {
            send(&theirs, message, fds).expect("sent");
            receive(&ours)
                .and_then(|(message, fds)| accept_open(message, fds, CLIENT_BYTES_DEFAULT))
                .map(|_| ())
        };
        for _ in 0..200 {
            for queues in ["0", "9", "-1", "x", ""] {
                let result = try_open(&open(queues), &[memory.as_fd()]);
                assert!(matches!(result, Err(ShareError::Key("queues"))), "{queues}");
            }
            let many = [memory.as_fd(); 200];
            let result = try_open(&open("1"), &many);
            assert!(matches!(result, Err(ShareError::Descriptors { found: 200, expected: 1 })));
            assert!(matches!(try_open(&open("1"), &[]), Err(ShareError::Descriptors { found: 0, .. })));
            assert!(matches!(try_open(&open("1"), &[ours.as_fd()]), Err(ShareError::Memory(_))));
            let other = Message::new(Kind::Connect, []);
            assert!(matches!(try_open(&other, &many), Err(ShareError::Unexpected { .. })));
            nix::sys::socket::send(theirs.as_raw_fd(), b"rubbish", MsgFlags::empty()).expect("sent");
            assert!(matches!(receive(&ours), Err(ShareError::Malformed(_))));
            nix::sys::socket::send(theirs.as_raw_fd(), &[b'x'; 20_000], MsgFlags::empty()).expect("sent");
            assert!(matches!(receive(&ours), Err(ShareError::Malformed("too long"))));
        }
        // Tests beside this one open and close some.
        assert!(count() < before + 200, "{before} before, {} after", count());
    }

    // Goal: each rule of the packet's grammar is enforced.
    // Method: one packet per rule, next to one that keeps them all.
    #[test]
    fn packets_that_break_a_rule_are_refused() {
        let decode = |text: &str| Message::decode(format!("blktapd-share 1 {text}").as_bytes());
        assert!(decode("open\na=\nb/c-0=x=y\n").is_ok());
        let long = format!("open\n{}=1\n", "k".repeat(KEY_BYTES_MAX + 1));
        let many = (0..=KEYS_MAX).fold("open\n".to_owned(), |text, i| text + &format!("k{i}=\n"));
        for bad in [
            "",
            "open",
            "closed\n",
            "open\na\n",
            "open\n=1\n",
            "open\nA=1\n",
            "open\na=1\na=1\n",
            "open\na=\x1b\n",
            &long,
            &many,
        ] {
            assert!(matches!(decode(bad), Err(ShareError::Malformed(_))), "{bad:?}");
        }
        assert!(matches!(Message::decode(b"blktapd-share 2 open\n"), Err(ShareError::Malformed(_))));
        assert!(matches!(Message::decode(b"blktapd-share 1 open\na=\xff\n"), Err(ShareError::Malformed(_))));
        let newline = Message::new(Kind::Error, [("reason".to_owned(), "a\nb".to_owned())]);
        assert!(newline.encode().is_err(), "a value cannot make a line of its own");
    }

    proptest! {
        // Goal: what is encoded is decoded; what is decoded is canonical enough to be encoded to the same keys; nothing panics.
        // Method: random keys and values, and random bytes that begin like a message.
        #[test]
        fn messages_survive_the_wire(
            keys in prop::collection::btree_map("[a-z0-9/-]{1,64}", "[ -~é]{0,40}", 0..20),
            rubbish in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'='), Just(b'a'), any::<u8>()], 0..60),
        ) {
            let message = Message::new(Kind::Connect, keys);
            prop_assert_eq!(&Message::decode(&message.encode()?)?, &message);
            let mut bytes = b"blktapd-share 1 open\n".to_vec();
            bytes.extend(rubbish);
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(&Message::decode(&message.encode()?)?, &message);
            }
        }
    }
}
