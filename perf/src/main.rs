//! `blktapd-perf`: blktapd beside its peers, in one run, with ratios instead of absolute claims.
//!
//! Charter: drives every server through its public command line, NBD, and rings in shared memory only, and measures from the outside
//! by the same means for all. Of the other crates it imports `ring-bridge` alone, and of that the frontend's side and the type of shared memory,
//! so it cannot know more about blktapd than about a peer. It must never
//! drop a measurement silently: what was not measured or failed stands in the report.
//!
//! Each exit path (end, error, SIGINT, SIGTERM, SIGHUP) unwinds normally: children are killed and temporary files removed by
//! destructors.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod args;
mod cases;
mod cpus;
mod files;
mod fio;
mod images;
mod load;
mod proc;
mod report;
mod servers;
mod stats;
mod stop;
mod targets;

use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use args::{Case, Cli, Command, LoadArgs, RunArgs};
use cases::{Bench, Settings};
use cpus::Cores;
use report::{Host, Report, SCHEMA};
use servers::{Endpoint, Kind, Program, process};

fn main() -> ExitCode {
    let result = stop::install().and_then(|()| match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Load(args) => load(&args),
        Command::Compare { first, second } => {
            print!(
                "{}",
                report::compare::render(&report::json::load(&first)?, &report::json::load(&second)?)
            );
            Ok(())
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blktapd-perf: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs) -> Result<()> {
    let settings = settings(args);
    let cores = Cores::choose(args.server_cpu, args.load_cpu)?;
    let fio = fio::version().context("fio is needed for the load")?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    raise_descriptor_limit()?;
    let (programs, mut skipped) = programs(args)?;
    if cores.server == cores.load {
        skipped.push(
            "a core of its own for the load: there is only one core, so figures include the load's share"
                .into(),
        );
    }
    let report = Report {
        schema: SCHEMA,
        host: host(&settings.dir, cores.clone(), fio)?,
        programs: programs.clone(),
        commands: Default::default(),
        verified: Vec::new(),
        samples: Vec::new(),
        skipped,
        failed: Vec::new(),
        targets: Vec::new(),
    };
    let mut bench = Bench::new(settings, programs, report)?;
    // What this program does beside the load belongs to the load's core.
    cpus::pin(&[cores.load])?;
    let mut names = Vec::new();
    let mut ended = Ok(());
    for case in &args.cases {
        let (name, work): (_, fn(&mut Bench) -> Result<()>) = match case {
            Case::Raw => (cases::raw::CASE, cases::raw::run),
            Case::Ram => (cases::ram::CASE, cases::ram::run),
            Case::Density => (cases::density::CASE, cases::density::run),
            Case::Qos => (cases::qos::CASE, cases::qos::run),
            Case::Shards => (cases::shards::CASE, cases::shards::run),
            Case::Formats => (cases::formats::CASE, cases::formats::run),
            Case::Encrypted => (cases::encrypted::CASE, cases::encrypted::run),
            Case::Alloc => (cases::alloc::CASE, cases::alloc::run),
            Case::Chain => (cases::chain::CASE, cases::chain::run),
            Case::Convert => (cases::convert::CASE, cases::convert::run),
            Case::Idle => (cases::idle::CASE, cases::idle::run),
            Case::Cold => (cases::cold::CASE, cases::cold::run),
            Case::Blkif => (cases::blkif::CASE, cases::blkif::run),
            Case::Rings => (cases::rings::CASE, cases::rings::run),
        };
        names.push(name);
        ended = work(&mut bench).with_context(|| format!("case {name}"));
        if ended.is_err() {
            break;
        }
    }
    if let Err(error) = &ended {
        bench.report.failed.push(format!("the run ended early: {error:#}"));
    }
    // What was measured before an interruption or failure is worth a report too.
    if !bench.report.samples.is_empty() {
        bench.report.targets = targets::judge(&bench.report, &names);
        publish(&bench.report, &args.out)?;
    }
    ended?;
    ensure!(!bench.subject_failed, "rows of blktapd failed, see above");
    Ok(())
}

fn settings(args: &RunArgs) -> Settings {
    let either = |normal: u32, quick: u32| if args.quick { quick } else { normal };
    let disks = match (args.disks.is_empty(), args.quick) {
        (false, _) => args.disks.iter().map(|&count| count as usize).collect(),
        (true, true) => vec![128],
        (true, false) => vec![128, 512],
    };
    Settings {
        rounds: args.rounds.unwrap_or(either(5, 2)),
        seconds: args.seconds.unwrap_or(either(3, 1)),
        idle_seconds: args.idle_seconds.unwrap_or(either(10, 2)),
        file_bytes: args.size_mib.unwrap_or(u64::from(either(1024, 128))) << 20,
        ram_bytes: args.ram_mib.unwrap_or(u64::from(either(256, 64))) << 20,
        dir: args.dir.clone(),
        loader: args.loader,
        aio: args.aio.clone(),
        disks,
        clusters: args.clusters.unwrap_or(u64::from(either(100_000, 4096))),
        blocks: args.blocks.unwrap_or(u64::from(either(20_000, 512))),
        convert_bytes: args.convert_mib.unwrap_or(u64::from(either(4096, 1024))) << 20,
    }
}

/// The servers that take part, in the order of the report, and a line for each that is missing. A missing blktapd is an error:
/// who wants to measure the peers alone says so with --servers.
fn programs(args: &RunArgs) -> Result<(Vec<Program>, Vec<String>)> {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for kind in [Kind::Blktapd, Kind::QemuNbd, Kind::QemuStorageDaemon, Kind::Nbdkit] {
        if !args.servers.contains(&kind) {
            continue;
        }
        if kind == Kind::Blktapd {
            let path = args.blktapd.clone().map_or_else(release_build, Ok)?;
            let hint = "build it with `cargo build --release`, name it with --blktapd, or measure peers alone with --servers";
            found.push(Program::at(kind, path).with_context(|| format!("no blktapd to measure: {hint}"))?);
        } else {
            match Program::find(kind) {
                Ok(program) => found.push(program),
                Err(reason) => missing.push(format!("{kind}: {reason:#}")),
            }
        }
    }
    if found.is_empty() {
        bail!("none of the servers is there: {}", missing.join("; "));
    }
    Ok((found, missing))
}

/// Where cargo puts the release build: beside this program when it is a release build itself, else where cargo says.
fn release_build() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR") {
        return Ok(Path::new(&dir).join("release/blktapd"));
    }
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let cargo = ["metadata", "--no-deps", "--offline", "--format-version=1", "--manifest-path", manifest];
    let text =
        process::output(Process::new("cargo").args(cargo)).context("cannot find blktapd (see --blktapd)")?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let dir = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(Path::new(dir).join("release/blktapd"))
}

