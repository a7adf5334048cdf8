//! Files that appear under their final name whole or not at all.

use crate::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file being written beside its final name. Dropped without [`AtomicFile::commit`] it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFile {
    temporary: BufWriter<NamedTempFile>,
    path: PathBuf,
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
        builder.prefix(".trt-embed-");
        // As any new file: what the umask leaves of rw-rw-rw-.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(folder).map_err(Error::io("create", path))?;
        Ok(Self { temporary: BufWriter::with_capacity(1 << 20, temporary), path: path.to_path_buf() })
    }

    /// The open file, after what was written so far.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&mut self) -> Result<&mut File> {
        self.temporary.flush().map_err(Error::io("write", &self.path))?;
        Ok(self.temporary.get_mut().as_file_mut())
    }

    /// Gives the file its final name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let temporary = self.temporary.into_inner().map_err(|error| Error::io("write", &self.path)(error.into_error()))?;
        temporary.persist(&self.path).map_err(|error| Error::io("write", &self.path)(error.error))?;
        Ok(())
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
