//! Opening a model on TensorRT: from an engine file or the cache to lanes that are ready.

use super::Progress;
use crate::Result;
use crate::backend::gpu::{GpuBackend, GpuSettings};
use crate::backend::tensorrt::{
    BuildProgress, BuildSettings, Cache, EngineRequest, Library, Runtime, TensorRtEncoder, cached_engine, load_engine,
};
use crate::cuda::Device;
use crate::model::ModelFolder;
use crate::pooling::Head;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is to be opened.
pub(super) struct Request<'a> {
    /// An engine file; without it, the cache's.
    pub engine: Option<&'a Path>,
    pub lanes: Option<usize>,
    /// How an engine is built for the cache.
    pub build: &'a BuildSettings,
    pub progress: Option<&'a Arc<dyn Progress>>,
}

/// GPU `device` and TensorRT, where this machine has them.
pub(super) fn find(device: usize) -> Result<(Device, Arc<Library>)> {
    // The device first: TensorRT 8.6 crashes where no driver is usable.
    let device = Device::open(device)?;
    Ok((device, Library::load()?))
}

/// The backend, and the file that its engine came from.
pub(super) fn open(
    (device, library): (Device, Arc<Library>),
    request: &Request<'_>,
    folder: &ModelFolder,
    head: Head,
) -> Result<(GpuBackend, PathBuf)> {
    let (file, path) = match request.engine {
        Some(path) => (load_engine(path, &library, &device, folder)?, path.to_path_buf()),
        None => {
            let mut wanted = EngineRequest::new(folder);
            wanted.settings = request.build.clone();
            cached_engine(&library, &device, &Cache::from_env()?, &wanted, &Steps(request.progress))?
        }
    };
    let runtime = Runtime::new(&library, &device)?;
    let encoder = Arc::new(TensorRtEncoder::load(&runtime, &file)?);
    drop(file);
    let mut settings = GpuSettings::default();
    if let Some(lanes) = request.lanes {
        settings.lanes = lanes;
    }
    Ok((GpuBackend::new(encoder, head, folder.config.pad_token_id, &settings)?, path))
}

/// A build's phases as an embedder's progress.
struct Steps<'a>(Option<&'a Arc<dyn Progress>>);

impl BuildProgress for Steps<'_> {
    fn phase_started(&self, phase: &str, parent: Option<&str>, _: u32) {
        // The phases within a phase are for those who build on purpose.
        if let (Some(progress), None) = (self.0, parent) {
            progress.step(Some(phase));
        }
    }

    fn phase_finished(&self, _: &str) {
        if let Some(progress) = self.0 {
            progress.step(None);
        }
    }
}
