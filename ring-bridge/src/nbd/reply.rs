//! The transmission phase, replies: headers and block status, written into a buffer of the caller.
//!
//! A reply header and what belongs to it fit into one [`Slot`]; data follow from the caller's own buffer. Nothing here
//! allocates or panics.
//!
//! | style | header |
//! |---|---|
//! | simple | magic 4, error 4, cookie 8 |
//! | structured | magic 4, flags 2, type 2, cookie 8, payload length 4 |
//! | extended | magic 4, flags 2, type 2, cookie 8, offset of the request 8, payload length 8 |

use super::proto::{
    EXTENDED_REPLY_MAGIC, NbdError, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, command_flag,
};
use super::transmission::{Request, Transmission};

/// Bytes of a [`Slot`]: the longest header with an error, its offset and a message.
pub const SLOT_BYTES: usize = 128;

/// Room for one encoded header.
pub type Slot = [u8; SLOT_BYTES];

/// Longest message of an error reply in bytes: what an extended header, error 4, length 2 and offset 8 leave of a slot.
pub const MESSAGE_BYTES_MAX: usize = SLOT_BYTES - 32 - 14;

/// How replies of a connection look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyStyle {
    /// One 16-byte header, data behind it.
    Simple,
    /// Chunks with a 20-byte header.
    Structured,
    /// Chunks with a 32-byte header.
    Extended,
}

/// What a reply repeats from its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    /// The client's number.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
}

/// Fills a buffer front to back; what does not fit is left out (callers size their buffers by constants).
struct Writer<'a> {
    buffer: &'a mut [u8],
    filled: usize,
}

impl Writer<'_> {
    fn put(mut self, bytes: &[u8]) -> Self {
        if let Some(room) = self.buffer.get_mut(self.filled..self.filled + bytes.len()) {
            room.copy_from_slice(bytes);
            self.filled += bytes.len();
        }
        self
    }

    fn u16(self, value: u16) -> Self {
        self.put(&value.to_be_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(&value.to_be_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(&value.to_be_bytes())
    }
}

impl ReplyStyle {
    /// Bytes of this style's header.
    pub const fn header_bytes(self) -> usize {
        match self {
            Self::Simple => super::proto::SIMPLE_REPLY_BYTES,
            Self::Structured => super::proto::STRUCTURED_REPLY_BYTES,
            Self::Extended => super::proto::EXTENDED_REPLY_BYTES,
        }
    }

    fn simple(buffer: &mut [u8], to: ReplyTo, error: u32) -> Writer<'_> {
        Writer { buffer, filled: 0 }.u32(SIMPLE_REPLY_MAGIC).u32(error).u64(to.cookie)
    }

    /// A chunk header; `payload` counts the bytes behind it. Not for `Simple`.
    fn chunk(self, buffer: &mut [u8], to: ReplyTo, kind: u16, last: bool, payload: u32) -> Writer<'_> {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        let writer = Writer { buffer, filled: 0 };
        if self == Self::Extended {
            let head = writer.u32(EXTENDED_REPLY_MAGIC).u16(flags).u16(kind).u64(to.cookie);
            head.u64(to.offset).u64(u64::from(payload))
        } else {
            writer.u32(STRUCTURED_REPLY_MAGIC).u16(flags).u16(kind).u64(to.cookie).u32(payload)
        }
    }

    /// Success without data: the answer to everything but reads and block status, and the end of a chunked read whose
    /// last data chunk was not marked so. Returns the bytes to send.
    pub fn done(self, slot: &mut Slot, to: ReplyTo) -> usize {
        match self {
            Self::Simple => Self::simple(slot, to, 0).filled,
            _ => self.chunk(slot, to, chunk::NONE, true, 0).filled,
        }
    }

    /// Failure of a request, the end of its reply. Structured and extended replies carry the message (cut at
    /// [`MESSAGE_BYTES_MAX`]). Returns the bytes to send.
    pub fn error(self, slot: &mut Slot, to: ReplyTo, error: NbdError, message: &str) -> usize {
        if self == Self::Simple {
            return Self::simple(slot, to, error.code()).filled;
        }
        let message = cut(message);
        let payload = 6 + message.len();
        self.chunk(slot, to, chunk::ERROR, true, payload as u32)
            .u32(error.code())
            .u16(message.len() as u16)
            .put(message)
            .filled
    }

    /// Failure at byte `at` of the export, with `last` unless more chunks follow. `None` in the simple style, which
    /// cannot say where. Returns the bytes to send.
    pub fn error_at(
        self,
        slot: &mut Slot,
        to: ReplyTo,
        error: NbdError,
        at: u64,
        message: &str,
        last: bool,
    ) -> Option<usize> {
        if self == Self::Simple {
            return None;
        }
        let message = cut(message);
        let payload = 14 + message.len();
        let writer = self.chunk(slot, to, chunk::ERROR_OFFSET, last, payload as u32);
        Some(writer.u32(error.code()).u16(message.len() as u16).put(message).u64(at).filled)
    }

    /// Header of `length` bytes of read data from byte `at` of the export, sent right behind it. In the simple style
    /// there is one such header for the whole request. `last`: nothing follows for this request; only when the data are
    /// at hand, since a chunk cannot be taken back. Returns the bytes of the header.
    ///
    /// `length` is at most `PAYLOAD_BYTES_MAX` and above zero.
    pub fn data(self, slot: &mut Slot, to: ReplyTo, at: u64, length: u32, last: bool) -> usize {
        match self {
            Self::Simple => Self::simple(slot, to, 0).filled,
            _ => self.chunk(slot, to, chunk::OFFSET_DATA, last, length.saturating_add(8)).u64(at).filled,
        }
    }

    /// `length` bytes from byte `at` of the export read as zeroes. `None` in the simple style: send the zeroes. Returns
    /// the bytes to send.
    pub fn hole(self, slot: &mut Slot, to: ReplyTo, at: u64, length: u32, last: bool) -> Option<usize> {
        if self == Self::Simple {
            return None;
        }
        Some(self.chunk(slot, to, chunk::OFFSET_HOLE, last, 12).u64(at).u32(length).filled)
    }
}

