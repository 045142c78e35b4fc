//! Goal: the NBD engines serve the clients that people use. Method: a tiny server around them (`nbd_server`) on a Unix
//! socket; libnbd's tools and Python binding, qemu-img and qemu-io do real work against it, and both what they print and
//! what arrived is compared.
//!
//! Debian 12: `apt install libnbd-bin python3-libnbd qemu-utils gnutls-bin`. Its clients do not know extended headers: for
//! those set `NBD_EXTENDED_QEMU` to a directory with `qemu-img` and `qemu-io` of QEMU 8.2 or later, and
//! `NBD_EXTENDED_LIBNBD` to one with `nbdinfo` and `nbdcopy` of libnbd 1.18 or later.

mod nbd_server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_server::{BLOCK, Disk, Disks, lock, serve, socket_in};
use ring_bridge::nbd::proto::command_flag;
use ring_bridge::nbd::{BlockSizes, ExportInfo, Features, ReplyStyle, RequestKind, TlsAcceptor};
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn info(name: &str, size_bytes: u64) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: format!("the disk {name}"),
        size_bytes,
        read_only: false,
        features: Features::ALL,
        block_sizes: BlockSizes::default(),
    }
}

/// A server and its directory.
struct Lab {
    directory: TempDir,
    disk: Arc<Disk>,
}

impl Lab {
    fn new(info: ExportInfo) -> Self {
        Self::with(info, |_| None)
    }

    /// `tls` makes its files in the lab's directory.
    fn with(info: ExportInfo, tls: impl FnOnce(&Path) -> Option<TlsAcceptor>) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let disk = Disk::new(info);
        let acceptor = tls(directory.path());
        let disks = Disks { disks: vec![Arc::clone(&disk)], bound: true };
        serve(socket_in(directory.path()), disks, acceptor).expect("listen");
        Self { directory, disk }
    }

    fn socket(&self) -> PathBuf {
        socket_in(self.directory.path())
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn styles(&self) -> Vec<ReplyStyle> {
        lock(&self.disk.agreements).iter().map(|agreed| agreed.transmission.reply_style()).collect()
    }

    fn saw(&self, kind: RequestKind, flag: u16) -> bool {
        self.disk.saw(|request| request.kind == kind && request.flags & flag == flag)
    }
}

/// Runs a program to its end, at most three minutes.
fn output(program: &str, arguments: &[&str], debug: &str) -> Output {
    let mut child = Command::new(program)
        .args(arguments)
        .env("LIBNBD_DEBUG", debug)
        // The binding of libnbd belongs to the distribution's python3, which need not be the first.
        .env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("{program} cannot be started ({error}); apt install libnbd-bin python3-libnbd qemu-utils gnutls-bin")
        });
    let deadline = Instant::now() + Duration::from_secs(180);
    while child.try_wait().expect("wait").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("kill");
            let output = child.wait_with_output().expect("output");
            panic!("{program} {arguments:?} hangs: {}", text(&output));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("output")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments, "0");
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output));
    text(&output)
}

/// Runs a program that has to fail; what it says. libnbd 1.14 shows a server's message only among its debug output.
fn fails(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments, "1");
    assert!(!output.status.success(), "{program} {arguments:?} succeeded: {}", text(&output));
    text(&output)
}

/// A libnbd script in nbdsh; `h` is a handle that is not connected, `uri` the server.
fn nbdsh(uri: &str, script: &str) -> String {
    let prelude = format!(
        "uri = {uri:?}
def fails(number, call, *arguments):
    try: call(*arguments)
    except nbd.Error as e:
        assert e.errno == number, (number, e.errno, e.string)
        return
    raise SystemExit('succeeded, expected ' + number)
"
    );
    run("nbdsh", &["-c", &prelude, "-c", script])
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// Bytes that differ everywhere, the same in every run.
fn pattern(length: u64, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8 | 1
    };
    (0..length).map(|_| word()).collect()
}

