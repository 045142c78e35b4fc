//! Goal: a store that is full for long costs no cluster. Method: thousands of writes whose payload is refused, then the length of the
//! file, with the image still open, and writes that must succeed.

use crate::error::ErrorKind;
use crate::qcow2::Qcow2;
use crate::testing::rig::{Case, LayerCase, Rig, read, write};
use crate::testing::{Fault, Kind};

const CLUSTER: u64 = 64 << 10;
/// More than what a busy image may keep in reserve, in clusters, several times.
const ATTEMPTS: u64 = 4000;

fn insist(options: &[(&str, &str)]) {
    let layer = LayerCase::new(&Qcow2, options, 1 << 30);
    let rig = Rig::create(&Case::new("qcow2", vec![layer]), 5).unwrap();
    let volume = rig.open(true).unwrap();
    rig.store.set_turns_max(u64::MAX);
    rig.store.run(write(&volume, 0, &[1; 4096])).unwrap();
    // The payload is 8 KiB long, and nothing else is.
    rig.inject_on_top(Fault::SHORT, |op| op.kind == Kind::Write && op.range.end - op.range.start == 8192);
    for attempt in 0..ATTEMPTS {
        let error = rig.store.run(write(&volume, (1 + attempt) * CLUSTER, &[9; 8192])).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Io(5));
    }
    rig.store.heal();
    for cluster in 1..100 {
        rig.store.run(write(&volume, cluster * CLUSTER + 4096, &[7; 512])).unwrap();
        let found = rig.store.run(read(&volume, cluster * CLUSTER, CLUSTER)).unwrap();
        let (before, after) = (&found[..4096], &found[4608..]);
        assert!(before.iter().chain(after).all(|byte| *byte == 0), "what failed shows in cluster {cluster}");
    }
    let length = rig.store.length(rig.files(0)[0]);
    assert!(length < ATTEMPTS / 2 * CLUSTER, "{options:?}: the file has {length} bytes");
    rig.store.run(volume.close()).unwrap();
    let findings = rig.check_sound().unwrap();
    assert_eq!(findings.leaks, Vec::<String>::new(), "{options:?}");
}

#[test]
fn a_store_that_refuses_payload_for_long_costs_no_cluster() {
    insist(&[]);
    insist(&[("extended_l2", "on")]);
}
