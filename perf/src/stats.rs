//! Summaries of repeated measurements. No value is dropped: the summary keeps the smallest and largest beside the figure.

use serde::{Deserialize, Serialize};

/// How the rounds of one figure become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The median; the mean of the two in the middle when the number is even.
    Median,
    /// The smallest: for CPU per operation, where noise of the host only ever adds.
    Min,
    /// The largest: for errors, where the worst round counts.
    Max,
}

/// One figure over all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The figure, by its rule.
    pub value: f64,
    /// The smallest round.
    pub min: f64,
    /// The largest round.
    pub max: f64,
}

/// The summary of `samples`, or none when there is no sample.
pub fn spread(samples: &[f64], rule: Rule) -> Option<Spread> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (&min, &max) = (sorted.first()?, sorted.last()?);
    let value = match rule {
        Rule::Min => min,
        Rule::Max => max,
        Rule::Median => {
            let upper = sorted[sorted.len() / 2];
            if sorted.len() % 2 == 1 { upper } else { (sorted[sorted.len() / 2 - 1] + upper) / 2.0 }
        }
    };
    Some(Spread { value, min, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: each rule takes the value it names, for odd and even counts. Method: small unordered samples.
    #[test]
    fn rules_take_what_they_name() {
        let odd = [3.0, 1.0, 10.0];
        assert_eq!(spread(&odd, Rule::Median), Some(Spread { value: 3.0, min: 1.0, max: 10.0 }));
        assert_eq!(spread(&odd, Rule::Min).map(|s| s.value), Some(1.0));
        assert_eq!(spread(&odd, Rule::Max).map(|s| s.value), Some(10.0));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 100.0], Rule::Median).map(|s| s.value), Some(3.0));
        assert_eq!(spread(&[], Rule::Median), None);
    }
}
