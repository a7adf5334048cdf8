//! `trt-embed build`: a model as a TensorRT engine, compared with a reference before it is kept.

use anyhow::Result;
use clap::ValueEnum;
use std::path::PathBuf;

/// Builds a TensorRT engine for this machine's GPU, or with TensorRT for RTX for GPUs that are not here.
///
/// The engine is compared with the model on the CPU, on texts of all lengths at every profile, and written only when it is true to it. One that is built
/// for other GPUs is compared where it is first loaded.
#[derive(Debug, clap::Args)]
#[cfg_attr(not(feature = "tensorrt"), allow(dead_code))] // this build only says what it lacks
#[command(after_help = "\
Shapes are written BATCHxLENGTH. A bucket serves one shape, fastest; a profile serves all shapes from MIN to MAX and is tuned for OPT.
Without either: buckets for one text and for many, of 32, 128 and the most tokens that the model takes.

--precision auto builds an fp16 engine, and with --calibration an int8 one, and keeps the one that is fastest on this GPU among those that
reach --min-cosine: by the geometric mean of their times at the largest shape of each profile. Where none does, it builds fp32.

Examples:
  trt-embed build -m sentence-transformers/all-mpnet-base-v2 -o mpnet.engine
  trt-embed build -m models/all-MiniLM-L6-v2 --precision fp32 --profile 1x1:1x128:1x512 --bucket 64x64 -o minilm.engine
  trt-embed build --onnx optimum/model.onnx -o model.engine
  trt-embed build -m models/all-MiniLM-L6-v2 --precision int8 --calibration calibration.json -o minilm-int8.engine
  trt-embed build -m models/all-MiniLM-L6-v2 --precision auto --calibration calibration.json -o minilm.engine
  trt-embed build -m models/all-MiniLM-L6-v2 --compute-capability 8.6 --bucket 1x32 --bucket 32x128 -o minilm-a10g.engine  # no GPU needed")]
pub struct Args {
    /// Model folder (sentence-transformers or plain Hugging Face), or hub id `org/name[@revision]`. May be left out where --onnx names a
    /// file in such a folder, or in a folder within it.
    #[arg(short, long, env = "TRT_EMBED_MODEL", value_name = "MODEL", required_unless_present = "onnx")]
    model: Option<String>,
    /// Takes the graph from this file, as other exporters write it, instead of exporting the model's.
    #[arg(long, value_name = "FILE")]
    onnx: Option<PathBuf>,
    /// Arithmetic of the engine.
    #[arg(long, env = "TRT_EMBED_PRECISION", value_enum, default_value_t = Precision::Fp16)]
    precision: Precision,
    /// Ranges of the model's activations, made by `trt-embed calibrate`, for --precision int8 or auto.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Linears that an int8 engine leaves in float, e.g. encoder.layer.0.output.dense; may be given several times [default: the fewest
    /// with which the model in INT8 reaches --min-cosine on the CPU].
    #[arg(long, value_name = "NAME", requires = "calibration")]
    keep_float: Vec<String>,
    /// Shapes that one profile serves, e.g. 1x1:8x128:32x512; may be given several times.
    #[arg(long, value_name = "MIN:OPT:MAX")]
    profile: Vec<String>,
    /// One shape that is served fastest, e.g. 64x32; may be given several times.
    #[arg(long, value_name = "BxS")]
    bucket: Vec<String>,
    /// Most GPU memory that one layer may use for intermediate results, e.g. 2GiB [default: all there is].
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    workspace: Option<usize>,
    /// From 0 (fast build) to 5 (fast engine) [default: TensorRT's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=5))]
    opt_level: Option<u8>,
    /// Layers of an fp16 engine that compute in fp32: those whose name contains PART; may be given several times (TensorRT 8.6).
    #[arg(long, value_name = "PART")]
    fp32_layers: Vec<String>,
    /// Computes GELU by its tanh approximation, which TensorRT 8.6 can take into fp16 matrix products: faster at large shapes. With TOKENS only
    /// in buckets and profiles whose largest shape holds at least so many tokens, padding included (TensorRT 8.6). The fidelity stated is still
    /// that to the model itself.
    #[arg(long, value_name = "TOKENS", num_args = 0..=1, require_equals = true, default_missing_value = "0", conflicts_with = "onnx")]
    tanh_gelu: Option<u64>,
    /// Smallest cosine to the reference's vectors that passes [default: 0.9999 for fp16, 0.99999 for fp32, 0.99 for int8].
    #[arg(long, value_name = "X", value_parser = cosine, conflicts_with = "no_parity")]
    min_cosine: Option<f64>,
    /// Compares with the vectors in this JSON file instead of the CPU's: {"texts": […], "vectors": [[…], …]}, as
    /// scripts/gpu_references.py makes it with sentence-transformers.
    #[arg(long, value_name = "FILE", conflicts_with = "no_parity")]
    reference: Option<PathBuf>,
    /// Writes the engine without comparing it.
    #[arg(long)]
    no_parity: bool,
    /// Builds for GPUs of this compute capability (8.6: A10G, RTX 30; 8.9: L4, RTX 40; 12.0: RTX 50) without asking for one; may be given several times
    /// (TensorRT for RTX). The engine is compared with its model where it is first loaded.
    #[arg(long, value_name = "X.Y", conflicts_with = "reference")]
    compute_capability: Vec<String>,
    /// Which GPU, as the driver counts them.
    #[arg(long, env = "TRT_EMBED_DEVICE", value_name = "N", default_value_t = 0)]
    device: usize,
    /// The engine file.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// `--precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// 32-bit floats, TF32 off
    Fp32,
    /// 16-bit floats where TensorRT finds them faster
    Fp16,
    /// As fp16, with the linears in 8-bit integers
    Int8,
    /// The fastest that is true enough to the model, as measured here
    Auto,
}

