//! Processes in the place of domains: a memfd is the domain's memory, a gref is the number of a page in it, and a pair of eventfds is
//! an event channel. The same interface as on Xen, without Xen: for tests, fuzzers, benches and local clients.
//!
//! A client is trusted as little as a guest, so:
//! * **Memory** must be a memfd sealed against shrinking (`F_SEAL_SHRINK`), so that no truncation can turn an access of ours into
//!   SIGBUS; of ordinary pages, since huge ones run out; without holes when it is admitted, so that our accesses do not allocate
//!   a client's memory on our account; and no larger than the limit, which bounds what a client can make us allocate by
//!   punching holes afterwards (such a page then reads as zeroes). Where the kernel counts commitments strictly
//!   (vm.overcommit_memory = 2) a punched page could be missing, so clients are refused there.
//! * **Events**: we make the eventfds ([`channel`]). The one that the client writes is only watched here, never written, and the one that
//!   we write is never given away: the client gets an epoll set that watches it. So no flag or counter that a client can change
//!   makes one of our calls wait. Neither is ever read: the sets are edge-triggered.
//! * A gref outside of the memory, or one that [`Permissions`] withhold, is a status of its segment.
//!
//! Invariant: an eventfd is in our set as long as its port is in the table.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::pages::Source;
use super::{
    Accounts, CopyStatus, Direction, Domid, EVENTS_MAX, Event, GrantCopy, GrantError, GrantFault, Gref,
    PAGE_BYTES, Pages, Port, Protection,
};

mod memory;
#[cfg(test)]
mod tests;

pub use memory::{CLIENT_BYTES_DEFAULT, ClientMemory, MemoryRefused, Permissions, make_client_memory};

/// Our end of an event channel.
#[derive(Debug)]
pub struct Channel {
    /// The client writes it; we watch it.
    kick: OwnedFd,
    /// We write it; nobody else has it.
    call: EventFd,
}

/// The client's end of an event channel, to be sent to it.
#[derive(Debug)]
pub struct ClientChannel {
    /// An eventfd: writing 1 (eight bytes) to it is a notification.
    pub kick: OwnedFd,
    /// An epoll set: it is readable (poll(2)) when there is a notification, and epoll_wait(2) takes it.
    pub call: OwnedFd,
}

/// Makes an event channel.
///
/// # Errors
/// [`GrantError::Kernel`] when there are no descriptors left.
pub fn channel() -> Result<(Channel, ClientChannel), GrantError> {
    let make = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let kick = OwnedFd::from(make().map_err(GrantError::kernel("eventfd"))?);
    let call = make().map_err(GrantError::kernel("eventfd"))?;
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(GrantError::kernel("epoll_create"))?;
    set.add(&call, EpollEvent::new(WATCH, 0)).map_err(GrantError::kernel("epoll_ctl"))?;
    let theirs = kick.try_clone().map_err(|_| GrantError::Kernel { what: "dup", errno: Errno::last() })?;
    Ok((Channel { kick, call }, ClientChannel { kick: theirs, call: set.0 }))
}

/// An event each time that the eventfd is written, without reading it.
const WATCH: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLET);
/// Marks our own eventfd in the set; no port has this number.
const NUDGE: u64 = u64::MAX;

#[derive(Debug)]
struct Client {
    memory: ClientMemory,
    channels: Vec<Arc<Channel>>,
}

#[derive(Debug)]
struct Bound {
    domid: Domid,
    remote: Port,
    channel: Arc<Channel>,
    token: u64,
    held: bool,
}

/// The clients of a shard.
#[derive(Debug)]
pub struct SharedDomains {
    clients: HashMap<Domid, Client>,
    ports: HashMap<Port, Bound>,
    last_port: Port,
    /// Watches all kicks, and `nudge`.
    set: Epoll,
    /// Makes the set ready for what is in `pending`.
    nudge: EventFd,
    /// Ports that are pending since they were bound.
    pending: Vec<Port>,
    buffer: Vec<EpollEvent>,
    accounts: Arc<Accounts>,
}

impl SharedDomains {
    pub(super) fn new(accounts: Arc<Accounts>) -> Result<SharedDomains, GrantError> {
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(GrantError::kernel("epoll_create"))?;
        let nudge = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(GrantError::kernel("eventfd"))?;
        set.add(&nudge, EpollEvent::new(WATCH, NUDGE)).map_err(GrantError::kernel("epoll_ctl"))?;
        Ok(SharedDomains {
            clients: HashMap::new(),
            ports: HashMap::new(),
            last_port: 0,
            set,
            nudge,
            pending: Vec::new(),
            buffer: vec![EpollEvent::empty(); EVENTS_MAX],
            accounts,
        })
    }

