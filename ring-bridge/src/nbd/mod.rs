//! The NBD protocol, server side, without I/O: bytes in, bytes and decisions out.
//!
//! ```text
//!  control thread                                          shard
//!  socket ─▶ [TlsSession] ─▶ Negotiation ─▶ Handoff ─────▶ Transmission::decode ─▶ check ─▶ serve
//!                             (Exports)                                            Reply ◀──┘
//! ```
//! * [`proto`]: numbers of the protocol, errno to NBD error.
//! * [`export`]: what a listener exports.
//! * [`negotiate`]: greeting and options, for the control thread. Memory per connection is bounded.
//! * [`transmission`]: request headers, checked against what was agreed. No allocation.
//! * [`reply`]: reply headers and block status, written into the caller's buffer. No allocation.
//! * [`tls`]: TLS 1.2 and 1.3 over memory buffers, with certificates or pre-shared keys.

use std::os::fd::OwnedFd;

pub mod export;
pub mod negotiate;
mod options;
pub mod proto;
mod psk;
pub mod reply;
pub mod tls;
pub mod transmission;

pub use export::{BlockSizes, ExportInfo, Exports, Features, NoExport, OneExport};
pub use negotiate::{Agreed, CloseReason, Negotiation, Step, TlsMode};
pub use proto::NbdError;
pub use reply::{ReplyStyle, ReplyTo, SLOT_BYTES, Slot, StatusBuilder};
pub use tls::{Handshake, PlainRead, TlsAcceptor, TlsError, TlsSession};
pub use transmission::{DecodeError, Refusal, RefusedRequest, Request, RequestKind, Transmission, Violation};

/// A negotiated connection on its way from the control thread to a shard.
#[derive(Debug)]
pub struct Handoff {
    /// The connected socket, non-blocking or not; it belongs to the shard from now on.
    pub fd: OwnedFd,
    /// Bytes that arrived behind the negotiation and belong to transmission. With TLS they are plaintext: use them up
    /// before the first [`TlsSession::read_plain`].
    pub unread: Vec<u8>,
    /// Agreed options.
    pub transmission: Transmission,
    /// Present on a connection in TLS; socket bytes pass through it in both directions. It may hold received bytes
    /// that were not decrypted yet: ask it before the socket.
    pub tls: Option<Box<TlsSession>>,
    /// Who: `unix pid 1234 (fio)` or `tcp 127.0.0.1:4711`.
    pub peer: String,
}
