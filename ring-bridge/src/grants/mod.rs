//! The memory and the notifications of domains, as a shard needs them: grants and event channels.
//!
//! There are two kinds behind one interface ([`Domains`]): the Xen hypervisor through /dev/xen/gntdev and /dev/xen/evtchn, and
//! processes that share a memfd and eventfds ([`memfd`]), for tests, fuzzers, benches and clients without Xen. A shard has
//! one `Domains` of a kind, so one descriptor for grants and one for events, whatever the number of its rings.
//!
//! ```text
//! ring pages  ── map ──▶ Pages            a ring's 1..16 pages in one piece
//! data pages  ── copy ─▶ own buffers      many segments of many domains in one call, a status for each
//!             ── persistent::Cache ─▶ Lease of mapped Pages, under a budget of the host
//! events      ── drain ─▶ work ─▶ unmask  (storm::Damper says when), notify
//! ```
//!
//! Invariants:
//! * a gref, a port and a domid are numbers that a guest chose; none is trusted, and a bad one is an error of its segment or
//!   its call, never of its neighbours;
//! * whatever is mapped or bound is counted in [`Accounts`], and released when its owner is dropped: first the mapping
//!   (munmap), then the kernel's record of it (UNMAP_GRANT_REF), then the descriptor;
//! * a ring that moves to another shard is unmapped and unbound here, and mapped and bound there;
//! * nothing here waits, except for what the hypervisor does during a call.
//!
//! `unsafe` is in `copy`, `pages`, `gntdev`, `evtchn`, `memfd` and `share` (descriptors that were received) only.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

mod accounts;
pub mod budget;
pub mod copy;
pub mod error;
pub mod evtchn;
pub mod gntdev;
pub mod memfd;
pub mod pages;
pub mod persistent;
pub mod share;
pub mod storm;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod xen_selftest;

pub use accounts::{Accounts, Counts};
pub use copy::{CopyStatus, Direction, GrantCopy};
pub use error::{GrantError, GrantFault, OpenError};
pub use pages::{Pages, Protection};

/// Number of a domain.
pub type Domid = u16;
/// Number of a grant: a page that a domain lets another one access.
pub type Gref = u32;
/// Number of an event channel's end.
pub type Port = u32;
/// Nanoseconds of a monotonic clock.
pub type Nanos = u64;

/// Bytes in a granted page, on every architecture.
pub const PAGE_BYTES: usize = 4096;
/// Most pages of a ring (facts of blkif: ring-page-order up to 4).
pub const RING_PAGES_MAX: usize = 16;
/// Most pages that one [`Domains::map`] takes.
pub const MAP_PAGES_MAX: usize = 256;
/// Segments that one [`Domains::copy`] moves unless told otherwise: 256 KiB, so that a shard's turn stays short.
pub const COPY_SEGMENTS_DEFAULT: usize = 64;

/// A port that has something to say, and what its owner called it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The local port, for [`Domains::unmask`].
    pub port: Port,
    /// As given to [`Domains::bind`].
    pub token: u64,
}

/// Most events that one [`Domains::drain`] takes.
pub const EVENTS_MAX: usize = 1024;

/// Memory and notifications of domains, of one shard.
#[derive(Debug)]
pub struct Domains {
    kind: Kind,
    accounts: Arc<Accounts>,
    copy_segments_max: usize,
}

#[derive(Debug)]
enum Kind {
    Xen { device: Arc<gntdev::GntDev>, segments: Vec<gntdev::CopySegment>, events: evtchn::EvtChn },
    Memfd(memfd::SharedDomains),
}

impl Domains {
    /// Opens the grant and event devices of Xen.
    ///
    /// # Errors
    /// [`OpenError`], which says in one sentence what is missing and what to do.
    pub fn open_xen() -> Result<Domains, OpenError> {
        let accounts = Arc::new(Accounts::default());
        let device = Arc::new(gntdev::GntDev::open()?);
        let events = evtchn::EvtChn::open(accounts.clone())?;
        let segments = Vec::with_capacity(COPY_SEGMENTS_DEFAULT);
        Ok(Domains::new(Kind::Xen { device, segments, events }, accounts))
    }

    /// Domains that are processes with a shared memfd; they are added by [`Domains::clients`].
    ///
    /// # Errors
    /// [`GrantError::Kernel`] when there are no descriptors left.
    pub fn open_memfd() -> Result<Domains, GrantError> {
        let accounts = Arc::new(Accounts::default());
        let clients = memfd::SharedDomains::new(accounts.clone())?;
        Ok(Domains::new(Kind::Memfd(clients), accounts))
    }

    fn new(kind: Kind, accounts: Arc<Accounts>) -> Domains {
        Domains { kind, accounts, copy_segments_max: COPY_SEGMENTS_DEFAULT }
    }

    /// The processes that take the place of domains; `None` on Xen.
    pub fn clients(&mut self) -> Option<&mut memfd::SharedDomains> {
        match &mut self.kind {
            Kind::Xen { .. } => None,
            Kind::Memfd(clients) => Some(clients),
        }
    }

