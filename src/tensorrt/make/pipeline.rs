//! From a model to a proven engine: export, build, compare with a reference, and what the manifest says of it.

use super::proof;
use super::source::{GraphSource, machine};
use super::timing::{Measured, measure, speeds};
use crate::cuda::Device;
use crate::graph::{Precision, Quantization};
use crate::model::{Activation, ModelFolder};
use crate::tensorrt::engine_file::{Build, Cache, CacheKey, EngineFile, Machine, Manifest, Model, Unproven};
use crate::tensorrt::library::{
    Arithmetic, BuildSettings, Flavour, Library, PlanBuilder, Profile, Target, Version, check_longest, default_profiles,
};
use crate::{Error, Progress, Result, Setting};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What a new engine must show before it is kept: its vectors beside those of the model on the CPU, or in
/// [`EngineRequest::reference`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Gate {
    /// [`Gate::bar`] of the arithmetic.
    #[default]
    Standard,
    /// No cosine below this.
    MinCosine(f64),
    /// Nothing; the manifest then has no fidelity.
    Off,
}

/// Which engine to build.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EngineRequest<'a> {
    /// The model: its graph where `onnx` is none, and in any case tokenizer, sizes and what the engine is compared with.
    pub folder: &'a ModelFolder,
    /// A file with the graph instead, as other exporters write it.
    pub onnx: Option<&'a Path>,
    /// How to build. Without profiles it is [`default_profiles`]; a timing cache comes from the engine cache.
    pub settings: BuildSettings,
    /// Texts of up to so many tokens must be held, also where the model's own limit is lower. (A lower number changes no engine: texts are cut
    /// before they reach it.)
    pub max_tokens: Option<usize>,
    /// Ranges of activations, for an int8 engine of `folder`'s own graph; a graph from `onnx` brings its Q/DQ pairs.
    pub quantization: Option<&'a Quantization>,
    /// Computes the GELU of `folder`'s own graph by its tanh approximation in profiles whose largest shape holds at least so many tokens,
    /// padding included; with 0 in all of them. TensorRT 8.6 has fp16 matrix products for it, and for the exact form only small ones: faster at
    /// large shapes, at a cosine of some 1e-6 less. Where one plan holds all profiles (TensorRT 10 and later, and for RTX) it is all or none.
    pub tanh_gelu: Option<u64>,
    /// What the engine must show.
    pub gate: Gate,
    /// A JSON file of vectors that it is compared with instead of the CPU's: `{"texts": […], "vectors": [[…], …]}`, as
    /// `scripts/gpu_references.py` writes it, made by any program from the same model with its default prompt.
    pub reference: Option<&'a Path>,
}

impl Gate {
    /// The smallest cosine that passes; `None` where nothing is compared. The standard leaves fp16 its 11 bits, fp32 its rounding
    /// and int8 what quantisation costs a text.
    pub fn bar(self, arithmetic: Arithmetic) -> Option<f64> {
        match (self, arithmetic) {
            (Self::Standard, Arithmetic::Fp32) => Some(0.99999),
            (Self::Standard, Arithmetic::Fp16) => Some(0.9999),
            (Self::Standard, Arithmetic::Int8) => Some(0.99),
            (Self::MinCosine(bar), _) => Some(bar),
            (Self::Off, _) => None,
        }
    }
}

impl<'a> EngineRequest<'a> {
    /// An engine of `folder`, in fp16 for the default profiles.
    pub fn new(folder: &'a ModelFolder) -> Self {
        Self {
            folder,
            onnx: None,
            settings: BuildSettings::default(),
            max_tokens: None,
            quantization: None,
            tanh_gelu: None,
            gate: Gate::default(),
            reference: None,
        }
    }

    /// Checks what needs neither TensorRT nor a GPU: the profiles, and that there is a reference where the gate wants one.
    ///
    /// # Errors
    /// [`Error::Setting`] for a profile beyond the model's positions, for profiles that do not hold [`EngineRequest::max_tokens`], and for int8
    /// without ranges; [`Error::NoReference`]; [`Error::ReferenceFile`].
    pub fn check(&self) -> Result<()> {
        for profile in &self.profiles() {
            profile.check(self.folder.config.max_tokens())?;
        }
        self.check_graph()?;
        match self.gate {
            Gate::Off => Ok(()),
            _ => proof::check_reference(self.folder, self.reference),
        }
    }

