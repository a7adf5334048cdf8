//! The proof of a new engine: its vectors beside those of the same model on the CPU, or of another program.

use super::reference::ReferenceFile;
use crate::compare::{Agreement, Padding, Reference, rows_of_all_lengths};
use crate::cuda::Device;
use crate::executor::Backend;
use crate::gpu::{GpuBackend, GpuSettings};
use crate::model::ModelFolder;
use crate::pooling::Head;
use crate::tensorrt::encoder::TensorRtEncoder;
use crate::tensorrt::engine_file::{EngineFile, Fidelity, Manifest, rounded};
use crate::tensorrt::library::{Arithmetic, Library, Profile, Runtime};
use crate::tokens::{Tokenizer, TokenizerSettings};
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// What engines are compared with where nothing else is given, for the manifest.
const ON_CPU: &str = "the same weights in fp32 on the CPU";

/// What an engine is compared with.
pub(super) struct Oracle {
    vectors: Reference,
    /// For the manifest.
    name: String,
}

/// Whether there will be something to compare with, without running the model: the file at `given`, or the CPU.
pub(super) fn check_reference(folder: &ModelFolder, given: Option<&Path>) -> Result<()> {
    if let Some(path) = given {
        return ReferenceFile::read(path)?.of_model(folder).map(drop);
    }
    if cfg!(not(feature = "cpu")) {
        return Err(Error::NoReference { reason: "this build lacks the feature `cpu`".into() });
    }
    folder.weights().map(drop).map_err(|error| Error::NoReference { reason: error.to_string() })
}

/// The vectors in the file at `given`; else the model's on the CPU, of texts up to the longest that `profiles` hold.
pub(super) fn reference(folder: &ModelFolder, profiles: &[Profile], given: Option<&Path>) -> Result<Oracle> {
    if let Some(path) = given {
        let file = ReferenceFile::read(path)?;
        return Ok(Oracle { vectors: file.of_model(folder)?, name: file.name() });
    }
    let longest = profiles.iter().map(|profile| profile.max().seq as usize).max().unwrap_or(1).min(folder.config.max_tokens());
    let settings = TokenizerSettings::of_model(folder, longest);
    let rows = rows_of_all_lengths(&Tokenizer::open(&folder.tokenizer, settings)?)?;
    Ok(Oracle { vectors: run_on_cpu(folder, longest, rows)?, name: ON_CPU.into() })
}

#[cfg(feature = "cpu")]
fn run_on_cpu(folder: &ModelFolder, longest: usize, rows: Vec<Vec<u32>>) -> Result<Reference> {
    let head = Head::of_model(folder)?;
    let dim = head.dim;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let backend = crate::cpu::CpuBackend::new(folder.architecture()?, head, longest, threads)?;
    Reference::run(&backend, rows, dim, Padding::of_model(folder))
}

#[cfg(not(feature = "cpu"))]
fn run_on_cpu(folder: &ModelFolder, _: usize, _: Vec<Vec<u32>>) -> Result<Reference> {
    check_reference(folder, None)?;
    Err(Error::NoReference { reason: "this build lacks the feature `cpu`".into() })
}

/// Loads the engine of `file` and runs the reference's texts through each of its profiles. How true it is and what its shapes cost is noted in
/// its manifest; [`Error::Fidelity`] within where that is below `bar`.
pub(super) fn compare(
    library: &Arc<Library>,
    device: &Device,
    folder: &ModelFolder,
    file: &mut EngineFile,
    oracle: &Oracle,
    bar: f64,
) -> Result<Result<()>> {
    let executor = executor(library, device, folder, file)?;
    if let Some(costs) = executor.costs() {
        file.manifest.note_costs(&costs);
    }
    let agreement = oracle.vectors.compare(&executor)?;
    let fidelity = fidelity(&agreement, &file.manifest.profiles, &oracle.name)?;
    let verdict = judge(&agreement, &fidelity, bar, &file.manifest);
    file.manifest.fidelity = Some(fidelity);
    Ok(verdict)
}

/// The engine of `file` with one lane.
pub(super) fn executor(library: &Arc<Library>, device: &Device, folder: &ModelFolder, file: &EngineFile) -> Result<GpuBackend> {
    let encoder = TensorRtEncoder::load(&Runtime::new(library, device)?, file)?;
    let settings = GpuSettings { lanes: 1, costs: file.manifest.shape_costs(), ..GpuSettings::default() };
    GpuBackend::new(Arc::new(encoder), Head::of_model(folder)?, Padding::of_model(folder), &settings)
}

