//! Requests of a volume: from memory as pieces, which are requests of the files' own disks, or by a future.

use std::rc::Rc;

use formats::crypt::{PayloadCipher, Spot};
use formats::driver::Erase;
use formats::error::Error;
use formats::file::Buf as Bytes;
use formats::volume::{Piece, Source, Volume};
use futures_lite::future::yield_now;

use super::*;
use crate::disk::Mem;
use crate::image::ShardPayload;
use crate::request::{Kind, PIECE, Sealed, Via};
use crate::storage::side::Extent;

/// Pieces of one request that go the fast way; more are the work of a future.
const PIECES_MAX: usize = 32;
/// Bytes that one block status tells of, at most: whoever wants more asks again.
const STATUS_MAX: u64 = 64 << 30;
/// Bytes that are looked up in one go; in the worst case every sector of them is a stretch of its own.
const STATUS_STEP: u64 = 16 << 20;
/// Stretches that a block status finds before it lets others go first, and what a look-up that finds one counts.
const WORK_MAX: usize = 2048;
const STEP_WORK: usize = 16;

impl<K: Kernel> Shard<K> {
    /// Carries a request of a volume out: from memory if that will do, else by a future.
    pub(in crate::reactor) fn start_volume(&mut self, slot: u32, req: ReqKey) {
        let kind = self.requests[req].kind;
        let moves = matches!(kind, Kind::Read | Kind::Write { .. });
        if moves && self.address(slot, req, Mem::Payload(0)).is_none() {
            self.counters.buffer_waits.add(1);
            self.starved.push_back((slot, Action::Volume { req }));
            if self.disks[slot as usize].pending.is_some() && !self.feeding {
                self.unsettled.push(slot);
            }
            return;
        }
        let write_through = self.disks[slot as usize].disk.as_ref().is_some_and(Disk::writes_through);
        let fast = match kind {
            Kind::Read => true,
            Kind::Write { fua } => !fua && !write_through,
            _ => false,
        };
        if fast && self.try_fast(slot, req, kind != Kind::Read) {
            return;
        }
        let Some(entry) = self.disks.get_mut(slot as usize) else { return };
        let stage = entry.engine.as_ref().map_or(Stage::Closed, |engine| engine.stage);
        if matches!(stage, Stage::Opening { .. } | Stage::Closing) {
            // It was on its way when the image was closed; it runs when that is open again.
            return self.with_disk(slot, |disk, ctx| disk.unstart(ctx, req));
        }
        let open = entry.engine.as_mut().and_then(|engine| Some((engine.volume.clone()?, engine)));
        let Some((volume, engine)) = open else {
            return self.volume_done(slot, req, Err(Error::io("the image", "a request", libc::EIO)));
        };
        let (port, files) = (engine.port.clone(), engine.files.clone());
        let payload = ShardPayload { port, req, files };
        let request = &self.requests[req];
        let durable = kind.fua() || (write_through && kind.changes());
        let job = Asked { kind, offset: request.offset, len: request.len, durable };
        engine.spawn(For::Request(req), Box::pin(run(volume, payload, job)));
        self.awake.push(slot);
    }