    /// Whether graph and profiles can be what is asked for.
    fn check_graph(&self) -> Result<()> {
        check_longest(&self.profiles(), self.max_tokens.unwrap_or(0))?;
        self.check_quantization()?;
        let Some(least) = self.tanh_gelu else { return Ok(()) };
        let largest = self.profiles().iter().map(|profile| profile.max().tokens()).max().unwrap_or(0);
        let reason = match (self.onnx, self.folder.config.activation) {
            (Some(_), _) => "it goes with the model's own graph, not with an ONNX file".into(),
            (None, Activation::Gelu) if largest >= least => return Ok(()),
            (None, Activation::Gelu) => format!("it begins at {least} tokens, and no shape holds more than {largest}"),
            (None, _) => "the model's activation (config.json's hidden_act) is not the exact GELU".into(),
        };
        Err(Error::Setting { setting: Setting::TanhGelu, reason })
    }

    /// From how many tokens on GELU is computed by tanh, where that divides the profiles.
    fn divided_gelu(&self) -> Option<u64> {
        self.tanh_gelu.filter(|&least| self.profiles().iter().any(|profile| profile.max().tokens() < least))
    }

    /// Whether ranges are there where they are needed, and nowhere else.
    fn check_quantization(&self) -> Result<()> {
        let int8 = self.settings.arithmetic == Arithmetic::Int8;
        let reason = match (int8, self.onnx.is_some(), self.quantization.is_some()) {
            (true, false, false) => {
                "int8 needs the ranges of activations: calibrate the model, build an engine file with its calibration and run that"
            }
            (false, _, true) | (_, true, true) => return Err(misplaced_calibration()),
            _ => return Ok(()),
        };
        Err(Error::Setting { setting: Setting::Calibration, reason: reason.into() })
    }

    /// Those asked for, else [`default_profiles`].
    pub(super) fn profiles(&self) -> Vec<Profile> {
        match self.settings.profiles.as_slice() {
            [] => default_profiles(self.folder.max_tokens().max(self.max_tokens.unwrap_or(0))),
            some => some.to_vec(),
        }
    }
}

/// Ranges where nothing is quantised, or where the graph brings its own.
pub(super) fn misplaced_calibration() -> Error {
    let reason = "it goes with an int8 engine of the model's own graph, not with other precisions or an ONNX file".into();
    Error::Setting { setting: Setting::Calibration, reason }
}

/// Builds the engine that `request` asks for and compares it with its reference. `cache` gives and keeps the timing cache, and
/// its lock keeps builds of several processes apart; the engine is not put into it.
///
/// For [`Target::Capabilities`] no GPU is asked, and so nothing compared: the engine says of itself what it must show, which [`prove`](super::prove)
/// sees to where it is first loaded.
///
/// # Errors
/// See [`EngineRequest::check`] and [`build_plan`](crate::backend::tensorrt::build_plan); [`Error::Fidelity`] where the engine does not pass the gate; [`Error::Cancelled`].
pub fn build_engine<'a>(
    library: &'a Arc<Library>,
    target: impl Into<Target<'a>>,
    cache: &'a Cache,
    request: &EngineRequest<'a>,
    progress: &'a dyn Progress,
) -> Result<EngineFile> {
    let target = target.into();
    request.check()?;
    if matches!(target, Target::Capabilities(_)) && request.reference.is_some() {
        let reason = "vectors of a file are compared where the engine is built, which no GPU for it does here: leave the file out, and the \
                      engine is compared with the model on the CPU where it is first loaded";
        return Err(Error::Setting { setting: Setting::ComputeCapability, reason: reason.into() });
    }
    let job = Job::new(library, target, cache, request, progress)?;
    let lock = cache.lock(progress)?;
    let mut engine = job.build()?;
    drop(lock);
    if let (Arithmetic::Int8, Target::Device(device)) = (request.settings.arithmetic, target) {
        // A quantised graph of another exporter has no fp16 one beside it. Before the lock, which building it takes.
        let half = || half_precision(library, device, cache, request, progress);
        let half = request.quantization.map(|_| half()).transpose()?;
        let times = || {
            let micros = |file: &mut EngineFile| measure(library, device, request.folder, file);
            let int8 = micros(&mut engine)?;
            if let Some((mut half, _)) = half {
                let fp16 = micros(&mut half)?;
                let beside = Measured { fp16: Some(&fp16), int8: None };
                engine.manifest.speed = speeds(&engine.manifest.profiles, &int8, beside);
            }
            Ok(())
        };
        phase_alone(progress, cache, "measuring int8", times)?;
    }
    Ok(engine)
}

