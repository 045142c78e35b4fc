//! Goal: a client gets the disk that it asks for, and no other client, however silent, numerous or rude, keeps it out.
//! Method: sockets of a real daemon on scripted shards; clients that speak the handshake byte by byte (NBD protocol, "fixed
//! newstyle").

#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

mod daemon_rig;

use std::path::Path;
use std::sync::Arc;

use blktapd::model::{AttachRequest, State};
use blktapd::nbd::{Scope, bind_all_socket};
use blktapd::xen::device::{DeviceId, Kind};
use daemon_rig::{FakeShard, Rig, patient, request, soon, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const GO: u32 = 7;
const LIST: u32 = 3;
const ACK: u32 = 1;
const INFO: u32 = 3;

/// Connects, reads the greeting and answers it.
async fn greet(path: &Path) -> std::io::Result<UnixStream> {
    let mut client = UnixStream::connect(path).await?;
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).await?;
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    client.write_all(&3u32.to_be_bytes()).await?;
    Ok(client)
}

/// Sends an option and returns the kinds and texts of its replies, up to the last.
async fn option(client: &mut UnixStream, number: u32, data: &[u8]) -> std::io::Result<Vec<(u32, Vec<u8>)>> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    client.write_all(&bytes).await?;
    let mut replies = Vec::new();
    loop {
        let mut header = [0; 20];
        client.read_exact(&mut header).await?;
        let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
        let mut payload = vec![0; u32::from_be_bytes(header[16..20].try_into().unwrap()) as usize];
        client.read_exact(&mut payload).await?;
        replies.push((kind, payload));
        if kind == ACK || kind & 0x8000_0000 != 0 {
            return Ok(replies);
        }
    }
}

fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(0u16.to_be_bytes());
    data
}

fn connections(rig: &Rig) -> usize {
    rig.shards.iter().map(|shard| shard.connected().len()).sum()
}

#[tokio::test]
async fn a_disks_own_socket_takes_its_name_and_the_empty_name() {
    let rig = Rig::new();
    rig.attach("d1", "null:?size=1M").await.unwrap();
    for (before, name) in ["", "d1"].into_iter().enumerate() {
        let mut client = greet(&rig.socket("d1")).await.unwrap();
        let replies = option(&mut client, GO, &go(name)).await.unwrap();
        assert_eq!(replies.last().unwrap().0, ACK);
        let info = &replies.iter().find(|(kind, _)| *kind == INFO).unwrap().1;
        assert_eq!(info[2..10], (1u64 << 20).to_be_bytes(), "the size");
        until("the shard has the connection", || connections(&rig) == before + 1).await;
    }
    let mut client = greet(&rig.socket("d1")).await.unwrap();
    let refused = option(&mut client, GO, &go("other")).await.unwrap();
    assert!(refused[0].0 & 0x8000_0000 != 0);
    let peers: Vec<String> = rig.shards.iter().flat_map(FakeShard::connected).collect();
    assert!(
        peers.iter().all(|peer| peer.starts_with(&format!("unix pid {}", std::process::id()))),
        "{peers:?}"
    );
}

#[tokio::test]
async fn the_common_socket_lists_and_serves_all_by_name() {
    let rig = Rig::new();
    rig.attach("a", "null:?size=1M").await.unwrap();
    rig.attach("b", "null:?size=2M").await.unwrap();
    let mut listener = bind_all_socket(&rig.daemon.settings()).unwrap();
    listener.serve(&rig.daemon, Scope::All);
    let path = rig.daemon.settings().nbd_all_socket();
    let mut client = greet(&path).await.unwrap();
    let listed = option(&mut client, LIST, &[]).await.unwrap();
    assert_eq!(listed.len(), 3);
    assert!(listed[0].1.ends_with(b"a") && listed[1].1.ends_with(b"b"));
    for unknown in ["", "c"] {
        assert!(option(&mut client, GO, &go(unknown)).await.unwrap()[0].0 & 0x8000_0000 != 0);
    }
    assert_eq!(option(&mut client, GO, &go("b")).await.unwrap().last().unwrap().0, ACK);
    until("its shard has the connection", || connections(&rig) == 1).await;
    drop(listener);
    assert!(!path.exists());
}

#[tokio::test]
async fn silent_and_rude_clients_keep_nobody_out() {
    let config = "[nbd]\nmax_negotiations = 64\n";
    let rig = Rig::with(Arc::new(tempfile::tempdir().unwrap()), config);
    rig.attach("d1", "null:?size=1M").await.unwrap();
    let path = rig.socket("d1");
    let mut crowd = Vec::new();
    for n in 0..300 {
        let mut client = UnixStream::connect(&path).await.unwrap();
        if n % 3 == 0 {
            // Says something that is no NBD; its end may be gone already.
            let _ = client.write_all(b"GET / HTTP/1.0\r\n\r\n").await;
        }
        crowd.push(client);
    }
    let mut client = greet(&path).await.unwrap();
    assert_eq!(option(&mut client, GO, &go("")).await.unwrap().last().unwrap().0, ACK);
    until("the shard has the connection", || connections(&rig) == 1).await;
    assert!(rig.daemon.nbd.negotiating() <= 16, "a quarter of 64 belongs to one listener");
    drop(crowd);
    until("all places are free", || rig.daemon.nbd.negotiating() == 0).await;
}

