//! The cubin cache: compiled kernels on disk, named by all that they depend on, checked when read, replaced whole.

use super::error::Result;
use crate::digest::hex;
use crate::files::{AtomicFile, user_cache_folder};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// First bytes of a cache file; then the SHA-256 of the cubin, then the cubin.
const MAGIC: &[u8; 8] = b"TECUBIN1";
const HEADER: usize = MAGIC.len() + 32;

/// A kernel source and how it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Source<'a> {
    /// File name, for messages.
    pub name: &'a str,
    /// CUDA C++.
    pub text: &'a str,
    /// As `--std=c++17`.
    pub options: &'a [&'a str],
}

impl<'a> Source<'a> {
    /// A source named `name`.
    pub fn new(name: &'a str, text: &'a str, options: &'a [&'a str]) -> Self {
        Self { name, text, options }
    }

    /// SHA-256 over everything that decides the cubin, in hexadecimal: text, options, architecture (as `sm_90`), NVRTC version.
    pub fn key(&self, arch: &str, nvrtc: (u32, u32)) -> String {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            // The length keeps neighbours apart: "ab" + "c" is not "a" + "bc".
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(self.text.as_bytes());
        part(&(self.options.len() as u64).to_le_bytes());
        for option in self.options {
            part(option.as_bytes());
        }
        part(arch.as_bytes());
        part(format!("{}.{}", nvrtc.0, nvrtc.1).as_bytes());
        hex(&hash.finalize())
    }
}

/// A folder of cubins, or none. Nothing that goes wrong with it is an error: the cubin is compiled anew and a warning logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CubinCache {
    folder: Option<PathBuf>,
}

impl CubinCache {
    /// `kernels` in the folder that `TRT_EMBED_CACHE` names, or `trt-embed/kernels` in the user's cache folder
    /// (`XDG_CACHE_HOME`, else `~/.cache`).
    pub fn of_user() -> Self {
        Self { folder: user_folder(|name| std::env::var_os(name).map(PathBuf::from)) }
    }

    /// `folder`, made when it is first written to.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()) }
    }

    /// Compiles every time.
    pub fn none() -> Self {
        Self { folder: None }
    }

    /// Where it is.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The cubin named `key`, else what `compile` makes, which is then kept.
    ///
    /// # Errors
    /// Those of `compile`.
    pub(super) fn get_or_compile(&self, key: &str, compile: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(folder) = &self.folder else { return compile() };
        let path = folder.join(format!("{key}.cubin"));
        match fs::read(&path) {
            Ok(bytes) => match checked(&bytes) {
                Some(cubin) => return Ok(cubin.to_vec()),
                None => log::warn!("{} is damaged; compiling it anew", path.display()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("cannot read {}: {error}; compiling it anew", path.display()),
        }
        let cubin = compile()?;
        if let Err(error) = store(folder, &path, &cubin) {
            log::warn!("cannot keep {}: {error}", path.display());
        }
        Ok(cubin)
    }
}

fn user_folder(env: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    Some(user_cache_folder(env)?.join("kernels"))
}

/// The cubin of a cache file whose sum is right.
fn checked(bytes: &[u8]) -> Option<&[u8]> {
    let (header, cubin) = bytes.split_at_checked(HEADER)?;
    let (magic, sum) = header.split_at_checked(MAGIC.len())?;
    (magic == MAGIC && sum == Sha256::digest(cubin).as_slice()).then_some(cubin)
}

fn store(folder: &Path, path: &Path, cubin: &[u8]) -> crate::Result<()> {
    fs::create_dir_all(folder).map_err(crate::Error::io("create", folder))?;
    let mut file = AtomicFile::create(path)?;
    let sum = Sha256::digest(cubin);
    for part in [MAGIC.as_slice(), &sum, cubin] {
        file.write_all(part).map_err(crate::Error::io("write", path))?;
    }
    file.commit()
}

#[cfg(test)]
#[path = "cubin_tests.rs"]
mod tests;
