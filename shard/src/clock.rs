//! Time inside a shard: one unit, one source. The real clock is CLOCK_MONOTONIC; the simulator has its own.

/// Nanoseconds since an arbitrary start (CLOCK_MONOTONIC on a real shard). 64 bits last for 584 years.
pub type Nanos = u64;

/// Nanoseconds in one second.
pub const SECOND: Nanos = 1_000_000_000;
/// Nanoseconds in one millisecond.
pub const MILLISECOND: Nanos = 1_000_000;
/// Nanoseconds in one microsecond.
pub const MICROSECOND: Nanos = 1_000;
