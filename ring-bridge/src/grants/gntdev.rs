//! /dev/xen/gntdev: pages that domains grant, mapped or copied.
//!
//! Layouts and numbers are those of Linux's public header xen/gntdev.h (facts: offsets below, checked by a test). The requests are
//! numbered by `_IOC(_IOC_NONE, 'G', nr, size)`: the size of the argument's type is in the number, a direction is not.
//!
//! What the kernel does that shapes this module:
//! * MAP_GRANT_REF only makes a record; the hypervisor maps at mmap(2), all pages of it or none, without telling which was bad;
//! * only a whole record can be unmapped: munmap(2), then UNMAP_GRANT_REF, else the record stays until the descriptor is closed;
//! * the driver walks a list of its records for every map and unmap, and each is a memory area of ours (vm.max_map_count):
//!   many pages per record are much cheaper than many records;
//! * GRANT_COPY gives every segment a status, if it returns 0. If it fails, statuses mean nothing.
//!
//! Invariant: a record exists as long as its [`Pages`].
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::stat::Mode;

use super::pages::Source;
use super::{
    Accounts, CopyStatus, Direction, Domid, GrantCopy, GrantError, GrantFault, Gref, MAP_PAGES_MAX,
    OpenError, PAGE_BYTES, Pages, Protection,
};

const PATH: &str = "/dev/xen/gntdev";
const MODULE: &str = "xen-gntdev";

/// A grant: `{ domid u32 @0, gref u32 @4 }`, 8 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct GrantRef {
    domid: u32,
    gref: u32,
}

/// MAP_GRANT_REF: `{ count u32 @0, pad u32 @4, index u64 @8 (answer), refs @16 }`; the header's type has one element.
#[repr(C)]
#[derive(Debug)]
struct MapGrantRef<const N: usize> {
    count: u32,
    pad: u32,
    index: u64,
    refs: [GrantRef; N],
}

/// UNMAP_GRANT_REF: `{ index u64 @0, count u32 @8, pad u32 @12 }`, 16 bytes.
#[repr(C)]
#[derive(Debug)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

/// Either end of a copy, 8 bytes: an address of ours, or `{ gref u32 @0, offset u16 @4, domid u16 @6 }`.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CopyEnd([u8; 8]);

impl CopyEnd {
    fn local(address: usize) -> CopyEnd {
        CopyEnd((address as u64).to_ne_bytes())
    }

    fn foreign(gref: Gref, offset: u16, domid: Domid) -> CopyEnd {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&gref.to_ne_bytes());
        bytes[4..6].copy_from_slice(&offset.to_ne_bytes());
        bytes[6..].copy_from_slice(&domid.to_ne_bytes());
        CopyEnd(bytes)
    }
}

const SOURCE_GREF: u16 = 1;
const DEST_GREF: u16 = 2;

/// One segment as the kernel takes it, 24 bytes: `{ source @0, dest @8, len u16 @16, flags u16 @18, status i16 @20 }`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct CopySegment {
    source: CopyEnd,
    dest: CopyEnd,
    len: u16,
    flags: u16,
    status: i16,
}

/// GRANT_COPY: `{ count u32 @0, pad u32 @4, segments @8 }`, 16 bytes.
#[repr(C)]
#[derive(Debug)]
struct CopyCall {
    count: u32,
    pad: u32,
    segments: *mut CopySegment,
}

/// `_IOC(_IOC_NONE, 'G', nr, size_of::<T>())`.
const fn request<T>(nr: u32) -> libc::Ioctl {
    (((size_of::<T>() as u32) << 16) | ((b'G' as u32) << 8) | nr) as libc::Ioctl
}

const MAP_GRANT_REF: libc::Ioctl = request::<MapGrantRef<1>>(0);
const UNMAP_GRANT_REF: libc::Ioctl = request::<UnmapGrantRef>(1);
const GRANT_COPY: libc::Ioctl = request::<CopyCall>(8);

/// The open device.
#[derive(Debug)]
pub struct GntDev {
    file: OwnedFd,
}

