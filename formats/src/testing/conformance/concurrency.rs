//! Many requests in flight on the same few places: overlapping and adjacent allocating writes, erases against writes, flushes in
//! between; slow operations; callers that go away while the kernel works for them.
//!
//! Every read on the way and the end state must hold what [`crate::testing::history`] allows. A write whose caller went away may
//! land at any time later, but only in its own blocks.

use std::rc::Rc;

use super::Guest;
use crate::testing::fault::{Fault, Rule};
use crate::testing::history::History;
use crate::testing::rig::{Case, Rig, read_all};
use crate::testing::run::{Abandon, Task};

/// Requests of one run.
const REQUESTS: usize = 60;
/// Requests in flight at a time.
const TASKS: usize = 8;

/// Runs a case with one seed. Odd seeds have callers that go away.
///
/// # Errors
/// What was read, or found at the end, and must not be.
pub fn run(case: &Case, seed: u64) -> Result<(), String> {
    let text = |error: crate::error::Error| error.to_string();
    let rig = Rig::create(case, seed).map_err(text)?;
    rig.store.start_record();
    let history = History::new(&rig.store, rig.initial.clone());
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xc0);
    let goes_away = seed % 2 == 1;
    for round in 0..2 {
        let volume = rig.open(true).map_err(text)?;
        let guest = Guest::new(&volume, &history);
        let salt = rng.u64(..);
        rig.store.inject(Rule::when(Fault::Slow(15), move |op| (op.id ^ salt).is_multiple_of(11)));
        let failures = Rc::new(std::cell::RefCell::new(Vec::new()));
        let tasks = (0..TASKS).map(|_| {
            let (mut rng, guest, failures) = (rng.fork(), &guest, failures.clone());
            let task: Task<'_> = Box::pin(async move {
                for _ in 0..REQUESTS / TASKS {
                    if goes_away && rng.u8(..4) == 0 {
                        let polls = rng.usize(1..6);
                        let mut of_request = rng.fork();
                        Abandon::after(polls, guest.random(&mut of_request)).await;
                    } else if let Err(error) = guest.random(&mut rng).await {
                        failures.borrow_mut().push(error.to_string());
                    }
                }
            });
            task
        });
        rig.store.try_run_all(tasks.collect()).map_err(|stuck| format!("round {round}: {stuck:?}"))?;
        if let Some(failure) = failures.borrow().first() {
            return Err(format!("round {round}: a request failed though no operation did: {failure}"));
        }
        rig.store.run(guest.read_all()).map_err(text)?;
        // What nobody waits for any more lands now.
        rig.store.settle();
        rig.store.heal();
        rig.store.run(guest.read_all()).map_err(text)?;
        guest.verdict().map_err(|error| format!("round {round}: {error}"))?;
        rig.store.run(volume.close()).map_err(|error| format!("close: {error}"))?;
        rig.check_sound()?;
    }
    let at = rig.store.mark();
    let volume = rig.open(false).map_err(text)?;
    let disk = rig.store.run(read_all(&volume)).map_err(text)?;
    history.judge(at, crate::testing::replay::Cause::ProcessDeath, &disk)?;
    match rig.store.violations().first() {
        Some(violation) => Err(violation.clone()),
        None => Ok(()),
    }
}
