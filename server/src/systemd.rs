//! What the service manager hears and gives: readiness, reloads, the watchdog, and sockets that it bound for us.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use sd_notify::NotifyState;

use crate::daemon::Daemon;
use crate::model::{Reload, ShardState};
use crate::nbd::listen_with;
use crate::problem::Problem;

/// Tells the service manager something; without one nothing happens.
pub fn notify(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager cannot be told: {error}");
    }
}

/// Reads the configuration again, with the service manager's knowledge.
pub async fn reloading(daemon: &Arc<Daemon>) -> Result<Reload, Problem> {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
    let result = daemon.reload().await;
    notify(&[NotifyState::Ready]);
    result
}

/// Tells the service manager that we live as long as every shard that has not ended turns, and keeps the status line. Also the
/// place where the shards' load is sampled.
pub async fn heartbeat(daemon: Arc<Daemon>) {
    /// For sampling the load.
    const EVERY: Duration = Duration::from_secs(5);
    let watchdog = sd_notify::watchdog_enabled();
    let every = watchdog.map_or(EVERY, |limit| (limit / 3).clamp(Duration::from_millis(100), EVERY));
    let mut status = String::new();
    loop {
        daemon.fleet.shards().iter().for_each(|shard| shard.sample());
        daemon.images.reap();
        let stalled: Vec<usize> = daemon
            .fleet
            .shards()
            .iter()
            .filter(|shard| shard.state() == ShardState::Stalled)
            .map(|shard| shard.index)
            .collect();
        if watchdog.is_some() && stalled.is_empty() {
            notify(&[NotifyState::Watchdog]);
        }
        let disks = daemon.all_disks();
        let failed = disks.iter().filter(|disk| disk.state() == crate::model::State::Failed).count();
        let mut new = format!("{} disks on {} shards", disks.len(), daemon.fleet.shards().len());
        if failed > 0 {
            new.push_str(&format!(", {failed} failed"));
        }
        let ended = daemon.fleet.shards().iter().filter(|shard| shard.state() == ShardState::Ended).count();
        if ended > 0 {
            new.push_str(&format!(", {ended} shards ended (restart when it suits)"));
        }
        if !stalled.is_empty() {
            new.push_str(&format!(", shards stalled: {stalled:?}"));
            tracing::error!("shards do not turn: {stalled:?}");
        }
        if new != status && !daemon.is_stopping() {
            notify(&[NotifyState::Status(&new)]);
            status = new;
        }
        tokio::time::sleep(every).await;
    }
}

/// Sockets that the service manager bound for us.
#[derive(Debug, Default)]
pub struct Given {
    /// `ctl`: the control socket.
    pub ctl: Option<std::os::unix::net::UnixListener>,
    /// `metrics`: the metrics listener.
    pub metrics: Option<Socket>,
    /// `nbd`, `nbd-tls`, and those without a name (which libnbd and others pass): all exports. The flag asks for TLS.
    pub nbd: Vec<(Socket, bool)>,
}

/// A listening socket.
#[derive(Debug)]
pub enum Socket {
    /// Unix.
    Unix(std::os::unix::net::UnixListener),
    /// TCP.
    Tcp(std::net::TcpListener),
}

/// Takes the sockets that the environment tells of. Must run before anything else opens descriptors.
pub fn given_sockets() -> Result<Given, Problem> {
    let fds = sd_listen_fds::get().map_err(|error| {
        Problem::invalid(format!("LISTEN_FDS, LISTEN_PID or LISTEN_FDNAMES is wrong: {error}"))
    })?;
    let mut given = Given::default();
    for (name, fd) in fds {
        let name = name.unwrap_or_default();
        let fd = fd.into_std();
        let socket = classify(fd, &name)?;
        match (name.as_str(), socket) {
            ("ctl", Socket::Unix(socket)) => given.ctl = Some(socket),
            ("ctl", Socket::Tcp(_)) => {
                return Err(Problem::invalid(
                    "the socket passed as \"ctl\" is TCP: the control socket is a Unix socket",
                ));
            }
            ("metrics", socket) => given.metrics = Some(socket),
            ("nbd-tls", socket) => given.nbd.push((socket, true)),
            ("nbd" | "unknown" | "", socket) => given.nbd.push((socket, false)),
            (other, socket) if other.ends_with(".socket") => given.nbd.push((socket, false)),
            (other, _) => {
                return Err(Problem::invalid(format!(
                    "a socket was passed under the name {other:?}: expected FileDescriptorName= ctl, metrics, nbd or nbd-tls"
                )));
            }
        }
    }
    Ok(given)
}

fn classify(fd: OwnedFd, name: &str) -> Result<Socket, Problem> {
    use std::os::fd::AsRawFd;
    let wrong = |what: &dyn std::fmt::Display| {
        Problem::invalid(format!(
            "the descriptor passed under the name {name:?} is no listening socket: {what}"
        ))
    };
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(|e| wrong(&e))?;
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
        .map_err(|e| wrong(&e))?;
    let listens =
        nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::AcceptConn).map_err(|e| wrong(&e))?;
    if !listens {
        return Err(wrong(&"listen() was not called on it"));
    }
    let address: SockaddrStorage = getsockname(fd.as_raw_fd()).map_err(|e| wrong(&e))?;
    match address.family() {
        Some(AddressFamily::Unix) => Ok(Socket::Unix(fd.into())),
        Some(AddressFamily::Inet | AddressFamily::Inet6) => Ok(Socket::Tcp(fd.into())),
        other => Err(wrong(&format!("its family is {other:?}"))),
    }
}

impl Socket {
    /// As an NBD listener.
    pub fn into_nbd(self, tls: bool) -> std::io::Result<crate::nbd::ListenerHandle> {
        Ok(listen_with(
            match self {
                Socket::Unix(socket) => {
                    crate::nbd::AnyListener::Unix(tokio::net::UnixListener::from_std(socket)?)
                }
                Socket::Tcp(socket) => {
                    crate::nbd::AnyListener::Tcp(tokio::net::TcpListener::from_std(socket)?)
                }
            },
            tls,
        ))
    }
}