/// The same engine in fp16 out of the cache, and where it lies there. Its fidelity is not asked for.
pub(super) fn half_precision(
    library: &Arc<Library>,
    device: &Device,
    cache: &Cache,
    request: &EngineRequest<'_>,
    progress: &dyn Progress,
) -> Result<(EngineFile, PathBuf)> {
    let mut half = EngineRequest { quantization: None, gate: Gate::Off, ..request.clone() };
    half.settings.arithmetic = Arithmetic::Fp16;
    cached_engine(library, device, cache, &half, progress)
}

/// The engine that `request` asks for out of `cache`, which it is built into where it is not there, and where it lies.
///
/// # Errors
/// As [`build_engine`]; [`Error::Io`] where the cache cannot be written.
pub fn cached_engine(
    library: &Arc<Library>,
    device: &Device,
    cache: &Cache,
    request: &EngineRequest<'_>,
    progress: &dyn Progress,
) -> Result<(EngineFile, PathBuf)> {
    request.check_graph()?;
    Job::new(library, device.into(), cache, request, progress)?.cached(request)
}

/// The engine in the file at `path`, checked against machine and model before its plan is read. One that was built ahead of time may still be
/// unproven, which [`prove`](super::prove) changes.
///
/// # Errors
/// [`Error::EngineMismatch`] for the first field that differs; see [`EngineFile::read`] and [`Manifest::check_folder`].
pub fn load_engine(path: &Path, library: &Library, device: &Device, folder: &ModelFolder) -> Result<EngineFile> {
    EngineFile::read(path, |manifest| {
        manifest.check_machine(&machine(library, device))?;
        manifest.check_folder(folder)
    })
}

/// A request with all that identifies its engine.
pub(super) struct Job<'a> {
    library: &'a Arc<Library>,
    target: Target<'a>,
    cache: &'a Cache,
    folder: &'a ModelFolder,
    progress: &'a dyn Progress,
    settings: BuildSettings,
    float_linears: Vec<String>,
    bar: Option<f64>,
    reference: Option<&'a Path>,
    source: GraphSource,
    /// The graph with the exact GELU, for the profiles below [`Model::tanh_gelu_from`].
    exact: Option<GraphSource>,
    machine: Machine,
    model: Model,
}

impl<'a> Job<'a> {
    pub fn new(
        library: &'a Arc<Library>,
        target: Target<'a>,
        cache: &'a Cache,
        request: &EngineRequest<'a>,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let folder = request.folder;
        let precision = graph_precision(library, request.settings.arithmetic);
        let source = |tanh_gelu| match (request.onnx, request.quantization) {
            (Some(path), _) => GraphSource::open(path, folder),
            (None, Some(quantization)) => GraphSource::quantise(folder, precision, tanh_gelu, quantization),
            (None, None) => GraphSource::export(folder, precision, tanh_gelu),
        };
        let divided = request.divided_gelu();
        if divided.is_some() && !has_plan_for_each_profile(library) {
            let reason = format!(
                "TensorRT {} keeps all shapes in one plan of one graph: it is for all of them or for none",
                library.version()
            );
            return Err(Error::Setting { setting: Setting::TanhGelu, reason });
        }
        let mut job = Self::of_graph(library, target, cache, request, progress, || source(request.tanh_gelu.is_some()))?;
        if let Some(least) = divided {
            job.model.tanh_gelu_from = least;
            job.exact = Some(source(false)?);
        }
        Ok(job)
    }

