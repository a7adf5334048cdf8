//! Attention as one operator, by blocks of query rows: memory grows with a text's length, not with its square, and keys that no query of a block
//! sees are left out. A row's result is what the whole would give: each block runs `tract`'s own products and softmax.

use super::ops::{Broadcast, gives_its_first_input};
use std::ops::Range;
use std::sync::Arc;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::{DatumType, IntoRunnable, TypedModel, TypedRunnableModel};
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::nn::{Softmax, SoftmaxKind};
use tract_onnx::tract_hir::internal::{Expansion, InferenceOp, InferenceResult, Solver, TensorProxy, expand};

/// Bytes of a block's scores: a batch of short texts is one block, and a text of 8192 tokens has some 85 rows in each (of 12 heads).
const SCORE_BYTES: usize = 32 << 20;
/// Rows of a block at least, however many keys they see.
const LEAST_ROWS: usize = 16;
/// Rows of a block at least where a window bounds the keys: fewer would have more keys beside them than they see.
const LEAST_WINDOWED_ROWS: usize = 64;
/// Added to the scores of keys outside the window, as the exported graph has it.
const MASKED: f32 = -1e4;

/// The operator of [`Graph::with_one_attention`](crate::graph::Graph).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Attention {
    heads: usize,
    head_size: usize,
    /// How far a key that counts is away.
    window: Option<usize>,
    /// Whether scores fall with the distance.
    has_slopes: bool,
    block: Block,
}

/// `softmax(queries keys^T + bias) values`, of some rows and some keys.
#[derive(Clone)]
struct Block(Arc<TypedRunnableModel>);

/// Reads the operator.
pub(super) fn attention(_context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let size = |name: &str| -> TractResult<usize> { Ok(usize::try_from(node.get_attr::<i64>(name)?)?) };
    let (heads, head_size) = (size("heads")?, size("head_size")?);
    let window = usize::try_from(node.get_attr::<i64>("window")?).ok();
    ensure!(matches!(node.input.len(), 4 | 5), "Attention has four inputs, or five with slopes");
    let has_slopes = node.input.len() == 5;
    let block = Block::new(heads, head_size, has_slopes, window.is_some() || has_slopes)?;
    Ok((expand(Attention { heads, head_size, window, has_slopes, block }), vec![]))
}

impl Block {
    /// `of_heads`: the bias has a part for each head; `of_rows`: for each row.
    fn new(heads: usize, head_size: usize, of_heads: bool, of_rows: bool) -> TractResult<Self> {
        let mut model = TypedModel::default();
        let [batch, rows, keys] = ["batch", "rows", "keys"].map(|name| model.sym(name).to_dim());
        let (heads, size, one) = (heads.to_dim(), head_size.to_dim(), 1.to_dim());
        let mut source = |name: &str, shape: [&TDim; 4]| model.add_source(name, DatumType::F32.fact(shape.map(Clone::clone)));
        let queries = source("queries", [&batch, &heads, &rows, &size])?;
        let of_keys = source("keys", [&batch, &heads, &keys, &size])?;
        let values = source("values", [&batch, &heads, &keys, &size])?;
        let bias_heads = if of_heads { &heads } else { &one };
        let bias = source("bias", [&batch, bias_heads, if of_rows { &rows } else { &one }, &keys])?;
        let scores = EinSum::new("bnrd,bnkd->bnrk".parse()?, DatumType::F32);
        let scores = model.wire_node("scores", scores, &[queries, of_keys])?;
        let scores = model.wire_node("biased", Broadcast::Add, &[scores[0], bias])?;
        let softmax = Softmax::new(tvec![3], None, SoftmaxKind::Softmax);
        let weights = model.wire_node("weights", softmax, &scores)?;
        let context = EinSum::new("bnrk,bnkd->bnrd".parse()?, DatumType::F32);
        let context = model.wire_node("context", context, &[weights[0], values])?;
        model.select_output_outlets(&context)?;
        Ok(Self(model.into_optimized()?.into_runnable()?))
    }
}

// Of operators with the same sizes and kinds of bias they are the same, and those are compared beside it.
impl PartialEq for Block {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Block {}

impl std::hash::Hash for Block {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Block")
    }
}

