//! Runs a tool's future over files: on a ring with direct I/O and many operations in flight, or, where the machine has no io_uring,
//! operation by operation.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::rc::Rc;
use std::sync::Arc;

use formats::error::Error;
use formats::file::{Buf, ImageFile, Pending};
use formats::metadata::Budget;
use formats::tools::layers::BUDGET_BYTES;
use rustix::fs::FallocateFlags;
use shard::api::{CacheMode, FileKind};
use shard::executor::{RingFlavour, probe_ring};
use shard::offline::{self, OfflineError, OfflineFile};

use super::failure::Failure;
use super::file::OpenFile;
use crate::files::FileKey;
use crate::files::device::Device;
use crate::files::image::{direct_units, probe_alignment, punts_direct_io};

/// Runs `work` over these files, in their order.
///
/// # Errors
/// What `work` answers.
pub fn run<T, W, F>(files: &[&OpenFile], work: W) -> Result<T, Failure>
where
    T: 'static,
    F: Future<Output = Result<T, Error>> + 'static,
    W: FnOnce(Vec<Rc<dyn ImageFile>>, Rc<Budget>) -> F,
{
    if probe_ring(RingFlavour::Deferred).is_err() {
        return run_blocking(files, work);
    }
    let opened: Vec<_> = files.iter().map(|file| offline_file(file)).collect::<Result<_, _>>()?;
    let stores: Vec<_> = files
        .iter()
        .map(|file| file.file.try_clone().map_err(|error| Failure::io(&file.path, "duplicate", &error)))
        .collect::<Result<_, _>>()?;
    let answer = offline::run(&opened, |files, budget| {
        let files = files.into_iter().zip(stores);
        let files = files.map(|(file, store)| Rc::new(Sparse { file, store }) as Rc<dyn ImageFile>);
        work(files.collect(), budget)
    });
    answer.map_err(|error| match error {
        OfflineError::Work(error) => error.into(),
        OfflineError::Start(error) => Failure::new(error.to_string()),
    })
}

/// The same, operation by operation, through the page cache.
///
/// # Errors
/// What `work` answers.
pub fn run_blocking<T, W, F>(files: &[&OpenFile], work: W) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Error>>,
    W: FnOnce(Vec<Rc<dyn ImageFile>>, Rc<Budget>) -> F,
{
    let files = files.iter().map(|file| file.blocking().map(|file| file as Rc<dyn ImageFile>));
    let files = files.collect::<Result<_, _>>()?;
    Ok(futures_lite::future::block_on(work(files, Budget::new(BUDGET_BYTES)))?)
}

fn offline_file(file: &OpenFile) -> Result<OfflineFile, Failure> {
    let failed = |error: &std::io::Error| Failure::io(&file.path, "open for I/O", error);
    let stat = file.file.metadata().map_err(|error| failed(&error))?;
    // Of a device the metadata has no length.
    let length = (&file.file).seek(SeekFrom::End(0)).map_err(|error| failed(&error))?;
    let (kind, store) = match file.key {
        FileKey::Block { device } => {
            (FileKind::Block { discard: Device::new(device).takes_discard() }, device)
        }
        FileKey::Regular { .. } => (FileKind::Regular, stat.dev()),
    };
    let direct = if file.buffered { None } else { direct(file, length) };
    let (fd, cache, (offset_align, memory_align)) = match direct {
        Some((direct, units)) => (direct, CacheMode::None, units),
        None => (file.file.try_clone().map_err(|error| failed(&error))?, CacheMode::Writeback, (1, 1)),
    };
    let punts = !file.is_device() && punts_direct_io(&fd);
    let image = shard::api::ImageFile {
        fd: OwnedFd::from(fd),
        tail: None,
        offset_align,
        memory_align,
        cache,
        kind,
        length,
        length_now: length.into(),
        punts,
        store,
    };
    let name = file.path.display().to_string().into();
    Ok(OfflineFile { image: Arc::new(image), name, writable: file.writable })
}

/// A descriptor for direct I/O and its units (offsets, memory); none where the store does not do that.
fn direct(file: &OpenFile, length: u64) -> Option<(File, (u32, u32))> {
    let path = format!("/proc/self/fd/{}", file.file.as_raw_fd());
    let direct =
        File::options().read(true).write(file.writable).custom_flags(libc::O_DIRECT).open(path).ok()?;
    let units = match (direct_units(&direct), file.is_device()) {
        (Some((0, _)), _) => None,
        (Some(units), _) => Some(units),
        (None, true) => rustix::fs::ioctl_blksszget(direct.as_fd()).ok().map(|block| (block, block)),
        (None, false) => probe_alignment(&direct, length),
    };
    let (offset, memory) = units?;
    // The end of a file that is no whole unit cannot be reached.
    let fits = |unit: u32| unit.is_power_of_two() && unit <= 4096;
    let whole = length.is_multiple_of(u64::from(offset.max(512)));
    (whole && fits(offset) && fits(memory.max(1))).then_some((direct, (offset.max(512), memory.max(1))))
}

/// A file that knows the holes of its store; everything else is the ring's.
#[derive(Debug)]
struct Sparse {
    file: Rc<dyn ImageFile>,
    store: File,
}

impl ImageFile for Sparse {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn length(&self) -> u64 {
        self.file.length()
    }

    fn is_device(&self) -> bool {
        self.file.is_device()
    }

    fn is_writable(&self) -> bool {
        self.file.is_writable()
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.file.read(offset, len)
    }

    fn read_lent(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.file.read_lent(offset, len)
    }

    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        self.file.write(offset, data)
    }

    fn flush(&self) -> Pending<'static, ()> {
        self.file.flush()
    }

    fn extend(&self, length: u64) -> Pending<'static, ()> {
        self.file.extend(length)
    }

    fn reserve(&self, range: Range<u64>) -> Pending<'static, bool> {
        let len = range.end.saturating_sub(range.start);
        // A store that has no space left says so to the writes as well.
        let done = !self.file.is_device()
            && rustix::fs::fallocate(&self.store, FallocateFlags::KEEP_SIZE, range.start, len).is_ok();
        Box::pin(std::future::ready(Ok(done)))
    }

    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        self.file.truncate(length)
    }

    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        self.file.zero(range)
    }

    fn data_run(&self, offset: u64) -> Pending<'static, (u64, bool)> {
        let run = match self.file.is_device() {
            true => (u64::MAX, true),
            false => formats::blocking::data_run(&self.store, offset, self.file.length()),
        };
        Box::pin(std::future::ready(Ok(run)))
    }
}
