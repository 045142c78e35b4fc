//! What a format driver and the futures of a volume see of a shard: files, and the memory of a request. They put operations into
//! a [`Port`]; the reactor takes them out after each poll, runs them as requests of the file (`reactor::volume`), and answers.
//!
//! Everything here is of one thread. An operation is in the port's queue when its future is made, and goes on when that is
//! dropped: its memory belongs to the reactor.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Wake, Waker};

use formats::error::Error;
use formats::file::{Buf, ImageFile, Pending};
use formats::volume::{FileId, Payload};

use crate::request::{PIECE, ReqKey};

/// One operation that a future has asked for.
#[derive(Debug)]
pub(crate) struct Job {
    /// Slot of the file's disk in the reactor; unused by the operations on memory only.
    pub file: u32,
    /// Whom to answer.
    pub reply: usize,
    pub work: Work,
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Work {
    /// Read this many bytes, at most [`PIECE`]. `lend`: into memory of the shard's, which is soon given up.
    Read { offset: u64, len: u32, lend: bool },
    /// Write, at most [`PIECE`] bytes.
    Write { offset: u64, data: Buf },
    /// Read into the payload of a request.
    ReadPayload { req: ReqKey, at: u32, offset: u64, len: u32 },
    /// Write from the payload of a request.
    WritePayload { req: ReqKey, at: u32, offset: u64, len: u32 },
    /// fdatasync.
    Flush,
    /// Zeroes, with holes where the store has them.
    Zero { offset: u64, len: u64 },
    /// Makes the file at least this long.
    Extend { length: u64 },
    /// Cuts the file to this length.
    Truncate { length: u64 },
    /// Bytes of a payload.
    Get { req: ReqKey, at: u32, len: u32 },
    /// Bytes for a payload.
    Put { req: ReqKey, at: u32, bytes: Buf },
    /// Zeroes for a payload.
    ZeroPayload { req: ReqKey, at: u32, len: u32 },
}

#[derive(Debug, Default)]
struct Reply {
    result: Option<Result<Buf, i32>>,
    waker: Option<Waker>,
    /// Nobody waits any more.
    dropped: bool,
}

/// Operations on their way from the futures of a volume to the reactor, and answers on their way back.
#[derive(Debug, Default)]
pub(crate) struct Port {
    jobs: RefCell<Vec<Job>>,
    replies: RefCell<slab::Slab<Reply>>,
}

/// Ends the interest in an answer.
struct Interest {
    port: Rc<Port>,
    key: usize,
}

impl Drop for Interest {
    fn drop(&mut self) {
        let mut replies = self.port.replies.borrow_mut();
        if let Some(reply) = replies.get_mut(self.key) {
            if reply.result.is_some() {
                replies.remove(self.key);
            } else {
                reply.dropped = true;
            }
        }
    }
}

impl Port {
    /// Queues an operation now; the future is its answer.
    fn start(self: &Rc<Port>, file: u32, work: Work) -> impl Future<Output = Result<Buf, i32>> + use<> {
        let key = self.replies.borrow_mut().insert(Reply::default());
        self.jobs.borrow_mut().push(Job { file, reply: key, work });
        let interest = Interest { port: self.clone(), key };
        async move {
            std::future::poll_fn(|context| {
                let mut replies = interest.port.replies.borrow_mut();
                let Some(reply) = replies.get_mut(interest.key) else { return Poll::Ready(Err(libc::EIO)) };
                match reply.result.take() {
                    Some(result) => {
                        replies.remove(interest.key);
                        Poll::Ready(result)
                    }
                    None => {
                        reply.waker = Some(context.waker().clone());
                        Poll::Pending
                    }
                }
            })
            .await
        }
    }

    /// The next operation that was asked for.
    pub(crate) fn take(&self) -> Vec<Job> {
        std::mem::take(&mut self.jobs.borrow_mut())
    }

