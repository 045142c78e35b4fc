//! Keys of encrypted images, read from where an operator put them.
//!
//! A key is the bytes of its file as they are, with any newline at its end. Once the process has read one it makes no core dumps and
//! cannot be traced by others than root (PR_SET_DUMPABLE): a dump would have the keys, and the guests' data besides.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use formats::crypt::Secret;
use formats::crypt::secret::SECRET_MAX_BYTES;
use zeroize::Zeroizing;

/// Where systemd puts the credentials of the service (systemd.exec(5)).
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// The file of a credential.
///
/// # Errors
/// The service has none at all: what to say.
pub fn credential_path(name: &str) -> Result<PathBuf, String> {
    match std::env::var_os(CREDENTIALS) {
        Some(folder) => Ok(Path::new(&folder).join(name)),
        None => Err(format!(
            "there is no credential {name}: systemd has given none (no {CREDENTIALS}); add LoadCredential={name}:PATH to the unit, or use \
             key-file="
        )),
    }
}

/// The key that `file` has; `what` is its name for messages.
///
/// # Errors
/// It is empty, too long, or cannot be read: what to say.
pub fn read(mut file: impl Read, what: &str) -> Result<Secret, String> {
    forbid_dumps();
    // All of it at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; SECRET_MAX_BYTES + 1]);
    let mut len = 0;
    loop {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("{what}: the key cannot be read: {error}")),
        }
    }
    match len {
        0 => Err(format!("{what} is empty: a key has at least one byte")),
        len if len > SECRET_MAX_BYTES => {
            Err(format!("{what} is no key: it has more than {SECRET_MAX_BYTES} bytes"))
        }
        len => Ok(Secret::of(Zeroizing::new(bytes[..len].to_vec()))),
    }
}

/// The key in the file at `path`, which must be a regular file; `what` is its name for messages.
///
/// # Errors
/// As for [`read`], or there is no such file: what to say.
pub fn read_file(path: &Path, what: &str) -> Result<Secret, String> {
    let failed = |error: std::io::Error| format!("{what}: the key cannot be read: {error}");
    // Asked first: opening a FIFO would wait.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(format!("{what} is no regular file: a key is in one"));
    }
    read(File::open(path).map_err(failed)?, what)
}

fn forbid_dumps() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!("core dumps may have keys in them: {error}");
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a key is what is in its file, and nothing else is taken for one. Method: files of several lengths and kinds.

    use super::*;

    #[test]
    fn a_key_is_what_is_in_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for bytes in [&b"a"[..], b"secret\n", &[0; SECRET_MAX_BYTES]] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read_file(&path, "a key").unwrap().bytes(), bytes);
        }
        for (bytes, word) in [(&b""[..], "empty"), (&[1; SECRET_MAX_BYTES + 1], "more than")] {
            std::fs::write(&path, bytes).unwrap();
            assert!(read_file(&path, "a key").unwrap_err().contains(word));
        }
        assert!(read_file(dir.path(), "a folder").unwrap_err().contains("no regular file"));
        assert!(read_file(&dir.path().join("none"), "none").unwrap_err().contains("No such file"));
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
    }
}
