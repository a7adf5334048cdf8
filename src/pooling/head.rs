//! All that follows the encoder: pooling, Dense modules, the cut to fewer components, and normalisation.

use super::{HiddenRows, pool};
#[cfg(any(feature = "cpu", feature = "tensorrt"))]
use crate::model::ModelFolder;
use crate::model::{Dense, DenseActivation, Pooling, Residual, Scaling};
use crate::tokens::TokenBatch;
use crate::{Error, Result, Setting};
use std::cell::Cell;

/// Partial sums of a dot product: enough to fill the vector units, and they keep rounding errors small.
const LANES: usize = 16;

/// Smallest norm that a vector is divided by: `eps` of `torch.nn.functional.normalize`.
const MIN_NORM: f64 = 1e-12;

/// From hidden states to vectors: pooling, Dense modules, the first `dim` components, unit length.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Head {
    /// The Pooling module.
    pub pooling: Pooling,
    /// Dense modules, applied in order to the pooled vector.
    pub dense: Vec<Dense>,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Values of one vector, after the cut.
    pub dim: usize,
    /// Whether and when vectors are scaled to unit length.
    pub scaling: Scaling,
}

impl Head {
    /// `model`'s own, as its folder has it: no override of pooling, no other cut.
    ///
    /// # Errors
    /// As [`Head::new`].
    #[cfg(any(feature = "cpu", feature = "tensorrt"))]
    pub(crate) fn of_model(model: &ModelFolder) -> Result<Self> {
        Self::new(
            model.pooling.clone(),
            model.dense.clone(),
            model.config.hidden_size,
            model.cut(model.embedding_size()),
            model.scaling(),
        )
    }

    /// Checks that the modules fit together. Without `dim` vectors keep the model's own width.
    ///
    /// # Errors
    /// [`Error::Setting`] when `dim` is 0 or above the model's width, or when a Dense module's sizes do not fit.
    pub fn new(pooling: Pooling, dense: Vec<Dense>, hidden_size: usize, dim: Option<usize>, scaling: Scaling) -> Result<Self> {
        let width = dense.last().map_or(pooling.width(hidden_size), |dense| dense.out_features);
        let head = Self { pooling, dense, hidden_size, dim: dim.unwrap_or(width), scaling };
        head.check()?;
        Ok(head)
    }

    /// Whether the parts fit together, which are anybody's to set.
    fn check(&self) -> Result<()> {
        let mut width = self.pooled_width();
        for (place, layer) in self.dense.iter().enumerate() {
            if layer.in_features != width || !is_whole(layer) {
                let (inputs, outputs, weights) = (layer.in_features, layer.out_features, layer.weight.len());
                let reason = format!(
                    "module {place} maps {inputs} to {outputs} values with {weights} weights; it is given vectors of {width} values"
                );
                return Err(Error::Setting { setting: Setting::Dense, reason });
            }
            width = layer.out_features;
        }
        if !(1..=width).contains(&self.dim) {
            let reason = format!("{} is outside 1 to {width}, the values of this model's vectors", self.dim);
            return Err(Error::Setting { setting: Setting::Dim, reason });
        }
        Ok(())
    }

    /// Values of a vector before the cut: those of the last Dense module, or of the pooled vector.
    pub fn width(&self) -> usize {
        self.dense.last().map_or(self.pooled_width(), |dense| dense.out_features)
    }

    /// Values of a pooled vector.
    pub fn pooled_width(&self) -> usize {
        self.pooling.width(self.hidden_size)
    }

    /// Whether more follows the pooled vector than one pass of cutting and scaling can do.
    #[cfg(feature = "cuda")]
    pub(crate) fn has_more_steps(&self) -> bool {
        !self.dense.is_empty() || (self.scaling == Scaling::BeforeCut && self.dim < self.pooled_width())
    }

