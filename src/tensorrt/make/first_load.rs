//! The proof of an engine that was built ahead of time: made on the GPU where it is first loaded, and kept in the cache.

use super::pipeline::phase;
use super::proof;
use super::source::machine;
use crate::cuda::Device;
use crate::model::ModelFolder;
use crate::tensorrt::engine_file::{Cache, EngineFile, Loaded, Proof};
use crate::tensorrt::library::Library;
use crate::{Progress, Result};
use std::sync::Arc;

/// The name under which `cache` keeps what is learnt of `file`, as it was read, on this machine.
pub(crate) fn loaded(library: &Library, device: &Device, file: &EngineFile) -> Result<Loaded> {
    Loaded::new(file, &machine(library, device))
}

/// Takes into `file` what it showed when it was loaded here before; false where it never was.
pub(crate) fn recall_proof(cache: &Cache, loaded: &Loaded, file: &mut EngineFile) -> bool {
    let proof = cache.proof(loaded);
    proof.map(|proof| file.manifest.take_proof(proof)).is_some()
}

/// Compares an engine that is [`unproven`](crate::tensorrt::Manifest::unproven) with its model on the CPU, as it would have been when it was built,
/// and notes in its manifest what came of it. `cache` keeps that, so that each machine does it once; an engine that is not unproven is left as it is.
///
/// # Errors
/// [`Error::Fidelity`](crate::Error::Fidelity) below the smallest cosine that its manifest asks for; [`Error::NoReference`](crate::Error::NoReference)
/// without the feature `cpu` or the model's weights; [`Error::Cancelled`](crate::Error::Cancelled); [`Error::Io`](crate::Error::Io).
pub fn prove(
    library: &Arc<Library>,
    device: &Device,
    cache: &Cache,
    folder: &ModelFolder,
    file: &mut EngineFile,
    progress: &dyn Progress,
) -> Result<()> {
    if file.manifest.unproven.is_none() {
        return Ok(());
    }
    let loaded = loaded(library, device, file)?;
    prove_as(library, device, (cache, &loaded), folder, file, progress)
}

/// As [`prove`], of a file whose name in the cache is known: it takes as long as reading all of it.
pub(crate) fn prove_as(
    library: &Arc<Library>,
    device: &Device,
    (cache, loaded): (&Cache, &Loaded),
    folder: &ModelFolder,
    file: &mut EngineFile,
    progress: &dyn Progress,
) -> Result<()> {
    let Some(wanted) = file.manifest.unproven.clone() else { return Ok(()) };
    // No build may spoil what is measured of its shapes, and of several processes one does the work.
    let _lock = cache.lock(progress)?;
    if recall_proof(cache, loaded, file) {
        return Ok(());
    }
    let reference = || proof::reference(folder, &file.manifest.profiles, None);
    let reference = phase(progress, "embedding the texts to compare", reference)?;
    let compare = || proof::compare(library, device, folder, file, &reference, wanted.min_cosine);
    phase(progress, "comparing the engine with the reference", compare)??;
    if let Some(fidelity) = file.manifest.fidelity.clone() {
        let proof = Proof { fidelity, costs: file.manifest.costs.clone() };
        cache.store_proof(loaded, &proof)?;
        file.manifest.take_proof(proof);
    }
    Ok(())
}
