//! Where the memory of RAM disks comes from and ends: the limit, a full file system, huge pages, restarts, first contents.
//!
//! Goal: every shortage is an answer with the rest of the disk unharmed, never SIGBUS; a file outlives its server and is taken up
//! again only when it fits; first contents are there, holes included; every refusal says what to do.
//! Method: real files on tmpfs, a mount of 1 MiB, and hugetlbfs where the host lets us (a skip is printed otherwise).

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::fstat;
use shard::ram::{
    PageSize, RamBudget, RamDisk, RamError, RamErrorKind, RamExtent, RamOutcome, anonymous_backing,
    open_backing, publish_backing, remove_backing,
};
use tempfile::TempDir;

const BLOCK: usize = 4096;
const MIB: u64 = 1 << 20;

fn budget(limit: u64) -> Arc<RamBudget> {
    Arc::new(RamBudget::new(limit))
}

/// A disk without a name on base pages, a second descriptor of its file, and its budget.
fn disk(size: u64, limit: u64) -> (Arc<RamDisk>, OwnedFd, Arc<RamBudget>) {
    let file = anonymous_backing("space", size, PageSize::Base).expect("memfd");
    let (other, budget) = (file.try_clone().expect("dup"), budget(limit));
    let disk = RamDisk::create(file, "space", size, PageSize::Base, Arc::clone(&budget)).expect("create");
    (disk, other, budget)
}

fn read(disk: &RamDisk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    assert_eq!(disk.read(offset, &mut bytes), RamOutcome::Done);
    bytes
}

/// A directory on tmpfs.
fn memory_dir() -> (TempDir, File) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a tmpfs on /dev/shm");
    let handle = File::open(dir.path()).expect("open");
    (dir, handle)
}

/// A file system mounted for one test; unmounted when dropped.
struct Mounted {
    path: PathBuf,
    _dir: TempDir,
}

impl Mounted {
    fn new(kind: &str, options: &str) -> Option<Mounted> {
        let dir = tempfile::tempdir().expect("temporary directory");
        if let Err(errno) = mount(Some("none"), dir.path(), Some(kind), MsFlags::empty(), Some(options)) {
            println!("SKIPPED: cannot mount {kind}: {errno} (needs root)");
            return None;
        }
        Some(Mounted { path: dir.path().to_owned(), _dir: dir })
    }

