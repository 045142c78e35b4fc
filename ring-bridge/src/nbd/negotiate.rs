//! The handshake phase: greeting, options, and the decision which export a connection gets.
//!
//! The caller owns the socket and runs one loop per connection:
//! ```text
//! loop {
//!     let step = negotiation.advance(&exports);
//!     send(negotiation.take_output());
//!     match step {
//!         Again => {}
//!         NeedInput => negotiation.feed(receive()),
//!         StartTls { unread } => { session = acceptor.session(); session.feed(unread); handshake; negotiation.tls_started() }
//!         Transmission(agreed) => hand over to the shard,
//!         Close(reason) => close,
//!     }
//! }
//! ```
//! Invariants, whatever the client sends:
//! * One option is handled per [`Negotiation::advance`], so that the output never holds more than one answer.
//! * [`Step::NeedInput`] is only returned while less than one option ([`OPTION_DATA_BYTES_MAX`]) is held. Longer options
//!   are skipped by count, not stored.
//! * A connection ends after [`OPTIONS_MAX`] options. Deadlines are the caller's.
//! * Nothing that was said before STARTTLS has any effect behind it.

use super::export::{ExportInfo, Exports, NoExport};
use super::options::{InfoRequest, Malformed, MetaContextRequest, Replies, name};
use super::proto::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, INIT_MAGIC, OPTION_BYTES, OPTION_MAGIC, client, handshake, option,
    reply,
};
use super::transmission::Transmission;

/// Most data of one option in bytes: four strings of the protocol. Longer ones are answered with `ERR_TOO_BIG`.
pub const OPTION_DATA_BYTES_MAX: usize = 16 << 10;

/// Options that one connection may send.
pub const OPTIONS_MAX: u32 = 1024;

/// The id that `base:allocation` gets.
const BASE_ALLOCATION_ID: u32 = 1;

/// Whether a listener speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// No TLS: STARTTLS is refused.
    Off,
    /// TLS only: before STARTTLS nothing else is answered (FORCEDTLS of the specification).
    Required,
}

/// What negotiation ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The export's own name ([`ExportInfo::name`]).
    pub export: String,
    /// What the shard needs to know.
    pub transmission: Transmission,
    /// Bytes that the client sent behind its last option.
    pub unread: Vec<u8>,
}

/// Why a connection ends in the handshake phase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client said goodbye.
    #[error("the client ended the negotiation")]
    Goodbye,
    /// The client sent flags that this server did not offer.
    #[error("client flags are {0:#x}, expected only bits 0 (fixed newstyle) and 1 (no zeroes)")]
    UnknownClientFlags(u32),
    /// The magic in front of an option is wrong.
    #[error("option magic is {0:#018x}, expected {OPTION_MAGIC:#018x} (IHAVEOPT)")]
    BadMagic(u64),
    /// The client did not agree to fixed newstyle and sent an option other than EXPORT_NAME.
    #[error("option {0} without fixed newstyle, where only EXPORT_NAME is possible")]
    NotFixedNewstyle(u32),
    /// EXPORT_NAME cannot be answered with an error.
    #[error("EXPORT_NAME refused: {0}")]
    ExportName(String),
    /// The bound on options was reached.
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// The caller went on after the end.
    #[error("the negotiation has ended")]
    Ended,
}

/// What the caller does next, after sending the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// An option was answered: call [`Negotiation::advance`] again.
    Again,
    /// Receive more bytes and [`Negotiation::feed`] them.
    NeedInput,
    /// Start TLS (the output has the ACK). From now on everything passes through the session.
    StartTls {
        /// Received bytes behind STARTTLS: they belong to the TLS handshake and to nothing else.
        unread: Vec<u8>,
    },
    /// The connection belongs to the shard of this export.
    Transmission(Box<Agreed>),
    /// Close the connection after sending the output.
    Close(CloseReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The greeting was put out, the client's flags have not come.
    ClientFlags,
    /// Options.
    Options,
    /// STARTTLS was acknowledged; waits for [`Negotiation::tls_started`].
    TlsHandshake,
    /// Transmission or closed.
    Ended,
}

/// The header of an option, still in the input.
#[derive(Debug, Clone, Copy)]
struct OptionHeader {
    number: u32,
    length: usize,
}

