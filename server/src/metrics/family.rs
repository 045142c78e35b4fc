//! Building metric families without ceremony.

use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use shard::stats::{BUCKETS_NS, BucketCounts};

/// A family that is being filled.
pub struct Family(MetricFamily);

impl Family {
    /// A family without metrics.
    pub fn new(name: &str, help: &str, kind: MetricType) -> Family {
        let mut family = MetricFamily::default();
        family.set_name(name.into());
        family.set_help(help.into());
        family.set_field_type(kind);
        Family(family)
    }

    /// Adds a value.
    pub fn value(&mut self, labels: &[(&str, &str)], value: f64) {
        let mut metric = Metric::from_label(label_pairs(labels));
        match self.0.get_field_type() {
            MetricType::COUNTER => {
                let mut counter = Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            }
            _ => {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
        }
        self.0.mut_metric().push(metric);
    }

    /// Adds a histogram of durations, the sum of some.
    pub fn histogram<'a>(
        &mut self,
        labels: &[(&str, &str)],
        parts: impl IntoIterator<Item = &'a BucketCounts>,
    ) {
        let (counts, sum_ns) = total(parts);
        let mut so_far = 0;
        let buckets = BUCKETS_NS.iter().zip(counts).map(|(bound, count)| {
            so_far += count;
            let mut bucket = Bucket::default();
            bucket.set_cumulative_count(so_far);
            bucket.set_upper_bound(*bound as f64 / 1e9);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(sum_ns as f64 / 1e9);
        let mut metric = Metric::from_label(label_pairs(labels));
        metric.set_histogram(histogram);
        self.0.mut_metric().push(metric);
    }

    /// The family, unless it is empty: a family without metrics is no valid exposition.
    pub fn finish(self) -> Option<MetricFamily> {
        (!self.0.get_metric().is_empty()).then_some(self.0)
    }
}

/// The sum of some histograms: counts (not cumulative) and nanoseconds.
pub fn total<'a>(parts: impl IntoIterator<Item = &'a BucketCounts>) -> ([u64; BUCKETS_NS.len() + 1], u64) {
    let mut counts = [0; BUCKETS_NS.len() + 1];
    let mut sum_ns: u64 = 0;
    for part in parts {
        let (part_counts, part_sum_ns) = part.read();
        counts.iter_mut().zip(part_counts).for_each(|(count, more)| *count += more);
        sum_ns = sum_ns.wrapping_add(part_sum_ns);
    }
    (counts, sum_ns)
}

fn label_pairs(labels: &[(&str, &str)]) -> Vec<LabelPair> {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).into());
        pair.set_value((*value).into());
        pair
    };
    labels.iter().map(pair).collect()
}
