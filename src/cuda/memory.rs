//! Device memory and page-locked host memory, with handles that keep it alive, and the copies between them.
#![allow(unsafe_code)]

use super::counters::{DEVICE_ALLOCATIONS, PINNED_ALLOCATIONS, count};
use super::device::Device;
use super::error::{CudaError, Result, driver};
use cudarc::driver::{DriverError, result, sys};
use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Types that buffers hold: plain numbers, any bit pattern of which is a value.
pub trait DeviceValue: Copy + Send + Sync + 'static + sealed::Sealed {
    /// As `f32`.
    const NAME: &'static str;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! device_values {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl DeviceValue for $t { const NAME: &'static str = stringify!($t); })* };
}
device_values!(u8, i32, i64, f32, half::f16);

/// What keeps something alive that the device may use.
pub(super) type Keep = Arc<dyn Any + Send + Sync>;

/// One allocation on a device, freed with its last handle.
struct DeviceBlock {
    device: Device,
    address: sys::CUdeviceptr,
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        self.device.bind_to_free();
        // SAFETY: the address came from cuMemAlloc and is freed once, here. Streams and graphs hold the block until their
        // work is done, so nothing uses it any more.
        if let Err(error) = unsafe { result::free_sync(self.address) } {
            log::warn!("{}", driver("free device memory")(error));
        }
    }
}

/// `len` values of `T` in device memory. A clone or a [`DeviceBuffer::slice`] is the same memory, which lives as long as any of
/// them, or a stream or graph that uses it.
pub struct DeviceBuffer<T> {
    block: Arc<dyn Block>,
    address: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<T>,
}

/// Memory that the device can address.
trait Block: Any + Send + Sync {
    fn device(&self) -> &Device;
    fn keep(self: Arc<Self>) -> Keep;
    /// The host's own memory, where it is that.
    fn host(self: Arc<Self>) -> Option<Arc<HostBlock>> {
        None
    }
}

impl Block for DeviceBlock {
    fn device(&self) -> &Device {
        &self.device
    }
    fn keep(self: Arc<Self>) -> Keep {
        self
    }
}

impl Block for HostBlock {
    fn device(&self) -> &Device {
        &self.device
    }
    fn keep(self: Arc<Self>) -> Keep {
        self
    }
    fn host(self: Arc<Self>) -> Option<Arc<HostBlock>> {
        Some(self)
    }
}

impl<T: DeviceValue> DeviceBuffer<T> {
    pub(super) fn alloc(device: &Device, len: usize) -> Result<Self> {
        let bytes = byte_len::<T>(len, "alloc")?;
        device.bind()?;
        count(&DEVICE_ALLOCATIONS);
        // SAFETY: the context is current; the result is owned by the block and never read before it is written (values are
        // plain numbers, so even that would only give odd numbers). No bytes are not allowed, hence at least one.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| out_of_memory(e, device, "GPU memory", bytes))?;
        let block = Arc::new(DeviceBlock { device: device.clone(), address });
        Ok(Self { block, address, len, values: PhantomData })
    }

    /// The values of `range`, as a buffer of their own.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where the range leaves the buffer.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.len {
            let reason = format!("values {}..{} of a buffer of {}", range.start, range.end, self.len);
            return Err(CudaError::Argument { call: "slice", reason });
        }
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Ok(Self { block: self.block.clone(), address, len: range.end - range.start, values: PhantomData })
    }

    /// The same bytes as values of `U`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where the bytes are no whole number of `U`, or not aligned to one.
    pub fn cast<U: DeviceValue>(&self) -> Result<DeviceBuffer<U>> {
        let bytes = self.bytes();
        if !bytes.is_multiple_of(size_of::<U>()) || !self.address.is_multiple_of(size_of::<U>() as u64) {
            let reason = format!("{bytes} bytes at {:#x} are no {} values", self.address, U::NAME);
            return Err(CudaError::Argument { call: "cast", reason });
        }
        let len = bytes / size_of::<U>();
        Ok(DeviceBuffer { block: self.block.clone(), address: self.address, len, values: PhantomData })
    }
}

impl<T> DeviceBuffer<T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Where it lies in the device's address space. Valid while a handle lives; whoever gives it to foreign code holds one
    /// ([`super::Stream::hold`]).
    pub fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn device(&self) -> &Device {
        self.block.device()
    }

    /// What keeps the memory alive, and the host block that it is, if it is one.
    pub(super) fn keep(&self) -> (Keep, Option<Arc<HostBlock>>) {
        (self.block.clone().keep(), self.block.clone().host())
    }
}

impl<T> Clone for DeviceBuffer<T> {
    fn clone(&self) -> Self {
        Self { block: self.block.clone(), address: self.address, len: self.len, values: PhantomData }
    }
}

impl<T: DeviceValue> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer<{}>({} at {:#x})", T::NAME, self.len, self.address)
    }
}

/// How page-locked host memory is cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostMemory {
    /// As other memory: for what the host reads.
    Cached,
    /// Not cached: the device reads it faster, the host reads it very slowly. For what the host only writes.
    WriteCombined,
}

