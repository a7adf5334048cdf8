//! Streams: work in order, everything that it uses held until it is done; and events, which keep time.
#![allow(unsafe_code)]

use super::counters::{SYNCHRONISATIONS, count};
use super::device::Device;
use super::error::{CudaError, Result, driver};
use super::graph::Graph;
use super::held::Held;
use super::memory::{self, DeviceBuffer, DeviceValue, HostBlock, Keep, PinnedBuffer};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, result};
use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

/// A non-blocking stream. `&mut self` enqueues: one thread at a time, though it may move between threads.
///
/// Waiting ([`Stream::synchronize`]) leaves the driver's default schedule: the thread spins while the process has no more
/// contexts than the machine has cores. That costs a core while it waits and answers some 10 us sooner than sleeping would.
pub struct Stream {
    /// What enqueued work uses; let go when it is done.
    under_way: Held,
    /// What the capture under way refers to.
    capturing: Option<Held>,
    stream: Arc<CudaStream>,
    device: Device,
}

impl Stream {
    pub(super) fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let stream = device.context().new_stream().map_err(driver("make a stream"))?;
        Ok(Self { under_way: Held::default(), capturing: None, stream, device: device.clone() })
    }

    /// The device that it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The stream as CUDA's C interfaces know it (`cudaStream_t`), for foreign code that enqueues on it. What that code uses
    /// must be held with [`Stream::hold`].
    pub fn raw(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Keeps `owner` alive until the work enqueued so far is done; in a capture, as long as the graph lives.
    pub fn hold<T: Any + Send + Sync>(&mut self, owner: Arc<T>) {
        self.hold_keep(owner);
    }

    /// As [`Stream::hold`], for a buffer that foreign code was given the address of.
    pub fn hold_buffer<T: DeviceValue>(&mut self, buffer: &DeviceBuffer<T>) {
        let (keep, host) = buffer.keep();
        self.hold_keep(keep);
        if let Some(host) = host {
            self.hold_host(host);
        }
    }

    /// Enqueues a copy of the first `count` values of `from` to the start of `to`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where either is shorter or of another device.
    pub fn copy_to_device<T: DeviceValue>(&mut self, from: &PinnedBuffer<T>, to: &DeviceBuffer<T>, count: usize) -> Result<()> {
        self.check("copy_to_device", count, from.len(), to.len())?;
        self.check_device("copy_to_device", from.device())?;
        self.check_device("copy_to_device", to.device())?;
        self.device.bind()?;
        self.hold_buffer(to);
        self.hold_host(from.block().clone());
        memory::enqueue_to_device(from, to, count, self.cu()).map_err(driver("copy to the device"))
    }

    /// Enqueues a copy of the first `count` values of `from` to the start of `to`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where either is shorter or of another device.
    pub fn copy_to_host<T: DeviceValue>(&mut self, from: &DeviceBuffer<T>, to: &mut PinnedBuffer<T>, count: usize) -> Result<()> {
        self.check("copy_to_host", count, from.len(), to.len())?;
        self.check_device("copy_to_host", from.device())?;
        self.check_device("copy_to_host", to.device())?;
        self.device.bind()?;
        self.hold_buffer(from);
        self.hold_host(to.block().clone());
        memory::enqueue_to_host(from, to, count, self.cu()).map_err(driver("copy to the host"))
    }

    /// Enqueues a copy of the first `count` values within the device.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where either is shorter or of another device.
    pub fn copy<T: DeviceValue>(&mut self, from: &DeviceBuffer<T>, to: &DeviceBuffer<T>, count: usize) -> Result<()> {
        self.check("copy", count, from.len(), to.len())?;
        self.check_device("copy", from.device())?;
        self.check_device("copy", to.device())?;
        self.device.bind()?;
        self.hold_buffer(from);
        self.hold_buffer(to);
        memory::enqueue_copy(from, to, count, self.cu()).map_err(driver("copy on the device"))
    }

    /// Enqueues setting every byte of `buffer` to `byte`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for a buffer of another device.
    pub fn fill_bytes<T: DeviceValue>(&mut self, buffer: &DeviceBuffer<T>, byte: u8) -> Result<()> {
        self.check_device("fill_bytes", buffer.device())?;
        self.device.bind()?;
        self.hold_buffer(buffer);
        memory::enqueue_fill(buffer, byte, self.cu()).map_err(driver("fill device memory"))
    }

    /// Waits for the enqueued work, then copies `from` into `to`, done on return. For loading and tests; the hot path uses
    /// pinned memory.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where `to` is shorter, or within a capture; an error of earlier work.
    pub fn upload<T: DeviceValue>(&mut self, from: &[T], to: &DeviceBuffer<T>) -> Result<()> {
        self.check("upload", from.len(), from.len(), to.len())?;
        self.check_device("upload", to.device())?;
        // Also refuses within a capture, which would keep the slice's address beyond its life.
        self.synchronize()?;
        self.device.bind()?;
        self.hold_buffer(to);
        memory::enqueue_upload(from, to, self.cu()).map_err(driver("copy to the device"))?;
        self.synchronize()
    }

    /// Waits for the enqueued work, then copies the first `to.len()` values of `from` into `to`, done on return.
    ///
    /// # Errors
    /// [`CudaError::Argument`] where `from` is shorter; an error of earlier work.
    pub fn download<T: DeviceValue>(&mut self, from: &DeviceBuffer<T>, to: &mut [T]) -> Result<()> {
        self.check("download", to.len(), from.len(), to.len())?;
        self.check_device("download", from.device())?;
        self.synchronize()?;
        self.device.bind()?;
        // Held for as long as it is read: it may be host memory.
        self.hold_buffer(from);
        let copied = memory::download(from, to).map_err(driver("copy to the host"));
        self.release();
        copied
    }

    /// Enqueues taking the time.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        self.device.bind()?;
        self.hold_keep(event.0.clone());
        event.0.record(&self.stream).map_err(driver("record an event"))
    }

    /// Waits until all enqueued work is done, and lets go of what it used.
    ///
    /// # Errors
    /// [`CudaError::DeviceLost`] where the work went wrong; [`CudaError::Argument`] within a capture.
    pub fn synchronize(&mut self) -> Result<()> {
        if self.capturing.is_some() {
            return Err(CudaError::Argument { call: "synchronize", reason: "a capture cannot wait".to_owned() });
        }
        count(&SYNCHRONISATIONS);
        let _range = crate::trace::range("wait");
        self.device.bind()?;
        self.wait().map_err(driver("wait for the stream"))?;
        self.release();
        Ok(())
    }

    /// Waits for the work, whatever else went wrong before.
    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::synchronize(self.cu()) }
    }

    /// Captures what `enqueue` enqueues on this stream, instead of running it, into a graph to be launched many times.
    /// The graph freezes sizes and addresses and holds everything that it refers to.
    ///
    /// The mode is thread-local: other threads may allocate and synchronise meanwhile, `enqueue` may not.
    ///
    /// # Errors
    /// What `enqueue` says, or the driver where something in it cannot be captured.
    pub fn capture<E: From<CudaError>>(&mut self, enqueue: impl FnOnce(&mut Stream) -> Result<(), E>) -> Result<Graph, E> {
        if self.capturing.is_some() {
            return Err(CudaError::Argument { call: "capture", reason: "a capture is under way".to_owned() }.into());
        }
        const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.device.bind()?;
        // SAFETY: the stream lives; `EndCapture` ends the capture in any case.
        unsafe { result::stream::begin_capture(self.cu(), MODE) }.map_err(driver("begin a capture"))?;
        self.capturing = Some(Held::default());
        let mut guard = EndCapture { stream: self, done: false };
        let enqueued = enqueue(&mut *guard.stream);
        let graph = guard.end();
        drop(guard);
        enqueued?;
        Ok(graph?.ok_or_else(|| CudaError::Argument {
            call: "capture",
            reason: "nothing was enqueued, so there is no graph".to_owned(),
        })?)
    }

    /// Enqueues a run of `graph`, which must have been captured on this stream.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for another stream's graph, or within a capture.
    pub fn launch(&mut self, graph: &Graph) -> Result<()> {
        self.check_graph("launch", graph)?;
        let _range = crate::trace::range("launch");
        self.device.bind()?;
        for host in graph.hosts() {
            self.hold_host(host.clone());
        }
        self.hold_keep(graph.keep());
        graph.enqueue().map_err(driver("launch a graph"))
    }

    pub(super) fn check_graph(&self, call: &'static str, graph: &Graph) -> Result<()> {
        if self.capturing.is_some() || !graph.belongs_to(&self.stream) {
            let reason = "a graph is used on the stream that captured it, outside a capture".to_owned();
            return Err(CudaError::Argument { call, reason });
        }
        Ok(())
    }

    pub(crate) fn cu(&self) -> CUstream {
        self.stream.cu_stream()
    }

    pub(super) fn hold_keep(&mut self, keep: Keep) {
        let held = self.capturing.as_mut().unwrap_or(&mut self.under_way);
        // Launches in a row mostly use the same few things: once each is enough.
        if !held.keeps.iter().rev().take(8).any(|k| Arc::ptr_eq(k, &keep)) {
            held.keeps.push(keep);
        }
    }

    fn hold_host(&mut self, host: Arc<HostBlock>) {
        match &mut self.capturing {
            Some(held) => held.hosts.push(host),
            None => {
                host.begin();
                self.under_way.hosts.push(host);
            }
        }
    }

    fn release(&mut self) {
        for host in self.under_way.hosts.drain(..) {
            host.end();
        }
        self.under_way.keeps.clear();
    }

    fn check(&self, call: &'static str, count: usize, from: usize, to: usize) -> Result<()> {
        if count > from || count > to {
            return Err(CudaError::Argument { call, reason: format!("{count} values from {from} to {to}") });
        }
        Ok(())
    }

    pub(crate) fn check_device(&self, call: &'static str, device: &Device) -> Result<()> {
        if !self.device.same(device) {
            let (own, other) = (self.device.properties().ordinal, device.properties().ordinal);
            let reason = format!("a buffer of GPU {other} on a stream of GPU {own}");
            return Err(CudaError::Argument { call, reason });
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What the work uses is let go after it is done. Where waiting fails the device is lost, and no work goes on.
        self.device.bind_to_free();
        if let Err(error) = self.wait() {
            log::warn!("{}", driver("wait for the stream")(error));
        }
        self.release();
    }
}

