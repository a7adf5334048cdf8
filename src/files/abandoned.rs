//! Temporary files whose writer is dead: told from those of running processes by an advisory lock.
//!
//! Every temporary file is locked (`flock`) as long as its writer lives; the system releases the lock of a killed process. A file that
//! can be locked has no writer, on the kernel that made it. Locks of other kernels (another host of a shared file system) may not be
//! seen here, so the name tells the kernel, by its boot id, and files of another one are left alone until nothing was written to them
//! for [`FOREIGN_AGE`].

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Age from which a file of another kernel counts as abandoned: of another host, or of this one before it was restarted.
const FOREIGN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The kernel that this process runs on, as part of a file's name; none where the system does not tell. Then every file counts as one of
/// another kernel.
static KERNEL: LazyLock<Option<String>> = LazyLock::new(|| {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let id: String = boot.chars().filter(char::is_ascii_hexdigit).take(12).collect();
    (id.len() == 12).then(|| format!("{id}-"))
});

/// Folders that this process has looked through: once is enough.
static SEEN: Mutex<BTreeSet<(PathBuf, &'static str)>> = Mutex::new(BTreeSet::new());

/// How the names of this process's temporary files begin.
pub(super) fn prefix(prefix: &str) -> String {
    format!("{prefix}{}", KERNEL.as_deref().unwrap_or_default())
}

/// Marks the new file or folder `file` at `path` as one that is being used, as long as `file` is open. False where another process
/// took it for abandoned in the moment before.
pub(super) fn claim(file: &File, path: &Path) -> bool {
    // A file system without locks: there no other process can lock it either, and it is never taken for abandoned.
    !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && is_at(file, path)
}

/// Removes from `folder` what killed processes left there under names that begin with `prefix`. What cannot be removed stays.
pub(super) fn remove(folder: &Path, prefix: &'static str) {
    let key = (folder.to_path_buf(), prefix);
    if !SEEN.lock().unwrap_or_else(PoisonError::into_inner).insert(key) {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if let Some(rest) = name.to_string_lossy().strip_prefix(prefix) {
            remove_if_abandoned(&entry, rest);
        }
    }
}

/// `rest` is the entry's name behind the prefix.
fn remove_if_abandoned(entry: &DirEntry, rest: &str) {
    // A link or a pipe was not made here.
    let Some(kind) = entry.file_type().ok().filter(|kind| kind.is_file() || kind.is_dir()) else { return };
    let path = entry.path();
    let Ok(file) = File::open(&path) else { return };
    let is_own = KERNEL.as_deref().is_some_and(|kernel| rest.starts_with(kernel));
    if !is_own && !is_old(&file) {
        return;
    }
    if file.try_lock().is_ok() && is_at(&file, &path) {
        let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Ok(()) => log::info!("removed {}, which a killed process had left", path.display()),
            Err(error) => log::debug!("cannot remove {}: {error}", path.display()),
        }
    }
}

fn is_old(file: &File) -> bool {
    let modified = file.metadata().and_then(|about| about.modified());
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age >= FOREIGN_AGE))
}

/// Whether `path` still names `file`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |about: fs::Metadata| (about.dev(), about.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(path)) => identity(file) == identity(path),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{AtomicFile, TEMPORARY_PREFIX};
    use std::io::Write;

    /// Looks through `folder` whether or not that was done before.
    fn sweep(folder: &Path) {
        SEEN.lock().unwrap().remove(&(folder.to_path_buf(), TEMPORARY_PREFIX));
        remove(folder, TEMPORARY_PREFIX);
    }

    #[cfg(target_os = "linux")] // elsewhere there may be no boot id
    #[test]
    fn only_what_nobody_holds_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, age: Duration| {
            let path = folder.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
            (path, file)
        };
        let mut live = AtomicFile::create(&folder.path().join("result")).unwrap();
        let (dead, _) = put(&prefix(".trt-embed-"), Duration::ZERO);
        let (foreign, _) = put(".trt-embed-0123456789ab-x", FOREIGN_AGE - Duration::from_secs(60));
        let (old, _) = put(".trt-embed-0123456789ab-y", FOREIGN_AGE);
        let (held, handle) = put(".trt-embed-0123456789ab-z", FOREIGN_AGE);
        handle.lock().unwrap();
        let (other, _) = put("trt-embed-x", 2 * FOREIGN_AGE);
        sweep(folder.path());
        assert!(!dead.exists() && !old.exists());
        assert!(foreign.exists() && held.exists() && other.exists());
        // The live one is still there to be finished.
        live.write_all(b"whole").unwrap();
        live.commit().unwrap();
        assert_eq!(fs::read(folder.path().join("result")).unwrap(), b"whole");
    }

    #[cfg(unix)]
    #[test]
    fn links_and_what_they_name_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join(prefix(".trt-embed-")));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        sweep(folder.path());
        assert!(target.exists() && fs::symlink_metadata(&link).is_ok());
    }

    #[test]
    fn a_file_that_was_taken_away_is_not_claimed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = File::create(&path).unwrap();
        let other = File::open(&path).unwrap();
        other.lock().unwrap();
        assert!(!claim(&file, &path), "locked by one that removes it");
        other.unlock().unwrap();
        assert!(claim(&file, &path));
        fs::remove_file(&path).unwrap();
        assert!(!claim(&file, &path), "removed");
    }
}
