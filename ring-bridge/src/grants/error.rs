//! What can go wrong with grants and event channels, and what to tell the operator.

use nix::errno::Errno;

use super::{Domid, Gref, Port};

/// Why the hypervisor refused one operation on a grant: the GNTST_* numbers of Xen's public header grant_table.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrantFault {
    /// GNTST_general_error, -1; also when the kernel could not tell why.
    #[error("undefined error")]
    General,
    /// GNTST_bad_domain, -2.
    #[error("no such domain")]
    BadDomain,
    /// GNTST_bad_gntref, -3.
    #[error("not a valid grant")]
    BadGref,
    /// GNTST_permission_denied, -8.
    #[error("not granted for this access")]
    Permission,
    /// GNTST_bad_page, -9.
    #[error("the page cannot be shared")]
    BadPage,
    /// GNTST_bad_copy_arg, -10.
    #[error("the range is not inside a page")]
    BadRange,
    /// GNTST_no_device_space or GNTST_no_space, -7 and -13.
    #[error("no space in the hypervisor's tables")]
    NoSpace,
    /// Any other number.
    #[error("status {0}")]
    Other(i16),
}

impl GrantFault {
    /// From a status of the hypervisor; `None` for GNTST_okay.
    pub fn from_status(status: i16) -> Option<GrantFault> {
        match status {
            0 => None,
            -1 => Some(GrantFault::General),
            -2 => Some(GrantFault::BadDomain),
            -3 => Some(GrantFault::BadGref),
            -7 | -13 => Some(GrantFault::NoSpace),
            -8 => Some(GrantFault::Permission),
            -9 => Some(GrantFault::BadPage),
            -10 => Some(GrantFault::BadRange),
            other => Some(GrantFault::Other(other)),
        }
    }
}

/// Why an operation on domains' memory or ports failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// No page, or too many.
    #[error("{found} grants cannot be mapped in one piece; 1 to {max} can")]
    PageCount {
        /// Number of grefs.
        found: usize,
        /// Most that there may be.
        max: usize,
    },
    /// A mapping was refused; which of its grefs is to blame is not known on Xen.
    #[error("cannot map {count} page(s) of domain {domid}, gref {first} and following: {errno}{}", map_hint(*.errno))]
    Map {
        /// Whose pages.
        domid: Domid,
        /// The first gref, or the bad one where it is known.
        first: Gref,
        /// Number of pages.
        count: usize,
        /// The kernel's reason; EINVAL for a gref that is none.
        errno: Errno,
    },
    /// A port could not be bound.
    #[error("cannot bind event channel {remote} of domain {domid}: {errno}{}", bind_hint(*.errno))]
    Bind {
        /// Whose port.
        domid: Domid,
        /// Its number there.
        remote: Port,
        /// The kernel's reason.
        errno: Errno,
    },
    /// A client's memory was refused.
    #[error("client memory refused: {0}")]
    Memory(#[from] super::memfd::MemoryRefused),
    /// The kernel refused something that has nothing to do with a domain.
    #[error("{what}: {errno}")]
    Kernel {
        /// The call.
        what: &'static str,
        /// Its error.
        errno: Errno,
    },
}

impl GrantError {
    pub(super) fn kernel(what: &'static str) -> impl FnOnce(Errno) -> GrantError {
        move |errno| GrantError::Kernel { what, errno }
    }
}

fn map_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::EINVAL | Errno::EFAULT => {
            " (the domain has not granted all of them, or not for writing; or Xen has no handles left, see gnttab_max_maptrack_frames)"
        }
        Errno::ENOMEM => {
            " (out of mappings: lower the budget of persistent grants, or raise vm.max_map_count and Xen's gnttab_max_maptrack_frames)"
        }
        _ => "",
    }
}

fn bind_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::EINVAL => " (it is not offered to this domain, or another backend has bound it)",
        Errno::ENOSPC => {
            " (no ports left: boot Xen without event_channels limits and Linux with FIFO event channels)"
        }
        Errno::ESRCH => " (there is no such domain)",
        _ => "",
    }
}

/// Why a device of Xen cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenErrorKind {
    /// This machine does not run under Xen.
    NoXen,
    /// It does, but the kernel has no such driver loaded.
    NoModule,
    /// We may not.
    NoPermission,
    /// Anything else.
    Other,
}

/// A device of Xen cannot be opened; the message says why and what to do in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot open {path}: {}", self.advice())]
pub struct OpenError {
    /// Class of the reason.
    pub kind: OpenErrorKind,
    /// The device.
    pub path: &'static str,
    /// The module that provides it.
    pub module: &'static str,
    /// The kernel's reason.
    pub errno: Errno,
}

impl OpenError {
    /// Explains `errno`, with what /sys/hypervisor/type has (`None`: it is not there).
    pub(super) fn explain(
        path: &'static str,
        module: &'static str,
        errno: Errno,
        hypervisor: Option<&str>,
    ) -> OpenError {
        let under_xen = hypervisor.is_some_and(|kind| kind.trim() == "xen");
        let kind = match errno {
            Errno::ENOENT | Errno::ENXIO | Errno::ENODEV if under_xen => OpenErrorKind::NoModule,
            Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => OpenErrorKind::NoXen,
            Errno::EACCES | Errno::EPERM => OpenErrorKind::NoPermission,
            _ => OpenErrorKind::Other,
        };
        OpenError { kind, path, module, errno }
    }

    /// Explains `errno` on this machine.
    pub(super) fn here(path: &'static str, module: &'static str, errno: Errno) -> OpenError {
        let hypervisor = std::fs::read_to_string("/sys/hypervisor/type").ok();
        OpenError::explain(path, module, errno, hypervisor.as_deref())
    }

    fn advice(&self) -> String {
        let OpenError { module, errno, .. } = self;
        match self.kind {
            OpenErrorKind::NoXen => {
                "this machine does not run under Xen, so no disk can be given to its guests by blkif; other frontends are not concerned".to_owned()
            }
            OpenErrorKind::NoModule => {
                format!("Xen is there but the kernel's driver is not; load it by `modprobe {module}`")
            }
            OpenErrorKind::NoPermission => {
                format!("{errno}; run as root, or give the service's user access by a udev rule")
            }
            OpenErrorKind::Other => match errno {
                Errno::EMFILE | Errno::ENFILE => {
                    format!("{errno}; raise the limit of open files (LimitNOFILE of the unit)")
                }
                _ => format!("{errno}"),
            },
        }
    }
}
