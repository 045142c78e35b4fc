//! Goal: QEMU and we mean the same by an image, whoever made and wrote it, in all types of disks, also those in several files and of odd
//! sizes. Method: images made by both; writes by both in turn around the borders of grains, tables and extents; each reads what the other
//! wrote, both checkers find nothing.

use std::path::Path;

use super::*;
use crate::driver::Erase;

const GIB: u64 = 1 << 30;

/// Options, size in sectors.
const MATRIX: &[(&[(&str, &str)], u64)] = &[
    (&[], 1),
    (&[("adapter_type", "lsilogic"), ("hwversion", "9")], 2048),
    (&[("subformat", "monolithicSparse"), ("zeroed_grain", "on"), ("compat6", "on")], 70 * 2048 + 3),
    (&[("zeroed_grain", "on")], 5 * GIB / 512 + 129),
    (&[("subformat", "monolithicFlat")], 6145),
    (&[("subformat", "twoGbMaxExtentSparse")], (4 * GIB + 300 * MIB) / 512 + 1),
    (&[("subformat", "twoGbMaxExtentSparse"), ("zeroed_grain", "on")], 4 * GIB / 512),
    (&[("subformat", "twoGbMaxExtentFlat"), ("adapter_type", "legacyESX")], 4 * GIB / 512 + 77),
];

/// What was written: a byte at a place.
type Writes = Vec<(u64, u64, u8)>;

/// Places of interest of a disk, cut to its size.
fn places(size: u64, round: u8) -> Writes {
    let shift = u64::from(round) * 8192;
    let places = [
        (shift, 512),
        (64 << 10, 70_000),
        (32 * MIB - 4096 + shift, 9000),
        (2 * GIB - 1024 - shift, 5000),
        (4 * GIB - 512, 1024),
        (4 * GIB + 17 * MIB + shift, 200_000),
        (size - size.min(512), 512),
    ];
    let places = places.into_iter().filter(|(at, _)| *at < size).enumerate();
    places
        .map(|(number, (at, len))| {
            (at, (len / 512 * 512).max(512).min(size - at), number as u8 * 16 + round + 1)
        })
        .collect()
}

/// What a byte of the disk is.
fn expected(writes: &Writes, at: u64) -> u8 {
    writes
        .iter()
        .rev()
        .find(|(start, len, _)| (*start..start + len).contains(&at))
        .map_or(0, |(_, _, byte)| *byte)
}

/// Compares what we read with what was written, around all writes.
fn we_read(volume: &Volume, writes: &Writes, what: &str) {
    for (start, len, _) in writes {
        let from = start.saturating_sub(3000);
        let to = (start + len + 3000).min(volume.size());
        let found = read(volume, from, to - from);
        let wrong = (from..to).zip(&found).find(|(at, byte)| expected(writes, *at) != **byte);
        assert_eq!(wrong.map(|(at, byte)| (at, *byte)), None, "{what}");
    }
}

fn qemu_writes(folder: &Path, writes: &Writes) {
    let commands = writes.iter().map(|(at, len, byte)| format!("write -P {byte} {at} {len}"));
    qemu_io(folder, &commands.collect::<Vec<_>>()).unwrap();
}

/// QEMU finds the last write of each place.
fn qemu_reads(folder: &Path, writes: &Writes, size: u64, what: &str) {
    let mut commands = Vec::new();
    for (start, len, _) in writes {
        for at in (*start..start + len).step_by(512) {
            commands.push(format!("read -P {} {at} 512", expected(writes, at)));
        }
        if start + len + 512 <= size {
            commands.push(format!("read -P {} {} 512", expected(writes, start + len), start + len));
        }
    }
    for some in commands.chunks(400) {
        let said = qemu_io(folder, some).unwrap();
        assert!(!said.contains("verification failed"), "{what}: {said}");
    }
}

fn qemu_io(folder: &Path, commands: &[String]) -> Result<String, String> {
    let mut arguments = vec!["qemu-io", "-f", "vmdk", "-t", "unsafe"];
    commands.iter().for_each(|command| arguments.extend(["-c", command.as_str()]));
    arguments.push("a.vmdk");
    qemu(folder, &arguments)
}

