//! Settings of an embedder, and making one of them.

use super::{BackendChoice, ChosenBackend, Embedder, Info, Normalize, auto};
use crate::executor::Backend;
use crate::model::{ModelFolder, Prompts};
use crate::pooling::{Head, Pooling, PoolingMode, Scaling};
use crate::scheduler::{LineSettings, Scheduler};
#[cfg(feature = "tensorrt")]
use crate::tensorrt::BuildSettings;
use crate::tokens::{BatchPlan, Tokenizer, TokenizerSettings};
use crate::{Error, Progress, Result, Setting};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// See [`EmbedderBuilder::overtakings`].
const OVERTAKINGS: usize = 4;

/// Settings of an [`Embedder`].
#[derive(Clone)]
pub struct EmbedderBuilder {
    model: String,
    prompt: Option<PromptChoice>,
    dim: Option<usize>,
    normalize: Normalize,
    pooling: Option<Vec<PoolingMode>>,
    batch_size: Option<usize>,
    batch_tokens: Option<usize>,
    max_tokens: Option<usize>,
    threads: Option<usize>,
    backend: BackendChoice,
    engine: Option<PathBuf>,
    /// Of engine files alone.
    require_proof: bool,
    device: usize,
    lanes: Option<usize>,
    queue_tokens: Option<usize>,
    /// Vectors of the model's full width, not scaled.
    raw: bool,
    overtakings: Option<usize>,
    linger: Duration,
    invariant: bool,
    #[cfg(feature = "cuda")]
    precision: Option<crate::native::Precision>,
    #[cfg(feature = "tensorrt")]
    build: Option<BuildSettings>,
    progress: Option<Arc<dyn Progress>>,
}

#[derive(Clone)]
enum PromptChoice {
    Name(String),
    Text(String),
}

/// An executor, and why it is the one.
struct Executor {
    backend: Arc<dyn Backend>,
    #[cfg(feature = "cuda")]
    gpu: Option<super::Gpu>,
    engine: Option<PathBuf>,
    reason: Option<String>,
}

#[cfg(feature = "cuda")]
impl Executor {
    fn of_gpu(gpu: crate::gpu::GpuBackend, engine: Option<PathBuf>) -> Self {
        let gpu = Arc::new(gpu);
        Self { backend: gpu.clone(), gpu: Some(super::Gpu::Fixed(gpu)), engine, reason: None }
    }
}

impl EmbedderBuilder {
    pub(super) fn new(model: String) -> Self {
        Self {
            model,
            prompt: None,
            dim: None,
            normalize: Normalize::Auto,
            pooling: None,
            batch_size: None,
            batch_tokens: None,
            max_tokens: None,
            threads: None,
            backend: BackendChoice::Auto,
            engine: None,
            require_proof: false,
            device: 0,
            lanes: None,
            queue_tokens: None,
            raw: false,
            overtakings: None,
            linger: Duration::ZERO,
            invariant: false,
            #[cfg(feature = "cuda")]
            precision: None,
            #[cfg(feature = "tensorrt")]
            build: None,
            progress: None,
        }
    }

    /// Prompt by its name in the model folder; an unknown name is an error that lists the known ones.
    #[must_use]
    pub fn prompt_name(mut self, name: impl Into<String>) -> Self {
        self.prompt = Some(PromptChoice::Name(name.into()));
        self
    }

    /// Prompt put before every text; empty for none, whatever the model folder's default.
    #[must_use]
    pub fn prompt(mut self, text: impl Into<String>) -> Self {
        self.prompt = Some(PromptChoice::Text(text.into()));
        self
    }

    /// Keeps the first `dim` values of each vector, cut before they are scaled to unit length; in the place of the model's own
    /// `truncate_dim`, which cuts after it.
    #[must_use]
    pub fn dim(mut self, dim: usize) -> Self {
        self.dim = Some(dim);
        self
    }

