//! QuantizeLinear and DequantizeLinear as ONNX defines them for INT8 with zero point 0.
//!
//! `tract`'s own multiply by 1/scale where ONNX divides, which rounds differently next to half steps.

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::{DatumType, TractResult, tvec};
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_hir::internal::{
    Expansion, InferenceOp, InferenceResult, Solver, TensorProxy, check_input_arity, check_output_arity, expand,
};

/// `x` f32 to i8, or back, with scales `[n]` along an axis of length n, or one for all.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Linear {
    direction: Direction,
    axis: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Direction {
    Quantize,
    Dequantize,
}

/// Reads ONNX's `QuantizeLinear`.
pub(super) fn quantize(_context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    read(node, Direction::Quantize)
}

/// Reads ONNX's `DequantizeLinear`.
pub(super) fn dequantize(_context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    read(node, Direction::Dequantize)
}

fn read(node: &NodeProto, direction: Direction) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let axis: i64 = node.get_attr_opt("axis")?.unwrap_or(1);
    ensure!(axis >= 0 && node.input.len() == 3, "only INT8 with a zero point and an axis from the front is exported");
    Ok((expand(Linear { direction, axis: axis as usize }), vec![]))
}

/// The nearest step, ties to the even one, cut at -128 and 127.
fn to_step(x: f32, scale: f32) -> i8 {
    // Casting saturates.
    (x / scale).round_ties_even() as i8
}

impl Linear {
    fn result(&self) -> DatumType {
        match self.direction {
            Direction::Quantize => DatumType::I8,
            Direction::Dequantize => DatumType::F32,
        }
    }
}

impl Expansion for Linear {
    fn name(&self) -> StaticName {
        "Int8Linear".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 3)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&outputs[0].datum_type, self.result())?;
        solver.equals(&inputs[0].shape, &outputs[0].shape)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        // The zero point is 0.
        model.wire_node(prefix, self.clone(), &inputs[..2])
    }
}

impl Op for Linear {
    fn name(&self) -> StaticName {
        "Int8Linear".into()
    }

    op_as_typed_op!();
}

impl TypedOp for Linear {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![self.result().fact(inputs[0].shape.clone())])
    }

    as_op!();
}

impl EvalOp for Linear {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (x, scales) = args_2!(inputs);
        let scales = scales.try_as_plain_ram()?;
        let scales = scales.as_slice::<f32>()?;
        // Values that share a scale lie side by side.
        let run = if scales.len() == 1 { x.len() } else { x.shape()[self.axis + 1..].iter().product() }.max(1);
        let mut out = Tensor::zero_dt(self.result(), x.shape())?;
        let x = x.try_as_plain_ram()?;
        match self.direction {
            Direction::Quantize => {
                let mut out = out.try_as_plain_ram_mut()?;
                let runs = out.as_slice_mut::<i8>()?.chunks_mut(run);
                for ((to, from), &scale) in runs.zip(x.as_slice::<f32>()?.chunks(run)).zip(scales.iter().cycle()) {
                    to.iter_mut().zip(from).for_each(|(step, &value)| *step = to_step(value, scale));
                }
            }
            Direction::Dequantize => {
                let mut out = out.try_as_plain_ram_mut()?;
                let runs = out.as_slice_mut::<f32>()?.chunks_mut(run);
                for ((to, from), &scale) in runs.zip(x.as_slice::<i8>()?.chunks(run)).zip(scales.iter().cycle()) {
                    to.iter_mut().zip(from).for_each(|(value, &step)| *value = f32::from(step) * scale);
                }
            }
        }
        Ok(tvec![out.into_tvalue()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(direction: Direction, axis: usize, x: Tensor, scales: &[f32]) -> Tensor {
        let scales = if scales.len() == 1 { tensor0(scales[0]) } else { tensor1(scales) };
        let mut out = Linear { direction, axis }.eval(&EvalContext::out_of_plan(), tvec![x.into(), scales.into()]).unwrap();
        out.remove(0).into_tensor()
    }

    #[test]
    fn halves_go_to_the_even_step_and_what_is_too_large_is_cut() {
        let x = [0.25f32, 0.75, 1.25, -0.25, -0.75, 63.5, 64.0, 1e9, -1e9, 0.0];
        let steps = run(Direction::Quantize, 1, tensor1(&x), &[0.5]);
        let steps = steps.try_as_plain_ram().unwrap();
        assert_eq!(steps.as_slice::<i8>().unwrap(), [0, 2, 2, 0, -2, 127, 127, 127, -128, 0]);
    }

    proptest! {
        #[test]
        fn there_and_back_is_what_f64_gives_with_a_scale_for_each_row(
            rows in prop::collection::vec((prop::collection::vec(-40f32..40.0, 3), 0.01f32..1.0), 1..6),
        ) {
            let values: Vec<f32> = rows.iter().flat_map(|row| row.0.clone()).collect();
            let scales: Vec<f32> = rows.iter().map(|row| row.1).collect();
            let x = Tensor::from_shape(&[rows.len(), 3], &values).unwrap();
            let back = run(Direction::Dequantize, 0, run(Direction::Quantize, 0, x, &scales), &scales);
            let back = back.try_as_plain_ram().unwrap();
            for ((found, value), scale) in back.as_slice::<f32>().unwrap().iter().zip(&values).zip(scales.iter().flat_map(|s| [s; 3])) {
                let quotient = f64::from(*value) / f64::from(*scale);
                // Next to a half step the rounding of the f32 quotient decides.
                prop_assume!((quotient.abs().fract() - 0.5).abs() > 1e-4);
                let expected = quotient.round_ties_even().clamp(-128.0, 127.0) * f64::from(*scale);
                prop_assert!((f64::from(*found) - expected).abs() <= expected.abs() * f64::from(f32::EPSILON));
            }
        }
    }
}
