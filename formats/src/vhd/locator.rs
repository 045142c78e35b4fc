//! Parent locators: the paths by which a differencing disk names its parent.
//!
//! | code | what it holds |
//! |---|---|
//! | `W2ru` | relative path, UTF-16 little-endian, `.\parent.vhd` |
//! | `W2ku` | absolute path, UTF-16 little-endian, `C:\disks\parent.vhd`; XenServer writes relative ones here, too |
//! | `MacX` | file URL, UTF-8; XenServer writes `file://./parent.vhd` and does not encode anything |
//! | `Mac `, `Wi2r`, `Wi2k` | deprecated: aliases and paths of unknown encoding, not read |
//!
//! Paths come from an image, so from anybody: they are strings here, bounded in length and free of control characters, and it is
//! the opener's gate that decides what may be opened.

use super::header::LocatorEntry;

/// Windows' relative path.
pub const W2RU: [u8; 4] = *b"W2ru";
/// Windows' absolute path.
pub const W2KU: [u8; 4] = *b"W2ku";
/// File URL.
pub const MACX: [u8; 4] = *b"MacX";
/// Codes that may stand in an image.
pub const KNOWN: [[u8; 4]; 7] = [[0; 4], W2RU, W2KU, MACX, *b"Mac ", *b"Wi2r", *b"Wi2k"];
/// Longest encoded path that is read, in bytes: a path of 4096 characters in UTF-16.
pub const LEN_MAX: u32 = 8192;

/// How paths in `W2ru`, `W2ku` and the header's name are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Utf16 {
    /// Locators.
    LittleEndian,
    /// The header's name.
    BigEndian,
}

/// Decodes UTF-16 up to its end or first NUL. `None` when it is not UTF-16 or has control characters.
pub fn decode_utf16(bytes: &[u8], order: Utf16) -> Option<String> {
    let units = bytes.chunks_exact(2).map(|pair| match order {
        Utf16::LittleEndian => u16::from_le_bytes([pair[0], pair[1]]),
        Utf16::BigEndian => u16::from_be_bytes([pair[0], pair[1]]),
    });
    let text: String =
        char::decode_utf16(units.take_while(|unit| *unit != 0)).collect::<Result<_, _>>().ok()?;
    (!text.chars().any(char::is_control)).then_some(text)
}

/// Encodes UTF-16.
pub fn encode_utf16(text: &str, order: Utf16) -> Vec<u8> {
    text.encode_utf16()
        .flat_map(|unit| match order {
            Utf16::LittleEndian => unit.to_le_bytes(),
            Utf16::BigEndian => unit.to_be_bytes(),
        })
        .collect()
}

/// A Windows path as one of ours: separators turned, the drive's letter taken off. `None` for network paths.
fn from_windows(path: &str) -> Option<String> {
    let path = path.replace('\\', "/");
    if path.starts_with("//") {
        return None;
    }
    let without_drive = match path.as_bytes() {
        [letter, b':', b'/', ..] if letter.is_ascii_alphabetic() => &path[2..],
        _ => &path,
    };
    usable(without_drive)
}

/// A path of ours as Windows writes it; relative ones begin with `.\`.
fn to_windows(path: &str) -> String {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("./{}", plain(path)) };
    path.replace('/', "\\")
}

/// Without `./` at its start.
fn plain(path: &str) -> &str {
    path.strip_prefix("./").unwrap_or(path)
}

/// A path that can name a file.
fn usable(path: &str) -> Option<String> {
    let path = plain(path);
    (!path.is_empty() && !path.ends_with('/')).then(|| path.to_owned())
}

/// `%XX` decoded; `None` when there are none, or what comes out is no text.
fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains('%') {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let [high, low, after @ ..] = rest else { return None };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        bytes.push((digit(*high)? * 16 + digit(*low)?) as u8);
        rest = after;
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.chars().any(char::is_control)).then_some(text)
}

/// The paths that a locator of this platform names, best first; none when it cannot be read.
pub fn decode(platform: [u8; 4], bytes: &[u8]) -> Vec<String> {
    match platform {
        W2RU | W2KU => {
            let path = decode_utf16(bytes, Utf16::LittleEndian);
            path.and_then(|path| from_windows(&path)).into_iter().collect()
        }
        MACX => {
            let text = std::str::from_utf8(bytes).unwrap_or_default().trim_end_matches('\0');
            let Some(path) = text.strip_prefix("file://").filter(|path| !path.chars().any(char::is_control))
            else {
                return Vec::new();
            };
            let path = path.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(path);
            // XenServer encodes nothing, others do as URLs demand; the opener takes the one that exists.
            [usable(path), percent_decoded(path).and_then(|path| usable(&path))]
                .into_iter()
                .flatten()
                .collect()
        }
        _ => Vec::new(),
    }
}

/// Encodes a path for a platform.
pub fn encode(platform: [u8; 4], path: &str) -> Vec<u8> {
    match platform {
        MACX if path.starts_with('/') => format!("file://{path}").into_bytes(),
        MACX => format!("file://./{}", plain(path)).into_bytes(),
        _ => encode_utf16(&to_windows(path), Utf16::LittleEndian),
    }
}

