//! `blktapd serve`: from nothing to a daemon that serves, and back.
//!
//! Order: sockets that were passed, settings, log, locks, shards (their threads inherit blocked signals), the runtime of the
//! control thread, listeners, the disks of the last run, READY. The way back: no new work, drain and flush, shards stopped.
//! When the last shard has ended by a failure the daemon ends as well, with a failure, for the service manager to start it again;
//! what a start needs (attachments, RAM disks, the run directory) stays.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::args::ServeArgs;
use crate::config::{Listen, Settings, SocketAccess};
use crate::daemon::Daemon;
use crate::http::{self, Api, peer};
use crate::images::Images;
use crate::metrics::Metrics;
use crate::nbd::{self, ListenerHandle};
use crate::problem::{Problem, ProblemKind};
use crate::state::StateStore;
use crate::systemd::{self, Given};
use crate::{logging, rundir, supervise};

/// How long readiness waits for the disks of the last run.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the daemon until it is told to stop. The value is the exit code: 1 when something could not be flushed.
pub fn serve(args: ServeArgs) -> Result<u8, Problem> {
    let given = systemd::given_sockets()?;
    let settings = Settings::load(&args)?;
    logging::start(&settings.log, settings.log_format)?;
    let owned = rundir::own(&settings)?;
    let state = StateStore::open(&settings.state_dir)?;
    let images = Images::new(&settings)?;
    let mut settings = settings;
    settings.nbd_limits = settings.nbd_limits.within(raise_descriptor_limit());

    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    let failed = |what: &str, error: &dyn std::fmt::Display| Problem::failed(format!("{what}: {error}"));
    signals.thread_block().map_err(|errno| failed("signals cannot be blocked", &errno))?;
    let (fleet, notices, events) = supervise::start_shards(&settings)?;
    signals.thread_unblock().map_err(|errno| failed("signals cannot be unblocked", &errno))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| failed("the control thread's runtime cannot start", &error))?;
    let result = runtime.block_on(async {
        tokio::spawn(supervise::deliver_events(fleet.clone(), events));
        let daemon = Daemon::new(args, settings, fleet, images, state)?;
        tokio::spawn(daemon.clone().handle_notices(notices));
        run(daemon, given).await
    });
    // A path that hangs keeps a thread; the process ends without it.
    runtime.shutdown_background();
    drop(owned);
    result
}

/// Serves until a signal, then stops.
async fn run(daemon: Arc<Daemon>, given: Given) -> Result<u8, Problem> {
    let failed = |what: &str, error: std::io::Error| Problem::failed(format!("{what}: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| failed("SIGTERM", error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| failed("SIGINT", error))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(|error| failed("SIGHUP", error))?;

    let listeners = listen(&daemon, given).await?;
    tokio::spawn(systemd::heartbeat(daemon.clone()));
    daemon.restore(Instant::now() + READY_PATIENCE).await;
    daemon.start_guests();
    systemd::notify(&[NotifyState::Ready]);
    tracing::info!(
        "blktapd {} serves at {} with {} shards",
        env!("CARGO_PKG_VERSION"),
        daemon.settings().run_dir.display(),
        daemon.fleet.shards().len()
    );

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = daemon.no_shard_left.notified() => {
                daemon.begin_stop();
                return Err(Problem::failed(
                    "no shard is left, so no disk can be served: the daemon ends, to be started again; report its log",
                ));
            }
            _ = hangup.recv() => {
                let daemon = daemon.clone();
                tokio::spawn(async move {
                    match systemd::reloading(&daemon).await {
                        Ok(report) => tracing::info!("reloaded: {report:?}"),
                        Err(problem) => tracing::error!("the configuration was not reloaded: {problem}"),
                    }
                });
            }
        }
    }
    systemd::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: draining and flushing all disks");
    daemon.begin_stop();
    drop(listeners);
    let deadline = Instant::now() + daemon.settings().shutdown_timeout;
    let unflushed = tokio::select! {
        unflushed = daemon.drain(deadline) => unflushed,
        _ = terminate.recv() => vec!["all disks (a second signal came)".into()],
        _ = interrupt.recv() => vec!["all disks (a second signal came)".into()],
    };
    daemon.fleet.stop(Duration::from_secs(5)).await;
    if unflushed.is_empty() {
        tracing::info!("stopped; every disk was flushed");
        return Ok(0);
    }
    tracing::error!("stopped; not flushed: {}", unflushed.join(", "));
    Ok(1)
}

/// What ends with the daemon.
struct Listeners {
    nbd: Vec<ListenerHandle>,
    http: Vec<tokio::task::JoinHandle<()>>,
    paths: Vec<std::path::PathBuf>,
}

