//! `trt-embed embed`: texts to vectors, as a stream.

use super::input::{ChunkLimits, InputArgs, Texts};
use super::output::{Format, RowWriter, Target};
use super::settings::{self, ModelArgs, VectorArgs};
use super::{Usage, progress};
use anyhow::Result;
use std::path::{Path, PathBuf};
use trt_embed::Error;

/// Turns texts into vectors.
///
/// Texts are arguments, the lines of a file, or stdin. Rows come in input order: as JSON Lines
/// {"index":0,"tokens":7,"embedding":[…]}, or as one NumPy array (float32, [texts, dim]).
/// Inputs of any size run in bounded memory. A file named with -o appears whole or not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: InputArgs,
    /// File to write; stdout without it, or with `-`.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Output format [default: npy when the name of -o ends in .npy, else jsonl].
    #[arg(short, long, env = "TRT_EMBED_FORMAT", value_enum)]
    format: Option<Format>,
    #[command(flatten)]
    vector: VectorArgs,
    /// Adds every token's hidden state to each row (jsonl only): "hidden_states":[[…],…], [tokens, hidden].
    #[arg(long)]
    hidden_states: bool,
}

const AFTER_HELP: &str = "\
Examples:
  trt-embed embed -m models/all-MiniLM-L6-v2 \"A cat sat.\" \"Stocks fell.\"
  trt-embed embed -m models/all-MiniLM-L6-v2 -i lines.txt -o vectors.npy
  cat questions.txt | trt-embed embed -m models/all-MiniLM-L6-v2 --prompt query > vectors.jsonl";

/// Texts of the first chunk: few, so that the first rows come soon. Each chunk doubles up to [`LARGEST_CHUNK`].
const FIRST_CHUNK: usize = 32;
/// Texts of the largest chunk: enough to sort lengths into full batches, few enough to stay under some tens of MB.
const LARGEST_CHUNK: usize = 4096;
/// The same with hidden states, which are hundreds of times larger than a vector.
const LARGEST_CHUNK_HIDDEN: usize = 64;
/// Bytes of text of one chunk. The tokenizer takes some hundred bytes for every token.
const CHUNK_BYTES: usize = 1 << 20;

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let format = args.format.unwrap_or_else(|| match args.output.as_deref().and_then(Path::extension) {
        Some(extension) if extension.eq_ignore_ascii_case("npy") => Format::Npy,
        _ => Format::Jsonl,
    });
    if args.hidden_states && format == Format::Npy {
        return Err(Usage(
            "--hidden-states goes with --format jsonl: texts differ in their number of tokens, and a NumPy array has no ragged rows".into(),
        )
        .into());
    }
    // Everything that can be wrong with the input and the output is found before the model is loaded.
    let mut texts = Texts::open(&args.input)?;
    let target = Target::open(args.output.as_deref())?;
    let bar = progress::texts(texts.size(), target.is_stdout());

    let embedder = settings::open(&args.model, Some(&args.vector))?;
    settings::say_backend(&args.model, &embedder);
    let mut rows = RowWriter::begin(format, target, embedder.info().dim)?;

    let largest = if args.hidden_states { LARGEST_CHUNK_HIDDEN } else { LARGEST_CHUNK };
    let mut limits = ChunkLimits { texts: FIRST_CHUNK, bytes: CHUNK_BYTES };
    let mut done = 0usize;
    let mut cut = 0usize;
    loop {
        let chunk = texts.next_chunk(limits)?;
        if chunk.is_empty() {
            break;
        }
        let embeddings = embedder.embed(&chunk).map_err(|error| number_from(done, error))?;
        let hidden = if args.hidden_states {
            Some(embedder.hidden_states(&chunk).map_err(|error| number_from(done, error))?)
        } else {
            None
        };
        rows.write(done as u64, &embeddings, hidden.as_deref())?;
        done += chunk.len();
        cut += embeddings.truncated;
        bar.set_position(texts.bytes_read());
        bar.set_message(format!("{done} texts"));
        limits.texts = (limits.texts * 2).min(largest);
    }
    rows.finish()?;
    bar.finish_and_clear();
    settings::say_truncated(cut, done, embedder.info().max_tokens);
    Ok(())
}

/// Errors number texts from the start of their call; the user counts from the start of the input.
pub fn number_from(first: usize, error: Error) -> Error {
    match error {
        Error::TokenId { id, text, vocab_size } => Error::TokenId { id, text: first + text, vocab_size },
        Error::NotFinite { text, component, value } => Error::NotFinite { text: first + text, component, value },
        other => other,
    }
}