impl GntDev {
    /// Opens /dev/xen/gntdev.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open() -> Result<GntDev, OpenError> {
        let file = open(PATH, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|errno| OpenError::here(PATH, MODULE, errno))?;
        Ok(GntDev { file })
    }

    /// Maps `grefs` (1 to [`MAP_PAGES_MAX`], checked by the caller) in one piece.
    pub(super) fn map(
        self: &Arc<GntDev>,
        domid: Domid,
        grefs: &[Gref],
        protection: Protection,
        accounts: &Arc<Accounts>,
    ) -> Result<Pages, GrantError> {
        let count = grefs.len();
        let refused = |errno| {
            accounts.map_failures.add(1);
            GrantError::Map { domid, first: grefs.first().copied().unwrap_or(0), count, errno }
        };
        let index = self.record(domid, grefs).map_err(refused)?;
        let writable = match protection {
            Protection::ReadOnly => ProtFlags::empty(),
            Protection::ReadWrite => ProtFlags::PROT_WRITE,
        };
        let bytes = NonZeroUsize::new(count * PAGE_BYTES).ok_or_else(|| refused(Errno::EINVAL))?;
        let flags = MapFlags::MAP_SHARED;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { mmap(None, bytes, ProtFlags::PROT_READ | writable, flags, &self.file, index as i64) };
        match start {
            Ok(start) => {
                let source = Source::Grants { device: self.clone(), index };
                // SAFETY: the mapping was made just now with this protection and size and is known to nobody else; Xen keeps
                // granted pages as long as they are mapped, so an access cannot fault.
                unsafe { Pages::from_mapping(start.cast(), count, protection, source, accounts.clone()) }
                    .map_err(|_| refused(Errno::EINVAL))
            }
            Err(errno) => {
                // Without this the record would stay until the device is closed.
                if self.forget(index, count).is_err() {
                    accounts.unmap_failures.add(1);
                }
                Err(refused(errno))
            }
        }
    }

    /// Makes a record of grants; it is to be mapped at the file offset that is returned.
    fn record(&self, domid: Domid, grefs: &[Gref]) -> Result<u64, Errno> {
        let mut refs = [GrantRef::default(); MAP_PAGES_MAX];
        if grefs.len() > MAP_PAGES_MAX {
            return Err(Errno::EINVAL);
        }
        for (to, &gref) in refs.iter_mut().zip(grefs) {
            *to = GrantRef { domid: domid.into(), gref };
        }
        let mut call = MapGrantRef { count: grefs.len() as u32, pad: 0, index: 0, refs };
        // SAFETY: MAP_GRANT_REF reads the head and `count` elements, and writes the head; `call` has MAP_PAGES_MAX of them, which is
        // not less (checked above), and is ours alone during the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), MAP_GRANT_REF, &raw mut call) };
        Errno::result(result)?;
        Ok(call.index)
    }

    /// Lets the kernel forget a record that is mapped no more.
    pub(super) fn forget(&self, index: u64, count: usize) -> Result<(), Errno> {
        let mut call = UnmapGrantRef { index, count: count as u32, pad: 0 };
        // SAFETY: UNMAP_GRANT_REF reads this structure, which is ours alone during the call. It touches no memory of the process: a
        // record that is still mapped stays until munmap.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), UNMAP_GRANT_REF, &raw mut call) };
        Errno::result(result).map(drop)
    }

    /// One call of GRANT_COPY. An error means that the statuses say nothing.
    fn submit(&self, segments: &mut [CopySegment]) -> Result<(), Errno> {
        let mut call = CopyCall { count: segments.len() as u32, pad: 0, segments: segments.as_mut_ptr() };
        // SAFETY: GRANT_COPY reads `count` segments, writes their statuses, and copies between granted pages and the local ranges in
        // the segments. These are those of `GrantCopy` values, whose maker promised that each is `len` bytes of memory that only
        // this call accesses, writable where the kernel writes.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), GRANT_COPY, &raw mut call) };
        Errno::result(result).map(drop)
    }
}

/// Copies all of `batch`, by one call unless the kernel refuses the batch as a whole. `segments` is scratch space.
pub(super) fn copy(
    device: &GntDev,
    segments: &mut Vec<CopySegment>,
    batch: &mut [GrantCopy],
    accounts: &Accounts,
) {
    copy_by(segments, batch, accounts, |segments| device.submit(segments));
}

