//! Goal: every flow of the daemon ends with what was asked for or with nothing changed, whatever a shard, the state's
//! directory or an image does. Method: the real daemon, images, sockets and state on scripted shards.

mod daemon_rig;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use blktapd::limit_change::LimitChange;
use blktapd::model::{QosRequest, State};
use blktapd::problem::ProblemKind;
use daemon_rig::{Behaviour, FakeShard, Rig, patient, raw, request, soon, until};
use shard::api::{Event, Reply, ShardError, ShardErrorKind};

fn state_of(rig: &Rig, name: &str) -> Option<State> {
    rig.daemon.find(name).map(|disk| disk.state())
}

fn shard_with<'a>(rig: &'a Rig, name: &str) -> &'a FakeShard {
    rig.shards.iter().find(|shard| shard.disks().iter().any(|disk| disk == name)).expect("a shard has it")
}

fn shard_has(rig: &Rig, shard: usize, name: &str) -> bool {
    rig.shards[shard].disks().iter().any(|disk| disk == name)
}

#[tokio::test]
async fn attach_is_idempotent_and_a_difference_is_a_conflict() {
    let rig = Rig::new();
    let (disk, new) = rig.attach("d1", "null:?size=1G").await.unwrap();
    assert!(new && disk.state == State::Running && disk.size_bytes == Some(1 << 30));
    assert_eq!(disk.frontends[0].socket, Some(rig.socket("d1").display().to_string()));
    assert!(rig.socket("d1").exists());
    assert_eq!(std::fs::metadata(rig.socket("d1")).unwrap().permissions().mode() & 0o777, 0o600);
    // The same size in other words is the same request.
    let (_, new) = rig.attach("d1", "null:?size=1024M").await.unwrap();
    assert!(!new);
    let problem = rig.attach("d1", "null:?size=2G").await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict);
    assert!(problem.message.contains("null:?size=1G instead of null:?size=2G"), "{problem}");
    let mut limited = request("null:?size=1G");
    limited.limits.iops = Some(5);
    let problem = rig.daemon.attach("d1", limited.clone(), patient()).await.unwrap_err();
    assert!(problem.message.contains("limits {} instead of {\"iops\":5}"), "{problem}");
    // After a live change both the first arguments and the present ones are what is served.
    let change = LimitChange { iops: Some(5), ..LimitChange::default() };
    let qos = QosRequest { limits: change, groups: None };
    rig.daemon.set_disk_limits("d1", qos, patient()).await.unwrap();
    assert_eq!(shard_with(&rig, "d1").limits("d1").iops_total.per_second, 5);
    rig.daemon.attach("d1", limited, patient()).await.unwrap();
    rig.attach("d1", "null:?size=1G").await.unwrap();
    assert_eq!(rig.shards.iter().flat_map(FakeShard::disks).count(), 1);
}

#[tokio::test]
async fn wrong_requests_are_explained_and_leave_nothing() {
    let rig = Rig::new();
    let mut no_frontend = request("null:?size=1G");
    no_frontend.nbd = false;
    let long = "x".repeat(64);
    let cases = [
        ("a/b", request("null:?size=1G"), "contains '/'"),
        ("", request("null:?size=1G"), "is empty"),
        ("d", no_frontend, "the frontends are: --nbd"),
        ("d", request("vmdk:/x"), "not built"),
        ("d", request("raw:relative"), "relative"),
        ("d", request("raw:/nowhere/at/all.img"), "/nowhere/at/all.img"),
        ("d", request("null:"), "needs a size"),
    ];
    for (name, request, expected) in cases {
        let problem = rig.daemon.attach(name, request, patient()).await.unwrap_err();
        assert!(problem.message.contains(expected), "{name}: {problem}");
    }
    let mut wrong_shard = request("null:?size=1G");
    wrong_shard.shard = Some(7);
    let problem = rig.daemon.attach("d", wrong_shard, patient()).await.unwrap_err();
    assert!(problem.message.contains("numbered from 0 to 1"), "{problem}");
    let mut twice = request("null:?size=1G");
    twice.groups = vec!["g".into(), "g".into()];
    assert!(rig.daemon.attach("d", twice, patient()).await.unwrap_err().message.contains("given twice"));
    let _ = rig.attach(&long, "null:?size=1G").await;
    assert!(
        rig.daemon.find("d").is_none() && rig.shards.iter().all(|shard| !shard.log().contains(&"connect"))
    );
    assert_eq!(rig.daemon.state.read(|state| state.disks.keys().filter(|name| **name != long).count()), 0);
}

