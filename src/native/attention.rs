//! Attention of packed rows: its list of work, its bias, and a checked launch of each kernel.
#![allow(unsafe_code)]

use super::kernels::{Matrix, NativeKernels, Rows, address, argument, hold};
use super::shape::{Precision, Shape};
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int};
use crate::cuda::{DeviceBuffer, Result, Stream};
use crate::tokens::BatchSize;
use std::sync::Arc;

/// Bytes of an entry of attention's list.
const LIST_ENTRY: usize = 32;
/// Tokens of the longest row that the packed attention takes.
const LONGEST_ROW: usize = 8192;

/// Tokens of the longest row that one warp takes.
const SHORT_ROW: usize = 32;

/// Entries of attention's list that serve any pack of `size` with so many heads, where wide blocks are made from `wide_from` on: attention.cu's contract has the sums.
fn list_entries(BatchSize { rows, longest, tokens }: BatchSize, heads: usize, wide_from: usize) -> usize {
    if longest <= SHORT_ROW {
        return rows.div_ceil(4);
    }
    let most = wide_from.max(1) - 1; // wide blocks that are too few
    let long = rows.min(tokens / (SHORT_ROW + 1));
    let entries = |long: usize, queries: usize| {
        let blocks = ((tokens + (queries - 1) * long) / queries).min(long * longest.div_ceil(queries));
        blocks + (rows - long).div_ceil(4)
    };
    let narrow = entries(long.min(most / heads), 64).min(2 * (most / heads) + rows.div_ceil(4));
    entries(long, 128).max(narrow) + 1
}

/// Tokens of the longest row above which its keys are split: those of two stages.
const SPLIT_FROM: usize = 128;
/// Teams of `attention_split`.
const SPLIT_TEAMS: usize = 4;

/// Shared memory of a team's stages, in bytes.
fn stages_bytes(head_size: usize, biased: bool) -> usize {
    2 * (256 * head_size + if biased { 3072 } else { 0 })
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

impl Bias {
    /// Values of the table of so many heads, as attention.cu wants it: four for each place.
    fn table_len(&self, heads: usize) -> usize {
        heads * (2 * self.reach + 192) * 4
    }
}

/// The kernels of one shape.
pub(super) enum AttentionKernel {
    Exact(Function),
    Packed {
        prepare: Function,
        plan: Function,
        all: Function,
        window: Function,
        /// On Hopper, whose blocks have the shared memory.
        split: Option<Function>,
        biased: bool,
    },
}

impl AttentionKernel {
    /// `module` compiles a kernel file for heads of `head_size`, for Hopper or not; `biased` says whether scores have a bias.
    pub fn load(
        precision: Precision,
        (head_size, biased, hopper): (usize, bool, bool),
        module: impl Fn(&str) -> Result<Arc<Module>>,
    ) -> Result<Self> {
        if precision == Precision::Fp32 {
            return Ok(Self::Exact(module("exact.cu")?.function(c"attention_exact")?));
        }
        let module = module("attention.cu")?;
        Ok(Self::Packed {
            prepare: module.function(c"prepare_bias")?,
            plan: module.function(c"plan_attention")?,
            all: module.function(c"attention")?,
            window: module.function(c"attention_window")?,
            split: hopper
                .then(|| module.function_with_shared(c"attention_split", SPLIT_TEAMS * stages_bytes(head_size, biased)))
                .transpose()?,
            biased,
        })
    }
}

impl NativeKernels {
    /// Bytes of attention's list of work for a batch of `size`.
    pub fn work_bytes(&self, size: BatchSize) -> usize {
        match &self.0.attention {
            AttentionKernel::Exact(_) => 0,
            AttentionKernel::Packed { .. } => self.entries(size) * LIST_ENTRY,
        }
    }

    fn entries(&self, size: BatchSize) -> usize {
        list_entries(size, self.0.shape.heads, self.wide_from())
    }

    /// Blocks of 128 queries, over all heads, from which such blocks are made.
    fn wide_from(&self) -> usize {
        2 * self.0.device.properties().multiprocessors as usize
    }

    /// Makes the bias as attention takes it, once a model.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for a bias that is too short; [`CudaError::OutOfMemory`].
    pub fn prepare_bias(&self, stream: &mut Stream, bias: &Bias) -> Result<Bias> {
        const CALL: &str = "prepare the bias";
        let AttentionKernel::Packed { prepare, .. } = &self.0.attention else { return Ok(bias.clone()) };
        let heads = self.0.shape.heads;
        if bias.by_distance.len() < heads * (2 * bias.reach + 1) {
            return Err(argument(
                CALL,
                format!("{} values for {heads} heads to a distance of {}", bias.by_distance.len(), bias.reach),
            ));
        }
        let table: DeviceBuffer<f32> = self.0.device.alloc(bias.table_len(heads))?;
        hold(stream, &[Some(&bias.by_distance), Some(&table)]);
        let mut parameters = Parameters::new();
        parameters.address(bias.by_distance.address());
        parameters.int(c_int(CALL, bias.reach)?);
        parameters.address(table.address());
        let grid = Grid { y: c_int(CALL, heads)?.cast_unsigned(), ..Grid::simple(bias.table_len(1) / 4) };
        // SAFETY: attention.cu's parameters, in order; both sizes are as it asks.
        unsafe { self.launch(stream, prepare, CALL, grid, parameters) }?;
        Ok(Bias { table: Some(table), ..bias.clone() })
    }

    /// Enqueues making attention's list of work, once for all layers; `longest`: tokens of the longest row.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn plan_attention(&self, stream: &mut Stream, rows: &Rows<'_>, longest: usize, list: &DeviceBuffer<u8>) -> Result<()> {
        const CALL: &str = "plan attention";
        let AttentionKernel::Packed { plan, .. } = &self.0.attention else { return Ok(()) };
        self.check_rows(CALL, rows)?;
        let entries = self.entries(BatchSize { rows: rows.rows, longest, tokens: rows.tokens });
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
        parameters.int(c_int(CALL, self.wide_from())?);
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
            AttentionKernel::Packed { all, window: windowed, split, biased, .. } => {
                let entries = self.entries(BatchSize { rows: rows.rows, longest, tokens: rows.tokens });
                let table = bias.and_then(|bias| bias.table.as_ref());
                let prepared = bias.is_none_or(|bias| table.is_some_and(|table| table.len() >= bias.table_len(heads)));
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
                parameters.int(0); // the list may still be in the making when the first attention starts
                parameters.address(address(table));
                parameters.int(c_int(CALL, bias.map_or(0, |bias| bias.reach))?);
                parameters.int(c_int(CALL, qkv.capacity)?);
                parameters.int(window);
                let blocks = c_int(CALL, heads * entries)?.cast_unsigned();
                // Where every block has a multiprocessor of its own there are no wide ones, and more teams a block take less time.
                let multiprocessors = self.0.device.properties().multiprocessors;
                let few = blocks <= multiprocessors && longest > SPLIT_FROM && window < 0 && !self.0.invariant;
                let (function, teams) = match split {
                    Some(split) if few => (split, SPLIT_TEAMS),
                    _ => (if window < 0 { all } else { windowed }, 1),
                };
                let shared = c_int(CALL, teams * stages_bytes(head_size, *biased))?.cast_unsigned();
                let block = 128 * teams as u32;
                let grid = Grid { x: blocks, y: 1, block, cluster: 1, shared, dependent: self.0.dependent };
                // SAFETY: attention.cu's parameters, in order; sizes were checked above. The list is of these very rows, whose tokens lie within the capacity.
                unsafe { self.launch(stream, function, CALL, grid, parameters) }
            }
        }
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
