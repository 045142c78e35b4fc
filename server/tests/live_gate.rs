//! Goal: what an image says of other files never makes the daemon open a file that it should not, nor hang, nor serve wrong data;
//! a refused attach names the file and what to do, and leaves nothing behind: no descriptor, no lock, no disk. A damaged image
//! is refused with the reason, and can be read as far as it is readable.
//! Method: chains made by qemu-img (`-u` for what it would refuse itself) and by our tools, some with edited headers; each is
//! attached, writable and read-only, and the message is compared; then the descriptors are counted, and qemu-io, which
//! takes locks, writes to the images.

mod live_process;
mod live_rig;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use live_process::{descriptor_list, descriptors};
use live_rig::nbd_client::Client;
use live_rig::{BLKTAPD, Rig, raw, run, wait_until};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// An overlay by `qemu-img create -u`, which looks at nothing; `format` as it will be stated.
fn overlay(rig: &Rig, name: &str, backing: &str, format: &str) -> String {
    let path = text(&rig.path(name));
    run("qemu-img", &["create", "-u", "-f", "qcow2", "-b", backing, "-F", format, &path, "4M"]).expect_ok();
    path
}

fn image_tool(arguments: &[&str]) {
    run(BLKTAPD, &[&["image"], arguments].concat()).expect_ok();
}

/// An image whose attach is refused with these words, writable and read-only.
struct Refused {
    spec: String,
    words: Vec<String>,
}

fn refused(path: &str, words: &[&str]) -> Refused {
    Refused { spec: format!("qcow2:{path}"), words: words.iter().map(|word| (*word).to_owned()).collect() }
}

/// Writes over a part of a file.
fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    File::options().write(true).open(path).expect("opens").write_all_at(bytes, offset).expect("writes");
}

/// Takes the type of the backing file out of a header by qemu-img: the header extension becomes one that nobody knows.
fn forget_backing_format(path: &Path) {
    let bytes = fs::read(path).expect("reads");
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).expect("the extension");
    patch(path, at as u64, &0x1234_5678_u32.to_be_bytes());
}

/// Everything that a chain can do wrong.
fn wrong_chains(rig: &Rig, outside: &Path) -> Vec<Refused> {
    let base = text(&rig.image("base.raw", 4 * MIB));
    let mut wrong = Vec::new();

    let path = overlay(rig, "outside.qcow2", &text(outside), "raw");
    wrong.push(refused(&path, &["outside.qcow2", &text(outside), "allowed_dirs"]));
    let path = overlay(rig, "etc.qcow2", &format!("{}etc/hostname", "../".repeat(30)), "raw");
    wrong.push(refused(&path, &["etc.qcow2", "hostname", "allowed_dirs"]));
    std::os::unix::fs::symlink(outside, rig.path("link.raw")).expect("links");
    let path = overlay(rig, "symlink.qcow2", "link.raw", "raw");
    wrong.push(refused(&path, &["symlink.qcow2", &text(outside), "allowed_dirs"]));

    overlay(rig, "loop-a.qcow2", "loop-b.qcow2", "qcow2");
    let path = overlay(rig, "loop-b.qcow2", "loop-a.qcow2", "qcow2");
    wrong.push(refused(&path, &["loop-b.qcow2", "comes twice", "loop", "rebase"]));
    let path = overlay(rig, "self.qcow2", "self.qcow2", "qcow2");
    wrong.push(refused(&path, &["self.qcow2", "comes twice"]));
    fs::hard_link(rig.path("self.qcow2"), rig.path("alias.qcow2")).expect("links");
    wrong.push(refused(&text(&rig.path("alias.qcow2")), &["self.qcow2", "comes twice"]));

    let path = overlay(rig, "orphan.qcow2", "missing.raw", "raw");
    wrong.push(refused(&path, &["orphan.qcow2", "missing.raw", "no such file"]));
    nix::unistd::mkfifo(&rig.path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let path = overlay(rig, "over-fifo.qcow2", "fifo", "raw");
    wrong.push(refused(&path, &["over-fifo.qcow2", "fifo", "FIFO"]));
    fs::create_dir(rig.path("folder")).expect("mkdir");
    let path = overlay(rig, "over-folder.qcow2", "folder", "raw");
    wrong.push(refused(&path, &["over-folder.qcow2", "folder", "directory"]));
    let path = overlay(rig, "over-device.qcow2", "/dev/zero", "raw");
    wrong.push(refused(&path, &["over-device.qcow2", "/dev/zero"]));
    let path = overlay(rig, "over-protocol.qcow2", "nbd://localhost/x", "raw");
    wrong.push(refused(&path, &["over-protocol.qcow2", "nbd:"]));
    let path = overlay(rig, "over-json.qcow2", "json:{\"driver\":\"null-co\"}", "raw");
    wrong.push(refused(&path, &["over-json.qcow2", "json:"]));

    let path = overlay(rig, "wrong-type.qcow2", &base, "qcow2");
    wrong.push(refused(&path, &["base.raw", "qcow2"]));
    let path = overlay(rig, "wrong-vhd.qcow2", &base, "vpc");
    wrong.push(refused(&path, &["base.raw"]));
    let path = overlay(rig, "unknown-type.qcow2", &base, "raw");
    patch_format(Path::new(&path), b"xyz");
    wrong.push(refused(&path, &["unknown-type.qcow2", "xyz", "not built in"]));
    let path = overlay(rig, "no-type.qcow2", &base, "raw");
    forget_backing_format(Path::new(&path));
    wrong.push(refused(&path, &["no-type.qcow2", "base.raw", "raw is never guessed", "rebase"]));

    // 65 images: one more than is possible.
    for number in 1..65 {
        let (below, format) =
            if number == 1 { (base.clone(), "raw") } else { (format!("deep-{}.qcow2", number - 1), "qcow2") };
        overlay(rig, &format!("deep-{number}.qcow2"), &below, format);
    }
    let path = text(&rig.path("deep-64.qcow2"));
    wrong.push(refused(&path, &["deep-64.qcow2", "64", "coalesce"]));

    // A VHD whose parent was made anew in the same place, under the same name.
    let (parent, child) = (rig.path("parent.vhd"), rig.path("child.vhd"));
    let (parent, child) = (format!("vhd:{}", parent.display()), format!("vhd:{}", child.display()));
    image_tool(&["create", &parent, "4M"]);
    image_tool(&["create", &child, "--parent", &parent]);
    image_tool(&["create", "--force", &parent, "4M"]);
    let words = ["child.vhd", "identity", "rebase"].map(str::to_owned).to_vec();
    wrong.push(Refused { spec: child, words });
    wrong
}

/// Another type of the same length in the header extension.
fn patch_format(path: &Path, format: &[u8; 3]) {
    let bytes = fs::read(path).expect("reads");
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).expect("the extension");
    patch(path, at as u64 + 8, format);
}

