//! A client that speaks the transmission phase of NBD: sends random requests, checks every answer.

use std::collections::{BTreeMap, VecDeque};

use ring_bridge::nbd::{BlockSizes, ExportInfo, Features, Transmission, proto};

use super::oracle::{Model, Outcome, Snapshot, Stamp, pattern};
use super::random::Random;

/// Bytes that a client has ready to send before it makes the next request.
const OUTBOX_MAX: usize = 256 << 10;

/// How a client behaves.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    pub depth: usize,
    /// Offsets and lengths are multiples of this.
    pub align: u64,
    /// Longest usual and longest rare transfer, in bytes.
    pub usual_max: u64,
    pub rare_max: u64,
    /// Chances in a thousand.
    pub write: u64,
    pub flush: u64,
    pub erase: u64,
    pub status: u64,
    pub fua: u64,
    pub bad: u64,
    /// Most bytes that it sends or takes in one go.
    pub step: usize,
    /// Everything happens in this part of the disk, so that requests overlap.
    pub window: (u64, u64),
}

/// What was asked.
#[derive(Clone)]
pub enum Ask {
    Read {
        since: Snapshot,
        data: Vec<u8>,
        covered: Vec<(u64, u64)>,
    },
    Change {
        stamp: Stamp,
        fua: bool,
        trim: bool,
        fast: bool,
    },
    Flush {
        since: Snapshot,
    },
    Status {
        since: Snapshot,
    },
    /// To be refused with this error.
    Bad {
        error: u32,
    },
    /// Answered with success or an error, without effect.
    Hint,
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ask::Read { covered, .. } => write!(f, "read, {} pieces have come", covered.len()),
            Ask::Change { stamp, fua, trim, .. } => write!(f, "change {stamp} fua {fua} trim {trim}"),
            Ask::Flush { .. } => f.write_str("flush"),
            Ask::Status { .. } => f.write_str("block status"),
            Ask::Bad { error } => write!(f, "nonsense for error {error}"),
            Ask::Hint => f.write_str("hint"),
        }
    }
}

/// A request that is not answered.
#[derive(Debug, Clone)]
pub struct Asked {
    pub sent: u64,
    pub offset: u64,
    pub len: u64,
    pub ask: Ask,
    /// First error that a chunk has told.
    error: Option<u32>,
}

/// An answer that the simulation has to judge: the byte model has judged the data already.
#[derive(Debug)]
pub struct Answer {
    pub asked: Asked,
    pub error: u32,
}

/// What reading reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Talks,
    /// Leaves: no new requests, goodbye behind the last.
    Leaving,
    Gone,
}

#[derive(Debug)]
pub struct Client {
    pub disk: usize,
    pub sock: usize,
    pub agreed: Transmission,
    pub habits: Habits,
    pub life: Life,
    /// Requests that it may still send in this round.
    pub budget: u32,
    /// Does not take replies for now.
    pub deaf: bool,
    /// Does not send for now, be it in the middle of a request.
    pub mute: bool,
    /// The server ended the connection in order: no reply is cut.
    pub ended_well: bool,
    pub asked: BTreeMap<u64, Asked>,
    cookie: u64,
    pub outbox: VecDeque<u8>,
    pub inbox: Vec<u8>,
    rng: Random,
}

/// The size and style that a listener would have agreed on.
pub fn agree(size: u64, read_only: bool, style: u64) -> Transmission {
    let info = ExportInfo {
        name: String::new(),
        description: String::new(),
        size_bytes: size,
        read_only,
        features: Features::ALL,
        block_sizes: BlockSizes::default(),
    };
    Transmission {
        structured: style > 0,
        extended: style > 1,
        base_allocation: (style > 0).then_some(1),
        flags: info.transmission_flags(style > 0),
        size_bytes: size,
        block_sizes: BlockSizes::default(),
    }
}

impl Client {
    pub fn new(disk: usize, sock: usize, agreed: Transmission, habits: Habits, seed: u64) -> Client {
        Client {
            disk,
            sock,
            agreed,
            habits,
            life: Life::Talks,
            budget: 0,
            deaf: false,
            mute: false,
            ended_well: false,
            asked: BTreeMap::new(),
            cookie: 0,
            outbox: VecDeque::new(),
            inbox: Vec::new(),
            rng: Random::new(seed),
        }
    }

