//! Goal: clients reach their disks over TLS, with certificates and with pre-shared keys, and nobody else does.
//! Method: keys made by GnuTLS' own tools, listeners of a real daemon, clients of libnbd and QEMU (both on GnuTLS, the
//! daemon on OpenSSL), data in and out compared.

mod live_rig;

use std::fs;
use std::path::Path;

use live_rig::{Random, Rig, free_port, raw, run};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A directory with an authority and with a key and certificate that it signed, under the names that libnbd and QEMU
/// look for: `ca-cert.pem`, `PERSON-cert.pem`, `PERSON-key.pem`.
fn pki(directory: &Path, people: &[&str]) {
    fs::create_dir_all(directory).expect("a directory");
    let path = |name: String| text(&directory.join(name));
    let template = |name: &str, lines: &str| {
        let file = path(format!("{name}.template"));
        fs::write(&file, format!("cn = {name}\nexpiration_days = 2\n{lines}\n")).expect("writes");
        file
    };
    let key = |name: &str| {
        let file = path(format!("{name}-key.pem"));
        run("certtool", &["--generate-privkey", "--key-type=ecdsa", "--outfile", &file]).expect_ok();
        file
    };
    let (ca_template, ca_key) = (template("ca", "ca\ncert_signing_key"), key("ca"));
    let ca = path("ca-cert.pem".into());
    let own =
        ["--generate-self-signed", "--load-privkey", &ca_key, "--template", &ca_template, "--outfile", &ca];
    run("certtool", &own).expect_ok();
    for person in people {
        let lines =
            "dns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\ntls_www_client\nsigning_key";
        let (template, key) = (template(person, lines), key(person));
        let certificate = path(format!("{person}-cert.pem"));
        let signed = ["--generate-certificate", "--load-ca-certificate", &ca, "--load-ca-privkey", &ca_key];
        let what = ["--load-privkey", &key, "--template", &template, "--outfile", &certificate];
        run("certtool", &[&signed[..], &what[..]].concat()).expect_ok();
    }
}

/// Copies random data in and out with nbdcopy, and compares.
fn carries_data(rig: &Rig, uri: &str, disk: &Path) {
    let source = rig.path("source.img");
    fs::write(&source, Random(5).bytes(8 << 20)).expect("writes");
    let out = rig.path("out.img");
    run("nbdcopy", &["--connections=2", "--flush", &text(&source), uri]).expect_ok();
    assert!(fs::read(disk).expect("reads") == fs::read(&source).expect("reads"), "in");
    run("nbdcopy", &["--connections=2", uri, &text(&out)]).expect_ok();
    assert!(fs::read(&out).expect("reads") == fs::read(&source).expect("reads"), "out");
    // Many small requests at once.
    let zeroes = rig.image("zeroes.img", 8 * MIB);
    let small = ["--connections=4", "--requests=64", "--request-size=4096"];
    run("nbdcopy", &[&small[..], &["--allocated", &text(&zeroes), uri]].concat()).expect_ok();
    run("nbdcopy", &[&small[..], &[&text(&source), uri]].concat()).expect_ok();
    fs::remove_file(&out).expect("removes");
    run("nbdcopy", &[&small[..], &[uri, &text(&out)]].concat()).expect_ok();
    assert!(fs::read(&out).expect("reads") == fs::read(&source).expect("reads"), "in small pieces");
}