    /// Adds a client under a number of the caller's choice; its ports are numbered from 0 in the order of `channels`.
    ///
    /// # Errors
    /// [`MemoryRefused::DomainInUse`].
    pub fn add(
        &mut self,
        domid: Domid,
        memory: ClientMemory,
        channels: Vec<impl Into<Arc<Channel>>>,
    ) -> Result<(), MemoryRefused> {
        if self.clients.contains_key(&domid) {
            return Err(MemoryRefused::DomainInUse { domid });
        }
        let channels = channels.into_iter().map(Into::into).collect();
        self.clients.insert(domid, Client { memory, channels });
        Ok(())
    }

    /// Forgets a client and unbinds its ports. [`Pages`] of it stay until they are dropped. What it was added with comes back, for
    /// another shard.
    pub fn remove(&mut self, domid: Domid) -> Option<(ClientMemory, Vec<Arc<Channel>>)> {
        let client = self.clients.remove(&domid)?;
        let ports: Vec<Port> =
            self.ports.iter().filter(|(_, bound)| bound.domid == domid).map(|(&port, _)| port).collect();
        for port in ports {
            self.unbind(port);
        }
        Some((client.memory, client.channels))
    }

    pub(super) fn map(
        &self,
        domid: Domid,
        grefs: &[Gref],
        protection: Protection,
    ) -> Result<Pages, GrantError> {
        let result = self.try_map(domid, grefs, protection);
        result.map_err(|(first, errno)| {
            self.accounts.map_failures.add(1);
            GrantError::Map { domid, first, count: grefs.len(), errno }
        })
    }

    /// Or the gref to blame, and why.
    fn try_map(&self, domid: Domid, grefs: &[Gref], protection: Protection) -> Result<Pages, (Gref, Errno)> {
        let first = grefs.first().copied().unwrap_or(0);
        let memory = &self.client(domid).ok_or((first, Errno::ESRCH))?.memory;
        for &gref in grefs {
            memory.check(gref, protection).map_err(|_| (gref, Errno::EINVAL))?;
        }
        let start = map_pages(memory.file(), grefs, protection).map_err(|errno| (first, errno))?;
        let accounts = self.accounts.clone();
        // SAFETY: `map_pages` made this range just now, with this protection, for nobody else. Its pages are of a memfd that cannot
        // be shrunk and whose size has them (`check`), so an access does not fault.
        let pages = unsafe { Pages::from_mapping(start, grefs.len(), protection, Source::File, accounts) };
        pages.map_err(|_| (first, Errno::EINVAL))
    }

    fn client(&self, domid: Domid) -> Option<&Client> {
        self.clients.get(&domid)
    }

    pub(super) fn copy(&self, batch: &mut [GrantCopy]) {
        let (mut bytes, mut failures) = (0, 0);
        for copy in batch.iter_mut() {
            copy.status = match self.copy_one(copy) {
                Ok(()) => CopyStatus::Done,
                Err(fault) => CopyStatus::Failed(fault),
            };
            match copy.status {
                CopyStatus::Done => bytes += usize::from(copy.len),
                _ => failures += 1,
            }
        }
        self.accounts.copy_calls.add(usize::from(!batch.is_empty()));
        self.accounts.copy_segments.add(batch.len());
        self.accounts.copy_failures.add(failures);
        self.accounts.copy_bytes.add(bytes);
    }