#[tokio::test]
async fn a_socket_path_that_is_too_long_is_refused_before_anything_is_opened() {
    let dir = tempfile::Builder::new().prefix(&"p".repeat(40)).tempdir().unwrap();
    let rig = Rig::with(Arc::new(dir), "");
    let problem = rig.attach(&"n".repeat(60), "null:?size=1G").await.unwrap_err();
    assert!(problem.message.contains("at most 107"), "{problem}");
    assert!(rig.shards.iter().all(|shard| shard.log().is_empty()));
}

#[tokio::test]
async fn an_attach_that_fails_half_way_is_undone() {
    let rig = Rig::new();
    let image = rig.image("a.img", 1 << 20);
    // The shard refuses.
    rig.shards.iter().for_each(|shard| shard.script("add", Behaviour::Refuse(ShardErrorKind::Limit)));
    assert!(rig.attach("d", &raw(&image)).await.is_err());
    // The socket cannot be bound: a directory is in its place.
    rig.shards.iter().for_each(|shard| shard.script("add", Behaviour::Answer));
    std::fs::create_dir_all(rig.socket("d").join("x")).unwrap();
    assert!(rig.attach("d", &raw(&image)).await.unwrap_err().message.contains("d.sock"));
    std::fs::remove_dir_all(rig.socket("d")).unwrap();
    // It cannot be kept: a directory is in the place of the new state.
    let obstacle = rig.dir.path().join("run/state/attachments.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    let problem = rig.attach("d", &raw(&image)).await.unwrap_err();
    assert!(problem.message.contains("cannot be kept, and was undone"), "{problem}");
    std::fs::remove_dir(&obstacle).unwrap();
    assert!(!rig.socket("d").exists() && rig.daemon.find("d").is_none());
    assert!(rig.shards.iter().all(|shard| shard.disks().is_empty()));
    // The image is free again: it can be attached for writing under another name.
    rig.attach("e", &raw(&image)).await.unwrap();
}

#[tokio::test]
async fn a_shard_that_takes_a_disk_too_late_gives_it_back() {
    let rig = Rig::new();
    let image = rig.image("a.img", 1 << 20);
    rig.shards.iter().for_each(|shard| shard.script("add", Behaviour::Hold));
    // Long enough for the image to be opened.
    let problem = rig.daemon.attach("d", request(&raw(&image)), soon(1000)).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::TimedOut);
    rig.shards.iter().for_each(|shard| shard.script("add", Behaviour::Answer));
    rig.shards.iter().for_each(FakeShard::release);
    until("the disk is removed again", || rig.shards.iter().any(|shard| shard.log().contains(&"force")))
        .await;
    // As soon as the file is closed it can be attached.
    let deadline = patient();
    while let Err(problem) = rig.attach("d", &raw(&image)).await {
        assert!(tokio::time::Instant::now() < deadline, "{problem}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn two_writers_on_one_image_conflict_with_the_holder_named() {
    let rig = Rig::new();
    let image = rig.image("a.img", 1 << 20);
    rig.attach("first", &raw(&image)).await.unwrap();
    let problem = rig.attach("second", &raw(&image)).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict);
    assert!(problem.message.contains("first"), "{problem}");
    rig.daemon.detach("first", false, patient()).await.unwrap();
    rig.attach("second", &raw(&image)).await.unwrap();
}

#[tokio::test]
async fn a_busy_disk_says_who_uses_it_and_goes_on() {
    let rig = Rig::new();
    rig.attach("d", "null:?size=1G").await.unwrap();
    let disk = rig.daemon.find("d").unwrap();
    disk.counters.clients.set(7);
    let problem = rig.daemon.detach("d", false, soon(50)).await.unwrap_err();
    assert_eq!((problem.kind, problem.exit_code()), (ProblemKind::Busy, 4));
    assert!(
        problem.message.contains("unix pid 0 (fio)") && problem.message.contains("and 2 more"),
        "{problem}"
    );
    assert_eq!(state_of(&rig, "d"), Some(State::Running));
    assert!(rig.socket("d").exists() && disk.inner().closing == 0);
    assert!(!shard_with(&rig, "d").log().contains(&"remove"));
    // When the clients leave in time, it goes.
    let daemon = rig.daemon.clone();
    let detach = tokio::spawn(async move { daemon.detach("d", false, patient()).await });
    tokio::time::sleep(std::time::Duration::from_millis(30)).await;
    disk.counters.clients.set(0);
    assert_eq!(detach.await.unwrap().unwrap(), None);
    assert!(rig.daemon.find("d").is_none() && !rig.socket("d").exists());
    assert_eq!(rig.daemon.detach("d", false, soon(100)).await.unwrap_err().exit_code(), 3);
}

#[tokio::test]
async fn a_stuck_drain_can_be_forced_and_leaves_a_zombie_until_the_kernel_is_done() {
    let rig = Rig::new();
    let image = rig.image("a.img", 1 << 20);
    rig.attach("d", &raw(&image)).await.unwrap();
    let shard = shard_with(&rig, "d").clone();
    shard.script("remove", Behaviour::Hold);
    shard.script("force", Behaviour::Hold);
    let problem = rig.daemon.detach("d", false, soon(100)).await.unwrap_err();
    assert_eq!((problem.kind, problem.exit_code()), (ProblemKind::TimedOut, 6));
    assert_eq!(state_of(&rig, "d"), Some(State::Draining));
    assert!(rig.daemon.state.read(|state| state.disks.is_empty()), "a restart must not bring it back");
    let daemon = rig.daemon.clone();
    let forced = tokio::spawn(async move { daemon.detach("d", true, patient()).await });
    until("the force arrives", || shard.log().contains(&"force")).await;
    let interrupted = ShardError { kind: ShardErrorKind::Interrupted, message: "by force".into() };
    shard.answer_held("remove", Err(interrupted));
    shard.answer_held("force", Ok(Reply::Zombie { in_flight: 3 }));
    let zombie = forced.await.unwrap().unwrap().expect("a zombie is left");
    assert_eq!(zombie.state, State::Zombie);
    assert!(zombie.reason.unwrap().contains("3 operations"));
    assert_eq!(rig.attach("d", &raw(&image)).await.unwrap_err().kind, ProblemKind::Busy);
    assert_eq!(rig.attach("other", &raw(&image)).await.unwrap_err().kind, ProblemKind::Conflict);
    let config = shard.take("d");
    shard.say(Event::ZombieGone { config });
    until("the zombie goes", || rig.daemon.find("d").is_none()).await;
    rig.attach("other", &raw(&image)).await.unwrap();
}

#[tokio::test]
async fn a_shard_that_refuses_to_remove_a_disk_keeps_it_and_it_stays_attached() {
    let rig = Rig::new();
    rig.attach("d", "null:?size=1G").await.unwrap();
    let shard = shard_with(&rig, "d").clone();
    shard.script("remove", Behaviour::Refuse(ShardErrorKind::WrongState));
    let problem = rig.daemon.detach("d", false, patient()).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Busy);
    assert_eq!(state_of(&rig, "d"), Some(State::Running));
    assert!(rig.socket("d").exists() && rig.daemon.state.read(|state| state.disks.contains_key("d")));
    shard.script("remove", Behaviour::Answer);
    rig.daemon.detach("d", false, patient()).await.unwrap();
    assert!(!rig.socket("d").exists());
}