#[test]
fn what_an_image_refers_to_passes_the_gate_or_nothing_is_opened() {
    let rig = Rig::start();
    let outside = tempfile::tempdir().expect("a directory");
    let secret = outside.path().join("secret.raw");
    fs::write(&secret, vec![7; 4 << 20]).expect("writes");
    let wrong = wrong_chains(&rig, &secret);
    // One that is right, so that the daemon has opened what it opens once.
    rig.attach("right", &format!("qcow2:{}", overlay(&rig, "right.qcow2", "base.raw", "raw")), &[]);
    rig.ctl_ok(&["detach", "right"]);
    let before = descriptors(rig.pid());
    for Refused { spec, words } in &wrong {
        for options in [&[][..], &["--read-only"]] {
            let said = rig.ctl(&[&["attach", "d", spec, "--nbd"], options].concat()).expect_failure();
            for word in words {
                assert!(said.contains(word), "{word:?} is missing for {spec}: {said}");
            }
        }
    }
    assert_eq!(rig.ctl_json(&["list"]), serde_json::json!([]));
    wait_until("what was opened is closed", || descriptors(rig.pid()) <= before);
    let open = descriptor_list(rig.pid());
    assert!(!open.iter().any(|path| path.contains("raw") || path.contains("qcow2")), "{open:?}");
    // Other programs get their locks.
    run("qemu-io", &["-f", "raw", "-c", "write 0 512", &text(&rig.path("base.raw"))]).expect_ok();
    for Refused { spec, .. } in &wrong {
        let (_, path) = spec.split_once(':').expect("a type");
        let device = format!("driver=file,filename={path}");
        run("qemu-io", &["--image-opts", "-c", "read 0 512", "-c", "write 0 0", &device]).expect_ok();
    }
    // 64 images are possible.
    rig.attach("deep", &format!("qcow2:{}", rig.path("deep-63.qcow2").display()), &[]);
    Client::connect(&rig.socket("deep")).expect("connects").write(0, &[1; 512]);
    let snapshot = format!("qcow2:{}", rig.path("deeper.qcow2").display());
    let said = rig.ctl(&["snapshot", "deep", &snapshot]).expect_failure();
    assert!(said.contains("64") && said.contains("coalesce"), "{said}");
    assert!(!rig.path("deeper.qcow2").exists());
    Client::connect(&rig.socket("deep")).expect("connects").write(0, &[2; 512]);
}

