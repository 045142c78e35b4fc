//! Who holds a lock on a file: found in the `lock:` lines of `/proc/PID/fdinfo` (proc(5)).
//!
//! F_OFD_GETLK and /proc/locks know a byte but no process for OFD locks. The walk costs time in proportion to
//! the descriptors of the host, so it is done only to explain a refusal, and it is bounded. It reads /proc
//! alone and touches no other file.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::stat::{FileStat, major, minor};

/// After this the holder is "another program".
const SEARCH_MAX: Duration = Duration::from_secs(2);

/// A process that holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its name: the kernel's, which has at most 15 bytes, completed from the command line.
    pub program: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.program, self.pid)
    }
}

/// Names the holder for a message.
pub fn name(holder: Option<&Holder>) -> String {
    holder.map_or_else(|| "another program".to_owned(), Holder::to_string)
}

/// The file's name in `lock:` lines, from one that this process holds on `fd`: `MAJOR:MINOR:INODE`. On btrfs
/// and overlayfs these are not the numbers that stat gives.
pub fn name_in_own_lock(fd: i32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    text.lines().find_map(parse).map(|line| line.file.to_owned())
}

/// The same from stat: right except on btrfs and overlayfs.
pub fn name_from_stat(stat: &FileStat) -> String {
    format!("{:02x}:{:02x}:{}", major(stat.st_dev), minor(stat.st_dev), stat.st_ino)
}

/// The first process other than this one that holds a lock over `byte` of `file`.
pub fn find(file: &str, byte: i64) -> Option<Holder> {
    let end = Instant::now() + SEARCH_MAX;
    let me = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if Instant::now() > end {
            break;
        }
        if pid != me && holds(&process.path(), file, byte, end) {
            return Some(Holder { pid, program: program_name(&process.path()) });
        }
    }
    None
}

fn program_name(process: &Path) -> String {
    let kernels = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let kernels = kernels.trim_end();
    let command = fs::read(process.join("cmdline")).unwrap_or_default();
    let program = command.split(|&byte| byte == 0).next().unwrap_or_default();
    let program = String::from_utf8_lossy(program.rsplit(|&byte| byte == b'/').next().unwrap_or_default());
    match (kernels, &*program) {
        ("", "") => "a program".to_owned(),
        // A program may write what it likes into its command line: believed only where it continues the
        // kernel's name.
        (kernels, program) if program.starts_with(kernels) => program.chars().take(64).collect(),
        (kernels, _) => kernels.to_owned(),
    }
}

fn holds(process: &Path, file: &str, byte: i64, end: Instant) -> bool {
    // Unreadable: it has just ended, or belongs to somebody whom we may not look at.
    let Ok(descriptors) = fs::read_dir(process.join("fdinfo")) else { return false };
    descriptors.flatten().take_while(|_| Instant::now() <= end).any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        text.lines()
            .filter_map(parse)
            .any(|line| line.file == file && line.first <= byte && byte <= line.last)
    })
}

/// A line of fdinfo: `lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:123 100 101`.
struct LockLine<'a> {
    file: &'a str,
    first: i64,
    last: i64,
}

fn parse(line: &str) -> Option<LockLine<'_>> {
    let mut fields = line.strip_prefix("lock:")?.split_ascii_whitespace();
    let class = fields.nth(1)?;
    // flock(2) and leases do not meet byte locks.
    if class != "OFDLCK" && class != "POSIX" {
        return None;
    }
    let file = fields.nth(3)?;
    let first = fields.next()?.parse().ok()?;
    let last = match fields.next()? {
        "EOF" => i64::MAX,
        number => number.parse().ok()?,
    };
    Some(LockLine { file, first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the kernel's lines are understood and others are left out. Method: lines as the kernel prints
    /// them.
    #[test]
    fn lock_lines() {
        let line = parse("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10010650 100 101").expect("a lock");
        assert_eq!((line.file, line.first, line.last), ("fe:00:10010650", 100, 101));
        let line = parse("lock:\t2: POSIX  ADVISORY  WRITE 12 00:2d:7 0 EOF").expect("a lock");
        assert_eq!((line.file, line.first, line.last), ("00:2d:7", 0, i64::MAX));
        for other in
            ["lock:\t1: FLOCK  ADVISORY  WRITE 12 00:2d:7 0 EOF", "pos:\t0", "lock:", "lock:\t1: OFDLCK"]
        {
            assert!(parse(other).is_none(), "{other}");
        }
    }
}