#[tokio::test]
async fn a_pause_that_takes_too_long_goes_back_to_running() {
    let rig = Rig::new();
    rig.attach("d", "null:?size=1G").await.unwrap();
    let shard = shard_with(&rig, "d").clone();
    shard.script("pause", Behaviour::Hold);
    let problem = rig.daemon.pause("d", false, soon(50)).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::TimedOut);
    assert_eq!(shard.log().last(), Some(&"resume"));
    shard.script("pause", Behaviour::Answer);
    assert_eq!(rig.daemon.pause("d", false, patient()).await.unwrap().state, State::Paused);
    assert_eq!(
        rig.daemon.pause("d", false, patient()).await.unwrap().state,
        State::Paused,
        "again is no error"
    );
    let disk = rig.daemon.resume("d", Default::default(), patient()).await.unwrap();
    assert_eq!(disk.state, State::Running);
}

#[tokio::test]
async fn a_pause_and_a_give_up_hold_over_a_crash_until_they_are_ended() {
    let rig = Rig::new();
    for name in ["paused", "resumed", "given-up", "runs"] {
        rig.attach(name, "null:?size=1G").await.unwrap();
    }
    rig.daemon.pause("paused", false, patient()).await.unwrap();
    rig.daemon.pause("resumed", false, patient()).await.unwrap();
    rig.daemon.resume("resumed", Default::default(), patient()).await.unwrap();
    rig.daemon.pause("given-up", false, patient()).await.unwrap();
    rig.daemon.fail("given-up", patient()).await.unwrap();
    let states = [
        ("paused", State::Paused),
        ("resumed", State::Running),
        ("given-up", State::Failed),
        ("runs", State::Running),
    ];
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    for (name, state) in states {
        assert_eq!(state_of(&rig, name), Some(state), "{name}");
    }
    let reason = |name: &str| rig.daemon.describe(&rig.daemon.find(name).unwrap()).reason;
    assert!(reason("paused").unwrap().contains("`ctl resume`"));
    assert!(reason("given-up").unwrap().contains("detach it"));
    assert_eq!(reason("runs"), None);
    // The attach that made it is still repeated without a change.
    assert!(!rig.attach("paused", "null:?size=1G").await.unwrap().1);
    assert_eq!(state_of(&rig, "paused"), Some(State::Paused));
    // A shard that dies changes nothing about it either.
    let place = rig.daemon.find("paused").unwrap().place().unwrap().1;
    rig.shards[place].die();
    until("it is back", || shard_has(&rig, 1 - place, "paused")).await;
    until("it is paused", || state_of(&rig, "paused") == Some(State::Paused)).await;
    rig.daemon.resume("paused", Default::default(), patient()).await.unwrap();
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    assert_eq!(state_of(&rig, "paused"), Some(State::Running), "resumed for good");
    rig.daemon.detach("given-up", false, patient()).await.unwrap();
    rig.attach("given-up", "null:?size=1G").await.unwrap();
    assert_eq!(state_of(&rig, "given-up"), Some(State::Running), "a new attachment");
}

