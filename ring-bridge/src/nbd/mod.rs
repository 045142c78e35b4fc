//! The NBD protocol, server side, without I/O: negotiation for the control thread, transmission for a shard.

use std::os::fd::OwnedFd;

/// What negotiation agreed on, for the transmission phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transmission {
    /// Structured replies.
    pub structured: bool,
    /// 64-bit extended headers (imply structured replies).
    pub extended: bool,
    /// `base:allocation` was selected; its context id.
    pub base_allocation: Option<u32>,
}

/// A negotiated connection on its way from the control thread to a shard.
#[derive(Debug)]
pub struct Handoff {
    /// The connected socket, non-blocking or not; it belongs to the shard from now on.
    pub fd: OwnedFd,
    /// Bytes that arrived behind the negotiation and belong to transmission.
    pub unread: Vec<u8>,
    /// Agreed options.
    pub transmission: Transmission,
    /// Who: `unix pid 1234 (fio)` or `tcp 127.0.0.1:4711`.
    pub peer: String,
}
