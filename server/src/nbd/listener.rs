//! Listeners: one Unix socket for each disk, one for all, and TCP.
//!
//! A socket is bound under a name that nobody can reach, gets its permissions there, and is then renamed to its place: no
//! client ever meets one with the wrong permissions, and a stale one is replaced at once. The run directory belongs to one
//! daemon (`rundir`), so that a socket found there is stale.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;

use super::negotiate::{Socket, negotiate};
use super::{Scope, peer};
use crate::config::{Settings, SocketAccess};
use crate::daemon::Daemon;
use crate::problem::Problem;

/// Pauses after an accept that failed (no descriptors): the backlog waits, and nothing spins.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

static NEXT_LISTENER: AtomicU64 = AtomicU64::new(0);

/// Any listening socket.
#[derive(Debug)]
pub enum AnyListener {
    /// Unix.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

/// A listener; it ends, and its socket goes, when this is dropped.
#[derive(Debug)]
pub struct ListenerHandle {
    path: Option<PathBuf>,
    waiting: Option<AnyListener>,
    tls: bool,
    task: Option<JoinHandle<()>>,
}

impl ListenerHandle {
    /// Starts to take clients.
    pub fn serve(&mut self, daemon: &Arc<Daemon>, scope: Scope) {
        if let Some(listener) = self.waiting.take() {
            self.task = Some(tokio::spawn(run(listener, self.tls, daemon.clone(), scope)));
        }
    }
}

impl Drop for ListenerHandle {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        if let Some(path) = &self.path {
            // Gone already, or a directory that is: nothing that would help anybody.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Binds the socket of one disk.
pub fn bind_disk_socket(settings: &Settings, disk: &str) -> Result<ListenerHandle, Problem> {
    bind(&settings.run_dir, &settings.nbd_socket(disk), &settings.nbd_access)
}

/// Binds the socket with all exports.
pub fn bind_all_socket(settings: &Settings) -> Result<ListenerHandle, Problem> {
    bind(&settings.run_dir, &settings.nbd_all_socket(), &settings.nbd_access)
}

fn bind(run_dir: &Path, path: &Path, access: &SocketAccess) -> Result<ListenerHandle, Problem> {
    let listener = bind_unix(run_dir, path, access)?;
    let listener = UnixListener::from_std(listener)
        .map_err(|error| Problem::failed(format!("the socket {} cannot be used: {error}", path.display())))?;
    Ok(ListenerHandle {
        path: Some(path.to_owned()),
        waiting: Some(AnyListener::Unix(listener)),
        tls: false,
        task: None,
    })
}

/// Binds a Unix socket with its permissions; what is at `path` is replaced.
pub fn bind_unix(run_dir: &Path, path: &Path, access: &SocketAccess) -> Result<StdUnixListener, Problem> {
    bind_with(run_dir, path, access, |path| StdUnixListener::bind(path))
}

/// The same for a socket of type SOCK_SEQPACKET.
pub fn bind_seqpacket(
    run_dir: &Path,
    path: &Path,
    access: &SocketAccess,
) -> Result<StdUnixListener, Problem> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    bind_with(run_dir, path, access, |path| {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::MAXCONN)?;
        Ok(StdUnixListener::from(socket))
    })
}

fn bind_with(
    run_dir: &Path,
    path: &Path,
    access: &SocketAccess,
    bind: impl Fn(&Path) -> std::io::Result<StdUnixListener>,
) -> Result<StdUnixListener, Problem> {
    formats::spec::check_socket_path(path)?;
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Problem::failed(format!("the socket {} cannot be {what}: {error}", path.display()))
    };
    let gid = match &access.group {
        None => None,
        Some(name) => match nix::unistd::Group::from_name(name) {
            Ok(Some(group)) => Some(group.gid),
            Ok(None) => {
                return Err(failed(
                    "given to its group",
                    &format!("there is no group {name:?} on this host"),
                ));
            }
            Err(errno) => return Err(failed("given to its group", &errno)),
        },
    };
    let hidden_dir = HiddenDir::beside(run_dir, path).map_err(|error| failed("bound", &error))?;
    let number = NEXT_LISTENER.fetch_add(1, Ordering::Relaxed);
    let hidden = hidden_dir.path.join(format!("s{number}"));
    let _ = std::fs::remove_file(&hidden);
    let listener = bind(&hidden).map_err(|error| failed("bound", &error))?;
    let dressed = || -> std::io::Result<()> {
        listener.set_nonblocking(true)?;
        if let Some(gid) = gid {
            nix::unistd::chown(&hidden, None, Some(gid)).map_err(|errno| {
                let group = access.group.as_deref().unwrap_or_default();
                std::io::Error::other(format!(
                    "giving it to the group {group} failed: {errno}; the daemon has to be in that group (SupplementaryGroups= of \
                     its service), or have CAP_CHOWN"
                ))
            })?;
        }
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(access.mode))?;
        std::fs::rename(&hidden, path)
    };
    dressed().map_err(|error| {
        let _ = std::fs::remove_file(&hidden);
        failed("put in its place", &error)
    })?;
    Ok(listener)
}