/// Ends a capture, also where the closure panics: the stream must not stay in it.
struct EndCapture<'a> {
    stream: &'a mut Stream,
    done: bool,
}

impl EndCapture<'_> {
    fn end(&mut self) -> Result<Option<Graph>> {
        self.done = true;
        let held = self.stream.capturing.take().unwrap_or_default();
        Graph::end_capture(&self.stream.stream, &self.stream.device, held)
    }
}

impl Drop for EndCapture<'_> {
    fn drop(&mut self) {
        if !self.done {
            drop(self.end());
        }
    }
}

/// A moment on a stream.
pub struct Event(Arc<CudaEvent>);

impl Event {
    pub(super) fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let event = device.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver("make an event"))?;
        Ok(Self(Arc::new(event)))
    }

    pub(super) fn raw(&self) -> CUevent {
        self.0.cu_event()
    }

    pub(super) fn keep(&self) -> Keep {
        self.0.clone()
    }

    /// Microseconds from this event to `end`, as the GPU counted; waits for both.
    ///
    /// # Errors
    /// What the driver says, for events that were not recorded.
    pub fn micros_until(&self, end: &Event) -> Result<f32> {
        Ok(self.0.elapsed_ms(&end.0).map_err(driver("read the time between events"))? * 1000.0)
    }
}
