//! `blktapd image`: the offline tools on the command line. Opens files and chains, makes new files, shows progress and prints
//! results; what is done to images is [`formats::tools`].
//!
//! ```text
//! args ─▶ name (TYPE:PATH) ─▶ chain (gate, locks) ─▶ engine (a ring without clients) ─▶ formats::tools
//!                          └▶ target (new files appear whole or not at all)
//! ```
//! Only results go to standard output; everything else, to standard error.

pub mod args;
mod chain;
mod copy;
mod engine;
mod failure;
mod file;
mod inspect;
mod make;
mod name;
mod output;
mod overlay;
mod progress;
mod target;
mod threads;

use args::{ImageArgs, ImageCommand};
use chain::Gate;
use failure::Failure;
pub use failure::USAGE;
pub use name::ImageName;

/// Runs a command; the answer is its exit code.
pub fn image(args: ImageArgs) -> u8 {
    let failed = failed_code(&args.command);
    match run(args) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("blktapd image: {failure}");
            if failure.is_usage { USAGE } else { failed }
        }
    }
}

/// What a command that could not do its work ends with.
fn failed_code(command: &ImageCommand) -> u8 {
    match command {
        ImageCommand::Compare { .. } => 2,
        _ => 1,
    }
}

fn run(args: ImageArgs) -> Result<u8, Failure> {
    let gate = Gate::new(&args.allow_device, &args.run_dir)?;
    let json = args.json;
    match args.command {
        ImageCommand::Create(args) => make::create(&args, &gate, json),
        ImageCommand::Info { image, chain, force_share } => {
            inspect::info(&image, chain, force_share, &gate, json)
        }
        ImageCommand::Check { image } => inspect::check(&image, None, &gate, json),
        ImageCommand::Repair { image, leaks } => {
            let repair = if leaks { formats::driver::Repair::Leaks } else { formats::driver::Repair::All };
            inspect::check(&image, Some(repair), &gate, json)
        }
        ImageCommand::Convert(args) => copy::convert(&args, &gate, json),
        ImageCommand::Snapshot(args) => make::snapshot(&args, &gate, json),
        ImageCommand::Coalesce(args) => overlay::coalesce(&args, &gate, json),
        ImageCommand::Rebase(args) => overlay::rebase(&args, &gate, json),
        ImageCommand::Resize { image, size, shrink } => overlay::resize(&image, size, shrink, &gate, json),
        ImageCommand::Map { image, start, length } => inspect::map(&image, start, length, &gate, json),
        ImageCommand::Compare { one, two, strict } => inspect::compare(&one, &two, strict, &gate, json),
        ImageCommand::Measure(args) => inspect::measure(&args, &gate, json),
        ImageCommand::Dd(args) => copy::dd(&args, &gate, json),
    }
}
