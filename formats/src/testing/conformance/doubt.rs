//! A flush that fails and loses what was not flushed, and an operator who goes on all the same: what is acknowledged from then on is
//! kept by the promise, and what no flush had covered is old, new or zero.

use super::{Guest, crash};
use crate::error::Error;
use crate::testing::fault::{Fault, Kind, Op, Rule};
use crate::testing::history::{BLOCK_BYTES, History};
use crate::testing::replay::crashes_behind;
use crate::testing::rig::{Case, Rig};
use crate::testing::run::Task;

/// Runs `requests` random requests in each of `tasks` tasks; the first that failed is returned.
fn requests(
    rig: &Rig,
    guest: &Guest<'_>,
    rng: &mut fastrand::Rng,
    tasks: usize,
    requests: usize,
) -> Result<(), String> {
    let failure = std::cell::RefCell::new(Ok(()));
    let all = (0..tasks).map(|_| {
        let (mut rng, failure) = (rng.fork(), &failure);
        let task: Task<'_> = Box::pin(async move {
            for _ in 0..requests {
                if let Err(error) = guest.random(&mut rng).await {
                    *failure.borrow_mut() = Err(error.to_string());
                }
            }
        });
        task
    });
    rig.store.try_run_all(all.collect()).map_err(|stuck| format!("{stuck:?}"))?;
    failure.into_inner()
}

/// The next flush of a file of the top layer fails and loses something.
fn plot(rig: &Rig, skip: u64) {
    let top = rig.files(0).to_vec();
    let flush = move |op: &Op| op.kind == Kind::Flush && top.contains(&op.file);
    rig.store.inject(Rule::when(Fault::Loses, flush).skipping(skip).at_most(1));
}

/// Writes to places that were given before the flush failed: what says where they are has to be there after a crash.
async fn write_doubtful(guest: &Guest<'_>, rng: &mut fastrand::Rng) -> Result<(), Error> {
    let doubtful = guest.history.doubtful_writes();
    for _ in 0..4 {
        if let Some(blocks) = rng.choice(&doubtful) {
            guest.write(blocks.clone()).await?;
            guest.flush().await?;
        }
    }
    Ok(())
}

/// Runs requests around a flush that fails, goes on, and judges `states` crash states of what follows.
///
/// # Errors
/// The first state that breaks the promise.
pub fn run(case: &Case, seed: u64, states: usize) -> Result<(), String> {
    let text = |error: crate::error::Error| error.to_string();
    let rig = Rig::create(case, seed).map_err(text)?;
    rig.store.start_record();
    rig.store.track_losses();
    let history = History::new(&rig.store, rig.initial.clone());
    let volume = rig.open(true).map_err(text)?;
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xd0);
    let guest = Guest::new(&volume, &history);
    requests(&rig, &guest, &mut rng, 3, 8)?;
    if rng.bool() {
        plot(&rig, rng.u64(..6));
    }
    // Some fail, and those that nobody asked to flush succeed.
    let _ = requests(&rig, &guest, &mut rng, 3, 8);
    let flushed = rig.store.run(guest.flush());
    rig.store.heal();
    if flushed.is_ok() {
        // At the end, then.
        let _ = requests(&rig, &guest, &mut rng, 1, 6);
        plot(&rig, 0);
        rig.store.run(guest.flush()).err().ok_or("a flush that failed was answered")?;
    }
    rig.store.settle();
    let granule = (volume.granule() / BLOCK_BYTES as u64).max(1);
    let encrypted = volume.layers()[0].driver.cipher().is_some();
    history.doubt(granule, encrypted);
    rig.store.accept_doubt();
    if rng.bool() {
        // It may fail once more.
        plot(&rig, rng.u64(..2));
        if rig.store.run(volume.write_again()).is_err() {
            history.doubt(granule, encrypted);
            rig.store.accept_doubt();
        }
        rig.store.heal();
    }
    rig.store.run(volume.write_again()).map_err(|error| format!("write again: {error}"))?;
    let resumed = rig.store.mark() + 1;
    let guest = Guest::new(&volume, &history);
    rig.store.run(write_doubtful(&guest, &mut rng)).map_err(text)?;
    requests(&rig, &guest, &mut rng, 3, 10).map_err(|error| format!("after the resume: {error}"))?;
    rig.store.run(guest.read_all()).map_err(text)?;
    guest.verdict().map_err(|error| format!("after the resume: {error}"))?;
    if rng.bool() {
        rig.store.run(volume.close()).map_err(|error| format!("close: {error}"))?;
    }
    drop(volume);
    let record = rig.store.take_record();
    crashes_behind(&record, resumed, states, seed, |state, seed| {
        crash::judge(&rig, &history, state, seed, None)
    })
}
