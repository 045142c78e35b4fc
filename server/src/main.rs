//! The program `blktapd`: parses the command line and calls the library.

use std::path::PathBuf;
use std::process::ExitCode;

use blktapd::args::{Cli, Command};
use blktapd::problem::Problem;
use clap::Parser;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    let result = match cli.command {
        Command::Serve(args) => blktapd::serve::serve(*args),
        Command::Ctl(args) => Ok(blktapd::client::ctl(*args)),
        Command::Image(args) => Ok(blktapd::image::image(*args)),
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

/// Prints what clap has to say: help, the version, or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    // With `image`, 2 is a finding.
    let is_image = std::env::args_os().nth(1).is_some_and(|command| command == "image");
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if is_image => ExitCode::from(blktapd::image::USAGE),
        code => ExitCode::from(u8::try_from(code).unwrap_or(2)),
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
