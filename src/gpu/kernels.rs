//! This crate's kernels: compiled for the device, and one checked launch for each.
#![allow(unsafe_code)]

use super::pool_plan::{Hardware, PoolPlan};
use super::values::{Hidden, Integers, NormedStream};
use crate::cuda::launch::{Function, Grid, Module, Parameters, SIMPLE_GRID, c_int, enqueue};
use crate::cuda::{CubinCache, CudaError, Device, DeviceBuffer, Result, Source, Stream};
use crate::pooling::PoolingMode;
use std::sync::Arc;

const OPTIONS: &[&str] = &["--std=c++17", "-lineinfo"];

/// The kernels' sources, as they are compiled.
pub fn kernel_sources() -> [Source<'static>; 2] {
    [
        Source::new("pooling.cu", include_str!("../../kernels/pooling.cu"), OPTIONS),
        Source::new("stage.cu", include_str!("../../kernels/stage.cu"), OPTIONS),
    ]
}

/// Longest row: positions are exact in f32 up to here, and the kernels' token numbers stay far from 2^31.
const MAX_SEQ: usize = 1 << 24;

const POOL: &str = "pool";

/// The kernels, loaded on one device. A clone is the same kernels.
#[derive(Clone)]
pub struct Kernels(Arc<Inner>);

struct Inner {
    pool_sum_f16: Function,
    pool_max_f16: Function,
    pool_sum_f32: Function,
    pool_max_f32: Function,
    pool_sum_stream_f16: Function,
    pool_max_stream_f16: Function,
    pool_sum_stream_bf16: Function,
    pool_max_stream_bf16: Function,
    normalise: Function,
    stage: Function,
    device: Device,
}

/// The sizes of one pooling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolShape {
    /// Rows.
    pub batch: usize,
    /// Most tokens of a row.
    pub seq: usize,
    /// Hidden states of all rows, those of padding included.
    pub tokens: usize,
    /// Columns of a hidden state, a multiple of 8.
    pub hidden: usize,
    /// Values of a vector: the first of `modes * hidden`.
    pub dim: usize,
    /// Whether each vector is scaled to unit length.
    pub normalise: bool,
}

/// One pooling: what [`Kernels::pool`] reads and writes.
#[derive(Debug, Clone, Copy)]
pub struct PoolJob<'a> {
    /// Hidden states, 16-byte aligned.
    pub hidden: Hidden<'a>,
    /// Where each row's hidden states begin, `[batch]`, taken into `0..=tokens`; `None` for rows that lie padded, `seq` apart.
    pub starts: Option<&'a DeviceBuffer<i32>>,
    /// Tokens of each row, `[batch]`; taken into `0..=seq`.
    pub lengths: &'a DeviceBuffer<i32>,
    /// Leading tokens of every row that are left out (a prompt's), one value; none for 0.
    pub skip: Option<&'a DeviceBuffer<i32>>,
    /// The vectors, `[batch, dim]`.
    pub out: &'a DeviceBuffer<f32>,
    /// How, side by side.
    pub modes: &'a [PoolingMode],
    /// The sizes.
    pub shape: PoolShape,
}

/// One batch on its way into an encoder: what [`Kernels::stage`] reads and writes.
#[derive(Debug, Clone, Copy)]
pub struct StageJob<'a> {
    /// `[skip, starts[batch + 1], ids]`, usually page-locked host memory as the device addresses it: the ids of all rows side by side,
    /// row r's from `starts[r]` to `starts[r + 1]`.
    pub staged: &'a DeviceBuffer<i32>,
    /// Leading tokens that pooling leaves out, one value.
    pub skip: &'a DeviceBuffer<i32>,
    /// Tokens of each row, `[batch]`.
    pub lengths: &'a DeviceBuffer<i32>,
    /// Token ids, one for each place of `rows`; `pad` where there is no token.
    pub ids: Integers<'a>,
    /// 1 at tokens, 0 elsewhere, one for each place of `rows`.
    pub mask: Option<Integers<'a>>,
    /// Rows.
    pub batch: usize,
    /// How the encoder takes them.
    pub rows: StagedRows<'a>,
    /// The id of padding.
    pub pad: i32,
}

