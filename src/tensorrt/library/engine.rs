//! Engines and their execution contexts: loads plans, tells what they take and give, runs them on a stream.
//!
//! Each value keeps what it needs alive: a [`Context`] its engine and buffers, an [`Engine`] its [`Runtime`], a runtime its
//! [`Library`]; and a [`Stream`] or captured graph keeps the context and buffers of the work put into it. Fields are declared
//! borrower first, because Rust drops them in that order.
#![allow(unsafe_code)]

use super::Library;
use super::builder::failure;
use super::capability::{ANOTHER_EXECUTOR, not_served};
use super::ffi::bridge;
use crate::cuda::{Device, DeviceBuffer, DeviceValue, Stream};
use crate::gpu::LayerTime;
use crate::{Error, Result};
use cxx::UniquePtr;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether a tensor goes into an engine or comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into.
    Input,
    /// Out of.
    Output,
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Element {
    F32,
    F16,
    Bf16,
    I8,
    U8,
    I32,
    I64,
    Bool,
}

/// An input or output of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoTensor {
    /// As in the ONNX graph.
    pub name: String,
    /// In or out.
    pub direction: Direction,
    /// Its type in device memory. Inputs that are int64 in the graph are [`Element::I32`] with TensorRT 8.6.
    pub element: Element,
    /// Row-major; -1 where dynamic.
    pub shape: Vec<i64>,
    /// TensorRT's words for the memory layout.
    pub format: String,
}

/// What one profile lets an input be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProfileRange {
    /// Index into [`Engine::io`].
    pub tensor: usize,
    /// Smallest shape.
    pub min: Vec<i64>,
    /// The shape tuned for.
    pub opt: Vec<i64>,
    /// Largest shape.
    pub max: Vec<i64>,
}

/// TensorRT's runtime on one device.
pub struct Runtime {
    runtime: UniquePtr<bridge::Runtime>,
    device: Device,
    library: Arc<Library>,
}

/// A loaded engine. Shared by the contexts that run it.
pub struct Engine {
    engine: UniquePtr<bridge::Engine>,
    io: Vec<IoTensor>,
    profiles: Vec<Vec<ProfileRange>>,
    runtime: Arc<Runtime>,
}

/// An engine at one profile, with the device memory it reads and writes. One thread at a time, always on the same stream.
pub struct Context {
    running: Arc<Running>,
    /// Of each tensor, by its place in [`Engine::io`].
    buffers: Vec<Option<DeviceBuffer<u8>>>,
    scratch: Option<DeviceBuffer<u8>>,
    stream: usize,
    profile: usize,
}

/// What enqueued work uses of a context: held by the stream until the work is done, by a captured graph as long as it lives.
struct Running {
    /// Locked by the one [`Context`] that owns it; the others that hold it only keep it alive.
    context: Mutex<UniquePtr<bridge::Context>>,
    engine: Arc<Engine>,
}

impl Runtime {
    /// Starts TensorRT's runtime on `device`.
    ///
    /// # Errors
    /// [`Error::TensorRt`].
    pub fn new(library: &Arc<Library>, device: &Device) -> Result<Arc<Self>> {
        device.bind()?;
        let runtime = library.handle().create_runtime().map_err(|exception| failure("start its runtime", &exception))?;
        Ok(Arc::new(Self { runtime, device: device.clone(), library: Arc::clone(library) }))
    }

