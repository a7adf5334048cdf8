//! How fast engines are beside one another, and what they multiply in: the encoder at the largest shape of each profile.

use super::proof;
use crate::cuda::{CudaError, Device};
use crate::gpu::GpuBackend;
use crate::model::ModelFolder;
use crate::tensorrt::engine_file::{EngineFile, Speed, rounded};
use crate::tensorrt::library::{Library, Products, Profile};
use crate::{Error, Result};
use std::sync::Arc;

/// Runs of each shape, of which the median counts.
const SPEED_RUNS: usize = 50;

/// Microseconds of the same model's engines in other arithmetic, in the order of the profiles.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured<'a> {
    pub fp16: Option<&'a [f64]>,
    pub int8: Option<&'a [f64]>,
}

/// Microseconds of the encoder in `file` at the largest shape of each profile, in their order. What its kernels multiply in is noted in
/// its manifest.
pub(super) fn measure(library: &Arc<Library>, device: &Device, folder: &ModelFolder, file: &mut EngineFile) -> Result<Vec<f64>> {
    let backend = proof::executor(library, device, folder, file)?;
    let time = |profile: &Profile| {
        let shape = profile.max();
        let micros = backend.gpu_micros(shape.batch as usize, shape.seq as usize, SPEED_RUNS)?.1.encoder;
        Ok(rounded(format!("{micros:.1}")))
    };
    let micros = file.manifest.profiles.iter().map(time).collect::<Result<_>>()?;
    file.manifest.products = products(&backend, &file.manifest.profiles)?;
    Ok(micros)
}

/// Of the profiles whose kernels are known.
fn products(backend: &GpuBackend, profiles: &[Profile]) -> Result<Vec<Products>> {
    let mut products = Vec::new();
    for (place, &profile) in profiles.iter().enumerate() {
        match backend.kernels(place) {
            Ok(kernels) => products.extend(kernels.map(|names| Products::count(profile, &names))),
            Err(Error::Cuda(error @ CudaError::DriverTooOld { .. })) => {
                log::warn!("what the kernels multiply in is not known: {error}");
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(products)
}

/// What the manifest of an engine says that takes `micros`.
pub(super) fn speeds(profiles: &[Profile], micros: &[f64], beside: Measured<'_>) -> Vec<Speed> {
    let at = |times: Option<&[f64]>, place: usize| times.and_then(|times| times.get(place).copied());
    let speed = |(place, (&profile, &micros))| Speed {
        profile,
        micros,
        fp16_micros: at(beside.fp16, place),
        int8_micros: at(beside.int8, place),
    };
    profiles.iter().zip(micros).enumerate().map(speed).collect()
}
