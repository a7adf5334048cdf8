//! Files that appear under their final name whole or not at all.

mod abandoned;
mod growing;

pub use growing::GrowingFile;

use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tempfile::NamedTempFile;

/// How the names of files begin that are not finished.
pub(crate) const TEMPORARY_PREFIX: &str = ".trt-embed-";
/// The same of folders in the system's place for temporary ones.
#[cfg(feature = "tensorrt")]
const FOLDER_PREFIX: &str = "trt-embed-";
/// How often a new file's name is tried again where another process took the file for an abandoned one.
const ATTEMPTS: usize = 16;

/// What this process would leave behind if it ended now.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Whether [`discard_unfinished`] was called.
static DISCARDED: AtomicBool = AtomicBool::new(false);

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
    /// Held open: its lock tells other processes that someone uses the folder.
    _claim: File,
    _unfinished: Unfinished,
}

impl AtomicFile {
    /// Begins writing what will be `path`; its folder must exist. Temporary files of processes that were killed while they wrote
    /// into that folder are removed.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        abandoned::remove(folder, TEMPORARY_PREFIX);
        let prefix = abandoned::prefix(TEMPORARY_PREFIX);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        // As any new file: what the umask leaves of rw-rw-rw-.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let (temporary, unfinished) = Unfinished::begin(|| {
            let make = || {
                let temporary = builder.tempfile_in(folder)?;
                let claimed = abandoned::claim(temporary.as_file(), temporary.path());
                Ok(claimed.then_some(temporary))
            };
            let temporary = claimed(make).map_err(Error::io("create", path))?;
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

    /// Gives the file its final name, once its contents are on the disk: a machine that fails leaves no half file either.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let Self { temporary, path, unfinished: noted } = self;
        let temporary = temporary.into_inner().map_err(|error| Error::io("write", &path)(error.into_error()))?;
        temporary.as_file().sync_all().map_err(Error::io("write", &path))?;
        // One step for `discard_unfinished`: the file is unfinished, or it has its name.
        let mut unfinished = unfinished();
        let persisted = temporary.persist(&path);
        unfinished.remove(&noted.0);
        drop(unfinished);
        persisted.map(drop).map_err(|error| Error::io("write", &path)(error.error))
    }
}

/// What `make` makes, as soon as it is not taken away again by a process that tidies up.
fn claimed<T>(make: impl Fn() -> std::io::Result<Option<T>>) -> std::io::Result<T> {
    for _ in 0..ATTEMPTS {
        if let Some(made) = make()? {
            return Ok(made);
        }
    }
    Err(std::io::Error::other("another process removes its temporary files again and again"))
}

/// Removes the files that this process has begun and not committed, and lets no thread begin or commit another: for a process that
/// ends at once, without unwinding its threads. Returns how many there were.
pub fn discard_unfinished() -> usize {
    // A second call would wait for the first one's lock.
    if DISCARDED.swap(true, Ordering::SeqCst) {
        return 0;
    }
    let mut unfinished = unfinished();
    let paths = std::mem::take(&mut *unfinished);
    for path in &paths {
        // It may be gone already, removed by the thread that wrote it.
        let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
    }
    // Stays locked.
    std::mem::forget(unfinished);
    paths.len()
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
        let place = std::env::temp_dir();
        abandoned::remove(&place, FOLDER_PREFIX);
        let prefix = abandoned::prefix(FOLDER_PREFIX);
        let ((folder, handle), unfinished) = Unfinished::begin(|| {
            let make = || {
                let folder = tempfile::Builder::new().prefix(&prefix).tempdir()?;
                let handle = File::open(folder.path())?;
                Ok(abandoned::claim(&handle, folder.path()).then_some((folder, handle)))
            };
            let (folder, handle) = claimed(make).map_err(Error::io("create a folder in", place))?;
            let place = folder.path().to_path_buf();
            Ok(((folder, handle), place))
        })?;
        Ok(Self { folder, _claim: handle, _unfinished: unfinished })
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
pub(crate) fn user_cache_folder(env: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name| env(name).filter(|path| !path.as_os_str().is_empty());
    set("TRT_EMBED_CACHE").or_else(|| {
        // XDG Base Directory specification: a relative XDG_CACHE_HOME is to be ignored.
        let cache = set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(cache.join("trt-embed"))
    })
}