    /// Whether it wants to send another request now.
    pub fn wants(&self) -> bool {
        let room = self.asked.len() < self.habits.depth && self.outbox.len() <= OUTBOX_MAX;
        self.life == Life::Talks && !self.mute && self.budget > 0 && room
    }

    fn range(&mut self) -> (u64, u64) {
        let Habits { align, usual_max, rare_max, window, .. } = self.habits;
        let longest = if self.rng.chance(30) { rare_max } else { usual_max };
        let room = window.1 - window.0;
        let len = self.rng.between(1, longest.div_ceil(align)) * align;
        let len = len.min(room);
        let start = window.0 + self.rng.below((room - len) / align + 1) * align;
        (start, len)
    }

    /// Makes the next request.
    pub fn ask(&mut self, model: &mut Model, now: u64) {
        use proto::command;
        self.budget -= 1;
        let (start, len) = self.range();
        let writable = !self.agreed.read_only();
        let h = self.habits;
        let dice = self.rng.below(1000);
        if dice < h.bad {
            return self.ask_bad(now);
        }
        let dice = self.rng.below(1000);
        let fua = if self.rng.chance(h.fua) { proto::command_flag::FUA } else { 0 };
        if dice < h.write && writable {
            let stamp = model.begin(now, start, start + len, false);
            let mut payload = vec![0; len as usize];
            pattern(stamp, start, &mut payload);
            let ask = Ask::Change { stamp, fua: fua != 0, trim: false, fast: false };
            self.push(now, command::WRITE, fua, start, len, ask, &payload);
        } else if dice < h.write + h.flush {
            let since = model.snapshot(now, 0, self.agreed.size_bytes);
            self.push(now, command::FLUSH, 0, 0, 0, Ask::Flush { since }, &[]);
        } else if dice < h.write + h.flush + h.erase && writable {
            let trim = self.rng.chance(500);
            let mut flags = fua;
            if !trim {
                flags |= if self.rng.chance(300) { proto::command_flag::NO_HOLE } else { 0 };
                flags |= if self.rng.chance(300) { proto::command_flag::FAST_ZERO } else { 0 };
            }
            let fast = flags & proto::command_flag::FAST_ZERO != 0;
            let stamp = model.begin(now, start, start + len, true);
            let ask = Ask::Change { stamp, fua: fua != 0, trim, fast };
            let number = if trim { command::TRIM } else { command::WRITE_ZEROES };
            self.push(now, number, flags, start, len, ask, &[]);
        } else if dice < h.write + h.flush + h.erase + h.status && self.agreed.structured {
            let one = if self.rng.chance(200) { proto::command_flag::REQ_ONE } else { 0 };
            let since = model.snapshot(now, start, start + len);
            self.push(now, command::BLOCK_STATUS, one, start, len, Ask::Status { since }, &[]);
        } else {
            let df = self.agreed.structured && len <= 256 << 10 && self.rng.chance(100);
            let flags = if df { proto::command_flag::DF } else { 0 };
            let since = model.snapshot(now, start, start + len);
            let ask = Ask::Read { since, data: vec![0; len as usize], covered: Vec::new() };
            self.push(now, command::READ, flags, start, len, ask, &[]);
        }
    }

