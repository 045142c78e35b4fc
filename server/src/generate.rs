//! `blktapd generate`: man pages, completions and the OpenAPI document, from the same definitions as the program.

use std::io::Write;
use std::path::Path;

use clap::CommandFactory;

use crate::args::{Cli, Generate};
use crate::problem::Problem;

/// Writes what was asked for.
pub fn generate(what: &Generate) -> Result<(), Problem> {
    let failed = |what: &str, error: &dyn std::fmt::Display| Problem::failed(format!("{what}: {error}"));
    match what {
        Generate::Man { out } => man(out),
        Generate::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "blktapd", &mut text);
            std::io::stdout()
                .write_all(&text)
                .map_err(|error| failed("the completions cannot be written", &error))
        }
        Generate::Openapi => {
            let text = crate::http::openapi()
                .to_pretty_json()
                .map_err(|error| failed("the description cannot be made", &error))?;
            writeln!(std::io::stdout(), "{text}")
                .map_err(|error| failed("the description cannot be written", &error))
        }
    }
}

fn man(out: &Path) -> Result<(), Problem> {
    std::fs::create_dir_all(out).and_then(|()| clap_mangen::generate_to(Cli::command(), out)).map_err(
        |error| Problem::failed(format!("the man pages cannot be written to {}: {error}", out.display())),
    )
}
