//! What an image says of its parent, and what a new overlay says of its own: the rules that the daemon and the offline tools have in
//! common. Nothing is opened here. Which files may be opened at all is the gate of each: `images::chain` for the daemon, where a
//! guest may have written the names, and `image::chain` for an operator's command.
//!
//! - The type of a parent is the one that the image states; raw is never guessed.
//! - A relative path is relative to the folder of the image that has it.
//! - A parent that has another identity than the child remembers is another image, whatever its name is.
//! - A parent is a file: a snapshot inside an image has no name that could be recorded.
//! - A chain has at most [`DEPTH_MAX`] images.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use formats::driver::{Description, Format, Identity, Link};
use formats::registry;
use formats::volume::DEPTH_MAX;

/// What to do about a parent that is not the right one.
pub fn advice(child: impl Display) -> String {
    format!("give it the right one with `blktapd image rebase --unsafe --parent TYPE:PATH {child}`")
}

/// The format of a type's name, also by the names that other programs have for ours. `None` when it is not built in.
pub fn named_format(name: &str) -> Option<&'static dyn Format> {
    registry::format(match name {
        "aio" => "raw",
        "vpc" => "vhd",
        other => other,
    })
}

/// The format of the parent that `link` of `child` names.
///
/// # Errors
/// The image does not say, or names one that is not built in: what to say.
pub fn parent_format(link: &Link, child: impl Display) -> Result<&'static dyn Format, String> {
    let Some(name) = &link.format else {
        let path = link.paths.first().map_or("", String::as_str);
        return Err(format!(
            "{child} does not say of which type its parent {path:?} is, and raw is never guessed: {}",
            advice(&child)
        ));
    };
    named_format(name).ok_or_else(|| {
        let known: Vec<_> = registry::ALL.iter().map(|format| format.name()).collect();
        format!(
            "{child}: its parent is of type {name:?}, which is not built in; there are {}",
            known.join(", ")
        )
    })
}

/// The file that `text` means in the image at `child`.
///
/// # Errors
/// It is no name of a file: what to say.
pub fn resolve(text: &str, child: &Path) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') {
        return Err(format!("{} refers to a file without a name", child.display()));
    }
    // An absolute path replaces the folder.
    Ok(child.parent().unwrap_or(Path::new("/")).join(text))
}

/// Whether `found`, at `parent`, is what `link` of `child` expects. `modified` is when the parent's file was changed last, in seconds
/// since 1970, if that is known. The answer is something to tell the operator, if there is anything.
///
/// # Errors
/// It is another image: what to say.
pub fn check_identity(
    link: &Link,
    found: Option<Identity>,
    modified: Option<u64>,
    (child, parent): (impl Display, impl Display),
) -> Result<Option<String>, String> {
    let (Some(expected), Some(found)) = (link.identity, found) else { return Ok(None) };
    let hex = |uuid: [u8; 16]| format!("{:032x}", u128::from_be_bytes(uuid));
    if expected.uuid != found.uuid {
        return Err(format!(
            "{parent} is another image than the one that {child} was made over, or was made anew: it has the identity {}, and {} is \
             expected; {}",
            hex(found.uuid),
            hex(expected.uuid),
            advice(&child)
        ));
    }
    Ok(match (expected.modified, modified) {
        (Some(expected), Some(found)) if expected != found => Some(format!(
            "{parent}: its time of modification ({found}) is not the one that {child} remembers ({expected})"
        )),
        _ => None,
    })
}

/// What to say of a parent that none of the link's paths leads to.
pub fn missing(link: &Link, child: impl Display, tried: &[PathBuf]) -> String {
    let tried: Vec<_> = tried.iter().map(|path| path.display().to_string()).collect();
    match link.paths.is_empty() {
        true => format!("{child} has a parent and does not say where: {}", advice(&child)),
        false => format!(
            "the parent of {child} is missing: there is no {}; {}",
            tried.join(", nor "),
            advice(&child)
        ),
    }
}

/// Whether one more image can lie below `above` images of the chain of `top`.
///
/// # Errors
/// There are too many: what to say.
pub fn check_depth(above: usize, top: impl Display) -> Result<(), String> {
    if above < DEPTH_MAX {
        return Ok(());
    }
    Err(format!(
        "{top}: its chain has more than {DEPTH_MAX} images: shorten it with `blktapd image coalesce`"
    ))
}

/// Whether an image can be recorded as the parent of another one: not a snapshot inside of it.
///
/// # Errors
/// It cannot: what to say.
pub fn check_parent(parent: impl Display, snapshot: Option<&str>) -> Result<(), String> {
    match snapshot {
        None => Ok(()),
        Some(snapshot) => Err(format!(
            "{parent}: its snapshot {snapshot:?} cannot be a parent: an overlay names the file alone, and would be over its active \
             state; make an image of the snapshot first (`blktapd image convert`)"
        )),
    }
}

