//! Goal: clients may read and write any byte range of any image, whatever blocks its store has, and neighbours in one block
//! never lose each other's writes.
//! Method: the same requests of sectors, odd sizes and odd offsets on files, loop devices of 512 and 4096 byte sectors,
//! a file system on 4096 byte sectors, tmpfs and ramfs, from one connection and from several at once, against a byte
//! model; read back by NBD and directly from the file or device. What the host does not have is skipped by name.

mod files_rig;
mod live_rig;

use std::fs::{self, File};
use std::path::Path;

use files_rig::{Loop, Mounted, make_image, skip};
use live_rig::load::Load;
use live_rig::model::Model;
use live_rig::nbd_client::{Client, FUA, Op};
use live_rig::{Random, Rig, nbdsh, raw, run, wait_until};
use tempfile::TempDir;

const KIB: u64 = 1 << 10;
/// Not large: every byte of a disk is looked at again and again.
const DISK_BYTES: u64 = 512 * KIB;

const LENGTHS: [usize; 9] = [1, 511, 512, 513, 1000, 4095, 4096, 4097, 66_000];
const OFFSETS: [u64; 9] = [0, 1, 511, 512, 513, 2048, 4095, 4096, 8191];

/// A disk under test, and what it must hold.
struct Disk<'a> {
    rig: &'a Rig,
    name: &'a str,
    /// The file or device itself.
    image: &'a Path,
    held: Vec<u8>,
    random: Random,
}

/// Attaches an image that holds `held` and runs everything on it.
fn run_all(rig: &Rig, name: &str, spec: &str, image: &Path, held: Vec<u8>) {
    eprintln!("{name}: {spec}");
    rig.attach(name, spec, &[]);
    let mut disk = Disk { rig, name, image, random: Random(held.len() as u64), held };
    disk.each_length_at_each_offset();
    disk.neighbours_of_one_block();
    disk.at_random();
    // The same bytes are there when the daemon has let go of the image.
    wait_until("its clients have gone", || rig.ctl(&["detach", name]).code == Some(0));
    disk.compare_with_the_image();
}

impl Disk<'_> {
    fn client(&self) -> Client {
        let client = Client::connect(&self.rig.socket(self.name)).expect("connects");
        assert_eq!(client.size_bytes, self.held.len() as u64, "size of {}", self.name);
        client
    }

    fn compare(&self, found: &[u8], start: usize) {
        let expected = &self.held[start..start + found.len()];
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        if let Some(at) = differs {
            let (position, found, expected) = (start + at, found[at], expected[at]);
            panic!("{}: byte {position} is {found:#04x}, not {expected:#04x}", self.name);
        }
    }

    /// The file may be shorter than the disk: behind its end the disk reads as zero.
    fn compare_with_the_image(&self) {
        let mut bytes = fs::read(self.image).expect("reads");
        assert!(bytes.len() <= self.held.len(), "{} has grown to {} bytes", self.name, bytes.len());
        bytes.resize(self.held.len(), 0);
        self.compare(&bytes, 0);
    }

    fn each_length_at_each_offset(&mut self) {
        let mut client = self.client();
        let size = self.held.len();
        let first = client.read(0, size);
        self.compare(&first, 0);
        for length in LENGTHS {
            for from in OFFSETS {
                // Counted from the start of the disk and from its end.
                for offset in [from as usize, size - length - from as usize] {
                    self.write_or_zero(&mut client, offset, length);
                    let (start, end) = (offset.saturating_sub(5000), (offset + length + 5000).min(size));
                    let found = client.read(start as u64, end - start);
                    self.compare(&found, start);
                    let found = client.read(offset as u64, length);
                    self.compare(&found, offset);
                }
            }
        }
        client.flush();
        self.compare_with_the_image();
    }

    fn write_or_zero(&mut self, client: &mut Client, offset: usize, length: usize) {
        let range = offset..offset + length;
        if self.random.below(4) == 0 {
            client.change(Op::WriteZeroes, 0, offset as u64, length as u32, &[]);
            self.held[range].fill(0);
        } else {
            let data = self.random.bytes(length);
            let flags = if self.random.below(4) == 0 { FUA } else { 0 };
            client.change(Op::Write, flags, offset as u64, length as u32, &data);
            self.held[range].copy_from_slice(&data);
        }
    }

    /// Four connections write at once, each every fourth piece of the same blocks.
    fn neighbours_of_one_block(&mut self) {
        let mut clients: Vec<Client> = (0..4).map(|_| self.client()).collect();
        for piece in [512, 100, 1365] {
            let (start, end) = (self.random.below(5000) as usize, self.held.len().min(100_000));
            for (index, offset) in (start..end - piece).step_by(piece).enumerate() {
                let data = self.random.bytes(piece);
                clients[index % 4].send(Op::Write, 0, offset as u64, piece as u32, &data);
                self.held[offset..offset + piece].copy_from_slice(&data);
                if index % 256 == 255 {
                    answers(&mut clients);
                }
            }
            answers(&mut clients);
            let found = clients[0].read(0, self.held.len());
            self.compare(&found, 0);
        }
        clients[1].flush();
        self.compare_with_the_image();
    }

    fn at_random(&mut self) {
        let (seed, held) = (self.random.next(), std::mem::take(&mut self.held));
        eprintln!("{}: seed {seed:#x}", self.name);
        let mut load = Load::new(&self.rig.socket(self.name), 3, Model::new(held), seed);
        load.run(400);
        self.held = load.settle().into_bytes();
        self.compare_with_the_image();
    }
}