/// nbdinfo by the disk's name and by the empty name, with everything it can ask.
#[test]
fn nbdinfo_shows_what_is_offered() {
    let lab = Lab::new(info("d1", 8 * MIB));
    let shown = json(&run("nbdinfo", &["--json", &lab.uri()]));
    let export = &shown["exports"][0];
    let expected = serde_json::json!({
        "export-name": "d1",
        "description": "the disk d1",
        "export-size": 8 * MIB,
        "is_rotational": false,
        "is_read_only": false,
        "can_cache": true,
        "can_df": true,
        "can_fast_zero": true,
        "can_flush": true,
        "can_fua": true,
        "can_multi_conn": true,
        "can_trim": true,
        "can_zero": true,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
        "contexts": ["base:allocation"],
    });
    for (key, value) in expected.as_object().expect("object") {
        assert_eq!(&export[key], value, "{key} in {export}");
    }
    let by_name = format!("nbd+unix:///d1?socket={}", lab.socket().display());
    assert_eq!(run("nbdinfo", &["--size", &by_name]).trim(), "8388608");
    let list = json(&run("nbdinfo", &["--json", "--list", &lab.uri()]));
    assert_eq!(list["exports"][0]["export-name"], "d1", "{list}");

    let other = format!("nbd+unix:///d2?socket={}", lab.socket().display());
    let refused = fails("nbdinfo", &[&other]);
    assert!(refused.contains("there is no export \"d2\" here"), "{refused}");
}

/// A listener with several exports and no default.
#[test]
fn listener_with_many_exports() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let read_only = ExportInfo { read_only: true, ..info("beta", MIB) };
    let disks = vec![Disk::new(info("alpha", 2 * MIB)), Disk::new(read_only), Disk::new(info("γ disk", MIB))];
    let socket = socket_in(directory.path());
    serve(socket.clone(), Disks { disks, bound: false }, None).expect("listen");

    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let list = run("nbdinfo", &["--list", &uri]);
    for line in ["export=\"alpha\"", "export=\"beta\"", "export=\"γ disk\"", "description: the disk beta"] {
        assert!(list.contains(line), "{line} in {list}");
    }
    let refused = fails("nbdinfo", &[&uri]);
    assert!(refused.contains("there is no default export here"), "{refused}");

    let beta = format!("nbd+unix:///beta?socket={}", socket.display());
    let script = "h.set_strict_mode(0); h.connect_uri(uri); assert h.is_read_only()
assert h.pread(512, 0) == bytes(512)
fails('EPERM', h.pwrite, b'x' * 512, 0); fails('EPERM', h.trim, 512, 0); fails('EPERM', h.zero, 512, 0)
assert not h.can_trim() and not h.can_zero() and not h.can_fast_zero()
assert h.pread(512, 0) == bytes(512); h.shutdown()";
    nbdsh(&beta, script);
}

/// nbdcopy in and out, sparse, over several connections; nbdinfo --map sees the same holes.
#[test]
fn nbdcopy_and_map() {
    libnbd_work("", ReplyStyle::Structured);
}

/// Extended headers with a newer libnbd, if `NBD_EXTENDED_LIBNBD` names its directory.
#[test]
fn nbdcopy_and_map_with_extended_headers() {
    let Some(directory) = std::env::var_os("NBD_EXTENDED_LIBNBD") else {
        println!(
            "SKIPPED: extended headers need libnbd 1.18 or later; set NBD_EXTENDED_LIBNBD to its directory"
        );
        return;
    };
    libnbd_work(&format!("{}/", directory.display()), ReplyStyle::Extended);
}