    /// Why `plan` was not loaded.
    fn refusal(&self, action: &'static str, plan: &[u8], exception: &cxx::Exception) -> Error {
        if !self.runtime.is_for_another_gpu(plan) {
            return failure(action, exception);
        }
        // TensorRT's own words, behind which nothing else stands on the line: "Supported compute capabilities: 8.0 8.6 >12.0".
        let said = exception.what().split_once("Supported compute capabilities: ").and_then(|(_, list)| list.lines().next());
        let served = said.map_or_else(|| "other GPUs".to_owned(), |list| list.trim().to_owned());
        let next = match self.library.check_device(&self.device) {
            Ok(()) => "Build it for this GPU's compute capability.",
            Err(_) => ANOTHER_EXECUTOR,
        };
        let properties = self.device.properties();
        not_served("the engine".into(), properties.name.clone(), properties.compute_capability.into(), served, next)
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The library behind it.
    pub fn library(&self) -> &Arc<Library> {
        &self.library
    }
}

impl Engine {
    /// Loads `plan` onto the device.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for a plan of another TensorRT or GPU, a damaged one, or one whose tensors are not plain device memory;
    /// [`Error::GpuNotServed`] where TensorRT for RTX says that the plan is for other GPUs.
    ///
    /// # Safety
    /// `plan` is as TensorRT's builder gave it, which trusts a plan's inside: one that was made up may do anything.
    pub unsafe fn deserialize(runtime: &Arc<Runtime>, plan: &[u8]) -> Result<Arc<Self>> {
        const ACTION: &str = "load the engine";
        runtime.device.bind()?;
        let engine = runtime.runtime.deserialize(plan).map_err(|exception| runtime.refusal(ACTION, plan, &exception))?;
        let io: Vec<IoTensor> = engine
            .io()
            .map_err(|exception| failure(ACTION, &exception))?
            .into_iter()
            .map(IoTensor::try_from)
            .collect::<Result<_>>()?;
        let mut profiles = vec![Vec::new(); engine.profile_count() as usize];
        for range in engine.profiles().map_err(|exception| failure(ACTION, &exception))? {
            let tensor = io.iter().position(|tensor| tensor.name == range.tensor);
            if let (Some(tensor), Some(profile)) = (tensor, profiles.get_mut(range.profile as usize)) {
                profile.push(ProfileRange { tensor, min: range.min, opt: range.opt, max: range.max });
            }
        }
        Ok(Arc::new(Self { engine, io, profiles, runtime: Arc::clone(runtime) }))
    }

    /// Takes the kernels that [`Engine::kernels`] of the same plan gave earlier, so that contexts need not compile them. False where they are
    /// another version's, driver's or GPU's, and with all but TensorRT for RTX, which alone compiles at load.
    pub(crate) fn load_kernels(&self, bytes: &[u8]) -> bool {
        self.engine.load_kernels(bytes)
    }

    /// The kernels that contexts of this engine have compiled; empty with all but TensorRT for RTX.
    ///
    /// # Errors
    /// [`Error::TensorRt`].
    pub(crate) fn kernels(&self) -> Result<Vec<u8>> {
        self.engine.kernels().map_err(|exception| failure("keep the compiled kernels", &exception))
    }

    /// Inputs and outputs. Their places here are how a context names them.
    pub fn io(&self) -> &[IoTensor] {
        &self.io
    }

    /// The place of the tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<usize> {
        self.io.iter().position(|tensor| tensor.name == name)
    }

    /// The range of each input in each profile, in the order they were built in.
    pub fn profiles(&self) -> &[Vec<ProfileRange>] {
        &self.profiles
    }

    /// Layers after TensorRT's fusions, over all profiles.
    pub fn layer_count(&self) -> usize {
        self.engine.layer_count() as usize
    }

    /// Device memory that a context at `profile` needs for intermediate results, in bytes. (TensorRT 8.6 tells only the largest
    /// profile's.)
    ///
    /// # Errors
    /// [`Error::TensorRt`] where there is no such profile.
    pub fn scratch_bytes(&self, profile: usize) -> Result<usize> {
        const ACTION: &str = "tell its scratch memory";
        let bytes = self.engine.scratch_bytes(index(profile)).map_err(|exception| failure(ACTION, &exception))?;
        usize::try_from(bytes).map_err(|_| Error::TensorRt {
            action: ACTION,
            reason: format!("{bytes} bytes do not fit this machine's addresses"),
            next: "Build with smaller profiles.",
        })
    }

    /// TensorRT's description of the layers, as JSON; types and tactics where the engine was built with
    /// [`LayerDetails::Full`](super::LayerDetails::Full).
    ///
    /// # Errors
    /// [`Error::TensorRt`].
    pub fn layers_json(&self) -> Result<String> {
        self.engine.layers_json().map_err(|exception| failure("describe the layers", &exception))
    }

