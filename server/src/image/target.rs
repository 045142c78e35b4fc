//! New files that appear whole or not at all.
//!
//! A new file has no name while it is written (O_TMPFILE), and gets it when it is complete and durable. Whatever kills the command,
//! the kernel takes the space back. Where a file system cannot do that, the file has the name `.NAME.blktapd-partial`
//! meanwhile; what a killed command has left under that name is removed by the next one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::failure::Failure;
use super::file::{OpenFile, Want};

/// Access of a new file before the umask, as other image tools give it.
const MODE: u32 = 0o644;

/// A file under way.
#[derive(Debug)]
pub struct NewFile {
    /// Open for writing, locked.
    pub file: OpenFile,
    path: PathBuf,
    folder: PathBuf,
    /// Its name meanwhile, where it needs one.
    partial: Option<PathBuf>,
    /// What stands at the path now and is to be replaced; locked until that is done.
    replaced: Option<OpenFile>,
}

impl NewFile {
    /// Makes an empty file that is to be at `path`. An existing one is replaced if `force` says so, and refused else.
    ///
    /// # Errors
    /// It exists, or is in use; the folder does not take it.
    pub fn make(path: &Path, force: bool) -> Result<NewFile, Failure> {
        // Through a link, so that the link stays.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let replaced = match std::fs::symlink_metadata(&path) {
            Ok(_) if force => Some(OpenFile::open(&path, Want::Write)?),
            Ok(_) => {
                return Err(Failure::new(format!(
                    "{} exists: choose another name, or replace it with --force",
                    path.display()
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Failure::io(&path, "look it up", &error)),
        };
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        let nameless =
            OpenOptions::new().read(true).write(true).mode(MODE).custom_flags(libc::O_TMPFILE).open(&folder);
        let (file, partial) = match nameless {
            Ok(file) => (file, None),
            // EISDIR: a kernel that does not know O_TMPFILE; EOPNOTSUPP: a file system that does not.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) =>
            {
                let partial = partial_path(&path);
                (make_partial(&partial)?, Some(partial))
            }
            Err(error) => return Err(Failure::io(&folder, "make a file in it", &error)),
        };
        let file = OpenFile::made(file, &path)?;
        Ok(NewFile { file, path, folder, partial, replaced })
    }

    /// What it takes the place of.
    pub fn replaced(&self) -> Option<&OpenFile> {
        self.replaced.as_ref()
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// What the kernel says; the file is not there then.
    pub fn publish(mut self) -> Result<(), Failure> {
        let failed = |doing: &str, error: io::Error| Failure::io(&self.path, doing, &error);
        self.file.file.sync_all().map_err(|error| failed("make it durable", error))?;
        match (self.partial.take(), self.replaced.is_some()) {
            (None, false) => self.link_to(&self.path)?,
            (None, true) => {
                let partial = partial_path(&self.path);
                remove_leftover(&partial)?;
                self.link_to(&partial)?;
                self.rename(&partial, true)?;
            }
            (Some(partial), replace) => self.rename(&partial, replace)?,
        }
        sync_folder(&self.folder)
    }

    fn link_to(&self, path: &Path) -> Result<(), Failure> {
        use rustix::fs::{AtFlags, CWD, linkat};
        let nameless = format!("/proc/self/fd/{}", self.file.file.as_raw_fd());
        linkat(CWD, nameless, CWD, path, AtFlags::SYMLINK_FOLLOW).map_err(|errno| self.appeared(errno))
    }

    fn rename(&self, partial: &Path, replace: bool) -> Result<(), Failure> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let renamed = match renameat_with(CWD, partial, CWD, &self.path, flags) {
            // Without the flag somebody's new file could be lost, in the moment since we looked.
            Err(rustix::io::Errno::INVAL) if !replace && !self.path.exists() => {
                renameat_with(CWD, partial, CWD, &self.path, RenameFlags::empty())
            }
            other => other,
        };
        renamed.map_err(|errno| {
            let _ = std::fs::remove_file(partial);
            self.appeared(errno)
        })
    }

    fn appeared(&self, errno: rustix::io::Errno) -> Failure {
        match errno {
            rustix::io::Errno::EXIST => Failure::new(format!(
                "{} was made by somebody else meanwhile: choose another name, or replace it with --force",
                self.path.display()
            )),
            errno => Failure::io(&self.path, "give the new file its name", &errno.into()),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            let _ = std::fs::remove_file(partial);
        }
    }
}

fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.blktapd-partial"))
}

fn make_partial(partial: &Path) -> Result<File, Failure> {
    remove_leftover(partial)?;
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(MODE).open(partial);
    made.map_err(|error| Failure::io(partial, "make it", &error))
}

/// Removes what a killed command has left; somebody who still works on it holds its lock.
fn remove_leftover(partial: &Path) -> Result<(), Failure> {
    if std::fs::symlink_metadata(partial).is_err() {
        return Ok(());
    }
    let _held = OpenFile::open(partial, Want::Write)?;
    std::fs::remove_file(partial).map_err(|error| Failure::io(partial, "remove it", &error))
}

/// Makes names in a folder durable.
///
/// # Errors
/// What the kernel says.
pub fn sync_folder(folder: &Path) -> Result<(), Failure> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| Failure::io(folder, "make the new name durable", &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A file that had to have a name from the start.
    fn named(path: &Path, replaced: Option<OpenFile>) -> NewFile {
        let partial = partial_path(path);
        let file = OpenFile::made(make_partial(&partial).unwrap(), path).unwrap();
        let folder = path.parent().unwrap().to_owned();
        NewFile { file, path: path.to_owned(), folder, partial: Some(partial), replaced }
    }

    /// Goal: a new file is there when it is published, not before, and an existing one is replaced only if that was asked for.
    /// Method: both ways of making one, with and without something in the way.
    #[test]
    fn a_new_file_appears_when_it_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (old, force) in [(None, false), (None, true), (Some("old"), true)] {
            for nameless in [true, false] {
                let _ = std::fs::remove_file(&path);
                old.inspect(|text| std::fs::write(&path, text).unwrap());
                let new = match nameless {
                    true => NewFile::make(&path, force).unwrap(),
                    false => named(&path, old.map(|_| OpenFile::open(&path, Want::Write).unwrap())),
                };
                (&new.file.file).write_all(b"new").unwrap();
                assert_eq!(std::fs::read_to_string(&path).ok().as_deref(), old);
                new.publish().unwrap();
                assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
                assert_eq!(names(dir.path()), ["disk"], "{old:?} {force} {nameless}");
            }
        }
        assert!(NewFile::make(&path, false).unwrap_err().message.contains("--force"));
    }

    /// Goal: nobody's file is lost that appears meanwhile, and nothing is left of one that was given up or whose maker was killed.
    /// Method: files put in the way between making and publishing; a left-over, held and free.
    #[test]
    fn what_is_in_the_way_stays_and_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for nameless in [true, false] {
            let new = if nameless { NewFile::make(&path, false).unwrap() } else { named(&path, None) };
            std::fs::write(&path, "somebody's").unwrap();
            assert!(new.publish().unwrap_err().message.contains("somebody else"), "{nameless}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's");
            std::fs::remove_file(&path).unwrap();
        }
        drop(named(&path, None));
        assert!(names(dir.path()).is_empty(), "given up");
        std::fs::write(partial_path(&path), "of a killed command").unwrap();
        let held = OpenFile::open(&partial_path(&path), Want::Write).unwrap();
        assert!(make_partial(&partial_path(&path)).unwrap_err().message.contains("in use"));
        drop(held);
        named(&path, None).publish().unwrap();
        assert_eq!(names(dir.path()), ["disk"]);
    }
}
