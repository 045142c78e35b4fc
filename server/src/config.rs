//! The configuration file, and what it makes together with the command line: [`Settings`].
//!
//! Command line over file over default. Unknown keys are refused with line, column and the nearest known key. Every key has
//! its default here and nowhere else.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use shard::executor::RingFlavour;
use shard::limits::Limits;

use crate::args::{LogFormat, Ring, ServeArgs};
use crate::limit_change::{LimitChange, size};
use crate::model::ErrorPolicy;
use crate::problem::Problem;

/// Read when no `--config` is given and it is there.
pub const DEFAULT_CONFIG: &str = "/etc/blktapd/blktapd.toml";
const DEFAULT_RUN_DIR: &str = "/run/blktapd";
const DEFAULT_STATE_DIR: &str = "/var/lib/blktapd";
const DEFAULT_METRICS: &str = "127.0.0.1:9680";

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ConfigFile {
    run_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    log: Option<String>,
    log_format: Option<LogFormat>,
    shutdown_timeout_s: Option<u32>,
    ctl: CtlSection,
    metrics: MetricsSection,
    shards: ShardsSection,
    images: ImagesSection,
    disks: DisksSection,
    ram: RamSection,
    nbd: NbdSection,
    groups: BTreeMap<String, LimitChange>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CtlSection {
    socket: Option<PathBuf>,
    mode: Option<String>,
    group: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MetricsSection {
    listen: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ShardsSection {
    cpus: Option<String>,
    ring: Option<Ring>,
    #[serde(deserialize_with = "size")]
    buffer_budget: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ImagesSection {
    allowed_dirs: Vec<PathBuf>,
    open_timeout_s: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DisksSection {
    on_error: Option<ErrorPolicy>,
    on_enospc: Option<ErrorPolicy>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RamSection {
    dir: Option<PathBuf>,
    #[serde(deserialize_with = "size")]
    limit: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NbdSection {
    listen: Vec<String>,
    mode: Option<String>,
    group: Option<String>,
    max_connections: Option<u32>,
    max_connections_per_disk: Option<u32>,
    max_negotiations: Option<u32>,
    negotiation_timeout_s: Option<u32>,
    tls: TlsSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TlsSection {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    psk: Option<PathBuf>,
}

/// Where a listener listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// An NBD listener on TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdListen {
    /// Address and port.
    pub address: SocketAddr,
    /// Clients must use TLS.
    pub tls: bool,
}

/// Files of the TLS listeners.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain and private key (PEM).
    pub cert_key: Option<(PathBuf, PathBuf)>,
    /// Clients must have a certificate signed by one of these authorities (PEM).
    pub client_ca: Option<PathBuf>,
    /// Pre-shared keys, lines of `USER:HEX`.
    pub psk: Option<PathBuf>,
}

/// Who may connect to a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permission bits.
    pub mode: u32,
    /// Group that owns the socket; the daemon's own when absent.
    pub group: Option<String>,
}

/// Bounds on NBD clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NbdLimits {
    /// Connections of all disks.
    pub connections: u32,
    /// Connections of one disk.
    pub connections_per_disk: u32,
    /// Clients that may haggle at a time, over all listeners; one listener has at most a quarter of them.
    pub negotiations: u32,
    /// Time for the whole negotiation.
    pub negotiation_timeout: Duration,
}

impl NbdLimits {
    /// The bounds that `descriptors` allow: clients must never take those that images and control need.
    pub fn within(self, descriptors: u64) -> NbdLimits {
        let at_most = |wanted: u32, share: u64, key: &str| {
            let possible = u32::try_from(descriptors / share).unwrap_or(u32::MAX).max(4);
            if wanted > possible {
                tracing::warn!(
                    "nbd.{key} is {wanted}, and {descriptors} open files allow {possible}: raise LimitNOFILE (ulimit -n)"
                );
            }
            wanted.min(possible)
        };
        NbdLimits {
            connections: at_most(self.connections, 2, "max_connections"),
            negotiations: at_most(self.negotiations, 8, "max_negotiations"),
            ..self
        }
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What the daemon was told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Sockets and locks.
    pub run_dir: PathBuf,
    /// Attachments.
    pub state_dir: PathBuf,
    /// Control socket.
    pub ctl: PathBuf,
    /// Who may connect to it.
    pub ctl_access: SocketAccess,
    /// `/metrics` and `/healthz`; `None` for nowhere else than on the control socket.
    pub metrics: Option<Listen>,
    /// CPUs for shards; `None` for all that are allowed.
    pub cpus: Option<Vec<usize>>,
    /// Best ring set-up to try.
    pub ring: RingFlavour,
    /// Bytes of I/O buffers of one shard.
    pub buffer_budget_bytes: usize,
    /// Take commands that inject faults.
    pub fault_commands: bool,
    /// Directories that images must be in; empty for everywhere.
    pub allowed_dirs: Vec<PathBuf>,
    /// How long opening an image at the start of the daemon may take; commands bring their own deadline.
    pub open_timeout: Duration,
    /// Policy of attachments that name none.
    pub on_error: ErrorPolicy,
    /// Policy of attachments that name none.
    pub on_enospc: ErrorPolicy,
    /// Directory of RAM disks that an operator chose.
    pub ram_dir: Option<PathBuf>,
    /// Limit on the memory of all RAM disks; `None` for no limit.
    pub ram_limit_bytes: Option<u64>,
    /// NBD on TCP.
    pub nbd_listen: Vec<NbdListen>,
    /// Who may connect to NBD's Unix sockets, and to those for blkif.
    pub nbd_access: SocketAccess,
    /// Bounds on NBD clients.
    pub nbd_limits: NbdLimits,
    /// TLS of the TCP listeners.
    pub tls: TlsFiles,
    /// Groups that the configuration names.
    pub groups: BTreeMap<String, Limits>,
    /// How long a stop may drain and flush.
    pub shutdown_timeout: Duration,
    /// What to log.
    pub log: String,
    /// How to log; `None` to find out.
    pub log_format: Option<LogFormat>,
}

impl Settings {
    /// Reads the configuration file that the arguments (or the default) name, and applies the arguments.
    pub fn load(args: &ServeArgs) -> Result<Settings, Problem> {
        let (path, required) = match &args.config {
            Some(path) => (path.as_path(), true),
            None => (Path::new(DEFAULT_CONFIG), false),
        };
        let file = match std::fs::read_to_string(path) {
            Ok(text) => parse(&text, path)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => ConfigFile::default(),
            Err(error) => {
                return Err(Problem::invalid(format!(
                    "the configuration {} cannot be read: {error}; give a file that is there with --config",
                    path.display()
                )));
            }
        };
        resolve(args, file).map_err(|problem| match path.exists() {
            true => problem.context(&format!("command line and {}", path.display())),
            false => problem,
        })
    }

    /// The directory of the disks' own NBD sockets.
    pub fn nbd_dir(&self) -> PathBuf {
        self.run_dir.join("nbd")
    }

    /// The NBD socket of one disk.
    pub fn nbd_socket(&self, disk: &str) -> PathBuf {
        self.nbd_dir().join(format!("{disk}.sock"))
    }

    /// The directory of the disks' blkif sockets.
    pub fn blkif_dir(&self) -> PathBuf {
        self.run_dir.join("blkif")
    }

    /// The socket of one disk for clients that share memory.
    pub fn blkif_socket(&self, disk: &str) -> PathBuf {
        self.blkif_dir().join(format!("{disk}.sock"))
    }

    /// The NBD socket with all exports.
    pub fn nbd_all_socket(&self) -> PathBuf {
        self.run_dir.join("nbd.sock")
    }
}

/// Parses the file; the error has file, line, column and a hint.
fn parse(text: &str, path: &Path) -> Result<ConfigFile, Problem> {
    toml::from_str(text).map_err(|error| {
        let place = match error.span() {
            Some(span) => {
                let before = text.get(..span.start).unwrap_or("");
                let line = before.matches('\n').count() + 1;
                let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
                format!("{}:{line}:{column}", path.display())
            }
            None => path.display().to_string(),
        };
        let hint = nearest_key(error.message()).map_or(String::new(), |key| format!("; did you mean {key}?"));
        Problem::invalid(format!("{place}: {}{hint}", error.message().trim_end()))
    })
}

/// The known key that is nearest to the unknown one, from serde's message "unknown field `x`, expected one of `a`, `b`".
fn nearest_key(message: &str) -> Option<&str> {
    let mut quoted = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    quoted
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .filter(|(distance, known)| *distance * 2 <= known.len().max(4))
        .min()
        .map(|(_, known)| known)
}

fn resolve(args: &ServeArgs, file: ConfigFile) -> Result<Settings, Problem> {
    let run_dir_given = args.run_dir.clone().or(file.run_dir);
    let run_dir = absolute(run_dir_given.clone().unwrap_or_else(|| DEFAULT_RUN_DIR.into()))?;
    let state_dir = match (args.state_dir.clone().or(file.state_dir), run_dir_given) {
        (Some(dir), _) => dir,
        (None, Some(_)) => run_dir.join("state"),
        (None, None) => DEFAULT_STATE_DIR.into(),
    };
    let ctl = args.ctl.clone().or(file.ctl.socket).unwrap_or_else(|| run_dir.join("ctl.sock"));
    let metrics = args.metrics.clone().or(file.metrics.listen);
    let cpus = args.cpus.clone().or(file.shards.cpus);
    let nbd_listen = if args.nbd_listen.is_empty() { file.nbd.listen } else { args.nbd_listen.clone() };
    let tls = tls_files(args, file.nbd.tls)?;
    let ring = match args.ring.or(file.shards.ring).unwrap_or(Ring::Deferred) {
        Ring::Deferred => RingFlavour::Deferred,
        Ring::Cooperative => RingFlavour::Cooperative,
        Ring::Plain => RingFlavour::Plain,
    };
    let buffer_budget = file.shards.buffer_budget.unwrap_or(64 << 20);
    if buffer_budget < 1 << 20 {
        return Err(Problem::invalid(format!(
            "shards.buffer_budget is {buffer_budget} bytes: expected at least 1M, so that a request fits"
        )));
    }
    let seconds = |given: Option<u32>, default: u32| Duration::from_secs(given.unwrap_or(default).into());
    let settings = Settings {
        ctl: absolute(ctl)?,
        ctl_access: access("ctl", file.ctl.mode, file.ctl.group, 0o660)?,
        metrics: parse_metrics(metrics.as_deref().unwrap_or(DEFAULT_METRICS))?,
        cpus: cpus.as_deref().map(parse_cpus).transpose()?,
        ring,
        buffer_budget_bytes: usize::try_from(buffer_budget).unwrap_or(usize::MAX),
        fault_commands: args.fault_commands,
        allowed_dirs: file.images.allowed_dirs.into_iter().map(absolute).collect::<Result<_, _>>()?,
        open_timeout: seconds(file.images.open_timeout_s, 30),
        on_error: file.disks.on_error.unwrap_or(ErrorPolicy::Report),
        on_enospc: file.disks.on_enospc.unwrap_or(ErrorPolicy::Report),
        ram_dir: args.ram_dir.clone().or(file.ram.dir).map(absolute).transpose()?,
        ram_limit_bytes: args.ram_limit.or(file.ram.limit).filter(|limit| *limit > 0),
        nbd_listen: nbd_listen.iter().map(|text| parse_nbd_listen(text)).collect::<Result<_, _>>()?,
        nbd_access: access("nbd", file.nbd.mode, file.nbd.group, 0o600)?,
        nbd_limits: NbdLimits {
            connections: positive("nbd.max_connections", file.nbd.max_connections, 4096)?,
            connections_per_disk: positive(
                "nbd.max_connections_per_disk",
                file.nbd.max_connections_per_disk,
                64,
            )?,
            negotiations: positive("nbd.max_negotiations", file.nbd.max_negotiations, 1024)?,
            negotiation_timeout: seconds(file.nbd.negotiation_timeout_s, 10),
        },
        tls,
        groups: groups(file.groups)?,
        shutdown_timeout: seconds(file.shutdown_timeout_s, 30),
        log: args.log.clone().or(file.log).unwrap_or_else(|| "info".into()),
        log_format: args.log_format.or(file.log_format),
        state_dir: absolute(state_dir)?,
        run_dir,
    };
    if settings.nbd_listen.iter().any(|listen| listen.tls)
        && settings.tls.cert_key.is_none()
        && settings.tls.psk.is_none()
    {
        return Err(Problem::invalid(
            "an NBD listener asks for TLS, and there is neither a certificate nor a pre-shared key: give --tls-cert and \
             --tls-key, or --tls-psk",
        ));
    }
    crate::logging::parse(&settings.log)?;
    formats::spec::check_socket_path(&settings.ctl)?;
    // Sockets are bound there before they are renamed to their places.
    formats::spec::check_socket_path(&settings.run_dir.join(crate::rundir::HIDDEN).join("s000000"))?;
    Ok(settings)
}

fn tls_files(args: &ServeArgs, file: TlsSection) -> Result<TlsFiles, Problem> {
    let cert_key = match (args.tls_cert.clone().or(file.cert), args.tls_key.clone().or(file.key)) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (Some(_), None) => {
            return Err(Problem::invalid("nbd.tls.cert is given without nbd.tls.key: give both"));
        }
        (None, Some(_)) => {
            return Err(Problem::invalid("nbd.tls.key is given without nbd.tls.cert: give both"));
        }
    };
    let client_ca = args.tls_client_ca.clone().or(file.client_ca);
    if client_ca.is_some() && cert_key.is_none() {
        return Err(Problem::invalid(
            "nbd.tls.client_ca asks for certificates of clients, and the server has none: give nbd.tls.cert and \
             nbd.tls.key as well",
        ));
    }
    let psk = args.tls_psk.clone().or(file.psk);
    if psk.is_some() && cert_key.is_some() {
        return Err(Problem::invalid(
            "both a certificate and pre-shared keys are given for TLS: the listeners use one of them, give that one",
        ));
    }
    Ok(TlsFiles { cert_key, client_ca, psk })
}

fn groups(written: BTreeMap<String, LimitChange>) -> Result<BTreeMap<String, Limits>, Problem> {
    written
        .into_iter()
        .map(|(name, change)| {
            formats::spec::check_disk_name(&name)?;
            let limits = change.to_limits().map_err(|problem| problem.context(&format!("groups.{name}")))?;
            Ok((name, limits))
        })
        .collect()
}

fn positive(key: &str, given: Option<u32>, default: u32) -> Result<u32, Problem> {
    match given.unwrap_or(default) {
        0 => Err(Problem::invalid(format!("{key} is 0: expected at least 1"))),
        n => Ok(n),
    }
}

/// Permission bits from a text like `0660`.
fn access(
    section: &str,
    mode: Option<String>,
    group: Option<String>,
    default: u32,
) -> Result<SocketAccess, Problem> {
    let mode = match &mode {
        None => default,
        Some(text) => match u32::from_str_radix(text, 8) {
            Ok(bits) if bits <= 0o777 => bits,
            _ => {
                return Err(Problem::invalid(format!(
                    "{section}.mode is {text:?}: expected permission bits in octal, like \"0660\""
                )));
            }
        },
    };
    Ok(SocketAccess { mode, group })
}

fn absolute(path: PathBuf) -> Result<PathBuf, Problem> {
    std::path::absolute(&path).map_err(|error| {
        Problem::invalid(format!("the path {:?} cannot be made absolute: {error}", path.display()))
    })
}

fn parse_metrics(text: &str) -> Result<Option<Listen>, Problem> {
    if text == "none" {
        return Ok(None);
    }
    if let Some(path) = text.strip_prefix("unix:") {
        let path = absolute(path.into())?;
        formats::spec::check_socket_path(&path)?;
        return Ok(Some(Listen::Unix(path)));
    }
    text.parse().map(|address| Some(Listen::Tcp(address))).map_err(|_| {
        Problem::invalid(format!(
            "the metrics address is {text:?}: expected ADDRESS:PORT like 127.0.0.1:9680 or [::1]:9680, unix:PATH, or none"
        ))
    })
}

fn parse_nbd_listen(text: &str) -> Result<NbdListen, Problem> {
    let (address, tls) = match text.strip_suffix(",tls") {
        Some(address) => (address, true),
        None => (text, false),
    };
    match address.parse() {
        Ok(address) => Ok(NbdListen { address, tls }),
        Err(_) => Err(Problem::invalid(format!(
            "the NBD address is {text:?}: expected ADDRESS:PORT like 0.0.0.0:10809 or [::]:10809, with ,tls behind it to \
             require TLS"
        ))),
    }
}

/// CPU numbers from a list like `0,2-5`.
fn parse_cpus(text: &str) -> Result<Vec<usize>, Problem> {
    const CPU_MAX: usize = 4095;
    let refuse = || {
        Problem::invalid(format!(
            "the CPU list is {text:?}: expected numbers and ranges up to {CPU_MAX}, like 0,2-5"
        ))
    };
    let number = |text: &str| text.parse::<usize>().ok().filter(|n| *n <= CPU_MAX).ok_or_else(refuse);
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(refuse());
        }
        cpus.extend(first..=last);
    }
    let mut sorted = cpus.clone();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() != cpus.len() {
        return Err(Problem::invalid(format!("the CPU list {text:?} names a CPU twice: name each once")));
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    //! Goal: every wrong configuration gets a message with place, finding and remedy; the layers win in their order.
    //! Method: tables of texts.

    use super::*;

    fn read(text: &str) -> Result<Settings, Problem> {
        resolve(&ServeArgs::default(), parse(text, Path::new("b.toml"))?)
    }

    #[test]
    fn unknown_keys_are_refused_with_line_and_hint() {
        for (text, expected) in [
            ("run_dir = '/r'\n\n  rundir = 1\n", "b.toml:3:3: unknown field `rundir`"),
            (
                "[metrics]\nlistn = 'x'\n",
                "b.toml:2:1: unknown field `listn`, expected `listen`; did you mean listen?",
            ),
            ("[nbd.tls]\ncerts = 'x'\n", "did you mean cert?"),
            ("[groups.a]\niops_reed = 1\n", "did you mean iops_read?"),
            ("shutdown_timeout_s = 'x'", "b.toml:1:22: invalid type: string \"x\""),
            ("a = [1,", "b.toml:1:"),
            ("[groups.a]\nbps = '10X'", "the unit \"X\" is not known"),
        ] {
            let message = read(text).unwrap_err().message;
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }

    #[test]
    fn wrong_values_name_themselves() {
        for (text, expected) in [
            ("[ctl]\nmode = '0999'", "ctl.mode is \"0999\""),
            ("[shards]\ncpus = '3-1'", "the CPU list is \"3-1\""),
            ("[shards]\ncpus = '1,1'", "names a CPU twice"),
            ("[shards]\nbuffer_budget = '4k'", "at least 1M"),
            ("[metrics]\nlisten = 'localhost'", "the metrics address is \"localhost\""),
            ("[nbd]\nlisten = ['1.2.3.4']", "the NBD address is \"1.2.3.4\""),
            ("[nbd]\nlisten = ['1.2.3.4:1,tls']", "give --tls-cert"),
            ("[nbd]\nmax_connections = 0", "nbd.max_connections is 0"),
            ("[nbd.tls]\ncert = 'x'", "without nbd.tls.key"),
            ("[groups.'a/b']\niops = 1", "the name \"a/b\""),
            ("[groups.a]\niops_burst = 1", "groups.a: a burst of iops"),
        ] {
            let message = read(text).unwrap_err().message;
            assert!(message.contains(expected), "{text:?}: {message}");
        }
        let long = format!("run_dir = '/{}'", "x".repeat(120));
        assert!(read(&long).unwrap_err().message.contains("at most 107"));
    }

    #[test]
    fn clients_leave_descriptors_for_the_rest() {
        let limits = read("").unwrap().nbd_limits;
        assert_eq!(limits.within(1 << 20), limits);
        let few = limits.within(1024);
        assert_eq!((few.connections, few.negotiations, few.connections_per_disk), (512, 128, 64));
    }

    /// The example file says what the defaults are, in lines that start with # and no blank, and shows no key that is wrong.
    #[test]
    fn the_example_is_right() {
        let text = include_str!("../../deploy/blktapd.toml");
        let is_key = |line: &str| line.contains(" = ") && line.starts_with(|c: char| c.is_ascii_lowercase());
        let uncomment = |mark: &str| {
            let line = |line: &str| {
                let inner = line.strip_prefix(mark).filter(|rest| is_key(rest) || rest.starts_with('['));
                format!("{}\n", inner.unwrap_or(line))
            };
            text.lines().map(line).collect::<String>()
        };
        let defaults = uncomment("#");
        assert!(defaults.matches("\n[").count() > 5 && defaults.contains("\nrun_dir = "), "{defaults}");
        // What the host decides has a value in the example all the same.
        let log_format = read(&defaults).unwrap().log_format;
        let expected = Settings { log_format, ..read("").unwrap() };
        assert_eq!(read(&defaults).unwrap(), expected);
        // Keys instead of a certificate.
        let shown = read(&uncomment("# ").replace("\npsk = ", "\n# psk = ")).unwrap();
        assert_eq!(shown.groups["tenant-7"].iops_total.burst, 40_000);
        assert_eq!(shown.ram_limit_bytes, Some(4 << 30));
        assert!(shown.tls.cert_key.is_some(), "{shown:?}");
    }

    #[test]
    fn defaults_and_layers() {
        let none = read("").unwrap();
        assert_eq!(none.run_dir, Path::new("/run/blktapd"));
        assert_eq!(none.state_dir, Path::new("/var/lib/blktapd"));
        assert_eq!(none.ctl, Path::new("/run/blktapd/ctl.sock"));
        assert_eq!(none.metrics, Some(Listen::Tcp("127.0.0.1:9680".parse().unwrap())));
        let run = read("run_dir = '/r'\n[groups.g]\niops = '2k'").unwrap();
        assert_eq!(run.state_dir, Path::new("/r/state"));
        assert_eq!(run.groups["g"].iops_total.per_second, 2000);
        let args =
            ServeArgs { run_dir: Some("/a".into()), metrics: Some("none".into()), ..Default::default() };
        let both =
            resolve(&args, parse("run_dir = '/r'\nstate_dir = '/s'", Path::new("x")).unwrap()).unwrap();
        assert_eq!((both.run_dir.as_path(), both.state_dir.as_path()), (Path::new("/a"), Path::new("/s")));
        assert_eq!(both.metrics, None);
        assert_eq!(parse_cpus("0,2-4").unwrap(), [0, 2, 3, 4]);
    }
}
