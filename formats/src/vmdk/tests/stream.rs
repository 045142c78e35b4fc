//! Goal: streams of others are read, ours are read by others, and no stream does harm. Method: disks with bytes that do and do not
//! compress, converted by QEMU and by us; tables behind the grains, as VMware puts them; markers and grains that lie.

use super::*;
use crate::codec::{self, Method};
use crate::error::ErrorKind;
use crate::raw_driver::Raw;
use crate::tools::encode::copy_encoded;

const GRAIN: usize = 65536;

/// A disk in a raw file: text, zeroes, noise.
fn raw(path: &Path, sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; sectors as usize * 512];
    let mut rng = fastrand::Rng::with_seed(sectors);
    for (number, grain) in bytes.chunks_mut(GRAIN).enumerate() {
        match number % 4 {
            0 => {
                grain.iter_mut().zip(b"a stream of grains ".iter().cycle()).for_each(|(to, from)| *to = *from)
            }
            1 => rng.fill(grain),
            2 => grain[grain.len() / 2] = 7,
            _ => {}
        }
    }
    std::fs::write(path, &bytes).unwrap();
    bytes
}

fn volume_of(path: &Path) -> Volume {
    let files: Vec<Rc<dyn ImageFile>> = vec![Blocking::open(path, false).unwrap()];
    let open = Open {
        files: files.clone(),
        writable: false,
        below_size: None,
        budget: Budget::new(1 << 20),
        log: None,
        snapshot: None,
        key: None,
    };
    Volume::new(vec![Layer { driver: wait(Raw.open(open)).unwrap(), files }]).unwrap()
}

/// Makes a stream of a raw file; returns what it holds.
fn make(folder: &Path, sectors: u64, options: &[(&str, &str)]) -> Vec<u8> {
    let bytes = raw(&folder.join("a.raw"), sectors);
    let path = folder.join("a.vmdk");
    let options = [&[("subformat", "streamOptimized")], options].concat();
    create(&path, Some(sectors * 512), None, &options).unwrap();
    let target = open(&path, true).unwrap();
    wait(copy_encoded(&volume_of(&folder.join("a.raw")), &target, &(), &())).unwrap();
    wait(target.flush()).unwrap();
    wait(target.close()).unwrap();
    bytes
}

fn same(path: &Path, bytes: &[u8], what: &str) {
    let volume = open(path, false).unwrap();
    assert_eq!(volume.size(), bytes.len() as u64, "{what}");
    assert!(read(&volume, 0, volume.size()) == bytes, "{what}");
    // Small reads within grains, and over their borders.
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..50 {
        let at = rng.usize(..bytes.len());
        let len = rng.usize(1..5000).min(bytes.len() - at);
        assert!(read(&volume, at as u64, len as u64) == bytes[at..at + len], "{what}: {len} at {at}");
    }
    assert_clean(path, what);
    let error = open(path, true).map(drop).unwrap_err();
    assert!(error.message.contains("stream-optimized"), "{error}");
}

#[test]
fn streams_of_qemu_are_read() {
    for sectors in [1, 128, 2048, 70_000, 33 * 2048 + 5] {
        let folder = tempfile::tempdir().unwrap();
        let bytes = raw(&folder.path().join("a.raw"), sectors);
        let to = ["-O", "vmdk", "-o", "subformat=streamOptimized", "a.raw", "a.vmdk"];
        qemu(folder.path(), &[&["qemu-img", "convert", "-f", "raw"][..], &to].concat()).unwrap();
        same(&folder.path().join("a.vmdk"), &bytes, &format!("{sectors} sectors"));
    }
}

#[test]
fn streams_of_ours_are_read_by_qemu() {
    for (sectors, options) in [
        (1, &[][..]),
        (2048 + 3, &[("grain_size", "4k")]),
        (70_000, &[]),
        (33 * 2048 + 5, &[("adapter_type", "lsilogic")]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let bytes = make(folder.path(), sectors, options);
        same(&folder.path().join("a.vmdk"), &bytes, &format!("ours, {sectors} sectors"));
        let arguments = ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", "a.vmdk", "b.raw"];
        qemu(folder.path(), &arguments).unwrap();
        assert!(std::fs::read(folder.path().join("b.raw")).unwrap() == bytes, "{sectors} sectors");
        qemu(folder.path(), &["qemu-img", "check", "-q", "-f", "vmdk", "a.vmdk"]).unwrap();
        let length = std::fs::metadata(folder.path().join("a.vmdk")).unwrap().len();
        assert!(length < bytes.len() as u64 / 2 + (256 << 10), "{length} bytes for {}", bytes.len());
    }
}

/// Goal: a stream is written once, and only as one. Method: everything else that can be done to one that is being made.
#[test]
fn a_stream_takes_each_grain_once_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmdk");
    create(&path, Some(MIB), None, &[("subformat", "streamOptimized")]).unwrap();
    let volume = open(&path, true).unwrap();
    let driver = &volume.layers()[0].driver;
    let grain = || codec::encode(Method::Zlib, &[5; GRAIN], 2 * GRAIN).unwrap();
    wait(driver.write_encoded(vec![(0, grain()), (65536, grain())])).unwrap();
    assert_eq!(read(&volume, 65530, 12), [5; 12]);
    assert!(wait(driver.write_encoded(vec![(0, grain())])).unwrap_err().message.contains("once"));
    assert!(wait(rig::write(&volume, 4096, &[1; 512])).unwrap_err().message.contains("convert -c"));
    assert!(wait(rig::write(&volume, 900_000, &[1; 512])).unwrap_err().message.contains("convert -c"));
    assert_eq!(wait(volume.resize(2 * MIB)).unwrap_err().kind, ErrorKind::Unsupported);
    wait(volume.close()).unwrap();
    same(&path, &[vec![5; 2 * GRAIN], vec![0; (1 << 20) - 2 * GRAIN]].concat(), "two grains");
    let unmade = create(&path, Some(MIB), Some(&path), &[("subformat", "streamOptimized")]).unwrap_err();
    assert!(unmade.message.contains("no parent"), "{unmade}");
}

