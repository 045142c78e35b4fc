//! Who else on this host serves disks to guests: the kernel's blkback and blktap's tapback.
//!
//! Two backends on one device would both map its rings. blkback is found in sysfs, for each device; tapback serves every `vbd3`
//! device and has no lock that could be asked, so its processes are looked for by name.

use std::path::PathBuf;

use super::device::DeviceId;
use crate::files::doctor::may_lock_memory;

/// The name of tapback's processes: the master and one for each domain.
const TAPBACK: &str = "tapback";

/// What the backend asks about its host.
pub trait Host: Send + Sync + 'static {
    /// The process number of a tapback that runs. May take milliseconds.
    fn tapback(&self) -> Option<u32>;

    /// Is the kernel's blkback loaded, so that it takes `vbd` devices by itself?
    fn blkback_loaded(&self) -> bool;

    /// Has the kernel's blkback this device?
    fn blkback_has(&self, id: DeviceId) -> bool;

    /// A disk is about to be used in this very domain: its dirty pages, written back when memory is short, come to this process,
    /// which must not wait for memory then. Shards do not ([`shard::executor`]); here its own pages are kept.
    ///
    /// # Errors
    /// What cannot be had, and what to do.
    fn keep_memory(&self) -> Result<(), String>;
}

/// This host.
#[derive(Debug, Clone)]
pub struct ThisHost {
    proc: PathBuf,
    bus: PathBuf,
}

impl Default for ThisHost {
    fn default() -> ThisHost {
        ThisHost { proc: "/proc".into(), bus: "/sys/bus/xen-backend".into() }
    }
}

impl Host for ThisHost {
    fn tapback(&self) -> Option<u32> {
        let entries = std::fs::read_dir(&self.proc).ok()?;
        entries.flatten().find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            (name.trim_end() == TAPBACK).then_some(pid)
        })
    }

    fn blkback_loaded(&self) -> bool {
        self.bus.join("drivers/vbd").exists()
    }

    fn blkback_has(&self, id: DeviceId) -> bool {
        self.bus.join(format!("devices/vbd-{}-{}/driver", id.domid, id.devid)).exists()
    }

    fn keep_memory(&self) -> Result<(), String> {
        use rustix::mm::{MlockAllFlags, mlockall};
        // What is not touched costs nothing; what once was stays.
        let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
        // Under a limit later mappings would fail, which is worse than what this is against.
        if !may_lock_memory() {
            return Err("memory cannot be locked: start blktapd with LimitMEMLOCK=infinity (ulimit -l unlimited) or give CAP_IPC_LOCK".into());
        }
        mlockall(all).map_err(|error| format!("memory cannot be locked: {error}"))
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the others are found where Linux shows them. Method: directories made by hand.

    use super::super::device::Kind;
    use super::*;

    #[test]
    fn others_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let host = ThisHost { proc: dir.path().join("proc"), bus: dir.path().join("bus") };
        let id = DeviceId { kind: Kind::Vbd, domid: 5, devid: 51712 };
        assert_eq!(host.tapback(), None);
        for (pid, name) in
            [("1", "init\n"), ("77", "tapback\n"), ("self", "tapback\n"), ("78", "mytapback\n")]
        {
            std::fs::create_dir_all(host.proc.join(pid)).unwrap();
            std::fs::write(host.proc.join(pid).join("comm"), name).unwrap();
        }
        assert_eq!(host.tapback(), Some(77));
        assert!(!host.blkback_loaded() && !host.blkback_has(id));
        std::fs::create_dir_all(host.bus.join("drivers/vbd")).unwrap();
        std::fs::create_dir_all(host.bus.join("devices/vbd-5-51712/driver")).unwrap();
        assert!(host.blkback_loaded() && host.blkback_has(id));
        assert!(!host.blkback_has(DeviceId { devid: 51728, ..id }));
    }
}
