//! A file that is written by several processes one after the other, and appears under its final name when the last one is done.

use super::{Unfinished, abandoned};
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// A file being written beside its final name, as `NAME.partial`, which a later process may go on with.
///
/// One process at a time has it open. Until [`GrowingFile::keep`] a new one leaves nothing behind when it is dropped, or when the
/// process ends by [`discard_unfinished`](super::discard_unfinished).
#[derive(Debug)]
pub struct GrowingFile {
    file: File,
    partial: PathBuf,
    path: PathBuf,
    unfinished: Option<Unfinished>,
}

impl GrowingFile {
    /// Opens what is to be `path`, or begins it; its folder must exist.
    ///
    /// # Errors
    /// [`Error::Io`], also where another process is writing it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let open = || {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false).open(&partial);
            let file = file.map_err(Error::io("create", &partial))?;
            if !abandoned::claim(&file, &partial) {
                let busy = std::io::Error::new(std::io::ErrorKind::ResourceBusy, "another process is writing it");
                return Err(Error::io("write", path)(busy));
            }
            Ok((file, partial.clone()))
        };
        let (file, unfinished) = Unfinished::begin(open)?;
        let mut growing = Self { file, partial, path: path.to_path_buf(), unfinished: Some(unfinished) };
        if growing.length()? > 0 {
            growing.keep();
        }
        Ok(growing)
    }

    /// The open file.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Where it lies until it is finished.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Bytes written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn length(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(Error::io("read", &self.partial))?.len())
    }

    /// Cuts it to its first `bytes`, behind which the next ones are written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn truncate(&mut self, bytes: u64) -> Result<()> {
        self.file.set_len(bytes).map_err(Error::io("write", &self.partial))?;
        self.file.seek(SeekFrom::Start(bytes)).map_err(Error::io("write", &self.partial))?;
        Ok(())
    }

    /// Waits until what was written is on the disk, and gives its bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<u64> {
        self.file.sync_all().map_err(Error::io("write", &self.partial))?;
        self.length()
    }

    /// Leaves it to a later process, however this one ends.
    pub fn keep(&mut self) {
        self.unfinished = None;
    }

    /// Removes it, also what earlier processes have written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn discard(mut self) -> Result<()> {
        self.keep();
        fs::remove_file(&self.partial).map_err(Error::io("remove", &self.partial))
    }

    /// Gives it its final name, once its contents are on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        self.keep();
        fs::rename(&self.partial, &self.path).map_err(Error::io("write", &self.path))
    }
}

impl Drop for GrowingFile {
    fn drop(&mut self) {
        if self.unfinished.is_some() {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn it_grows_from_one_opening_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut first = GrowingFile::open(&path).unwrap();
        first.file().write_all(b"one two").unwrap();
        assert_eq!(first.sync().unwrap(), 7);
        first.keep();
        let busy = GrowingFile::open(&path).unwrap_err().to_string();
        assert!(busy.contains("another process"), "{busy}");
        drop(first);
        assert!(!path.exists());

        let mut second = GrowingFile::open(&path).unwrap();
        assert_eq!(second.length().unwrap(), 7);
        second.truncate(4).unwrap();
        second.file().write_all(b"three").unwrap();
        let partial = second.partial().to_path_buf();
        second.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one three");
        assert!(!partial.exists());
    }

    #[test]
    fn a_new_one_that_is_not_kept_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = GrowingFile::open(&folder.path().join("out")).unwrap();
        file.file().write_all(b"x").unwrap();
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // One that holds something was kept by an earlier process.
        fs::write(folder.path().join("out.partial"), "x").unwrap();
        drop(GrowingFile::open(&folder.path().join("out")).unwrap());
        assert_eq!(fs::read(folder.path().join("out.partial")).unwrap(), b"x");
    }
}