#[test]
fn certificates_prove_the_server() {
    let keys = tempfile::tempdir().expect("a directory");
    pki(keys.path(), &["server"]);
    let file = |name: &str| text(&keys.path().join(name));
    // What libnbd and QEMU call a client without a certificate: a directory with the authority only.
    let client = keys.path().join("client");
    fs::create_dir(&client).expect("a directory");
    fs::copy(file("ca-cert.pem"), client.join("ca-cert.pem")).expect("copies");
    let port = free_port();
    let listen = format!("127.0.0.1:{port},tls");
    let (cert, key) = (file("server-cert.pem"), file("server-key.pem"));
    let rig = Rig::with(2, &["--nbd-listen", &listen, "--tls-cert", &cert, "--tls-key", &key]);
    let disk = rig.image("d1.img", 8 * MIB);
    rig.attach("d1", &raw(&disk), &[]);

    let uri = format!("nbds://localhost:{port}/d1?tls-certificates={}", client.display());
    carries_data(&rig, &uri, &disk);
    let tls = run("nbdinfo", &["--json", &uri]).expect_ok();
    assert!(tls.contains("\"TLS\": true"), "{tls}");
    // QEMU's client.
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", client.display());
    let image = format!("driver=nbd,host=localhost,port={port},export=d1,tls-creds=tls0");
    let commands = ["-c", "write -P 9 1M 300k", "-c", "flush", "-c", "read -P 9 1M 300k"];
    let qemu_io = [&["--object", &object, "--image-opts"], &commands[..], &[&image]].concat();
    let printed = run("qemu-io", &qemu_io).expect_ok();
    assert!(!printed.contains("failed"), "{printed}");

    // Without TLS nothing is told, not even the names of the disks.
    run("nbdinfo", &[&format!("nbd://localhost:{port}/d1")]).expect_failure();
    let said = run("nbdinfo", &["--list", &format!("nbd://localhost:{port}/")]).expect_failure();
    assert!(!said.contains("d1"), "{said}");
    // A server that another authority signed is not believed: the check above means something.
    let other = keys.path().join("other");
    pki(&other, &[]);
    let uri = format!("nbds://localhost:{port}/d1?tls-certificates={}", other.display());
    run("nbdinfo", &[&uri]).expect_failure();
}

#[test]
fn certificates_prove_the_client() {
    let keys = tempfile::tempdir().expect("a directory");
    let (good, other) = (keys.path().join("good"), keys.path().join("other"));
    pki(&good, &["server", "client"]);
    pki(&other, &["client"]);
    let file = |name: &str| text(&good.join(name));
    let port = free_port();
    let listen = format!("127.0.0.1:{port},tls");
    let (cert, key, ca) = (file("server-cert.pem"), file("server-key.pem"), file("ca-cert.pem"));
    let files = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca];
    let rig = Rig::with(1, &[&["--nbd-listen", &listen], &files[..]].concat());
    rig.attach("d1", "ram:m?size=8M", &[]);
    let uri =
        |directory: &Path| format!("nbds://localhost:{port}/d1?tls-certificates={}", directory.display());

    run("nbdinfo", &[&uri(&good)]).expect_ok();
    let shown = rig.ctl_ok(&["events"]) + &rig.log();
    assert!(!shown.contains("panicked"), "{shown}");
    // Signed by another authority, though this client believes the server.
    fs::copy(good.join("ca-cert.pem"), other.join("ca-cert.pem")).expect("copies");
    run("nbdinfo", &[&uri(&other)]).expect_failure();
    // No certificate at all.
    let nobody = keys.path().join("nobody");
    fs::create_dir(&nobody).expect("a directory");
    fs::copy(good.join("ca-cert.pem"), nobody.join("ca-cert.pem")).expect("copies");
    run("nbdinfo", &[&uri(&nobody)]).expect_failure();
    run("nbdinfo", &[&uri(&good)]).expect_ok();
}

#[test]
fn pre_shared_keys_prove_both() {
    let keys = tempfile::tempdir().expect("a directory");
    let file = |name: &str| text(&keys.path().join(name));
    for (name, users) in [("keys.psk", &["alice", "bob"][..]), ("other.psk", &["alice"])] {
        for user in users {
            run("psktool", &["-u", user, "-p", &file(name)]).expect_ok();
        }
    }
    let port = free_port();
    let listen = format!("127.0.0.1:{port},tls");
    let rig = Rig::with(1, &["--nbd-listen", &listen, "--tls-psk", &file("keys.psk")]);
    let disk = rig.image("d1.img", 8 * MIB);
    rig.attach("d1", &raw(&disk), &[]);

    let uri =
        |user: &str, keys: &str| format!("nbds://{user}@localhost:{port}/d1?tls-psk-file={}", file(keys));
    carries_data(&rig, &uri("alice", "keys.psk"), &disk);
    run("nbdinfo", &[&uri("bob", "keys.psk")]).expect_ok();
    run("nbdinfo", &[&uri("alice", "other.psk")]).expect_failure();
    run("nbdinfo", &[&uri("carol", "keys.psk")]).expect_failure();
    run("nbdinfo", &[&format!("nbd://localhost:{port}/d1")]).expect_failure();
    run("nbdinfo", &[&uri("alice", "keys.psk")]).expect_ok();
}
