//! The parts of `blktapd` that tests reach: the program itself is `main.rs`.

pub mod files;
