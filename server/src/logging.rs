//! The log: text or JSON on standard error, or the journal's own protocol.

use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::args::LogFormat;
use crate::problem::Problem;

/// To change the filter of the running log.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging; once in a process.
pub fn start(filter: &str, format: Option<LogFormat>) -> Result<(), Problem> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let _ = FILTER.set(handle);
    let registry = tracing_subscriber::registry().with(filter);
    let format =
        format.unwrap_or_else(|| if stderr_is_journal() { LogFormat::Journald } else { LogFormat::Text });
    let failed = |error: &dyn std::fmt::Display| Problem::failed(format!("logging cannot start: {error}"));
    match format {
        LogFormat::Journald => {
            let journal = tracing_journald::layer().map_err(|error| failed(&error))?;
            registry.with(journal).try_init()
        }
        LogFormat::Json => {
            registry.with(tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr)).try_init()
        }
        LogFormat::Text => {
            let text = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
            registry.with(text.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))).try_init()
        }
    }
    .map_err(|error| failed(&error))
}

/// Changes what is logged from now on. Without a log nothing happens.
pub fn set_filter(filter: &str) -> Result<(), Problem> {
    let filter = parse(filter)?;
    match FILTER.get() {
        None => Ok(()),
        Some(handle) => handle
            .reload(filter)
            .map_err(|error| Problem::failed(format!("the log's filter cannot be changed: {error}"))),
    }
}

/// The filter of a text, or what is wrong with it.
pub fn parse(filter: &str) -> Result<EnvFilter, Problem> {
    EnvFilter::try_new(filter).map_err(|error| {
        Problem::invalid(format!(
            "the log filter {filter:?} is wrong: {error}; expected error, warn, info, debug or target=level"
        ))
    })
}

/// systemd names the journal's socket as `device:inode` (systemd.exec(5), JOURNAL_STREAM).
fn stderr_is_journal() -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = nix::sys::stat::fstat(std::io::stderr()) else { return false };
    named == format!("{}:{}", stat.st_dev, stat.st_ino)
}