/// The manifest's words for `agreement`.
fn fidelity(agreement: &Agreement, profiles: &[Profile], reference: &str) -> Result<Fidelity> {
    for (profile, cosine) in profiles.iter().zip(&agreement.by_profile) {
        log::info!("profile {profile}: the smallest cosine to the CPU is {cosine:.8}");
    }
    let place = agreement.worst;
    let worst_profile = profiles.get(place.profile).copied().ok_or_else(|| Error::OutsideProfile {
        shape: format!("number {}", place.profile),
        profiles: format!("{} profiles", profiles.len()),
    })?;
    Ok(Fidelity {
        texts: agreement.texts,
        reference: reference.into(),
        min_cosine: rounded(format!("{:.9}", agreement.min_cosine)),
        max_abs_difference: rounded(format!("{:.3e}", agreement.max_abs_difference)),
        not_finite: agreement.not_finite,
        worst_profile,
        worst_tokens: place.tokens,
    })
}

/// Whether the engine of `manifest` reaches `bar`.
fn judge(agreement: &Agreement, fidelity: &Fidelity, bar: f64, manifest: &Manifest) -> Result<()> {
    if agreement.reaches(bar) {
        return Ok(());
    }
    Err(Error::Fidelity {
        measured: agreement.verdict(),
        min_cosine: (fidelity.not_finite == 0).then_some(fidelity.min_cosine),
        bar,
        profile: fidelity.worst_profile.to_string(),
        tokens: fidelity.worst_tokens,
        next: match manifest.arithmetic {
            Arithmetic::Fp16 if manifest.machine.tensorrt.starts_with("8.") => {
                "TensorRT 8 adds up products of fp16 in fp16, which costs deep models and long rows most; the backend cuda adds them up in fp32. \
                 An fp32 engine keeps more; a lower bar accepts less."
            }
            Arithmetic::Fp16 => "An fp32 engine keeps more; a lower bar accepts less.",
            Arithmetic::Int8 => "An fp16 engine keeps more; a lower bar accepts less.",
            Arithmetic::Fp32 => "Do the graph and the weights belong together? A lower bar accepts less.",
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::Place;
    use crate::tensorrt::engine_file::manifest;

    fn agreement(min_cosine: f64, not_finite: usize) -> Agreement {
        let worst = Place { profile: 1, tokens: 23 };
        Agreement {
            texts: 60,
            vectors: 300,
            by_profile: vec![min_cosine],
            min_cosine,
            max_abs_difference: 2e-3,
            not_finite,
            worst,
        }
    }

    fn profiles() -> Vec<Profile> {
        ["1x16", "1x1:2x32:4x64"].map(|text| text.parse().unwrap()).into()
    }

    #[test]
    fn what_was_measured_is_written_down_and_read_again() {
        let written = fidelity(&agreement(0.999_950_000_012_345, 0), &profiles(), ON_CPU).unwrap();
        let read: Fidelity = serde_json::from_str(&serde_json::to_string(&written).unwrap()).unwrap();
        assert_eq!(read, written);
        assert_eq!((written.worst_profile.to_string().as_str(), written.worst_tokens), ("1x1:2x32:4x64", 23));
        assert_eq!((written.texts, written.min_cosine, written.max_abs_difference, written.not_finite), (60, 0.99995, 2e-3, 0));
    }

    #[test]
    fn what_passes_is_taken_and_what_does_not_says_where() {
        let judged = |agreement: &Agreement, arithmetic| {
            let manifest = Manifest { arithmetic, ..manifest() };
            judge(agreement, &fidelity(agreement, &profiles(), ON_CPU).unwrap(), 0.9999, &manifest)
        };
        judged(&agreement(0.99995, 0), Arithmetic::Fp16).unwrap();
        for (agreement, arithmetic, parts) in [
            (agreement(0.9985, 0), Arithmetic::Fp16, ["0.9985000", "0.9999", "23 tokens", "1x1:2x32:4x64", "fp32 engine"]),
            (agreement(0.9985, 0), Arithmetic::Fp32, ["0.9985000", "0.9999", "23 tokens", "1x1:2x32:4x64", "lower bar"]),
            (agreement(1.0, 3), Arithmetic::Fp16, ["3 of 300", "0.9999", "23 tokens", "1x1:2x32:4x64", "not finite"]),
        ] {
            let error = judged(&agreement, arithmetic).unwrap_err();
            let Error::Fidelity { tokens: 23, min_cosine, .. } = &error else { panic!("{error}") };
            assert_eq!(*min_cosine, (agreement.not_finite == 0).then_some(agreement.min_cosine));
            // The one TensorRT that adds up in fp16.
            assert_eq!(error.to_string().contains("TensorRT 8 adds up"), arithmetic == Arithmetic::Fp16, "{error}");
            for part in parts {
                assert!(error.to_string().contains(part), "no {part:?} in: {error}");
            }
        }
    }
}
