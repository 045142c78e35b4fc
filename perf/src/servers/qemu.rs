//! QEMU's two servers. qemu-nbd serves one disk per process; qemu-storage-daemon many in one process. Both with
//! `cache.direct=on` on files; which `aio` they use is the caller's choice and named in the row.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::process::Process;
use super::{Aio, Disk, Endpoint, Frontend, Protocol, READY_TIMEOUT, Setup, Started, answers, shown};

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
            Disk::Image { format, path, .. } => command
                .arg(format!("--format={}", format.qemu_driver()))
                .args(["--cache=none", &format!("--aio={}", setup.aio.name())])
                .arg(path),
            Disk::Null(bytes) => command.args(["--image-opts", &format!("driver=null-co,size={bytes}")]),
            Disk::Luks { .. } => bail!("encrypted disks are measured on blktapd alone"),
            Disk::Ram(_) => bail!("qemu-nbd has no memory disk"),
        };
        if index == 0 {
            shown_command = shown(&command);
        }
        processes.push(Process::spawn(command, &setup.cores, &run_dir.join(format!("log{index}")))?);
        endpoints.push(Endpoint { socket, export: String::new(), protocol: Protocol::Nbd });
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
    let rings = setup.frontend == Frontend::Ring;
    if !rings {
        command
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
    }
    let mut endpoints = Vec::with_capacity(setup.disks.len());
    let mut shown_command = String::new();
    for (index, disk) in setup.disks.iter().enumerate() {
        let mut blockdev = match disk {
            Disk::File(path) => {
                format!("{},cache.direct=on", file_options("", path, setup.aio))
            }
            Disk::Image { .. } => format!("{},cache.direct=on", image_options("", disk, setup.aio)?),
            Disk::Luks { .. } => bail!("encrypted disks are measured on blktapd alone"),
            Disk::Null(bytes) => format!("driver=null-co,size={bytes}"),
            Disk::Ram(bytes) if rings => {
                // The run directory of a setup with memory is on tmpfs.
                let path = run_dir.join(format!("memory{index}"));
                std::fs::File::create(&path).and_then(|file| file.set_len(*bytes))?;
                file_options("", &path, setup.aio)
            }
            Disk::Ram(_) => bail!("qemu-storage-daemon has no memory disk"),
        };
        // Writing to a String cannot fail.
        let _ = write!(blockdev, ",node-name=n{index}");
        let own_socket = run_dir.join(format!("d{index}.sock"));
        let export = match setup.frontend {
            Frontend::Nbd => format!("type=nbd,id=e{index},node-name=n{index},name=d{index},writable=on"),
            Frontend::Ring => format!(
                "type=vhost-user-blk,id=e{index},node-name=n{index},writable=on,addr.type=unix,addr.path={}",
                own_socket.display()
            ),
        };
        command.args(["--blockdev", &blockdev, "--export", &export]);
        if index == 0 {
            shown_command = shown(&command);
        }
        let (socket, protocol) =
            if rings { (own_socket, Protocol::VhostUser) } else { (socket.clone(), Protocol::Nbd) };
        endpoints.push(Endpoint { socket, export: format!("d{index}"), protocol });
    }
    let mut process = Process::spawn(command, &setup.cores, &run_dir.join("log"))?;
    // The listener is there before the exports are; the exports of one command line are made before it serves.
    process.wait_until(READY_TIMEOUT, || match setup.frontend {
        Frontend::Nbd => answers(&socket),
        // It takes one client at a time, which a probe must not be.
        Frontend::Ring => endpoints.last().is_none_or(|last| last.socket.exists()),
    })?;
    Ok(Started { processes: vec![process], endpoints, command: shown_command })
}

/// The options of a file under the node whose options begin with `prefix`.
fn file_options(prefix: &str, path: &Path, aio: Aio) -> String {
    format!("{prefix}driver=file,{prefix}filename={},{prefix}aio={}", doubled_commas(path), aio.name())
}

/// The options of an image and of all that is below it: QEMU hands `cache.direct` down by itself, `aio` it does not.
fn image_options(prefix: &str, disk: &Disk, aio: Aio) -> Result<String> {
    let (driver, path, below) = match disk {
        Disk::File(path) => ("raw", path, None),
        Disk::Image { format, path, below } => (format.qemu_driver(), path, below.as_deref()),
        Disk::Luks { .. } | Disk::Ram(_) | Disk::Null(_) => bail!("only files can be below an image"),
    };
    let mut options =
        format!("{prefix}driver={driver},{}", file_options(&format!("{prefix}file."), path, aio));
    if let Some(below) = below {
        options.push(',');
        options.push_str(&image_options(&format!("{prefix}backing."), below, aio)?);
    }
    Ok(options)
}

/// A comma in a value of QEMU's options is written twice.
fn doubled_commas(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::*;

    // Goal: every layer of a chain gets the same way of I/O. Method: a qcow2 over a raw file with a comma in its name.
    #[test]
    fn options_reach_every_layer() {
        let below = Some(Box::new(Disk::File("/b,c".into())));
        let disk = Disk::Image { format: Format::Qcow2, path: "/a".into(), below };
        assert_eq!(
            image_options("", &disk, Aio::Native).unwrap(),
            "driver=qcow2,file.driver=file,file.filename=/a,file.aio=native,\
             backing.driver=raw,backing.file.driver=file,backing.file.filename=/b,,c,backing.file.aio=native"
        );
    }
}
