//! Engine files: a plan with the manifest that says what it was built for.
//!
//! Layout, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic `trtembed` |
//! | 8..12 | format version, 2 |
//! | 12..16 | length of the manifest |
//! | 16..24 | length of the plan |
//! | 24..56 | SHA-256 of the manifest and of the SHA-256 of each 4 MiB of the plans |
//! | 56.. | manifest (JSON), plans |

mod cache;
mod load;
mod manifest;

pub(crate) use cache::Loaded;
pub use cache::{Cache, CacheKey};
pub(super) use manifest::Proof;
pub(super) use manifest::rounded;
#[cfg(test)]
pub(super) use manifest::tests::manifest;
pub use manifest::{Build, Cost, Fidelity, Machine, Manifest, Model, Source, Speed, Unproven};

use crate::digest::{PIECE_BYTES, of_pieces};
use crate::files::AtomicFile;
use crate::{Error, Result};
use prost::bytes::Bytes;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: &[u8; 8] = b"trtembed";
const FORMAT: u32 = 2;
const HEADER_BYTES: usize = 56;
/// Far above any manifest: a larger length is damage, and is not allocated.
const MAX_MANIFEST_BYTES: u32 = 1 << 20;

/// A manifest with its plan, which came from a build or whole from a file.
///
/// TensorRT trusts what is in a plan, and so runs whatever a file holds: open only engine files that you or those you trust have built.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineFile {
    /// What the plan is.
    pub manifest: Manifest,
    plan: Bytes,
}

struct Header {
    manifest_bytes: usize,
    plan_bytes: u64,
    digest: [u8; 32],
}

impl EngineFile {
    /// An engine of parts.
    ///
    /// # Safety
    /// `plan` is as TensorRT's builder gave it, or is never loaded.
    #[allow(unsafe_code)] // the declaration alone
    pub unsafe fn from_parts(manifest: Manifest, plan: Vec<u8>) -> Self {
        Self::built(manifest, plan)
    }

    /// As [`EngineFile::from_parts`], for who has built it.
    pub(super) fn built(manifest: Manifest, plan: Vec<u8>) -> Self {
        Self { manifest, plan: plan.into() }
    }

    /// TensorRT's bytes: all plans, one after the other ([`Manifest::split`]).
    pub fn plan(&self) -> &[u8] {
        &self.plan
    }

    /// What the file's contents are recognised by.
    pub(super) fn digest(&self) -> Result<[u8; 32]> {
        let json = serde_json::to_vec(&self.manifest)
            .map_err(|error| Error::Setting { setting: crate::Setting::Engine, reason: format!("its manifest: {error}") })?;
        Ok(digest(&json, &of_pieces([self.plan()])))
    }

    /// Writes manifest and plan to `path`, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; what was at `path` before is then still there.
    pub fn write(path: &Path, manifest: &Manifest, plan: &[u8]) -> Result<()> {
        let json = serde_json::to_vec_pretty(manifest)
            .map_err(|error| Error::EngineFile { path: path.into(), reason: format!("its manifest: {error}") })?;
        let manifest_bytes = u32::try_from(json.len())
            .ok()
            .filter(|&bytes| bytes <= MAX_MANIFEST_BYTES)
            .ok_or_else(|| Error::EngineFile { path: path.into(), reason: format!("its manifest has {} bytes", json.len()) })?;
        let digest = digest(&json, &of_pieces([plan]));

        let mut file = AtomicFile::create(path)?;
        let parts: [&[u8]; 7] = [
            MAGIC,
            &FORMAT.to_le_bytes(),
            &manifest_bytes.to_le_bytes(),
            &(plan.len() as u64).to_le_bytes(),
            &digest,
            &json,
            plan,
        ];
        for part in parts {
            file.write_all(part).map_err(Error::io("write", path))?;
        }
        file.commit()
    }

    /// Reads the manifest alone. The hash is not checked, which needs the plan, but the file's length is.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Io`], [`Error::EngineFile`].
    pub fn read_manifest(path: &Path) -> Result<Manifest> {
        let mut reader = Reader::open(path)?;
        let header = reader.header()?;
        let (manifest, _) = reader.manifest(&header)?;
        reader.check_length(&header)?;
        Ok(manifest)
    }

