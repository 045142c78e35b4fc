//! The futures of a volume: runs those that can go on, starts what they ask for, takes what they come to.

use std::task::{Context, Poll};

use formats::error::Error;
use formats::file::Buf as Bytes;

use super::*;
use crate::image::{Job, Work};
use crate::request::{Kind, PIECE, Via};

/// Mappings that only memory and log have are written back after this time, also when no guest flushes…
const TIDY_AFTER: Nanos = 100 * MILLISECOND;
/// …or when there are so many: early enough that nobody waits for room in the log.
const TIDY_MANY: u64 = crate::alog::ENTRIES as u64 / 4;
/// The time after which it is tried again when that has failed.
const TIDY_AGAIN: Nanos = SECOND;
/// Polls of one disk's futures in a turn. A poll is short (who has much to do lets others go first), but futures may wake each
/// other without end.
const POLLS_MAX: u32 = 64;

impl<K: Kernel> Shard<K> {
    /// Futures that let others go first in the last turn go on.
    pub(in crate::reactor) fn wake_yielded(&mut self) {
        for slot in std::mem::take(&mut self.awake_next) {
            if let Some(engine) = self.disks.get_mut(slot as usize).and_then(|entry| entry.engine.as_mut()) {
                let yielded = std::mem::take(&mut engine.yielded);
                engine.lock_ready().extend(yielded);
                self.awake.push(slot);
            }
        }
    }

    fn wake_next(&mut self, slot: u32) {
        if !self.awake_next.contains(&slot) {
            self.awake_next.push(slot);
        }
    }

    /// Lets futures of a volume go on that can.
    pub(in crate::reactor) fn run_tasks(&mut self, slot: u32) {
        loop {
            let Some(engine) = self.disks.get_mut(slot as usize).and_then(|entry| entry.engine.as_mut())
            else {
                return;
            };
            if engine.polled.0 != self.turn {
                engine.polled = (self.turn, 0);
            }
            if engine.polled.1 >= POLLS_MAX {
                return self.wake_next(slot);
            }
            let ready = std::mem::take(&mut *engine.lock_ready());
            if ready.is_empty() {
                return;
            }
            for task in ready {
                let Some(engine) = self.disks.get_mut(slot as usize).and_then(|entry| entry.engine.as_mut())
                else {
                    return;
                };
                let Some(running) = engine.tasks.get_mut(task) else { continue };
                let mut context = Context::from_waker(&running.waker);
                let polled = guarded(|| running.future.as_mut().poll(&mut context));
                let whom = running.whom;
                engine.polled.1 += 1;
                if matches!(polled, Ok(Poll::Ready(_))) {
                    let done = engine.tasks.remove(task);
                    drop(done);
                }
                let yielded = engine.take_woken(task);
                let jobs = engine.port.take();
                if yielded {
                    self.wake_next(slot);
                }
                for job in jobs {
                    self.start_job(slot, job);
                }
                match polled {
                    Ok(Poll::Pending) => {}
                    Ok(Poll::Ready(result)) => self.task_done(slot, whom, result),
                    // Opening it once more would come to the same: it is an error of the image, not a quarantine.
                    Err(message) if whom == For::Open => {
                        if let Some(engine) = &mut self.disks[slot as usize].engine {
                            engine.tasks.try_remove(task);
                        }
                        let what =
                            format!("its driver failed while it was opened ({message}); please report it");
                        self.task_done(slot, whom, Err(Error::corrupt("the image", what)));
                    }
                    Err(message) => return self.quarantine(slot, &message),
                }
            }
        }
    }