    /// Starts a read or write all of whose places are known. False when they are not.
    fn try_fast(&mut self, slot: u32, req: ReqKey, write: bool) -> bool {
        let (offset, len) = (self.requests[req].offset, self.requests[req].len);
        let Some(engine) = &self.disks[slot as usize].engine else { return false };
        let Some(volume) = engine.volume.clone().filter(|_| engine.stage == Stage::Open) else {
            return false;
        };
        let files = engine.files.clone();
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        let found = guarded(|| {
            let guard = volume.try_hold(offset, len, write)?;
            let all = if write {
                volume.map_write(offset, len, &mut pieces)
            } else {
                volume.map_read(offset, len, &mut pieces) == Ok(len)
            };
            (all && pieces.len() <= PIECES_MAX).then_some(guard)
        });
        let aligned = |piece: &Piece| match piece.source {
            Source::File { id, .. } => {
                let file =
                    files.get(usize::from(id.layer)).and_then(|files| files.get(usize::from(id.file.0)));
                let whole_sectors =
                    volume.cipher(id.layer).is_none_or(|cipher| cipher.is_whole(piece.start, piece.len));
                whole_sectors
                    && file.is_some_and(|file| {
                        (piece.start - offset).is_multiple_of(u64::from(file.memory_align))
                    })
            }
            Source::Zero => true,
            Source::Encoded { .. } => false,
        };
        let guard = match found {
            Ok(Some(guard)) if pieces.iter().all(aligned) => guard,
            Ok(_) => {
                self.pieces = pieces;
                return false;
            }
            Err(message) => {
                self.pieces = pieces;
                self.quarantine(slot, &message);
                return true;
            }
        };
        let request = &mut self.requests[req];
        request.guard = Some(guard);
        request.pending = 1;
        for piece in &pieces {
            let at = (piece.start - offset) as u32;
            match piece.source {
                Source::File { id, offset } => {
                    self.requests[req].pending += 1;
                    let file = files[usize::from(id.layer)][usize::from(id.file.0)].slot;
                    let via = |sealed| Via::Piece { disk: slot, req, at, sealed };
                    match (volume.cipher(id.layer), write) {
                        (None, _) => {
                            let kind = if write { Kind::Write { fua: false } } else { Kind::Read };
                            self.submit_via(file, kind, offset, piece.len, via(Sealed::No));
                        }
                        (Some(_), false) => {
                            self.submit_via(file, Kind::Read, offset, piece.len, via(Sealed::Read(id.layer)));
                        }
                        (Some(cipher), true) => {
                            let spot = Spot { disk: piece.start, file: offset };
                            let sealed = self.sealed(file, (req, at), piece.len, cipher, spot);
                            self.submit_for(sealed, via(Sealed::Written));
                        }
                    }
                }
                Source::Zero | Source::Encoded { .. } => self.zero_payload(req, at, piece.len as u32),
            }
        }
        self.pieces = pieces;
        self.piece_done(slot, req, 0);
        true
    }

    /// The write of a piece of a request to an encrypted file: with an encrypted copy of the bytes.
    fn sealed(
        &mut self,
        file: u32,
        (req, at): (ReqKey, u32),
        len: u64,
        cipher: &PayloadCipher,
        spot: Spot,
    ) -> Request {
        let mut write = Request::new(file, Kind::Write { fua: false }, spot.file, len, None, self.now);
        let len = len as usize;
        if self.sealing.len() < len {
            self.sealing = Bytes::zeroed(PIECE as usize);
        }
        let bytes = &mut self.sealing[..len];
        match self.requests.get(req).and_then(|request| request.payload.as_ref()) {
            Some(payload) => bytes.copy_from_slice(&self.pool.bytes(payload)[at as usize..][..len]),
            // What is left of another one is nobody's business.
            None => bytes.fill(0),
        }
        cipher.encrypt(spot, bytes);
        match self.pool.take(len, true) {
            Some(buf) => {
                self.pool.bytes_mut(&buf)[..len].copy_from_slice(bytes);
                write.payload = Some(buf);
            }
            // The address space is spent: it waits for a buffer like any other.
            None => write.carried = Some(bytes.to_vec()),
        }
        write
    }