/// How staged rows lie before an encoder.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum StagedRows<'a> {
    /// A rectangle `[batch, seq]`: each row is padded to this many tokens, and cut there.
    Padded(usize),
    /// Side by side, without padding between them.
    Packed {
        /// Where each row begins, `[batch]`, is written here.
        starts: &'a DeviceBuffer<i32>,
        /// Places for tokens; what the rows leave is padding.
        tokens: usize,
    },
}

impl Kernels {
    /// Compiles the kernels for `device`, or takes them from `cache`, and loads them.
    ///
    /// # Errors
    /// [`CudaError::NvrtcMissing`], [`CudaError::Compile`], or what the driver says to the cubin.
    pub fn load(device: &Device, cache: &CubinCache) -> Result<Self> {
        let [pooling, stage] = kernel_sources();
        let pooling = Module::compile(device, cache, &pooling)?;
        let stage = Module::compile(device, cache, &stage)?;
        Ok(Self(Arc::new(Inner {
            pool_sum_f16: pooling.function(c"pool_sum_f16")?,
            pool_max_f16: pooling.function(c"pool_max_f16")?,
            pool_sum_f32: pooling.function(c"pool_sum_f32")?,
            pool_max_f32: pooling.function(c"pool_max_f32")?,
            pool_sum_stream_f16: pooling.function(c"pool_sum_stream_f16")?,
            pool_max_stream_f16: pooling.function(c"pool_max_stream_f16")?,
            pool_sum_stream_bf16: pooling.function(c"pool_sum_stream_bf16")?,
            pool_max_stream_bf16: pooling.function(c"pool_max_stream_bf16")?,
            normalise: pooling.function(c"normalise")?,
            stage: stage.function(c"stage_tokens")?,
            device: device.clone(),
        })))
    }

    /// Enqueues pooling over each row's tokens `skip..lengths[row]`: the modes' vectors side by side, cut to `dim`, normalised
    /// where the shape says so.
    ///
    /// The same as [`crate::pooling`] on the CPU, in f32. Padding is never read; a row without tokens gives zeros. Lengths and
    /// skip are read on the device when the work runs, so a captured graph takes fresh ones at every launch.
    ///
    /// One launch for one mode, where a row fits one block or cluster (hidden up to 8192 in fp16, 4096 in fp32); otherwise one
    /// for each mode and one for normalisation.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for buffers that are too short, not aligned to 16 bytes or of another device, a hidden size that
    /// is not a multiple of 8, or a `dim` that the modes do not give.
    pub fn pool(&self, stream: &mut Stream, job: &PoolJob<'_>) -> Result<()> {
        let PoolShape { batch, seq, .. } = job.shape;
        self.pool_planned(stream, job, |mode, columns| {
            let tokens = if matches!(mode, PoolingMode::Cls | PoolingMode::LastToken) { 1 } else { seq };
            PoolPlan::choose(Hardware::of(self.0.device.properties()), batch, tokens, columns, job.hidden.lane())
        })
    }