fn libnbd_work(directory: &str, style: ReplyStyle) {
    let (nbdcopy, nbdinfo) = (format!("{directory}nbdcopy"), format!("{directory}nbdinfo"));
    let lab = Lab::new(info("d1", 24 * MIB));
    let mut image = vec![0; 24 * MIB as usize];
    let (start, length) = (5 * MIB as usize, 3 * MIB as usize);
    image[start..start + length].copy_from_slice(&pattern(length as u64, 1));
    image[..BLOCK].copy_from_slice(&pattern(BLOCK as u64, 2));
    let (source, copy) = (lab.file("in.img"), lab.file("out.img"));
    fs::write(&source, &image).expect("write");

    run(&nbdcopy, &["--flush", "--connections=4", "--threads=4", source.to_str().expect("path"), &lab.uri()]);
    assert!(lab.disk.bytes() == image);
    assert!(lab.saw(RequestKind::Flush, 0), "nbdcopy --flush flushes");
    run(&nbdcopy, &["--connections=4", "--threads=4", &lab.uri(), copy.to_str().expect("path")]);
    assert!(fs::read(&copy).expect("read") == image);
    assert!(lock(&lab.disk.agreements).len() >= 8, "multi-conn is used");
    assert!(lab.styles().iter().all(|found| *found == style), "{:?}", lab.styles());
    assert!(lab.saw(RequestKind::BlockStatus, 0));

    let map = json(&run(&nbdinfo, &["--map", "--json", &lab.uri()]));
    let extents: Vec<_> =
        map.as_array().expect("list").iter().map(|e| (&e["offset"], &e["length"], &e["type"])).collect();
    let expected =
        [(0, 4096, 0), (4096, 5_238_784, 3), (5_242_880, 3_145_728, 0), (8_388_608, 16_777_216, 3)];
    assert_eq!(extents.len(), expected.len(), "{map}");
    for (found, expected) in extents.into_iter().zip(expected) {
        assert!(*found.0 == expected.0 && *found.1 == expected.1 && *found.2 == expected.2, "{map}");
    }
}

/// libnbd commands with every flag; what arrived is checked by kind and flag.
#[test]
fn libnbd_commands_and_flags() {
    let lab = Lab::new(info("d1", 4 * MIB));
    let script = "
h.add_meta_context('base:allocation'); h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.can_meta_context('base:allocation')
h.pwrite(b'a' * 8192, 4096, nbd.CMD_FLAG_FUA)
chunks = []
def chunk(data, offset, status, error): chunks.append((offset, len(data), status))
assert h.pread_structured(16384, 0, chunk) == bytes(4096) + b'a' * 8192 + bytes(4096)
assert [c[2] for c in chunks] == [nbd.READ_HOLE, nbd.READ_DATA, nbd.READ_DATA, nbd.READ_HOLE], chunks
chunks.clear()
assert h.pread_structured(16384, 0, chunk, nbd.CMD_FLAG_DF) == bytes(4096) + b'a' * 8192 + bytes(4096)
assert chunks == [(0, 16384, nbd.READ_DATA)], chunks
extents = []
def extent(context, offset, entries, error): extents.append((context, offset, list(entries)))
h.block_status(65536, 0, extent)
assert extents == [('base:allocation', 0, [4096, 3, 8192, 0, 53248, 3])], extents
extents.clear(); h.block_status(65536, 2048, extent, nbd.CMD_FLAG_REQ_ONE)
assert extents == [('base:allocation', 2048, [2048, 3])], extents
h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA); h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
extents.clear(); h.block_status(16384, 0, extent)
assert extents == [('base:allocation', 0, [4096, 3, 4096, 0, 8192, 3])], extents
h.trim(4096, 4096, nbd.CMD_FLAG_FUA); h.cache(4096, 0); h.flush()
assert h.pread(3, 4 * 1024 * 1024 - 3) == bytes(3)
h.shutdown()";
    nbdsh(&lab.uri(), script);
    assert_eq!(lab.styles(), [ReplyStyle::Structured]);
    for (kind, flag) in [
        (RequestKind::Write, command_flag::FUA),
        (RequestKind::Read, command_flag::DF),
        (RequestKind::BlockStatus, command_flag::REQ_ONE),
        (RequestKind::WriteZeroes, command_flag::NO_HOLE | command_flag::FUA),
        (RequestKind::WriteZeroes, command_flag::FAST_ZERO),
        (RequestKind::Trim, command_flag::FUA),
        (RequestKind::Cache, 0),
        (RequestKind::Flush, 0),
    ] {
        assert!(lab.saw(kind, flag), "{kind:?} with {flag:#x}");
    }
}