/// A client and a server of 512 disks need more descriptors than the usual soft limit; children inherit it.
fn raise_descriptor_limit() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}

fn host(dir: &Path, cores: Cores, fio: String) -> Result<Host> {
    let kernel = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, name)| name.trim());
    let filesystem = process::output(Process::new("stat").args(["--file-system", "--format=%T"]).arg(dir))?;
    Ok(Host {
        kernel,
        processor: processor.to_owned(),
        cores,
        files: format!("{} ({})", dir.display(), filesystem.trim()),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        started_s: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs(),
        fio,
    })
}

fn publish(report: &Report, out: &Path) -> Result<()> {
    let text = report::table::render(report);
    print!("{text}");
    let file = out.join("report.txt");
    std::fs::write(&file, &text).with_context(|| format!("cannot write {}", file.display()))?;
    report::json::save(report, &out.join("report.json"))?;
    let plots = report::svg::save(report, out)?;
    println!("report.txt, report.json and {} plots are in {}", plots.len(), out.display());
    Ok(())
}

fn load(args: &LoadArgs) -> Result<()> {
    raise_descriptor_limit()?;
    let endpoints = (0..args.connections)
        .map(|index| Endpoint {
            socket: args.socket.clone(),
            export: args.export.replace("{}", &index.to_string()),
            protocol: servers::Protocol::Nbd,
        })
        .collect();
    let job = load::Job {
        endpoints,
        op: args.op,
        block_bytes: args.block_bytes,
        pattern: args.pattern,
        pace: match args.per_second {
            Some(per_second) => load::Pace::Open { per_second },
            None => load::Pace::Closed { depth: args.depth },
        },
        warmup: Duration::from_secs(u64::from(args.warmup_seconds)),
        window: Duration::from_secs(u64::from(args.seconds)),
        seed: args.seed,
    };
    let outcome = load::run(&job, &mut |_| Ok(()))?;
    let percentiles = [50.0, 90.0, 99.0, 99.9, 100.0].map(|percentile| outcome.percentile_us(percentile));
    let [p50_us, p90_us, p99_us, p999_us, max_us] = percentiles;
    if args.json {
        let json = serde_json::json!({
            "completed": outcome.completed, "errors": outcome.errors, "unanswered": outcome.unanswered,
            "window_s": outcome.window.as_secs_f64(), "iops": outcome.iops(),
            "p50_us": p50_us, "p90_us": p90_us, "p99_us": p99_us, "p999_us": p999_us, "max_us": max_us,
        });
        println!("{json}");
    } else {
        println!(
            "{:.1} operations/s ({} in {:.3} s), {} errors, {} unanswered",
            outcome.iops(),
            outcome.completed,
            outcome.window.as_secs_f64(),
            outcome.errors,
            outcome.unanswered
        );
        println!(
            "latency us: p50 {p50_us:.1}  p90 {p90_us:.1}  p99 {p99_us:.1}  p99.9 {p999_us:.1}  max {max_us:.1}"
        );
    }
    ensure!(outcome.errors == 0, "the server answered {} requests with an error", outcome.errors);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    // Goal: the definitions of the command line are consistent, and lists and defaults mean what the help says.
    #[test]
    fn command_line_is_sound() {
        Cli::command().debug_assert();
        let Command::Run(args) = Cli::parse_from(["p", "run", "--quick", "--cases", "raw,qos"]).command
        else {
            panic!("run was asked for")
        };
        assert_eq!(args.cases, [Case::Raw, Case::Qos]);
        assert_eq!(settings(&args).rounds, 2);
        assert_eq!(settings(&args).disks, [128]);
        assert!(Cli::try_parse_from(["p", "run", "--rounds", "0"]).is_err());
        assert!(
            Cli::try_parse_from(["p", "load", "--socket", "s", "--depth", "2", "--per-second", "5"]).is_err()
        );
    }
}
