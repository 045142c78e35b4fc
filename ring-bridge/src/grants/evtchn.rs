//! /dev/xen/evtchn: the notifications of domains.
//!
//! Numbers are those of Linux's public header xen/evtchn.h: `_IOC(_IOC_NONE, 'E', nr, size)`. read(2) gives the pending local ports, four
//! bytes each, and each of them is masked until it is written back. Ports belong to the descriptor that bound them.
//!
//! Invariants: a port is in the table from its bind to its unbind, and only such a port is reported, notified or unmasked: one that
//! was read and unbound before it was handled is nobody's (XSA-331). A number that Xen gives out again right after may get the
//! old one's event: its owner looks at its ring for nothing, which is harmless.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{read, write};

use super::{Accounts, Domid, EVENTS_MAX, Event, GrantError, OpenError, Port};

const PATH: &str = "/dev/xen/evtchn";
const MODULE: &str = "xen-evtchn";
/// Bytes of a port in read(2) and write(2).
const PORT_BYTES: usize = size_of::<Port>();

/// BIND_INTERDOMAIN: `{ remote_domain u32 @0, remote_port u32 @4 }`, 8 bytes; the answer is the local port.
#[repr(C)]
#[derive(Debug)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

/// UNBIND, NOTIFY and BIND_UNBOUND_PORT take one number: a port, or the remote domain.
#[repr(C)]
#[derive(Debug)]
struct OneNumber {
    number: u32,
}

const fn request(nr: u32, size: usize) -> libc::Ioctl {
    (((size as u32) << 16) | ((b'E' as u32) << 8) | nr) as libc::Ioctl
}

const BIND_INTERDOMAIN: libc::Ioctl = request(1, size_of::<BindInterdomain>());
#[cfg(test)]
const BIND_UNBOUND_PORT: libc::Ioctl = request(2, size_of::<OneNumber>());
const UNBIND: libc::Ioctl = request(3, size_of::<OneNumber>());
const NOTIFY: libc::Ioctl = request(4, size_of::<OneNumber>());
const RESET: libc::Ioctl = request(5, 0);

/// The open device and the ports bound through it; closing it unbinds them.
#[derive(Debug)]
pub struct EvtChn {
    file: OwnedFd,
    ports: Ports,
    buffer: Vec<u8>,
    accounts: Arc<Accounts>,
}

impl EvtChn {
    /// Opens /dev/xen/evtchn.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(super) fn open(accounts: Arc<Accounts>) -> Result<EvtChn, OpenError> {
        let file = open(PATH, OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
            .map_err(|errno| OpenError::here(PATH, MODULE, errno))?;
        let buffer = vec![0; EVENTS_MAX * PORT_BYTES];
        Ok(EvtChn { file, ports: Ports::default(), buffer, accounts })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Binds a port that `domid` offers.
    pub(super) fn bind(&mut self, domid: Domid, remote: Port, token: u64) -> Result<Port, GrantError> {
        let mut call = BindInterdomain { remote_domain: domid.into(), remote_port: remote };
        // SAFETY: BIND_INTERDOMAIN reads this structure, which is ours alone during the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BIND_INTERDOMAIN, &raw mut call) };
        let local = Errno::result(result).map_err(|errno| GrantError::Bind { domid, remote, errno })?;
        let local = local as Port; // not negative: errors were sorted out
        self.adopt(local, token);
        Ok(local)
    }

    /// Makes a port that `domid` may bind.
    #[cfg(test)]
    pub(super) fn offer(&mut self, domid: Domid, token: u64) -> Result<Port, Errno> {
        let local = self.call(BIND_UNBOUND_PORT, domid.into())? as Port;
        self.adopt(local, token);
        Ok(local)
    }

    fn adopt(&mut self, local: Port, token: u64) {
        if self.ports.insert(local, token) {
            self.accounts.ports.add(1);
        }
    }

    pub(super) fn unbind(&mut self, port: Port) {
        if self.ports.remove(port) {
            self.accounts.ports.sub(1);
            // It fails only for a port that is not bound here.
            let _ = self.call(UNBIND, port);
        }
    }

    pub(super) fn notify(&mut self, port: Port) {
        if !self.ports.has(port) {
            return;
        }
        self.accounts.notifications.add(1);
        if self.call(NOTIFY, port).is_err() {
            self.accounts.notify_failures.add(1);
        }
    }

    /// A call that takes one number by reference.
    fn call(&self, request: libc::Ioctl, number: u32) -> Result<i32, Errno> {
        let mut call = OneNumber { number };
        // SAFETY: the requests that this function is called with read one u32, which is ours alone during the call.
        Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw mut call) })
    }

    pub(super) fn drain(&mut self, events: &mut Vec<Event>) -> bool {
        self.accounts.drains.add(1);
        match read(&self.file, &mut self.buffer) {
            Ok(bytes) => {
                let ports = bytes / PORT_BYTES;
                let taken = self.ports.select(&self.buffer[..bytes], events);
                self.accounts.events.add(taken);
                self.accounts.events_ignored.add(ports - taken);
                // One that filled the buffer exactly is asked again for nothing. A short one was all there was when it began: see
                // `Domains::event_fd` for what came meanwhile.
                ports == EVENTS_MAX
            }
            Err(Errno::EFBIG) => {
                self.recover_overflow(events);
                true
            }
            Err(Errno::EINTR) => true,
            Err(_) => false, // EAGAIN: nothing is pending
        }
    }

    /// The kernel's list of pending ports ran over, which it prevents by its size. What was in it is lost; every port counts as
    /// pending then, and so is looked at and unmasked.
    fn recover_overflow(&mut self, events: &mut Vec<Event>) {
        self.accounts.event_overflows.add(1);
        // SAFETY: RESET has no argument; it empties the list.
        let _ = unsafe { libc::ioctl(self.file.as_raw_fd(), RESET, 0) };
        self.ports.all(events);
    }

    pub(super) fn unmask(&mut self, ports: &[Port]) {
        for some in ports.chunks(EVENTS_MAX) {
            let mut len = 0;
            for &port in some.iter().filter(|port| self.ports.has(**port)) {
                self.buffer[len..len + PORT_BYTES].copy_from_slice(&port.to_ne_bytes());
                len += PORT_BYTES;
            }
            if len > 0 {
                self.accounts.unmasks.add(1);
                // The kernel takes a page of ports at once; a signal cannot interrupt it.
                let _ = write(&self.file, &self.buffer[..len]);
            }
        }
    }
}