impl Expansion for Attention {
    fn name(&self) -> StaticName {
        "Attention".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        gives_its_first_input(solver, inputs, outputs, if self.has_slopes { 5 } else { 4 })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Attention {
    fn name(&self) -> StaticName {
        "Attention".into()
    }

    op_as_typed_op!();
}

impl TypedOp for Attention {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![inputs[0].datum_type.fact(inputs[0].shape.clone())])
    }

    as_op!();
}

impl EvalOp for Attention {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (queries, keys, values) = (&inputs[0], &inputs[1], &inputs[2]);
        let [batch, heads, sequence, _] = queries.shape() else { bail!("queries of shape {:?}", queries.shape()) };
        let (batch, heads, sequence) = (*batch, *heads, *sequence);
        let mask = inputs[3].try_as_plain_ram()?;
        let slopes = inputs.get(4).map(|slopes| slopes.try_as_plain_ram()).transpose()?;
        let bias = Bias {
            mask: mask.as_slice::<f32>()?,
            slopes: slopes.as_ref().map(|slopes| slopes.as_slice::<f32>()).transpose()?,
            window: self.window,
        };
        ensure!(bias.mask.len() == batch * sequence && bias.slopes.is_none_or(|slopes| slopes.len() == heads));
        let most = block_rows(batch * heads, sequence, self.window);
        let mut context = None;
        for first in (0..sequence).step_by(most.max(1)) {
            let rows = first..(first + most).min(sequence);
            let seen = seen_keys(&rows, sequence, self.window);
            let part = |of: &TValue, range: &Range<usize>| -> TractResult<TValue> {
                if range.len() == sequence { Ok(of.clone()) } else { Ok(of.slice(2, range.start, range.end)?.into_tvalue()) }
            };
            let shape = [batch, bias.slopes.map_or(1, <[f32]>::len), bias.rows(&rows), seen.len()];
            let of_block = Tensor::from_shape(&shape, &bias.of_block(batch, sequence, &rows, &seen))?;
            let inputs = tvec![part(queries, &rows)?, part(keys, &seen)?, part(values, &seen)?, of_block.into_tvalue()];
            let found = self.block.0.run(inputs)?;
            if rows.len() == sequence {
                return Ok(found);
            }
            let context = match &mut context {
                Some(context) => context,
                None => context.insert(Tensor::zero::<f32>(queries.shape())?),
            };
            context.assign_slice(rows, &found[0], .., 2)?;
        }
        let context = context.map_or_else(|| Tensor::zero::<f32>(queries.shape()), Ok)?;
        Ok(tvec![context.into_tvalue()])
    }
}

/// Rows of a block, of so many heads of all texts.
fn block_rows(heads: usize, sequence: usize, window: Option<usize>) -> usize {
    let most = SCORE_BYTES / (4 * heads * sequence).max(1);
    match window {
        Some(window) => most.clamp(LEAST_ROWS, (2 * window).max(LEAST_WINDOWED_ROWS)),
        None => most.max(LEAST_ROWS),
    }
}

/// The keys that queries of these rows see.
fn seen_keys(rows: &Range<usize>, sequence: usize, window: Option<usize>) -> Range<usize> {
    match window {
        Some(window) => rows.start.saturating_sub(window)..rows.end.saturating_add(window).min(sequence),
        None => 0..sequence,
    }
}

/// What is added to scores.
struct Bias<'a> {
    /// Of each key, `[batch, sequence]`.
    mask: &'a [f32],
    slopes: Option<&'a [f32]>,
    window: Option<usize>,
}

