//! The command line: one definition for the program, its man pages and its shell completions.
//!
//! What an option means is said here once; defaults that the configuration can change are applied in `config`, so absent
//! options stay `None`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::image::args::ImageArgs;
use crate::limit_change::LimitChange;
use crate::model::ErrorPolicy;

/// The control socket when neither `--ctl` nor `BLKTAPD_CTL` names one.
pub const DEFAULT_CTL: &str = "/run/blktapd/ctl.sock";

/// User-space block server for dense Xen hosts
#[derive(Debug, Parser)]
#[command(name = "blktapd", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon, in the foreground
    Serve(Box<ServeArgs>),
    /// Talk to a running daemon
    Ctl(Box<CtlArgs>),
    /// Work on images that nobody uses
    Image(Box<ImageArgs>),
    /// Check whether this host, and directories of images on it, can serve disks
    Doctor {
        /// Directories where images are or will be
        dirs: Vec<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write man pages, shell completions or the OpenAPI description
    Generate {
        /// What to write
        #[command(subcommand)]
        what: Generate,
    },
}

/// What `generate` can write.
#[derive(Debug, Subcommand)]
pub enum Generate {
    /// One man page per command
    Man {
        /// Directory for the pages
        #[arg(long, default_value = ".")]
        out: PathBuf,
    },
    /// Completions for a shell, to standard output
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// The description of the HTTP API, to standard output
    Openapi,
}

/// Options of `serve`. Each overrides the configuration.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Configuration file (TOML); without this option, /etc/blktapd/blktapd.toml is read if it is there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// CPUs to run a shard on each, like 0,2-5 [default: all allowed]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<String>,
    /// Directory for sockets and locks [default: /run/blktapd]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Directory that keeps attachments over restarts [default: /var/lib/blktapd, or RUN_DIR/state when --run-dir is given]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Control socket [default: RUN_DIR/ctl.sock]
    #[arg(long, value_name = "SOCK")]
    pub ctl: Option<PathBuf>,
    /// Where /metrics and /healthz listen: ADDRESS:PORT, unix:PATH or none [default: 127.0.0.1:9680]
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<String>,
    /// NBD over TCP: ADDRESS:PORT, or ADDRESS:PORT,tls to require TLS; may be repeated
    #[arg(long, value_name = "ADDR[,tls]")]
    pub nbd_listen: Vec<String>,
    /// Certificate chain (PEM) of the TLS listeners
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key (PEM) of the TLS listeners
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Authorities (PEM): TLS clients must have a certificate signed by one of them
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Pre-shared keys of TLS clients: lines of USER:HEX, as GnuTLS' psktool writes them
    #[arg(long, value_name = "FILE")]
    pub tls_psk: Option<PathBuf>,
    /// Directory for RAM disks, on tmpfs or hugetlbfs [default: RUN_DIR/ram, or one in /dev/shm where RUN_DIR is not on tmpfs]
    #[arg(long, value_name = "DIR")]
    pub ram_dir: Option<PathBuf>,
    /// Limit on the memory of all RAM disks together, like 4G [default: none but the file system's]
    #[arg(long, value_name = "SIZE", value_parser = formats::size::parse_size)]
    pub ram_limit: Option<u64>,
    /// What to log: error, warn, info, debug, or filters like blktapd=debug [default: info]
    #[arg(long, value_name = "FILTER", env = "BLKTAPD_LOG")]
    pub log: Option<String>,
    /// How to log [default: journald when standard error goes there, else text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Best ring set-up to try; what the kernel refuses degrades to the next
    #[arg(long, value_name = "SETUP", hide = true)]
    pub ring: Option<Ring>,
    /// Take commands that inject faults, for tests
    #[arg(long, hide = true)]
    pub fault_commands: bool,
}

/// Formats of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines to standard error
    Text,
    /// JSON lines to standard error
    Json,
    /// The journal's own protocol
    Journald,
}

