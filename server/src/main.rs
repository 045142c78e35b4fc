//! The program `blktapd`: parses the command line and calls the library.

use std::path::PathBuf;
use std::process::ExitCode;

use blktapd::args::{Cli, Command};
use blktapd::problem::Problem;
use clap::Parser;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => blktapd::serve::serve(*args),
        Command::Ctl(args) => Ok(blktapd::client::ctl(*args)),
        Command::Doctor { dirs, json } => Ok(doctor(&dirs, json)),
        Command::Generate { what } => blktapd::generate::generate(&what).map(|()| 0),
    };
    match result {
        Ok(code) => code.into(),
        Err(Problem { kind, message }) => {
            // clap's own word for wrong usage is 2; everything else that stops the daemon is 1.
            eprintln!("blktapd: {message}");
            let code = Problem { kind, message }.exit_code();
            ExitCode::from(if code == 2 { 2 } else { 1 })
        }
    }
}

/// Checks the host and prints what was found.
fn doctor(dirs: &[PathBuf], json: bool) -> u8 {
    let report = blktapd::files::doctor::examine(dirs);
    let text = match json {
        true => serde_json::to_string_pretty(&report).unwrap_or_default() + "\n",
        false => report.to_string(),
    };
    // A reader that closes its end early is no error.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    report.exit_code()
}