/// A directory on the file system of a socket that only we can enter.
struct HiddenDir {
    path: PathBuf,
    temporary: bool,
}

impl HiddenDir {
    fn beside(run_dir: &Path, socket: &Path) -> std::io::Result<HiddenDir> {
        if socket.starts_with(run_dir) {
            return Ok(HiddenDir { path: run_dir.join(crate::rundir::HIDDEN), temporary: false });
        }
        let parent = socket.parent().unwrap_or(Path::new("/"));
        // mkdtemp makes it with mode 0700.
        let path = nix::unistd::mkdtemp(&parent.join(".blktapd-XXXXXX"))?;
        Ok(HiddenDir { path, temporary: true })
    }
}

impl Drop for HiddenDir {
    fn drop(&mut self) {
        if self.temporary {
            // Empty by now, or holding what could not be renamed: then it stays for somebody to look at.
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// Listens on TCP.
pub async fn listen_tcp(address: SocketAddr, tls: bool) -> Result<ListenerHandle, Problem> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Problem::failed(format!(
            "NBD cannot listen on {address}: {error}; give another address with --nbd-listen"
        ))
    })?;
    Ok(ListenerHandle { path: None, waiting: Some(AnyListener::Tcp(listener)), tls, task: None })
}

/// Listens on a socket that somebody else bound (socket activation).
pub fn listen_with(listener: AnyListener, tls: bool) -> ListenerHandle {
    ListenerHandle { path: None, waiting: Some(listener), tls, task: None }
}

async fn run(listener: AnyListener, tls: bool, daemon: Arc<Daemon>, scope: Scope) {
    let number = listener_number();
    let mut pause = None;
    loop {
        let accepted = match &listener {
            AnyListener::Unix(listener) => match listener.accept().await {
                Ok((socket, _)) => {
                    let peer = peer::of_unix(&socket);
                    spawn(&daemon, number, &scope, tls, socket, peer).await;
                    Ok(())
                }
                Err(error) => Err(error),
            },
            AnyListener::Tcp(listener) => match listener.accept().await {
                Ok((socket, address)) => {
                    // Small replies wait for nobody; a client whose host vanished is noticed.
                    let _ = socket.set_nodelay(true);
                    let _ =
                        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::KeepAlive, &true);
                    spawn(&daemon, number, &scope, tls, socket, peer::of_tcp(address)).await;
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        match accepted {
            Ok(()) => pause = None,
            Err(error) => pause = pause_after_failed_accept(pause, &error).await,
        }
    }
}

/// A number that no other listener has, for `super::places::Places`.
pub fn listener_number() -> u64 {
    NEXT_LISTENER.fetch_add(1, Ordering::Relaxed)
}

/// After an accept that failed, and the pause after the one before it, if that failed as well.
pub async fn pause_after_failed_accept(last: Option<Duration>, error: &std::io::Error) -> Option<Duration> {
    // The client left while it waited: that is no lack of anything.
    if error.kind() == std::io::ErrorKind::ConnectionAborted {
        return last;
    }
    let pause = last.map_or(ACCEPT_PAUSE.0, |last| (last * 2).min(ACCEPT_PAUSE.1));
    if last.is_none() || pause == ACCEPT_PAUSE.1 {
        tracing::warn!("a client cannot be accepted: {error}; raise LimitNOFILE if descriptors lack");
    }
    tokio::time::sleep(pause).await;
    Some(pause)
}

/// Serves one client in a task of its own, bounded in time. Returns when the client has a place.
async fn spawn<S: Socket + 'static>(
    daemon: &Arc<Daemon>,
    listener: u64,
    scope: &Scope,
    tls: bool,
    socket: S,
    peer: String,
) {
    let limits = daemon.nbd.limits();
    let ticket = daemon.nbd.places.take(listener, limits.negotiations).await;
    let number = ticket.number();
    let (owner, scope) = (daemon.clone(), scope.clone());
    let task = tokio::spawn(async move {
        let acceptor = if tls { owner.nbd.tls() } else { None };
        if tls && acceptor.is_none() {
            tracing::warn!("a TLS client was refused: there is no certificate or key any more");
            return;
        }
        let name = peer.clone();
        let negotiation = negotiate(socket, peer, &owner, &scope, acceptor, &ticket);
        let agreed = match tokio::time::timeout(limits.negotiation_timeout, negotiation).await {
            Ok(Ok(agreed)) => agreed,
            Ok(Err(end)) => return tracing::debug!("NBD client {name}: {end}"),
            Err(_) => return tracing::info!("NBD client {name} did not choose an export in time"),
        };
        // From here on the client is no stranger any more, and cannot lose its place.
        tokio::spawn(async move {
            let (export, handoff) = agreed;
            match owner.connect(&export, handoff).await {
                Ok(()) => tracing::debug!(disk = export, "NBD client {name} connected"),
                Err(problem) => {
                    tracing::warn!(disk = export, "NBD client {name} was not connected: {problem}")
                }
            }
        });
        drop(ticket);
    });
    daemon.nbd.places.set_task(number, task.abort_handle());
}
