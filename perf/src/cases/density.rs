//! `density`: many disks, each with 50 operations per second. For each server and number of disks: memory and CPU idle without
//! clients, idle with a connected client per disk, under the load (open loop, latency from the due time), and idle again after a
//! burst that made every disk busy, with the clients still connected.

use std::time::Duration;

use anyhow::Result;

use super::{Bench, loaded, order};
use crate::files::ImageDir;
use crate::load::{self, Op, Pace, Pattern};
use crate::report::{Metric, Row, Values};
use crate::servers::{self, Aio, Disk, Endpoint, Frontend, Kind, Program, Running, Setup};
use crate::{proc, stop};

/// The case's name.
pub const CASE: &str = "density";
/// Operations per second on each disk.
const RATE_PER_SECOND: f64 = 50.0;
const DISK_BYTES: u64 = 4 << 20;
const BLOCK_BYTES: u32 = 4096;
/// A process per disk is measured up to this number of disks.
const PROCESSES_MAX: usize = 128;
/// How long a server may settle before an idle window.
const SETTLE: Duration = Duration::from_secs(2);
/// "No CPU": less than this share of one core, in percent.
pub const NO_CPU_PERCENT: f64 = 0.01;

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "one process")
}

/// Point: nobody is connected.
pub fn idle(disks: usize) -> String {
    format!("{disks} disks idle")
}

/// Point: a client is connected to each disk and says nothing.
pub fn connected(disks: usize) -> String {
    format!("{disks} disks idle, connected")
}

/// Point: 50 reads per second on each.
pub fn at_rate(disks: usize) -> String {
    format!("{disks} disks at {RATE_PER_SECOND}/s")
}

/// Point: idle after every disk was busy, still connected.
pub fn after(disks: usize) -> String {
    format!("{disks} disks idle after load")
}

/// A server with many disks.
pub(super) struct Contender {
    pub(super) row: Row,
    pub(super) program: Program,
    pub(super) aio: Aio,
    pub(super) failed: bool,
}

/// Runs the case for each number of disks.
pub fn run(bench: &mut Bench) -> Result<()> {
    for count in bench.settings.disks.clone() {
        let images = ImageDir::new(&bench.settings.dir, count as u64 * DISK_BYTES)?;
        eprintln!("{CASE}: writing {count} files of {} MiB", DISK_BYTES >> 20);
        let disks: Vec<Disk> =
            images.files("disks", count, DISK_BYTES)?.into_iter().map(Disk::File).collect();
        let contenders = contenders(bench, count);
        rounds(bench, CASE, contenders, &disks)?;
    }
    Ok(())
}

/// Measures all contenders in interleaved rounds.
pub(super) fn rounds(
    bench: &mut Bench,
    case: &str,
    mut contenders: Vec<Contender>,
    disks: &[Disk],
) -> Result<()> {
    for round in 0..bench.settings.rounds {
        for index in order(contenders.len(), round) {
            let contender = &mut contenders[index];
            if contender.failed {
                continue;
            }
            stop::check()?;
            if let Err(error) = measure(bench, case, contender, disks, round) {
                bench.failed(case, &contender.row, error)?;
                contender.failed = true;
            }
        }
    }
    Ok(())
}

fn contenders(bench: &mut Bench, count: usize) -> Vec<Contender> {
    let mut list = Vec::new();
    for program in bench.programs.clone() {
        let mut add =
            |row: Row, aio: Aio| list.push(Contender { row, program: program.clone(), aio, failed: false });
        match program.kind {
            Kind::Blktapd => add(subject(), Aio::IoUring),
            Kind::QemuStorageDaemon => {
                for &aio in &bench.settings.aio {
                    add(Row::new(program.kind, format!("one process, aio={}", aio.name())), aio);
                }
            }
            Kind::QemuNbd if count > PROCESSES_MAX => {
                let line =
                    format!("{CASE}: {count} processes of {}: measured up to {PROCESSES_MAX}", program.kind);
                bench.report.skipped.push(line);
            }
            Kind::QemuNbd => {
                // With Linux AIO so many processes soon exceed the host's fs.aio-max-nr.
                let aios = &bench.settings.aio;
                let aio = aios.iter().copied().find(|&aio| aio != Aio::Native).unwrap_or(Aio::Threads);
                add(Row::new(program.kind, format!("process per disk, aio={}", aio.name())), aio);
            }
            Kind::Nbdkit => {
                add(Row::new(program.kind, "one process, file cache=none, not direct"), Aio::Threads)
            }
        }
    }
    with_control(list)
}

