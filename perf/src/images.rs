//! Images for the benches, made with `blktapd image` itself, so that they are what its users have.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::servers::process::Process;
use crate::servers::{Disk, Program};

/// No command that prepares or checks images takes longer.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// `blktapd image`.
#[derive(Debug, Clone)]
pub struct Tool {
    blktapd: PathBuf,
    cores: Vec<usize>,
    log: PathBuf,
}

impl Tool {
    /// The tool of `blktapd`, on `cores`; what it prints goes to a file in `scratch`.
    pub fn new(blktapd: &Program, cores: Vec<usize>, scratch: &Path) -> Self {
        Self { blktapd: blktapd.path.clone(), cores, log: scratch.join("image.log") }
    }

    /// `blktapd image ARGUMENTS`, not started.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.blktapd);
        command.arg("image").args(arguments);
        command
    }

    /// Runs `blktapd image ARGUMENTS`; an exit code other than 0 is an error.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<()> {
        finish(self.command(arguments), &self.cores, &self.log)
    }

    /// Makes an empty image of `bytes`, over what the disk has below it.
    pub fn create(&self, disk: &Disk, bytes: u64) -> Result<()> {
        let mut arguments = vec!["create".to_owned(), disk.spec(""), bytes.to_string()];
        if let Disk::Image { below: Some(below), .. } = disk {
            arguments.extend(["--parent".to_owned(), below.spec("")]);
        }
        self.run(arguments)
    }

    /// Copies the contents of a disk into a new image.
    pub fn convert(&self, from: &Disk, to: &Disk) -> Result<()> {
        self.run(["convert", &from.spec(""), &to.spec("")])
    }

    /// An error when the contents of two disks differ.
    pub fn compare(&self, one: &Disk, two: &Disk) -> Result<()> {
        self.run(["compare", &one.spec(""), &two.spec("")])
    }

    /// An error when the image has any fault, leaks included.
    pub fn check(&self, disk: &Disk) -> Result<()> {
        self.run(["check", &disk.spec("")])
    }
}

/// Runs a command to its end on `cores`; what it prints goes to `log` and is quoted when it fails.
pub fn finish(command: Command, cores: &[usize], log: &Path) -> Result<()> {
    let shown = format!("{command:?}");
    let mut process = Process::spawn(command, cores, log)?;
    let status = process.wait(TIMEOUT)?;
    ensure!(status.success(), "{shown} failed ({status}): {}", process.last_words());
    Ok(())
}