/// The handshake phase of one connection.
#[derive(Debug)]
pub struct Negotiation {
    phase: Phase,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Data of a too long option that are still to come.
    skip: usize,
    options: u32,
    tls: TlsMode,
    in_tls: bool,
    fixed_newstyle: bool,
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    /// The export whose `base:allocation` was selected.
    base_allocation: Option<String>,
}

impl Negotiation {
    /// A new connection; the greeting is in the output.
    pub fn new(tls: TlsMode) -> Self {
        let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        let mut output = Vec::new();
        output.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        output.extend_from_slice(&flags.to_be_bytes());
        Self {
            phase: Phase::ClientFlags,
            input: Vec::new(),
            output,
            skip: 0,
            options: 0,
            tls,
            in_tls: false,
            fixed_newstyle: false,
            no_zeroes: false,
            structured: false,
            extended: false,
            base_allocation: None,
        }
    }

    /// Adds received bytes (plaintext, when in TLS). Call it when [`Step::NeedInput`] asked for it, with what one receive
    /// gave.
    pub fn feed(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.input.extend_from_slice(&bytes[skipped..]);
    }

    /// Bytes to send to the client; the output is empty afterwards.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The TLS handshake that [`Step::StartTls`] asked for succeeded. What was agreed in plaintext is forgotten.
    pub fn tls_started(&mut self) {
        if self.phase == Phase::TlsHandshake {
            self.phase = Phase::Options;
            self.in_tls = true;
            self.structured = false;
            self.extended = false;
            self.base_allocation = None;
        }
    }

    /// Whether the connection is in TLS.
    pub const fn in_tls(&self) -> bool {
        self.in_tls
    }

    /// Bytes held for this connection: received ones that were not handled, and answers that were not taken.
    pub fn held_bytes(&self) -> usize {
        self.input.capacity() + self.output.capacity()
    }

    /// Handles at most one message of the client.
    pub fn advance(&mut self, exports: &dyn Exports) -> Step {
        let step = match self.phase {
            Phase::ClientFlags => self.client_flags(),
            Phase::Options => self.next_option(exports),
            Phase::TlsHandshake => Step::NeedInput,
            Phase::Ended => Step::Close(CloseReason::Ended),
        };
        if matches!(step, Step::Transmission(_) | Step::Close(_)) {
            self.phase = Phase::Ended;
            self.input = Vec::new();
        }
        step
    }

    fn client_flags(&mut self) -> Step {
        let Some((flags, _)) = self.input.split_first_chunk::<4>() else { return Step::NeedInput };
        let flags = u32::from_be_bytes(*flags);
        self.input.drain(..4);
        if flags & !(client::FIXED_NEWSTYLE | client::NO_ZEROES) != 0 {
            return Step::Close(CloseReason::UnknownClientFlags(flags));
        }
        self.fixed_newstyle = flags & client::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & client::NO_ZEROES != 0;
        self.phase = Phase::Options;
        Step::Again
    }

    /// The header at the front of the input, if it is there as a whole.
    fn header(&self) -> Result<Option<OptionHeader>, CloseReason> {
        let Some(header) = self.input.first_chunk::<OPTION_BYTES>() else { return Ok(None) };
        let [m0, m1, m2, m3, m4, m5, m6, m7, n0, n1, n2, n3, l0, l1, l2, l3] = *header;
        let magic = u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        if magic != OPTION_MAGIC {
            return Err(CloseReason::BadMagic(magic));
        }
        let number = u32::from_be_bytes([n0, n1, n2, n3]);
        Ok(Some(OptionHeader { number, length: u32::from_be_bytes([l0, l1, l2, l3]) as usize }))
    }

