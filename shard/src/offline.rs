//! A shard without clients, on the caller's thread: the offline tools work with image files through the same storage ring,
//! read-modify-write and group commit as the daemon, with many operations in flight.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use crossbeam::channel::unbounded;
use formats::error::Error;
use formats::file::{ImageFile as FormatFile, Pending};
use formats::metadata::Budget;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::api::ImageFile;
use crate::executor::{RingFlavour, StartError, probe_ring};
use crate::reactor::{EventSink, Shard, ShardParts};
use crate::stats::ShardCounters;
use crate::storage::pool::Pool;
use crate::storage::uring::Uring;

/// Bytes of I/O buffers.
const BUFFER_BYTES: usize = 64 << 20;
/// Bytes of tables of images.
const TABLE_BYTES: usize = 64 << 20;

/// A file to work on, opened and locked by the caller.
#[derive(Debug, Clone)]
pub struct OfflineFile {
    /// The file; without a `tail` descriptor.
    pub image: Arc<ImageFile>,
    /// Its path, for messages.
    pub name: Arc<str>,
    /// It may be changed.
    pub writable: bool,
}

/// Why nothing could be run.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// The machine lacks something.
    #[error("{0}")]
    Start(#[from] StartError),
    /// The work failed.
    #[error("{0}")]
    Work(#[from] Error),
}

fn failed(error: impl std::fmt::Display) -> StartError {
    StartError(format!("cannot prepare for I/O: {error}"))
}

/// Runs a future over `files`, in the same order, and returns when it has ended; I/O that it dropped is waited for.
///
/// # Errors
/// io_uring does not work here, or what the future answers.
pub fn run<T, F, W>(files: &[OfflineFile], work: W) -> Result<T, OfflineError>
where
    T: 'static,
    F: Future<Output = Result<T, Error>> + 'static,
    W: FnOnce(Vec<Rc<dyn FormatFile>>, Rc<Budget>) -> F,
{
    let flavour = probe_ring(RingFlavour::Deferred)?;
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let eventfd = || EventFd::from_flags(flags).map(|fd| Arc::new(OwnedFd::from(fd))).map_err(failed);
    let (inbox_wake, wake) = (eventfd()?, eventfd()?);
    let (_commands, inbox) = unbounded();
    let (tx, events) = unbounded();
    let pool = Pool::new(BUFFER_BYTES, BUFFER_BYTES * 3).map_err(failed)?;
    pool.use_large_pages();
    let mut shard = Shard::new(ShardParts {
        kernel: Uring::new(flavour, inbox_wake.clone()).map_err(failed)?,
        pool,
        inbox,
        inbox_wake,
        events: EventSink { tx, wake, shard: 0 },
        counters: Arc::new(ShardCounters::default()),
        table_budget_bytes: TABLE_BYTES,
        fault_commands: false,
    });
    let result: Rc<RefCell<Option<Result<T, Error>>>> = Rc::default();
    let place = result.clone();
    let task = move |files, budget| -> Pending<'static, ()> {
        let work = work(files, budget);
        Box::pin(async move {
            *place.borrow_mut() = Some(work.await);
            Ok(())
        })
    };
    shard.start_tool(files, task);
    while shard.tool_runs() {
        shard.turn().map_err(failed)?;
        // What it would tell an operator is in the errors of the files, too.
        while events.try_recv().is_ok() {}
    }
    let result = result.borrow_mut().take();
    Ok(result.unwrap_or_else(|| Err(Error::invalid("the work ended without a result; report it")))?)
}

#[cfg(test)]
mod tests {
    //! Goal: what a future writes to a file is in it, at any offset, with many operations in flight, also those that it does not
    //! wait for. Method: a temporary file with and without O_DIRECT.

    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use super::*;
    use crate::api::{CacheMode, FileKind};
    use formats::file::Buf;

    fn file(dir: &tempfile::TempDir, direct: bool) -> (std::fs::File, OfflineFile) {
        let path = dir.path().join("image");
        let mut options = std::fs::File::options();
        options.read(true).write(true).create(true);
        let plain = options.open(&path).unwrap();
        plain.set_len(1 << 20).unwrap();
        let fd = options.custom_flags(if direct { libc::O_DIRECT } else { 0 }).open(&path).unwrap().into();
        let image = ImageFile {
            fd,
            tail: None,
            offset_align: if direct { 4096 } else { 1 },
            memory_align: if direct { 4096 } else { 1 },
            cache: if direct { CacheMode::None } else { CacheMode::Writeback },
            kind: FileKind::Regular,
            length: 1 << 20,
            length_now: (1 << 20).into(),
            punts: false,
            store: 1,
        };
        let name = path.display().to_string().into();
        (plain, OfflineFile { image: Arc::new(image), name, writable: true })
    }

    #[test]
    fn what_a_future_writes_is_in_the_file() {
        // O_DIRECT needs a file system that has it.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for direct in [true, false] {
            let (plain, file) = file(&dir, direct);
            let answer = run(&[file], |files, _| async move {
                let file = files[0].clone();
                // Neighbouring pieces of the same blocks, all at once.
                let writes: Vec<_> =
                    (0..500u64).map(|n| file.write(n * 700, Buf::copy_of(&[n as u8 | 1; 700]))).collect();
                for write in writes {
                    write.await?;
                }
                file.extend(3 << 20).await?;
                drop(file.write(2 << 20, Buf::copy_of(&[9; 5000])));
                file.flush().await?;
                let back = file.read(699, 2).await?;
                Ok((back[0], back[1], file.length()))
            });
            assert_eq!(answer.unwrap(), (1, 1, 3 << 20));
            let mut bytes = vec![0; 700];
            for n in 0..500u64 {
                plain.read_exact_at(&mut bytes, n * 700).unwrap();
                assert!(bytes.iter().all(|byte| *byte == n as u8 | 1), "{n}");
            }
            plain.read_exact_at(&mut bytes, 2 << 20).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 9), "nobody waited for it, and it was done");
            assert_eq!(plain.metadata().unwrap().len(), 3 << 20);
        }
    }

    #[test]
    fn an_error_is_the_answer_and_a_panic_ends_nothing_else() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (_, mut file) = file(&dir, false);
        file.writable = false;
        let answer =
            run(&[file.clone()], |files, _| async move { files[0].write(0, Buf::zeroed(512)).await });
        let message = answer.unwrap_err().to_string();
        assert!(message.contains("image") && message.contains("512 bytes at 0"), "{message}");
        let answer = run(&[file], |_, _| async move { panic!("boom") as Result<(), Error> });
        assert!(answer.is_err());
    }
}
