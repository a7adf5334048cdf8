//! Loaded cubins, and the launch of a kernel in them.
#![allow(unsafe_code)]

use super::cubin::{CubinCache, Source};
use super::device::Device;
use super::error::{CudaError, Result, driver};
use super::nvrtc;
use super::stream::Stream;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

/// Threads of the simple kernels' blocks.
const SIMPLE_BLOCK: u32 = 256;
/// Most blocks of the simple kernels, which stride over the rest.
pub(crate) const SIMPLE_GRID: usize = 4096;

/// How many blocks of what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) x: u32,
    pub(crate) y: u32,
    /// Threads of a block.
    pub(crate) block: u32,
    /// Blocks of a cluster; 1 for none.
    pub(crate) cluster: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
    /// Whether it may start before the kernel in front of it has ended: it waits by itself for what that one writes
    /// (programmatic dependent launch, compute capability 9.0 and up).
    pub(crate) dependent: bool,
}

impl Grid {
    /// Blocks enough for `total` values, a thread each, up to [`SIMPLE_GRID`], which then stride.
    pub(crate) fn simple(total: usize) -> Self {
        let blocks = total.div_ceil(SIMPLE_BLOCK as usize).clamp(1, SIMPLE_GRID);
        Self { x: blocks as u32, y: 1, block: SIMPLE_BLOCK, cluster: 1, shared: 0, dependent: false }
    }
}

/// A kernel's parameters, without the heap. Each has 8 bytes of its own; the driver reads as many as the kernel declares, from
/// the start, which on little-endian machines is right for 4-byte values too.
pub(crate) struct Parameters {
    values: [u64; Self::MOST],
    count: usize,
}

impl Parameters {
    const MOST: usize = 32;

    pub(crate) fn new() -> Self {
        Self { values: [0; Self::MOST], count: 0 }
    }

    fn push(&mut self, value: u64) {
        self.values[self.count] = value; // at most 32 parameters, which are the kernels' own
        self.count += 1;
    }

    pub(crate) fn address(&mut self, address: u64) {
        self.push(address);
    }

    pub(crate) fn long(&mut self, n: u64) {
        self.push(n);
    }

    pub(crate) fn int(&mut self, n: i32) {
        self.push(u64::from(n.cast_unsigned()));
    }

    pub(crate) fn float(&mut self, n: f32) {
        self.push(u64::from(n.to_bits()));
    }

    fn pointers(&mut self) -> [*mut c_void; Self::MOST] {
        let mut pointers = [std::ptr::null_mut(); Self::MOST];
        for (pointer, value) in pointers.iter_mut().zip(&mut self.values[..self.count]) {
            *pointer = std::ptr::from_mut(value).cast();
        }
        pointers
    }
}

/// Enqueues a kernel.
///
/// # Safety
/// The parameters are the kernel's own, in number, order and type, and the addresses among them hold what it reads and writes
/// under this grid until the stream has run it. The function's module stays loaded as long.
unsafe fn launch(function: &Function, grid: Grid, stream: sys::CUstream, mut parameters: Parameters) -> Result<(), DriverError> {
    let Grid { x, y, block, cluster, shared, dependent } = grid;
    let function = function.raw;
    let mut parameters = parameters.pointers();
    if cluster == 1 && !dependent {
        // SAFETY: the caller's promise.
        return unsafe { result::launch_kernel(function, (x, y, 1), (block, 1, 1), shared, stream, &mut parameters) };
    }
    let mut attributes = [
        sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster, y: 1, z: 1 },
            },
        },
        sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        },
    ];
    let used = match (cluster > 1, dependent) {
        (true, true) => &mut attributes[..],
        (true, false) => &mut attributes[..1],
        (false, _) => &mut attributes[1..],
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
        attrs: used.as_mut_ptr(),
        numAttrs: used.len() as u32,
    };
    // SAFETY: the caller's promise; the attributes live through the call.
    unsafe { sys::cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), std::ptr::null_mut()) }.result()
}

/// As [`launch`], on `device`, whose stream it must be; an error is about trying to do `during`.
///
/// # Safety
/// As [`launch`].
pub(crate) unsafe fn enqueue(
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

/// A size as kernels take it.
///
/// # Errors
/// [`CudaError::Argument`] above 2^31 - 1.
pub(crate) fn c_int(call: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| CudaError::Argument { call, reason: format!("a size of {n} is above 2^31 - 1") })
}

