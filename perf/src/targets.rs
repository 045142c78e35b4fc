//! The project's performance targets, as ratios inside one run, judged from the report. This only reports: a missed target is
//! no failure of the run.

mod images;
mod rings;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cases::{blkif, density, qos, ram, raw, rings as many, shards, single};
use crate::report::{Metric, Report, Row, Summary};

/// What became of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Measured and reached.
    Met,
    /// Measured and not reached.
    Missed,
    /// This machine or this run cannot say.
    NotMeasured,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Met => "met",
            Verdict::Missed => "MISSED",
            Verdict::NotMeasured => "not measured",
        })
    }
}

/// The side on which the target is reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::AtMost(value) => write!(f, "<= {value}"),
            Wanted::AtLeast(value) => write!(f, ">= {value}"),
        }
    }
}

/// One target of the project and what was measured for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TargetResult {
    /// What is compared.
    pub name: String,
    /// The bound.
    pub wanted: Wanted,
    /// The ratio or figure, when it could be had.
    pub measured: Option<f64>,
    /// The verdict.
    pub verdict: Verdict,
    /// Against whom, or why not.
    pub note: String,
}

/// Judges all targets whose case was asked for.
pub fn judge(report: &Report, cases: &[&str]) -> Vec<TargetResult> {
    let judge = Judge { report, summaries: report.summaries() };
    let mut results = Vec::new();
    if cases.contains(&raw::CASE) {
        judge.raw(&mut results);
    }
    if cases.contains(&ram::CASE) {
        judge.ram(&mut results);
    }
    if cases.contains(&raw::CASE) && cases.contains(&ram::CASE) {
        judge.sequential(&mut results);
    }
    if cases.contains(&density::CASE) {
        judge.density(&mut results);
    }
    if cases.contains(&qos::CASE) {
        judge.qos(&mut results);
    }
    if cases.contains(&shards::CASE) {
        judge.shards(&mut results);
    }
    judge.images(cases, &mut results);
    if cases.contains(&blkif::CASE) {
        judge.rings(&mut results);
    }
    if cases.contains(&many::CASE) {
        judge.many_rings(&mut results);
    }
    results
}

struct Judge<'a> {
    report: &'a Report,
    summaries: Vec<Summary>,
}

/// A figure and whose it is.
type Named = Option<(f64, String)>;

