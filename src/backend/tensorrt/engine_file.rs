//! Engine files: a plan with the manifest that says what it was built for.
//!
//! Layout, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic `trtembed` |
//! | 8..12 | format version, 1 |
//! | 12..16 | length of the manifest |
//! | 16..24 | length of the plan |
//! | 24..56 | SHA-256 of manifest and plan |
//! | 56.. | manifest (JSON), plan |

use super::builder::Arithmetic;
use super::profile::Profile;
use crate::files::AtomicFile;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 8] = b"trtembed";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 56;
/// Far above any manifest: a larger length is damage, and is not allocated.
const MAX_MANIFEST_BYTES: u32 = 1 << 20;

/// What a plan was built for. A plan runs only where all of it is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Version of TensorRT.
    pub tensorrt: String,
    /// Compute capability, e.g. `9.0`.
    pub compute_capability: String,
    /// The GPU's name.
    pub gpu: String,
}

/// The model that a plan computes. Vectors of different models are not comparable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// SHA-256 of the ONNX graph.
    pub graph: String,
    /// SHA-256 of tokenizer.json.
    pub tokenizer: String,
    /// Pooling and what follows it, in words.
    pub pooling: String,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Longest row.
    pub positions: usize,
}

/// How near the engine's vectors are to the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    /// Texts compared.
    pub texts: usize,
    /// What they were compared with.
    pub reference: String,
    /// Smallest cosine.
    pub min_cosine: f64,
    /// Largest difference of a component.
    pub max_abs_difference: f64,
    /// Vectors with a NaN or an infinity.
    pub not_finite: usize,
}

/// How a plan was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// `trt-embed` and its version.
    pub by: String,
    /// CUDA version of the driver. A plan also runs under other drivers.
    pub cuda_driver: String,
    /// Seconds that it took.
    pub seconds: u64,
    /// Most bytes of workspace, if limited.
    pub workspace_bytes: Option<usize>,
    /// TensorRT's optimisation level, if set.
    pub optimization_level: Option<u8>,
}

/// The first part of an engine file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What it runs on.
    pub machine: Machine,
    /// What it computes.
    pub model: Model,
    /// In which arithmetic.
    pub arithmetic: Arithmetic,
    /// For which shapes, in the plan's order.
    pub profiles: Vec<Profile>,
    /// How it was made.
    pub build: Build,
    /// How good it is, where that was measured.
    pub fidelity: Option<Fidelity>,
}

/// A manifest with its plan.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineFile {
    /// What the plan is.
    pub manifest: Manifest,
    /// TensorRT's bytes.
    pub plan: Vec<u8>,
}

struct Header {
    manifest_bytes: usize,
    plan_bytes: u64,
    digest: [u8; 32],
}

fn mismatch(field: &'static str, expected: &str, found: &str) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::EngineMismatch { field, expected: expected.into(), found: found.into() })
}

impl Manifest {
    /// Checks that the plan runs on `machine`.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_machine(&self, machine: &Machine) -> Result<()> {
        mismatch("the version of TensorRT", &machine.tensorrt, &self.machine.tensorrt)?;
        mismatch("the compute capability", &machine.compute_capability, &self.machine.compute_capability)?;
        mismatch("the GPU", &machine.gpu, &self.machine.gpu)
    }

    /// Checks that the plan computes `model`.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_model(&self, model: &Model) -> Result<()> {
        mismatch("the hash of the graph", &model.graph, &self.model.graph)?;
        mismatch("the hash of the tokenizer", &model.tokenizer, &self.model.tokenizer)?;
        mismatch("the pooling", &model.pooling, &self.model.pooling)?;
        mismatch("the hidden size", &model.hidden_size.to_string(), &self.model.hidden_size.to_string())?;
        mismatch("the longest row", &model.positions.to_string(), &self.model.positions.to_string())
    }
}

impl EngineFile {
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
        let digest = Sha256::new().chain_update(&json).chain_update(plan).finalize();

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
        file.file()?.sync_all().map_err(Error::io("write", path))?;
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
        let mut plan = Vec::new();
        // The file's own length bounds the allocation.
        plan.reserve_exact(usize::try_from(header.plan_bytes).unwrap_or(0));
        reader.file.read_to_end(&mut plan).map_err(Error::io("read", path))?;
        let digest = Sha256::new().chain_update(&json).chain_update(&plan).finalize();
        if digest[..] != header.digest {
            return Err(reader.damaged("its SHA-256 is not the one in its header".into()));
        }
        Ok(Self { manifest, plan })
    }
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
                Error::NotFound { what: "engine file".into(), path: path.into(), next: "build one with `trt-embed build`".into() }
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
#[path = "engine_file_tests.rs"]
pub(super) mod tests;
