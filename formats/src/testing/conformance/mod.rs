//! What every driver passes, alone and in chains: a table of [`Case`]s is run through [`Format`](crate::driver::Format) and
//! [`Volume`](crate::volume::Volume) as the daemon does it.
//!
//! | suite | what it does | size (environment variable, default) |
//! |---|---|---|
//! | [`model`] | random reads, writes, erases, resizes, re-opens and deaths of the process against a byte array | `MODEL_SEEDS` 2 |
//! | [`concurrency`] | overlapping and adjacent requests in flight, slow operations, callers that go away | `CONCURRENCY_SEEDS` 4 |
//! | [`faults`] | the N-th operation fails, for every N; the store is full for a long time | `FAULT_POINTS` 15 |
//! | [`crash`] | a concurrent run with a resize, then power losses and process deaths at any moment of it | `CRASH_SEEDS` 1, `REPLAY_STATES` 40 |
//! | [`doubt`] | a flush fails and loses writes, an operator goes on; crashes after that | `DOUBT_SEEDS` 2, `REPLAY_STATES` 40 |
//! | [`enumerate`] | all sequences of a few requests, a crash at each point | `ENUMERATE_LENGTH` 1 |
//!
//! All of it for an hour: `MODEL_SEEDS=300 CONCURRENCY_SEEDS=1000 FAULT_POINTS=100000 CRASH_SEEDS=100 DOUBT_SEEDS=100
//! REPLAY_STATES=1000 ENUMERATE_LENGTH=3 cargo test --release -p formats conformance`. `SEED` is the first seed (default 1): a failure names its seed,
//! and `SEED=n MODEL_SEEDS=1` runs it again.

pub mod concurrency;
pub mod crash;
pub mod doubt;
#[cfg(test)]
mod drivers;
pub mod enumerate;
pub mod faults;
mod guest;
pub mod model;
#[cfg(test)]
mod tests;

pub use guest::Guest;

use super::oracle::judge_closed;
use super::rig::Case;
use super::size_of_run;

/// A judge of an image besides our own driver: gets the files of a crashed or closed chain.
pub type Oracle<'a> = &'a dyn Fn(&super::rig::Rig) -> Result<(), String>;

/// Runs a suite for its seeds; the first failure is returned with the case and the seed before it.
///
/// # Errors
/// The first failure.
pub fn for_seeds(
    case: &Case,
    suite: &str,
    seeds: u64,
    run: impl Fn(&Case, u64) -> Result<(), String>,
) -> Result<(), String> {
    let first = size_of_run("SEED", 1);
    let began = std::time::Instant::now();
    for seed in first..first + seeds {
        run(case, seed).map_err(|error| format!("{suite}, case {}, SEED={seed}: {error}", case.name))?;
    }
    // Shown with --nocapture: where the time of a long run goes.
    println!("{suite}, case {}: {seeds} seeds in {:.1} s", case.name, began.elapsed().as_secs_f32());
    Ok(())
}

/// Runs all suites on a case.
///
/// # Errors
/// The first failure.
pub fn all(case: &Case, oracle: Option<Oracle<'_>>) -> Result<(), String> {
    for_seeds(case, "model", size_of_run("MODEL_SEEDS", 2), |case, seed| {
        model::run(case, seed, 120, oracle.and(Some(&judge_closed)))
    })?;
    for_seeds(case, "concurrency", size_of_run("CONCURRENCY_SEEDS", 4), concurrency::run)?;
    for_seeds(case, "faults", 1, |case, seed| faults::sweep(case, seed, size_of_run("FAULT_POINTS", 15)))?;
    for_seeds(case, "no space", 3, faults::no_space)?;
    let states = size_of_run("REPLAY_STATES", 40) as usize;
    for_seeds(case, "crash", size_of_run("CRASH_SEEDS", 1), |case, seed| {
        crash::run(case, seed, states, oracle)
    })?;
    for_seeds(case, "doubt", size_of_run("DOUBT_SEEDS", 2), |case, seed| doubt::run(case, seed, states))?;
    for_seeds(case, "enumerate", 1, |case, seed| {
        enumerate::run(case, seed, size_of_run("ENUMERATE_LENGTH", 1))
    })
}
