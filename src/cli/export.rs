//! `trt-embed export`: a model as ONNX.

use super::{output, progress, settings};
use anyhow::Result;
use clap::ValueEnum;
use indicatif::HumanBytes;
use std::path::PathBuf;
use trt_embed::graph;

/// Writes a model as ONNX, with its configuration and tokenizer beside it.
///
/// The graph takes `input_ids` and `attention_mask` (int32, [batch, sequence], rows padded on the right) and gives
/// `last_hidden_state` ([batch, sequence, hidden]). Pooling is not part of it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed export -m models/all-MiniLM-L6-v2 -o exported
  trt-embed export -m sentence-transformers/all-mpnet-base-v2 -o exported --precision fp16")]
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
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let precision = match args.precision {
        Precision::Fp32 => graph::Precision::Fp32,
        Precision::Fp16 => graph::Precision::Fp16,
    };
    let model = settings::open_folder(&args.model)?;
    let bar = progress::step("exporting");
    let export = graph::export_to_folder(&model, precision, &args.output);
    bar.finish_and_clear();
    let lines = export?
        .files
        .iter()
        .map(|file| format!("{:>12}  {}\n", HumanBytes(file.bytes).to_string(), file.path.display()))
        .collect::<String>();
    output::print(&lines)
}
