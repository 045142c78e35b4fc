//! The event loop of the load generator: one thread, one epoll, one timer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::client::{Client, Op};
use super::schedule::{Offsets, Random, Schedule};
use super::{Edge, Job, Outcome, Pace};
use crate::stop;

/// Requests in flight on one connection of an open loop; more wait, up to [`WAITING_MAX`].
const OPEN_DEPTH_MAX: u32 = 64;
/// Due requests that wait for a place on one connection.
const WAITING_MAX: usize = 4096;
/// How long answers are awaited after the window.
const DRAIN: Duration = Duration::from_secs(1);
/// The largest accepted request.
const BLOCK_MAX: u32 = 32 << 20;
const TIMER: u64 = u64::MAX;
/// Latencies above are recorded as this.
const LATENCY_MAX_NS: u64 = 600_000_000_000;

/// A place for one request in flight; its index is the NBD handle.
#[derive(Debug, Clone, Copy)]
struct Slot {
    since_ns: u64,
    busy: bool,
}

struct Connection {
    client: Client,
    offsets: Offsets,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Open loop: due times of requests that found no free slot.
    waiting: VecDeque<u64>,
    /// Whether the socket is polled for room.
    polls_out: bool,
}

/// A load that is running.
pub(super) struct Engine<'a> {
    job: &'a Job,
    connections: Vec<Connection>,
    epoll: Epoll,
    timer: TimerFd,
    schedule: Option<Schedule>,
    random: Random,
    payload: Vec<u8>,
    start: Instant,
    /// The moment for which the timer is set; 0 when it is not.
    armed_ns: u64,
    tally: Tally,
}

/// What is counted. Times are nanoseconds from the start of the load.
struct Tally {
    /// The measured window, as planned.
    planned_ns: (u64, u64),
    /// While the window is open, completions count.
    open: bool,
    completed: u64,
    errors: u64,
    unanswered: u64,
    latency_ns: Histogram<u64>,
}

impl Tally {
    fn reply(&mut self, since_ns: u64, now_ns: u64, error: u32) {
        if self.open {
            self.completed += 1;
        }
        if error != 0 {
            self.errors += 1;
        }
        if self.in_window(since_ns) {
            // `saturating_record` clips at the largest value instead of losing it.
            self.latency_ns.saturating_record(now_ns.saturating_sub(since_ns).max(1));
        }
    }

    fn in_window(&self, at_ns: u64) -> bool {
        (self.planned_ns.0..self.planned_ns.1).contains(&at_ns)
    }
}

