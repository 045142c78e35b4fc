//! Goal: no order of completions, faults, commands and disconnects breaks a promise of the shard. Method: whole shards under a
//! virtual clock with a byte model, one seed per run; see the module above.

use std::collections::BTreeMap;

use super::random::Random;
use super::scenario::{Plan, Sim};

/// What a seed runs.
fn plan(seed: u64) -> Plan {
    let mut rng = Random::new(seed ^ 0x91a7);
    let large = rng.chance(20);
    Plan {
        disks: rng.between(1, 4) as usize,
        clients: rng.between(1, 6) as usize,
        rounds: rng.between(1, 4) as usize,
        requests: rng.pick(&[10, 40, 120]),
        faults: !rng.chance(150),
        commands: !rng.chance(150),
        budget: rng.pick(&[1 << 20, 4 << 20, 16 << 20]),
        size_max: if large { 48 << 20 } else { rng.pick(&[64 << 10, 512 << 10, 2 << 20]) },
        rare_max: if large { 32 << 20 } else { 1 << 20 },
    }
}

fn silence_injected_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let injected =
                info.payload_as_str().is_some_and(|text| text.starts_with("injected panic in disk"));
            if !injected {
                before(info);
            }
        }));
    });
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How often what happened, over all runs.
type Tally = BTreeMap<String, u64>;

/// Runs one seed; returns the hash of its trace, or nothing when a rule was broken.
fn run(seed: u64, tally: &mut Tally) -> Option<u64> {
    silence_injected_panics();
    let verbose = std::env::var_os("SIM_VERBOSE").is_some();
    let result = std::panic::catch_unwind(|| {
        let mut sim = Sim::new(seed, plan(seed), verbose);
        (sim.run(), sim.tally)
    });
    match result {
        Ok((hash, counts)) => {
            for (what, count) in counts {
                *tally.entry(what).or_default() += count;
            }
            Some(hash)
        }
        Err(_) => {
            eprintln!(
                "seed {seed} broke a rule; again: SIM_SEED={seed} SIM_VERBOSE=1 cargo test -p shard sim::tests::seeds"
            );
            None
        }
    }
}

/// What has to happen in a run of many seeds, or the simulator has stopped testing it.
const HAPPENS: [&str; 35] = [
    "Pause",
    "Pause refused: Interrupted",
    "Resume",
    "ResumeInDoubt",
    "Resume refused: DataInDoubt",
    "Park",
    "Park refused: Interrupted",
    "Unpark",
    "Unpark handed back",
    "Limits",
    "a RAM disk met another shard",
    "Fail",
    "Swap",
    "Resize",
    "Resize refused: Failed",
    "Remove",
    "RemoveForce",
    "Zombie",
    "Panic",
    "state StorageError",
    "state Quarantined",
    "read done",
    "read failed",
    "change done",
    "change failed",
    "trim done",
    "flush done",
    "flush failed",
    "status done",
    "nonsense failed",
    "kernel Read errno 5",
    "kernel Write errno 5",
    "kernel Write errno 28",
    "kernel Sync errno 5",
    "kernel Space errno 5",
];

/// What has to happen in a run of very many.
const RARE: [&str; 4] =
    ["carried data wait for a buffer", "Swap refused: Failed", "Swap refused: DataInDoubt", "state Failed"];

#[test]
fn seeds() {
    let (first, count) = match number("SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (number("SIM_FIRST").unwrap_or(0), number("SIM_SEEDS").unwrap_or(150)),
    };
    let mut tally = Tally::new();
    // A few broken seeds are more telling than one.
    let broken: Vec<u64> =
        (first..first + count).filter(|&seed| run(seed, &mut tally).is_none()).take(10).collect();
    assert!(broken.is_empty(), "seeds that broke a rule: {broken:?}");
    if count >= 150 {
        let rare = if count >= 2000 { &RARE[..] } else { &[] };
        let never: Vec<_> = HAPPENS.iter().chain(rare).filter(|what| !tally.contains_key(**what)).collect();
        assert!(never.is_empty(), "this never happened: {never:?}; what did: {tally:#?}");
    }
    if std::env::var_os("SIM_VERBOSE").is_some() {
        eprintln!("{tally:#?}");
    }
}

#[test]
fn one_seed_is_one_run() {
    for seed in 1_000_000..1_000_005 {
        let hash = run(seed, &mut Tally::new());
        assert!(hash.is_some(), "seed {seed} broke a rule");
        assert_eq!(hash, run(seed, &mut Tally::new()), "seed {seed} ran in two ways");
    }
}

/// Goal: a client that sends requests which are refused, and reads no replies, costs a bounded amount. Method: it has far
/// more to send than may pile up, so it must be stopped in the middle; when it reads, all is answered.
#[test]
fn replies_that_nobody_reads_do_not_pile_up() {
    let plan = Plan { disks: 1, clients: 0, faults: false, commands: false, ..plan(1) };
    let mut sim = Sim::new(1, plan, false);
    sim.run_to_rest();
    sim.connect(0);
    let client = &mut sim.clients[0];
    (client.habits.bad, client.habits.depth, client.habits.step) = (1000, usize::MAX, 1 << 20);
    (client.budget, client.deaf) = (40_000, true);
    sim.run_to_rest();
    assert!(sim.clients[0].budget > 20_000, "the server read on: {} requests left", sim.clients[0].budget);
    sim.clients[0].deaf = false;
    sim.world.borrow_mut().wake_client(0);
    sim.run_to_rest();
    assert_eq!((sim.clients[0].budget, sim.clients[0].asked.len()), (0, 0));
}
