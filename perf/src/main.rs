//! `blktapd-perf`: blktapd beside its peers, in one run.
#![allow(dead_code)]
mod cpus;
mod fio;
mod load;
mod proc;
mod servers;
mod stats;
mod stop;
fn main() {}
