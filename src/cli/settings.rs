//! The settings of an embedder that several verbs share, and opening one with them.

use super::{progress, say};
use anyhow::Result;
use clap::ValueEnum;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use trt_embed::model::ModelFolder;
use trt_embed::pooling::PoolingMode;
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Normalize};

/// Which model, and where it runs.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Model folder (sentence-transformers or plain Hugging Face), or hub id `org/name[@revision]`.
    #[arg(short, long, env = "TRT_EMBED_MODEL", value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    pub executor: ExecutorArgs,
}

/// What runs a model, and in what pieces.
#[derive(Debug, Clone, clap::Args)]
pub struct ExecutorArgs {
    /// What runs the model. `auto` takes the best that this build and this machine have and that serves the model (cuda, then TensorRT, then the CPU),
    /// and says which, and why no better one. What overflows fp16 it runs in bf16, unless --cuda-precision is given.
    #[arg(long, env = "TRT_EMBED_BACKEND", value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,
    /// Engine file made by `trt-embed build` [default: the engine cache's, built at the first use].
    #[arg(long, env = "TRT_EMBED_ENGINE", value_name = "FILE")]
    pub engine: Option<PathBuf>,
    /// Refuses an engine file that was never compared with its model: one that was built ahead of time and was not loaded on this machine before,
    /// or without comparison. Otherwise the first is compared when it is first loaded.
    #[arg(long, requires = "engine")]
    pub require_proof: bool,
    /// Precision of an engine that is built for the cache [default: fp16]. `--backend auto` then takes TensorRT before cuda.
    #[arg(long, value_enum, value_name = "PRECISION", conflicts_with = "engine")]
    pub engine_precision: Option<EnginePrecision>,
    /// How the backend `cuda` stores values; sums are always in 32 bits [default: fp16; with `--backend auto` bf16 where values overflow it].
    #[arg(long, env = "TRT_EMBED_CUDA_PRECISION", value_enum, value_name = "PRECISION")]
    pub cuda_precision: Option<CudaPrecision>,
    /// The same bits of a text's vector whatever shares its batch, on the backend `cuda`, which `--backend auto` then means: one order of all sums, at
    /// the cost of the kernels for single short texts.
    #[arg(long, env = "TRT_EMBED_INVARIANT")]
    pub invariant: bool,
    /// GPU, as the driver numbers them.
    #[arg(long, env = "TRT_EMBED_DEVICE", value_name = "N", default_value_t = 0)]
    pub device: usize,
    /// Calls that may run on the GPU at the same time [default: 2].
    #[arg(long, env = "TRT_EMBED_LANES", value_name = "N")]
    pub lanes: Option<NonZeroUsize>,
    /// Threads of the CPU backend [default: all cores].
    #[arg(long, env = "TRT_EMBED_THREADS", value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Longest text in tokens, special tokens included; longer texts are cut [default: the model's limit].
    #[arg(long, env = "TRT_EMBED_MAX_TOKENS", value_name = "N")]
    pub max_tokens: Option<NonZeroUsize>,
    /// Most texts of one batch [default: the backend's choice].
    #[arg(long, env = "TRT_EMBED_BATCH_SIZE", value_name = "N")]
    pub batch_size: Option<NonZeroUsize>,
    /// Most tokens of one batch, padding included [default: the backend's choice].
    #[arg(long, env = "TRT_EMBED_BATCH_TOKENS", value_name = "N")]
    pub batch_tokens: Option<NonZeroUsize>,
}

/// How a text's vector is made.
#[derive(Debug, Clone, clap::Args)]
pub struct VectorArgs {
    /// Prompt put before every text, by its name in the model folder, e.g. `query`; an empty name for none [default: the model's default prompt].
    #[arg(long, env = "TRT_EMBED_PROMPT", value_name = "NAME")]
    pub prompt: Option<String>,
    /// Keep only the first N values of each vector (for Matryoshka models); cut before normalising.
    #[arg(long, env = "TRT_EMBED_DIM", value_name = "N")]
    pub dim: Option<NonZeroUsize>,
    /// Scale vectors to unit length: as the model says, always, or never.
    #[arg(long, env = "TRT_EMBED_NORMALIZE", value_enum, default_value_t = NormalizeArg::Auto)]
    pub normalize: NormalizeArg,
    /// How token states become one vector: as the model says, or one or several modes; several (`cls,mean`) are concatenated in the order given.
    #[arg(
        long,
        env = "TRT_EMBED_POOLING",
        value_enum,
        value_delimiter = ',',
        value_name = "MODE[,MODE…]",
        default_value = "auto"
    )]
    pub pooling: Vec<PoolingArg>,
}

