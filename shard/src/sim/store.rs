//! The simulated kernel, files: reads, writes, fdatasync, fallocate and side jobs, with their faults.

use std::os::fd::AsRawFd;

use super::file::BLOCK;
use super::kernel::{Event, Failure, FileOp, InFlight, Side, Target, What, World};
use super::memory;
use crate::clock::{MICROSECOND, MILLISECOND};
use crate::storage::Op;
use crate::storage::side::{Extent, SideCall, SideDone, SideJob};

/// A quarter of the kernel's workers.
const PUNTED_MAX: u32 = 16;

impl World {
    pub(super) fn start_file(&mut self, shard: usize, id: u64, file: usize, direct: bool, op: Op) -> FileOp {
        assert!(!self.files[file].frozen, "operation on a disk that was reported as at rest: {op:?}");
        let memory = self.lanes[shard].memory.clone();
        let inside = |addr: usize, len: u32, write: bool| {
            // The last range is of zeroes, which only writes may use.
            let ranges = if write { &memory[..] } else { &memory[..memory.len() - 1] };
            let end = addr + len as usize;
            assert!(
                ranges.iter().any(|r| r.0 <= addr && end <= r.0 + r.1),
                "memory outside of the buffers: {op:?}"
            );
        };
        let nowait = matches!(op, Op::Read { nowait: true, .. } | Op::Write { nowait: true, .. });
        let f = &mut self.files[file];
        assert!(direct || !nowait, "I/O through the page cache takes a worker: {op:?}");
        if !nowait {
            let punted = self.punted.entry((shard, f.store)).or_default();
            *punted += 1;
            assert!(*punted <= PUNTED_MAX, "more work than a store may give to the kernel's workers: {op:?}");
        }
        let rng = &mut self.rng;
        let faults = f.faults;
        let must_wait = nowait && (rng.chance(faults.wait) || (f.hung && rng.chance(500)));
        let align = if direct { f.align } else { 1 };
        let step = if direct { f.align.max(f.memory_align) } else { 1 };
        let mut aligned = true;
        let (mut result, mut moves) = (0i32, 0u64);
        let mut writeback = Vec::new();
        let failure = match op {
            Op::Read { addr, len, offset, .. } | Op::Write { addr, len, offset, .. } => {
                let write = matches!(op, Op::Write { .. });
                inside(addr, len, write);
                assert!(len > 0, "I/O of nothing");
                if direct {
                    let memory_align = f.memory_align as usize;
                    aligned = offset % align == 0 && u64::from(len) % align == 0 && addr % memory_align == 0;
                }
                let reach =
                    if write { u64::from(len) } else { f.length.saturating_sub(offset).min(u64::from(len)) };
                result = reach as i32;
                moves = reach;
                let what = if write { What::Write } else { What::Read };
                if nowait && f.cannot_tell {
                    (result, moves) = (-libc::EOPNOTSUPP, 0);
                    None
                } else if must_wait && (reach <= step || rng.chance(700)) {
                    (result, moves) = (-libc::EAGAIN, 0);
                    None
                } else if must_wait {
                    moves = rng.between(1, (reach - 1) / step) * step;
                    result = moves as i32;
                    None
                } else if rng.chance(faults.again) {
                    (result, moves) = (if rng.chance(500) { -libc::EAGAIN } else { -libc::EINTR }, 0);
                    None
                } else if f.is_plotted(what) || rng.chance(faults.eio) || (write && rng.chance(faults.enospc))
                {
                    let errno =
                        if write && faults.enospc > 0 && rng.chance(500) { libc::ENOSPC } else { libc::EIO };
                    result = -errno;
                    // Some of it may have landed.
                    moves = rng.between(0, reach / align) * align;
                    Some((what, offset, offset + u64::from(len), errno))
                } else {
                    if reach > step && rng.chance(faults.short) {
                        moves = rng.between(1, (reach - 1) / step) * step;
                        result = moves as i32;
                    }
                    None
                }
            }
            Op::Fdatasync { .. } => {
                f.syncs += 1;
                assert!(f.syncs <= 1, "two fdatasyncs of one file in flight");
                writeback = f.begin_sync();
                let errno = if faults.enospc > 0 && rng.chance(300) { libc::ENOSPC } else { libc::EIO };
                let fails = f.is_plotted(What::Sync) || rng.chance(faults.sync);
                fails.then_some((What::Sync, 0, u64::MAX, errno))
            }
            Op::Fallocate { mode, offset, len, .. } => {
                f.fallocates += 1;
                assert!(f.fallocates <= 2, "more than two fallocates of one file in flight");
                assert!(len > 0, "fallocate of nothing");
                let able = if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 { f.can_punch } else { f.can_zero };
                assert!(mode & libc::FALLOC_FL_KEEP_SIZE != 0, "fallocate must not change the length");
                aligned = !f.is_block || (offset % 512 == 0 && len % 512 == 0);
                if !able {
                    result = -libc::EOPNOTSUPP;
                    None
                } else {
                    let errno = if faults.enospc > 0 && rng.chance(500) { libc::ENOSPC } else { libc::EIO };
                    rng.chance(faults.eio).then_some((What::Space, offset, offset + len, errno))
                }
            }
            _ => None,
        };
        // Every rest of a short transfer is aligned here, so Linux's EINVAL would be a mistake of the shard.
        assert!(aligned, "misaligned for this file (align {align}): {op:?}");
        let at = self.instant;
        let failure = failure.map(|(what, start, end, errno)| Failure { file, at, what, start, end, errno });
        if let Some(failure) = failure {
            result = -failure.errno;
        }
        if failure.is_some_and(|failure| failure.what == What::Sync) {
            // Linux marks the pages clean: the next fdatasync knows nothing of them.
            writeback.clear();
        }
        f.busy += 1;
        let early = if moves > 0 { rng.between(0, moves / align) * align } else { 0 };
        let held = f.hung && !must_wait && !(nowait && f.cannot_tell);
        let punted = (!nowait).then_some((shard, f.store));
        let mut op = FileOp { file, op, early, result, moves, writeback, seal: 0, held, failure, punted };
        let delay = if rng.chance(faults.slow) {
            rng.between(5 * MILLISECOND, 300 * MILLISECOND)
        } else {
            rng.between(5 * MICROSECOND, 1500 * MICROSECOND)
        };
        self.trace([2 | (file as u64) << 4, op.result as u64, op.moves]);
        self.say(format_args!(
            "shard {shard} file {file} {:?} -> {} in {}us",
            op.op,
            op.result,
            delay / 1000
        ));
        self.prepare(&mut op);
        if !op.held {
            self.schedule(delay, Event::Op(id));
        }
        op
    }

