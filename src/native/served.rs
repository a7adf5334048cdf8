//! Whether the engine can serve a machine and a model, before anything is loaded.

use super::shape::{Precision, Shape};
use crate::Result;
use crate::cuda::{CudaError, Device, Properties, find_nvrtc};
use crate::model::Architecture;

/// The oldest compute capability that has the kernels' instructions (`mma.sync` of bf16, `cp.async`).
const OLDEST: (u32, u32) = (8, 0);

/// Whether the engine runs on `device`: the GPU is new enough, and NVRTC is there to compile its kernels.
///
/// # Errors
/// [`CudaError::GpuTooOld`]; [`CudaError::NvrtcMissing`].
pub fn check_device(device: &Device) -> Result<(), CudaError> {
    check_properties(device.properties())?;
    // Also where all kernels are in the cache: they are kept by its version.
    find_nvrtc(device.properties().driver_cuda.0).map(drop)
}

/// Whether the engine runs `architecture` with values stored in `precision`.
///
/// # Errors
/// [`Error::NotServed`](crate::Error::NotServed) for the first part or size that no kernel serves.
pub fn check_architecture(architecture: &Architecture, precision: Precision) -> Result<()> {
    Shape::of(architecture, precision).map(drop)
}

fn check_properties(about: &Properties) -> Result<(), CudaError> {
    let dotted = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    if about.compute_capability < OLDEST {
        let (found, needed) = (dotted(about.compute_capability), dotted(OLDEST));
        return Err(CudaError::GpuTooOld { name: about.name.clone(), found, needed });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_from_8_0_on_are_served_and_older_ones_named() {
        let gpu = |major, minor| Properties {
            name: "NVIDIA Test".to_owned(),
            compute_capability: (major, minor),
            ..Properties::unknown()
        };
        for served in [(8, 0), (8, 6), (9, 0), (12, 1)] {
            assert_eq!(check_properties(&gpu(served.0, served.1)), Ok(()));
        }
        for (old, found) in [((7, 5), "7.5"), ((7, 0), "7.0"), ((6, 1), "6.1")] {
            let error = check_properties(&gpu(old.0, old.1)).unwrap_err().to_string();
            let told = format!("GPU NVIDIA Test has compute capability {found}, 8.0 (A100) or newer is needed");
            assert!(error.starts_with(&told), "{error}");
        }
    }
}