    /// As [`Job::new`], for the graph that `source` gives.
    pub fn of_graph(
        library: &'a Arc<Library>,
        target: Target<'a>,
        cache: &'a Cache,
        request: &EngineRequest<'a>,
        progress: &'a dyn Progress,
        source: impl FnOnce() -> Result<GraphSource>,
    ) -> Result<Self> {
        let folder = request.folder;
        let machine = match target {
            Target::Device(device) => machine(library, device),
            Target::Capabilities(wanted) => Machine::ahead_of_time(library.version(), wanted),
        };
        let mut settings = BuildSettings { profiles: request.profiles(), ..request.settings.clone() };
        if settings.timing_cache.is_empty() {
            settings.timing_cache = cache.timing_cache(&machine);
        }
        let source = phase(progress, "reading the model", source)?;
        let model = phase(progress, "hashing the model", || source.model(folder))?;
        let bar = request.gate.bar(settings.arithmetic);
        let float_linears = request.quantization.map(|quantization| quantization.float.iter().cloned().collect());
        let float_linears: Vec<String> = float_linears.unwrap_or_default();
        Ok(Self {
            library,
            target,
            cache,
            folder,
            progress,
            settings,
            float_linears,
            bar,
            reference: request.reference,
            source,
            exact: None,
            machine,
            model,
        })
    }

    /// The engine out of the cache, where it is built into where it is not there, and where it lies.
    pub fn cached(&self, request: &EngineRequest<'_>) -> Result<(EngineFile, PathBuf)> {
        let key = CacheKey::new(&self.machine, &self.model, &self.settings)?;
        let build = || {
            request.check()?;
            self.build()
        };
        let engine = self.cache.get_or_build(&key, |manifest| self.check(manifest), self.progress, build)?;
        Ok((engine, self.cache.path(&key)))
    }

    /// Whether an engine with this manifest is what was asked for.
    fn check(&self, manifest: &Manifest) -> Result<()> {
        manifest.check_machine(&self.machine)?;
        manifest.check_model(&self.model)?;
        manifest.check_build(self.settings.arithmetic, &self.settings.profiles)?;
        self.bar.map_or(Ok(()), |bar| manifest.check_fidelity(bar))
    }

    fn build(&self) -> Result<EngineFile> {
        let progress = self.progress;
        let Target::Device(device) = self.target else {
            let mut file = self.build_unproven()?;
            file.manifest.unproven = self.bar.map(|min_cosine| Unproven { min_cosine });
            return Ok(file);
        };
        // First, because what is wrong with it shows in seconds, and its memory is free again before TensorRT needs much.
        let reference = || proof::reference(self.folder, &self.settings.profiles, self.reference);
        let reference = self.bar.map(|_| phase(progress, "embedding the texts to compare", reference)).transpose()?;
        let mut file = self.build_unproven()?;
        if let (Some(bar), Some(reference)) = (self.bar, reference) {
            let compare = || proof::compare(self.library, device, self.folder, &mut file, &reference, bar);
            phase(progress, "comparing the engine with the reference", compare)??;
        }
        Ok(file)
    }

    /// The engine before it is compared. The caller holds the cache's lock.
    pub fn build_unproven(&self) -> Result<EngineFile> {
        let start = Instant::now();
        let plans = self.build_plans()?;
        let seconds = start.elapsed().as_secs_f64().round() as u64;
        let manifest = Manifest {
            machine: self.machine.clone(),
            model: self.model.clone(),
            arithmetic: self.settings.arithmetic,
            profiles: self.settings.profiles.clone(),
            plan_bytes: plans.iter().map(|plan| plan.len() as u64).collect(),
            build: self.provenance(seconds),
            fidelity: None,
            unproven: None,
            speed: Vec::new(),
            products: Vec::new(),
            costs: Vec::new(),
        };
        // One plan, the rule from TensorRT 10 on, is not copied.
        let plan = match <[Vec<u8>; 1]>::try_from(plans) {
            Ok([plan]) => plan,
            Err(plans) => plans.concat(),
        };
        Ok(EngineFile::built(manifest, plan))
    }

