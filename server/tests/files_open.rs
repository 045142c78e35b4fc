//! Opening images on the real host: kinds of objects, directories that are allowed, alignment, sizes, sharing
//! and release.

mod files_rig;

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use blktapd::files::{FileState, OpenErrorKind, OpenRequest, Released};
use files_rig::{
    Loop, Mounted, PATIENCE, Rig, make_image, read_works, reader, request, run, skip, takes_direct_io,
    wait_until,
};
use shard::api::{CacheMode, FileKind};

async fn refusal(rig: &Rig, request: OpenRequest) -> (OpenErrorKind, String) {
    let error = rig.files.open(request).await.expect_err("it must be refused");
    assert_eq!(rig.files.entries(), [], "a refusal leaves nothing behind: {error}");
    (error.kind, error.message)
}

/// Goal: what is no disk is refused by name, at once, and without opening it (a FIFO without a writer would
/// hang).
/// Method: one of each kind, and paths that lead nowhere.
#[tokio::test]
async fn only_files_and_block_devices() {
    let rig = Rig::new().await;
    nix::unistd::mkfifo(&rig.path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let _listener = UnixListener::bind(rig.path("socket")).expect("bind");
    rig.image("empty", 0);
    rig.image("plain", 512);
    symlink("circle", rig.path("circle")).expect("symlink");
    let long = "n".repeat(300);
    for (name, kind, part) in [
        ("fifo", OpenErrorKind::Invalid, "is a FIFO"),
        ("socket", OpenErrorKind::Invalid, "is a socket"),
        ("run", OpenErrorKind::Invalid, "is a directory"),
        ("empty", OpenErrorKind::Invalid, "the file is empty"),
        ("none/disk", OpenErrorKind::NotFound, "there is no none in"),
        ("plain/disk", OpenErrorKind::NotFound, "Not a directory"),
        ("circle", OpenErrorKind::Invalid, "symbolic links"),
        (long.as_str(), OpenErrorKind::Invalid, "255 bytes"),
        ("/dev/null", OpenErrorKind::Invalid, "is a character device"),
    ] {
        let (found, message) = refusal(&rig, request(&rig.path(name))).await;
        assert_eq!(found, kind, "{message}");
        assert!(message.contains(part) && message.contains(name), "{message}");
    }
    for relative in ["", "disk.img", "./disk.img"] {
        let (kind, message) = refusal(&rig, request(Path::new(relative))).await;
        assert_eq!(kind, OpenErrorKind::Invalid, "{message}");
    }
    let sector = OpenRequest { sector: Some(1024), ..request(&rig.path("plain")) };
    let (kind, message) = refusal(&rig, sector).await;
    assert_eq!(kind, OpenErrorKind::Invalid);
    assert!(message.contains("512 or 4096"), "{message}");
}

/// Goal: with allowed directories nothing outside is opened, whatever links and dots say, and everything
/// inside is.
/// Method: links that stay, that leave and that come back, `..`, and a root that is itself a link.
#[tokio::test]
async fn allowed_roots() {
    let rig = Rig::with_roots(|dir| vec![dir.join("images"), dir.join("linked")]).await;
    let images = rig.path("images");
    fs::create_dir_all(images.join("sub")).expect("create");
    fs::create_dir(rig.path("other")).expect("create");
    let inside = make_image(&images.join("sub/a.img"), 512);
    let outside = rig.image("other/b.img", 512);
    symlink("sub/a.img", images.join("relative")).expect("symlink");
    symlink(&inside, images.join("absolute")).expect("symlink");
    symlink(&outside, images.join("leaves")).expect("symlink");
    symlink("../other/b.img", images.join("climbs")).expect("symlink");
    symlink("other", rig.path("linked")).expect("symlink");
    for good in
        ["images/sub/a.img", "images/relative", "images/absolute", "images/sub/../relative", "linked/b.img"]
    {
        let opened = rig.files.open(request(&rig.path(good))).await;
        let opened = opened.unwrap_or_else(|error| panic!("{good}: {error}"));
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed, "{good}");
    }
    for bad in ["other/b.img", "images/leaves", "images/climbs", "images/../other/b.img", "imagesx"] {
        let (kind, message) = refusal(&rig, request(&rig.path(bad))).await;
        assert_eq!(kind, OpenErrorKind::OutsideRoots, "{bad}: {message}");
        assert!(message.contains(&*images.to_string_lossy()), "the directories are listed: {message}");
    }
    let (kind, _) = refusal(&rig, request(&images)).await;
    assert_eq!(kind, OpenErrorKind::Invalid, "the root itself is a directory");
    rig.files.set_allowed_roots(Vec::new()).expect("valid");
    rig.files.open(request(&outside)).await.expect("without configuration every path is allowed");
    assert!(rig.files.set_allowed_roots(vec!["images".into()]).is_err(), "a root must be absolute");
}

