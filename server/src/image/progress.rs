//! A bar for people who wait: on standard error, and only if that is a terminal.

use std::cell::RefCell;
use std::io::IsTerminal;

use formats::tools::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar, or nothing.
#[derive(Debug)]
pub struct Bar {
    what: &'static str,
    bar: RefCell<Option<ProgressBar>>,
}

impl Bar {
    /// A bar that is labelled `what`.
    pub fn new(what: &'static str) -> Bar {
        Bar { what, bar: RefCell::new(None) }
    }
}

impl Progress for Bar {
    fn begin(&self, total: u64) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::new(total);
        let template = "{msg} {bar:40} {percent:>3} % of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(self.what);
        self.bar.replace(Some(bar));
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.bar.borrow() {
            bar.inc(bytes);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
