//! This crate's kernels: compiled for the device, and one checked launch for each.
#![allow(unsafe_code)]

use super::pool_plan::{Hardware, PoolPlan};
use crate::cuda::error::driver;
use crate::cuda::launch::{Function, Grid, Module, Parameters, SIMPLE_GRID, launch};
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
    normalise: Function,
    stage: Function,
    device: Device,
}

/// Hidden states `[batch, seq, hidden]`, row-major.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Hidden<'a> {
    /// fp16.
    F16(&'a DeviceBuffer<half::f16>),
    /// fp32.
    F32(&'a DeviceBuffer<f32>),
}

/// The sizes of one pooling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolShape {
    /// Rows.
    pub batch: usize,
    /// Tokens of each row, padding included.
    pub seq: usize,
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

/// Integers in device memory, as wide as an encoder's input.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Integers<'a> {
    /// int32.
    I32(&'a DeviceBuffer<i32>),
    /// int64.
    I64(&'a DeviceBuffer<i64>),
}

/// One batch on its way into an encoder: what [`Kernels::stage`] reads and writes.
#[derive(Debug, Clone, Copy)]
pub struct StageJob<'a> {
    /// `[skip, lengths[batch], ids[batch, seq]]`, usually page-locked host memory as the device addresses it. Of the ids only
    /// real tokens are read.
    pub staged: &'a DeviceBuffer<i32>,
    /// Leading tokens that pooling leaves out, one value.
    pub skip: &'a DeviceBuffer<i32>,
    /// Tokens of each row, `[batch]`, taken into `0..=seq`.
    pub lengths: &'a DeviceBuffer<i32>,
    /// Token ids, `[batch, seq]`, `pad` behind each row's tokens.
    pub ids: Integers<'a>,
    /// 1 at tokens, 0 at padding, `[batch, seq]`.
    pub mask: Option<Integers<'a>>,
    /// Rows.
    pub batch: usize,
    /// Tokens of each row, padding included.
    pub seq: usize,
    /// The id of padding.
    pub pad: i32,
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
        let PoolJob { hidden, lengths, skip, out, modes, shape } = *job;
        let PoolShape { batch, seq, hidden: width, dim, normalise } = shape;
        if batch == 0 {
            return Ok(());
        }
        let lane = hidden.lane();
        match hidden {
            Hidden::F16(buffer) => stream.hold_buffer(buffer),
            Hidden::F32(buffer) => stream.hold_buffer(buffer),
        }
        stream.hold_buffer(lengths);
        stream.hold_buffer(out);
        if let Some(skip) = skip {
            stream.hold_buffer(skip);
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
            };
            let mut parameters = Parameters::new();
            for address in [hidden.address(), lengths.address(), skip.map_or(0, DeviceBuffer::address), out.address()] {
                parameters.address(address);
            }
            for n in [batch, seq, width, columns, dim, offset] {
                parameters.int(c_int(POOL, n)?);
            }
            parameters.int(mode_number(mode));
            for n in [usize::from(fused), plan.lanes, plan.groups] {
                parameters.int(c_int(POOL, n)?);
            }
            let grid = Grid {
                x: (plan.clusters * plan.cluster) as u32,
                y: plan.tiles as u32,
                block: plan.threads() as u32,
                cluster: plan.cluster as u32,
                shared: plan.shared_bytes(lane) as u32,
            };
            // SAFETY: the parameters are pooling.cu's, in order. hidden holds batch * seq * width values of the function's type,
            // 16-byte aligned, and width is a multiple of 8; lengths holds batch values, skip one or is null; out holds
            // batch * dim values and offset + columns <= dim (check_pool, and above). The plan was checked: lanes * groups
            // threads and their shared memory, tiles that cover the columns. The kernel takes the lengths into [0, seq].
            unsafe { self.launch(stream, function, "launch pooling", grid, parameters)? };
        }
        if normalise && !fused {
            self.normalise(stream, out, batch, dim)?;
        }
        Ok(())
    }

    fn check_pool(&self, stream: &Stream, job: &PoolJob<'_>) -> Result<()> {
        let argument = |reason: String| Err(CudaError::Argument { call: POOL, reason });
        let PoolJob { hidden, lengths, skip, out, modes, shape } = *job;
        let PoolShape { batch, seq, hidden: width, dim, .. } = shape;
        if width == 0 || width % 8 != 0 {
            return argument(format!("hidden size {width} is not a multiple of 8"));
        }
        if seq > MAX_SEQ {
            return argument(format!("rows of {seq} tokens; {MAX_SEQ} are possible"));
        }
        if dim == 0 || dim > modes.len().saturating_mul(width) {
            return argument(format!("dim {dim} of {} modes of {width} columns", modes.len()));
        }
        let needed = [
            ("hidden", batch.checked_mul(seq).and_then(|n| n.checked_mul(width)), hidden.len()),
            ("lengths", Some(batch), lengths.len()),
            ("skip", Some(1), skip.map_or(1, DeviceBuffer::len)),
            ("out", batch.checked_mul(dim), out.len()),
        ];
        for (name, needed, found) in needed {
            if needed.is_none_or(|needed| found < needed) {
                return argument(format!("{name} holds {found} values, too few for {shape:?}"));
            }
        }
        if hidden.address() % 16 != 0 {
            return argument(format!("hidden states at {:#x} are not aligned to 16 bytes", hidden.address()));
        }
        self.check_stream(POOL, stream)?;
        for device in [hidden.device(), lengths.device(), skip.unwrap_or(lengths).device(), out.device()] {
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
        let StageJob { staged, skip, lengths, ids, mask, batch, seq, pad } = *job;
        let mask_len = mask.map_or(usize::MAX, |mask| mask.len());
        let total = batch.checked_mul(seq).filter(|&total| {
            total.checked_add(1 + batch).is_some_and(|values| values <= staged.len())
                && total <= ids.len()
                && total <= mask_len
                && batch <= lengths.len()
                && !skip.is_empty()
        });
        let (Ok(c_batch), Ok(c_seq), Some(total)) = (i32::try_from(batch), i32::try_from(seq), total) else {
            return Err(CudaError::Argument { call: CALL, reason: format!("{batch} rows of {seq} tokens in {job:?}") });
        };
        self.check_stream(CALL, stream)?;
        for device in [staged.device(), skip.device(), lengths.device(), ids.device(), mask.unwrap_or(ids).device()] {
            stream.check_device(CALL, device)?;
        }
        for buffer in [staged, skip, lengths] {
            stream.hold_buffer(buffer);
        }
        ids.hold(stream);
        if let Some(mask) = mask {
            mask.hold(stream);
        }
        let mut parameters = Parameters::new();
        for address in [staged.address(), skip.address(), lengths.address(), ids.address(), mask.map_or(0, |mask| mask.address())]
        {
            parameters.address(address);
        }
        for n in [ids.wide(), mask.is_some_and(|mask| mask.wide())] {
            parameters.int(i32::from(n));
        }
        for n in [c_batch, c_seq, pad] {
            parameters.int(n);
        }
        // SAFETY: stage.cu's parameters, in order; staged holds 1 + batch + batch * seq values, ids and mask (or null) batch * seq of
        // the width told, lengths batch and skip one (checked above).
        unsafe { self.launch(stream, &self.0.stage, "launch stage", Grid::simple(total), parameters) }
    }

    fn check_stream(&self, call: &'static str, stream: &Stream) -> Result<()> {
        stream.check_device(call, &self.0.device)
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
        self.0.device.bind()?;
        stream.hold(self.0.clone());
        // SAFETY: the caller's promise; the function's module lives in `self`, which the stream holds.
        unsafe { launch(function, grid, stream.cu(), parameters) }.map_err(driver(during))
    }
}

