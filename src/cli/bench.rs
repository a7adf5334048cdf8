//! `trt-embed bench`: latency and throughput of a model on this machine.

use super::mix::Seeded;
use super::settings::{self, ModelArgs};
use super::{bench_gpu, output, progress};
use anyhow::{Result, bail};
use serde::Serialize;
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::{Duration, Instant};
use trt_embed::Embedder;

/// Measures latency and throughput.
///
/// Latency is wall time on the calling thread, one call in flight, after warm-up: from token ids in memory to vectors in
/// memory with fresh random ids each call, and from text to vector with tokenising apart. Throughput is that of a fixed mix
/// of lengths, in sentences and real tokens (padding never counts), the median of up to five rounds. On a GPU also the GPU's own time of the whole graph and of
/// the encoder alone, the cold start, device memory, and the engine's measured fidelity.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed bench -m models/all-MiniLM-L6-v2 --threads 1 --shape 1x16 --shape 1x128
  trt-embed bench -m models/all-MiniLM-L6-v2 --iterations 10000 --mixed 2000 --json")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Texts x tokens of one call; may be repeated [default: 1x16 1x128 32x128, as far as the model's limit goes].
    #[arg(long, value_name = "BxS")]
    shape: Vec<Shape>,
    /// Calls measured for each shape; p99.9 wants 10000 or more.
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    iterations: Option<NonZeroUsize>,
    /// Seconds measured for each shape, instead of a number of calls.
    #[arg(long, value_name = "S", default_value = "5", value_parser = parse_seconds)]
    seconds: Duration,
    /// Texts of the mix of lengths that throughput is measured on; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 256)]
    mixed: usize,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// `--shape`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub batch: usize,
    pub seq: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = |text: &str| text.parse().ok().filter(|size| (1..=1 << 20).contains(size));
        match text.split_once('x').map(|(batch, seq)| (size(batch), size(seq))) {
            Some((Some(batch), Some(seq))) => Ok(Self { batch, seq }),
            _ => Err("a shape is texts x tokens, e.g. 8x128".into()),
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.batch, self.seq)
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is needed".to_owned())?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("more than 0 and at most 86400".into())
    }
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    backend: &'static str,
    threads: usize,
    /// Seconds until the model was ready, and of the first call.
    load_s: f64,
    first_vector_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<bench_gpu::GpuReport>,
    shapes: Vec<ShapeReport>,
    text_to_vector: Vec<TextReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mixed: Option<MixedReport>,
}

#[derive(Debug, Serialize)]
struct ShapeReport {
    shape: String,
    calls: usize,
    ids_to_vector_us: Percentiles,
    #[serde(flatten)]
    gpu: Option<bench_gpu::GpuTimes>,
}

#[derive(Debug, Serialize)]
struct TextReport {
    /// Mean number of tokens of the texts, special tokens included.
    tokens: f64,
    calls: usize,
    tokenise_us: Percentiles,
    total_us: Percentiles,
}

#[derive(Debug, Serialize)]
struct MixedReport {
    texts: usize,
    /// Real tokens.
    tokens: u64,
    /// Tokens run, padding included.
    padded_tokens: u64,
    tokenise_s: f64,
    /// From texts to vectors, tokenising included.
    total_s: f64,
    sentences_per_s: f64,
    tokens_per_s: f64,
    /// From token ids to vectors, without tokenising.
    ids_total_s: f64,
    ids_sentences_per_s: f64,
    ids_tokens_per_s: f64,
    /// Tokens of each text.
    lengths: Vec<u32>,
}

