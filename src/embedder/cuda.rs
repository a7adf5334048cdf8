//! Opening a model on the native CUDA engine; under `auto` in bf16 where it overflows fp16.

use super::auto;
use super::widening::Widening;
use crate::compare::Padding;
use crate::cuda::Device;
use crate::error::Error;
use crate::gpu::{GpuBackend, GpuSettings};
use crate::model::{Architecture, ModelFolder};
use crate::native::{NativeEncoder, NativeSettings, Precision};
use crate::pooling::Head;
use crate::trace::stage;
use crate::{Result, trace};
use std::sync::Arc;

/// What is to be opened, and where.
#[derive(Clone)]
pub(super) struct Request {
    pub device: Device,
    pub settings: NativeSettings,
    pub lanes: Option<usize>,
    pub head: Head,
    pub padding: Padding,
    /// The longest text in tokens.
    pub max_tokens: usize,
}

/// A model that `auto` opened.
pub(super) enum Opened {
    /// In fp16, and in bf16 from the first overflow on.
    Narrow(Widening<GpuBackend>),
    /// In bf16 already, and why.
    Wide(Box<GpuBackend>, String),
}

impl Request {
    fn in_precision(&self, precision: Precision) -> Self {
        let mut request = self.clone();
        request.settings.precision = precision;
        request
    }
}

/// The model on the request's device.
pub(super) fn open(request: &Request, architecture: &Architecture) -> Result<GpuBackend> {
    let Request { device, settings: native, lanes, head, padding, max_tokens } = request;
    let encoder = stage("making the engine", || NativeEncoder::new(device, architecture, *max_tokens, native))?;
    let mut settings = GpuSettings { cubins: native.cubins.clone(), ..GpuSettings::default() };
    if let Some(lanes) = lanes {
        settings.lanes = *lanes;
    }
    GpuBackend::new(Arc::new(encoder), head.clone(), *padding, &settings)
}

/// As [`open`], for a caller who asked for no precision: in fp16, and where weights or values overflow it in bf16.
pub(super) fn open_fitting(request: &Request, folder: &ModelFolder) -> Result<Opened> {
    let architecture = folder.architecture()?;
    let narrow = match open(request, &architecture) {
        Ok(narrow) => narrow,
        Err(error) => {
            let Some(precision) = auto::wider(&error, None) else { return Err(error) };
            log::warn!("{error}; --backend auto loads the model in {}", precision.name());
            let wide = open(&request.in_precision(precision), &architecture)?;
            return Ok(Opened::Wide(Box::new(wide), format!("cuda in {} in the place of fp16: {error}", precision.name())));
        }
    };
    let overflows: fn(&Error) -> bool = |error| auto::wider(error, None).is_some();
    // The weights that are loaded again must be the same ones: the architecture keeps the files mapped that were opened here, and what an adapter
    // changed.
    let wide = request.in_precision(Precision::Bf16);
    let remake = Box::new(move || {
        let _range = trace::range("load again in bf16");
        open(&wide, &architecture)
    });
    Ok(Opened::Narrow(Widening::new(narrow, overflows, remake)))
}