/// A loaded cubin.
pub(crate) struct Module {
    raw: sys::CUmodule,
    device: Device,
}

// SAFETY: modules and functions are handles into the context, usable from any thread that has it current (every call binds it).
unsafe impl Send for Module {}
// SAFETY: as for Send; loading and unloading are the only calls that change it, and each happens once.
unsafe impl Sync for Module {}

/// A kernel, with the module that it lives in.
pub(crate) struct Function {
    raw: sys::CUfunction,
    module: Arc<Module>,
}

// SAFETY: as for Module.
unsafe impl Send for Function {}
// SAFETY: as for Module; launches only read it.
unsafe impl Sync for Function {}

impl Module {
    pub(crate) fn compile(device: &Device, cache: &CubinCache, source: &Source<'_>) -> Result<Arc<Self>> {
        let (major, minor) = device.properties().compute_capability;
        Self::compile_for(device, cache, source, &format!("sm_{major}{minor}"))
    }

    /// As [`Module::compile`], for an architecture that the device runs: `sm_90a` for all that a Hopper GPU can do, `compute_80` for what it runs
    /// of the instructions of another, which the driver translates.
    pub(crate) fn compile_for(device: &Device, cache: &CubinCache, source: &Source<'_>, arch: &str) -> Result<Arc<Self>> {
        let newest = device.properties().driver_cuda.0;
        let key = source.key(arch, nvrtc::find_nvrtc(newest)?.version);
        let cubin = cache.get_or_compile(&key, || nvrtc::compile(newest, source.name, source.text, arch, source.options))?;
        device.bind()?;
        // SAFETY: the image is a whole cubin: NVRTC's own result, or a cache file whose sum was checked; the driver checks it
        // too, and copies it.
        let raw = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(driver("load a kernel's cubin"))?;
        Ok(Arc::new(Self { raw, device: device.clone() }))
    }

    pub(crate) fn function(self: &Arc<Self>, name: &CStr) -> Result<Function> {
        self.device.bind()?;
        // SAFETY: the module is loaded and lives as long as the function (the Arc).
        let raw = unsafe { result::module::get_function(self.raw, CString::from(name)) }
            .map_err(driver("find a kernel in its cubin"))?;
        Ok(Function { raw, module: self.clone() })
    }

    /// As [`Module::function`], for a kernel that takes `bytes` of dynamic shared memory, more than the 48 KiB that need no asking.
    pub(crate) fn function_with_shared(self: &Arc<Self>, name: &CStr, bytes: usize) -> Result<Function> {
        let function = self.function(name)?;
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        function.set(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)?;
        Ok(function)
    }

    /// Reads the array of integers that the module has as the global `name`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where it is of another size than `into`.
    pub(crate) fn read_global(&self, name: &CStr, into: &mut [i32]) -> Result<()> {
        const DURING: &str = "read a value of a cubin";
        self.device.bind()?;
        // SAFETY: the module is loaded.
        let (address, bytes) = unsafe { result::module::get_global(self.raw, CString::from(name)) }.map_err(driver(DURING))?;
        if bytes != size_of_val(into) {
            let reason = format!("{name:?} has {bytes} bytes, not {}", size_of_val(into));
            return Err(CudaError::Argument { call: DURING, reason });
        }
        // SAFETY: so many bytes are there, which no kernel writes, and any bytes are integers.
        unsafe { result::memcpy_dtoh_sync(into, address) }.map_err(driver(DURING))
    }
}

impl Function {
    /// Asks for as much of a multiprocessor's cache as shared memory as there is, so that blocks of two kernels fit beside each other.
    pub(crate) fn prefer_shared(&self) -> Result<()> {
        const ALL: i32 = 100;
        self.set(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, ALL)
    }

    fn set(&self, attribute: sys::CUfunction_attribute, value: i32) -> Result<()> {
        self.module.device.bind()?;
        // SAFETY: the function is loaded and lives as long as its module, which it holds.
        unsafe { result::function::set_function_attribute(self.raw, attribute, value) }
            .map_err(driver("set how a kernel is launched"))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        self.device.bind_to_free();
        // SAFETY: loaded once, unloaded once; streams and graphs hold the kernels whose work is under way.
        if let Err(error) = unsafe { result::module::unload(self.raw) } {
            log::warn!("{}", driver("unload a kernel")(error));
        }
    }
}
