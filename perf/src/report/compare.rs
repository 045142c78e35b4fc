//! Two reports side by side: the ratio of the second to the first for each figure that both have. Only runs on the same
//! machine with the same settings are comparable, and then only beyond the noise that the A/A rows show.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::table::number;
use super::{Metric, Report, Summary};

/// The comparison as text.
pub fn render(first: &Report, second: &Report) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let (a, b) = (&first.host, &second.host);
    if (&a.processor, &a.kernel, &a.files) != (&b.processor, &b.kernel, &b.files) {
        let _ = writeln!(
            text,
            "The runs differ in more than the programs: {} / {} / {} and {} / {} / {}.",
            a.processor, a.kernel, a.files, b.processor, b.kernel, b.files
        );
    }
    let (first, second) = (first.summaries(), second.summaries());
    let metrics = [Metric::Iops, Metric::P50Us, Metric::P99Us, Metric::CpuPerMillion, Metric::PssKib];
    let mut table = Table::new();
    let mut header = vec!["case".to_owned(), "point".into(), "row".into()];
    header.extend(metrics.iter().map(|metric| metric.title().to_owned()));
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    let mut unmatched = 0;
    for new in &second {
        let Some(old) = first.iter().find(|old| same(old, new)) else {
            unmatched += 1;
            continue;
        };
        let mut cells = vec![new.case.clone(), new.point.clone(), new.row.to_string()];
        for metric in metrics {
            cells.push(match (old.value(metric), new.value(metric)) {
                (Some(old), Some(new)) if old > 0.0 => {
                    format!("{} -> {} x{:.2}", number(old), number(new), new / old)
                }
                _ => "-".into(),
            });
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let _ = writeln!(text, "{table}");
    let missing = first.iter().filter(|old| !second.iter().any(|new| same(old, new))).count();
    if unmatched + missing > 0 {
        let _ =
            writeln!(text, "{missing} rows are only in the first report, {unmatched} only in the second.");
    }
    text
}

fn same(a: &Summary, b: &Summary) -> bool {
    a.case == b.case && a.point == b.point && a.row == b.row
}

#[cfg(test)]
mod tests {
    use super::super::Row;
    use super::super::tests::{report, sample};
    use super::*;

    // Goal: the ratio is second to first, and what has no partner is said. Method: one common row, one extra.
    #[test]
    fn ratios_are_second_to_first() {
        let row = Row::new("blktapd", "");
        let first = report(vec![sample("raw", "p", row.clone(), &[(Metric::Iops, 200.0)])]);
        let second = report(vec![
            sample("raw", "p", row.clone(), &[(Metric::Iops, 300.0)]),
            sample("raw", "q", row, &[(Metric::Iops, 1.0)]),
        ]);
        let text = render(&first, &second);
        assert!(text.contains("200 -> 300 x1.50"), "{text}");
        assert!(text.contains("0 rows are only in the first report, 1 only in the second"), "{text}");
    }
}
