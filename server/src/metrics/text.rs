//! Prometheus' text format (exposition format 0.0.4), written directly: for families that have values for each disk.
//!
//! With 512 busy disks a scrape has 46,000 lines. The model of the prometheus crate has several allocations for each of them and
//! sorts them; that was 20 ms of CPU for a scrape, and this is 3. Everything that is not by disk goes through the crate.
//!
//! The caller's part: all values of a family come after its `new` and before the next one's, no series twice, label names and
//! the family's help in plain words. Values of labels are escaped here.

use std::fmt::Write;
use std::sync::LazyLock;

use prometheus::proto::MetricType;
use shard::stats::{BUCKETS_NS, BucketCounts};

use super::family::total;

/// The bounds of the buckets as they are written.
static BOUNDS: LazyLock<[String; BUCKETS_NS.len() + 1]> = LazyLock::new(|| {
    std::array::from_fn(|index| match BUCKETS_NS.get(index) {
        Some(bound) => (*bound as f64 / 1e9).to_string(),
        None => "+Inf".into(),
    })
});

/// A family that is being written. One without values leaves no trace.
pub struct TextFamily<'a> {
    out: &'a mut String,
    name: &'a str,
    help: &'a str,
    kind: MetricType,
    begun: bool,
    /// A line's beginning that several lines share.
    prefix: String,
}

impl<'a> TextFamily<'a> {
    /// A family without values. `kind` is counter, gauge or histogram.
    pub fn new(out: &'a mut String, name: &'a str, help: &'a str, kind: MetricType) -> TextFamily<'a> {
        TextFamily { out, name, help, kind, begun: false, prefix: String::new() }
    }

    /// Adds a value.
    pub fn value(&mut self, labels: &[(&str, &str)], value: f64) {
        self.begin();
        self.out.push_str(self.name);
        self.out.push('{');
        push_labels(self.out, labels);
        self.out.push_str("} ");
        push_number(self.out, value);
        self.out.push('\n');
    }

    /// Adds a histogram of durations, the sum of some. It has labels.
    pub fn histogram<'b>(
        &mut self,
        labels: &[(&str, &str)],
        parts: impl IntoIterator<Item = &'b BucketCounts>,
    ) {
        self.begin();
        let (counts, sum_ns) = total(parts);
        self.prefix.clear();
        self.prefix.push_str(self.name);
        self.prefix.push_str("_bucket{");
        push_labels(&mut self.prefix, labels);
        self.prefix.push_str(",le=\"");
        let mut so_far = 0;
        for (index, count) in counts.into_iter().enumerate() {
            so_far += count;
            self.out.push_str(&self.prefix);
            self.out.push_str(&BOUNDS[index]);
            self.out.push_str("\"} ");
            push_integer(self.out, so_far);
            self.out.push('\n');
        }
        for (suffix, value) in [("_sum{", sum_ns as f64 / 1e9), ("_count{", so_far as f64)] {
            self.out.push_str(self.name);
            self.out.push_str(suffix);
            push_labels(self.out, labels);
            self.out.push_str("} ");
            push_number(self.out, value);
            self.out.push('\n');
        }
    }

    fn begin(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let kind = match self.kind {
            MetricType::COUNTER => "counter",
            MetricType::HISTOGRAM => "histogram",
            _ => "gauge",
        };
        // Writing to a string does not fail.
        let _ = write!(
            self.out,
            "# HELP {0} {1}\n# TYPE {0} {2}\n",
            self.name,
            self.help.replace('\n', " "),
            kind
        );
    }
}

fn push_labels(out: &mut String, labels: &[(&str, &str)]) {
    for (index, (name, value)) in labels.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        out.push_str(name);
        out.push_str("=\"");
        if value.contains(['\\', '"', '\n']) {
            out.push_str(&value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"));
        } else {
            out.push_str(value);
        }
        out.push('"');
    }
}

/// Most values are whole numbers, and those are written faster.
fn push_number(out: &mut String, value: f64) {
    const EXACT: f64 = (1u64 << 53) as f64;
    if value.fract() == 0.0 && (0.0..EXACT).contains(&value) {
        push_integer(out, value as u64);
    } else {
        let _ = write!(out, "{value}");
    }
}

fn push_integer(out: &mut String, value: u64) {
    let _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    //! Goal: the text says what the prometheus crate would say. Method: the same values through both, and its own text.

    use super::super::family::Family;
    use super::*;
    use prometheus::TextEncoder;

    #[test]
    fn it_writes_what_the_crate_writes() {
        let buckets = [BucketCounts::default(), BucketCounts::default()];
        for (index, ns) in [1, 60_000, 700_000_000, u64::MAX / 4].into_iter().enumerate() {
            buckets[index % 2].record(ns);
        }
        let labels: [(&str, &str); 2] = [("disk", "d-1"), ("path", "/a \"b\"\\c\nd é")];
        let values = [0.0, 1.0, 1.5, 3e-9, 123_456_789_012.0, 9.1e15, 1e21, -4.0, 0.1 + 0.2];
        let mut text = String::new();
        let mut families = Vec::new();
        let plain: [(&str, &str); 1] = [("disk", "d")];
        for (name, kind) in [("c_total", MetricType::COUNTER), ("g", MetricType::GAUGE)] {
            let mut ours = TextFamily::new(&mut text, name, "What it is.", kind);
            let mut theirs = Family::new(name, "What it is.", kind);
            for value in values {
                ours.value(&labels, value);
                theirs.value(&labels, value);
            }
            ours.value(&plain, 1.0);
            theirs.value(&plain, 1.0);
            families.push(theirs);
        }
        let mut ours = TextFamily::new(&mut text, "h_seconds", "Times.", MetricType::HISTOGRAM);
        let mut theirs = Family::new("h_seconds", "Times.", MetricType::HISTOGRAM);
        ours.histogram(&labels, &buckets);
        theirs.histogram(&labels, &buckets);
        families.push(theirs);
        let _without_values = TextFamily::new(&mut text, "nothing", "Not there.", MetricType::GAUGE);
        let families: Vec<_> = families.into_iter().filter_map(Family::finish).collect();
        let mut expected = String::new();
        TextEncoder::new().encode_utf8(&families, &mut expected).unwrap();
        assert_eq!(text, expected);
        assert!(text.contains("path=\"/a \\\"b\\\"\\\\c\\nd é\""), "{text}");
        assert!(text.contains("le=\"0.00005\"} 1\n") && text.contains("le=\"+Inf\"} 4\n"), "{text}");
    }
}
