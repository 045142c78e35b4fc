//! The formats that this program knows: one line each.

use crate::driver::Format;

/// All formats with a driver.
pub static ALL: &[&dyn Format] =
    &[&crate::raw_driver::Raw, &crate::qcow2::Qcow2, &crate::vhd::Vhd, &crate::vmdk::Vmdk];

/// The format of a type name.
pub fn format(name: &str) -> Option<&'static dyn Format> {
    ALL.iter().copied().find(|format| format.name() == name)
}

/// The format that the first and last bytes of a file show; never raw.
pub fn recognise(head: &[u8], tail: &[u8]) -> Option<&'static dyn Format> {
    ALL.iter().copied().find(|format| format.recognises(head, tail))
}
