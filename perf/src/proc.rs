//! What a process and its children cost: CPU time, memory, descriptors. Everything is read from the outside, by the same
//! means for every server.
//!
//! * CPU: the process' CPU clock (clock_getcpuclockid(3)), which is user plus system time of all its threads, those that
//!   ended and the kernel's io-wq workers included, in nanoseconds. Interrupts and block completions are in nobody's figure.
//! * Memory: `Pss` of /proc/PID/smaps_rollup.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// A sum over process trees at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time since the processes began.
    pub cpu: Duration,
    /// Proportional set size in KiB.
    pub pss_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// CPU time of the processes `roots` and all their descendants.
pub fn cpu(roots: &[u32]) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for pid in tree(roots) {
        total += cpu_of(pid).with_context(|| format!("process {pid} cannot be read: did the server die?"))?;
    }
    Ok(total)
}

/// CPU time, memory and descriptors of the processes `roots` and all their descendants.
pub fn usage(roots: &[u32]) -> Result<Usage> {
    let mut sum = Usage::default();
    for pid in tree(roots) {
        sum.cpu += cpu_of(pid)?;
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        sum.pss_kib += pss_kib(&text).with_context(|| format!("{path} has no Pss line"))?;
        sum.descriptors += fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
    }
    Ok(sum)
}

/// Bytes that the processes `roots` and all their descendants had read from block devices (`read_bytes` of /proc/PID/io, which
/// counts direct I/O through io_uring as well).
pub fn read_bytes(roots: &[u32]) -> Result<u64> {
    let mut total = 0;
    for pid in tree(roots) {
        let path = format!("/proc/{pid}/io");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("read_bytes:"));
        total += line
            .and_then(|value| value.trim().parse::<u64>().ok())
            .with_context(|| format!("{path} has no read_bytes line"))?;
    }
    Ok(total)
}

fn cpu_of(pid: u32) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid as i32))?;
    Ok(Duration::from(clock_gettime(clock)?))
}

/// The roots and their descendants, each once.
fn tree(roots: &[u32]) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut todo: Vec<u32> = roots.to_vec();
    while let Some(pid) = todo.pop() {
        if !found.insert(pid) {
            continue;
        }
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            if let Ok(children) = fs::read_to_string(task.path().join("children")) {
                todo.extend(children.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
            }
        }
    }
    found
}

/// The `Pss:` line of smaps_rollup, in KiB.
fn pss_kib(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("Pss:"))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: the Pss line is taken, not Pss_Dirty or Pss_Anon. Method: a real smaps_rollup text, shortened.
    #[test]
    fn pss_is_read_from_its_own_line() {
        let text = "55d0-7ffd ---p 00000000 00:00 0   [rollup]\nRss:    1234 kB\nPss_Dirty:   7 kB\nPss:     567 kB\n";
        assert_eq!(pss_kib(text), Some(567));
        assert_eq!(pss_kib("Rss: 1 kB\n"), None);
    }

    // Goal: the CPU of a child's child is counted. Method: a shell whose child spins for a moment; the shell itself sleeps.
    #[test]
    fn cpu_of_descendants_is_counted() {
        let script = "(i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 60) & echo $!; wait";
        let mut shell = std::process::Command::new("sh")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let grandchild = {
            use std::io::BufRead;
            let mut line = String::new();
            std::io::BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
            line.trim().parse::<u32>().unwrap()
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let (mut all, mut alone) = (Duration::ZERO, Duration::ZERO);
        while all < alone + Duration::from_millis(20) && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            all = cpu(&[shell.id()]).unwrap();
            alone = cpu_of(shell.id()).unwrap();
        }
        assert!(tree(&[shell.id()]).contains(&grandchild));
        for pid in tree(&[shell.id()]) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = shell.wait();
        assert!(all >= alone + Duration::from_millis(20), "all {all:?}, shell alone {alone:?}");
    }
}
