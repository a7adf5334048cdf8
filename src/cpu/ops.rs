//! Two operators of encoder graphs as one pass over memory each, in place of `tract`'s general forms of them.
//!
//! `tract` takes `LayerNormalization` apart into six operators, and adds and multiplies tensors of different shapes element by element: the first two
//! together cost a fifth of a text of 128 tokens, the products of gates and rotary positions a seventh (benches/RESULTS.md).

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::{DatumType, TractResult, tvec};
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_hir::internal::{
    Expansion, InferenceOp, InferenceResult, Solver, TensorProxy, check_input_arity, check_output_arity, expand,
};

/// Partial sums of a row: enough to fill the vector units, and they keep rounding errors small.
const LANES: usize = 16;

/// LayerNorm over the last axis of `x` `[.., n]` with `weight` and `bias` `[n]`, all f32.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct LayerNorm {
    /// As bits, since `tract` wants operators that are `Eq`.
    epsilon: u32,
}

/// `a + b` or `a * b` for f32 tensors of one rank, where an axis of length 1 is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Broadcast {
    Add,
    Multiply,
}

/// Reads ONNX's `LayerNormalization` as [`LayerNorm`]. Exported graphs have it over the last axis, with a bias.
pub(super) fn layer_norm(_context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let axis: i64 = node.get_attr_opt("axis")?.unwrap_or(-1);
    ensure!(axis == -1 && node.input.len() == 3, "only LayerNormalization over the last axis with a bias is exported");
    let epsilon: f32 = node.get_attr_opt("epsilon")?.unwrap_or(1e-5);
    Ok((expand(LayerNorm { epsilon: epsilon.to_bits() }), vec![]))
}

/// Puts [`Broadcast`] where an optimised model still adds or multiplies two f32 tensors.
pub(super) fn replace_broadcasts(model: &mut TypedModel) {
    for node in &mut model.nodes {
        let operation = match node.op_as::<TypedBinOp>().map(|op| op.0.name()) {
            Some("Add") => Broadcast::Add,
            Some("Mul") => Broadcast::Multiply,
            _ => continue,
        };
        if node.outputs.iter().all(|output| output.fact.datum_type == DatumType::F32) {
            node.op = Box::new(operation);
        }
    }
}

/// The rules of an operator of so many inputs whose output has the type and shape of the first.
pub(super) fn gives_its_first_input<'r, 'p: 'r>(
    solver: &mut Solver<'r>,
    inputs: &'p [TensorProxy],
    outputs: &'p [TensorProxy],
    count: usize,
) -> InferenceResult {
    check_input_arity(inputs, count)?;
    check_output_arity(outputs, 1)?;
    solver.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
    solver.equals(&inputs[0].shape, &outputs[0].shape)
}

impl Expansion for LayerNorm {
    fn name(&self) -> StaticName {
        "LayerNorm".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        gives_its_first_input(solver, inputs, outputs, 3)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for LayerNorm {
    fn name(&self) -> StaticName {
        "LayerNorm".into()
    }

    op_as_typed_op!();
}

impl TypedOp for LayerNorm {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![inputs[0].datum_type.fact(inputs[0].shape.clone())])
    }

    as_op!();
}

impl EvalOp for LayerNorm {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (x, weight, bias) = args_3!(inputs);
        let mut x = x.into_tensor();
        let weight = weight.try_as_plain_ram()?;
        let bias = bias.try_as_plain_ram()?;
        let (weight, bias) = (weight.as_slice::<f32>()?, bias.as_slice::<f32>()?);
        for row in x.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?.chunks_exact_mut(weight.len().max(1)) {
            normalise(row, weight, bias, f32::from_bits(self.epsilon));
        }
        Ok(tvec![x.into_tvalue()])
    }
}

/// `(row - mean) / sqrt(variance + epsilon) * weight + bias`, in place; the variance of the differences, not of the squares.
fn normalise(row: &mut [f32], weight: &[f32], bias: &[f32], epsilon: f32) {
    let length = row.len() as f32;
    let mean = sum(row, |value| value) / length;
    let variance = sum(row, |value| (value - mean) * (value - mean)) / length;
    let scale = 1.0 / (variance + epsilon).sqrt();
    for ((value, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
        *value = (*value - mean) * scale * weight + bias;
    }
}

fn sum(row: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    lanes.iter().sum::<f32>() + tail.iter().map(|value| term(*value)).sum::<f32>()
}

impl Op for Broadcast {
    fn name(&self) -> StaticName {
        match self {
            Self::Add => "BroadcastAdd".into(),
            Self::Multiply => "BroadcastMultiply".into(),
        }
    }

    op_as_typed_op!();
}

impl TypedOp for Broadcast {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let shape = tract_onnx::tract_core::broadcast::multi_broadcast(&[&inputs[0].shape, &inputs[1].shape])?;
        Ok(tvec![DatumType::F32.fact(shape)])
    }

    as_op!();
}

