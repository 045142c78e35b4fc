//! The server under test, driven only through its command line: `serve`, and `ctl attach` for each disk.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::process::{Process, output};
use super::{Disk, Endpoint, Frontend, Protocol, READY_TIMEOUT, Setup, Started, answers, shown};
use crate::stop;

pub(super) fn start(setup: &Setup<'_>, run_dir: &Path) -> Result<Started> {
    ensure!(
        setup.attach.is_empty() || setup.attach.len() == setup.disks.len(),
        "arguments for {} disks, but {} disks",
        setup.attach.len(),
        setup.disks.len()
    );
    let cpus: Vec<String> = setup.cores.iter().map(usize::to_string).collect();
    let mut serve = Command::new(&setup.program.path);
    serve.arg("serve").arg("--run-dir").arg(run_dir).args(["--metrics", "none", "--cpus", &cpus.join(",")]);
    let mut command = shown(&serve);
    let ctl = run_dir.join("ctl.sock");
    let mut process = Process::spawn(serve, &setup.cores, &run_dir.join("output"))?;
    process.wait_until(READY_TIMEOUT, || answers(&ctl))?;

    let mut endpoints = Vec::with_capacity(setup.disks.len());
    for (index, disk) in setup.disks.iter().enumerate() {
        stop::check()?;
        let name = format!("d{index}");
        let mut attach = Command::new(&setup.program.path);
        let rings = setup.frontend == Frontend::Ring;
        let frontend = if rings { "--blkif" } else { "--nbd" };
        attach.arg("ctl").arg("--ctl").arg(&ctl).args(["attach", &name, &spec(disk, &name), frontend]);
        if let Some(more) = setup.attach.get(index) {
            attach.args(more);
        }
        if index == 0 {
            command = format!("{command}; {}", shown(&attach));
        }
        output(&mut attach)?;
        let (dir, protocol) = if rings { ("blkif", Protocol::Blkif) } else { ("nbd", Protocol::Nbd) };
        let socket = run_dir.join(dir).join(format!("{name}.sock"));
        endpoints.push(Endpoint { socket, export: name, protocol });
    }
    // A socket for rings is there when `attach` says so.
    if let Some(last) = endpoints.last().filter(|last| last.protocol == Protocol::Nbd) {
        process.wait_until(READY_TIMEOUT, || answers(&last.socket))?;
    }
    Ok(Started { processes: vec![process], endpoints, command })
}

/// The image spec of a disk.
pub(super) fn spec(disk: &Disk, name: &str) -> String {
    match disk {
        Disk::File(path) => format!("raw:{}", percent_encoded(path)),
        Disk::Image { format, path, .. } => format!("{}:{}", format.name(), percent_encoded(path)),
        Disk::Luks { path, key } => {
            format!("luks:{}?key-file={}", percent_encoded(path), percent_encoded(key))
        }
        Disk::Ram(bytes) => format!("ram:{name}?size={bytes}"),
        Disk::Null(bytes) => format!("null:?size={bytes}"),
    }
}

/// A path with everything but unreserved characters and slashes percent-encoded.
fn percent_encoded(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                text.push(byte as char)
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: a path with characters of the grammar stays one path. Method: encode a hostile name.
    #[test]
    fn paths_are_percent_encoded() {
        let disk = Disk::File("/srv/a b?c&d%é".into());
        assert_eq!(spec(&disk, "d0"), "raw:/srv/a%20b%3Fc%26d%25%C3%A9");
        assert_eq!(spec(&Disk::Ram(4096), "d7"), "ram:d7?size=4096");
    }
}