    /// Decrypts what a piece has read into the payload of its request. The answer is an errno, 0 if that was done.
    fn unseal(&mut self, slot: u32, read: &Request, (req, at): (ReqKey, u32), layer: u16) -> i32 {
        let engine = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref());
        let volume = engine.and_then(|engine| engine.volume.as_ref());
        let (Some(cipher), Some(request)) =
            (volume.and_then(|volume| volume.cipher(layer)), self.requests.get(req))
        else {
            return libc::EIO;
        };
        let Some(payload) = &request.payload else { return libc::EIO };
        let spot = Spot { disk: request.offset + u64::from(at), file: read.offset };
        cipher.decrypt(spot, &mut self.pool.bytes_mut(payload)[at as usize..][..read.len as usize]);
        0
    }

    pub(super) fn zero_payload(&mut self, req: ReqKey, at: u32, len: u32) {
        if let Some(payload) = self.requests.get(req).and_then(|request| request.payload.as_ref()) {
            self.pool.bytes_mut(payload)[at as usize..][..len as usize].fill(0);
        }
    }

    /// Gives a request to the disk of a file.
    pub(super) fn submit_via(&mut self, file: u32, kind: Kind, offset: u64, len: u64, via: Via) {
        self.submit_for(Request::new(file, kind, offset, len, None, self.now), via);
    }

    /// Gives a request, maybe with data of its own, to the disk of a file.
    pub(super) fn submit_for(&mut self, mut request: Request, via: Via) {
        self.disks[via.disk() as usize].ops += 1;
        request.via = Some(via);
        self.submit(request);
    }

    /// A piece of a request on the fast path is done, or its start is.
    fn piece_done(&mut self, slot: u32, req: ReqKey, errno: i32) {
        let request = &mut self.requests[req];
        request.pending -= 1;
        if request.errno == 0 {
            request.errno = errno;
        }
        if request.pending > 0 {
            return;
        }
        request.guard = None;
        let errno = request.errno;
        if self.disks[slot as usize].engine.as_ref().is_some_and(|engine| !engine.tasks.is_empty()) {
            // One of them may have waited for the range.
            self.awake.push(slot);
        }
        self.with_disk(slot, |disk, ctx| disk.on_volume(ctx, req, errno, false));
    }

    /// A request of a file's disk is done: the one place where its result goes back to the volume. True when it was one.
    pub(in crate::reactor) fn via_done(&mut self, request: &mut Request) -> bool {
        let Some(via) = request.via else { return false };
        let slot = via.disk();
        let errno = request.errno;
        let mut payload = request.payload.take();
        let alive = self.disks.get(slot as usize).is_some_and(|entry| !entry.quarantined);
        match via {
            Via::Piece { req, at, sealed, .. } => {
                if alive {
                    let errno = match (sealed, errno) {
                        (Sealed::Read(layer), 0) => self.unseal(slot, request, (req, at), layer),
                        (_, errno) => errno,
                    };
                    self.piece_done(slot, req, errno);
                }
            }
            Via::Future { reply, lend, .. } => {
                let read = errno == 0 && request.kind == Kind::Read;
                let result = match payload.take_if(|_| read) {
                    _ if errno != 0 => Err(errno),
                    Some(buf) if lend => Ok(self.pool.lend(buf, request.len as usize)),
                    Some(buf) => {
                        let bytes = Bytes::copy_of(&self.pool.bytes(&buf)[..request.len as usize]);
                        self.pool.give(buf);
                        Ok(bytes)
                    }
                    None => Ok(Bytes::zeroed(0)),
                };
                let engine = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref());
                if let Some(engine) = engine {
                    engine.port.answer(reply, result);
                    self.awake.push(slot);
                }
            }
        }
        if let Some(buf) = payload {
            self.pool.give(buf);
        }
        self.op_gone(slot, false);
        true
    }

    pub(super) fn volume_done(&mut self, slot: u32, req: ReqKey, result: Result<Outcome, Error>) {
        let errno = match result {
            Ok(Outcome::Extents(extents)) => {
                self.requests[req].extents = extents;
                0
            }
            Ok(_) => 0,
            Err(error) => {
                self.tell_image_error(slot, &error);
                error.errno()
            }
        };
        // A flush that failed below must not be asked for again until somebody accepts what it means.
        let sync_failed = errno != 0
            && self
                .file_slots(slot)
                .iter()
                .any(|&file| self.disks[file as usize].disk.as_ref().is_some_and(Disk::flush_failed));
        self.with_disk(slot, |disk, ctx| disk.on_volume(ctx, req, errno, sync_failed));
        self.watch_pending(slot);
    }
}

/// A request of a volume's disk.
struct Asked {
    kind: Kind,
    offset: u64,
    len: u64,
    /// Durable before the answer.
    durable: bool,
}

/// Carries out what a request asks for.
async fn run(volume: Rc<Volume>, payload: ShardPayload, asked: Asked) -> Result<Outcome, Error> {
    let Asked { kind, offset, len, durable } = asked;
    match kind {
        Kind::Read => volume.read(offset, len, &payload).await?,
        Kind::Write { .. } => volume.write(offset, len, &payload).await?,
        Kind::Flush => volume.flush().await?,
        Kind::Discard { .. } => volume.erase(offset, len, Erase::Discard).await?,
        Kind::WriteZeroes { fast: true, .. } => {
            let message = "whether zeroing is fast is not known before it is done";
            return Err(Error::new(formats::error::ErrorKind::Unsupported, message));
        }
        Kind::WriteZeroes { no_hole, .. } => {
            volume.erase(offset, len, if no_hole { Erase::ZeroKeep } else { Erase::Zero }).await?;
        }
        Kind::Extents { max } => return extents(&volume, offset, len, max).await,
        Kind::SetLength { .. } => {
            // Its offset is the new size.
            volume.resize(offset).await?;
            volume.flush().await?;
        }
    }
    if durable {
        volume.flush().await?;
    }
    Ok(Outcome::Done)
}

