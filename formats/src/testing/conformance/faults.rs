//! Operations that fail: the error reaches the request that needed the operation and no other; the disk goes on; what was there
//! is there; and the image opens cleanly afterwards.

use super::Guest;
use crate::driver::Erase;
use crate::error::{Error, ErrorKind};
use crate::testing::fault::{Fault, Kind, Op, Rule};
use crate::testing::history::History;
use crate::testing::replay::Cause;
use crate::testing::rig::{Case, Rig, read_all};

/// What one run with one failing operation showed.
struct Outcome {
    /// Operations that were submitted from the opening on.
    operations: u64,
    /// Requests that failed.
    failed: Vec<String>,
}

/// The requests of the sweep, one after the other: first allocations, overwrites, erases, and allocation in what was freed.
async fn requests(guest: &Guest<'_>, failed: &mut Vec<String>) {
    let end = guest.blocks();
    let mut take = |what: &str, result: Result<(), Error>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error}"));
        }
    };
    take("write 1", guest.write(3..5).await);
    take("write 2", guest.write(4..140).await);
    take("write 3", guest.write(end - 9..end).await);
    take("flush 1", guest.flush().await);
    take("zero", guest.erase(0..128, Erase::Zero).await);
    take("write 4", guest.write(60..70).await);
    take("read 1", guest.read(0..200).await);
    take("discard", guest.erase(end / 2..end, Erase::Discard).await);
    take("flush 2", guest.flush().await);
    take("write 5", guest.write(end / 2..end / 2 + 130).await);
    take("tidy", guest.volume.tidy().await);
    take("keep", guest.erase(10..90, Erase::ZeroKeep).await);
    take("flush 3", guest.flush().await);
    take("read 2", guest.read(end / 2..end).await);
}

fn attempt(fresh: &Rig, seed: u64, fault: Option<(u64, Fault)>) -> Result<Outcome, String> {
    let rig = fresh.copy(seed);
    rig.store.start_record();
    rig.store.complete_in_order();
    let history = History::new(&rig.store, rig.initial.clone());
    let first = rig.store.submitted();
    let failed_kind = std::rc::Rc::new(std::cell::Cell::new(None));
    if let Some((number, fault)) = fault {
        let failed_kind = failed_kind.clone();
        let nth = move |op: &Op| {
            let hit = op.id == first + number;
            if hit {
                failed_kind.set(Some(op.kind));
            }
            hit
        };
        rig.store.inject(Rule::when(fault, nth));
    }
    let (mut failed, mut operations) = (Vec::new(), 0);
    match rig.open(true) {
        Ok(volume) => {
            let guest = Guest::new(&volume, &history);
            rig.store.run(requests(&guest, &mut failed));
            operations = rig.store.submitted() - first;
            rig.store.heal();
            rig.store
                .run(guest.read_all())
                .map_err(|error| format!("the disk does not read any more: {error}"))?;
            guest.verdict()?;
        }
        Err(error) => failed.push(format!("open: {error}")),
    }
    // After a failed flush everything that needs one fails for good; other errors are told once.
    if failed_kind.get() != Some(Kind::Flush) && failed.len() > 1 {
        return Err(format!(
            "one operation failed ({:?}), several requests did: {failed:?}",
            failed_kind.get()
        ));
    }
    if failed.is_empty() && failed_kind.get() == Some(Kind::Flush) {
        return Err("a flush failed and nobody was told".to_string());
    }
    rig.store.heal();
    let at = rig.store.mark();
    let after = rig.after_death(seed)?;
    after.check_sound()?;
    let volume = after.open(true).map_err(|error| format!("open again: {error}"))?;
    let disk = after.store.run(read_all(&volume)).map_err(|error| format!("read again: {error}"))?;
    history
        .judge(at, Cause::ProcessDeath, &disk)
        .map_err(|error| format!("{error}; failed were {failed:?}"))?;
    after.store.run(volume.close()).map_err(|error| format!("close: {error}"))?;
    after.check_sound()?;
    Ok(Outcome { operations, failed })
}

/// Fails each operation of a run of requests once (or `points` of them, evenly spread), in each way.
///
/// # Errors
/// What went wrong beyond the one request.
pub fn sweep(case: &Case, seed: u64, points: u64) -> Result<(), String> {
    let fresh = Rig::create(case, seed).map_err(|error| error.to_string())?;
    let sound = attempt(&fresh, seed, None)?;
    if let Some(failure) = sound.failed.first() {
        return Err(format!("fails without a fault: {failure}"));
    }
    let stride = sound.operations.div_ceil(points.max(1)).max(1);
    let mut told = 0;
    for number in (0..sound.operations).step_by(stride as usize) {
        // With one stride in between, each kind of fault meets other operations.
        for (way, fault) in [Fault::EIO, Fault::SHORT, Fault::ENOSPC].into_iter().enumerate() {
            let number = (number + way as u64 * stride / 3).min(sound.operations - 1);
            let outcome = attempt(&fresh, seed, Some((number, fault)))
                .map_err(|error| format!("operation {number} fails with {fault:?}: {error}"))?;
            told += outcome.failed.len();
        }
    }
    if told == 0 {
        return Err("no request ever heard of a fault".to_string());
    }
    Ok(())
}

/// Attempts of a guest that does not give up.
const ATTEMPTS: usize = 1000;

/// A guest that goes on to write to a full store. Returns how many of its requests failed.
async fn insist(guest: &Guest<'_>, rng: &mut fastrand::Rng) -> Result<u64, String> {
    let mut full = 0;
    for _ in 0..ATTEMPTS {
        let start = rng.u64(..guest.blocks());
        match guest.write(start..start + 1).await {
            Err(error) if error.kind == ErrorKind::NoSpace => full += 1,
            Err(error) => return Err(format!("not ENOSPC: {error}")),
            Ok(()) => {}
        }
    }
    Ok(full)
}

/// The store gets full in the middle of allocations: requests fail with ENOSPC, everything that was there is there, and once
/// there is room the same disk goes on.
///
/// # Errors
/// What was harmed.
pub fn no_space(case: &Case, seed: u64) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let rig = Rig::create(case, seed).map_err(text)?;
    rig.store.start_record();
    let history = History::new(&rig.store, rig.initial.clone());
    let volume = rig.open(true).map_err(text)?;
    let guest = Guest::new(&volume, &history);
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xf0);
    rig.store
        .run(async {
            for _ in 0..5 {
                guest.random(&mut rng).await?;
            }
            guest.flush().await
        })
        .map_err(text)?;
    rig.store.set_space_max(rig.store.allocated_bytes() + rng.u64(0..40) * 4096);
    let mut full = 0u64;
    rig.store.run(async {
        for _ in 0..40 {
            match guest.random(&mut rng).await {
                Err(error) if error.kind == ErrorKind::NoSpace => full += 1,
                Err(error) => return Err(format!("not ENOSPC: {error}")),
                Ok(()) => {}
            }
        }
        guest.read_all().await.map_err(|error| format!("a full store cannot be read: {error}"))
    })?;
    full += rig.store.run(insist(&guest, &mut rng))?;
    guest.verdict().map_err(|error| format!("while full: {error}"))?;
    rig.store.set_space_max(u64::MAX);
    rig.store
        .run(async {
            guest.flush().await?;
            for _ in 0..20 {
                guest.random(&mut rng).await?;
            }
            guest.read_all().await?;
            volume.close().await
        })
        .map_err(|error| format!("with room again ({full} requests had failed): {error}"))?;
    guest.verdict().map_err(|error| format!("with room again: {error}"))?;
    rig.check_sound().map(drop)
}