#[tokio::test]
async fn a_pause_that_cannot_be_kept_is_ended() {
    let rig = Rig::new();
    rig.attach("d", "null:?size=1G").await.unwrap();
    // A directory in the place of the state's new file makes every write fail.
    let block = rig.dir.path().join("run/state/attachments.json.new");
    std::fs::create_dir(&block).unwrap();
    let problem = rig.daemon.pause("d", false, patient()).await.unwrap_err();
    assert!(problem.message.contains("runs on"), "{problem}");
    assert_eq!(state_of(&rig, "d"), Some(State::Running));
    assert!(rig.daemon.fail("d", patient()).await.is_err());
    assert_eq!(state_of(&rig, "d"), Some(State::Running), "not given up, since that could not be kept");
    std::fs::remove_dir(&block).unwrap();
    rig.daemon.pause("d", false, patient()).await.unwrap();
    std::fs::create_dir(&block).unwrap();
    assert!(rig.daemon.resume("d", Default::default(), patient()).await.is_err());
    assert_eq!(state_of(&rig, "d"), Some(State::Paused));
    std::fs::remove_dir(&block).unwrap();
    // A resume that the shard refuses leaves the pause in force.
    shard_with(&rig, "d").script("resume", Behaviour::Refuse(ShardErrorKind::WrongState));
    assert!(rig.daemon.resume("d", Default::default(), patient()).await.is_err());
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    assert_eq!(state_of(&rig, "d"), Some(State::Paused));
}

