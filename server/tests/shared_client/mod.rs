//! A client of a disk's blkif socket: the library's frontend, and what it must read.

#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is what they are for")]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use ring_bridge::blkif::client::{Client, Queue, Shape};
use ring_bridge::blkif::request::Status;
use ring_bridge::blkif::wire::Abi;
use ring_bridge::grants::memfd::ClientChannel;
use ring_bridge::grants::share::{self, Kind, Message, ShareError};

use crate::live_rig::{PATIENCE, Random};

/// One queue, one page, requests of up to 44 KiB.
pub const SMALL: Shape =
    Shape { abi: Abi::X86_64, queues: 1, ring_pages: 1, places: 32, pages: 11, persistent: false };

/// A socket that is connected.
pub fn dial(path: &Path) -> OwnedFd {
    let made = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(made.as_raw_fd(), &UnixAddr::new(path).unwrap())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    made
}

fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(limit).unwrap()).unwrap_or(0) > 0
}

/// The next message.
pub fn hear(socket: &OwnedFd) -> Result<(Message, Vec<OwnedFd>), ShareError> {
    assert!(wait_readable(socket.as_fd(), PATIENCE), "the server says nothing");
    share::receive(socket)
}

/// The reason that the server gives before it closes.
#[track_caller]
pub fn hear_reason(socket: &OwnedFd) -> String {
    let (message, _) = hear(socket).expect("a message before the end");
    assert_eq!(message.kind, Kind::Error, "{message:?}");
    assert!(matches!(hear(socket), Err(ShareError::Closed)), "it closes behind an error");
    message.keys["reason"].clone()
}

/// A connected client.
pub struct Session {
    pub socket: OwnedFd,
    pub offer: BTreeMap<String, String>,
    pub connected: BTreeMap<String, String>,
    pub lines: Vec<Line>,
}

/// A queue and its channel.
pub struct Line {
    pub queue: Queue,
    pub channel: ClientChannel,
    places: usize,
    pages: usize,
}

/// Connects, or says what the server said.
pub fn try_session(path: &Path, disk: &str, shape: Shape) -> Result<Session, String> {
    let socket = dial(path);
    let mut client = Client::new(shape).unwrap();
    share::send(&socket, &client.open(disk), &[client.file()]).unwrap();
    let (message, fds) = hear(&socket).map_err(|error| error.to_string())?;
    if message.kind == Kind::Error {
        return Err(message.keys["reason"].clone());
    }
    let (offer, channels) = share::accept_offer(message, fds).unwrap();
    share::send(&socket, &client.connect(), &[]).unwrap();
    let (message, _) = hear(&socket).map_err(|error| error.to_string())?;
    if message.kind == Kind::Error {
        return Err(message.keys["reason"].clone());
    }
    assert_eq!(message.kind, Kind::Connected);
    let queues = std::mem::take(&mut client.queues).into_iter().zip(channels);
    let (places, pages) = (shape.places, shape.pages);
    let lines = queues.map(|(queue, channel)| Line { queue, channel, places, pages }).collect();
    Ok(Session { socket, offer, connected: message.keys, lines })
}

#[track_caller]
pub fn session(path: &Path, disk: &str, shape: Shape) -> Session {
    try_session(path, disk, shape).unwrap_or_else(|reason| panic!("refused: {reason}"))
}

impl Line {
    /// Responses that have come within the time.
    pub fn wait(&mut self, limit: Duration) -> Vec<(usize, Status)> {
        let deadline = Instant::now() + limit;
        let mut done = Vec::new();
        loop {
            self.queue.poll(|place, status| done.push((place, status))).expect("an honest backend");
            if !done.is_empty() {
                return done;
            }
            if self.queue.frontend.sleep(1).unwrap() {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !wait_readable(self.channel.call.as_fd(), left) {
                return done;
            }
            let set = Epoll(self.channel.call.try_clone().unwrap());
            set.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO).unwrap();
        }
    }