#[tokio::test]
async fn a_client_that_does_not_choose_is_closed_in_time() {
    let config = "[nbd]\nnegotiation_timeout_s = 1\n";
    let rig = Rig::with(Arc::new(tempfile::tempdir().unwrap()), config);
    rig.attach("d1", "null:?size=1M").await.unwrap();
    let mut client = UnixStream::connect(rig.socket("d1")).await.unwrap();
    // On a busy machine the second may be over before these words.
    let _ = client.write_all(&3u32.to_be_bytes()).await;
    let mut greeting = Vec::new();
    let closed = tokio::time::timeout_at(patient(), client.read_to_end(&mut greeting)).await;
    assert!(closed.is_ok(), "it is served for ever");
    assert!(greeting.is_empty() || greeting.starts_with(b"NBDMAGIC"), "{greeting:?}");
    until("its place is free", || rig.daemon.nbd.negotiating() == 0).await;
}

#[tokio::test]
async fn the_bound_on_clients_is_told_to_the_one_too_many() {
    let config = "[nbd]\nmax_connections_per_disk = 2\n";
    let rig = Rig::with(Arc::new(tempfile::tempdir().unwrap()), config);
    rig.attach("d1", "null:?size=1M").await.unwrap();
    let mut clients = Vec::new();
    for n in 0..2 {
        let mut client = greet(&rig.socket("d1")).await.unwrap();
        option(&mut client, GO, &go("")).await.unwrap();
        until("the shard has the connection", || connections(&rig) == n + 1).await;
        clients.push(client);
    }
    let mut client = greet(&rig.socket("d1")).await.unwrap();
    let (kind, message) = option(&mut client, GO, &go("")).await.unwrap().remove(0);
    let message = String::from_utf8(message).unwrap();
    assert!(kind & 0x8000_0000 != 0 && message.contains("has 2 clients"), "{message}");
    // While it is being detached nobody comes in, and when that fails they do again.
    let daemon = rig.daemon.clone();
    let disk = rig.daemon.find("d1").unwrap();
    // Long enough for what is asked meanwhile.
    let detach = tokio::spawn(async move { daemon.detach("d1", false, soon(5000)).await });
    until("it is closing", || disk.inner().closing > 0).await;
    disk.counters.clients.set(1);
    let (_, message) = option(&mut client, GO, &go("")).await.unwrap().remove(0);
    assert!(String::from_utf8(message).unwrap().contains("is being detached"));
    assert!(detach.await.unwrap().is_err());
    assert_eq!(option(&mut client, GO, &go("")).await.unwrap().last().unwrap().0, ACK);
}

// Goal: what a guest had put into its rings when the daemon died is not overtaken by somebody else's writes. Method: a guest's disk is restored by
// a daemon that has no XenStore to look into; clients ask for it, and for one that nobody can write.
#[tokio::test]
async fn a_disk_that_awaits_its_guests_recovery_takes_no_writer() {
    let rig = Rig::new();
    for (number, name) in [(1, "written"), (2, "read")] {
        let device = DeviceId { kind: Kind::Vbd3, domid: number, devid: 51712 };
        let request = AttachRequest { read_only: name == "read", ..request("null:?size=1M") };
        rig.daemon.attach_device(name, request, device, patient()).await.unwrap();
        let mut client = greet(&rig.socket(name)).await.unwrap();
        assert_eq!(
            option(&mut client, GO, &go("")).await.unwrap().last().unwrap().0,
            ACK,
            "{name}, at first"
        );
    }
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    for (name, state) in [("written", State::AwaitingRecovery), ("read", State::AwaitingRecovery)] {
        assert_eq!(rig.daemon.find(name).unwrap().state(), state, "{name}");
    }
    let mut client = greet(&rig.socket("written")).await.unwrap();
    let (kind, message) = option(&mut client, GO, &go("")).await.unwrap().remove(0);
    let message = String::from_utf8(message).unwrap();
    assert!(kind & 0x8000_0000 != 0 && message.contains("awaits the recovery"), "{message}");
    let mut client = greet(&rig.socket("read")).await.unwrap();
    assert_eq!(option(&mut client, GO, &go("")).await.unwrap().last().unwrap().0, ACK);
}

#[tokio::test]
async fn a_connection_waits_while_its_disk_is_between_shards() {
    let rig = Rig::new();
    rig.attach("d1", "null:?size=1M").await.unwrap();
    let disk = rig.daemon.find("d1").unwrap();
    let between = disk.place.write().await;
    let mut client = greet(&rig.socket("d1")).await.unwrap();
    assert_eq!(option(&mut client, GO, &go("")).await.unwrap().last().unwrap().0, ACK);
    until("it waits", || disk.connecting.load(std::sync::atomic::Ordering::Relaxed) == 1).await;
    assert_eq!(connections(&rig), 0);
    drop(between);
    until("it arrives", || connections(&rig) == 1).await;
}
