//! What guests do with their end: start again, vanish, die, flood, lie.

use std::time::Duration;

use tokio::time::Instant;

use super::super::device::DeviceId;
use super::super::rig::*;
use super::super::xenbus::Link;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn connected(rig: &Rig, id: DeviceId) {
    toolstack_attach(&rig.fake, id, &[]);
    rig.fake.wait_for(&backend_state(id), "2").await;
    publish_rings(&rig.fake, id);
    rig.fake.wait_for(&backend_state(id), "4").await;
    rig.fake.write(&front_state(id), 4);
}

/// A boot loader closes properly and its kernel begins anew.
#[tokio::test]
async fn a_boot_loader_then_a_kernel() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    connected(&rig, id).await;
    for _ in 0..5 {
        rig.fake.write(&front_state(id), 5);
        rig.fake.wait_for(&backend_state(id), "5").await;
        assert_eq!(rig.disks.log_of(id).last().unwrap(), "connect", "requests may still come in state 5");
        rig.fake.write(&front_state(id), 6);
        rig.fake.wait_for(&backend_state(id), "6").await;
        rig.fake.write(&front_state(id), 1);
        rig.fake.wait_for(&backend_state(id), "2").await;
        publish_rings(&rig.fake, id);
        rig.fake.wait_for(&backend_state(id), "4").await;
    }
    rig.disks.assert_never_wrong();
    assert_eq!(rig.disks.state().connects, 6);
}

/// A kernel that is started by another one finds both ends connected and starts from 1 without closing.
#[tokio::test]
async fn a_frontend_that_starts_again_without_closing() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    connected(&rig, id).await;
    rig.fake.write(&front_state(id), 1);
    rig.fake.wait_for(&backend_state(id), "2").await;
    assert_eq!(rig.disks.log_of(id), ["open", "connect", "disconnect"]);
    publish_rings(&rig.fake, id);
    rig.fake.wait_for(&backend_state(id), "4").await;
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn a_frontend_that_vanishes_leaves_a_closed_directory() {
    let rig = Rig::new();
    for (domid, vanish) in [(5, true), (6, false)] {
        let id = vbd3(domid, XVDA);
        connected(&rig, id).await;
        if vanish {
            rig.fake.remove(&id.frontend())
        } else {
            rig.fake.write(&front_state(id), "rubbish")
        }
        rig.fake.wait_for(&backend_state(id), "6").await;
        assert_eq!(rig.disks.log_of(id), ["open", "connect", "disconnect"]);
        assert!(rig.fake.read(&format!("{}/params", id.backend(0))).is_some());
    }
}

/// A domain that died and whose toolstack does not clean up: its rings must not keep its memory.
#[tokio::test]
async fn a_dead_domain_keeps_nothing_mapped() {
    let rig = Rig::new();
    let (dead, alive) = (vbd3(5, XVDA), vbd3(6, XVDA));
    connected(&rig, dead).await;
    connected(&rig, alive).await;
    rig.fake.kill_domain(5);
    rig.fake.wait_for(&backend_state(dead), "6").await;
    assert_eq!(rig.disks.log_of(dead), ["open", "connect", "disconnect"]);
    assert_eq!(rig.fake.read(&backend_state(alive)).as_deref(), Some("4"));
    assert!(rig.fake.read(&format!("{}/params", dead.backend(0))).is_some(), "it is the toolstack's");
}

#[tokio::test]
async fn a_flood_of_states_costs_little_and_hurts_nobody() {
    let rig = Rig::new();
    let (hostile, good) = (vbd3(5, XVDA), vbd3(6, XVDA));
    connected(&rig, hostile).await;
    let before = rig.fake.state().requests;
    let begin = Instant::now();
    let mut writes = 0;
    while begin.elapsed() < Duration::from_secs(1) || writes < 1000 {
        rig.fake.write(&front_state(hostile), 3 + writes % 2);
        writes += 1;
        if writes == 500 {
            toolstack_attach(&rig.fake, good, &[]);
        }
        tokio::task::yield_now().await;
    }
    rig.fake.wait_for(&backend_state(good), "2").await;
    publish_rings(&rig.fake, good);
    rig.fake.wait_for(&backend_state(good), "4").await;
    // A burst of looks, and then at most one in ten milliseconds, each of three reads, besides the work for the other device.
    let looks = 40 + begin.elapsed().as_millis() as u64 / 5;
    let asked = rig.fake.state().requests - before;
    assert!(asked < 3 * looks + 300, "{asked} requests for a flood of {writes}");
    assert_eq!(rig.disks.state().connects, 2);
    rig.disks.assert_never_wrong();
}

