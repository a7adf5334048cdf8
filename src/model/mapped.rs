//! A file mapped into memory, read-only: the one place of this room that needs `unsafe`.
#![allow(unsafe_code)]

use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::{File, Metadata};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A whole file in memory, unmapped when dropped.
///
/// Whoever writes into the file while it is mapped (`cp` over it, where writers of models rename) changes what is read here, and a file that
/// becomes shorter ends the process (SIGBUS). The first is noticed by [`Mapped::check_unchanged`] after the reading; against the
/// second only copying the file would help, which for weights takes their whole memory again.
#[derive(Debug)]
pub(crate) struct Mapped {
    map: Mmap,
    file: File,
    path: PathBuf,
    opened: State,
    place: Option<(u64, u64)>,
}

/// What a write changes.
#[derive(Debug, PartialEq)]
struct State {
    bytes: u64,
    /// None where the file system keeps no times.
    modified: Option<SystemTime>,
}

/// Which file is mapped, and in which state: two mappings of equal ones show the same bytes, as long as [`Mapped::check_unchanged`] holds for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileId {
    path: PathBuf,
    bytes: u64,
    modified: SystemTime,
    /// Device and inode, where the system has them.
    place: Option<(u64, u64)>,
}

impl State {
    fn of(about: &Metadata) -> Self {
        Self { bytes: about.len(), modified: about.modified().ok() }
    }
}

impl Mapped {
    /// Maps the file at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let about = file.metadata().map_err(Error::io("read", path))?;
        let opened = State::of(&about);
        let place = place(&about);
        // SAFETY: the mapping is private and read-only, and is only handed out as `&[u8]` that borrows from it. What remains is
        // another process changing or cutting the file meanwhile: weight files are replaced by renaming (this crate, the hub
        // cache and Python's writers do so), which leaves a mapped file as it was. See the type for those who do otherwise.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(Self { map, file, path: path.to_owned(), opened, place })
    }

    /// Which file it is; `None` where the file system keeps no times, by which a file that was written to would be known.
    pub fn id(&self) -> Option<FileId> {
        let State { bytes, modified } = self.opened;
        Some(FileId { path: self.path.clone(), bytes, modified: modified?, place: self.place })
    }

    /// Whether the file is still as it was when it was opened, by its length and the time of the last write.
    ///
    /// # Errors
    /// [`Error::FileChanged`]; [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        // Of the open file, not of what has its name now.
        let now = State::of(&self.file.metadata().map_err(Error::io("read", &self.path))?);
        if now == self.opened { Ok(()) } else { Err(Error::FileChanged { path: self.path.clone() }) }
    }
}

#[cfg(unix)]
fn place(about: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((about.dev(), about.ino()))
}

#[cfg(not(unix))]
fn place(_: &Metadata) -> Option<(u64, u64)> {
    None
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn a_file_is_known_by_its_place_and_its_state() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"first").unwrap();
        let id = || Mapped::open(&path).unwrap().id().unwrap();
        let first = id();
        assert_eq!(id(), first);
        // Another file of the same name, length and time.
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        let other = folder.path().join("other");
        std::fs::write(&other, b"again").unwrap();
        File::options().append(true).open(&other).unwrap().set_modified(modified).unwrap();
        assert_ne!(Mapped::open(&other).unwrap().id().unwrap(), first);
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(id() == first, cfg!(not(unix)));
        // The same file later, and longer.
        let replaced = id();
        File::options().append(true).open(&path).unwrap().set_modified(modified + Duration::from_secs(5)).unwrap();
        assert_ne!(id(), replaced);
    }

    #[test]
    fn a_file_that_is_written_to_is_noticed_and_one_that_is_replaced_is_not_ours_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"first").unwrap();
        let mapped = Mapped::open(&path).unwrap();
        mapped.check_unchanged().unwrap();

        // By renaming, as careful writers do: what is mapped stays what it was.
        let other = folder.path().join("other");
        std::fs::write(&other, b"longer than that").unwrap();
        std::fs::rename(&other, &path).unwrap();
        mapped.check_unchanged().unwrap();
        assert_eq!(&*mapped, b"first");

        let mapped = Mapped::open(&path).unwrap();
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"!").unwrap();
        assert!(matches!(mapped.check_unchanged(), Err(Error::FileChanged { .. })));

        // As long as before, later.
        let mapped = Mapped::open(&path).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
        let error = mapped.check_unchanged().unwrap_err();
        assert!(matches!(&error, Error::FileChanged { path: named } if *named == path), "{error}");
    }
}
