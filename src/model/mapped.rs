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
}

/// What a write changes.
#[derive(Debug, PartialEq)]
struct State {
    bytes: u64,
    /// None where the file system keeps no times.
    modified: Option<SystemTime>,
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
        let opened = State::of(&file.metadata().map_err(Error::io("read", path))?);
        // SAFETY: the mapping is private and read-only, and is only handed out as `&[u8]` that borrows from it. What remains is
        // another process changing or cutting the file meanwhile: weight files are replaced by renaming (this crate, the hub
        // cache and Python's writers do so), which leaves a mapped file as it was. See the type for those who do otherwise.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(Self { map, file, path: path.to_owned(), opened })
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