/// Puts the directory and the only table of a stream behind its grains, with the footer that VMware writes.
fn tables_to_the_end(path: &Path) {
    let mut file = std::fs::read(path).unwrap();
    let number = |file: &[u8], at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let directory = number(&file, 56) as usize * 512;
    let table = u32::from_le_bytes(file[directory..directory + 4].try_into().unwrap()) as usize * 512;
    let entries = file[table..table + 2048].to_vec();
    let marker = |sectors: u64, kind: u8| {
        let mut marker = vec![0; 512];
        marker[..8].copy_from_slice(&sectors.to_le_bytes());
        marker[12] = kind;
        marker
    };
    file[directory..directory + 512].fill(0xee);
    file[table..table + 2048].fill(0xee);
    // In place of the marker that ends the stream.
    file.truncate(file.len() - 512);
    file.extend(marker(4, 1));
    let table = (file.len() / 512) as u32;
    file.extend(entries);
    file.extend(marker(1, 2));
    let directory = (file.len() / 512) as u64;
    let mut entry = vec![0; 512];
    entry[..4].copy_from_slice(&table.to_le_bytes());
    file.extend(entry);
    file.extend(marker(1, 3));
    let mut footer = file[..512].to_vec();
    footer[56..64].copy_from_slice(&directory.to_le_bytes());
    file.extend(footer);
    file.extend(marker(0, 0));
    file[56..64].fill(0xff);
    std::fs::write(path, file).unwrap();
}

#[test]
fn tables_at_the_end_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = make(folder.path(), 20 * 2048, &[]);
    let path = folder.path().join("a.vmdk");
    tables_to_the_end(&path);
    same(&path, &bytes, "tables at the end");
    qemu(folder.path(), &["qemu-img", "convert", "-f", "vmdk", "-O", "raw", "a.vmdk", "b.raw"]).unwrap();
    assert!(std::fs::read(folder.path().join("b.raw")).unwrap() == bytes, "QEMU reads it, too");
    let whole = std::fs::read(&path).unwrap();
    for (name, spoil) in [
        ("cut off", (|file: &mut Vec<u8>| file.truncate(file.len() - 512)) as fn(&mut Vec<u8>)),
        ("no end", |file| {
            let end = file.len() - 500;
            file[end] = 1;
        }),
        ("no directory", |file| {
            let footer = file.len() - 1024;
            file[footer + 56..footer + 64].fill(0xff);
        }),
    ] {
        let mut file = whole.clone();
        spoil(&mut file);
        std::fs::write(&path, file).unwrap();
        let error = files(&path, false).map(drop).unwrap_err();
        assert!(error.message.contains("cut off"), "{name}: {error}");
    }
}

/// Goal: a marker or a grain that lies is an error of the requests that need it. Method: the second grain of a stream, spoilt in
/// several ways, a bomb among them.
#[test]
fn what_lies_is_an_error_for_its_range() {
    let bomb = codec::encode(Method::Zlib, &vec![0; 4 << 20], GRAIN).unwrap();
    let short = codec::encode(Method::Zlib, &[1; 4096], GRAIN).unwrap();
    let marked = |sector: u64, data: &[u8]| {
        [&sector.to_le_bytes(), &(data.len() as u32).to_le_bytes()[..], data].concat()
    };
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("another sector", marked(64, &short), "sector 64"),
        ("no bytes", marked(128, &[]), "0 bytes"),
        ("too many", [&128u64.to_le_bytes()[..], &[0xff; 4]].concat(), "4294967295 bytes"),
        ("behind the end", [&128u64.to_le_bytes()[..], &[0, 0, 2, 0]].concat(), "131072 bytes"),
        ("a bomb", marked(128, &bomb), "more than 65536 bytes"),
        ("too short", marked(128, &short), "4096 bytes instead of 65536"),
        ("noise", marked(128, &[0xa5; 100]), "zlib"),
        ("cut off", marked(128, &bomb[..20]), "end within"),
    ];
    for (name, bytes, words) in cases {
        let folder = tempfile::tempdir().unwrap();
        let whole = make(folder.path(), 4 * 128, &[]);
        let path = folder.path().join("a.vmdk");
        let mut file = std::fs::read(&path).unwrap();
        let at = (0..file.len() / 512)
            .rev()
            .find(|sector| file[sector * 512..].starts_with(&128u64.to_le_bytes()))
            .unwrap()
            * 512;
        file[at..at + bytes.len()].copy_from_slice(&bytes);
        std::fs::write(&path, file).unwrap();
        let volume = open(&path, false).unwrap();
        let error = wait(rig::read(&volume, 65536, 512)).unwrap_err();
        assert!(error.kind == ErrorKind::Corrupt && error.message.contains(words), "{name}: {error}");
        assert!(read(&volume, 0, 65536) == whole[..65536], "{name}: the grain before");
        assert!(read(&volume, 2 * 65536, 65536) == whole[2 * 65536..3 * 65536], "{name}: the grain behind");
    }
}