    /// The part of an operation that happens at its start.
    pub(super) fn prepare(&mut self, op: &mut FileOp) {
        let file = &mut self.files[op.file];
        match op.op {
            Op::Write { addr, len, offset, .. } => {
                let mut bytes = vec![0; len as usize];
                memory::load(addr, &mut bytes);
                op.seal = hash(&bytes);
                file.write(offset, &bytes[..op.early as usize]);
            }
            Op::Read { addr, len, offset, .. } => {
                let junk = vec![0xd5; len as usize];
                memory::store(addr, &junk);
                if op.early > 0 {
                    memory::store(addr, &file.data[offset as usize..(offset + op.early) as usize]);
                }
                op.seal = self.sequence;
            }
            _ => {}
        }
    }

    /// The part of an operation that happens at its end.
    pub(super) fn conclude(&mut self, mut op: FileOp) -> i32 {
        self.new_failures.extend(op.failure);
        let file = &mut self.files[op.file];
        file.busy -= 1;
        if let Some(count) = op.punted.and_then(|key| self.punted.get_mut(&key)) {
            *count -= 1;
        }
        match op.op {
            Op::Write { addr, len, offset, .. } => {
                let mut bytes = vec![0; len as usize];
                memory::load(addr, &mut bytes);
                assert_eq!(op.seal, hash(&bytes), "the buffer of a write changed while the kernel used it");
                file.write(offset + op.early, &bytes[op.early as usize..op.moves as usize]);
            }
            Op::Read { addr, len, offset, .. } => {
                let mut bytes = vec![0; len as usize];
                memory::load(addr, &mut bytes);
                let untouched = bytes[op.early as usize..].iter().all(|&byte| byte == 0xd5);
                assert!(untouched, "the buffer of a read was used by others while the kernel had it");
                let (from, to) = (offset + op.early, offset + op.moves);
                if from < to {
                    memory::store(addr + op.early as usize, &file.data[from as usize..to as usize]);
                }
            }
            Op::Fdatasync { .. } => {
                file.syncs -= 1;
                if op.result == 0 {
                    file.end_sync(std::mem::take(&mut op.writeback));
                }
            }
            Op::Fallocate { mode, offset, len, .. } => {
                file.fallocates -= 1;
                if op.result == 0 {
                    file.erase(offset, len, mode & libc::FALLOC_FL_PUNCH_HOLE != 0);
                }
            }
            _ => {}
        }
        op.result
    }