    /// One request and its end.
    pub fn one(&mut self, write: bool, sector: u64, bytes: usize) -> Status {
        assert!(self.queue.submit(write, sector, bytes, 0).unwrap());
        self.queue.publish(&self.channel).unwrap();
        self.wait(PATIENCE).first().expect("an answer").1
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> Status {
        self.queue.copy_in(0, 0, data).unwrap();
        self.one(true, sector, data.len())
    }

    pub fn read(&mut self, sector: u64, bytes: usize) -> (Status, Vec<u8>) {
        let status = self.one(false, sector, bytes);
        let mut data = vec![0; bytes];
        self.queue.copy_out(0, 0, &mut data).unwrap();
        (status, data)
    }
}

/// A load on a part of a disk of its own that knows what it must read. Sectors hold their number and generation.
pub struct Load {
    pub line: Line,
    first_sector: u64,
    generations: Vec<u64>,
    random: Random,
    /// What is in each place: write, first sector of the part, sectors.
    running: Vec<Option<(bool, usize, usize)>>,
    pub answered: usize,
}

fn sector_of(sector: u64, generation: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    if generation > 0 {
        let mut random = Random(sector << 32 ^ generation);
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&random.next().to_le_bytes());
        }
    }
    bytes
}

impl Load {
    /// The part has to read as zeroes at first.
    pub fn new(line: Line, first_sector: u64, sectors: usize) -> Load {
        let running = vec![None; line.places];
        Load {
            line,
            first_sector,
            generations: vec![0; sectors],
            random: Random(first_sector),
            running,
            answered: 0,
        }
    }

    fn overlaps(&self, first: usize, sectors: usize) -> bool {
        self.running.iter().flatten().any(|&(_, at, len)| first < at + len && at < first + sectors)
    }

    /// Fills the ring with random requests.
    pub fn submit(&mut self) {
        for place in 0..self.running.len() {
            if self.running[place].is_some() {
                continue;
            }
            let most = (self.line.pages * 8).min(self.generations.len() / 2) as u64;
            let sectors = 1 + self.random.below(most) as usize;
            let first = self.random.below((self.generations.len() - sectors) as u64) as usize;
            if self.overlaps(first, sectors) {
                continue;
            }
            let write = self.random.below(2) == 0;
            for sector in first..first + sectors {
                let content = if write {
                    self.generations[sector] += 1;
                    sector_of(self.first_sector + sector as u64, self.generations[sector])
                } else {
                    // Rubbish that a read must replace.
                    [0xa5; 512]
                };
                self.line.queue.copy_in(place, (sector - first) * 512, &content).unwrap();
            }
            let at = self.first_sector + first as u64;
            if !self.line.queue.submit(write, at, sectors * 512, place).unwrap() {
                panic!("the ring has as many entries as there are places");
            }
            self.running[place] = Some((write, first, sectors));
        }
        self.line.queue.publish(&self.line.channel).unwrap();
    }

    /// Takes answers and checks them; false when none came in that time.
    pub fn check(&mut self, limit: Duration) -> bool {
        let done = self.line.wait(limit);
        for &(place, status) in &done {
            let (write, first, sectors) = self.running[place].take().expect("a request");
            assert_eq!(status, Status::Okay, "write {write} at sector {first}, {sectors} sectors");
            for sector in first..first + sectors {
                if write {
                    continue;
                }
                let mut found = [0; 512];
                self.line.queue.copy_out(place, (sector - first) * 512, &mut found).unwrap();
                let at = self.first_sector + sector as u64;
                assert!(
                    found == sector_of(at, self.generations[sector]),
                    "sector {at} reads as something else"
                );
            }
            self.answered += 1;
        }
        !done.is_empty()
    }

    /// So many requests, and the end of all that are under way.
    pub fn run(&mut self, requests: usize) {
        while self.answered < requests {
            self.submit();
            assert!(self.check(PATIENCE), "no answer");
        }
        self.drain();
    }

    pub fn drain(&mut self) {
        while self.running.iter().any(Option::is_some) {
            assert!(self.check(PATIENCE), "no answer");
        }
    }

    /// What the part must hold.
    pub fn expected(&self) -> Vec<u8> {
        let sectors = self.generations.iter().enumerate();
        sectors
            .flat_map(|(sector, &generation)| sector_of(self.first_sector + sector as u64, generation))
            .collect()
    }
}
