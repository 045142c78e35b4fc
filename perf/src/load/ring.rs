//! The load of disks through rings in shared memory: blkif of blktapd and vhost-user-blk of its peer, by the same loop. One thread; a
//! closed loop on one ring, or an open loop on many. A look at the ring takes all that has come and refills it, and an empty ring is waited for.
//!
//! Invariant: both kinds of ring are driven equally: one notification of the other side per refill at most, and only if it asks for one; one
//! system call to wait.

use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::schedule::{Offsets, Random, Schedule};
use super::{Edge, Job, Op, Outcome, Pace};
use crate::load::{blkif, vhost};
use crate::servers::{Endpoint, Protocol};
use crate::stop;

/// How often the user's wish to leave is looked at.
const WAIT_MS: u16 = 200;
/// How long answers are awaited after the window, and in a verification.
const PATIENCE: Duration = Duration::from_secs(30);
/// Latencies above are recorded as this.
const LATENCY_MAX_NS: u64 = 600_000_000_000;
/// Requests in flight on a ring of an open loop.
const OPEN_PLACES: usize = 16;
/// How long answers to an open loop are awaited after the window.
const OPEN_DRAIN: Duration = Duration::from_secs(1);
/// Bytes of a request of [`verify`].
const VERIFY_BYTES: usize = 64 << 10;

/// A ring with places for requests, each with memory of its own.
pub trait Ring {
    /// Size of the disk.
    fn size_bytes(&self) -> u64;
    /// Writes a request to the ring. Its place has none.
    fn submit(&mut self, op: Op, offset: u64, bytes: usize, place: usize) -> Result<()>;
    /// Shows the server what was submitted, and notifies it if it wants that.
    fn publish(&mut self) -> Result<()>;
    /// Takes what was answered: its place, and whether it succeeded.
    fn poll(&mut self, done: &mut Vec<(usize, bool)>) -> Result<()>;
    /// Asks to be notified of the next answer; true when there is one already.
    fn sleep(&mut self) -> Result<bool>;
    /// Readable when there is a notification; [`Ring::wait`] takes it.
    fn call_fd(&self) -> RawFd;
    /// Waits for a notification.
    fn wait(&mut self, timeout_ms: u16) -> Result<()>;
    /// Fills the start of a place's memory.
    fn copy_in(&mut self, place: usize, data: &[u8]) -> Result<()>;
    /// Reads the start of a place's memory.
    fn copy_out(&self, place: usize, data: &mut [u8]) -> Result<()>;
}

/// Connects to a disk, for so many requests of so many bytes.
pub fn open(endpoint: &Endpoint, depth: u32, block_bytes: u32) -> Result<Box<dyn Ring>> {
    let (places, bytes) = (depth as usize, block_bytes as usize);
    Ok(match endpoint.protocol {
        Protocol::Blkif => Box::new(blkif::Disk::open(endpoint, places, bytes)?),
        Protocol::VhostUser => Box::new(vhost::Disk::open(endpoint, places, bytes)?),
        Protocol::Nbd => bail!("NBD has no rings"),
    })
}

/// Runs a closed loop on the job's first endpoint, or an open loop on all; `at` is called at both edges of the window.
pub fn run(job: &Job, at: &mut dyn FnMut(Edge) -> Result<()>) -> Result<Outcome> {
    match job.pace {
        Pace::Closed { depth } => closed_loop(job, depth, at),
        Pace::Open { per_second } => open_loop(job, per_second, at),
    }
}

