//! The least that a GPU must move and compute for each step, by its shape alone, and what that takes at full speed: the floors that `profile` holds
//! measured times against.
//!
//! Counted is what a step reads and writes once each: weights, activations as they are stored, statistics, tables. What is in the level 2 cache already is
//! counted all the same, so that a step may be faster than its floor where its activations are small. Of operations those of products count (a
//! multiplication and an addition are two); the others are free beside the bytes that they come with.

use super::program::{LinearId, Residual, Step};
use super::shape::{CHUNK, Precision, Shape};
use crate::cuda::Properties;
use crate::gpu::{LayerWork, Peaks};
use crate::tokens::BatchSize;

/// How the statistics of a norm are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Statistics {
    /// By the linear that needs them, of the stream or of the sums that the linear in front left: there is nothing to do.
    Inline,
    /// From the sums that the linear in front left.
    Joined,
    /// From the stream.
    Read,
}

/// What the work of a step depends on besides the architecture's sizes.
#[derive(Debug, Clone)]
pub(super) struct Load<'a> {
    /// Tokens of each row.
    pub rows: Vec<usize>,
    /// Tokens that linears run, padding included.
    pub tokens: usize,
    /// Of each layer, the places that a token sees to each side; -1 for all.
    pub windows: &'a [i32],
    /// Whether scores have a bias by distance.
    pub biased: bool,
    /// Of each step of the program, how its statistics are taken; of no meaning but for those that measure.
    pub statistics: &'a [Statistics],
}

/// The tokens of each row of a batch of this size: rows are full as far as its tokens reach, as those that are measured.
pub(super) fn full_rows(size: BatchSize) -> Vec<usize> {
    let mut left = size.tokens;
    let row = |_| {
        let tokens = left.min(size.longest);
        left -= tokens;
        tokens
    };
    (0..size.rows).map(row).filter(|&tokens| tokens > 0).collect()
}

/// Pairs of tokens of which one sees the other, in a row of `tokens`; `window` places to each side, -1 for all.
fn pairs(tokens: usize, window: i32) -> usize {
    match usize::try_from(window) {
        Err(_) => tokens * tokens,
        Ok(window) => (0..tokens).map(|token| token.min(window) + (tokens - 1 - token).min(window) + 1).sum(),
    }
}

/// The work of one step; `taken` says how its statistics are, if it measures.
pub(super) fn work(step: &Step, taken: Statistics, shape: &Shape, load: &Load<'_>) -> LayerWork {
    let Shape { hidden, wide, heads, .. } = *shape;
    let value = shape.precision.bytes();
    let tokens = load.tokens;
    let matrix = |columns: usize| tokens * columns * value;
    // Mean and deviation of each token, two f32.
    let statistics = tokens * 8;
    // Weight and bias of a norm, f32.
    let norm = 2 * hidden * 4;
    let moved = |bytes: usize| LayerWork { bytes: bytes as u64, flops: 0 };
    match *step {
        // Ids, a row of the table and one of the positions a token; the stream and its statistics.
        Step::Embed { .. } => moved(tokens * 4 + matrix(hidden) + tokens * hidden * 4 + matrix(hidden) + statistics),
        Step::Normalise { .. } => moved(2 * matrix(hidden) + statistics + norm),
        Step::Measure { .. } => match taken {
            Statistics::Inline => LayerWork::default(),
            // Two f32 a chunk and token.
            Statistics::Joined => moved(tokens * hidden.div_ceil(CHUNK) * 8 + statistics),
            Statistics::Read => moved(matrix(hidden) + statistics),
        },
        Step::Linear { linear, norm: folded, residual, .. } => {
            let (outputs, inputs) = match linear {
                LinearId::Qkv => (shape.qkv(), hidden),
                LinearId::Output => (hidden, hidden),
                LinearId::Expansion => (shape.expanded(), hidden),
                LinearId::Contraction => (hidden, wide),
            };
            // The weight's row sums, and the statistics of what is read.
            let of_norm = if folded.is_some() { outputs * 4 + statistics } else { 0 };
            let of_residual = match residual {
                None => 0,
                Some(Residual::Raw) => matrix(hidden),
                Some(Residual::Through(_)) => matrix(hidden) + statistics + norm,
            };
            let weights = outputs * inputs * value + outputs * 4;
            let bytes = weights + matrix(inputs) + matrix(outputs) + of_norm + of_residual;
            LayerWork { bytes: bytes as u64, flops: 2 * (tokens * outputs * inputs) as u64 }
        }
        // Queries and keys, read and written; the table of turns lies in the level 2 cache.
        Step::QueriesKeys { .. } => moved(4 * matrix(hidden)),
        // What attention gave and the stream, which is written, each with a norm.
        Step::AddAttended { .. } => moved(3 * matrix(hidden) + 2 * statistics + 2 * norm),
        Step::Gate { .. } => moved(matrix(shape.expanded()) + matrix(wide)),
        Step::Attention { layer } => {
            let window = load.windows.get(layer).copied().unwrap_or(-1);
            let seen: usize = load.rows.iter().map(|&row| pairs(row, window)).sum();
            let longest = load.rows.iter().copied().max().unwrap_or(0);
            let bias = if load.biased { heads * (2 * longest).saturating_sub(1) * 4 } else { 0 };
            // A product of queries and keys, and one of weights and values.
            LayerWork { bytes: (matrix(shape.qkv()) + matrix(hidden) + bias) as u64, flops: 4 * (seen * hidden) as u64 }
        }
        Step::Give { norm: through } => {
            let of_norm = if through.is_some() { statistics + norm } else { 0 };
            moved(matrix(hidden) + of_norm + tokens * hidden * 4)
        }
    }
}

