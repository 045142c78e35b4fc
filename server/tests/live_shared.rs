//! Goal: a disk's blkif socket serves local clients that share their memory as rings of guests are served, whatever they do; and what
//! happens to the disk meanwhile (pause, move, detach, the daemon's end) happens to them as it should.
//! Method: a real daemon; the frontend of the library, whose loads know each sector that they must read; a client in a process of its own
//! that is killed; first packets that break the protocol. Descriptors of the daemon are counted.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is what they are for")]

mod live_process;
mod live_rig;
mod shared_client;

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use live_process::descriptors;
use live_rig::{PATIENCE, Rig, Running, raw, wait_until};
use nix::sys::socket::{MsgFlags, send};
use ring_bridge::blkif::client::{Client, Shape};
use ring_bridge::blkif::request::Status;
use ring_bridge::blkif::wire::{Abi, REQ_PROD};
use ring_bridge::grants::memfd::make_client_memory;
use ring_bridge::grants::share::{self, Kind, Message};
use ring_bridge::memory::RingMemory;
use shared_client::{Load, SMALL, Session, dial, hear, hear_reason, session, try_session};

const MIB: u64 = 1 << 20;

fn socket(rig: &Rig, disk: &str) -> PathBuf {
    rig.run_dir().join("blkif").join(format!("{disk}.sock"))
}

fn attach(rig: &Rig, disk: &str, spec: &str, options: &[&str]) -> PathBuf {
    rig.ctl_ok(&[&["attach", disk, spec, "--blkif"], options].concat());
    socket(rig, disk)
}

/// Files of requests in flight.
fn tables(rig: &Rig) -> usize {
    fs::read_dir(rig.run_dir().join("inflight")).map_or(0, Iterator::count)
}

fn clients(rig: &Rig, disk: &str) -> u64 {
    rig.ctl_json(&["show", disk])["clients"].as_u64().unwrap()
}

/// Each queue of a client on a thread and a part of the disk of its own. Returns what the disk must hold.
fn verified(session: Session, disk_bytes: u64, requests: usize) -> Vec<u8> {
    let part = (disk_bytes / 512) as usize / session.lines.len();
    let loads = session.lines.into_iter().enumerate();
    let threads: Vec<_> = loads
        .map(|(number, line)| {
            let mut load = Load::new(line, (number * part) as u64, part);
            std::thread::spawn(move || {
                load.run(requests);
                load.expected()
            })
        })
        .collect();
    let expected = threads.into_iter().flat_map(|thread| thread.join().expect("a load"));
    expected.collect()
}

#[test]
fn data_is_verified_on_every_kind_of_ring_and_disk() {
    let rig = Rig::start();
    let shapes = [
        SMALL,
        Shape { abi: Abi::X86_32, ring_pages: 2, places: 60, persistent: true, ..SMALL },
        Shape { queues: 4, ring_pages: 4, places: 64, persistent: true, ..SMALL },
        Shape { queues: 8, ring_pages: 16, places: 16, pages: 64, ..SMALL },
        Shape { pages: 256, places: 12, persistent: true, ..SMALL },
    ];
    let before = descriptors(rig.pid());
    for (number, shape) in shapes.into_iter().enumerate() {
        let image = rig.image(&format!("{number}.img"), 8 * MIB);
        let path = attach(&rig, "file", &raw(&image), &[]);
        let one = session(&path, "file", shape);
        assert_eq!(one.offer["max-ring-page-order"], "4");
        assert_eq!(one.connected["sectors"], (8 * MIB / 512).to_string());
        assert_eq!((one.connected["sector-size"].as_str(), one.connected["info"].as_str()), ("512", "0"));
        let shown = rig.ctl_json(&["show", "file"]);
        let peer = shown["connections"][0]["peer"].as_str().unwrap().to_owned();
        assert!(peer.starts_with(&format!("blkif unix pid {}", std::process::id())), "{peer}");
        assert_eq!(tables(&rig), shape.queues);
        let guest = rig.ctl_json(&["guests"])[0].clone();
        assert!(guest["device"].as_str().is_some_and(|name| name.starts_with("blkif/file/")), "{guest}");
        assert_eq!(
            (&guest["link"], &guest["queues"]),
            (&"connected".into(), &shape.queues.into()),
            "{guest}"
        );
        let expected = verified(one, 8 * MIB, 120);
        wait_until("the client is gone", || clients(&rig, "file") == 0);
        rig.ctl_ok(&["detach", "file"]);
        assert!(
            fs::read(&image).unwrap()[..expected.len()] == expected[..],
            "the file holds what was written"
        );
        let path = attach(&rig, "memory", "ram:m?size=8M", &[]);
        verified(session(&path, "memory", shape), 8 * MIB, 120);
        wait_until("the client is gone", || clients(&rig, "memory") == 0);
        rig.ctl_ok(&["detach", "memory"]);
        wait_until("tables go with their clients", || tables(&rig) == 0);
        assert_eq!(rig.ctl_json(&["guests"]), serde_json::json!([]));
    }
    wait_until("all descriptors are back", || descriptors(rig.pid()) <= before + 4);
}

