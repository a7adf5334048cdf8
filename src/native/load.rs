//! The kernels that bring weights into place: a checked launch of each.
#![allow(unsafe_code)]

use super::arch::{Arch, native_source, options};
use super::kernels::{DeviceLinear, address, argument, hold};
use super::shape::{CHUNK, Precision};
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int, enqueue};
use crate::cuda::{CubinCache, Device, DeviceBuffer, Result, Source, Stream};

/// Blocks of the kernels that run once a model.
const LOAD_GRID: usize = 1056;

/// What a tensor of a file becomes.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadJob<'a> {
    /// Row-major values as stored, `[rows, inputs]`.
    pub source: &'a DeviceBuffer<u8>,
    /// As load.cu numbers it.
    pub dtype: i32,
    pub rows: usize,
    pub inputs: usize,
    /// The first row's place in the whole.
    pub first: usize,
    pub gamma: Option<&'a DeviceBuffer<f32>>,
    pub beta: Option<&'a DeviceBuffer<f32>>,
    pub bias: Option<&'a DeviceBuffer<f32>>,
    pub fault: &'a DeviceBuffer<i32>,
}

/// Kernels that bring weights into place.
pub(super) struct LoadKernels {
    lay_out: Function,
    fold: Function,
    narrow: Function,
    exact: bool,
    device: Device,
}

impl LoadKernels {
    pub fn load(device: &Device, cache: &CubinCache, arch: &Arch, precision: Precision) -> Result<Self> {
        let text = native_source("load.cu");
        let options = options(precision, 0);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let module = Module::compile_for(device, cache, &Source::new("load.cu", &text, &options), &arch.target)?;
        let exact = precision == Precision::Fp32;
        Ok(Self {
            lay_out: module.function(if exact { c"lay_out_exact" } else { c"lay_out_weight" })?,
            fold: module.function(if exact { c"fold_exact" } else { c"fold_norm" })?,
            narrow: module.function(c"narrow_table")?,
            exact,
            device: device.clone(),
        })
    }

    /// Enqueues laying out rows of a linear, folding its norm, and looking for values that do not fit.
    pub fn linear(&self, stream: &mut Stream, job: &LoadJob<'_>, into: &DeviceLinear) -> Result<()> {
        const CALL: &str = "lay out a weight";
        let LoadJob { source, dtype, rows, inputs, first, gamma, beta, bias, fault } = *job;
        let total = into.weight.capacity;
        let fits = inputs == into.weight.columns
            && inputs.is_multiple_of(if self.exact { 1 } else { CHUNK })
            && first + rows <= total
            && into.weight.values.len() >= total * inputs * self.stored_bytes()
            && source.len() >= rows * inputs * dtype_bytes(dtype)
            && into.bias.len() >= total
            && into.sums.as_ref().is_none_or(|sums| sums.len() >= total)
            && [gamma, beta].into_iter().flatten().all(|vector| vector.len() >= inputs)
            && bias.is_none_or(|bias| bias.len() >= rows)
            && !fault.is_empty();
        if !fits {
            return Err(argument(CALL, format!("rows {first} to {} of {total}, {inputs} inputs: {job:?}", first + rows)));
        }
        hold(stream, &[Some(source), Some(&into.weight.values)]);
        hold(stream, &[gamma, beta, bias, Some(&into.bias), into.sums.as_ref()]);
        hold(stream, &[Some(fault)]);
        // SAFETY: the rows are within both (checked above), and the stream holds the buffers.
        unsafe { self.lay_out(stream, job, &into.weight.values, total) }?;

        let mut parameters = Parameters::new();
        parameters.address(source.address());
        parameters.int(dtype);
        parameters.address(address(bias));
        parameters.address(address(beta));
        parameters.address(into.weight.values.address());
        parameters.address(into.bias.address());
        parameters.address(address(into.sums.as_ref()));
        for n in [rows, inputs, first] {
            parameters.int(c_int(CALL, n)?);
        }
        if !self.exact {
            parameters.int(c_int(CALL, total)?);
        }
        let grid = Grid { x: c_int(CALL, rows.div_ceil(8))?.cast_unsigned(), ..Grid::simple(1) };
        // SAFETY: as above; a warp a row, 8 of them a block.
        unsafe { enqueue(&self.device, stream, &self.fold, "fold a norm", grid, parameters) }
    }

    /// Enqueues narrowing `values` values of a table to the stored type, from place `first` of it on.
    pub fn table(&self, stream: &mut Stream, job: &LoadJob<'_>, table: &DeviceBuffer<u8>) -> Result<()> {
        const CALL: &str = "narrow a table";
        let LoadJob { source, dtype, rows, inputs, first, fault, .. } = *job;
        let values = rows * inputs;
        let stored = self.stored_bytes();
        if (first * inputs + values) * stored > table.len() || source.len() < values * dtype_bytes(dtype) || fault.is_empty() {
            return Err(argument(CALL, format!("{values} values at row {first} of a table of {} bytes", table.len())));
        }
        hold(stream, &[Some(source), Some(table)]);
        hold(stream, &[Some(fault)]);
        if self.exact {
            // A table is laid out as a weight without a norm.
            // SAFETY: the rows are within both (checked above), and the stream holds the buffers.
            return unsafe { self.lay_out(stream, &LoadJob { gamma: None, ..*job }, table, first + rows) };
        }
        let mut parameters = Parameters::new();
        parameters.address(source.address());
        parameters.int(dtype);
        parameters.address(table.address() + (first * inputs * stored) as u64);
        parameters.long(values as u64);
        parameters.address(fault.address());
        let grid = Grid { x: LOAD_GRID as u32, ..Grid::simple(1) };
        // SAFETY: load.cu's parameters, in order; both sizes were checked above and the stream holds the buffers.
        unsafe { enqueue(&self.device, stream, &self.narrow, CALL, grid, parameters) }
    }

    /// Enqueues laying out the job's rows among `total` rows of `values`.
    ///
    /// # Safety
    /// The rows lie within `source` and `values`, gamma has `inputs` values, and the stream holds them all.
    unsafe fn lay_out(&self, stream: &mut Stream, job: &LoadJob<'_>, values: &DeviceBuffer<u8>, total: usize) -> Result<()> {
        const CALL: &str = "lay out a weight";
        let mut parameters = Parameters::new();
        parameters.address(job.source.address());
        parameters.int(job.dtype);
        parameters.address(address(job.gamma));
        parameters.address(values.address());
        for n in [job.rows, job.inputs, job.first] {
            parameters.int(c_int(CALL, n)?);
        }
        if !self.exact {
            parameters.int(c_int(CALL, total)?);
        }
        parameters.address(job.fault.address());
        let grid = Grid { x: LOAD_GRID as u32, ..Grid::simple(1) };
        // SAFETY: load.cu's parameters, in order; the rest is the caller's promise.
        unsafe { enqueue(&self.device, stream, &self.lay_out, CALL, grid, parameters) }
    }

    /// Bytes of a stored value.
    fn stored_bytes(&self) -> usize {
        if self.exact { 4 } else { 2 }
    }
}

/// Bytes of a value as files store it, by load.cu's number.
fn dtype_bytes(dtype: i32) -> usize {
    match dtype {
        1 | 2 => 2,
        3 => 8,
        _ => 4,
    }
}
