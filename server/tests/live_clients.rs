//! Goal: the data path works with programs that we did not write: libnbd's tools, QEMU's and fio.
//! Method: a real daemon, real clients with deadlines, and their own verification; what they say of a disk is
//! compared with what the image file holds. Encrypted connections are in `live_tls`.

mod live_rig;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use live_rig::{Rig, fio_verified, free_port, nbdsh, raw, run};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A sparse file of `bytes` bytes with random data in some places: between them are real holes.
fn sparse_image(rig: &Rig, name: &str, bytes: u64, data: &[(u64, u64)]) -> std::path::PathBuf {
    let path = rig.image(name, bytes);
    let file = File::options().write(true).open(&path).expect("opens");
    let mut random = live_rig::Random(bytes);
    for &(offset, length) in data {
        file.write_all_at(&random.bytes(length as usize), offset).expect("writes");
    }
    file.sync_all().expect("fsync");
    path
}

/// Asserts that two files hold the same bytes, with a message that can be read.
#[track_caller]
fn assert_same(left: &Path, right: &Path) {
    let (left_bytes, right_bytes) = (fs::read(left).expect("reads"), fs::read(right).expect("reads"));
    assert_eq!(left_bytes.len(), right_bytes.len(), "{} and {}", left.display(), right.display());
    let differs = left_bytes.iter().zip(&right_bytes).position(|(l, r)| l != r);
    assert_eq!(differs, None, "first different byte of {} and {}", left.display(), right.display());
}

#[test]
fn nbdinfo_tells_what_the_disks_are() {
    let rig = Rig::start();
    let image = rig.image("d1.img", 64 * MIB);
    let uri = rig.attach("d1", &raw(&image), &[]);
    rig.attach("memory", "ram:m?size=8M", &[]);
    rig.attach("frozen", &raw(&rig.image("frozen.img", MIB)), &["--read-only"]);

    assert_eq!(run("nbdinfo", &["--size", &uri]).expect_ok().trim(), (64 * MIB).to_string());
    let info = json(&run("nbdinfo", &["--json", &uri]).expect_ok());
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 64 * MIB);
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    assert_eq!(export["block_size_minimum"], 1);
    for feature in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(export[format!("can_{feature}")], true, "{feature}");
        if feature != "fast_zero" {
            run("nbdinfo", &["--can", &feature.replace('_', "-"), &uri]).expect_ok();
        }
    }
    run("nbdinfo", &["--is", "read-only", &uri]).expect_failure();
    run("nbdinfo", &["--is", "read-only", &rig.uri("frozen")]).expect_ok();
    run("nbdinfo", &["--can", "trim", &rig.uri("frozen")]).expect_failure();

    let list = json(&run("nbdinfo", &["--list", "--json", &rig.uri_by_name("")]).expect_ok());
    let exports = list["exports"].as_array().expect("a list");
    let mut names: Vec<_> =
        exports.iter().map(|export| export["export-name"].as_str().expect("name")).collect();
    names.sort_unstable();
    assert_eq!(names, ["d1", "frozen", "memory"]);
    let memory = exports.iter().find(|export| export["export-name"] == "memory").expect("listed");
    assert_eq!(memory["export-size"], 8 * MIB);
}

/// The export name chooses the disk at the common socket; a disk's own socket takes its name and the empty one.
#[test]
fn names_choose_the_disk() {
    let rig = Rig::start();
    rig.attach("one", "null:?size=1M", &[]);
    rig.attach("two", "null:?size=2M", &[]);
    let size = |uri: &str| run("nbdinfo", &["--size", uri]);
    assert_eq!(size(&rig.uri("one")).expect_ok().trim(), MIB.to_string());
    assert_eq!(size(&rig.uri("two").replace("///?", "///two?")).expect_ok().trim(), (2 * MIB).to_string());
    assert_eq!(size(&rig.uri_by_name("one")).expect_ok().trim(), MIB.to_string());
    assert_eq!(size(&rig.uri_by_name("two")).expect_ok().trim(), (2 * MIB).to_string());
    for wrong in [rig.uri("one").replace("///?", "///two?"), rig.uri_by_name("three"), rig.uri_by_name("")] {
        let said = size(&wrong).expect_failure();
        assert!(said.contains("export") || said.contains("No such file"), "{wrong}: {said}");
    }
}