/// `2GiB`, `512MB` or a number of bytes.
fn bytes(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, usize); 8] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()));
    let value = number.parse::<usize>().ok().zip(unit).and_then(|(number, (_, unit))| number.checked_mul(*unit));
    value.filter(|&value| value > 0).ok_or_else(|| "a size such as 512MiB or 2GiB is expected".into())
}

/// A cosine that an engine can be asked for.
fn cosine(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| (0.0..=1.0).contains(value));
    value.ok_or_else(|| "a number from 0 to 1 is expected".into())
}

/// Runs the verb.
#[cfg(not(feature = "tensorrt"))]
pub fn run(_: Args) -> Result<()> {
    anyhow::bail!(
        "this trt-embed was built without TensorRT; build it again with `--features tensorrt` \
         (TENSORRT_INCLUDE_DIR names TensorRT's headers, scripts/tensorrt-headers.sh gets them)"
    )
}

#[cfg(feature = "tensorrt")]
pub use with_tensorrt::run;

#[cfg(feature = "tensorrt")]
mod with_tensorrt {
    use super::super::build_progress::watch;
    use super::super::build_summary::{candidate_lines, engine_lines, slower_int8, table};
    use super::super::output::{self, Target};
    #[cfg(feature = "cpu")]
    use super::super::progress;
    use super::super::{Usage, say, settings};
    use super::{Args, Precision};
    use anyhow::Result;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use trt_embed::backend::tensorrt::{
        Arithmetic, Cache, ComputeCapability, EngineFile, EngineRequest, Fastest, FastestRequest, Gate, Library, Profile, Shape,
        Target as BuiltFor, build_engine, build_fastest,
    };
    use trt_embed::cuda::Device;
    #[cfg(feature = "cpu")]
    use trt_embed::graph::Quantization;
    use trt_embed::model::ModelFolder;
    use trt_embed::quantization::Calibration;
    #[cfg(feature = "cpu")]
    use trt_embed::quantization::{QuantizationReport, Samples, choose_float};