    /// One plan for all profiles; with TensorRT 8 one for each, because plans of several profiles may fail to load there (Myelin's
    /// "missing offset in id2offset", NVIDIA/TensorRT issue 2977).
    fn build_plans(&self) -> Result<Vec<Vec<u8>>> {
        let export = || Ok((self.source.serialise()?, self.exact.as_ref().map(GraphSource::serialise).transpose()?));
        let (graph, exact) = phase(self.progress, "exporting the graph", export)?;
        let mut settings = self.settings.clone();
        let parts: Vec<&[Profile]> = if has_plan_for_each_profile(self.library) {
            self.settings.profiles.chunks(1).collect()
        } else {
            vec![&self.settings.profiles]
        };
        let builder = phase(self.progress, "loading TensorRT's builder", || PlanBuilder::new(self.library, self.target))?;
        let mut plans = Vec::with_capacity(parts.len());
        for (number, profiles) in parts.iter().enumerate() {
            let small = profiles.iter().all(|profile| profile.max().tokens() < self.model.tanh_gelu_from);
            let graph = exact.as_ref().filter(|_| small).unwrap_or(&graph);
            settings.onnx_path = graph.path.clone();
            settings.profiles = profiles.to_vec();
            let name = match (parts.len(), profiles) {
                (2.., [profile]) => format!("building the engine for {profile} ({} of {})", number + 1, parts.len()),
                _ => "building the engine".to_owned(),
            };
            let build = || builder.build(&graph.bytes, &settings, self.progress);
            let plan = phase(self.progress, &name, build)?;
            plans.push(plan.bytes);
            settings.timing_cache = plan.timing_cache;
        }
        // Also for an engine that will not pass: its tactics need not be timed again. TensorRT for RTX times nothing.
        if !settings.timing_cache.is_empty()
            && let Err(error) = self.cache.store_timing_cache(&self.machine, &settings.timing_cache)
        {
            log::warn!("the next build starts without a timing cache: {error}");
        }
        Ok(plans)
    }

    fn provenance(&self, seconds: u64) -> Build {
        let cuda_driver = match self.target {
            Target::Device(device) => {
                let (major, minor) = device.properties().driver_cuda;
                format!("{major}.{minor}")
            }
            Target::Capabilities(_) => "none".into(),
        };
        Build {
            by: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).into(),
            cuda_driver,
            seconds,
            workspace_bytes: self.settings.workspace_bytes,
            optimization_level: self.settings.optimization_level,
            fp32_layers: self.settings.fp32_layers.clone(),
            float_linears: self.float_linears.clone(),
            int8_inputs: self.source.int8_inputs(&self.float_linears),
        }
    }
}

/// Whether each profile has a plan of its own, as [`Job::build_plans`] says.
fn has_plan_for_each_profile(library: &Library) -> bool {
    matches!(library.version(), Version { flavour: Flavour::Standard, major: ..10, .. })
}

/// Up to TensorRT 8.6 a flag lets an fp32 graph run in fp16; from 10 on the graph's own types decide.
fn graph_precision(library: &Library, arithmetic: Arithmetic) -> Precision {
    match arithmetic {
        Arithmetic::Fp16 | Arithmetic::Int8 if library.version().is_strongly_typed() => Precision::Fp16,
        _ => Precision::Fp32,
    }
}

/// Runs `work` as a phase that `progress` hears of.
pub(super) fn phase<T>(progress: &dyn Progress, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if progress.cancelled() {
        return Err(Error::Cancelled { what: "making the engine" });
    }
    progress.phase_started(name, None, 0);
    let result = work();
    progress.phase_finished(name);
    result
}

/// As [`phase`], while no other build runs that shares `cache`: its work on the GPU would spoil what `work` times.
pub(super) fn phase_alone<T>(progress: &dyn Progress, cache: &Cache, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let _lock = cache.lock(progress)?;
    phase(progress, name, work)
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
