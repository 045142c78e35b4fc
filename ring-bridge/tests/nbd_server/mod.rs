//! A tiny blocking NBD server around the engines of `ring_bridge::nbd`: one thread per connection, a disk of bytes in
//! memory. It exists to let real clients talk to the engines, and shows how they are called.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use ring_bridge::nbd::proto::{command_flag, state};
use ring_bridge::nbd::{
    DecodeError, ExportInfo, Exports, Handshake, Negotiation, NoExport, PlainRead, ReplyStyle, Request,
    RequestKind, SLOT_BYTES, StatusBuilder, Step, TlsAcceptor, TlsMode, TlsSession, Transmission,
};

/// Allocation is tracked in blocks of this size.
pub const BLOCK: usize = 4096;

/// What a connection agreed on.
#[derive(Debug)]
pub struct Agreement {
    pub transmission: Transmission,
    /// Version and suite of TLS.
    pub protocol: Option<String>,
    /// Who the client proved to be.
    pub identity: Option<String>,
}

/// Bytes, and which blocks were written.
struct Contents {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
}

/// One disk, and what clients did to it.
pub struct Disk {
    pub info: ExportInfo,
    contents: Mutex<Contents>,
    /// Every request that passed the checks.
    pub requests: Mutex<Vec<Request>>,
    /// Every connection's agreement.
    pub agreements: Mutex<Vec<Agreement>>,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    pub fn new(info: ExportInfo) -> Arc<Self> {
        let size = info.size_bytes as usize;
        let contents = Contents { bytes: vec![0; size], allocated: vec![false; size.div_ceil(BLOCK)] };
        let (requests, agreements) = (Mutex::default(), Mutex::default());
        Arc::new(Self { info, contents: Mutex::new(contents), requests, agreements })
    }

    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.contents).bytes.clone()
    }

    pub fn saw(&self, test: impl Fn(&Request) -> bool) -> bool {
        lock(&self.requests).iter().any(test)
    }

    fn change(&self, range: (u64, usize), data: Option<&[u8]>, allocate: bool) {
        let mut contents = lock(&self.contents);
        let (start, end) = (range.0 as usize, range.0 as usize + range.1);
        match data {
            Some(data) => contents.bytes[start..end].copy_from_slice(data),
            None => contents.bytes[start..end].fill(0),
        }
        // Only whole blocks become holes.
        let blocks = if allocate {
            start / BLOCK..end.div_ceil(BLOCK)
        } else {
            let first = start.div_ceil(BLOCK);
            first..(end / BLOCK).max(first)
        };
        contents.allocated[blocks].fill(allocate);
    }

    /// Length and allocation of runs in a range.
    fn runs(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        let contents = lock(&self.contents);
        let (mut at, end) = (offset, offset + length);
        let mut runs = Vec::new();
        while at < end {
            let block = at as usize / BLOCK;
            let next = end.min((block as u64 + 1) * BLOCK as u64);
            runs.push((next - at, contents.allocated[block]));
            at = next;
        }
        runs
    }
}

/// What a listener serves.
pub struct Disks {
    pub disks: Vec<Arc<Disk>>,
    /// The empty name means the first disk.
    pub bound: bool,
}

impl Disks {
    fn disk(&self, name: &str) -> Option<&Arc<Disk>> {
        match name {
            "" if self.bound => self.disks.first(),
            _ => self.disks.iter().find(|disk| disk.info.name == name),
        }
    }
}

impl Exports for Disks {
    fn find(&self, name: &str) -> Result<ExportInfo, NoExport> {
        self.disk(name).map(|disk| disk.info.clone()).ok_or(NoExport::Unknown)
    }

    fn list(&self) -> Vec<(String, String)> {
        self.disks.iter().map(|disk| (disk.info.name.clone(), disk.info.description.clone())).collect()
    }
}