    /// A request that must be refused, or has no effect, in a stream that goes on.
    fn ask_bad(&mut self, now: u64) {
        use proto::{NbdError, command};
        let size = self.agreed.size_bytes;
        let einval = Ask::Bad { error: NbdError::Einval.code() };
        let read_only = self.agreed.read_only();
        match self.rng.below(6) {
            0 => self.push(now, command::READ, 0, size - 100, 200, einval, &[]),
            1 => {
                let error = if read_only { NbdError::Eperm } else { NbdError::Enospc };
                self.push(
                    now,
                    command::WRITE,
                    0,
                    size - 100,
                    200,
                    Ask::Bad { error: error.code() },
                    &[7; 200],
                );
            }
            2 => self.push(now, 77, 0, 0, 100, einval, &[]),
            3 => self.push(now, command::READ, 0x4000, 0, 512, einval, &[]),
            4 => self.push(now, command::CACHE, 0, 0, 4096.min(size), Ask::Hint, &[]),
            _ => self.push(now, command::READ, 0, 0, 0, einval, &[]),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a request has these fields")]
    fn push(
        &mut self,
        now: u64,
        command: u16,
        mut flags: u16,
        offset: u64,
        len: u64,
        ask: Ask,
        payload: &[u8],
    ) {
        self.cookie += 1;
        let cookie = self.cookie << 8 | 0x5a;
        let mut head = Vec::new();
        if self.agreed.extended {
            if command == proto::command::WRITE && self.rng.chance(700) {
                flags |= proto::command_flag::PAYLOAD_LEN;
            }
            head.extend(proto::EXTENDED_REQUEST_MAGIC.to_be_bytes());
        } else {
            head.extend(proto::REQUEST_MAGIC.to_be_bytes());
        }
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(offset.to_be_bytes());
        if self.agreed.extended {
            head.extend(len.to_be_bytes());
        } else {
            head.extend((len as u32).to_be_bytes());
        }
        self.outbox.extend(head);
        self.outbox.extend(payload);
        let asked = Asked { sent: now, offset, len, ask, error: None };
        self.asked.insert(cookie, asked);
    }

    /// Says goodbye behind what is queued.
    pub fn leave(&mut self) {
        self.life = Life::Leaving;
        let mut head = vec![];
        let magic = if self.agreed.extended { proto::EXTENDED_REQUEST_MAGIC } else { proto::REQUEST_MAGIC };
        head.extend(magic.to_be_bytes());
        head.extend(0u16.to_be_bytes());
        head.extend(proto::command::DISC.to_be_bytes());
        head.extend([0; 16]);
        head.extend(vec![0; if self.agreed.extended { 8 } else { 4 }]);
        self.outbox.extend(head);
    }

    /// Takes the next complete answer out of the inbox. An error is a broken promise of the server.
    pub fn next_answer(&mut self, model: &Model) -> Result<Option<Answer>, String> {
        loop {
            let Some((used, answer)) = self.parse(model)? else { return Ok(None) };
            self.inbox.drain(..used);
            if answer.is_some() {
                return Ok(answer);
            }
        }
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.inbox[at..at + N]);
        bytes
    }

    fn parse(&mut self, model: &Model) -> Result<Option<(usize, Option<Answer>)>, String> {
        if !self.agreed.structured {
            return self.parse_simple(model);
        }
        let head = if self.agreed.extended { 32 } else { 20 };
        if self.inbox.len() < head {
            return Ok(None);
        }
        let magic = u32::from_be_bytes(self.field(0));
        let flags = u16::from_be_bytes(self.field(4));
        let kind = u16::from_be_bytes(self.field(6));
        let cookie = u64::from_be_bytes(self.field(8));
        let (expected, len) = if self.agreed.extended {
            (proto::EXTENDED_REPLY_MAGIC, u64::from_be_bytes(self.field(24)))
        } else {
            (proto::STRUCTURED_REPLY_MAGIC, u64::from(u32::from_be_bytes(self.field(16))))
        };
        if magic != expected || len > (33 << 20) {
            return Err(format!("reply magic {magic:#x}, length {len}"));
        }
        let total = head + len as usize;
        if self.inbox.len() < total {
            return Ok(None);
        }
        let payload = self.inbox[head..total].to_vec();
        let last = flags & proto::chunk::FLAG_DONE != 0;
        let Some(asked) = self.asked.get_mut(&cookie) else {
            return Err(format!("an answer to {cookie:#x}, which is not asked for (or was answered before)"));
        };
        if self.agreed.extended {
            let mut offset = [0; 8];
            offset.copy_from_slice(&self.inbox[16..24]);
            if u64::from_be_bytes(offset) != asked.offset {
                return Err("an extended reply repeats another offset".into());
            }
        }
        asked.chunk(kind, &payload, last, model)?;
        if !last {
            return Ok(Some((total, None)));
        }
        Ok(Some((total, Some(self.complete(cookie)?))))
    }

    fn complete(&mut self, cookie: u64) -> Result<Answer, String> {
        let Some(asked) = self.asked.remove(&cookie) else { return Err("no such request".into()) };
        let error = asked.error.unwrap_or(0);
        if let Ask::Read { covered, .. } = &asked.ask
            && error == 0
            && covered.iter().map(|c| c.1 - c.0).sum::<u64>() != asked.len
        {
            return Err(format!("a read of {} bytes at {} was answered in part", asked.len, asked.offset));
        }
        Ok(Answer { asked, error })
    }

    fn parse_simple(&mut self, model: &Model) -> Result<Option<(usize, Option<Answer>)>, String> {
        if self.inbox.len() < 16 {
            return Ok(None);
        }
        let magic = u32::from_be_bytes(self.field(0));
        let error = u32::from_be_bytes(self.field(4));
        let cookie = u64::from_be_bytes(self.field(8));
        if magic != proto::SIMPLE_REPLY_MAGIC {
            return Err(format!("simple reply magic {magic:#x}"));
        }
        let Some(asked) = self.asked.get_mut(&cookie) else {
            return Err(format!("an answer to {cookie:#x}, which is not asked for (or was answered before)"));
        };
        let mut total = 16;
        if error != 0 {
            asked.error = Some(error);
        } else if matches!(asked.ask, Ask::Read { .. }) {
            total += asked.len as usize;
            if self.inbox.len() < total {
                return Ok(None);
            }
            let (offset, data) = (asked.offset, &self.inbox[16..total]);
            asked.data(offset, data, model)?;
        } else if matches!(asked.ask, Ask::Bad { .. }) {
            return Err("a request that makes no sense was answered with success".into());
        }
        Ok(Some((total, Some(self.complete(cookie)?))))
    }
}

impl Asked {
    /// Data of a read.
    fn data(&mut self, at: u64, bytes: &[u8], model: &Model) -> Result<(), String> {
        let Ask::Read { since, data, covered } = &mut self.ask else {
            return Err("data for a request that is no read".into());
        };
        let end = at + bytes.len() as u64;
        if at < self.offset || end > self.offset + self.len || covered.iter().any(|c| at < c.1 && c.0 < end) {
            return Err(format!("data for {at}..{end}, twice or outside of the read"));
        }
        covered.push((at, end));
        let from = (at - self.offset) as usize;
        data[from..from + bytes.len()].copy_from_slice(bytes);
        model.check_read(since, at, bytes)
    }

