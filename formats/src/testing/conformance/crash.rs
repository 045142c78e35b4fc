//! Crash replay: a concurrent run is recorded, then crash states of it are opened, checked, compared with what the guest knows,
//! and used again.

use super::{Guest, Oracle};
use crate::testing::history::History;
use crate::testing::record::Record;
use crate::testing::replay::{Crash, crashes};
use crate::testing::rig::{Case, Rig, read_all};
use crate::testing::run::Task;
use crate::volume::Volume;

/// One of this many states is shown to the oracle.
const ORACLE_SHARE: u64 = 8;

/// One of this many states is used again.
const USE_SHARE: u64 = 4;

/// A recorded run.
#[derive(Debug)]
pub struct Recorded {
    /// The chain; its store has seen the run.
    pub rig: Rig,
    /// What the guest did.
    pub history: History,
    /// What happened.
    pub record: Record,
}

/// Opens a case, runs `tasks` times `requests` random requests at a time, with a resize in the middle, closes it, and records all
/// that.
///
/// # Errors
/// A request fails.
pub fn record(case: &Case, seed: u64, tasks: usize, requests: usize) -> Result<Recorded, String> {
    let text = |error: crate::error::Error| error.to_string();
    let rig = Rig::create(case, seed).map_err(text)?;
    rig.store.start_record();
    let history = History::new(&rig.store, rig.initial.clone());
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xca);
    {
        let volume = rig.open(true).map_err(text)?;
        let guest = Guest::new(&volume, &history);
        let failure = std::cell::RefCell::new(None);
        let all = (0..tasks).map(|number| {
            let (mut rng, guest, failure) = (rng.fork(), &guest, &failure);
            let task: Task<'_> = Box::pin(async move {
                for request in 0..requests {
                    let result = match (number, request) {
                        (0, request) if request == requests / 2 => guest.grow().await,
                        _ => guest.random(&mut rng).await,
                    };
                    if let Err(error) = result {
                        failure.borrow_mut().get_or_insert(error.to_string());
                    }
                }
            });
            task
        });
        rig.store.try_run_all(all.collect()).map_err(|stuck| format!("{stuck:?}"))?;
        if let Some(failure) = failure.borrow_mut().take() {
            return Err(failure);
        }
        guest.verdict()?;
        rig.store.run(volume.close()).map_err(text)?;
    }
    let record = rig.store.take_record();
    Ok(Recorded { rig, history, record })
}

/// Judges one state: the log fits, the check finds no damage, the contents are legal, the image works on.
///
/// # Errors
/// What is wrong.
pub fn judge(
    rig: &Rig,
    history: &History,
    crash: &Crash,
    seed: u64,
    oracle: Option<Oracle<'_>>,
) -> Result<(), String> {
    let after = rig.from_crash(crash, seed)?;
    after.check_sound()?;
    if let Some(oracle) = oracle.filter(|_| seed.is_multiple_of(ORACLE_SHARE)) {
        oracle(&after).map_err(|error| format!("oracle: {error}"))?;
    }
    let volume = after.open(true).map_err(|error| format!("open: {error}"))?;
    let disk = after.store.run(read_all(&volume)).map_err(|error| format!("read: {error}"))?;
    history.judge(crash.at, crash.cause, &disk)?;
    if seed.is_multiple_of(USE_SHARE) {
        use_again(&after, volume, disk, seed).map_err(|error| format!("in the next use: {error}"))?;
    }
    after.store.violations().first().map_or(Ok(()), |violation| Err(violation.clone()))
}

/// After a crash it is a disk like any other: it takes writes, and everything else stays as it was.
fn use_again(after: &Rig, volume: Volume, mut disk: Vec<u8>, seed: u64) -> Result<(), String> {
    let text = |error: crate::error::Error| error.to_string();
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..4 {
        let blocks = super::guest::random_blocks(&mut rng, volume.size() / 512);
        let data = vec![rng.u8(..); (blocks.end - blocks.start) as usize * 512];
        let start = blocks.start as usize * 512;
        after.store.run(crate::testing::rig::write(&volume, start as u64, &data)).map_err(text)?;
        disk[start..start + data.len()].copy_from_slice(&data);
    }
    after.store.run(volume.close()).map_err(|error| format!("close: {error}"))?;
    after.check_sound()?;
    let volume = after.open(false).map_err(|error| format!("open: {error}"))?;
    let again = after.store.run(read_all(&volume)).map_err(text)?;
    if disk != again {
        let at = disk.iter().zip(&again).position(|(old, new)| old != new);
        return Err(format!("byte {at:?} has changed"));
    }
    Ok(())
}

/// Records a run with one seed and judges `states` crash states of it.
///
/// # Errors
/// The first state that breaks the promise.
pub fn run(case: &Case, seed: u64, states: usize, oracle: Option<Oracle<'_>>) -> Result<(), String> {
    let Recorded { rig, history, record } = record(case, seed, 4, 14)?;
    crashes(&record, states, seed, |crash, seed| judge(&rig, &history, crash, seed, oracle))
}
