//! Goal: a hostile, broken or merely numerous client costs the daemon a bounded amount, which is given back, and
//! disturbs nobody.
//! Method: a real daemon under a checked load; beside it clients that send garbage, halves, or nothing, up to ten
//! thousand from a process of their own (both ends do not fit into one process); descriptors and memory of the daemon
//! are read from /proc.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_process;
mod live_rig;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use live_client::{Client, Load, READ, TRIM, WRITE, go, greeted, head, option};
use live_process::{cpu_ticks, descriptor_list, descriptors, memory_kib};
use live_rig::{Random, Rig, Running, raw, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const MIB: u64 = 1 << 20;
const STORM: usize = 10_000;

/// What a storm is told through its environment: socket, number of clients, whether each says hello.
const SOCKET: &str = "BLKTAPD_TEST_STORM_SOCKET";
const CLIENTS: &str = "BLKTAPD_TEST_STORM_CLIENTS";
const HELLO: &str = "BLKTAPD_TEST_STORM_HELLO";

/// Not a test: the process of silent clients, which the tests start. It connects and sits until it is killed.
#[test]
#[ignore = "the other process of ten_thousand_silent_clients_disturb_nobody, which starts it"]
fn storm_process() {
    let (Ok(socket), Ok(clients)) = (std::env::var(SOCKET), std::env::var(CLIENTS)) else { return };
    let hello = std::env::var(HELLO).is_ok();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let clients = clients.parse::<usize>().unwrap().min(hard as usize - 100);
    let mut held = Vec::with_capacity(clients);
    for _ in 0..clients {
        let mut stream = UnixStream::connect(&socket).unwrap();
        if hello {
            // Says that it speaks, and then nothing more. It may have lost its place by now.
            let _ = stream.write_all(&3u32.to_be_bytes());
        }
        held.push(stream);
    }
    println!("the storm holds {clients} connections");
    loop {
        std::thread::park();
    }
}

fn storm(socket: &Path, clients: usize, hello: bool) -> Running {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["storm_process", "--exact", "--ignored", "--nocapture"]);
    command.env(SOCKET, socket).env(CLIENTS, clients.to_string());
    if hello {
        command.env(HELLO, "1");
    }
    Running::start(&mut command)
}

/// Waits until descriptors and memory are what they were.
#[track_caller]
fn wait_for_calm(rig: &Rig, (fds, kib): (usize, u64), more_kib: u64) {
    let deadline = Instant::now() + live_client::PATIENCE;
    loop {
        let (fds_now, kib_now) = (descriptors(rig.pid()), memory_kib(rig.pid()));
        if fds_now <= fds && kib_now <= kib + more_kib {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{fds} descriptors and {kib} KiB before, now {fds_now} and {kib_now} KiB: {:#?}",
            descriptor_list(rig.pid())
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A client that speaks is served. One that a busy machine keeps from speaking for a tenth of a second may lose its place to the
/// storm, and asks again.
fn served(socket: &Path, export: &str) -> Client {
    let deadline = Instant::now() + live_client::PATIENCE;
    loop {
        match Client::connect(socket, export) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "a client that speaks is served: {error}"),
        }
    }
}

#[test]
fn ten_thousand_silent_clients_disturb_nobody() {
    let rig = Rig::with(2, &[]);
    rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &["--shard", "0"]);
    rig.attach("d2", &raw(&rig.image("d2.img", MIB)), &[]);
    let loads = [1, 2].map(|n| Load::start(rig.socket(&format!("d{n}")), "", 64, n));
    loads.iter().for_each(|load| load.wait_for(500));
    let before = (descriptors(rig.pid()), memory_kib(rig.pid()));
    let all = rig.run_dir().join("nbd.sock");
    for (socket, hello) in [(&all, false), (&rig.socket("d1"), false), (&all, true)] {
        let mut storm = storm(socket, STORM, hello);
        // While they come, and while they sit.
        for stage in ["coming", "sitting"] {
            if stage == "sitting" {
                wait_until("the storm is there", || storm.printed().contains("the storm holds"));
                let printed = storm.printed();
                println!("{}", printed.lines().find(|line| line.contains("the storm holds")).unwrap());
            }
            loads.iter().for_each(|load| load.wait_for(200));
            for (path, export) in
                [(&all, "d1"), (&all, "d2"), (&rig.socket("d1"), ""), (&rig.socket("d2"), "")]
            {
                let mut client = served(path, export);
                client.read(0, 4096).unwrap();
                client.disconnect().unwrap();
            }
            rig.ctl_ok(&["list"]);
            let (fds, kib) = (descriptors(rig.pid()), memory_kib(rig.pid()));
            assert!(fds < before.0 + 1024 + 64, "{fds} descriptors, {} before", before.0);
            assert!(kib < before.1 + 64 * 1024, "{kib} KiB, {} before", before.1);
            println!("{stage}: {fds} descriptors, {kib} KiB; before: {before:?}");
        }
        drop(storm);
        wait_for_calm(&rig, before, 8 * 1024);
    }
    for load in loads {
        println!("{} checked operations beside it", load.finish());
    }
}

#[test]
fn a_client_that_says_nothing_is_shown_the_door() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("blktapd.toml");
    std::fs::write(&config, "[nbd]\nnegotiation_timeout_s = 1\n").unwrap();
    let rig = Rig::with(1, &["--config", config.to_str().unwrap()]);
    rig.attach("d1", "null:?size=1M", &[]);
    let before = descriptors(rig.pid());
    let silent = UnixStream::connect(rig.socket("d1")).unwrap();
    let mut halves = UnixStream::connect(rig.socket("d1")).unwrap();
    // On a busy machine the second may be over before these words; the greeting is among what is read below.
    let _ = halves.write_all(&[&3u32.to_be_bytes()[..], &go("d1")[..20]].concat());
    // One that says something every now and then, and never enough.
    let mut drop_by_drop = UnixStream::connect(rig.socket("d1")).unwrap();
    let start = Instant::now();
    while drop_by_drop.write_all(&[0]).is_ok() {
        assert!(start.elapsed() < live_client::PATIENCE, "it is served for ever");
        std::thread::sleep(Duration::from_millis(50));
    }
    for mut stream in [silent, halves] {
        stream.set_read_timeout(Some(live_client::PATIENCE)).unwrap();
        let mut rest = Vec::new();
        // The greeting, and then the end: not the time-out of this test.
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
    }
    wait_until("their descriptors are closed", || descriptors(rig.pid()) <= before);
}