#[tokio::test]
async fn a_move_that_fails_leaves_the_disk_where_it_was() {
    let rig = Rig::new();
    let (disk, _) = rig.attach("d", "null:?size=1G").await.unwrap();
    let from = disk.shard.unwrap();
    let to = (1 - from) as u16;
    let shard = rig.shards[from].clone();
    shard.script("park", Behaviour::Refuse(ShardErrorKind::WrongState));
    assert!(rig.daemon.move_disk("d", to, patient()).await.is_err());
    shard.script("park", Behaviour::Hold);
    let daemon = rig.daemon.clone();
    let slow = tokio::spawn(async move { daemon.move_disk("d", to, soon(50)).await });
    until("the park is given up", || shard.log().contains(&"cancel")).await;
    shard.answer_held(
        "park",
        Err(ShardError { kind: ShardErrorKind::Interrupted, message: "cancelled".into() }),
    );
    assert_eq!(slow.await.unwrap().unwrap_err().kind, ProblemKind::TimedOut);
    rig.shards[usize::from(to)].die();
    assert!(rig.daemon.move_disk("d", to, patient()).await.unwrap_err().message.contains("has ended"));
    assert_eq!(rig.daemon.move_disk("d", 9, patient()).await.unwrap_err().exit_code(), 2);
    assert_eq!(rig.daemon.find("d").unwrap().place().unwrap().1, from);
    assert_eq!(state_of(&rig, "d"), Some(State::Running));
    assert!(rig.daemon.state.read(|state| state.disks["d"].shard.is_none()));
}

/// A disk that was parked just when its move was given up goes back; when its shard does not take it, that is told.
#[tokio::test]
async fn a_disk_that_does_not_come_back_from_a_move_is_told() {
    let rig = Rig::new();
    let (disk, _) = rig.attach("d", "null:?size=1G").await.unwrap();
    let from = disk.shard.unwrap();
    let shard = rig.shards[from].clone();
    for taken in [true, false] {
        shard.script("park", Behaviour::Hold);
        shard.script("unpark", Behaviour::Hold);
        let daemon = rig.daemon.clone();
        let moved = tokio::spawn(async move { daemon.move_disk("d", (1 - from) as u16, soon(50)).await });
        let cancels = if taken { 1 } else { 2 };
        let count = |kind| shard.log().iter().filter(|logged| **logged == kind).count();
        until("the park is given up", || count("cancel") == cancels).await;
        shard.answer_held("park", Ok(Reply::Parked(daemon_rig::parked_disk())));
        assert_eq!(moved.await.unwrap().unwrap_err().kind, ProblemKind::TimedOut);
        until("it is put back", || count("unpark") == cancels).await;
        let told = || {
            let events = rig.daemon.events.after(0, 1024);
            events.iter().any(|event| event.message.contains("it did not come back"))
        };
        if taken {
            shard.answer_held("unpark", Ok(Reply::Done));
            // The place is free again: whoever needs it has it.
            rig.daemon.pause("d", false, patient()).await.unwrap();
            rig.daemon.resume("d", Default::default(), patient()).await.unwrap();
            assert!(!told());
        } else {
            shard.hand_back();
            until("it is told", told).await;
        }
    }
}

