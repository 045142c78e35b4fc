//! Printing. A reader that closes its end early (`| head`) is no error.

use std::io::Write;

use serde::Serialize;

use super::Failure;

/// Prints lines to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let end = if text.ends_with('\n') || text.is_empty() { "" } else { "\n" };
    print_raw(&format!("{text}{end}"))
}

/// Prints exactly this to standard output.
pub fn print_raw(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure { message: format!("cannot print: {error}"), exit_code: 1 })
        }
        _ => Ok(()),
    }
}

/// Prints JSON.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure { message: format!("cannot print JSON: {error}"), exit_code: 1 })?;
    print(&text)
}

/// Prints an error.
pub fn error(message: &str) {
    // Nowhere left to tell that this failed.
    let _ = writeln!(std::io::stderr(), "blktapd: {message}");
}
