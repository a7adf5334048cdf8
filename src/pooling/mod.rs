//! Pooling: what sentence-transformers' Pooling module does to hidden states, and the CPU implementation (the kernels' oracle).

mod head;

pub(crate) use head::check_output;
pub use head::{Head, Scaling, apply_dense, check_finite, cut_and_scale};

use crate::tokens::TokenBatch;
use crate::{Error, Result, Setting};
use std::fmt;
use std::str::FromStr;

/// One way to make a vector of a text's hidden states. The order of the variants is the order in which sentence-transformers
/// concatenates the modes that a `pooling_mode_*` flag of 1_Pooling/config.json switches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum PoolingMode {
    /// The first token (the first after the prompt when prompts are left out, as sentence-transformers does).
    Cls,
    /// The largest value of each component.
    Max,
    /// The mean.
    Mean,
    /// The sum over the square root of the number of tokens.
    MeanSqrtLen,
    /// The mean weighted by position (1, 2, 3, …). A prompt that is left out still counts in the positions.
    WeightedMean,
    /// The last token.
    LastToken,
}

impl PoolingMode {
    /// Every mode, in the order of the `pooling_mode_*` flags.
    pub const ALL: [Self; 6] = [Self::Cls, Self::Max, Self::Mean, Self::MeanSqrtLen, Self::WeightedMean, Self::LastToken];

    /// The name on the command line, which [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cls => "cls",
            Self::Max => "max",
            Self::Mean => "mean",
            Self::MeanSqrtLen => "mean_sqrt_len",
            Self::WeightedMean => "weightedmean",
            Self::LastToken => "lasttoken",
        }
    }

    /// The boolean of this mode in 1_Pooling/config.json as sentence-transformers before 6 writes it.
    pub fn config_flag(self) -> &'static str {
        match self {
            Self::Cls => "pooling_mode_cls_token",
            Self::Max => "pooling_mode_max_tokens",
            Self::Mean => "pooling_mode_mean_tokens",
            Self::MeanSqrtLen => "pooling_mode_mean_sqrt_len_tokens",
            Self::WeightedMean => "pooling_mode_weightedmean_tokens",
            Self::LastToken => "pooling_mode_lasttoken",
        }
    }
}

impl fmt::Display for PoolingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for PoolingMode {
    type Err = Error;

    /// Reads [`PoolingMode::name`], or sentence-transformers' longer name `mean_sqrt_len_tokens`.
    fn from_str(name: &str) -> Result<Self> {
        let wanted = if name == "mean_sqrt_len_tokens" { "mean_sqrt_len" } else { name };
        Self::ALL.into_iter().find(|mode| mode.name() == wanted).ok_or_else(|| Error::Setting {
            setting: Setting::Pooling,
            reason: format!("\"{name}\" is not a pooling mode; known: {}", known_modes()),
        })
    }
}

fn known_modes() -> String {
    PoolingMode::ALL.map(PoolingMode::name).join(", ")
}

/// The Pooling module: one or several modes, concatenated.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pooling {
    /// In the order of concatenation; never empty.
    pub modes: Vec<PoolingMode>,
    /// Whether the prompt's tokens count (`include_prompt`, true where absent).
    pub include_prompt: bool,
}

impl Pooling {
    /// Pools by `modes`, concatenated as given, which is how sentence-transformers 6 treats a `pooling_mode` list. Flags of older
    /// configurations have the order of [`PoolingMode::ALL`].
    ///
    /// # Errors
    /// [`Error::Setting`] when there is no mode.
    pub fn new(modes: impl IntoIterator<Item = PoolingMode>, include_prompt: bool) -> Result<Self> {
        let modes: Vec<_> = modes.into_iter().collect();
        if modes.is_empty() {
            let reason = format!("no mode given; choose one or several of {}", known_modes());
            return Err(Error::Setting { setting: Setting::Pooling, reason });
        }
        Ok(Self { modes, include_prompt })
    }

    /// Width of the pooled vector for hidden states of `hidden_size`.
    pub fn width(&self, hidden_size: usize) -> usize {
        self.modes.len().saturating_mul(hidden_size)
    }
}