    /// How many segments one [`Domains::copy`] moves at most (at least 1).
    pub fn set_copy_segments_max(&mut self, segments: usize) {
        self.copy_segments_max = segments.max(1);
    }

    /// What is held and what was done; shared, for metrics.
    pub fn accounts(&self) -> &Arc<Accounts> {
        &self.accounts
    }

    /// Maps a ring: `grefs` (1 to [`RING_PAGES_MAX`]) of one domain, writable, in one piece and in this order.
    ///
    /// # Errors
    /// [`GrantError::PageCount`]; [`GrantError::Map`] when one of them cannot be mapped: none is then.
    pub fn map_ring(&mut self, domid: Domid, grefs: &[Gref]) -> Result<Pages, GrantError> {
        if grefs.len() > RING_PAGES_MAX {
            return Err(GrantError::PageCount { found: grefs.len(), max: RING_PAGES_MAX });
        }
        self.map(domid, grefs, Protection::ReadWrite)
    }

    /// Maps 1 to [`MAP_PAGES_MAX`] pages of one domain in one piece and in this order; dropping them unmaps them. A gref may
    /// occur twice.
    ///
    /// # Errors
    /// As [`Domains::map_ring`].
    pub fn map(&mut self, domid: Domid, grefs: &[Gref], protection: Protection) -> Result<Pages, GrantError> {
        if grefs.is_empty() || grefs.len() > MAP_PAGES_MAX {
            return Err(GrantError::PageCount { found: grefs.len(), max: MAP_PAGES_MAX });
        }
        match &self.kind {
            Kind::Xen { device, .. } => device.map(domid, grefs, protection, &self.accounts),
            Kind::Memfd(clients) => clients.map(domid, grefs, protection),
        }
    }

    /// Moves bytes between domains' pages and our buffers: the first of `batch`, at most as many as
    /// [`Domains::set_copy_segments_max`] says, in one call. Returns how many; each of them has its own status then, and a failed
    /// one says nothing about the others. The caller goes on with the rest in its next turn.
    pub fn copy(&mut self, batch: &mut [GrantCopy]) -> usize {
        let count = batch.len().min(self.copy_segments_max);
        let batch = &mut batch[..count];
        match &mut self.kind {
            Kind::Xen { device, segments, .. } => gntdev::copy(device, segments, batch, &self.accounts),
            Kind::Memfd(clients) => clients.copy(batch),
        }
        count
    }

    /// The descriptor to be polled for reading: it is ready when [`Domains::drain`] has something. It has to be polled anew after
    /// each drain: an event of Xen that comes during one makes it ready, but wakes nobody who polls it already.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Xen { events, .. } => events.fd(),
            Kind::Memfd(clients) => clients.fd(),
        }
    }

    /// Binds a domain's port to a local one. The local port is pending at once, since notifications may have been lost
    /// before: the owner looks at its ring.
    ///
    /// # Errors
    /// [`GrantError::Bind`].
    pub fn bind(&mut self, domid: Domid, remote: Port, token: u64) -> Result<Port, GrantError> {
        match &mut self.kind {
            Kind::Xen { events, .. } => events.bind(domid, remote, token),
            Kind::Memfd(clients) => clients.bind(domid, remote, token),
        }
    }

    /// Gives a local port up. One that is not bound here is left alone.
    pub fn unbind(&mut self, port: Port) {
        match &mut self.kind {
            Kind::Xen { events, .. } => events.unbind(port),
            Kind::Memfd(clients) => clients.unbind(port),
        }
    }

    /// Tells the other end of a local port that there is something. One that is not bound here is left alone.
    pub fn notify(&mut self, port: Port) {
        match &mut self.kind {
            Kind::Xen { events, .. } => events.notify(port),
            Kind::Memfd(clients) => clients.notify(port),
        }
    }

    /// Appends pending ports to `events`, at most [`EVENTS_MAX`], without waiting. Each is masked until [`Domains::unmask`].
    /// Returns whether there may be more: then the descriptor need not become ready again. Ports that are bound no more are left
    /// out.
    pub fn drain(&mut self, events: &mut Vec<Event>) -> bool {
        match &mut self.kind {
            Kind::Xen { events: channel, .. } => channel.drain(events),
            Kind::Memfd(clients) => clients.drain(events),
        }
    }

    /// Lets ports report again, after the work that they announced has been done. Ports that are not bound are left out.
    pub fn unmask(&mut self, ports: &[Port]) {
        match &mut self.kind {
            Kind::Xen { events, .. } => events.unmask(ports),
            Kind::Memfd(clients) => clients.unmask(ports),
        }
    }

    /// Keeps a port quiet that will be unmasked later than at the end of this turn ([`storm::Damper`]).
    pub fn hold(&mut self, port: Port) {
        match &mut self.kind {
            // The kernel masked it when it reported it.
            Kind::Xen { .. } => {}
            Kind::Memfd(clients) => clients.hold(port),
        }
    }
}

impl persistent::Mapper for Domains {
    type Mapped = Pages;

    fn map_pages(&mut self, domid: Domid, grefs: &[Gref]) -> Result<Pages, GrantError> {
        self.map(domid, grefs, Protection::ReadWrite)
    }
}