/// Goal: regular files of any length are served by the size rule, with a buffered descriptor for what direct
/// I/O cannot reach.
/// Method: lengths around sectors and blocks on the file system of the temporary directory.
#[tokio::test]
async fn length_and_tail() {
    let rig = Rig::new().await;
    for (length, served) in
        [(1, 512), (511, 512), (512, 512), (513, 1024), (4096, 4096), (1_000_001, 1_000_448)]
    {
        let path = rig.image("disk.img", length);
        let opened = match rig.files.open(request(&path)).await {
            Ok(opened) => opened,
            Err(error) if error.kind == OpenErrorKind::Unsupported => {
                return skip("length_and_tail", &error.message);
            }
            Err(error) => panic!("{error}"),
        };
        let image = &opened.image;
        assert_eq!((opened.served_bytes, opened.sector_bytes, image.length), (served, 512, length));
        assert_eq!(image.kind, FileKind::Regular);
        // A page at least: the page cache of the tail must hold nothing that O_DIRECT reaches.
        let unit = u64::from(image.offset_align).max(4096);
        assert_eq!(image.tail.is_some(), length % unit != 0, "{length}");
        let unit = image.offset_align;
        assert!(unit.is_power_of_two() && (512..=4096).contains(&unit));
        if length > 100_000 {
            assert!(read_works(image, unit.into(), unit as usize, image.memory_align as usize));
        }
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    }
    let path = rig.image("disk.img", 5 * 512);
    let (kind, message) = refusal(&rig, OpenRequest { sector: Some(4096), ..request(&path) }).await;
    assert_eq!(kind, OpenErrorKind::Invalid);
    assert!(message.contains("2560") && message.contains("4096"), "{message}");
    let buffered = OpenRequest { cache: CacheMode::Writeback, ..request(&path) };
    let opened = rig.files.open(buffered).await.expect("opens");
    assert_eq!((opened.image.offset_align, opened.image.memory_align), (1, 1));
    assert!(opened.image.tail.is_none());
}

/// Goal: where the kernel does not tell the alignment it is probed; where direct I/O does not work the disk
/// is refused with the way out, and that way works. Method: tmpfs and ramfs, short and long files.
#[tokio::test]
async fn tmpfs_and_ramfs() {
    let rig = Rig::new().await;
    let mount = |name: &str| Mounted::new(&rig.path(name), name, "none");
    let (tmpfs, ramfs) = match (mount("tmpfs"), mount("ramfs")) {
        (Ok(tmpfs), Ok(ramfs)) => (tmpfs, ramfs),
        (Err(why), _) | (_, Err(why)) => return skip("tmpfs_and_ramfs", &why),
    };
    let lengths: &[u64] = if takes_direct_io(&tmpfs.point) { &[1, 600, 1024, 8191, 1 << 20] } else { &[] };
    for &length in lengths {
        let path = make_image(&tmpfs.point.join("disk.img"), length);
        let opened = rig.files.open(request(&path)).await.unwrap_or_else(|error| panic!("{error}"));
        let image = &opened.image;
        // A page at least: the page cache of the tail must hold nothing that O_DIRECT reaches.
        let unit = u64::from(image.offset_align).max(4096);
        assert_eq!(image.tail.is_some(), length % unit != 0, "{length}");
        if length >= 1024 {
            assert_eq!(image.offset_align, 512, "tmpfs takes any offset");
        }
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    }
    let path = make_image(&ramfs.point.join("disk.img"), 1 << 20);
    let (kind, message) = refusal(&rig, request(&path)).await;
    assert_eq!(kind, OpenErrorKind::Unsupported);
    assert!(message.contains("?cache=writeback") && message.contains("ramfs"), "{message}");
    let buffered = OpenRequest { cache: CacheMode::Writeback, ..request(&path) };
    let opened = rig.files.open(buffered).await.expect("the way out works");
    let key = opened.key;
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
}

