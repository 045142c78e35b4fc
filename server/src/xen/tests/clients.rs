//! The client alone: order, listings, transactions, loss of the connection, floods.

use std::time::Duration;

use super::super::batch::{Batch, Condition, Outcome};
use super::super::client::Store;
use super::super::client::{Status, StoreError};
use super::super::fake::FakeStore;
use super::super::transport::Transport;
use super::super::wire::{Errno, Request};

const PATIENCE: Duration = Duration::from_secs(60);

async fn pair() -> (FakeStore, Store) {
    let fake = FakeStore::new();
    let store = fake.client();
    store.connected(PATIENCE).await.unwrap();
    (fake, store)
}

#[tokio::test]
async fn values_and_listings() {
    let (fake, store) = pair().await;
    fake.write("/a/b", "x");
    fake.write("/a/c", "");
    assert_eq!(store.read("/a/b").await.unwrap().as_deref(), Some(&b"x"[..]));
    assert_eq!(store.read("/a/c").await.unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(store.read("/a/d").await.unwrap(), None);
    assert_eq!(store.list("/a").await.unwrap().unwrap(), ["b", "c"]);
    assert_eq!(store.list("/a/b").await.unwrap().unwrap(), Vec::<String>::new());
    assert_eq!(store.list("/z").await.unwrap(), None);
    assert_eq!(store.own_domid().await.unwrap(), 0);
    assert!(store.domain_exists(0).await.unwrap() && !store.domain_exists(9).await.unwrap());
}

#[tokio::test]
async fn answers_find_their_questions_in_any_order() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.shuffle = true);
    for n in 0..500 {
        fake.write(&format!("/n/{n}"), n);
    }
    let paths: Vec<String> = (0..1000).map(|n| format!("/n/{n}")).collect();
    for (n, value) in store.read_all(&paths).await.unwrap().into_iter().enumerate() {
        let expected = (n < 500).then(|| n.to_string().into_bytes());
        assert_eq!(value, expected);
    }
}

#[tokio::test]
async fn a_listing_may_be_longer_than_a_message() {
    let (fake, store) = pair().await;
    for n in 0..3000 {
        fake.write(&format!("/big/{n}"), "");
    }
    assert_eq!(store.list("/big").await.unwrap().unwrap().len(), 3000);
    let lists = store.list_all(&["/big".into(), "/none".into()]).await.unwrap();
    assert_eq!((lists[0].len(), lists[1].len()), (3000, 0));
    // While the directory changes all the time, parts of different listings are not mixed.
    let changing = async {
        for n in 0.. {
            fake.write("/big/x", n);
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = changing => {}
        listed = store.list("/big") => match listed {
            Ok(names) => assert_eq!(names.unwrap().len(), 3001),
            Err(error) => assert!(matches!(error, StoreError::Conflict(..)), "{error}"),
        },
    }
    fake.faults(|faults| faults.is_old = true);
    assert_eq!(store.list("/big").await.unwrap_err().errno(), Some(&Errno::NotImplemented));
}

#[tokio::test]
async fn a_change_is_tried_again_when_somebody_was_faster() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.conflicts = 7);
    let batch = Batch::new().write("/t/a", 1).write("/t/b", 2);
    assert_eq!(store.apply(&batch).await.unwrap(), Outcome::Committed);
    assert_eq!((fake.read("/t/a").as_deref(), fake.read("/t/b").as_deref()), (Some("1"), Some("2")));
    // With a bound.
    fake.faults(|faults| faults.conflicts = u32::MAX);
    let error = store.apply(&batch).await.unwrap_err();
    assert!(matches!(&error, StoreError::Conflict(_, path) if path == "/t/a"), "{error}");
    fake.faults(|faults| faults.conflicts = 0);
    // Real conflicts: many add one to the same number, and none is lost.
    fake.write("/sum", 0);
    let adders: Vec<_> = (0..8)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    loop {
                        let old = store.read("/sum").await.unwrap().unwrap();
                        let old = String::from_utf8(old).unwrap();
                        let batch = Batch::new()
                            .only_if(Condition::Equals("/sum".into(), old.clone()))
                            .write("/sum", old.parse::<u32>().unwrap() + 1);
                        if store.apply(&batch).await.unwrap() == Outcome::Committed {
                            break;
                        }
                    }
                }
            })
        })
        .collect();
    for adder in adders {
        adder.await.unwrap();
    }
    assert_eq!(fake.read("/sum").as_deref(), Some("80"));
    assert_eq!(fake.open_transactions(), 0);
}

#[tokio::test]
async fn conditions_keep_everything_as_it_was() {
    let (fake, store) = pair().await;
    fake.write("/c/full/x", "1");
    fake.write("/c/empty", "");
    let there = |path: &str| Condition::Exists(path.into());
    for refused in [
        there("/c/none"),
        Condition::Missing("/c/full".into()),
        Condition::Equals("/c/full/x".into(), "2".into()),
        Condition::Equals("/c/none".into(), "".into()),
        Condition::Empty("/c/full".into()),
        Condition::Empty("/c/none".into()),
    ] {
        let batch = Batch::new().only_if(there("/c")).only_if(refused.clone()).write("/c/new", 1);
        assert_eq!(store.apply(&batch).await.unwrap(), Outcome::Refused(refused));
        assert_eq!(fake.read("/c/new"), None);
    }
    let batch =
        Batch::new().only_if(Condition::Empty("/c/empty".into())).remove("/c/empty").remove("/c/never");
    assert_eq!(store.apply(&batch).await.unwrap(), Outcome::Committed);
    assert_eq!(fake.read("/c/empty"), None);
    fake.wait("no open transaction", |fake| fake.open_transactions() == 0).await;
}