/// Ring set-ups, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ring {
    /// Completions are run by the shard itself
    Deferred,
    /// Completions do not interrupt the shard
    Cooperative,
    /// No flags
    Plain,
}

/// Options of `ctl`.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// Control socket of the daemon
    #[arg(long, value_name = "SOCK", env = "BLKTAPD_CTL", default_value = DEFAULT_CTL, global = true)]
    pub ctl: PathBuf,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Seconds until the command gives up, at most 600
    #[arg(long, value_name = "SECONDS", default_value_t = 30, global = true,
          value_parser = clap::value_parser!(u32).range(0..=600))]
    pub timeout: u32,
    /// What to do
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// Commands of `ctl`.
#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// Serve an image as a disk; prints where the disk is now
    Attach(Box<AttachArgs>),
    /// Stop serving a disk, when its clients have gone
    Detach {
        /// The disk
        name: String,
        /// Do not wait for clients or the kernel
        #[arg(long)]
        force: bool,
    },
    /// List the disks
    List,
    /// Show one disk
    Show {
        /// The disk
        name: String,
    },
    /// Counters and latencies
    Stats {
        /// The disk [default: all]
        name: Option<String>,
    },
    /// Show or change limits of a disk or a group, live
    Qos(Box<QosArgs>),
    /// Hold the requests of a disk until it is resumed, over restarts of the daemon as well
    Pause {
        /// The disk
        name: String,
        /// Also close its image and give the locks back, so that a script can work on it; `resume` opens it again
        #[arg(long)]
        release: bool,
    },
    /// Run a paused disk, or held requests of a disk in storage-error again
    Resume {
        /// The disk
        name: String,
        /// After a failed fdatasync: go on although acknowledged data may be lost
        #[arg(long)]
        data_in_doubt: bool,
        /// Run a paused disk on another image of the same size, TYPE:PATH
        #[arg(long, value_name = "TYPE:PATH")]
        image: Option<String>,
    },
    /// Put a new overlay over a disk, live; what the disk holds at that instant stays in its image
    ///
    /// `snapshot NAME TYPE:FILE` for one disk, `snapshot A=TYPE:FILE B=TYPE:FILE` for several at one instant, all or none. The
    /// files are made; they must not exist.
    Snapshot {
        /// NAME TYPE:FILE, or NAME=TYPE:FILE for each disk
        #[arg(required = true)]
        disks: Vec<String>,
    },
    /// Give a disk up: its requests are answered with errors until it is detached, over restarts of the daemon as well
    Fail {
        /// The disk
        name: String,
    },
    /// Make a disk larger while it runs; clients see it when they connect again
    Resize {
        /// The disk
        name: String,
        /// New size, like 20G
        #[arg(value_parser = formats::size::parse_size)]
        size: u64,
    },
    /// Move a disk to another shard, live
    Move {
        /// The disk
        name: String,
        /// Number of the shard
        shard: u16,
    },
    /// List the groups and their limits
    Groups,
    /// List the shards
    Shards,
    /// A live view of disks and shards
    Top {
        /// Seconds between two looks
        #[arg(long, default_value_t = 1.0, value_parser = interval)]
        interval: f64,
        /// Looks until it ends [default: no end]
        #[arg(long)]
        count: Option<u64>,
    },
    /// Devices of Xen's guests, as XenStore and the shards know them
    Guests,
    /// For the script of a toolstack: take the device of XENBUS_PATH over, and print its disk's NBD socket when it is ready
    #[command(hide = true)]
    Claim {
        /// The script's XENBUS_PATH
        xenbus_path: String,
    },
    /// What happened lately
    Events {
        /// Only events after this number
        #[arg(long, value_name = "SEQ")]
        after: Option<u64>,
        /// At most so many, the newest
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
        limit: Option<u32>,
    },
    /// Make a disk's or a shard's own code panic, in a daemon that was started with --fault-commands
    #[command(hide = true)]
    InjectPanic {
        /// The disk
        #[arg(required_unless_present = "shard", conflicts_with = "shard")]
        name: Option<String>,
        /// The shard
        #[arg(long, value_name = "N")]
        shard: Option<u16>,
    },
    /// Read the configuration again
    Reload,
    /// Versions of this program and of the daemon
    Version,
}