    /// The store of a disk stops answering.
    pub fn hang(&mut self, disk: usize) {
        self.say(format_args!("disk {disk} hangs"));
        self.files_of(disk).for_each(|file| file.hung = true);
    }

    /// It answers again, also to what it was asked before.
    pub fn release(&mut self, disk: usize) {
        self.say(format_args!("disk {disk} answers again"));
        self.files_of(disk).for_each(|file| file.hung = false);
        let mut ids = Vec::new();
        let files = &self.files;
        for (&id, running) in &mut self.running {
            if let InFlight::File(op) = &mut running.what
                && files[op.file].disk == disk
                && std::mem::take(&mut op.held)
            {
                ids.push(Event::Op(id));
            }
        }
        for (&id, side) in &mut self.sides {
            if files[side.file].disk == disk && std::mem::take(&mut side.held) {
                ids.push(Event::Side(id));
            }
        }
        for event in ids {
            let after = self.rng.between(0, MILLISECOND);
            self.schedule(after, event);
        }
    }

    pub(super) fn start_side(&mut self, shard: usize, job: &SideJob) {
        let fd = job.file.fd.as_raw_fd();
        let Some(&Target::File(file, _)) = self.descriptors.get(&fd) else { panic!("side job on no file") };
        assert!(!self.files[file].frozen, "side job on a disk that was reported as at rest");
        self.sequence += 1;
        let id = self.sequence;
        let held = self.files[file].hung;
        self.sides.insert(id, Side { shard, user_data: job.user_data, file, call: job.call, held });
        if !held {
            let after = self.rng.between(10 * MICROSECOND, 2 * MILLISECOND);
            self.schedule(after, Event::Side(id));
        }
    }

    pub(super) fn side_event(&mut self, id: u64) {
        let Some(side) = self.sides.remove(&id) else { return };
        let file = &mut self.files[side.file];
        let rng = &mut self.rng;
        let (what, start, len) = match side.call {
            SideCall::Extents { offset, len, .. } => (What::Extents, offset, len),
            SideCall::DiscardDevice { offset, len } => (What::Space, offset, len),
            SideCall::SetLength { length, .. } => (What::Space, length, 0),
        };
        let result = if rng.chance(file.faults.side) {
            let errno = libc::EIO;
            self.new_failures.push(Failure {
                file: side.file,
                at: self.instant,
                what,
                start,
                end: start + len,
                errno,
            });
            Err(errno)
        } else {
            match side.call {
                SideCall::Extents { offset, len, max } => {
                    let extents = file.extents(offset, len, max);
                    Ok(extents.into_iter().map(|(len, hole)| Extent { len, hole }).collect())
                }
                SideCall::SetLength { length, grow } => {
                    assert!(!file.is_block, "a device has its length");
                    if !grow || length > file.length {
                        file.set_length(length);
                    }
                    Ok(Vec::new())
                }
                SideCall::DiscardDevice { offset, len } => {
                    assert!(offset % 512 == 0 && len % 512 == 0, "misaligned discard");
                    // A device may forget all, a part, or nothing.
                    for block in offset / BLOCK..(offset + len) / BLOCK {
                        let start = (block * BLOCK).max(offset);
                        if rng.chance(500) {
                            file.erase(start, (offset + len - start).min(BLOCK), true);
                        }
                    }
                    Ok(Vec::new())
                }
            }
        };
        self.trace([3, side.file as u64, u64::from(result.is_ok())]);
        let lane = &mut self.lanes[side.shard];
        lane.side_done.push_back(SideDone { user_data: side.user_data, result });
        self.wake(side.shard);
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hash = bytes.len() as u64;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    for &byte in chunks.remainder() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    hash
}
