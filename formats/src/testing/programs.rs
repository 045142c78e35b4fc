//! Other people's programs as judges: QEMU's tools and libvhdi. A program that is not there is said so and skipped.

use std::path::Path;
use std::process::{Command, Output};

/// What a program may take, in seconds.
const DEADLINE_S: &str = "60";

/// Runs a program in `folder` with a deadline; `None` (which it says) when the host has none of this name.
pub fn run(folder: &Path, command: &[&str]) -> Option<Output> {
    let mut run = Command::new("timeout");
    run.args(["-s", "KILL", DEADLINE_S]).args(command).current_dir(folder);
    // 127: timeout found no such program.
    let output = run.output().ok().filter(|output| output.status.code() != Some(127));
    if output.is_none() {
        eprintln!("skipped: there is no {}", command.first().unwrap_or(&"program"));
    }
    output
}

/// QEMU's tools are here.
pub fn have_qemu() -> bool {
    run(Path::new("."), &["qemu-img", "--version"]).is_some()
}

/// Runs a program that is there and has to succeed; returns what it printed.
///
/// # Panics
/// It does not.
#[track_caller]
pub fn must_run(folder: &Path, command: &[&str]) -> String {
    let Some(output) = run(folder, command) else { panic!("{command:?}: not there") };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// What QEMU reads of an image of the format that it calls `format`, or of a snapshot inside of it.
///
/// # Panics
/// It cannot.
#[track_caller]
pub fn qemu_reads(folder: &Path, format: &str, image: &str, snapshot: Option<&str>) -> Vec<u8> {
    const OUT: &str = "qemu-reads.raw";
    let mut arguments = vec!["qemu-img", "convert", "-t", "unsafe", "-f", format, "-O", "raw"];
    let id = snapshot.map(|name| format!("snapshot.name={name}"));
    if let Some(id) = &id {
        arguments.extend(["-l", id]);
    }
    arguments.extend([image, OUT]);
    must_run(folder, &arguments);
    std::fs::read(folder.join(OUT)).unwrap_or_else(|error| panic!("{OUT}: {error}"))
}

/// `qemu-img check` finds nothing at all.
///
/// # Panics
/// It does.
#[track_caller]
pub fn qemu_finds_nothing(folder: &Path, image: &str) {
    must_run(folder, &["qemu-img", "check", image]);
}

const READ_WITH_LIBVHDI: &str = "
import sys, pyvhdi
parent = None
for name in sys.argv[2:]:
    file = pyvhdi.file()
    file.open(name)
    if parent is not None:
        file.set_parent(parent)
    parent = file
with open(sys.argv[1], 'wb') as out:
    left = parent.get_media_size()
    while left > 0:
        data = parent.read_buffer(min(left, 65536))
        out.write(data)
        left -= len(data)
";

/// What libvhdi reads of a chain of VHDs, the lowest image first; `None` when there is no Python that can import `pyvhdi`. Another
/// one than the usual is named in `PYVHDI_PYTHON`.
///
/// # Panics
/// It cannot.
#[track_caller]
pub fn libvhdi_reads(images: &[&Path]) -> Option<Vec<u8>> {
    let here = Path::new(".");
    let python = std::env::var("PYVHDI_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !run(here, &[&python, "-c", "import pyvhdi"])?.status.success() {
        eprintln!("skipped: {python} has no pyvhdi; name one that has in PYVHDI_PYTHON");
        return None;
    }
    let out = images.last()?.with_extension("libvhdi");
    let mut command = vec![python.as_str(), "-c", READ_WITH_LIBVHDI, out.to_str()?];
    command.extend(images.iter().filter_map(|image| image.to_str()));
    must_run(here, &command);
    std::fs::read(&out).ok()
}