/// Goal: a block device tells its unit, size, discard and store; requests below the unit are refused by the
/// kernel and those of the unit are taken. Method: loop devices with 512 and 4096 byte sectors.
#[tokio::test]
async fn loop_devices() {
    let rig = Rig::new().await;
    for sector in [512_u32, 4096] {
        let backing = rig.image("backing", 1 << 20);
        let size = sector.to_string();
        let device = match Loop::new(&backing, &["--sector-size", &size, "--direct-io=on"]) {
            Ok(device) => device,
            Err(why) => return skip("loop_devices", &why),
        };
        let metadata = fs::metadata(&device.node).expect("the node");
        assert!(metadata.file_type().is_block_device());
        let opened = rig.files.open(request(&device.node)).await.unwrap_or_else(|error| panic!("{error}"));
        let image = &opened.image;
        assert_eq!((opened.served_bytes, opened.sector_bytes), (1 << 20, sector));
        assert_eq!((image.length, image.offset_align), (1 << 20, sector));
        assert_eq!(image.kind, FileKind::Block { discard: true });
        assert_eq!(image.store, std::os::unix::fs::MetadataExt::rdev(&metadata));
        assert!(image.memory_align <= 4096 && image.tail.is_none());
        assert!(read_works(image, sector.into(), sector as usize, image.memory_align as usize));
        if sector == 4096 {
            assert!(!read_works(image, 512, 512, 512), "the unit is real");
        }
        // The claim keeps others out while the disk is attached.
        let (mounted, said) =
            run("mount", &["-t", "ext4", &device.node.to_string_lossy(), &rig.path("run").to_string_lossy()]);
        assert!(!mounted && said.contains("busy"), "{said}");
        let key = opened.key;
        assert_eq!(rig.files.current_length(key, PATIENCE).await, Ok(1 << 20));
        assert_eq!(rig.files.allocated_bytes(key, PATIENCE).await, Ok(1 << 20));
        let coarse = OpenRequest { sector: Some(4096), ..reader(&device.node, "d2") };
        assert_eq!(rig.files.open(coarse).await.expect_err("a writer has it").kind, OpenErrorKind::Busy);
        fs::OpenOptions::new()
            .write(true)
            .open(&backing)
            .and_then(|file| file.set_len(2 << 20))
            .expect("grow");
        let (grown, said) = run("losetup", &["-c", &device.node.to_string_lossy()]);
        assert!(grown, "{said}");
        assert_eq!(rig.files.current_length(key, PATIENCE).await, Ok(2 << 20), "the size is read again");
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    }
}