/// With allowed directories, exactly these hold: an image in one may refer to another.
#[test]
fn allowed_directories_let_a_chain_through() {
    let outside = tempfile::tempdir().expect("a directory");
    let (inside, other) = (outside.path().join("in"), outside.path().join("out"));
    [&inside, &other].iter().for_each(|dir| fs::create_dir(dir).expect("mkdir"));
    let config = outside.path().join("blktapd.toml");
    let rig_dir = outside.path().join("rig");
    fs::create_dir(&rig_dir).expect("mkdir");
    fs::write(&config, format!("[images]\nallowed_dirs = [{:?}, {:?}]\n", text(&inside), text(&rig_dir)))
        .expect("writes");
    let rig = Rig::with(1, &["--config", &text(&config)]);
    for dir in [&inside, &other] {
        fs::write(dir.join("base.raw"), vec![7; 1 << 20]).expect("writes");
    }
    let over = |name: &str, base: &Path| {
        let path = text(&rig_dir.join(name));
        run("qemu-img", &["create", "-u", "-f", "qcow2", "-b", &text(base), "-F", "raw", &path, "1M"])
            .expect_ok();
        format!("qcow2:{path}")
    };
    let bad = over("bad.qcow2", &other.join("base.raw"));
    let said = rig.ctl(&["attach", "bad", &bad, "--nbd"]).expect_failure();
    assert!(said.contains("bad.qcow2") && said.contains("base.raw") && said.contains("allowed"), "{said}");
    rig.attach("good", &over("good.qcow2", &inside.join("base.raw")), &[]);
    assert_eq!(Client::connect(&rig.socket("good")).expect("connects").read(0, 512), [7; 512]);
}

/// Damage by its kind: what attach says, and whether what is readable can be read.
#[test]
fn a_damaged_image_is_refused_with_the_reason() {
    let rig = Rig::start();
    let fresh = |name: &str| {
        let path = rig.path(name);
        let (format, peer) = if name.ends_with("vhd") { ("vhd", "vpc") } else { ("qcow2", "qcow2") };
        run("qemu-img", &["create", "-f", peer, &text(&path), "8M"]).expect_ok();
        run("qemu-io", &["-f", peer, "-c", "write -P 5 0 1M", &text(&path)]).expect_ok();
        (format!("{format}:{}", path.display()), path)
    };
    let refuse = |spec: &str, options: &[&str], words: &[&str]| {
        let said = rig.ctl(&[&["attach", "d", spec, "--nbd"], options].concat()).expect_failure();
        words.iter().for_each(|word| assert!(said.contains(word), "{word:?} is missing for {spec}: {said}"));
    };
    let reads = |spec: &str| {
        rig.attach("d", spec, &["--read-only"]);
        assert!(Client::connect(&rig.socket("d")).expect("connects").read(0, 4096) == [5; 4096]);
        rig.ctl_ok(&["detach", "d"]);
    };
    // QEMU's mark of an image that it found corrupt.
    let (spec, path) = fresh("marked.qcow2");
    patch(&path, 79, &[2]);
    refuse(&spec, &[], &["marked.qcow2", "corrupt", "--read-only", "repair"]);
    reads(&spec);
    // A feature that nobody knows.
    let (spec, path) = fresh("feature.qcow2");
    patch(&path, 78, &[0x80]);
    refuse(&spec, &[], &["feature.qcow2"]);
    refuse(&spec, &["--read-only"], &["feature.qcow2"]);
    // Nothing of the header is left.
    let (spec, path) = fresh("blank.qcow2");
    patch(&path, 0, &[0; 512]);
    refuse(&spec, &["--read-only"], &["blank.qcow2"]);
    // Tables that lie far behind the end of the file.
    let (spec, path) = fresh("far.qcow2");
    patch(&path, 40, &(1_u64 << 40).to_be_bytes());
    refuse(&spec, &[], &["far.qcow2"]);
    refuse(&spec, &["--read-only"], &["far.qcow2"]);
    // A length that no table can hold.
    let (spec, path) = fresh("huge.qcow2");
    patch(&path, 24, &[0xff; 8]);
    refuse(&spec, &["--read-only"], &["huge.qcow2"]);
    // A block of a VHD that lies behind the end of the file; the others are right.
    let (spec, path) = fresh("block.vhd");
    let bytes = fs::read(&path).expect("reads");
    let table = u64::from_be_bytes(bytes[512 + 16..512 + 24].try_into().expect("8 bytes"));
    patch(&path, table + 4, &0x7fff_0000_u32.to_be_bytes());
    refuse(&spec, &[], &["block.vhd", "read-only"]);
    reads(&spec);
    // A footer that is lost: the copy at the beginning serves.
    let (spec, path) = fresh("footer.vhd");
    patch(&path, fs::metadata(&path).expect("stat").len() - 512, &[0; 512]);
    reads(&spec);
    // Both copies.
    patch(&path, 0, &[0; 512]);
    refuse(&spec, &["--read-only"], &["footer.vhd"]);
    // Shorter than a header, and another type than was said.
    let spec = format!("qcow2:{}", rig.image("short.qcow2", 7).display());
    refuse(&spec, &[], &["short.qcow2"]);
    let (_, path) = fresh("other.qcow2");
    refuse(&format!("vhd:{}", path.display()), &[], &["other.qcow2"]);
    // And the daemon goes on.
    rig.attach("d", &raw(&rig.image("sound.raw", MIB)), &[]);
    Client::connect(&rig.socket("d")).expect("connects").write(0, &[1; 512]);
}