    /// The runtime behind it.
    pub fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    /// A context at `profile` that works on `stream`, with every input at the profile's largest shape. Waits for the stream.
    ///
    /// `scratch` is device memory for intermediate results, at least [`Engine::scratch_bytes`], which contexts on one stream may
    /// share, because their work follows one another; without it TensorRT allocates its own.
    ///
    /// # Errors
    /// [`Error::TensorRt`], also for scratch that is too small; [`Error::Cuda`].
    ///
    /// # Safety
    /// Whenever the context runs, its inputs hold what its graph was made for: ids within the embedding table. An id is a place in memory, which
    /// TensorRT does not check.
    pub unsafe fn create_context(
        self: &Arc<Self>,
        profile: usize,
        stream: &mut Stream,
        scratch: Option<DeviceBuffer<u8>>,
    ) -> Result<Context> {
        const ACTION: &str = "create an execution context";
        let failed = |exception: cxx::Exception| failure(ACTION, &exception);
        let ranges = self.profiles.get(profile).ok_or_else(|| {
            misuse(ACTION, format!("the engine has {} profiles, number {profile} was asked for", self.profiles.len()))
        })?;
        self.check_device(ACTION, stream.device())?;
        if let Some(scratch) = &scratch {
            self.check_buffer(ACTION, scratch, self.scratch_bytes(profile)?)?;
        }
        self.runtime.device.bind()?;
        let owner = if scratch.is_some() { bridge::Scratch::Given } else { bridge::Scratch::Own };
        let mut raw = self.engine.create_context(owner).map_err(failed)?;
        if let Some(scratch) = &scratch {
            raw.pin_mut().set_scratch(address(scratch), scratch.bytes()).map_err(failed)?;
        }
        let running = Arc::new(Running { context: Mutex::new(raw), engine: Arc::clone(self) });
        stream.hold(Arc::clone(&running));
        let number = stream.raw() as usize;
        running.lock().pin_mut().set_profile(index(profile), number).map_err(failed)?;
        stream.synchronize()?;
        for range in ranges {
            running.lock().pin_mut().set_input_shape(index(range.tensor), &range.max).map_err(failed)?;
        }
        Ok(Context { running, buffers: vec![None; self.io.len()], scratch, stream: number, profile })
    }

    fn check_device(&self, action: &'static str, device: &Device) -> Result<()> {
        if self.runtime.device.same(device) {
            return Ok(());
        }
        let (own, other) = (self.runtime.device.properties().ordinal, device.properties().ordinal);
        Err(misuse(action, format!("the engine is on GPU {own}, this is on GPU {other}")))
    }

    /// TensorRT wants addresses aligned to 256 bytes.
    fn check_buffer<T: DeviceValue>(&self, action: &'static str, buffer: &DeviceBuffer<T>, needed: usize) -> Result<()> {
        self.check_device(action, buffer.device())?;
        if buffer.bytes() >= needed && buffer.address().is_multiple_of(256) {
            return Ok(());
        }
        Err(misuse(action, format!("{buffer:?} was given, {needed} bytes at a multiple of 256 are needed")))
    }
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, UniquePtr<bridge::Context>> {
        // A panic while it was locked came from this crate, before or after a call of TensorRT.
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running {
    // TensorRT frees memory on the device that is current.
    fn drop(&mut self) {
        self.engine.runtime.device.bind_to_free();
    }
}

impl Drop for Engine {
    // As for Running.
    fn drop(&mut self) {
        self.runtime.device.bind_to_free();
    }
}

impl Context {
    /// The engine that it runs.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.running.engine
    }

    /// The profile that it was made for.
    pub fn profile(&self) -> usize {
        self.profile
    }

    /// Sets the shape of an input for the next runs.
    ///
    /// # Errors
    /// [`Error::OutsideProfile`] for a shape that the profile does not serve; [`Error::TensorRt`].
    pub fn set_input_shape(&mut self, tensor: usize, shape: &[i64]) -> Result<()> {
        let ranges = self.engine().profiles.get(self.profile).map(Vec::as_slice).unwrap_or_default();
        if let Some(range) = ranges.iter().find(|range| range.tensor == tensor)
            && !range.holds(shape)
        {
            let write = |dims: &[i64]| dims.iter().map(i64::to_string).collect::<Vec<_>>().join("x");
            return Err(Error::OutsideProfile {
                shape: write(shape),
                profiles: format!("{}:{}:{}", write(&range.min), write(&range.opt), write(&range.max)),
            });
        }
        self.running
            .lock()
            .pin_mut()
            .set_input_shape(index(tensor), shape)
            .map_err(|exception| failure("set an input's shape", &exception))
    }

    /// A tensor's shape at the present input shapes; -1 where TensorRT does not know it.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for a tensor that does not exist.
    pub fn shape(&self, tensor: usize) -> Result<Vec<i64>> {
        self.running.lock().shape(index(tensor)).map_err(|exception| failure("tell a tensor's shape", &exception))
    }

    /// Lets a tensor live in `buffer`, aligned to 256 bytes, until another takes its place.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for a tensor that does not exist, or a buffer of another device, empty or not aligned.
    pub fn set_buffer<T: DeviceValue>(&mut self, tensor: usize, buffer: &DeviceBuffer<T>) -> Result<()> {
        const ACTION: &str = "use a tensor's buffer";
        self.engine().check_buffer(ACTION, buffer, 1)?;
        let bytes = buffer.cast::<u8>()?;
        self.running
            .lock()
            .pin_mut()
            .set_address(index(tensor), address(buffer), buffer.bytes())
            .map_err(|exception| failure(ACTION, &exception))?;
        if let Some(place) = self.buffers.get_mut(tensor) {
            *place = Some(bytes);
        }
        Ok(())
    }

    /// Puts one run onto the stream, or into the graph that the stream captures.
    ///
    /// Run once and synchronise before capturing: the first run at a shape sets things up that cannot be captured.
    ///
    /// # Errors
    /// [`Error::TensorRt`], also for a buffer that is too small for its tensor's present shape, and for another stream than the
    /// context was made with.
    pub fn enqueue(&mut self, stream: &mut Stream) -> Result<()> {
        self.hold(stream)?;
        let mut context = self.running.lock();
        context.pin_mut().enqueue(self.stream).map_err(|exception| failure("run the engine", &exception))
    }

    /// Runs once and gives the time of each layer, in order. The context is slower from then on and cannot be captured: make one
    /// for this alone.
    ///
    /// # Errors
    /// As [`Context::enqueue`].
    pub fn measure_layers(&mut self, stream: &mut Stream) -> Result<Vec<LayerTime>> {
        self.hold(stream)?;
        let rows = self
            .running
            .lock()
            .pin_mut()
            .enqueue_profiled(self.stream)
            .map_err(|exception| failure("measure the layers", &exception))?;
        stream.synchronize()?;
        Ok(rows.into_iter().map(|row| LayerTime::new(row.name, row.milliseconds)).collect())
    }

    /// Lets the stream keep alive all that the next run uses, before it may use it.
    fn hold(&self, stream: &mut Stream) -> Result<()> {
        if stream.raw() as usize != self.stream {
            return Err(misuse("run the engine", "the context belongs to another stream".into()));
        }
        stream.device().bind()?;
        stream.hold(Arc::clone(&self.running));
        for buffer in self.buffers.iter().flatten().chain(&self.scratch) {
            stream.hold_buffer(buffer);
        }
        Ok(())
    }
}

impl ProfileRange {
    /// Whether a tensor of `shape` lies within.
    pub fn holds(&self, shape: &[i64]) -> bool {
        shape.len() == self.min.len()
            && shape.len() == self.max.len()
            && shape.iter().zip(&self.min).zip(&self.max).all(|((value, min), max)| (min..=max).contains(&value))
    }
}

impl TryFrom<bridge::IoTensor> for IoTensor {
    type Error = Error;

