//! Devices that we make ourselves: by name and number, twice, with and without consent, and after the guest's death.

use std::time::Duration;

use tokio::time::Instant;

use super::super::create::{NewDevice, attach, detach, force, resolve};
use super::super::rig::*;
use super::super::spec::MARK;
use crate::problem::ProblemKind;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn new(domid: u16) -> NewDevice {
    NewDevice { domid, devid: XVDA, disk: "web1".into(), read_only: false }
}

#[tokio::test]
async fn domains_have_names_and_numbers() {
    let rig = Rig::new();
    for (domid, name) in [(0, "Domain-0"), (5, "web"), (6, "twin"), (7, "twin")] {
        rig.fake.introduce(domid);
        rig.fake.write(&format!("/local/domain/{domid}/name"), name);
    }
    rig.store.connected(Duration::from_secs(60)).await.unwrap();
    assert_eq!(resolve(&rig.store, "web").await.unwrap(), 5);
    assert_eq!(resolve(&rig.store, "5").await.unwrap(), 5);
    assert_eq!(resolve(&rig.store, "0").await.unwrap(), 0);
    assert_eq!(resolve(&rig.store, "Domain-0").await.unwrap(), 0);
    for (domain, kind, word) in [
        ("nobody", ProblemKind::NotFound, "called"),
        ("9", ProblemKind::NotFound, "no domain 9"),
        ("32752", ProblemKind::Invalid, "below"),
        ("99999999999", ProblemKind::Invalid, "below"),
        ("", ProblemKind::NotFound, "called"),
        ("twin", ProblemKind::Conflict, "[6, 7]"),
    ] {
        let problem = resolve(&rig.store, domain).await.unwrap_err();
        assert!(problem.kind == kind && problem.message.contains(word), "{domain}: {problem}");
    }
}

#[tokio::test]
async fn a_device_is_made_served_and_removed_with_consent() {
    for domid in [5, 0] {
        let rig = Rig::new();
        rig.fake.introduce(domid);
        rig.fake.write(&format!("/local/domain/{domid}/name"), "web");
        rig.store.connected(Duration::from_secs(60)).await.unwrap();
        let id = attach(&rig.store, &new(domid)).await.unwrap();
        assert_eq!(attach(&rig.store, &new(domid)).await.unwrap(), id, "made twice is made once");
        let _guest = rig.guest(id);
        rig.wait_states(id, "4", "4").await;
        assert_eq!(rig.disks.state().wanted[&id].disk.as_deref(), Some("web1"));
        assert_eq!(
            *rig.host.kept.lock().unwrap(),
            u32::from(domid == 0),
            "for disks of our own domain, once"
        );
        // Every node is its owner's, and the other's to read; no stranger's.
        let (own, guest) =
            (vec!["n0".to_owned(), format!("r{domid}")], vec![format!("n{domid}"), "r0".to_owned()]);
        for (dir, perms) in [(id.backend(0), own), (id.frontend(), guest)] {
            let state = rig.fake.state();
            let nodes: Vec<_> = state
                .tree
                .iter()
                .filter(|(path, _)| path.starts_with(&dir))
                .map(|(_, node)| &node.perms)
                .collect();
            assert!(nodes.len() > 6 && nodes.iter().all(|found| **found == perms), "{dir}: {nodes:?}");
        }
        detach(&rig.store, id).await.unwrap();
        rig.backend.wait_gone(id, soon()).await.unwrap();
        assert_eq!(rig.disks.log_of(id), ["open", "connect", "disconnect", "removed"]);
        rig.fake
            .wait("no nodes", |fake| {
                fake.nodes_below("/local/domain/0/backend/vbd3").is_empty()
                    && fake.nodes_below(&format!("/local/domain/{domid}/device/vbd")).is_empty()
            })
            .await;
        rig.fake
            .wait("no directory", |fake| fake.read(&format!("/local/domain/{domid}/device/vbd")).is_none())
            .await;
        // Once more is no error.
        detach(&rig.store, id).await.unwrap();
        force(&rig.store, id).await.unwrap();
    }
}