#[tokio::test]
async fn the_disks_of_a_dead_shard_go_to_another_and_the_others_go_on() {
    let rig = Rig::new();
    let image = rig.image("d0.img", 1 << 20);
    rig.attach("d0", &raw(&image)).await.unwrap();
    for n in 1..4 {
        rig.attach(&format!("d{n}"), "null:?size=1G").await.unwrap();
    }
    let dead = rig.daemon.find("d0").unwrap().place().unwrap().1;
    let left = 1 - dead;
    let lost = rig.shards[dead].disks();
    assert_eq!((lost.len(), rig.shards[left].disks().len()), (2, 2));
    // The dead shard holds on to the image of one of them, as kernel operations do: that one is listed as failed until it is
    // free, the other is served at once.
    let held = rig.shards[dead].take("d0");
    rig.shards[dead].die();
    let other = lost.iter().find(|name| *name != "d0").unwrap().clone();
    until("the other is served", || state_of(&rig, &other) == Some(State::Running)).await;
    let tried = || {
        let disk = rig.daemon.describe(&rig.daemon.find("d0").unwrap());
        disk.retry_in_s.is_some() && disk.state == State::Failed
    };
    until("the one that is held has been tried", tried).await;
    drop(held);
    until("it is served as well", || state_of(&rig, "d0") == Some(State::Running)).await;
    for n in 0..4 {
        let name = format!("d{n}");
        assert_eq!(state_of(&rig, &name), Some(State::Running));
        assert_eq!(rig.daemon.find(&name).unwrap().place().unwrap().1, left);
        assert!(rig.socket(&name).exists(), "{name} has its socket");
    }
    assert_eq!(rig.shards[left].disks(), ["d0", "d1", "d2", "d3"]);
    let events = rig.daemon.events.after(0, 1024);
    let told = |text: &str| events.iter().any(|event| event.message.contains(text));
    assert!(told("it was shot by a test; its disks are brought up on other shards"), "{events:?}");
    assert!(told("served again, by another shard"), "{events:?}");
    assert!(!rig.daemon.health().healthy, "a core is still missing");
    assert_eq!(rig.attach("new", "null:?size=1G").await.unwrap().0.shard, Some(left));
    rig.daemon.detach("d0", false, patient()).await.unwrap();

    // The last one takes the daemon along; what is attached stays attached.
    rig.shards[left].die();
    tokio::time::timeout_at(patient(), rig.daemon.no_shard_left.notified()).await.unwrap();
    assert_eq!(rig.daemon.state.read(|state| state.disks.len()), 4);
}

#[tokio::test]
async fn a_disk_that_is_being_detached_goes_with_its_dead_shard() {
    let rig = Rig::new();
    rig.attach("d", "null:?size=1G").await.unwrap();
    let shard = shard_with(&rig, "d").clone();
    shard.script("remove", Behaviour::Hold);
    let daemon = rig.daemon.clone();
    let detach = tokio::spawn(async move { daemon.detach("d", false, patient()).await });
    until("it drains", || shard.log().contains(&"remove")).await;
    shard.die();
    detach.await.unwrap().unwrap();
    until("it is gone", || rig.daemon.find("d").is_none()).await;
    assert!(rig.daemon.state.read(|state| state.disks.is_empty()));
}