/// `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// The best of this build and this machine
    Auto,
    /// ONNX graph run by tract
    Cpu,
    /// This program's own kernels on an NVIDIA GPU
    Cuda,
    /// TensorRT engine on an NVIDIA GPU
    #[value(name = "tensorrt")]
    TensorRt,
}

/// `--engine-precision`. [`build`](super::build) has its own, which can also choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EnginePrecision {
    /// 32-bit floats, TF32 off
    Fp32,
    /// 16-bit floats where TensorRT finds them faster
    Fp16,
    /// As fp16, with the linears in 8-bit integers
    Int8,
}

/// `--cuda-precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CudaPrecision {
    /// 16-bit floats: fast and exact enough for nearly every model
    Fp16,
    /// The other 16-bit floats, for models whose values overflow fp16
    Bf16,
    /// 32-bit floats: exact and slow
    Fp32,
}

/// `--normalize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NormalizeArg {
    /// As the model says
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

/// `--pooling`. Names as [`PoolingMode::name`] has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PoolingArg {
    /// As the model says
    Auto,
    /// The first token
    Cls,
    /// The largest value of each component
    Max,
    /// The mean over the tokens
    Mean,
    /// The sum over the square root of the number of tokens
    #[value(name = "mean_sqrt_len", alias = "mean_sqrt_len_tokens")]
    MeanSqrtLen,
    /// The mean weighted by position
    #[value(name = "weightedmean")]
    WeightedMean,
    /// The last token
    #[value(name = "lasttoken", alias = "last-token")]
    LastToken,
}

impl Backend {
    /// As the library takes it.
    pub fn choice(self) -> BackendChoice {
        match self {
            Self::Auto => BackendChoice::Auto,
            Self::Cpu => BackendChoice::Cpu,
            Self::Cuda => BackendChoice::Cuda,
            Self::TensorRt => BackendChoice::TensorRt,
        }
    }
}

#[cfg(feature = "tensorrt")]
impl EnginePrecision {
    /// As the builder takes it.
    pub fn arithmetic(self) -> trt_embed::backend::tensorrt::Arithmetic {
        use trt_embed::backend::tensorrt::Arithmetic;
        match self {
            Self::Fp32 => Arithmetic::Fp32,
            Self::Fp16 => Arithmetic::Fp16,
            Self::Int8 => Arithmetic::Int8,
        }
    }
}

impl PoolingArg {
    fn mode(self) -> Option<PoolingMode> {
        match self {
            Self::Auto => None,
            Self::Cls => Some(PoolingMode::Cls),
            Self::Max => Some(PoolingMode::Max),
            Self::Mean => Some(PoolingMode::Mean),
            Self::MeanSqrtLen => Some(PoolingMode::MeanSqrtLen),
            Self::WeightedMean => Some(PoolingMode::WeightedMean),
            Self::LastToken => Some(PoolingMode::LastToken),
        }
    }
}

/// The modes that `--pooling` asks for, none for `auto`.
///
/// # Errors
/// `auto` beside a mode.
pub fn modes(pooling: &[PoolingArg]) -> Result<Option<Vec<PoolingMode>>> {
    if pooling == [PoolingArg::Auto] {
        return Ok(None);
    }
    let modes: Option<Vec<PoolingMode>> = pooling.iter().map(|arg| arg.mode()).collect();
    match modes {
        Some(modes) => Ok(Some(modes)),
        None => Err(super::Usage("--pooling: `auto` stands alone; leave it out to name modes".into()).into()),
    }
}

/// Opens the model with these settings.
///
/// # Errors
/// Usage faults, and whatever [`trt_embed::EmbedderBuilder::build`] finds wrong.
pub fn open(model: &ModelArgs, vector: Option<&VectorArgs>) -> Result<Embedder> {
    let mut builder = builder(&model.model, &model.executor)?.progress(progress::downloads());
    if let Some(vector) = vector {
        builder = builder.normalize(match vector.normalize {
            NormalizeArg::Auto => Normalize::Auto,
            NormalizeArg::On => Normalize::On,
            NormalizeArg::Off => Normalize::Off,
        });
        builder = match vector.prompt.as_deref() {
            None => builder,
            Some("") => builder.prompt(""),
            Some(name) => builder.prompt_name(name),
        };
        if let Some(dim) = vector.dim {
            builder = builder.dim(dim.get());
        }
        if let Some(modes) = modes(&vector.pooling)? {
            builder = builder.pooling(&modes);
        }
    }
    let bar = progress::step("loading the model");
    let embedder = builder.build();
    bar.finish_and_clear();
    Ok(embedder?)
}

