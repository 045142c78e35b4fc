//! The report as a file.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Report, SCHEMA};

/// Writes the report.
pub fn save(report: &Report, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a report of the same format version.
pub fn load(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let report: Report = serde_json::from_str(&text)
        .with_context(|| format!("{} is no report of `blktapd-perf run`", path.display()))?;
    ensure!(
        report.schema == SCHEMA,
        "{} has format {}, this program reads format {SCHEMA}: use the blktapd-perf that wrote it",
        path.display(),
        report.schema
    );
    Ok(report)
}
