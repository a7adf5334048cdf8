//! Opening a model on TensorRT: from an engine file or the cache to lanes that are ready.

use crate::compare::Padding;
use crate::cuda::Device;
use crate::gpu::{GpuBackend, GpuSettings};
use crate::model::ModelFolder;
use crate::pooling::Head;
use crate::tensorrt::{
    BuildSettings, Cache, EngineFile, EngineRequest, Flavour, Library, Loaded, Manifest, Runtime, TensorRtEncoder, cached_engine,
    loaded, machine, prove_as, recall_proof,
};
use crate::trace::stage;
use crate::{Error, NoProgress, Progress, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is to be opened.
pub(super) struct Request<'a> {
    pub lanes: Option<usize>,
    /// The longest text that was asked for, if any.
    pub max_tokens: Option<usize>,
    /// Whether an engine file must have been compared with its model already.
    pub require_proof: bool,
    /// How an engine is built for the cache.
    pub build: &'a BuildSettings,
    pub progress: Option<&'a Arc<dyn Progress>>,
}

impl Request<'_> {
    fn progress(&self) -> &dyn Progress {
        self.progress.map_or(&NoProgress, |progress| &**progress)
    }
}

/// GPU `device` and TensorRT, where this machine has them and they go together.
pub(super) fn find(device: usize) -> Result<(Device, Arc<Library>)> {
    // The device first: TensorRT 8.6 crashes where no driver is usable.
    let device = stage("opening the GPU", || Device::open(device))?;
    let library = stage("opening TensorRT", Library::load)?;
    library.check_device(&device)?;
    Ok((device, library))
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
    let mut file = file?;
    let (device, library) = found?;
    file.manifest.check_machine(&machine(&library, &device))?;
    let place = place_in_cache(&library, &device, &file)?;
    if let Some(place) = &place
        && file.manifest.unproven.is_some()
    {
        prove_once(&(device.clone(), library.clone()), path, place, &mut file, request, folder)?;
    }
    let kept = Kept::at(&library, place);
    if request.require_proof && file.manifest.fidelity.is_none() {
        return Err(Error::Unproven { path: path.into(), reason: "it was built without being compared with its model".into() });
    }
    start(&(device, library), file, kept, request, folder, head)
}

/// Sees to it that an engine that was built ahead of time has shown on this machine what it must.
fn prove_once(
    (device, library): &(Device, Arc<Library>),
    path: &Path,
    (cache, loaded): &(Cache, Loaded),
    file: &mut EngineFile,
    request: &Request<'_>,
    folder: &ModelFolder,
) -> Result<()> {
    if recall_proof(cache, loaded, file) {
        return Ok(());
    }
    if request.require_proof {
        let reason = format!("it was built ahead of time and never compared with its model on {}", device.properties().name);
        return Err(Error::Unproven { path: path.into(), reason });
    }
    log::info!("{} was built ahead of time: comparing it with its model, once on this machine", path.display());
    stage("proving the engine", || prove_as(library, device, (cache, loaded), folder, file, request.progress()))
}

/// Where what is learnt of an engine on this machine is kept, if anything is. Of the file as it was read, before a proof is taken into it.
fn place_in_cache(library: &Library, device: &Device, file: &EngineFile) -> Result<Option<(Cache, Loaded)>> {
    if library.version().flavour != Flavour::Rtx && file.manifest.unproven.is_none() {
        return Ok(None);
    }
    Ok(Some((Cache::from_env()?, loaded(library, device, file)?)))
}

/// Where compiled kernels of an engine are kept between processes: what TensorRT for RTX compiles at load, which takes seconds.
struct Kept {
    cache: Cache,
    loaded: Loaded,
    bytes: Vec<u8>,
}

impl Kept {
    /// None with a TensorRT that compiles nothing at load.
    fn at(library: &Library, place: Option<(Cache, Loaded)>) -> Option<Self> {
        let (cache, loaded) = place.filter(|_| library.version().flavour == Flavour::Rtx)?;
        let bytes = cache.kernels(&loaded);
        Some(Self { cache, loaded, bytes })
    }

    fn take_into(&self, encoder: &TensorRtEncoder) {
        if !self.bytes.is_empty() && !encoder.engines().iter().all(|engine| engine.load_kernels(&self.bytes)) {
            log::info!("kernels that were kept for the engine are another driver's, and are compiled anew");
        }
    }

    /// Without them the next process compiles again, no more.
    fn keep(&self, encoder: &TensorRtEncoder) -> Result<()> {
        for engine in encoder.engines() {
            let bytes = engine.kernels()?;
            if bytes != self.bytes {
                self.cache.store_kernels(&self.loaded, &bytes)?;
            }
        }
        Ok(())
    }
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
    let (file, path) = cached_engine(library, device, &Cache::from_env()?, &wanted, request.progress())?;
    let kept = Kept::at(library, place_in_cache(library, device, &file)?);
    Ok((start(found, file, kept, request, folder, head)?, path))
}

fn start(
    (device, library): &(Device, Arc<Library>),
    file: EngineFile,
    kept: Option<Kept>,
    request: &Request<'_>,
    folder: &ModelFolder,
    head: Head,
) -> Result<GpuBackend> {
    let runtime = Runtime::new(library, device)?;
    let encoder = Arc::new(stage("loading the engine", || TensorRtEncoder::load(&runtime, &file))?);
    if let Some(kept) = &kept {
        kept.take_into(&encoder);
    }
    let mut settings = GpuSettings { costs: file.manifest.shape_costs(), ..GpuSettings::default() };
    drop(file);
    if let Some(lanes) = request.lanes {
        settings.lanes = lanes;
    }
    let backend = GpuBackend::new(encoder.clone(), head, Padding::of_model(folder), &settings)?;
    if let Some(Err(error)) = kept.map(|kept| kept.keep(&encoder)) {
        log::warn!("the next load compiles its kernels again: {error}");
    }
    Ok(backend)
}