/// Goal: a device that is mounted or read-only is refused for writing, and the reason names the user. Method:
/// a loop device with ext4.
#[tokio::test]
async fn devices_in_use() {
    let rig = Rig::new().await;
    let backing = rig.image("backing", 8 << 20);
    let (made, why) = run("mkfs.ext4", &["-q", &backing.to_string_lossy()]);
    if !made {
        return skip("devices_in_use", &why);
    }
    let device = match Loop::new(&backing, &[]) {
        Ok(device) => device,
        Err(why) => return skip("devices_in_use", &why),
    };
    let node = device.node.to_string_lossy().into_owned();
    let mounted = match Mounted::new(&rig.path("mnt"), "ext4", &node) {
        Ok(mounted) => mounted,
        Err(why) => return skip("devices_in_use", &why),
    };
    let (kind, message) = refusal(&rig, request(&device.node)).await;
    assert_eq!(kind, OpenErrorKind::Busy);
    assert!(message.contains(&format!("is mounted on {} as ext4", mounted.point.display())), "{message}");
    let opened = rig.files.open(reader(&device.node, "d1")).await.expect("reading does no harm");
    let key = opened.key;
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    drop(mounted);
    drop(device);
    let device = Loop::new(&backing, &["-r"]).expect("worked before");
    let (kind, message) = refusal(&rig, request(&device.node)).await;
    assert_eq!(kind, OpenErrorKind::Permission);
    assert!(message.contains("--read-only"), "{message}");
}

/// Goal: readers share one description; a writer is alone; the refusal names our disk; the last user's
/// release closes.
/// Method: all pairs on one file, by its own name, a link and a hard link.
#[tokio::test]
async fn one_entry_per_file() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 8192);
    let (link, hard) = (rig.path("link"), rig.path("hard"));
    symlink(&path, &link).expect("symlink");
    fs::hard_link(&path, &hard).expect("hard link");
    let buffered = |request: OpenRequest| OpenRequest { cache: CacheMode::Writeback, ..request };

    let first = rig.files.open(buffered(reader(&path, "d1"))).await.expect("opens");
    let second = rig.files.open(buffered(reader(&link, "d2"))).await.expect("shares");
    assert!(std::sync::Arc::ptr_eq(&first.image, &second.image));
    assert_eq!((first.key, first.generation), (second.key, second.generation));
    for (request, part) in [
        (buffered(OpenRequest { user: "d3".into(), ..request(&hard) }), "the disk d1, d2 reads it (as "),
        (buffered(reader(&path, "d2")), "the disk d2 uses it already"),
        (reader(&path, "d3"), "cache=writeback"),
    ] {
        let error = rig.files.open(request).await.expect_err("conflict");
        assert_eq!(error.kind, OpenErrorKind::Busy);
        assert!(error.message.contains(part), "{error}");
    }
    let wrong = OpenRequest { sector: Some(1), ..buffered(reader(&path, "d3")) };
    assert!(rig.files.open(wrong).await.is_err());
    assert_eq!(rig.files.entries()[0].users, ["d1", "d2"], "a refused user is not listed");

    let key = first.key;
    assert_eq!(rig.files.release(key, "d9", PATIENCE).await, Released::Unknown);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::StillUsed);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Unknown);
    let generation = first.generation;
    drop((first, second));
    assert_eq!(rig.files.release(key, "d2", PATIENCE).await, Released::Closed);
    assert_eq!(rig.files.entries(), []);

    let writer = rig.files.open(buffered(request(&path))).await.expect("alone");
    assert!(writer.generation > generation, "another description");
    let error = rig.files.open(buffered(reader(&hard, "d2"))).await.expect_err("conflict");
    assert!(error.message.contains("the disk d1 writes to it (as "), "{error}");
}

/// Goal: a file whose descriptors are still out is a zombie: nobody gets it, and it goes when the last clone
/// goes.
/// Method: keep a clone over the release, as a shard with kernel operations would.
#[tokio::test]
async fn zombie_keeps_its_place() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 8192);
    let opened = rig.files.open(request(&path)).await.expect("opens");
    let (key, clone) = (opened.key, opened.image.clone());
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Zombie);
    assert_eq!(rig.files.entries()[0].state, FileState::Zombie);
    let error = rig.files.open(OpenRequest { user: "d2".into(), ..request(&path) }).await.expect_err("busy");
    assert!(error.kind == OpenErrorKind::Busy && error.message.contains("detached disk d1"), "{error}");
    assert_eq!(rig.files.reap(), 1);
    drop(clone);
    assert_eq!(rig.files.reap(), 0);
    let opened = rig.files.open(OpenRequest { user: "d2".into(), ..request(&path) }).await;
    assert_eq!(rig.files.entries()[0].users, ["d2"]);
    opened.expect("free, and the close was waited for");
}