    fn copy_one(&self, copy: &GrantCopy) -> Result<(), GrantFault> {
        let memory = &self.client(copy.domid).ok_or(GrantFault::BadDomain)?.memory;
        if !copy.is_in_page() {
            return Err(GrantFault::BadRange);
        }
        let len = usize::from(copy.len);
        match copy.direction {
            Direction::FromDomain => {
                memory.check(copy.gref, Protection::ReadOnly)?;
                // SAFETY: whoever made the segment promised that these are initialised bytes of private memory that may be written
                // and that nobody else accesses meanwhile.
                let local = unsafe { std::slice::from_raw_parts_mut(copy.local.as_ptr(), len) };
                memory.copy_out(copy.gref, copy.offset, local)
            }
            Direction::ToDomain => {
                memory.check(copy.gref, Protection::ReadWrite)?;
                // SAFETY: as above; they are only read.
                let local = unsafe { std::slice::from_raw_parts(copy.local.as_ptr(), len) };
                memory.copy_in(copy.gref, copy.offset, local)
            }
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.set.0.as_fd()
    }

    pub(super) fn bind(&mut self, domid: Domid, remote: Port, token: u64) -> Result<Port, GrantError> {
        let refused = |errno| GrantError::Bind { domid, remote, errno };
        let client = self.client(domid).ok_or(refused(Errno::ESRCH))?;
        let channel = client.channels.get(remote as usize).ok_or(refused(Errno::EINVAL))?.clone();
        // As on Xen, an event channel has one other end.
        if self.ports.values().any(|bound| bound.domid == domid && bound.remote == remote) {
            return Err(refused(Errno::EINVAL));
        }
        let port = self.free_port();
        self.set.add(&channel.kick, EpollEvent::new(WATCH, port.into())).map_err(refused)?;
        self.ports.insert(port, Bound { domid, remote, channel, token, held: false });
        self.accounts.ports.add(1);
        self.pending.push(port);
        // Nobody reads it and it is ours alone, so it takes the write, 2^64 - 2 times.
        let _ = self.nudge.write(1);
        Ok(port)
    }

    /// A number that no port has. Numbers are not used again soon, so a late event never finds another port's owner.
    fn free_port(&mut self) -> Port {
        loop {
            self.last_port = self.last_port.wrapping_add(1);
            if !self.ports.contains_key(&self.last_port) {
                return self.last_port;
            }
        }
    }

    pub(super) fn unbind(&mut self, port: Port) {
        if let Some(bound) = self.ports.remove(&port) {
            self.accounts.ports.sub(1);
            // It fails only for a descriptor that is not in the set.
            let _ = self.set.delete(&bound.channel.kick);
        }
    }

    pub(super) fn notify(&mut self, port: Port) {
        if let Some(bound) = self.ports.get(&port) {
            self.accounts.notifications.add(1);
            if bound.channel.call.write(1).is_err() {
                self.accounts.notify_failures.add(1);
            }
        }
    }

    pub(super) fn drain(&mut self, events: &mut Vec<Event>) -> bool {
        self.accounts.drains.add(1);
        // EINTR cannot be, without a wait; then nothing is taken, and it is asked again.
        let Ok(found) = self.set.wait(&mut self.buffer, EpollTimeout::ZERO) else {
            return true;
        };
        let before = events.len();
        let mut ignored = 0;
        for ready in &self.buffer[..found] {
            if ready.data() == NUDGE {
                let pending = self.pending.drain(..).filter_map(|port| event(&self.ports, port));
                events.extend(pending);
                continue;
            }
            match event(&self.ports, ready.data() as Port) {
                Some(event) => events.push(event),
                None => ignored += 1,
            }
        }
        self.accounts.events.add(events.len() - before);
        self.accounts.events_ignored.add(ignored);
        found == self.buffer.len()
    }

    pub(super) fn unmask(&mut self, ports: &[Port]) {
        for port in ports {
            // A port that was not held is not masked: its events are edges, of which a turn takes one.
            if let Some(bound) = self.ports.get_mut(port).filter(|bound| bound.held) {
                bound.held = false;
                self.accounts.unmasks.add(1);
                // This also looks whether the eventfd was ever written, so that nothing that came meanwhile is lost.
                let mut watch = EpollEvent::new(WATCH, (*port).into());
                let _ = self.set.modify(&bound.channel.kick, &mut watch);
            }
        }
    }

    pub(super) fn hold(&mut self, port: Port) {
        if let Some(bound) = self.ports.get_mut(&port) {
            bound.held = true;
            let mut nothing = EpollEvent::new(EpollFlags::empty(), port.into());
            let _ = self.set.modify(&bound.channel.kick, &mut nothing);
        }
    }
}

impl Drop for SharedDomains {
    fn drop(&mut self) {
        self.accounts.ports.sub(self.ports.len());
    }
}

fn event(ports: &HashMap<Port, Bound>, port: Port) -> Option<Event> {
    ports.get(&port).map(|bound| Event { port, token: bound.token })
}

/// Maps pages of a file side by side, in the order of `grefs`.
fn map_pages(file: BorrowedFd<'_>, grefs: &[Gref], protection: Protection) -> Result<NonNull<u8>, Errno> {
    let len = NonZeroUsize::new(grefs.len() * PAGE_BYTES).ok_or(Errno::EINVAL)?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory. It only keeps the range free.
    let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
    let writable = match protection {
        Protection::ReadOnly => ProtFlags::empty(),
        Protection::ReadWrite => ProtFlags::PROT_WRITE,
    };
    let mut page = 0;
    for run in grefs.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        let at = start.addr().checked_add(page * PAGE_BYTES);
        let bytes = NonZeroUsize::new(run.len() * PAGE_BYTES);
        let offset = i64::from(run[0]) * PAGE_BYTES as i64;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        // SAFETY: MAP_FIXED replaces pages of the range that was reserved above: the runs together have as many pages as `grefs`, so `at`
        // and `bytes` stay inside, and nobody knows the range yet.
        let mapped = at.zip(bytes).ok_or(Errno::EINVAL).and_then(|(at, bytes)| unsafe {
            mmap(Some(at), bytes, ProtFlags::PROT_READ | writable, flags, file, offset)
        });
        if let Err(errno) = mapped {
            // SAFETY: the range was mapped above and is known to nobody.
            let _ = unsafe { munmap(start, len.get()) };
            return Err(errno);
        }
        page += run.len();
    }
    Ok(start.cast())
}