/// Data and holes of a range, as the tables of the chain have them; of its first part when it is long.
async fn extents(volume: &Volume, offset: u64, len: u64, max: usize) -> Result<Outcome, Error> {
    let (mut at, end) = (offset, offset + len.min(STATUS_MAX));
    let mut out: Vec<Extent> = Vec::new();
    let mut pieces = Vec::new();
    let mut work = 0;
    while at < end && out.len() < max {
        let step = (end - at).min(STATUS_STEP);
        pieces.clear();
        let covered = volume.map_read(at, step, &mut pieces)?;
        if covered == 0 {
            volume.load(at, step).await?;
            continue;
        }
        work += STEP_WORK + pieces.len();
        if work >= WORK_MAX {
            work = 0;
            yield_now().await;
        }
        for piece in &pieces {
            let hole = piece.source == Source::Zero;
            match out.last_mut() {
                Some(last) if last.hole == hole => last.len += piece.len,
                _ => out.push(Extent { len: piece.len, hole }),
            }
        }
        at += covered;
    }
    out.truncate(max);
    Ok(Outcome::Extents(out))
}

#[cfg(test)]
mod tests {
    //! Goal: a block status of any range is answered, in bounded steps and about a bounded part. Method: a disk of 2^60 bytes
    //! that is never read from; polls are counted.

    use std::ops::Range;
    use std::task::{Context, Poll, Waker};

    use formats::driver::Open;
    use formats::file::{ImageFile, Pending};
    use formats::metadata::Budget;
    use formats::volume::Layer;

    use super::*;

    #[derive(Debug)]
    struct Endless;

    impl ImageFile for Endless {
        fn name(&self) -> &str {
            "endless"
        }
        fn length(&self) -> u64 {
            1 << 60
        }
        fn is_device(&self) -> bool {
            true
        }
        fn is_writable(&self) -> bool {
            false
        }
        fn read(&self, _: u64, _: usize) -> Pending<'static, Bytes> {
            unreachable!()
        }
        fn write(&self, _: u64, _: Bytes) -> Pending<'static, ()> {
            unreachable!()
        }
        fn flush(&self) -> Pending<'static, ()> {
            unreachable!()
        }
        fn extend(&self, _: u64) -> Pending<'static, ()> {
            unreachable!()
        }
        fn truncate(&self, _: u64) -> Pending<'static, ()> {
            unreachable!()
        }
        fn zero(&self, _: Range<u64>) -> Pending<'static, ()> {
            unreachable!()
        }
    }

    #[test]
    fn a_block_status_is_short_and_lets_others_go_first() {
        let file: Rc<dyn ImageFile> = Rc::new(Endless);
        let open = Open {
            files: vec![file.clone()],
            writable: false,
            below_size: None,
            budget: Budget::new(1 << 20),
            log: None,
            snapshot: None,
            key: None,
        };
        let raw = formats::registry::format("raw").expect("raw is known");
        let driver = formats::blocking::wait(raw.open(open)).expect("it opens");
        let volume = Volume::new(vec![Layer { driver, files: vec![file] }]).expect("one layer");
        for (len, told, least) in [(1 << 60, STATUS_MAX, 16), (1 << 20, 1 << 20, 1)] {
            let mut future = std::pin::pin!(extents(&volume, 4096, len - 4096, 100));
            let mut polls = 1;
            let answer = loop {
                match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    Poll::Ready(answer) => break answer,
                    Poll::Pending => polls += 1,
                }
            };
            let Ok(Outcome::Extents(extents)) = answer else { panic!("extents") };
            let told = told.min(len - 4096);
            assert_eq!(extents, [Extent { len: told, hole: false }]);
            assert!(polls >= least, "{polls} polls for {len} bytes");
        }
    }
}
