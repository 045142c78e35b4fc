//! Goal: no damage does harm, what can be repaired without guessing is, and everything else is named. Method: a written image, spoilt in
//! one place; what check, repair and opening make of it. And disks that are refused by name.

use super::super::header::{Shape, SparseHeader};
use super::*;
use crate::error::ErrorKind;
use zerocopy::FromBytes;

/// Bytes of a grain of the images here.
const GRAIN: u64 = 4096;

/// An image in a file: grains 0, 1, 600 and 700 of the disk are there.
fn image(folder: &Path, options: &[(&str, &str)]) -> std::path::PathBuf {
    let path = folder.join("a.vmdk");
    let mut options = options.to_vec();
    options.push(("grain_size", "4k"));
    create(&path, Some(3 * MIB), None, &options).unwrap();
    let volume = open(&path, true).unwrap();
    for grain in [0, 1, 600, 700u64] {
        write(&volume, grain * GRAIN, &[grain as u8 + 1; GRAIN as usize]);
    }
    wait(volume.close()).unwrap();
    path
}

struct Bytes(Vec<u8>, std::path::PathBuf);

impl Bytes {
    fn of(path: &Path) -> Bytes {
        Bytes(std::fs::read(path).unwrap(), path.to_owned())
    }

    fn number(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.0[at as usize..at as usize + 4].try_into().unwrap())
    }

    fn set(&mut self, at: u64, number: u32) {
        self.0[at as usize..at as usize + 4].copy_from_slice(&number.to_le_bytes());
    }

    /// Where the entry of a grain is, in the table that counts or in its copy.
    fn entry(&self, grain: u64, copy: bool) -> u64 {
        let header = SparseHeader::read_from_prefix(&self.0).unwrap().0;
        let directory = if copy { header.redundant.get() } else { header.directory.get() };
        u64::from(self.number(directory * 512 + grain / 512 * 4)) * 512 + grain % 512 * 4
    }

    fn save(&self) {
        std::fs::write(&self.1, &self.0).unwrap();
    }
}

/// What is spoilt; what the check says; whether a repair mends it; what grain 600 reads then.
type Case = (&'static str, fn(&mut Bytes), &'static str, bool, Option<u8>);

const CASES: &[Case] = &[
    ("behind the end", |b| b.set(b.entry(600, false), 0x0100_0000), "behind the end", true, Some(89)),
    (
        "behind the end in both",
        |b| {
            b.set(b.entry(600, false), 0x0100_0000);
            b.set(b.entry(600, true), 0x0100_0000);
        },
        "behind the end",
        true,
        Some(0),
    ),
    ("on the header", |b| b.set(b.entry(600, false), 1), "on the header", true, Some(89)),
    (
        "on tables in both",
        |b| {
            b.set(b.entry(600, false), 32);
            b.set(b.entry(600, true), 33);
        },
        "on the header",
        false,
        None,
    ),
    (
        "two at one place",
        |b| b.set(b.entry(600, false), b.number(b.entry(1, false))),
        "overlaps",
        true,
        Some(89),
    ),
    (
        "two at one place in both",
        |b| {
            b.set(b.entry(600, false), b.number(b.entry(1, false)));
            b.set(b.entry(600, true), b.number(b.entry(1, false)));
        },
        "overlaps",
        false,
        Some(2),
    ),
    (
        "half over another",
        |b| b.set(b.entry(600, false), b.number(b.entry(1, false)) + 4),
        "overlaps",
        true,
        Some(89),
    ),
    (
        "a copy that differs",
        |b| b.set(b.entry(600, true), 0),
        "copies of grain tables differ",
        true,
        Some(89),
    ),
];

/// Where the directory's entry for grain 600 is.
fn directory_entry(bytes: &Bytes, copy: bool) -> u64 {
    let header = SparseHeader::read_from_prefix(&bytes.0).unwrap().0;
    (if copy { header.redundant.get() } else { header.directory.get() }) * 512 + 4
}