/// Wrong requests are answered with the specification's error and the connection goes on, in both reply styles.
#[test]
fn wrong_requests_keep_the_connection() {
    for style in ["True", "False"] {
        let lab =
            Lab::new(ExportInfo { features: Features { fua: false, ..Features::ALL }, ..info("d1", MIB) });
        let script = format!(
            "
h.set_strict_mode(0); h.set_request_structured_replies({style}); h.connect_uri(uri)
end = 1024 * 1024
fails('ENOSPC', h.pwrite, b'x' * 1024, end - 512); fails('ENOSPC', h.zero, 1024, end - 512)
fails('EINVAL', h.pread, 1024, end - 512); fails('EINVAL', h.trim, 1024, end); fails('EINVAL', h.cache, 1, end)
fails('EINVAL', h.pwrite, b'x' * 512, 0, nbd.CMD_FLAG_FUA)
fails('EINVAL', h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE); fails('EINVAL', h.zero, 512, 0, nbd.CMD_FLAG_DF)
fails('EINVAL', h.zero, 0, 0)
fails('EINVAL', h.block_status, 512, 0, lambda *a: 0)
h.pwrite(b'y' * 512, 512); assert h.pread(512, 512) == b'y' * 512; h.shutdown()"
        );
        nbdsh(&lab.uri(), &script);
        let expected = if style == "True" { ReplyStyle::Structured } else { ReplyStyle::Simple };
        assert_eq!(lab.styles(), [expected]);
    }
}

/// Old clients: EXPORT_NAME with and without the zeroes behind it.
#[test]
fn export_name_for_old_clients() {
    for flags in ["0", "nbd.HANDSHAKE_FLAG_NO_ZEROES"] {
        let lab = Lab::new(info("d1", MIB));
        let script = format!(
            "
h.set_handshake_flags({flags}); h.set_export_name('d1'); h.connect_uri(uri)
assert h.get_protocol() == 'newstyle', h.get_protocol()
assert h.get_size() == 1024 * 1024; h.pwrite(b'z' * 512, 0); assert h.pread(512, 0) == b'z' * 512; h.shutdown()"
        );
        nbdsh(&lab.uri(), &script);
        assert_eq!(lab.styles(), [ReplyStyle::Simple]);
    }
}

/// The options one by one, through libnbd's negotiation mode.
#[test]
fn options_one_by_one() {
    let lab = Lab::new(info("d1", MIB));
    let script = "
h.set_opt_mode(True); h.connect_uri(uri); names = []
assert h.opt_list(lambda name, description: names.append((name, description))) == 1
assert names == [('d1', 'the disk d1')], names
contexts = []
def context(name): contexts.append(name)
h.set_export_name('d1'); h.set_full_info(True)
assert h.opt_list_meta_context(context) == 1 and contexts == ['base:allocation'], contexts
for query, count in (('base:', 1), ('base:allocation', 1), ('base:other', 0), ('qemu:dirty-bitmap:x', 0), ('x-y:z', 0)):
    h.clear_meta_contexts(); h.add_meta_context(query)
    assert h.opt_list_meta_context(context) == count, query
h.opt_info(); assert h.get_size() == 1024 * 1024 and h.get_canonical_export_name() == 'd1'
assert h.get_export_description() == 'the disk d1'
h.set_export_name('nope'); fails('ENOENT', h.opt_info); fails('ENOENT', h.opt_go)
h.set_export_name(''); h.opt_go(); assert h.get_size() == 1024 * 1024; h.shutdown()
g = nbd.NBD(); g.set_opt_mode(True); g.connect_uri(uri); g.opt_abort()";
    nbdsh(&lab.uri(), script);
}