impl EvalOp for Broadcast {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (a, b) = args_2!(inputs);
        let shape = tract_onnx::tract_core::broadcast::multi_broadcast(&[a.shape(), b.shape()])?;
        // The result goes into the operand that has its shape; both operations are commutative.
        let (mut result, other) = if a.shape() == &*shape {
            (a.into_tensor(), b)
        } else if b.shape() == &*shape {
            (b.into_tensor(), a)
        } else {
            (a.broadcast_to_shape(&shape)?, b)
        };
        let operand = other.try_as_plain_ram()?;
        let (mut values, operand) = (result.try_as_plain_ram_mut()?, operand.as_slice::<f32>()?);
        self.apply(values.as_slice_mut::<f32>()?, &shape, operand, other.shape());
        Ok(tvec![result.into_tvalue()])
    }
}

impl Broadcast {
    /// Combines `values` of shape `shape` with `operand` of shape `other`, in place, repeating axes of length 1.
    fn apply(self, values: &mut [f32], shape: &[usize], operand: &[f32], other: &[usize]) {
        match self {
            Self::Add => combine(values, shape, operand, other, |a, b| a + b),
            Self::Multiply => combine(values, shape, operand, other, |a, b| a * b),
        }
    }
}

/// See [`Broadcast::apply`].
fn combine(values: &mut [f32], shape: &[usize], operand: &[f32], other: &[usize], operation: impl Fn(f32, f32) -> f32) {
    let each = |values: &mut [f32], operand: &[f32]| {
        values.iter_mut().zip(operand).for_each(|(value, &operand)| *value = operation(*value, operand));
    };
    if shape == other {
        return each(values, operand);
    }
    let Some((&width, outer)) = shape.split_last() else { return };
    let row_width = other.last().copied().unwrap_or(1);
    // Where the operand's row of each row of the values begins: an odometer over the outer axes, in which repeated axes do not move.
    let mut place = vec![0; outer.len()];
    for row in values.chunks_exact_mut(width.max(1)) {
        let start = place.iter().zip(other).fold(0, |start, (&at, &length)| start * length + if length == 1 { 0 } else { at });
        match &operand[start * row_width..(start + 1) * row_width] {
            &[single] if width != 1 => row.iter_mut().for_each(|value| *value = operation(*value, single)),
            operand => each(row, operand),
        }
        for (at, &length) in place.iter_mut().zip(outer).rev() {
            *at += 1;
            if *at < length {
                break;
            }
            *at = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn axes_of_length_one_are_repeated(
            axes in prop::collection::vec((1usize..4, any::<bool>()), 1..5),
        ) {
            let shape: Vec<usize> = axes.iter().map(|axis| axis.0).collect();
            let other: Vec<usize> = axes.iter().map(|&(length, repeated)| if repeated { 1 } else { length }).collect();
            let values = |shape: &[usize], offset: f32| -> Vec<f32> {
                (0..shape.iter().product()).map(|i: usize| i as f32 + offset).collect()
            };
            let (values, operand) = (values(&shape, 0.5), values(&other, 100.0));
            let array = |shape: &[usize], values: &[f32]| {
                tract_onnx::prelude::tract_ndarray::ArrayD::from_shape_vec(shape.to_vec(), values.to_vec()).unwrap()
            };
            let (a, b) = (array(&shape, &values), array(&other, &operand));
            for (operation, expected) in [(Broadcast::Add, &a + &b), (Broadcast::Multiply, &a * &b)] {
                let mut result = values.clone();
                operation.apply(&mut result, &shape, &operand, &other);
                prop_assert_eq!(expected.iter().copied().collect::<Vec<_>>(), result);
            }
        }

        #[test]
        fn layer_norm_equals_an_f64_oracle(
            row in prop::collection::vec(-50f32..50.0, 1..100), scale in -2f32..2.0, shift in -2f32..2.0,
        ) {
            let (weight, bias) = (vec![scale; row.len()], vec![shift; row.len()]);
            let mut normalised = row.clone();
            normalise(&mut normalised, &weight, &bias, 1e-5);
            let n = row.len() as f64;
            let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
            let deviation = (variance + 1e-5).sqrt();
            // The mean is rounded to within n eps max|x|, which the division by the deviation magnifies.
            let bound = (n + 8.0) * f64::from(f32::EPSILON) * 50.0 * f64::from(scale.abs()) / deviation + 1e-6;
            for (value, &x) in normalised.iter().zip(&row) {
                let expected = (f64::from(x) - mean) / deviation * f64::from(scale) + f64::from(shift);
                prop_assert!((f64::from(*value) - expected).abs() <= bound, "{} {} {}", value, expected, bound);
            }
        }
    }
}