#[test]
fn damage_is_found_repaired_or_left_alone() {
    for (name, spoil, words, mends, then) in CASES {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), &[]);
        let mut bytes = Bytes::of(&path);
        spoil(&mut bytes);
        bytes.save();
        let found = check(&path, None);
        assert!(found.corruptions.iter().any(|line| line.contains(words)), "{name}: {:?}", found.corruptions);
        let of_tables = words.contains("copies");
        assert_eq!(
            open(&path, true).err().map(|error| error.kind),
            (!of_tables).then_some(ErrorKind::Corrupt),
            "{name}"
        );
        // Read-only the rest is served, whatever is wrong with one grain.
        let volume = open(&path, false).unwrap();
        assert_eq!(read(&volume, 700 * GRAIN, 4), [189; 4], "{name}");
        drop(volume);
        assert_eq!(Bytes::of(&path).0, bytes.0, "{name}: nothing is changed by looking");
        check(&path, Some(Repair::Leaks));
        assert_eq!(Bytes::of(&path).0, bytes.0, "{name}: leaks are no damage");
        let repaired = check(&path, Some(Repair::All));
        let clean = check(&path, None).corruptions.is_empty();
        assert_eq!(
            (clean, repaired.repaired_total > 0),
            (*mends, *mends),
            "{name}: {:?}",
            check(&path, None).corruptions
        );
        if let Some(then) = then {
            let volume = open(&path, *mends).unwrap();
            assert_eq!(read(&volume, 600 * GRAIN, 4), [*then; 4], "{name}");
        }
    }
}

#[test]
fn a_lost_table_comes_back_from_its_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), &[]);
    let mut bytes = Bytes::of(&path);
    bytes.set(directory_entry(&bytes, false), 0x00ff_ffff);
    bytes.save();
    assert!(check(&path, None).corruptions.iter().any(|line| line.contains("no grain table")));
    let volume = open(&path, false).unwrap();
    assert_eq!(read(&volume, 0, 4), [1; 4]);
    assert_eq!(wait(rig::read(&volume, 600 * GRAIN, 512)).unwrap_err().kind, ErrorKind::Corrupt);
    drop(volume);
    assert!(check(&path, Some(Repair::All)).repaired_total > 0);
    assert_clean(&path, "repaired");
    let volume = open(&path, true).unwrap();
    assert_eq!(read(&volume, 600 * GRAIN, 4), [89; 4]);
}

/// Goal: what a crash leaves between the two tables is no damage, and the next opening for writing mends it. Method: the header's mark with
/// a copy that is behind.
#[test]
fn copies_that_are_behind_after_a_crash_are_mended() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), &[]);
    let mut bytes = Bytes::of(&path);
    bytes.set(bytes.entry(600, true), 0);
    bytes.0[72] = 1;
    bytes.save();
    let found = check(&path, None);
    assert_eq!(found.corruptions, Vec::<String>::new());
    assert!(found.remarks.iter().any(|line| line.contains("not closed cleanly")), "{:?}", found.remarks);
    wait(open(&path, true).unwrap().close()).unwrap();
    let mended = Bytes::of(&path);
    assert_eq!(mended.number(mended.entry(600, true)), mended.number(mended.entry(600, false)));
    assert_eq!(mended.0[72], 0);
}

#[test]
fn space_behind_the_last_grain_is_a_leak() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), &[]);
    let whole = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(whole + 10 * GRAIN).unwrap();
    assert_eq!(check(&path, None).leaks_total, 1);
    assert_eq!(check(&path, Some(Repair::Leaks)).repaired_total, 1);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), whole);
    assert_clean(&path, "cut off");
}

/// Each line: where in the header which bytes are put; what is said.
#[test]
fn headers_that_cannot_be_are_refused() {
    let table: &[(usize, &[u8], &str)] = &[
        (0, b"KDMW", "no VMDK"),
        (4, &[4], "version 4"),
        (8, &[0x0b], "flags"),
        (12, &[0xff; 8], "capacity"),
        (12, &[0; 8], "grain tables"),
        (12, &[0, 0, 0, 0, 0x10, 0, 0, 0], "grain tables are"),
        (20, &[9], "grains of 4608"),
        (20, &[0; 8], "grains of 0"),
        (20, &[0, 0x20], "grains of 4194304"),
        (28, &[0xff, 0xff, 0xff], "descriptor"),
        (44, &[0, 1], "grain tables of 256"),
        (48, &[0xff, 0xff, 0xff, 0xff], "redundant grain directory"),
        (56, &[0, 0, 0xff, 0xff], "grain directory"),
        (56, &[0xff; 8], "footer"),
        (64, &[0xff, 0xff], "cut off"),
        (73, b"\r\n ", "transferred as text"),
        (77, &[1], "compression"),
        (77, &[2], "compression"),
    ];
    for (at, put, words) in table {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), &[]);
        let mut bytes = Bytes::of(&path);
        bytes.0[*at..at + put.len()].copy_from_slice(put);
        bytes.save();
        let error = files(&path, false).map(drop).unwrap_err();
        assert!(error.message.contains(words) && error.message.contains("a.vmdk"), "{at} {put:?}: {error}");
    }
}