    impl Precision {
        /// As the builder takes it; none where it is to be chosen.
        fn arithmetic(self) -> Option<Arithmetic> {
            match self {
                Self::Fp32 => Some(Arithmetic::Fp32),
                Self::Fp16 => Some(Arithmetic::Fp16),
                Self::Int8 => Some(Arithmetic::Int8),
                Self::Auto => None,
            }
        }
    }

    /// Runs the verb: what can go wrong at once first, then what takes minutes.
    pub fn run(args: Args) -> Result<()> {
        let profiles = profiles(&args)?;
        let capabilities = capabilities(&args)?;
        let output = output_file(&args.output)?;
        let folder = folder(&args)?;
        let mut request = EngineRequest::new(&folder);
        request.reference = args.reference.as_deref();
        request.onnx = args.onnx.as_deref();
        request.settings.profiles = profiles;
        request.settings.workspace_bytes = args.workspace;
        request.settings.optimization_level = args.opt_level;
        request.settings.fp32_layers = args.fp32_layers.clone();
        request.tanh_gelu = args.tanh_gelu;
        request.gate = match (args.no_parity, args.min_cosine) {
            (true, _) => Gate::Off,
            (false, Some(bar)) => Gate::MinCosine(bar),
            (false, None) => Gate::Standard,
        };
        match args.precision.arithmetic() {
            Some(arithmetic) => {
                request.settings.arithmetic = arithmetic;
                run_one(&args, &output, request, &capabilities)
            }
            None if !capabilities.is_empty() => {
                let next = "nothing can be timed for a GPU that is not here: choose fp32, fp16 or int8";
                Err(Usage(format!("--precision auto does not go with --compute-capability: {next}")).into())
            }
            None => run_fastest(&args, &output, request),
        }
    }

    /// Builds the engine in the precision asked for.
    fn run_one(args: &Args, output: &Path, request: EngineRequest<'_>, capabilities: &[ComputeCapability]) -> Result<()> {
        let mut request = request;
        let calibration = args.calibration.as_deref().map(Calibration::read).transpose()?;
        if let Some(calibration) = &calibration {
            calibration.check(request.folder, None)?;
        }
        let quantization = calibration.as_ref().map(|ranges| ranges.quantization(args.keep_float.iter().cloned()));
        request.quantization = quantization.as_ref();
        request.check()?;
        // No driver is asked for a GPU that is not here.
        let (device, library) = match capabilities {
            [] => open(args).map(|(device, library)| (Some(device), library))?,
            _ => (None, open_library()?),
        };
        let target = device.as_ref().map_or(BuiltFor::Capabilities(capabilities), BuiltFor::Device);
        // Last, because it takes minutes: all else has proved right. Before builds are watched: a signal ends it at once.
        #[cfg(feature = "cpu")]
        let chosen = calibration.as_ref().map(|ranges| choose(&request, ranges, &args.keep_float)).transpose()?;
        #[cfg(feature = "cpu")]
        if let Some(chosen) = &chosen {
            request.quantization = Some(chosen);
        }
        let progress = watch(&library);
        let built = Cache::from_env().and_then(|cache| build_engine(&library, target, &cache, &request, &progress));
        progress.finish();
        if let Err(trt_embed::Error::Fidelity { min_cosine: Some(cosine), .. }) = &built {
            say(&format!("to accept this engine as it is: {}", accepting(std::env::args(), *cosine)));
        }
        let engine = built?;
        EngineFile::write(output, &engine.manifest, engine.plan())?;
        output::print(&table(&engine_lines(&args.output, &engine)))?;
        say_all([engine.manifest.missing_int8(), slower_int8(&engine.manifest, false)]);
        Ok(())
    }

