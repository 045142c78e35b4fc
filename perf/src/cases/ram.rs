//! `ram`: one disk in memory. Before anything is timed, fio fills every disk with checksummed blocks and reads them back, so each
//! timed request copies real bytes. Null disks (which copy nothing, or nothing of their own) are the limit of the protocol.

use anyhow::Result;

use super::Bench;
use super::single::{self, Contender, Lifetime, Plan, Subject};
use crate::report::Row;
use crate::servers::{Aio, Disk, Frontend, Kind};

/// The case's name.
pub const CASE: &str = "ram";
/// Variant of nbdkit's memory row.
pub const MEMORY: &str = "memory";
/// Variant of all rows without data.
pub const NULL: &str = "null";

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "ram")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let size_bytes = bench.settings.ram_bytes;
    let mut contenders = Vec::new();
    for program in bench.programs.clone() {
        let mut add = |row: Row, disk: Disk| {
            let subject = Subject::Server { program: program.clone(), aio: Aio::IoUring, disk };
            contenders.push(Contender { row, subject });
        };
        match program.kind {
            Kind::Blktapd => {
                add(subject(), Disk::Ram(size_bytes));
                add(Row::new(program.kind, NULL), Disk::Null(size_bytes));
            }
            Kind::QemuNbd | Kind::QemuStorageDaemon => {
                add(Row::new(program.kind, format!("{NULL}-co")), Disk::Null(size_bytes));
            }
            Kind::Nbdkit => {
                add(Row::new(program.kind, MEMORY), Disk::Ram(size_bytes));
                add(Row::new(program.kind, NULL), Disk::Null(size_bytes));
            }
        }
    }
    let plan = Plan {
        case: CASE,
        size_bytes,
        lifetime: Lifetime::Case,
        points: &single::POINTS,
        frontend: Frontend::Nbd,
        warm: false,
    };
    single::run(bench, plan, single::with_control(contenders))
}
