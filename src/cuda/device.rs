//! A GPU: opened by number, its properties, its memory, and where buffers and streams come from.
#![allow(unsafe_code)]

use super::error::{CudaError, Result, driver, visible_devices};
use super::library::start_driver;
use super::memory::{DeviceBuffer, DeviceValue, HostMemory, PinnedBuffer};
use super::stream::{Event, Stream};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, result};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A GPU and its primary context. A clone, or the same number opened again, is the same device; use it from any thread.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

/// The devices that are open in this process, by number: each has one context, and those who share a GPU share all that is counted in it.
static OPEN: Mutex<BTreeMap<usize, Weak<Inner>>> = Mutex::new(BTreeMap::new());

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
    /// Highest clock of the multiprocessors, in kHz; 0 where the driver does not tell.
    pub clock_khz: u32,
    /// Highest clock of the memory, in kHz; 0 where the driver does not tell.
    pub memory_clock_khz: u32,
    /// Width of the bus to the memory, in bits; 0 where the driver does not tell.
    pub memory_bus_bits: u32,
}

#[cfg(test)]
impl Properties {
    /// Those of no device.
    pub(crate) fn unknown() -> Self {
        Self {
            ordinal: 0,
            name: String::new(),
            compute_capability: (0, 0),
            driver_cuda: (0, 0),
            total_memory: 0,
            multiprocessors: 0,
            l2_bytes: 0,
            clusters: false,
            clock_khz: 0,
            memory_clock_khz: 0,
            memory_bus_bits: 0,
        }
    }
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

    /// Opens device `ordinal`, or takes it as it is open already, with its primary context (which TensorRT shares).
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
        // Locked while the context is made, so that two who open a device at the same time get one.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inner) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(Self(inner));
        }
        let context = CudaContext::new(ordinal).map_err(driver("make the device's context"))?;
        // SAFETY: tracking orders the streams that use a `CudaSlice`, of which this crate makes none: its buffers are put in order by the
        // one stream that they are used on. With it the first stream waits for the whole context, which breaks captures under way.
        unsafe { context.disable_event_tracking() };
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
            // For reports alone: a driver that does not know them is none the worse.
            clock_khz: number(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).unwrap_or(0),
            memory_clock_khz: number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0),
            memory_bus_bits: number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0),
        };
        let inner = Arc::new(Inner { context, properties });
        open.insert(ordinal, Arc::downgrade(&inner));
        Ok(Self(inner))
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.0.properties
    }

    /// Free and total memory now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<Memory> {
        self.bind()?;
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

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    /// Makes the context this thread's current one.
    ///
    /// In the place of cudarc's `bind_to_thread`, which does nothing but return an error that was noted when something, anything, was
    /// dropped: such an error is logged here and binds nobody's hands.
    pub(crate) fn bind(&self) -> Result<()> {
        if let Err(error) = self.context().check_err() {
            log::warn!("{}", driver("free what was no longer used")(error));
        }
        let own = self.context().cu_ctx();
        let bound = match result::ctx::get_current() {
            Ok(Some(current)) if current == own => Ok(()),
            // SAFETY: the context was made by `open` and lives as long as this value.
            Ok(_) => unsafe { result::ctx::set_current(own) },
            Err(error) => Err(error),
        };
        bound.map_err(driver("use the device's context"))
    }

    /// As [`Device::bind`] before something is freed, which is tried in any case.
    pub(crate) fn bind_to_free(&self) {
        if let Err(error) = self.bind() {
            log::warn!("while freeing GPU memory: {error}");
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn a_device_that_is_open_is_shared() {
        let open: Vec<Device> = std::thread::scope(|scope| {
            let openers: Vec<_> = (0..8).map(|_| scope.spawn(|| Device::open(0).unwrap())).collect();
            openers.into_iter().map(|opener| opener.join().unwrap()).collect()
        });
        assert!(open.iter().all(|device| Arc::ptr_eq(&device.0, &open[0].0)));
        assert!(!open[0].context().is_event_tracking());
        drop(open);
        Device::open(0).unwrap().memory().unwrap();
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn an_error_noted_of_something_dropped_hinders_nobody() {
        use cudarc::driver::DriverError;
        use cudarc::driver::sys::CUresult::CUDA_ERROR_INVALID_HANDLE;
        let device = Device::open(0).unwrap();
        let note = || device.context().record_err::<()>(Err(DriverError(CUDA_ERROR_INVALID_HANDLE)));
        let free = device.memory().unwrap().free;
        for _ in 0..8 {
            let buffer = device.alloc::<u8>(64 << 20).unwrap();
            note();
            drop(buffer);
        }
        assert!(free.abs_diff(device.memory().unwrap().free) < 64 << 20, "a block leaked");
        let mut stream = device.stream().unwrap();
        let buffer = device.alloc::<u8>(16).unwrap();
        note();
        stream.fill_bytes(&buffer, 1).unwrap();
        note();
        stream.synchronize().unwrap();
        note();
        let graph = stream.capture::<CudaError>(|stream| {
            note();
            stream.fill_bytes(&buffer, 2)?;
            note();
            Ok(())
        });
        note();
        stream.launch(&graph.unwrap()).unwrap();
        note();
        let mut bytes = [0; 16];
        stream.download(&buffer, &mut bytes).unwrap();
        assert_eq!(bytes, [2; 16]);
    }
}