/// qemu-img and qemu-io of the installed QEMU: convert in and out, compare, patterns, zeroes, discard, FUA.
#[test]
fn qemu_tools() {
    qemu_work("", &Lab::new(info("d1", 24 * MIB)), ReplyStyle::Structured);
}

/// Extended headers with a newer QEMU, if `NBD_EXTENDED_QEMU` names its directory.
#[test]
fn qemu_tools_with_extended_headers() {
    let Some(directory) = std::env::var_os("NBD_EXTENDED_QEMU") else {
        println!("SKIPPED: extended headers need QEMU 8.2 or later; set NBD_EXTENDED_QEMU to its directory");
        return;
    };
    let directory = format!("{}/", directory.display());
    qemu_work(&directory, &Lab::new(info("d1", 24 * MIB)), ReplyStyle::Extended);

    // An extent of more than 32 bits in one reply. The disk's memory is never touched.
    let lab = Lab::new(info("large", 5 << 30));
    let map = json(&run(&format!("{directory}qemu-img"), &["map", "--output=json", "-f", "raw", &lab.uri()]));
    assert!(map[0]["start"] == 0 && map[0]["length"] == 5_u64 << 30, "{map}");
    assert!(lab.disk.saw(|request| request.length > u64::from(u32::MAX)), "one request asked for it");
}

fn qemu_work(directory: &str, lab: &Lab, style: ReplyStyle) {
    let (img, io) = (format!("{directory}qemu-img"), format!("{directory}qemu-io"));
    let uri = lab.uri();
    assert!(run(&img, &["info", "-f", "raw", &uri]).contains("virtual size: 24 MiB (25165824 bytes)"));
    let mut image = vec![0; 24 * MIB as usize];
    image[MIB as usize..11 * MIB as usize].copy_from_slice(&pattern(10 * MIB, 3));
    let (source, copy) = (lab.file("in.img"), lab.file("out.img"));
    let (source_path, copy_path) = (source.to_str().expect("path"), copy.to_str().expect("path"));
    fs::write(&source, &image).expect("write");
    run(&img, &["convert", "-n", "-f", "raw", "-O", "raw", source_path, &uri]);
    assert!(lab.disk.bytes() == image);
    run(&img, &["compare", "-f", "raw", "-F", "raw", source_path, &uri]);
    run(&img, &["convert", "-f", "raw", "-O", "raw", &uri, copy_path]);
    assert!(fs::read(&copy).expect("read") == image);
    let map = json(&run(&img, &["map", "--output=json", "-f", "raw", &uri]));
    assert!(map[1]["start"] == MIB && map[1]["length"] == 10 * MIB && map[1]["data"] == true, "{map}");
    assert!(map[0]["zero"] == true && map[0]["data"] == false, "{map}");

    let commands = [
        "write -P 0xab 1000 5000",
        "read -P 0xab 1000 5000",
        "write -f -P 0xcd 64k 64k",
        "read -P 0xcd 64k 64k",
        "write -z 64k 32k",
        "read -P 0 64k 32k",
        "write -zu 96k 32k",
        "read -P 0 96k 32k",
        "discard 1M 1M",
        "flush",
        "read -P 0 1M 1M",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&uri);
    let shown = run(&io, &arguments);
    assert!(!shown.contains("failed") && !shown.contains("verification"), "{shown}");
    assert!(lab.styles().iter().all(|found| *found == style), "{:?}", lab.styles());
    for (kind, flag) in [
        (RequestKind::Write, command_flag::FUA),
        (RequestKind::WriteZeroes, command_flag::NO_HOLE),
        (RequestKind::WriteZeroes, 0),
        (RequestKind::Trim, 0),
        (RequestKind::Flush, 0),
        (RequestKind::BlockStatus, 0),
    ] {
        assert!(lab.saw(kind, flag), "{kind:?} with {flag:#x}");
    }
}

