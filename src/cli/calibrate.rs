//! `trt-embed calibrate`: the ranges of a model's activations, for INT8.

use super::input::{Chunk, ChunkLimits, InputArgs, Texts};
use super::settings::Backend;
use super::{Usage, npy, output, progress, settings, skip};
use anyhow::Result;
use clap::ValueEnum;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use trt_embed::model::ModelFolder;
use trt_embed::quantization::{CalibrationSettings, Method, Observer, Samples, calibrate_with, check_calibration};

/// Measures how far a model's activations reach over sample texts, for `export --precision int8`.
///
/// Runs the fp32 model, on the GPU or on all cores of the CPU. Texts are read as `embed` reads them; some hundred that are like those to
/// be embedded are enough. Padding never counts. An output file that exists is replaced.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed calibrate -m models/all-MiniLM-L6-v2 -i lines.txt -o calibration.json
  trt-embed calibrate -m models/all-MiniLM-L6-v2 --npy ids -o calibration.json --method entropy")]
pub struct Args {
    /// Model folder (sentence-transformers or plain Hugging Face), or hub id `org/name[@revision]`.
    #[arg(short, long, env = "TRT_EMBED_MODEL", value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    input: InputArgs,
    /// What runs the model: its graph, so TensorRT or the CPU. `auto` takes TensorRT where this build and this machine have all that it needs, and says
    /// which. Its engine is built at the first use and kept in the engine cache.
    #[arg(long, env = "TRT_EMBED_BACKEND", value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// GPU, as the driver numbers them.
    #[arg(long, env = "TRT_EMBED_DEVICE", value_name = "N", default_value_t = 0)]
    device: usize,
    /// Folder with `input_ids.npy` and `attention_mask.npy` (int64 or int32, [samples, seq]) instead of texts.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["input", "texts"])]
    npy: Option<PathBuf>,
    /// File to write.
    #[arg(short, long, value_name = "FILE", default_value = "calibration.json")]
    output: PathBuf,
    /// How a range is found from a tensor's values.
    #[arg(long, value_enum, default_value_t = MethodArg::Minmax)]
    method: MethodArg,
    /// Percentage of the values that a range holds, with `--method percentile` [default: 99.999].
    #[arg(long, value_name = "P")]
    percentile: Option<f64>,
    /// Moves the reach of channels into the weights before ranges are measured (SmoothQuant), with this alpha between 0 and 1.
    #[arg(long, value_name = "ALPHA")]
    smooth_quant: Option<f32>,
    /// Most texts that are taken; what follows them is not read.
    #[arg(long, value_name = "N", default_value = "4096")]
    max_samples: NonZeroUsize,
}

/// `--method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    /// The largest magnitude
    Minmax,
    /// The magnitude that all but a few values stay below
    Percentile,
    /// The cut that loses the least information (Kullback-Leibler)
    Entropy,
}

/// `--percentile` where none is given: the best of those measured (docs/quantization.md).
const PERCENTILE: f64 = 99.999;
/// Bytes of text that are tokenized at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let method = match (args.method, args.percentile) {
        (MethodArg::Percentile, Some(percentile)) => Method::Percentile(percentile),
        (_, Some(_)) => return Err(Usage("--percentile goes with --method percentile".into()).into()),
        (MethodArg::Percentile, None) => Method::Percentile(PERCENTILE),
        (MethodArg::Minmax, None) => Method::MinMax,
        (MethodArg::Entropy, None) => Method::Entropy,
    };
    let settings = CalibrationSettings { method, smoothing: args.smooth_quant };
    let most = args.max_samples.get();
    // What is wrong with the input is found before the model is loaded.
    let (model, samples) = match &args.npy {
        Some(folder) => {
            let rows = npy::read(folder, most)?;
            let model = settings::open_folder(&args.model)?;
            let samples = Samples::from_ids(&model, rows)?;
            (model, samples)
        }
        None => {
            let texts = Texts::open(&args.input)?;
            let model = settings::open_folder(&args.model)?;
            let samples = read_texts(texts, &model, most)?;
            (model, samples)
        }
    };
    check_calibration(&samples, &settings)?;
    let mut observer = observer(&args, &model, &samples)?;
    let bar = progress::texts(Some(0), true);
    let calibration = calibrate_with(observer.as_mut(), &model, &samples, &settings, &progress::Counted(&bar))?;
    bar.finish_and_clear();
    calibration.write(&args.output)?;
    output::print(&format!(
        "{} tensors, {} texts, {} tokens, {}: {}\n",
        calibration.ranges.len(),
        calibration.samples,
        calibration.tokens,
        calibration.method,
        args.output.display()
    ))
}

/// What runs the model, as `--backend` says; on stderr what `auto` chose.
#[cfg_attr(not(feature = "tensorrt"), allow(unused_variables))] // the CPU takes rows of any length
fn observer(args: &Args, model: &ModelFolder, samples: &Samples) -> Result<Box<dyn Observer>> {
    match args.backend.choice().decide(args.device)? {
        #[cfg(feature = "cpu")]
        trt_embed::ChosenBackend::Cpu { reason } => {
            settings::say_choice(args.backend, "cpu", reason.as_deref());
            Ok(Box::new(trt_embed::quantization::CpuObserver::new(model)?))
        }
        #[cfg(feature = "tensorrt")]
        trt_embed::ChosenBackend::TensorRt { device, library } => {
            use trt_embed::backend::tensorrt::{Cache, TensorRtObserver};
            settings::say_choice(args.backend, "tensorrt", None);
            let cache = Cache::from_env()?;
            let watch = super::build_progress::watch(&library);
            let observer = TensorRtObserver::new(&library, &device, &cache, model, samples.longest(), &watch);
            watch.finish();
            Ok(Box::new(observer?))
        }
        // Whose kernels fold what lies between linears: there is nothing to observe.
        #[cfg(feature = "cuda")]
        trt_embed::ChosenBackend::Cuda { .. } => Err(Usage(
            "--backend cuda: calibrate observes a graph, which TensorRT and the CPU run; name one of them, or auto".into(),
        )
        .into()),
        other => anyhow::bail!("calibrate does not run on {other:?}; name another with --backend"),
    }
}

fn read_texts(mut texts: Texts, model: &ModelFolder, most: usize) -> Result<Samples> {
    let mut samples = Samples::default();
    while samples.len() < most {
        let limits = ChunkLimits { texts: most - samples.len(), bytes: CHUNK_BYTES };
        let Chunk { texts: chunk, rows, .. } = texts.next_chunk(limits)?;
        if chunk.is_empty() {
            break;
        }
        let placed = |error| skip::placed(error, &texts, &chunk, &rows, |texts| Samples::from_texts(model, texts).map(drop));
        samples.extend(Samples::from_texts(model, &chunk).map_err(placed)?);
    }
    Ok(samples)
}