/// A message that fits, cut at a character.
fn cut(message: &str) -> &[u8] {
    let mut end = message.len().min(MESSAGE_BYTES_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message.as_bytes()[..end]
}

/// Extents in one block status reply at most, as the specification asks.
pub const EXTENTS_MAX: usize = 1 << 20;

/// Collects the extents of a BLOCK_STATUS reply in a buffer of the caller, as they go on the wire.
///
/// The reply is as long as the buffer allows: clients ask again where it ends. Neighbours with equal flags become one
/// extent, nothing reaches behind the request, and REQ_ONE is honoured.
#[derive(Debug)]
pub struct StatusBuilder<'b> {
    buffer: &'b mut [u8],
    style: ReplyStyle,
    to: ReplyTo,
    context: u32,
    /// Extents that may still be written.
    room: usize,
    written: usize,
    /// Bytes of the request that no extent covers yet.
    uncovered: u64,
    /// The extent that may still grow.
    pending: Option<(u64, u32)>,
}

impl<'b> StatusBuilder<'b> {
    /// Bytes in front of the extents: header, context id, and a count with extended headers.
    const fn prefix_bytes(style: ReplyStyle) -> usize {
        match style {
            ReplyStyle::Extended => style.header_bytes() + 8,
            _ => style.header_bytes() + 4,
        }
    }

    const fn extent_bytes(style: ReplyStyle) -> usize {
        match style {
            ReplyStyle::Extended => 16,
            _ => 8,
        }
    }

    /// The reply to `request`, which passed [`Transmission::check`]. `None` when no context was selected, replies are
    /// simple, or `buffer` has no room for one extent (64 bytes always have).
    pub fn new(buffer: &'b mut [u8], agreed: &Transmission, request: &Request) -> Option<Self> {
        let style = agreed.reply_style();
        let context = agreed.base_allocation?;
        if style == ReplyStyle::Simple {
            return None;
        }
        let fits = buffer.len().checked_sub(Self::prefix_bytes(style))? / Self::extent_bytes(style);
        let most = if request.has(command_flag::REQ_ONE) { 1 } else { EXTENTS_MAX };
        let room = fits.min(most);
        if room == 0 {
            return None;
        }
        let to = request.reply_to();
        Some(Self { buffer, style, to, context, room, written: 0, uncovered: request.length, pending: None })
    }

    /// The next `length` bytes have `flags` (`proto::state`). Returns whether another extent is of use.
    pub fn push(&mut self, length: u64, flags: u32) -> bool {
        let length = length.min(self.uncovered);
        if length == 0 {
            return self.uncovered > 0;
        }
        match &mut self.pending {
            Some((pending, same)) if *same == flags => *pending += length,
            _ => {
                self.flush();
                if self.room == 0 {
                    self.uncovered = 0;
                    return false;
                }
                self.pending = Some((length, flags));
            }
        }
        self.uncovered -= length;
        self.uncovered > 0
    }

    /// Bytes of the request that are covered by no extent yet; zero when the reply is full.
    pub const fn uncovered(&self) -> u64 {
        self.uncovered
    }

    fn flush(&mut self) {
        let Some((length, flags)) = self.pending.take() else { return };
        let at = Self::prefix_bytes(self.style) + self.written * Self::extent_bytes(self.style);
        let writer = Writer { buffer: &mut *self.buffer, filled: at };
        if self.style == ReplyStyle::Extended {
            writer.u64(length).u64(u64::from(flags));
        } else {
            // Compact requests have 32-bit lengths, and no extent is longer than its request.
            writer.u32(u32::try_from(length).unwrap_or(u32::MAX)).u32(flags);
        }
        self.written += 1;
        self.room -= 1;
    }

    /// Writes the header. Returns the bytes of the whole reply at the front of the buffer. A reply without any extent
    /// becomes one of unknown content, which is always true.
    pub fn finish(mut self) -> usize {
        if self.written == 0 && self.pending.is_none() {
            self.pending = Some((self.uncovered, 0));
        }
        self.flush();
        let prefix = Self::prefix_bytes(self.style);
        let total = prefix + self.written * Self::extent_bytes(self.style);
        let payload = (total - self.style.header_bytes()) as u32;
        let kind = match self.style {
            ReplyStyle::Extended => chunk::BLOCK_STATUS_EXT,
            _ => chunk::BLOCK_STATUS,
        };
        let head = self.style.chunk(self.buffer, self.to, kind, true, payload).u32(self.context);
        if self.style == ReplyStyle::Extended {
            head.u32(self.written as u32);
        }
        total
    }
}
