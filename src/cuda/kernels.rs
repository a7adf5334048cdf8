//! This crate's kernels: compiled for the device, and one checked launch for each.
#![allow(unsafe_code)]

use super::cubin::{CubinCache, Source};
use super::device::Device;
use super::error::{CudaError, Result, driver};
use super::memory::{DeviceBuffer, DeviceValue};
use super::nvrtc;
use super::plan::PoolPlan;
use super::stream::Stream;
use crate::pooling::PoolingMode;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

const OPTIONS: &[&str] = &["--std=c++17", "-lineinfo"];

/// The kernels' sources, as they are compiled.
pub fn kernel_sources() -> [Source<'static>; 2] {
    [
        Source::new("pooling.cu", include_str!("../../kernels/pooling.cu"), OPTIONS),
        Source::new("mask.cu", include_str!("../../kernels/mask.cu"), OPTIONS),
    ]
}

/// Longest row: positions are exact in f32 up to here, and the kernels' token numbers stay far from 2^31.
const MAX_SEQ: usize = 1 << 24;
/// Threads of the simple kernels' blocks.
const SIMPLE_BLOCK: u32 = 256;
/// Most blocks of the simple kernels, which stride over the rest.
const SIMPLE_GRID: usize = 4096;

/// The kernels, loaded on one device. A clone is the same kernels.
#[derive(Clone)]
pub struct Kernels(Arc<Inner>);

struct Inner {
    pool_sum_f16: Function,
    pool_max_f16: Function,
    pool_sum_f32: Function,
    pool_max_f32: Function,
    normalise: Function,
    mask_i32: Function,
    mask_i64: Function,
    widen: Function,
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

/// Element types that an attention mask may have.
pub trait MaskValue: DeviceValue {
    #[doc(hidden)]
    const WIDE: bool;
}

impl MaskValue for i32 {
    const WIDE: bool = false;
}

impl MaskValue for i64 {
    const WIDE: bool = true;
}

impl Kernels {
    /// Compiles the kernels for `device`, or takes them from `cache`, and loads them.
    ///
    /// # Errors
    /// [`CudaError::NvrtcMissing`], [`CudaError::Compile`], or what the driver says to the cubin.
    pub fn load(device: &Device, cache: &CubinCache) -> Result<Self> {
        let [pooling, mask] = kernel_sources();
        let pooling = Module::compile(device, cache, &pooling)?;
        let mask = Module::compile(device, cache, &mask)?;
        Ok(Self(Arc::new(Inner {
            pool_sum_f16: pooling.function(c"pool_sum_f16")?,
            pool_max_f16: pooling.function(c"pool_max_f16")?,
            pool_sum_f32: pooling.function(c"pool_sum_f32")?,
            pool_max_f32: pooling.function(c"pool_max_f32")?,
            normalise: pooling.function(c"normalise")?,
            mask_i32: mask.function(c"attention_mask_i32")?,
            mask_i64: mask.function(c"attention_mask_i64")?,
            widen: mask.function(c"widen_i32_i64")?,
            device: device.clone(),
        })))
    }

    /// Enqueues pooling: `out[batch, dim]` of `hidden` over each row's tokens `skip..lengths[row]` (`lengths: [batch]`;
    /// `skip`: one value, none for 0), the modes' vectors side by side, cut to `dim`, normalised where the shape says so.
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
    pub fn pool(
        &self,
        stream: &mut Stream,
        hidden: Hidden<'_>,
        lengths: &DeviceBuffer<i32>,
        skip: Option<&DeviceBuffer<i32>>,
        out: &DeviceBuffer<f32>,
        modes: &[PoolingMode],
        shape: PoolShape,
    ) -> Result<()> {
        let hardware = self.0.device.hardware();
        let plan = |mode, columns| {
            let tokens = if matches!(mode, PoolingMode::Cls | PoolingMode::LastToken) { 1 } else { shape.seq };
            PoolPlan::choose(hardware, shape.batch, tokens, columns, hidden.lane())
        };
        self.pool_planned(stream, hidden, lengths, skip, out, modes, shape, plan)
    }

