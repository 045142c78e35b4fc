//! Results on standard output: lines for people, or JSON.

use std::io::Write;

use formats::size::format_size;

use super::failure::Failure;

/// Prints a result in one of its two forms.
///
/// # Errors
/// Standard output cannot be written (a reader that has gone is no error).
pub fn print(json: bool, value: &serde_json::Value, text: &str) -> Result<(), Failure> {
    if json {
        let mut pretty = serde_json::to_string_pretty(value).unwrap_or_default();
        pretty.push('\n');
        return write(&pretty);
    }
    write(text)
}

/// Writes text as it is.
///
/// # Errors
/// As for [`print`].
pub fn write(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// A number of bytes for people.
pub fn bytes(bytes: u64) -> String {
    let short = format_size(bytes);
    if short == bytes.to_string() { format!("{bytes} bytes") } else { format!("{short} ({bytes} bytes)") }
}