    /// Builds the engine in the precision that is fastest, and says why it is that one.
    fn run_fastest(args: &Args, output: &Path, engine: EngineRequest<'_>) -> Result<()> {
        let calibration = args.calibration.as_deref().map(Calibration::read).transpose()?;
        let mut request = FastestRequest::new(engine);
        request.calibration = calibration.as_ref();
        request.keep_float = &args.keep_float;
        request.check()?;
        if calibration.is_none() {
            let why = match args.onnx {
                Some(_) => "with an --onnx file that is not quantised",
                None => "without --calibration FILE, which `trt-embed calibrate` makes",
            };
            say(&format!("--precision auto: int8 is no candidate {why}"));
        }
        if args.no_parity {
            say("--precision auto: by time alone, because of --no-parity");
        }
        let (device, library) = open(args)?;
        let progress = watch(&library);
        let built = build_fastest(&library, &device, &Cache::from_env()?, &request, &progress);
        progress.finish();
        let fastest = built?;
        let Fastest { engine, candidates, .. } = &fastest;
        EngineFile::write(output, &engine.manifest, engine.plan())?;
        #[cfg(feature = "cpu")]
        if let Some(report) = &fastest.fitted {
            say_fitted(report);
        }
        let mut lines = engine_lines(&args.output, engine);
        lines.extend(candidate_lines(candidates, &engine.manifest));
        output::print(&table(&lines))?;
        let half = candidates.iter().find(|candidate| candidate.arithmetic == Arithmetic::Fp16);
        let slower = slower_int8(&engine.manifest, half.is_some_and(|half| half.refused.is_some()));
        say_all([engine.manifest.missing_int8(), slower]);
        Ok(())
    }

    /// The command of `args` with the bar that a smallest cosine of `cosine` reaches.
    pub(super) fn accepting(args: impl IntoIterator<Item = String>, cosine: f64) -> String {
        const FLAG: &str = "--min-cosine";
        let mut words = vec!["trt-embed".to_owned()];
        let mut args = args.into_iter().skip(1);
        while let Some(word) = args.next() {
            if word == FLAG {
                args.next(); // its value
            } else if !word.starts_with(&format!("{FLAG}=")) {
                words.push(word);
            }
        }
        // Down, so that rounding does not refuse it again.
        words.extend([FLAG.to_owned(), format!("{:.5}", (cosine * 1e5).floor() / 1e5)]);
        let plain = |word: &str| {
            !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./:=,@+%".contains(&byte))
        };
        let quoted = |word: String| if plain(&word) { word } else { format!("'{}'", word.replace('\'', r"'\''")) };
        words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
    }

    /// What must not go unheard.
    fn say_all(notes: [Option<String>; 2]) {
        notes.iter().flatten().for_each(|note| say(note));
    }

    /// The GPU, and TensorRT with its parser.
    fn open(args: &Args) -> Result<(Device, Arc<Library>)> {
        let device = Device::open(args.device)?;
        Ok((device, open_library()?))
    }

    /// TensorRT with its parser.
    fn open_library() -> Result<Arc<Library>> {
        let library = Library::load()?;
        library.load_parser()?;
        Ok(library)
    }

    fn capabilities(args: &Args) -> Result<Vec<ComputeCapability>> {
        Ok(args.compute_capability.iter().map(|text| text.parse()).collect::<trt_embed::Result<_>>()?)
    }

    #[cfg(feature = "cpu")]
    fn say_fitted(report: &QuantizationReport) {
        say(&format!("quantisation on the CPU: {}", report.to_string().trim_end()));
    }

    /// What INT8 takes: as told, or so that the model keeps to the bar on the CPU.
    #[cfg(feature = "cpu")]
    fn choose(request: &EngineRequest<'_>, calibration: &Calibration, keep_float: &[String]) -> Result<Quantization> {
        let (texts, bar) = (Samples::of_all_lengths(request.folder)?, request.gate.bar(request.settings.arithmetic));
        let spinner = progress::step("choosing what INT8 may take");
        let chosen = choose_float(request.folder, calibration, &texts, keep_float, bar);
        spinner.finish_and_clear();
        let (quantization, report) = chosen?;
        report.iter().for_each(say_fitted);
        Ok(quantization)
    }