/// As [`copy`], with the call as an argument.
fn copy_by(
    segments: &mut Vec<CopySegment>,
    batch: &mut [GrantCopy],
    accounts: &Accounts,
    mut submit: impl FnMut(&mut [CopySegment]) -> Result<(), Errno>,
) {
    segments.clear();
    for copy in batch.iter_mut() {
        if copy.is_in_page() {
            copy.status = CopyStatus::Pending;
            segments.push(segment(copy));
        } else {
            // The kernel would refuse the whole batch for it.
            copy.status = CopyStatus::Failed(GrantFault::BadRange);
        }
    }
    let mut calls = 0;
    if !segments.is_empty() {
        calls += 1;
        let together = submit(segments);
        if together.is_err() {
            // Something about one of them (its local memory, say) made the kernel give up in the middle. A copy can be done again;
            // each alone says which one it was.
            for one in segments.iter_mut() {
                calls += 1;
                if submit(std::slice::from_mut(one)).is_err() {
                    one.status = -1;
                }
            }
        }
    }
    accounts.copy_calls.add(calls);
    settle(segments, batch, accounts);
}

/// Gives every segment that was submitted its status.
fn settle(segments: &[CopySegment], batch: &mut [GrantCopy], accounts: &Accounts) {
    let (mut bytes, mut failures, mut split) = (0, 0, 0);
    let mut answers = segments.iter();
    for copy in batch.iter_mut() {
        if copy.status == CopyStatus::Pending {
            // A status that nobody gave is a failure.
            let status = answers.next().map_or(-1, |answer| answer.status);
            copy.status = match GrantFault::from_status(status) {
                None => CopyStatus::Done,
                Some(fault) => CopyStatus::Failed(fault),
            };
        }
        match copy.status {
            CopyStatus::Done => bytes += usize::from(copy.len),
            _ => failures += 1,
        }
        split += usize::from(copy.is_split());
    }
    accounts.copy_segments.add(batch.len());
    accounts.copy_segments_split.add(split);
    accounts.copy_failures.add(failures);
    accounts.copy_bytes.add(bytes);
}

