//! `raw`: one raw file, written and allocated, with direct I/O. Rows: blktapd twice (A/A), QEMU's servers with each way to submit
//! I/O, nbdkit (which has no direct I/O), and fio on the file itself as the limit.

use anyhow::Result;

use super::Bench;
use super::single::{self, Contender, Lifetime, Plan, Subject};
use crate::files::ImageDir;
use crate::report::Row;
use crate::servers::{Aio, Disk, Frontend, Kind};

/// The case's name.
pub const CASE: &str = "raw";
/// The server's name of the row that is the limit.
pub const LIMIT: &str = "fio on the file";

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "raw")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let size_bytes = bench.settings.file_bytes;
    let images = ImageDir::new(&bench.settings.dir, size_bytes)?;
    eprintln!("{CASE}: writing a file of {} MiB", size_bytes >> 20);
    let path = images.file("disk.img", size_bytes)?;
    let mut contenders = Vec::new();
    for program in bench.programs.clone() {
        let mut add = |row: Row, aio: Aio| {
            let disk = Disk::File(path.clone());
            contenders
                .push(Contender { row, subject: Subject::Server { program: program.clone(), aio, disk } });
        };
        match program.kind {
            Kind::Blktapd => add(subject(), Aio::IoUring),
            Kind::QemuNbd | Kind::QemuStorageDaemon => {
                for &aio in &bench.settings.aio {
                    add(Row::new(program.kind, format!("direct, aio={}", aio.name())), aio);
                }
            }
            Kind::Nbdkit => add(Row::new(program.kind, "file cache=none, not direct"), Aio::Threads),
        }
    }
    let mut contenders = single::with_control(contenders);
    contenders.push(Contender { row: Row::new(LIMIT, "io_uring, direct"), subject: Subject::File(path) });
    let plan = Plan {
        case: CASE,
        size_bytes,
        lifetime: Lifetime::Measurement,
        points: &single::POINTS,
        frontend: Frontend::Nbd,
        warm: false,
    };
    single::run(bench, plan, contenders)
}
