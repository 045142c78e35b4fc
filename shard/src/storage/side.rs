//! Calls that io_uring lacks (finding holes, discarding on devices), run on a few threads of the process.
//!
//! A store that never answers may take two of the threads for ever, not more: jobs of one store beyond that wait. Jobs are
//! rare (block status, discards on devices), so a lock and a queue do.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};

use crossbeam::channel::Sender;

use crate::api::ImageFile;

/// Threads of the process for side jobs.
const THREADS: usize = 8;
/// Threads that the jobs of one store may hold.
const PER_STORE: usize = 2;

/// What to do.
#[derive(Debug, Clone, Copy)]
pub enum SideCall {
    /// Data and holes in `[offset, offset + len)`, at most `max` extents.
    Extents {
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bound of the answer.
        max: usize,
    },
    /// Makes the file as long as `length`, or, with `grow`, at least as long.
    SetLength {
        /// Bytes.
        length: u64,
        /// Do not cut.
        grow: bool,
    },
    /// BLKDISCARD.
    DiscardDevice {
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// A piece of a disk: length in bytes and whether it is a hole (reads as zero, takes no space).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// No space is allocated; reads as zero.
    pub hole: bool,
}

/// A job with the file that it works on; the file stays open until it is done.
#[derive(Debug)]
pub struct SideJob {
    /// Comes back with the result.
    pub user_data: u64,
    /// The file.
    pub file: Arc<ImageFile>,
    /// The call.
    pub call: SideCall,
}

/// A finished job.
#[derive(Debug)]
pub struct SideDone {
    /// As given.
    pub user_data: u64,
    /// Extents (empty for calls without such an answer) or an errno.
    pub result: Result<Vec<Extent>, i32>,
}

/// Where a shard's results go: its channel and the eventfd that its ring polls.
#[derive(Debug, Clone)]
pub struct SideReply {
    /// Results.
    pub tx: Sender<SideDone>,
    /// Wakes the shard.
    pub wake: Arc<OwnedFd>,
}

struct Queue {
    jobs: VecDeque<(SideJob, SideReply)>,
    /// Stores whose jobs run now, one entry per running job.
    running: Vec<u64>,
    idle: usize,
    threads: usize,
}

/// The side threads of the process; started when the first job comes.
pub struct SidePool {
    queue: Mutex<Queue>,
    ready: Condvar,
}

impl std::fmt::Debug for SidePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SidePool").finish_non_exhaustive()
    }
}

static POOL: SidePool = SidePool {
    queue: Mutex::new(Queue { jobs: VecDeque::new(), running: Vec::new(), idle: 0, threads: 0 }),
    ready: Condvar::new(),
};

/// Queues a job; the result is sent to `reply`.
pub fn run(job: SideJob, reply: SideReply) {
    let mut queue = POOL.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    queue.jobs.push_back((job, reply));
    if queue.jobs.len() > queue.idle && queue.threads < THREADS {
        let name = format!("side-{}", queue.threads);
        if std::thread::Builder::new().name(name).stack_size(128 << 10).spawn(work).is_ok() {
            queue.threads += 1;
        }
    }
    drop(queue);
    POOL.ready.notify_one();
}

fn work() {
    let mut queue = POOL.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    loop {
        let next = queue.jobs.iter().position(|(job, _)| {
            queue.running.iter().filter(|&&store| store == job.file.store).count() < PER_STORE
        });
        let Some((job, reply)) = next.and_then(|index| queue.jobs.remove(index)) else {
            queue.idle += 1;
            queue = POOL.ready.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
            queue.idle -= 1;
            continue;
        };
        let store = job.file.store;
        queue.running.push(store);
        drop(queue);
        let result = call(&job.file, job.call);
        let user_data = job.user_data;
        // The file goes before the answer: the control side may wait for the last reference.
        drop(job);
        // A shard that has ended wants no answer.
        if reply.tx.send(SideDone { user_data, result }).is_ok() {
            signal(&reply.wake);
        }
        queue = POOL.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(index) = queue.running.iter().position(|&s| s == store) {
            queue.running.swap_remove(index);
        }
        // A job of this store may have waited for its turn while all threads slept.
        POOL.ready.notify_one();
    }
}

/// Makes an eventfd readable. A full counter is readable already, so the result does not matter.
pub fn signal(eventfd: &OwnedFd) {
    let _ = nix::unistd::write(eventfd, &1u64.to_ne_bytes());
}

fn call(file: &ImageFile, call: SideCall) -> Result<Vec<Extent>, i32> {
    match call {
        SideCall::Extents { offset, len, max } => extents(file, offset, len, max),
        SideCall::DiscardDevice { offset, len } => discard(file, offset, len),
        SideCall::SetLength { length, grow } => set_length(file, length, grow),
    }
}