#[test]
fn a_read_only_disk_and_a_resized_one_say_so() {
    let rig = Rig::start();
    let path = attach(&rig, "frozen", &raw(&rig.image("frozen.img", MIB)), &["--read-only"]);
    let mut one = session(&path, "frozen", SMALL);
    assert_eq!(one.connected["info"], "4");
    assert_eq!(one.lines[0].write(0, &[1; 512]), Status::Error);
    assert_eq!(one.lines[0].read(0, 512), (Status::Okay, vec![0; 512]));
    let path = attach(&rig, "grows", &raw(&rig.image("grows.img", MIB)), &[]);
    let mut one = session(&path, "grows", SMALL);
    assert_eq!(one.lines[0].write(MIB / 512, &[7; 512]), Status::Error, "behind the end");
    rig.ctl_ok(&["resize", "grows", "2M"]);
    let (message, _) = hear(&one.socket).unwrap();
    assert_eq!((message.kind, message.keys["sectors"].as_str()), (Kind::Connected, "4096"));
    assert_eq!(one.lines[0].write(MIB / 512, &[7; 512]), Status::Okay);
}

#[test]
fn pause_and_move_under_load_lose_nothing() {
    let rig = Rig::with(2, &[]);
    let image = rig.image("d.img", 16 * MIB);
    let path = attach(&rig, "d", &raw(&image), &["--shard", "0"]);
    // Another disk with a client on each shard: numbers of clients must not meet when a disk comes.
    let shards = rig.ctl_json(&["shards"]).as_array().unwrap().len();
    let last = (shards - 1).to_string();
    let others = [("a", "0"), ("b", &*last)]
        .map(|(name, shard)| attach(&rig, name, "ram:x?size=4M", &["--shard", shard]));
    let mut others =
        ["a", "b"].iter().zip(&others).map(|(name, path)| session(path, name, SMALL)).collect::<Vec<_>>();
    let shape = Shape { queues: 2, ring_pages: 2, places: 40, pages: 32, persistent: true, ..SMALL };
    let two = session(&path, "d", shape);
    static STOP: AtomicBool = AtomicBool::new(false);
    let part = (16 * MIB / 512 / 2) as usize;
    let threads: Vec<_> = (two.lines.into_iter().enumerate())
        .map(|(number, line)| {
            let mut load = Load::new(line, (number * part) as u64, part);
            std::thread::spawn(move || {
                // However slow the machine is, it goes on.
                while !STOP.load(Ordering::Relaxed) || load.answered < 50 {
                    load.submit();
                    assert!(load.check(PATIENCE), "no answer");
                }
                load.drain();
                load
            })
        })
        .collect();
    for round in 0..6 {
        rig.ctl_ok(&["pause", "d"]);
        assert_eq!(clients(&rig, "d"), 1);
        rig.ctl_ok(&["resume", "d"]);
        if shards > 1 {
            rig.ctl_ok(&["move", "d", if round % 2 == 0 { "1" } else { "0" }]);
        }
        for other in &mut others {
            assert_eq!(other.lines[0].write(round, &[round as u8; 512]), Status::Okay);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    STOP.store(true, Ordering::Relaxed);
    let loads: Vec<Load> = threads.into_iter().map(|thread| thread.join().expect("a load")).collect();
    let expected: Vec<u8> = loads.iter().flat_map(Load::expected).collect();
    drop((two.socket, loads));
    wait_until("the client is gone", || clients(&rig, "d") == 0);
    rig.ctl_ok(&["detach", "d"]);
    assert!(fs::read(&image).unwrap() == expected, "the file holds what was written");
}

#[test]
fn detach_waits_for_clients_and_force_does_not() {
    let rig = Rig::start();
    let path = attach(&rig, "d", &raw(&rig.image("d.img", 4 * MIB)), &[]);
    let mut one = session(&path, "d", SMALL);
    let said = rig.ctl(&["--timeout", "1", "detach", "d"]).expect_failure();
    assert!(said.contains("is in use; blkif unix pid"), "{said}");
    assert_eq!(one.lines[0].write(3, &[3; 512]), Status::Okay, "nothing has changed");
    let mut load = Load::new(one.lines.remove(0), 64, 4096);
    load.submit();
    rig.ctl_ok(&["detach", "d", "--force"]);
    assert!(hear_reason(&one.socket).contains("detached"));
    assert!(!path.exists(), "its socket goes");
    wait_until("it is gone", || rig.ctl(&["show", "d"]).code != Some(0));
    wait_until("its tables go", || tables(&rig) == 0);
    attach(&rig, "d", &raw(&rig.path("d.img")), &[]);
    let mut one = session(&path, "d", SMALL);
    assert_eq!(one.lines[0].read(3, 512), (Status::Okay, vec![3; 512]));
}

#[test]
fn the_end_of_the_daemon_is_clean_and_the_socket_comes_back() {
    let mut rig = Rig::start();
    let path = attach(&rig, "d", "ram:m?size=1M", &[]);
    let mut one = session(&path, "d", SMALL);
    assert_eq!(one.lines[0].write(0, &[9; 512]), Status::Okay);
    assert!(rig.terminate().success(), "{}", rig.log());
    assert!(hear_reason(&one.socket).contains("stopping"));
    rig.restart();
    rig.wait_for_state("d", "running");
    let mut one = session(&path, "d", SMALL);
    assert_eq!(one.lines[0].read(0, 512), (Status::Okay, vec![9; 512]));
    // A daemon that dies leaves tables, of which nobody can ask for anything any more.
    assert_eq!(tables(&rig), 1);
    rig.kill();
    rig.restart();
    wait_until("they are removed", || tables(&rig) == 0);
    rig.wait_for_state("d", "running");
    let mut one = session(&path, "d", SMALL);
    assert_eq!(one.lines[0].read(0, 512), (Status::Okay, vec![9; 512]));
}

#[test]
fn a_broken_ring_ends_its_client_and_nobody_else() {
    let rig = Rig::start();
    let path = attach(&rig, "d", "ram:m?size=1M", &[]);
    let mut good = session(&path, "d", SMALL);
    let bad = session(&path, "d", Shape { queues: 2, ..SMALL });
    bad.lines[1].queue.frontend.memory().store(REQ_PROD, 1000).unwrap();
    ring_bridge::blkif::client::kick(&bad.lines[1].channel);
    let reason = hear_reason(&bad.socket);
    assert!(reason.contains("queue 1"), "{reason}");
    assert_eq!(good.lines[0].write(0, &[1; 512]), Status::Okay);
    wait_until("the other one is gone", || clients(&rig, "d") == 1);
    wait_until("its tables are gone", || tables(&rig) == 1);
}

/// Where the client that is killed connects to.
const SOCKET: &str = "BLKTAPD_TEST_SHARED_SOCKET";

/// Not a test: the process that is killed. It writes for ever, and says which sectors are acknowledged.
#[test]
#[ignore = "the other process of a_client_that_is_killed_leaves_nothing, which starts it"]
fn writing_process() {
    let Ok(path) = std::env::var(SOCKET) else { return };
    let shape = Shape { queues: 2, ring_pages: 4, places: 100, pages: 64, persistent: true, ..SMALL };
    let mut one = session(Path::new(&path), "d", shape);
    let second = one.lines.remove(1);
    std::thread::spawn(move || {
        let mut load = Load::new(second, 8192, 8192);
        loop {
            load.submit();
            load.check(PATIENCE);
        }
    });
    for sector in 0.. {
        assert_eq!(one.lines[0].write(sector % 8192, &[sector as u8; 512]), Status::Okay);
        if sector == 50 {
            println!("fifty are written");
        }
    }
}

#[test]
fn a_client_that_is_killed_leaves_nothing() {
    let rig = Rig::start();
    let path = attach(&rig, "d", &raw(&rig.image("d.img", 8 * MIB)), &[]);
    let before = descriptors(rig.pid());
    for _ in 0..4 {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["writing_process", "--exact", "--ignored", "--nocapture"]).env(SOCKET, &path);
        let mut process = Running::start(&mut command);
        wait_until("it has written", || process.printed().contains("fifty"));
        drop(process);
        wait_until("the daemon has noticed", || clients(&rig, "d") == 0);
        wait_until("its tables are gone", || tables(&rig) == 0);
    }
    wait_until("its descriptors are back", || descriptors(rig.pid()) <= before + 4);
    let mut one = session(&path, "d", SMALL);
    assert_eq!(one.lines[0].read(40, 512), (Status::Okay, vec![40; 512]));
    drop(one);
    rig.ctl_ok(&["detach", "d"]);
}

fn with(message: &Message, changes: &[(&str, &str)]) -> Message {
    let mut keys = message.keys.clone();
    keys.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    Message::new(message.kind, keys.into_iter().filter(|(_, value)| value != "-"))
}

#[test]
fn hostile_packets_are_refused_with_a_sentence() {
    let rig = Rig::start();
    let path = attach(&rig, "d", "ram:m?size=1M", &[]);
    let mut good = session(&path, "d", SMALL);
    let before = descriptors(rig.pid());
    let client = Client::new(SMALL).unwrap();
    let open = client.open("d");
    let huge = make_client_memory(65537).unwrap();
    for round in 0..20 {
        // First packets that are none.
        for rubbish in [
            &b"x"[..],
            b"GET / HTTP/1.1\n",
            b"blktapd-share 2 open\n",
            b"blktapd-share 1 open\na",
            &[0xff; 60_000],
        ] {
            let one = dial(&path);
            send(one.as_raw_fd(), rubbish, MsgFlags::empty()).unwrap();
            assert!(hear_reason(&one).contains("not a message"));
        }
        // First messages that are wrong, with descriptors or without.
        let file = fs::File::open("/dev/null").unwrap();
        let cases: [(Message, Vec<_>, &str); 8] = [
            (with(&open, &[("disk", "other")]), vec![client.file()], "not served here"),
            (with(&open, &[("queues", "9")]), vec![client.file()], "queues"),
            (with(&open, &[("queues", "-")]), vec![client.file()], "queues"),
            (open.clone(), vec![], "0 descriptors"),
            (open.clone(), vec![client.file(); 100], "100 descriptors"),
            (open.clone(), vec![file.as_fd()], "refused"),
            (open.clone(), vec![huge.as_fd()], "268435456"),
            (client.connect(), vec![client.file()], "`open` was expected"),
        ];
        for (message, fds, expected) in cases {
            let one = dial(&path);
            share::send(&one, &message, &fds).unwrap();
            let reason = hear_reason(&one);
            assert!(reason.contains(expected), "{reason}, not {expected}");
        }
        // Second messages that are wrong.
        let connect = client.connect();
        for (message, expected) in [
            (with(&connect, &[("ring-ref0", "100000000")]), "ring-ref0"),
            (with(&connect, &[("ring-ref0", "-")]), "ring-ref0"),
            (with(&connect, &[("ring-page-order", "5")]), "ring-page-order"),
            (with(&connect, &[("event-channel", "1")]), "event-channel"),
            (with(&connect, &[("event-channel", "131072")]), "event-channel"),
            (with(&connect, &[("multi-queue-num-queues", "2")]), "multi-queue-num-queues"),
            (with(&connect, &[("protocol", "m68k")]), "protocol"),
            (open.clone(), "connect"),
        ] {
            let one = dial(&path);
            share::send(&one, &open, &[client.file()]).unwrap();
            assert_eq!(hear(&one).unwrap().0.kind, Kind::Offer);
            share::send(&one, &message, &[]).unwrap();
            let reason = hear_reason(&one);
            assert!(reason.contains(expected), "{reason}, not {expected}");
        }
        // One that talks after it is connected, and one that leaves between the messages.
        let talks = session(&path, "d", SMALL);
        share::send(&talks.socket, &open, &[]).unwrap();
        assert!(hear_reason(&talks.socket).contains("nothing may follow"));
        let leaves = dial(&path);
        share::send(&leaves, &open, &[client.file()]).unwrap();
        drop(leaves);
        assert_eq!(good.lines[0].write(round, &[round as u8; 512]), Status::Okay);
    }
    wait_until("all descriptors are back", || descriptors(rig.pid()) <= before + 4);
    wait_until("all tables are gone", || tables(&rig) == 1);
    wait_until("all but one are gone", || clients(&rig, "d") == 1);
}

#[test]
fn silent_clients_keep_nobody_out_and_clients_are_counted() {
    let rig = Rig::start();
    let path = attach(&rig, "d", "ram:m?size=1M", &[]);
    let before = descriptors(rig.pid());
    let client = Client::new(SMALL).unwrap();
    let silent: Vec<_> = (0..60)
        .map(|number| {
            let one = dial(&path);
            if number % 2 == 0 {
                // Evicted already, it may be.
                let _ = share::send(&one, &with(&client.open("d"), &[("queues", "8")]), &[client.file()]);
            }
            one
        })
        .collect();
    let mut many: Vec<Session> = (0..16).map(|_| session(&path, "d", SMALL)).collect();
    // Each that still negotiates has its channels; there are at most 16 of them.
    wait_until("others have lost theirs", || descriptors(rig.pid()) <= before + 16 * 19 + 16 * 5);
    drop(silent);
    let reason = try_session(&path, "d", SMALL).err().expect("no room");
    assert!(reason.contains("has 16 clients"), "{reason}");
    for one in &mut many {
        assert_eq!(one.lines[0].write(0, &[1; 512]), Status::Okay);
    }
    many.truncate(12);
    wait_until("some have gone", || clients(&rig, "d") == 12);
}
