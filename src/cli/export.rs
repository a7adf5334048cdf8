//! `trt-embed export`: a model as ONNX.

use super::{Usage, output, progress, settings};
use anyhow::Result;
use clap::ValueEnum;
use indicatif::HumanBytes;
use std::path::PathBuf;
use trt_embed::graph::{self, Export, Graph, Inputs, Integers};
use trt_embed::model::ModelFolder;
use trt_embed::quantization::Calibration;

/// Writes a model as ONNX, with its configuration and tokenizer beside it.
///
/// The graph takes `input_ids` and `attention_mask` ([batch, sequence], rows padded on the right) and gives `last_hidden_state`
/// ([batch, sequence, hidden]). Pooling is not part of it. Programs that are fed as optimum's exports are want --io int64, and for BERT
/// most of them --token-types.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed export -m models/all-MiniLM-L6-v2 -o exported
  trt-embed export -m sentence-transformers/all-mpnet-base-v2 -o exported --precision fp16
  trt-embed export -m models/all-MiniLM-L6-v2 -o exported --io int64 --token-types
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
    /// Type of the inputs.
    #[arg(long, value_enum, default_value_t = Io::Int32)]
    io: Io,
    /// Makes `token_type_ids` an input, too (BERT): the row of the token type table that is added at each token. Without it that is row 0
    /// everywhere. Ranges for --precision int8 are those of row 0.
    #[arg(long)]
    token_types: bool,
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

/// `--io`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Io {
    /// 32 bits
    Int32,
    /// 64 bits, as optimum's exports have them
    Int64,
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
    let export = export(&model, &args);
    bar.finish_and_clear();
    let lines = export?
        .files
        .iter()
        .map(|file| format!("{:>12}  {}\n", HumanBytes(file.bytes).to_string(), file.path.display()))
        .collect::<String>();
    output::print(&lines)
}

fn export(model: &ModelFolder, args: &Args) -> trt_embed::Result<Export> {
    let mut inputs = Inputs::new(match args.io {
        Io::Int32 => Integers::Int32,
        Io::Int64 => Integers::Int64,
    });
    if args.token_types {
        inputs = inputs.with_token_types();
    }
    let precision = if args.precision == Precision::Fp16 { graph::Precision::Fp16 } else { graph::Precision::Fp32 };
    let quantization = match &args.calibration {
        None => None,
        Some(file) => {
            let calibration = Calibration::read(file)?;
            calibration.check(model, None)?;
            Some(calibration.quantization(args.keep_float.clone()))
        }
    };
    let graph = Graph::with_inputs(&model.architecture()?, precision, quantization.as_ref(), inputs)?;
    graph.export_to_folder(model, &args.output)
}