    /// As [`Kernels::pool`], launched as `plan` says for a mode and its number of columns. For measuring.
    ///
    /// # Errors
    /// As [`Kernels::pool`], and for a plan that does not fit.
    pub fn pool_planned(
        &self,
        stream: &mut Stream,
        job: &PoolJob<'_>,
        plan: impl Fn(PoolingMode, usize) -> PoolPlan,
    ) -> Result<()> {
        self.check_pool(stream, job)?;
        let PoolJob { hidden, starts, lengths, skip, out, modes, shape } = *job;
        let PoolShape { batch, seq, tokens, hidden: width, dim, normalise } = shape;
        if batch == 0 {
            return Ok(());
        }
        let lane = hidden.lane();
        hidden.hold(stream);
        stream.hold_buffer(lengths);
        stream.hold_buffer(out);
        for buffer in [starts, skip].into_iter().flatten() {
            stream.hold_buffer(buffer);
        }
        let mut fused = false;
        for (i, &mode) in modes.iter().enumerate() {
            let offset = i * width;
            if offset >= dim {
                break; // cut off, and so not computed
            }
            let columns = width.min(dim - offset);
            let plan = plan(mode, columns);
            if let Some(reason) = plan.fault(Hardware::of(self.0.device.properties()), columns, lane) {
                return Err(CudaError::Argument { call: POOL, reason });
            }
            fused = normalise && plan.tiles == 1 && columns == dim;
            let function = match (hidden, mode) {
                (Hidden::F16(_), PoolingMode::Max) => &self.0.pool_max_f16,
                (Hidden::F16(_), _) => &self.0.pool_sum_f16,
                (Hidden::F32(_), PoolingMode::Max) => &self.0.pool_max_f32,
                (Hidden::F32(_), _) => &self.0.pool_sum_f32,
                (Hidden::Stream(NormedStream { bf16: false, .. }), PoolingMode::Max) => &self.0.pool_max_stream_f16,
                (Hidden::Stream(NormedStream { bf16: false, .. }), _) => &self.0.pool_sum_stream_f16,
                (Hidden::Stream(_), PoolingMode::Max) => &self.0.pool_max_stream_bf16,
                (Hidden::Stream(_), _) => &self.0.pool_sum_stream_bf16,
            };
            let mut parameters = Parameters::new();
            let or_null = |buffer: Option<&DeviceBuffer<i32>>| buffer.map_or(0, DeviceBuffer::address);
            for address in [hidden.address(), or_null(starts), lengths.address(), or_null(skip), out.address()] {
                parameters.address(address);
            }
            parameters.long(tokens as u64);
            for n in [batch, seq, width, columns, dim, offset] {
                parameters.int(c_int(POOL, n)?);
            }
            parameters.int(mode_number(mode));
            for n in [usize::from(fused), plan.lanes, plan.groups] {
                parameters.int(c_int(POOL, n)?);
            }
            if let Hidden::Stream(NormedStream { statistics, norm, capacity, noted: [noted, seen], .. }) = hidden {
                parameters.address(statistics.address());
                parameters.address(norm.as_ref().map_or(0, |(weight, _)| weight.address()));
                parameters.address(norm.as_ref().and_then(|(_, bias)| bias.as_ref()).map_or(0, DeviceBuffer::address));
                parameters.long(*capacity as u64);
                parameters.address(noted.address());
                parameters.address(seen.address());
            }
            let grid = Grid {
                x: (plan.clusters * plan.cluster) as u32,
                y: plan.tiles as u32,
                block: plan.threads() as u32,
                cluster: plan.cluster as u32,
                shared: plan.shared_bytes(lane) as u32,
                // It waits by itself where it can.
                dependent: Hardware::of(self.0.device.properties()).clusters,
            };
            // SAFETY: the parameters are pooling.cu's, in order. hidden holds tokens * width values of the function's type (of a stream in its
            // chunks, with statistics, weight and bias of the norm as long as they must be), 16-byte
            // aligned, and width is a multiple of 8; starts holds batch values or is null, and tokens are batch * seq then; lengths holds
            // batch values, skip one or is null; out holds
            // batch * dim values and offset + columns <= dim (check_pool, and above). The plan was checked: lanes * groups
            // threads and their shared memory, tiles that cover the columns. The kernel takes starts and lengths into hidden.
            unsafe { self.launch(stream, function, "launch pooling", grid, parameters)? };
        }
        if normalise && !fused {
            self.normalise(stream, out, batch, dim)?;
        }
        Ok(())
    }

