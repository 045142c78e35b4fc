//! `shards`: does a second active shard make an operation dearer. One shard and two, with a RAM disk and a client each.
//!
//! The conditions are the same per shard: on four or more cores each shard and each load has a core of its own; on fewer, each
//! load shares the core of its shard in *both* rows. Throughput can only be judged in the first arrangement.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Bench, order, per_million};
use crate::load::{self, Op, Pace, Pattern};
use crate::report::{Metric, Row, Values};
use crate::servers::{self, Aio, Disk, Frontend, Kind, Program, Setup};
use crate::{cpus, fio, proc, stop};

/// The case's name.
pub const CASE: &str = "shards";
/// The only point.
pub const POINT: &str = "RAM, 4k random read QD32 per shard";
/// Cores that are needed to judge throughput.
pub const CORES_FOR_SCALING: usize = 4;
const WARMUP: Duration = Duration::from_millis(500);
/// Of each RAM disk.
const DISK_BYTES: u64 = 64 << 20;

/// The row with one shard.
pub fn one() -> Row {
    Row::new(Kind::Blktapd, "one shard")
}

/// The row with two.
pub fn two() -> Row {
    Row::new(Kind::Blktapd, "two shards")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(program) = bench.blktapd_for(CASE) else { return Ok(()) };
    let allowed = bench.cores().allowed;
    let (shards, loads) = match allowed.as_slice() {
        [a, b, c, d, ..] => ([*a, *b], [*c, *d]),
        [a, b, ..] => ([*a, *b], [*a, *b]),
        _ => {
            bench.report.skipped.push(format!("{CASE}: needs two cores, there is one"));
            return Ok(());
        }
    };
    let rows = [(one(), 1), (one().again(), 1), (two(), 2)];
    for round in 0..bench.settings.rounds {
        for index in order(rows.len(), round) {
            stop::check()?;
            let (row, count) = &rows[index];
            match measure(bench, &program, &shards[..*count], &loads[..*count], row, round) {
                Ok(values) => bench.record(CASE, POINT, row, round, values),
                Err(error) => return bench.failed(CASE, row, error),
            }
        }
    }
    Ok(())
}

fn measure(
    bench: &mut Bench,
    program: &Program,
    shards: &[usize],
    loads: &[usize],
    row: &Row,
    round: u32,
) -> Result<Values> {
    let disks = vec![Disk::Ram(DISK_BYTES); shards.len()];
    let attach = (0..shards.len()).map(|shard| vec!["--shard".to_owned(), shard.to_string()]).collect();
    let server = servers::start(&Setup {
        program,
        aio: Aio::IoUring,
        cores: shards.to_vec(),
        disks,
        frontend: Frontend::Nbd,
        attach,
    })?;
    bench.started(CASE, row, &server);
    for endpoint in &server.endpoints {
        let target = fio::Target::Nbd(endpoint.clone());
        fio::verify(&target, DISK_BYTES, DISK_BYTES, bench.cores().load, &bench.scratch())?;
    }
    let window = Duration::from_secs(u64::from(bench.settings.seconds));
    let job = |endpoint| load::Job {
        endpoints: vec![endpoint],
        op: Op::Read,
        block_bytes: 4096,
        pattern: Pattern::Random,
        pace: Pace::Closed { depth: 32 },
        warmup: WARMUP,
        window,
        seed: u64::from(round) + 1,
    };
    let pids = server.pids();
    let results = std::thread::scope(|scope| -> Result<Vec<(Duration, load::Outcome)>> {
        let threads: Vec<_> = server
            .endpoints
            .iter()
            .zip(loads)
            .map(|(endpoint, &core)| {
                let (job, pids) = (job(endpoint.clone()), &pids);
                scope.spawn(move || on_core(&job, core, pids))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().ok().context("a load panicked")?).collect()
    })?;
    let errors: u64 = results.iter().map(|(_, outcome)| outcome.errors).sum();
    ensure!(errors == 0, "the server answered {errors} requests with an error");
    let iops: f64 = results.iter().map(|(_, outcome)| outcome.iops()).sum();
    // The windows of the loads differ by the time of connecting: CPU is taken as a rate, as the operations are.
    let (cpu, outcome) = results.first().context("no load")?;
    let operations = iops * outcome.window.as_secs_f64();
    ensure!(operations >= 1.0, "the server answered no request");
    Ok(Values::from([(Metric::Iops, iops), (Metric::CpuPerMillion, per_million(*cpu, operations as u64))]))
}

/// Runs a load on a core; with the CPU of the whole server in the load's window.
fn on_core(job: &load::Job, core: usize, pids: &[u32]) -> Result<(Duration, load::Outcome)> {
    cpus::pin(&[core])?;
    let (mut begin, mut end) = (Duration::ZERO, Duration::ZERO);
    let outcome = load::run(job, &mut |edge| {
        match edge {
            load::Edge::Begin => begin = proc::cpu(pids)?,
            load::Edge::End => end = proc::cpu(pids)?,
        }
        Ok(())
    })?;
    Ok((end.saturating_sub(begin), outcome))
}