    /// Starts what a future asked for.
    fn start_job(&mut self, slot: u32, job: Job) {
        let Job { file, reply, work } = job;
        let via = Via::Future { disk: slot, reply, payload: None, lend: false };
        let borrowed = |req, at| Via::Future { disk: slot, reply, payload: Some((req, at)), lend: false };
        match work {
            Work::Read { offset, len, lend } => {
                debug_assert!(len <= PIECE);
                let via = Via::Future { disk: slot, reply, payload: None, lend };
                self.submit_via(file, Kind::Read, offset, u64::from(len), via);
            }
            Work::Write { offset, data } => {
                let kind = Kind::Write { fua: false };
                let mut request = Request::new(file, kind, offset, data.len() as u64, None, self.now);
                match self.pool.take_back(data) {
                    Ok(buf) => request.payload = Some(buf),
                    Err(data) => match self.pool.take(data.len(), true) {
                        Some(buf) => {
                            self.pool.bytes_mut(&buf)[..data.len()].copy_from_slice(&data);
                            request.payload = Some(buf);
                        }
                        // The address space is spent: it waits for a buffer like any other.
                        None => request.carried = Some(data.to_vec()),
                    },
                }
                self.submit_for(request, via);
            }
            Work::ReadPayload { req, at, offset, len } => {
                self.submit_via(file, Kind::Read, offset, u64::from(len), borrowed(req, at));
            }
            Work::WritePayload { req, at, offset, len } => {
                let kind = Kind::Write { fua: false };
                self.submit_via(file, kind, offset, u64::from(len), borrowed(req, at));
            }
            Work::Flush => self.submit_via(file, Kind::Flush, 0, 0, via),
            Work::Zero { offset, len } => {
                let kind = Kind::WriteZeroes { fua: false, no_hole: false, fast: false };
                self.submit_via(file, kind, offset, len, via);
            }
            Work::Extend { length } => {
                self.submit_via(file, Kind::SetLength { grow: true }, length, 0, via);
            }
            Work::Truncate { length } => {
                self.submit_via(file, Kind::SetLength { grow: false }, length, 0, via);
            }
            Work::Get { req, at, len } => {
                let payload = self.requests.get(req).and_then(|request| request.payload.as_ref());
                let bytes =
                    payload.map(|buf| Bytes::copy_of(&self.pool.bytes(buf)[at as usize..][..len as usize]));
                self.answer_job(slot, reply, bytes.ok_or(libc::EIO));
            }
            Work::Put { req, at, bytes } => {
                if let Some(payload) = self.requests.get(req).and_then(|request| request.payload.as_ref()) {
                    self.pool.bytes_mut(payload)[at as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                self.answer_job(slot, reply, Ok(Bytes::zeroed(0)));
            }
            Work::ZeroPayload { req, at, len } => {
                self.zero_payload(req, at, len);
                self.answer_job(slot, reply, Ok(Bytes::zeroed(0)));
            }
        }
    }

    fn answer_job(&mut self, slot: u32, reply: usize, result: Result<Bytes, i32>) {
        if let Some(engine) = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref()) {
            engine.port.answer(reply, result);
        }
    }

    fn task_done(&mut self, slot: u32, whom: For, result: Result<Outcome, Error>) {
        match whom {
            For::Request(req) => self.volume_done(slot, req, result),
            For::Tool => {}
            For::Open => self.open_done(slot, result),
            For::Close => self.close_done(slot, result.map(drop)),
            For::Tidy => {
                if let Some(engine) = &mut self.disks[slot as usize].engine {
                    engine.tidying = false;
                }
                match result {
                    Ok(_) => self.watch_pending(slot),
                    Err(error) => {
                        self.tell_image_error(slot, &error);
                        self.tidy_at(slot, self.now + TIDY_AGAIN);
                    }
                }
            }
        }
    }

    /// An operator accepted that acknowledged data may be lost.
    pub(in crate::reactor) fn accept_doubt(&mut self, slot: u32) {
        for file in self.file_slots(slot) {
            if let Some(disk) = &mut self.disks[file as usize].disk {
                disk.accept_doubt();
            }
        }
    }

    /// What a driver or a store said, at most once a second for each disk.
    pub(super) fn tell_image_error(&mut self, slot: u32, error: &Error) {
        let entry = &mut self.disks[slot as usize];
        if entry.told.is_some_and(|at| self.now < at + SECOND) {
            return;
        }
        entry.told = Some(self.now);
        self.events.send(Event::ImageError { disk: entry.id, message: error.message.clone() });
    }

    /// A future may have left mappings that only memory and log have: sees to it that they are written back.
    pub(in crate::reactor) fn watch_pending(&mut self, slot: u32) {
        let entry = &mut self.disks[slot as usize];
        let Some(engine) =
            entry.engine.as_ref().filter(|engine| engine.stage == Stage::Open && !engine.tidying)
        else {
            return;
        };
        let Some(volume) = engine.volume.clone() else { return };
        // A panic of the driver here is met again by its next future.
        let pending = guarded(|| volume.usage().pending_mappings).unwrap_or(0);
        if pending >= TIDY_MANY {
            self.start_tidy(slot);
        } else if pending > 0 {
            self.tidy_at(slot, self.now + TIDY_AFTER);
        }
    }

    /// Sets the timer for writing mappings back, unless it is set.
    fn tidy_at(&mut self, slot: u32, at: Nanos) {
        let entry = &mut self.disks[slot as usize];
        if entry.tidy.is_none() {
            entry.tidy = Some(at);
            self.timers.push(Reverse((at, slot)));
        }
    }

    /// Mappings that only memory and log have are written back.
    pub(in crate::reactor) fn start_tidy(&mut self, slot: u32) {
        let entry = &mut self.disks[slot as usize];
        // Nothing happens to a paused disk; it goes on when it is resumed.
        let paused = entry.disk.as_ref().is_some_and(|disk| disk.state() == DiskState::Paused);
        let Some(engine) = entry.engine.as_mut().filter(|_| !paused) else { return };
        if engine.stage != Stage::Open || engine.tidying {
            return;
        }
        let Some(volume) = engine.volume.clone() else { return };
        if guarded(|| volume.usage().pending_mappings > 0) == Ok(true) {
            engine.tidying = true;
            engine.spawn(For::Tidy, Box::pin(async move { volume.tidy().await.map(|()| Outcome::Done) }));
            self.awake.push(slot);
        }
    }
}