    /// Answers an operation: bytes of a read, nothing otherwise, or an errno.
    pub(crate) fn answer(&self, key: usize, result: Result<Buf, i32>) {
        let mut replies = self.replies.borrow_mut();
        let Some(reply) = replies.get_mut(key) else { return };
        if reply.dropped {
            replies.remove(key);
            return;
        }
        reply.result = Some(result);
        let waker = reply.waker.take();
        drop(replies);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Tells the reactor which future of a volume can go on.
#[derive(Debug)]
pub(crate) struct TaskWaker {
    pub ready: Arc<std::sync::Mutex<Vec<usize>>>,
    pub task: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Always on the shard's thread, so nobody else holds it; a mutex because `Waker` must be `Send`.
        let mut ready = self.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !ready.contains(&self.task) {
            ready.push(self.task);
        }
    }
}

/// A file of an image on a shard.
#[derive(Debug)]
pub(crate) struct ShardFile {
    pub port: Rc<Port>,
    /// Slot of its disk in the reactor.
    pub slot: u32,
    pub name: Arc<str>,
    /// Its length, where it is kept for whoever opens the image next.
    pub image: Arc<crate::api::ImageFile>,
    pub device: bool,
    pub writable: bool,
    /// Alignment of memory that the store wants, bytes.
    pub memory_align: u32,
}

impl ShardFile {
    fn failed<T: 'static>(&self, what: String, errno: i32) -> Pending<'static, T> {
        let error = Error::io(&self.name, what, errno);
        Box::pin(std::future::ready(Err(error)))
    }

    /// Reads piece by piece, all at once.
    fn read_to(&self, offset: u64, len: usize, lend: bool) -> Pending<'static, Buf> {
        let what = format!("read of {len} bytes at {offset}");
        let pieces: Vec<_> = (0..len)
            .step_by(PIECE as usize)
            .map(|at| {
                let part = (len - at).min(PIECE as usize) as u32;
                self.port.start(self.slot, Work::Read { offset: offset + at as u64, len: part, lend })
            })
            .collect();
        let name = self.name.clone();
        Box::pin(async move {
            let whole = pieces.len() == 1;
            let mut bytes = Buf::zeroed(if whole { 0 } else { len });
            let mut at = 0;
            for piece in pieces {
                let part = piece.await.map_err(|errno| Error::io(&name, &what, errno))?;
                if whole {
                    return Ok(part);
                }
                bytes[at..at + part.len()].copy_from_slice(&part);
                at += part.len();
            }
            Ok(bytes)
        })
    }

    /// Runs one operation whose answer carries nothing.
    fn run(&self, work: Work, what: String) -> Pending<'static, ()> {
        let answer = self.port.start(self.slot, work);
        let name = self.name.clone();
        Box::pin(async move { answer.await.map(drop).map_err(|errno| Error::io(&name, what, errno)) })
    }
}