/// Holes of the file are holes of the disk, exactly, and writes and trims change both.
#[test]
fn the_map_shows_real_holes() {
    let rig = Rig::start();
    let data = [(MIB, MIB), (5 * MIB, 64 * KIB), (10 * MIB, 128 * KIB)];
    let image = sparse_image(&rig, "d1.img", 16 * MIB, &data);
    let uri = rig.attach("d1", &raw(&image), &[]);
    let data_extents = || -> Vec<(u64, u64)> {
        let map = json(&run("nbdinfo", &["--map", "--json", &uri]).expect_ok());
        let mut extents: Vec<(u64, u64)> = Vec::new();
        for extent in map.as_array().expect("a list") {
            let (offset, length) = (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
            match extents.last_mut() {
                _ if extent["type"] != 0 => assert_eq!(extent["type"], 3, "a hole reads as zero"),
                Some(last) if last.0 + last.1 == offset => last.1 += length,
                _ => extents.push((offset, length)),
            }
        }
        extents
    };
    assert_eq!(data_extents(), data);
    let changes = "h.pwrite(b'x' * 65536, 12 << 20); h.trim(65536, 5 << 20); h.zero(131072, 10 << 20)";
    nbdsh(&uri, changes).expect_ok();
    assert_eq!(data_extents(), [(MIB, MIB), (12 * MIB, 64 * KIB)]);
    // Zeroes that keep their space, and the same map by QEMU.
    nbdsh(&uri, "h.zero(65536, 12 << 20, nbd.CMD_FLAG_NO_HOLE); h.flush()").expect_ok();
    let map = json(&run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]).expect_ok());
    let not_zero = map.as_array().expect("a list").iter().filter(|extent| extent["zero"] == false);
    let not_zero: Vec<_> =
        not_zero.map(|extent| (extent["start"].as_u64(), extent["length"].as_u64())).collect();
    assert_eq!(not_zero, [(Some(MIB), Some(MIB))], "{map}");
    let read = fs::read(&image).expect("reads");
    assert!(read[5 << 20..].iter().all(|byte| *byte == 0), "trimmed and zeroed");
}

#[test]
fn nbdcopy_in_and_out_gives_identical_bytes() {
    let rig = Rig::with(2, &[]);
    let places = [(0, 3 * MIB + 512), (7 * MIB + 4096, 5 * MIB), (31 * MIB, MIB)];
    let source = sparse_image(&rig, "source.img", 32 * MIB, &places);
    let disk = rig.image("d1.img", 32 * MIB);
    let uri = rig.attach("d1", &raw(&disk), &[]);
    let memory = rig.attach("memory", "ram:m?size=32M", &[]);
    let out = rig.path("out.img");
    let (from, to) = (text(&source), text(&out));
    let many = ["--connections=4", "--threads=2", "--requests=32", "--flush"];
    let copy = |options: &[&str], from: &str, to: &str| {
        run("nbdcopy", &[options, &[from, to]].concat()).expect_ok();
    };

    copy(&many, &from, &uri);
    assert_same(&source, &disk);
    copy(&many, &uri, &to);
    assert_same(&source, &out);
    // From disk to disk, and with other connections and requests.
    copy(&many, &uri, &memory);
    fs::remove_file(&out).expect("removes");
    copy(&["--connections=1", "--requests=1", "--request-size=32768"], &memory, &to);
    assert_same(&source, &out);
    // What was sparse arrives sparse; what is there already is overwritten by zeroes.
    let map = json(&run("nbdinfo", &["--map", "--json", &memory]).expect_ok());
    assert!(map.as_array().expect("a list").iter().any(|extent| extent["type"] == 3), "no hole: {map}");
    let empty = rig.image("empty.img", 32 * MIB);
    copy(&["--connections=2"], &text(&empty), &memory);
    copy(&["--allocated", "--connections=2"], &text(&empty), &uri);
    assert_same(&empty, &disk);
    fs::remove_file(&out).expect("removes");
    copy(&many, &memory, &to);
    assert_same(&empty, &out);
}

