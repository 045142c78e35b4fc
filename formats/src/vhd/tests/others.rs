//! Goal: images of QEMU are read and written here as QEMU reads them, and ours there; libvhdi agrees. Method: `qemu-img`, `qemu-io` and, where it is
//! there, Python's `pyvhdi` on files in a temporary folder. A missing program is printed and skipped.

use std::path::{Path, PathBuf};

use super::*;
use crate::testing::DiskFile;
use crate::testing::at_once::same;
use crate::testing::programs::{have_qemu, libvhdi_reads, must_run, qemu_reads};

fn open_file(path: &Path, writable: bool) -> Rc<dyn ImageFile> {
    DiskFile::open(path, writable)
}

/// What `qemu-img` reads from an image.
fn seen_by_qemu(image: &Path) -> Vec<u8> {
    qemu_reads(image.parent().unwrap(), "vpc", image.to_str().unwrap(), None)
}

/// What we read.
fn seen_by_us(image: &Path) -> Vec<u8> {
    let disk = volume(&open_file(image, false), false);
    read(&disk, 0, disk.size()).unwrap()
}

/// Runs QEMU's tools.
fn qemu(program: &str, arguments: &[&str]) {
    must_run(Path::new("."), &[&[program], arguments].concat());
}

/// Random changes of multiples of `unit`, here, on an open image and on a copy of its bytes.
fn scribble(disk: &Volume, bytes: &mut [u8], unit: u64, seed: u64, steps: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..steps {
        at_once::change(disk, bytes, unit, &mut rng).unwrap();
    }
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.vhd");
    (folder, image)
}

#[test]
fn images_of_qemu() {
    if !have_qemu() {
        return;
    }
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
        qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, name, size]);
        if index < 4 {
            let writes = ["-c", "write -P 17 512 1024", "-c", "write -P 18 2200000 512k"];
            qemu("qemu-io", &[&["-f", "vpc"], &writes[..], &[name]].concat());
        }
        let mut bytes = seen_by_qemu(&image);
        same("we", &seen_by_us(&image), &bytes);
        let file = open_file(&image, true);
        assert_clean(&file);
        let disk = volume(&file, true);
        scribble(&disk, &mut bytes, 512, index as u64, 60);
        block_on(disk.close()).unwrap();
        assert_clean(&file);
        same("we", &seen_by_us(&image), &bytes);
        same("QEMU", &seen_by_qemu(&image), &bytes);
        if let Some(found) = libvhdi_reads(&[&image]) {
            same("libvhdi", &found, &bytes);
        }
        // And QEMU goes on where we stopped.
        if bytes.len() > 1 << 20 {
            qemu("qemu-io", &["-f", "vpc", "-c", "write -P 99 1000k 3k", name]);
            bytes[1000 << 10..1003 << 10].fill(99);
            same("we", &seen_by_us(&image), &bytes);
            assert_eq!(check(&file, None).corruptions, Vec::<String>::new());
        }
    }
}

#[test]
fn images_of_ours() {
    if !have_qemu() {
        return;
    }
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
        let file = open_file(&image, true);
        create(&file, Some(size), None, options);
        let disk = volume(&file, true);
        let mut bytes = vec![0; disk.size() as usize];
        scribble(&disk, &mut bytes, 512, 100 + index as u64, 40);
        let grown = disk.size() + (3 << 20);
        block_on(disk.resize(grown)).unwrap();
        bytes.resize(grown as usize, 0);
        scribble(&disk, &mut bytes, 512, 200 + index as u64, 40);
        block_on(disk.close()).unwrap();
        same("we", &seen_by_us(&image), &bytes);
        // QEMU takes the geometry of a creator that it does not know for the size.
        let by_geometry = options.contains(&("creator", "vbox"));
        let found = seen_by_qemu(&image);
        let len = if by_geometry { found.len().min(bytes.len()) } else { bytes.len() };
        same("QEMU", &found[..len.min(found.len())], &bytes[..len]);
        if let Some(found) = libvhdi_reads(&[&image]) {
            // It takes the original size for the current one.
            same("libvhdi", &found, &bytes[..found.len()]);
        }
        // QEMU writes to it.
        let name = image.to_str().unwrap();
        qemu("qemu-io", &["-f", "vpc", "-c", "write -P 77 1500k 700k", name]);
        bytes[1500 << 10..2200 << 10].fill(77);
        same("we", &seen_by_us(&image), &bytes);
        assert_eq!(check(&file, None).corruptions, Vec::<String>::new());
    }
}

#[test]
fn chains_of_ours() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|depth| folder.path().join(format!("{depth}.vhd"))).collect();
    let mut bytes = vec![0; 6 << 20];
    for depth in 0..3usize {
        let file = open_file(&paths[depth], true);
        let mut below = Vec::new();
        if depth == 0 {
            create(&file, Some(6 << 20), None, &[]);
        } else {
            let parent = open_file(&paths[depth - 1], false);
            let relative = format!("./{}.vhd", depth - 1);
            create(
                &file,
                None,
                Some(link_to(&parent, &[&relative, paths[depth - 1].to_str().unwrap()])),
                &[],
            );
            for under in (0..depth).rev() {
                let file = open_file(&paths[under], false);
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
        same("we", &read(&disk, 0, 6 << 20).unwrap(), &bytes);
        if let Some(found) = libvhdi_reads(&chain) {
            same("libvhdi", &found, &bytes);
        }
    }
}
