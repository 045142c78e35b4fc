//! NBD on the control side: listeners, negotiation, and the hand-over of a connection to its disk's shard.
//!
//! ```text
//! listener ─▶ Negotiations (bounded, who was silent longest goes first) ─▶ negotiate ─▶ Daemon::connect ─▶ shard
//! ```
//! A client costs a task and some KiB until it has chosen an export, at most for the negotiation's time, and never keeps
//! another one out: when the places are taken, the one that has been silent longest loses its own.

mod exports;
mod listener;
mod negotiate;
pub(crate) mod peer;
pub(crate) mod places;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ring_bridge::nbd::{Handoff, TlsAcceptor};
use shard::api::Command;

use crate::config::{NbdLimits, Settings, TlsFiles};
use crate::daemon::{Daemon, Disk, lock};
use crate::problem::{Problem, ProblemKind};

pub use listener::{
    AnyListener, ListenerHandle, bind_all_socket, bind_disk_socket, bind_seqpacket, bind_unix, listen_tcp,
    listen_with, listener_number, pause_after_failed_accept,
};

/// Which exports a listener has.
#[derive(Debug, Clone)]
pub enum Scope {
    /// One disk, by its name and by the empty name.
    One(Arc<str>),
    /// All, by name.
    All,
}

/// What all listeners share.
pub struct NbdServer {
    limits: Mutex<NbdLimits>,
    tls: Mutex<Option<Arc<TlsAcceptor>>>,
    places: places::Places,
}

impl NbdServer {
    /// No listener yet; reads certificates and keys.
    pub fn new(settings: &Settings) -> Result<NbdServer, Problem> {
        Ok(NbdServer {
            limits: Mutex::new(settings.nbd_limits),
            tls: Mutex::new(acceptor(&settings.tls)?),
            places: places::Places::default(),
        })
    }

    /// Bounds in force.
    pub fn limits(&self) -> NbdLimits {
        *lock(&self.limits)
    }

    /// New bounds, for clients to come.
    pub fn set_limits(&self, limits: NbdLimits) {
        *lock(&self.limits) = limits;
    }

    /// Reads certificates and keys again, for connections to come.
    pub fn reload_tls(&self, files: &TlsFiles) -> Result<(), Problem> {
        let new = acceptor(files)?;
        *lock(&self.tls) = new;
        Ok(())
    }

    fn tls(&self) -> Option<Arc<TlsAcceptor>> {
        lock(&self.tls).clone()
    }

    /// Clients that are negotiating now.
    pub fn negotiating(&self) -> usize {
        self.places.taken()
    }
}

fn acceptor(files: &TlsFiles) -> Result<Option<Arc<TlsAcceptor>>, Problem> {
    let acceptor = match (&files.cert_key, &files.psk) {
        (Some((cert, key)), _) => TlsAcceptor::with_certificates(cert, key, files.client_ca.as_deref()),
        (None, Some(psk)) => TlsAcceptor::with_psk_file(psk),
        (None, None) => return Ok(None),
    };
    acceptor
        .map(|acceptor| Some(Arc::new(acceptor)))
        .map_err(|error| Problem::invalid(format!("TLS: {error}")))
}

/// A connection counts for its disk from the agreement on, before the shard counts it.
pub(crate) struct Connecting<'a>(&'a Disk);

impl<'a> Connecting<'a> {
    pub(crate) fn new(disk: &'a Disk) -> Connecting<'a> {
        disk.connecting.fetch_add(1, Ordering::Relaxed);
        Connecting(disk)
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0.connecting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Daemon {
    /// Gives a negotiated connection to the shard of its disk. The connection is closed when that fails.
    async fn connect(&self, export: &str, handoff: Box<Handoff>) -> Result<(), Problem> {
        const PATIENCE: Duration = Duration::from_secs(30);
        let disk = self.disk(export)?;
        let _counted = Connecting::new(&disk);
        // Waits while the disk is on its way to another shard.
        let _place = tokio::time::timeout(PATIENCE, disk.place.read()).await.map_err(|_| {
            Problem::new(
                ProblemKind::TimedOut,
                format!("disk {export} was on its way to another shard for too long"),
            )
        })?;
        self.may_connect(&disk, 0)?;
        let (id, shard) = disk
            .place()
            .ok_or_else(|| Problem::new(ProblemKind::Busy, format!("disk {export} is not served now")))?;
        self.fleet.call(shard, Command::Connect { disk: id, handoff }).await?;
        Ok(())
    }

    /// Whether `more` clients may use the disk, besides those that are connected or counted in `connecting`.
    pub(crate) fn may_connect(&self, disk: &Disk, more: u64) -> Result<(), Problem> {
        let refuse = |kind, why: String| Err(Problem::new(kind, format!("disk {} {why}", disk.name)));
        if self.is_stopping() {
            return refuse(ProblemKind::Unavailable, "goes down with the daemon".into());
        }
        let (standing, closing, awaiting) = {
            let inner = disk.inner();
            (inner.standing, inner.closing, inner.awaiting && !inner.attachment.request.read_only)
        };
        if standing != crate::daemon::disk::Standing::Live {
            return refuse(ProblemKind::Busy, "is not served now".into());
        }
        if closing > 0 {
            return refuse(ProblemKind::Busy, "is being detached".into());
        }
        if awaiting {
            // What its guest wrote into rings of the daemon that is gone is yet to be done: nobody may write in between.
            return refuse(
                ProblemKind::Busy,
                "awaits the recovery of its guest's requests, and nobody else may write to it until then: restart or unplug the \
                 guest's disk, or give it up with `ctl detach --force`"
                    .into(),
            );
        }
        let limits = self.nbd.limits();
        let clients = disk.counters.clients.get() + u64::from(disk.connecting.load(Ordering::Relaxed)) + more;
        if clients > u64::from(limits.connections_per_disk) {
            return refuse(
                ProblemKind::Unavailable,
                format!(
                    "has {} clients: no more are allowed (nbd.max_connections_per_disk)",
                    limits.connections_per_disk
                ),
            );
        }
        let all: u64 = self.fleet.shards().iter().map(|shard| shard.counters.clients.get()).sum();
        if all + more > u64::from(limits.connections) {
            return refuse(
                ProblemKind::Unavailable,
                format!("gets no more clients: the daemon has {all} (nbd.max_connections)"),
            );
        }
        Ok(())
    }
}
