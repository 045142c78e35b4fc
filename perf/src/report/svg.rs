//! The report as plots: one SVG per case and metric, a panel per point with its own scale, a bar per row, and a thin line from
//! the smallest to the largest round.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{PathElement, Rectangle, Text};
use plotters::style::{Color, IntoFont, RGBColor, WHITE};

use super::table::number;
use super::{CaseRows, Metric, PointRows, Report, Summary, grouped};

const PANEL_WIDTH: i32 = 660;
const ROW_HEIGHT: i32 = 22;
const TITLE_HEIGHT: i32 = 30;
const LABEL_WIDTH: i32 = 330;
const VALUE_WIDTH: i32 = 70;
const INK: RGBColor = RGBColor(40, 40, 40);
const SUBJECT: RGBColor = RGBColor(0, 114, 178);
const PEER: RGBColor = RGBColor(160, 160, 160);
const PLOTTED: [Metric; 7] = [
    Metric::Iops,
    Metric::P50Us,
    Metric::P99Us,
    Metric::CpuPerMillion,
    Metric::CpuPercent,
    Metric::PssPerDiskKib,
    Metric::LimitErrorPercent,
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes all plots into `dir` and returns their paths.
pub fn save(report: &Report, dir: &Path) -> Result<Vec<PathBuf>> {
    let summaries = report.summaries();
    let mut written = Vec::new();
    for CaseRows { case, points } in grouped(&summaries) {
        for metric in PLOTTED {
            let panels: Vec<PointRows<'_>> = points
                .iter()
                .map(|PointRows { point, rows }| PointRows {
                    point,
                    rows: rows.iter().copied().filter(|row| row.values.contains_key(&metric)).collect(),
                })
                .filter(|panel| !panel.rows.is_empty())
                .collect();
            if panels.is_empty() {
                continue;
            }
            let name = metric.title().replace(['/', ' '], "-").replace('%', "percent").to_lowercase();
            let path = dir.join(format!("{case}-{name}.svg"));
            plot(&path, &format!("{case}: {}", metric.title()), metric, &panels)
                .map_err(|error| anyhow!("cannot plot {}: {error}", path.display()))?;
            written.push(path);
        }
    }
    Ok(written)
}

fn plot(
    path: &Path,
    title: &str,
    metric: Metric,
    panels: &[PointRows<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let columns = if panels.len() > 1 { 2 } else { 1 };
    let lines = panels.len().div_ceil(columns) as i32;
    let rows = panels.iter().map(|panel| panel.rows.len()).max().unwrap_or(1) as i32;
    let panel_height = TITLE_HEIGHT + rows * ROW_HEIGHT + 12;
    let size = ((columns as i32 * PANEL_WIDTH) as u32, (TITLE_HEIGHT + lines * panel_height) as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    root.draw(&Text::new(title.to_owned(), (10, 8), ("sans-serif", 18).into_font().color(&INK)))?;
    for (index, PointRows { point, rows }) in panels.iter().enumerate() {
        let left = (index % columns) as i32 * PANEL_WIDTH;
        let top = TITLE_HEIGHT + (index / columns) as i32 * panel_height;
        panel(&root, left, top, point, metric, rows)?;
    }
    root.present()?;
    Ok(())
}

fn panel(
    root: &Area<'_>,
    left: i32,
    top: i32,
    point: &str,
    metric: Metric,
    rows: &[&Summary],
) -> Result<(), Box<dyn std::error::Error>> {
    let text = ("sans-serif", 13).into_font().color(&INK);
    root.draw(&Text::new(
        point.to_owned(),
        (left + 10, top + 8),
        ("sans-serif", 14).into_font().color(&INK),
    ))?;
    let largest = rows.iter().filter_map(|row| row.values.get(&metric)).map(|s| s.max).fold(0.0, f64::max);
    let room = f64::from(PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH);
    let length = |value: f64| if largest > 0.0 { (value / largest * room) as i32 } else { 0 };
    for (index, row) in rows.iter().enumerate() {
        let Some(spread) = row.values.get(&metric) else { continue };
        let y = top + TITLE_HEIGHT + index as i32 * ROW_HEIGHT;
        let x = left + LABEL_WIDTH;
        root.draw(&Text::new(row.row.to_string(), (left + 10, y + 3), text.clone()))?;
        let colour = if row.row.server == rows[0].row.server { SUBJECT } else { PEER };
        root.draw(&Rectangle::new(
            [(x, y + 2), (x + length(spread.value).max(1), y + ROW_HEIGHT - 4)],
            colour.filled(),
        ))?;
        let middle = y + ROW_HEIGHT / 2 - 1;
        let whisker = vec![(x + length(spread.min), middle), (x + length(spread.max), middle)];
        root.draw(&PathElement::new(whisker, INK.stroke_width(1)))?;
        root.draw(&Text::new(number(spread.value), (x + length(spread.max) + 6, y + 3), text.clone()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Row;
    use super::super::tests::{report, sample};
    use super::*;

    // Goal: a plot holds every row and its value. Method: two rows, the SVG's text.
    #[test]
    fn plot_names_rows_and_values() {
        let dir = tempfile::tempdir().unwrap();
        let report = report(vec![
            sample("raw", "4k", Row::new("blktapd", ""), &[(Metric::Iops, 1234.0)]),
            sample("raw", "4k", Row::new("nbdkit", "file"), &[(Metric::Iops, 567.0)]),
        ]);
        let written = save(&report, dir.path()).unwrap();
        assert_eq!(written, [dir.path().join("raw-iops.svg")]);
        let text = std::fs::read_to_string(&written[0]).unwrap();
        for part in ["blktapd", "nbdkit file", "1234", "567", "4k"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
    }
}
