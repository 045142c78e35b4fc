//! Move: park on one shard, unpark on the other; on any failure the disk goes back to where it was.

use std::sync::Arc;

use shard::api::{Command, Reply};
use tokio::time::Instant;

use super::control::live;
use super::{Daemon, Disk};
use crate::fleet::{Seat, Shard};
use crate::model::{self, Level};
use crate::placement;
use crate::problem::{Problem, ProblemKind};

impl Daemon {
    /// Moves a disk with its clients to the shard `to`.
    pub async fn move_disk(
        self: &Arc<Self>,
        name: &str,
        to: u16,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        let disk = self.disk(name)?;
        let _guard = self.lock_name(name, deadline).await?;
        let target = placement::named(&self.fleet, to)?.clone();
        let (id, from) = live(&disk)?;
        let before = disk.inner().attachment.clone();
        // Kept first: a move that cannot be kept is not begun.
        if before.shard != Some(to) {
            let after = crate::state::Attachment { shard: Some(to), ..before.clone() };
            self.state.set_disk(name, Some(after)).await?;
        }
        if from != target.index
            && let Err(problem) = self.change_shard(&disk, from, &target, deadline).await
        {
            self.state.set_disk(name, Some(before)).await?;
            return Err(problem);
        }
        disk.inner().attachment.shard = Some(to);
        debug_assert_eq!(disk.id(), Some(id), "a move keeps the identity");
        Ok(self.describe(&disk))
    }

    async fn change_shard(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        from: usize,
        target: &Arc<Shard>,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let seat = Seat::take(target);
        // Nobody sends the disk anything while it is on no shard.
        let _place = disk.place.write().await;
        let parked = self.park(disk, from, deadline).await?;
        self.unpark(disk, parked, from, target.index).await?;
        if let Some(live) = &mut disk.inner().live {
            live.seat = seat;
        }
        let message = format!("moved from shard {from} to shard {}", target.index);
        self.events.record(Level::Info, Some(&disk.name), message);
        Ok(())
    }

    async fn park(
        &self,
        disk: &Disk,
        from: usize,
        deadline: Instant,
    ) -> Result<Box<shard::park::ParkedDisk>, Problem> {
        let (id, _) = live(disk)?;
        let mut call = self.fleet.start(from, Command::Park { disk: id })?;
        let why = tokio::select! {
            answer = call.answer() => return parked(disk, answer?),
            () = tokio::time::sleep_until(deadline) => "its requests were not answered in time",
            () = disk.interrupt.notified() => "another command gave the disk up",
        };
        // It may have been answered just now: then the disk is parked, and goes on where it was.
        let cancelled = self.fleet.call(from, Command::CancelPark { disk: id }).await;
        match call.answer().await {
            Ok(Reply::Parked(parked)) => {
                self.fleet.call(from, Command::Unpark(parked)).await?;
            }
            Ok(_) | Err(_) => drop(cancelled),
        }
        Err(Problem::new(
            ProblemKind::TimedOut,
            format!("disk {} was not moved, and runs on shard {from}: {why}", disk.name),
        ))
    }

    /// Puts a parked disk on shard `to`, or back on `from`.
    async fn unpark(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        parked: Box<shard::park::ParkedDisk>,
        from: usize,
        to: usize,
    ) -> Result<(), Problem> {
        let error = match self.fleet.call(to, Command::Unpark(parked)).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        // The shard did not take it, and the connections are lost with it. The image is still open here, so the disk itself
        // goes on where it was.
        let config = {
            let groups = self.groups.resolve(&disk.inner().attachment.groups.clone());
            let inner = disk.inner();
            let live = inner.live.as_ref();
            live.map(|live| (live.id, live.image.backend.clone(), live.image.size_bytes)).map(
                |(id, backend, size_bytes)| {
                    Box::new(shard::api::DiskConfig {
                        id,
                        name: disk.name.clone(),
                        backend,
                        size_bytes,
                        read_only: inner.attachment.request.read_only,
                        on_error: inner.attachment.on_error.into(),
                        on_enospc: inner.attachment.on_enospc.into(),
                        limits: inner.attachment.limits,
                        groups,
                        counters: disk.counters.clone(),
                    })
                },
            )
        };
        let back = match config {
            Some(config) => {
                self.fleet.call(from, Command::AddDisk(config)).await.map(|_| ()).map_err(Problem::from)
            }
            None => Err(Problem::failed("it has no image")),
        };
        let what = match back {
            Ok(()) => format!("it runs on shard {from} again, and its clients were disconnected"),
            Err(problem) => {
                disk.inner().reason = Some(problem.message.clone());
                format!("going back to shard {from} failed as well: {problem}; detach it by force")
            }
        };
        self.events.record(
            Level::Error,
            Some(&disk.name),
            format!("shard {to} did not take the disk ({error}); {what}"),
        );
        Err(Problem::failed(format!("disk {} was not moved: shard {to}: {error}; {what}", disk.name)))
    }
}

fn parked(disk: &Disk, reply: Reply) -> Result<Box<shard::park::ParkedDisk>, Problem> {
    match reply {
        Reply::Parked(parked) => Ok(parked),
        other => Err(Problem::failed(format!("disk {}: unexpected answer to Park: {other:?}", disk.name))),
    }
}
