//! The proof of a new engine: its vectors beside those of the same model on the CPU.

use super::encoder::TensorRtEncoder;
use super::engine::Runtime;
use super::engine_file::EngineFile;
use super::library::Library;
use super::profile::Profile;
use crate::backend::gpu::parity::{Agreement, Reference, rows_of_all_lengths};
use crate::backend::gpu::{GpuBackend, GpuSettings};
use crate::cuda::Device;
use crate::model::ModelFolder;
use crate::pooling::Head;
use crate::tokens::{Tokenizer, TokenizerSettings};
use crate::{Error, Result};
use std::sync::Arc;

/// What engines are compared with, for the manifest.
pub(super) const REFERENCE: &str = "the same weights in fp32 on the CPU";

/// Whether there will be a reference, without making it.
pub(super) fn check_reference(folder: &ModelFolder) -> Result<()> {
    if cfg!(not(feature = "cpu")) {
        return Err(Error::NoReference { reason: "this build lacks the feature `cpu`".into() });
    }
    folder.weights().map(drop).map_err(|error| Error::NoReference { reason: error.to_string() })
}

/// The model's vectors on the CPU, of texts up to the longest that `profiles` hold.
pub(super) fn reference(folder: &ModelFolder, profiles: &[Profile]) -> Result<Reference> {
    let config = &folder.config;
    let longest = profiles.iter().map(|profile| profile.max().seq as usize).max().unwrap_or(1).min(config.max_tokens());
    let mut settings = TokenizerSettings::new(longest, config.pad_token_id, config.vocab_size);
    settings.lower_case = folder.do_lower_case;
    let rows = rows_of_all_lengths(&Tokenizer::open(&folder.tokenizer_path(), settings)?)?;
    run_on_cpu(folder, longest, rows)
}

#[cfg(feature = "cpu")]
fn run_on_cpu(folder: &ModelFolder, longest: usize, rows: Vec<Vec<u32>>) -> Result<Reference> {
    use crate::backend::gpu::parity::Padding;
    let head = Head::of_model(folder)?;
    let dim = head.dim;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let backend = crate::backend::CpuBackend::new(&folder.config, folder.weights()?, head, longest, threads)?;
    let padding = Padding { id: folder.config.pad_token_id, vocab_size: folder.config.vocab_size };
    Reference::run(&backend, rows, dim, padding)
}

#[cfg(not(feature = "cpu"))]
fn run_on_cpu(folder: &ModelFolder, _: usize, _: Vec<Vec<u32>>) -> Result<Reference> {
    check_reference(folder)?;
    Err(Error::NoReference { reason: "this build lacks the feature `cpu`".into() })
}

/// Loads the engine of `file` and runs the reference's texts through each of its profiles.
pub(super) fn compare(
    library: &Arc<Library>,
    device: &Device,
    folder: &ModelFolder,
    file: &EngineFile,
    reference: &Reference,
) -> Result<Agreement> {
    reference.compare(&executor(library, device, folder, file)?)
}

/// The engine of `file` with one lane.
pub(super) fn executor(library: &Arc<Library>, device: &Device, folder: &ModelFolder, file: &EngineFile) -> Result<GpuBackend> {
    let encoder = TensorRtEncoder::load(&Runtime::new(library, device)?, file)?;
    let settings = GpuSettings { lanes: 1, ..GpuSettings::default() };
    GpuBackend::new(Arc::new(encoder), Head::of_model(folder)?, folder.config.pad_token_id, &settings)
}
