//! Opening a model on TensorRT: from an engine file or the cache to lanes that are ready.

use crate::compare::Padding;
use crate::cuda::Device;
use crate::gpu::{GpuBackend, GpuSettings};
use crate::model::ModelFolder;
use crate::pooling::Head;
use crate::tensorrt::{
    BuildSettings, Cache, EngineFile, EngineRequest, Library, Manifest, Runtime, TensorRtEncoder, cached_engine, machine,
};
use crate::trace::stage;
use crate::{NoProgress, Progress, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is to be opened.
pub(super) struct Request<'a> {
    pub lanes: Option<usize>,
    /// The longest text that was asked for, if any.
    pub max_tokens: Option<usize>,
    /// How an engine is built for the cache.
    pub build: &'a BuildSettings,
    pub progress: Option<&'a Arc<dyn Progress>>,
}

/// GPU `device` and TensorRT, where this machine has them.
pub(super) fn find(device: usize) -> Result<(Device, Arc<Library>)> {
    // The device first: TensorRT 8.6 crashes where no driver is usable.
    let device = stage("opening the GPU", || Device::open(device))?;
    Ok((device, stage("opening TensorRT", Library::load)?))
}

/// The backend on GPU `device` with the engine in the file at `path`.
pub(super) fn open_file(
    device: usize,
    path: &Path,
    request: &Request<'_>,
    folder: &ModelFolder,
    head: Head,
) -> Result<GpuBackend> {
    // Side by side: the driver takes as long to start as a gigabyte to be read and hashed.
    let check = |manifest: &Manifest| {
        manifest.check_folder(folder)?;
        request.max_tokens.map_or(Ok(()), |tokens| manifest.check_max_tokens(tokens))
    };
    let read = || stage("reading the engine", || EngineFile::read(path, check));
    let (found, file) = rayon::join(|| find(device), read);
    // What was asked for first, then what this machine has.
    let file = file?;
    let (device, library) = found?;
    file.manifest.check_machine(&machine(&library, &device))?;
    start(&(device, library), file, request, folder, head)
}

/// The backend with the engine of the cache, which is built where it is not there, and the file that it came from.
pub(super) fn open_cached(
    found: &(Device, Arc<Library>),
    request: &Request<'_>,
    folder: &ModelFolder,
    head: Head,
) -> Result<(GpuBackend, PathBuf)> {
    let (device, library) = found;
    let mut wanted = EngineRequest::new(folder);
    wanted.settings = request.build.clone();
    wanted.max_tokens = request.max_tokens;
    let progress: &dyn Progress = request.progress.map_or(&NoProgress, |progress| &**progress);
    let (file, path) = cached_engine(library, device, &Cache::from_env()?, &wanted, progress)?;
    Ok((start(found, file, request, folder, head)?, path))
}

fn start(
    (device, library): &(Device, Arc<Library>),
    file: EngineFile,
    request: &Request<'_>,
    folder: &ModelFolder,
    head: Head,
) -> Result<GpuBackend> {
    let runtime = Runtime::new(library, device)?;
    let encoder = stage("loading the engine", || TensorRtEncoder::load(&runtime, &file))?;
    let mut settings = GpuSettings { costs: file.manifest.shape_costs(), ..GpuSettings::default() };
    drop(file);
    if let Some(lanes) = request.lanes {
        settings.lanes = lanes;
    }
    GpuBackend::new(Arc::new(encoder), head, Padding::of_model(folder), &settings)
}
