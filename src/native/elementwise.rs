//! Rotary positions and gates: a checked launch of each.
#![allow(unsafe_code)]

use super::kernels::{Matrix, NativeKernels, Rows, address, argument, hold};
use super::shape::Precision;
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int};
use crate::cuda::{Device, DeviceBuffer, Result, Stream};
use crate::model::architecture::{Rotary, RotaryScaling};
use std::sync::Arc;

/// Blocks a multiprocessor of the kernel that strides.
const BLOCKS: usize = 8;

/// The kernels of models that have such parts.
pub(super) struct Elementwise {
    rotate: Function,
    gate: Function,
}

impl Elementwise {
    pub fn load(precision: Precision, module: impl Fn(&str) -> Result<Arc<Module>>) -> Result<Self> {
        let module = module("elementwise.cu")?;
        let exact = precision == Precision::Fp32;
        Ok(Self {
            rotate: module.function(if exact { c"rotate_exact" } else { c"rotate" })?,
            gate: module.function(if exact { c"gate_exact" } else { c"gate" })?,
        })
    }
}

/// A model's rotary positions on the device.
#[derive(Debug, Clone)]
pub(super) struct DeviceRotary {
    /// (cos, sin), `[positions, size / 2]`.
    pub turns: DeviceBuffer<f32>,
    /// `[size / 2]`, where rows of more than `trained` tokens have others.
    pub frequencies: Option<DeviceBuffer<f32>>,
    pub size: usize,
    pub trained: usize,
    pub factor: f32,
}

/// (cos, sin) of each position and pair, rounded where the references round: the angle is an f32.
pub(super) fn turns(rotary: &Rotary, positions: usize) -> Vec<f32> {
    let frequencies = rotary.rounded_frequencies();
    let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency));
    angles.map(f64::from).flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]).collect()
}

impl DeviceRotary {
    /// Of texts of up to `positions` tokens.
    pub fn new(device: &Device, stream: &mut Stream, rotary: &Rotary, positions: usize) -> Result<Self> {
        let mut upload = |values: &[f32]| -> Result<DeviceBuffer<f32>> {
            let buffer = device.alloc(values.len())?;
            stream.upload(values, &buffer)?;
            Ok(buffer)
        };
        let (trained, factor) = match rotary.scaling {
            RotaryScaling::DynamicNtk { factor, trained } if trained < positions => (trained, factor as f32),
            _ => (positions, 1.0),
        };
        let longer = (trained < positions).then(|| upload(&rotary.rounded_frequencies())).transpose()?;
        Ok(Self { turns: upload(&turns(rotary, positions))?, frequencies: longer, size: rotary.size, trained, factor })
    }

    fn positions(&self) -> usize {
        self.turns.len() / self.size.max(2)
    }
}

impl NativeKernels {
    /// Enqueues turning the queries and keys of `qkv`; rows are of at most `longest` tokens.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn rotate(
        &self,
        stream: &mut Stream,
        qkv: &Matrix,
        rows: &Rows<'_>,
        longest: usize,
        rotary: &DeviceRotary,
    ) -> Result<()> {
        const CALL: &str = "rotate";
        let shape = &self.0.shape;
        let Some(kernels) = &self.0.elementwise else {
            return Err(argument(CALL, "the model has no rotary positions".to_owned()));
        };
        self.check_matrix(CALL, qkv)?;
        self.check_rows(CALL, rows)?;
        let DeviceRotary { turns, frequencies, size, trained, factor } = rotary;
        let fits = qkv.columns == shape.qkv()
            && rows.tokens <= qkv.capacity
            && *size <= shape.head_size
            && size.is_multiple_of(if shape.precision == Precision::Fp32 { 2 } else { 16 })
            && longest <= rotary.positions()
            && frequencies.as_ref().is_none_or(|frequencies| frequencies.len() >= size / 2)
            && (frequencies.is_some() || longest <= *trained);
        if !fits {
            let reason = format!("{} tokens in rows of up to {longest}, {qkv:?} by {rotary:?}", rows.tokens);
            return Err(argument(CALL, reason));
        }
        hold(stream, &[Some(&qkv.values)]);
        hold(stream, &[Some(rows.starts), Some(rows.lengths)]);
        hold(stream, &[Some(turns), frequencies.as_ref()]);
        let mut parameters = Parameters::new();
        for address in [qkv.values.address(), rows.starts.address(), rows.lengths.address()] {
            parameters.address(address);
        }
        parameters.int(c_int(CALL, rows.rows)?);
        parameters.address(turns.address());
        parameters.address(address(frequencies.as_ref()));
        for n in [rows.tokens, qkv.capacity, shape.heads, shape.head_size, *size, *trained] {
            parameters.int(c_int(CALL, n)?);
        }
        parameters.float(*factor);
        // SAFETY: elementwise.cu's parameters, in order; sizes were checked above, and the lengths of rows by the encoder's ranges.
        unsafe { self.launch(stream, &kernels.rotate, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues `out = activation(first half of expanded) * second half`.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn gate(&self, stream: &mut Stream, expanded: &Matrix, out: &Matrix, tokens: usize) -> Result<()> {
        const CALL: &str = "gate";
        let Some(kernels) = &self.0.elementwise else {
            return Err(argument(CALL, "the model has no gates".to_owned()));
        };
        self.check_matrix(CALL, expanded)?;
        self.check_matrix(CALL, out)?;
        let wide = out.columns;
        if expanded.columns != 2 * wide || expanded.capacity != out.capacity || !(1..=out.capacity).contains(&tokens) {
            return Err(argument(CALL, format!("{tokens} tokens of {expanded:?} into {out:?}")));
        }
        hold(stream, &[Some(&expanded.values), Some(&out.values)]);
        let mut parameters = Parameters::new();
        parameters.address(expanded.values.address());
        parameters.address(out.values.address());
        for n in [tokens, out.capacity, wide] {
            parameters.int(c_int(CALL, n)?);
        }
        let pieces = tokens * (wide / 8);
        let most = BLOCKS * self.0.device.properties().multiprocessors as usize;
        let blocks = c_int(CALL, pieces.div_ceil(256).clamp(1, most))?.cast_unsigned();
        let grid = Grid { x: blocks, dependent: self.0.dependent, ..Grid::simple(1) };
        // SAFETY: elementwise.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &kernels.gate, CALL, grid, parameters) }
    }
}

#[cfg(test)]
#[path = "elementwise_tests.rs"]
mod tests;