/// Rings of a daemon that is dead are not touched; a guest that starts again is served.
#[tokio::test]
async fn what_is_connected_at_our_start_is_left_alone() {
    let fake = super::super::fake::FakeStore::new();
    let (stays, closes, restarts) = (vbd3(5, XVDA), vbd3(6, XVDA), vbd3(7, XVDA));
    for id in [stays, closes, restarts] {
        toolstack_attach(&fake, id, &[("state", "4")]);
        publish_rings(&fake, id);
        fake.write(&front_state(id), 4);
    }
    let rig = Rig::on(fake);
    rig.fake.wait("three", |_| rig.disks.state().awaiting.len() == 3).await;
    rig.fake
        .wait("a reason", |_| rig.backend.device(stays).is_some_and(|status| status.reason.is_some()))
        .await;
    let status = rig.backend.device(stays).unwrap();
    assert_eq!(status.link, Link::Awaiting);
    assert!(status.reason.unwrap().contains("awaiting recovery"));
    rig.fake.write(&front_state(closes), 5);
    rig.fake.wait_for(&backend_state(closes), "5").await;
    rig.fake.write(&front_state(closes), 6);
    rig.fake.wait_for(&backend_state(closes), "6").await;
    rig.fake.write(&front_state(restarts), 1);
    rig.fake.wait_for(&backend_state(restarts), "2").await;
    publish_rings(&rig.fake, restarts);
    rig.fake.wait_for(&backend_state(restarts), "4").await;
    assert_eq!(rig.fake.read(&backend_state(stays)).as_deref(), Some("4"));
    assert_eq!(rig.disks.log_of(stays), ["open"]);
    assert_eq!(rig.disks.log_of(restarts), ["open", "connect"]);
    rig.disks.assert_never_wrong();
}

/// Many guests write anything at any time, the store restarts, toolstacks come and go; in the end all is gone.
#[tokio::test]
async fn chaos_ends_with_nothing_left() {
    tokio::join!(chaos(1), chaos(2), chaos(3), chaos(4));
}

async fn chaos(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let rig = Rig::new();
    rig.disks.state().delay = Duration::from_millis(1);
    let ids: Vec<DeviceId> = (1..=20).map(|domid| vbd3(domid, XVDA)).collect();
    for id in &ids {
        toolstack_attach(&rig.fake, *id, &[]);
    }
    for turn in 0..2000 {
        let id = *random.choice(&ids).unwrap();
        match random.u32(0..100) {
            0 if turn % 10 == 0 => rig.fake.restart(),
            1 => toolstack_detach(&rig.fake, id),
            2 => toolstack_clean(&rig.fake, id),
            3..=9 if rig.fake.read(&backend_state(id)).is_none() => toolstack_attach(&rig.fake, id, &[]),
            10 => rig.fake.faults(|faults| faults.conflicts = 3),
            11 => rig.fake.remove(&id.frontend()),
            12..=40 => publish_rings(&rig.fake, id),
            41..=60 => {
                let value = *random
                    .choice(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "x", ""].as_slice())
                    .unwrap();
                rig.fake.write(&front_state(id), value);
            }
            _ => tokio::time::sleep(Duration::from_micros(random.u64(0..3000))).await,
        }
    }
    for id in &ids {
        toolstack_clean(&rig.fake, *id);
    }
    for id in &ids {
        rig.backend.wait_gone(*id, soon()).await.unwrap();
    }
    assert!(rig.disks.state().connects > 20, "only {} connects", rig.disks.state().connects);
    assert!(rig.disks.state().uses.is_empty(), "{:?}", rig.disks.state().uses);
    rig.disks.assert_never_wrong();
    rig.fake.wait("three watches", |fake| fake.watch_paths().len() == 3).await;
    rig.fake
        .wait("no errors", |fake| {
            let errors = fake.nodes_below("/local/domain/0/error/backend");
            errors.iter().all(|path| path == "/local/domain/0/error/backend/vbd3")
        })
        .await;
    // A directory of a domain stays: it is the toolstack's. No device does.
    assert!(
        rig.fake.nodes_below("/local/domain/0/backend/vbd3").iter().all(|path| path.split('/').count() == 7)
    );
}
