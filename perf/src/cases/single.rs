//! One disk under one client: 4k random and 64k sequential, reads and writes, one and 32 in flight. Shared by `raw` and `ram`,
//! which differ in their rows only.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use super::{Bench, Loader, loaded, loaded_ring, order, per_million};
use crate::fio;
use crate::load::{self, Op, Pace, Pattern, ring};
use crate::report::{Metric, Row, Values};
use crate::servers::{self, Aio, Disk, Frontend, Program, Running, Setup};
use crate::{files, proc, stop};

/// A way to load one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    op: Op,
    pattern: Pattern,
    block_kib: u32,
    depth: u32,
}

impl Point {
    pub(super) const fn new(block_kib: u32, pattern: Pattern, op: Op, depth: u32) -> Self {
        Self { op, pattern, block_kib, depth }
    }

    /// The name in reports.
    pub fn name(&self) -> String {
        let pattern = if self.pattern == Pattern::Random { "random" } else { "sequential" };
        let op = if self.op == Op::Read { "read" } else { "write" };
        format!("{}k {pattern} {op} QD{}", self.block_kib, self.depth)
    }
}

/// 4k random reads, one in flight.
pub const READ_4K_QD1: Point = Point::new(4, Pattern::Random, Op::Read, 1);
/// 4k random writes, one in flight.
pub const WRITE_4K_QD1: Point = Point::new(4, Pattern::Random, Op::Write, 1);
/// 4k random reads, 32 in flight.
pub const READ_4K_QD32: Point = Point::new(4, Pattern::Random, Op::Read, 32);
/// 4k random writes, 32 in flight.
pub const WRITE_4K_QD32: Point = Point::new(4, Pattern::Random, Op::Write, 32);
/// 64k sequential reads, one in flight.
pub const READ_64K_QD1: Point = Point::new(64, Pattern::Sequential, Op::Read, 1);
/// 64k sequential writes, one in flight.
pub const WRITE_64K_QD1: Point = Point::new(64, Pattern::Sequential, Op::Write, 1);
/// 64k sequential reads, 32 in flight.
pub const READ_64K_QD32: Point = Point::new(64, Pattern::Sequential, Op::Read, 32);
/// 64k sequential writes, 32 in flight.
pub const WRITE_64K_QD32: Point = Point::new(64, Pattern::Sequential, Op::Write, 32);

/// All points.
pub const POINTS: [Point; 8] = [
    READ_4K_QD1,
    WRITE_4K_QD1,
    READ_4K_QD32,
    WRITE_4K_QD32,
    READ_64K_QD1,
    WRITE_64K_QD1,
    READ_64K_QD32,
    WRITE_64K_QD32,
];

/// What a row measures.
#[derive(Debug, Clone)]
pub enum Subject {
    /// fio on the file itself, without a server.
    File(PathBuf),
    /// A server with one disk.
    Server {
        /// The program.
        program: Program,
        /// QEMU's way to submit I/O.
        aio: Aio,
        /// The disk.
        disk: Disk,
    },
}

/// A row of a single-disk case.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Its name.
    pub row: Row,
    /// What it is.
    pub subject: Subject,
}

/// Whether servers live for one measurement or for the case. A file has one server at a time; memory must keep its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// Started anew for each measurement.
    Measurement,
    /// Started once; idle while others are measured.
    Case,
}

struct Entrant {
    contender: Contender,
    running: Option<Running>,
    /// A row that failed is not measured further.
    failed: bool,
}

/// How the rows of a case are measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// The case's name.
    pub case: &'static str,
    /// Size of the disk.
    pub size_bytes: u64,
    /// How long servers live.
    pub lifetime: Lifetime,
    /// What the disks are reached by.
    pub frontend: Frontend,
    /// The points.
    pub points: &'static [Point],
    /// Whether a disk is read once before each measurement, so that its metadata is cached.
    pub warm: bool,
}

/// Adds the A/A row behind the first contender.
pub fn with_control(mut contenders: Vec<Contender>) -> Vec<Contender> {
    if let Some(first) = contenders.first().cloned() {
        contenders.insert(1, Contender { row: first.row.again(), subject: first.subject });
    }
    contenders
}