    /// Whether vectors are scaled to unit length.
    #[must_use]
    pub fn normalize(mut self, normalize: Normalize) -> Self {
        self.normalize = normalize;
        self
    }

    /// Pools otherwise than the model folder says; several modes are concatenated.
    #[must_use]
    pub fn pooling(mut self, modes: &[PoolingMode]) -> Self {
        self.pooling = Some(modes.to_vec());
        self
    }

    /// Most texts of one batch; the executor's own limit where not set.
    #[must_use]
    pub fn batch_size(mut self, texts: usize) -> Self {
        self.batch_size = Some(texts);
        self
    }

    /// Most tokens of one batch, padding included; what the executor gains from where not set.
    #[must_use]
    pub fn batch_tokens(mut self, tokens: usize) -> Self {
        self.batch_tokens = Some(tokens);
        self
    }

    /// Cuts texts at `tokens` instead of the model's own limit; at most what its positions serve, and with [`EmbedderBuilder::engine`] what that
    /// engine serves. Above the model's own limit the cache has an engine of its own.
    #[must_use]
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = Some(tokens);
        self
    }

    /// Most batches that the CPU backend runs at a time, each on a thread, for all callers together; as many as there are cores where not
    /// set. Callers beyond them wait for their turn. Calls of many texts are tokenised on at most as many threads, on every backend.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Which executor runs the graph.
    #[must_use]
    pub fn backend(mut self, choice: BackendChoice) -> Self {
        self.backend = choice;
        self
    }

    /// Runs this engine file, which was built of the model, with TensorRT. Without it the engine is taken from the cache, or
    /// built into it.
    #[must_use]
    pub fn engine(mut self, file: impl Into<PathBuf>) -> Self {
        self.engine = Some(file.into());
        self
    }

    /// Whether the [`EmbedderBuilder::engine`] must have been compared with its model before: when it was built, or when it was loaded on this machine
    /// earlier. Otherwise one that was built ahead of time is compared when it is first loaded, which takes the model's time on the CPU.
    #[must_use]
    pub fn require_proof(mut self, required: bool) -> Self {
        self.require_proof = required;
        self
    }

    /// Which GPU, as the driver numbers them; the first where not set.
    #[must_use]
    pub fn device(mut self, ordinal: usize) -> Self {
        self.device = ordinal;
        self
    }

    /// Calls that may run on the GPU at the same time; 2 where not set. Each takes device memory for a batch of the largest shape.
    #[must_use]
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = Some(lanes);
        self
    }

    /// Most tokens of submitted texts that wait for the executor, both classes together; as many as come where not set. [`Embedder::submit`]
    /// then gives [`Error::Overloaded`] at once where more would wait; texts that would be more than that by themselves are always refused. A
    /// token that waits takes some 4 bytes of memory. Synchronous calls are not counted: each holds up its own thread.
    #[must_use]
    pub fn queue_tokens(mut self, tokens: usize) -> Self {
        self.queue_tokens = Some(tokens);
        self
    }

    /// Leaves vectors at their full width and unscaled, whatever else was said: for callers that cut and scale them themselves, each as its request asks.
    #[cfg(feature = "serve")]
    pub(crate) fn raw(mut self) -> Self {
        self.raw = true;
        self
    }

    /// Most batches of interactive texts, those of synchronous calls included, that are begun one after another while a
    /// [`Bulk`](crate::Class::Bulk) text waits: the bulk text whose turn it is in its class is overtaken so many times at most, then the next
    /// batch is bulk's. 4 where not set; with 0 bulk goes first. It goes before them earlier where they have cost more than a ninth of what was run, for
    /// two batches at each place of the executor at most. Such batches are small: a quarter of a second, or a single text.
    #[must_use]
    pub fn overtakings(mut self, batches: usize) -> Self {
        self.overtakings = Some(batches);
        self
    }

    /// How long a submitted text may wait for others to share its batch though the executor has a free place; not at all where not set. Under load
    /// texts gather while batches run, so that this helps few: it trades the latency of a lone text for fewer batches.
    #[must_use]
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Whether a text's vector is the same bits whatever shares its batch. Only the backend `cuda` can say so, which [`BackendChoice::Auto`] then means,
    /// nothing else: it then runs all texts by kernels with one order of sums, and never changes the precision. On one GPU: another kind of GPU has other
    /// kernels.
    #[must_use]
    pub fn invariant(mut self, invariant: bool) -> Self {
        self.invariant = invariant;
        self
    }

    /// How the backend `cuda` stores values; fp16 where not set. With [`BackendChoice::Auto`] bf16 takes its place where weights or values overflow it,
    /// with a warning and told by [`Info::backend_reason`]; what is set here is never changed.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn precision(mut self, precision: crate::native::Precision) -> Self {
        self.precision = Some(precision);
        self
    }

    /// How an engine is built for the cache; fp16 and a set of common shapes where not set. [`BackendChoice::Auto`] then passes over the backend `cuda`,
    /// which has no engine, unless [`EmbedderBuilder::precision`] is set too.
    #[cfg(feature = "tensorrt")]
    #[must_use]
    pub fn build_settings(mut self, settings: BuildSettings) -> Self {
        self.build = Some(settings);
        self
    }

    /// Hears of slow work and may stop it: the model's download, and an engine's build.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Opens (or downloads) the model, exports its graph and makes the executor ready.
    ///
    /// # Errors
    /// A model that cannot be found or read, a setting that it cannot give ([`Error::Setting`]), an executor that this build or
    /// machine lacks ([`Error::Backend`]).
    pub fn build(self) -> Result<Embedder> {
        let path = crate::model::resolve(&self.model, self.progress.as_ref())?;
        let folder = ModelFolder::open(&path)?;
        let prompt = self.prompt_text(&folder)?;
        let max_tokens = self.token_limit(&folder)?;
        let pooling = match &self.pooling {
            None => folder.pooling.clone(),
            Some(modes) => Pooling::new(modes.iter().copied(), folder.pooling.include_prompt)?,
        };
        let scaling = match (self.normalize, self.dim) {
            _ if self.raw => Scaling::None,
            (Normalize::Auto, None) => folder.scaling(),
            (Normalize::Auto, Some(_)) if !folder.normalize => Scaling::None,
            (Normalize::Auto, Some(_)) | (Normalize::On, _) => Scaling::AfterCut,
            (Normalize::Off, _) => Scaling::None,
        };
        let width = folder.dense.last().map_or(pooling.width(folder.config.hidden_size), |dense| dense.out_features);
        let cut = if self.raw { None } else { self.dim.or(folder.cut(width)) };
        let head = Head::new(pooling.clone(), folder.dense.clone(), folder.config.hidden_size, cut, scaling)?;
        let dim = head.dim;
        let tokenizer = Tokenizer::open(
            &folder.tokenizer,
            TokenizerSettings {
                skip_prompt: !pooling.include_prompt,
                prompt: prompt.clone(),
                threads: Some(self.thread_count()),
                ..TokenizerSettings::of_model(&folder, max_tokens)
            },
        )
        .map_err(|error| match error {
            // The folder's own limit is at fault, not a setting of the caller's.
            Error::Setting { setting: Setting::MaxTokens, reason } if self.max_tokens.is_none() => {
                Error::Config { path: folder.encoder.clone(), reason: format!("max_seq_length or model_max_length: {reason}") }
            }
            other => other,
        })?;
        let executor = self.executor(&folder, head, max_tokens)?;
        let backend = executor.backend;
        let limits = backend.limits();
        if limits.max_seq < max_tokens {
            let longest = limits.max_seq;
            log::warn!("the engine serves texts of up to {longest} tokens, longer ones fail; cut them at {longest} tokens");
        }
        let plan = BatchPlan {
            max_batch: self.batch_size.map_or(limits.max_batch, |rows| rows.clamp(1, limits.max_batch)),
            batch_tokens: self.batch_tokens.unwrap_or(limits.batch_tokens).max(1),
            parallelism: limits.parallelism,
            costs: backend.costs(),
        };
        let info = Info {
            model: self.model,
            folder: path,
            config: folder.config,
            pooling,
            normalize: scaling != Scaling::None,
            dim,
            similarity: folder.similarity,
            max_tokens,
            backend: backend.name(),
            backend_reason: executor.reason,
            engine: executor.engine,
            limits,
            prompt,
        };
        Ok(Embedder {
            info,
            tokenizer,
            prompts: folder.prompts,
            backend,
            #[cfg(feature = "serve")]
            bare: None,
            scheduler: Arc::new(Scheduler::new(LineSettings {
                plan: plan.clone(),
                queue_tokens: self.queue_tokens,
                overtakings: self.overtakings.unwrap_or(OVERTAKINGS),
                linger: self.linger,
            })),
            #[cfg(feature = "cuda")]
            gpu: executor.gpu,
            #[cfg(feature = "cuda")]
            widened: std::sync::OnceLock::new(),
            plan,
        })
    }

    /// Threads asked for, else the cores there are.
    fn thread_count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads.unwrap_or_else(cores).max(1)
    }

    fn prompt_text(&self, folder: &ModelFolder) -> Result<Option<String>> {
        match &self.prompt {
            Some(PromptChoice::Text(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
            Some(PromptChoice::Name(name)) => prompt_by_name(&folder.prompts, name),
            None => folder.prompts.default_name.as_ref().map_or(Ok(None), |name| prompt_by_name(&folder.prompts, name)),
        }
    }

    fn token_limit(&self, folder: &ModelFolder) -> Result<usize> {
        let limit = folder.config.max_tokens();
        match self.max_tokens {
            None => Ok(folder.max_tokens()),
            Some(tokens) if (1..=limit).contains(&tokens) => Ok(tokens),
            Some(tokens) => Err(Error::Setting {
                setting: Setting::MaxTokens,
                reason: format!("{tokens} is outside 1..={limit}, which the model's positions serve"),
            }),
        }
    }

    fn executor(&self, folder: &ModelFolder, head: Head, max_tokens: usize) -> Result<Executor> {
        let backend = if self.invariant { auto::invariant(self.backend, self.engine.is_some())? } else { self.backend };
        match (backend, &self.engine) {
            (BackendChoice::Cpu | BackendChoice::Cuda, Some(file)) => Err(Error::Setting {
                setting: Setting::Engine,
                reason: format!("{} is for TensorRT; leave it out to run on another backend", file.display()),
            }),
            #[cfg(feature = "tensorrt")]
            (BackendChoice::TensorRt | BackendChoice::Auto, Some(file)) => {
                let build = self.build.clone().unwrap_or_default();
                let gpu = super::tensorrt::open_file(self.device, file, &self.gpu_request(&build), folder, head)?;
                Ok(Executor::of_gpu(gpu, Some(file.clone())))
            }
            #[cfg(not(feature = "tensorrt"))]
            (BackendChoice::TensorRt | BackendChoice::Auto, Some(_)) => Err(super::choice::no_tensorrt()),
            (BackendChoice::Auto, None) => {
                let (executor, passed) = auto::first(&auto::candidates(auto::Built::THIS, self.wishes()), |candidate| {
                    let chosen = candidate.choice().decide(self.device);
                    let chosen = chosen.map_err(|error| auto::refusal(auto::Stage::Finding, error))?;
                    self.open(chosen, folder, head.clone(), max_tokens)
                        .map_err(|error| auto::refusal(auto::Stage::Opening, error))
                })?;
                let told: Vec<String> = passed.into_iter().chain(executor.reason).collect();
                Ok(Executor { reason: (!told.is_empty()).then(|| told.join("; ")), ..executor })
            }
            (choice, None) => self.open(choice.decide(self.device)?, folder, head, max_tokens),
        }
    }

    #[cfg_attr(not(feature = "cpu"), allow(unused_variables))] // an engine has its own longest row; without executors nothing is used
    fn open(&self, chosen: ChosenBackend, folder: &ModelFolder, head: Head, max_tokens: usize) -> Result<Executor> {
        match chosen {
            #[cfg(feature = "cpu")]
            ChosenBackend::Cpu { reason } => self.cpu(folder, head, max_tokens, reason),
            #[cfg(feature = "cuda")]
            ChosenBackend::Cuda { device } => {
                let precision = self.precision.unwrap_or_default();
                let settings = crate::native::NativeSettings { precision, invariant: self.invariant, ..Default::default() };
                let padding = crate::compare::Padding::of_model(folder);
                let request = super::cuda::Request { device, settings, lanes: self.lanes, head, padding, max_tokens };
                if (self.backend, self.precision, self.invariant) == (BackendChoice::Auto, None, false) {
                    return Ok(match super::cuda::open_fitting(&request, folder)? {
                        super::cuda::Opened::Narrow(gpu) => {
                            let gpu = Arc::new(gpu);
                            Executor { backend: gpu.clone(), gpu: Some(super::Gpu::Widening(gpu)), engine: None, reason: None }
                        }
                        super::cuda::Opened::Wide(gpu, reason) => {
                            Executor { reason: Some(reason), ..Executor::of_gpu(*gpu, None) }
                        }
                    });
                }
                Ok(Executor::of_gpu(super::cuda::open(&request, &folder.architecture()?)?, None))
            }
            #[cfg(feature = "tensorrt")]
            ChosenBackend::TensorRt { device, library } => {
                let build = self.build.clone().unwrap_or_default();
                let request = self.gpu_request(&build);
                let (gpu, engine) = super::tensorrt::open_cached(&(device, library), &request, folder, head)?;
                Ok(Executor::of_gpu(gpu, Some(engine)))
            }
        }
    }

    /// What was asked for that is one executor's alone.
    fn wishes(&self) -> auto::Wishes {
        auto::Wishes {
            #[cfg(feature = "tensorrt")]
            engine_settings: self.build.is_some(),
            #[cfg(not(feature = "tensorrt"))]
            engine_settings: false,
            #[cfg(feature = "cuda")]
            cuda_precision: self.precision.is_some(),
            #[cfg(not(feature = "cuda"))]
            cuda_precision: false,
        }
    }

    #[cfg(feature = "tensorrt")]
    fn gpu_request<'a>(&'a self, build: &'a BuildSettings) -> super::tensorrt::Request<'a> {
        super::tensorrt::Request {
            lanes: self.lanes,
            max_tokens: self.max_tokens,
            require_proof: self.require_proof,
            build,
            progress: self.progress.as_ref(),
        }
    }

    #[cfg(feature = "cpu")]
    fn cpu(&self, folder: &ModelFolder, head: Head, max_tokens: usize, reason: Option<String>) -> Result<Executor> {
        let backend = crate::cpu::CpuBackend::new(folder.architecture()?, head, max_tokens, self.thread_count())?;
        Ok(Executor {
            backend: Arc::new(backend),
            #[cfg(feature = "cuda")]
            gpu: None,
            engine: None,
            reason,
        })
    }
}

/// The text of the prompt called `name`; none where it is empty.
pub(super) fn prompt_by_name(prompts: &Prompts, name: &str) -> Result<Option<String>> {
    let Some(text) = prompts.by_name.get(name) else {
        let known = match prompts.by_name.len() {
            0 => "the model has no prompts".into(),
            _ => format!("the model has {}", prompts.by_name.keys().cloned().collect::<Vec<_>>().join(", ")),
        };
        return Err(Error::Setting { setting: Setting::PromptName, reason: format!("\"{name}\" is not known; {known}") });
    };
    Ok(Some(text.clone()).filter(|text| !text.is_empty()))
}