#[tokio::test]
async fn attachments_survive_and_a_missing_image_is_listed_and_tried_again() {
    let rig = Rig::new();
    let image = rig.image("a.img", 1 << 20);
    let gone = rig.image("gone.img", 1 << 20);
    rig.attach("good", &raw(&image)).await.unwrap();
    rig.attach("bad", &raw(&gone)).await.unwrap();
    let change = LimitChange { bps: Some(1 << 20), ..LimitChange::default() };
    rig.daemon.set_disk_limits("good", QosRequest { limits: change, groups: None }, patient()).await.unwrap();
    std::fs::remove_file(&gone).unwrap();
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    assert_eq!(state_of(&rig, "good"), Some(State::Running));
    assert_eq!(shard_with(&rig, "good").limits("good").bps_total.per_second, 1 << 20);
    assert!(rig.socket("good").exists() && !rig.socket("bad").exists());
    let bad = rig.daemon.describe(&rig.daemon.find("bad").unwrap());
    assert_eq!(bad.state, State::Failed);
    assert!(bad.reason.unwrap().contains("gone.img"), "the reason names the file");
    rig.image("gone.img", 1 << 20);
    until("it is tried again", || state_of(&rig, "bad") == Some(State::Running)).await;
    // One that stays away can be detached, and does not come back.
    rig.daemon.detach("bad", false, patient()).await.unwrap();
    std::fs::remove_file(&gone).unwrap();
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    assert!(rig.daemon.find("bad").is_none());
}

#[tokio::test]
async fn an_operator_can_try_a_failed_disk_at_once() {
    let rig = Rig::new();
    let image = rig.image("a.img", 1 << 20);
    rig.attach("d", &raw(&image)).await.unwrap();
    std::fs::remove_file(&image).unwrap();
    let rig = rig.crash("").await;
    rig.daemon.restore(patient()).await;
    assert!(rig.attach("d", &raw(&image)).await.is_err());
    rig.image("a.img", 1 << 20);
    let (disk, new) = rig.attach("d", &raw(&image)).await.unwrap();
    assert!(!new && disk.state == State::Running);
}

#[tokio::test]
async fn many_attaches_at_once_spread_and_one_name_is_served_once() {
    let rig = Rig::new();
    let mut tasks = Vec::new();
    for n in 0..256 {
        let daemon = rig.daemon.clone();
        // Every name comes twice.
        let name = format!("d{}", n % 128);
        tasks.push(tokio::spawn(
            async move { daemon.attach(&name, request("null:?size=1M"), patient()).await },
        ));
    }
    let mut new = 0;
    for task in tasks {
        new += usize::from(task.await.unwrap().unwrap().1);
    }
    assert_eq!(new, 128);
    assert_eq!([rig.shards[0].disks().len(), rig.shards[1].disks().len()], [64, 64]);
    assert_eq!(rig.daemon.state.read(|state| state.disks.len()), 128);
}

