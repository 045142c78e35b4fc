//! A disk of blktapd through its blkif socket: the frontend of `ring-bridge`, set up as Linux's blkfront does it: one queue, the smallest
//! ring that holds the requests, persistent grants, indirect requests where eleven segments do not suffice.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use ring_bridge::blkif::client::{Client, Queue, Shape};
use ring_bridge::blkif::request::Status;
use ring_bridge::blkif::wire::{Abi, PAGE_BYTES, entries};
use ring_bridge::grants::memfd::ClientChannel;
use ring_bridge::grants::share::{self, Kind, Message};

use super::Op;
use super::ring::Ring;
use crate::servers::Endpoint;

/// How long the server may take to answer a message.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connected disk.
#[derive(Debug)]
pub struct Disk {
    queue: Queue,
    channel: ClientChannel,
    calls: Epoll,
    size_bytes: u64,
    /// Its end is the end of the connection.
    _socket: OwnedFd,
}

impl Disk {
    /// Connects, for `places` requests of up to `bytes`.
    pub fn open(endpoint: &Endpoint, places: usize, bytes: usize) -> Result<Disk> {
        let ring_pages =
            [1, 2, 4, 8, 16].into_iter().find(|&pages| entries(pages).is_some_and(|n| n as usize >= places));
        let ring_pages = ring_pages.with_context(|| format!("no ring holds {places} requests"))?;
        let pages = bytes.div_ceil(PAGE_BYTES);
        let shape = Shape { abi: Abi::X86_64, queues: 1, ring_pages, places, pages, persistent: true };
        let mut client = Client::new(shape)?;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&endpoint.socket)?)
            .with_context(|| format!("cannot connect to {}", endpoint.socket.display()))?;
        share::send(&socket, &client.open(&endpoint.export), &[client.file()])?;
        let (message, fds) = receive(&socket)?;
        let (_, channels) = share::accept_offer(message, fds)?;
        share::send(&socket, &client.connect(), &[])?;
        let (message, _) = receive(&socket)?;
        ensure!(message.kind == Kind::Connected, "{:?} came instead of the disk's properties", message.kind);
        let sectors: u64 =
            message.keys.get("sectors").and_then(|text| text.parse().ok()).context("no size")?;
        let queue = client.queues.pop().context("no queue")?;
        let channel = channels.into_iter().next().context("no channel")?;
        let calls = Epoll(channel.call.try_clone()?);
        Ok(Disk { queue, channel, calls, size_bytes: sectors * 512, _socket: socket })
    }
}

fn receive(socket: &OwnedFd) -> Result<(Message, Vec<OwnedFd>)> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut fds, PollTimeout::try_from(HANDSHAKE_TIMEOUT)?)? > 0, "the server does not answer");
    let (message, fds) = share::receive(socket)?;
    if message.kind == Kind::Error {
        bail!("refused: {}", message.keys.get("reason").map_or("without a reason", |reason| reason));
    }
    Ok((message, fds))
}

impl Ring for Disk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&mut self, op: Op, offset: u64, bytes: usize, place: usize) -> Result<()> {
        ensure!(self.queue.submit(op == Op::Write, offset / 512, bytes, place)?, "the ring is full");
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        Ok(self.queue.publish(&self.channel)?)
    }

    fn poll(&mut self, done: &mut Vec<(usize, bool)>) -> Result<()> {
        Ok(self.queue.poll(|place, status| done.push((place, status == Status::Okay)))?)
    }

    fn sleep(&mut self) -> Result<bool> {
        Ok(self.queue.frontend.sleep(1)?)
    }

    fn call_fd(&self) -> RawFd {
        self.calls.0.as_raw_fd()
    }

    fn wait(&mut self, timeout_ms: u16) -> Result<()> {
        // This takes the notification as well: the set is edge-triggered.
        match self.calls.wait(&mut [EpollEvent::empty()], EpollTimeout::from(timeout_ms)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("epoll_wait"),
        }
    }

    fn copy_in(&mut self, place: usize, data: &[u8]) -> Result<()> {
        Ok(self.queue.copy_in(place, 0, data)?)
    }

    fn copy_out(&self, place: usize, data: &mut [u8]) -> Result<()> {
        Ok(self.queue.copy_out(place, 0, data)?)
    }
}