    fn try_from(tensor: bridge::IoTensor) -> Result<Self> {
        let refused = |what: &str| Error::TensorRt {
            action: "load the engine",
            reason: format!("tensor {} {what}", tensor.name),
            next: "Build an engine from a graph that this crate exported.",
        };
        let element = match tensor.element {
            bridge::Element::F32 => Element::F32,
            bridge::Element::F16 => Element::F16,
            bridge::Element::Bf16 => Element::Bf16,
            bridge::Element::I8 => Element::I8,
            bridge::Element::U8 => Element::U8,
            bridge::Element::I32 => Element::I32,
            bridge::Element::I64 => Element::I64,
            bridge::Element::Bool => Element::Bool,
            _ => return Err(refused("has a type that no encoder has")),
        };
        if tensor.on_host {
            return Err(refused("lives in host memory"));
        }
        if !tensor.linear {
            return Err(refused(&format!("is not row-major but {}", tensor.format)));
        }
        let direction = if tensor.is_input { Direction::Input } else { Direction::Output };
        Ok(Self { name: tensor.name, direction, element, shape: tensor.shape, format: tensor.format })
    }
}

/// An index for the bridge. One beyond its range names no tensor or profile there either.
fn index(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Addresses of 64-bit devices; the bridge refuses none, TensorRT refuses 0.
fn address<T>(buffer: &DeviceBuffer<T>) -> usize {
    usize::try_from(buffer.address()).unwrap_or(0)
}

pub(in crate::tensorrt) fn misuse(action: &'static str, reason: String) -> Error {
    Error::TensorRt { action, reason, next: "This is a fault of trt-embed: please report it." }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Runtime").field("library", &self.library).finish_non_exhaustive()
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Engine").field("io", &self.io).field("profiles", &self.profiles).finish_non_exhaustive()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Context").field("profile", &self.profile).finish_non_exhaustive()
    }
}