/// ftruncate. What is new reads as zero and takes no space.
fn set_length(file: &ImageFile, length: u64, grow: bool) -> Result<Vec<Extent>, i32> {
    if let crate::api::FileKind::Block { .. } = file.kind {
        // Whoever manages the device has made it larger, or not.
        let end =
            nix::unistd::lseek64(&file.fd, 0, nix::unistd::Whence::SeekEnd).map_err(|errno| errno as i32)?;
        return if end as u64 >= length { Ok(Vec::new()) } else { Err(libc::ENOSPC) };
    }
    let now = nix::sys::stat::fstat(&file.fd).map_err(|errno| errno as i32)?.st_size as u64;
    if now == length || (grow && now > length) {
        return Ok(Vec::new());
    }
    let length = i64::try_from(length).map_err(|_| libc::EFBIG)?;
    nix::unistd::ftruncate(&file.fd, length).map_err(|errno| errno as i32)?;
    Ok(Vec::new())
}

/// Walks data and holes with lseek. What lies behind the end of the file is a hole.
fn extents(file: &ImageFile, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, i32> {
    use nix::unistd::{Whence, lseek64};
    let end = offset + len;
    let mut at = offset;
    let mut out = Vec::new();
    while at < end && out.len() < max {
        let data = match lseek64(&file.fd, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(nix::errno::Errno::ENXIO) => end,
            // A file system without SEEK_DATA: all data, which is always true enough.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EOPNOTSUPP) => {
                out.push(Extent { len: end - at, hole: false });
                break;
            }
            Err(errno) => return Err(errno as i32),
        };
        if data > at {
            let stop = data.min(end);
            out.push(Extent { len: stop - at, hole: true });
            at = stop;
            continue;
        }
        let hole = match lseek64(&file.fd, at as i64, Whence::SeekHole) {
            Ok(hole) => hole as u64,
            Err(errno) => return Err(errno as i32),
        };
        let stop = hole.min(end);
        if stop <= at {
            // The file changed between the two calls; data is the safe answer.
            out.push(Extent { len: end - at, hole: false });
            break;
        }
        out.push(Extent { len: stop - at, hole: false });
        at = stop;
    }
    Ok(out)
}

fn discard(file: &ImageFile, offset: u64, len: u64) -> Result<Vec<Extent>, i32> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from the pointer, which are there; the descriptor is open while `file` lives.
    let result = unsafe { ioctl::blkdiscard(file.fd.as_raw_fd(), &range) };
    result.map(|_| Vec::new()).map_err(|errno| errno as i32)
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        /// BLKDISCARD of linux/fs.h: _IO(0x12, 119), takes a pointer to offset and length in bytes.
        blkdiscard,
        nix::request_code_none!(0x12, 119),
        [u64; 2]
    );
}

#[cfg(test)]
mod tests {
    //! Goal: holes are found where the file has them. Method: a sparse file with known data.
    use super::*;
    use crate::api::{CacheMode, FileKind};
    use std::os::unix::fs::FileExt;

    fn image(file: std::fs::File, length: u64) -> Arc<ImageFile> {
        Arc::new(ImageFile {
            fd: file.into(),
            tail: None,
            offset_align: 1,
            memory_align: 1,
            cache: CacheMode::Writeback,
            kind: FileKind::Regular,
            length,
            length_now: length.into(),
            punts: false,
            store: 1,
        })
    }

    #[test]
    fn holes_come_back_through_the_threads() {
        let file = tempfile::tempfile().expect("file");
        file.set_len(1 << 20).expect("length");
        file.write_all_at(&[1u8; 65536], 65536 * 4).expect("data");
        let (tx, rx) = crossbeam::channel::unbounded();
        let wake = nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_CLOEXEC)
            .expect("eventfd");
        let reply = SideReply { tx, wake: Arc::new(OwnedFd::from(wake)) };
        let call = SideCall::Extents { offset: 65536, len: (1 << 20) - 65536 + 512, max: 100 };
        run(SideJob { user_data: 9, file: image(file, 1 << 20), call }, reply);
        let done = rx.recv().expect("result");
        assert_eq!(done.user_data, 9);
        let extents = done.result.expect("extents");
        assert_eq!(extents[0], Extent { len: 65536 * 3, hole: true });
        assert_eq!(extents[1], Extent { len: 65536, hole: false });
        assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), (1 << 20) - 65536 + 512);
        assert!(extents[2..].iter().all(|e| e.hole));
    }
}
