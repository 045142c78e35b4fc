//! nbdkit with its file, memory and null plugins. The file plugin has no direct I/O: `cache=none` drops the pages after each
//! request, which is its nearest setting. Its defaults are kept otherwise (16 threads per connection).

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::process::Process;
use super::{Disk, Endpoint, Protocol, READY_TIMEOUT, Setup, Started, answers, shown};

pub(super) fn start(setup: &Setup<'_>, run_dir: &Path) -> Result<Started> {
    let socket = run_dir.join("nbd.sock");
    let mut command = Command::new(&setup.program.path);
    command.arg("--foreground").arg("--unix").arg(&socket);
    let mut exports = vec![String::new()];
    match setup.disks.as_slice() {
        [Disk::File(path)] => {
            let mut file = std::ffi::OsString::from("file=");
            file.push(path);
            command.arg("file").arg(file).arg("cache=none");
        }
        [Disk::Ram(bytes)] => {
            command.args(["memory", &bytes.to_string()]);
        }
        [Disk::Image { format, .. }] => bail!("nbdkit has no plugin for {}", format.name()),
        [Disk::Luks { .. }] => bail!("encrypted disks are measured on blktapd alone"),
        [Disk::Null(bytes)] => {
            command.args(["null", &bytes.to_string()]);
        }
        many => {
            let (dir, names) = directory_of(many)?;
            let mut argument = std::ffi::OsString::from("dir=");
            argument.push(dir);
            command.arg("file").arg(argument).arg("cache=none");
            exports = names;
        }
    }
    let command_text = shown(&command);
    let mut process = Process::spawn(command, &setup.cores, &run_dir.join("log"))?;
    process.wait_until(READY_TIMEOUT, || answers(&socket))?;
    let endpoints = exports
        .into_iter()
        .map(|export| Endpoint { socket: socket.clone(), export, protocol: Protocol::Nbd })
        .collect();
    Ok(Started { processes: vec![process], endpoints, command: command_text })
}

/// One nbdkit serves many files only as the files of one directory, exported by their names.
fn directory_of(disks: &[Disk]) -> Result<(&Path, Vec<String>)> {
    let mut common = None;
    let mut names = Vec::with_capacity(disks.len());
    for disk in disks {
        let Disk::File(path) = disk else {
            bail!("nbdkit serves several disks only as files of one directory")
        };
        let dir = path.parent().with_context(|| format!("{} has no directory", path.display()))?;
        if *common.get_or_insert(dir) != dir {
            bail!("nbdkit serves several disks only as files of one directory");
        }
        let name = path.file_name().and_then(|name| name.to_str());
        names.push(name.with_context(|| format!("{} is no name for an export", path.display()))?.to_owned());
    }
    Ok((common.context("no disks")?, names))
}