    fn profiles(args: &Args) -> Result<Vec<Profile>> {
        let wrong = |setting: &str, error: trt_embed::Error| match error {
            trt_embed::Error::Setting { reason, .. } => Usage(format!("{setting}: {reason}")),
            other => Usage(format!("{setting}: {other}")),
        };
        let mut profiles = Vec::new();
        for text in &args.profile {
            profiles.push(text.parse::<Profile>().map_err(|error| wrong("--profile", error))?);
        }
        for text in &args.bucket {
            profiles.push(Profile::bucket(text.parse::<Shape>().map_err(|error| wrong("--bucket", error))?));
        }
        Ok(profiles)
    }

    /// The regular file that `-o` names, once its folder has proved writable.
    fn output_file(path: &Path) -> Result<PathBuf> {
        match Target::open(Some(path), false)? {
            Target::File { path, .. } => Ok(path),
            Target::Stream { name, .. } => Err(Usage(format!("-o: an engine is written to a file, not to {name}")).into()),
        }
    }

    /// The model: as named, else the folder that the ONNX file lies in or the one around that.
    fn folder(args: &Args) -> Result<ModelFolder> {
        if let Some(name) = &args.model {
            return settings::open_folder(name);
        }
        let onnx = args.onnx.as_deref().unwrap_or(Path::new(""));
        let inner = onnx.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        // Where links lead, so that the parent is that of the real folder; one that does not exist is named as it was given.
        let inner = inner.canonicalize().unwrap_or_else(|_| inner.to_path_buf());
        let has = |folder: &Path, name: &str| folder.join(name).is_file();
        let is_model = |folder: &&Path| has(folder, "config.json") && (has(folder, "tokenizer.json") || has(folder, "vocab.txt"));
        match [Some(inner.as_path()), inner.parent()].into_iter().flatten().find(is_model) {
            Some(folder) => Ok(ModelFolder::open(folder)?),
            None => Err(Usage(format!(
                "no config.json and tokenizer.json beside {} or in the folder above: name the model with -m",
                onnx.display()
            ))
            .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, expected) in [
            ("2GiB", 2 << 30),
            ("512mib", 512 << 20),
            ("1 KiB", 1024),
            ("3GB", 3_000_000_000),
            ("7kB", 7000),
            ("42", 42),
            ("42B", 42),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0GiB", "-1", "+1", "1.5GiB", "GiB", "1TiB", "99999999999GiB", "1 2GiB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[cfg(feature = "tensorrt")]
    #[test]
    fn the_command_that_accepts_an_engine_can_be_run_as_it_is_printed() {
        for (args, cosine, expected) in [
            (
                &["trt-embed", "build", "-m", "a", "-o", "b.engine"][..],
                0.999_897_4,
                "trt-embed build -m a -o b.engine --min-cosine 0.99989",
            ),
            (
                &["/bin/t", "build", "--min-cosine", "0.5", "-o", "it's b"],
                0.25,
                r"trt-embed build -o 'it'\''s b' --min-cosine 0.25000",
            ),
            (
                &["t", "build", "--min-cosine=0.99", "--bucket", "1x32"],
                0.98,
                "trt-embed build --bucket 1x32 --min-cosine 0.98000",
            ),
        ] {
            let said = with_tensorrt::accepting(args.iter().map(|word| (*word).to_owned()), cosine);
            assert_eq!(said, expected);
            let bar: f64 = said.rsplit(' ').next().unwrap().parse().unwrap();
            assert!(bar <= cosine && bar > cosine - 1e-5);
        }
    }

    #[test]
    fn cosines_are_read_within_their_range() {
        assert_eq!(cosine("0.9995"), Ok(0.9995));
        for text in ["1.1", "-0.5", "NaN", "inf", "high", ""] {
            assert!(cosine(text).is_err(), "{text}");
        }
    }
}