/// Takes the answers to all that was sent; none may be an error.
fn answers(clients: &mut [Client]) {
    for client in clients {
        for reply in client.finish_all() {
            assert_eq!(reply.error, 0, "request {}", reply.cookie);
        }
    }
}

/// A file of random bytes.
fn filled(path: &Path, bytes: u64) -> Vec<u8> {
    let held = Random(bytes).bytes(bytes as usize);
    fs::write(path, &held).expect("writes");
    held
}

#[test]
fn a_regular_file() {
    let rig = Rig::with(2, &[]);
    for (name, options) in [("direct", ""), ("back", "?cache=writeback"), ("through", "?cache=writethrough")]
    {
        let image = rig.path(name);
        let held = filled(&image, DISK_BYTES);
        run_all(&rig, name, &format!("{}{options}", raw(&image)), &image, held);
    }
}

/// A disk has the file's length rounded up to 512; behind the file's end are zeroes, and a write there makes the file longer,
/// at most as long as the disk.
#[test]
fn files_of_odd_lengths() {
    let rig = Rig::start();
    for (odd, cache) in [(1, "none"), (200, "writeback"), (511, "none"), (513, "none"), (4095, "none")] {
        let name = format!("odd{odd}");
        let image = rig.path(&name);
        let length = DISK_BYTES + odd;
        let mut held = filled(&image, length);
        held.resize(length.next_multiple_of(512) as usize, 0);
        let spec = format!("{}?cache={cache}", raw(&image));
        rig.attach(&name, &spec, &[]);
        let file_length = || fs::metadata(&image).expect("stat").len();
        {
            let mut client = Client::connect(&rig.socket(&name)).expect("connects");
            assert_eq!(client.size_bytes, held.len() as u64);
            let whole = client.read(0, held.len());
            assert!(whole == held, "{name}: the file, then zeroes");
            assert_eq!(file_length(), length, "{name}: a read changes nothing");
            let last = held.len() as u64 - 1;
            client.write(last, b"E");
            client.flush();
            assert_eq!(file_length(), held.len() as u64, "{name}: longer, and no longer than the disk");
            *held.last_mut().expect("not empty") = b'E';
            let reply = client.call(Op::Write, 0, last, 2, b"EF");
            assert_ne!(reply.error, 0, "{name}: beyond the disk");
            assert!(client.read(0, held.len()) == held, "{name}");
        }
        wait_until("its clients have gone", || rig.ctl(&["detach", &name]).code == Some(0));
        // Its length again, for the whole matrix across the end of the file.
        File::options().write(true).open(&image).and_then(|file| file.set_len(length)).expect("truncates");
        held[length as usize..].fill(0);
        run_all(&rig, &name, &spec, &image, held);
    }
}

