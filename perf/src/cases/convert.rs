//! `convert`: `blktapd image convert` beside `qemu-img convert`, a disk of which every other MiB has data. Both use direct I/O and may
//! use all cores; both end with an fsync of the new file, which is inside the timing. Nothing is reflinked: both read and write.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::{Bench, order};
use crate::files::{self, ImageDir};
use crate::images::{self, Tool};
use crate::report::{Metric, Row, Values};
use crate::servers::process;
use crate::servers::{Disk, Format, Kind};
use crate::stop;

/// The case's name.
pub const CASE: &str = "convert";
/// Point: a sparse raw file becomes qcow2.
pub const RAW_TO_QCOW2: &str = "half-sparse raw to qcow2";
/// Point: and back.
pub const QCOW2_TO_RAW: &str = "half-sparse qcow2 to raw";
/// The peer's program, and its row.
pub const PEER: &str = "qemu-img";
/// What the peer is told: no cache on either side, writes in any order, 16 coroutines.
const PEER_OPTIONS: [&str; 8] = ["convert", "-t", "none", "-T", "none", "-W", "-m", "16"];
const EXTENT_BYTES: u64 = 1 << 20;

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "image convert")
}

/// The peer's row.
pub fn peer() -> Row {
    Row::new(PEER, "-t none -T none -W -m 16")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    let bytes = bench.settings.convert_bytes;
    let images = ImageDir::new(&bench.settings.dir, 2 * bytes + (64 << 20))?;
    eprintln!("{CASE}: writing a half-sparse disk of {} MiB", bytes >> 20);
    let raw = Disk::File(images.file("source.img", bytes)?);
    punch(raw.path().context("a file has a path")?, bytes)?;
    let qcow2 = Disk::image(Format::Qcow2, images.path("source.qcow2"));
    tool.convert(&raw, &qcow2)?;

    let mut rows = vec![subject(), subject().again()];
    match process::output(Command::new(PEER).arg("--version")) {
        Ok(_) => rows.push(peer()),
        Err(error) => bench.report.skipped.push(format!("{CASE}: {PEER}: {error:#}")),
    }
    let points = [
        (RAW_TO_QCOW2, &raw, Disk::image(Format::Qcow2, images.path("target"))),
        (QCOW2_TO_RAW, &qcow2, Disk::File(images.path("target"))),
    ];
    for (point, source, target) in &points {
        for round in 0..bench.settings.rounds {
            for index in order(rows.len(), round) {
                stop::check()?;
                let row = &rows[index];
                let values = measure(bench, &tool, row, source, target)?;
                bench.record(CASE, point, row, round, values);
                if round == 0 {
                    tool.compare(source, target)?;
                }
                std::fs::remove_file(target.path().context("a file has a path")?)?;
            }
        }
    }
    Ok(())
}

/// Makes holes of every other extent.
fn punch(path: &Path, bytes: u64) -> Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let mut at = EXTENT_BYTES;
    while at < bytes {
        fallocate(&file, flags, at as i64, EXTENT_BYTES.min(bytes - at) as i64)?;
        at += 2 * EXTENT_BYTES;
    }
    files::flush(path)
}

fn measure(bench: &mut Bench, tool: &Tool, row: &Row, source: &Disk, target: &Disk) -> Result<Values> {
    let (from, to) = (source.path().context("no file")?, target.path().context("no file")?);
    files::flush(from)?;
    let command = if row.server == PEER {
        let mut command = Command::new(PEER);
        command.args(PEER_OPTIONS).args(["-f", qemu_format(source), "-O", qemu_format(target)]);
        command.arg(from).arg(to);
        command
    } else {
        tool.command(["convert", &source.spec(""), &target.spec("")])
    };
    bench.report.commands.insert(format!("{CASE}: {row}"), format!("{command:?}"));
    let cores = bench.cores().allowed;
    let log = bench.scratch().join("convert.log");
    let before = children_cpu()?;
    let begin = Instant::now();
    images::finish(command, &cores, &log)?;
    std::fs::File::open(to)?.sync_all()?;
    let elapsed = begin.elapsed();
    let cpu = children_cpu()?.saturating_sub(before);
    Ok(Values::from([
        (Metric::WallMs, elapsed.as_secs_f64() * 1e3),
        (Metric::CpuMs, cpu.as_secs_f64() * 1e3),
    ]))
}

fn qemu_format(disk: &Disk) -> &'static str {
    match disk {
        Disk::Image { format, .. } => format.qemu_driver(),
        Disk::File(_) | Disk::Luks { .. } | Disk::Ram(_) | Disk::Null(_) => "raw",
    }
}

/// CPU of all children that ended: a command is the only one that ends between two looks.
fn children_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(us.unsigned_abs()))
}
