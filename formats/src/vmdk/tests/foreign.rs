//! Goal: images are read and written that are laid out as other programs do it: grain tables that are made when they are needed, grains
//! at any sector, no redundant tables (VirtualBox, ESX); and what is freed is used again. Method: such images made by hand.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::super::descriptor::{New, compose};
use super::super::header::{FLAG_NEWLINES, FLAG_REDUNDANT, SparseHeader};
use super::*;
use crate::driver::Erase;

const GRAIN: u64 = 65536;

/// An image of 70 MiB whose directories (at sectors 24 and 25) are empty, and the next sector is free.
fn bare(path: &Path, redundant: bool) {
    let extents = ["RW 143360 SPARSE \"a.vmdk\"".to_owned()];
    let new =
        New { cid: 0x1234, parent: None, create_type: "monolithicSparse", extents: &extents, database: &[] };
    let header = SparseHeader {
        version: U32::new(1),
        flags: U32::new(FLAG_NEWLINES | if redundant { FLAG_REDUNDANT } else { 0 }),
        capacity: U64::new(143_360),
        grain: U64::new(128),
        descriptor: U64::new(1),
        descriptor_len: U64::new(20),
        directory: U64::new(24),
        redundant: U64::new(if redundant { 25 } else { 0 }),
        overhead: U64::new(26),
        ..SparseHeader::new()
    };
    let mut file = vec![0; 26 * 512];
    file[..512].copy_from_slice(header.as_bytes());
    let text = compose(&new).unwrap();
    file[512..512 + text.len()].copy_from_slice(&text);
    std::fs::write(path, file).unwrap();
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn tables_are_made_when_they_are_needed() {
    for redundant in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.vmdk");
        bare(&path, redundant);
        assert_clean(&path, "bare");
        assert_eq!(read(&open(&path, false).unwrap(), 0, 70_000), vec![0; 70_000]);
        let volume = open(&path, true).unwrap();
        for at in [0, 33 * MIB + 500, 69 * MIB] {
            write(&volume, at, &[at as u8 | 3; 9000]);
        }
        wait(volume.erase(64 * MIB, MIB, Erase::Zero)).unwrap();
        wait(volume.close()).unwrap();
        assert_clean(&path, "written");
        let volume = open(&path, true).unwrap();
        for at in [0, 33 * MIB + 500, 69 * MIB] {
            assert_eq!(read(&volume, at, 9000), [at as u8 | 3; 9000]);
        }
        // QEMU writes to both tables of an entry: it must find them.
        drop(volume);
        let commands =
            ["qemu-io", "-f", "vmdk", "-c", "write -P 9 1M 64k", "-c", "read -P 3 0 9000", "a.vmdk"];
        assert!(!qemu(folder.path(), &commands).unwrap().contains("failed"));
        assert_eq!(read(&open(&path, false).unwrap(), MIB, 65536), vec![9; 65536]);
        assert_clean(&path, "written by QEMU");
    }
}

/// Goal: grains at places that are no multiples of their size are told apart. Method: a table and two grains at odd sectors, then one of
/// them moved half over the other.
#[test]
fn grains_lie_at_any_sector() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmdk");
    bare(&path, false);
    // The table at sector 26, grains at 30 + 1 and behind it.
    put(&path, 24 * 512, &26u32.to_le_bytes());
    put(&path, 26 * 512, &[31u32.to_le_bytes(), 159u32.to_le_bytes()].concat());
    put(&path, 31 * 512, &[1; 65536]);
    put(&path, 159 * 512, &[2; 65536]);
    assert_clean(&path, "odd places");
    let volume = open(&path, true).unwrap();
    assert_eq!(read(&volume, GRAIN - 2, 4), [1, 1, 2, 2]);
    write(&volume, GRAIN - 1, &[7; 2]);
    write(&volume, 40 * MIB, &[8; 100]);
    wait(volume.erase(0, GRAIN, Erase::Zero)).unwrap();
    wait(volume.close()).unwrap();
    let volume = open(&path, true).unwrap();
    assert_eq!([read(&volume, GRAIN - 2, 4), read(&volume, 40 * MIB, 2)], [vec![0, 0, 7, 2], vec![8, 8]]);
    wait(volume.close()).unwrap();
    put(&path, 26 * 512, &60u32.to_le_bytes());
    assert!(check(&path, None).corruptions.iter().any(|line| line.contains("overlaps")));
}