    /// Turns `hidden`, whose rows lie as `rows` says, into vectors `out` `[batch, dim]`, in the batch's row order.
    ///
    /// # Errors
    /// [`Error::InputLength`] and [`Error::OutputLength`] where the lengths of `hidden` or `out` do not follow from `batch`;
    /// [`Error::Setting`] for a head whose parts do not fit together.
    pub fn apply(&self, hidden: &[f32], rows: HiddenRows, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.apply_to(batch.batch(), out, |pooled| pool(hidden, rows, batch, self.hidden_size, &self.pooling, pooled))
    }

    /// The steps after pooling, of the vectors `[rows, pooled_width]` that `pool` writes, to `out` `[rows, dim]`. What lies between is
    /// kept for this thread's next call, which then allocates nothing. Where `pool` fails, `out` is left as it was.
    ///
    /// # Errors
    /// What `pool` returns; [`Error::OutputLength`] where `out` does not have `rows` vectors; [`Error::Setting`] for a head whose parts do
    /// not fit together.
    pub fn apply_to(&self, rows: usize, out: &mut [f32], pool: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
        self.check()?;
        check_output(out, rows, self.dim)?;
        thread_local! {
            static KEPT: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
        }
        // Taken, not borrowed: `pool` may run other work on this thread.
        let [mut vectors, mut next] = KEPT.take();
        vectors.resize(rows * self.pooled_width(), 0.0);
        let done = pool(&mut vectors).and_then(|()| {
            for dense in &self.dense {
                next.resize(rows * dense.out_features, 0.0);
                apply_dense(dense, &vectors, &mut next)?;
                std::mem::swap(&mut vectors, &mut next);
            }
            cut_and_scale(&vectors, self.width(), self.dim, self.scaling, out)
        });
        KEPT.set([vectors, next]);
        done
    }
}

/// Whether a module's weights and bias are as many as its sizes say.
fn is_whole(dense: &Dense) -> bool {
    let (inputs, outputs) = (dense.in_features, dense.out_features);
    inputs > 0
        && outputs > 0
        && inputs.checked_mul(outputs) == Some(dense.weight.len())
        && dense.bias.as_ref().is_none_or(|bias| bias.len() == outputs)
        && match &dense.residual {
            Residual::None => true,
            Residual::Input => inputs == outputs,
            Residual::Projected(matrix) => matrix.len() == dense.weight.len(),
        }
}

/// Applies a Dense module: `out` `[rows, out_features] = activation(input W^T + b)` for `input` `[rows, in_features]`.
///
/// # Errors
/// [`Error::Setting`] for a module whose weights or bias are not as many as its sizes say; [`Error::InputLength`] and
/// [`Error::OutputLength`] where the two lengths do not belong to the same number of rows.
pub fn apply_dense(dense: &Dense, input: &[f32], out: &mut [f32]) -> Result<()> {
    let (inputs, outputs) = (dense.in_features, dense.out_features);
    if !is_whole(dense) {
        let reason = format!("a module that maps {inputs} to {outputs} values has {} weights", dense.weight.len());
        return Err(Error::Setting { setting: Setting::Dense, reason });
    }
    check_output(out, rows_of("the input of a Dense module", input, inputs)?, outputs)?;
    // A row of weights is read from memory once and serves every text.
    for (o, weights) in dense.weight.chunks_exact(inputs).enumerate() {
        let bias = dense.bias.as_ref().map_or(0.0, |bias| bias[o]);
        for (row, values) in input.chunks_exact(inputs).enumerate() {
            let result = activate(dense.activation, dot(weights, values) + bias);
            out[row * outputs + o] = match &dense.residual {
                Residual::None => result,
                Residual::Input => result + values[o],
                Residual::Projected(matrix) => result + dot(&matrix[o * inputs..][..inputs], values),
            };
        }
    }
    Ok(())
}