/// One page-locked host allocation.
pub(super) struct HostBlock {
    device: Device,
    start: *mut u8,
    /// Pieces of work under way that use it. Locked while the host touches the memory: work of the device begins before or after.
    in_use: Mutex<u32>,
}

// SAFETY: the memory belongs to the block until it is dropped and is page-locked for all contexts; who may touch it when is
// ruled by the lock and count of `in_use`: the host while it holds the lock and no work is under way, the device while it is counted.
unsafe impl Send for HostBlock {}
// SAFETY: as for Send; shared handles only read `start`, and reach the memory behind it through `HostBlock::touch` alone.
unsafe impl Sync for HostBlock {}

impl HostBlock {
    /// Work that uses it is about to be enqueued. Waits while the host touches the memory.
    pub(super) fn begin(&self) {
        *self.lock() += 1;
    }

    /// That work is done.
    pub(super) fn end(&self) {
        *self.lock() -= 1;
    }

    /// Lets the host touch the memory while no work of the device is under way or can begin; `None` where some is.
    fn touch<R>(&self, work: impl FnOnce(*mut u8) -> R) -> Option<R> {
        let in_use = self.lock();
        (*in_use == 0).then(|| work(self.start))
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        // Nothing panics while it is locked: the host copies plain numbers.
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        self.device.bind_to_free();
        // SAFETY: the pointer came from cuMemHostAlloc and is freed once; streams and graphs hold the block while they use it.
        if let Err(error) = unsafe { result::free_host(self.start.cast()) } {
            log::warn!("{}", driver("free pinned memory")(error));
        }
    }
}

/// `len` values of `T` in page-locked host memory, zero at first. The host reads and writes it only while no enqueued work
/// uses it: until [`super::Stream::synchronize`], [`PinnedBuffer::write`] and [`PinnedBuffer::read`] are errors.
pub struct PinnedBuffer<T> {
    block: Arc<HostBlock>,
    len: usize,
    values: PhantomData<T>,
}

impl<T: DeviceValue> PinnedBuffer<T> {
    pub(super) fn alloc(device: &Device, len: usize, kind: HostMemory) -> Result<Self> {
        let bytes = byte_len::<T>(len, "pinned")?;
        device.bind()?;
        count(&PINNED_ALLOCATIONS);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE
            | sys::CU_MEMHOSTALLOC_DEVICEMAP
            | match kind {
                HostMemory::Cached => 0,
                HostMemory::WriteCombined => sys::CU_MEMHOSTALLOC_WRITECOMBINED,
            };
        // SAFETY: the context is current; the block owns the result.
        let start = unsafe { result::malloc_host(bytes.max(1), flags) }
            .map_err(|e| out_of_memory(e, device, "pinned host memory", bytes))?
            .cast::<u8>();
        let block = HostBlock { device: device.clone(), start, in_use: Mutex::new(0) };
        // SAFETY: `bytes.max(1)` bytes were allocated just now and nobody else knows of them.
        unsafe { start.write_bytes(0, bytes.max(1)) };
        Ok(Self { block: Arc::new(block), len, values: PhantomData })
    }

    /// Writes `values` from place `at` on.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where they do not fit or enqueued work still uses the buffer.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<()> {
        self.touch("write", at, values.len(), |start| {
            // SAFETY: `start` is followed by as many values (`touch`), T is a plain number, and nobody else touches the memory
            // meanwhile. `values` cannot overlap: no slice of this memory is ever given out.
            unsafe { start.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        })
    }

    /// Writes `count` times `value` from place `at` on.
    ///
    /// # Errors
    /// As [`PinnedBuffer::write`].
    pub fn fill(&mut self, at: usize, count: usize, value: T) -> Result<()> {
        self.touch("fill", at, count, |start| {
            for i in 0..count {
                // SAFETY: as in `write`.
                unsafe { start.add(i).write(value) };
            }
        })
    }

    /// Reads `into.len()` values from place `at` on.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where there are not as many or enqueued work still uses the buffer.
    pub fn read(&self, at: usize, into: &mut [T]) -> Result<()> {
        let count = into.len();
        self.touch("read", at, count, |start| {
            // SAFETY: as in `write`.
            unsafe { start.copy_to_nonoverlapping(into.as_mut_ptr(), count) };
        })
    }

    /// The same memory as the device addresses it (over the bus, without a copy): kernels read and write it directly.
    ///
    /// # Errors
    /// What the driver says.
    pub fn mapped(&self) -> Result<DeviceBuffer<T>> {
        self.block.device.bind()?;
        let mut address = 0;
        // SAFETY: the pointer came from cuMemHostAlloc with DEVICEMAP; the call writes one address.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, self.block.start.cast(), 0) }
            .result()
            .map_err(driver("map pinned memory"))?;
        Ok(DeviceBuffer { block: self.block.clone(), address, len: self.len, values: PhantomData })
    }

