//! INT8 graphs: where QuantizeLinear and DequantizeLinear stand, and with which scales.
//!
//! Symmetric, zero point 0. Weights have a scale per output channel, the tensors that feed them one scale each. The form is the one
//! that TensorRT fuses into INT8 matrix products: a float weight `[out, in]` through Q and DQ along axis 0, then Transpose, then
//! MatMul; and one pair of Q and DQ on a tensor for all linears that it feeds. Biases, softmax, LayerNorm, activations, embeddings
//! and the residual branches stay as they are.

use super::builder::Builder;
use super::constant::Values;
use super::onnx::{AttributeProto, ElementType, ValueInfoProto};
use super::{Dim, Graph, Precision, encoder};
use crate::model::{Architecture, TensorView};
use crate::{Error, Result, Setting};
use half::f16;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The largest INT8 step. -128 is not used, so that both signs reach equally far.
const STEPS: f32 = 127.0;

/// What an INT8 graph needs beside the model: ranges of activations, and which linears stay in float.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Quantization {
    /// Range of each tensor that feeds a quantised linear, by the tensor's name in the fp32 graph ([`Linear::input`]).
    pub ranges: BTreeMap<String, Range>,
    /// Names of linears that are not quantised ([`Linear::name`]).
    pub float: BTreeSet<String>,
}

/// How far a tensor's values reach.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// The largest magnitude that INT8 represents; larger values are cut. Of the values after the division by `smoothing`, where there is one.
    pub amax: f32,
    /// SmoothQuant: each channel is divided by its factor before quantisation, and the weights' columns are multiplied by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smoothing: Option<Vec<f32>>,
}

/// A linear of the encoder: `x W^T + b`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Linear {
    /// Name of its tensors without `.weight` and `.bias`, e.g. `encoder.layer.0.intermediate.dense`.
    pub name: String,
    /// Name of the graph's tensor that feeds it.
    pub input: String,
    /// The layer, from 0.
    pub layer: usize,
    /// What it does there.
    pub role: Role,
    /// Width of a row of its input.
    pub inputs: usize,
    /// Width of a row of its output.
    pub outputs: usize,
}

/// What a linear does in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Attention's queries.
    Query,
    /// Attention's keys.
    Key,
    /// Attention's values.
    Value,
    /// What follows attention's heads.
    AttentionOutput,
    /// The wide half of the feed-forward part.
    Ffn1,
    /// The narrow half of the feed-forward part.
    Ffn2,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::AttentionOutput => "attention output",
            Self::Ffn1 => "ffn1",
            Self::Ffn2 => "ffn2",
        })
    }
}

impl Graph {
    /// The encoder's graph with its linears in INT8: explicit Q/DQ, and `precision` for everything else.
    ///
    /// With [`Precision::Fp32`] opset 17; with [`Precision::Fp16`], whose scales are fp16 too, opset 19 (for TensorRT 10 and later).
    ///
    /// # Errors
    /// [`Error::Calibration`] for a tensor without a range, or a range that gives no usable scale; [`Error::Setting`] for a name in
    /// [`Quantization::float`] that is no linear; whatever [`Graph::new`] finds.
    pub fn quantized(architecture: &Architecture, precision: Precision, quantization: &Quantization) -> Result<Self> {
        Self::write_quantized(architecture, Builder::new(architecture, precision), quantization)
    }

    pub(super) fn write_quantized<'q>(
        architecture: &Architecture,
        builder: Builder<'q>,
        quantization: &'q Quantization,
    ) -> Result<Self> {
        let graph = encoder::write(architecture, builder.quantized(quantization))?;
        if let Some(unknown) = quantization.float.iter().find(|name| graph.linears.iter().all(|linear| linear.name != **name)) {
            let known: Vec<&str> = graph.linears.iter().map(|linear| linear.name.as_str()).collect();
            let reason = format!("\"{unknown}\" is no linear of this model; its linears are {}", known.join(", "));
            return Err(Error::Setting { setting: Setting::KeepFloat, reason });
        }
        Ok(graph)
    }

    /// The fp32 graph with every tensor that feeds a linear as a further output `[batch, sequence, channels]`, in the order of
    /// [`Graph::observed_tensors`].
    ///
    /// # Errors
    /// As [`Graph::new`].
    pub fn observed(architecture: &Architecture) -> Result<Self> {
        let mut graph = Self::new(architecture, Precision::Fp32)?;
        let outputs = graph.observed_tensors().into_iter().map(|(name, channels)| {
            let dims = [Dim::Named("batch"), Dim::Named("sequence"), Dim::Fixed(channels)];
            ValueInfoProto::tensor(name, ElementType::Float32, &dims)
        });
        let outputs: Vec<ValueInfoProto> = outputs.collect();
        if let Some(header) = &mut graph.header.graph {
            header.output.extend(outputs);
        }
        Ok(graph)
    }

    /// The encoder's linears, in the order of the graph.
    pub fn linears(&self) -> &[Linear] {
        &self.linears
    }

    /// Names of the outputs; the first is `last_hidden_state`.
    pub fn outputs(&self) -> impl Iterator<Item = &str> {
        self.header.graph.iter().flat_map(|graph| &graph.output).map(|output| output.name.as_str())
    }

    /// Name and channels of each tensor that feeds a linear, once each, in the order of the graph.
    pub fn observed_tensors(&self) -> Vec<(&str, usize)> {
        let mut tensors: Vec<(&str, usize)> = Vec::new();
        for linear in &self.linears {
            if tensors.iter().all(|(name, _)| *name != linear.input) {
                tensors.push((&linear.input, linear.inputs));
            }
        }
        tensors
    }
}