impl Bias<'_> {
    /// As many rows as it has for `rows`: one where all are the same.
    fn rows(&self, rows: &Range<usize>) -> usize {
        if self.window.is_none() && self.slopes.is_none() { 1 } else { rows.len() }
    }

    /// `[batch, heads or 1, rows or 1, keys]`.
    fn of_block(&self, batch: usize, sequence: usize, rows: &Range<usize>, keys: &Range<usize>) -> Vec<f32> {
        let slopes = self.slopes.unwrap_or(&[0.0]);
        let rows = rows.start..rows.start + self.rows(rows);
        let mut values = Vec::with_capacity(batch * slopes.len() * rows.len() * keys.len());
        for mask in self.mask.chunks_exact(sequence.max(1)).take(batch) {
            for slope in slopes {
                for row in rows.clone() {
                    values.extend(keys.clone().map(|key| {
                        let distance = row.abs_diff(key);
                        let outside = self.window.is_some_and(|window| distance > window);
                        mask[key] - slope * distance as f32 + if outside { MASKED } else { 0.0 }
                    }));
                }
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In f64.
    fn oracle(op: &Attention, shape: [usize; 3], values: [&[f32]; 3], mask: &[f32], slopes: &[f32]) -> Vec<f64> {
        let ([batch, heads, sequence], size) = (shape, op.head_size);
        let [queries, keys, of_keys] = values;
        let mut context = vec![0.0; batch * heads * sequence * size];
        for (row, out) in context.chunks_exact_mut(size).enumerate() {
            let (head, place) = (row / sequence, row % sequence);
            let score = |key: usize| {
                let (query, of_key) = (&queries[row * size..][..size], &keys[(head * sequence + key) * size..][..size]);
                let product: f64 = query.iter().zip(of_key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let distance = place.abs_diff(key);
                let outside = op.window.is_some_and(|window| distance > window);
                let slope = if op.has_slopes { f64::from(slopes[head % heads]) * distance as f64 } else { 0.0 };
                product + f64::from(mask[head / heads * sequence + key]) - slope + if outside { -1e4 } else { 0.0 }
            };
            let scores: Vec<f64> = (0..sequence).map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (key, weight) in weights.iter().enumerate() {
                for (out, value) in out.iter_mut().zip(&of_keys[(head * sequence + key) * size..][..size]) {
                    *out += weight / total * f64::from(*value);
                }
            }
        }
        context
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn blocks_give_what_the_whole_gives(
            batch in 1usize..3, heads in 1usize..4, sequence in 1usize..200, window in prop::option::of(0usize..70), has_slopes: bool, seed: u64,
        ) {
            let (size, mut state) = (8, seed | 1);
            let mut values = |count: usize| -> Vec<f32> {
                let mut next = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 40) as f32 / (1 << 23) as f32 - 1.0
                };
                (0..count).map(|_| next()).collect()
            };
            let count = batch * heads * sequence * size;
            let (queries, keys, of_keys, slopes) = (values(count), values(count), values(count), values(heads));
            // The last text is shorter.
            let real = sequence.div_ceil(2);
            let mask: Vec<f32> = (0..batch * sequence).map(|i| if i / sequence > 0 && i % sequence >= real { MASKED } else { 0.0 }).collect();
            let block = Block::new(heads, size, has_slopes, window.is_some() || has_slopes).unwrap();
            let op = Attention { heads, head_size: size, window, has_slopes, block };
            let shape = [batch, heads, sequence, size];
            let tensor = |shape: &[usize], values: &[f32]| Tensor::from_shape(shape, values).unwrap().into_tvalue();
            let mut inputs = tvec![tensor(&shape, &queries), tensor(&shape, &keys), tensor(&shape, &of_keys), tensor(&[batch, 1, 1, sequence], &mask)];
            if has_slopes {
                inputs.push(tensor(&[heads], &slopes));
            }
            let found = op.eval(&EvalContext::out_of_plan(), inputs).unwrap();
            let expected = oracle(&op, [batch, heads, sequence], [&queries, &keys, &of_keys], &mask, &slopes);
            for (row, (found, expected)) in found[0].try_as_plain_ram().unwrap().as_slice::<f32>().unwrap().iter().zip(&expected).enumerate() {
                // Padding's own rows may see no key that counts: nobody reads them.
                let place = row / size % sequence;
                let is_real = row / size / sequence / heads == 0 || place < real;
                prop_assert!(!is_real || (f64::from(*found) - expected).abs() < 1e-5, "{}: {} {}", row, found, expected);
            }
        }

        #[test]
        fn blocks_cover_all_rows_and_what_they_see(heads in 1usize..400, sequence in 1usize..9000, window in prop::option::of(0usize..5000)) {
            let most = block_rows(heads, sequence, window);
            prop_assert!(most >= LEAST_ROWS);
            let rows = most.min(sequence);
            let seen = seen_keys(&(0..rows), sequence, window);
            prop_assert!(seen.start == 0 && seen.end >= rows && seen.end <= sequence);
            prop_assert!(4 * heads * rows * seen.len() <= SCORE_BYTES || rows <= LEAST_ROWS);
            let last = seen_keys(&(sequence - 1..sequence), sequence, window);
            prop_assert_eq!(last, window.map_or(0, |window| (sequence - 1).saturating_sub(window))..sequence);
        }
    }
}
