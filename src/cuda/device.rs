//! A GPU: opened by number, its properties, its memory, and where buffers and streams come from.

use super::error::{CudaError, Result, driver, visible_devices};
use super::library::start_driver;
use super::memory::{DeviceBuffer, DeviceValue, HostMemory, PinnedBuffer};
use super::plan::Hardware;
use super::stream::{Event, Stream};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use std::fmt;
use std::sync::Arc;

/// A GPU and its primary context. A clone is the same device; use it from any thread.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    context: Arc<CudaContext>,
    properties: Properties,
}

/// What a device is. Does not change while the process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Properties {
    /// Number as the driver counts, from 0, among the visible devices.
    pub ordinal: usize,
    /// As `NVIDIA H200`.
    pub name: String,
    /// Major and minor, as (9, 0).
    pub compute_capability: (u32, u32),
    /// Major and minor of the CUDA that the driver supports, as (13, 0).
    pub driver_cuda: (u32, u32),
    /// Bytes.
    pub total_memory: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the level 2 cache.
    pub l2_bytes: usize,
    /// Whether thread block clusters can be launched (compute capability 9.0 and up).
    pub clusters: bool,
}

/// Device memory in bytes, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// Not in use by any process.
    pub free: usize,
    /// All there is.
    pub total: usize,
}

impl Device {
    /// How many devices the driver shows (`CUDA_VISIBLE_DEVICES` hides some).
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::NoDevice`].
    pub fn count() -> Result<usize> {
        start_driver()?;
        let count = CudaContext::device_count().map_err(driver("count the devices"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens device `ordinal` and makes its primary context (which TensorRT shares).
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::NoDevice`], [`CudaError::NoSuchDevice`], or what the
    /// driver says.
    pub fn open(ordinal: usize) -> Result<Self> {
        let driver_cuda = start_driver()?;
        let count = Self::count()?;
        let visible = visible_devices();
        if count == 0 {
            return Err(CudaError::NoDevice { reason: "0 devices".to_owned(), visible });
        }
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice { ordinal, count, visible });
        }
        let context = CudaContext::new(ordinal).map_err(driver("make the device's context"))?;
        let number = |attribute| -> Result<u32> {
            let value = context.attribute(attribute).map_err(driver("read the device's properties"))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let properties = Properties {
            ordinal,
            name: context.name().map_err(driver("read the device's name"))?,
            compute_capability: (
                number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            driver_cuda,
            total_memory: context.total_mem().map_err(driver("read the device's memory size"))?,
            multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            clusters: number(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)? != 0,
        };
        Ok(Self(Arc::new(Inner { context, properties })))
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.0.properties
    }

    /// What the choice of a launch shape needs to know.
    pub fn hardware(&self) -> Hardware {
        Hardware { multiprocessors: self.0.properties.multiprocessors, clusters: self.0.properties.clusters }
    }

    /// Free and total memory now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<Memory> {
        let (free, total) = self.context().mem_get_info().map_err(driver("read the free memory"))?;
        Ok(Memory { free, total })
    }

    /// Allocates `len` values, not initialised, at least 256-byte aligned.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with the bytes asked and free.
    pub fn alloc<T: DeviceValue>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::alloc(self, len)
    }

    /// Allocates `len` page-locked host values, all zero, which the device reads and writes by itself.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with the bytes asked.
    pub fn pinned<T: DeviceValue>(&self, len: usize, kind: HostMemory) -> Result<PinnedBuffer<T>> {
        PinnedBuffer::alloc(self, len, kind)
    }

    /// A new non-blocking stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(&self) -> Result<Stream> {
        Stream::new(self)
    }

    /// A new event that keeps time.
    ///
    /// # Errors
    /// What the driver says.
    pub fn event(&self) -> Result<Event> {
        Event::new(self)
    }

    /// Waits for all work of this process on the device.
    ///
    /// # Errors
    /// [`CudaError::DeviceLost`] when some of it went wrong.
    pub fn synchronize(&self) -> Result<()> {
        self.context().synchronize().map_err(driver("wait for the device"))
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    /// Makes the context this thread's current one.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("use the device's context"))
    }

    /// Whether two handles are the same device.
    pub(crate) fn same(&self, other: &Device) -> bool {
        self.0.properties.ordinal == other.0.properties.ordinal
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.0.properties).finish()
    }
}