impl Builder<'_> {
    /// `x` through smoothing, Q and DQ: once, however many linears it feeds.
    pub(super) fn quantized_input(&mut self, x: &str, range: &Range) -> Result<String> {
        let done = format!("{x}.DequantizeLinear");
        if self.names.contains(&done) {
            return Ok(done);
        }
        let scale = activation_scale(x, range.amax, self.float)?;
        let smoothed = match &range.smoothing {
            None => x.to_owned(),
            Some(factors) => {
                let inverse: Vec<f32> = factors.iter().map(|factor| 1.0 / factor).collect();
                let inverse = self.floats(&format!("{x}.smoothing"), &[inverse.len()], inverse);
                self.node("Mul", &format!("{x}.smoothed"), &[x, &inverse], vec![])
            }
        };
        let scale = self.scalar(&format!("{x}.scale"), scale);
        let zero = self.constant("zero_point", &[], ElementType::Int8, Values::Zeros);
        let steps = self.node("QuantizeLinear", x, &[&smoothed, &scale, &zero], vec![]);
        Ok(self.node("DequantizeLinear", x, &[&steps, &scale, &zero], vec![]))
    }

    /// The weight `view` (`[outputs, inputs]`, times `factor`) through Q and DQ along its outputs, as `[inputs, outputs]`.
    pub(super) fn quantized_weight(&mut self, linear: &str, view: TensorView, factor: f32, range: &Range) -> Result<String> {
        let name = format!("{linear}.weight");
        let (outputs, inputs) = (view.shape[0], view.shape[1]);
        let columns = match &range.smoothing {
            None => vec![factor; inputs],
            Some(factors) => factors.iter().map(|column| column * factor).collect(),
        };
        let scales = weight_scales(&name, &view, &columns, self.float)?;
        let values = match &range.smoothing {
            None => Values::Stored { view, factor },
            Some(_) => Values::Columns { view, columns },
        };
        let weight = self.constant(&name, &[outputs, inputs], self.float, values);
        let scale = self.floats(&format!("{name}.scale"), &[outputs], scales);
        let zero = self.constant(&format!("zero_point.{outputs}"), &[outputs], ElementType::Int8, Values::Zeros);
        let axis = || vec![AttributeProto::int("axis", 0)];
        let steps = self.node("QuantizeLinear", &name, &[&weight, &scale, &zero], axis());
        let weight = self.node("DequantizeLinear", &name, &[&steps, &scale, &zero], axis());
        Ok(self.node("Transpose", &name, &[&weight], vec![AttributeProto::ints("perm", &[1, 0])]))
    }

    /// The range of `tensor`, `channels` wide.
    pub(super) fn range<'q>(quantization: &'q Quantization, tensor: &str, channels: usize) -> Result<&'q Range> {
        let fault = |reason: String| Error::Calibration { reason: format!("tensor \"{tensor}\" {reason}; calibrate again") };
        let Some(range) = quantization.ranges.get(tensor) else { return Err(fault("has no range".into())) };
        if let Some(factors) = &range.smoothing {
            if factors.len() != channels {
                return Err(fault(format!("has {channels} channels and {} smoothing factors", factors.len())));
            }
            if let Some(factor) = factors.iter().find(|factor| !(factor.is_normal() && **factor > 0.0)) {
                return Err(fault(format!("has a smoothing factor of {factor}")));
            }
        }
        Ok(range)
    }
}

/// The scale of a tensor whose values reach to `amax`.
fn activation_scale(tensor: &str, amax: f32, float: ElementType) -> Result<f32> {
    let scale = amax / STEPS;
    let fault = |why: &str| {
        let reason = format!("tensor \"{tensor}\" reaches to {amax}, which gives the scale {scale}: {why}");
        Err(Error::Calibration { reason })
    };
    if !(scale.is_normal() && scale > 0.0) {
        return fault("calibrate again with texts that are like those to be embedded");
    }
    if float == ElementType::Float16 && !f16::from_f32(scale).is_normal() {
        return fault(
            "fp16 does not hold it; keep the linears that it feeds in float (--keep-float), or take fp32 for the others",
        );
    }
    Ok(scale)
}

/// A scale for each row of `view` times `columns`.
///
/// A row of zeros has the scale 1. fp16 scales are at least the smallest normal one: rows that small would otherwise be divided by 0,
/// or by a scale of a few bits.
fn weight_scales(name: &str, view: &TensorView, columns: &[f32], float: ElementType) -> Result<Vec<f32>> {
    let values = view.to_f32();
    let smallest = if float == ElementType::Float16 { f16::MIN_POSITIVE.to_f32() } else { f32::MIN_POSITIVE };
    let row_scale = |(row, values): (usize, &[f32])| {
        let mut amax = 0f32;
        for (value, column) in values.iter().zip(columns) {
            let magnitude = (value * column).abs();
            if !magnitude.is_finite() {
                let reason = format!("tensor \"{name}\" holds {value} in row {row}, which INT8 cannot represent");
                return Err(Error::Calibration { reason });
            }
            amax = amax.max(magnitude);
        }
        Ok(if amax == 0.0 { 1.0 } else { (amax / STEPS).max(smallest) })
    };
    values.chunks_exact(columns.len().max(1)).enumerate().map(row_scale).collect()
}
