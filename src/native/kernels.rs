//! The engine's kernels, compiled for the device and the model's sizes, and what their launches have in common: matrices, checks, the launch itself.
//! Those of the stream are launched in `stream.rs`, linears in `linear.rs`, attention in `attention.rs`.
#![allow(unsafe_code)]

use super::arch::{Arch, native_source, options, shape_options};
use super::attention::AttentionKernel;
use super::elementwise::Elementwise;
use super::encoder::NativeSettings;
use super::linear::Linears;
use super::shape::{CHUNK, Precision, Shape};
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int, enqueue};
use crate::cuda::{CudaError, Device, DeviceBuffer, DeviceValue, Result, Source, Stream};
use std::sync::Arc;

/// A matrix in device memory, `[capacity, columns]`: chunked where values are of two bytes, row-major in f32.
#[derive(Debug, Clone)]
pub(super) struct Matrix {
    pub values: DeviceBuffer<u8>,
    pub capacity: usize,
    pub columns: usize,
}

/// A linear's weights on the device.
#[derive(Debug, Clone)]
pub(super) struct DeviceLinear {
    /// `[outputs, inputs]`, the norm's weight folded in.
    pub weight: Matrix,
    /// `[outputs]`, the norm's bias folded in.
    pub bias: DeviceBuffer<f32>,
    /// Sums of the weight's rows, where a norm is folded in.
    pub sums: Option<DeviceBuffer<f32>>,
}

/// A norm's weights on the device.
#[derive(Debug, Clone)]
pub(super) struct DeviceNorm {
    pub gamma: DeviceBuffer<f32>,
    pub beta: Option<DeviceBuffer<f32>>,
    pub epsilon: f32,
    pub rms: i32,
}

/// Where rows lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub starts: &'a DeviceBuffer<i32>,
    pub lengths: &'a DeviceBuffer<i32>,
    pub rows: usize,
    /// Of all rows, padding behind them included.
    pub tokens: usize,
}

/// Kernels of one shape, loaded on one device.
pub(super) struct NativeKernels(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub embed: Function,
    pub statistics: Function,
    pub normalise: Function,
    pub add_normed: Function,
    pub hidden_states: Function,
    pub linears: Linears,
    pub attention: AttentionKernel,
    /// Of models with rotary positions, gates, or norms of queries and keys.
    pub elementwise: Option<Elementwise>,
    pub shape: Shape,
    /// Whether a kernel may start before the one in front has ended.
    pub dependent: bool,
    /// Whether linears of all sizes are to have one order of sums.
    pub invariant: bool,
    pub device: Device,
}

impl NativeKernels {
    /// Compiles the kernels for `shape`, or takes them from the settings' cache.
    ///
    /// # Errors
    /// [`CudaError::NvrtcMissing`], [`CudaError::Compile`], or what the driver says to the cubin.
    pub fn load(device: &Device, settings: &NativeSettings, arch: &Arch, shape: Shape, biased: bool) -> Result<Self> {
        let mut options = options(shape.precision, shape.activation);
        options.extend(shape_options(shape.heads, shape.head_size, biased));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let module = |name: &str| -> Result<Arc<Module>> {
            let text = native_source(name);
            Module::compile_for(device, &settings.cubins, &Source::new(name, &text, &options), &arch.target)
        };
        let stream = module("stream.cu")?;
        let either = |fast, exact| stream.function(if shape.precision == Precision::Fp32 { exact } else { fast });
        Ok(Self(Arc::new(Inner {
            embed: either(c"embed", c"embed_exact")?,
            statistics: either(c"statistics", c"statistics_exact")?,
            normalise: either(c"normalise", c"normalise_exact")?,
            add_normed: either(c"add_normed", c"add_normed_exact")?,
            hidden_states: either(c"hidden_states", c"hidden_states_exact")?,
            linears: Linears::load(shape.precision, arch.hopper, module)?,
            attention: AttentionKernel::load(shape.precision, (shape.head_size, biased, arch.hopper), module)?,
            elementwise: (shape.gated || shape.rotary || shape.inner_norms)
                .then(|| Elementwise::load(shape.precision, module))
                .transpose()?,
            shape,
            dependent: arch.dependent,
            invariant: settings.invariant,
            device: device.clone(),
        })))
    }

    pub(super) fn check_stream(
        &self,
        call: &'static str,
        matrix: &Matrix,
        statistics: &DeviceBuffer<f32>,
        rows: &Rows<'_>,
    ) -> Result<()> {
        self.check_matrix(call, matrix)?;
        self.check_rows(call, rows)?;
        if rows.tokens > matrix.capacity || statistics.len() < 2 * matrix.capacity {
            let reason = format!("{} tokens in {matrix:?} with {} statistics", rows.tokens, statistics.len());
            return Err(argument(call, reason));
        }
        Ok(())
    }