fn closed_loop(job: &Job, depth: u32, at: &mut dyn FnMut(Edge) -> Result<()>) -> Result<Outcome> {
    let endpoint = job.endpoints.first().context("no disk to load")?;
    let mut ring = open(endpoint, depth, job.block_bytes)?;
    let mut random = Random(job.seed);
    let bytes = job.block_bytes as usize;
    let payload: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
    let mut offsets = Offsets::new(job.pattern, ring.size_bytes(), job.block_bytes);
    let mut since = Vec::with_capacity(depth as usize);
    let start = Instant::now();
    for place in 0..depth as usize {
        ring.copy_in(place, &payload)?;
        ring.submit(job.op, offsets.next(&mut random), bytes, place)?;
        since.push(start);
    }
    ring.publish()?;
    let mut latency_ns = Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).context("histogram")?;
    let (mut completed, mut errors, mut window) = (0, 0, Duration::ZERO);
    let mut done = Vec::with_capacity(depth as usize);
    let mut opened: Option<Instant> = None;
    let mut pending = depth as usize;
    let begin = start + job.warmup;
    let end = begin + job.window;
    let mut closed = false;
    while pending > 0 {
        done.clear();
        ring.poll(&mut done)?;
        let now = Instant::now();
        if opened.is_none() && now >= begin {
            at(Edge::Begin)?;
            opened = Some(Instant::now());
        }
        if let (Some(opened), false, true) = (opened, closed, now >= end) {
            closed = true;
            window = opened.elapsed();
            at(Edge::End)?;
        }
        if done.is_empty() {
            ensure!(now < end + PATIENCE, "{pending} requests are not answered");
            if !ring.sleep()? {
                stop::check()?;
                ring.wait(WAIT_MS)?;
            }
            continue;
        }
        for &(place, good) in &done {
            errors += u64::from(!good);
            if let (Some(opened), false) = (opened, closed) {
                completed += 1;
                if since[place] >= opened {
                    latency_ns.saturating_record((now - since[place]).as_nanos() as u64);
                }
            }
            if closed {
                pending -= 1;
            } else {
                since[place] = now;
                ring.submit(job.op, offsets.next(&mut random), bytes, place)?;
            }
        }
        if !closed {
            ring.publish()?;
        }
    }
    Ok(Outcome { completed, errors, unanswered: 0, window, latency_ns })
}

/// One ring of an open loop.
struct Line {
    ring: Box<dyn Ring>,
    offsets: Offsets,
    /// When the request of each place was due, nanoseconds from the start.
    due_ns: [Option<u64>; OPEN_PLACES],
}

/// An open loop. A request that finds all places of its ring taken counts as unanswered.
struct OpenLoop<'a> {
    job: &'a Job,
    lines: Vec<Line>,
    calls: Epoll,
    start: Instant,
    /// The measured window, nanoseconds from the start.
    window_ns: (u64, u64),
    outcome: Outcome,
    done: Vec<(usize, bool)>,
}

fn open_loop(job: &Job, per_second: f64, at: &mut dyn FnMut(Edge) -> Result<()>) -> Result<Outcome> {
    let mut random = Random(job.seed);
    let calls = Epoll::new()?;
    let mut lines = Vec::with_capacity(job.endpoints.len());
    for (index, endpoint) in job.endpoints.iter().enumerate() {
        stop::check()?;
        let ring = open(endpoint, OPEN_PLACES as u32, job.block_bytes)?;
        calls.ctl(ControlOperation::Add, ring.call_fd(), EpollEvent::new(EventSet::IN, index as u64))?;
        let offsets = Offsets::new(job.pattern, ring.size_bytes(), job.block_bytes);
        lines.push(Line { ring, offsets, due_ns: [None; OPEN_PLACES] });
    }
    ensure!(!lines.is_empty() && per_second > 0.0, "nothing to load");
    let mut schedule = Schedule::new(lines.len(), per_second, &mut random);
    let begin_ns = job.warmup.as_nanos() as u64;
    let latency_ns = Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).context("histogram")?;
    let outcome = Outcome { completed: 0, errors: 0, unanswered: 0, window: Duration::ZERO, latency_ns };
    let window_ns = (begin_ns, begin_ns + job.window.as_nanos() as u64);
    let start = Instant::now();
    let mut running = OpenLoop { job, lines, calls, start, window_ns, outcome, done: Vec::new() };
    running.turn_until(window_ns.0, Some(&mut schedule), &mut random)?;
    at(Edge::Begin)?;
    let (opened, before) = (Instant::now(), running.outcome.completed);
    running.turn_until(window_ns.1, Some(&mut schedule), &mut random)?;
    running.outcome.window = opened.elapsed();
    running.outcome.completed -= before;
    let completed = running.outcome.completed;
    at(Edge::End)?;
    running.turn_until(window_ns.1 + OPEN_DRAIN.as_nanos() as u64, None, &mut random)?;
    let left = running.lines.iter().flat_map(|line| line.due_ns).flatten();
    let left = left.filter(|&due_ns| running.in_window(due_ns)).count();
    Ok(Outcome { completed, unanswered: running.outcome.unanswered + left as u64, ..running.outcome })
}

