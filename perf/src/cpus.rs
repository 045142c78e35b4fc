//! Which cores the servers and the load run on. A child inherits the affinity of the thread that starts it, so a server is
//! started while the calling thread is on the server's cores; no wrapper program and no code between fork and exec.

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// The cores of a run. Both lists are non-empty; they differ wherever the machine has two cores.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cores {
    /// All cores that this process may use, in ascending order.
    pub allowed: Vec<usize>,
    /// The core of a server in every case but `shards`.
    pub server: usize,
    /// The core of the load in every case but `shards`.
    pub load: usize,
}

impl Cores {
    /// The first allowed core for the server and the second for the load, or as the user chose.
    pub fn choose(server: Option<usize>, load: Option<usize>) -> Result<Self> {
        let allowed = allowed()?;
        let Some(&first) = allowed.first() else { bail!("this process may run on no core") };
        let server = server.unwrap_or(first);
        let load = match load {
            Some(load) => load,
            None => allowed.iter().copied().find(|&cpu| cpu != server).unwrap_or(server),
        };
        for cpu in [server, load] {
            if !allowed.contains(&cpu) {
                bail!(
                    "core {cpu} is not among the cores that this process may use ({allowed:?}): choose one of those"
                );
            }
        }
        Ok(Self { allowed, server, load })
    }
}

/// The cores that the calling thread may run on.
pub fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
    Ok((0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect())
}

/// Moves the calling thread to `cpus`.
pub fn pin(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu).with_context(|| format!("core {cpu} is out of range"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on cores {cpus:?}"))
}

/// Runs `work` (which starts a child) on `cpus`, and returns the thread to where it was.
pub fn on<T>(cpus: &[usize], work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = allowed()?;
    pin(cpus)?;
    let result = work();
    pin(&before)?;
    result
}