impl ImageFile for ShardFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.image.length_now.load(Ordering::Relaxed)
    }

    fn is_device(&self) -> bool {
        self.device
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.read_to(offset, len, false)
    }

    fn read_lent(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.read_to(offset, len, true)
    }

    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        let len = data.len();
        let what = format!("write of {len} bytes at {offset}");
        if !self.writable {
            return self.failed(what, libc::EROFS);
        }
        let end = offset + len as u64;
        let pieces: Vec<_> = if len <= PIECE as usize {
            vec![self.port.start(self.slot, Work::Write { offset, data })]
        } else {
            let parts = data.chunks(PIECE as usize).enumerate();
            parts
                .map(|(number, part)| {
                    let offset = offset + number as u64 * u64::from(PIECE);
                    self.port.start(self.slot, Work::Write { offset, data: Buf::copy_of(part) })
                })
                .collect()
        };
        let (name, image) = (self.name.clone(), self.image.clone());
        Box::pin(async move {
            let mut result = Ok(());
            for piece in pieces {
                result = result.and(piece.await.map(drop));
            }
            result.map_err(|errno| Error::io(&name, what, errno))?;
            image.length_now.fetch_max(end, Ordering::Relaxed);
            Ok(())
        })
    }

    fn flush(&self) -> Pending<'static, ()> {
        self.run(Work::Flush, "fdatasync".to_owned())
    }

    fn extend(&self, length: u64) -> Pending<'static, ()> {
        if length <= self.length() {
            return Box::pin(std::future::ready(Ok(())));
        }
        let what = format!("growing from {} to {length} bytes", self.length());
        if self.device || !self.writable {
            return self.failed(what, if self.device { libc::ENOSPC } else { libc::EROFS });
        }
        let done = self.run(Work::Extend { length }, what);
        let image = self.image.clone();
        Box::pin(async move {
            done.await?;
            image.length_now.fetch_max(length, Ordering::Relaxed);
            Ok(())
        })
    }

    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        if self.device {
            return Box::pin(std::future::ready(Ok(())));
        }
        let what = format!("cutting from {} to {length} bytes", self.length());
        if !self.writable {
            return self.failed(what, libc::EROFS);
        }
        let done = self.run(Work::Truncate { length }, what);
        let image = self.image.clone();
        Box::pin(async move {
            done.await?;
            image.length_now.store(length, Ordering::Relaxed);
            Ok(())
        })
    }

    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        let (offset, len) = (range.start, range.end.saturating_sub(range.start));
        let what = format!("zeroing {len} bytes at {offset}");
        if len == 0 {
            return Box::pin(std::future::ready(Ok(())));
        }
        if !self.writable {
            return self.failed(what, libc::EROFS);
        }
        self.run(Work::Zero { offset, len }, what)
    }
}

/// The payload of a request, for the futures of its volume.
pub(crate) struct ShardPayload {
    pub port: Rc<Port>,
    pub req: ReqKey,
    /// `[layer][file]`, as in the volume.
    pub files: Rc<Vec<Vec<Rc<ShardFile>>>>,
}

impl ShardPayload {
    fn file(&self, id: FileId) -> Option<&Rc<ShardFile>> {
        self.files.get(usize::from(id.layer))?.get(usize::from(id.file.0))
    }
}

fn no_file<'a, T: 'a>() -> Pending<'a, T> {
    Box::pin(std::future::ready(Err(Error::invalid("a driver named a file that it does not have"))))
}

impl Payload for ShardPayload {
    fn read(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()> {
        let Some(file) = self.file(file) else { return no_file() };
        if !at.is_multiple_of(file.memory_align as usize) {
            let read = file.read(offset, len);
            return Box::pin(async move {
                self.put(at, read.await?);
                Ok(())
            });
        }
        let what = format!("read of {len} bytes at {offset}");
        let work = Work::ReadPayload { req: self.req, at: at as u32, offset, len: len as u32 };
        file.run(work, what)
    }

    fn write(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()> {
        let Some(file) = self.file(file) else { return no_file() };
        let file = file.clone();
        let end = offset + len as u64;
        if !at.is_multiple_of(file.memory_align as usize) {
            return Box::pin(async move { file.write(offset, self.get(at, len).await?).await });
        }
        let what = format!("write of {len} bytes at {offset}");
        if !file.writable {
            return file.failed(what, libc::EROFS);
        }
        let work = Work::WritePayload { req: self.req, at: at as u32, offset, len: len as u32 };
        let done = file.run(work, what);
        Box::pin(async move {
            done.await?;
            file.image.length_now.fetch_max(end, Ordering::Relaxed);
            Ok(())
        })
    }

    fn put(&self, at: usize, bytes: Buf) {
        let work = Work::Put { req: self.req, at: at as u32, bytes };
        drop(self.port.start(u32::MAX, work));
    }

    fn get(&self, at: usize, len: usize) -> Pending<'_, Buf> {
        let work = Work::Get { req: self.req, at: at as u32, len: len as u32 };
        let answer = self.port.start(u32::MAX, work);
        Box::pin(async move {
            answer.await.map_err(|errno| Error::io("the request", "reading its payload", errno))
        })
    }

    fn zero(&self, at: usize, len: usize) {
        let work = Work::ZeroPayload { req: self.req, at: at as u32, len: len as u32 };
        drop(self.port.start(u32::MAX, work));
    }
}