impl Drop for Listeners {
    fn drop(&mut self) {
        self.nbd.clear();
        self.http.iter().for_each(tokio::task::JoinHandle::abort);
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn listen(daemon: &Arc<Daemon>, given: Given) -> Result<Listeners, Problem> {
    let settings = daemon.settings();
    let failed = |what: &str, error: std::io::Error| Problem::failed(format!("{what}: {error}"));
    let api = Api { daemon: daemon.clone(), metrics: Arc::new(Metrics::new()?) };
    let mut listeners = Listeners { nbd: Vec::new(), http: Vec::new(), paths: Vec::new() };

    let control = match given.ctl {
        Some(socket) => socket,
        None => bind_control(&settings).inspect(|_| listeners.paths.push(settings.ctl.clone()))?,
    };
    let control = UnixListener::from_std(control).map_err(|error| failed("the control socket", error))?;
    listeners.http.push(tokio::spawn(http::serve::control(control, http::control_router(api.clone()))));
    listen_metrics(&settings, given.metrics, api, &mut listeners).await?;

    listeners.nbd.push(nbd::bind_all_socket(&settings)?);
    for listen in &settings.nbd_listen {
        listeners.nbd.push(nbd::listen_tcp(listen.address, listen.tls).await?);
    }
    for (socket, tls) in given.nbd {
        let listener = socket.into_nbd(tls).map_err(|error| failed("a passed NBD socket", error))?;
        listeners.nbd.push(listener);
    }
    listeners.nbd.iter_mut().for_each(|listener| listener.serve(daemon, nbd::Scope::All));
    Ok(listeners)
}

async fn listen_metrics(
    settings: &Settings,
    given: Option<systemd::Socket>,
    api: Api,
    listeners: &mut Listeners,
) -> Result<(), Problem> {
    let failed = |error: &dyn std::fmt::Display| {
        Problem::failed(format!(
            "metrics cannot be served at {}: {error}; give another address with --metrics, or none",
            settings.metrics.as_ref().map_or_else(|| "the passed socket".into(), Listen::to_string)
        ))
    };
    let router = http::metrics_router(api);
    let task = match (given, &settings.metrics) {
        (Some(systemd::Socket::Tcp(socket)), _) => {
            let listener = TcpListener::from_std(socket).map_err(|error| failed(&error))?;
            tokio::spawn(http::serve::metrics_tcp(listener, router))
        }
        (Some(systemd::Socket::Unix(socket)), _) => {
            let listener = UnixListener::from_std(socket).map_err(|error| failed(&error))?;
            tokio::spawn(http::serve::metrics_unix(listener, router))
        }
        (None, Some(Listen::Tcp(address))) => {
            let listener = TcpListener::bind(address).await.map_err(|error| failed(&error))?;
            tokio::spawn(http::serve::metrics_tcp(listener, router))
        }
        (None, Some(Listen::Unix(path))) => {
            refuse_answered(path, "metrics socket", "--metrics")?;
            let socket = bind_api(settings, path)?;
            listeners.paths.push(path.clone());
            let listener = UnixListener::from_std(socket).map_err(|error| failed(&error))?;
            tokio::spawn(http::serve::metrics_unix(listener, router))
        }
        (None, None) => return Ok(()),
    };
    listeners.http.push(task);
    Ok(())
}

fn bind_control(settings: &Settings) -> Result<std::os::unix::net::UnixListener, Problem> {
    refuse_answered(&settings.ctl, "control socket", "--ctl")?;
    bind_api(settings, &settings.ctl)
}

/// Binds a socket of the API. Readers need to connect: without another group the socket is theirs, where there is such a group and
/// it may be given to it (root may; others only to groups that they are in). What readers may ask is decided in [`peer`].
fn bind_api(
    settings: &Settings,
    path: &std::path::Path,
) -> Result<std::os::unix::net::UnixListener, Problem> {
    let access = &settings.ctl_access;
    let readers = nix::unistd::Group::from_name(peer::READERS).ok().flatten();
    if access.group.is_none() && readers.is_some() {
        let theirs = SocketAccess { group: Some(peer::READERS.into()), ..access.clone() };
        match nbd::bind_unix(&settings.run_dir, path, &theirs) {
            Ok(socket) => return Ok(socket),
            Err(problem) => tracing::debug!("not for the group {}: {problem}", peer::READERS),
        }
    }
    nbd::bind_unix(&settings.run_dir, path, access)
}

/// A socket outside the run directory may belong to somebody else: it is replaced only if nobody answers.
fn refuse_answered(path: &std::path::Path, what: &str, option: &str) -> Result<(), Problem> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!(
                "somebody answers at the {what} {}: stop that program, or name another with {option}",
                path.display()
            ),
        ));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => Err(Problem::new(
            ProblemKind::Conflict,
            format!(
                "{} is there and is no socket: remove it, or name another path with {option}",
                path.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// Each client and image takes descriptors: the soft limit is raised to the hard one. Returns the limit.
fn raise_descriptor_limit() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return u64::MAX };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(errno) => {
            tracing::warn!("the limit of open files stays at {soft}: {errno}");
            soft
        }
    }
}
