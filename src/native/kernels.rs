//! The engine's kernels: compiled for the device and the model's sizes, and one checked launch for each.
#![allow(unsafe_code)]

use super::arch::{Arch, native_sources, options};
use super::shape::{CHUNK, Precision, Shape};
use crate::cuda::error::driver;
use crate::cuda::launch::{Function, Grid, Module, Parameters, launch};
use crate::cuda::{CubinCache, CudaError, Device, DeviceBuffer, DeviceValue, Result, Source, Stream};
use crate::tokens::BatchSize;
use std::sync::Arc;

/// Tokens that `linear_few` is launched for at most.
pub(super) const FEW: usize = 64;
/// Dynamic shared memory of the tiled linears.
const LARGE_SHARED: usize = 3 * (128 + 128) * 128;
const SMALL_SHARED: usize = 4 * (64 + 64) * 128;

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

/// What a linear reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearJob<'a> {
    pub input: &'a Matrix,
    pub linear: &'a DeviceLinear,
    /// Of the input, where a norm is folded in.
    pub statistics: &'a DeviceBuffer<f32>,
    /// Added: the stream through a norm, or as it is.
    pub residual: Option<(&'a Matrix, Option<&'a DeviceNorm>)>,
    pub activated: bool,
    pub out: &'a Matrix,
    pub tokens: usize,
}

/// What `linear_few` needs besides: it measures its input itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured<'a> {
    pub norm: Option<&'a DeviceNorm>,
    pub rows: Rows<'a>,
    pub stage: usize,
    pub fault: &'a DeviceBuffer<i32>,
}

/// Bytes of an entry of attention's list.
const LIST_ENTRY: usize = 32;
/// Tokens of the longest row that the packed attention takes.
const LONGEST_ROW: usize = 8192;

/// Entries of attention's list that serve any `rows` rows of `tokens` tokens.
fn list_entries(rows: usize, tokens: usize) -> usize {
    let long = rows.min(tokens / 33);
    (tokens + 63 * long) / 64 + (rows - long).div_ceil(4) + 1
}

/// What attention reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionJob<'a> {
    pub qkv: &'a Matrix,
    pub context: &'a Matrix,
    pub rows: Rows<'a>,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Bias of the scores.
    pub bias: Option<&'a Bias>,
    /// Places that a token sees to each side; -1 for all.
    pub window: i32,
    /// What [`NativeKernels::plan_attention`] wrote.
    pub list: &'a DeviceBuffer<u8>,
}

/// Bias of the scores by distance.
#[derive(Debug, Clone)]
pub(super) struct Bias {
    /// `[heads, 2 reach + 1]`.
    pub by_distance: DeviceBuffer<f32>,
    pub reach: usize,
    /// As the packed attention takes it; [`NativeKernels::prepare_bias`] makes it.
    pub table: Option<DeviceBuffer<f32>>,
}

/// Kernels of one shape, loaded on one device.
pub(super) struct NativeKernels(Arc<Inner>);

struct Inner {
    embed: Function,
    statistics: Function,
    normalise: Function,
    hidden_states: Function,
    linears: Linears,
    attention: AttentionKernel,
    shape: Shape,
    dependent: bool,
    device: Device,
}

/// Each without and with the activation.
enum Linears {
    Exact([Function; 2]),
    Tiled { large: [Function; 2], small: [Function; 2], few: [Function; 2] },
}

enum AttentionKernel {
    Exact(Function),
    Packed { prepare: Function, plan: Function, all: Function, window: Function, biased: bool },
}

