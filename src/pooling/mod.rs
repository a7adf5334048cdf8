//! Pooling: what sentence-transformers' Pooling module does to hidden states, and the CPU implementation (the kernels' oracle).

mod head;

pub use crate::model::{Pooling, PoolingMode, Scaling};
pub(crate) use head::check_output;
pub use head::{Head, apply_dense, check_finite, cut_and_scale};

use crate::tokens::TokenBatch;
use crate::{Error, Result};

/// How the hidden states of a batch's rows lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenRows {
    /// Side by side, `[tokens, hidden_size]`.
    Packed,
    /// Padded to this many tokens each, `[batch, width, hidden_size]`.
    Padded(usize),
}

/// Pools `hidden`, whose rows lie as `rows` says, into `out` `[batch, pooling.width(hidden_size)]`.
///
/// The tokens of a row are its positions `batch.skip .. length`; values elsewhere are never read. Semantics are those of
/// `Pooling._forward_padded` in sentence-transformers 6.2 for right-padded rows. A row without tokens gives zeros; there
/// sentence-transformers gives zeros too, save that `max` gives -inf and `cls` the state at position 0. A NaN among a row's states
/// comes out as NaN. Sums are kept in f64, so results are exact to the rounding of f32.
///
/// # Errors
/// [`Error::InputLength`] and [`Error::OutputLength`] where the lengths of `hidden` or `out` do not follow from the other arguments.
pub fn pool(
    hidden: &[f32],
    rows: HiddenRows,
    batch: &TokenBatch,
    hidden_size: usize,
    pooling: &Pooling,
    out: &mut [f32],
) -> Result<()> {
    let (count, width) = (batch.batch(), pooling.width(hidden_size));
    let states = match rows {
        HiddenRows::Padded(tokens) => count.saturating_mul(tokens.max(batch.size().longest)),
        HiddenRows::Packed => batch.ids().len(),
    };
    let expected = states.saturating_mul(hidden_size);
    if hidden.len() != expected {
        let shape = match rows {
            HiddenRows::Padded(tokens) => format!("{count} texts x {tokens} tokens x {hidden_size}"),
            HiddenRows::Packed => format!("{states} tokens x {hidden_size}"),
        };
        return Err(Error::InputLength { what: "hidden states", expected, found: hidden.len(), shape });
    }
    check_output(out, count, width)?;
    if hidden.is_empty() || out.is_empty() {
        out.fill(0.0);
        return Ok(());
    }
    let mut sum = vec![0f64; hidden_size];
    for (row, ((&first, length), pooled)) in
        batch.starts().iter().zip(batch.lengths()).zip(out.chunks_exact_mut(width)).enumerate()
    {
        let first = match rows {
            HiddenRows::Padded(tokens) => row * tokens,
            HiddenRows::Packed => first as usize,
        };
        let start = (batch.skip() as usize).min(length as usize);
        let tokens = &hidden[(first + start) * hidden_size..(first + length as usize) * hidden_size];
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