impl<'a> Engine<'a> {
    /// Opens all connections.
    pub(super) fn new(job: &'a Job) -> Result<Self> {
        ensure!(!job.endpoints.is_empty(), "a load needs at least one disk");
        ensure!(
            (1..=BLOCK_MAX).contains(&job.block_bytes),
            "a block of {} bytes is not possible",
            job.block_bytes
        );
        let mut random = Random(job.seed);
        let (depth, schedule) = match job.pace {
            Pace::Closed { depth } => {
                ensure!((1..=4096).contains(&depth), "{depth} requests in flight: 1 to 4096 are possible");
                (depth, None)
            }
            Pace::Open { per_second } => {
                ensure!(
                    per_second > 0.0 && per_second <= 1e6,
                    "{per_second} operations per second are not possible"
                );
                (OPEN_DEPTH_MAX, Some(Schedule::new(job.endpoints.len(), per_second, &mut random)))
            }
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        let mut connections = Vec::with_capacity(job.endpoints.len());
        for (index, endpoint) in job.endpoints.iter().enumerate() {
            stop::check()?;
            let client = Client::open(endpoint, job.op, job.block_bytes)?;
            epoll.add(client.socket(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
            let offsets = Offsets::new(job.pattern, client.size_bytes, job.block_bytes);
            let slots = vec![Slot { since_ns: 0, busy: false }; depth as usize];
            let free = (0..depth).collect();
            connections.push(Connection {
                client,
                offsets,
                slots,
                free,
                waiting: VecDeque::new(),
                polls_out: false,
            });
        }
        let payload = match job.op {
            Op::Read => Vec::new(),
            Op::Write => (0..job.block_bytes).map(|_| random.next() as u8).collect(),
        };
        let begin_ns = job.warmup.as_nanos() as u64;
        let tally = Tally {
            planned_ns: (begin_ns, begin_ns + job.window.as_nanos() as u64),
            open: false,
            completed: 0,
            errors: 0,
            unanswered: 0,
            latency_ns: Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).context("histogram")?,
        };
        Ok(Self {
            job,
            connections,
            epoll,
            timer,
            schedule,
            random,
            payload,
            start: Instant::now(),
            armed_ns: 0,
            tally,
        })
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Runs warm-up, window and drain; hands the connections back.
    pub(super) fn run(mut self, at: &mut dyn FnMut(Edge) -> Result<()>) -> Result<(Outcome, Vec<Client>)> {
        self.start = Instant::now();
        if let Pace::Closed { depth } = self.job.pace {
            for index in 0..self.connections.len() {
                for _ in 0..depth {
                    self.issue(index, self.now_ns())?;
                }
                self.flush(index)?;
            }
        }
        let (begin_ns, end_ns) = self.tally.planned_ns;
        self.turn_until(begin_ns)?;
        at(Edge::Begin)?;
        let opened = Instant::now();
        self.tally.open = true;
        self.turn_until(end_ns)?;
        self.tally.open = false;
        let window = opened.elapsed();
        at(Edge::End)?;
        self.drain()?;
        let clients = self.connections.into_iter().map(|connection| connection.client).collect();
        let Tally { completed, errors, unanswered, latency_ns, .. } = self.tally;
        Ok((Outcome { completed, errors, unanswered, window, latency_ns }, clients))
    }

    /// Sends, receives and sleeps until the time `until_ns`.
    fn turn_until(&mut self, until_ns: u64) -> Result<()> {
        let mut scratch = vec![0; 256 << 10];
        loop {
            stop::check()?;
            let now = self.now_ns();
            // Also what was due when this thread was not running: a stall at the end of the window must not make requests vanish.
            self.send_due(now.min(until_ns))?;
            if now >= until_ns {
                return Ok(());
            }
            let wake = self.schedule.as_ref().map_or(until_ns, |schedule| schedule.peek().0.min(until_ns));
            if wake != self.armed_ns {
                let wait = Duration::from_nanos(wake.saturating_sub(self.now_ns()).max(1));
                self.timer.set(Expiration::OneShot(TimeSpec::from(wait)), TimerSetTimeFlags::empty())?;
                self.armed_ns = wake;
            }
            self.poll(EpollTimeout::NONE, &mut scratch)?;
        }
    }

    /// One wait and what it brought.
    fn poll(&mut self, timeout: EpollTimeout, scratch: &mut [u8]) -> Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(error) => return Err(error).context("epoll_wait"),
        };
        for event in &events[..count] {
            if event.data() == TIMER {
                // Only wakes the loop; reading the count makes it not ready again. Another wake-up may have read it.
                let _ = self.timer.wait();
                self.armed_ns = 0;
                continue;
            }
            let index = event.data() as usize;
            if event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                self.receive(index, scratch)
                    .with_context(|| format!("export {:?}", self.job.endpoints[index].export))?;
            }
            self.flush(index)?;
        }
        Ok(())
    }

    /// Open loop: sends everything that is due.
    fn send_due(&mut self, now_ns: u64) -> Result<()> {
        while let Some(schedule) = &mut self.schedule {
            let (due_ns, index) = schedule.peek();
            if due_ns > now_ns || due_ns >= self.tally.planned_ns.1 {
                break;
            }
            schedule.advance();
            let connection = &mut self.connections[index];
            if !connection.free.is_empty() {
                self.issue(index, due_ns)?;
                self.flush(index)?;
            } else if connection.waiting.len() < WAITING_MAX {
                connection.waiting.push_back(due_ns);
            } else if self.tally.in_window(due_ns) {
                self.tally.unanswered += 1;
            }
        }
        Ok(())
    }

    /// Queues one request; there is a free slot.
    fn issue(&mut self, index: usize, since_ns: u64) -> Result<()> {
        let connection = &mut self.connections[index];
        let Some(slot) = connection.free.pop() else { bail!("no free slot for a request") };
        connection.slots[slot as usize] = Slot { since_ns, busy: true };
        let offset = connection.offsets.next(&mut self.random);
        connection.client.queue(self.job.op, u64::from(slot), offset, self.job.block_bytes, &self.payload);
        Ok(())
    }

