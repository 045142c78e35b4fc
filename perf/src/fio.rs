//! fio as the load of one disk (ioengine=nbd), as the limit (io_uring on the file itself) and as the witness that a server
//! keeps what is written (`--verify`). Its JSON is read by serde; only the fields used here are named.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::load::{Op, Pattern};
use crate::servers::Endpoint;
use crate::servers::process::{Process, output};

/// No fio runs longer, whatever happens to this program.
const FIO_MAX: Duration = Duration::from_secs(4000);

/// What fio works on.
#[derive(Debug, Clone)]
pub enum Target {
    /// A disk over NBD.
    Nbd(Endpoint),
    /// A file, with O_DIRECT and io_uring.
    File(PathBuf),
}

/// One timed fio job.
#[derive(Debug, Clone)]
pub struct Job {
    /// What it works on.
    pub target: Target,
    /// Reads or writes.
    pub op: Op,
    /// Random or sequential.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
    /// How long.
    pub seconds: u32,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Equal seeds give equal offsets.
    pub seed: u64,
}

/// What one job measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Requests completed.
    pub completed: u64,
    /// Per second, by fio's own clock.
    pub iops: f64,
    /// Percentiles of the whole latency (submission and completion) in microseconds.
    pub p50_us: f64,
    /// 90th.
    pub p90_us: f64,
    /// 99th.
    pub p99_us: f64,
    /// fio's own user and system time in seconds.
    pub own_cpu_s: f64,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Deserialize)]
struct JobOutput {
    error: i64,
    read: Direction,
    write: Direction,
    usr_cpu: f64,
    sys_cpu: f64,
    job_runtime: f64,
}

#[derive(Deserialize)]
struct Direction {
    total_ios: u64,
    iops: f64,
    lat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, f64>,
}

/// The version of the fio in PATH, or why there is none.
pub fn version() -> Result<String> {
    Ok(output(Command::new("fio").arg("--version"))?.trim().to_owned())
}

/// Runs one timed job on `core`. `dir` is for its output files.
pub fn run(job: &Job, core: usize, dir: &Path) -> Result<Outcome> {
    let rw = match (job.pattern, job.op) {
        (Pattern::Random, Op::Read) => "randread",
        (Pattern::Random, Op::Write) => "randwrite",
        (Pattern::Sequential, Op::Read) => "read",
        (Pattern::Sequential, Op::Write) => "write",
    };
    let mut command = base(&job.target, job.size_bytes);
    command
        .arg(format!("--rw={rw}"))
        .arg(format!("--bs={}", job.block_bytes))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--runtime={}", job.seconds))
        .arg(format!("--randseed={}", job.seed))
        .args(["--time_based", "--norandommap", "--lat_percentiles=1", "--clat_percentiles=0"])
        .arg("--percentile_list=50:90:99");
    let text = finish(command, core, dir, Duration::from_secs(u64::from(job.seconds) + 60))?;
    parse(&text, job.op)
}

/// Writes the first `bytes` of the disk with checksummed blocks and reads them all back; an error when any byte differs.
pub fn verify(target: &Target, bytes: u64, size_bytes: u64, core: usize, dir: &Path) -> Result<()> {
    let mut command = base(target, bytes.min(size_bytes));
    command.args([
        "--rw=write",
        "--bs=1m",
        "--iodepth=8",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
    ]);
    let text =
        finish(command, core, dir, Duration::from_secs(300)).context("verification of written data")?;
    let read = only_job(&text)?.read.total_ios;
    ensure!(read > 0, "fio read nothing back");
    Ok(())
}

/// Reads the whole disk once, so that what a server keeps of its metadata is there.
pub fn touch(target: &Target, size_bytes: u64, core: usize, dir: &Path) -> Result<()> {
    let mut command = base(target, size_bytes);
    command.args(["--rw=read", "--bs=1m", "--iodepth=4"]);
    finish(command, core, dir, Duration::from_secs(300)).context("reading the disk once")?;
    Ok(())
}

