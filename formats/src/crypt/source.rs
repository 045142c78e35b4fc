//! Where keys come from: options of an image's specification.
//!
//! | option | key |
//! |---|---|
//! | `key-file=/PATH` | the bytes of a file, as they are |
//! | `key-credential=NAME` | a credential that systemd gives the program (`LoadCredential=`, `$CREDENTIALS_DIRECTORY`) |
//! | `key-fd=N` | what an open descriptor of the program gives until its end; for `blktapd image` only |
//!
//! It is for every encrypted image of the chain. With a number behind it (`key-file-1=`) it is for one: 0 is the image itself, 1 the
//! one below, and so on; that goes before the one for all. A specification has no key itself: it is seen in process lists, logs and
//! state files.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::volume::DEPTH_MAX;

/// The place of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file; absolute.
    File(PathBuf),
    /// A credential of systemd.
    Credential(String),
    /// A descriptor.
    Descriptor(i32),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeySource::File(path) => write!(f, "{}", path.display()),
            KeySource::Credential(name) => write!(f, "credential {name}"),
            KeySource::Descriptor(number) => write!(f, "descriptor {number}"),
        }
    }
}

/// The places of the keys of a chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySources {
    all: Option<KeySource>,
    of_layer: BTreeMap<usize, KeySource>,
}

/// The kind of an option and the image it is for.
fn kind_of(option: &str) -> Option<(&'static str, Option<usize>)> {
    KeySources::KINDS.iter().find_map(|kind| {
        let rest = option.strip_prefix(kind)?;
        match rest.strip_prefix('-') {
            None if rest.is_empty() => Some((*kind, None)),
            // One way to write a number.
            Some(number) => {
                let layer = number.parse::<usize>().ok().filter(|layer| layer.to_string() == number)?;
                Some((*kind, Some(layer)))
            }
            None => None,
        }
    })
}

impl KeySources {
    /// The kinds of options, without a number.
    pub const KINDS: [&str; 3] = ["key-file", "key-credential", "key-fd"];

    /// The options that name the same keys when one more image is on top. `encrypted` says of each image of the chain as it is whether it
    /// is.
    pub fn carried(&self, encrypted: &[bool]) -> Vec<(String, String)> {
        let layers = encrypted.iter().enumerate().filter(|(_, is)| **is);
        let named = layers.filter_map(|(layer, _)| Some((layer + 1, self.of(layer)?)));
        named
            .map(|(layer, source)| match source {
                KeySource::File(path) => (format!("key-file-{layer}"), path.display().to_string()),
                KeySource::Credential(name) => (format!("key-credential-{layer}"), name.clone()),
                KeySource::Descriptor(number) => (format!("key-fd-{layer}"), number.to_string()),
            })
            .collect()
    }

    /// Whether an option of a specification names a key.
    pub fn is_option(option: &str) -> bool {
        kind_of(option).is_some()
    }

    /// Whether an option of a specification is the path of a key's file.
    pub fn is_file_option(option: &str) -> bool {
        kind_of(option).is_some_and(|(kind, _)| kind == "key-file")
    }

