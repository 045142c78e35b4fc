//! Kernel, limits, processors and devices.

use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::utsname::uname;

use super::Check;

/// Deferred task work of io_uring came with it.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// Below this glommio refuses to start (its rings' check of RLIMIT_MEMLOCK), whatever the process may do.
const MEMLOCK_MIN: u64 = 512 << 10;
/// What one shard's executor locks.
const MEMLOCK_PER_SHARD: u64 = 256 << 10;
/// Rings, event descriptors and standard streams of a small daemon.
const NOFILE_MIN: u64 = 256;
/// Enough for some thousand disks with a client each.
const NOFILE_GOOD: u64 = 16384;
/// CAP_IPC_LOCK in linux/capability.h.
const CAP_IPC_LOCK: u32 = 14;
/// CAP_SYS_RESOURCE in linux/capability.h.
const CAP_SYS_RESOURCE: u32 = 24;

pub(super) fn kernel() -> Vec<Check> {
    let release = uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    let found = format!("Linux {release}");
    let (major, minor) = KERNEL_MIN;
    let check = match parse_release(&release) {
        Some(version) if version >= KERNEL_MIN => Check::ok("kernel", found),
        Some(_) => Check::missing(
            "kernel",
            found,
            format!("blktapd needs Linux {major}.{minor}: install a newer kernel"),
        ),
        None => Check::warning(
            "kernel",
            format!("{found}: this release has no number"),
            format!("make sure that it is Linux {major}.{minor} or later"),
        ),
    };
    vec![check]
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Number of processors that this process may use.
fn allowed() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

pub(super) fn limits() -> Vec<Check> {
    vec![locked_memory(), open_files(), write_back()]
}

/// Whether a disk may be used on the host that serves it: its dirty pages are written back when memory is short, by a process that must
/// not wait for memory then.
fn write_back() -> Check {
    let subject = "write-back";
    let missing = match (has_capability(CAP_SYS_RESOURCE), may_lock_memory()) {
        (true, true) => {
            return Check::ok(
                subject,
                "disks may be mounted on this very host, also when its memory is short",
            );
        }
        (false, true) => "CAP_SYS_RESOURCE",
        (true, false) => "LimitMEMLOCK=infinity",
        (false, false) => "CAP_SYS_RESOURCE and LimitMEMLOCK=infinity",
    };
    let found = "a disk that is mounted on this very host may wait for memory which its own dirty pages hold";
    Check::warning(subject, found, format!("give blktapd {missing}, or use its disks elsewhere only"))
}

fn locked_memory() -> Check {
    let subject = "locked memory";
    let (soft, _) = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok(limits) => limits,
        Err(errno) => return Check::warning(subject, format!("not known: {errno}"), "check ulimit -l"),
    };
    let exempt = has_capability(CAP_IPC_LOCK);
    let wanted = (allowed().len() as u64 * MEMLOCK_PER_SHARD).max(MEMLOCK_MIN);
    judge_memlock(soft, exempt, wanted)
}

fn judge_memlock(soft: u64, exempt: bool, wanted: u64) -> Check {
    let limit = if soft == libc::RLIM_INFINITY { "no limit".into() } else { format!("{} KiB", soft >> 10) };
    let capability = if exempt { "CAP_IPC_LOCK is held" } else { "without CAP_IPC_LOCK" };
    let found = format!("{limit}, {capability}");
    let advice = format!(
        "set LimitMEMLOCK={}K or more in the unit (ulimit -l in a shell); one shard for each processor \
        needs that much",
        wanted >> 10
    );
    if soft < MEMLOCK_MIN {
        Check::missing("locked memory", found, advice)
    } else if soft < wanted && !exempt {
        Check::warning("locked memory", found, advice)
    } else {
        Check::ok("locked memory", found)
    }
}

fn open_files() -> Check {
    let subject = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => judge_nofile(soft, hard),
        Err(errno) => Check::warning(subject, format!("not known: {errno}"), "check ulimit -n"),
    }
}

fn judge_nofile(soft: u64, hard: u64) -> Check {
    let found = format!("{soft} (at most {hard})");
    let advice =
        format!("set LimitNOFILE={NOFILE_GOOD} in the unit; each disk and each client takes up to two");
    if soft < NOFILE_MIN {
        Check::missing("open files", found, advice)
    } else if soft < NOFILE_GOOD {
        Check::warning("open files", found, advice)
    } else {
        Check::ok("open files", found)
    }
}

