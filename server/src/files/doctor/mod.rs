//! `blktapd doctor [DIR…]`: what this host has and lacks, in sentences, with what to do.
//!
//! Each check is one line: its subject, a verdict, what was found and, unless all is well, the advice. Only
//! what the daemon cannot work without is `missing` and makes the exit code 1. The checks change nothing,
//! except that one small file is made and removed in each DIR.

mod directory;
mod host;
mod ring;

pub(crate) use host::may_lock_memory;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde::Serialize;

/// How long a directory may take to answer before it counts as dead.
const DIRECTORY_MAX: Duration = Duration::from_secs(10);

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Neither good nor bad.
    Info,
    /// Works, with a cost that the advice names.
    Warning,
    /// Something needed is not there.
    Missing,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at: `kernel`, `io_uring`, `/srv/images: direct I/O`.
    pub subject: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; absent where there is nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    fn ok(subject: impl Into<String>, found: impl Into<String>) -> Check {
        Check { subject: subject.into(), verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn info(subject: impl Into<String>, found: impl Into<String>) -> Check {
        Check { verdict: Verdict::Info, ..Check::ok(subject, found) }
    }

    fn warning(subject: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { verdict: Verdict::Warning, advice: Some(advice.into()), ..Check::ok(subject, found) }
    }

    fn missing(subject: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { verdict: Verdict::Missing, advice: Some(advice.into()), ..Check::ok(subject, found) }
    }
}

/// Everything that was checked. `Display` is the table for people; serde gives `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Nothing needed is missing.
    pub ready: bool,
    /// In the order in which they matter.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(checks: Vec<Check>) -> Report {
        Report { ready: checks.iter().all(|check| check.verdict != Verdict::Missing), checks }
    }

    /// 0 when ready, else 1.
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.ready)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject_width = self.checks.iter().map(|check| check.subject.chars().count()).max().unwrap_or(0);
        for Check { subject, verdict, found, advice } in &self.checks {
            let word = match verdict {
                Verdict::Ok => "ok",
                Verdict::Info => "info",
                Verdict::Warning => "warning",
                Verdict::Missing => "MISSING",
            };
            writeln!(f, "{word:<7}  {subject:<subject_width$}  {found}")?;
            if let Some(advice) = advice {
                writeln!(f, "{:<7}  {:<subject_width$}  -> {advice}", "", "")?;
            }
        }
        let count = |verdict| self.checks.iter().filter(|check| check.verdict == verdict).count();
        match (count(Verdict::Missing), count(Verdict::Warning)) {
            (0, 0) => writeln!(f, "\nThis host is ready for blktapd."),
            (0, warnings) => writeln!(f, "\nThis host is ready for blktapd, with warnings: {warnings}."),
            (missing, _) => writeln!(f, "\nblktapd cannot work here as it should: {missing} missing."),
        }
    }
}

/// Runs all checks. Blocks for some milliseconds, and up to ten seconds for a directory that does not answer.
pub fn examine(directories: &[PathBuf]) -> Report {
    let mut checks = host::kernel();
    checks.extend(ring::checks());
    checks.extend(host::limits());
    checks.extend(host::processors());
    checks.extend(host::devices());
    for directory in directories {
        checks.extend(examine_directory(directory));
    }
    Report::new(checks)
}

/// On a thread of its own: one that hangs in a dead mount is left behind, and ends with the process.
fn examine_directory(directory: &Path) -> Vec<Check> {
    let (sender, receiver) = mpsc::channel();
    let target = directory.to_owned();
    let spawned = std::thread::Builder::new().name("doctor".into()).spawn(move || {
        // Nobody listens any more when it was late.
        let _ = sender.send(directory::checks(&target));
    });
    let subject = directory.display().to_string();
    if let Err(error) = spawned {
        return vec![Check::missing(
            subject,
            format!("no thread to look at it: {error}"),
            "raise the limit of tasks",
        )];
    }
    receiver.recv_timeout(DIRECTORY_MAX).unwrap_or_else(|_| {
        let found = format!("no answer within {} s", DIRECTORY_MAX.as_secs());
        vec![Check::missing(subject, found, "find out why the mount hangs; disks on it would not work")]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(vec![
            Check::ok("kernel", "Linux 6.12"),
            Check::warning("open files", "1024", "raise it"),
            Check::missing("io_uring", "forbidden", "allow it"),
        ])
    }

    /// Goal: the report says in words and in its exit code whether the host will do. Method: one check of
    /// each kind, then without the bad one.
    #[test]
    fn verdict_of_the_whole() {
        let mut report = report();
        assert_eq!(report.exit_code(), 1);
        let text = report.to_string();
        assert!(text.contains("MISSING  io_uring    forbidden\n"), "{text}");
        assert!(text.contains("                     -> allow it\n"), "{text}");
        assert!(text.ends_with("cannot work here as it should: 1 missing.\n"), "{text}");
        report.checks.pop();
        let report = Report::new(report.checks);
        assert_eq!(report.exit_code(), 0);
        assert!(report.to_string().ends_with("with warnings: 1.\n"));
    }

    /// Goal: the JSON names verdicts in lower case and leaves empty advice out. Method: serialise.
    #[test]
    fn json_shape() {
        let json = serde_json::to_value(report()).expect("serialises");
        assert_eq!(json["ready"], false);
        assert_eq!(
            json["checks"][0],
            serde_json::json!({"subject": "kernel", "verdict": "ok", "found": "Linux 6.12"})
        );
    }

    /// Goal: the checks run to their end on the host of the tests and judge a real directory. Method: run
    /// them on a temporary directory and on none.
    #[test]
    fn runs_here() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let absent = directory.path().join("none");
        let report = examine(&[directory.path().to_owned(), absent.clone()]);
        let subjects: Vec<_> = report.checks.iter().map(|check| check.subject.as_str()).collect();
        for wanted in ["kernel", "io_uring", "locked memory", "open files", "processors", "Xen", "ublk"] {
            assert!(subjects.contains(&wanted), "{wanted} is not among {subjects:?}");
        }
        let of_absent = format!("{}", absent.display());
        assert!(report.checks.iter().any(|c| c.subject == of_absent && c.verdict == Verdict::Missing));
        assert_eq!(report.exit_code(), 1);
        for part in ["file system", "direct I/O", "holes", "locks", "free space"] {
            let subject = format!("{}: {part}", directory.path().display());
            assert!(subjects.contains(&subject.as_str()), "{subject} is not among {subjects:?}");
        }
        let left = std::fs::read_dir(directory.path()).expect("read").count();
        assert_eq!(left, 0, "nothing is left behind");
    }
}
