//! Goal: images of QEMU are read and written here as QEMU reads them, and ours there; libvhdi agrees. Method: `qemu-img`, `qemu-io` and, where it is
//! there, Python's `pyvhdi` on files in a temporary folder. A missing program is printed and skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::store::Disk;
use super::*;

/// Runs a program for at most a minute; `None` when it is not there.
fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    let result = Command::new("timeout").args(["-s", "KILL", "60", program]).args(arguments).output();
    // 127: timeout found no such program.
    let output = result.ok().filter(|output| output.status.code() != Some(127));
    if output.is_none() {
        println!("skipped: there is no {program}");
    }
    output
}

/// Runs a program of QEMU that has to succeed; false when it is not there.
fn qemu(program: &str, arguments: &[&str]) -> bool {
    let Some(output) = run(program, arguments) else { return false };
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    true
}

/// What `qemu-img` reads from an image.
fn seen_by_qemu(image: &Path) -> Option<Vec<u8>> {
    let raw = image.with_extension("raw");
    let arguments = ["convert", "-f", "vpc", "-O", "raw", image.to_str()?, raw.to_str()?];
    qemu("qemu-img", &arguments).then(|| std::fs::read(&raw).unwrap())
}

/// What we read.
fn seen_by_us(image: &Path) -> Vec<u8> {
    let disk = volume(&Disk::open(image, false), false);
    read(&disk, 0, disk.size()).unwrap()
}

/// Where libvhdi is: a Python that can import it, from the environment or the usual one.
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

/// What libvhdi reads from a chain, the lowest image first; `None` when it is not there.
fn seen_by_libvhdi(images: &[&Path]) -> Option<Vec<u8>> {
    let python = std::env::var("PYVHDI_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let usable = run(&python, &["-c", "import pyvhdi"])?.status.success();
    if !usable {
        println!("skipped: {python} has no pyvhdi; name one that has in PYVHDI_PYTHON");
        return None;
    }
    let out = images.last()?.with_extension("libvhdi");
    let mut arguments = vec!["-c", READ_WITH_LIBVHDI, out.to_str()?];
    arguments.extend(images.iter().filter_map(|image| image.to_str()));
    let output = run(&python, &arguments)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(std::fs::read(&out).unwrap())
}

#[track_caller]
fn same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(wrong, None, "first difference");
}

/// Random writes and erases of multiples of `unit`, here, on an open image and on a copy of its bytes.
fn scribble(disk: &Volume, bytes: &mut [u8], unit: u64, seed: u64, steps: u64) {
    let mut numbers = Numbers(seed);
    let units = bytes.len() as u64 / unit;
    for step in 0..steps {
        let offset = numbers.below(units) * unit;
        let len = ((1 + numbers.below(51200 / unit)) * unit).min(bytes.len() as u64 - offset);
        let range = offset as usize..(offset + len) as usize;
        if step % 7 == 6 {
            block_on(disk.erase(offset, len, crate::driver::Erase::Zero)).unwrap();
            bytes[range].fill(0);
        } else {
            let data = numbers.bytes(len);
            write(disk, offset, &data).unwrap();
            bytes[range].copy_from_slice(&data);
        }
    }
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.vhd");
    (folder, image)
}

#[test]
fn images_of_qemu() {
    for (index, (options, size)) in [
        ("subformat=dynamic", "9M"),
        ("subformat=dynamic,force_size=on", "5243392"),
        ("subformat=fixed", "3M"),
        ("subformat=fixed,force_size=on", "3146240"),
        ("subformat=dynamic,force_size=on", "512"),
        ("subformat=dynamic", "5001216"),
    ]
    .into_iter()
    .enumerate()
    {
        let (_folder, image) = scratch();
        let name = image.to_str().unwrap();
        if !qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, name, size]) {
            return;
        }
        if index < 4 {
            let writes = ["-c", "write -P 17 512 1024", "-c", "write -P 18 2200000 512k"];
            assert!(qemu("qemu-io", &[&["-f", "vpc"], &writes[..], &[name]].concat()));
        }
        let mut bytes = seen_by_qemu(&image).unwrap();
        same(&seen_by_us(&image), &bytes);
        let file = Disk::open(&image, true);
        assert_clean(&file);
        let disk = volume(&file, true);
        scribble(&disk, &mut bytes, 512, index as u64, 60);
        block_on(disk.close()).unwrap();
        assert_clean(&file);
        same(&seen_by_us(&image), &bytes);
        same(&seen_by_qemu(&image).unwrap(), &bytes);
        if let Some(found) = seen_by_libvhdi(&[&image]) {
            same(&found, &bytes);
        }
        // And QEMU goes on where we stopped.
        if bytes.len() > 1 << 20 {
            assert!(qemu("qemu-io", &["-f", "vpc", "-c", "write -P 99 1000k 3k", name]));
            bytes[1000 << 10..1003 << 10].fill(99);
            same(&seen_by_us(&image), &bytes);
            assert_eq!(check(&file, None).corruptions, Vec::<String>::new());
        }
    }
}