/// Makes an authority, a server's and a client's certificate with certtool, in the layout of libnbd and QEMU.
fn certificates(directory: &Path) -> PathBuf {
    let pki = directory.join("pki");
    fs::create_dir(&pki).expect("directory");
    let at = |name: &str| pki.join(name).to_str().expect("path").to_string();
    let templates = [
        ("ca", "cn = lab authority\nca\ncert_signing_key\n"),
        ("server", "cn = localhost\ndns_name = localhost\ntls_www_server\nsigning_key\nencryption_key\n"),
        ("client", "cn = lab client\ntls_www_client\nsigning_key\nencryption_key\n"),
    ];
    for (who, template) in templates {
        fs::write(at(&format!("{who}.info")), template).expect("write");
        let (key, info) = (at(&format!("{who}-key.pem")), at(&format!("{who}.info")));
        let certificate = at(&format!("{who}-cert.pem"));
        run("certtool", &["--generate-privkey", "--key-type=ecdsa", "--outfile", &key]);
        let (ca, ca_key) = (at("ca-cert.pem"), at("ca-key.pem"));
        let mut arguments = vec!["--template", &info, "--load-privkey", &key, "--outfile", &certificate];
        if who == "ca" {
            arguments.push("--generate-self-signed");
        } else {
            let signed =
                ["--generate-certificate", "--load-ca-certificate", &ca, "--load-ca-privkey", &ca_key];
            arguments.extend(signed);
        }
        run("certtool", &arguments);
    }
    pki
}

fn certificate_acceptor(directory: &Path, check_clients: bool) -> Option<TlsAcceptor> {
    let pki = certificates(directory);
    let ca = pki.join("ca-cert.pem");
    let ca = check_clients.then_some(ca.as_path());
    let acceptor =
        TlsAcceptor::with_certificates(&pki.join("server-cert.pem"), &pki.join("server-key.pem"), ca);
    Some(acceptor.expect("acceptor"))
}

fn psk_acceptor(directory: &Path) -> Option<TlsAcceptor> {
    let file = directory.join("keys.psk");
    run("psktool", &["--username", "alice", "--pskfile", file.to_str().expect("path")]);
    Some(TlsAcceptor::with_psk_file(&file).expect("acceptor"))
}

/// Copies an image in and out, and checks that TLS cannot be avoided.
fn copy_through_tls(lab: &Lab, uri: &str) {
    let image = pattern(24 * MIB, 4);
    let (source, copy) = (lab.file("in.img"), lab.file("out.img"));
    fs::write(&source, &image).expect("write");
    run("nbdcopy", &[source.to_str().expect("path"), uri]);
    run("nbdcopy", &[uri, copy.to_str().expect("path")]);
    assert!(fs::read(&copy).expect("read") == image);
    assert!(run("nbdinfo", &["--list", uri]).contains("export=\"d1\""));
    let refused = fails("nbdinfo", &[&lab.uri()]);
    assert!(refused.contains("this listener speaks only TLS"), "{refused}");
}

/// TLS with certificates: libnbd and QEMU, TLS 1.3 and 1.2.
#[test]
fn tls_with_certificates() {
    let lab = Lab::with(info("d1", 24 * MIB), |directory| certificate_acceptor(directory, false));
    let pki = lab.file("pki");
    let uri = format!(
        "nbds+unix://localhost/?socket={}&tls-certificates={}",
        lab.socket().display(),
        pki.display()
    );
    copy_through_tls(&lab, &uri);
    for (version, priority) in [("TLSv1.3", "NORMAL"), ("TLSv1.2", "NORMAL:-VERS-TLS1.3")] {
        let credentials =
            format!("tls-creds-x509,id=tls0,endpoint=client,dir={},priority={priority}", pki.display());
        qemu_through_tls(&lab, &credentials, version);
    }
}