/// Both write and read in turn.
fn round_trip(folder: &Path, what: &str, size: u64) {
    let path = folder.join("a.vmdk");
    let mut writes = Writes::new();
    for round in 0..4 {
        let new: Writes = places(size, round).into_iter().filter(|(at, len, _)| at + len <= size).collect();
        writes.extend(new.iter().copied());
        // Where there is no grain table yet QEMU writes over the header of the extent: of COWD extents it only reads.
        if round % 2 == 0 && !what.contains("vmfsSparse") {
            qemu_writes(folder, &new);
        } else {
            let volume = open(&path, true).unwrap();
            assert_eq!(volume.size(), size, "{what}");
            new.iter().for_each(|(at, len, byte)| write(&volume, *at, &vec![*byte; *len as usize]));
            // Zeroes over whole grains and parts of them.
            let zeroes = (4096, (200_000 & !511).min(size - size.min(4096)), 0);
            wait(volume.erase(zeroes.0.min(size), zeroes.1, Erase::Zero)).unwrap();
            if zeroes.1 > 0 {
                writes.push(zeroes);
            }
            wait(volume.flush()).unwrap();
            we_read(&volume, &writes, what);
            wait(volume.close()).unwrap();
        }
        we_read(&open(&path, false).unwrap(), &writes, what);
        qemu_reads(folder, &writes, size, what);
        qemu(folder, &["qemu-img", "check", "-q", "-f", "vmdk", "a.vmdk"]).unwrap();
        assert_clean(&path, what);
    }
}

fn option_list(options: &[(&str, &str)]) -> String {
    options.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

#[test]
fn images_of_qemu() {
    for (options, sectors) in MATRIX {
        let folder = tempfile::tempdir().unwrap();
        let (list, size) = (option_list(options), (sectors * 512).to_string());
        let mut arguments = vec!["qemu-img", "create", "-q", "-f", "vmdk"];
        if !list.is_empty() {
            arguments.extend(["-o", &list]);
        }
        arguments.extend(["a.vmdk", &size]);
        qemu(folder.path(), &arguments).unwrap();
        round_trip(folder.path(), &format!("{list} {sectors}"), sectors * 512);
    }
}

#[test]
fn images_of_ours() {
    let ours: &[(&[(&str, &str)], u64)] = &[
        (&[("grain_size", "4k")], 300 * 2048 + 5),
        (&[("grain_size", "2M"), ("zeroed_grain", "on")], 5 * GIB / 512),
        (&[("subformat", "vmfs")], 4097),
        (&[("subformat", "vmfsSparse"), ("grain_size", "4k")], 5 * GIB / 512 + 1),
        (&[("subformat", "vmfsSparse")], 40 * 2048),
        (
            &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "64M"), ("grain_size", "16k")],
            200 * 2048 + 9,
        ),
    ];
    for (options, sectors) in MATRIX.iter().chain(ours) {
        let folder = tempfile::tempdir().unwrap();
        create(&folder.path().join("a.vmdk"), Some(sectors * 512), None, options).unwrap();
        round_trip(folder.path(), &format!("ours: {options:?} {sectors}"), sectors * 512);
    }
}

/// Goal: the options have the names and effects that they have with qemu-img. Method: descriptors of both side by side, but for what is
/// random, and for the blanks of ours.
#[test]
fn descriptors_are_those_of_qemu() {
    for (options, sectors) in MATRIX {
        let folder = tempfile::tempdir().unwrap();
        let (list, size) = (option_list(options), (sectors * 512).to_string());
        let list = if list.is_empty() { "adapter_type=ide".to_owned() } else { list };
        qemu(folder.path(), &["qemu-img", "create", "-q", "-f", "vmdk", "-o", &list, "a.vmdk", &size])
            .unwrap();
        let theirs = text_of(&folder.path().join("a.vmdk"));
        create(&folder.path().join("a.vmdk"), Some(sectors * 512), None, options).unwrap();
        assert_eq!(text_of(&folder.path().join("a.vmdk")), theirs, "{list}");
    }
}

/// The lines of a descriptor, without blanks and identity.
fn text_of(path: &Path) -> Vec<String> {
    let own =
        wait(crate::vmdk::Own::read(&(Blocking::open(path, false).unwrap() as Rc<dyn ImageFile>))).unwrap();
    let text = String::from_utf8(own.descriptor.text).unwrap();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("CID="));
    lines.map(str::to_owned).collect()
}