/// The work of what ran under these names, in order: the steps of `program` as [`layer_name`] has them, the engine's kernels, or those of a latency class.
/// `None` for a name that is none of the program's steps; for all linears where they are not as many as the program's, and so for attention.
pub(super) fn works(program: &[Step], shape: &Shape, load: &Load<'_>, names: &[&str]) -> Vec<Option<LayerWork>> {
    if names.len() == program.len() && names.iter().zip(program).all(|(name, step)| *name == layer_name(step)) {
        let taken = load.statistics.iter().copied().chain(std::iter::repeat(Statistics::Read));
        return program.iter().zip(taken).map(|(step, taken)| Some(work(step, taken, shape, load))).collect();
    }
    let kinds: Vec<Kind> = names.iter().map(|name| Kind::of(name)).collect();
    let of = |wanted: fn(&Step) -> bool| -> Vec<&Step> { program.iter().filter(|step| wanted(step)).collect() };
    let linears = of(|step| matches!(step, Step::Linear { .. }));
    let attentions = of(|step| matches!(step, Step::Attention { .. }));
    // The smallest latency class has the linear behind attention in attention's kernel.
    let count = |kind: Kind| kinds.iter().filter(|of| **of == kind).count();
    let attends = count(Kind::Attention) == attentions.len();
    let fused = attends && count(Kind::Linear) + attentions.len() == linears.len();
    let multiplies = count(Kind::Linear) == linears.len() || fused;
    let (mut next_linear, mut next_attention) = (linears.into_iter(), attentions.into_iter());
    let mut take = |kind: Kind| -> Option<LayerWork> {
        match kind {
            Kind::Linear if multiplies => Some(work(next_linear.next()?, Statistics::Inline, shape, load)),
            Kind::Attention if attends => {
                let attention = work(next_attention.next()?, Statistics::Inline, shape, load);
                if !fused {
                    return Some(attention);
                }
                let output = work(next_linear.next()?, Statistics::Inline, shape, load);
                // What lies between them stays on the multiprocessors.
                let between = 2 * (load.tokens * shape.hidden * shape.precision.bytes()) as u64;
                Some(LayerWork { bytes: attention.bytes + output.bytes - between, flops: attention.flops + output.flops })
            }
            Kind::Single(wanted) => {
                program.iter().find(|step| wanted.is(step)).map(|step| work(step, Statistics::Inline, shape, load))
            }
            Kind::Measure(statistics) => {
                let measure = program.iter().find(|step| matches!(step, Step::Measure { .. }))?;
                Some(work(measure, statistics, shape, load))
            }
            Kind::Linear | Kind::Attention | Kind::Other => None,
        }
    };
    kinds.into_iter().map(&mut take).collect()
}

