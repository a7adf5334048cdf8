//! `trt-embed embed`: texts to vectors, as a stream.

use super::input::{Chunk, ChunkLimits, Fault, InputArgs, OnError, Texts};
use super::output::{Format, RowWriter, Target};
use super::resume::{self, Done, Job};
use super::settings::{self, ModelArgs, VectorArgs};
use super::skip::{self, Skipped};
use super::{Usage, progress, say};
use anyhow::Result;
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};
use std::time::Instant;
use trt_embed::{Embedder, Embeddings, HiddenStates};

/// Turns texts into vectors.
///
/// Texts are arguments, the lines of a file, or stdin. Rows come in input order: as JSON Lines
/// {"index":0,"tokens":7,"embedding":[…]}, or as one NumPy array (float32, [texts, dim]). `index` counts texts from 0;
/// messages count texts and lines from 1.
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
    /// What becomes of a line that is no text, and of a text that cannot be embedded. Skipped ones have no row: rows of jsonl keep the
    /// `index` of their line; row K of npy is that of the K-th line that was not skipped. The exit status is 0 unless all are skipped.
    #[arg(long, env = "TRT_EMBED_ON_ERROR", value_enum, default_value_t = OnError::Fail)]
    on_error: OnError,
    /// File that tells the skipped lines, as {"line":7,"reason":…,"text":…,"bytes":…}, lines counted from 1 [default: OUTPUT.errors.jsonl
    /// beside -o, else stderr names the first ten].
    #[arg(long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// Goes on where an interrupted run with --resume stopped, or begins one that can be gone on with. Until the output is complete,
    /// OUTPUT.partial holds its rows and OUTPUT.resume how far they go. Wants -i FILE and -o FILE; another input, model or setting is
    /// an error. On the CPU the output equals that of an uninterrupted run byte for byte.
    #[arg(long)]
    resume: bool,
}

const AFTER_HELP: &str = "\
Examples:
  trt-embed embed -m models/all-MiniLM-L6-v2 \"A cat sat.\" \"Stocks fell.\"
  trt-embed embed -m models/all-MiniLM-L6-v2 -i lines.txt -o vectors.npy
  trt-embed embed -m models/all-MiniLM-L6-v2 -i lines.txt -o vectors.npy --on-error skip --resume
  cat questions.txt | trt-embed embed -m models/all-MiniLM-L6-v2 --prompt query > vectors.jsonl";

/// Texts of the first chunk: few, so that the first rows come soon. Each chunk doubles up to [`LARGEST_CHUNK`].
const FIRST_CHUNK: usize = 32;
/// Texts of the largest chunk: enough to sort lengths into full batches, few enough to stay under some tens of MB.
const LARGEST_CHUNK: usize = 4096;
/// The same with hidden states, which are hundreds of times larger than a vector.
const LARGEST_CHUNK_HIDDEN: usize = 64;
/// Bytes of text of one chunk. The tokenizer takes some hundred bytes for every token.
const CHUNK_BYTES: usize = 1 << 20;

/// A run that has everything it needs.
struct Run {
    embedder: Embedder,
    texts: Texts,
    rows: RowWriter,
    skipped: Skipped,
    job: Option<Job>,
    done: Done,
    hidden_states: bool,
}

/// What a chunk gave.
struct Embedded {
    /// The numbers of the texts that have a row, from 0.
    rows: Vec<u64>,
    embeddings: Embeddings,
    hidden: Option<Vec<HiddenStates>>,
    /// The lines that have none, in order.
    faults: Vec<Fault>,
}

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
    let mut texts = Texts::open(&args.input)?.on_error(args.on_error);
    let mut target = Target::open(args.output.as_deref(), args.resume)?;
    let mut skipped = Skipped::open(args.on_error, args.errors.as_deref(), &target, args.resume)?;
    let mut job = None;
    if args.resume {
        job = Some(Job::open(&mut target, &skipped, &mut texts)?);
    } else {
        resume::say_ignored(&target);
    }
    let bar = progress::texts(texts.size(), target.is_stdout());

    let embedder = settings::open(&args.model, Some(&args.vector))?;
    settings::say_backend(&args.model, &embedder);
    let mut done = Done::default();
    if let Some(job) = &mut job {
        let settings = resume::settings(&args.model, format, args.hidden_states, &texts, &embedder)?;
        done = job.begin(settings, &mut target, &mut skipped)?;
    }
    let rows = RowWriter::begin(format, target, embedder.info().dim, done.rows)?;
    let mut run = Run { embedder, texts, rows, skipped, job, done, hidden_states: args.hidden_states };
    let ended = run.all(&bar);
    bar.finish_and_clear();
    if ended.is_err() {
        run.job.iter().filter_map(|job| job.kept()).for_each(|kept| say(&kept));
    }
    ended?;
    run.finish()
}