    /// Lets `work` touch the `count` values from place `at` on, where they are within the buffer and no work of the device uses it.
    fn touch(&self, call: &'static str, at: usize, count: usize, work: impl FnOnce(*mut T)) -> Result<()> {
        if at.checked_add(count).is_none_or(|end| end > self.len) {
            let reason = format!("{count} values at {at} of a pinned buffer of {}", self.len);
            return Err(CudaError::Argument { call, reason });
        }
        // SAFETY: `at` is within the allocation of `len` values (checked above).
        let touched = self.block.touch(|start| work(unsafe { start.cast::<T>().add(at) }));
        touched.ok_or_else(|| {
            let reason = "work that uses this pinned buffer is under way; synchronise its stream first".to_owned();
            CudaError::Argument { call, reason }
        })
    }
}

impl<T> PinnedBuffer<T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn device(&self) -> &Device {
        &self.block.device
    }

    pub(super) fn block(&self) -> &Arc<HostBlock> {
        &self.block
    }
}

impl<T: DeviceValue> fmt::Debug for PinnedBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBuffer<{}>({})", T::NAME, self.len)
    }
}

/// Enqueues a copy of the first `count` values, page-locked host to device. The caller checked the lengths and holds both
/// until the stream is done.
pub(super) fn enqueue_to_device<T: DeviceValue>(
    from: &PinnedBuffer<T>,
    to: &DeviceBuffer<T>,
    count: usize,
    stream: sys::CUstream,
) -> Result<(), DriverError> {
    // SAFETY: `count` is at most either length (the caller, Stream, checks), both stay alive (the stream holds them), and the
    // host does not write the pinned memory meanwhile (its in_use count).
    unsafe { sys::cuMemcpyHtoDAsync_v2(to.address, from.block.start.cast(), count * size_of::<T>(), stream) }.result()
}

/// As [`enqueue_to_device`], the other way.
pub(super) fn enqueue_to_host<T: DeviceValue>(
    from: &DeviceBuffer<T>,
    to: &PinnedBuffer<T>,
    count: usize,
    stream: sys::CUstream,
) -> Result<(), DriverError> {
    // SAFETY: as in `enqueue_to_device`; the host does not read meanwhile.
    unsafe { sys::cuMemcpyDtoHAsync_v2(to.block.start.cast(), from.address, count * size_of::<T>(), stream) }.result()
}

/// Enqueues a copy of the first `count` values, device to device.
pub(super) fn enqueue_copy<T: DeviceValue>(
    from: &DeviceBuffer<T>,
    to: &DeviceBuffer<T>,
    count: usize,
    stream: sys::CUstream,
) -> Result<(), DriverError> {
    // SAFETY: `count` is at most either length (checked by Stream) and the stream holds both blocks.
    unsafe { result::memcpy_dtod_async(to.address, from.address, count * size_of::<T>(), stream) }
}

/// Enqueues setting every byte of `buffer`.
pub(super) fn enqueue_fill<T: DeviceValue>(buffer: &DeviceBuffer<T>, byte: u8, stream: sys::CUstream) -> Result<(), DriverError> {
    // SAFETY: the bytes are the buffer's own and the stream holds its block; any bit pattern is a value of T.
    unsafe { result::memset_d8_async(buffer.address, byte, buffer.bytes(), stream) }
}

/// Enqueues a copy of a host slice into `to`; the caller synchronises before the slice may change.
///
/// Not `memcpy_htod_sync`: from pageable memory that returns once the bytes are staged (CUDA driver API, "API synchronization
/// behavior"), and its transfer, on the default stream, is not ordered with kernels on non-blocking streams: a race seen on an
/// H200.
pub(super) fn enqueue_upload<T: DeviceValue>(from: &[T], to: &DeviceBuffer<T>, stream: sys::CUstream) -> Result<(), DriverError> {
    // SAFETY: the lengths were checked by Stream, which synchronises before it gives the slice back.
    unsafe { result::memcpy_htod_async(to.address, from, stream) }
}

/// Copies into a host slice and waits: the slice is the caller's again on return.
pub(super) fn download<T: DeviceValue>(from: &DeviceBuffer<T>, to: &mut [T]) -> Result<(), DriverError> {
    // SAFETY: the lengths were checked by Stream; the copy is done when the call returns; any bit pattern is a value of T.
    unsafe { result::memcpy_dtoh_sync(to, from.address) }
}

fn byte_len<T>(len: usize, call: &'static str) -> Result<usize> {
    len.checked_mul(size_of::<T>())
        .filter(|bytes| isize::try_from(*bytes).is_ok())
        .ok_or_else(|| CudaError::Argument { call, reason: format!("{len} values are more than memory can address") })
}

fn out_of_memory(error: DriverError, device: &Device, what: &'static str, asked: usize) -> CudaError {
    if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return driver("allocate memory")(error);
    }
    let (free, total) = device.memory().map_or((0, device.properties().total_memory), |m| (m.free, m.total));
    CudaError::OutOfMemory { what, asked, free, total }
}