#[tokio::test]
async fn a_guest_that_does_not_let_go_is_named_and_forced() {
    let rig = Rig::new();
    rig.fake.introduce(5);
    rig.store.connected(Duration::from_secs(60)).await.unwrap();
    let id = attach(&rig.store, &new(5)).await.unwrap();
    rig.fake.wait_for(&backend_state(id), "2").await;
    publish_rings(&rig.fake, id);
    rig.fake.wait_for(&backend_state(id), "4").await;
    rig.fake.write(&front_state(id), 4);
    detach(&rig.store, id).await.unwrap();
    let problem = rig.backend.wait_gone(id, Instant::now() + Duration::from_millis(100)).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::TimedOut);
    assert!(problem.message.contains("frontend is in state 4, ours 5"), "{problem}");
    force(&rig.store, id).await.unwrap();
    rig.backend.wait_gone(id, soon()).await.unwrap();
    assert_eq!(rig.disks.log_of(id), ["open", "connect", "disconnect", "removed"]);
    assert!(rig.fake.nodes_below("/local/domain/0/backend").iter().all(|path| !path.contains("/5")));
}

#[tokio::test]
async fn a_dead_guest_leaves_no_nodes_of_ours() {
    let rig = Rig::new();
    rig.fake.introduce(5);
    rig.store.connected(Duration::from_secs(60)).await.unwrap();
    let id = attach(&rig.store, &new(5)).await.unwrap();
    let guest = rig.guest(id);
    rig.wait_states(id, "4", "4").await;
    drop(guest);
    rig.fake.kill_domain(5);
    rig.backend.wait_gone(id, soon()).await.unwrap();
    rig.fake
        .wait("no nodes", |fake| {
            fake.nodes_below("/local/domain/0/backend/vbd3").is_empty()
                && fake.nodes_below("/local/domain/5/device").is_empty()
        })
        .await;
    assert_eq!(rig.disks.log_of(id), ["open", "connect", "disconnect", "removed"]);
    let problem = attach(&rig.store, &new(5)).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::NotFound);
}

#[tokio::test]
async fn a_death_while_the_daemon_was_away_is_noticed() {
    let fake = super::super::fake::FakeStore::new();
    toolstack_attach(&fake, vbd3(5, XVDA), &[(MARK, "web1"), ("state", "4")]);
    publish_rings(&fake, vbd3(5, XVDA));
    fake.kill_domain(5);
    let rig = Rig::on(fake);
    rig.fake.wait("no nodes", |fake| fake.nodes_below("/local/domain/0/backend/vbd3").is_empty()).await;
}

#[tokio::test]
async fn what_is_there_is_not_overwritten() {
    let rig = Rig::new();
    let id = vbd3(5, XVDA);
    toolstack_attach(&rig.fake, id, &[]);
    rig.fake.wait_for(&backend_state(id), "2").await;
    let problem = attach(&rig.store, &new(5)).await.unwrap_err();
    assert!(problem.kind == ProblemKind::Conflict && problem.message.contains("xvda"), "{problem}");
    for outcome in [detach(&rig.store, id).await, force(&rig.store, id).await] {
        let problem = outcome.unwrap_err();
        assert!(problem.message.contains("xl block-detach"), "{problem}");
    }
    assert_eq!(rig.fake.read(&backend_state(id)).as_deref(), Some("2"));
    // Another backend's device of the same number: its frontend is there, and no directory of ours.
    rig.fake.introduce(6);
    rig.fake.write("/local/domain/6/device/vbd/51712/state", 4);
    let problem = attach(&rig.store, &new(6)).await.unwrap_err();
    assert!(problem.message.contains("/local/domain/6/device/vbd/51712"), "{problem}");
    assert_eq!(rig.fake.read(&vbd3(6, XVDA).backend(0)), None);
    // Ours, for another disk.
    rig.fake.introduce(7);
    attach(&rig.store, &new(7)).await.unwrap();
    let problem = attach(&rig.store, &NewDevice { disk: "web2".into(), ..new(7) }).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict);
}