#[test]
fn images_of_ours() {
    for (index, (options, size)) in [
        (&[][..], 7u64 << 20),
        (&[("block_size", "4096")], (3 << 20) + 512),
        (&[("block_size", "512k"), ("creator", "vbox")], 2 << 20),
        (&[("creator", "win")], (5 << 20) - 1536),
        (&[("creator", "vpc")], 4 << 20),
        (&[("type", "fixed")], (2 << 20) + 512),
    ]
    .into_iter()
    .enumerate()
    {
        let (_folder, image) = scratch();
        let file = Disk::open(&image, true);
        create(&file, Some(size), None, options);
        let disk = volume(&file, true);
        let mut bytes = vec![0; disk.size() as usize];
        scribble(&disk, &mut bytes, 512, 100 + index as u64, 40);
        let grown = disk.size() + (3 << 20);
        block_on(disk.resize(grown)).unwrap();
        bytes.resize(grown as usize, 0);
        scribble(&disk, &mut bytes, 512, 200 + index as u64, 40);
        block_on(disk.close()).unwrap();
        same(&seen_by_us(&image), &bytes);
        // QEMU takes the geometry of a creator that it does not know for the size.
        let by_geometry = options.contains(&("creator", "vbox"));
        let Some(found) = seen_by_qemu(&image) else { return };
        let len = if by_geometry { found.len().min(bytes.len()) } else { bytes.len() };
        same(&found[..len.min(found.len())], &bytes[..len]);
        if let Some(found) = seen_by_libvhdi(&[&image]) {
            // It takes the original size for the current one.
            same(&found, &bytes[..found.len()]);
        }
        // QEMU writes to it.
        let name = image.to_str().unwrap();
        assert!(qemu("qemu-io", &["-f", "vpc", "-c", "write -P 77 1500k 700k", name]));
        bytes[1500 << 10..2200 << 10].fill(77);
        same(&seen_by_us(&image), &bytes);
        assert_eq!(check(&file, None).corruptions, Vec::<String>::new());
    }
}

#[test]
fn chains_of_ours() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|depth| folder.path().join(format!("{depth}.vhd"))).collect();
    let mut bytes = vec![0; 6 << 20];
    for depth in 0..3usize {
        let file = Disk::open(&paths[depth], true);
        let mut below = Vec::new();
        if depth == 0 {
            create(&file, Some(6 << 20), None, &[]);
        } else {
            let parent = Disk::open(&paths[depth - 1], false);
            let relative = format!("./{}.vhd", depth - 1);
            create(
                &file,
                None,
                Some(link_to(&parent, &[&relative, paths[depth - 1].to_str().unwrap()])),
                &[],
            );
            for under in (0..depth).rev() {
                let file = Disk::open(&paths[under], false);
                below.push(layer(&file, false, (under > 0).then_some(6 << 20)).unwrap());
            }
        }
        let top = layer(&file, true, (depth > 0).then_some(6 << 20)).unwrap();
        let disk = Volume::new([vec![top], below].concat()).unwrap();
        // libvhdi 20260901 loses a parent's sectors from where a run of clear bits begins to the next multiple of eight.
        scribble(&disk, &mut bytes, 4096, depth as u64, 30);
        block_on(disk.close()).unwrap();
        assert_clean(&file);
        let chain: Vec<&Path> = paths[..=depth].iter().map(PathBuf::as_path).collect();
        same(&read(&disk, 0, 6 << 20).unwrap(), &bytes);
        if let Some(found) = seen_by_libvhdi(&chain) {
            same(&found, &bytes);
        }
    }
}
