//! Goal: no order of completions, faults, commands and disconnects breaks a promise of the shard. Method: whole shards under a
//! virtual clock with a byte model, one seed per run; see the module above.

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

/// Runs one seed; returns the hash of its trace.
fn run(seed: u64) -> u64 {
    silence_injected_panics();
    let verbose = std::env::var_os("SIM_VERBOSE").is_some();
    let result = std::panic::catch_unwind(|| Sim::new(seed, plan(seed), verbose).run());
    match result {
        Ok(hash) => hash,
        Err(panic) => {
            eprintln!(
                "seed {seed} failed; again: SIM_SEED={seed} SIM_VERBOSE=1 cargo test -p shard --lib sim::tests::seeds"
            );
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn seeds() {
    if let Some(seed) = number("SIM_SEED") {
        run(seed);
        return;
    }
    let first = number("SIM_FIRST").unwrap_or(0);
    for seed in first..first + number("SIM_SEEDS").unwrap_or(60) {
        run(seed);
    }
}

#[test]
fn one_seed_is_one_run() {
    for seed in 1_000_000..1_000_005 {
        assert_eq!(run(seed), run(seed), "seed {seed} ran in two ways");
    }
}
