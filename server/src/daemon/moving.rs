//! Move: park on one shard, unpark on the other; on any failure the disk goes back to where it was.

use std::sync::Arc;

use shard::api::{Command, DiskId, Reply, ShardError, ShardErrorKind};
use shard::executor::ShardGone;
use shard::park::ParkedDisk;
use tokio::sync::OwnedRwLockWriteGuard;
use tokio::time::Instant;

use super::control::live;
use super::{Daemon, Disk};
use crate::fleet::Seat;
use crate::model::{self, Level};
use crate::placement;
use crate::problem::{Problem, ProblemKind};
use crate::state::Attachment;

impl Daemon {
    /// Moves a disk with its clients to the shard `to`.
    pub async fn move_disk(
        self: &Arc<Self>,
        name: &str,
        to: u16,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        let _guard = self.lock_name(name, deadline).await?;
        let disk = self.disk(name)?;
        let target = placement::named(&self.fleet, to)?.clone();
        let (id, from) = live(&disk)?;
        // Kept first, so that nothing can fail behind the move.
        let before = disk.inner().attachment.clone();
        let after = Attachment { shard: Some(to), ..before.clone() };
        if after != before {
            self.state.set_disk(name, Some(after.clone())).await?;
        }
        if from != target.index {
            let moved = async {
                let place = disk.whole_place(deadline).await?;
                let (parked, _place) = self.park(&disk, id, from, place, deadline).await?;
                self.unpark(&disk, parked, from, target.index).await
            };
            let seat = Seat::take(&target);
            if let Err(problem) = moved.await {
                self.state.set_disk(name, Some(before)).await?;
                return Err(problem);
            }
            if let Some(live) = &mut disk.inner().live {
                live.seat = seat;
            }
            self.events.record(Level::Info, Some(name), format!("moved from shard {from} to shard {to}"));
        }
        disk.inner().attachment.shard = Some(to);
        Ok(self.describe(&disk))
    }

    /// Takes the disk off its shard. When that takes too long the disk goes on where it is; `place` is then given back as soon
    /// as the shard has said so.
    async fn park(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        id: DiskId,
        from: usize,
        place: OwnedRwLockWriteGuard<()>,
        deadline: Instant,
    ) -> Result<(Box<ParkedDisk>, OwnedRwLockWriteGuard<()>), Problem> {
        let mut call = self.fleet.start(from, Command::Park { disk: id })?;
        let (kind, why) = tokio::select! {
            answer = call.answer() => return Ok((parked(disk, answer?)?, place)),
            () = tokio::time::sleep_until(deadline) => {
                (ProblemKind::TimedOut, "its requests were not answered in time")
            }
            () = disk.interrupt.notified() => (ProblemKind::Busy, "another command gives the disk up"),
        };
        let (daemon, disk) = (self.clone(), disk.clone());
        let name = disk.name.clone();
        tokio::spawn(async move {
            let cancelled = daemon.fleet.call(from, Command::CancelPark { disk: id }).await;
            // It may have been answered just now: then the disk is parked, and goes on where it was.
            if let Ok(Reply::Parked(parked)) = call.answer().await {
                daemon.put_back(&disk, from, parked).await;
            }
            drop((cancelled, place));
        });
        Err(Problem::new(kind, format!("disk {name} was not moved, and runs on shard {from}: {why}")))
    }

    /// Puts a disk that was parked too late back on its shard.
    async fn put_back(&self, disk: &Disk, from: usize, parked: Box<ParkedDisk>) {
        let why = match self.fleet.call(from, Command::Unpark(parked)).await {
            Ok(Reply::Done) => return,
            // When the shard has ended the disk comes up on another, with what is about to happen to all of its disks.
            Ok(Reply::NotTaken(_)) => format!("shard {from} takes no disks any more"),
            Ok(other) => format!("unexpected answer to Unpark: {other:?}"),
            Err(error) => error.message,
        };
        disk.reset_gauges();
        let message = format!(
            "it did not come back to shard {from} from a move that was given up, and its clients were disconnected: {why}"
        );
        self.events.record(Level::Error, Some(&disk.name), message);
    }

    /// Puts a parked disk on shard `to`, or back on `from`.
    async fn unpark(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        parked: Box<ParkedDisk>,
        from: usize,
        to: usize,
    ) -> Result<(), Problem> {
        let error = match self.fleet.call(to, Command::Unpark(parked)).await {
            Ok(Reply::NotTaken(parked)) => {
                // Whole as it is, it goes back with its connections. Also when that shard has ended meanwhile: then it comes back.
                if let Ok(Reply::Done) = self.fleet.call(from, Command::Unpark(parked)).await {
                    let why = format!("shard {to} takes no disks any more; it runs on shard {from} again");
                    return Err(Problem::failed(format!("disk {} was not moved: {why}", disk.name)));
                }
                ShardError { kind: ShardErrorKind::Failed, message: ShardGone(from).to_string() }
            }
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        // The shard did not take it, and the connections are lost with it. The image is still open here, so the disk itself
        // goes on where it was.
        disk.reset_gauges();
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
                let id = config.id;
                match self.fleet.call(from, Command::AddDisk(config)).await {
                    Ok(_) => {
                        let deadline = Instant::now() + super::DEFAULT_TIMEOUT;
                        self.restore_hold(disk, from, id, deadline).await
                    }
                    Err(error) => Err(error.into()),
                }
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

fn parked(disk: &Disk, reply: Reply) -> Result<Box<ParkedDisk>, Problem> {
    match reply {
        Reply::Parked(parked) => Ok(parked),
        other => Err(Problem::failed(format!("disk {}: unexpected answer to Park: {other:?}", disk.name))),
    }
}