impl Judge<'_> {
    fn rows<'s>(&'s self, case: &'s str, point: &'s str) -> impl Iterator<Item = &'s Summary> {
        self.summaries.iter().filter(move |s| s.case == case && s.point == point && !s.row.again)
    }

    /// The subject's figure: blktapd's own row.
    fn ours(&self, case: &str, point: &str, row: &Row, metric: Metric) -> Named {
        let found = self.rows(case, point).find(|summary| summary.row == *row)?;
        Some((found.value(metric)?, found.row.to_string()))
    }

    /// The best figure among the rows that `peer` accepts.
    fn best(&self, case: &str, point: &str, metric: Metric, peer: impl Fn(&Row) -> bool) -> Named {
        let all = self
            .rows(case, point)
            .filter(|summary| peer(&summary.row))
            .filter_map(|summary| Some((summary.value(metric)?, summary.row.to_string())));
        if metric == Metric::Iops {
            all.max_by(|a, b| a.0.total_cmp(&b.0))
        } else {
            all.min_by(|a, b| a.0.total_cmp(&b.0))
        }
    }

    fn raw(&self, results: &mut Vec<TargetResult>) {
        let row = raw::subject();
        let qemu = |row: &Row| row.server.starts_with("qemu-");
        let checks = [
            (&single::READ_4K_QD32, Metric::CpuPerMillion, Wanted::AtMost(0.55)),
            (&single::WRITE_4K_QD32, Metric::CpuPerMillion, Wanted::AtMost(0.55)),
            (&single::READ_4K_QD32, Metric::Iops, Wanted::AtLeast(1.5)),
            (&single::WRITE_4K_QD32, Metric::Iops, Wanted::AtLeast(1.8)),
            (&single::READ_4K_QD1, Metric::CpuPerMillion, Wanted::AtMost(0.75)),
            (&single::READ_4K_QD1, Metric::P50Us, Wanted::AtMost(0.9)),
            (&single::WRITE_4K_QD1, Metric::CpuPerMillion, Wanted::AtMost(0.75)),
            (&single::WRITE_4K_QD1, Metric::P50Us, Wanted::AtMost(0.9)),
        ];
        for (point, metric, wanted) in checks {
            let point = point.name();
            let ours = self.ours(raw::CASE, &point, &row, metric);
            let theirs = self.best(raw::CASE, &point, metric, qemu);
            results.push(ratio(
                format!("raw {point}: {} to QEMU's better", metric.title()),
                wanted,
                ours,
                theirs,
            ));
        }
    }

    fn ram(&self, results: &mut Vec<TargetResult>) {
        let row = ram::subject();
        let verified = self.report.verified.contains(&format!("{}: {row}", ram::CASE));
        let memory = |row: &Row| row.server == "nbdkit" && row.variant == ram::MEMORY;
        let null = |row: &Row| row.server.starts_with("qemu-");
        for point in [&single::READ_4K_QD32, &single::WRITE_4K_QD32] {
            let point = point.name();
            let ours = self.ours(ram::CASE, &point, &row, Metric::CpuPerMillion).filter(|_| verified);
            let nbdkit = self.best(ram::CASE, &point, Metric::CpuPerMillion, memory);
            let qemu = self.best(ram::CASE, &point, Metric::CpuPerMillion, null);
            results.push(ratio(
                format!("RAM {point}: CPU to nbdkit memory"),
                Wanted::AtMost(0.6),
                ours.clone(),
                nbdkit,
            ));
            results.push(ratio(
                format!("RAM {point}: CPU to QEMU null-co"),
                Wanted::AtMost(0.85),
                ours,
                qemu,
            ));
        }
    }

    /// 64k sequential beside the smaller of the file itself and the best server that does no I/O.
    fn sequential(&self, results: &mut Vec<TargetResult>) {
        for point in [&single::READ_64K_QD32, &single::WRITE_64K_QD32] {
            let point = point.name();
            let ours = self.ours(raw::CASE, &point, &raw::subject(), Metric::Iops);
            let file = self.best(raw::CASE, &point, Metric::Iops, |row| row.server == raw::LIMIT);
            let null = self.best(ram::CASE, &point, Metric::Iops, |row| {
                row.server != "blktapd" && row.variant.starts_with(ram::NULL)
            });
            let limit = match (file, null) {
                (Some(file), Some(null)) => Some(if file.0 <= null.0 { file } else { null }),
                _ => None,
            };
            results.push(ratio(
                format!("raw {point}: IOPS to the limit"),
                Wanted::AtLeast(0.95),
                ours,
                limit,
            ));
        }
    }

    fn density(&self, results: &mut Vec<TargetResult>) {
        let row = density::subject();
        let figure = |name: &str, point: String, metric: Metric, wanted: Wanted| {
            let ours = self.ours(density::CASE, &point, &row, metric).map(|(value, _)| value);
            plain(name.into(), wanted, ours, point)
        };
        let pss = Metric::PssPerDiskKib;
        let idle_cpu = Wanted::AtMost(density::NO_CPU_PERCENT);
        results.push(figure(
            "512 idle disks: PSS KiB per disk",
            density::connected(512),
            pss,
            Wanted::AtMost(64.0),
        ));
        results.push(figure("512 idle disks: CPU %", density::connected(512), Metric::CpuPercent, idle_cpu));
        results.push(figure(
            "512 disks after load: PSS KiB per disk",
            density::after(512),
            pss,
            Wanted::AtMost(256.0),
        ));
        results.push(figure(
            "512 disks after load: CPU %",
            density::after(512),
            Metric::CpuPercent,
            idle_cpu,
        ));
        let daemon = |row: &Row| row.server == "qemu-storage-daemon";
        for (metric, wanted) in [(Metric::CpuPerMillion, 0.9), (Metric::P99Us, 1.0)] {
            let point = density::at_rate(128);
            let ours = self.ours(density::CASE, &point, &row, metric);
            let theirs = self.best(density::CASE, &point, metric, daemon);
            let name = format!("128 disks at 50/s: {} to qemu-storage-daemon", metric.title());
            results.push(ratio(name, Wanted::AtMost(wanted), ours, theirs));
        }
    }

    fn qos(&self, results: &mut Vec<TargetResult>) {
        for limit in &qos::LIMITS {
            let point = limit.point();
            let worst = self.ours(qos::CASE, &point, &qos::subject(), Metric::LimitErrorPercent);
            let name = format!("limit {point}: worst round off by %");
            results.push(plain(name, Wanted::AtMost(1.0), worst.map(|(value, _)| value), String::new()));
        }
        let p90 = |point: &str| self.ours(qos::CASE, point, &qos::subject(), Metric::P90Us);
        let control = p90(qos::ALONE);
        let mut result = ratio(
            "neighbour's p90 beside a limited disk, to its control".into(),
            Wanted::AtMost(1.2),
            p90(qos::BESIDE_LIMITED),
            control.clone(),
        );
        if let (Some(control), Some(again)) = (control, p90(qos::ALONE_AGAIN)) {
            result.note = format!("the A/A control moved by x{:.2}", again.0 / control.0);
        }
        results.push(result);
    }

    fn shards(&self, results: &mut Vec<TargetResult>) {
        let figure = |row: &Row, metric| self.ours(shards::CASE, shards::POINT, row, metric);
        for (metric, wanted) in
            [(Metric::CpuPerMillion, Wanted::AtMost(1.05)), (Metric::Iops, Wanted::AtLeast(1.9))]
        {
            let name = format!("two shards to one: {}", metric.title());
            let mut result =
                ratio(name, wanted, figure(&shards::two(), metric), figure(&shards::one(), metric));
            if metric == Metric::Iops && self.report.host.cores.allowed.len() < shards::CORES_FOR_SCALING {
                result.verdict = Verdict::NotMeasured;
                result.note = format!(
                    "needs {} cores; here each shard shares its core with its load",
                    shards::CORES_FOR_SCALING
                );
            }
            results.push(result);
        }
    }
}

