//! `blktapd ctl`: a client of the API, and how its answers look to people.
//!
//! Everything it does, `curl --unix-socket` can do as well. Exit codes: see [`crate::problem::Problem::exit_code`], and 5 when no
//! daemon answers.

mod commands;
mod connection;
mod output;
mod tables;
mod top;

use crate::args::CtlArgs;

/// Exit code when no daemon answers.
pub const NO_DAEMON: u8 = 5;

/// Runs one command. The value is the exit code.
pub fn ctl(args: CtlArgs) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("cannot start: {error}"));
            return 1;
        }
    };
    match runtime.block_on(commands::run(args)) {
        Ok(code) => code,
        Err(failure) => {
            output::error(&failure.message);
            failure.exit_code
        }
    }
}

/// Why a command failed, and with which exit code.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// For the operator.
    pub message: String,
    /// For scripts.
    pub exit_code: u8,
}

impl From<crate::problem::Problem> for Failure {
    fn from(problem: crate::problem::Problem) -> Failure {
        Failure { exit_code: problem.exit_code(), message: problem.message }
    }
}
