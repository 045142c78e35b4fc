//! Goal: the handshake phase answers as the specification says, and no client costs more than is bounded. Method: byte
//! vectors written out for the common conversation; a small client that builds options and splits replies for every
//! rule; random bytes and random splits for the bounds.

use proptest::collection::vec;
use proptest::prelude::*;
use ring_bridge::nbd::negotiate::{OPTION_DATA_BYTES_MAX, OPTIONS_MAX};
use ring_bridge::nbd::proto::{option, reply, transmission};
use ring_bridge::nbd::{
    Agreed, BlockSizes, CloseReason, ExportInfo, Exports, Features, Negotiation, NoExport, OneExport, Step,
    TlsMode,
};

const FIXED: u32 = 3;

fn info(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: "a disk".into(),
        size_bytes: 0x1234_5000,
        read_only: false,
        features: Features::ALL,
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 25 },
    }
}

struct Two;

impl Exports for Two {
    fn find(&self, name: &str) -> Result<ExportInfo, NoExport> {
        match name {
            "d1" | "d2" => Ok(info(name)),
            "broken" => Err(NoExport::Refused("broken has failed: see ctl show broken".into())),
            "late" => Err(NoExport::ShuttingDown),
            _ => Err(NoExport::Unknown),
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![("d1".into(), "first".into()), ("d2".into(), String::new())]
    }
}

/// One option as a client sends it.
fn opt(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn counted(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// Data of INFO and GO.
fn go(name: &str, wants: &[u16]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend((wants.len() as u16).to_be_bytes());
    data.extend(wants.iter().flat_map(|want| want.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query.as_bytes())));
    data
}

/// A client: sends bytes, collects replies as (option, type, data).
struct Client<'e> {
    server: Negotiation,
    exports: &'e dyn Exports,
}

type Replies = Vec<(u32, u32, Vec<u8>)>;

impl<'e> Client<'e> {
    fn new(tls: TlsMode, exports: &'e dyn Exports) -> Self {
        let mut client = Self { server: Negotiation::new(tls), exports };
        let greeting = client.server.take_output();
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(client.raw(&FIXED.to_be_bytes()), (vec![], Step::NeedInput));
        client
    }