/// Goal: what the descriptor and its extents say of each other is checked. Method: descriptors over files that are not like that.
#[test]
fn extents_must_be_what_the_descriptor_says() {
    let folder = tempfile::tempdir().unwrap();
    let single = image(folder.path(), &[]);
    std::fs::copy(&single, folder.path().join("sparse.vmdk")).unwrap();
    std::fs::write(folder.path().join("flat"), vec![7; 8192]).unwrap();
    let path = folder.path().join("d.vmdk");
    let head = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n";
    let table: &[(&str, Result<&str, &str>)] = &[
        ("RW 17 FLAT \"flat\" 0", Err("8192 bytes")),
        ("RW 16 FLAT \"flat\" 1", Err("8192 bytes")),
        ("RW 8 FLAT \"flat\" 0\nRW 8 FLAT \"flat\" 4", Err("over each other")),
        ("RW 6144 SPARSE \"sparse.vmdk\"\nRW 6144 SPARSE \"sparse.vmdk\"", Err("over each other")),
        ("RW 9999999 SPARSE \"sparse.vmdk\"", Err("its header says")),
        ("RW 16 SPARSE \"flat\"", Err("no sparse extent")),
        ("RW 8 FLAT \"flat\" 8\nRW 8 FLAT \"flat\" 0", Ok("written")),
        ("RW 8 FLAT \"flat\" 0\nRW 6144 SPARSE \"sparse.vmdk\"", Ok("written")),
        ("RW 1 FLAT \"flat\" 0\nRW 6144 SPARSE \"sparse.vmdk\"", Ok("no multiple")),
        ("RW 8 FLAT \"flat\" 0\nRW 8 ZERO", Ok("for reading alone")),
        ("RDONLY 8 FLAT \"flat\" 0", Ok("for reading alone")),
    ];
    for (extents, expected) in table {
        std::fs::write(&path, format!("{head}{extents}\n")).unwrap();
        let volume = open(&path, false);
        match expected {
            Err(words) => assert!(volume.unwrap_err().message.contains(words), "{extents}"),
            Ok(words) => {
                read(&volume.unwrap(), 0, 512);
                match open(&path, true) {
                    Ok(volume) => {
                        write(&volume, 1000, &[9; 5000]);
                        assert_eq!(read(&volume, 1000, 5000), [9; 5000]);
                        wait(volume.close()).unwrap();
                        assert_eq!(*words, "written", "{extents}");
                    }
                    Err(error) => assert!(error.message.contains(words), "{extents}: {error}"),
                }
            }
        }
    }
    // An extent of a split disk is none by itself, and a tracked disk is not written.
    create(&path, Some(3 * MIB), None, &[("subformat", "twoGbMaxExtentSparse")]).unwrap();
    let error = files(&folder.path().join("d-s001.vmdk"), false).map(drop).unwrap_err();
    assert!(error.message.contains("descriptor is in another file"), "{error}");
    std::fs::write(&path, format!("{head}changeTrackPath=\"d-ctk.vmdk\"\nRW 8 FLAT \"flat\" 0\n")).unwrap();
    assert!(open(&path, true).unwrap_err().message.contains("tracked"));
}

#[test]
fn shapes_of_both_kinds_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let shape = |path: &Path| {
        wait(Shape::read(&(Blocking::open(path, false).unwrap() as Rc<dyn ImageFile>))).unwrap()
    };
    let hosted = shape(&image(folder.path(), &[("zeroed_grain", "on")]));
    assert_eq!((hosted.tables(), hosted.grains(), hosted.version, hosted.zeroed), (2, 768, 2, true));
    let path = folder.path().join("c.vmdk");
    create(&path, Some(3 * MIB), None, &[("subformat", "vmfsSparse")]).unwrap();
    let cowd = shape(&folder.path().join("c-delta.vmdk"));
    assert_eq!((cowd.tables(), cowd.grains(), cowd.cowd, cowd.root), (2, 6144, true, true));
}
