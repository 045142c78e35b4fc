//! Bounded enumeration: all sequences of a few requests on a fresh image, and a crash at each point of each. What random runs miss
//! by bad luck is found here if a short sequence shows it.

use std::ops::Range;

use super::{Guest, crash};
use crate::driver::Erase;
use crate::error::Error;
use crate::testing::history::History;
use crate::testing::replay::{Cause, Replayer};
use crate::testing::rig::{Case, Rig};

#[derive(Debug, Clone)]
enum Request {
    Write(Range<u64>),
    Erase(Range<u64>, Erase),
    Flush,
    Grow,
    Tidy,
    Reopen,
}

/// Requests that meet each other: on a part of a cluster, on whole ones, and far away.
fn alphabet(blocks: u64) -> Vec<Request> {
    vec![
        Request::Write(1..3),
        Request::Write(0..130),
        Request::Write(blocks - 2..blocks),
        Request::Erase(0..128, Erase::Zero),
        Request::Erase(0..blocks, Erase::Discard),
        Request::Erase(0..8, Erase::ZeroKeep),
        Request::Flush,
        Request::Grow,
        Request::Tidy,
        Request::Reopen,
    ]
}

async fn carry_out(guest: &Guest<'_>, request: &Request) -> Result<(), Error> {
    match request {
        Request::Write(blocks) => guest.write(blocks.clone()).await,
        Request::Erase(blocks, how) => guest.erase(blocks.clone(), *how).await,
        Request::Flush => guest.flush().await,
        Request::Grow => guest.grow().await,
        Request::Tidy => guest.volume.tidy().await,
        Request::Reopen => Ok(()),
    }
}

/// Runs all sequences of up to `length` requests.
///
/// # Errors
/// The first sequence and moment that break the promise.
pub fn run(case: &Case, seed: u64, length: u64) -> Result<(), String> {
    let fresh = Rig::create(case, seed).map_err(|error| error.to_string())?;
    let letters = alphabet(case.layers[0].size / 512);
    for length in 1..=length as u32 {
        for number in 0..letters.len().pow(length) {
            let word =
                (0..length).map(|place| letters[number / letters.len().pow(place) % letters.len()].clone());
            let word: Vec<Request> = word.collect();
            sequence(fresh.copy(seed ^ number as u64), &word, seed)
                .map_err(|error| format!("{word:?}: {error}"))?;
        }
    }
    Ok(())
}

fn sequence(rig: Rig, word: &[Request], seed: u64) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    rig.store.start_record();
    let history = History::new(&rig.store, rig.initial.clone());
    let mut volume = rig.open(true).map_err(text)?;
    let mut first = 0;
    for request in word {
        // Crashes before the last request are those of a shorter sequence.
        first = rig.store.mark();
        let guest = Guest::new(&volume, &history);
        rig.store.run(carry_out(&guest, request)).map_err(|error| format!("{request:?}: {error}"))?;
        if let Request::Reopen = request {
            rig.store.run(volume.close()).map_err(|error| format!("close: {error}"))?;
            volume = rig.open(true).map_err(text)?;
        }
    }
    drop(volume);
    let record = rig.store.take_record();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut replayer = Replayer::new(&record);
    for at in first..=record.events.len() {
        replayer.advance(at);
        for cause in [Cause::PowerLoss, Cause::ProcessDeath] {
            let state = replayer.crash(cause, &mut rng);
            crash::judge(&rig, &history, &state, rng.u64(..), None)
                .map_err(|error| format!("{cause:?} behind event {at}: {error}"))?;
        }
    }
    Ok(())
}
