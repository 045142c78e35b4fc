//! The cases, and what they share: the run's settings and the report that grows.

pub mod alloc;
pub mod blkif;
pub mod chain;
pub mod cold;
pub mod convert;
pub mod density;
pub mod encrypted;
pub mod formats;
pub mod idle;
pub mod qos;
pub mod ram;
pub mod raw;
pub mod rings;
pub mod shards;
pub mod single;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use tempfile::TempDir;

use crate::cpus::Cores;
use crate::images::Tool;
use crate::load;
use crate::report::{Metric, Report, Row, Sample, Values};
use crate::servers::{Aio, Kind, Program, Running};
use crate::{proc, stop};

/// Which program makes the load of single disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Loader {
    /// fio with ioengine=nbd.
    Fio,
    /// The load generator of this program, where fio itself is the bottleneck.
    Own,
}

/// The settings of a run, equal for all cases and rows.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Interleaved rounds.
    pub rounds: u32,
    /// Length of one timed load.
    pub seconds: u32,
    /// Length of one idle window.
    pub idle_seconds: u32,
    /// Size of the raw file.
    pub file_bytes: u64,
    /// Size of a RAM disk.
    pub ram_bytes: u64,
    /// Where image files go.
    pub dir: PathBuf,
    /// What makes the load of single disks.
    pub loader: Loader,
    /// How QEMU submits I/O; one row each.
    pub aio: Vec<Aio>,
    /// Numbers of disks in the density case.
    pub disks: Vec<usize>,
    /// Clusters of a qcow2 image that the alloc case writes to.
    pub clusters: u64,
    /// Blocks of a VHD that the alloc case writes to.
    pub blocks: u64,
    /// Size of the disk in the convert case.
    pub convert_bytes: u64,
}

/// A run in progress.
#[derive(Debug)]
pub struct Bench {
    /// Settings.
    pub settings: Settings,
    /// The servers that were found.
    pub programs: Vec<Program>,
    /// What was found out so far.
    pub report: Report,
    /// True when a row of blktapd failed. A peer that fails is reported but does not fail the run.
    pub subject_failed: bool,
    scratch: TempDir,
}

impl Bench {
    /// A run with an empty report.
    pub fn new(settings: Settings, programs: Vec<Program>, report: Report) -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("blkperf").tempdir()?;
        Ok(Self { settings, programs, report, subject_failed: false, scratch })
    }

    /// The cores.
    pub fn cores(&self) -> Cores {
        self.report.host.cores.clone()
    }

    /// A server, if it takes part.
    pub fn program(&self, kind: Kind) -> Option<Program> {
        self.programs.iter().find(|program| program.kind == kind).cloned()
    }

    /// blktapd, if it takes part; otherwise the case is noted as skipped.
    pub fn blktapd_for(&mut self, case: &str) -> Option<Program> {
        let found = self.program(Kind::Blktapd);
        if found.is_none() {
            self.report.skipped.push(format!("{case}: needs blktapd, which takes no part in this run"));
        }
        found
    }

    /// The offline tool of blktapd, which makes the images of a case; without blktapd the case is noted as skipped.
    pub fn image_tool_for(&mut self, case: &str) -> Option<Tool> {
        let program = self.blktapd_for(case)?;
        Some(Tool::new(&program, self.cores().allowed, self.scratch.path()))
    }

    /// A directory for outputs of the load.
    pub fn scratch(&self) -> PathBuf {
        self.scratch.path().to_path_buf()
    }

    /// Adds one measurement and says so.
    pub fn record(&mut self, case: &str, point: &str, row: &Row, round: u32, values: Values) {
        let figures: Vec<String> = values
            .iter()
            .map(|(metric, value)| format!("{} {}", metric.title(), crate::report::table::number(*value)))
            .collect();
        eprintln!("{case} | {point} | round {} | {row}: {}", round + 1, figures.join(", "));
        self.report.samples.push(Sample {
            case: case.into(),
            point: point.into(),
            row: row.clone(),
            round,
            values,
        });
    }

    /// Notes how a server was started.
    pub fn started(&mut self, case: &str, row: &Row, running: &Running) {
        self.report.commands.insert(format!("{case}: {row}"), running.command.clone());
    }

    /// Notes that a row failed: it is not measured further, the others are. What the user interrupted is no failure of the row
    /// and ends the run.
    pub fn failed(&mut self, case: &str, row: &Row, error: anyhow::Error) -> Result<()> {
        stop::check()?;
        let line = format!("{case}: {row}: {error:#}");
        eprintln!("{line}");
        self.subject_failed |= row.server == Kind::Blktapd.name();
        self.report.failed.push(line);
        Ok(())
    }
}

