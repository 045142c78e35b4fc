//! One client's negotiation: bytes between its socket and the protocol engine, in the clear or through TLS.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ring_bridge::nbd::{
    Agreed, Handoff, Handshake, Negotiation, PlainRead, Step, TlsAcceptor, TlsMode, TlsSession,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Scope;
use super::exports::DaemonExports;
use super::places::Ticket;
use crate::daemon::Daemon;

/// Bytes of one receive.
const RECEIVE_BYTES: usize = 4096;

/// Why a negotiation ended without a disk. The text is for the log.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client left, or the socket broke.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// The client left in the middle.
    #[error("the client left before it chose an export")]
    Left,
    /// The protocol says so.
    #[error("{0}")]
    Closed(ring_bridge::nbd::CloseReason),
    /// TLS failed.
    #[error("TLS: {0}")]
    Tls(#[from] ring_bridge::nbd::TlsError),
}

/// What a socket can do here.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send {
    /// The descriptor, for a shard. It is non-blocking, as tokio made it, and stays so. io_uring does not look at O_NONBLOCK when
    /// it receives and sends: only MSG_DONTWAIT (the shard's first try to send) ends an operation with EAGAIN, everything else
    /// waits in the ring by a poll of its own, without a worker thread and without a turn of the shard. Blocking sockets
    /// were seen to behave the same; `a_shard_does_not_turn_for_clients_that_keep_it_waiting` is the test.
    fn into_fd(self) -> io::Result<OwnedFd>;
}

impl Socket for tokio::net::UnixStream {
    fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

impl Socket for tokio::net::TcpStream {
    fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

/// The socket with TLS on it, once that was started.
struct Channel<'a, S> {
    socket: S,
    ticket: &'a Ticket,
    tls: Option<Box<TlsSession>>,
    /// Ciphertext that the session has not taken yet.
    held: Vec<u8>,
}

impl<S: Socket> Channel<'_, S> {
    async fn send(&mut self, plain: Vec<u8>) -> Result<(), End> {
        let Some(tls) = &mut self.tls else {
            self.socket.write_all(&plain).await?;
            return Ok(());
        };
        let mut rest = plain.as_slice();
        while !rest.is_empty() {
            let taken = tls.write_plain(rest)?;
            rest = rest.get(taken..).unwrap_or_default();
            self.socket.write_all(&tls.take_output()).await?;
        }
        Ok(())
    }

    /// Some bytes from the client; none when it left.
    async fn receive(&mut self) -> Result<Vec<u8>, End> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            if let Some(tls) = &mut self.tls {
                match tls.read_plain(&mut buffer)? {
                    PlainRead::Bytes(count) => {
                        buffer.truncate(count);
                        return Ok(buffer);
                    }
                    PlainRead::Closed => return Ok(Vec::new()),
                    PlainRead::WouldBlock => self.socket.write_all(&tls.take_output()).await?,
                }
            }
            let count = self.receive_raw(&mut buffer).await?;
            match &mut self.tls {
                _ if count == 0 => return Ok(Vec::new()),
                None => {
                    buffer.truncate(count);
                    return Ok(buffer);
                }
                Some(_) => self.feed(),
            }
        }
    }

    /// Receives from the socket; with TLS what came is held for the session.
    async fn receive_raw(&mut self, buffer: &mut [u8]) -> Result<usize, End> {
        if self.tls.is_some() && !self.held.is_empty() {
            return Ok(self.held.len());
        }
        let count = self.socket.read(buffer).await?;
        self.ticket.spoke();
        if self.tls.is_some() {
            self.held.extend_from_slice(&buffer[..count]);
        }
        Ok(count)
    }

    fn feed(&mut self) {
        if let Some(tls) = &mut self.tls {
            let taken = tls.feed(&self.held);
            self.held.drain(..taken);
        }
    }

    async fn start_tls(&mut self, acceptor: &TlsAcceptor, unread: Vec<u8>) -> Result<(), End> {
        self.tls = Some(Box::new(acceptor.session()?));
        self.held = unread;
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            self.feed();
            let Some(tls) = &mut self.tls else { return Err(End::Left) };
            let handshake = tls.handshake();
            // Also after a failure: the output has the alert that tells the client why.
            self.socket.write_all(&tls.take_output()).await?;
            if handshake? == Handshake::Done {
                return Ok(());
            }
            if self.receive_raw(&mut buffer).await? == 0 {
                return Err(End::Left);
            }
        }
    }
}

/// Negotiates until the client has an export. The caller sets the deadline.
pub async fn negotiate<S: Socket>(
    socket: S,
    peer: String,
    daemon: &Arc<Daemon>,
    scope: &Scope,
    acceptor: Option<Arc<TlsAcceptor>>,
    ticket: &Ticket,
) -> Result<(String, Box<Handoff>), End> {
    let mode = if acceptor.is_some() { TlsMode::Required } else { TlsMode::Off };
    let mut negotiation = Negotiation::new(mode);
    let mut channel = Channel { socket, ticket, tls: None, held: Vec::new() };
    let agreed: Box<Agreed> = loop {
        let step = negotiation.advance(&DaemonExports { daemon, scope });
        channel.send(negotiation.take_output()).await?;
        match step {
            Step::Again => {}
            Step::NeedInput => {
                let bytes = channel.receive().await?;
                if bytes.is_empty() {
                    return Err(End::Left);
                }
                negotiation.feed(&bytes);
            }
            Step::StartTls { unread } => {
                let Some(acceptor) = &acceptor else { return Err(End::Left) };
                channel.start_tls(acceptor, unread).await?;
                negotiation.tls_started();
            }
            Step::Transmission(agreed) => break agreed,
            Step::Close(reason) => return Err(End::Closed(reason)),
        }
    };
    channel.feed();
    let peer = match channel.tls.as_ref().and_then(|tls| tls.client_identity()) {
        Some(identity) => format!("{peer} ({identity})"),
        None => peer,
    };
    let Agreed { export, transmission, unread } = *agreed;
    let handoff = Handoff { fd: channel.socket.into_fd()?, unread, transmission, tls: channel.tls, peer };
    Ok((export, Box::new(handoff)))
}