    fn next_option(&mut self, exports: &dyn Exports) -> Step {
        if self.skip > 0 {
            return Step::NeedInput;
        }
        let OptionHeader { number, length } = match self.header() {
            Ok(Some(header)) => header,
            Ok(None) => return Step::NeedInput,
            Err(reason) => return Step::Close(reason),
        };
        if !self.fixed_newstyle && number != option::EXPORT_NAME {
            return Step::Close(CloseReason::NotFixedNewstyle(number));
        }
        if length > OPTION_DATA_BYTES_MAX {
            return self.too_big(number, length);
        }
        let Some(data) = self.input.get(OPTION_BYTES..OPTION_BYTES + length) else { return Step::NeedInput };
        let data = data.to_vec();
        self.input.drain(..OPTION_BYTES + length);
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Step::Close(CloseReason::TooManyOptions);
        }
        self.answer(number, &data, exports)
    }

    /// Refuses an option without storing its data.
    fn too_big(&mut self, number: u32, length: usize) -> Step {
        let here = length.min(self.input.len() - OPTION_BYTES);
        self.input.drain(..OPTION_BYTES + here);
        self.skip = length - here;
        self.options += 1;
        if number == option::EXPORT_NAME {
            return Step::Close(CloseReason::ExportName(format!("its name has {length} bytes")));
        }
        if self.options > OPTIONS_MAX {
            return Step::Close(CloseReason::TooManyOptions);
        }
        let message = format!("the option has {length} bytes of data, the limit is {OPTION_DATA_BYTES_MAX}");
        Replies::new(&mut self.output, number).error(reply::ERR_TOO_BIG, &message);
        Step::Again
    }

    fn answer(&mut self, number: u32, data: &[u8], exports: &dyn Exports) -> Step {
        if self.tls == TlsMode::Required && !self.in_tls {
            match number {
                option::STARTTLS | option::ABORT => {}
                option::EXPORT_NAME => {
                    let why = "this listener speaks only TLS: the client has to send STARTTLS first";
                    return Step::Close(CloseReason::ExportName(why.into()));
                }
                _ => {
                    let why =
                        "this listener speaks only TLS: start it first (nbds: in libnbd, tls-creds in QEMU)";
                    return self.fail(number, reply::ERR_TLS_REQD, why);
                }
            }
        }
        let answered = match number {
            option::EXPORT_NAME => return self.export_name(data, exports),
            option::ABORT => {
                Replies::new(&mut self.output, number).ack();
                return Step::Close(CloseReason::Goodbye);
            }
            option::STARTTLS => self.start_tls(data),
            option::LIST => self.list(data, exports),
            option::INFO | option::GO => self.info_or_go(number, data, exports),
            option::STRUCTURED_REPLY => self.structured_reply(data),
            option::EXTENDED_HEADERS => self.extended_headers(data),
            option::LIST_META_CONTEXT => self.list_meta_context(data, exports),
            option::SET_META_CONTEXT => self.set_meta_context(data, exports),
            _ => Err(Refused::new(reply::ERR_UNSUP, format!("option {number} is not known here"))),
        };
        match answered {
            Ok(step) => step,
            Err(Refused { reply, message }) => self.fail(number, reply, &message),
        }
    }

    fn fail(&mut self, number: u32, kind: u32, message: &str) -> Step {
        Replies::new(&mut self.output, number).error(kind, message);
        Step::Again
    }

    fn ack(&mut self, number: u32) -> Result<Step, Refused> {
        Replies::new(&mut self.output, number).ack();
        Ok(Step::Again)
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<Step, Refused> {
        no_data(data)?;
        if self.tls == TlsMode::Off {
            return Err(Refused::new(reply::ERR_POLICY, "this listener does not speak TLS"));
        }
        if self.in_tls {
            return Err(Refused::new(reply::ERR_INVALID, "the connection is in TLS already"));
        }
        Replies::new(&mut self.output, option::STARTTLS).ack();
        self.phase = Phase::TlsHandshake;
        Ok(Step::StartTls { unread: std::mem::take(&mut self.input) })
    }

    fn list(&mut self, data: &[u8], exports: &dyn Exports) -> Result<Step, Refused> {
        no_data(data)?;
        let mut replies = Replies::new(&mut self.output, option::LIST);
        for (name, description) in exports.list() {
            replies.server(&name, &description);
        }
        self.ack(option::LIST)
    }

    /// The specification leaves a repetition open: it changes nothing, so it succeeds.
    fn structured_reply(&mut self, data: &[u8]) -> Result<Step, Refused> {
        no_data(data)?;
        if self.extended {
            let why = "extended headers were agreed and include structured replies";
            return Err(Refused::new(reply::ERR_EXT_HEADER_REQD, why));
        }
        self.structured = true;
        self.ack(option::STRUCTURED_REPLY)
    }

    fn extended_headers(&mut self, data: &[u8]) -> Result<Step, Refused> {
        no_data(data)?;
        self.structured = true;
        self.extended = true;
        self.ack(option::EXTENDED_HEADERS)
    }

    fn list_meta_context(&mut self, data: &[u8], exports: &dyn Exports) -> Result<Step, Refused> {
        self.needs_structured()?;
        let request = MetaContextRequest::parse(option::LIST_META_CONTEXT, data)?;
        find(exports, request.name)?;
        if request.base_allocation {
            let mut replies = Replies::new(&mut self.output, option::LIST_META_CONTEXT);
            replies.meta_context(0, BASE_ALLOCATION);
        }
        self.ack(option::LIST_META_CONTEXT)
    }

    /// Replaces the selection, also when it fails.
    fn set_meta_context(&mut self, data: &[u8], exports: &dyn Exports) -> Result<Step, Refused> {
        self.base_allocation = None;
        self.needs_structured()?;
        let request = MetaContextRequest::parse(option::SET_META_CONTEXT, data)?;
        let export = find(exports, request.name)?;
        if request.base_allocation {
            self.base_allocation = Some(export.name);
            let mut replies = Replies::new(&mut self.output, option::SET_META_CONTEXT);
            replies.meta_context(BASE_ALLOCATION_ID, BASE_ALLOCATION);
        }
        self.ack(option::SET_META_CONTEXT)
    }

    fn needs_structured(&self) -> Result<(), Refused> {
        if self.structured {
            return Ok(());
        }
        Err(Refused::new(
            reply::ERR_INVALID,
            "metadata contexts need STRUCTURED_REPLY or EXTENDED_HEADERS first",
        ))
    }

    fn info_or_go(&mut self, number: u32, data: &[u8], exports: &dyn Exports) -> Result<Step, Refused> {
        let request = InfoRequest::parse(data)?;
        let export = find(exports, request.name)?;
        let flags = export.transmission_flags(self.structured);
        Replies::new(&mut self.output, number).info(&export, flags, &request);
        let step = self.ack(number)?;
        Ok(if number == option::GO { self.enter(export) } else { step })
    }

    /// There is no error reply to this option: every refusal closes.
    fn export_name(&mut self, data: &[u8], exports: &dyn Exports) -> Step {
        if self.extended {
            let why = "extended headers were agreed, and they need GO";
            return Step::Close(CloseReason::ExportName(why.into()));
        }
        let export = match name(data).map_err(Refused::from).and_then(|name| find(exports, name)) {
            Ok(export) => export,
            Err(Refused { message, .. }) => return Step::Close(CloseReason::ExportName(message)),
        };
        let flags = export.transmission_flags(self.structured);
        self.output.extend_from_slice(&export.size_bytes.to_be_bytes());
        self.output.extend_from_slice(&flags.to_be_bytes());
        if !self.no_zeroes {
            self.output.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
        self.enter(export)
    }

    fn enter(&mut self, export: ExportInfo) -> Step {
        let selected = self.base_allocation.take().is_some_and(|name| name == export.name);
        let transmission = Transmission {
            structured: self.structured,
            extended: self.extended,
            base_allocation: selected.then_some(BASE_ALLOCATION_ID),
            flags: export.transmission_flags(self.structured),
            size_bytes: export.size_bytes,
            block_sizes: export.block_sizes,
        };
        let unread = std::mem::take(&mut self.input);
        Step::Transmission(Box::new(Agreed { export: export.name, transmission, unread }))
    }
}

/// An option that is answered with an error.
#[derive(Debug)]
struct Refused {
    reply: u32,
    message: String,
}

impl Refused {
    fn new(reply: u32, message: impl Into<String>) -> Self {
        Self { reply, message: message.into() }
    }
}

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Self::new(malformed.reply, malformed.message)
    }
}

fn no_data(data: &[u8]) -> Result<(), Refused> {
    if data.is_empty() {
        return Ok(());
    }
    Err(Refused::new(reply::ERR_INVALID, format!("this option has no data, {} bytes came", data.len())))
}

fn find(exports: &dyn Exports, name: &str) -> Result<ExportInfo, Refused> {
    exports.find(name).map_err(|why| match why {
        NoExport::Unknown if name.is_empty() => Refused::new(
            reply::ERR_UNKNOWN,
            "there is no default export here: ask for one by its name (nbdinfo --list shows them)",
        ),
        NoExport::Unknown => {
            let short: String = name.chars().take(64).collect();
            let message = format!("there is no export {short:?} here (nbdinfo --list shows those there are)");
            Refused::new(reply::ERR_UNKNOWN, message)
        }
        NoExport::Refused(message) => Refused::new(reply::ERR_POLICY, message),
        NoExport::ShuttingDown => Refused::new(reply::ERR_SHUTDOWN, "the server is going down"),
    })
}
