//! Goal: requests are decoded, checked and answered as the specification says, whatever their bytes. Method: headers and
//! replies written out byte for byte; a table of refusals; random headers against a naive reading; block status against
//! a list of bytes.

use proptest::collection::vec;
use proptest::prelude::*;
use ring_bridge::nbd::proto::{PAYLOAD_BYTES_MAX, command, command_flag as flag, transmission};
use ring_bridge::nbd::reply::MESSAGE_BYTES_MAX;
use ring_bridge::nbd::{
    BlockSizes, DecodeError, NbdError, Refusal, ReplyStyle, ReplyTo, Request, RequestKind, SLOT_BYTES,
    StatusBuilder, Transmission, Violation,
};

const SIZE: u64 = 1 << 40;
const TO: ReplyTo = ReplyTo { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };

fn agreed(style: ReplyStyle) -> Transmission {
    Transmission {
        structured: style != ReplyStyle::Simple,
        extended: style == ReplyStyle::Extended,
        base_allocation: (style != ReplyStyle::Simple).then_some(5),
        flags: 0xded,
        size_bytes: SIZE,
        block_sizes: BlockSizes::default(),
    }
}

/// A header as a client writes it.
fn header(extended: bool, flags: u16, kind: u16, offset: u64, length: u64) -> Vec<u8> {
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(TO.cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    if extended {
        bytes.extend(length.to_be_bytes());
    } else {
        bytes.extend((length as u32).to_be_bytes());
    }
    bytes
}

/// Goal: both header layouts. Method: bytes written out.
#[test]
fn headers_byte_for_byte() {
    let compact = b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
                    \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00";
    let request = Request {
        kind: RequestKind::Write,
        flags: flag::FUA,
        cookie: TO.cookie,
        offset: 0x1000,
        length: 512,
        payload: 512,
    };
    let simple = agreed(ReplyStyle::Simple);
    assert_eq!(simple.header_bytes(), 28);
    assert_eq!(simple.decode(compact), Ok(request));
    assert!(request.fua() && request.reply_to() == TO);

    let extended = b"\x21\xe4\x1c\x71\x00\x10\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\
                     \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x40\x00\x00\x00\x00trailing";
    let request = Request {
        kind: RequestKind::WriteZeroes,
        flags: flag::FAST_ZERO,
        length: 0x40_0000_0000,
        payload: 0,
        ..request
    };
    assert_eq!(agreed(ReplyStyle::Extended).header_bytes(), 32);
    assert_eq!(agreed(ReplyStyle::Extended).decode(extended), Ok(request));
}

/// Goal: what the stream survives, and what not. Method: one header for each.
#[test]
fn broken_headers() {
    let (compact, extended) = (agreed(ReplyStyle::Structured), agreed(ReplyStyle::Extended));
    let dropped = |agreed: &Transmission, bytes: &[u8]| match agreed.decode(bytes) {
        Err(DecodeError::Drop(violation)) => violation,
        other => panic!("{other:?}"),
    };
    let read = header(false, 0, command::READ, 0, 512);
    assert_eq!(dropped(&compact, &read[..27]), Violation::ShortHeader { expected: 28, found: 27 });
    let bad = Violation::BadMagic { expected: 0x21e4_1c71, found: 0x2560_9513 };
    assert_eq!(dropped(&extended, &[&read[..], &[0; 4]].concat()), bad);
    let large = u64::from(PAYLOAD_BYTES_MAX) + 1;
    let too_large = Violation::PayloadTooLarge { length: large };
    assert_eq!(dropped(&compact, &header(false, 0, command::WRITE, 0, large)), too_large);
    assert_eq!(dropped(&extended, &header(true, 0, command::WRITE, 0, large)), too_large);
    assert_eq!(dropped(&extended, &header(true, flag::PAYLOAD_LEN, 99, 0, large)), too_large);

    for (agreed, bytes, payload) in [
        (&compact, header(false, 0, 99, 0x1000, 512), 0),
        (&extended, header(true, 0, 99, 0x1000, u64::MAX), 0),
        (&extended, header(true, flag::PAYLOAD_LEN, 99, 0x1000, 512), 512),
    ] {
        let Err(DecodeError::Refuse(refused)) = agreed.decode(&bytes) else { panic!("refused") };
        assert_eq!(
            (refused.reply_to, refused.payload, refused.refusal.error),
            (TO, payload, NbdError::Einval)
        );
    }
    // A write has its payload with and without the flag (QEMU leaves it out).
    for flags in [0, flag::PAYLOAD_LEN] {
        let request = extended.decode(&header(true, flags, command::WRITE, 0, 512)).expect("write");
        assert_eq!((request.payload, extended.check(&request)), (512, Ok(())));
    }
    // A read that announces payload is refused, and says how much to skip.
    let request = extended.decode(&header(true, flag::PAYLOAD_LEN, command::READ, 0, 512)).expect("read");
    assert_eq!(
        (request.payload, extended.check(&request).map_err(|r| r.error)),
        (512, Err(NbdError::Einval))
    );
}

/// Goal: each rule of [`Transmission::check`] with the specification's error. Method: a table.
#[test]
fn refusals() {
    use NbdError::{Einval, Enospc, Eperm};
    use RequestKind::{BlockStatus, Cache, Disconnect, Flush, Read, Trim, Write, WriteZeroes};
    let ok = agreed(ReplyStyle::Structured);
    let read_only = Transmission { flags: 0x58f, ..ok };
    let bare = Transmission { flags: transmission::HAS_FLAGS, base_allocation: None, ..ok };
    let coarse =
        Transmission { block_sizes: BlockSizes { minimum: 4096, preferred: 4096, maximum: 65536 }, ..ok };
    let max = u64::from(PAYLOAD_BYTES_MAX);
    let cases = [
        (ok, Read, flag::FUA | flag::DF, SIZE - 1, 1, None),
        (ok, Read, 0, 0, max, None),
        (ok, Read, 0, 0, max + 1, Some(Einval)),
        (ok, Read, 0, SIZE, 1, Some(Einval)),
        (ok, Read, 0, u64::MAX, 1, Some(Einval)),
        (ok, Read, 0, 0, 0, Some(Einval)),
        (ok, Read, flag::NO_HOLE, 0, 1, Some(Einval)),
        (ok, Read, 1 << 15, 0, 1, Some(Einval)),
        (ok, Write, flag::FUA, 0, 1, None),
        (ok, Write, flag::DF, 0, 1, Some(Einval)),
        (ok, Write, flag::PAYLOAD_LEN, 0, 1, Some(Einval)),
        (ok, Write, 0, SIZE - 1, 2, Some(Enospc)),
        (ok, WriteZeroes, flag::NO_HOLE | flag::FAST_ZERO | flag::FUA, 0, SIZE, None),
        (ok, WriteZeroes, 0, 1, SIZE, Some(Enospc)),
        (ok, WriteZeroes, flag::REQ_ONE, 0, 1, Some(Einval)),
        (ok, Trim, flag::FUA, 0, SIZE, None),
        (ok, Trim, 0, 1, SIZE, Some(Einval)),
        (ok, Cache, 0, 0, SIZE, None),
        (ok, Cache, flag::DF, 0, 1, Some(Einval)),
        (ok, BlockStatus, flag::REQ_ONE, 0, SIZE, None),
        (ok, BlockStatus, 0, 0, 0, Some(Einval)),
        (ok, Flush, flag::FUA, 0, 0, None),
        (ok, Flush, 0, 0, 1, Some(Einval)),
        (ok, Flush, 0, 1, 0, Some(Einval)),
        (ok, Disconnect, u16::MAX, 9, 9, None),
        (read_only, Write, 0, SIZE, 1, Some(Eperm)),
        (read_only, Trim, 0, 0, 1, Some(Eperm)),
        (read_only, WriteZeroes, 0, 0, 1, Some(Eperm)),
        (read_only, Read, 0, 0, 1, None),
        (read_only, Flush, 0, 0, 0, None),
        (bare, Write, 0, 0, 1, None),
        (bare, Write, flag::FUA, 0, 1, Some(Einval)),
        (bare, Read, flag::DF, 0, 1, Some(Einval)),
        (bare, Flush, 0, 0, 0, Some(Einval)),
        (bare, Trim, 0, 0, 1, Some(Einval)),
        (bare, Cache, 0, 0, 1, Some(Einval)),
        (bare, WriteZeroes, 0, 0, 1, Some(Einval)),
        (bare, BlockStatus, 0, 0, 1, Some(Einval)),
        (coarse, Read, 0, 4096, 65536, None),
        (coarse, Read, 0, 512, 4096, Some(Einval)),
        (coarse, Write, 0, 4096, 512, Some(Einval)),
        (coarse, Write, 0, 0, 69632, Some(Einval)),
        (coarse, Trim, 0, 0, 69632, None),
    ];
    for (agreed, kind, flags, offset, length, expected) in cases {
        let request = Request { kind, flags, cookie: 1, offset, length, payload: 0 };
        let found = agreed.check(&request).err().map(|Refusal { error, .. }| error);
        assert_eq!(found, expected, "{request:?}");
    }
}

/// Goal: every reply in every style. Method: bytes written out.
#[test]
fn replies_byte_for_byte() {
    use ReplyStyle::{Extended, Simple, Structured};
    let cookie = b"\x01\x02\x03\x04\x05\x06\x07\x08";
    let simple = |error: u8| [b"\x67\x44\x66\x98\x00\x00\x00", &[error][..], cookie].concat();
    let structured = |flags: u8, kind: &[u8; 2], length: u8| {
        [b"\x66\x8e\x33\xef\x00", &[flags][..], kind, cookie, &[0, 0, 0, length]].concat()
    };
    let extended = |flags: u8, kind: &[u8; 2], length: u8| {
        let offset = b"\x00\x00\x00\x00\x00\x00\x10\x00";
        [b"\x6e\x8a\x27\x8c\x00", &[flags][..], kind, cookie, offset, &[0, 0, 0, 0, 0, 0, 0, length]].concat()
    };
    let mut slot = [0xee; SLOT_BYTES];
    let mut done = |style: ReplyStyle| {
        let count = style.done(&mut slot, TO);
        slot[..count].to_vec()
    };
    assert_eq!(done(Simple), simple(0));
    assert_eq!(done(Structured), structured(1, b"\0\0", 0));
    assert_eq!(done(Extended), extended(1, b"\0\0", 0));

    let mut error = |style: ReplyStyle, message: &str| {
        let count = style.error(&mut slot, TO, NbdError::Enospc, message);
        slot[..count].to_vec()
    };
    assert_eq!(error(Simple, "full"), simple(28));
    let tail = b"\0\0\0\x1c\0\x04full";
    assert_eq!(error(Structured, "full"), [&structured(1, b"\x80\x01", 10)[..], tail].concat());
    assert_eq!(error(Extended, "full"), [&extended(1, b"\x80\x01", 10)[..], tail].concat());
    assert_eq!(error(Extended, &"é".repeat(4000)).len(), 32 + 6 + MESSAGE_BYTES_MAX);

    let at = 0x1200;
    let mut error_at = |style: ReplyStyle| {
        let count = style.error_at(&mut slot, TO, NbdError::Eio, at, "bad", false)?;
        Some(slot[..count].to_vec())
    };
    let tail = b"\0\0\0\x05\0\x03bad\0\0\0\0\0\0\x12\0";
    assert_eq!(error_at(Simple), None);
    assert_eq!(error_at(Structured), Some([&structured(0, b"\x80\x02", 17)[..], tail].concat()));
    assert_eq!(error_at(Extended), Some([&extended(0, b"\x80\x02", 17)[..], tail].concat()));
    let longest = Extended.error_at(&mut slot, TO, NbdError::Eio, at, &"x".repeat(5000), true);
    assert_eq!(longest, Some(SLOT_BYTES), "the slot is as long as the longest reply");

    let mut data = |style: ReplyStyle, last| {
        let count = style.data(&mut slot, TO, at, 200, last);
        slot[..count].to_vec()
    };
    let tail = b"\0\0\0\0\0\0\x12\0";
    assert_eq!(data(Simple, true), simple(0));
    assert_eq!(data(Structured, true), [&structured(1, b"\0\x01", 208)[..], tail].concat());
    assert_eq!(data(Extended, false), [&extended(0, b"\0\x01", 208)[..], tail].concat());

    let mut hole = |style: ReplyStyle| {
        let count = style.hole(&mut slot, TO, at, 0x10000, true)?;
        Some(slot[..count].to_vec())
    };
    let tail = b"\0\0\0\0\0\0\x12\0\0\x01\0\0";
    assert_eq!(hole(Simple), None);
    assert_eq!(hole(Structured), Some([&structured(1, b"\0\x02", 12)[..], tail].concat()));
    assert_eq!(hole(Extended), Some([&extended(1, b"\0\x02", 12)[..], tail].concat()));
}

/// A BLOCK_STATUS request of a kind.
fn status_request(length: u64, flags: u16) -> Request {
    let ReplyTo { cookie, offset } = TO;
    Request { kind: RequestKind::BlockStatus, flags, cookie, offset, length, payload: 0 }
}

/// Goal: both block status chunks. Method: bytes written out; an empty one says "unknown".
#[test]
fn block_status_byte_for_byte() {
    let mut buffer = [0; 256];
    let structured = agreed(ReplyStyle::Structured);
    let mut status = StatusBuilder::new(&mut buffer, &structured, &status_request(0x3000, 0)).expect("room");
    assert!(status.push(0x1000, 3) && status.push(0x800, 3));
    assert!(!status.push(0x10_0000, 0), "the request is covered");
    let count = status.finish();
    assert_eq!(
        buffer[..count],
        *b"\x66\x8e\x33\xef\x00\x01\x00\x05\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x14\
           \0\0\0\x05\0\0\x18\0\0\0\0\x03\0\0\x18\0\0\0\0\0"
    );
    let extended = agreed(ReplyStyle::Extended);
    let status = StatusBuilder::new(&mut buffer, &extended, &status_request(1 << 36, 0)).expect("room");
    let count = status.finish();
    assert_eq!(
        buffer[..count],
        *b"\x6e\x8a\x27\x8c\x00\x01\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x10\x00\
           \0\0\0\0\0\0\0\x18\0\0\0\x05\0\0\0\x01\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    let mut small = [0; 64];
    assert!(StatusBuilder::new(&mut small, &extended, &status_request(1, 0)).is_some());
    assert!(StatusBuilder::new(&mut small[..55], &extended, &status_request(1, 0)).is_none());
    assert!(StatusBuilder::new(&mut small, &agreed(ReplyStyle::Simple), &status_request(1, 0)).is_none());
    let unselected = Transmission { base_allocation: None, ..extended };
    assert!(StatusBuilder::new(&mut small, &unselected, &status_request(1, 0)).is_none());
}

/// Extents of a reply.
fn extents(reply: &[u8], style: ReplyStyle) -> Vec<(u64, u32)> {
    let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().expect("four bytes"));
    let long = |at: usize| u64::from_be_bytes(reply[at..at + 8].try_into().expect("eight bytes"));
    if style == ReplyStyle::Extended {
        assert_eq!(long(24) as usize, reply.len() - 32);
        assert_eq!(word(36) as usize, (reply.len() - 40) / 16);
        (40..reply.len()).step_by(16).map(|at| (long(at), long(at + 8) as u32)).collect()
    } else {
        assert_eq!(word(16) as usize, reply.len() - 20);
        (24..reply.len()).step_by(8).map(|at| (u64::from(word(at)), word(at + 4))).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2048) })]

    /// Goal: no header panics, payload is bounded, and what passes the checks is within the rules. Method: random headers,
    /// half of them with a right magic, against a naive reading of the rules.
    #[test]
    fn any_header(
        mut bytes in vec(any::<u8>(), 0..40),
        right in any::<bool>(),
        kind in 0_u16..10,
        near_end in any::<bool>(),
        short in any::<bool>(),
        extended in any::<bool>(),
        offered in any::<u16>(),
    ) {
        let style = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
        let agreed = Transmission { flags: offered, ..agreed(style) };
        if right && bytes.len() >= 32 {
            bytes[..4].copy_from_slice(&header(extended, 0, 0, 0, 0)[..4]);
            bytes[4] = 0;
            bytes[5] &= 0x3f;
            bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            if near_end {
                bytes[16..20].copy_from_slice(&[0, 0, 0, 0xff]);
            }
            if short {
                bytes[24..30].fill(0);
            }
        }
        match agreed.decode(&bytes) {
            Err(DecodeError::Drop(_)) => {}
            Err(DecodeError::Refuse(refused)) => prop_assert!(refused.payload <= PAYLOAD_BYTES_MAX),
            Ok(request) => {
                prop_assert!(request.payload <= PAYLOAD_BYTES_MAX);
                let write = request.kind == RequestKind::Write;
                prop_assert!(!write || u64::from(request.payload) == request.length);
                if agreed.check(&request).is_ok() && request.kind != RequestKind::Disconnect {
                    let end = u128::from(request.offset) + u128::from(request.length);
                    prop_assert!(end <= u128::from(SIZE));
                    prop_assert!((request.length == 0) == (request.kind == RequestKind::Flush));
                    let changes = write || matches!(request.kind, RequestKind::Trim | RequestKind::WriteZeroes);
                    prop_assert!(!changes || !agreed.read_only());
                    prop_assert!(!request.has(flag::FUA) || offered & transmission::SEND_FUA != 0);
                    prop_assert!(write || request.payload == 0);
                }
            }
        }
    }

    /// Goal: block status tells the truth, in order, within the request and the buffer. Method: random runs; the reply,
    /// spread over the bytes of the request, must agree with the runs as far as it reaches.
    #[test]
    fn block_status_agrees_with_the_bytes(
        runs in vec((0_u64..50, 0_u32..4), 0..40),
        length in 1_u64..600,
        room in 56_usize..400,
        one in any::<bool>(),
        extended in any::<bool>(),
    ) {
        let style = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
        let mut buffer = vec![0; room];
        let request = status_request(length, if one { flag::REQ_ONE } else { 0 });
        let mut status = StatusBuilder::new(&mut buffer, &agreed(style), &request).expect("room");
        let mut pushed = Vec::new();
        for (length, flags) in runs {
            pushed.extend((0..length).map(|_| flags));
            if !status.push(length, flags) {
                break;
            }
        }
        let count = status.finish();
        let extents = extents(&buffer[..count], style);
        prop_assert!(!extents.is_empty() && (!one || extents.len() == 1));
        prop_assert!(extents.iter().all(|(length, _)| *length > 0));
        prop_assert!(extents.windows(2).all(|pair| pair[0].1 != pair[1].1), "neighbours differ");
        prop_assert!(extents.iter().map(|(length, _)| length).sum::<u64>() <= length);
        if pushed.is_empty() {
            prop_assert_eq!(extents, [(length, 0)]);
        } else {
            let told: Vec<u32> =
                extents.iter().flat_map(|(length, flags)| (0..*length).map(|_| *flags)).collect();
            prop_assert!(pushed.starts_with(&told));
            // Short only for want of room, of more runs, or because one extent was asked for.
            let fits = (room - if extended { 40 } else { 24 }) / if extended { 16 } else { 8 };
            let complete = told.len() as u64 == length.min(pushed.len() as u64);
            prop_assert!(complete || one || extents.len() == fits);
        }
    }
}