/// Settings of the embedder of `source`, a folder or a hub id.
///
/// # Errors
/// Usage faults.
pub fn builder(source: &str, executor: &ExecutorArgs) -> Result<EmbedderBuilder> {
    let mut builder = Embedder::builder(source).backend(executor.backend.choice());
    builder = builder.device(executor.device);
    if let Some(file) = &executor.engine {
        builder = builder.engine(file).require_proof(executor.require_proof);
    }
    if let Some(lanes) = executor.lanes {
        builder = builder.lanes(lanes.get());
    }
    if let Some(precision) = executor.engine_precision {
        builder = with_precision(builder, precision)?;
    }
    if let Some(precision) = executor.cuda_precision {
        builder = with_cuda_precision(builder, precision)?;
    }
    builder = builder.invariant(executor.invariant);
    if let Some(threads) = executor.threads {
        builder = builder.threads(threads.get());
    }
    if let Some(tokens) = executor.max_tokens {
        builder = builder.max_tokens(tokens.get());
    }
    if let Some(rows) = executor.batch_size {
        builder = builder.batch_size(rows.get());
    }
    if let Some(tokens) = executor.batch_tokens {
        builder = builder.batch_tokens(tokens.get());
    }
    Ok(builder)
}

#[cfg(feature = "tensorrt")]
fn with_precision(builder: EmbedderBuilder, precision: EnginePrecision) -> Result<EmbedderBuilder> {
    let mut settings = trt_embed::backend::tensorrt::BuildSettings::default();
    settings.arithmetic = precision.arithmetic();
    Ok(builder.build_settings(settings))
}

#[cfg(not(feature = "tensorrt"))]
fn with_precision(_: EmbedderBuilder, _: EnginePrecision) -> Result<EmbedderBuilder> {
    Err(super::Usage("--engine-precision: this build has no TensorRT support".into()).into())
}

#[cfg(feature = "cuda")]
fn with_cuda_precision(builder: EmbedderBuilder, precision: CudaPrecision) -> Result<EmbedderBuilder> {
    use trt_embed::backend::native::Precision;
    Ok(builder.precision(match precision {
        CudaPrecision::Fp16 => Precision::Fp16,
        CudaPrecision::Bf16 => Precision::Bf16,
        CudaPrecision::Fp32 => Precision::Fp32,
    }))
}

#[cfg(not(feature = "cuda"))]
fn with_cuda_precision(_: EmbedderBuilder, _: CudaPrecision) -> Result<EmbedderBuilder> {
    Err(super::Usage("--cuda-precision: this build has no CUDA kernels; build it with --features cuda".into()).into())
}

/// Opens the model folder `name`, or downloads the hub id.
///
/// # Errors
/// Whatever the model's files or the hub find wrong.
pub fn open_folder(name: &str) -> Result<ModelFolder> {
    Ok(ModelFolder::open(trt_embed::model::resolve(name, Some(&progress::downloads()))?)?)
}

/// Says on stderr what `--backend auto` chose.
pub fn say_backend(model: &ModelArgs, embedder: &Embedder) {
    let info = embedder.info();
    say_choice(model.executor.backend, info.backend, info.backend_reason.as_deref());
    if let Some(engine) = &info.engine {
        log::info!("engine: {}", engine.display());
    }
}

/// Says on stderr that `--backend auto` chose `chosen`, and for which `reason` nothing better; nothing where the backend was named.
pub fn say_choice(asked: Backend, chosen: &str, reason: Option<&str>) {
    if asked != Backend::Auto {
        return;
    }
    let why = match reason {
        // Of a message of several lines the first says what is missing; `doctor` tells the rest.
        Some(reason) => format!(": {}", reason.lines().next().unwrap_or_default().trim_end_matches(':')),
        None => String::new(),
    };
    say(&format!("backend: {chosen} (chosen by --backend auto{why})"));
}

/// Says on stderr, once, how many texts were cut.
pub fn say_truncated(cut: u64, texts: u64, max_tokens: usize) {
    if cut > 0 {
        let were = if cut == 1 { "was" } else { "were" };
        say(&format!("{cut} of {texts} texts {were} longer than {max_tokens} tokens and {were} cut"));
    }
}
