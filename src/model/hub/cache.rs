//! The cache on disk, in the layout that Hugging Face tools share:
//! `models--org--name/{blobs/ETAG, refs/REVISION, snapshots/COMMIT/FILE -> ../../blobs/ETAG, .no_exist/COMMIT/FILE}`.
//!
//! Layout: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>.

use crate::files::{AtomicFile, TEMPORARY_PREFIX};
use crate::model::HubId;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One repository's part of the cache.
#[derive(Debug, Clone)]
pub(super) struct Repo {
    folder: PathBuf,
    lock: PathBuf,
}

/// Held while a repository is downloaded. Best effort: where the file system knows no locks, the work is done twice, no more.
#[derive(Debug)]
pub(super) struct Lock {
    _file: Option<File>,
}

/// Whether `revision` is a full commit id, which never changes its meaning.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Repo {
    pub fn new(cache: &Path, id: &HubId) -> Self {
        let name = folder_name(id);
        Self { folder: cache.join(&name), lock: cache.join(".locks").join(name).join("trt-embed.lock") }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.blobs().join(etag)
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub fn file(&self, commit: &str, file: &str) -> PathBuf {
        self.snapshot(commit).join(file)
    }

    /// The commit that `revision` meant when it was last fetched.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes what `revision` means now.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        parent_of(&path)?;
        let mut file = AtomicFile::create(&path)?;
        file.write_all(commit.as_bytes()).map_err(Error::io("write", &path))?;
        file.commit()
    }

    /// Whether a Hugging Face tool has noted that the repository has no such file at this commit.
    pub fn is_known_absent(&self, commit: &str, file: &str) -> bool {
        self.absent(commit, file).is_file()
    }

    /// Notes that the repository has no such file at this commit.
    pub fn note_absent(&self, commit: &str, file: &str) -> Result<()> {
        let path = self.absent(commit, file);
        if path.is_file() {
            return Ok(());
        }
        parent_of(&path)?;
        File::create(&path).map(drop).map_err(Error::io("create", path))
    }

    fn absent(&self, commit: &str, file: &str) -> PathBuf {
        self.folder.join(".no_exist").join(commit).join(file)
    }

    /// Gives blob `etag` its name in the snapshot.
    pub fn point(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let pointer = self.file(commit, file);
        parent_of(&pointer)?;
        // From snapshots/COMMIT/FILE up to the repository's folder, then down: the cache may be moved as a whole.
        let up = "../".repeat(2 + file.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        if pointer.symlink_metadata().is_ok() {
            fs::remove_file(&pointer).map_err(Error::io("replace", &pointer))?;
        }
        link(&target, &self.blob(etag), &pointer).map_err(Error::io("link", &pointer))?;
        Ok(pointer)
    }

    /// A file that gets its name among the blobs when it is committed.
    pub fn new_blob(&self) -> Result<AtomicFile> {
        let blobs = self.blobs();
        fs::create_dir_all(&blobs).map_err(Error::io("create", &blobs))?;
        AtomicFile::create(&blobs.join("unnamed"))
    }

    /// Waits until no other process downloads this repository.
    pub fn lock(&self) -> Lock {
        let locked = parent_of(&self.lock).ok().and_then(|_| File::create(&self.lock).ok()).filter(|file| file.lock().is_ok());
        if locked.is_some() {
            self.remove_leftovers();
        }
        Lock { _file: locked }
    }

    /// Removes what a killed process left unfinished. Files are those that nobody has locked. Folders are staging areas of earlier
    /// versions, which worked in them only while they held the repository's lock.
    fn remove_leftovers(&self) {
        for folder in [self.folder.clone(), self.blobs(), self.folder.join("refs")] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if !entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
                    continue;
                }
                let path = entry.path();
                let removed = match entry.file_type() {
                    Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                    _ if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) => fs::remove_file(&path),
                    _ => continue,
                };
                if let Err(error) = removed {
                    log::warn!("cannot remove {}, which a killed process left: {error}", path.display());
                }
            }
        }
    }
}

fn folder_name(id: &HubId) -> String {
    format!("models--{}--{}", id.org, id.name)
}

/// The folder of `path`, made where it is absent.
fn parent_of(path: &Path) -> Result<&Path> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    Ok(folder)
}

#[cfg(unix)]
fn link(target: &str, _blob: &Path, pointer: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, pointer)
}

/// Links need rights of their own elsewhere; Hugging Face tools keep a copy then.
#[cfg(not(unix))]
fn link(_target: &str, blob: &Path, pointer: &Path) -> std::io::Result<()> {
    fs::copy(blob, pointer).map(drop)
}