    fn check_pool(&self, stream: &Stream, job: &PoolJob<'_>) -> Result<()> {
        let argument = |reason: String| Err(CudaError::Argument { call: POOL, reason });
        let PoolJob { hidden, starts, lengths, skip, out, modes, shape } = *job;
        let PoolShape { batch, seq, tokens, hidden: width, dim, .. } = shape;
        if width == 0 || width % 8 != 0 {
            return argument(format!("hidden size {width} is not a multiple of 8"));
        }
        if seq > MAX_SEQ {
            return argument(format!("rows of {seq} tokens; {MAX_SEQ} are possible"));
        }
        if dim == 0 || dim > modes.len().saturating_mul(width) {
            return argument(format!("dim {dim} of {} modes of {width} columns", modes.len()));
        }
        if starts.is_none() && batch.checked_mul(seq) != Some(tokens) {
            return argument(format!("{tokens} hidden states are not {batch} rows of {seq}"));
        }
        let needed = [
            ("hidden", tokens.checked_mul(width).filter(|&values| i64::try_from(values).is_ok()), hidden.len()),
            ("starts", Some(batch), starts.map_or(batch, DeviceBuffer::len)),
            ("lengths", Some(batch), lengths.len()),
            ("skip", Some(1), skip.map_or(1, DeviceBuffer::len)),
            ("out", batch.checked_mul(dim), out.len()),
        ];
        for (name, needed, found) in needed {
            if needed.is_none_or(|needed| found < needed) {
                return argument(format!("{name} holds {found} values, too few for {shape:?}"));
            }
        }
        if let Hidden::Stream(of) = hidden
            && let Some(reason) = of.fault(tokens, width)
        {
            return argument(reason);
        }
        if hidden.address() % 16 != 0 {
            return argument(format!("hidden states at {:#x} are not aligned to 16 bytes", hidden.address()));
        }
        self.check_stream(POOL, stream)?;
        for device in [
            hidden.device(),
            starts.unwrap_or(lengths).device(),
            lengths.device(),
            skip.unwrap_or(lengths).device(),
            out.device(),
        ] {
            stream.check_device(POOL, device)?;
        }
        Ok(())
    }

    /// Enqueues scaling each of the `batch` rows of `rows[batch, dim]` to unit length, in place: `y / max(|y|, 1e-12)`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where the buffer is too short or of another device.
    pub fn normalise(&self, stream: &mut Stream, rows: &DeviceBuffer<f32>, batch: usize, dim: usize) -> Result<()> {
        const CALL: &str = "normalise";
        let fits = batch.checked_mul(dim).is_some_and(|n| n <= rows.len());
        let (Ok(c_batch), Ok(c_dim), true) = (i32::try_from(batch), i32::try_from(dim), fits) else {
            let reason = format!("{batch} rows of {dim} values in a buffer of {}", rows.len());
            return Err(CudaError::Argument { call: CALL, reason });
        };
        self.check_stream(CALL, stream)?;
        stream.check_device(CALL, rows.device())?;
        if batch == 0 || dim == 0 {
            return Ok(());
        }
        stream.hold_buffer(rows);
        let mut parameters = Parameters::new();
        parameters.address(rows.address());
        parameters.int(c_batch);
        parameters.int(c_dim);
        let grid = Grid { x: batch.min(SIMPLE_GRID) as u32, ..Grid::simple(1) };
        // SAFETY: pooling.cu's parameters, in order; rows holds batch * dim values; the block is whole warps.
        unsafe { self.launch(stream, &self.0.normalise, "launch normalise", grid, parameters) }
    }