/// Adds the A/A row behind the first contender.
pub(super) fn with_control(mut list: Vec<Contender>) -> Vec<Contender> {
    if let Some(first) = list.first() {
        let control = Contender {
            row: first.row.again(),
            program: first.program.clone(),
            aio: first.aio,
            failed: false,
        };
        list.insert(1, control);
    }
    list
}

fn measure(bench: &mut Bench, case: &str, contender: &Contender, disks: &[Disk], round: u32) -> Result<()> {
    let count = disks.len();
    let row = &contender.row;
    let disks = disks.to_vec();
    let cores = vec![bench.cores().server];
    let setup = Setup {
        program: &contender.program,
        aio: contender.aio,
        cores,
        disks,
        frontend: Frontend::Nbd,
        attach: Vec::new(),
    };
    let server = servers::start(&setup)?;
    bench.started(case, row, &server);

    let mut values = idle_window(bench, &server)?;
    values.insert(Metric::ReadyMs, server.ready.as_secs_f64() * 1e3);
    bench.record(case, &idle(count), row, round, values);

    let clients = connect(&server.endpoints)?;
    let values = idle_window(bench, &server)?;
    bench.record(case, &connected(count), row, round, values);
    disconnect(clients);

    let window = Duration::from_secs(u64::from(bench.settings.seconds.max(2)));
    let mut job = load::Job {
        endpoints: server.endpoints.clone(),
        op: Op::Read,
        block_bytes: BLOCK_BYTES,
        pattern: Pattern::Random,
        pace: Pace::Open { per_second: RATE_PER_SECOND },
        warmup: Duration::from_secs(1),
        window,
        seed: u64::from(round) + 1,
    };
    let (mut values, _, clients) = loaded(&job, &server)?;
    disconnect(clients);
    if let Some(&pss) = values.get(&Metric::PssKib) {
        values.insert(Metric::PssPerDiskKib, pss / count as f64);
    }
    bench.record(case, &at_rate(count), row, round, values);

    // A burst with large requests makes each disk use what it would ever use; its speed is not the question.
    job.block_bytes = 64 << 10;
    job.op = Op::Write;
    job.pace = Pace::Closed { depth: 8 };
    job.warmup = Duration::ZERO;
    job.window = Duration::from_secs(2);
    let (_, _, clients) = loaded(&job, &server)?;
    let values = idle_window(bench, &server)?;
    bench.record(case, &after(count), row, round, values);
    disconnect(clients);
    Ok(())
}

fn connect(endpoints: &[Endpoint]) -> Result<Vec<load::Client>> {
    endpoints
        .iter()
        .map(|endpoint| {
            stop::check()?;
            load::Client::open(endpoint, Op::Read, BLOCK_BYTES)
        })
        .collect()
}

fn disconnect(clients: Vec<load::Client>) {
    clients.into_iter().for_each(load::Client::disconnect);
}

/// CPU over a window without any request, and memory and descriptors at its end.
fn idle_window(bench: &Bench, server: &Running) -> Result<Values> {
    stop::sleep(SETTLE)?;
    let pids = server.pids();
    let begin = std::time::Instant::now();
    let before = proc::cpu(&pids)?;
    stop::sleep(Duration::from_secs(u64::from(bench.settings.idle_seconds)))?;
    let cpu = proc::cpu(&pids)?.saturating_sub(before);
    let window = begin.elapsed();
    let usage = proc::usage(&pids)?;
    Ok(Values::from([
        (Metric::CpuPercent, 100.0 * cpu.as_secs_f64() / window.as_secs_f64()),
        (Metric::PssKib, usage.pss_kib as f64),
        (Metric::PssPerDiskKib, usage.pss_kib as f64 / server.endpoints.len() as f64),
        (Metric::Descriptors, usage.descriptors as f64),
    ]))
}