    /// A chunk of a structured or extended reply.
    fn chunk(&mut self, kind: u16, payload: &[u8], last: bool, model: &Model) -> Result<(), String> {
        use proto::chunk;
        let number = |at: usize, len: usize| -> Result<u64, String> {
            let bytes = payload.get(at..at + len).ok_or("a chunk is too short")?;
            Ok(bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
        };
        match kind {
            chunk::NONE if last && payload.is_empty() => match &self.ask {
                Ask::Bad { .. } => Err("a request that makes no sense was answered with success".into()),
                _ => Ok(()),
            },
            chunk::OFFSET_DATA => self.data(number(0, 8)?, &payload[8..], model),
            chunk::OFFSET_HOLE => {
                let zeroes = vec![0; number(8, 4)? as usize];
                self.data(number(0, 8)?, &zeroes, model)
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                let error = number(0, 4)? as u32;
                let message = number(4, 2)? as usize;
                let tail = if kind == chunk::ERROR { 0 } else { 8 };
                if error == 0 || payload.len() != 6 + message + tail {
                    return Err("an error chunk is malformed".into());
                }
                self.error.get_or_insert(error);
                Ok(())
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let Ask::Status { since } = &self.ask else { return Err("extents nobody asked for".into()) };
                let (first, width) = if kind == chunk::BLOCK_STATUS { (4, 4) } else { (8, 8) };
                let count = (payload.len() - first) / (2 * width);
                if number(0, 4)? != 1 || count == 0 || payload.len() != first + count * 2 * width {
                    return Err("a block status is malformed".into());
                }
                let mut at = self.offset;
                for extent in 0..count {
                    let from = first + extent * 2 * width;
                    let (len, flags) = (number(from, width)?, number(from + width, width)?);
                    let end = at + len;
                    if len == 0 || end > self.offset + self.len {
                        return Err(format!("an extent of {len} bytes at {at} is outside of the request"));
                    }
                    if flags & 2 != 0 && !model.may_be_zero(since, at, end) {
                        return Err(format!("{at}..{end} is said to read as zeroes, which cannot be"));
                    }
                    at = end;
                }
                Ok(())
            }
            _ => Err(format!("chunk of kind {kind:#x}, {} bytes", payload.len())),
        }
    }

    /// How a change ends when its answer has come.
    pub fn outcome(&self, error: u32) -> Outcome {
        match &self.ask {
            Ask::Change { trim: false, .. } if error == 0 => Outcome::Stored,
            _ => Outcome::Unknown,
        }
    }
}