fn has_capability(number: u32) -> bool {
    let set = || {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    set().is_some_and(|set| set & (1 << number) != 0)
}

/// This process may lock as much memory as it likes.
pub(crate) fn may_lock_memory() -> bool {
    let unlimited = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == libc::RLIM_INFINITY);
    unlimited || has_capability(CAP_IPC_LOCK)
}

pub(super) fn processors() -> Vec<Check> {
    let allowed = allowed();
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    vec![judge_processors(&allowed, online.trim())]
}

fn judge_processors(allowed: &[usize], online: &str) -> Check {
    let (subject, list) = ("processors", list_of(allowed));
    if allowed.is_empty() {
        return Check::missing(subject, "none known for this process", "check taskset and the cpuset");
    }
    let outside: Vec<usize> = expand(online).filter(|cpu| !allowed.contains(cpu)).collect();
    if outside.is_empty() {
        return Check::ok(subject, format!("{list} allowed: all that are online"));
    }
    // Often wanted (dom0 pinning), so no warning.
    let cpuset = fs::read_to_string("/proc/self/cpuset").unwrap_or_default();
    let found = format!(
        "{list} allowed of {online}; {} are kept from this process by affinity or its cpuset {}",
        list_of(&outside),
        cpuset.trim()
    );
    Check::info(subject, found)
}

/// The kernel's form: `0-3,8`.
fn list_of(cpus: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let words = ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    words.collect::<Vec<_>>().join(",")
}

fn expand(list: &str) -> impl Iterator<Item = usize> {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    });
    ranges.flatten()
}

pub(super) fn devices() -> Vec<Check> {
    let present = |path: &str| Path::new(path).exists();
    let xen = match (present("/dev/xen/gntdev"), present("/dev/xen/evtchn")) {
        (true, true) => "gntdev and evtchn are there: this is a Xen domain",
        (false, false) => "no /dev/xen/gntdev and evtchn: no Xen guests from here; NBD works",
        _ => "only one of /dev/xen/gntdev and evtchn: load xen-gntdev and xen-evtchn to serve Xen guests",
    };
    let ublk = if present("/dev/ublk-control") {
        "/dev/ublk-control is there"
    } else {
        "no /dev/ublk-control (modprobe ublk_drv would bring it); nothing needs it now"
    };
    vec![Check::info("Xen", xen), Check::info("ublk", ublk)]
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    /// Goal: releases as distributions write them are compared as numbers. Method: samples.
    #[test]
    fn kernel_releases() {
        assert_eq!(parse_release("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(parse_release("6.12-rc1"), Some((6, 12)));
        assert_eq!(parse_release("5.15.0"), Some((5, 15)));
        assert!(parse_release("5.15.0") < Some(KERNEL_MIN) && parse_release("6.10.1") > Some(KERNEL_MIN));
        assert_eq!(parse_release("unknown"), None);
    }

    /// Goal: limits are judged at their bounds. Method: values on both sides.
    #[test]
    fn limits_at_their_bounds() {
        let memlock = |soft, exempt| judge_memlock(soft, exempt, 4 << 20).verdict;
        assert_eq!(memlock(64 << 10, true), Verdict::Missing, "glommio checks the limit alone");
        assert_eq!(memlock(1 << 20, false), Verdict::Warning);
        assert_eq!(memlock(1 << 20, true), Verdict::Ok);
        assert_eq!(memlock(4 << 20, false), Verdict::Ok);
        let advice = judge_memlock(0, false, 4 << 20).advice.expect("advice");
        assert!(advice.contains("LimitMEMLOCK=4096K"), "{advice}");
        let nofile = |soft| judge_nofile(soft, 1 << 20).verdict;
        let verdicts = [nofile(128), nofile(1024), nofile(16384)];
        assert_eq!(verdicts, [Verdict::Missing, Verdict::Warning, Verdict::Ok]);
    }

    /// Goal: CPUs that are online but not allowed are named. Method: lists in the kernel's form.
    #[test]
    fn processors_that_are_kept_away() {
        assert_eq!(judge_processors(&[0, 1, 2], "0-2").verdict, Verdict::Ok);
        let part = judge_processors(&[1, 3], "0-4,8");
        assert_eq!(part.verdict, Verdict::Info);
        assert!(part.found.contains("1,3 allowed of 0-4,8; 0,2,4,8 are kept"), "{}", part.found);
        assert_eq!(judge_processors(&[], "0").verdict, Verdict::Missing);
    }
}