    fn open(&self) -> File {
        File::open(&self.path).expect("open mount point")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a descriptor may still be open in a test that failed.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

#[test]
fn the_limit_is_no_space_and_can_be_raised() {
    let (disk, _file, budget) = disk(MIB, 3 * BLOCK as u64);
    let other_file = anonymous_backing("other", MIB, PageSize::Base).expect("memfd");
    let other =
        RamDisk::create(other_file, "other", MIB, PageSize::Base, Arc::clone(&budget)).expect("create");
    assert_eq!(disk.write(0, &[1; 2 * BLOCK]), RamOutcome::Done);
    assert_eq!(other.write(0, &[2; 2 * BLOCK]), RamOutcome::NoSpace, "the limit is on the sum");
    assert_eq!(read(&other, 0, BLOCK), [2; BLOCK], "what fitted is there");
    assert_eq!(read(&other, BLOCK as u64, BLOCK), [0; BLOCK]);
    assert_eq!(disk.write(100, &[3; 2 * BLOCK - 100]), RamOutcome::Done, "memory that is there stays usable");
    assert_eq!(disk.write_zeroes(2 * BLOCK as u64, 1, false), RamOutcome::NoSpace);
    assert_eq!(disk.discard(0, BLOCK as u64), RamOutcome::Done);
    assert_eq!(
        other.write(BLOCK as u64, &[2; BLOCK]),
        RamOutcome::Done,
        "what one gives back another can have"
    );
    assert_eq!(disk.write(0, &[1; BLOCK]), RamOutcome::NoSpace);
    budget.set_limit_bytes(4 * BLOCK as u64);
    assert_eq!(disk.write(0, &[1; BLOCK]), RamOutcome::Done);
    assert_eq!(budget.used_bytes(), 4 * BLOCK as u64);
    drop(other);
    assert_eq!(budget.used_bytes(), 2 * BLOCK as u64);
}

#[test]
fn a_full_file_system_is_no_space_and_no_signal() {
    let Some(mount) = Mounted::new("tmpfs", "size=1M") else { return };
    let dir = mount.open();
    let size = 8 * MIB;
    let backing = open_backing(dir.as_fd(), "full", size, PageSize::Base).expect("backing");
    let disk = RamDisk::create(backing.file, "full", size, PageSize::Base, budget(64 * MIB)).expect("create");
    let mut written = Vec::new();
    for block in 0..size / BLOCK as u64 {
        match disk.write(block * BLOCK as u64, &[block as u8 | 1; BLOCK]) {
            RamOutcome::Done => written.push(block),
            RamOutcome::NoSpace => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(written.len(), 256, "every page of the file system is used");
    assert_eq!(disk.allocated_bytes(), MIB);
    for &block in &written {
        assert_eq!(read(&disk, block * BLOCK as u64, BLOCK), [block as u8 | 1; BLOCK]);
    }
    assert_eq!(read(&disk, size - BLOCK as u64, BLOCK), [0; BLOCK], "a hole reads although nothing is free");
    assert_eq!(disk.discard(written[7] * BLOCK as u64, BLOCK as u64), RamOutcome::Done);
    assert_eq!(
        disk.write(size - 512, &[9; 512]),
        RamOutcome::Done,
        "a page that was given back serves elsewhere"
    );
}

#[test]
fn a_disk_outlives_its_server() {
    let (path, dir) = memory_dir();
    let size = MIB + 512;
    let open = || open_backing(dir.as_fd(), "d1", size, PageSize::Base);
    let total = budget(64 * MIB);
    let create =
        |file| RamDisk::create(file, "d1", size, PageSize::Base, Arc::clone(&total)).expect("create");

    let backing = open().expect("new");
    assert!(!backing.taken_up);
    let disk = create(backing.file);
    assert_eq!(disk.write(0, &[1; 5000]), RamOutcome::Done);
    drop(disk);
    let backing = open().expect("new again");
    assert!(!backing.taken_up, "an unpublished file is an attempt that did not end, and starts empty");
    let disk = create(backing.file);
    assert_eq!(read(&disk, 0, 5000), [0; 5000]);
    publish_backing(dir.as_fd(), "d1").expect("publish");

    assert_eq!(open().expect_err("open elsewhere").kind, RamErrorKind::Busy);
    assert_eq!(disk.write(size - 512, &[2; 512]), RamOutcome::Done);
    assert_eq!(disk.write(200 << 10, &[3; 8192]), RamOutcome::Done);
    assert_eq!(disk.discard(200 << 10, 4096), RamOutcome::Done);
    drop(disk);
    assert_eq!(total.used_bytes(), 0);

    let wrong = open_backing(dir.as_fd(), "d1", size + 512, PageSize::Base).expect_err("another size");
    assert_eq!(wrong.kind, RamErrorKind::Mismatch);
    assert!(wrong.message.contains("1049088") && wrong.message.contains("d1"), "{wrong}");
    total.set_limit_bytes(0); // what exists is taken up whatever the limit
    let backing = open().expect("take up");
    assert!(backing.taken_up);
    let disk = create(backing.file.try_clone().expect("dup"));
    assert_eq!(read(&disk, size - 512, 512), [2; 512]);
    assert_eq!(read(&disk, 200 << 10, 4096), [0; 4096]);
    assert_eq!(read(&disk, (200 << 10) + 4096, 4096), [3; 4096]);
    assert_eq!(disk.allocated_bytes(), 2 * 4096, "memory that was allocated and never used is given back");
    assert_eq!(fstat(&backing.file).expect("stat").st_blocks, 16);
    assert_eq!(total.used_bytes(), 2 * 4096);
    assert_eq!(disk.write(0, &[1; 512]), RamOutcome::NoSpace, "but nothing is added above it");

    remove_backing(dir.as_fd(), "d1").expect("remove");
    remove_backing(dir.as_fd(), "d1").expect("twice is no error");
    assert_eq!(fs::read_dir(path.path()).expect("list").count(), 0);
    assert_eq!(read(&disk, size - 512, 512), [2; 512], "in use until the last user goes");
}

#[test]
fn refusals_name_the_thing_and_the_remedy() {
    let (path, dir) = memory_dir();
    let try_open = |name: &str, size, page| open_backing(dir.as_fd(), name, size, page).expect_err("refused");
    let check = |error: RamError, kind, part: &str| {
        assert!(error.kind == kind && error.message.contains(part), "{:?}: {error}", error.kind);
    };
    for name in ["", "a/b", "nul\0", &"x".repeat(201)] {
        check(try_open(name, MIB, PageSize::Base), RamErrorKind::Invalid, "name");
        assert!(remove_backing(dir.as_fd(), name).is_err() && publish_backing(dir.as_fd(), name).is_err());
    }
    for size in [0, 511, 1000, 1 << 60, u64::MAX] {
        check(try_open("d", size, PageSize::Base), RamErrorKind::Invalid, "multiple of 512");
    }
    check(try_open("d", MIB, PageSize::Huge2M), RamErrorKind::Invalid, "2 MiB");
    check(try_open("d", 2 * MIB, PageSize::Huge2M), RamErrorKind::WrongFileSystem, "hugetlbfs");
    let root = File::open("/proc").expect("proc");
    let error = open_backing(root.as_fd(), "d", MIB, PageSize::Base).expect_err("no tmpfs");
    check(error, RamErrorKind::WrongFileSystem, "tmpfs");

    // What another user could have put there is not trusted: he could truncate it under the mapping.
    let foreign = path.path().join("d.ram");
    fs::write(&foreign, vec![0; MIB as usize]).expect("write");
    fs::set_permissions(&foreign, fs::Permissions::from_mode(0o666)).expect("chmod");
    check(try_open("d", MIB, PageSize::Base), RamErrorKind::Mismatch, "mode");
    fs::remove_file(&foreign).expect("remove");
    std::os::unix::fs::symlink("/etc/passwd", &foreign).expect("symlink");
    check(try_open("d", MIB, PageSize::Base), RamErrorKind::Io, "open");

    let file = anonymous_backing("short", MIB, PageSize::Base).expect("memfd");
    let error =
        RamDisk::create(file, "short", 2 * MIB, PageSize::Base, budget(MIB)).expect_err("file too short");
    check(error, RamErrorKind::Mismatch, "1048576");
}

#[test]
fn first_contents_are_loaded_without_their_holes() {
    let source = tempfile::tempfile().expect("temporary file");
    source.set_len(3 * MIB + 700).expect("size");
    source.write_all_at(&[5; 6000], 8192 + 100).expect("write");
    source.write_all_at(&[0; 65536], 1 << 20).expect("zeroes");
    source.write_all_at(&[6; 10], 3 * MIB + 690).expect("end");
    let (disk, file, _budget) = disk(4 * MIB, 64 * MIB);
    disk.load_initial(&source).expect("load");
    let mut expected = vec![0; 3 << 20];
    source.read_exact_at(&mut expected, 0).expect("read");
    let half = expected.len() / 4;
    for part in 0..4 {
        assert!(read(&disk, (part * half) as u64, half) == expected[part * half..(part + 1) * half]);
    }
    assert_eq!(read(&disk, 3 * MIB + 690, 20), [[6; 10], [0; 10]].concat());
    // Two places with data, and what one allocation covers around each.
    assert!(disk.allocated_bytes() <= 2 * (64 << 10), "{} bytes", disk.allocated_bytes());
    assert_eq!(fstat(&file).expect("stat").st_blocks as u64 * 512, disk.allocated_bytes());
}

#[test]
fn first_contents_that_do_not_fit_are_refused() {
    let source = tempfile::tempfile().expect("temporary file");
    source.write_all_at(&[1; 3 * BLOCK], 0).expect("write");
    let (small, _file, _budget) = disk(2 * BLOCK as u64, MIB);
    let error = small.load_initial(&source).expect_err("too large");
    assert!(error.kind == RamErrorKind::Invalid && error.message.contains("12288"), "{error}");
    let (poor, _file, _budget) = disk(MIB, 2 * BLOCK as u64);
    let error = poor.load_initial(&source).expect_err("no memory");
    assert!(error.kind == RamErrorKind::NoSpace && error.message.contains("8192 of 8192"), "{error}");
}

/// Reserves 2 MiB pages for one test and gives the former number back.
struct HugePages(String);

const HUGE_POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(pages: u32) -> Option<HugePages> {
        let before = fs::read_to_string(HUGE_POOL).ok()?;
        fs::write(HUGE_POOL, pages.to_string()).ok()?;
        let guard = HugePages(before);
        let now = fs::read_to_string(HUGE_POOL).ok()?;
        (now.trim() == pages.to_string()).then_some(guard)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_POOL, self.0.trim());
    }
}

// Goal: a disk of huge pages takes and gives back whole pages, says when none are left, and is found again by its contents.
// Method: a pool of three pages under a disk of eight; one test does it all, since the pool belongs to the host.
#[test]
fn huge_pages() {
    let Some(pool) = HugePages::reserve(3) else {
        println!("SKIPPED: cannot reserve three huge pages of 2 MiB");
        return;
    };
    let Some(mount) = Mounted::new("hugetlbfs", "pagesize=2M") else { return };
    let dir = mount.open();
    let (size, huge) = (16 * MIB, 2 * MIB);
    let error = open_backing(dir.as_fd(), "h", size, PageSize::Base).expect_err("base pages");
    assert_eq!(error.kind, RamErrorKind::WrongFileSystem);

    let backing = open_backing(dir.as_fd(), "h", size, PageSize::Huge2M).expect("backing");
    let total = budget(64 * MIB);
    let create =
        |file| RamDisk::create(file, "h", size, PageSize::Huge2M, Arc::clone(&total)).expect("create");
    let disk = create(backing.file);
    assert_eq!(disk.write(huge + 5000, &[1; 100]), RamOutcome::Done);
    assert_eq!(disk.allocated_bytes(), huge);
    let expected = [(huge, true), (huge, false), (size - 2 * huge, true)];
    let extents: Vec<_> = disk.extents(0, size, 9).iter().map(|e: &RamExtent| (e.len, e.hole)).collect();
    assert_eq!(extents, expected);
    assert_eq!(disk.write(3 * huge - 100, &[2; 200]), RamOutcome::Done, "over a border of pages");
    assert_eq!(disk.write(7 * huge, &[3; 100]), RamOutcome::NoSpace, "the pool is empty");
    assert_eq!(total.used_bytes(), 3 * huge);
    assert_eq!(read(&disk, 7 * huge, 100), [0; 100]);

    // A part of a page is zeroed and stays; a whole one goes.
    let RamOutcome::Partial { done } = disk.discard(2 * huge, huge - 4096) else {
        panic!("more than a turn")
    };
    assert_eq!(disk.discard(2 * huge + done, huge - 4096 - done), RamOutcome::Done);
    assert_eq!(disk.allocated_bytes(), 3 * huge);
    assert_eq!(disk.discard(3 * huge, huge), RamOutcome::Done);
    assert_eq!((disk.allocated_bytes(), total.used_bytes()), (2 * huge, 2 * huge));
    assert_eq!(disk.write(7 * huge, &[3; 100]), RamOutcome::Done);
    assert_eq!(disk.write_zeroes(7 * huge, 100, false), RamOutcome::Done);

    publish_backing(dir.as_fd(), "h").expect("publish");
    drop(disk);
    let backing = open_backing(dir.as_fd(), "h", size, PageSize::Huge2M).expect("take up");
    assert!(backing.taken_up);
    let disk = create(backing.file);
    assert_eq!(read(&disk, huge + 4999, 102), [vec![0], vec![1; 100], vec![0]].concat());
    assert_eq!(read(&disk, 3 * huge - 101, 101), [vec![0], vec![2; 100]].concat());
    assert_eq!(
        (disk.allocated_bytes(), total.used_bytes()),
        (2 * huge, 2 * huge),
        "a page of zeroes is given back"
    );
    drop(disk);

    let file = anonymous_backing("m", size, PageSize::Huge2M).expect("memfd");
    let disk = create_named(file, size);
    assert_eq!(disk.write(0, &[4; 100]), RamOutcome::Done);
    assert_eq!(disk.write(huge, &[4; 100]), RamOutcome::NoSpace);
    assert_eq!(read(&disk, 0, 100), [4; 100]);
    drop(disk);
    remove_backing(dir.as_fd(), "h").expect("remove");
    drop(pool);
    if fs::read_to_string(HUGE_POOL).is_ok_and(|pages| pages.trim() == "0") {
        let error = anonymous_backing("m", size, PageSize::Huge2M).expect_err("no pages");
        assert!(
            error.kind == RamErrorKind::NoHugePages && error.message.contains("vm.nr_hugepages"),
            "{error}"
        );
    }
}

fn create_named(file: OwnedFd, size: u64) -> Arc<RamDisk> {
    RamDisk::create(file, "m", size, PageSize::Huge2M, budget(64 * MIB)).expect("create")
}