/// Microseconds; a percentile is the smallest measured value that at least that share of the calls did not exceed.
#[derive(Debug, Serialize)]
struct Percentiles {
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

impl Percentiles {
    fn of(mut calls: Vec<Duration>) -> Self {
        calls.sort_unstable();
        // The nearest rank, in thousandths: ceil(n p) - 1.
        let at = |thousandths: usize| {
            let rank = (calls.len() * thousandths).div_ceil(1000).max(1) - 1;
            calls.get(rank).map_or(0.0, |call| call.as_nanos() as f64 / 1e3)
        };
        Self { p50: at(500), p90: at(900), p99: at(990), p999: at(999), max: at(1000) }
    }
}

/// Every run of the benchmark sees the same ids, texts and lengths.
const SEED: u64 = 20_250_101;
/// Calls before measuring.
const WARM_UP: usize = 5;
/// Tokens of the texts of the text-to-vector measurement.
const TEXT_TOKENS: [usize; 2] = [16, 128];
/// `[CLS]` and `[SEP]` or their like: a text of n - 2 words has n tokens.
const SPECIAL_TOKENS: usize = 2;

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let embedder = settings::open(&args.model, None)?;
    let load_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    embedder.embed(&["The first call."])?;
    let first_vector_s = start.elapsed().as_secs_f64();
    settings::say_backend(&args.model, &embedder);
    let info = embedder.info();
    let longest = longest(&embedder);
    let shapes = shapes(&args.shape, longest)?;
    let bar = progress::step("measuring");
    let mut seeded = Seeded::new(SEED);

    let mut report = Report {
        model: info.model.clone(),
        backend: info.backend,
        threads: args
            .model
            .executor
            .threads
            .map_or_else(|| std::thread::available_parallelism().map_or(1, NonZeroUsize::get), NonZeroUsize::get),
        load_s,
        first_vector_s,
        gpu: bench_gpu::report(&embedder)?,
        shapes: Vec::new(),
        text_to_vector: Vec::new(),
        mixed: None,
    };
    for shape in shapes {
        bar.set_message(format!("ids to vectors, {shape}"));
        report.shapes.push(ids_to_vector(&embedder, shape, &args, &mut seeded)?);
    }
    let mut lengths: Vec<usize> = TEXT_TOKENS.iter().map(|tokens| *tokens.min(&longest)).collect();
    lengths.dedup();
    for tokens in lengths {
        bar.set_message(format!("text to vector, {tokens} tokens"));
        report.text_to_vector.push(text_to_vector(&embedder, tokens, &args, &mut seeded)?);
    }
    if args.mixed > 0 {
        bar.set_message(format!("throughput, {} texts", args.mixed));
        report.mixed = Some(mixed(&embedder, args.mixed)?);
    }
    bar.finish_and_clear();
    output::print(&if args.json { serde_json::to_string(&report)? + "\n" } else { table(&report) })
}

/// Tokens of the longest text that is measured: an engine may serve shorter ones than the model.
fn longest(embedder: &Embedder) -> usize {
    let info = embedder.info();
    info.max_tokens.min(info.limits.max_seq)
}

/// The shapes asked for, or the default ones cut to the longest text.
fn shapes(asked: &[Shape], max_tokens: usize) -> Result<Vec<Shape>> {
    if let Some(shape) = asked.iter().find(|shape| shape.seq > max_tokens) {
        bail!("--shape {shape}: {} tokens are more than the {max_tokens} that model and engine take", shape.seq);
    }
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let mut shapes: Vec<Shape> =
        [(1, 16), (1, 128), (32, 128)].into_iter().map(|(batch, seq)| Shape { batch, seq: max_tokens.min(seq) }).collect();
    shapes.dedup();
    Ok(shapes)
}

impl Args {
    /// Whether `calls` calls since `start` are enough.
    fn enough(&self, calls: usize, start: Instant) -> bool {
        match self.iterations {
            Some(iterations) => calls >= iterations.get(),
            None => calls > 0 && start.elapsed() >= self.seconds,
        }
    }
}

