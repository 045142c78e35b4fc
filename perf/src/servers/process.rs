//! A child process that cannot outlive its owner: dropping it kills its whole process group and reaps it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{cpus, stop};

/// How long a server may take to end after SIGTERM before it is killed.
const TERM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a short program (`ctl attach`, `--version`) may run.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(60);

/// A running child, leader of a process group of its own.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command` on `cores`; what it prints goes to `log`, which is quoted when it fails.
    pub fn spawn(mut command: Command, cores: &[usize], log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        let child = cpus::on(cores, || command.spawn().with_context(|| format!("cannot start {name}")))?;
        Ok(Self { child, name, log: log.to_path_buf() })
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` says so; an error when the process ends first or `timeout` passes.
    pub fn wait_until(&mut self, timeout: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !ready() {
            stop::check()?;
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once ({status}): {}", self.name, self.last_words());
            }
            if Instant::now() > deadline {
                bail!("{} was not ready after {} s: {}", self.name, timeout.as_secs(), self.last_words());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for the end of a program that ends by itself.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            stop::check()?;
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {} s: {}", self.name, timeout.as_secs(), self.last_words());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The end of what the program printed, for messages.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(5)..].join("; ");
        if tail.is_empty() { "it printed nothing".into() } else { tail }
    }

    fn signal_group(&self, signal: Signal) {
        // The group is gone when the child was reaped and had no children: nothing is left to do then.
        let _ = killpg(Pid::from_raw(self.child.id() as i32), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal_group(Signal::SIGTERM);
        let deadline = Instant::now() + TERM_TIMEOUT;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        eprintln!("{} did not end within {} s of SIGTERM and is killed", self.name, TERM_TIMEOUT.as_secs());
        self.signal_group(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Runs a short program to its end and returns what it printed on stdout; an error carries its stderr. The program is killed when
/// the user asks to leave or [`OUTPUT_TIMEOUT`] passes.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let shown =
        command.get_args().fold(name.clone(), |text, argument| text + " " + &argument.to_string_lossy());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let status = wait_or_kill(&mut child).with_context(|| format!("`{shown}`"))?;
    let stdout = stdout.join().unwrap_or_default();
    let stderr = stderr.join().unwrap_or_default();
    if !status.success() {
        bail!("`{shown}` failed ({status}): {}", stderr.trim());
    }
    Ok(stdout)
}

/// Reads a pipe on a thread, so that a program that prints much does not wait for us.
fn reader(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What could be read is shown; the exit status decides.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait_or_kill(child: &mut Child) -> Result<ExitStatus> {
    let deadline = Instant::now() + OUTPUT_TIMEOUT;
    let result = loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(error) => break error.into(),
        }
        if let Err(interrupted) = stop::check() {
            break interrupted;
        }
        if Instant::now() > deadline {
            break anyhow!("did not end within {} s", OUTPUT_TIMEOUT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: a message of a failed program names the command and what it said. Method: a shell that complains.
    #[test]
    fn failure_is_quoted() {
        let error =
            output(Command::new("sh").args(["-c", "echo no such disk >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("no such disk") && error.contains('3'), "{error}");
        assert_eq!(output(Command::new("echo").arg("fine")).unwrap(), "fine\n");
    }

    // Goal: nothing of a server outlives its owner. Method: a shell with a child of its own, dropped.
    #[test]
    fn dropping_ends_the_whole_group() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 300 & echo $!; wait"]);
        let mut process = Process::spawn(command, &cpus::allowed().unwrap(), &log).unwrap();
        process
            .wait_until(Duration::from_secs(20), || fs::read_to_string(&log).is_ok_and(|t| t.ends_with('\n')))
            .unwrap();
        let grandchild: i32 = fs::read_to_string(&log).unwrap().trim().parse().unwrap();
        drop(process);
        let deadline = Instant::now() + Duration::from_secs(20);
        let alive = || {
            fs::read_to_string(format!("/proc/{grandchild}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
        };
        while alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!alive());
    }
}