impl Drop for EvtChn {
    fn drop(&mut self) {
        // Closing the descriptor unbinds; only the count is ours.
        self.accounts.ports.sub(self.ports.len());
    }
}

/// The ports that are ours.
#[derive(Debug, Default)]
struct Ports(HashMap<Port, u64>);

impl Ports {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn has(&self, port: Port) -> bool {
        self.0.contains_key(&port)
    }

    /// Whether it is new.
    fn insert(&mut self, port: Port, token: u64) -> bool {
        self.0.insert(port, token).is_none()
    }

    /// Whether it was there.
    fn remove(&mut self, port: Port) -> bool {
        self.0.remove(&port).is_some()
    }

    /// Appends those of the ports in `bytes` (four each, native order) that are ours. Returns how many they are.
    fn select(&self, bytes: &[u8], events: &mut Vec<Event>) -> usize {
        let before = events.len();
        let (ports, _) = bytes.as_chunks::<PORT_BYTES>();
        events.extend(ports.iter().filter_map(|&bytes| {
            let port = Port::from_ne_bytes(bytes);
            self.0.get(&port).map(|&token| Event { port, token })
        }));
        events.len() - before
    }

    fn all(&self, events: &mut Vec<Event>) {
        events.extend(self.0.iter().map(|(&port, &token)| Event { port, token }));
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    // Goal: what we pass is what the kernel's header describes.
    // Method: sizes, offsets and request numbers, which were computed by compiling the header, compared with our types.
    #[test]
    fn layouts_and_numbers_are_the_kernels() {
        assert_eq!(BIND_INTERDOMAIN, 0x8_4501);
        assert_eq!(BIND_UNBOUND_PORT, 0x4_4502);
        assert_eq!(UNBIND, 0x4_4503);
        assert_eq!(NOTIFY, 0x4_4504);
        assert_eq!(RESET, 0x4505);
        assert_eq!(offset_of!(BindInterdomain, remote_domain), 0);
        assert_eq!(offset_of!(BindInterdomain, remote_port), 4);
    }

    // Goal: XSA-331: an event of a port that was unbound after the kernel reported it reaches nobody.
    // Method: three ports are read; one was never ours and one is unbound before the table is asked.
    #[test]
    fn xsa_331_ports_that_are_gone_are_ignored() {
        let mut ports = Ports::default();
        assert!(ports.insert(7, 70) && ports.insert(9, 90));
        let bytes: Vec<u8> = [7u32, 8, 9].iter().flat_map(|port| port.to_ne_bytes()).collect();
        let mut events = Vec::new();
        assert_eq!(ports.select(&bytes, &mut events), 2);
        assert!(ports.remove(9) && !ports.remove(9));
        events.clear();
        assert_eq!(ports.select(&bytes, &mut events), 1);
        assert_eq!(events, [Event { port: 7, token: 70 }]);
        // Half a port at the end is nothing, whatever gave it.
        assert_eq!(ports.select(&bytes[..6], &mut events), 1);
    }
}
