//! Limits as people write them: one flat structure for the options of `ctl`, the keys of the configuration and the JSON
//! of the API.
//!
//! A field that is absent leaves the limit as it is; 0 removes it. `--iops` and `--bps` are totals over reads and writes,
//! and without a burst unless one is asked for.

use formats::size::{parse_byte_rate, parse_count};
use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize};
use shard::limits::{Limits, Rate};
use utoipa::ToSchema;

use crate::problem::Problem;

/// A change of limits; also, with every limit that is set, a description of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct LimitChange {
    /// Operations per second, reads and writes together; 0 for no limit
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops: Option<u64>,
    /// Operations that may exceed --iops after a time of rest; refills at that rate
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_burst: Option<u64>,
    /// Operations that may exceed --iops once; does not refill
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_one_time_burst: Option<u64>,
    /// Reads per second; 0 for no limit
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_read: Option<u64>,
    /// Reads that may exceed --iops-read after a time of rest
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_read_burst: Option<u64>,
    /// Reads that may exceed --iops-read once
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_read_one_time_burst: Option<u64>,
    /// Writes, discards and zeroings per second; 0 for no limit
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_write: Option<u64>,
    /// Writes that may exceed --iops-write after a time of rest
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_write_burst: Option<u64>,
    /// Writes that may exceed --iops-write once
    #[arg(long, value_name = "N", value_parser = parse_count)]
    #[serde(deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = count_schema)]
    pub iops_write_one_time_burst: Option<u64>,
    /// Bytes per second, reads and writes together (100M, 1GB/s); 0 for no limit
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps: Option<u64>,
    /// Bytes that may exceed --bps after a time of rest
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_burst: Option<u64>,
    /// Bytes that may exceed --bps once
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_one_time_burst: Option<u64>,
    /// Bytes read per second; 0 for no limit
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_read: Option<u64>,
    /// Bytes read that may exceed --bps-read after a time of rest
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_read_burst: Option<u64>,
    /// Bytes read that may exceed --bps-read once
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_read_one_time_burst: Option<u64>,
    /// Bytes written per second; 0 for no limit
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_write: Option<u64>,
    /// Bytes written that may exceed --bps-write after a time of rest
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_write_burst: Option<u64>,
    /// Bytes written that may exceed --bps-write once
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub bps_write_one_time_burst: Option<u64>,
    /// An operation of more bytes than this counts as several; 0 turns it off
    #[arg(long, value_name = "BYTES", value_parser = parse_byte_rate)]
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = bytes_schema)]
    pub iops_size: Option<u64>,
    /// Count what the limits would delay, and delay nothing (--dry-run=false ends it)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
}

impl LimitChange {
    /// Changes `limits`. An error when a burst has no rate to belong to; `limits` is then as it was.
    pub fn apply(&self, limits: &mut Limits) -> Result<(), Problem> {
        let mut new = *limits;
        let set = |name: &str, rate: &mut Rate, values: [Option<u64>; 3]| {
            let [per_second, burst, one_time] = values;
            rate.per_second = per_second.unwrap_or(rate.per_second);
            rate.burst = burst.unwrap_or(rate.burst);
            rate.one_time_burst = one_time.unwrap_or(rate.one_time_burst);
            if rate.per_second > 0 {
                return Ok(());
            }
            if burst.is_some_and(|n| n > 0) || one_time.is_some_and(|n| n > 0) {
                let option = name.replace('_', "-");
                return Err(Problem::invalid(format!(
                    "a burst of {name} is given, and no rate: it says how far a rate may be exceeded; \
                     give {name} (--{option}) as well"
                )));
            }
            *rate = Rate::default();
            Ok(())
        };
        set("iops", &mut new.iops_total, [self.iops, self.iops_burst, self.iops_one_time_burst])?;
        set(
            "iops_read",
            &mut new.iops_read,
            [self.iops_read, self.iops_read_burst, self.iops_read_one_time_burst],
        )?;
        set(
            "iops_write",
            &mut new.iops_write,
            [self.iops_write, self.iops_write_burst, self.iops_write_one_time_burst],
        )?;
        set("bps", &mut new.bps_total, [self.bps, self.bps_burst, self.bps_one_time_burst])?;
        set(
            "bps_read",
            &mut new.bps_read,
            [self.bps_read, self.bps_read_burst, self.bps_read_one_time_burst],
        )?;
        set(
            "bps_write",
            &mut new.bps_write,
            [self.bps_write, self.bps_write_burst, self.bps_write_one_time_burst],
        )?;
        new.iops_size = self.iops_size.unwrap_or(new.iops_size);
        new.dry_run = self.dry_run.unwrap_or(new.dry_run);
        *limits = new;
        Ok(())
    }

    /// The limits that this change makes of none.
    pub fn to_limits(&self) -> Result<Limits, Problem> {
        let mut limits = Limits::default();
        self.apply(&mut limits)?;
        Ok(limits)
    }

    /// True when it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == LimitChange::default()
    }
}