/// How an image in the folder `from` names the file at the absolute `path` relatively; symbolic links on the way are followed.
pub fn relative(path: &Path, from: &Path) -> Option<String> {
    let name = path.file_name()?;
    let to = path.parent()?.canonicalize().ok()?;
    let from = from.canonicalize().ok()?;
    let common = to.components().zip(from.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| "..".as_ref());
    let down = to.components().skip(common);
    let mut relative: PathBuf = up.chain(down.map(|part| part.as_os_str())).collect();
    relative.push(name);
    relative.into_os_string().into_string().ok()
}

/// Bytes of the disk that an image serves: of its active state, or of a snapshot inside it as it was then.
///
/// # Errors
/// There is no such snapshot: what to say.
pub fn disk_size(
    image: impl Display,
    description: &Description,
    snapshot: Option<(&str, &[formats::driver::Snapshot])>,
) -> Result<u64, String> {
    let Some((wanted, all)) = snapshot else { return Ok(description.size) };
    let Some(found) = formats::driver::Snapshot::find(all, wanted) else {
        let names: Vec<_> = all.iter().map(|one| one.name.as_str()).take(20).collect();
        return Err(format!("{image} has no snapshot {wanted:?}; it has: {}", names.join(", ")));
    };
    let size = found.size.unwrap_or(description.size);
    let rounded = size.checked_next_multiple_of(512);
    rounded.ok_or_else(|| format!("{image}: its snapshot {wanted:?} says that it has {size} bytes"))
}

#[cfg(test)]
mod tests {
    //! Goal: each rule holds and says what to do. Method: links and descriptions made by hand, right ones and wrong ones.

    use super::*;
    use formats::driver::Snapshot;

    fn link(format: Option<&str>) -> Link {
        let identity = Some(Identity { uuid: [1; 16], modified: Some(7) });
        Link { paths: vec!["a".into()], format: format.map(str::to_owned), identity }
    }

    #[test]
    fn a_type_is_stated_and_built_in() {
        for (name, expected) in [("raw", "raw"), ("vpc", "vhd"), ("vhd", "vhd"), ("qcow2", "qcow2")] {
            assert_eq!(parent_format(&link(Some(name)), "c").unwrap().name(), expected);
        }
        for (name, words) in
            [(None, ["c", "raw is never guessed", "rebase"]), (Some("vmdk"), ["c", "vmdk", "not built in"])]
        {
            let error = parent_format(&link(name), "c").err().unwrap();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn paths_are_seen_from_the_image() {
        let at = |text| resolve(text, Path::new("/d/e/child")).ok();
        assert_eq!(at("a"), Some("/d/e/a".into()));
        assert_eq!(at("../a"), Some("/d/e/../a".into()));
        assert_eq!(at("/a"), Some("/a".into()));
        assert_eq!((at(""), at("a\0b")), (None, None));
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("x/y")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("x/y"), dir.path().join("link")).unwrap();
        let seen = |path: &str, from: &str| relative(&dir.path().join(path), &dir.path().join(from));
        assert_eq!(seen("a", "x/y").as_deref(), Some("../../a"));
        assert_eq!(seen("link/a", "x").as_deref(), Some("y/a"));
        assert_eq!(seen("none/a", "x"), None);
    }

    #[test]
    fn another_identity_is_another_image_and_another_time_is_told() {
        let found = |byte| Some(Identity { uuid: [byte; 16], modified: None });
        let check = |found, modified| check_identity(&link(None), found, modified, ("c", "p"));
        assert_eq!(check(found(1), Some(7)), Ok(None));
        assert_eq!(check(found(1), None), Ok(None));
        assert_eq!(check(None, Some(8)), Ok(None));
        assert!(check(found(1), Some(8)).unwrap().is_some_and(|note| note.contains("time")));
        let error = check(found(2), Some(7)).unwrap_err();
        assert!(["another image", "identity", "rebase"].iter().all(|word| error.contains(word)), "{error}");
    }

    #[test]
    fn a_snapshot_has_its_own_size_and_is_no_parent() {
        let one = |id: &str, name: &str, size| {
            let (id, name) = (id.to_owned(), name.to_owned());
            Snapshot { id, name, size, created: 0, machine_bytes: 0 }
        };
        let description = Description {
            size: 4096,
            backing: None,
            data_files: Vec::new(),
            identity: None,
            writable: Ok(()),
            encryption: None,
            properties: Vec::new(),
        };
        // The second one's identifier is the first one's name.
        let all = [one("1", "2", Some(512)), one("2", "b", Some(1000)), one("3", "old", None)];
        let size = |wanted| disk_size("i", &description, Some((wanted, &all[..])));
        assert_eq!(disk_size("i", &description, None), Ok(4096));
        assert_eq!(["1", "2", "b", "old"].map(size), [Ok(512), Ok(1024), Ok(1024), Ok(4096)]);
        assert!(size("none").unwrap_err().contains("it has: 2, b, old"));
        let large = [one("1", "a", Some(u64::MAX))];
        assert!(disk_size("i", &description, Some(("a", &large))).is_err());
        assert!(check_parent("i", None).is_ok() && check_parent("i", Some("a")).is_err());
        assert!(check_depth(DEPTH_MAX - 1, "i").is_ok() && check_depth(DEPTH_MAX, "i").is_err());
    }
}