    /// As [`Kernels::pool`], launched as `plan` says for a mode and its number of columns. For measuring.
    ///
    /// # Errors
    /// As [`Kernels::pool`], and for a plan that does not fit.
    #[allow(clippy::too_many_arguments)] // the buffers of one launch, each of its own type
    pub fn pool_planned(
        &self,
        stream: &mut Stream,
        hidden: Hidden<'_>,
        lengths: &DeviceBuffer<i32>,
        skip: Option<&DeviceBuffer<i32>>,
        out: &DeviceBuffer<f32>,
        modes: &[PoolingMode],
        shape: PoolShape,
        plan: impl Fn(PoolingMode, usize) -> PoolPlan,
    ) -> Result<()> {
        const CALL: &str = "pool";
        let argument = |reason: String| CudaError::Argument { call: CALL, reason };
        let PoolShape { batch, seq, hidden: width, dim, normalise } = shape;
        if width == 0 || width % 8 != 0 {
            return Err(argument(format!("hidden size {width} is not a multiple of 8")));
        }
        if seq > MAX_SEQ {
            return Err(argument(format!("rows of {seq} tokens; {MAX_SEQ} are possible")));
        }
        let pooled = modes.len().saturating_mul(width);
        if dim == 0 || dim > pooled {
            return Err(argument(format!("dim {dim} of {} modes of {width} columns", modes.len())));
        }
        let values = batch.checked_mul(seq).and_then(|n| n.checked_mul(width));
        let needed = [
            ("hidden", values, hidden.len()),
            ("lengths", Some(batch), lengths.len()),
            ("skip", Some(1), skip.map_or(1, DeviceBuffer::len)),
            ("out", batch.checked_mul(dim), out.len()),
        ];
        for (name, needed, found) in needed {
            if needed.is_none_or(|needed| found < needed) {
                return Err(argument(format!("{name} holds {found} values, too few for {shape:?}")));
            }
        }
        if hidden.address() % 16 != 0 {
            return Err(argument(format!("hidden states at {:#x} are not aligned to 16 bytes", hidden.address())));
        }
        self.check_stream(CALL, stream)?;
        for device in [hidden.device(), lengths.device(), skip.unwrap_or(lengths).device(), out.device()] {
            stream.check_device(CALL, device)?;
        }
        if batch == 0 {
            return Ok(());
        }
        let lane = hidden.lane();
        let c_int = |name: &str, n: usize| i32::try_from(n).map_err(|_| argument(format!("{name} {n} is above 2^31 - 1")));
        let [c_batch, c_seq, c_width, c_dim] =
            [c_int("batch", batch)?, c_int("seq", seq)?, c_int("hidden", width)?, c_int("dim", dim)?];

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
            if let Some(fault) = plan.fault(self.0.device.hardware(), columns, lane) {
                return Err(argument(fault));
            }
            fused = normalise && plan.tiles == 1 && columns == dim;
            let function = match (hidden, mode) {
                (Hidden::F16(_), PoolingMode::Max) => &self.0.pool_max_f16,
                (Hidden::F16(_), _) => &self.0.pool_sum_f16,
                (Hidden::F32(_), PoolingMode::Max) => &self.0.pool_max_f32,
                (Hidden::F32(_), _) => &self.0.pool_sum_f32,
            };
            let mut parameters = Parameters::new();
            parameters.address(hidden.address());
            parameters.address(lengths.address());
            parameters.address(skip.map_or(0, DeviceBuffer::address));
            parameters.address(out.address());
            for n in [c_batch, c_seq, c_width, c_int("columns", columns)?, c_dim, c_int("offset", offset)?] {
                parameters.int(n);
            }
            for n in [mode_number(mode), i32::from(fused), c_int("lanes", plan.lanes)?, c_int("groups", plan.groups)?] {
                parameters.int(n);
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
            // batch * dim values and offset + columns <= dim. The plan was checked: lanes * groups threads and their shared
            // memory, tiles that cover the columns. The kernel clamps the lengths to [0, seq].
            unsafe { self.launch(stream, function, "launch pooling", grid, &mut parameters)? };
        }
        if normalise && !fused {
            self.normalise(stream, out, batch, dim)?;
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
        unsafe { self.launch(stream, &self.0.normalise, "launch normalise", grid, &mut parameters) }
    }

    /// Enqueues `mask[batch, seq] = token < lengths[row]`, 1 and 0.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where a buffer is too short or of another device.
    pub fn attention_mask<T: MaskValue>(
        &self,
        stream: &mut Stream,
        lengths: &DeviceBuffer<i32>,
        mask: &DeviceBuffer<T>,
        batch: usize,
        seq: usize,
    ) -> Result<()> {
        const CALL: &str = "attention_mask";
        let total = batch.checked_mul(seq).filter(|&n| n <= mask.len() && batch <= lengths.len());
        let (Ok(c_batch), Ok(c_seq), Some(total)) = (i32::try_from(batch), i32::try_from(seq), total) else {
            let reason = format!("{batch} rows of {seq} tokens: {} lengths, {} mask values", lengths.len(), mask.len());
            return Err(CudaError::Argument { call: CALL, reason });
        };
        self.check_stream(CALL, stream)?;
        stream.check_device(CALL, lengths.device())?;
        stream.check_device(CALL, mask.device())?;
        if total == 0 {
            return Ok(());
        }
        stream.hold_buffer(lengths);
        stream.hold_buffer(mask);
        let mut parameters = Parameters::new();
        parameters.address(lengths.address());
        parameters.address(mask.address());
        parameters.int(c_batch);
        parameters.int(c_seq);
        let function = if T::WIDE { &self.0.mask_i64 } else { &self.0.mask_i32 };
        // SAFETY: mask.cu's parameters, in order; mask holds batch * seq values of the function's type, lengths batch.
        unsafe { self.launch(stream, function, "launch attention_mask", Grid::simple(total), &mut parameters) }
    }

    /// Enqueues `out[i] = ids[i]` for the first `count` values, i32 to i64.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where a buffer is too short or of another device.
    pub fn widen(&self, stream: &mut Stream, ids: &DeviceBuffer<i32>, out: &DeviceBuffer<i64>, count: usize) -> Result<()> {
        const CALL: &str = "widen";
        if count > ids.len() || count > out.len() {
            let reason = format!("{count} values from {} to {}", ids.len(), out.len());
            return Err(CudaError::Argument { call: CALL, reason });
        }
        self.check_stream(CALL, stream)?;
        stream.check_device(CALL, ids.device())?;
        stream.check_device(CALL, out.device())?;
        if count == 0 {
            return Ok(());
        }
        stream.hold_buffer(ids);
        stream.hold_buffer(out);
        let mut parameters = Parameters::new();
        parameters.address(ids.address());
        parameters.address(out.address());
        parameters.long(count as i64);
        // SAFETY: mask.cu's parameters, in order; both buffers hold count values.
        unsafe { self.launch(stream, &self.0.widen, "launch widen", Grid::simple(count), &mut parameters) }
    }

    fn check_stream(&self, call: &'static str, stream: &Stream) -> Result<()> {
        stream.check_device(call, &self.0.device)
    }

    /// # Safety
    /// The parameters are the kernel's own, in number, order and type, and the addresses hold what it reads and writes under
    /// this grid. The stream holds the buffers.
    unsafe fn launch(
        &self,
        stream: &mut Stream,
        function: &Function,
        during: &'static str,
        grid: Grid,
        parameters: &mut Parameters,
    ) -> Result<()> {
        self.0.device.bind()?;
        stream.hold(self.0.clone());
        let mut pointers = parameters.pointers();
        // SAFETY: the caller's promise; the function's module lives in `self`, which the stream holds.
        unsafe { launch(function.raw, grid, stream.cu(), &mut pointers) }.map_err(driver(during))
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

#[derive(Debug, Clone, Copy)]
struct Grid {
    x: u32,
    y: u32,
    block: u32,
    cluster: u32,
    shared: u32,
}

impl Grid {
    /// Blocks enough for `total` values, a thread each, up to [`SIMPLE_GRID`].
    fn simple(total: usize) -> Self {
        let blocks = total.div_ceil(SIMPLE_BLOCK as usize).clamp(1, SIMPLE_GRID);
        Self { x: blocks as u32, y: 1, block: SIMPLE_BLOCK, cluster: 1, shared: 0 }
    }
}

/// A kernel's parameters, without the heap. Each has 8 bytes of its own; the driver reads as many as the kernel declares, from
/// the start, which on little-endian machines is right for 4-byte values too.
struct Parameters {
    values: [u64; Self::MOST],
    count: usize,
}

impl Parameters {
    const MOST: usize = 16;

    fn new() -> Self {
        Self { values: [0; Self::MOST], count: 0 }
    }

    fn push(&mut self, value: u64) {
        self.values[self.count] = value; // at most 14 parameters in this file
        self.count += 1;
    }

    fn address(&mut self, address: u64) {
        self.push(address);
    }

    fn int(&mut self, n: i32) {
        self.push(u64::from(n.cast_unsigned()));
    }

    fn long(&mut self, n: i64) {
        self.push(n.cast_unsigned());
    }

    fn pointers(&mut self) -> [*mut c_void; Self::MOST] {
        let mut pointers = [std::ptr::null_mut(); Self::MOST];
        for (pointer, value) in pointers.iter_mut().zip(&mut self.values[..self.count]) {
            *pointer = std::ptr::from_mut(value).cast();
        }
        pointers
    }
}

/// # Safety
/// As [`Kernels::launch`].
unsafe fn launch(
    function: sys::CUfunction,
    grid: Grid,
    stream: sys::CUstream,
    parameters: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let Grid { x, y, block, cluster, shared } = grid;
    if cluster == 1 {
        // SAFETY: the caller's promise.
        return unsafe { result::launch_kernel(function, (x, y, 1), (block, 1, 1), shared, stream, parameters) };
    }
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster, y: 1, z: 1 } },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    // SAFETY: the caller's promise; the attribute lives through the call.
    unsafe { sys::cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), std::ptr::null_mut()) }.result()
}