#[test]
fn qemu_img_converts_and_compares() {
    let rig = Rig::start();
    let source = sparse_image(&rig, "source.img", 16 * MIB, &[(0, 2 * MIB), (9 * MIB + 512, 3 * MIB)]);
    let disk = rig.image("d1.img", 16 * MIB);
    let uri = rig.attach("d1", &raw(&disk), &[]);
    let (from, out) = (text(&source), rig.path("out.qcow2"));

    let info = json(&run("qemu-img", &["info", "-f", "raw", "--output=json", &uri]).expect_ok());
    assert_eq!(info["virtual-size"], 16 * MIB);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, &uri]).expect_ok();
    assert_same(&source, &disk);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]).expect_ok();
    let parallel = ["convert", "-m", "8", "-W", "-f", "raw", "-O", "qcow2", &uri, &text(&out)];
    run("qemu-img", &parallel).expect_ok();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &text(&out), &from]).expect_ok();
    // A difference is found, so the comparisons above could have failed.
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 4M 512", &uri]).expect_ok();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]).expect_failure();
    // qcow2 inside of the disk: metadata writes of a format driver, then its check.
    run("qemu-img", &["create", "-f", "qcow2", &uri, "12M"]).expect_ok();
    let commands = ["-c", "write -P 1 0 3M", "-c", "write -z 1M 1M", "-c", "discard 2M 1M", "-c", "flush"];
    run("qemu-io", &[&["-f", "qcow2"], &commands[..], &[&uri]].concat()).expect_ok();
    run("qemu-img", &["check", "-f", "qcow2", &uri]).expect_ok();
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    let rig = Rig::start();
    let disk = rig.image("d1.img", 8 * MIB);
    let raw_uri = rig.attach("d1", &raw(&disk), &[]);
    let ram_uri = rig.attach("memory", "ram:m?size=8M", &[]);
    for uri in [&raw_uri, &ram_uri] {
        let commands = [
            "write -P 0x11 0 1M",
            "write -f -P 0x22 1M 64k", // FUA
            "write -P 0x33 12345 777", // QEMU passes it on: the minimum block is 1
            "aio_write -P 0x44 2M 1M", // several at once
            "aio_write -P 0x55 3M 1M",
            "aio_flush",
            "write -z 4096 8k",    // zeroes, may not leave a hole
            "write -z -u 64k 64k", // zeroes, may leave a hole
            "write -z 200001 33",  // unaligned zeroes
            "discard 2M 512k",
            "flush",
            "read -P 0x11 0 4096",
            "read -P 0 4096 8k",
            "read -P 0x33 12345 777",
            "read -P 0x11 13122 1k",
            "read -P 0 64k 64k",
            "read -P 0x11 200000 1",
            "read -P 0 200001 33",
            "read -P 0x11 200034 100",
            "read -P 0x22 1M 64k",
            "read -P 0 1114112 900000",
            "read -P 0 2M 512k",
            "read -P 0x44 2621440 512k",
            "read -P 0x55 3M 1M",
            "readv -P 0x55 3M 64k 512 4096",
        ];
        let mut arguments = vec!["-f", "raw"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(uri);
        let printed = run("qemu-io", &arguments).expect_ok();
        assert!(!printed.contains("failed"), "{printed}");
    }
    let wrong = run("qemu-io", &["-f", "raw", "-c", "read -P 0x12 0 512", &raw_uri]);
    assert!(wrong.stdout.contains("verification failed"), "it compares: {wrong:?}");
    let bytes = fs::read(&disk).expect("reads");
    assert!(bytes[12345..13122].iter().all(|byte| *byte == 0x33), "through the file");
}

/// Many jobs with mixed, unaligned sizes at once; each has a part of the disk and checks what it reads back.
#[test]
fn fio_verifies_a_raw_file() {
    let rig = Rig::with(2, &[]);
    let uri = rig.attach("d1", &raw(&rig.image("d1.img", 64 * MIB)), &[]);
    fio_verified(&uri, 8, &["--bsrange=512-512k", "--bs_unaligned=1", "--size=4m"]);
    fio_verified(&uri, 4, &["--bssplit=512/30:4k/40:64k/20:512k/10", "--size=8m"]);
}

