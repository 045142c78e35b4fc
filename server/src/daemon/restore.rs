//! Disks of the last run: listed at once, tried until they work.
//!
//! The opening of an image is not done under the disk's name, so that a dead mount does not keep an operator from detaching the
//! disk; whoever brings it up holds `attempt` instead, and looks under the name whether the disk is still wanted.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::disk::Standing;
use super::{Daemon, Disk};
use crate::model::Level;
use crate::problem::{Problem, ProblemKind};
use crate::state::Hold;

/// Images that are opened at a time.
const CONCURRENT: usize = 64;
/// First and longest pause between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl Daemon {
    /// Lists the disks of the state and starts to bring them up. Returns when each was tried once, or at `deadline`.
    pub async fn restore(self: &Arc<Self>, deadline: Instant) {
        let kept = self.state.read(|state| state.disks.clone());
        if kept.is_empty() {
            return;
        }
        let slots = Arc::new(Semaphore::new(CONCURRENT));
        let mut first_tries = JoinSet::new();
        for (name, attachment) in kept {
            let disk = Disk::new(&name, attachment, "its image is being opened");
            {
                // Until XenStore has told otherwise, its guest may have requests in rings of the daemon that is gone.
                let mut inner = disk.inner();
                inner.awaiting = inner.attachment.device.is_some();
            }
            disk.device_to_come.store(false, Ordering::Relaxed);
            self.insert(&disk);
            let (daemon, slots) = (self.clone(), slots.clone());
            first_tries.spawn(async move {
                let _slot = slots.acquire().await;
                daemon.bring_back(disk, "restored").await;
            });
        }
        let all = async { while first_tries.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline, all).await.is_err() {
            tracing::warn!(
                "some images have not answered yet; their disks are listed as failed until they do"
            );
            first_tries.detach_all();
        }
    }

    /// Tries a disk that is down; when that fails it goes on being tried in the background. `word` is the event of success.
    pub(super) async fn bring_back(self: &Arc<Self>, disk: Arc<Disk>, word: &str) {
        if disk.inner().attachment.hold == Hold::Released {
            // Somebody else works on its image. `resume` tries it.
            disk.inner().reason = Hold::Released.reason().map(str::to_owned);
            return;
        }
        let deadline = Instant::now() + self.settings().open_timeout;
        if let Err(problem) = self.attempt(&disk, deadline, word).await
            && self.has(&disk)
        {
            let message = format!("not served: {problem}; it is tried again");
            self.events.record(Level::Error, Some(&disk.name), message);
            tokio::spawn(self.clone().retry(disk));
        }
    }

    /// Tries a disk that is down until it works or is not wanted any more.
    async fn retry(self: Arc<Self>, disk: Arc<Disk>) {
        let mut pause = PAUSE.0;
        loop {
            disk.inner().retry_at = Some(Instant::now() + pause);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
            if self.is_stopping() || !self.has(&disk) || disk.standing() != Standing::Down {
                return;
            }
            let deadline = Instant::now() + self.settings().open_timeout;
            match self.attempt(&disk, deadline, "served again").await {
                Ok(()) => return,
                Err(problem) => tracing::debug!(disk = &*disk.name, "still not served: {problem}"),
            }
        }
    }

    /// A guest's device wants its disk, which may be down.
    pub async fn bring_up_again(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let _guard = self.lock_name(&disk.name, deadline).await?;
        self.try_again(disk, deadline).await
    }

    /// An operator wants a disk that is down to be tried now. The caller holds the name.
    pub(super) async fn try_again(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let attempt = tokio::time::timeout_at(deadline, disk.attempt.lock()).await.map_err(|_| {
            Problem::new(ProblemKind::TimedOut, format!("disk {}: its image has not answered yet", disk.name))
        })?;
        if disk.standing() != Standing::Down {
            return Ok(());
        }
        let result = self.bring_up(disk, deadline).await;
        drop(attempt);
        match result {
            Ok(live) => {
                self.go_live(disk, live);
                self.events.record(Level::Info, Some(&disk.name), "served again");
                Ok(())
            }
            Err(problem) => {
                disk.inner().reason = Some(problem.message.clone());
                Err(problem)
            }
        }
    }

    /// Brings a disk up that is down, unless it is not wanted any more by then. `word` is the event of success.
    async fn attempt(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        deadline: Instant,
        word: &str,
    ) -> Result<(), Problem> {
        let attempt = disk.attempt.lock().await;
        if disk.standing() != Standing::Down {
            return Ok(());
        }
        let live = match self.bring_up(disk, deadline).await {
            Ok(live) => live,
            Err(problem) => {
                disk.inner().reason = Some(problem.message.clone());
                return Err(problem);
            }
        };
        // No `await` between this look and what follows from it.
        let wanted = self.has(disk) && disk.inner().closing == 0 && !self.is_stopping();
        let result = if wanted {
            self.go_live(disk, live);
            self.events.record(Level::Info, Some(&disk.name), word);
            Ok(())
        } else {
            self.take_down(disk, live).await;
            Err(Problem::new(ProblemKind::Busy, "it is being detached"))
        };
        drop(attempt);
        result
    }
}