    fn flush(&mut self, index: usize) -> Result<()> {
        let connection = &mut self.connections[index];
        let blocked = !connection.client.flush()?;
        if blocked != connection.polls_out {
            connection.polls_out = blocked;
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, blocked);
            self.epoll.modify(connection.client.socket(), &mut EpollEvent::new(flags, index as u64))?;
        }
        Ok(())
    }

    /// Takes replies and, while the load lasts, sends the next requests.
    fn receive(&mut self, index: usize, scratch: &mut [u8]) -> Result<()> {
        let start = self.start;
        let Connection { client, slots, free, .. } = &mut self.connections[index];
        let tally = &mut self.tally;
        client.receive(scratch, |reply| {
            let slot = usize::try_from(reply.handle).ok().and_then(|handle| slots.get_mut(handle));
            let Some(slot) = slot.filter(|slot| slot.busy) else {
                bail!("a reply for handle {}, which is not in flight", reply.handle);
            };
            slot.busy = false;
            free.push(reply.handle as u32);
            tally.reply(slot.since_ns, start.elapsed().as_nanos() as u64, reply.error);
            Ok(())
        })?;
        let now_ns = self.now_ns();
        if now_ns >= self.tally.planned_ns.1 {
            return Ok(());
        }
        match self.job.pace {
            Pace::Closed { .. } => {
                while !self.connections[index].free.is_empty() {
                    self.issue(index, now_ns)?;
                }
            }
            Pace::Open { .. } => {
                while !self.connections[index].free.is_empty() {
                    let Some(due_ns) = self.connections[index].waiting.pop_front() else { break };
                    self.issue(index, due_ns)?;
                }
            }
        }
        Ok(())
    }

    /// Awaits the answers to what was sent, for a bounded time, and counts what has none.
    fn drain(&mut self) -> Result<()> {
        let deadline = Instant::now() + DRAIN;
        let mut scratch = vec![0; 256 << 10];
        let in_flight = |connection: &Connection| connection.slots.len() - connection.free.len();
        while Instant::now() < deadline && self.connections.iter().any(|connection| in_flight(connection) > 0)
        {
            stop::check()?;
            self.poll(EpollTimeout::from(50u8), &mut scratch)?;
        }
        if let Pace::Open { .. } = self.job.pace {
            for connection in &self.connections {
                let sent =
                    connection.slots.iter().filter(|slot| slot.busy && self.tally.in_window(slot.since_ns));
                let waiting = connection.waiting.iter().filter(|&&due_ns| self.tally.in_window(due_ns));
                self.tally.unanswered += (sent.count() + waiting.count()) as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pattern, run};
    use super::*;
    use crate::servers::{Aio, Disk, Frontend, Kind, Program, Running, Setup, start};

    /// QEMU's null disk as the peer of these tests.
    fn null_disk(kind: Kind, disks: usize) -> Option<Running> {
        let program = match Program::find(kind) {
            Ok(program) => program,
            Err(reason) => {
                eprintln!("skipped: {reason}");
                return None;
            }
        };
        let cores = crate::cpus::allowed().unwrap();
        let disks = vec![Disk::Null(1 << 20); disks];
        Some(
            start(&Setup {
                program: &program,
                aio: Aio::Threads,
                cores,
                disks,
                frontend: Frontend::Nbd,
                attach: Vec::new(),
            })
            .unwrap(),
        )
    }

    fn job(server: &Running, op: Op, pace: Pace) -> Job {
        Job {
            endpoints: server.endpoints.clone(),
            op,
            block_bytes: 65536,
            pattern: Pattern::Random,
            pace,
            warmup: Duration::from_millis(200),
            window: Duration::from_millis(1000),
            seed: 5,
        }
    }

    // Goal: a closed loop of writes and reads runs against a real server, larger than the socket's buffers, with as many
    // latencies as requests. Method: qemu-nbd null-co, 32 x 64 KiB in flight.
    #[test]
    fn closed_loop_against_qemu_nbd() {
        let Some(server) = null_disk(Kind::QemuNbd, 1) else { return };
        for op in [Op::Write, Op::Read] {
            let mut edges = Vec::new();
            let outcome = run(&job(&server, op, Pace::Closed { depth: 32 }), &mut |edge| {
                edges.push(edge);
                Ok(())
            })
            .unwrap();
            assert_eq!(edges, [Edge::Begin, Edge::End]);
            assert_eq!(outcome.errors, 0);
            assert!(outcome.completed > 32, "{}", outcome.completed);
            assert!(outcome.latency_ns.len().abs_diff(outcome.completed) <= 64, "{op:?}: {outcome:?}");
        }
    }

    // Goal: an open loop sends each due request exactly once and accounts for all of them. Method: 8 exports of one
    // qemu-storage-daemon, 50/s each for one second: 400 are due in the window.
    #[test]
    fn open_loop_accounts_for_every_due_request() {
        let Some(server) = null_disk(Kind::QemuStorageDaemon, 8) else { return };
        let outcome = run(&job(&server, Op::Read, Pace::Open { per_second: 50.0 }), &mut |_| Ok(())).unwrap();
        let due = outcome.latency_ns.len() + outcome.unanswered;
        // The window's edges may fall between the requests of a connection.
        assert!(due.abs_diff(400) <= 8, "{due} requests were accounted for in {:?}", outcome.window);
        assert_eq!(outcome.errors, 0);
    }

    // Goal: an unknown export is an error that names it. Method: qemu-storage-daemon, an export that is not there.
    #[test]
    fn unknown_export_is_named() {
        let Some(server) = null_disk(Kind::QemuStorageDaemon, 1) else { return };
        let mut job = job(&server, Op::Read, Pace::Closed { depth: 1 });
        job.endpoints[0].export = "nowhere".into();
        let error = run(&job, &mut |_| Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("nowhere"), "{error:#}");
    }
}
