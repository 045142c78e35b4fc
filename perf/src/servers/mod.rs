//! The servers that are compared: how each is found, started on its cores with a set of disks, and stopped.
//!
//! Every server gets the settings of its own documentation that fit the task, and the same ones in every row: direct I/O
//! where the server has it, one NBD export per disk on a Unix socket, no limit, no filter. `command` of a running server is
//! printed with the results, so that a reader can repeat a row by hand.

mod blktapd;
mod nbdkit;
pub mod process;
mod qemu;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use process::Process;

/// How long a server may take until its socket answers.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// A program that serves NBD.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The server under test.
    Blktapd,
    /// QEMU's server of one disk per process.
    QemuNbd,
    /// QEMU's server of many disks in one process.
    QemuStorageDaemon,
    /// nbdkit with its file, memory and null plugins.
    Nbdkit,
}

impl Kind {
    /// The program's name, which is also the name in every report.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Blktapd => "blktapd",
            Kind::QemuNbd => "qemu-nbd",
            Kind::QemuStorageDaemon => "qemu-storage-daemon",
            Kind::Nbdkit => "nbdkit",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How QEMU submits I/O (its option `aio`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Aio {
    /// Linux AIO.
    Native,
    /// io_uring.
    IoUring,
    /// A pool of threads, QEMU's default.
    Threads,
}

impl Aio {
    /// The value of QEMU's option.
    pub fn name(self) -> &'static str {
        match self {
            Aio::Native => "native",
            Aio::IoUring => "io_uring",
            Aio::Threads => "threads",
        }
    }
}

/// A server program found on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// Which server it is.
    pub kind: Kind,
    /// Its executable.
    pub path: PathBuf,
    /// The first line of its `--version`.
    pub version: String,
}

impl Program {
    /// Asks the program at `path` for its version.
    pub fn at(kind: Kind, path: PathBuf) -> Result<Self> {
        let text = process::output(Command::new(&path).arg("--version"))?;
        let version = text.lines().next().unwrap_or("").trim().to_owned();
        Ok(Self { kind, path, version })
    }

    /// Looks for the program in PATH.
    pub fn find(kind: Kind) -> Result<Self> {
        let found = std::env::var_os("PATH").and_then(|path| {
            std::env::split_paths(&path).map(|dir| dir.join(kind.name())).find(|file| file.is_file())
        });
        match found {
            Some(path) => Self::at(kind, path),
            None => bail!("{kind} is not in PATH"),
        }
    }
}

/// A format of image files, as far as the benches measure it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2, with the clusters of 64 KiB that both sides make by default.
    Qcow2,
    /// Dynamic VHD, with blocks of 2 MiB.
    Vhd,
}

impl Format {
    /// The type of an image in blktapd's names.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vhd",
        }
    }

    /// QEMU's name of its driver.
    pub fn qemu_driver(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vpc",
        }
    }
}

/// The bytes behind an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disk {
    /// A raw file, served with direct I/O where the server can.
    File(PathBuf),
    /// An image, with direct I/O as well.
    Image {
        /// Its format.
        format: Format,
        /// Its file.
        path: PathBuf,
        /// What is below it. The image names it by itself; QEMU is told again, so that `aio` holds for all layers.
        below: Option<Box<Disk>>,
    },
    /// A raw disk behind a LUKS header, with direct I/O; for blktapd.
    Luks {
        /// Its file.
        path: PathBuf,
        /// The file of its passphrase.
        key: PathBuf,
    },
    /// Memory of so many bytes that really holds what is written.
    Ram(u64),
    /// A disk of so many bytes that holds nothing.
    Null(u64),
}

impl Disk {
    /// An image with nothing below it.
    pub fn image(format: Format, path: PathBuf) -> Self {
        Disk::Image { format, path, below: None }
    }

    /// The file that is written, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Disk::File(path) | Disk::Image { path, .. } | Disk::Luks { path, .. } => Some(path),
            Disk::Ram(_) | Disk::Null(_) => None,
        }
    }

    /// The name of the disk for blktapd; a disk in memory is called `name`.
    pub fn spec(&self, name: &str) -> String {
        blktapd::spec(self, name)
    }
}

