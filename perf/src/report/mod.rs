//! What a run found: every sample of every round, and the summary by row from which tables, plots and targets are made.
//!
//! Vocabulary: a *case* (`raw`, `density`, …) has *points* (`4k random read QD32`); at each point every *row* (a server with
//! its settings) is measured once per *round*. The first row is the *subject*; ratios are
//! subject to row.

pub mod compare;
pub mod json;
pub mod svg;
pub mod table;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cpus::Cores;
use crate::servers::Program;
use crate::stats::{Rule, Spread, spread};
use crate::targets::TargetResult;

/// A figure that is measured. The order is the order of columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Operations per second.
    Iops,
    /// Median latency in microseconds.
    P50Us,
    /// 90th percentile.
    P90Us,
    /// 99th percentile.
    P99Us,
    /// Server CPU (user and system) in seconds per million operations.
    CpuPerMillion,
    /// Server CPU in percent of one core, for idle servers.
    CpuPercent,
    /// Proportional set size of all processes of the server, KiB.
    PssKib,
    /// The same divided by the number of disks.
    PssPerDiskKib,
    /// Open descriptors of the server.
    Descriptors,
    /// Milliseconds from start to the last disk being there.
    ReadyMs,
    /// Requests due in an open loop that got no answer.
    Unanswered,
    /// Distance of the measured rate from the limit, percent.
    LimitErrorPercent,
    /// Milliseconds from the start of a command to its end.
    WallMs,
    /// Milliseconds of CPU (user and system) of a command.
    CpuMs,
    /// Bytes that a server read of its file for one request beyond the data that was asked for.
    MetadataBytes,
    /// The same as a number of reads, where the size of a read is known.
    MetadataReads,
}

impl Metric {
    /// All metrics, in the order of columns.
    pub const ALL: [Metric; 16] = [
        Metric::Iops,
        Metric::P50Us,
        Metric::P90Us,
        Metric::P99Us,
        Metric::CpuPerMillion,
        Metric::CpuPercent,
        Metric::PssKib,
        Metric::PssPerDiskKib,
        Metric::Descriptors,
        Metric::ReadyMs,
        Metric::Unanswered,
        Metric::LimitErrorPercent,
        Metric::WallMs,
        Metric::CpuMs,
        Metric::MetadataBytes,
        Metric::MetadataReads,
    ];

    /// Heading of a column or plot.
    pub fn title(self) -> &'static str {
        match self {
            Metric::Iops => "IOPS",
            Metric::P50Us => "p50 us",
            Metric::P90Us => "p90 us",
            Metric::P99Us => "p99 us",
            Metric::CpuPerMillion => "CPU s/M",
            Metric::CpuPercent => "CPU %",
            Metric::PssKib => "PSS KiB",
            Metric::PssPerDiskKib => "PSS KiB/disk",
            Metric::Descriptors => "descriptors",
            Metric::ReadyMs => "ready ms",
            Metric::Unanswered => "unanswered",
            Metric::LimitErrorPercent => "off limit %",
            Metric::WallMs => "wall ms",
            Metric::CpuMs => "CPU ms",
            Metric::MetadataBytes => "metadata B/op",
            Metric::MetadataReads => "metadata reads/op",
        }
    }

    /// How rounds become one figure. Noise of a shared host only ever adds CPU, so the smallest round is nearest to the truth;
    /// what must hold always is judged by its worst round.
    pub fn rule(self) -> Rule {
        match self {
            Metric::CpuPerMillion | Metric::CpuPercent | Metric::CpuMs => Rule::Min,
            Metric::Unanswered
            | Metric::LimitErrorPercent
            | Metric::MetadataBytes
            | Metric::MetadataReads => Rule::Max,
            _ => Rule::Median,
        }
    }

    /// Whether a table shows the subject's ratio to other rows.
    pub fn has_ratio(self) -> bool {
        matches!(
            self,
            Metric::Iops
                | Metric::P50Us
                | Metric::P99Us
                | Metric::CpuPerMillion
                | Metric::PssKib
                | Metric::WallMs
                | Metric::CpuMs
        )
    }
}

/// The figures of one measurement.
pub type Values = BTreeMap<Metric, f64>;

/// Who was measured.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Row {
    /// The program's name.
    pub server: String,
    /// Its settings, as far as rows differ by them.
    pub variant: String,
    /// True for the second measurement of the same thing, which shows the noise.
    pub again: bool,
}

impl Row {
    /// A row that is measured once per round.
    pub fn new(server: impl fmt::Display, variant: impl Into<String>) -> Self {
        Self { server: server.to_string(), variant: variant.into(), again: false }
    }

    /// The A/A row of this one.
    pub fn again(&self) -> Self {
        Self { again: true, ..self.clone() }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.server)?;
        if !self.variant.is_empty() {
            write!(f, " {}", self.variant)?;
        }
        if self.again { f.write_str(" (A/A)") } else { Ok(()) }
    }
}

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// The case.
    pub case: String,
    /// The point.
    pub point: String,
    /// The row.
    pub row: Row,
    /// The round, from 0.
    pub round: u32,
    /// What was measured.
    pub values: Values,
}

/// All rounds of one row at one point.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The case.
    pub case: String,
    /// The point.
    pub point: String,
    /// The row.
    pub row: Row,
    /// Rounds that were measured.
    pub rounds: usize,
    /// Each figure by its rule.
    pub values: BTreeMap<Metric, Spread>,
}

impl Summary {
    /// One figure.
    pub fn value(&self, metric: Metric) -> Option<f64> {
        self.values.get(&metric).map(|spread| spread.value)
    }
}