impl Run {
    /// Embeds the input to its end.
    fn all(&mut self, bar: &ProgressBar) -> Result<()> {
        let largest = if self.hidden_states { LARGEST_CHUNK_HIDDEN } else { LARGEST_CHUNK };
        let first = if self.done.next_chunk > 0 { self.done.next_chunk } else { FIRST_CHUNK };
        let mut limits = ChunkLimits { texts: first.min(largest), bytes: CHUNK_BYTES };
        loop {
            let chunk = self.texts.next_chunk(limits)?;
            if chunk.is_empty() {
                return Ok(());
            }
            let embedded = self.embed(chunk)?;
            for fault in &embedded.faults {
                self.skipped.note(fault, &self.texts)?;
            }
            self.rows.write(&embedded.rows, &embedded.embeddings, embedded.hidden.as_deref())?;
            limits.texts = (limits.texts * 2).min(largest);
            self.done.rows += embedded.rows.len() as u64;
            self.done.truncated += embedded.embeddings.truncated as u64;
            self.done.next_chunk = limits.texts;
            // A chunk that was cut short ends elsewhere once the faulty line is mended, or lines are added.
            if !self.texts.stopped() {
                self.checkpoint()?;
            }
            bar.set_position(self.texts.bytes_read());
            bar.set_message(format!("{} texts", self.done.rows));
        }
    }

    /// Embeds the texts of `chunk`; where they may be skipped, without those that cannot be.
    fn embed(&self, chunk: Chunk) -> Result<Embedded> {
        let Chunk { texts, rows, faults } = chunk;
        match self.call(&texts) {
            Ok((embeddings, hidden)) => Ok(Embedded { rows, embeddings, hidden, faults }),
            Err(error) if self.skipped.allowed() && skip::is_about_texts(&error) => {
                let (embeddings, hidden) = self.call(&[])?;
                let mut embedded = Embedded { rows: Vec::new(), embeddings, hidden, faults };
                self.embed_good(error, &texts, &rows, &mut embedded)?;
                embedded.faults.sort_by_key(|fault| fault.row);
                Ok(embedded)
            }
            Err(error) => Err(skip::placed(error, &self.texts, &texts, &rows, |texts| self.call(texts).map(drop))),
        }
    }

    /// Adds to `embedded` those of `texts` that can be embedded, and what is wrong with the others. The call with all of them gave
    /// `error`. Halves are tried, and halves of those that fail: of n texts, k bad ones cost n log k more at most.
    fn embed_good(&self, error: trt_embed::Error, texts: &[String], rows: &[u64], embedded: &mut Embedded) -> Result<()> {
        if let ([text], [row]) = (texts, rows) {
            let reason = skip::reason_alone(&error);
            embedded.faults.push(Fault::new(*row, reason, text.as_bytes(), text.len() as u64));
            return Ok(());
        }
        let (texts, rows) = (texts.split_at(texts.len() / 2), rows.split_at(rows.len() / 2));
        for (texts, rows) in [(texts.0, rows.0), (texts.1, rows.1)] {
            match self.call(texts) {
                Ok((embeddings, hidden)) => {
                    embedded.rows.extend(rows);
                    embedded.embeddings.values.extend(embeddings.values);
                    embedded.embeddings.tokens.extend(embeddings.tokens);
                    embedded.embeddings.truncated += embeddings.truncated;
                    embedded.hidden.iter_mut().zip(hidden).for_each(|(all, hidden)| all.extend(hidden));
                }
                Err(error) if skip::is_about_texts(&error) => self.embed_good(error, texts, rows, embedded)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn call(&self, texts: &[String]) -> trt_embed::Result<(Embeddings, Option<Vec<HiddenStates>>)> {
        let embeddings = self.embedder.embed(texts)?;
        let hidden = if self.hidden_states { Some(self.embedder.hidden_states(texts)?) } else { None };
        Ok((embeddings, hidden))
    }

    /// Notes how far the run is, where it can be gone on with and it is time.
    fn checkpoint(&mut self) -> Result<()> {
        let Some(job) = self.job.as_mut().filter(|job| job.is_due()) else { return Ok(()) };
        let began = Instant::now();
        self.done.output_bytes = self.rows.sync()?;
        self.done.errors_bytes = self.skipped.sync()?;
        self.done.skipped = self.skipped.count;
        self.done.input = self.texts.position();
        job.checkpoint(&self.done, self.skipped.path(), began)?;
        self.rows.keep();
        self.skipped.keep();
        Ok(())
    }

    /// Completes the files.
    fn finish(self) -> Result<()> {
        let Self { embedder, rows, skipped, job, done, .. } = self;
        let lines = done.rows + skipped.count;
        // Where no line was of use, it is not the lines that are wrong, and no output is better than an empty one.
        if lines > 0 && done.rows == 0 {
            rows.discard()?;
        } else {
            rows.finish()?;
        }
        let ended = skipped.finish(lines);
        job.map_or(Ok(()), Job::finish)?;
        ended?;
        settings::say_truncated(done.truncated, done.rows, embedder.info().max_tokens);
        Ok(())
    }
}