/// Pools `hidden` `[batch, seq, hidden_size]` into `out` `[batch, pooling.width(hidden_size)]`.
///
/// The tokens of a row are its positions `batch.skip .. length`; values elsewhere are never read. Semantics are those of
/// `Pooling._forward_padded` in sentence-transformers 6.2 for right-padded rows. A row without tokens gives zeros; there
/// sentence-transformers gives zeros too, save that `max` gives -inf and `cls` the state at position 0. A NaN among a row's states
/// comes out as NaN. Sums are kept in f64, so results are exact to the rounding of f32.
///
/// # Errors
/// [`Error::InputLength`] and [`Error::OutputLength`] where the lengths of `hidden` or `out` do not follow from the other arguments.
pub fn pool(hidden: &[f32], batch: &TokenBatch, hidden_size: usize, pooling: &Pooling, out: &mut [f32]) -> Result<()> {
    let (rows, seq, width) = (batch.batch(), batch.seq(), pooling.width(hidden_size));
    let row_len = seq.saturating_mul(hidden_size);
    let expected = rows.saturating_mul(row_len);
    if hidden.len() != expected {
        let shape = format!("{rows} texts x {seq} tokens x {hidden_size}");
        return Err(Error::InputLength { what: "hidden states", expected, found: hidden.len(), shape });
    }
    check_output(out, rows, width)?;
    if hidden.is_empty() || out.is_empty() {
        out.fill(0.0);
        return Ok(());
    }
    let mut sum = vec![0f64; hidden_size];
    for ((states, &length), pooled) in hidden.chunks_exact(row_len).zip(batch.lengths()).zip(out.chunks_exact_mut(width)) {
        let end = length as usize;
        let start = (batch.skip() as usize).min(end);
        let tokens = &states[start * hidden_size..end * hidden_size];
        for (&mode, part) in pooling.modes.iter().zip(pooled.chunks_exact_mut(hidden_size)) {
            if tokens.is_empty() {
                part.fill(0.0);
            } else {
                pool_row(mode, tokens, start, &mut sum, part);
            }
        }
    }
    Ok(())
}

/// Pools `tokens` `[n, hidden]`, n > 0, whose first one stands at position `start`, into `out` `[hidden]`. `sum` is scratch.
fn pool_row(mode: PoolingMode, tokens: &[f32], start: usize, sum: &mut [f64], out: &mut [f32]) {
    let hidden_size = out.len();
    let count = tokens.len() / hidden_size;
    match mode {
        PoolingMode::Cls => out.copy_from_slice(&tokens[..hidden_size]),
        PoolingMode::LastToken => out.copy_from_slice(&tokens[tokens.len() - hidden_size..]),
        PoolingMode::Max => {
            out.copy_from_slice(&tokens[..hidden_size]);
            for state in tokens.chunks_exact(hidden_size).skip(1) {
                for (max, &value) in out.iter_mut().zip(state) {
                    // f32::max would drop a NaN.
                    *max = if value > *max || value.is_nan() { value } else { *max };
                }
            }
        }
        PoolingMode::Mean => weighted_sum(tokens, |_| 1.0, count as f64, sum, out),
        PoolingMode::MeanSqrtLen => weighted_sum(tokens, |_| 1.0, (count as f64).sqrt(), sum, out),
        PoolingMode::WeightedMean => {
            let weight = |token: usize| (start + token + 1) as f64;
            weighted_sum(tokens, weight, (0..count).map(weight).sum(), sum, out);
        }
    }
}

/// `out = sum_i weight(i) * tokens[i] / divisor`.
fn weighted_sum(tokens: &[f32], weight: impl Fn(usize) -> f64, divisor: f64, sum: &mut [f64], out: &mut [f32]) {
    sum.fill(0.0);
    for (token, state) in tokens.chunks_exact(out.len()).enumerate() {
        let weight = weight(token);
        for (sum, &value) in sum.iter_mut().zip(state) {
            *sum += weight * f64::from(value);
        }
    }
    for (out, &sum) in out.iter_mut().zip(sum.iter()) {
        *out = (sum / divisor) as f32;
    }
}
