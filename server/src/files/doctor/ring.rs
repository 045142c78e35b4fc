//! io_uring: is it there, is it allowed, which operations and set-ups does this kernel have.

use std::fs;
use std::io;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::Check;

const SUBJECT: &str = "io_uring";

/// The operations of a shard.
const NEEDED: [(u8, &str); 13] = [
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
    (opcode::PollAdd::CODE, "POLL_ADD"),
    (opcode::Recv::CODE, "RECV"),
    (opcode::RecvMsg::CODE, "RECVMSG"),
    (opcode::SendMsg::CODE, "SENDMSG"),
    (opcode::Timeout::CODE, "TIMEOUT"),
    (opcode::TimeoutUpdate::CODE, "TIMEOUT_REMOVE"),
    (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
];

pub(super) fn checks() -> Vec<Check> {
    let ring = match IoUring::new(8) {
        Ok(ring) => ring,
        Err(error) => {
            let sysctl = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
            return vec![explain(&error, sysctl.trim(), has_seccomp_filter(&status))];
        }
    };
    vec![operations(&ring), flavours()]
}

fn has_seccomp_filter(status: &str) -> bool {
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

/// Why no ring could be made.
fn explain(error: &io::Error, sysctl: &str, seccomp: bool) -> Check {
    let (found, advice) = match error.raw_os_error() {
        Some(libc::ENOSYS) if seccomp => (
            "hidden by a seccomp filter (ENOSYS)".to_owned(),
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's or unit's filter",
        ),
        Some(libc::ENOSYS) => {
            ("not in this kernel (ENOSYS)".to_owned(), "install a kernel with CONFIG_IO_URING")
        }
        Some(libc::EPERM) if matches!(sysctl, "1" | "2") => (
            format!("forbidden by the sysctl kernel.io_uring_disabled={sysctl}"),
            "set kernel.io_uring_disabled=0 (in /etc/sysctl.d), or 1 and run the daemon as root or in the \
             group kernel.io_uring_group",
        ),
        Some(libc::EPERM) => (
            "forbidden (EPERM), probably by a seccomp filter".to_owned(),
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's or unit's filter",
        ),
        Some(libc::ENOMEM) => (
            "no locked memory left for a ring (ENOMEM)".to_owned(),
            "raise LimitMEMLOCK= in the unit (ulimit -l in a shell)",
        ),
        Some(libc::EMFILE | libc::ENFILE) => (
            "no descriptor left for a ring".to_owned(),
            "raise LimitNOFILE= in the unit (ulimit -n in a shell)",
        ),
        _ => (format!("a ring cannot be made: {error}"), "see the kernel's log"),
    };
    Check::missing(SUBJECT, found, advice)
}

fn operations(ring: &IoUring) -> Check {
    let mut probe = Probe::new();
    if let Err(error) = ring.submitter().register_probe(&mut probe) {
        return Check::missing(
            SUBJECT,
            format!("it does not tell its operations: {error}"),
            "allow io_uring_register in the seccomp filter, or install a newer kernel",
        );
    }
    let absent: Vec<_> =
        NEEDED.iter().filter(|(code, _)| !probe.is_supported(*code)).map(|(_, name)| *name).collect();
    if absent.is_empty() {
        Check::ok(SUBJECT, format!("allowed, with all {} operations that a shard uses", NEEDED.len()))
    } else {
        Check::missing(
            SUBJECT,
            format!("without {}", absent.join(", ")),
            "install a newer kernel: Linux 6.1 has them all",
        )
    }
}

/// The best set-up that works; shards take the same way down.
fn flavours() -> Check {
    let subject = "ring set-up";
    let builder = IoUring::<squeue::Entry, cqueue::Entry>::builder;
    if builder().setup_single_issuer().setup_defer_taskrun().build(8).is_ok() {
        return Check::ok(subject, "SINGLE_ISSUER and DEFER_TASKRUN: the cheapest");
    }
    let advice = "each operation costs somewhat more CPU; Linux 6.1 has the cheapest set-up";
    if builder().setup_coop_taskrun().build(8).is_ok() {
        return Check::warning(subject, "COOP_TASKRUN", advice);
    }
    Check::warning(subject, "plain rings only", advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every way in which io_uring can be absent has its own sentence. Method: the errors that kernels
    /// and filters give.
    #[test]
    fn absence_is_explained() {
        let found = |code: i32, sysctl: &str, seccomp: bool| {
            explain(&io::Error::from_raw_os_error(code), sysctl, seccomp).found
        };
        assert!(found(libc::ENOSYS, "", false).contains("not in this kernel"));
        assert!(found(libc::ENOSYS, "0", true).contains("seccomp"));
        assert!(found(libc::EPERM, "2", false).contains("io_uring_disabled=2"));
        assert!(found(libc::EPERM, "0", true).contains("seccomp"));
        assert!(found(libc::ENOMEM, "0", false).contains("locked memory"));
        assert!(found(libc::EIO, "0", false).contains("cannot be made"));
        assert!(has_seccomp_filter("Name:\tx\nSeccomp:\t2\n"));
        assert!(!has_seccomp_filter("Seccomp:\t0\nSeccomp_filters:\t2\n"));
    }
}