/// The machine and the settings of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// Model name of the processor.
    pub processor: String,
    /// Which cores were used for what.
    pub cores: Cores,
    /// Where the image files were, and on which file system.
    pub files: String,
    /// The command line of this program.
    pub command: String,
    /// Unix time of the start.
    pub started_s: u64,
    /// Version of fio.
    pub fio: String,
}

/// Everything that a run found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Version of this format.
    pub schema: u32,
    /// Machine and settings.
    pub host: Host,
    /// The servers and their versions.
    pub programs: Vec<Program>,
    /// `case: row` to the command that started it (the last one, with paths of the run).
    pub commands: BTreeMap<String, String>,
    /// `case: row` whose data was written and read back with checksums before it was timed.
    pub verified: Vec<String>,
    /// All samples in the order in which they were taken.
    pub samples: Vec<Sample>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
    /// Rows that failed, and why.
    pub failed: Vec<String>,
    /// The targets, judged.
    pub targets: Vec<TargetResult>,
}

/// The version of the JSON format.
pub const SCHEMA: u32 = 1;

impl Report {
    /// All rows of all points, in the order in which they were first seen.
    pub fn summaries(&self) -> Vec<Summary> {
        let mut order: Vec<(&str, &str, &Row)> = Vec::new();
        let mut samples: BTreeMap<(&str, &str, &Row), Vec<&Values>> = BTreeMap::new();
        for sample in &self.samples {
            let key = (sample.case.as_str(), sample.point.as_str(), &sample.row);
            let list = samples.entry(key).or_default();
            if list.is_empty() {
                order.push(key);
            }
            list.push(&sample.values);
        }
        order
            .into_iter()
            .map(|key| {
                let list = &samples[&key];
                let values = Metric::ALL
                    .into_iter()
                    .filter_map(|metric| {
                        let all: Vec<f64> =
                            list.iter().filter_map(|values| values.get(&metric).copied()).collect();
                        Some((metric, spread(&all, metric.rule())?))
                    })
                    .collect();
                let (case, point, row) = key;
                Summary {
                    case: case.into(),
                    point: point.into(),
                    row: row.clone(),
                    rounds: list.len(),
                    values,
                }
            })
            .collect()
    }
}

/// The points of one case.
#[derive(Debug)]
pub struct CaseRows<'a> {
    /// The case.
    pub case: &'a str,
    /// Its points.
    pub points: Vec<PointRows<'a>>,
}

/// The rows of one point; never empty.
#[derive(Debug)]
pub struct PointRows<'a> {
    /// The point.
    pub point: &'a str,
    /// Its rows.
    pub rows: Vec<&'a Summary>,
}

/// Summaries by case and point in order of appearance. Rows have the order of the case's first point, which is measured in the
/// order of the table; later points begin with other rows.
pub fn grouped(summaries: &[Summary]) -> Vec<CaseRows<'_>> {
    let mut cases: Vec<CaseRows<'_>> = Vec::new();
    for summary in summaries {
        let at = cases.iter().position(|rows| rows.case == summary.case).unwrap_or_else(|| {
            cases.push(CaseRows { case: &summary.case, points: Vec::new() });
            cases.len() - 1
        });
        let points = &mut cases[at].points;
        match points.iter_mut().find(|rows| rows.point == summary.point) {
            Some(found) => found.rows.push(summary),
            None => points.push(PointRows { point: &summary.point, rows: vec![summary] }),
        }
    }
    for CaseRows { points, .. } in &mut cases {
        let first: Vec<Row> =
            points.iter().flat_map(|point| &point.rows).map(|summary| summary.row.clone()).collect();
        for PointRows { rows, .. } in points {
            rows.sort_by_key(|summary| first.iter().position(|row| *row == summary.row));
        }
    }
    cases
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A report with the given samples, for tests of tables, plots and targets.
    pub(crate) fn report(samples: Vec<Sample>) -> Report {
        Report {
            schema: SCHEMA,
            host: Host {
                kernel: "6.1".into(),
                processor: "p".into(),
                cores: Cores { allowed: vec![0, 1], server: 0, load: 1 },
                files: "/srv on ext4".into(),
                command: "blktapd-perf run".into(),
                started_s: 1,
                fio: "fio-3.33".into(),
            },
            programs: Vec::new(),
            commands: BTreeMap::new(),
            verified: Vec::new(),
            samples,
            skipped: Vec::new(),
            failed: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// One sample.
    pub(crate) fn sample(case: &str, point: &str, row: Row, values: &[(Metric, f64)]) -> Sample {
        Sample {
            case: case.into(),
            point: point.into(),
            row,
            round: 0,
            values: values.iter().copied().collect(),
        }
    }

    // Goal: each metric is summed up by its own rule, and no row is lost. Method: three rounds of two rows.
    #[test]
    fn rounds_are_summed_up_by_rule() {
        let row = Row::new("blktapd", "");
        let round = |iops, cpu| {
            sample("raw", "p", row.clone(), &[(Metric::Iops, iops), (Metric::CpuPerMillion, cpu)])
        };
        let other = sample("raw", "p", row.again(), &[(Metric::Iops, 5.0)]);
        let report = report(vec![round(1.0, 9.0), other, round(3.0, 7.0), round(2.0, 8.0)]);
        let summaries = report.summaries();
        assert_eq!(summaries.len(), 2);
        assert_eq!(summaries[0].rounds, 3);
        assert_eq!(summaries[0].value(Metric::Iops), Some(2.0));
        assert_eq!(summaries[0].value(Metric::CpuPerMillion), Some(7.0));
        assert_eq!(grouped(&summaries)[0].points[0].rows.len(), 2);
    }
}