/// What the disks of a server are reached by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frontend {
    /// NBD on a Unix socket.
    Nbd,
    /// Rings in shared memory: blkif, or vhost-user-blk.
    Ring,
}

/// How a disk is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// NBD.
    Nbd,
    /// blktapd's blkif socket.
    Blkif,
    /// vhost-user-blk.
    VhostUser,
}

/// What to start: a server with disks, on cores.
#[derive(Debug, Clone)]
pub struct Setup<'a> {
    /// The server.
    pub program: &'a Program,
    /// QEMU's `aio` option; not used by others.
    pub aio: Aio,
    /// The cores of the whole process; blktapd gets one shard on each.
    pub cores: Vec<usize>,
    /// The disks, exported as `d0`, `d1`, …
    pub disks: Vec<Disk>,
    /// What the disks are to be reached by.
    pub frontend: Frontend,
    /// For blktapd: further arguments of `ctl attach` for each disk (limits, shard); empty, or one entry per disk.
    pub attach: Vec<Vec<String>>,
}

/// Where a client finds a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Path of the Unix socket.
    pub socket: PathBuf,
    /// Export name; empty for the default export.
    pub export: String,
    /// What is spoken there.
    pub protocol: Protocol,
}

impl Endpoint {
    /// The NBD URI of this disk.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export, self.socket.display())
    }
}

/// A server that is running; dropping it stops it and removes its run directory.
#[derive(Debug)]
pub struct Running {
    // The order matters: processes end before their directory is removed.
    processes: Vec<Process>,
    _run_dir: TempDir,
    /// Where each disk of the setup is, in its order.
    pub endpoints: Vec<Endpoint>,
    /// The command that started it (the first, where there is one process per disk).
    pub command: String,
    /// From the first start of a process until all disks were there.
    pub ready: Duration,
}

impl Running {
    /// The ids of its processes.
    pub fn pids(&self) -> Vec<u32> {
        self.processes.iter().map(Process::id).collect()
    }

    /// What the server printed last, for messages.
    pub fn last_words(&self) -> String {
        self.processes.first().map(Process::last_words).unwrap_or_default()
    }
}

/// What a starter hands back: its processes, where the disks are, and a command to show.
struct Started {
    processes: Vec<Process>,
    endpoints: Vec<Endpoint>,
    command: String,
}

/// Starts the server and waits until all its disks can be opened.
pub fn start(setup: &Setup<'_>) -> Result<Running> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("blkperf");
    // RAM disks outlive blktapd: in a run directory on tmpfs they go with it, elsewhere they would stay in /dev/shm.
    let ram = setup.disks.iter().any(|disk| matches!(disk, Disk::Ram(_)));
    let in_memory = if ram { builder.tempdir_in("/dev/shm").ok() } else { None };
    let run_dir = match in_memory {
        Some(dir) => dir,
        None => builder.tempdir().context("cannot create a run directory")?,
    };
    let begin = std::time::Instant::now();
    let rings = setup.frontend == Frontend::Ring;
    let started = match setup.program.kind {
        Kind::QemuNbd | Kind::Nbdkit if rings => {
            bail!("{} has no rings in shared memory", setup.program.kind)
        }
        Kind::Blktapd => blktapd::start(setup, run_dir.path()),
        Kind::QemuNbd => qemu::start_nbd(setup, run_dir.path()),
        Kind::QemuStorageDaemon => qemu::start_daemon(setup, run_dir.path()),
        Kind::Nbdkit => nbdkit::start(setup, run_dir.path()),
    }
    .with_context(|| format!("cannot start {} with {} disks", setup.program.kind, setup.disks.len()))?;
    let ready = begin.elapsed();
    let Started { processes, endpoints, command } = started;
    Ok(Running { processes, _run_dir: run_dir, endpoints, command, ready })
}

/// True when something accepts connections at `socket`.
fn answers(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

/// The command line as a person would type it.
fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
