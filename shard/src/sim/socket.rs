//! A connection: two bounded byte streams in memory. A real socket pair serves as the descriptor that the shard owns, and tells
//! when the shard has closed it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// How a client has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    No,
    Eof,
    Reset,
}

#[derive(Debug)]
pub struct Socket {
    /// The client's end of the pair: hung up when the shard has closed its own.
    peer: UnixStream,
    pub to_server: VecDeque<u8>,
    pub to_client: VecDeque<u8>,
    /// Bytes that fit into each direction.
    pub room: usize,
    pub client: usize,
    pub client_gone: Gone,
    pub server_gone: bool,
    /// Operations in flight.
    pub recv: Option<u64>,
    pub send: Option<u64>,
    /// Chance in a thousand that a receive is interrupted.
    pub faults: u64,
}

impl Socket {
    /// A connection, and the descriptor for the shard.
    pub fn pair(client: usize, room: usize, faults: u64) -> (Socket, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let socket = Socket {
            peer: ours,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            room,
            client,
            client_gone: Gone::No,
            server_gone: false,
            recv: None,
            send: None,
            faults,
        };
        (socket, theirs.into())
    }

    /// The shard has closed its descriptor.
    pub fn is_hung_up(&self) -> bool {
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_PEEK;
        nix::sys::socket::recv(self.peer.as_raw_fd(), &mut [0], flags) == Ok(0)
    }
}