/// Goal: a disk that is written and erased again and again takes no more space than it needs. Method: twenty rounds over the same 8 MiB, in
/// one opening and in several.
#[test]
fn freed_places_are_used_again() {
    for reopen in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.vmdk");
        create(&path, Some(64 * MIB), None, &[]).unwrap();
        let mut volume = open(&path, true).unwrap();
        for round in 0..20u8 {
            write(&volume, u64::from(round % 3) * 8 * MIB, &vec![round + 1; 8 << 20]);
            wait(volume.erase(u64::from(round % 3) * 8 * MIB, 8 * MIB, Erase::Zero)).unwrap();
            if reopen {
                wait(volume.close()).unwrap();
                volume = open(&path, true).unwrap();
            }
        }
        let length = std::fs::metadata(&path).unwrap().len();
        assert!(length < 40 << 20, "{length} bytes");
        wait(volume.close()).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 1 << 20, "nothing is left of it");
        assert_clean(&path, "erased");
    }
}

/// Goal: a disk grows past what its grain directory has room for, by what the format allows, and what it cannot do it refuses by name.
/// Method: sizes around the borders of tables and directories, read by QEMU; refusals.
#[test]
fn disks_grow() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmdk");
    create(&path, Some(MIB + 512), None, &[]).unwrap();
    let mut written = Vec::new();
    for size in [2 * MIB, 32 * MIB, 33 * MIB + 512, 9 << 30, (20 << 30) + 1536u64] {
        let volume = open(&path, true).unwrap();
        let old = volume.size();
        write(&volume, old - 512, &[1; 512]);
        wait(volume.resize(size)).unwrap();
        assert_eq!(read(&volume, old - 512, 1024), [[1; 512], [0; 512]].concat());
        write(&volume, size - 700, &[2; 700]);
        written.extend([(old - 512, 1u8), (size - 512, 2)]);
        wait(volume.close()).unwrap();
        assert_clean(&path, &format!("grown to {size}"));
        let info = qemu(folder.path(), &["qemu-img", "info", "-f", "vmdk", "a.vmdk"]).unwrap();
        assert!(info.contains(&format!("({size} bytes)")), "{info}");
        for (at, byte) in &written {
            let byte = written.iter().rev().find(|(other, _)| other == at).map_or(*byte, |(_, byte)| *byte);
            let command = format!("read -P {byte} {at} 512");
            let said =
                qemu(folder.path(), &["qemu-io", "-r", "-f", "vmdk", "-c", &command, "a.vmdk"]).unwrap();
            assert!(!said.contains("failed"), "{command}: {said}");
        }
        qemu(folder.path(), &["qemu-img", "check", "-q", "-f", "vmdk", "a.vmdk"]).unwrap();
    }
    let volume = open(&path, true).unwrap();
    for (size, words) in [(MIB, "smaller"), ((20 << 30) + 1537, "multiple of 512"), (1 << 46, "convert")] {
        let error = wait(volume.resize(size)).unwrap_err();
        assert!(error.message.contains(words), "{size}: {error}");
    }
    for (options, size, words) in [
        (&[("subformat", "vmfsSparse")][..], 2 * MIB, "convert"),
        (&[("subformat", "twoGbMaxExtentFlat")][..], 3 << 30, "up to 2 GiB"),
    ] {
        create(&path, Some(MIB), None, options).unwrap();
        let volume = open(&path, true).unwrap();
        let error = wait(volume.resize(size)).unwrap_err();
        assert!(error.message.contains(words), "{error}");
    }
}

/// Goal: options that make no sense are refused by name, and devices are told that they cannot grow. Method: a table.
#[test]
fn options_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmdk");
    let table: &[(&[(&str, &str)], &str)] = &[
        (&[("subformat", "fullDevice")], "monolithicSparse"),
        (&[("adapter_type", "nvme")], "lsilogic"),
        (&[("hwversion", "x\"")], "number"),
        (&[("hwversion", "9"), ("compat6", "on")], "compat6"),
        (&[("zeroed_grain", "maybe")], "on or off"),
        (&[("grain_size", "3000")], "power of two"),
        (&[("grain_size", "512")], "power of two"),
        (&[("grain_size", "4M")], "power of two"),
        (&[("extent_size", "3G")], "2G"),
        (&[("subformat", "monolithicFlat"), ("zeroed_grain", "on")], "flat"),
        (&[("subformat", "vmfsSparse"), ("zeroed_grain", "on")], "zeroed_grain"),
        (&[("preallocation", "full")], "no option preallocation"),
    ];
    for (options, words) in table {
        let error = create(&path, Some(MIB), None, options).unwrap_err();
        assert!(error.message.contains(words), "{options:?}: {error}");
    }
    for (size, words) in [(0, "a size of"), (1 << 42, "a size of")] {
        assert!(create(&path, Some(size), None, &[]).unwrap_err().message.contains(words));
    }
    assert!(create(&path, None, None, &[]).unwrap_err().message.contains("needs a size"));
}