#[tokio::test]
async fn limits_that_cannot_be_kept_or_sent_do_not_change() {
    let rig = Rig::new();
    rig.attach("d", "null:?size=1G").await.unwrap();
    let shard = shard_with(&rig, "d").clone();
    let change =
        || QosRequest { limits: LimitChange { iops: Some(9), ..LimitChange::default() }, groups: None };
    let obstacle = rig.dir.path().join("run/state/attachments.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    assert!(rig.daemon.set_disk_limits("d", change(), patient()).await.is_err());
    std::fs::remove_dir(&obstacle).unwrap();
    shard.script("limits", Behaviour::Refuse(ShardErrorKind::Failed));
    assert!(rig.daemon.set_disk_limits("d", change(), patient()).await.is_err());
    assert_eq!(shard.limits("d").iops_total.per_second, 0);
    assert_eq!(rig.daemon.state.read(|state| state.disks["d"].limits.iops_total.per_second), 0);
    assert_eq!(rig.daemon.describe(&rig.daemon.find("d").unwrap()).limits, LimitChange::default());
}

#[tokio::test]
async fn groups_persist_and_the_configuration_wins() {
    let config = "[groups.gold]\niops = 1000\n";
    let rig = Rig::with(Arc::new(tempfile::tempdir().unwrap()), config);
    let mut in_groups = request("null:?size=1G");
    in_groups.groups = vec!["gold".into(), "vm7".into()];
    rig.daemon.attach("d", in_groups, patient()).await.unwrap();
    let change = LimitChange { iops: Some(50), ..LimitChange::default() };
    rig.daemon.set_group_limits("vm7", &change).await.unwrap();
    rig.daemon.set_group_limits("gold", &change).await.unwrap();
    assert!(shard_with(&rig, "d").log().contains(&"limits"), "waiting requests are looked at again");
    assert_eq!(rig.daemon.delete_group("vm7").await.unwrap_err().kind, ProblemKind::Conflict);
    let rig = rig.crash(config).await;
    rig.daemon.restore(patient()).await;
    assert_eq!(rig.daemon.describe_group("vm7").unwrap().limits.iops, Some(50));
    let gold = rig.daemon.describe_group("gold").unwrap();
    assert_eq!((gold.limits.iops, gold.configured, gold.disks), (Some(1000), true, vec!["d".to_owned()]));
}

#[tokio::test]
async fn a_reload_applies_what_it_can_and_names_the_rest() {
    let rig = Rig::with(Arc::new(tempfile::tempdir().unwrap()), "[groups.g]\niops = 1\n");
    let path = rig.dir.path().join("blktapd.toml");
    std::fs::write(
        &path,
        "[groups.g]\niops = 2\n[shards]\ncpus = '0'\n[nbd]\nmax_connections_per_disk = 3\n",
    )
    .unwrap();
    let report = rig.daemon.reload().await.unwrap();
    assert!(report.applied.iter().any(|what| what == "groups") && report.restart == ["shards"], "{report:?}");
    assert_eq!(rig.daemon.describe_group("g").unwrap().limits.iops, Some(2));
    assert_eq!(rig.daemon.nbd.limits().connections_per_disk, 3);
    std::fs::write(&path, "[groups.g]\niopz = 2\n").unwrap();
    let problem = rig.daemon.reload().await.unwrap_err();
    assert!(
        problem.message.contains("blktapd.toml:2:1") && problem.message.contains("did you mean iops?"),
        "{problem}"
    );
    assert_eq!(rig.daemon.describe_group("g").unwrap().limits.iops, Some(2), "a wrong file changes nothing");
}

#[tokio::test]
async fn a_stop_drains_all_and_says_what_was_not_flushed() {
    let rig = Rig::new();
    for name in ["a", "b", "c"] {
        rig.attach(name, "null:?size=1G").await.unwrap();
    }
    let stuck = shard_with(&rig, "b").clone();
    stuck.script("remove", Behaviour::Hold);
    stuck.script("force", Behaviour::Hold);
    let on_stuck = stuck.disks();
    rig.daemon.begin_stop();
    let problem = rig.daemon.run(async { Ok(()) }).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Unavailable);
    // Long enough for the others.
    assert_eq!(rig.daemon.drain(soon(2000)).await, on_stuck);
    assert_eq!(rig.daemon.state.read(|state| state.disks.len()), 3, "they come back with the next start");
}

#[tokio::test]
async fn a_ram_disk_is_shared_by_name_and_its_memory_goes_with_the_last_detach() {
    let rig = Rig::new();
    rig.attach("a", "ram:shared?size=1M").await.unwrap();
    rig.attach("b", "ram:shared?size=1M").await.unwrap();
    let problem = rig.attach("c", "ram:shared?size=2M").await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict);
    assert!(problem.message.contains("used by a, b"), "{problem}");
    rig.daemon.detach("a", false, patient()).await.unwrap();
    assert_eq!(rig.attach("c", "ram:shared?size=2M").await.unwrap_err().kind, ProblemKind::Conflict);
    rig.daemon.detach("b", false, patient()).await.unwrap();
    rig.attach("c", "ram:shared?size=2M").await.unwrap();
}
