//! Numbers of the NBD protocol, and the one place where an errno becomes an NBD error.
//!
//! Source: `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd>, with the extended headers of its
//! `extension-ext-header` branch as QEMU and libnbd speak them. All integers on the wire are big-endian. Names are the
//! specification's without the prefix `NBD_`.

/// First eight bytes that a server says: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the newstyle greeting, and magic of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a 28-byte request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a 32-byte request (extended headers).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of a reply chunk with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a compact request header: magic 4, flags 2, type 2, cookie 8, offset 8, length 4.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of an extended request header: as the compact one, with a length of 8.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Bytes of a simple reply: magic 4, error 4, cookie 8.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured chunk header: magic 4, flags 2, type 2, cookie 8, payload length 4.
pub const STRUCTURED_REPLY_BYTES: usize = 20;
/// Bytes of an extended chunk header: magic 4, flags 2, type 2, cookie 8, request offset 8, payload length 8.
pub const EXTENDED_REPLY_BYTES: usize = 32;
/// Bytes of an option header: magic 8, option 4, payload length 4.
pub const OPTION_BYTES: usize = 16;
/// Zero bytes that end the answer to `EXPORT_NAME`, unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Longest string of the protocol, in bytes (names, queries, messages).
pub const STRING_BYTES_MAX: usize = 4096;
/// Largest payload of a READ or WRITE that every client may count on, in bytes; larger ones may end the connection.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Flags of the greeting (16 bits).
pub mod handshake {
    /// Options can fail without ending the connection.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The zeroes behind the answer to `EXPORT_NAME` can be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Flags that a client answers the greeting with (32 bits).
pub mod client {
    /// The client speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client does not want the zeroes.
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Transmission flags: what an export offers (16 bits).
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Everything that changes data fails with `EPERM`.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The command flag FUA is honoured.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The store behaves like a rotating disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and NO_HOLE are served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The command flag DF is honoured; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The command flag FAST_ZERO is honoured.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the negotiation.
pub mod option {
    /// Choose an export; there is no way to refuse but to close.
    pub const EXPORT_NAME: u32 = 1;
    /// Goodbye.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Go on in TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export, with refusals.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option is known and not allowed here.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// TLS must come first.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The request or its answer is too large.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    /// Extended headers stand in the way.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's own name.
    pub const NAME: u16 = 1;
    /// A sentence for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Command numbers.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Goodbye.
    pub const DISC: u16 = 2;
    /// Make answered writes durable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Metadata of a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags (16 bits).
pub mod command_flag {
    /// Durable before it is answered. Legal on every command once SEND_FUA was offered.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must be answered with one content chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS must be answered with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must be faster than writing zeroes, or fail at once with `ENOTSUP`.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The header's length counts payload that follows (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types and flags of reply chunks.
pub mod chunk {
    /// Flag: the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing; only as the last chunk.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context and extents of 32-bit length.
    pub const BLOCK_STATUS: u16 = 5;
    /// Context, count and extents of 64-bit length (extended headers only).
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Error and message.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// Error, message and where.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// Flags of `base:allocation` extents.
pub mod state {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// The metadata context that this server knows.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Errors that may stand in a reply; the number is the one on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: changes to a read-only export.
    Eperm = 1,
    /// The store failed.
    Eio = 5,
    /// No memory; the specification asks to avoid it.
    Enomem = 12,
    /// The request makes no sense.
    Einval = 22,
    /// No space, or a write behind the end.
    Enospc = 28,
    /// Too large to be answered in one piece (DF).
    Eoverflow = 75,
    /// Not possible in the way that was asked: only as the answer to FAST_ZERO.
    Enotsup = 95,
    /// The server is going down; the client should say goodbye.
    Eshutdown = 108,
}

impl NbdError {
    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The NBD error for a positive errno of Linux. What the protocol has no word for is an I/O error.
    ///
    /// `EOPNOTSUPP` becomes [`NbdError::Enotsup`], which clients expect only after FAST_ZERO: callers fall back to a
    /// slower way for everything else.
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EACCES | libc::EROFS => Self::Eperm,
            libc::ENOMEM => Self::Enomem,
            libc::EINVAL => Self::Einval,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::Enospc,
            libc::EOVERFLOW => Self::Eoverflow,
            libc::EOPNOTSUPP => Self::Enotsup,
            libc::ESHUTDOWN => Self::Eshutdown,
            _ => Self::Eio,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no errno of a store reaches a client as a number outside of the protocol's list. Method: every errno of Linux.
    #[test]
    fn every_errno_maps_into_the_protocol() {
        let allowed = [1, 5, 12, 22, 28, 75, 95, 108];
        for errno in -1..=133 {
            assert!(allowed.contains(&NbdError::from_errno(errno).code()), "errno {errno}");
        }
        assert_eq!(NbdError::from_errno(libc::EDQUOT), NbdError::Enospc);
        assert_eq!(NbdError::from_errno(libc::EROFS), NbdError::Eperm);
        assert_eq!(NbdError::from_errno(libc::EREMOTEIO), NbdError::Eio);
    }
}
