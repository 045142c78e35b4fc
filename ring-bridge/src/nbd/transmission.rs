//! The transmission phase, requests: decode a header, check it against what was agreed.
//!
//! Invariants: nothing here allocates or panics; a header that decodes says how many payload bytes follow it, so that
//! the stream can go on after any refusal; what the stream cannot survive is a [`Violation`].

use super::export::BlockSizes;
use super::proto::{
    EXTENDED_REQUEST_BYTES, EXTENDED_REQUEST_MAGIC, NbdError, PAYLOAD_BYTES_MAX, REQUEST_BYTES,
    REQUEST_MAGIC, command, command_flag as flag, transmission,
};
use super::reply::{ReplyStyle, ReplyTo};

/// What negotiation agreed on, for the transmission phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transmission {
    /// Structured replies.
    pub structured: bool,
    /// 64-bit extended headers (imply structured replies).
    pub extended: bool,
    /// `base:allocation` was selected; its context id.
    pub base_allocation: Option<u32>,
    /// Transmission flags as sent to the client: commands and flags outside of them are refused.
    pub flags: u16,
    /// Size of the export in bytes, as sent to the client.
    pub size_bytes: u64,
    /// Block sizes of the export.
    pub block_sizes: BlockSizes,
}

/// Commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Read `length` bytes.
    Read,
    /// Write the payload.
    Write,
    /// Finish what is in flight, end TLS, close. No reply.
    Disconnect,
    /// Make answered writes durable.
    Flush,
    /// Discard.
    Trim,
    /// Prefetch.
    Cache,
    /// Write zeroes.
    WriteZeroes,
    /// Report extents.
    BlockStatus,
}

/// A decoded request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub kind: RequestKind,
    /// Command flags (`proto::command_flag`), as sent.
    pub flags: u16,
    /// The client's own number; every reply repeats it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes to work on.
    pub length: u64,
    /// Bytes of payload behind the header, at most [`PAYLOAD_BYTES_MAX`]: received before the next header, or skipped
    /// when the request is refused.
    pub payload: u32,
}

impl Request {
    /// What a reply repeats.
    pub const fn reply_to(&self) -> ReplyTo {
        ReplyTo { cookie: self.cookie, offset: self.offset }
    }

    /// Whether a command flag is set.
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// FUA on a command that can change data.
    pub const fn fua(&self) -> bool {
        self.has(flag::FUA)
            && matches!(self.kind, RequestKind::Write | RequestKind::Trim | RequestKind::WriteZeroes)
    }
}

/// A request is answered with an error and the connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Error of the reply.
    pub error: NbdError,
    /// Message of the reply (structured replies carry it).
    pub reason: &'static str,
}

/// A header that names no request this server knows, in a stream that can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{refusal}")]
pub struct RefusedRequest {
    /// What the reply repeats.
    pub reply_to: ReplyTo,
    /// Bytes of payload behind the header, to be skipped.
    pub payload: u32,
    /// The answer.
    pub refusal: Refusal,
}

/// The client broke the protocol in a way that leaves no trust in the stream: drop the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The caller gave fewer bytes than a header has.
    #[error("a request header has {expected} bytes, got {found}")]
    ShortHeader {
        /// Bytes of a header.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The magic is wrong.
    #[error("request magic is {found:#010x}, expected {expected:#010x}")]
    BadMagic {
        /// Magic of the agreed header style.
        expected: u32,
        /// Magic found.
        found: u32,
    },
    /// More payload than this server receives, or skips.
    #[error("a request announces {length} bytes of payload, the limit is {PAYLOAD_BYTES_MAX}")]
    PayloadTooLarge {
        /// Announced bytes.
        length: u64,
    },
}

/// Why a header is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Drop the connection.
    #[error(transparent)]
    Drop(#[from] Violation),
    /// Skip the payload and answer with an error.
    #[error(transparent)]
    Refuse(RefusedRequest),
}

const fn refuse(error: NbdError, reason: &'static str) -> Result<(), Refusal> {
    Err(Refusal { error, reason })
}

/// Big-endian fields of a header, front to back. Reads past the end give zero; the length was checked before.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk::<N>().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *head
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }
}

impl Transmission {
    /// Changes are refused.
    pub const fn read_only(&self) -> bool {
        self.flags & transmission::READ_ONLY != 0
    }

    /// How replies look.
    pub const fn reply_style(&self) -> ReplyStyle {
        match (self.extended, self.structured) {
            (true, _) => ReplyStyle::Extended,
            (false, true) => ReplyStyle::Structured,
            (false, false) => ReplyStyle::Simple,
        }
    }

    /// Bytes of a request header: 28, or 32 with extended headers.
    pub const fn header_bytes(&self) -> usize {
        if self.extended { EXTENDED_REQUEST_BYTES } else { REQUEST_BYTES }
    }

    /// Decodes the header at the front of `bytes` ([`Self::header_bytes`] long; what follows is not looked at).
    ///
    /// # Errors
    /// [`DecodeError::Refuse`] for a command nobody knows; [`DecodeError::Drop`] when the stream cannot go on.
    pub fn decode(&self, bytes: &[u8]) -> Result<Request, DecodeError> {
        let expected = self.header_bytes();
        let Some(header) = bytes.get(..expected) else {
            return Err(Violation::ShortHeader { expected, found: bytes.len() }.into());
        };
        let mut fields = Fields(header);
        let expected = if self.extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let found = fields.u32();
        if found != expected {
            return Err(Violation::BadMagic { expected, found }.into());
        }
        let flags = fields.u16();
        let number = fields.u16();
        let cookie = fields.u64();
        let offset = fields.u64();
        let length = if self.extended { fields.u64() } else { u64::from(fields.u32()) };

        let kind = kind(number);
        let payload = self.payload_bytes(kind, flags, length)?;
        match kind {
            Some(kind) => Ok(Request { kind, flags, cookie, offset, length, payload }),
            None => Err(DecodeError::Refuse(RefusedRequest {
                reply_to: ReplyTo { cookie, offset },
                payload,
                refusal: Refusal { error: NbdError::Einval, reason: "unknown command" },
            })),
        }
    }