#[tokio::test]
async fn a_change_that_is_dropped_leaves_no_transaction_open() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.delay = Duration::from_millis(5));
    for cut_ms in 0..25 {
        let batch = Batch::new().only_if(Condition::Missing("/x".into())).write("/d", 1);
        let _ = tokio::time::timeout(Duration::from_millis(cut_ms), store.apply(&batch)).await;
    }
    fake.faults(|faults| faults.delay = Duration::ZERO);
    fake.wait("no open transaction", |fake| fake.open_transactions() == 0).await;
}

#[tokio::test]
async fn a_refusal_is_one_sentence() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.deny = vec!["/secret".into()]);
    let error = store.read("/secret/a").await.unwrap_err().to_string();
    assert!(error.contains("/secret/a") && error.contains("EACCES") && error.contains("root"), "{error}");
    let error = store.apply(&Batch::new().write("/secret/a", 1)).await.unwrap_err();
    assert_eq!(error.errno(), Some(&Errno::Access));
    fake.wait("no open transaction", |fake| fake.open_transactions() == 0).await;
}

#[tokio::test]
async fn a_lost_connection_comes_back_with_its_watches() {
    let (fake, store) = pair().await;
    fake.write("/w/a", 1);
    let watch = store.watch("/w", 1);
    watch.changed().await;
    fake.wait("the watch", |fake| fake.watch_paths() == ["/w"]).await;
    // The store's own first event.
    let _ = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
    for round in 0..5 {
        fake.faults(|faults| faults.mute = true);
        let waiting = store.start(Request::Read("/w/a".into()), None);
        fake.restart();
        fake.faults(|faults| faults.mute = false);
        // A change that happens while we are away.
        fake.write("/w/a", round);
        assert!(matches!(waiting.answer().await, Err(StoreError::Away(_))));
        assert!(tokio::time::timeout(PATIENCE, watch.changed()).await.unwrap().all);
        store.connected(PATIENCE).await.unwrap();
        fake.wait("the watch", |fake| fake.watch_paths() == ["/w"]).await;
        assert_eq!(store.read("/w/a").await.unwrap().unwrap(), round.to_string().into_bytes());
    }
    drop(watch);
    fake.wait("no watch", |fake| fake.watch_paths().is_empty()).await;
}

#[tokio::test]
async fn a_transaction_does_not_outlive_its_connection() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.delay = Duration::from_millis(30));
    let batch = Batch::new().only_if(Condition::Missing("/never".into())).write("/half", 1);
    let running = tokio::spawn({
        let store = store.clone();
        async move { store.apply(&batch).await }
    });
    fake.wait("a transaction", |fake| fake.open_transactions() == 1).await;
    fake.restart();
    assert!(matches!(running.await.unwrap(), Err(StoreError::Away(_))));
    assert_eq!(fake.read("/half"), None);
    store.connected(PATIENCE).await.unwrap();
    fake.wait("no open transaction", |fake| fake.open_transactions() == 0).await;
}

#[tokio::test]
async fn nobody_there_is_said_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let store = Store::new(Transport::Socket(path.clone()));
    let error = store.connected(Duration::from_millis(300)).await.unwrap_err().to_string();
    assert!(error.contains("start xenstored") && error.contains(path.to_str().unwrap()), "{error}");
    assert!(matches!(store.read("/a").await, Err(StoreError::Away(_))));
    assert!(matches!(&*store.status().borrow(), Status::Away(_)));
}

#[tokio::test]
async fn a_flood_of_events_does_not_hold_up_answers() {
    let (fake, store) = pair().await;
    let watch = store.watch("/flood", 1);
    fake.wait("the watch", |fake| fake.watch_paths() == ["/flood"]).await;
    for n in 0..50_000 {
        fake.write(&format!("/flood/{}", n % 10_000), n);
    }
    fake.write("/answer", 42);
    assert_eq!(store.read("/answer").await.unwrap().unwrap(), b"42");
    let changes = watch.changed().await;
    assert!(changes.all || changes.below.len() <= super::super::watches::NOTED_MAX);
    assert!(changes.all, "10,000 names are more than are noted one by one");
}

#[tokio::test]
async fn a_silent_store_is_given_up() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.mute = true);
    let error = store.read("/a").await.unwrap_err().to_string();
    assert!(error.contains("has not answered"), "{error}");
    fake.faults(|faults| faults.mute = false);
    store.connected(PATIENCE).await.unwrap();
    assert_eq!(store.read("/a").await.unwrap(), None);
}

#[tokio::test]
async fn watches_of_the_kernel_s_device_are_answered_without_a_number() {
    let (fake, store) = pair().await;
    fake.faults(|faults| faults.kernel_watches = true);
    let watches: Vec<_> = (0..40).map(|n| store.watch(format!("/k/{n}"), 0)).collect();
    assert_eq!(store.read("/a").await.unwrap(), None);
    fake.wait("the watches", |fake| fake.watch_paths().len() == 40).await;
    drop(watches);
    fake.wait("no watches", |fake| fake.watch_paths().is_empty()).await;
    assert_eq!(store.read("/a").await.unwrap(), None);
    assert_eq!(*store.status().borrow(), Status::Connected(1), "the connection was never lost");
}
