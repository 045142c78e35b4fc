//! The formats that this program knows: one line each.

use crate::driver::Format;

/// All formats with a driver.
pub static ALL: &[&dyn Format] = &[
    &crate::raw_driver::Raw,
    &crate::qcow2::Qcow2,
    &crate::vhd::Vhd,
    &crate::qcow::Qcow,
    &crate::crypt::luks::Luks,
];

/// The format of a type name.
pub fn format(name: &str) -> Option<&'static dyn Format> {
    ALL.iter().copied().find(|format| format.name() == name)
}

/// The format that the first and last bytes of a file show; never raw.
pub fn recognise(head: &[u8], tail: &[u8]) -> Option<&'static dyn Format> {
    ALL.iter().copied().find(|format| format.recognises(head, tail))
}

/// The name of a format that is known and has no driver, if the first bytes of a file show it.
pub fn foreign(head: &[u8]) -> Option<&'static str> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    let known: [(&str, bool); 5] = [
        ("vhdx", at(0, b"vhdxfile")),
        ("vdi", at(64, &0xbeda_107f_u32.to_le_bytes())),
        ("qed", at(0, b"QED\0")),
        ("parallels", at(0, b"WithoutFreeSpace")),
        ("parallels", at(0, b"WithouFreSpacExt")),
    ];
    known.iter().find(|(_, found)| *found).map(|(name, _)| *name)
}