/// The last part of a path, which is what the header's name field holds.
pub fn base_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// Which locators an image gets for the paths of its parent: XenServer's three, in its order. Its tools take all of them as
/// relative paths when they are; a `W2ku` that is absolute is what the specification says.
pub fn choose<'a>(paths: &'a [String]) -> Vec<([u8; 4], &'a str)> {
    let relative = paths.iter().find(|path| !path.starts_with('/')).map(String::as_str);
    let absolute = paths.iter().find(|path| path.starts_with('/')).map(String::as_str);
    let mut chosen: Vec<([u8; 4], &'a str)> = Vec::new();
    chosen.extend(relative.or(absolute).map(|path| (MACX, path)));
    chosen.extend(absolute.or(relative).map(|path| (W2KU, path)));
    chosen.extend(relative.map(|path| (W2RU, path)));
    chosen
}

/// Whether an entry can be read at all: known code, a length and space that make sense.
///
/// # Errors
/// What is wrong with it.
pub fn check_entry(entry: &LocatorEntry) -> Result<(), String> {
    let code = entry.platform.escape_ascii();
    if !KNOWN.contains(&entry.platform) {
        return Err(format!("has the unknown platform code \"{code}\""));
    }
    if entry.platform == [0; 4] {
        return Ok(());
    }
    let (len, space) = (entry.len.get(), entry.space_bytes());
    if len == 0 || len > LEN_MAX {
        return Err(format!("({code}) has a path of {len} bytes, from 1 to {LEN_MAX} are possible"));
    }
    match space {
        Some(space) if u64::from(len) <= space => Ok(()),
        _ => Err(format!("({code}) has a path of {len} bytes in a space of {}", entry.space.get())),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: paths of all platforms and creators are read, ours are written as others expect, garbage gives nothing.
    //! Method: tables of known answers; round trips and arbitrary bytes by property tests.

    use super::*;
    use proptest::prelude::*;

    fn wide(text: &str) -> Vec<u8> {
        encode_utf16(text, Utf16::LittleEndian)
    }

    #[test]
    fn paths_of_other_tools() {
        for (code, bytes, paths) in [
            (W2RU, wide(".\\parent.vhd"), vec!["parent.vhd"]),
            (W2RU, wide("..\\up\\p q.vhd\0\0"), vec!["../up/p q.vhd"]),
            (W2KU, wide("C:\\disks\\é.vhd"), vec!["/disks/é.vhd"]),
            (W2KU, wide(".\\xen.vhd"), vec!["xen.vhd"]),
            (W2KU, wide("\\\\server\\share\\p.vhd"), vec![]),
            (W2KU, wide("\\srv\\p.vhd"), vec!["/srv/p.vhd"]),
            (MACX, b"file://./parent.vhd".to_vec(), vec!["parent.vhd"]),
            (MACX, b"file:///srv/a%20b.vhd".to_vec(), vec!["/srv/a%20b.vhd", "/srv/a b.vhd"]),
            (MACX, b"file://localhost/srv/a.vhd".to_vec(), vec!["/srv/a.vhd"]),
            (MACX, b"http://x/a.vhd".to_vec(), vec![]),
            (MACX, b"file://a\nb".to_vec(), vec![]),
            (W2RU, wide(".\\"), vec![]),
            (W2RU, vec![0x00, 0xd8, 0x41, 0x00], vec![]),
            (*b"Mac ", b"file://a".to_vec(), vec![]),
        ] {
            assert_eq!(decode(code, &bytes), paths, "{} {bytes:?}", code.escape_ascii());
        }
    }

    #[test]
    fn written_as_xenserver_and_windows_expect() {
        assert_eq!(encode(MACX, "./p.vhd"), b"file://./p.vhd");
        assert_eq!(encode(W2RU, "p.vhd"), wide(".\\p.vhd"));
        assert_eq!(encode(W2KU, "/srv/p.vhd"), wide("\\srv\\p.vhd"));
        let both = ["../p.vhd".to_owned(), "/srv/p.vhd".to_owned()];
        assert_eq!(choose(&both), [(MACX, "../p.vhd"), (W2KU, "/srv/p.vhd"), (W2RU, "../p.vhd")]);
        assert_eq!(choose(&both[..1]), [(MACX, "../p.vhd"), (W2KU, "../p.vhd"), (W2RU, "../p.vhd")]);
        assert_eq!(choose(&both[1..]), [(MACX, "/srv/p.vhd"), (W2KU, "/srv/p.vhd")]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for code in KNOWN {
                for path in decode(code, &bytes) {
                    prop_assert!(!path.is_empty() && !path.chars().any(char::is_control));
                }
            }
        }

        #[test]
        fn paths_come_back(path in "/?([a-zé ]{1,8}/){0,3}[a-z.]{1,8}") {
            prop_assume!(!path.starts_with("./"));
            for code in [W2RU, W2KU, MACX] {
                prop_assert_eq!(&decode(code, &encode(code, &path))[0], &path);
            }
        }
    }
}
