//! One flag that says "the user wants to leave". SIGINT, SIGTERM and SIGHUP only set it; every wait of the harness looks
//! at it, so that each exit path unwinds normally and the destructors stop the servers and remove the files.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

fn flag() -> &'static Arc<AtomicBool> {
    ASKED.get_or_init(|| Arc::new(AtomicBool::new(false)))
}

/// Catches the signals that ask a program to end. To be called once, before any child is started.
pub fn install() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, flag().clone()).context("cannot install a signal handler")?;
    }
    Ok(())
}

/// True once the user asked to leave.
pub fn asked() -> bool {
    flag().load(Ordering::Relaxed)
}

/// An error once the user asked to leave, so that `?` unwinds.
pub fn check() -> Result<()> {
    if asked() {
        bail!("interrupted: servers are stopped and temporary files removed");
    }
    Ok(())
}

/// Sleeps, and wakes early with an error when the user asks to leave.
pub fn sleep(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
}
