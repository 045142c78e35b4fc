//! The memory of a client: what is admitted, and accesses by page.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::grants::{Domid, GrantFault, Gref, PAGE_BYTES, Protection};
use crate::memory::{AtomicBytes, MemoryError, SharedRegion, check_sealed};

/// Most memory of one client, unless set otherwise.
pub const CLIENT_BYTES_DEFAULT: u64 = 1 << 30;

/// Why a client's memory is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryRefused {
    /// It could be truncated, is no memfd, or cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The size is none that we take.
    #[error("it has {found} bytes; a multiple of 4096, at least one page and at most {max} bytes, is needed")]
    Size {
        /// Bytes.
        found: u64,
        /// Limit in bytes.
        max: u64,
    },
    /// Some of it has no memory.
    #[error(
        "only {found} of its {expected} bytes have memory; the client must fallocate(2) all of it before it passes it on"
    )]
    Holes {
        /// Bytes that have memory.
        found: u64,
        /// Size.
        expected: u64,
    },
    /// It is on hugetlbfs.
    #[error("it has huge pages, which run out when a client punches holes; use a memfd without MFD_HUGETLB")]
    HugePages,
    /// Pages of the host are not pages of the protocol.
    #[error("the pages of this host have {found} bytes, and 4096 are needed")]
    HostPages {
        /// Bytes.
        found: u64,
    },
    /// The kernel may refuse a page at any time.
    #[error(
        "vm.overcommit_memory is 2 on this host: a hole in shared memory would kill the server; set it to 0 or 1"
    )]
    StrictOvercommit,
    /// The number is taken.
    #[error("domain {domid} is another client")]
    DomainInUse {
        /// Number.
        domid: Domid,
    },
}

/// What a client lets us do with each of its pages; everything at first. Shared with whoever changes it: the client's own code in
/// tests, where it takes the place of a grant table.
#[derive(Debug)]
pub struct Permissions {
    pages: AtomicBytes,
}

const ALL: u8 = 0;
const READ: u8 = 1;
const NONE: u8 = 2;

impl Permissions {
    /// For memory of `pages`.
    ///
    /// # Errors
    /// As of mmap(2).
    pub fn new(pages: u32) -> std::io::Result<Arc<Permissions>> {
        Ok(Arc::new(Permissions { pages: AtomicBytes::new(pages as usize)? }))
    }

    /// Grants a page for reading and writing, for reading, or (`None`) not at all. What is mapped already stays mapped, as on Xen.
    pub fn set(&self, gref: Gref, permission: Option<Protection>) {
        if let Some(page) = self.pages.get(gref as usize) {
            let value = match permission {
                Some(Protection::ReadWrite) => ALL,
                Some(Protection::ReadOnly) => READ,
                None => NONE,
            };
            page.store(value, Ordering::Relaxed);
        }
    }

    fn check(&self, gref: Gref, wanted: Protection) -> Result<(), GrantFault> {
        match (self.pages.get(gref as usize).map_or(NONE, |page| page.load(Ordering::Relaxed)), wanted) {
            (ALL, _) | (READ, Protection::ReadOnly) => Ok(()),
            (READ, Protection::ReadWrite) => Err(GrantFault::Permission),
            _ => Err(GrantFault::BadGref),
        }
    }
}

/// A client's memory that was found fit.
#[derive(Debug)]
pub struct ClientMemory {
    region: SharedRegion,
    file: OwnedFd,
    pages: u32,
    permissions: Option<Arc<Permissions>>,
}

impl ClientMemory {
    /// Looks at a client's memfd and maps it. `bytes_max`: see [`CLIENT_BYTES_DEFAULT`].
    ///
    /// # Errors
    /// [`MemoryRefused`]; the message tells the client's author what to do.
    pub fn admit(file: OwnedFd, bytes_max: u64) -> Result<ClientMemory, MemoryRefused> {
        check_host()?;
        check_sealed(file.as_fd())?;
        let kernel = |what| move |errno: Errno| MemoryError::Kernel { what, errno };
        if fstatfs(&file).map_err(kernel("fstatfs"))?.filesystem_type() == HUGETLBFS_MAGIC {
            return Err(MemoryRefused::HugePages);
        }
        let stat = fstat(&file).map_err(kernel("fstat"))?;
        let (size, allocated) = (stat.st_size as u64, stat.st_blocks as u64 * 512);
        let pages = u32::try_from(size / PAGE_BYTES as u64).unwrap_or(0);
        if pages == 0 || size > bytes_max || !size.is_multiple_of(PAGE_BYTES as u64) {
            return Err(MemoryRefused::Size { found: size, max: bytes_max });
        }
        if allocated < size {
            return Err(MemoryRefused::Holes { found: allocated, expected: size });
        }
        let region = SharedRegion::map(&file, size as usize)?;
        Ok(ClientMemory { region, file, pages, permissions: None })
    }

    /// The same with permissions for each page.
    pub fn with_permissions(self, permissions: Arc<Permissions>) -> ClientMemory {
        ClientMemory { permissions: Some(permissions), ..self }
    }

    /// Number of pages: grefs are smaller than it.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether a page exists and may be accessed so.
    pub(super) fn check(&self, gref: Gref, wanted: Protection) -> Result<(), GrantFault> {
        if gref >= self.pages {
            return Err(GrantFault::BadGref);
        }
        self.permissions.as_ref().map_or(Ok(()), |permissions| permissions.check(gref, wanted))
    }

    pub(super) fn copy_out(&self, gref: Gref, offset: u16, dst: &mut [u8]) -> Result<(), GrantFault> {
        self.region.copy_out(position(gref, offset), dst).map_err(|_| GrantFault::BadRange)
    }

    pub(super) fn copy_in(&self, gref: Gref, offset: u16, src: &[u8]) -> Result<(), GrantFault> {
        self.region.copy_in(position(gref, offset), src).map_err(|_| GrantFault::BadRange)
    }
}

/// Makes memory that [`ClientMemory::admit`] takes: for the client's side.
///
/// # Errors
/// [`MemoryError::Kernel`]: no memory, no descriptors.
pub fn make_client_memory(pages: u32) -> Result<OwnedFd, MemoryError> {
    let kernel = |what| move |errno: Errno| MemoryError::Kernel { what, errno };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create(c"blktapd-client", flags).map_err(kernel("memfd_create"))?;
    let bytes = i64::from(pages) * PAGE_BYTES as i64;
    fallocate(&file, FallocateFlags::empty(), 0, bytes).map_err(kernel("fallocate"))?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).map_err(kernel("fcntl(F_ADD_SEALS)"))?;
    Ok(file)
}

fn position(gref: Gref, offset: u16) -> usize {
    gref as usize * PAGE_BYTES + usize::from(offset)
}

fn check_host() -> Result<(), MemoryRefused> {
    let page_bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    let found = page_bytes.map_or(PAGE_BYTES as u64, |bytes| bytes as u64);
    if found != PAGE_BYTES as u64 {
        return Err(MemoryRefused::HostPages { found });
    }
    let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
    if overcommit.is_ok_and(|mode| mode.trim() == "2") {
        return Err(MemoryRefused::StrictOvercommit);
    }
    Ok(())
}