/// Listens on `path` until the process ends.
pub fn serve(path: PathBuf, disks: Disks, tls: Option<TlsAcceptor>) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let disks = Arc::new(disks);
    thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let (disks, tls) = (Arc::clone(&disks), tls.clone());
            thread::spawn(move || {
                if let Err(error) = connection(socket, &disks, tls.as_ref()) {
                    println!("connection ended: {error}");
                }
            });
        }
    });
    Ok(())
}

/// A socket, with TLS or without.
struct Wire {
    socket: UnixStream,
    tls: Option<TlsSession>,
    /// Plaintext that came with the negotiation.
    unread: Vec<u8>,
}

impl Wire {
    fn flush_tls(&mut self) -> io::Result<()> {
        match &mut self.tls {
            Some(session) => self.socket.write_all(&session.take_output()),
            None => Ok(()),
        }
    }

    fn feed_tls(session: &mut TlsSession, socket: &mut UnixStream) -> io::Result<()> {
        let mut chunk = [0; 8192];
        let count = socket.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        assert_eq!(session.feed(&chunk[..count]), count);
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.unread.is_empty() {
            let count = buffer.len().min(self.unread.len());
            buffer[..count].copy_from_slice(&self.unread[..count]);
            self.unread.drain(..count);
            return Ok(count);
        }
        loop {
            let Some(session) = &mut self.tls else { return self.socket.read(buffer) };
            match session.read_plain(buffer).map_err(io::Error::other)? {
                PlainRead::Bytes(count) => return Ok(count),
                PlainRead::Closed => return Ok(0),
                PlainRead::WouldBlock => {
                    self.socket.write_all(&session.take_output())?;
                    Self::feed_tls(session, &mut self.socket)?;
                }
            }
        }
    }

    fn receive_exact(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.receive(buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let Some(session) = &mut self.tls else { return self.socket.write_all(bytes) };
            let taken = session.write_plain(bytes).map_err(io::Error::other)?;
            bytes = &bytes[taken..];
            self.flush_tls()?;
        }
        Ok(())
    }

    fn start_tls(&mut self, mut session: TlsSession, unread: &[u8]) -> io::Result<()> {
        assert_eq!(session.feed(unread), unread.len());
        loop {
            let state = session.handshake();
            self.socket.write_all(&session.take_output())?;
            match state.map_err(io::Error::other)? {
                Handshake::Done => break,
                Handshake::NeedInput => Self::feed_tls(&mut session, &mut self.socket)?,
            }
        }
        self.tls = Some(session);
        Ok(())
    }
}

fn connection(socket: UnixStream, disks: &Disks, tls: Option<&TlsAcceptor>) -> io::Result<()> {
    let mut wire = Wire { socket, tls: None, unread: Vec::new() };
    let mode = if tls.is_some() { TlsMode::Required } else { TlsMode::Off };
    let mut negotiation = Negotiation::new(mode);
    let agreed = loop {
        let step = negotiation.advance(disks);
        wire.send(&negotiation.take_output())?;
        match step {
            Step::Again => {}
            Step::NeedInput => {
                let mut chunk = [0; 512];
                let count = wire.receive(&mut chunk)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                negotiation.feed(&chunk[..count]);
            }
            Step::StartTls { unread } => {
                let acceptor = tls.ok_or(io::ErrorKind::InvalidInput)?;
                wire.start_tls(acceptor.session().map_err(io::Error::other)?, &unread)?;
                negotiation.tls_started();
            }
            Step::Transmission(agreed) => break agreed,
            Step::Close(reason) => return Err(io::Error::other(reason)),
        }
    };
    let disk = disks.disk(&agreed.export).ok_or(io::ErrorKind::NotFound)?;
    let identity = wire.tls.as_ref().and_then(TlsSession::client_identity);
    let protocol = wire.tls.as_ref().map(TlsSession::protocol);
    lock(&disk.agreements).push(Agreement { transmission: agreed.transmission, protocol, identity });
    wire.unread = agreed.unread;
    transmit(&mut wire, disk, agreed.transmission)
}