    pub(super) fn check_rows(&self, call: &'static str, rows: &Rows<'_>) -> Result<()> {
        if rows.rows > rows.starts.len().min(rows.lengths.len()) {
            return Err(argument(
                call,
                format!("{} rows of {} starts and {} lengths", rows.rows, rows.starts.len(), rows.lengths.len()),
            ));
        }
        Ok(())
    }

    /// Whether the bytes are there, aligned, on this device.
    pub(super) fn check_matrix(&self, call: &'static str, matrix: &Matrix) -> Result<()> {
        let precision = self.0.shape.precision;
        let granule = if precision == Precision::Fp32 { 1 } else { CHUNK };
        let bytes = matrix.capacity.checked_mul(matrix.columns).and_then(|values| values.checked_mul(precision.bytes()));
        let there = bytes.is_some_and(|bytes| bytes <= matrix.values.len());
        if !there || !matrix.columns.is_multiple_of(granule) || !matrix.values.address().is_multiple_of(128) {
            return Err(argument(call, format!("{matrix:?} in {}", precision.name())));
        }
        if !matrix.values.device().same(&self.0.device) {
            return Err(argument(call, format!("{matrix:?} is on another GPU than the kernels")));
        }
        Ok(())
    }

    pub(super) fn check_norm(&self, call: &'static str, norm: &DeviceNorm, columns: usize) -> Result<()> {
        let short = |vector: &DeviceBuffer<f32>| vector.len() < columns;
        if short(&norm.gamma) || norm.beta.as_ref().is_some_and(short) {
            return Err(argument(call, format!("a norm of {} values for {columns} columns", norm.gamma.len())));
        }
        Ok(())
    }

    /// Enqueues `function`, which makes statistics of the stream for `norm` out of what lies at `source`.
    ///
    /// # Safety
    /// As [`enqueue`]: `source` holds what the kernel reads for all tokens, and the stream holds it.
    pub(super) unsafe fn make_statistics(
        &self,
        stream: &mut Stream,
        (function, call, grid, source): (&Function, &'static str, Grid, u64),
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: &DeviceNorm,
        (stage, fault): (usize, &DeviceBuffer<i32>),
    ) -> Result<()> {
        self.check_stream(call, matrix, statistics, rows)?;
        hold(stream, &[Some(rows.starts), Some(rows.lengths), Some(fault)]);
        hold(stream, &[Some(statistics)]);
        let mut parameters = Parameters::new();
        for address in [source, statistics.address(), rows.starts.address(), rows.lengths.address()] {
            parameters.address(address);
        }
        for n in [rows.rows, rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(call, n)?);
        }
        norm_parameters(&mut parameters, Some(norm));
        parameters.int(c_int(call, stage)?);
        parameters.address(fault.address());
        // SAFETY: the parameters that such kernels have, in order; sizes were checked above, and the source by the caller.
        unsafe { self.launch(stream, function, call, grid, parameters) }
    }

    /// A warp a token.
    pub(super) fn token_grid(&self, tokens: usize) -> Grid {
        Grid { x: tokens.div_ceil(8).max(1) as u32, dependent: self.0.dependent, ..Grid::simple(1) }
    }

    /// # Safety
    /// As [`enqueue`]; the stream holds the buffers.
    pub(super) unsafe fn launch(
        &self,
        stream: &mut Stream,
        function: &Function,
        during: &'static str,
        grid: Grid,
        parameters: Parameters,
    ) -> Result<()> {
        stream.hold(self.0.clone());
        // SAFETY: the caller's promise; the function's module lives in `self`, which the stream holds.
        unsafe { enqueue(&self.0.device, stream, function, during, grid, parameters) }
    }
}

/// Epsilon and whether there is no mean; anything will do without a norm.
pub(super) fn norm_parameters(parameters: &mut Parameters, norm: Option<&DeviceNorm>) {
    parameters.float(norm.map_or(1.0, |norm| norm.epsilon));
    parameters.int(norm.map_or(0, |norm| norm.rms));
}

pub(super) fn hold<T: DeviceValue>(stream: &mut Stream, buffers: &[Option<&DeviceBuffer<T>>]) {
    for buffer in buffers.iter().copied().flatten() {
        stream.hold_buffer(buffer);
    }
}

/// The address, or null.
pub(super) fn address<T: DeviceValue>(buffer: Option<&DeviceBuffer<T>>) -> u64 {
    buffer.map_or(0, DeviceBuffer::address)
}

pub(super) fn argument(call: &'static str, reason: String) -> CudaError {
    CudaError::Argument { call, reason }
}