/// How many rows of `width` values `values` are.
fn rows_of(what: &'static str, values: &[f32], width: usize) -> Result<usize> {
    let (found, rows) = (values.len(), values.len().div_ceil(width.max(1)));
    match values.len().checked_rem(width) {
        Some(0) => Ok(rows),
        _ => Err(Error::InputLength { what, expected: rows * width, found, shape: format!("{rows} texts x {width}") }),
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks_a, chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        for ((lane, x), y) in lanes.iter_mut().zip(a).zip(b) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

fn activate(activation: DenseActivation, x: f32) -> f32 {
    match activation {
        DenseActivation::Identity => x,
        DenseActivation::Tanh => x.tanh(),
        // f32::max would turn a NaN into 0.
        DenseActivation::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        DenseActivation::Gelu => {
            let x = f64::from(x);
            (x / 2.0 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
        }
        DenseActivation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        DenseActivation::Silu => x / (1.0 + (-x).exp()),
        DenseActivation::LeakyRelu => {
            if x > 0.0 {
                x
            } else {
                0.01 * x
            }
        }
        DenseActivation::Elu => {
            if x > 0.0 {
                x
            } else {
                x.exp_m1()
            }
        }
        DenseActivation::Mish => x * softplus(x).tanh(),
        DenseActivation::Softplus => softplus(x),
    }
}

/// ln(1 + exp(x)); torch takes x itself above 20.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Keeps the first `dim` of `width` values of each row, scaled to unit length as `scaling` says: `out` `[rows, dim]`.
///
/// As `torch.nn.functional.normalize`, no norm below 1e-12 is divided by: a vector of zeros stays one.
///
/// # Errors
/// [`Error::Setting`] unless `dim` is within 1 to `width`; [`Error::InputLength`] and [`Error::OutputLength`] where the lengths do not
/// belong to the same number of rows.
pub fn cut_and_scale(values: &[f32], width: usize, dim: usize, scaling: Scaling, out: &mut [f32]) -> Result<()> {
    if !(1..=width).contains(&dim) {
        return Err(Error::Setting {
            setting: Setting::Dim,
            reason: format!("{dim} is outside 1 to {width}, the values of a vector"),
        });
    }
    check_output(out, rows_of("vectors", values, width)?, dim)?;
    for (values, out) in values.chunks_exact(width).zip(out.chunks_exact_mut(dim)) {
        let measured = match scaling {
            Scaling::None => {
                out.copy_from_slice(&values[..dim]);
                continue;
            }
            Scaling::BeforeCut => values,
            Scaling::AfterCut => &values[..dim],
        };
        let norm = measured.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
        // Written so that a NaN stays one (f64::max would drop it).
        let norm = if norm < MIN_NORM { MIN_NORM } else { norm };
        for (out, &value) in out.iter_mut().zip(values) {
            *out = (f64::from(value) / norm) as f32;
        }
    }
    Ok(())
}

/// Checks that `out` has room for the vectors of `texts` texts, and for no more.
///
/// # Errors
/// [`Error::OutputLength`].
pub(crate) fn check_output(out: &[f32], texts: usize, dim: usize) -> Result<()> {
    let (expected, found) = (texts.saturating_mul(dim), out.len());
    if found == expected { Ok(()) } else { Err(Error::OutputLength { expected, found, texts, dim }) }
}

/// Checks that the vectors `values` `[rows, dim]` are finite; `texts` `[rows]` gives each one's place in the caller's order
/// ([`TokenBatch::rows`]).
///
/// # Errors
/// [`Error::NotFinite`] with the text of the first row that is not, and the component.
pub fn check_finite(values: &[f32], dim: usize, texts: &[usize]) -> Result<()> {
    // No early exit, so that the usual case is one pass of vector instructions.
    if values.iter().fold(true, |finite, value| finite & value.is_finite()) {
        return Ok(());
    }
    for (row, vector) in values.chunks(dim.max(1)).enumerate() {
        if let Some(component) = vector.iter().position(|value| !value.is_finite()) {
            let text = texts.get(row).copied().unwrap_or(row);
            return Err(Error::NotFinite { text, component, value: vector[component] });
        }
    }
    Ok(())
}