fn ids_to_vector(embedder: &Embedder, shape: Shape, args: &Args, seeded: &mut Seeded) -> Result<ShapeReport> {
    let config = &embedder.info().config;
    let mut vectors = vec![0.0; shape.batch * embedder.info().dim];
    let mut call = || -> Result<Duration> {
        let rows: Vec<Vec<u32>> =
            (0..shape.batch).map(|_| seeded.ids(shape.seq, config.vocab_size, config.pad_token_id)).collect();
        let start = Instant::now();
        embedder.embed_ids_into(&rows, &mut vectors)?;
        let elapsed = start.elapsed();
        std::hint::black_box(&vectors);
        Ok(elapsed)
    };
    for _ in 0..WARM_UP {
        call()?;
    }
    let mut calls = Vec::new();
    let start = Instant::now();
    while !args.enough(calls.len(), start) {
        calls.push(call()?);
    }
    Ok(ShapeReport {
        shape: shape.to_string(),
        calls: calls.len(),
        ids_to_vector_us: Percentiles::of(calls),
        gpu: bench_gpu::times(embedder, shape.batch, shape.seq)?,
    })
}

fn text_to_vector(embedder: &Embedder, tokens: usize, args: &Args, seeded: &mut Seeded) -> Result<TextReport> {
    let mut counted = 0u64;
    let mut call = || -> Result<(Duration, Duration, u32)> {
        let text = [seeded.text(tokens.saturating_sub(SPECIAL_TOKENS))];
        let start = Instant::now();
        std::hint::black_box(embedder.tokenize(&text)?);
        let tokenised = start.elapsed();
        let start = Instant::now();
        let embeddings = std::hint::black_box(embedder.embed(&text)?);
        Ok((tokenised, start.elapsed(), embeddings.tokens.first().copied().unwrap_or(0)))
    };
    for _ in 0..WARM_UP {
        call()?;
    }
    let (mut tokenise, mut total) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while !args.enough(total.len(), start) {
        let (tokenised, all, tokens) = call()?;
        tokenise.push(tokenised);
        total.push(all);
        counted += u64::from(tokens);
    }
    Ok(TextReport {
        tokens: counted as f64 / total.len() as f64,
        calls: total.len(),
        tokenise_us: Percentiles::of(tokenise),
        total_us: Percentiles::of(total),
    })
}

fn mixed(embedder: &Embedder, texts: usize) -> Result<MixedReport> {
    // A generator of its own: the mix does not depend on what was measured before.
    let mut seeded = Seeded::new(SEED);
    let limit = longest(embedder);
    let texts: Vec<String> = (0..texts)
        .map(|_| {
            let tokens = seeded.length(limit);
            seeded.text(tokens.saturating_sub(SPECIAL_TOKENS))
        })
        .collect();
    embedder.embed(texts.get(..texts.len().min(WARM_UP)).unwrap_or_default())?;

    let tokenized = embedder.tokenize(&texts)?;
    let tokenise_s = median_s(|| embedder.tokenize(&texts))?;
    let total_s = median_s(|| embedder.embed(&texts))?;
    let tokens = tokenized.tokens.iter().map(|tokens| u64::from(*tokens)).sum::<u64>();
    let config = &embedder.info().config;
    let ids = |&tokens: &u32| seeded.ids(tokens as usize, config.vocab_size, config.pad_token_id);
    let rows: Vec<Vec<u32>> = tokenized.tokens.iter().map(ids).collect();
    let ids_total_s = median_s(|| embedder.embed_ids(&rows))?;
    Ok(MixedReport {
        texts: texts.len(),
        tokens,
        padded_tokens: tokenized.batches.iter().map(|batch| (batch.batch() * batch.longest()) as u64).sum(),
        tokenise_s,
        total_s,
        sentences_per_s: texts.len() as f64 / total_s,
        tokens_per_s: tokens as f64 / total_s,
        ids_total_s,
        ids_sentences_per_s: texts.len() as f64 / ids_total_s,
        ids_tokens_per_s: tokens as f64 / ids_total_s,
        lengths: tokenized.tokens,
    })
}