    /// Takes an option. False: it names no key.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn take(&mut self, option: &str, value: &str) -> Result<bool, String> {
        let Some((kind, layer)) = kind_of(option) else { return Ok(false) };
        let source = match kind {
            "key-file" if value.starts_with('/') && !value.contains(char::is_control) => {
                KeySource::File(value.into())
            }
            "key-file" => return Err(format!("option {option} is {value:?}: expected an absolute path")),
            "key-credential" => {
                let plain = |c: char| c.is_ascii_alphanumeric() || "._-@:".contains(c);
                if value.is_empty() || value.starts_with('.') || !value.chars().all(plain) {
                    return Err(format!("option {option} is {value:?}: expected the name of a credential"));
                }
                KeySource::Credential(value.to_owned())
            }
            _ => {
                let number = value.parse().ok().filter(|number| *number >= 0);
                let what = || format!("option {option} is {value:?}: expected the number of a descriptor");
                KeySource::Descriptor(number.ok_or_else(what)?)
            }
        };
        let twice = match layer {
            None => self.all.replace(source).is_some(),
            Some(layer) if layer >= DEPTH_MAX => {
                return Err(format!("option {option}: a chain has at most {DEPTH_MAX} images, from 0 on"));
            }
            Some(layer) => self.of_layer.insert(layer, source).is_some(),
        };
        if twice {
            return Err(format!("option {option}: there is another key for the same image: give one"));
        }
        Ok(true)
    }

    /// No key is named.
    pub fn is_empty(&self) -> bool {
        self.all.is_none() && self.of_layer.is_empty()
    }

    /// The place of the key of image number `layer`, 0 is the first.
    pub fn of(&self, layer: usize) -> Option<&KeySource> {
        self.of_layer.get(&layer).or(self.all.as_ref())
    }

    /// Checks that every key has an image to open: `encrypted` says of each image of the chain whether it is.
    ///
    /// # Errors
    /// A key that opens nothing: what to say.
    pub fn check_used(&self, encrypted: &[bool]) -> Result<(), String> {
        if let Some((layer, source)) =
            self.of_layer.iter().find(|(layer, _)| !encrypted.get(**layer).is_some_and(|is| *is))
        {
            return Err(format!(
                "the key from {source} is for image {layer} of the chain, which is not encrypted or not there; 0 is the first"
            ));
        }
        match &self.all {
            Some(source) if !encrypted.contains(&true) => {
                Err(format!("the key from {source} opens nothing: no image of the chain is encrypted"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: an option means one key for one image or for all, and what makes no sense is refused. Method: a table.

    use super::*;

    #[test]
    fn options_name_keys() {
        let mut keys = KeySources::default();
        assert!(keys.is_empty());
        for (option, value) in [("key-file", "/k"), ("key-credential-2", "disk.key"), ("key-fd-0", "3")] {
            assert_eq!((KeySources::is_option(option), keys.take(option, value)), (true, Ok(true)));
        }
        assert_eq!(keys.of(0), Some(&KeySource::Descriptor(3)));
        assert_eq!(keys.of(1), Some(&KeySource::File("/k".into())));
        assert_eq!(keys.of(2), Some(&KeySource::Credential("disk.key".into())));
        let carried = [("key-fd-1", "3"), ("key-credential-3", "disk.key")];
        assert_eq!(keys.carried(&[true, false, true]), carried.map(|(a, b)| (a.to_owned(), b.to_owned())));
        assert_eq!(keys.take("snapshot", "a"), Ok(false));
        for (option, value) in [
            ("key-file", "/other"),
            ("key-fd-2", "4"),
            ("key-file-3", "relative"),
            ("key-file-3", ""),
            ("key-credential-3", "../x"),
            ("key-credential-3", ""),
            ("key-fd-3", "-1"),
            ("key-fd-3", "x"),
            ("key-file-64", "/k"),
        ] {
            assert!(keys.take(option, value).is_err(), "{option}={value}");
        }
        for option in ["key", "key-files", "key-file-", "key-file-01", "key-file-x"] {
            assert!(!KeySources::is_option(option), "{option}");
        }
    }

    #[test]
    fn keys_that_open_nothing_are_told() {
        let keys = |options: &[(&str, &str)]| {
            let mut keys = KeySources::default();
            options.iter().for_each(|(option, value)| assert_eq!(keys.take(option, value), Ok(true)));
            keys
        };
        let all = keys(&[("key-file", "/k")]);
        assert!(all.check_used(&[false, true]).is_ok() && all.check_used(&[false]).is_err());
        let one = keys(&[("key-file-1", "/k")]);
        assert!(one.check_used(&[false, true]).is_ok());
        assert!(one.check_used(&[true, false]).is_err() && one.check_used(&[true]).is_err());
        assert!(KeySources::default().check_used(&[]).is_ok());
    }
}