    /// Reads the file. `check` sees the manifest before the plan is read.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Io`]; [`Error::EngineFile`] for damage; what `check` returns.
    pub fn read(path: &Path, check: impl FnOnce(&Manifest) -> Result<()>) -> Result<Self> {
        let mut reader = Reader::open(path)?;
        let header = reader.header()?;
        let (manifest, json) = reader.manifest(&header)?;
        check(&manifest)?;
        reader.check_length(&header)?;
        // Read, not mapped: what is hashed is then what TensorRT gets, whatever becomes of the file.
        let start = (HEADER_BYTES + header.manifest_bytes) as u64;
        let (plan, pieces) = reader.plan(start, header.plan_bytes)?;
        if digest(&json, &pieces) != header.digest {
            return Err(reader.damaged("its SHA-256 is not the one in its header".into()));
        }
        Ok(Self::built(manifest, plan))
    }
}

/// The hash in the header, of the manifest and of the hashes of the plan's pieces.
fn digest(json: &[u8], pieces: &[[u8; 32]]) -> [u8; 32] {
    let whole = Sha256::new().chain_update((json.len() as u64).to_le_bytes()).chain_update(json);
    pieces.iter().fold(whole, |whole, piece| whole.chain_update(piece)).finalize().into()
}

struct Reader<'a> {
    path: &'a Path,
    file: File,
    file_bytes: u64,
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                Error::NotFound { what: "engine file".into(), path: path.into(), next: "build one of the model".into() }
            }
            _ => Error::io("read", path)(error),
        })?;
        let file_bytes = file.metadata().map_err(Error::io("read", path))?.len();
        Ok(Self { path, file, file_bytes })
    }

    fn damaged(&self, reason: String) -> Error {
        Error::EngineFile { path: self.path.into(), reason }
    }

    fn fill(&mut self, buffer: &mut [u8], what: &str) -> Result<()> {
        self.file.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.damaged(format!("it ends within its {what}")),
            _ => Error::io("read", self.path)(error),
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, "header")?;
        Ok(bytes)
    }

    fn header(&mut self) -> Result<Header> {
        if &self.array::<8>()? != MAGIC {
            return Err(self.damaged("it does not begin with \"trtembed\"".into()));
        }
        let format = u32::from_le_bytes(self.array()?);
        if format != FORMAT {
            return Err(self.damaged(format!("it is of format {format}, this program reads {FORMAT}")));
        }
        let manifest_bytes = u32::from_le_bytes(self.array()?);
        if manifest_bytes > MAX_MANIFEST_BYTES {
            return Err(self.damaged(format!("its manifest would have {manifest_bytes} bytes")));
        }
        let plan_bytes = u64::from_le_bytes(self.array()?);
        Ok(Header { manifest_bytes: manifest_bytes as usize, plan_bytes, digest: self.array()? })
    }

    fn manifest(&mut self, header: &Header) -> Result<(Manifest, Vec<u8>)> {
        let mut json = vec![0; header.manifest_bytes];
        self.fill(&mut json, "manifest")?;
        let manifest = serde_json::from_slice(&json).map_err(|error| self.damaged(format!("its manifest: {error}")))?;
        Ok((manifest, json))
    }

    /// The `bytes` bytes from `start` on and the hash of each piece of them, on all cores.
    fn plan(&self, start: u64, bytes: u64) -> Result<(Vec<u8>, Vec<[u8; 32]>)> {
        let room = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
        let Some(bytes) = usize::try_from(bytes).ok().filter(|&bytes| room(bytes)) else {
            return Err(self.damaged(format!("there is no memory for its plan of {bytes} bytes")));
        };
        let mut plan = vec![0; bytes];
        let read = |(number, piece): (usize, &mut [u8])| {
            self.file.read_exact_at(piece, start + (number * PIECE_BYTES) as u64).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => self.damaged("it changed while it was read".into()),
                _ => Error::io("read", self.path)(error),
            })?;
            Ok(Sha256::digest(piece).into())
        };
        let pieces = plan.par_chunks_mut(PIECE_BYTES).enumerate().map(read).collect::<Result<_>>()?;
        Ok((plan, pieces))
    }

    fn check_length(&self, header: &Header) -> Result<()> {
        let Header { manifest_bytes, plan_bytes, .. } = *header;
        if (HEADER_BYTES as u64 + manifest_bytes as u64).checked_add(plan_bytes) == Some(self.file_bytes) {
            return Ok(());
        }
        let found = self.file_bytes;
        Err(self.damaged(format!("it has {found} bytes, its header says {HEADER_BYTES} + {manifest_bytes} + {plan_bytes}")))
    }
}

#[cfg(test)]
mod tests;