/// A loaded cubin.
struct Module {
    raw: sys::CUmodule,
    device: Device,
}

// SAFETY: modules and functions are handles into the context, usable from any thread that has it current (every call binds it).
unsafe impl Send for Module {}
// SAFETY: as for Send; loading and unloading are the only calls that change it, and each happens once.
unsafe impl Sync for Module {}

/// A kernel, with the module that it lives in.
struct Function {
    raw: sys::CUfunction,
    _module: Arc<Module>,
}

// SAFETY: as for Module.
unsafe impl Send for Function {}
// SAFETY: as for Module; launches only read it.
unsafe impl Sync for Function {}

impl Module {
    fn compile(device: &Device, cache: &CubinCache, source: &Source<'_>) -> Result<Arc<Self>> {
        let (major, minor) = device.properties().compute_capability;
        let arch = format!("sm_{major}{minor}");
        let newest = device.properties().driver_cuda.0;
        let key = source.key(&arch, nvrtc::find_nvrtc(newest)?.version);
        let cubin =
            cache.get_or_compile(&key, || nvrtc::compile(newest, source.name, source.text, &arch, source.options))?;
        device.bind()?;
        // SAFETY: the image is a whole cubin: NVRTC's own result, or a cache file whose sum was checked; the driver checks it
        // too, and copies it.
        let raw = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(driver("load a kernel's cubin"))?;
        Ok(Arc::new(Self { raw, device: device.clone() }))
    }

    fn function(self: &Arc<Self>, name: &CStr) -> Result<Function> {
        self.device.bind()?;
        // SAFETY: the module is loaded and lives as long as the function (the Arc).
        let raw =
            unsafe { result::module::get_function(self.raw, CString::from(name)) }.map_err(driver("find a kernel in its cubin"))?;
        Ok(Function { raw, _module: self.clone() })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded once, unloaded once; streams and graphs hold the kernels whose work is under way.
            if let Err(error) = unsafe { result::module::unload(self.raw) } {
                log::warn!("{}", driver("unload a kernel")(error));
            }
        }
    }
}
