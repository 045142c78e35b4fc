//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cases::Loader;
use crate::load::{Op, Pattern};
use crate::servers::{Aio, Kind};

/// Side-by-side benches of blktapd and its peers.
///
/// `run` measures blktapd and the peers that are installed (qemu-nbd, qemu-storage-daemon, nbdkit, and fio on the file itself as
/// the limit) in turn and prints ratios. perf/README.md says how to read them.
#[derive(Debug, Parser)]
#[command(name = "blktapd-perf", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure blktapd beside its peers.
    Run(Box<RunArgs>),
    /// Load NBD disks of any server and print rate and latencies.
    Load(LoadArgs),
    /// Print the ratios of a second report to a first.
    Compare {
        /// report.json of the first run.
        first: PathBuf,
        /// report.json of the second run.
        second: PathBuf,
    },
}

/// A case of `run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// One raw file with direct I/O.
    Raw,
    /// One disk in memory, data verified.
    Ram,
    /// 128 and 512 disks: 50 operations/s each, idle, idle after load.
    Density,
    /// Accuracy of limits, protection of a neighbour.
    Qos,
    /// One shard and two.
    Shards,
    /// Allocated qcow2 and VHD images beside our own raw file.
    Formats,
    /// A LUKS disk beside our own raw file, and the cipher alone.
    Encrypted,
    /// Writes that allocate a cluster or block each.
    Alloc,
    /// A chain of 30 images beside a flat one.
    Chain,
    /// `blktapd image convert` beside `qemu-img convert`.
    Convert,
    /// 512 idle qcow2 disks.
    Idle,
    /// What a cold read of a 1 TiB image costs in metadata.
    Cold,
    /// blkif beside vhost-user-blk, both through rings in shared memory.
    Blkif,
    /// Many rings in shared memory, 50 operations/s each.
    Rings,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Short rounds and small files: shows that everything works; its figures are no claims.
    #[arg(long)]
    pub quick: bool,
    /// Cases to run.
    #[arg(long, value_enum, value_delimiter = ',',
          default_values_t = Case::value_variants().to_vec())]
    pub cases: Vec<Case>,
    /// Servers that take part; one that is not installed is noted and left out.
    #[arg(long, value_enum, value_delimiter = ',',
          default_values_t = [Kind::Blktapd, Kind::QemuNbd, Kind::QemuStorageDaemon, Kind::Nbdkit])]
    pub servers: Vec<Kind>,
    /// The blktapd to be measured [default: the release build of this workspace].
    #[arg(long, value_name = "PATH")]
    pub blktapd: Option<PathBuf>,
    /// Interleaved rounds [default: 5; quick: 2].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Length of each timed load [default: 3; quick: 1].
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: Option<u32>,
    /// Length of each idle window [default: 10; quick: 2].
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub idle_seconds: Option<u32>,
    /// Size of the raw file [default: 1024; quick: 128].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    pub size_mib: Option<u64>,
    /// Size of a RAM disk [default: 256; quick: 64].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=65_536))]
    pub ram_mib: Option<u64>,
    /// Numbers of disks in the density case [default: 128,512; quick: 128].
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub disks: Vec<u32>,
    /// Clusters that the alloc case writes to [default: 100000; quick: 4096].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(64..=1_000_000))]
    pub clusters: Option<u64>,
    /// Blocks of a VHD that the alloc case writes to [default: 20000; quick: 512].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(16..=1_000_000))]
    pub blocks: Option<u64>,
    /// Size of the disk in the convert case [default: 4096; quick: 1024].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    pub convert_mib: Option<u64>,
    /// How QEMU submits I/O; each is a row, and targets are judged against the best.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Aio::Native, Aio::IoUring])]
    pub aio: Vec<Aio>,
    /// What loads a single disk: fio, or this program where fio is the bottleneck.
    #[arg(long, value_enum, default_value_t = Loader::Fio)]
    pub loader: Loader,
    /// Core of the servers [default: the first that is allowed].
    #[arg(long, value_name = "CPU")]
    pub server_cpu: Option<usize>,
    /// Core of the load [default: the second that is allowed].
    #[arg(long, value_name = "CPU")]
    pub load_cpu: Option<usize>,
    /// Directory for image files, on a disk with direct I/O; they are removed at the end.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub dir: PathBuf,
    /// Directory for report.json, report.txt and the plots.
    #[arg(long, value_name = "DIR", default_value = "perf-report")]
    pub out: PathBuf,
}

/// Arguments of `load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Unix socket of the server.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Export name; `{}` stands for the number of the connection, from 0.
    #[arg(long, default_value = "")]
    pub export: String,
    /// Connections.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub connections: u32,
    /// Reads or writes (writes destroy what is on the disk).
    #[arg(long, value_enum, default_value_t = Op::Read)]
    pub op: Op,
    /// Random or sequential.
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,
    /// Bytes of a request.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=33_554_432))]
    pub block_bytes: u32,
    /// Closed loop: requests in flight on each connection.
    #[arg(long, default_value_t = 1, conflicts_with = "per_second")]
    pub depth: u32,
    /// Open loop: requests per second on each connection.
    #[arg(long, value_name = "RATE")]
    pub per_second: Option<f64>,
    /// Seconds of load before the measurement.
    #[arg(long, default_value_t = 1)]
    pub warmup_seconds: u32,
    /// Seconds of measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
    /// Equal seeds give equal requests.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
