//! Files that appear under their final name whole or not at all.

use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tempfile::NamedTempFile;

/// How the names of files begin that are not finished.
pub(crate) const TEMPORARY_PREFIX: &str = ".trt-embed-";

/// What this process would leave behind if it ended now.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A path that is in [`UNFINISHED`] while this lives.
#[derive(Debug)]
struct Unfinished(PathBuf);

/// A file being written beside its final name. Dropped without [`AtomicFile::commit`] it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFile {
    temporary: BufWriter<NamedTempFile>,
    path: PathBuf,
    unfinished: Unfinished,
}

/// A folder for what lies on the disk only while it is worked on, in the system's own place for that (`TMPDIR`). Goes with the value.
#[cfg(feature = "tensorrt")]
#[derive(Debug)]
pub(crate) struct TemporaryFolder {
    folder: tempfile::TempDir,
    _unfinished: Unfinished,
}

impl AtomicFile {
    /// Begins writing what will be `path`; its folder must exist.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY_PREFIX);
        // As any new file: what the umask leaves of rw-rw-rw-.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let (temporary, unfinished) = Unfinished::begin(|| {
            let temporary = builder.tempfile_in(folder).map_err(Error::io("create", path))?;
            let place = temporary.path().to_path_buf();
            Ok((temporary, place))
        })?;
        Ok(Self { temporary: BufWriter::with_capacity(1 << 20, temporary), path: path.to_path_buf(), unfinished })
    }

    /// The open file, after what was written so far.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&mut self) -> Result<&mut File> {
        self.temporary.flush().map_err(Error::io("write", &self.path))?;
        Ok(self.temporary.get_mut().as_file_mut())
    }

    /// The file will be `path`, on the same file system, instead of what [`Self::create`] was told.
    #[cfg(feature = "hub")]
    pub(crate) fn set_path(&mut self, path: &Path) {
        self.path = path.to_path_buf();
    }

    /// Gives the file its final name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let Self { temporary, path, unfinished } = self;
        let temporary = temporary.into_inner().map_err(|error| Error::io("write", &path)(error.into_error()))?;
        temporary.persist(&path).map_err(|error| Error::io("write", &path)(error.error))?;
        drop(unfinished);
        Ok(())
    }
}

/// Removes the files that this process has begun and not committed, and lets no thread begin another: for a process that ends at
/// once, without unwinding its threads.
pub fn discard_unfinished() {
    let mut unfinished = unfinished();
    for path in std::mem::take(&mut *unfinished) {
        // It may be gone already: committed, or removed by the thread that wrote it.
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
    }
    // Stays locked.
    std::mem::forget(unfinished);
}

fn unfinished() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    // A set of paths is whole after any panic.
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unfinished {
    /// Notes the path that `make` makes, without a moment in which it exists and is not noted.
    fn begin<T>(make: impl FnOnce() -> Result<(T, PathBuf)>) -> Result<(T, Self)> {
        let mut unfinished = unfinished();
        let (made, path) = make()?;
        unfinished.insert(path.clone());
        Ok((made, Self(path)))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().remove(&self.0);
    }
}

#[cfg(feature = "tensorrt")]
impl TemporaryFolder {
    pub fn create() -> Result<Self> {
        let (folder, unfinished) = Unfinished::begin(|| {
            let folder = tempfile::Builder::new().prefix("trt-embed-").tempdir();
            let folder = folder.map_err(Error::io("create a folder in", std::env::temp_dir()))?;
            let place = folder.path().to_path_buf();
            Ok((folder, place))
        })?;
        Ok(Self { folder, _unfinished: unfinished })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Write for AtomicFile {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.temporary.write(buffer)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.temporary.flush()
    }
}

/// The user's folder for what this crate can make again: `TRT_EMBED_CACHE`, else `trt-embed` in the user's cache folder
/// (`XDG_CACHE_HOME`, else `~/.cache`). None where no variable names one.
#[cfg(feature = "tensorrt")]
pub(crate) fn user_cache_folder(env: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name| env(name).filter(|path| !path.as_os_str().is_empty());
    set("TRT_EMBED_CACHE").or_else(|| {
        // XDG Base Directory specification: a relative XDG_CACHE_HOME is to be ignored.
        let cache = set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(cache.join("trt-embed"))
    })
}
