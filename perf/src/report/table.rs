//! The report as text: one table per point, then the targets.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::{CaseRows, Metric, PointRows, Report, Summary, grouped};
use crate::stats::Spread;

/// The whole report.
pub fn render(report: &Report) -> String {
    let summaries = report.summaries();
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{}; kernel {}; server on core {}, load on core {}; files {}; {}",
        report.host.processor,
        report.host.kernel,
        report.host.cores.server,
        report.host.cores.load,
        report.host.files,
        report.host.fio
    );
    let _ = writeln!(text, "command: {}", report.host.command);
    for program in &report.programs {
        let _ = writeln!(text, "{}: {}", program.kind, program.version);
    }
    for CaseRows { case, points } in grouped(&summaries) {
        for PointRows { point, rows } in points {
            let _ = writeln!(text, "\n{case}: {point} ({} rounds)\n{}", rows[0].rounds, point_table(&rows));
        }
    }
    for line in &report.skipped {
        let _ = writeln!(text, "not measured: {line}");
    }
    for line in &report.failed {
        let _ = writeln!(text, "FAILED: {line}");
    }
    if !report.targets.is_empty() {
        let _ = writeln!(text, "\ntargets\n{}", targets(report));
    }
    text
}

/// One point: a line per row, a column per metric, and behind a metric the subject's ratio to each row.
fn point_table(rows: &[&Summary]) -> Table {
    let subject = rows[0];
    let metrics: Vec<Metric> = Metric::ALL
        .into_iter()
        .filter(|metric| rows.iter().any(|row| row.values.contains_key(metric)))
        .collect();
    let shows_ratio = |metric: Metric| rows.len() > 1 && metric.has_ratio();
    let mut header = vec!["row".to_owned()];
    for &metric in &metrics {
        header.push(metric.title().into());
        if shows_ratio(metric) {
            header.push(format!("{}/it", subject.row.server));
        }
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for row in rows {
        let mut cells = vec![row.row.to_string()];
        for &metric in &metrics {
            cells.push(row.values.get(&metric).map_or("-".into(), |spread| figure(*spread)));
            if shows_ratio(metric) {
                cells.push(ratio(subject.value(metric), row.value(metric)));
            }
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn targets(report: &Report) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["target", "wanted", "measured", "verdict", "note"]);
    for target in &report.targets {
        table.add_row([
            target.name.clone(),
            target.wanted.to_string(),
            target.measured.map_or("-".into(), number),
            target.verdict.to_string(),
            target.note.clone(),
        ]);
    }
    table
}

/// A figure with the rounds' smallest and largest.
fn figure(spread: Spread) -> String {
    if spread.min == spread.max {
        number(spread.value)
    } else {
        format!("{} [{}..{}]", number(spread.value), number(spread.min), number(spread.max))
    }
}

/// A number with about three significant digits.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{:.2}M", value / 1e6),
        v if v >= 1e4 => format!("{:.1}k", value / 1e3),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.01 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.5}"),
    }
}

fn ratio(subject: Option<f64>, row: Option<f64>) -> String {
    match (subject, row) {
        (Some(subject), Some(row)) if row > 0.0 => format!("{:.2}", subject / row),
        _ => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Row;
    use super::super::tests::{report, sample};
    use super::*;

    // Goal: the ratio is ours to theirs, rows keep their place, and figures show their spread. Method: two rows, two rounds.
    #[test]
    fn ratio_is_subject_to_row() {
        let peer = Row::new("qemu-nbd", "aio=native");
        let text = render(&report(vec![
            sample("raw", "p", Row::new("blktapd", ""), &[(Metric::Iops, 90_000.0)]),
            sample("raw", "p", peer, &[(Metric::Iops, 50_000.0)]),
            sample("raw", "p", Row::new("blktapd", ""), &[(Metric::Iops, 110_000.0)]),
        ]));
        let lines: Vec<&str> = text.lines().filter(|line| line.contains('|')).collect();
        assert!(lines[0].contains("blktapd/it"), "{text}");
        assert!(lines[2].contains("100.0k [90.0k..110.0k]") && lines[2].contains("1.00"), "{text}");
        assert!(lines[3].contains("qemu-nbd aio=native") && lines[3].contains("2.00"), "{text}");
    }
}
