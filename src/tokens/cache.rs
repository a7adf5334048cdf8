//! Tokenizers that are loaded once: by all users of one process, and by processes that find them in a cache folder, where they are named by all that they
//! depend on, checked when read, and replaced whole.

use super::assemble;
use super::loaded::{Choices, Loaded};
use crate::digest::{hex, of_pieces};
use crate::files::{AtomicFile, user_cache_folder};
use crate::model::{Mapped, TokenizerFiles, read_file};
use crate::shared::Registry;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::ErrorKind;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// First bytes of a file: the form of what follows. It also stands for what is made of the files here and in the library, so that it must change with either.
const FORM: &[u8; 8] = b"TETOKEN1";
/// Then the key, the CRC-32 of the rest, and the rest.
const HEADER: usize = FORM.len() + 32 + 4;

/// The `tokenizers` crate that was tried with [`FORM`]; see the test of it.
const LIBRARY: &str = "0.23.2";

/// Vocabulary files of fewer bytes are parsed in milliseconds, and not worth a file of the cache.
const LEAST_BYTES: usize = 1 << 20;

/// The tokenizers of this process that are alive.
static LIVING: Registry<Key, Loaded> = Registry::new();

/// SHA-256 of all that a loaded tokenizer depends on.
type Key = [u8; 32];

/// A folder of tokenizers, or none. Nothing that goes wrong with it is an error: the tokenizer is made of its files and a warning logged.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: Option<PathBuf>,
    least_bytes: usize,
}

impl Cache {
    /// `tokenizers` in the user's folder for what can be made again.
    pub fn of_user() -> Self {
        let folder = user_cache_folder(|name| std::env::var_os(name).map(PathBuf::from));
        Self { folder: folder.map(|folder| folder.join("tokenizers")), least_bytes: LEAST_BYTES }
    }

    /// The tokenizer that `files` describe: the living one, that of the folder, or a new one.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Tokenizer`].
    pub fn open(&self, files: &TokenizerFiles, choices: Choices) -> Result<Arc<Loaded>> {
        let path = files.vocabulary_path();
        let bytes = read_file(path)?;
        let key = key(files, &bytes, choices);
        let make = || Loaded::new(assemble::from_files(files, &bytes)?, choices).map_err(assemble::at(path));
        LIVING.get_or_make(key, || self.get_or_make(&key, bytes.len(), make))
    }

    /// The tokenizer of `key` in the folder, else what `make` makes of `bytes` bytes of vocabulary, which is then kept.
    fn get_or_make(&self, key: &Key, bytes: usize, make: impl FnOnce() -> Result<Loaded>) -> Result<Loaded> {
        let Some(folder) = self.folder.as_deref().filter(|_| bytes >= self.least_bytes) else { return make() };
        let path = folder.join(format!("{}.tokenizer", hex(key)));
        match Mapped::open(&path) {
            Ok(bytes) => match checked(&bytes, key).and_then(Loaded::from_bytes) {
                Some(loaded) => return Ok(loaded),
                None => log::warn!("{} is damaged; making it anew", path.display()),
            },
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => log::warn!("{error}; making the tokenizer of its files"),
        }
        let loaded = make()?;
        if let Some(bytes) = loaded.to_bytes()
            && let Err(error) = store(folder, &path, key, &bytes)
        {
            log::warn!("cannot keep {}: {error}; set TRT_EMBED_CACHE to a folder that can be written", path.display());
        }
        Ok(loaded)
    }
}

/// The contents count, not the file's name and times: a vocabulary that is written over in place within one tick of the file system's clock, or copied with
/// its times, would otherwise be taken for the former one. One who gives away a tokenizer cannot make another one's key either.
fn key(files: &TokenizerFiles, vocabulary: &[u8], choices: Choices) -> Key {
    // Their debugging form has every field.
    let described = format!("{:?} {:?} {choices:?}", files.class(), files.init());
    let is_json = matches!(files.vocabulary(), crate::model::Vocabulary::Json(_));
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        // The length keeps neighbours apart.
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    for text in [env!("CARGO_PKG_VERSION"), LIBRARY, &described] {
        part(text.as_bytes());
    }
    part(FORM);
    part(&[is_json.into()]);
    part(of_pieces([vocabulary]).as_flattened());
    hash.finalize().into()
}

/// The contents of a cache file that is whole and of this key.
fn checked<'b>(bytes: &'b [u8], key: &Key) -> Option<&'b [u8]> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    (header == self::header(key, rest)).then_some(rest)
}

fn header(key: &Key, rest: &[u8]) -> Vec<u8> {
    [FORM.as_slice(), key, &crc32fast::hash(rest).to_le_bytes()].concat()
}

fn store(folder: &Path, path: &Path, key: &Key, bytes: &[u8]) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let mut file = AtomicFile::create(path)?;
    for part in [header(key, bytes).as_slice(), bytes] {
        file.write_all(part).map_err(Error::io("write", path))?;
    }
    file.commit()
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