fn base(target: &Target, size_bytes: u64) -> Command {
    // fio hangs for ever when a server goes away, and would outlive this program if that is killed.
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", &FIO_MAX.as_secs().to_string(), "fio"]);
    command.args(["--thread", "--name=perf", "--output-format=json"]).arg(format!("--size={size_bytes}"));
    match target {
        Target::Nbd(endpoint) => command.arg("--ioengine=nbd").arg(format!("--uri={}", endpoint.uri())),
        // A colon separates file names in fio's option.
        Target::File(path) => command
            .args(["--ioengine=io_uring", "--direct=1"])
            .arg(format!("--filename={}", path.display().to_string().replace(':', "\\:"))),
    };
    command
}

fn finish(mut command: Command, core: usize, dir: &Path, timeout: Duration) -> Result<String> {
    let file = dir.join("fio.json");
    command.arg(format!("--output={}", file.display()));
    let mut process = Process::spawn(command, &[core], &dir.join("fio.log"))?;
    let status = process.wait(timeout)?;
    ensure!(status.success(), "fio failed ({status}): {}", process.last_words());
    std::fs::read_to_string(&file).with_context(|| format!("fio wrote no {}", file.display()))
}

fn only_job(text: &str) -> Result<JobOutput> {
    // Notes of fio's engines may stand before the JSON.
    let json = text.find('{').map_or(text, |at| &text[at..]);
    let output: Output =
        serde_json::from_str(json).context("fio's JSON is not as expected (fio 3.33 was used here)")?;
    let job = output.jobs.into_iter().next().context("fio reported no job")?;
    ensure!(job.error == 0, "fio reported error {}", job.error);
    Ok(job)
}

fn parse(text: &str, op: Op) -> Result<Outcome> {
    let job = only_job(text)?;
    let direction = match op {
        Op::Read => &job.read,
        Op::Write => &job.write,
    };
    ensure!(direction.total_ios > 0, "fio completed no request");
    let percentile = |name: &str| {
        direction
            .lat_ns
            .percentile
            .get(name)
            .map(|ns| ns / 1000.0)
            .with_context(|| format!("fio gave no percentile {name}"))
    };
    Ok(Outcome {
        completed: direction.total_ios,
        iops: direction.iops,
        p50_us: percentile("50.000000")?,
        p90_us: percentile("90.000000")?,
        p99_us: percentile("99.000000")?,
        own_cpu_s: (job.usr_cpu + job.sys_cpu) / 100.0 * job.job_runtime / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"note of an engine
{"fio version":"fio-3.33","jobs":[{"jobname":"perf","error":0,"usr_cpu":10.0,"sys_cpu":30.0,"job_runtime":2000,
"read":{"total_ios":117451,"iops":117333.6,"lat_ns":{"min":1,"percentile":{"50.000000":24448,"90.000000":67072,"99.000000":109056}}},
"write":{"total_ios":0,"iops":0.0,"lat_ns":{"min":0}}}]}"#;

    // Goal: the figures come from the right direction and unit. Method: the shape of fio 3.33's output, shortened.
    #[test]
    fn figures_have_their_units() {
        let outcome = parse(TEXT, Op::Read).unwrap();
        assert_eq!((outcome.completed, outcome.p50_us, outcome.p99_us), (117_451, 24.448, 109.056));
        assert!((outcome.own_cpu_s - 0.8).abs() < 1e-9);
    }

    // Goal: no result is no zero. Method: the direction that did nothing, a failed job, and no JSON.
    #[test]
    fn nothing_is_an_error() {
        assert!(parse(TEXT, Op::Write).is_err());
        assert!(parse(&TEXT.replace("\"error\":0", "\"error\":5"), Op::Read).is_err());
        assert!(parse("", Op::Read).is_err());
    }
}