#[test]
fn garbage_in_the_negotiation_ends_that_client_only() {
    let rig = Rig::start();
    rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &[]);
    let mut witness = Client::connect(&rig.socket("d1"), "").unwrap();
    let before = (descriptors(rig.pid()), memory_kib(rig.pid()));
    let flags = 3u32.to_be_bytes().to_vec();
    let mut absurd = option(7, &[]);
    absurd[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut wrong_magic = option(7, &[]);
    wrong_magic[0] ^= 1;
    let mut long_name = go("d1");
    long_name[16..20].copy_from_slice(&0x7fff_ffffu32.to_be_bytes());
    let mut cases: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        0xffff_ffffu32.to_be_bytes().to_vec(),
        0u32.to_be_bytes().to_vec(),
        [&flags[..], &go("d1")[..10]].concat(),
        [&flags[..], &wrong_magic].concat(),
        [&flags[..], &absurd].concat(),
        [&flags[..], &absurd, &vec![7; 1 << 20]].concat(),
        [&flags[..], &long_name].concat(),
        [&flags[..], &option(1, b"no-such-disk")].concat(),
        [&flags[..], &option(7, &vec![0xff; 16 << 10])].concat(),
        [&flags[..], &option(3, b"data")].concat(),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        [&flags[..], &option(5, &[]).repeat(5000)].concat(),
    ];
    let mut random = Random(7);
    for round in 0..200 {
        let length = random.below(300) as usize;
        let noise = random.bytes(length);
        // Every other one gets past the first look.
        cases.push(if round % 2 == 0 {
            noise
        } else {
            [&flags[..], &option(random.next() as u32, &noise)].concat()
        });
    }
    let all = rig.run_dir().join("nbd.sock");
    for (number, bytes) in cases.iter().enumerate() {
        let path = if number % 2 == 0 { &all } else { &rig.socket("d1") };
        let mut stream = greeted(path).unwrap();
        // The daemon may close in the middle: that is an answer, too.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // To the end of what it has to say; never without one.
        match stream.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "case {number}: {error}")
            }
        }
        if number % 16 == 0 {
            witness.write(0, &[number as u8; 512]).unwrap();
        }
    }
    // An option that nobody knows is refused, and the client may go on.
    let mut stream = greeted(&all).unwrap();
    stream.write_all(&[&flags[..], &option(0x7777, b"what"), &go("d1")].concat()).unwrap();
    let mut replies = [0; 20];
    stream.read_exact(&mut replies).unwrap();
    assert_eq!(replies[12..16], 0x8000_0001u32.to_be_bytes(), "unsupported");
    let mut text = vec![0; u32::from_be_bytes(replies[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut text).unwrap();
    stream.read_exact(&mut replies).unwrap();
    assert_eq!(replies[12..16], 3u32.to_be_bytes(), "the description of the export");
    drop(stream);
    assert_eq!(witness.read(0, 512).unwrap().len(), 512);
    wait_for_calm(&rig, before, 8 * 1024);
}

#[test]
fn garbage_in_requests_is_answered_or_ends_that_client_only() {
    let rig = Rig::start();
    rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &[]);
    let mut witness = Client::connect(&rig.socket("d1"), "").unwrap();
    let connect = || Client::connect(&rig.socket("d1"), "").unwrap();
    let before = (descriptors(rig.pid()), memory_kib(rig.pid()));

    // What is wrong and can be skipped is answered, and the connection goes on.
    let mut client = connect();
    for (command, offset, len, error) in [
        (READ, MIB, 512, 22),
        (READ, MIB - 512, 1024, 22),
        (READ, u64::MAX - 511, 512, 22),
        (READ, 0, u32::MAX, 22),
        (TRIM, MIB, 512, 22),
        (99, 0, 512, 22),
        (3, 4096, 512, 22),
    ] {
        client.send(command, offset, len, &[]).unwrap();
        let reply = client.receive().unwrap();
        assert_eq!(reply.error, error, "command {command}, {len} bytes at {offset}");
    }
    client.send(WRITE, MIB, 512, &[9; 512]).unwrap();
    assert!(matches!(client.receive().unwrap().error, 22 | 28), "a write behind the end");
    client.write(8192, &[5; 512]).unwrap();
    assert_eq!(client.read(8192, 512).unwrap(), [5; 512]);

    // What cannot be skipped ends the connection.
    let mut wrong_magic = head(READ, 1, 0, 512);
    wrong_magic[0] ^= 1;
    let absurd_write = head(WRITE, 1, 0, u32::MAX);
    for bytes in
        [wrong_magic, absurd_write, vec![0; 28], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()]
    {
        let mut client = connect();
        client.stream.write_all(&bytes).unwrap();
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        match client.stream.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
        assert_eq!(witness.read(8192, 512).unwrap(), [5; 512]);
    }

    // Half a request, or a request with half of its payload: nothing of it reaches the disk.
    for cut in [1, 27, 28, 29, 28 + 4096, 28 + 65535] {
        let mut client = connect();
        let mut bytes = head(WRITE, 1, 65536, 65536);
        bytes.extend([0xee; 65536]);
        client.stream.write_all(&bytes[..cut]).unwrap();
        drop(client);
    }
    wait_until("they are gone", || rig.ctl_json(&["show", "d1"])["clients"] == 2);
    assert_eq!(witness.read(65536, 65536).unwrap(), vec![0; 65536]);

    // Noise, thirty times.
    let mut random = Random(3);
    for _ in 0..30 {
        let mut client = connect();
        let length = 28 * (1 + random.below(20) as usize);
        let mut bytes = random.bytes(length);
        bytes[..4].copy_from_slice(&head(0, 0, 0, 0)[..4]);
        let _ = client.stream.write_all(&bytes);
        drop(client);
    }
    drop(client);
    wait_until("they are gone", || rig.ctl_json(&["show", "d1"])["clients"] == 1);
    assert_eq!(witness.read(8192, 512).unwrap().len(), 512);
    wait_for_calm(&rig, before, 8 * 1024);
}

