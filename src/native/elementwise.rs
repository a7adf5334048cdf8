//! Norms of queries and keys, rotary positions, and gates: a checked launch of each.
#![allow(unsafe_code)]

use super::kernels::{DeviceNorm, Matrix, NativeKernels, Rows, address, argument, hold, norm_parameters};
use super::shape::{Precision, Shape};
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int};
use crate::cuda::{Device, DeviceBuffer, Result, Stream};
use crate::model::architecture::{Rotary, RotaryScaling};
use std::sync::Arc;

/// Blocks a multiprocessor of the kernel that strides.
const BLOCKS: usize = 8;

/// The kernels of models that have such parts.
pub(super) struct Elementwise {
    queries_keys: Function,
    gate: Function,
}

impl Elementwise {
    pub fn load(precision: Precision, module: impl Fn(&str) -> Result<Arc<Module>>) -> Result<Self> {
        let module = module("elementwise.cu")?;
        let exact = precision == Precision::Fp32;
        Ok(Self {
            queries_keys: module.function(if exact { c"queries_keys_exact" } else { c"queries_keys" })?,
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

    /// Whether it turns heads of `shape`, in rows of up to `longest` tokens.
    fn fits(&self, shape: &Shape, longest: usize) -> bool {
        let Self { frequencies, size, trained, .. } = self;
        *size <= shape.head_size
            && size.is_multiple_of(if shape.precision == Precision::Fp32 { 2 } else { 16 })
            && longest <= self.positions()
            && frequencies.as_ref().is_none_or(|frequencies| frequencies.len() >= size / 2)
            && (frequencies.is_some() || longest <= *trained)
    }
}

/// What queries and keys go through in front of attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueriesKeys<'a> {
    pub query: Option<&'a DeviceNorm>,
    pub key: Option<&'a DeviceNorm>,
    pub rotary: Option<&'a DeviceRotary>,
}

impl NativeKernels {
    /// Enqueues putting the queries and keys of `qkv` through their norms and turning them; rows are of at most `longest` tokens.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn queries_keys(
        &self,
        stream: &mut Stream,
        qkv: &Matrix,
        rows: &Rows<'_>,
        longest: usize,
        job: &QueriesKeys<'_>,
    ) -> Result<()> {
        const CALL: &str = "queries and keys";
        let shape = &self.0.shape;
        let QueriesKeys { query, key, rotary } = *job;
        let Some(kernels) = &self.0.elementwise else {
            return Err(argument(CALL, "the model has neither rotary positions nor norms of queries and keys".to_owned()));
        };
        self.check_matrix(CALL, qkv)?;
        self.check_rows(CALL, rows)?;
        for norm in [query, key].into_iter().flatten() {
            self.check_norm(CALL, norm, shape.hidden)?;
        }
        let fits = qkv.columns == shape.qkv()
            && shape.hidden.is_multiple_of(8)
            && rows.tokens <= qkv.capacity
            && rotary.is_none_or(|rotary| rotary.fits(shape, longest));
        if !fits {
            let reason = format!("{} tokens in rows of up to {longest}, {qkv:?} by {rotary:?}", rows.tokens);
            return Err(argument(CALL, reason));
        }
        let (turns, frequencies) = (rotary.map(|rotary| &rotary.turns), rotary.and_then(|rotary| rotary.frequencies.as_ref()));
        let weights = [query, key].map(|norm| (norm.map(|norm| &norm.gamma), norm.and_then(|norm| norm.beta.as_ref())));
        hold(stream, &[Some(&qkv.values)]);
        hold(stream, &[Some(rows.starts), Some(rows.lengths)]);
        hold(stream, &[turns, frequencies, weights[0].0, weights[0].1, weights[1].0, weights[1].1]);
        let mut parameters = Parameters::new();
        for address in [qkv.values.address(), rows.starts.address(), rows.lengths.address()] {
            parameters.address(address);
        }
        parameters.int(c_int(CALL, rows.rows)?);
        for (gamma, beta) in weights {
            parameters.address(address(gamma));
            parameters.address(address(beta));
        }
        parameters.address(address(turns));
        parameters.address(address(frequencies));
        let (size, trained) = rotary.map_or((0, 0), |rotary| (rotary.size, rotary.trained));
        for n in [rows.tokens, qkv.capacity, shape.heads, shape.head_size, size, trained] {
            parameters.int(c_int(CALL, n)?);
        }
        parameters.float(rotary.map_or(1.0, |rotary| rotary.factor));
        norm_parameters(&mut parameters, query);
        norm_parameters(&mut parameters, key);
        // SAFETY: elementwise.cu's parameters, in order; sizes were checked above, and the lengths of rows by the encoder's ranges.
        unsafe { self.launch(stream, &kernels.queries_keys, CALL, self.token_grid(rows.tokens), parameters) }
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