fn segment(copy: &GrantCopy) -> CopySegment {
    let local = CopyEnd::local(copy.local.as_ptr().expose_provenance());
    let foreign = CopyEnd::foreign(copy.gref, copy.offset, copy.domid);
    let (source, dest, flags) = match copy.direction {
        Direction::FromDomain => (foreign, local, SOURCE_GREF),
        Direction::ToDomain => (local, foreign, DEST_GREF),
    };
    // A status that the kernel does not write must not read as success.
    CopySegment { source, dest, len: copy.len, flags, status: -1 }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;
    use std::ptr::NonNull;

    use super::*;

    // Goal: what we pass is what the kernel's header describes, on every 64-bit architecture.
    // Method: sizes, offsets and request numbers, which were computed by compiling the header, compared with our types.
    #[test]
    fn layouts_and_numbers_are_the_kernels() {
        assert_eq!(MAP_GRANT_REF, 0x18_4700);
        assert_eq!(UNMAP_GRANT_REF, 0x10_4701);
        assert_eq!(GRANT_COPY, 0x10_4708);
        assert_eq!(size_of::<GrantRef>(), 8);
        assert_eq!((offset_of!(GrantRef, domid), offset_of!(GrantRef, gref)), (0, 4));
        type Map = MapGrantRef<{ MAP_PAGES_MAX }>;
        assert_eq!(size_of::<MapGrantRef<1>>(), 24);
        assert_eq!(size_of::<Map>(), 16 + 8 * MAP_PAGES_MAX);
        assert_eq!((offset_of!(Map, count), offset_of!(Map, index), offset_of!(Map, refs)), (0, 8, 16));
        assert_eq!(size_of::<UnmapGrantRef>(), 16);
        assert_eq!((offset_of!(UnmapGrantRef, index), offset_of!(UnmapGrantRef, count)), (0, 8));
        assert_eq!((size_of::<CopySegment>(), align_of::<CopySegment>()), (24, 8));
        assert_eq!((offset_of!(CopySegment, source), offset_of!(CopySegment, dest)), (0, 8));
        assert_eq!((offset_of!(CopySegment, len), offset_of!(CopySegment, flags)), (16, 18));
        assert_eq!(offset_of!(CopySegment, status), 20);
        assert_eq!((size_of::<CopyCall>(), offset_of!(CopyCall, segments)), (16, 8));
        let foreign = CopyEnd::foreign(0x0403_0201, 0x0605, 0x0807);
        if cfg!(target_endian = "little") {
            assert_eq!(foreign.0, [1, 2, 3, 4, 5, 6, 7, 8]);
        }
    }

    fn batch(memory: &mut [u8], ranges: &[(u16, u16)]) -> Vec<GrantCopy> {
        let local = NonNull::new(memory.as_mut_ptr()).expect("a slice");
        let one = |(gref, &(offset, len)): (usize, &(u16, u16))| {
            // SAFETY: the fake kernels of these tests never touch the memory.
            unsafe { GrantCopy::new(1, gref as Gref, offset, len, Direction::ToDomain, local) }
        };
        ranges.iter().enumerate().map(one).collect()
    }

    // Goal: XSA-361, 362, 365, 367: every status counts, and one failure neither hides nor makes another.
    // Method: a kernel that gives each segment another status, among them unknown and positive ones.
    #[test]
    fn xsa_362_each_segment_has_its_own_status() {
        let statuses = [0, -1, 0, -2, -3, 5, -8, 0, -13, -99];
        let accounts = Accounts::default();
        let mut memory = [0; 8];
        let mut batch = batch(&mut memory, &[(0, 8); 10]);
        copy_by(&mut Vec::new(), &mut batch, &accounts, |segments| {
            segments.iter_mut().zip(statuses).for_each(|(segment, status)| segment.status = status);
            Ok(())
        });
        for (copy, status) in batch.iter().zip(statuses) {
            let expected = GrantFault::from_status(status).map_or(CopyStatus::Done, CopyStatus::Failed);
            assert_eq!(copy.status(), expected, "status {status}");
        }
        let counts = accounts.counts();
        assert_eq!((counts.copy_calls, counts.copy_segments, counts.copy_failures), (1, 10, 7));
        assert_eq!(counts.copy_bytes, 24);
    }

    // Goal: a segment that makes the kernel refuse the whole call costs only itself.
    // Method: a kernel that fails a call with gref 3 in it, after having written nonsense statuses.
    #[test]
    fn xsa_367_a_refused_call_is_taken_apart() {
        let accounts = Accounts::default();
        let mut memory = [0; 8];
        let mut batch = batch(&mut memory, &[(0, 8); 5]);
        let poison = CopyEnd::foreign(3, 0, 1);
        copy_by(&mut Vec::new(), &mut batch, &accounts, |segments| {
            segments.iter_mut().for_each(|segment| segment.status = 0);
            if segments.iter().any(|segment| segment.dest == poison) { Err(Errno::EFAULT) } else { Ok(()) }
        });
        for (gref, copy) in batch.iter().enumerate() {
            let bad = CopyStatus::Failed(GrantFault::General);
            assert_eq!(copy.status(), if gref == 3 { bad } else { CopyStatus::Done });
        }
        assert_eq!(accounts.counts().copy_calls, 6);
    }

    // Goal: a range outside of its page fails alone and never reaches the kernel; a kernel that answers nothing is no success.
    // Method: good and bad ranges in one batch; then a kernel that leaves the statuses alone.
    #[test]
    fn xsa_361_bad_ranges_and_silent_kernels_are_failures() {
        let accounts = Accounts::default();
        let mut memory = [0; 8];
        let ranges = [(0, 8), (4095, 2), (0, 0), (4088, 8), (u16::MAX, u16::MAX), (0, 4097)];
        let mut first = batch(&mut memory, &ranges);
        copy_by(&mut Vec::new(), &mut first, &accounts, |segments| {
            assert_eq!(segments.len(), 2);
            segments.iter_mut().for_each(|segment| segment.status = 0);
            Ok(())
        });
        let done: Vec<bool> = first.iter().map(|copy| copy.status() == CopyStatus::Done).collect();
        assert_eq!(done, [true, false, false, true, false, false]);
        let mut second = batch(&mut memory, &[(0, 8); 3]);
        copy_by(&mut Vec::new(), &mut second, &accounts, |_| Ok(()));
        assert!(second.iter().all(|copy| copy.status() == CopyStatus::Failed(GrantFault::General)));
    }

    // Goal: an operator reads in one sentence what is missing.
    // Method: every class of reason, with and without Xen.
    #[test]
    fn open_errors_say_what_to_do() {
        let explain = |errno, xen| OpenError::explain(PATH, MODULE, errno, xen).to_string();
        assert!(explain(Errno::ENOENT, None).contains("does not run under Xen"));
        assert!(explain(Errno::ENOENT, Some("kvm\n")).contains("does not run under Xen"));
        assert!(explain(Errno::ENODEV, Some("xen\n")).contains("modprobe xen-gntdev"));
        assert!(explain(Errno::EACCES, Some("xen\n")).contains("udev rule"));
        assert!(explain(Errno::EMFILE, Some("xen\n")).contains("LimitNOFILE"));
        assert!(explain(Errno::EIO, Some("xen\n")).contains("EIO"));
    }
}
