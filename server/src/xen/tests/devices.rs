//! Devices of toolstacks: from discovery to removal, in order and out of order.

use std::time::Duration;

use tokio::time::Instant;

use super::super::backend::Report;
use super::super::device::{DeviceId, Kind};
use super::super::keys::{Protocol, Queue};
use super::super::rig::*;
use super::super::xenbus::Link;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn wait_problem(rig: &Rig, word: &str) {
    let known = |_: &_| rig.backend.problem().is_some_and(|problem| problem.contains(word));
    rig.fake.wait(word, known).await;
}

#[tokio::test]
async fn a_disk_comes_serves_and_goes() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    // The toolstack waits for InitWait before it runs the script: an image that is slow to open must not hold it up.
    rig.disks.state().open_delay = Duration::from_millis(200);
    toolstack_attach(&rig.fake, id, &[("script", "/etc/xen/scripts/block-blktapd")]);
    rig.fake.wait_for(&backend_state(id), "2").await;
    assert!(rig.disks.log_of(id).is_empty());
    let node = |name: &str| rig.fake.read(&format!("{}/{name}", id.backend(0)));
    assert_eq!(node("max-ring-page-order").as_deref(), Some("4"));
    assert_eq!(node("max-ring-pages").as_deref(), Some("16"));
    assert_eq!(node("multi-queue-max-queues").as_deref(), Some("8"));
    assert_eq!(node("feature-max-indirect-segments").as_deref(), Some("256"));
    assert_eq!(node("sectors"), None);
    rig.backend.claim(id, soon()).await.unwrap();
    let _guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
    assert_eq!(node("sectors").as_deref(), Some("2048"));
    assert_eq!(node("feature-flush-cache").as_deref(), Some("1"));
    let connect = rig.disks.state().last_connect.clone().unwrap();
    assert_eq!((connect.domid, connect.devid, connect.protocol), (5, XVDA, Protocol::X86_64));
    assert_eq!(connect.queues, [Queue { grefs: vec![8], port: 12 }]);
    assert!(connect.persistent);
    let status = rig.backend.device(id).unwrap();
    assert!(status.served && status.ready && status.link == Link::Connected && status.reason.is_none());
    toolstack_detach(&rig.fake, id);
    rig.wait_states(id, "6", "6").await;
    assert_eq!(rig.disks.log_of(id), ["open", "connect", "disconnect"]);
    // Closed is not gone: the directories are the toolstack's.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(node("state").as_deref(), Some("6"));
    toolstack_clean(&rig.fake, id);
    rig.backend.wait_gone(id, soon()).await.unwrap();
    rig.wait_log(id, "removed").await;
    assert!(rig.fake.nodes_below(&id.backend(0)).is_empty(), "a removed directory was made again");
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn a_hundred_devices_and_nothing_left_of_them() {
    let rig = Rig::new();
    let ids: Vec<DeviceId> = (0..100).map(|n| vbd3(1 + n / 2, XVDA + 16 * u32::from(n % 2))).collect();
    rig.disks.state().delay = Duration::from_millis(2);
    // Half of them is there before we look.
    let mut guests = Vec::new();
    for id in &ids {
        toolstack_attach(&rig.fake, *id, &[]);
        guests.push(rig.guest(*id));
    }
    for id in &ids {
        rig.wait_states(*id, "4", "4").await;
    }
    assert_eq!(rig.disks.state().connects, 100);
    // One domain in two shuts down, the other dies.
    for id in &ids {
        if id.domid % 2 == 0 {
            toolstack_detach(&rig.fake, *id);
        } else {
            toolstack_clean(&rig.fake, *id);
        }
    }
    for id in ids.iter().filter(|id| id.domid % 2 == 0) {
        rig.wait_states(*id, "6", "6").await;
        toolstack_clean(&rig.fake, *id);
    }
    for id in &ids {
        rig.backend.wait_gone(*id, soon()).await.unwrap();
    }
    drop(guests);
    rig.fake.wait("three watches", |fake| fake.watch_paths().len() == 3).await;
    assert!(rig.backend.devices().is_empty());
    assert!(rig.disks.state().uses.is_empty());
    assert_eq!(rig.fake.open_transactions(), 0);
    assert!(rig.fake.nodes_below("/local/domain/0/error").is_empty());
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn a_restarted_store_disturbs_no_guest() {
    let rig = Rig::new();
    let ids: Vec<DeviceId> = (1..=10).map(|domid| vbd3(domid, XVDA)).collect();
    let guests: Vec<_> = ids
        .iter()
        .map(|id| {
            toolstack_attach(&rig.fake, *id, &[]);
            rig.guest(*id)
        })
        .collect();
    for id in &ids {
        rig.wait_states(*id, "4", "4").await;
    }
    for _ in 0..5 {
        rig.fake.restart();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A device that was made while we were away is found.
    rig.fake.restart();
    let late = vbd3(11, XVDA);
    toolstack_attach(&rig.fake, late, &[]);
    let _guest = rig.guest(late);
    rig.wait_states(late, "4", "4").await;
    assert_eq!(rig.disks.state().connects, 11, "nobody was connected a second time");
    for id in &ids {
        assert_eq!(rig.fake.read(&backend_state(*id)).as_deref(), Some("4"));
        toolstack_detach(&rig.fake, *id);
    }
    for id in &ids {
        rig.wait_states(*id, "6", "6").await;
    }
    drop(guests);
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn what_the_shard_says_while_the_store_is_away_is_not_lost() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    rig.disks.state().delay = Duration::from_millis(100);
    toolstack_attach(&rig.fake, id, &[]);
    rig.fake.wait_for(&backend_state(id), "2").await;
    publish_rings(&rig.fake, id);
    rig.fake.wait("connecting", |_| rig.disks.state().connects == 1).await;
    rig.fake.faults(|faults| faults.mute = true);
    rig.fake.restart();
    tokio::time::sleep(Duration::from_millis(300)).await;
    rig.fake.faults(|faults| faults.mute = false);
    rig.fake.restart();
    rig.fake.wait_for(&backend_state(id), "4").await;
    assert_eq!(rig.disks.state().connects, 1);
}

/// The toolstack asks for the removal at any moment between the shard's work and the end of our transaction, which is slow here.
#[tokio::test]
async fn a_state_of_the_toolstack_is_never_overwritten() {
    let moments: Vec<_> = (0..16).map(|n| tokio::spawn(detach_while_connecting(8 * n))).collect();
    for moment in moments {
        moment.await.unwrap();
    }
}

async fn detach_while_connecting(after_ms: u64) {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    rig.fake.faults(|faults| faults.delay = Duration::from_millis(20));
    toolstack_attach(&rig.fake, id, &[]);
    rig.fake.wait_for(&backend_state(id), "2").await;
    publish_rings(&rig.fake, id);
    rig.fake.wait("the connect", |_| rig.disks.state().connects == 1).await;
    tokio::time::sleep(Duration::from_millis(after_ms)).await;
    toolstack_detach(&rig.fake, id);
    for _ in 0..100 {
        assert_eq!(rig.fake.read(&backend_state(id)).as_deref(), Some("5"), "after {after_ms} ms");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // The guest sees it and closes.
    rig.fake.write(&front_state(id), 6);
    rig.fake.wait_for(&backend_state(id), "6").await;
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn a_removal_of_a_guest_without_a_driver_is_answered_at_once() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    toolstack_attach(&rig.fake, id, &[]);
    rig.fake.wait_for(&backend_state(id), "2").await;
    toolstack_detach(&rig.fake, id);
    rig.fake.wait_for(&backend_state(id), "6").await;
    assert_eq!(rig.fake.read(&front_state(id)).as_deref(), Some("1"));
}

#[tokio::test]
async fn an_image_that_does_not_open_is_told_and_can_be_tried_again() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    rig.disks.state().fail_open = Some("there is no /srv/a.img".into());
    toolstack_attach(&rig.fake, id, &[]);
    let problem = rig.backend.claim(id, soon()).await.unwrap_err();
    assert!(problem.message.contains("/srv/a.img"), "{problem}");
    rig.fake.wait_for(&backend_state(id), "5").await;
    let error = format!("{}/error", id.error(0));
    rig.fake.wait_for(&error, "there is no /srv/a.img").await;
    rig.fake.write(&front_state(id), 6);
    rig.fake.wait_for(&backend_state(id), "6").await;
    rig.fake.write(&front_state(id), 1);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(rig.fake.read(&backend_state(id)).as_deref(), Some("6"), "no circle without the image");
    rig.disks.state().fail_open = None;
    rig.backend.retry(id);
    let _guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
    toolstack_clean(&rig.fake, id);
    rig.backend.wait_gone(id, soon()).await.unwrap();
    assert_eq!(rig.fake.read(&error), None, "the error went with the device");
}

#[tokio::test]
async fn rings_that_cannot_be_mapped_and_nodes_that_lie_fail_that_device_only() {
    let rig = Rig::new();
    let (bad, good) = (vbd3(5, XVDA), vbd3(6, XVDA));
    toolstack_attach(&rig.fake, good, &[]);
    let _guest = rig.guest(good);
    rig.wait_states(good, "4", "4").await;
    rig.disks.state().fail_connect = Some("grant 8 of domain 5 cannot be mapped".into());
    toolstack_attach(&rig.fake, bad, &[]);
    rig.fake.wait_for(&backend_state(bad), "2").await;
    publish_rings(&rig.fake, bad);
    rig.fake.wait_for(&backend_state(bad), "5").await;
    let error = format!("{}/error", bad.error(0));
    rig.fake.wait_for(&error, "grant 8 of domain 5 cannot be mapped").await;
    rig.fake.write(&front_state(bad), 6);
    rig.fake.wait_for(&backend_state(bad), "6").await;
    rig.disks.state().fail_connect = None;
    for (name, value, told) in [
        ("ring-ref", "-1", "ring-ref is \"-1\""),
        ("multi-queue-num-queues", "0", "multi-queue-num-queues is \"0\""),
        ("event-channel", "", "event-channel is \"\""),
    ] {
        rig.fake.write(&front_state(bad), 1);
        rig.fake.wait_for(&backend_state(bad), "2").await;
        rig.fake.write(&format!("{}/{name}", bad.frontend()), value);
        rig.fake.write(&front_state(bad), 3);
        rig.fake.wait_for(&backend_state(bad), "5").await;
        assert!(rig.fake.read(&error).unwrap().contains(told), "{:?}", rig.fake.read(&error));
        rig.fake.remove(&format!("{}/{name}", bad.frontend()));
        rig.fake.write(&front_state(bad), 6);
        rig.fake.wait_for(&backend_state(bad), "6").await;
        rig.fake.write(&format!("{}/ring-ref", bad.frontend()), 8);
    }
    assert_eq!(rig.fake.read(&backend_state(good)).as_deref(), Some("4"));
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn size_and_broken_rings_are_reported() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    toolstack_attach(&rig.fake, id, &[]);
    let _guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
    let told = rig.guests.watch(backend_state(id), 0);
    told.changed().await;
    rig.disks.state().sectors = 4096;
    rig.backend.report(id, Report::Resized);
    rig.fake.wait_for(&format!("{}/sectors", id.backend(0)), "4096").await;
    // The same state is written again: that is what the guest's driver waits for.
    tokio::time::timeout_at(soon(), told.changed()).await.unwrap();
    rig.backend.report(id, Report::RingBroken("queue 0: the producer is 99 ahead".into()));
    rig.fake.wait_for(&format!("{}/error", id.error(0)), "queue 0: the producer is 99 ahead").await;
    rig.wait_states(id, "4", "4").await;
    assert!(rig.backend.device(id).unwrap().reason.unwrap().contains("queue 0"));
    // One about a device that is not there is dropped.
    rig.backend.report(vbd3(99, 1), Report::Resized);
    assert!(rig.backend.device(vbd3(99, 1)).is_none());
}

#[tokio::test]
async fn another_device_at_the_same_place_gets_its_own_image() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    toolstack_attach(&rig.fake, id, &[]);
    let guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
    // Removed and made again while the store is slow to say so: only the result is seen.
    rig.fake.faults(|faults| faults.delay = Duration::from_millis(30));
    toolstack_clean(&rig.fake, id);
    toolstack_attach(&rig.fake, id, &[("params", "vhd:/srv/other.vhd"), ("mode", "r")]);
    rig.fake
        .wait("the other image", |_| {
            rig.disks.state().wanted.get(&id).is_some_and(|wanted| wanted.params == "vhd:/srv/other.vhd")
        })
        .await;
    rig.fake.faults(|faults| faults.delay = Duration::ZERO);
    rig.wait_states(id, "4", "4").await;
    assert_eq!(rig.fake.read(&format!("{}/info", id.backend(0))).as_deref(), Some("4"), "read-only");
    let log = rig.disks.log_of(id);
    assert_eq!(log, ["open", "connect", "disconnect", "removed", "open", "connect"]);
    drop(guest);
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn tapback_is_not_fought_with() {
    let rig = Rig::new();
    *rig.host.tapback.lock().unwrap() = Some(77);
    // A device that may be tapback's own is no trouble.
    let (id, theirs) = (vbd3(5, XVDA), vbd3(6, XVDA));
    toolstack_attach(&rig.fake, theirs, &[]);
    let known = |_: &_| rig.backend.device(theirs).is_some_and(|status| status.reason.is_some());
    rig.fake.wait("their device", known).await;
    assert!(!rig.backend.problem().is_some_and(|problem| problem.contains("tapback")));
    toolstack_attach(&rig.fake, id, &[("script", "block-blktapd")]);
    wait_problem(&rig, "tapback (process 77)").await;
    let problem = rig.backend.problem().unwrap();
    assert!(problem.contains("tapback (process 77)") && problem.contains("stop it"), "{problem}");
    assert_eq!(rig.fake.read(&backend_state(id)).as_deref(), Some("1"));
    assert!(rig.disks.log_of(id).is_empty());
    *rig.host.tapback.lock().unwrap() = None;
    rig.fake.wait_for(&backend_state(id), "2").await;
    assert_eq!(rig.backend.problem(), None);
}

#[tokio::test]
async fn blkback_keeps_what_it_has_until_the_script_takes_it() {
    let rig = Rig::new();
    let id = DeviceId { kind: Kind::Vbd, domid: 5, devid: XVDA };
    let other = DeviceId { devid: XVDA + 16, ..id };
    *rig.host.loaded.lock().unwrap() = true;
    rig.host.bound.lock().unwrap().extend([id, other]);
    toolstack_attach(&rig.fake, other, &[("script", "/etc/xen/scripts/block")]);
    toolstack_attach(
        &rig.fake,
        id,
        &[("script", "block-blktapd"), ("state", "2"), ("multi-queue-max-queues", "99")],
    );
    rig.fake
        .wait("both", |_| rig.backend.devices().iter().filter(|status| status.reason.is_some()).count() == 2)
        .await;
    assert!(rig.backend.device(id).unwrap().reason.unwrap().contains("xen-blkback has it"));
    assert!(rig.backend.device(other).unwrap().reason.unwrap().contains("script is block:"));
    // The script unbinds, then asks for the device. A guest that was quicker is in state 3 already.
    rig.host.bound.lock().unwrap().retain(|bound| *bound != id);
    publish_rings(&rig.fake, id);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(rig.disks.log_of(id).is_empty(), "not before it is asked for");
    rig.backend.claim(id, soon()).await.unwrap();
    rig.fake.wait_for(&backend_state(id), "4").await;
    assert_eq!(rig.fake.read(&format!("{}/multi-queue-max-queues", id.backend(0))).as_deref(), Some("8"));
    assert!(rig.disks.log_of(other).is_empty());
    let problem = rig.backend.claim(vbd3(9, 9), soon()).await.unwrap_err();
    assert!(problem.message.contains("vbd3/9/9"), "{problem}");
}

#[tokio::test]
async fn without_blkback_plain_devices_are_served_at_once() {
    let rig = Rig::new();
    let id = DeviceId { kind: Kind::Vbd, domid: 5, devid: XVDA };
    toolstack_attach(&rig.fake, id, &[("script", "block-blktapd")]);
    let _guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
}

#[tokio::test]
async fn an_old_store_and_a_missing_permission_are_explained() {
    let fake = super::super::fake::FakeStore::new();
    fake.faults(|faults| faults.is_old = true);
    for domid in 1..1200 {
        fake.write(&format!("/local/domain/0/backend/vbd3/{domid}/x"), "");
    }
    let rig = Rig::on(fake);
    wait_problem(&rig, "older than Xen 4.9").await;
    let problem = rig.backend.problem().unwrap();
    assert!(problem.contains("older than Xen 4.9"), "{problem}");
    // New devices are served all the same.
    let id = vbd3(2000, XVDA);
    toolstack_attach(&rig.fake, id, &[]);
    rig.fake.wait_for(&backend_state(id), "2").await;

    let fake = super::super::fake::FakeStore::new();
    fake.faults(|faults| faults.deny = vec!["/local/domain/0/backend".into()]);
    let rig = Rig::on(fake);
    wait_problem(&rig, "EACCES").await;
    let problem = rig.backend.problem().unwrap();
    assert!(problem.contains("EACCES") && problem.contains("root"), "{problem}");
}

#[tokio::test]
async fn a_slow_store_with_conflicts_and_shuffled_answers_is_only_slow() {
    let rig = Rig::new();
    rig.fake.faults(|faults| {
        (faults.delay, faults.shuffle, faults.conflicts) = (Duration::from_millis(3), true, 5);
    });
    let ids: Vec<DeviceId> = (1..=10).map(|domid| vbd3(domid, XVDA)).collect();
    let mut guests = Vec::new();
    for id in &ids {
        toolstack_attach(&rig.fake, *id, &[]);
        guests.push(rig.guest(*id));
    }
    for id in &ids {
        rig.wait_states(*id, "4", "4").await;
        toolstack_detach(&rig.fake, *id);
    }
    for id in &ids {
        rig.wait_states(*id, "6", "6").await;
    }
    rig.disks.assert_never_wrong();
    assert_eq!(rig.disks.state().connects, 10);
}

#[tokio::test]
async fn a_panic_is_one_device_s_and_passes() {
    let rig = Rig::new();
    let (bad, good) = (vbd3(5, XVDA), vbd3(6, XVDA));
    rig.disks.state().panic_once = Some(bad);
    rig.disks.state().open_delay = Duration::from_millis(50);
    toolstack_attach(&rig.fake, bad, &[]);
    toolstack_attach(&rig.fake, good, &[]);
    let _guests = (rig.guest(bad), rig.guest(good));
    rig.fake.wait("the panic", |_| rig.disks.state().panic_once.is_none()).await;
    rig.wait_states(good, "4", "4").await;
    // Whatever changes about the device brings it back.
    rig.fake.write(&format!("{}/online", bad.backend(0)), 1);
    rig.wait_states(bad, "4", "4").await;
    rig.disks.assert_never_wrong();
}

#[tokio::test]
async fn the_end_of_the_daemon_leaves_states_alone() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    toolstack_attach(&rig.fake, id, &[]);
    let _guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
    let Rig { fake, store, guests, disks, host, backend } = rig;
    drop((backend, store));
    fake.wait("only the guest's watch", |fake| fake.watch_paths() == [backend_state(id)]).await;
    assert_eq!(fake.read(&backend_state(id)).as_deref(), Some("4"));
    assert_eq!(disks.log_of(id), ["open", "connect"]);
    drop((guests, host));
}
