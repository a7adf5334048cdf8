//! What stands where a file should be and is not the file: a Git LFS pointer, or a symbolic link whose target is gone.

use crate::{Error, Result};
use std::path::Path;

/// How a pointer begins; the second address is that of the format's first version.
const FIRST_LINES: [&[u8]; 2] = [b"version https://git-lfs.github.com/spec/v1", b"version https://hawser.github.com/spec/v1"];

/// The longest pointer that the format allows.
const MAX_POINTER: usize = 1024;

/// A Git LFS pointer: a few lines of text that stand for a large file in a clone without git-lfs.
///
/// Format: <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LfsPointer {
    /// Bytes of the file that it stands for, where it says so.
    size: Option<u64>,
}

/// The pointer that a file's content is, if it is one.
pub(crate) fn lfs_pointer(content: &[u8]) -> Option<LfsPointer> {
    let content = content.get(..MAX_POINTER).unwrap_or(content);
    if !FIRST_LINES.iter().any(|line| content.starts_with(line)) {
        return None;
    }
    let size = content.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"size "));
    Some(LfsPointer { size: size.and_then(|digits| str::from_utf8(digits).ok()?.trim().parse().ok()) })
}

impl LfsPointer {
    /// The error for the file at `path`, which is this pointer.
    pub fn error(self, path: &Path) -> Error {
        Error::LfsPointer { path: path.to_path_buf(), size: self.size }
    }
}

/// The content of the file at `path`.
///
/// # Errors
/// [`Error::Io`]; [`Error::LfsPointer`] for a pointer in its place.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let content = std::fs::read(path).map_err(Error::io("read", path))?;
    match lfs_pointer(&content) {
        Some(pointer) => Err(pointer.error(path)),
        None => Ok(content),
    }
}

/// `Ok` unless `path` is a symbolic link whose target is gone. For files that may be absent: such a link is no absent file.
pub(crate) fn check_link(path: &Path) -> Result<()> {
    let Ok(target) = std::fs::read_link(path) else { return Ok(()) };
    match path.metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::DanglingLink { path: path.to_path_buf(), target })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_told_from_files() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 90868376\n";
        assert_eq!(lfs_pointer(pointer), Some(LfsPointer { size: Some(90_868_376) }));
        let message = LfsPointer { size: Some(90_868_376) }.error(Path::new("m/model.safetensors")).to_string();
        for part in ["m/model.safetensors", "Git LFS pointer", "90868376 bytes", "git lfs pull", "org/name"] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
        // Line ends of another system, the format's first address, a pointer that was cut.
        let other = b"version https://hawser.github.com/spec/v1\r\noid sha256:4d7a2146\r\nsize 7\r\n";
        assert_eq!(lfs_pointer(other), Some(LfsPointer { size: Some(7) }));
        assert_eq!(lfs_pointer(&pointer[..50]), Some(LfsPointer { size: None }));
        assert!(!LfsPointer { size: None }.error(Path::new("f")).to_string().contains("0 bytes"), "an unknown size is not zero");
        for no in [&b""[..], b"{}", b"version 1", b"\x88\0\0\0\0\0\0\0{}", b" version https://git-lfs.github.com/spec/v1"] {
            assert_eq!(lfs_pointer(no), None);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nothing_is_told_from_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("config.json");
        assert!(check_link(&link).is_ok(), "an absent file is no link");
        std::os::unix::fs::symlink("../blobs/gone", &link).unwrap();
        let message = check_link(&link).unwrap_err().to_string();
        for part in [link.to_str().unwrap(), "../blobs/gone", "fetch the model again"] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
        std::fs::create_dir(folder.path().join("blobs")).unwrap();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("blobs", &link).unwrap();
        assert!(check_link(&link).is_ok());
    }
}