/// Checks the contenders' data, then measures all at all points in interleaved rounds.
pub fn run(bench: &mut Bench, plan: Plan, contenders: Vec<Contender>) -> Result<()> {
    let case = plan.case;
    let mut entrants: Vec<Entrant> =
        contenders.into_iter().map(|contender| Entrant { contender, running: None, failed: false }).collect();
    for entrant in &mut entrants {
        stop::check()?;
        if let Err(error) = prepare(bench, plan, entrant) {
            bench.failed(case, &entrant.contender.row, error)?;
            entrant.failed = true;
        }
    }
    for round in 0..bench.settings.rounds {
        for (at, point) in plan.points.iter().enumerate() {
            for index in order(entrants.len(), round + at as u32) {
                let entrant = &mut entrants[index];
                if entrant.failed {
                    continue;
                }
                stop::check()?;
                match measure(bench, plan, point, round, entrant) {
                    Ok(values) => bench.record(case, &point.name(), &entrant.contender.row, round, values),
                    Err(error) => {
                        bench.failed(case, &entrant.contender.row, error)?;
                        entrant.failed = true;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Starts a server and has fio write and read back checksummed blocks, unless the disk is null or the case only reads.
fn prepare(bench: &mut Bench, plan: Plan, entrant: &mut Entrant) -> Result<()> {
    let Plan { case, size_bytes, lifetime, .. } = plan;
    let Subject::Server { disk, .. } = &entrant.contender.subject else { return Ok(()) };
    let writes = plan.points.iter().any(|point| point.op == Op::Write);
    let holds_data = writes && !matches!(disk, Disk::Null(_));
    // Memory is filled completely, so that every timed read copies real bytes; of a file a part is enough.
    let bytes = if lifetime == Lifetime::Case { size_bytes } else { size_bytes.min(64 << 20) };
    let running = start(bench, plan.frontend, &entrant.contender)?;
    let row = &entrant.contender.row;
    bench.started(case, row, &running);
    if holds_data {
        let endpoint = running.endpoints[0].clone();
        match plan.frontend {
            Frontend::Nbd => {
                let target = fio::Target::Nbd(endpoint);
                fio::verify(&target, bytes, size_bytes, bench.cores().load, &bench.scratch())?;
            }
            Frontend::Ring => ring::verify(&endpoint, bytes)?,
        }
        bench.report.verified.push(format!("{case}: {row}"));
    }
    if lifetime == Lifetime::Case {
        entrant.running = Some(running);
    }
    Ok(())
}

fn start(bench: &Bench, frontend: Frontend, contender: &Contender) -> Result<Running> {
    let Subject::Server { program, aio, disk } = &contender.subject else {
        anyhow::bail!("{} is no server", contender.row)
    };
    let cores = vec![bench.cores().server];
    servers::start(&Setup {
        program,
        aio: *aio,
        cores,
        disks: vec![disk.clone()],
        frontend,
        attach: Vec::new(),
    })
}

fn measure(bench: &Bench, plan: Plan, point: &Point, round: u32, entrant: &Entrant) -> Result<Values> {
    let Plan { case, size_bytes, .. } = plan;
    // Kept alive until the end of the measurement when it was started for it.
    let started;
    let server = match (&entrant.contender.subject, &entrant.running) {
        (Subject::File(path), _) => {
            let target = fio::Target::File(path.clone());
            let outcome = fio::run(
                &fio_job(bench, target, size_bytes, point, round),
                bench.cores().load,
                &bench.scratch(),
            )?;
            let cpu = Duration::from_secs_f64(outcome.own_cpu_s.max(0.0));
            return Ok(values_of(&outcome, cpu));
        }
        (Subject::Server { .. }, Some(running)) => running,
        (Subject::Server { .. }, None) => {
            started = start(bench, plan.frontend, &entrant.contender)?;
            &started
        }
    };
    if plan.warm {
        let target = fio::Target::Nbd(server.endpoints[0].clone());
        fio::touch(&target, size_bytes, bench.cores().load, &bench.scratch())?;
    }
    let result = match bench.settings.loader {
        _ if plan.frontend == Frontend::Ring => with_ring(bench, server, point, round),
        Loader::Fio => with_fio(bench, server, size_bytes, point, round),
        Loader::Own => with_own(bench, server, point, round),
    };
    if let Subject::Server { disk, .. } = &entrant.contender.subject
        && let Some(path) = disk.path()
    {
        files::flush(path)?;
    }
    result.map_err(|error| {
        error.context(format!("{case} {}; the server said: {}", point.name(), server.last_words()))
    })
}

fn fio_job(bench: &Bench, target: fio::Target, size_bytes: u64, point: &Point, round: u32) -> fio::Job {
    fio::Job {
        target,
        op: point.op,
        pattern: point.pattern,
        block_bytes: point.block_kib << 10,
        depth: point.depth,
        seconds: bench.settings.seconds,
        size_bytes,
        seed: u64::from(round) + 1,
    }
}

fn with_fio(bench: &Bench, server: &Running, size_bytes: u64, point: &Point, round: u32) -> Result<Values> {
    let target = fio::Target::Nbd(server.endpoints[0].clone());
    let job = fio_job(bench, target, size_bytes, point, round);
    let pids = server.pids();
    let before = proc::cpu(&pids)?;
    let outcome = fio::run(&job, bench.cores().load, &bench.scratch())?;
    let after = proc::usage(&pids)?;
    let mut values = values_of(&outcome, after.cpu.saturating_sub(before));
    values.insert(Metric::PssKib, after.pss_kib as f64);
    Ok(values)
}

fn with_own(bench: &Bench, server: &Running, point: &Point, round: u32) -> Result<Values> {
    let (values, _, _) = loaded(&own_job(bench, server, point, round), server)?;
    Ok(values)
}

fn with_ring(bench: &Bench, server: &Running, point: &Point, round: u32) -> Result<Values> {
    loaded_ring(&own_job(bench, server, point, round), &server.pids())
}

fn own_job(bench: &Bench, server: &Running, point: &Point, round: u32) -> load::Job {
    load::Job {
        endpoints: vec![server.endpoints[0].clone()],
        op: point.op,
        block_bytes: point.block_kib << 10,
        pattern: point.pattern,
        pace: Pace::Closed { depth: point.depth },
        warmup: Duration::from_millis(200),
        window: Duration::from_secs(u64::from(bench.settings.seconds)),
        seed: u64::from(round) + 1,
    }
}

fn values_of(outcome: &fio::Outcome, cpu: Duration) -> Values {
    Values::from([
        (Metric::Iops, outcome.iops),
        (Metric::P50Us, outcome.p50_us),
        (Metric::P90Us, outcome.p90_us),
        (Metric::P99Us, outcome.p99_us),
        (Metric::CpuPerMillion, per_million(cpu, outcome.completed)),
    ])
}