fn transmit(wire: &mut Wire, disk: &Disk, agreed: Transmission) -> io::Result<()> {
    let style = agreed.reply_style();
    let mut slot = [0; SLOT_BYTES];
    loop {
        let mut header = [0; 32];
        let header = &mut header[..agreed.header_bytes()];
        wire.receive_exact(header)?;
        let (to, payload, verdict) = match agreed.decode(header) {
            Ok(request) => (request.reply_to(), request.payload, agreed.check(&request).map(|()| request)),
            Err(DecodeError::Refuse(refused)) => (refused.reply_to, refused.payload, Err(refused.refusal)),
            Err(DecodeError::Drop(violation)) => return Err(io::Error::other(violation)),
        };
        let mut data = vec![0; payload as usize];
        wire.receive_exact(&mut data)?;
        match verdict {
            Err(refusal) => {
                let count = style.error(&mut slot, to, refusal.error, refusal.reason);
                wire.send(&slot[..count])?;
            }
            Ok(Request { kind: RequestKind::Disconnect, .. }) => {
                if let Some(session) = &mut wire.tls {
                    session.close();
                }
                return wire.flush_tls();
            }
            Ok(request) => {
                lock(&disk.requests).push(request);
                execute(wire, disk, &agreed, &request, &data)?;
            }
        }
    }
}

fn execute(
    wire: &mut Wire,
    disk: &Disk,
    agreed: &Transmission,
    request: &Request,
    data: &[u8],
) -> io::Result<()> {
    let range = (request.offset, request.length as usize);
    match request.kind {
        RequestKind::Read => return read(wire, disk, agreed, request),
        RequestKind::BlockStatus => {
            let mut buffer = [0; 512];
            let mut status =
                StatusBuilder::new(&mut buffer, agreed, request).ok_or(io::ErrorKind::InvalidInput)?;
            for (length, allocated) in disk.runs(request.offset, request.length) {
                if !status.push(length, if allocated { 0 } else { state::HOLE | state::ZERO }) {
                    break;
                }
            }
            let count = status.finish();
            return wire.send(&buffer[..count]);
        }
        RequestKind::Write => disk.change(range, Some(data), true),
        RequestKind::WriteZeroes => disk.change(range, None, request.has(command_flag::NO_HOLE)),
        RequestKind::Trim => disk.change(range, None, false),
        RequestKind::Flush | RequestKind::Cache | RequestKind::Disconnect => {}
    }
    let mut slot = [0; SLOT_BYTES];
    let count = agreed.reply_style().done(&mut slot, request.reply_to());
    wire.send(&slot[..count])
}

fn read(wire: &mut Wire, disk: &Disk, agreed: &Transmission, request: &Request) -> io::Result<()> {
    let (style, to) = (agreed.reply_style(), request.reply_to());
    let mut slot = [0; SLOT_BYTES];
    let whole = style == ReplyStyle::Simple || request.has(command_flag::DF);
    let runs = if whole { vec![(request.length, true)] } else { disk.runs(request.offset, request.length) };
    let mut at = request.offset;
    for (index, (length, allocated)) in runs.iter().enumerate() {
        let last = index + 1 == runs.len();
        let hole = if *allocated { None } else { style.hole(&mut slot, to, at, *length as u32, last) };
        if let Some(count) = hole {
            wire.send(&slot[..count])?;
        } else {
            let bytes = lock(&disk.contents).bytes[at as usize..(at + length) as usize].to_vec();
            let count = style.data(&mut slot, to, at, *length as u32, last);
            wire.send(&slot[..count])?;
            wire.send(&bytes)?;
        }
        at += length;
    }
    Ok(())
}

/// A socket path in `directory`.
pub fn socket_in(directory: &Path) -> PathBuf {
    directory.join("nbd.sock")
}
