//! QEMU's two servers. qemu-nbd serves one disk per process; qemu-storage-daemon many in one process. Both with
//! `cache.direct=on` on files; which `aio` they use is the caller's choice and named in the row.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::process::Process;
use super::{Disk, Endpoint, READY_TIMEOUT, Setup, Started, answers, shown};

/// One qemu-nbd per disk, all on the same cores.
pub(super) fn start_nbd(setup: &Setup<'_>, run_dir: &Path) -> Result<Started> {
    let mut processes = Vec::with_capacity(setup.disks.len());
    let mut endpoints = Vec::with_capacity(setup.disks.len());
    let mut shown_command = String::new();
    for (index, disk) in setup.disks.iter().enumerate() {
        let socket = run_dir.join(format!("d{index}.sock"));
        let mut command = Command::new(&setup.program.path);
        // A limit of 0 clients lets the harness look whether the socket answers without using up the only place.
        command.arg("--persistent").arg("--shared=0").arg("--socket").arg(&socket);
        match disk {
            Disk::File(path) => command
                .args(["--format=raw", "--cache=none"])
                .arg(format!("--aio={}", setup.aio.name()))
                .arg(path),
            Disk::Null(bytes) => command.args(["--image-opts", &format!("driver=null-co,size={bytes}")]),
            Disk::Ram(_) => bail!("qemu-nbd has no memory disk"),
        };
        if index == 0 {
            shown_command = shown(&command);
        }
        processes.push(Process::spawn(command, &setup.cores, &run_dir.join(format!("log{index}")))?);
        endpoints.push(Endpoint { socket, export: String::new() });
    }
    for (process, endpoint) in processes.iter_mut().zip(&endpoints) {
        process.wait_until(READY_TIMEOUT, || answers(&endpoint.socket))?;
    }
    Ok(Started { processes, endpoints, command: shown_command })
}

/// One qemu-storage-daemon with an export per disk.
pub(super) fn start_daemon(setup: &Setup<'_>, run_dir: &Path) -> Result<Started> {
    let socket = run_dir.join("nbd.sock");
    let mut command = Command::new(&setup.program.path);
    command
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
    let mut endpoints = Vec::with_capacity(setup.disks.len());
    let mut shown_command = String::new();
    for (index, disk) in setup.disks.iter().enumerate() {
        let mut blockdev = match disk {
            Disk::File(path) => format!(
                "driver=file,filename={},cache.direct=on,aio={}",
                doubled_commas(path),
                setup.aio.name()
            ),
            Disk::Null(bytes) => format!("driver=null-co,size={bytes}"),
            Disk::Ram(_) => bail!("qemu-storage-daemon has no memory disk"),
        };
        // Writing to a String cannot fail.
        let _ = write!(blockdev, ",node-name=n{index}");
        let export = format!("type=nbd,id=e{index},node-name=n{index},name=d{index},writable=on");
        command.args(["--blockdev", &blockdev, "--export", &export]);
        if index == 0 {
            shown_command = shown(&command);
        }
        endpoints.push(Endpoint { socket: socket.clone(), export: format!("d{index}") });
    }
    let mut process = Process::spawn(command, &setup.cores, &run_dir.join("log"))?;
    // The listener is there before the exports are; the exports of one command line are made before it serves.
    process.wait_until(READY_TIMEOUT, || answers(&socket))?;
    Ok(Started { processes: vec![process], endpoints, command: shown_command })
}

/// A comma in a value of QEMU's options is written twice.
fn doubled_commas(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