    /// Enqueues making an encoder's inputs of what the host staged. Lengths, skip and ids are read when the work runs, so a captured
    /// graph takes fresh ones at every launch.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where a buffer is too short or of another device.
    pub fn stage(&self, stream: &mut Stream, job: &StageJob<'_>) -> Result<()> {
        const CALL: &str = "stage";
        let StageJob { staged, skip, lengths, ids, mask, batch, rows, pad } = *job;
        let mask_len = mask.map_or(usize::MAX, |mask| mask.len());
        // 0 tells the kernel that rows are packed: padded ones of 0 tokens have no place for any.
        let (seq, starts, total) = match rows {
            StagedRows::Padded(seq) => (seq, None, batch.checked_mul(seq).filter(|_| seq > 0)),
            StagedRows::Packed { starts, tokens } => (0, Some(starts), Some(tokens).filter(|_| batch <= starts.len())),
        };
        let total = total.filter(|&total| {
            total.checked_add(batch).and_then(|n| n.checked_add(2)).is_some_and(|values| values <= staged.len())
                && total <= ids.len()
                && total <= mask_len
                && batch <= lengths.len()
                && !skip.is_empty()
        });
        let c_total = total.and_then(|total| i32::try_from(total).ok());
        let (Ok(c_batch), Ok(c_seq), Some(total), Some(c_total)) = (i32::try_from(batch), i32::try_from(seq), total, c_total)
        else {
            return Err(CudaError::Argument { call: CALL, reason: format!("{batch} rows, {rows:?}, in {job:?}") });
        };
        self.check_stream(CALL, stream)?;
        for device in [
            staged.device(),
            skip.device(),
            starts.unwrap_or(lengths).device(),
            lengths.device(),
            ids.device(),
            mask.unwrap_or(ids).device(),
        ] {
            stream.check_device(CALL, device)?;
        }
        for buffer in [staged, skip, starts.unwrap_or(lengths), lengths] {
            stream.hold_buffer(buffer);
        }
        ids.hold(stream);
        if let Some(mask) = mask {
            mask.hold(stream);
        }
        let mut parameters = Parameters::new();
        let addresses = [
            staged.address(),
            skip.address(),
            starts.map_or(0, DeviceBuffer::address),
            lengths.address(),
            ids.address(),
            mask.map_or(0, |mask| mask.address()),
        ];
        for address in addresses {
            parameters.address(address);
        }
        for n in [ids.wide(), mask.is_some_and(|mask| mask.wide())] {
            parameters.int(i32::from(n));
        }
        for n in [c_batch, c_seq, c_total, pad] {
            parameters.int(n);
        }
        // SAFETY: stage.cu's parameters, in order; staged holds 2 + batch + total values, ids and mask (or null) total of the width told,
        // starts (or null) and lengths batch and skip one (checked above).
        unsafe { self.launch(stream, &self.0.stage, "launch stage", Grid::simple(total), parameters) }
    }

    fn check_stream(&self, call: &'static str, stream: &Stream) -> Result<()> {
        stream.check_device(call, &self.0.device)
    }

    /// # Safety
    /// As [`enqueue`]; the stream holds the buffers.
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

/// The modes as pooling.cu numbers them.
fn mode_number(mode: PoolingMode) -> i32 {
    match mode {
        PoolingMode::Cls => 0,
        PoolingMode::Max => 1,
        PoolingMode::Mean => 2,
        PoolingMode::MeanSqrtLen => 3,
        PoolingMode::WeightedMean => 4,
        PoolingMode::LastToken => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::kernel_sources;
    use crate::cuda::nvrtc::{NEWEST_MAJOR, compile};

    #[test]
    #[ignore = "needs NVRTC (no GPU)"]
    fn the_kernels_compile_for_every_architecture_in_use() {
        for arch in ["sm_80", "sm_86", "sm_89", "sm_90"] {
            for source in kernel_sources() {
                let cubin = compile(NEWEST_MAJOR, source.name, source.text, arch, source.options).unwrap();
                assert_eq!(cubin[..4], *b"\x7fELF", "{} for {arch}", source.name);
            }
        }
    }
}