/// The order of `count` rows in a turn: each turn starts with another row, so that none is always the first after a change.
pub fn order(count: usize, turn: u32) -> impl Iterator<Item = usize> {
    (0..count).map(move |index| (index + turn as usize) % count)
}

/// Runs a load against a server and measures both: the load's outcome, and the server's CPU between the edges of the window.
/// Memory is read at the end of the window.
pub fn loaded(job: &load::Job, server: &Running) -> Result<(Values, load::Outcome, Vec<load::Client>)> {
    let pids = server.pids();
    let (mut begin, mut end) = (Duration::ZERO, proc::Usage::default());
    let (outcome, clients) = load::run_and_keep(job, &mut |edge| {
        match edge {
            load::Edge::Begin => begin = proc::cpu(&pids)?,
            load::Edge::End => end = proc::usage(&pids)?,
        }
        Ok(())
    })?;
    let mut values = values_of(&outcome, begin, &end)?;
    if let load::Pace::Open { .. } = job.pace {
        values.insert(Metric::Unanswered, outcome.unanswered as f64);
    }
    Ok((values, outcome, clients))
}

/// The same for disks that are reached through rings, served by these processes.
pub fn loaded_ring(job: &load::Job, pids: &[u32]) -> Result<Values> {
    let (mut begin, mut end) = (Duration::ZERO, proc::Usage::default());
    let outcome = load::ring::run(job, &mut |edge| {
        match edge {
            load::Edge::Begin => begin = proc::cpu(pids)?,
            load::Edge::End => end = proc::usage(pids)?,
        }
        Ok(())
    })?;
    let mut values = values_of(&outcome, begin, &end)?;
    if let load::Pace::Open { .. } = job.pace {
        values.insert(Metric::Unanswered, outcome.unanswered as f64);
    }
    Ok(values)
}

/// The figures of a load, of which the server had used `begin` of CPU at its start.
fn values_of(outcome: &load::Outcome, begin: Duration, end: &proc::Usage) -> Result<Values> {
    anyhow::ensure!(outcome.errors == 0, "the server answered {} requests with an error", outcome.errors);
    anyhow::ensure!(outcome.completed > 0, "the server answered no request in {:?}", outcome.window);
    Ok(Values::from([
        (Metric::Iops, outcome.iops()),
        (Metric::P50Us, outcome.percentile_us(50.0)),
        (Metric::P90Us, outcome.percentile_us(90.0)),
        (Metric::P99Us, outcome.percentile_us(99.0)),
        (Metric::CpuPerMillion, per_million(end.cpu.saturating_sub(begin), outcome.completed)),
        (Metric::PssKib, end.pss_kib as f64),
    ]))
}

/// CPU seconds per million operations.
pub fn per_million(cpu: Duration, operations: u64) -> f64 {
    cpu.as_secs_f64() * 1e6 / operations.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: each turn measures every row once and begins with another. Method: three rows, three turns.
    #[test]
    fn turns_rotate() {
        let turns: Vec<Vec<usize>> = (0..3).map(|turn| order(3, turn).collect()).collect();
        assert_eq!(turns, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
    }

    // Goal: units of the CPU figure. Method: 0.5 s for 100 000 operations are 5 s per million.
    #[test]
    fn cpu_per_million_has_its_unit() {
        assert!((per_million(Duration::from_millis(500), 100_000) - 5.0).abs() < 1e-9);
    }
}