/// Options of `attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Name of the disk: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with . or -
    pub name: String,
    /// The image: raw:PATH (options cache=none|writeback|writethrough, sector=512|4096), vhd:PATH, qcow2:PATH, luks:PATH
    /// (options cache=, and key-file=, key-credential= for encrypted ones),
    /// ram:NAME?size=SIZE (options init=FILE, huge=2M),
    /// null:?size=SIZE
    #[arg(value_name = "TYPE:PATH")]
    pub image: String,
    /// Refuse everything that changes data
    #[arg(long)]
    pub read_only: bool,
    /// Serve it to NBD clients, at RUN_DIR/nbd/NAME.sock and by name at RUN_DIR/nbd.sock
    #[arg(long)]
    pub nbd: bool,
    /// Serve it by blkif to local clients that share their memory, at RUN_DIR/blkif/NAME.sock
    #[arg(long)]
    pub blkif: bool,
    /// Give it to a guest of Xen: the domain's number or name, 0 for the host itself
    #[arg(long, value_name = "DOM", requires = "vdev")]
    pub domain: Option<String>,
    /// The name of the disk in the guest, like xvda
    #[arg(long, value_name = "VDEV", requires = "domain")]
    pub vdev: Option<String>,
    /// Limits of the disk itself
    #[command(flatten)]
    pub limits: LimitChange,
    /// A group whose limits hold as well; may be repeated, nearest first
    #[arg(long, value_name = "GROUP")]
    pub group: Vec<String>,
    /// When a read, write or flush fails [default: as configured]
    #[arg(long, value_name = "POLICY")]
    pub on_error: Option<ErrorPolicy>,
    /// When the store is full [default: as configured]
    #[arg(long, value_name = "POLICY")]
    pub on_enospc: Option<ErrorPolicy>,
    /// The shard to serve it [default: the least loaded]
    #[arg(long, value_name = "N")]
    pub shard: Option<u16>,
}

/// Options of `qos`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("subject").required(true).multiple(true).args(["name", "group"])))]
pub struct QosArgs {
    /// The disk
    pub name: Option<String>,
    /// The group; with a disk, the disk's new groups (may be repeated, nearest first; empty for none)
    #[arg(long, value_name = "GROUP")]
    pub group: Vec<String>,
    /// Limits to change
    #[command(flatten)]
    pub limits: LimitChange,
}

/// A sensible time between two looks.
fn interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("{text:?} is not a number of seconds from 0.1 to 3600")),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the contract of the command line. Method: clap's own check, and the lines that scripts use.

    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_lines_of_the_contract_parse() {
        for line in [
            "blktapd serve",
            "blktapd serve --config f --cpus 0,1 --run-dir r --state-dir s --ctl c --metrics none --nbd-listen 1.2.3.4:1,tls",
            "blktapd ctl attach d1 raw:/x.img --nbd --iops 500 --bps 10M --group g --read-only --on-error pause --shard 1",
            "blktapd ctl --ctl /s --json --timeout 5 detach d1 --force",
            "blktapd ctl list --json",
            "blktapd ctl qos d1 --iops 0",
            "blktapd ctl qos --group g --bps-read 5M --dry-run",
            "blktapd ctl resume d1 --data-in-doubt",
            "blktapd ctl move d1 1",
            "blktapd doctor /a /b",
            "blktapd generate completions bash",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        for line in [
            "blktapd",
            "blktapd ctl attach d1",
            "blktapd ctl qos --iops 1",
            "blktapd ctl attach d1 null: --iops many",
            "blktapd ctl --timeout 601 list",
            "blktapd serve --tls-key k",
        ] {
            let error =
                Cli::try_parse_from(line.split(' ')).err().unwrap_or_else(|| panic!("{line} was taken"));
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