/// Seconds that `work` takes: the median of as many rounds as are begun within a second, at least one and at most five.
fn median_s<T>(work: impl Fn() -> trt_embed::Result<T>) -> Result<f64> {
    const ROUNDS: usize = 5;
    let begin = Instant::now();
    let mut rounds = Vec::with_capacity(ROUNDS);
    while rounds.is_empty() || (rounds.len() < ROUNDS && begin.elapsed() < Duration::from_secs(1)) {
        let start = Instant::now();
        std::hint::black_box(work()?);
        rounds.push(start.elapsed().as_secs_f64());
    }
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[rounds.len() / 2])
}

fn table(report: &Report) -> String {
    let mut out = match &report.gpu {
        None => format!("{}, backend {}, {} threads; microseconds\n\n", report.model, report.backend, report.threads),
        Some(gpu) => format!("{}, backend {} on {}; microseconds\n\n", report.model, report.backend, gpu.name),
    };
    let mut gpu_lines = String::new();
    let mut line = |name: &str, calls: usize, us: &Percentiles| {
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{name:<28} {calls:>8} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1}",
            us.p50, us.p90, us.p99, us.p999, us.max
        );
    };
    for shape in &report.shapes {
        line(&format!("ids to vector {}", shape.shape), shape.calls, &shape.ids_to_vector_us);
        if let Some(gpu) = &shape.gpu {
            gpu_lines.push_str(&gpu.line(&shape.shape, shape.ids_to_vector_us.p50));
        }
    }
    for text in &report.text_to_vector {
        line(&format!("text to vector 1x{:.0}", text.tokens), text.calls, &text.total_us);
        line("  of that tokenising", text.calls, &text.tokenise_us);
    }
    let head = format!("{:<28} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10}\n", "", "calls", "p50", "p90", "p99", "p99.9", "max");
    let at = out.find("\n\n").map_or(0, |at| at + 2);
    out.insert_str(at, &head);
    if !gpu_lines.is_empty() {
        let _ = write!(out, "\n{}{gpu_lines}", bench_gpu::GpuTimes::HEAD);
    }
    if let Some(mixed) = &report.mixed {
        let MixedReport { texts, tokens, padded_tokens, total_s, tokenise_s, ids_total_s, .. } = mixed;
        let _ = write!(
            out,
            "\nmixed lengths: {texts} texts, {tokens} tokens ({padded_tokens} with padding)\n\
             from texts: {total_s:.3} s (tokenising alone {tokenise_s:.3} s), {:.1} sentences/s, {:.0} tokens/s\n\
             from ids:   {ids_total_s:.3} s, {:.1} sentences/s, {:.0} tokens/s\n",
            mixed.sentences_per_s, mixed.tokens_per_s, mixed.ids_sentences_per_s, mixed.ids_tokens_per_s
        );
    }
    let _ = writeln!(out, "\nloaded in {:.3} s, first vector after {:.1} ms more", report.load_s, report.first_vector_s * 1e3);
    if let Some(gpu) = &report.gpu {
        out.push_str(&gpu.lines());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let us = Percentiles::of((1..=1000).rev().map(Duration::from_micros).collect());
        assert_eq!([us.p50, us.p90, us.p99, us.p999, us.max], [500.0, 900.0, 990.0, 999.0, 1000.0]);
        let one = Percentiles::of(vec![Duration::from_nanos(1500)]);
        assert_eq!([one.p50, one.p999, one.max], [1.5, 1.5, 1.5]);
    }

    #[test]
    fn shapes_are_read_and_checked() {
        assert_eq!("8x128".parse(), Ok(Shape { batch: 8, seq: 128 }));
        for bad in ["8", "8x", "x8", "0x8", "8x0", "-1x8", "8x128x2", "99999999x1"] {
            assert!(bad.parse::<Shape>().is_err(), "{bad}");
        }
        let cut = shapes(&[], 24).unwrap();
        assert_eq!(cut.iter().map(ToString::to_string).collect::<Vec<_>>(), ["1x16", "1x24", "32x24"]);
        assert!(shapes(&[Shape { batch: 1, seq: 25 }], 24).is_err());
    }
}
