//! A small NBD client for end-to-end tests: what the public clients do not let a test say (requests one by one, replies
//! left unread, half messages), and a load that checks every byte that it reads.
//!
//! NBD protocol: "fixed newstyle" negotiation with GO, then simple replies. Every receive has a deadline.

#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is what they are for")]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Longer than any reply takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;

const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const GO: u32 = 7;

/// Bytes of a block of the checked load.
pub const BLOCK: usize = 4096;

/// A connected client.
pub struct Client {
    pub stream: UnixStream,
    pub size_bytes: u64,
    /// Lengths of the reads that were not answered, by cookie.
    reads: HashMap<u64, u32>,
    next_cookie: u64,
}

/// The answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// 0, or an error of the protocol (its numbers are those of Linux).
    pub error: u32,
    /// What a read has read.
    pub data: Vec<u8>,
}

/// Connects and reads the greeting.
pub fn greeted(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    Ok(stream)
}

/// An option with its data.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The option GO for an export, with no information asked for.
pub fn go(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(0u16.to_be_bytes());
    option(GO, &data)
}

/// The head of a request.
pub fn head(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

impl Client {
    /// Connects and chooses an export. A refusal of the server is an error with its text.
    pub fn connect(socket: &Path, export: &str) -> io::Result<Client> {
        let mut stream = greeted(socket)?;
        stream.write_all(&3u32.to_be_bytes())?;
        stream.write_all(&go(export))?;
        let mut size_bytes = 0;
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header)?;
            let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
            let mut payload = vec![0; u32::from_be_bytes(header[16..20].try_into().unwrap()) as usize];
            stream.read_exact(&mut payload)?;
            match kind {
                1 => return Ok(Client { stream, size_bytes, reads: HashMap::new(), next_cookie: 1 }),
                3 if payload[..2] == [0, 0] => {
                    size_bytes = u64::from_be_bytes(payload[2..10].try_into().unwrap());
                }
                3 => {}
                error => {
                    let text = String::from_utf8_lossy(&payload).into_owned();
                    return Err(io::Error::other(format!("refused ({error:#x}): {text}")));
                }
            }
        }
    }

    /// Sends a request and does not wait; the payload of a write is `data`.
    pub fn send(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = head(command, cookie, offset, len);
        bytes.extend(data);
        self.stream.write_all(&bytes)?;
        if command == READ {
            self.reads.insert(cookie, len);
        }
        Ok(cookie)
    }

    /// The next reply.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        assert_eq!(u32::from_be_bytes(header[..4].try_into().unwrap()), REPLY_MAGIC, "a simple reply");
        let error = u32::from_be_bytes(header[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(header[8..].try_into().unwrap());
        let len = self.reads.remove(&cookie).unwrap_or(0);
        let mut data = vec![0; if error == 0 { len as usize } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { cookie, error, data })
    }

    /// Whether a reply, or the end of the connection, comes within this time.
    pub fn speaks_within(&self, time: Duration) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(time).unwrap()).expect("poll") > 0
    }

    fn exchange(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<Vec<u8>> {
        let cookie = self.send(command, offset, len, data)?;
        let reply = self.receive()?;
        assert_eq!(reply.cookie, cookie, "nothing else was asked");
        match reply.error {
            0 => Ok(reply.data),
            error => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }

    /// Reads; nothing else may be in flight. An error of the protocol is one of the same number.
    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Vec<u8>> {
        self.exchange(READ, offset, len, &[])
    }

    /// Writes; nothing else may be in flight.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.exchange(WRITE, offset, data.len() as u32, data).map(drop)
    }

    /// Flushes; nothing else may be in flight.
    pub fn flush(&mut self) -> io::Result<()> {
        self.exchange(FLUSH, 0, 0, &[]).map(drop)
    }

    /// Says goodbye and waits until the server has closed the connection.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.send(DISCONNECT, 0, 0, &[])?;
        match self.stream.read(&mut [0; 1])? {
            0 => Ok(()),
            _ => Err(io::Error::other("the server went on after the goodbye")),
        }
    }
}

/// What the checked load has in a block after `version` writes to it; blocks start as zeroes.
pub fn contents(seed: u64, block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let stamp = (seed << 48 ^ block << 24 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words =
        (0..BLOCK as u64 / 8).map(|word| stamp.wrapping_mul(2 * word + 1).rotate_left(word as u32 % 64));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Writes and reads at random until told to stop, several at a time, and checks what it reads.
pub struct Load {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<()>>,
}

impl Load {
    /// Starts on the first `blocks` blocks of a disk that holds zeroes.
    pub fn start(socket: PathBuf, export: &str, blocks: u64, seed: u64) -> Load {
        let (stop, operations) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut client = Client::connect(&socket, export).expect("the load connects");
        let (stopped, count) = (stop.clone(), operations.clone());
        let thread = std::thread::spawn(move || {
            let mut versions = vec![0; blocks as usize];
            let mut round = seed;
            while !stopped.load(Ordering::Relaxed) {
                round += 1;
                load_round(&mut client, &mut versions, seed, round)?;
                count.fetch_add(8, Ordering::Relaxed);
            }
            client.flush()?;
            for (block, version) in versions.iter().enumerate() {
                let found = client.read(block as u64 * BLOCK as u64, BLOCK as u32)?;
                check(&found, seed, block as u64, *version)?;
            }
            client.disconnect()
        });
        Load { stop, operations, thread }
    }

    /// Operations up to now.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// Waits until so many more operations are done; fails when the load has ended.
    pub fn wait_for(&self, more: u64) {
        let (end, deadline) = (self.operations() + more, Instant::now() + PATIENCE);
        while self.operations() < end && !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "the load stands at {} operations", self.operations());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops, reads everything once more, and returns how many operations there were. Fails on any error or wrong byte.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.join().expect("the load does not panic");
        result.unwrap_or_else(|error| {
            panic!("the load after {} operations: {error}", self.operations.load(Ordering::Relaxed))
        });
        self.operations.load(Ordering::Relaxed)
    }
}

/// Eight blocks at once, each written or read.
fn load_round(client: &mut Client, versions: &mut [u64], seed: u64, round: u64) -> io::Result<()> {
    let blocks = versions.len() as u64;
    let mut asked = HashMap::new();
    for index in 0..8u64 {
        // Eight different ones: a step that is odd, on a number of blocks that is a power of two.
        let block = (round.wrapping_mul(7919) + index * 13) % blocks;
        let offset = block * BLOCK as u64;
        let cookie = if (round + index).is_multiple_of(2) {
            versions[block as usize] += 1;
            let data = contents(seed, block, versions[block as usize]);
            client.send(WRITE, offset, BLOCK as u32, &data)?
        } else {
            client.send(READ, offset, BLOCK as u32, &[])?
        };
        asked.insert(cookie, block);
    }
    for _ in 0..8 {
        let reply = client.receive()?;
        let block = asked.remove(&reply.cookie).ok_or_else(|| io::Error::other("a reply to no request"))?;
        if reply.error != 0 {
            return Err(io::Error::from_raw_os_error(reply.error as i32));
        }
        if !reply.data.is_empty() {
            check(&reply.data, seed, block, versions[block as usize])?;
        }
    }
    Ok(())
}

fn check(found: &[u8], seed: u64, block: u64, version: u64) -> io::Result<()> {
    if found == contents(seed, block, version) {
        return Ok(());
    }
    Err(io::Error::other(format!("block {block} does not hold what was written to it {version} times")))
}