/// `sector=` is what clients are told is the smallest request, and what they are held to.
#[test]
fn the_sector_option_is_the_smallest_request() {
    let rig = Rig::start();
    let image = rig.image("d.img", DISK_BYTES);
    for (name, sector) in [("small", 512), ("large", 4096)] {
        let uri = rig.attach(name, &format!("{}?sector={sector}", raw(&image)), &[]);
        let info = run("nbdinfo", &["--json", &uri]).expect_ok();
        assert!(info.contains(&format!("\"block_size_minimum\": {sector}")), "{info}");
        let script = format!(
            "
h.set_strict_mode(0)
for offset, size in ((0, 100), (100, {sector}), ({sector} // 2, {sector}), (0, {sector} + 1)):
    for what in (lambda: h.pread(size, offset), lambda: h.pwrite(b'x' * size, offset)):
        try:
            what()
            raise SystemExit((offset, size))
        except nbd.Error as error:
            assert error.errno == 'EINVAL', error
h.pwrite(b'x' * {sector}, {sector})
assert h.pread(3 * {sector}, 0) == bytes({sector}) + b'x' * {sector} + bytes({sector})
h.zero({sector}, {sector})
"
        );
        nbdsh(&uri, &script).expect_ok();
        wait_until("its clients have gone", || rig.ctl(&["detach", name]).code == Some(0));
    }
    let odd = rig.image("odd.img", DISK_BYTES + 512);
    let said = rig.ctl(&["attach", "odd", &format!("{}?sector=4096", raw(&odd)), "--nbd"]).expect_failure();
    assert!(said.contains("odd.img") && said.contains("4096"), "{said}");
}

/// A loop device over an image; `None` with the reason said when the host has none.
fn loop_device(test: &str, dir: &TempDir, bytes: u64, sector: u32) -> Option<Loop> {
    let image = make_image(&dir.path().join(format!("loop{sector}.img")), bytes);
    let options = [format!("--sector-size={sector}"), "--direct-io=on".to_owned()];
    let made = Loop::new(&image, &[&options[0], &options[1]]).or_else(|_| Loop::new(&image, &[&options[0]]));
    made.inspect_err(|why| skip(test, why)).ok()
}

#[test]
fn loop_devices() {
    let dir = tempfile::tempdir().expect("a directory");
    for sector in [512, 4096] {
        let Some(device) = loop_device("loop_devices", &dir, DISK_BYTES, sector) else { return };
        let rig = Rig::with(2, &[]);
        run_all(&rig, "loop", &raw(&device.node), &device.node, vec![0; DISK_BYTES as usize]);
        // The device passed it on.
        let below = fs::read(dir.path().join(format!("loop{sector}.img"))).expect("reads");
        assert!(below == fs::read(&device.node).expect("reads"), "the file below the device");
    }
}

#[test]
fn a_file_system_on_large_sectors() {
    const TEST: &str = "a_file_system_on_large_sectors";
    let dir = tempfile::tempdir().expect("a directory");
    let Some(device) = loop_device(TEST, &dir, 64 << 20, 4096) else { return };
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", &device.node.to_string_lossy()]).expect_ok();
    let point = dir.path().join("mounted");
    let mounted = match Mounted::new(&point, "ext4", &device.node.to_string_lossy()) {
        Ok(mounted) => mounted,
        Err(why) => return skip(TEST, &why),
    };
    let rig = Rig::with(2, &[]);
    for length in [DISK_BYTES, DISK_BYTES + 700] {
        let image = mounted.point.join(format!("{length}.img"));
        let mut held = filled(&image, length);
        held.resize(length.next_multiple_of(512) as usize, 0);
        run_all(&rig, "disk", &raw(&image), &image, held);
    }
}

#[test]
fn a_file_on_tmpfs() {
    let dir = tempfile::tempdir().expect("a directory");
    let mounted = match Mounted::new(&dir.path().join("mounted"), "tmpfs", "none") {
        Ok(mounted) => mounted,
        Err(why) => return skip("a_file_on_tmpfs", &why),
    };
    let rig = Rig::with(2, &[]);
    for (name, options) in [("direct", ""), ("back", "?cache=writeback")] {
        let image = mounted.point.join(name);
        let held = filled(&image, DISK_BYTES);
        let spec = format!("{}{options}", raw(&image));
        // Whether tmpfs takes O_DIRECT depends on the kernel; where it does not, the way out is said.
        let tried = rig.ctl(&["attach", "try", &spec, "--nbd"]);
        if tried.code != Some(0) {
            assert!(options.is_empty() && tried.stderr.contains("cache=writeback"), "{tried:?}");
            continue;
        }
        rig.ctl_ok(&["detach", "try"]);
        run_all(&rig, name, &spec, &image, held);
    }
}

#[test]
fn a_file_on_ramfs_needs_a_cache() {
    let dir = tempfile::tempdir().expect("a directory");
    let mounted = match Mounted::new(&dir.path().join("mounted"), "ramfs", "none") {
        Ok(mounted) => mounted,
        Err(why) => return skip("a_file_on_ramfs_needs_a_cache", &why),
    };
    let rig = Rig::with(2, &[]);
    let image = mounted.point.join("disk.img");
    let held = filled(&image, DISK_BYTES);
    let said = rig.ctl(&["attach", "disk", &raw(&image), "--nbd"]).expect_failure();
    assert!(
        said.contains("disk.img") && said.contains("cache=writeback"),
        "names the file and the way out: {said}"
    );
    assert_eq!(rig.ctl_json(&["list"]), serde_json::json!([]), "nothing is half attached");
    run_all(&rig, "disk", &format!("{}?cache=writeback", raw(&image)), &image, held);
}
