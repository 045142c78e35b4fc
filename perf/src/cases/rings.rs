//! `rings`: many disks, each through a ring of its own with 50 reads per second (open loop, latency from the due time). One process
//! of blktapd with one shard beside one process of qemu-storage-daemon, and beside one for each disk.

use std::time::Duration;

use anyhow::Result;

use super::{Bench, loaded_ring, order};
use crate::files::ImageDir;
use crate::load::{self, Op, Pace, Pattern};
use crate::report::Row;
use crate::servers::{self, Aio, Disk, Frontend, Kind, Program, Running, Setup};
use crate::stop;

/// The case's name.
pub const CASE: &str = "rings";
/// Number of rings at which the target is judged.
pub const JUDGED: usize = 512;
/// How variants with a process per disk begin.
pub const PER_DISK: &str = "process per disk";
/// Linux AIO contexts of so many processes exceed the usual fs.aio-max-nr.
const AIO: Aio = Aio::IoUring;
const RATE_PER_SECOND: f64 = 50.0;
const DISK_BYTES: u64 = 4 << 20;

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "one process")
}

/// The point of so many rings.
pub fn point(rings: usize) -> String {
    format!("{rings} rings at {RATE_PER_SECOND}/s")
}

struct Contender {
    row: Row,
    program: Program,
    per_disk: bool,
    failed: bool,
}

/// Runs the case for each number of disks.
pub fn run(bench: &mut Bench) -> Result<()> {
    for count in bench.settings.disks.clone() {
        let images = ImageDir::new(&bench.settings.dir, count as u64 * DISK_BYTES)?;
        eprintln!("{CASE}: writing {count} files of {} MiB", DISK_BYTES >> 20);
        let disks: Vec<Disk> =
            images.files("disks", count, DISK_BYTES)?.into_iter().map(Disk::File).collect();
        let mut contenders = contenders(bench);
        for round in 0..bench.settings.rounds {
            for index in order(contenders.len(), round) {
                let contender = &mut contenders[index];
                if contender.failed {
                    continue;
                }
                stop::check()?;
                if let Err(error) = measure(bench, contender, &disks, round) {
                    bench.failed(CASE, &contender.row, error)?;
                    contender.failed = true;
                }
            }
        }
    }
    Ok(())
}

fn contenders(bench: &Bench) -> Vec<Contender> {
    let mut list = Vec::new();
    for program in &bench.programs {
        let mut add =
            |row, per_disk| list.push(Contender { row, program: program.clone(), per_disk, failed: false });
        match program.kind {
            Kind::Blktapd => {
                add(subject(), false);
                add(subject().again(), false);
            }
            Kind::QemuStorageDaemon => {
                add(Row::new(program.kind, format!("one process, aio={}", AIO.name())), false);
                add(Row::new(program.kind, format!("{PER_DISK}, aio={}", AIO.name())), true);
            }
            Kind::QemuNbd | Kind::Nbdkit => {}
        }
    }
    list
}

fn measure(bench: &mut Bench, contender: &Contender, disks: &[Disk], round: u32) -> Result<()> {
    let start = |disks: &[Disk]| {
        stop::check()?;
        servers::start(&Setup {
            program: &contender.program,
            aio: AIO,
            cores: vec![bench.cores().server],
            disks: disks.to_vec(),
            frontend: Frontend::Ring,
            attach: Vec::new(),
        })
    };
    let each = if contender.per_disk { 1 } else { disks.len() };
    let running = disks.chunks(each).map(start).collect::<Result<Vec<Running>>>()?;
    if let Some(first) = running.first() {
        bench.started(CASE, &contender.row, first);
    }
    let job = load::Job {
        endpoints: running.iter().flat_map(|server| server.endpoints.clone()).collect(),
        op: Op::Read,
        block_bytes: 4096,
        pattern: Pattern::Random,
        pace: Pace::Open { per_second: RATE_PER_SECOND },
        warmup: Duration::from_secs(1),
        window: Duration::from_secs(u64::from(bench.settings.seconds.max(2))),
        seed: u64::from(round) + 1,
    };
    let pids: Vec<u32> = running.iter().flat_map(Running::pids).collect();
    let values = loaded_ring(&job, &pids)?;
    bench.record(CASE, &point(disks.len()), &contender.row, round, values);
    Ok(())
}