#[test]
fn fio_verifies_a_ram_disk() {
    let rig = Rig::with(2, &[]);
    let uri = rig.attach("memory", "ram:m?size=64M", &[]);
    fio_verified(&uri, 8, &["--bsrange=512-512k", "--bs_unaligned=1", "--size=4m"]);
    fio_verified(&uri, 4, &["--bssplit=512/30:4k/40:64k/20:512k/10", "--size=8m"]);
}

#[test]
fn fio_verifies_cached_files() {
    let rig = Rig::with(2, &[]);
    for cache in ["writeback", "writethrough"] {
        let image = rig.image(&format!("{cache}.img"), 32 * MIB);
        let uri = rig.attach(cache, &format!("{}?cache={cache}", raw(&image)), &[]);
        fio_verified(&uri, 4, &["--bsrange=512-256k", "--bs_unaligned=1", "--size=2m"]);
        // A client that was told of the write finds it in the file.
        nbdsh(&uri, "h.pwrite(b'q' * 1000, 31 << 20); h.flush()").expect_ok();
        let mut bytes = [0; 1000];
        File::open(&image).unwrap().read_exact_at(&mut bytes, 31 * MIB).expect("reads");
        assert!(bytes.iter().all(|byte| *byte == b'q'), "{cache}");
    }
}

#[test]
fn a_null_disk_takes_all_and_reads_zeroes() {
    let rig = Rig::start();
    let uri = rig.attach("n", "null:?size=1G", &[]);
    let commands = ["-c", "write -P 1 0 1M", "-c", "write -z 5M 1M", "-c", "discard 0 1G", "-c", "flush"];
    let read = ["-c", "read -P 0 0 1M", "-c", "read -P 0 1073741312 512"];
    let printed = run("qemu-io", &[&["-f", "raw"], &commands[..], &read[..], &[&uri]].concat()).expect_ok();
    assert!(!printed.contains("failed"), "{printed}");
    run("nbdcopy", &["--connections=2", &uri, "null:"]).expect_ok();
}

#[test]
fn a_read_only_disk_refuses_what_changes_it() {
    let rig = Rig::start();
    let image = sparse_image(&rig, "d1.img", 2 * MIB, &[(0, MIB)]);
    let before = fs::read(&image).expect("reads");
    let uri = rig.attach("d1", &raw(&image), &["--read-only"]);
    // Also a client that does not look at the flags gets EPERM, and the connection lives on.
    let script = "
h.set_strict_mode(0)
for change in [lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0),
               lambda: h.pwrite(b'x' * 512, 0, nbd.CMD_FLAG_FUA)]:
    try:
        change()
        raise SystemExit('it was taken')
    except nbd.Error as error:
        assert error.errno == 'EPERM', error
assert len(h.pread(4096, 0)) == 4096
";
    nbdsh(&uri, script).expect_ok();
    run("qemu-io", &["-f", "raw", "-c", "write 0 512", &uri]).expect_failure();
    run("nbdcopy", &[&text(&image), &uri]).expect_failure();
    let out = rig.path("out.img");
    run("nbdcopy", &[&uri, &text(&out)]).expect_ok();
    assert_same(&image, &out);
    assert_eq!(fs::read(&image).expect("reads"), before);
}