impl OpenLoop<'_> {
    fn in_window(&self, due_ns: u64) -> bool {
        (self.window_ns.0..self.window_ns.1).contains(&due_ns)
    }

    /// Sends what is due and takes answers until then; without a schedule, until all are there.
    fn turn_until(
        &mut self,
        end_ns: u64,
        mut schedule: Option<&mut Schedule>,
        random: &mut Random,
    ) -> Result<()> {
        let mut events = vec![EpollEvent::default(); 256];
        loop {
            stop::check()?;
            let now_ns = self.start.elapsed().as_nanos() as u64;
            let mut next_ns = end_ns;
            if let Some(schedule) = &mut schedule {
                // Also what was due when this thread was not running: a stall at the end of the window must not make requests vanish.
                loop {
                    let (due_ns, index) = schedule.peek();
                    next_ns = due_ns;
                    if due_ns > now_ns || due_ns >= end_ns {
                        break;
                    }
                    schedule.advance();
                    self.issue(index, due_ns, random)?;
                }
            }
            let idle = self.lines.iter().all(|line| line.due_ns.iter().all(Option::is_none));
            if now_ns >= end_ns || schedule.is_none() && idle {
                return Ok(());
            }
            // Less than a millisecond is waited for by looking.
            let timeout_ms = (next_ns.min(end_ns).saturating_sub(now_ns) / 1_000_000).min(100) as i32;
            let found = match self.calls.wait(timeout_ms, &mut events) {
                Ok(found) => found,
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                Err(error) => return Err(error).context("epoll_wait"),
            };
            for event in &events[..found] {
                self.answers(event.data() as usize)?;
            }
        }
    }

    fn issue(&mut self, index: usize, due_ns: u64, random: &mut Random) -> Result<()> {
        let in_window = self.in_window(due_ns);
        let line = &mut self.lines[index];
        let Some(place) = line.due_ns.iter().position(Option::is_none) else {
            self.outcome.unanswered += u64::from(in_window);
            return Ok(());
        };
        line.due_ns[place] = Some(due_ns);
        line.ring.submit(self.job.op, line.offsets.next(random), self.job.block_bytes as usize, place)?;
        line.ring.publish()?;
        // The next answer is to be told of.
        if line.ring.sleep()? {
            self.answers(index)?;
        }
        Ok(())
    }

    fn answers(&mut self, index: usize) -> Result<()> {
        self.lines[index].ring.wait(0)?;
        loop {
            self.done.clear();
            self.lines[index].ring.poll(&mut self.done)?;
            let now_ns = self.start.elapsed().as_nanos() as u64;
            for &(place, good) in &self.done {
                let due_ns = self.lines[index].due_ns[place].take().context("an answer to no request")?;
                self.outcome.completed += 1;
                self.outcome.errors += u64::from(!good);
                if (self.window_ns.0..self.window_ns.1).contains(&due_ns) {
                    self.outcome.latency_ns.saturating_record(now_ns.saturating_sub(due_ns).max(1));
                }
            }
            if !self.lines[index].ring.sleep()? {
                return Ok(());
            }
        }
    }
}

/// Writes the first `bytes` of a disk with a pattern and reads them all back; an error when any byte differs.
pub fn verify(endpoint: &Endpoint, bytes: u64) -> Result<()> {
    let mut ring = open(endpoint, 1, VERIFY_BYTES as u32)?;
    let bytes = bytes.min(ring.size_bytes()) / VERIFY_BYTES as u64 * VERIFY_BYTES as u64;
    ensure!(bytes > 0, "the disk is too small to be verified");
    for op in [Op::Write, Op::Read] {
        for offset in (0..bytes).step_by(VERIFY_BYTES) {
            stop::check()?;
            let pattern = pattern(offset);
            ring.copy_in(0, if op == Op::Write { &pattern } else { &[0xa5; VERIFY_BYTES] })?;
            one(ring.as_mut(), op, offset).with_context(|| format!("{op:?} at {offset}"))?;
            let mut found = vec![0; VERIFY_BYTES];
            ring.copy_out(0, &mut found)?;
            ensure!(found == pattern, "the data at {offset} are not what was written");
        }
    }
    Ok(())
}

fn pattern(offset: u64) -> Vec<u8> {
    let mut random = Random(offset);
    (0..VERIFY_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// One request and its answer.
fn one(ring: &mut dyn Ring, op: Op, offset: u64) -> Result<()> {
    ring.submit(op, offset, VERIFY_BYTES, 0)?;
    ring.publish()?;
    let deadline = Instant::now() + PATIENCE;
    let mut done = Vec::new();
    while done.is_empty() {
        ensure!(Instant::now() < deadline, "no answer");
        ring.poll(&mut done)?;
        if done.is_empty() && !ring.sleep()? {
            ring.wait(WAIT_MS)?;
        }
    }
    ensure!(done == [(0, true)], "answered with an error");
    Ok(())
}
