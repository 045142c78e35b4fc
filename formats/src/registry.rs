//! The formats that this program knows: one line each.

use std::rc::Rc;

use crate::driver::{Description, Format};
use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;

/// Bytes at the start of a file that show what it is.
const HEAD_BYTES: u64 = 64 << 10;

/// All formats with a driver.
pub static ALL: &[&dyn Format] = &[
    &crate::raw_driver::Raw,
    &crate::vhd::Vhd,
    &crate::qcow2::Qcow2,
    &crate::qcow::Qcow,
    &crate::vmdk::Vmdk,
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

/// What an image says of itself; if it is none of `format`, the error also says what it is instead, where the file shows that.
///
/// # Errors
/// Those of [`Format::describe`].
pub async fn describe(format: &dyn Format, file: Rc<dyn ImageFile>) -> Result<Description, Error> {
    let mut error = match format.describe(file.clone()).await {
        Ok(description) => return Ok(description),
        Err(error) => error,
    };
    let length = file.length();
    let head = file.read(0, HEAD_BYTES.min(length) as usize).await?;
    let tail = file.read(length.saturating_sub(512), length.min(512) as usize).await?;
    if let Some(name) = foreign(&head) {
        error.kind = ErrorKind::Unsupported;
        error.message += &format!(
            "; it looks like an image of the format {name}, which this program does not have: convert it with `qemu-img convert`"
        );
    } else if let Some(found) = recognise(&head, &tail).filter(|found| found.name() != format.name()) {
        error.message += &format!("; it looks like {0}: write {0}:{1}", found.name(), file.name());
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    //! Goal: an image of a format without a driver is refused by its name, whatever it is opened as, and one with a driver is not.
    //! Method: the first bytes that these formats have, each asked as each format; an image of each of ours.

    use super::*;
    use crate::driver::Create;
    use crate::testing::{Pages, Store};

    #[test]
    fn foreign_images_are_refused_by_name() {
        let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
        vdi.resize(64, 0);
        vdi.extend_from_slice(&0xbeda_107fu32.to_le_bytes());
        let heads: [(&str, &[u8]); 5] = [
            ("vhdx", b"vhdxfile"),
            ("vdi", &vdi),
            ("qed", b"QED\0"),
            ("parallels", b"WithoutFreeSpace"),
            ("parallels", b"WithouFreSpacExt"),
        ];
        for (name, head) in heads {
            let mut bytes = head.to_vec();
            bytes.resize(70_000, 0);
            assert!(
                foreign(head).is_some_and(|found| found == name)
                    && recognise(&bytes, &bytes[69_488..]).is_none()
            );
            for format in ALL.iter().filter(|format| format.name() != "raw") {
                let store = Store::new(1);
                let file = store.add("a", Pages::of(&bytes));
                let error = store.run(describe(*format, file)).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Unsupported, "{error}");
                assert!(
                    error.message.contains(&format!("format {name},")) && error.message.contains("qemu-img"),
                    "{error}"
                );
            }
        }
        assert_eq!(foreign(b"vhdx"), None);
    }

    #[test]
    fn images_of_ours_say_what_they_are() {
        for made in ALL.iter().filter(|format| format.name() != "raw") {
            let store = Store::new(1);
            let file = store.add("a", Pages::empty());
            let key = (made.name() == "luks").then(|| crate::crypt::Secret::new(b"of a test".to_vec()));
            let create = Create { size: Some(4 << 20), backing: None, options: Vec::new(), key };
            store.run(made.create(file.clone(), Vec::new(), &create)).unwrap();
            let bytes = store.pages(0).bytes(0..65536.min(store.pages(0).length()));
            assert_eq!(foreign(&bytes), None);
            for asked in ALL.iter().filter(|format| format.name() != "raw") {
                let described = store.run(describe(*asked, file.clone()));
                match described {
                    Ok(_) => assert_eq!(asked.name(), made.name()),
                    Err(error) => {
                        assert!(error.message.contains(&format!("write {}:", made.name())), "{error}")
                    }
                }
            }
        }
    }
}
