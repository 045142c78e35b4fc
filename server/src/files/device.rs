//! Facts about a block device from sysfs (`/sys/dev/block/MAJOR:MINOR`), and who else uses it.
//!
//! Sysfs answers without opening the device, and the same for a disk and a partition: a partition's request
//! queue is its parent's.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor, stat};

use super::mounts::Mounts;

/// A block device by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    numbers: String,
    folder: PathBuf,
}

impl Device {
    /// `rdev` is `st_rdev` of its node.
    pub fn new(rdev: u64) -> Device {
        let numbers = format!("{}:{}", major(rdev), minor(rdev));
        let folder = PathBuf::from("/sys/dev/block").join(&numbers);
        Device { numbers, folder }
    }

    /// The kernel's name: `sda1`.
    pub fn name(&self) -> Option<String> {
        let target = fs::canonicalize(&self.folder).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// The device cannot be written (BLKROGET says the same).
    pub fn is_read_only(&self) -> bool {
        self.number("ro") == Some(1)
    }

    /// The device takes discards.
    pub fn takes_discard(&self) -> bool {
        let positive = |name: &str| self.queue_number(name).is_some_and(|bytes| bytes > 0);
        positive("discard_granularity") && positive("discard_max_bytes")
    }

    /// Bytes of a logical block: the unit of direct I/O.
    pub fn logical_block_bytes(&self) -> Option<u32> {
        self.queue_number("logical_block_size").and_then(|bytes| u32::try_from(bytes).ok())
    }

    fn number(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(name)).ok()?.trim().parse().ok()
    }

    fn queue_number(&self, name: &str) -> Option<u64> {
        let is_partition = self.folder.join("partition").exists();
        // The folder is a link to `.../sda/sda1`, so `..` is the whole disk.
        self.number(&if is_partition { format!("../queue/{name}") } else { format!("queue/{name}") })
    }

    /// Why exclusive use was refused, in words to be put behind "is in use: ".
    pub fn users(&self) -> String {
        let mut found = Vec::new();
        self.add_users(&mut found);
        for part in self.partitions() {
            part.add_users(&mut found);
        }
        if found.is_empty() {
            found.push(
                "the kernel or another program has it for itself; lsblk, /proc/swaps and fuser may tell who"
                    .into(),
            );
        }
        found.join("; ")
    }

    fn add_users(&self, found: &mut Vec<String>) {
        let name = self.name().unwrap_or_else(|| self.numbers.clone());
        let node = Path::new("/dev").join(&name);
        if let Some(mount) = Mounts::read().ok().and_then(|mounts| mounts.of_device(&self.numbers, &node)) {
            found.push(format!("{name} is mounted on {} as {}", mount.point.display(), mount.fs_type));
        }
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let swap_nodes = swaps.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
        // Nodes in /dev: stat of them asks no device.
        if swap_nodes.filter_map(|node| stat(node).ok()).any(|swap| Device::new(swap.st_rdev) == *self) {
            found.push(format!("{name} is swap space"));
        }
        for holder in fs::read_dir(self.folder.join("holders")).into_iter().flatten().flatten() {
            found.push(format!("{name} is part of {}", holder.file_name().display()));
        }
    }

    fn partitions(&self) -> Vec<Device> {
        let children = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let parts = children.map(|entry| entry.path()).filter(|path| path.join("partition").exists());
        parts
            .filter_map(|folder| {
                let numbers = fs::read_to_string(folder.join("dev")).ok()?.trim().to_owned();
                Some(Device { numbers, folder })
            })
            .collect()
    }
}
