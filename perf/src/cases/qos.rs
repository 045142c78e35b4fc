//! `qos`: does a limit hold, and does it protect a neighbour. Both measure blktapd only; its limits have no burst unless asked.
//!
//! Accuracy: a closed loop with 32 in flight pushes against each limit; after a second the rate over five seconds is compared
//! with the limit. Neighbour: one disk has 500 reads per second (open loop) while another disk of the same shard is (a) idle,
//! twice, as the control and its A/A, (b) pushed against its limit, (c) pushed without a limit, for information.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{Bench, loaded, order};
use crate::files::ImageDir;
use crate::load::{self, Op, Pace, Pattern};
use crate::report::{Metric, Row};
use crate::servers::{self, Aio, Disk, Endpoint, Frontend, Kind, Program, Running, Setup};
use crate::stop;

/// The case's name.
pub const CASE: &str = "qos";
/// Point: the neighbour without any other load.
pub const ALONE: &str = "neighbour alone";
/// Point: the same once more.
pub const ALONE_AGAIN: &str = "neighbour alone, A/A";
/// Point: another disk is pushed against its limit.
pub const BESIDE_LIMITED: &str = "neighbour beside a limited disk";
/// Point: another disk is pushed without limit.
pub const BESIDE_UNLIMITED: &str = "neighbour beside an unlimited disk";
const WINDOW: Duration = Duration::from_secs(5);
const WARMUP: Duration = Duration::from_secs(1);
const DISK_BYTES: u64 = 64 << 20;
const PUSH_DEPTH: u32 = 32;
const NEIGHBOUR_PER_SECOND: f64 = 500.0;
const NEIGHBOUR_LIMIT: &str = "500";

/// A limit to be checked.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    option: &'static str,
    per_second: u64,
    op: Op,
    block_bytes: u32,
}

impl Limit {
    /// The name in reports.
    pub fn point(&self) -> String {
        let op = if self.op == Op::Read { "reads" } else { "writes" };
        format!("{} {}, {}k {op}", self.option, self.per_second, self.block_bytes >> 10)
    }
}

/// The limits that are checked: small and large, operations and bytes, total and by direction.
pub const LIMITS: [Limit; 5] = [
    Limit { option: "--iops", per_second: 500, op: Op::Read, block_bytes: 4096 },
    Limit { option: "--iops", per_second: 5000, op: Op::Read, block_bytes: 4096 },
    Limit { option: "--iops-write", per_second: 1000, op: Op::Write, block_bytes: 4096 },
    Limit { option: "--bps", per_second: 20_000_000, op: Op::Read, block_bytes: 4096 },
    Limit { option: "--bps", per_second: 100_000_000, op: Op::Write, block_bytes: 65_536 },
];

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "raw")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(program) = bench.blktapd_for(CASE) else { return Ok(()) };
    let images = ImageDir::new(&bench.settings.dir, 3 * DISK_BYTES)?;
    let disks: Vec<Disk> = images.files("disks", 3, DISK_BYTES)?.into_iter().map(Disk::File).collect();
    for round in 0..bench.settings.rounds {
        let result = accuracy(bench, &program, &disks[0], round)
            .and_then(|()| neighbour(bench, &program, &disks, round));
        if let Err(error) = result {
            return bench.failed(CASE, &subject(), error);
        }
    }
    Ok(())
}

fn job(endpoint: &Endpoint, op: Op, block_bytes: u32, pace: Pace, round: u32) -> load::Job {
    load::Job {
        endpoints: vec![endpoint.clone()],
        op,
        block_bytes,
        pattern: Pattern::Random,
        pace,
        warmup: WARMUP,
        window: WINDOW,
        seed: u64::from(round) + 1,
    }
}

fn accuracy(bench: &mut Bench, program: &Program, disk: &Disk, round: u32) -> Result<()> {
    for limit in &LIMITS {
        stop::check()?;
        let attach = vec![vec![limit.option.to_owned(), limit.per_second.to_string()]];
        let cores = vec![bench.cores().server];
        let setup = Setup {
            program,
            aio: Aio::IoUring,
            cores,
            disks: vec![disk.clone()],
            frontend: Frontend::Nbd,
            attach,
        };
        let server = servers::start(&setup)?;
        bench.started(CASE, &subject(), &server);
        let pace = Pace::Closed { depth: PUSH_DEPTH };
        let (mut values, outcome, _) =
            loaded(&job(&server.endpoints[0], limit.op, limit.block_bytes, pace, round), &server)?;
        let unit = if limit.option.starts_with("--bps") { f64::from(limit.block_bytes) } else { 1.0 };
        let measured = outcome.iops() * unit;
        let error_percent = 100.0 * (measured - limit.per_second as f64).abs() / limit.per_second as f64;
        values.insert(Metric::LimitErrorPercent, error_percent);
        bench.record(CASE, &limit.point(), &subject(), round, values);
    }
    Ok(())
}

fn neighbour(bench: &mut Bench, program: &Program, disks: &[Disk], round: u32) -> Result<()> {
    let attach = vec![Vec::new(), vec!["--iops".to_owned(), NEIGHBOUR_LIMIT.to_owned()], Vec::new()];
    let setup = Setup {
        program,
        aio: Aio::IoUring,
        cores: vec![bench.cores().server],
        disks: disks.to_vec(),
        frontend: Frontend::Nbd,
        attach,
    };
    let server = servers::start(&setup)?;
    let [neighbour, limited, unlimited] = server.endpoints.as_slice() else {
        anyhow::bail!("three disks were asked for, {} are there", server.endpoints.len())
    };
    let points = [
        (ALONE, None),
        (BESIDE_LIMITED, Some(limited)),
        (ALONE_AGAIN, None),
        (BESIDE_UNLIMITED, Some(unlimited)),
    ];
    for index in order(points.len(), round) {
        stop::check()?;
        let (point, pushed) = points[index];
        let job = job(neighbour, Op::Read, 4096, Pace::Open { per_second: NEIGHBOUR_PER_SECOND }, round);
        let mut values = beside(&job, pushed, &server)?;
        // The server's CPU is for both disks and says nothing here.
        values.remove(&Metric::CpuPerMillion);
        bench.record(CASE, point, &subject(), round, values);
    }
    Ok(())
}

/// Runs `job`, and a closed loop on `pushed` during it, from a little before its window until its end.
fn beside(job: &load::Job, pushed: Option<&Endpoint>, server: &Running) -> Result<crate::report::Values> {
    std::thread::scope(|scope| {
        let push = pushed.map(|endpoint| {
            let push = load::Job {
                endpoints: vec![endpoint.clone()],
                pace: Pace::Closed { depth: PUSH_DEPTH },
                ..job.clone()
            };
            scope.spawn(move || load::run(&push, &mut |_| Ok(())))
        });
        let result = loaded(job, server).map(|(values, _, _)| values);
        if let Some(push) = push {
            push.join().ok().context("the other load panicked")?.context("the load on the other disk")?;
        }
        result
    })
}