/// How a step is called where steps are timed one by one.
pub(super) fn layer_name(step: &Step) -> String {
    format!("{step:?}")
}

/// What a kernel does, by its name in `kernels/`, or by the name that a latency class gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Linear,
    Attention,
    Single(Single),
    Measure(Statistics),
    Other,
}

/// Steps that are the same wherever they stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Single {
    Embed,
    Normalise,
    QueriesKeys,
    AddAttended,
    Gate,
    Give,
}

impl Single {
    fn is(self, step: &Step) -> bool {
        match self {
            Self::Embed => matches!(step, Step::Embed { .. }),
            Self::Normalise => matches!(step, Step::Normalise { .. }),
            Self::QueriesKeys => matches!(step, Step::QueriesKeys { .. }),
            Self::AddAttended => matches!(step, Step::AddAttended { .. }),
            Self::Gate => matches!(step, Step::Gate { .. }),
            Self::Give => matches!(step, Step::Give { .. }),
        }
    }
}

impl Kind {
    fn of(name: &str) -> Self {
        // `layer 3: Wide`, `latency16_wide`.
        let of_class = name.strip_prefix("layer ").and_then(|rest| Some(rest.split_once(": ")?.1));
        let of_class = of_class.or_else(|| name.strip_prefix("latency").and_then(|rest| Some(rest.split_once('_')?.1)));
        match of_class.map(str::to_ascii_lowercase).as_deref() {
            Some("qkv" | "output" | "wide" | "narrow") => return Self::Linear,
            Some("attention") => return Self::Attention,
            Some("embed") => return Self::Single(Single::Embed),
            Some("hidden") => return Self::Single(Single::Give),
            _ => {}
        }
        match name {
            "attention" | "attention_window" | "attention_exact" => Self::Attention,
            "embed" | "embed_exact" => Self::Single(Single::Embed),
            "queries_keys" | "queries_keys_exact" => Self::Single(Single::QueriesKeys),
            "add_normed" | "add_normed_exact" => Self::Single(Single::AddAttended),
            "gate" | "gate_exact" => Self::Single(Single::Gate),
            "normalise" | "normalise_exact" => Self::Single(Single::Normalise),
            "hidden_states" | "hidden_states_exact" | "hidden states" => Self::Single(Single::Give),
            "statistics" | "statistics_exact" => Self::Measure(Statistics::Read),
            "join_statistics" => Self::Measure(Statistics::Joined),
            _ if name.starts_with("linear_") => Self::Linear,
            _ => Self::Other,
        }
    }
}

/// The fastest that such a GPU reads and writes its memory, and multiplies in this precision, as far as both are known.
pub(super) fn peaks(about: &Properties, precision: Precision) -> Peaks {
    // Memories of all kinds that GPUs have give two values a clock and line.
    let bandwidth = 2.0 * f64::from(about.memory_clock_khz) * 1e3 * f64::from(about.memory_bus_bits) / 8.0;
    let a_clock = operations_a_clock(about.compute_capability, precision).unwrap_or(0);
    let flops = f64::from(a_clock) * f64::from(about.multiprocessors) * f64::from(about.clock_khz) * 1e3;
    let known = |value: f64| (value > 0.0).then_some(value);
    Peaks { bytes_a_second: known(bandwidth), flops: known(flops) }
}

/// Multiplications and additions of one multiprocessor in one clock, dense, summed in f32: NVIDIA's architecture whitepapers (A100, GA102, Ada, H100,
/// Blackwell), whose figures for a whole GPU are these times multiprocessors and boost clock. GeForce cards sum 16-bit products in f32 at half of that.
fn operations_a_clock(compute_capability: (u32, u32), precision: Precision) -> Option<u32> {
    let tensor = match compute_capability {
        (8, 0) => 2048,
        (8, 6 | 9) | (12, 0) => 1024,
        (9, 0) => 4096,
        (10, 0) => 8192,
        _ => return None,
    };
    // Two for each lane of 32 bits, of which the A100 has 64 and the later ones 128.
    let plain = if compute_capability == (8, 0) { 128 } else { 256 };
    Some(if precision == Precision::Fp32 { plain } else { tensor })
}

#[cfg(test)]
#[path = "floor_tests.rs"]
mod tests;
