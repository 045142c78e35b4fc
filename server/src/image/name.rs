//! Images as they are named on the command line: the one grammar, with the formats that have a driver.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use formats::crypt::source::KeySources;
use formats::driver::Format;
use formats::registry;
use formats::spec::NamedImage;

/// A named image: nothing has been opened.
#[derive(Clone)]
pub struct ImageName {
    /// Its format.
    pub format: &'static dyn Format,
    /// Absolute.
    pub path: PathBuf,
    /// It was typed as an absolute path.
    pub typed_absolute: bool,
    /// A snapshot inside it.
    pub snapshot: Option<String>,
    /// Through the page cache.
    pub buffered: bool,
    /// Where the keys of encrypted images are: of it, and of what is below it.
    pub keys: KeySources,
}

impl fmt::Debug for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.format.name(), self.path.display())
    }
}

impl FromStr for ImageName {
    type Err = String;

    fn from_str(text: &str) -> Result<ImageName, String> {
        let base = std::env::current_dir().map_err(|error| format!("the current directory: {error}"))?;
        let image = NamedImage::parse_relative_to(text, &base).map_err(|error| error.to_string())?;
        let format = format(&image.type_name)?;
        let mut name = ImageName::plain(format, image.path);
        name.typed_absolute = text.split_once(':').is_some_and(|(_, path)| path.starts_with(['/', '%']));
        for (key, value) in image.options {
            let path = match KeySources::is_file_option(&key) && !value.is_empty() {
                true => base.join(&value).into_os_string().into_string(),
                false => Ok(value.clone()),
            };
            let path = path.map_err(|path| format!("{path:?} is not UTF-8"))?;
            if name.keys.take(&key, &path)? {
                continue;
            }
            match (key.as_str(), value.as_str()) {
                ("snapshot", _) => name.snapshot = Some(value),
                ("cache", "none") => {}
                ("cache", "writeback" | "writethrough") => name.buffered = true,
                ("cache", _) => {
                    return Err(format!(
                        "option cache is {value:?}: expected none, writeback or writethrough"
                    ));
                }
                _ => {
                    return Err(format!(
                        "{key:?} is no option of images here: there are snapshot=NAME, cache=none|writeback|writethrough, \
                         key-file=PATH, key-credential=NAME and key-fd=N"
                    ));
                }
            }
        }
        Ok(name)
    }
}

impl ImageName {
    /// Without options.
    pub fn plain(format: &'static dyn Format, path: PathBuf) -> ImageName {
        ImageName {
            format,
            path,
            typed_absolute: true,
            snapshot: None,
            buffered: false,
            keys: KeySources::default(),
        }
    }

    /// The folder that relative paths in the image are relative to.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }
}

/// The format of a type's name.
///
/// # Errors
/// There is none, or it has no file.
pub fn format(name: &str) -> Result<&'static dyn Format, String> {
    // The grammar's other name for raw.
    let canonical = if name == "aio" { "raw" } else { name };
    if let Some(format) = registry::format(canonical) {
        return Ok(format);
    }
    let known: Vec<_> = registry::ALL.iter().map(|format| format.name()).collect();
    Err(match name {
        "ram" | "null" => format!("{name} has no file that a tool could work on: take {}", known.join(", ")),
        _ => format!("{name:?} is no type of images that this version works on: it has {}", known.join(", ")),
    })
}