impl Hidden<'_> {
    /// Columns in 16 bytes.
    fn lane(&self) -> usize {
        match self {
            Self::F16(_) => 8,
            Self::F32(_) => 4,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F16(buffer) => buffer.len(),
            Self::F32(buffer) => buffer.len(),
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::F16(buffer) => buffer.address(),
            Self::F32(buffer) => buffer.address(),
        }
    }

    fn device(&self) -> &Device {
        match self {
            Self::F16(buffer) => buffer.device(),
            Self::F32(buffer) => buffer.device(),
        }
    }
}

impl Integers<'_> {
    fn wide(&self) -> bool {
        matches!(self, Self::I64(_))
    }

    fn len(&self) -> usize {
        match self {
            Self::I32(buffer) => buffer.len(),
            Self::I64(buffer) => buffer.len(),
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::I32(buffer) => buffer.address(),
            Self::I64(buffer) => buffer.address(),
        }
    }

    fn device(&self) -> &Device {
        match self {
            Self::I32(buffer) => buffer.device(),
            Self::I64(buffer) => buffer.device(),
        }
    }

    fn hold(&self, stream: &mut Stream) {
        match self {
            Self::I32(buffer) => stream.hold_buffer(buffer),
            Self::I64(buffer) => stream.hold_buffer(buffer),
        }
    }
}

/// A size as the kernels take it.
fn c_int(call: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| CudaError::Argument { call, reason: format!("a size of {n} is above 2^31 - 1") })
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