/// A target on our figure divided by theirs.
fn ratio(name: String, wanted: Wanted, ours: Named, theirs: Named) -> TargetResult {
    match (ours, theirs) {
        (Some((ours, _)), Some((theirs, whose))) if theirs > 0.0 => {
            plain(name, wanted, Some(ours / theirs), whose)
        }
        (None, _) => plain(name, wanted, None, "blktapd was not measured (or its data not verified)".into()),
        _ => plain(name, wanted, None, "nothing to compare with was measured".into()),
    }
}

/// A target on a figure itself.
fn plain(name: String, wanted: Wanted, measured: Option<f64>, note: String) -> TargetResult {
    let verdict = match (measured, wanted) {
        (None, _) => Verdict::NotMeasured,
        (Some(value), Wanted::AtMost(bound)) if value <= bound => Verdict::Met,
        (Some(value), Wanted::AtLeast(bound)) if value >= bound => Verdict::Met,
        (Some(_), _) => Verdict::Missed,
    };
    TargetResult { name, wanted, measured, verdict, note }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{report, sample};

    fn judged(results: &[TargetResult], part: &str) -> TargetResult {
        results.iter().find(|result| result.name.contains(part)).unwrap().clone()
    }

    // Goal: the comparison is with the better of QEMU's rows, never with the A/A row or another point, and a figure that is
    // missing is no pass. Method: a report with two QEMU rows.
    #[test]
    fn the_better_peer_counts() {
        let point = single::READ_4K_QD32.name();
        let values = |iops, cpu| [(Metric::Iops, iops), (Metric::CpuPerMillion, cpu)];
        let report = report(vec![
            sample("raw", &point, raw::subject(), &values(90.0, 6.0)),
            sample("raw", &point, raw::subject().again(), &values(900.0, 1.0)),
            sample("raw", &point, Row::new("qemu-nbd", "aio=native"), &values(50.0, 12.0)),
            sample("raw", &point, Row::new("qemu-storage-daemon", "aio=native"), &values(70.0, 11.0)),
            sample("raw", &point, Row::new("nbdkit", "file"), &values(500.0, 1.0)),
        ]);
        let results = judge(&report, &["raw"]);
        let iops = judged(&results, "4k random read QD32: IOPS");
        assert_eq!(iops.verdict, Verdict::Missed);
        assert!((iops.measured.unwrap() - 90.0 / 70.0).abs() < 1e-9);
        assert!(iops.note.contains("storage-daemon"));
        let cpu = judged(&results, "4k random read QD32: CPU");
        assert_eq!(cpu.verdict, Verdict::Met);
        assert!((cpu.measured.unwrap() - 6.0 / 11.0).abs() < 1e-9);
        assert_eq!(judged(&results, "4k random write QD32: IOPS").verdict, Verdict::NotMeasured);
    }

    // Goal: a RAM figure without verification does not count. Method: the same report with and without it.
    #[test]
    fn unverified_memory_does_not_count() {
        let point = single::READ_4K_QD32.name();
        let mut report = report(vec![
            sample("ram", &point, ram::subject(), &[(Metric::CpuPerMillion, 3.0)]),
            sample("ram", &point, Row::new("nbdkit", ram::MEMORY), &[(Metric::CpuPerMillion, 6.0)]),
        ]);
        assert_eq!(judged(&judge(&report, &["ram"]), "nbdkit memory").verdict, Verdict::NotMeasured);
        report.verified.push(format!("ram: {}", ram::subject()));
        assert_eq!(judged(&judge(&report, &["ram"]), "nbdkit memory").verdict, Verdict::Met);
    }
}
