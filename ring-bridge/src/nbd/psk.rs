//! Files of pre-shared keys, as `psktool` of GnuTLS writes them: one `identity:hexkey` in each line.
//!
//! An identity that starts with `#` is itself in hexadecimal, as GnuTLS reads it. Keys never appear in a message.

use std::collections::HashMap;
use std::fmt;

/// Longest identity that OpenSSL takes, in bytes.
const IDENTITY_BYTES_MAX: usize = 256;
/// Shortest key that is accepted, in bytes.
const KEY_BYTES_MIN: usize = 16;
/// Longest key that OpenSSL takes, in bytes.
const KEY_BYTES_MAX: usize = 512;

/// Keys by identity.
#[derive(Default, PartialEq, Eq)]
pub(super) struct PskTable(HashMap<Vec<u8>, Vec<u8>>);

impl fmt::Debug for PskTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PskTable({} identities)", self.0.len())
    }
}

impl PskTable {
    /// Parses a file. The error names line, problem and remedy.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let (identity, key) = parse_line(line).map_err(|why| format!("line {}: {why}", index + 1))?;
            if keys.insert(identity, key).is_some() {
                return Err(format!("line {}: the identity was given before; keep one", index + 1));
            }
        }
        if keys.is_empty() {
            let remedy = "make one with: psktool --username NAME --pskfile FILE";
            return Err(format!("it holds no key; {remedy}"));
        }
        Ok(Self(keys))
    }

    pub fn key(&self, identity: &[u8]) -> Option<&[u8]> {
        self.0.get(identity).map(Vec::as_slice)
    }
}

fn parse_line(line: &str) -> Result<(Vec<u8>, Vec<u8>), String> {
    let Some((identity, key)) = line.trim_end().split_once(':') else {
        return Err("expected IDENTITY:HEXKEY, found no colon".into());
    };
    let identity = match identity.strip_prefix('#') {
        Some(hex) => from_hex(hex).ok_or("the identity behind # is not hexadecimal")?,
        None => identity.as_bytes().to_vec(),
    };
    if identity.is_empty() || identity.len() > IDENTITY_BYTES_MAX || identity.contains(&0) {
        return Err(format!("an identity has 1 to {IDENTITY_BYTES_MAX} bytes and no NUL"));
    }
    let key = from_hex(key).ok_or("the key is not hexadecimal (an even number of digits 0-9 a-f)")?;
    if !(KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len()) {
        return Err(format!("the key has {} bytes, expected {KEY_BYTES_MIN} to {KEY_BYTES_MAX}", key.len()));
    }
    Ok((identity, key))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| if let [high, low] = pair { Some(digit(*high)? << 4 | digit(*low)?) } else { None })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0F";

    /// Goal: the file of psktool is read, hexadecimal identities included. Method: one file with all kinds of lines.
    #[test]
    fn reads_what_psktool_writes() {
        let table = PskTable::parse(&format!("alice:{KEY}\n\n#626f62:{KEY}ff\r\n")).expect("valid");
        assert_eq!(table.key(b"alice"), Some(&(0..16).collect::<Vec<u8>>()[..]));
        assert_eq!(table.key(b"bob").map(<[u8]>::len), Some(17));
        assert_eq!(table.key(b"carol"), None);
    }

    /// Goal: a bad file is refused by line and reason, without its key. Method: one file for each reason.
    #[test]
    fn refuses_by_line() {
        let long = "a".repeat(257);
        for (text, why) in [
            ("\n \n".to_string(), "holds no key"),
            ("alice".into(), "line 1: expected IDENTITY:HEXKEY"),
            (format!("a:{KEY}\nb:0g"), "line 2: the key is not hexadecimal"),
            (format!("b:{KEY}0"), "the key is not hexadecimal"),
            ("b:00".into(), "the key has 1 bytes"),
            (format!("a:{KEY}\na:{KEY}"), "line 2: the identity was given before"),
            (format!(":{KEY}"), "an identity has 1 to 256 bytes"),
            (format!("{long}:{KEY}"), "an identity has 1 to 256 bytes"),
            (format!("#6:{KEY}"), "behind # is not hexadecimal"),
        ] {
            let error = PskTable::parse(&text).expect_err(&text);
            assert!(error.contains(why), "{text:?}: {error}");
            assert!(!error.contains(KEY));
        }
    }
}
