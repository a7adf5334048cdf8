//! `trt-embed export`: a model as ONNX.

use super::{Usage, output, progress, settings};
use anyhow::Result;
use clap::ValueEnum;
use indicatif::HumanBytes;
use std::path::{Path, PathBuf};
use trt_embed::graph::{self, Export, Graph};
use trt_embed::model::ModelFolder;
use trt_embed::quantization::Calibration;

/// Writes a model as ONNX, with its configuration and tokenizer beside it.
///
/// The graph takes `input_ids` and `attention_mask` (int32, [batch, sequence], rows padded on the right) and gives
/// `last_hidden_state` ([batch, sequence, hidden]). Pooling is not part of it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed export -m models/all-MiniLM-L6-v2 -o exported
  trt-embed export -m sentence-transformers/all-mpnet-base-v2 -o exported --precision fp16
  trt-embed export -m models/all-MiniLM-L6-v2 -o exported --precision int8 --calibration calibration.json")]
pub struct Args {
    /// Model folder (sentence-transformers or plain Hugging Face), or hub id `org/name[@revision]`.
    #[arg(short, long, env = "TRT_EMBED_MODEL", value_name = "MODEL")]
    model: String,
    /// Folder for the files; made when it does not exist.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Type of weights and activations.
    #[arg(long, env = "TRT_EMBED_PRECISION", value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// Ranges for --precision int8, made by `trt-embed calibrate`.
    #[arg(long, value_name = "FILE", required_if_eq("precision", "int8"))]
    calibration: Option<PathBuf>,
    /// Linears that --precision int8 leaves in float, e.g. encoder.layer.0.output.dense; may be given several times.
    #[arg(long, value_name = "NAME", requires = "calibration")]
    keep_float: Vec<String>,
    /// ONNX operator set; 17 is the one that is written.
    #[arg(long, value_name = "N", value_parser = ["17"], default_value = "17")]
    opset: String,
}

/// `--precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// 32-bit floats
    Fp32,
    /// 16-bit floats, the output included
    Fp16,
    /// Linears in INT8 (explicit QuantizeLinear and DequantizeLinear), the rest in 32-bit floats
    Int8,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    if args.calibration.is_some() && args.precision != Precision::Int8 {
        return Err(Usage("--calibration goes with --precision int8".into()).into());
    }
    let model = settings::open_folder(&args.model)?;
    let bar = progress::step("exporting");
    let export = match (args.precision, &args.calibration) {
        (Precision::Fp16, _) => graph::export_to_folder(&model, graph::Precision::Fp16, &args.output),
        (_, Some(file)) => export_int8(&model, file, args.keep_float, &args.output),
        _ => graph::export_to_folder(&model, graph::Precision::Fp32, &args.output),
    };
    bar.finish_and_clear();
    let lines = export?
        .files
        .iter()
        .map(|file| format!("{:>12}  {}\n", HumanBytes(file.bytes).to_string(), file.path.display()))
        .collect::<String>();
    output::print(&lines)
}

fn export_int8(model: &ModelFolder, calibration: &Path, keep_float: Vec<String>, folder: &Path) -> trt_embed::Result<Export> {
    let calibration = Calibration::read(calibration)?;
    calibration.check(model, None)?;
    let quantization = calibration.quantization(keep_float);
    let graph = Graph::quantized(&model.config, &model.weights()?, graph::Precision::Fp32, &quantization)?;
    graph.export_to_folder(model, folder)
}