fn qemu_through_tls(lab: &Lab, credentials: &str, version: &str) {
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=tls0,tls-hostname=localhost",
        lab.socket().display()
    );
    let commands =
        ["write -P 0x5a 4096 1M", "read -P 0x5a 4096 1M", "write -P 0x5b 0 8M", "read -P 0x5b 0 8M"];
    let mut arguments = vec!["--object", credentials, "--image-opts"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&image);
    let shown = run("qemu-io", &arguments);
    assert!(!shown.contains("failed") && !shown.contains("verification"), "{shown}");
    let agreements = lock(&lab.disk.agreements);
    let protocol = agreements.last().and_then(|agreed| agreed.protocol.as_deref()).unwrap_or_default();
    assert!(protocol.starts_with(version), "{protocol}, expected {version}");
}

/// Mutual TLS: a client without a certificate is refused, one of the right authority is named.
#[test]
fn tls_with_client_certificates() {
    let lab = Lab::with(info("d1", 24 * MIB), |directory| certificate_acceptor(directory, true));
    let pki = lab.file("pki");
    let socket = lab.socket();
    let uri = |pki: &Path| {
        format!("nbds+unix://localhost/?socket={}&tls-certificates={}", socket.display(), pki.display())
    };
    copy_through_tls(&lab, &uri(&pki));
    let named =
        lock(&lab.disk.agreements).iter().all(|agreed| agreed.identity.as_deref() == Some("lab client"));
    assert!(named, "{:?}", lock(&lab.disk.agreements));

    let stranger = lab.file("stranger");
    fs::create_dir(&stranger).expect("directory");
    fs::copy(pki.join("ca-cert.pem"), stranger.join("ca-cert.pem")).expect("copy");
    fails("nbdinfo", &[&uri(&stranger)]);
}

/// Pre-shared keys: libnbd and QEMU, TLS 1.3 and 1.2; a wrong key and an unknown identity are refused.
#[test]
fn tls_with_pre_shared_keys() {
    let lab = Lab::with(info("d1", 24 * MIB), psk_acceptor);
    let keys = lab.file("keys.psk");
    let socket = lab.socket();
    let uri = |user: &str, keys: &Path| {
        format!("nbds+unix://{user}@/?socket={}&tls-psk-file={}", socket.display(), keys.display())
    };
    copy_through_tls(&lab, &uri("alice", &keys));
    let named = lock(&lab.disk.agreements).iter().all(|agreed| agreed.identity.as_deref() == Some("alice"));
    assert!(named, "{:?}", lock(&lab.disk.agreements));

    let strangers = lab.file("strangers.psk");
    for user in ["alice", "mallory"] {
        run("psktool", &["--username", user, "--pskfile", strangers.to_str().expect("path")]);
        fails("nbdinfo", &[&uri(user, &strangers)]);
    }

    let qemu = lab.file("qemu-psk");
    fs::create_dir(&qemu).expect("directory");
    fs::copy(&keys, qemu.join("keys.psk")).expect("copy");
    for (version, priority) in [("TLSv1.3", "NORMAL"), ("TLSv1.2", "NORMAL:-VERS-TLS1.3")] {
        let credentials = format!(
            "tls-creds-psk,id=tls0,endpoint=client,username=alice,dir={},priority={priority}",
            qemu.display()
        );
        qemu_through_tls(&lab, &credentials, version);
    }
}

/// A client that insists on TLS is told that there is none.
#[test]
fn no_tls_where_none_is_configured() {
    let lab = Lab::new(info("d1", MIB));
    let file = lab.file("keys.psk");
    run("psktool", &["--username", "alice", "--pskfile", file.to_str().expect("path")]);
    let uri =
        format!("nbds+unix://alice@/?socket={}&tls-psk-file={}", lab.socket().display(), file.display());
    let refused = fails("nbdinfo", &[&uri]);
    assert!(refused.contains("TLS"), "{refused}");
}