impl From<&Limits> for LimitChange {
    fn from(limits: &Limits) -> LimitChange {
        let some = |n: u64| (n > 0).then_some(n);
        let rate = |rate: &Rate| (some(rate.per_second), some(rate.burst), some(rate.one_time_burst));
        let (iops, iops_burst, iops_one_time_burst) = rate(&limits.iops_total);
        let (iops_read, iops_read_burst, iops_read_one_time_burst) = rate(&limits.iops_read);
        let (iops_write, iops_write_burst, iops_write_one_time_burst) = rate(&limits.iops_write);
        let (bps, bps_burst, bps_one_time_burst) = rate(&limits.bps_total);
        let (bps_read, bps_read_burst, bps_read_one_time_burst) = rate(&limits.bps_read);
        let (bps_write, bps_write_burst, bps_write_one_time_burst) = rate(&limits.bps_write);
        LimitChange {
            iops,
            iops_burst,
            iops_one_time_burst,
            iops_read,
            iops_read_burst,
            iops_read_one_time_burst,
            iops_write,
            iops_write_burst,
            iops_write_one_time_burst,
            bps,
            bps_burst,
            bps_one_time_burst,
            bps_read,
            bps_read_burst,
            bps_read_one_time_burst,
            bps_write,
            bps_write_burst,
            bps_write_one_time_burst,
            iops_size: some(limits.iops_size),
            dry_run: limits.dry_run.then_some(true),
        }
    }
}

/// The largest rate, burst or size that can be given: far above what hardware does, and no arithmetic on it overflows.
const QUANTITY_MAX: u64 = 1 << 50;

/// A number, or a text with a unit.
struct Quantity(fn(&str) -> Result<u64, formats::size::SizeError>, &'static str);

impl Visitor<'_> for Quantity {
    type Value = u64;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.1)
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<u64, E> {
        match value {
            0..=QUANTITY_MAX => Ok(value),
            _ => Err(E::custom(format!("{value} is too large: the largest value is {QUANTITY_MAX}"))),
        }
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
    }

    /// JSON knows no difference between 5 and 5.0.
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<u64, E> {
        if value.fract() == 0.0 && (0.0..=QUANTITY_MAX as f64).contains(&value) {
            Ok(value as u64)
        } else {
            Err(E::invalid_value(serde::de::Unexpected::Float(value), &self))
        }
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<u64, E> {
        let value = (self.0)(text).map_err(E::custom)?;
        self.visit_u64(value)
    }
}

fn count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    from.deserialize_any(Quantity(parse_count, "a number of operations, like 500 or \"20k\"")).map(Some)
}

fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    from.deserialize_any(Quantity(parse_byte_rate, "a number of bytes, like 1048576 or \"100M\"")).map(Some)
}

/// A size in bytes in the configuration: a number, or a text with a unit.
pub fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    from.deserialize_any(Quantity(formats::size::parse_size, "a size in bytes, like 1048576 or \"64M\""))
        .map(Some)
        .map_err(D::Error::custom)
}

/// What is certainly taken as text; fractions and more units are as well ([`formats::size`]).
const QUANTITY_PATTERN: &str = "^([0-9]{1,15}|[0-9]{1,6}[kMG])$";

fn quantity_schema(description: &str, pattern: &str) -> utoipa::openapi::schema::Schema {
    use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
    OneOfBuilder::new()
        .description(Some(description))
        .item(ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0)).maximum(Some(QUANTITY_MAX)))
        .item(ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern)))
        .into()
}

fn count_schema() -> utoipa::openapi::schema::Schema {
    quantity_schema("Operations (per second, or of a burst); letters are powers of 1000.", QUANTITY_PATTERN)
}

fn bytes_schema() -> utoipa::openapi::schema::Schema {
    quantity_schema("Bytes (per second, or of a burst); letters are powers of 1024.", QUANTITY_PATTERN)
}

#[cfg(test)]
mod tests {
    //! Goal: the three notations of a limit mean the same. Method: known values, and a round trip.

    use super::*;

    #[test]
    fn zero_removes_a_limit_with_its_bursts() {
        let mut limits = Limits::default();
        let set = LimitChange { iops: Some(500), iops_burst: Some(100), ..Default::default() };
        set.apply(&mut limits).unwrap();
        assert_eq!(limits.iops_total, Rate { per_second: 500, burst: 100, one_time_burst: 0 });
        LimitChange { bps: Some(1 << 20), ..Default::default() }.apply(&mut limits).unwrap();
        assert_eq!(limits.iops_total.per_second, 500, "another limit is left alone");
        LimitChange { iops: Some(0), ..Default::default() }.apply(&mut limits).unwrap();
        assert_eq!(limits.iops_total, Rate::default());
        assert_eq!(LimitChange::from(&limits), LimitChange { bps: Some(1 << 20), ..Default::default() });
    }

    #[test]
    fn a_burst_needs_a_rate() {
        let mut limits = Limits { iops_size: 4096, ..Limits::default() };
        let before = limits;
        let change = LimitChange { bps_read_burst: Some(1), iops_size: Some(1), ..Default::default() };
        let problem = change.apply(&mut limits).unwrap_err();
        assert!(problem.message.contains("--bps-read"), "{problem}");
        assert_eq!(limits, before);
    }

    #[test]
    fn json_takes_numbers_and_units_and_refuses_the_rest() {
        let change: LimitChange =
            serde_json::from_str(r#"{"iops": "20k", "bps": "1M", "iops_read": 7}"#).unwrap();
        assert_eq!((change.iops, change.bps, change.iops_read), (Some(20_000), Some(1 << 20), Some(7)));
        for bad in
            [r#"{"iops": -1}"#, r#"{"iops": 1.5}"#, r#"{"iops": "x"}"#, r#"{"ips": 1}"#, r#"{"iops": null}"#]
        {
            assert!(serde_json::from_str::<LimitChange>(bad).is_err(), "{bad}");
        }
    }
}
