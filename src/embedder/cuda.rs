//! Opening a model on the native CUDA engine.

use crate::Result;
use crate::compare::Padding;
use crate::cuda::Device;
use crate::gpu::{GpuBackend, GpuSettings};
use crate::model::ModelFolder;
use crate::native::{NativeEncoder, NativeSettings};
use crate::pooling::Head;
use crate::trace::stage;
use std::sync::Arc;

/// The model on `device`, for texts of up to `max_tokens` tokens.
pub(super) fn open(
    device: &Device,
    native: &NativeSettings,
    lanes: Option<usize>,
    folder: &ModelFolder,
    head: Head,
    max_tokens: usize,
) -> Result<GpuBackend> {
    let encoder = stage("making the engine", || NativeEncoder::new(device, &folder.architecture()?, max_tokens, native))?;
    let mut settings = GpuSettings { cubins: native.cubins.clone(), ..GpuSettings::default() };
    if let Some(lanes) = lanes {
        settings.lanes = lanes;
    }
    GpuBackend::new(Arc::new(encoder), head, Padding::of_model(folder), &settings)
}