impl NativeKernels {
    /// Compiles the kernels for `shape`, or takes them from `cache`.
    ///
    /// # Errors
    /// [`CudaError::NvrtcMissing`], [`CudaError::Compile`], or what the driver says to the cubin.
    pub fn load(device: &Device, cache: &CubinCache, arch: &Arch, shape: Shape, biased: bool) -> Result<Self> {
        let [_, stream, linear, attention, exact] = native_sources();
        let mut options = options(shape.precision, shape.activation);
        options.extend([
            format!("-DHEADS={}", shape.heads),
            format!("-DHEAD_SIZE={}", shape.head_size),
            format!("-DBIAS={}", i32::from(biased)),
        ]);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let module = |source| module_of(device, cache, arch, source, &options);
        let of_stream = module(&stream)?;
        let is_exact = shape.precision == Precision::Fp32;
        let either = |fast, slow| of_stream.function(if is_exact { slow } else { fast });
        let (linears, attention) = if is_exact {
            let module = module(&exact)?;
            let linears = Linears::Exact([module.function(c"linear_exact")?, module.function(c"linear_exact_activated")?]);
            (linears, AttentionKernel::Exact(module.function(c"attention_exact")?))
        } else {
            let module = module(&linear)?;
            let pair = |names: [_; 2], shared| -> Result<[Function; 2]> {
                Ok([module.function_with_shared(names[0], shared)?, module.function_with_shared(names[1], shared)?])
            };
            let linears = Linears::Tiled {
                large: pair([c"linear_128", c"linear_128_activated"], LARGE_SHARED)?,
                small: pair([c"linear_64", c"linear_64_activated"], SMALL_SHARED)?,
                few: pair([c"linear_few", c"linear_few_activated"], 0)?,
            };
            let module = module_of(device, cache, arch, &attention, &options)?;
            let attention = AttentionKernel::Packed {
                prepare: module.function(c"prepare_bias")?,
                plan: module.function(c"plan_attention")?,
                all: module.function(c"attention")?,
                window: module.function(c"attention_window")?,
                biased,
            };
            (linears, attention)
        };
        Ok(Self(Arc::new(Inner {
            embed: either(c"embed", c"embed_exact")?,
            statistics: either(c"statistics", c"statistics_exact")?,
            normalise: either(c"normalise", c"normalise_exact")?,
            hidden_states: either(c"hidden_states", c"hidden_states_exact")?,
            linears,
            attention,
            shape,
            dependent: arch.dependent,
            device: device.clone(),
        })))
    }