#[test]
fn clients_that_never_read_their_replies_cost_a_bounded_amount() {
    let rig = Rig::start();
    rig.attach("d1", "ram:r?size=64M", &[]);
    rig.attach("d2", &raw(&rig.image("d2.img", MIB)), &[]);
    let load = Load::start(rig.socket("d2"), "", 64, 5);
    load.wait_for(100);
    let before = (descriptors(rig.pid()), memory_kib(rig.pid()));
    let mut deaf = Vec::new();
    for _ in 0..40 {
        let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
        client.stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        // As many as the socket takes: the daemon does not read on for ever.
        let sent = (0..20_000).take_while(|_| client.send(READ, 0, 1 << 20, &[]).is_ok()).count();
        assert!(sent < 20_000, "the daemon takes requests without end");
        deaf.push(client);
    }
    let kib = memory_kib(rig.pid());
    println!("40 deaf clients: {kib} KiB, before {} KiB", before.1);
    // The budget of a shard's buffers is 64 MiB; and one buffer more for each connection.
    assert!(kib < before.1 + (64 + 32) * 1024, "{kib} KiB, {} before", before.1);
    // The same disk and its shard serve others.
    load.wait_for(500);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    client.write(0, &[1; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    client.disconnect().unwrap();
    drop(deaf);
    wait_for_calm(&rig, before, 16 * 1024);
    load.finish();
}

/// Turns of the one shard so far, and ticks of CPU of the whole daemon.
fn work(rig: &Rig) -> (u64, u64) {
    (rig.ctl_json(&["shards"])[0]["turns"].as_u64().unwrap(), cpu_ticks(rig.pid()))
}

/// A shard waits for a client in the kernel, whether the client has nothing to say, stopped in the middle of a request, or
/// takes no replies; the sockets are non-blocking, and that must not turn the wait into a spin.
#[test]
fn a_shard_does_not_turn_for_clients_that_keep_it_waiting() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rig = Rig::with(1, &["--nbd-listen", &format!("127.0.0.1:{port}")]);
    rig.attach("d1", "null:?size=64M", &[]);
    trait Stream: Read + Write {}
    impl<T: Read + Write> Stream for T {}
    let connect = |tcp: bool| -> Box<dyn Stream> {
        let mut stream: Box<dyn Stream> = if tcp {
            let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
            Box::new(stream)
        } else {
            let stream = UnixStream::connect(rig.socket("d1")).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
            Box::new(stream)
        };
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&[&3u32.to_be_bytes()[..], &option(1, b"d1")].concat()).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        stream
    };
    let mut waiting = Vec::new();
    for tcp in [false, true] {
        let mut idle = connect(tcp);
        idle.write_all(&head(READ, 1, 0, 512)).unwrap();
        idle.read_exact(&mut [0; 16 + 512]).unwrap();
        let mut half_head = connect(tcp);
        half_head.write_all(&head(READ, 1, 0, 512)[..9]).unwrap();
        let mut half_payload = connect(tcp);
        half_payload.write_all(&[head(WRITE, 1, 0, 1 << 20), vec![7; 100_000]].concat()).unwrap();
        let mut deaf = connect(tcp);
        let sent = (0..1_000_000).take_while(|_| deaf.write_all(&head(READ, 1, 0, 1 << 20)).is_ok()).count();
        assert!(sent < 1_000_000, "the daemon takes requests without end");
        // One that takes a little now and then: each time the rest has to be waited for again.
        let mut slow = connect(tcp);
        slow.write_all(&head(READ, 1, 0, 16 << 20)).unwrap();
        waiting.extend([idle, half_head, half_payload, deaf, slow]);
    }
    // What can be done for them has been done when a second brings nothing but its tick and the look itself.
    let mut before = work(&rig);
    wait_until("the shard rests", || {
        std::thread::sleep(Duration::from_secs(1));
        let last = std::mem::replace(&mut before, work(&rig));
        before.0 - last.0 <= 5
    });
    let start = Instant::now();
    for round in 0..30 {
        for slow in [4, 9] {
            waiting[slow].read_exact(&mut vec![0; 4096 + round]).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let after = work(&rig);
    let (turns, ticks) = (after.0 - before.0, after.1 - before.1);
    let seconds = start.elapsed().as_secs();
    println!("{turns} turns and {ticks} ticks of CPU in {seconds} s");
    // A tick each second, a command, and at most one for each of the 60 times that a slow client took something.
    assert!(turns <= 75 + 2 * seconds, "{turns} turns in {seconds} s");
    assert!(ticks <= 20, "{ticks} ticks of CPU in {seconds} s");
}

#[test]
fn silent_callers_of_the_control_socket_do_not_lock_the_operator_out() {
    let rig = Rig::start();
    rig.attach("d1", "null:?size=1M", &[]);
    let before = descriptors(rig.pid());
    let silent: Vec<_> =
        (0..300).map(|_| UnixStream::connect(rig.run_dir().join("ctl.sock")).unwrap()).collect();
    // More than have a place: the command waits until they are shown the door.
    rig.ctl_ok(&["--timeout", "50", "list"]);
    drop(silent);
    wait_until("their descriptors are closed", || descriptors(rig.pid()) <= before);
}