/// Goal: repeated attach and detach, many at a time and some abandoned half-way, leave no descriptor, entry
/// or thread behind.
/// Method: tasks that open and release, or are aborted; then count.
#[tokio::test]
async fn cycles_leak_nothing() {
    let rig = std::sync::Arc::new(Rig::new().await);
    let descriptors = || {
        let links = fs::read_dir("/proc/self/fd").expect("proc").flatten();
        let here = rig.dir.path();
        links.filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.starts_with(here))).count()
    };
    for round in 0..20 {
        let mut tasks = Vec::new();
        for number in 0..10 {
            let (rig, path) = (rig.clone(), rig.image(&format!("disk{number}"), 5000));
            tasks.push(tokio::spawn(async move {
                let user = format!("d{number}");
                let Ok(opened) = rig.files.open(OpenRequest { user: user.clone(), ..request(&path) }).await
                else {
                    return false;
                };
                let key = opened.key;
                drop(opened);
                rig.files.release(key, &user, PATIENCE).await == Released::Closed
            }));
        }
        let abandoned = tasks.split_off(if round % 2 == 0 { 10 } else { 5 });
        tokio::time::sleep(Duration::from_micros(round * 100)).await;
        abandoned.iter().for_each(|task| task.abort());
        for task in tasks {
            assert!(task.await.expect("joins"), "round {round}");
        }
        for task in abandoned {
            let _ = task.await;
        }
        for entry in rig.files.entries() {
            // Aborted between open and release: what a careless caller would have to do.
            for user in &entry.users {
                rig.files.release(entry.key, user, PATIENCE).await;
            }
        }
        wait_until("nothing is left open", || rig.files.entries().is_empty());
    }
    wait_until("all descriptors are closed", || descriptors() == 0);
    assert!(rig.files.threads() <= 4);
}

/// Goal: allocation and length follow the file. Method: write, grow, ask; ask for a file that is not open.
#[tokio::test]
async fn measures() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 1 << 20);
    let opened = rig
        .files
        .open(OpenRequest { cache: CacheMode::Writethrough, ..request(&path) })
        .await
        .expect("opens");
    let key = opened.key;
    assert_eq!(rig.files.allocated_bytes(key, PATIENCE).await, Ok(0), "sparse");
    let file = fs::OpenOptions::new().write(true).open(&path).expect("open");
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 65536], 0).expect("write");
    file.set_len(2 << 20).and_then(|()| file.sync_all()).expect("grow");
    assert!(rig.files.allocated_bytes(key, PATIENCE).await.expect("open") >= 65536);
    assert_eq!(rig.files.current_length(key, PATIENCE).await, Ok(2 << 20));
    drop(opened);
    rig.files.release(key, "d1", PATIENCE).await;
    let error = rig.files.current_length(key, PATIENCE).await.expect_err("closed");
    assert_eq!(error.kind, OpenErrorKind::NotFound);
}

/// Goal: when the owner of an image has died, its kernel operations keep the file from being served again, although
/// every descriptor that we had is closed; then it is another description.
/// Method: a duplicate of the descriptor stands for an operation: both hold the description, and nothing of ours.
#[tokio::test]
async fn operations_of_a_dead_owner_are_a_fence() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 4096);
    let opened = rig.files.open(request(&path)).await.expect("opens");
    let (key, generation) = (opened.key, opened.generation);
    let operation = opened.image.fd.try_clone().expect("dup");
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    let short = OpenRequest { deadline: Duration::from_millis(200), ..request(&path) };
    let (kind, message) = refusal(&rig, short).await;
    assert_eq!(kind, OpenErrorKind::Timeout, "{message}");
    // An attempt with time left goes on as soon as the last operation has ended.
    let second = rig.files.open(request(&path));
    let ends = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(operation);
    };
    let (second, ()) = tokio::join!(second, ends);
    assert_ne!(second.expect("opens").generation, generation, "a new description");
}