    /// Enqueues making the stream of token ids, with statistics for `norm`. `added` `[positions, hidden]`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for buffers that are too short or of another device.
    pub fn embed(
        &self,
        stream: &mut Stream,
        ids: &DeviceBuffer<i32>,
        rows: &Rows<'_>,
        words: &DeviceBuffer<u8>,
        added: Option<&DeviceBuffer<f32>>,
        norm: Option<&DeviceNorm>,
        into: (&Matrix, &DeviceBuffer<f32>),
    ) -> Result<()> {
        const CALL: &str = "embed";
        let (matrix, statistics) = into;
        self.check_stream(CALL, matrix, statistics, rows)?;
        if ids.len() < rows.tokens {
            return Err(argument(CALL, format!("{} ids for {} tokens", ids.len(), rows.tokens)));
        }
        hold(stream, &[Some(ids), Some(rows.starts), Some(rows.lengths)]);
        hold(stream, &[Some(words), Some(&matrix.values)]);
        hold(stream, &[added, Some(statistics)]);
        let mut parameters = Parameters::new();
        for buffer in [ids, rows.starts, rows.lengths] {
            parameters.address(buffer.address());
        }
        parameters.int(c_int(CALL, rows.rows)?);
        parameters.address(words.address());
        parameters.address(address(added));
        parameters.address(matrix.values.address());
        parameters.address(statistics.address());
        for n in [rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        norm_parameters(&mut parameters, norm);
        // SAFETY: stream.cu's parameters, in order; the stream's and the rows' sizes were checked above. The ids were checked against the table
        // where the batch entered, and padding's id where the lanes were made; rows are no longer than the positions, which the encoder's
        // ranges see to.
        unsafe { self.launch(stream, &self.0.embed, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues measuring the stream for `norm`.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn measure(
        &self,
        stream: &mut Stream,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: &DeviceNorm,
        (stage, fault): (usize, &DeviceBuffer<i32>),
    ) -> Result<()> {
        const CALL: &str = "measure the stream";
        self.check_stream(CALL, matrix, statistics, rows)?;
        hold(stream, &[Some(rows.starts), Some(rows.lengths), Some(fault)]);
        hold(stream, &[Some(&matrix.values)]);
        hold(stream, &[Some(statistics)]);
        let mut parameters = Parameters::new();
        for address in [matrix.values.address(), statistics.address(), rows.starts.address(), rows.lengths.address()] {
            parameters.address(address);
        }
        for n in [rows.rows, rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        norm_parameters(&mut parameters, Some(norm));
        parameters.int(c_int(CALL, stage)?);
        parameters.address(fault.address());
        // SAFETY: stream.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.0.statistics, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues putting the stream through `norm`, in place; its statistics are then those of nothing.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn normalise(
        &self,
        stream: &mut Stream,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: &DeviceNorm,
    ) -> Result<()> {
        const CALL: &str = "normalise the stream";
        self.check_stream(CALL, matrix, statistics, rows)?;
        self.check_norm(CALL, norm, matrix.columns)?;
        hold(stream, &[Some(&matrix.values)]);
        hold(stream, &[Some(statistics), Some(&norm.gamma), norm.beta.as_ref()]);
        let mut parameters = Parameters::new();
        for address in [matrix.values.address(), statistics.address(), norm.gamma.address(), address(norm.beta.as_ref())] {
            parameters.address(address);
        }
        for n in [rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        // SAFETY: stream.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.0.normalise, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues giving the stream out through `norm`, or as it is, as f32 `[tokens, hidden]`, and `fault` into `seen`.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn hidden_states(
        &self,
        stream: &mut Stream,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: Option<&DeviceNorm>,
        out: &DeviceBuffer<f32>,
        (fault, seen): (&DeviceBuffer<i32>, &DeviceBuffer<i32>),
    ) -> Result<()> {
        const CALL: &str = "give hidden states";
        self.check_stream(CALL, matrix, statistics, rows)?;
        if let Some(norm) = norm {
            self.check_norm(CALL, norm, matrix.columns)?;
        }
        if out.len() < rows.tokens * matrix.columns || fault.is_empty() || seen.is_empty() {
            return Err(argument(CALL, format!("{} values for {} tokens of {}", out.len(), rows.tokens, matrix.columns)));
        }
        hold(stream, &[Some(fault), Some(seen)]);
        let (gamma, beta) = (norm.map(|norm| &norm.gamma), norm.and_then(|norm| norm.beta.as_ref()));
        hold(stream, &[Some(&matrix.values)]);
        hold(stream, &[Some(statistics), gamma, beta, Some(out)]);
        let mut parameters = Parameters::new();
        for address in [matrix.values.address(), statistics.address(), address(gamma), address(beta), out.address()] {
            parameters.address(address);
        }
        for n in [rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        parameters.address(fault.address());
        parameters.address(seen.address());
        // SAFETY: stream.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.0.hidden_states, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues a linear. `measured` chooses the kernel for few tokens, which measures its input itself.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for sizes that do not belong together, or buffers that are too short or of another device.
    pub fn linear(&self, stream: &mut Stream, job: &LinearJob<'_>, measured: Option<&Measured<'_>>) -> Result<()> {
        const CALL: &str = "linear";
        let LinearJob { input, linear, statistics, residual, activated, out, tokens } = *job;
        let (inputs, outputs) = (linear.weight.columns, linear.weight.capacity);
        let capacity = input.capacity;
        let norm = residual.and_then(|(_, norm)| norm);
        let residual_matrix = residual.map(|(matrix, _)| matrix);
        let fits = [input, out].into_iter().chain(residual_matrix).all(|matrix| matrix.capacity == capacity)
            && input.columns == inputs
            && out.columns == outputs
            && residual_matrix.is_none_or(|matrix| matrix.columns == outputs)
            && tokens <= capacity
            && linear.bias.len() >= outputs
            && linear.sums.as_ref().is_none_or(|sums| sums.len() >= outputs)
            && statistics.len() >= 2 * capacity;
        if !fits {
            let reason = format!(
                "{outputs} outputs of {inputs} inputs, {tokens} tokens, in {input:?} to {out:?} with {residual_matrix:?}"
            );
            return Err(argument(CALL, reason));
        }
        for matrix in [input, out, &linear.weight].into_iter().chain(residual_matrix) {
            self.check_matrix(CALL, matrix)?;
            stream.hold_buffer(&matrix.values);
        }
        if let Some(norm) = norm {
            self.check_norm(CALL, norm, outputs)?;
        }
        let (gamma, beta) = (norm.map(|norm| &norm.gamma), norm.and_then(|norm| norm.beta.as_ref()));
        hold(stream, &[Some(&linear.bias), linear.sums.as_ref(), Some(statistics), gamma, beta]);

        let mut parameters = Parameters::new();
        for address in [
            input.values.address(),
            linear.weight.values.address(),
            linear.bias.address(),
            address(linear.sums.as_ref()),
            statistics.address(),
            residual_matrix.map_or(0, |matrix| matrix.values.address()),
            statistics.address(),
            address(gamma),
            address(beta),
            out.values.address(),
        ] {
            parameters.address(address);
        }
        let which = usize::from(activated);
        let tiles = |size: usize, tile: usize| c_int(CALL, size.div_ceil(tile)).map(i32::cast_unsigned);
        let grid = |tile: usize, block, shared: usize| -> Result<Grid> {
            let (x, y) = (tiles(outputs, tile)?, tiles(tokens, tile)?);
            Ok(Grid { x, y, block, cluster: 1, shared: shared as u32, dependent: self.0.dependent })
        };
        let (function, grid) = match &self.0.linears {
            Linears::Exact(functions) => {
                for n in [tokens, outputs, inputs] {
                    parameters.int(c_int(CALL, n)?);
                }
                (&functions[which], grid(64, 256, 0)?)
            }
            Linears::Tiled { large, small, few } => {
                for n in [capacity, outputs, inputs] {
                    parameters.int(c_int(CALL, n)?);
                }
                match measured {
                    Some(Measured { norm, rows, stage, fault }) if tokens <= FEW => {
                        hold(stream, &[Some(rows.starts), Some(rows.lengths), Some(fault)]);
                        parameters.int(c_int(CALL, tokens)?);
                        norm_parameters(&mut parameters, *norm);
                        parameters.address(rows.starts.address());
                        parameters.address(rows.lengths.address());
                        parameters.int(c_int(CALL, rows.rows)?);
                        parameters.int(c_int(CALL, *stage)?);
                        parameters.address(fault.address());
                        let grid =
                            Grid { x: tiles(outputs, 8)?, y: 1, block: 256, cluster: 1, shared: 0, dependent: self.0.dependent };
                        (&few[which], grid)
                    }
                    _ => {
                        let tiles = outputs.div_ceil(128) * tokens.div_ceil(128);
                        let enough = tiles >= self.0.device.properties().multiprocessors as usize;
                        if enough {
                            (&large[which], grid(128, 256, LARGE_SHARED)?)
                        } else {
                            (&small[which], grid(64, 128, SMALL_SHARED)?)
                        }
                    }
                }
            }
        };
        // SAFETY: the parameters of linear.cu or exact.cu, in order; all sizes were checked above. Tiles end within the capacity, which is a multiple of
        // them; outputs beyond the last are not written.
        unsafe { self.launch(stream, function, CALL, grid, parameters) }
    }

    /// Bytes of attention's list of work for a batch of `size`.
    pub fn work_bytes(&self, size: BatchSize) -> usize {
        match &self.0.attention {
            AttentionKernel::Exact(_) => 0,
            AttentionKernel::Packed { .. } => list_entries(size.rows, size.tokens) * LIST_ENTRY,
        }
    }

    /// Makes the bias as attention takes it, once a model.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for a bias that is too short; [`CudaError::OutOfMemory`].
    pub fn prepare_bias(&self, stream: &mut Stream, bias: &Bias) -> Result<Bias> {
        const CALL: &str = "prepare the bias";
        let AttentionKernel::Packed { prepare, .. } = &self.0.attention else { return Ok(bias.clone()) };
        let heads = self.0.shape.heads;
        let width = 2 * bias.reach + 192;
        if bias.by_distance.len() < heads * (2 * bias.reach + 1) {
            return Err(argument(
                CALL,
                format!("{} values for {heads} heads to a distance of {}", bias.by_distance.len(), bias.reach),
            ));
        }
        let table: DeviceBuffer<f32> = self.0.device.alloc(heads * width * 4)?;
        hold(stream, &[Some(&bias.by_distance), Some(&table)]);
        let mut parameters = Parameters::new();
        parameters.address(bias.by_distance.address());
        parameters.int(c_int(CALL, bias.reach)?);
        parameters.address(table.address());
        let grid = Grid { y: c_int(CALL, heads)?.cast_unsigned(), ..Grid::simple(width) };
        // SAFETY: attention.cu's parameters, in order; both sizes are as it asks.
        unsafe { self.launch(stream, prepare, CALL, grid, parameters) }?;
        Ok(Bias { table: Some(table), ..bias.clone() })
    }

    /// Enqueues making attention's list of work, once for all layers.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn plan_attention(&self, stream: &mut Stream, rows: &Rows<'_>, list: &DeviceBuffer<u8>) -> Result<()> {
        const CALL: &str = "plan attention";
        let AttentionKernel::Packed { plan, .. } = &self.0.attention else { return Ok(()) };
        self.check_rows(CALL, rows)?;
        let entries = list_entries(rows.rows, rows.tokens);
        if list.len() < entries * LIST_ENTRY {
            return Err(argument(CALL, format!("{} bytes for {entries} entries", list.len())));
        }
        hold(stream, &[Some(rows.starts), Some(rows.lengths)]);
        hold(stream, &[Some(list)]);
        let mut parameters = Parameters::new();
        parameters.address(rows.starts.address());
        parameters.address(rows.lengths.address());
        parameters.int(c_int(CALL, rows.rows)?);
        parameters.address(list.address());
        parameters.int(c_int(CALL, entries)?);
        parameters.int(c_int(CALL, 2 * self.0.device.properties().multiprocessors as usize)?);
        let threads = rows.rows.max(entries).next_multiple_of(32).clamp(32, 1024) as u32;
        let grid = Grid { x: 1, block: threads, dependent: self.0.dependent, ..Grid::simple(1) };
        // SAFETY: attention.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, plan, CALL, grid, parameters) }
    }

    /// Enqueues attention of all rows.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn attention(&self, stream: &mut Stream, job: &AttentionJob<'_>) -> Result<()> {
        const CALL: &str = "attention";
        let AttentionJob { qkv, context, rows, longest, bias, window, list } = *job;
        let Shape { hidden, heads, head_size, .. } = self.0.shape;
        let fits = qkv.columns == 3 * hidden
            && context.columns == hidden
            && qkv.capacity == context.capacity
            && rows.tokens <= qkv.capacity
            && bias.is_none_or(|bias| bias.reach + 1 >= longest && bias.by_distance.len() >= heads * (2 * bias.reach + 1));
        if !fits {
            return Err(argument(
                CALL,
                format!("rows of up to {longest} of {} tokens, {qkv:?} to {context:?}, {bias:?}", rows.tokens),
            ));
        }
        self.check_matrix(CALL, qkv)?;
        self.check_matrix(CALL, context)?;
        self.check_rows(CALL, &rows)?;
        hold(stream, &[Some(&qkv.values), Some(&context.values)]);
        hold(stream, &[Some(rows.starts), Some(rows.lengths)]);
        hold(stream, &[bias.map(|bias| &bias.by_distance)]);
        match &self.0.attention {
            AttentionKernel::Exact(function) => {
                let mut parameters = Parameters::new();
                for address in [qkv.values.address(), context.values.address(), rows.starts.address(), rows.lengths.address()] {
                    parameters.address(address);
                }
                for n in [rows.rows, heads, head_size] {
                    parameters.int(c_int(CALL, n)?);
                }
                parameters.address(bias.map_or(0, |bias| bias.by_distance.address()));
                parameters.int(c_int(CALL, bias.map_or(0, |bias| bias.reach))?);
                parameters.int(window);
                let (x, y) = (c_int(CALL, rows.tokens)?.cast_unsigned(), c_int(CALL, heads)?.cast_unsigned());
                let shared = c_int(CALL, longest * 4)?.cast_unsigned();
                let grid = Grid { x, y, block: 128, cluster: 1, shared, dependent: self.0.dependent };
                // SAFETY: exact.cu's parameters, in order; sizes were checked above, and the shared memory holds the scores of the longest row.
                unsafe { self.launch(stream, function, CALL, grid, parameters) }
            }
            AttentionKernel::Packed { all, window: windowed, biased, .. } => {
                let entries = list_entries(rows.rows, rows.tokens);
                let table = bias.and_then(|bias| bias.table.as_ref());
                let width = |bias: &Bias| heads * (2 * bias.reach + 192) * 4;
                let prepared = bias.is_none_or(|bias| table.is_some_and(|table| table.len() >= width(bias)));
                if *biased != bias.is_some() || !prepared || list.len() < entries * LIST_ENTRY || longest > LONGEST_ROW {
                    let reason = format!(
                        "{bias:?} with kernels for {biased}, {} bytes for {entries} entries, {longest} tokens",
                        list.len()
                    );
                    return Err(argument(CALL, reason));
                }
                hold(stream, &[Some(list)]);
                hold(stream, &[table]);
                let mut parameters = Parameters::new();
                for address in [qkv.values.address(), context.values.address(), list.address()] {
                    parameters.address(address);
                }
                parameters.int(c_int(CALL, entries)?);
                parameters.int(0); // the list may still be in the making when the first attention starts
                parameters.address(address(table));
                parameters.int(c_int(CALL, bias.map_or(0, |bias| bias.reach))?);
                parameters.int(c_int(CALL, qkv.capacity)?);
                parameters.int(window);
                let most = 16 * self.0.device.properties().multiprocessors as usize;
                let blocks = c_int(CALL, (heads * entries).min(most))?.cast_unsigned();
                let shared = 2 * (256 * head_size + if *biased { 3072 } else { 0 });
                let grid = Grid { x: blocks, y: 1, block: 128, cluster: 1, shared: shared as u32, dependent: self.0.dependent };
                let function = if window < 0 { all } else { windowed };
                // SAFETY: attention.cu's parameters, in order; sizes were checked above. The list is of these very rows, whose tokens lie within the capacity.
                unsafe { self.launch(stream, function, CALL, grid, parameters) }
            }
        }
    }

    fn check_stream(&self, call: &'static str, matrix: &Matrix, statistics: &DeviceBuffer<f32>, rows: &Rows<'_>) -> Result<()> {
        self.check_matrix(call, matrix)?;
        self.check_rows(call, rows)?;
        if rows.tokens > matrix.capacity || statistics.len() < 2 * matrix.capacity {
            let reason = format!("{} tokens in {matrix:?} with {} statistics", rows.tokens, statistics.len());
            return Err(argument(call, reason));
        }
        Ok(())
    }

    fn check_rows(&self, call: &'static str, rows: &Rows<'_>) -> Result<()> {
        if rows.rows > rows.starts.len().min(rows.lengths.len()) {
            return Err(argument(
                call,
                format!("{} rows of {} starts and {} lengths", rows.rows, rows.starts.len(), rows.lengths.len()),
            ));
        }
        Ok(())
    }

    /// Whether the bytes are there, aligned, on this device.
    fn check_matrix(&self, call: &'static str, matrix: &Matrix) -> Result<()> {
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

    fn check_norm(&self, call: &'static str, norm: &DeviceNorm, columns: usize) -> Result<()> {
        let short = |vector: &DeviceBuffer<f32>| vector.len() < columns;
        if short(&norm.gamma) || norm.beta.as_ref().is_some_and(short) {
            return Err(argument(call, format!("a norm of {} values for {columns} columns", norm.gamma.len())));
        }
        Ok(())
    }

    /// A warp a token.
    fn token_grid(&self, tokens: usize) -> Grid {
        Grid { x: tokens.div_ceil(8).max(1) as u32, dependent: self.0.dependent, ..Grid::simple(1) }
    }

    /// # Safety
    /// As [`launch`]; the stream holds the buffers.
    unsafe fn launch(
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

fn module_of(
    device: &Device,
    cache: &CubinCache,
    arch: &Arch,
    (name, text): &(&'static str, String),
    options: &[&str],
) -> Result<Arc<Module>> {
    Module::compile_for(device, cache, &Source::new(name, text, options), &arch.target)
}

/// # Safety
/// As [`launch`]; the stream holds the buffers, and the function lives until the stream has run it.
pub(super) unsafe fn enqueue(
    device: &Device,
    stream: &mut Stream,
    function: &Function,
    during: &'static str,
    grid: Grid,
    parameters: Parameters,
) -> Result<()> {
    stream.check_device(during, device)?;
    device.bind()?;
    // SAFETY: the caller's promise.
    unsafe { launch(function, grid, stream.cu(), parameters) }.map_err(driver(during))
}

/// Epsilon and whether there is no mean; anything will do without a norm.
fn norm_parameters(parameters: &mut Parameters, norm: Option<&DeviceNorm>) {
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

/// A size as the kernels take it.
pub(super) fn c_int(call: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| argument(call, format!("a size of {n} is above 2^31 - 1")))
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