    fn raw(&mut self, bytes: &[u8]) -> (Vec<u8>, Step) {
        self.server.feed(bytes);
        let mut output = Vec::new();
        loop {
            let step = self.server.advance(self.exports);
            output.extend(self.server.take_output());
            if step != Step::Again {
                return (output, step);
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> (Replies, Step) {
        let (output, step) = self.raw(bytes);
        (split(&output), step)
    }

    /// Sends one option and expects the conversation to go on; the types of the replies.
    fn ask(&mut self, number: u32, data: &[u8]) -> Vec<u32> {
        let (replies, step) = self.send(&opt(number, data));
        assert_eq!(step, Step::NeedInput);
        assert!(replies.iter().all(|(option, ..)| *option == number));
        replies.into_iter().map(|(_, kind, _)| kind).collect()
    }

    fn agree(&mut self, number: u32, data: &[u8]) -> Box<Agreed> {
        match self.raw(&opt(number, data)).1 {
            Step::Transmission(agreed) => agreed,
            other => panic!("expected transmission, got {other:?}"),
        }
    }
}

fn split(mut output: &[u8]) -> Replies {
    let word =
        |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let mut replies = Vec::new();
    while !output.is_empty() {
        assert_eq!(&output[..8], &0x0003_e889_0455_65a9_u64.to_be_bytes());
        let length = word(output, 16) as usize;
        replies.push((word(output, 8), word(output, 12), output[20..20 + length].to_vec()));
        output = &output[20 + length..];
    }
    replies
}

/// Goal: the bytes of the commonest conversation. Method: GO with all information requests, answer written out.
#[test]
fn go_with_all_information_byte_for_byte() {
    let exports = OneExport(info("d1"));
    let mut client = Client::new(TlsMode::Off, &exports);
    let (output, step) = client.raw(&opt(option::GO, &go("", &[3, 1, 2, 0, 77])));
    let head = |kind: &[u8; 4], length: u8| {
        [b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07", &kind[..], &[0, 0, 0, length]].concat()
    };
    let expected = [
        head(b"\x00\x00\x00\x03", 4),
        b"\x00\x01d1".to_vec(),
        head(b"\x00\x00\x00\x03", 8),
        b"\x00\x02a disk".to_vec(),
        head(b"\x00\x00\x00\x03", 14),
        b"\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00".to_vec(),
        head(b"\x00\x00\x00\x03", 12),
        b"\x00\x00\x00\x00\x00\x00\x12\x34\x50\x00\x0d\x6d".to_vec(),
        head(b"\x00\x00\x00\x01", 0),
    ]
    .concat();
    assert_eq!(output, expected);
    let Step::Transmission(agreed) = step else { panic!("{step:?}") };
    assert_eq!(agreed.export, "d1");
    assert!(!agreed.transmission.structured && !agreed.transmission.extended);
    assert_eq!(agreed.transmission.flags, 0xd6d);
    assert_eq!(agreed.transmission.size_bytes, 0x1234_5000);
}

/// Goal: EXPORT_NAME in both lengths, and after the end. Method: answer written out.
#[test]
fn export_name_byte_for_byte() {
    let exports = OneExport(info("d1"));
    for (flags, zeroes) in [(0_u32, 124), (1, 124), (2, 0), (3, 0)] {
        let mut client = Client { server: Negotiation::new(TlsMode::Off), exports: &exports };
        client.server.take_output();
        let (output, step) =
            client.raw(&[&flags.to_be_bytes(), &opt(1, b"d1")[..], b"first request"].concat());
        let expected = [&b"\x00\x00\x00\x00\x12\x34\x50\x00\x0d\x6d"[..], &vec![0; zeroes]].concat();
        assert_eq!(output, expected, "client flags {flags}");
        let Step::Transmission(agreed) = step else { panic!("{step:?}") };
        assert_eq!(agreed.unread, b"first request");
        assert_eq!(client.raw(b"x").1, Step::Close(CloseReason::Ended));
    }
}

/// Goal: each option's replies. Method: one table of conversations on a listener with two exports.
#[test]
fn replies_by_option() {
    let (ack, info, context, server) = (reply::ACK, reply::INFO, reply::META_CONTEXT, reply::SERVER);
    let (invalid, unknown, too_big) = (reply::ERR_INVALID, reply::ERR_UNKNOWN, reply::ERR_TOO_BIG);
    let long = "n".repeat(4097);
    let cases: Vec<(u32, Vec<u8>, Vec<u32>)> = vec![
        (99, vec![1; 100], vec![reply::ERR_UNSUP]),
        (4, vec![], vec![reply::ERR_UNSUP]),
        (option::LIST, vec![], vec![server, server, ack]),
        (option::LIST, vec![0], vec![invalid]),
        (option::STARTTLS, vec![], vec![reply::ERR_POLICY]),
        (option::STARTTLS, vec![0], vec![invalid]),
        (option::INFO, go("d1", &[]), vec![info, ack]),
        (option::INFO, go("d1", &[1, 2, 3]), vec![info, info, info, info, ack]),
        (option::INFO, go("", &[]), vec![unknown]),
        (option::INFO, go("d3", &[3]), vec![unknown]),
        (option::GO, go("d3", &[3]), vec![unknown]),
        (option::GO, go("broken", &[]), vec![reply::ERR_POLICY]),
        (option::GO, go("late", &[]), vec![reply::ERR_SHUTDOWN]),
        (option::GO, vec![], vec![invalid]),
        (option::GO, vec![0, 0, 0, 2, b'd'], vec![invalid]),
        (option::GO, [&go("d1", &[])[..], b"x"].concat(), vec![invalid]),
        (option::GO, [&counted(b"d1")[..], &[0xff, 0xff, 0, 1]].concat(), vec![invalid]),
        (option::GO, [&counted(b"d\xff")[..], &[0, 0]].concat(), vec![invalid]),
        (option::GO, [&counted(b"d\0")[..], &[0, 0]].concat(), vec![invalid]),
        (option::GO, go(&long, &[]), vec![too_big]),
        (option::LIST_META_CONTEXT, meta("d1", &[]), vec![invalid]),
        (option::SET_META_CONTEXT, meta("d1", &["base:allocation"]), vec![invalid]),
        (option::STRUCTURED_REPLY, vec![0], vec![invalid]),
        (option::STRUCTURED_REPLY, vec![], vec![ack]),
        (option::STRUCTURED_REPLY, vec![], vec![ack]),
        (option::LIST_META_CONTEXT, meta("d1", &[]), vec![context, ack]),
        (option::LIST_META_CONTEXT, meta("d1", &["base:"]), vec![context, ack]),
        (option::LIST_META_CONTEXT, meta("d1", &["base:allocation", "base:"]), vec![context, ack]),
        (option::LIST_META_CONTEXT, meta("d1", &["base:other", "qemu:", "nonsense", ""]), vec![ack]),
        (option::LIST_META_CONTEXT, meta("d3", &[]), vec![unknown]),
        (option::SET_META_CONTEXT, meta("d1", &[]), vec![ack]),
        (option::SET_META_CONTEXT, meta("d1", &["base:"]), vec![ack]),
        (option::SET_META_CONTEXT, meta("d1", &["x-a:b", "base:allocation"]), vec![context, ack]),
        (option::SET_META_CONTEXT, meta("d1", &[&long]), vec![too_big]),
        (option::SET_META_CONTEXT, [&counted(b"d1")[..], &[0xff; 4]].concat(), vec![invalid]),
        (option::EXTENDED_HEADERS, vec![0], vec![invalid]),
        (option::EXTENDED_HEADERS, vec![], vec![ack]),
        (option::EXTENDED_HEADERS, vec![], vec![ack]),
        (option::STRUCTURED_REPLY, vec![], vec![reply::ERR_EXT_HEADER_REQD]),
        (option::LIST_META_CONTEXT, meta("d2", &[]), vec![context, ack]),
    ];
    let mut client = Client::new(TlsMode::Off, &Two);
    for (number, data, expected) in cases {
        assert_eq!(client.ask(number, &data), expected, "option {number} with {data:?}");
    }
    let agreed = client.agree(option::GO, &go("d2", &[]));
    assert!(agreed.transmission.structured && agreed.transmission.extended);
}

/// Goal: messages help. Method: the texts of three refusals.
#[test]
fn refusals_say_what_to_do() {
    let mut client = Client::new(TlsMode::Off, &Two);
    let mut said = |number, data: &[u8]| {
        let (replies, _) = client.send(&opt(number, data));
        String::from_utf8(replies[0].2.clone()).expect("text")
    };
    assert!(said(option::INFO, &go("d\n3", &[])).contains(r#"no export "d\n3" here (nbdinfo --list"#));
    assert!(said(option::INFO, &go("", &[])).contains("ask for one by its name"));
    assert_eq!(said(option::INFO, &go("broken", &[])), "broken has failed: see ctl show broken");
}

/// Goal: the selection of contexts belongs to one export and to the last SET. Method: four orders.
#[test]
fn meta_context_is_tied_to_its_export() {
    let allocation = meta("d1", &["base:allocation"]);
    for (later, name, expected) in [
        (None, "d1", Some(1)),
        (None, "d2", None),
        (Some(meta("d3", &["base:allocation"])), "d1", None),
        (Some(meta("d1", &[])), "d1", None),
    ] {
        let mut client = Client::new(TlsMode::Off, &Two);
        client.ask(option::STRUCTURED_REPLY, &[]);
        for data in std::iter::once(&allocation).chain(&later) {
            client.ask(option::SET_META_CONTEXT, data);
        }
        let agreed = client.agree(option::GO, &go(name, &[]));
        assert_eq!(agreed.transmission.base_allocation, expected);
        assert!(agreed.transmission.flags & transmission::SEND_DF != 0);
    }
}

/// Goal: a listener that requires TLS answers nothing else before, and forgets what came before. Method: each option before
/// STARTTLS, bytes smuggled behind it, the options again afterwards.
#[test]
fn tls_comes_first() {
    let mut client = Client::new(TlsMode::Required, &Two);
    for number in [3, 6, 7, 8, 9, 10, 11, 99] {
        assert_eq!(client.ask(number, &go("d1", &[])), [reply::ERR_TLS_REQD]);
    }
    assert_eq!(client.ask(option::STARTTLS, b"x"), [reply::ERR_INVALID]);
    let smuggled = opt(option::STRUCTURED_REPLY, &[]);
    let (replies, step) = client.send(&[opt(option::STARTTLS, &[]), smuggled.clone()].concat());
    assert_eq!(replies, [(option::STARTTLS, reply::ACK, vec![])]);
    assert_eq!(step, Step::StartTls { unread: smuggled });
    assert_eq!(client.server.advance(&Two), Step::NeedInput, "waits for the handshake");
    client.server.tls_started();
    assert!(client.server.in_tls());
    assert_eq!(
        client.ask(option::SET_META_CONTEXT, &meta("d1", &[])),
        [reply::ERR_INVALID],
        "not structured"
    );
    assert_eq!(client.ask(option::STARTTLS, &[]), [reply::ERR_INVALID]);
    assert_eq!(client.agree(option::GO, &go("d1", &[])).export, "d1");

    let mut client = Client::new(TlsMode::Required, &Two);
    let (output, step) = client.raw(&opt(option::EXPORT_NAME, b"d1"));
    assert!(output.is_empty() && matches!(step, Step::Close(CloseReason::ExportName(_))));
    let mut client = Client::new(TlsMode::Required, &Two);
    let (replies, step) = client.send(&opt(option::ABORT, b"ignored"));
    assert_eq!((replies[0].1, step), (reply::ACK, Step::Close(CloseReason::Goodbye)));
}

/// Goal: what cannot be answered closes. Method: one conversation for each reason.
#[test]
fn closes() {
    let close = |bytes: &[u8]| {
        let mut client = Client { server: Negotiation::new(TlsMode::Off), exports: &Two };
        client.server.take_output();
        match client.raw(bytes) {
            (output, Step::Close(reason)) if output.is_empty() || output.len() == 20 => reason,
            other => panic!("{other:?}"),
        }
    };
    let after = |flags: u32, bytes: &[u8]| close(&[&flags.to_be_bytes(), bytes].concat());
    assert_eq!(close(&7_u32.to_be_bytes()), CloseReason::UnknownClientFlags(7));
    assert_eq!(after(3, b"IHAVEOPS\0\0\0\x03\0\0\0\0"), CloseReason::BadMagic(0x4948_4156_454f_5053));
    assert_eq!(after(0, &opt(option::LIST, &[])), CloseReason::NotFixedNewstyle(3));
    for name in ["", "d3", "late"] {
        assert!(matches!(after(3, &opt(1, name.as_bytes())), CloseReason::ExportName(_)));
    }
    assert!(matches!(after(3, &opt(1, b"\xff")), CloseReason::ExportName(_)));
    assert!(matches!(after(3, &opt(1, &vec![b'd'; 20 << 10])), CloseReason::ExportName(_)));
    let extended = [opt(option::EXTENDED_HEADERS, &[]), opt(option::EXPORT_NAME, b"d1")].concat();
    assert!(matches!(after(3, &extended), CloseReason::ExportName(_)));
}

/// Goal: too long options are refused without being stored, and the conversation goes on. Method: 1 MiB of data in pieces.
#[test]
fn long_options_are_skipped() {
    let mut client = Client::new(TlsMode::Off, &Two);
    let length = 1 << 20;
    let (replies, _) = client.send(&opt(77, &vec![7; length])[..2048]);
    assert_eq!(replies[0].1, reply::ERR_TOO_BIG);
    let mut rest = opt(77, &vec![7; length])[2048..].to_vec();
    rest.extend(opt(option::LIST, &[]));
    let mut replies = Vec::new();
    for piece in rest.chunks(4096) {
        replies.extend(client.send(piece).0);
        assert!(client.server.held_bytes() < 16 << 10, "{}", client.server.held_bytes());
    }
    assert_eq!(replies.last().map(|reply| (reply.0, reply.1)), Some((option::LIST, reply::ACK)));
}

/// Goal: a client that asks for ever is cut off. Method: unknown options until the bound.
#[test]
fn options_are_counted() {
    let mut client = Client::new(TlsMode::Off, &Two);
    for _ in 0..OPTIONS_MAX {
        assert_eq!(client.ask(99, &[]), [reply::ERR_UNSUP]);
    }
    assert_eq!(client.raw(&opt(99, &[])).1, Step::Close(CloseReason::TooManyOptions));
}

/// Runs a conversation in pieces: everything that was said, the last step, and what it left unread.
fn converse(bytes: &[u8], sizes: &[usize], tls: TlsMode) -> (Vec<u8>, Step) {
    let mut server = Negotiation::new(tls);
    let mut said = server.take_output();
    let (mut rest, mut sizes) = (bytes, sizes.iter().cycle());
    loop {
        match server.advance(&Two) {
            Step::Again => {}
            Step::NeedInput if rest.is_empty() => return (said, Step::NeedInput),
            Step::NeedInput => {
                let size = sizes.next().map_or(rest.len(), |size| rest.len().min(*size));
                server.feed(&rest[..size]);
                rest = &rest[size..];
                // Vec doubles: the bound on what is held, not the bound times two, is for the contents.
                assert!(size > 4096 || server.held_bytes() <= 2 * (OPTION_DATA_BYTES_MAX + 16 + 4096));
            }
            Step::StartTls { mut unread } => {
                unread.extend(rest);
                return (said, Step::StartTls { unread });
            }
            Step::Transmission(mut agreed) => {
                said.extend(server.take_output());
                agreed.unread.extend(rest);
                return (said, Step::Transmission(agreed));
            }
            close @ Step::Close(_) => {
                said.extend(server.take_output());
                return (said, close);
            }
        }
        let output = server.take_output();
        assert!(output.len() <= 16 << 10, "one answer at a time");
        said.extend(output);
    }
}

/// Options that are right, wrong in one place, or noise.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("d1"), Just("d2"), Just(""), Just("d3")];
    let query = prop_oneof![Just("base:"), Just("base:allocation"), Just("x-a:b"), Just("")];
    let number = prop_oneof![8 => 2_u32..12, 1 => any::<u32>()];
    prop_oneof![
        (number.clone(), vec(any::<u8>(), 0..40)).prop_map(|(number, data)| opt(number, &data)),
        number.prop_map(|number| opt(number, &[])),
        (6_u32..8, name.clone(), vec(0_u16..5, 0..4)).prop_map(|(n, name, wants)| opt(n, &go(name, &wants))),
        (9_u32..11, name.clone(), vec(query, 0..4))
            .prop_map(|(n, name, queries)| opt(n, &meta(name, &queries))),
        name.prop_map(|name| opt(option::EXPORT_NAME, name.as_bytes())),
        (0_usize..70_000).prop_map(|length| opt(5000, &vec![1; length])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    /// Goal: how a conversation is cut into pieces changes nothing. Method: random options, whole and in random pieces.
    #[test]
    fn pieces_change_nothing(
        flags in prop_oneof![8 => Just(3_u32), 1 => 0_u32..5],
        options in vec(any_option(), 0..12),
        tail in vec(any::<u8>(), 0..40),
        sizes in vec(1_usize..600, 1..20),
        required in any::<bool>(),
    ) {
        let tls = if required { TlsMode::Required } else { TlsMode::Off };
        let bytes = [&flags.to_be_bytes()[..], &options.concat(), &tail].concat();
        prop_assert_eq!(converse(&bytes, &sizes, tls), converse(&bytes, &[], tls));
    }

    /// Goal: no bytes panic. Method: random bytes behind valid flags and a valid magic.
    #[test]
    fn noise_is_survived(noise in vec(any::<u8>(), 0..300), number in 0_u32..12, length in 0_u32..300) {
        let head = [&FIXED.to_be_bytes()[..], b"IHAVEOPT", &number.to_be_bytes(), &length.to_be_bytes()].concat();
        for start in [0, 4, 12, 20] {
            let bytes = [&head[..start], &noise].concat();
            converse(&bytes, &[7], TlsMode::Off);
        }
    }
}