    /// Payload behind a header: a WRITE always has it; others, with extended headers, if the flag PAYLOAD_LEN says so.
    ///
    /// The specification wants the flag on an extended WRITE too, but the client of QEMU 10.0 leaves it out and sends the
    /// payload. Taking the length as payload in both cases never reads what a guest wrote as a request.
    fn payload_bytes(&self, kind: Option<RequestKind>, flags: u16, length: u64) -> Result<u32, Violation> {
        let announced = self.extended && flags & flag::PAYLOAD_LEN != 0;
        if !announced && kind != Some(RequestKind::Write) {
            return Ok(0);
        }
        match u32::try_from(length) {
            Ok(payload) if payload <= PAYLOAD_BYTES_MAX => Ok(payload),
            _ => Err(Violation::PayloadTooLarge { length }),
        }
    }

    /// Checks a request against what was agreed: flags, permission, offered commands, block sizes, bounds.
    ///
    /// # Errors
    /// The answer to send. The request's payload has then to be received and thrown away.
    pub fn check(&self, request: &Request) -> Result<(), Refusal> {
        self.check_flags(request)?;
        self.check_offered(request)?;
        match request.kind {
            RequestKind::Disconnect => Ok(()),
            RequestKind::Flush if request.offset == 0 && request.length == 0 => Ok(()),
            RequestKind::Flush => refuse(NbdError::Einval, "a flush has neither offset nor length"),
            _ => self.check_range(request),
        }
    }

    fn check_flags(&self, request: &Request) -> Result<(), Refusal> {
        let offered = |bit: u16, flag: u16| if self.flags & bit != 0 { flag } else { 0 };
        let own = match request.kind {
            RequestKind::Read => offered(transmission::SEND_DF, flag::DF),
            RequestKind::Write if self.extended => flag::PAYLOAD_LEN,
            RequestKind::WriteZeroes => {
                flag::NO_HOLE | offered(transmission::SEND_FAST_ZERO, flag::FAST_ZERO)
            }
            RequestKind::BlockStatus => flag::REQ_ONE,
            // The client gets no reply to a goodbye, so that nothing may be wrong with it.
            RequestKind::Disconnect => u16::MAX,
            RequestKind::Write | RequestKind::Flush | RequestKind::Trim | RequestKind::Cache => 0,
        };
        let legal = own | offered(transmission::SEND_FUA, flag::FUA);
        if request.flags & !legal != 0 {
            return refuse(
                NbdError::Einval,
                "a command flag is unknown, not offered, or not for this command",
            );
        }
        Ok(())
    }

    fn check_offered(&self, request: &Request) -> Result<(), Refusal> {
        let changes =
            matches!(request.kind, RequestKind::Write | RequestKind::Trim | RequestKind::WriteZeroes);
        if changes && self.read_only() {
            return refuse(NbdError::Eperm, "the export is read-only");
        }
        let offered = match request.kind {
            RequestKind::Read | RequestKind::Write | RequestKind::Disconnect => true,
            RequestKind::Flush => self.flags & transmission::SEND_FLUSH != 0,
            RequestKind::Trim => self.flags & transmission::SEND_TRIM != 0,
            RequestKind::Cache => self.flags & transmission::SEND_CACHE != 0,
            RequestKind::WriteZeroes => self.flags & transmission::SEND_WRITE_ZEROES != 0,
            RequestKind::BlockStatus => {
                if self.base_allocation.is_none() {
                    return refuse(NbdError::Einval, "block status needs a selected metadata context");
                }
                true
            }
        };
        if offered { Ok(()) } else { refuse(NbdError::Einval, "the command is not offered by this export") }
    }

    /// A length of zero is refused: the specification leaves it open, and so no code behind this sees one.
    fn check_range(&self, request: &Request) -> Result<(), Refusal> {
        if request.length == 0 {
            return refuse(NbdError::Einval, "the length is zero");
        }
        let inside = request.offset.checked_add(request.length).is_some_and(|end| end <= self.size_bytes);
        if !inside {
            return match request.kind {
                RequestKind::Write | RequestKind::WriteZeroes => {
                    refuse(NbdError::Enospc, "the range ends behind the end of the export")
                }
                _ => refuse(NbdError::Einval, "the range ends behind the end of the export"),
            };
        }
        let minimum = u64::from(self.block_sizes.minimum.max(1));
        if !request.offset.is_multiple_of(minimum) || !request.length.is_multiple_of(minimum) {
            return refuse(NbdError::Einval, "offset or length is no multiple of the minimum block size");
        }
        let carries_data = matches!(request.kind, RequestKind::Read | RequestKind::Write);
        let maximum = self.block_sizes.maximum.min(PAYLOAD_BYTES_MAX);
        if carries_data && request.length > u64::from(maximum) {
            return refuse(NbdError::Einval, "the length is larger than the maximum block size");
        }
        Ok(())
    }
}

const fn kind(number: u16) -> Option<RequestKind> {
    Some(match number {
        command::READ => RequestKind::Read,
        command::WRITE => RequestKind::Write,
        command::DISC => RequestKind::Disconnect,
        command::FLUSH => RequestKind::Flush,
        command::TRIM => RequestKind::Trim,
        command::CACHE => RequestKind::Cache,
        command::WRITE_ZEROES => RequestKind::WriteZeroes,
        command::BLOCK_STATUS => RequestKind::BlockStatus,
        _ => return None,
    })
}