/// A client without structured replies gets simple ones, also for the largest read there is.
#[test]
fn clients_without_structured_replies() {
    let rig = Rig::start();
    let image = sparse_image(&rig, "d1.img", 80 * MIB, &[(0, 33 * MIB), (70 * MIB, 9 * MIB)]);
    let uri = rig.attach("d1", &raw(&image), &[]);
    let script = format!(
        "
assert not h.get_structured_replies_negotiated()
with open('{image}', 'rb') as f:
    want = f.read()
for size in (32 << 20, (32 << 20) - 1, 3000001, 512, 1):
    for offset in (0, 12345, (80 << 20) - size):
        got = h.pread(size, offset)
        assert got == want[offset:offset + size], (size, offset)
data = bytes(want[5:5 + (32 << 20)])
h.pwrite(data, 40 << 20)
h.flush()
assert h.pread(32 << 20, 40 << 20) == data
",
        image = image.display()
    );
    live_rig::nbdsh_after("h.set_request_structured_replies(False)", &uri, &script).expect_ok();
    // The same reads in chunks, with and without DF.
    let script = format!(
        "
with open('{image}', 'rb') as f:
    want = f.read()
for size in (32 << 20, 3000001, 512, 1):
    for offset in (0, 12345, (80 << 20) - size):
        parts = bytearray(b'?' * size)
        def chunk(data, at, status, error):
            assert status in (nbd.READ_DATA, nbd.READ_HOLE), status
            parts[at - offset:at - offset + len(data)] = data
        for flags in (0, nbd.CMD_FLAG_DF):
            parts[:] = b'?' * size
            try:
                got = h.pread_structured(size, offset, chunk, flags)
            except nbd.Error as error:
                # Allowed by the protocol: too large to answer in one piece.
                assert flags and error.errno in ('EOVERFLOW', 'EINVAL'), error
                continue
            assert got == want[offset:offset + size] == parts, (size, offset, flags)
",
        image = image.display()
    );
    nbdsh(&uri, &script).expect_ok();
}

#[test]
fn errors_reach_the_request_and_the_connection_lives() {
    let rig = Rig::start();
    let uri = rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &[]);
    let script = "
h.set_strict_mode(0)
def refused(errnos, f):
    try:
        f()
    except nbd.Error as error:
        assert error.errno in errnos, error
        return
    raise SystemExit('it was taken')
refused(('EINVAL',), lambda: h.pread(512, 1 << 20))
refused(('EINVAL',), lambda: h.pread(1024, (1 << 20) - 512))
refused(('ENOSPC', 'EINVAL'), lambda: h.pwrite(b'x' * 512, 1 << 20))
refused(('ENOSPC', 'EINVAL'), lambda: h.zero(4096, (1 << 20) - 512))
refused(('EINVAL',), lambda: h.trim(4096, (1 << 20) - 512))
refused(('EINVAL', 'EOVERFLOW', 'ENOMEM'), lambda: h.pread(512, (1 << 64) - 512))
h.pwrite(b'y' * 512, (1 << 20) - 512)
assert h.pread(512, (1 << 20) - 512) == b'y' * 512
";
    nbdsh(&uri, script).expect_ok();
}

/// What one connection wrote, another reads as soon as the first was told; a flush on one covers both.
#[test]
fn connections_see_each_other() {
    let rig = Rig::with(2, &[]);
    for spec in [raw(&rig.image("d1.img", 4 * MIB)), "ram:m?size=4M".to_owned()] {
        let name = if spec.starts_with("ram") { "memory" } else { "d1" };
        let uri = rig.attach(name, &spec, &[]);
        let script = format!(
            "
others = [nbd.NBD() for _ in range(3)]
for other in others:
    other.connect_uri('{uri}')
for n in range(300):
    data = bytes([n % 251 + 1]) * 700
    offset = n * 701
    others[n % 3].pwrite(data, offset)
    assert h.pread(700, offset) == data, n
h.flush()
"
        );
        nbdsh(&uri, &script).expect_ok();
    }
}

#[test]
fn disks_are_served_over_tcp() {
    let port = free_port();
    let rig = Rig::with(1, &["--nbd-listen", &format!("127.0.0.1:{port}")]);
    let source = sparse_image(&rig, "source.img", 8 * MIB, &[(0, 5 * MIB)]);
    let disk = rig.image("d1.img", 8 * MIB);
    rig.attach("d1", &raw(&disk), &[]);
    let uri = format!("nbd://127.0.0.1:{port}/d1");
    run("nbdcopy", &["--connections=4", "--flush", &text(&source), &uri]).expect_ok();
    assert_same(&source, &disk);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &text(&source), &uri]).expect_ok();
    fio_verified(&uri, 4, &["--bsrange=512-256k", "--bs_unaligned=1", "--size=2m"]);
    run("nbdinfo", &[&format!("nbd://127.0.0.1:{port}/other")]).expect_failure();
    // It does not speak TLS, and a client that wants it does not fall back to plain text.
    run("nbdinfo", &[&format!("nbds://127.0.0.1:{port}/d1")]).expect_failure();
}
