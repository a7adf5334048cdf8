//! Engines and their execution contexts: loads plans, tells what they take and give, runs them on a stream.
//!
//! Each value keeps what it needs alive: a [`Context`] its engine, stream and device memory, an [`Engine`] its [`Runtime`], a
//! runtime its [`Library`]. Fields are declared borrower first, because Rust drops them in that order.

use super::builder::failure;
use super::ffi::bridge;
use super::library::{CudaReady, Library};
use crate::{Error, Result};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use cxx::UniquePtr;
use std::fmt;
use std::sync::Arc;

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

/// The time that one layer took.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerTime {
    /// TensorRT's name: the ONNX nodes fused into it.
    pub name: String,
    /// Milliseconds.
    pub milliseconds: f32,
}

pub(crate) mod sealed {
    /// Keeps [`super::DeviceMemory`] to types of which this crate knows that they own what they name.
    pub trait Sealed {}
}

/// Device memory that lives as long as its owner.
pub trait DeviceMemory: sealed::Sealed + Send + Sync {
    /// Device address of the first byte.
    fn address(&self) -> u64;
    /// Size in bytes.
    fn bytes(&self) -> usize;
}

impl<T: Send + Sync> sealed::Sealed for CudaSlice<T> {}

impl<T: Send + Sync> DeviceMemory for CudaSlice<T> {
    fn address(&self) -> u64 {
        self.device_ptr(self.stream()).0
    }

    fn bytes(&self) -> usize {
        self.num_bytes()
    }
}

/// TensorRT's runtime on one device.
pub struct Runtime {
    runtime: UniquePtr<bridge::Runtime>,
    cuda: CudaReady,
    library: Arc<Library>,
}

/// A loaded engine. Shared by the contexts that run it.
pub struct Engine {
    engine: UniquePtr<bridge::Engine>,
    io: Vec<IoTensor>,
    profiles: Vec<Vec<ProfileRange>>,
    runtime: Arc<Runtime>,
}

/// An engine at one profile on one stream, with the device memory it reads and writes.
///
/// `Send`, not `Sync`: one thread at a time.
pub struct Context {
    context: UniquePtr<bridge::Context>,
    /// All that was ever handed to the context: work in flight and captured graphs may still use it.
    memory: Vec<Arc<dyn DeviceMemory>>,
    stream: Arc<CudaStream>,
    profile: usize,
    engine: Arc<Engine>,
}

impl Runtime {
    /// Starts TensorRT's runtime on the device of `cuda`.
    ///
    /// # Errors
    /// [`Error::TensorRt`].
    pub fn new(library: &Arc<Library>, cuda: &CudaReady) -> Result<Arc<Self>> {
        cuda.bind()?;
        let runtime = library.handle().create_runtime().map_err(|exception| failure("start its runtime", &exception))?;
        Ok(Arc::new(Self { runtime, cuda: cuda.clone(), library: Arc::clone(library) }))
    }

    /// The library behind it.
    pub fn library(&self) -> &Arc<Library> {
        &self.library
    }
}

impl Engine {
    /// Loads `plan` onto the device. Check where it comes from first: TensorRT trusts a plan's inside.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for a plan of another TensorRT or GPU, a damaged one, or one whose tensors are not plain device memory.
    pub fn deserialize(runtime: &Arc<Runtime>, plan: &[u8]) -> Result<Arc<Self>> {
        const ACTION: &str = "load the engine";
        runtime.cuda.bind()?;
        let engine = runtime.runtime.deserialize(plan).map_err(|exception| failure(ACTION, &exception))?;
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

    /// Inputs and outputs. Their places here are how a [`Context`] names them.
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

    /// A context at `profile` that works on `stream`, with every input at the profile's largest shape.
    ///
    /// `scratch` is device memory for intermediate results, at least [`Engine::scratch_bytes`], which contexts that never run at
    /// the same time may share; without it TensorRT allocates its own.
    ///
    /// # Errors
    /// [`Error::TensorRt`], also for scratch that is too small.
    pub fn create_context(
        self: &Arc<Self>,
        profile: usize,
        stream: &Arc<CudaStream>,
        scratch: Option<Arc<dyn DeviceMemory>>,
    ) -> Result<Context> {
        const ACTION: &str = "create an execution context";
        let refused = |reason: String| Error::TensorRt { action: ACTION, reason, next: "This is a fault of trt-embed: please report it." };
        let failed = |exception: cxx::Exception| failure(ACTION, &exception);
        let Some(ranges) = self.profiles.get(profile) else {
            return Err(refused(format!("the engine has {} profiles, number {profile} was asked for", self.profiles.len())));
        };
        self.runtime.cuda.bind()?;
        let owner = if scratch.is_some() { bridge::Scratch::Given } else { bridge::Scratch::Own };
        let context = self.engine.create_context(owner).map_err(failed)?;
        let mut context =
            Context { context, memory: Vec::new(), stream: Arc::clone(stream), profile, engine: Arc::clone(self) };
        if let Some(scratch) = scratch {
            let needed = self.scratch_bytes(profile)?;
            check_memory(scratch.as_ref(), needed).map_err(refused)?;
            context.context.pin_mut().set_scratch(address(scratch.as_ref()), scratch.bytes()).map_err(failed)?;
            context.memory.push(scratch);
        }
        let stream = context.raw_stream();
        context.context.pin_mut().set_profile(index(profile), stream).map_err(failed)?;
        context.synchronize()?;
        for range in ranges {
            context.context.pin_mut().set_input_shape(index(range.tensor), &range.max).map_err(failed)?;
        }
        Ok(context)
    }
}

impl Context {
    /// The engine that it runs.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The profile that it was made for.
    pub fn profile(&self) -> usize {
        self.profile
    }

    /// The stream that it works on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Sets the shape of an input for the next runs.
    ///
    /// # Errors
    /// [`Error::OutsideProfile`] for a shape that the profile does not serve; [`Error::TensorRt`].
    pub fn set_input_shape(&mut self, tensor: usize, shape: &[i64]) -> Result<()> {
        let ranges = self.engine.profiles.get(self.profile).map(Vec::as_slice).unwrap_or_default();
        if let Some(range) = ranges.iter().find(|range| range.tensor == tensor)
            && !range.holds(shape)
        {
            let write = |dims: &[i64]| dims.iter().map(i64::to_string).collect::<Vec<_>>().join("x");
            return Err(Error::OutsideProfile {
                shape: write(shape),
                profiles: format!("{}:{}:{}", write(&range.min), write(&range.opt), write(&range.max)),
            });
        }
        self.context
            .pin_mut()
            .set_input_shape(index(tensor), shape)
            .map_err(|exception| failure("set an input's shape", &exception))
    }

    /// A tensor's shape at the present input shapes; -1 where TensorRT does not know it.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for a tensor that does not exist.
    pub fn shape(&self, tensor: usize) -> Result<Vec<i64>> {
        self.context.shape(index(tensor)).map_err(|exception| failure("tell a tensor's shape", &exception))
    }

    /// Lets a tensor live in `memory`, which the context then keeps alive. It must be aligned to 256 bytes.
    ///
    /// # Errors
    /// [`Error::TensorRt`].
    pub fn set_memory(&mut self, tensor: usize, memory: &Arc<dyn DeviceMemory>) -> Result<()> {
        const ACTION: &str = "use a tensor's memory";
        check_memory(memory.as_ref(), 1).map_err(|reason| Error::TensorRt {
            action: ACTION,
            reason,
            next: "This is a fault of trt-embed: please report it.",
        })?;
        if !self.memory.iter().any(|kept| Arc::ptr_eq(kept, memory)) {
            self.memory.push(Arc::clone(memory));
        }
        self.context
            .pin_mut()
            .set_address(index(tensor), address(memory.as_ref()), memory.bytes())
            .map_err(|exception| failure(ACTION, &exception))
    }

    /// Puts one run onto the stream, or into the graph that the stream captures. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::TensorRt`], also for memory that is too small for a tensor's present shape.
    pub fn enqueue(&mut self) -> Result<()> {
        self.engine.runtime.cuda.bind()?;
        let stream = self.raw_stream();
        self.context.pin_mut().enqueue(stream).map_err(|exception| failure("run the engine", &exception))
    }

    /// Runs once and gives the time of each layer, in order. The context is slower from then on and cannot be captured: make one
    /// for this alone.
    ///
    /// # Errors
    /// As [`Context::enqueue`].
    pub fn measure_layers(&mut self) -> Result<Vec<LayerTime>> {
        self.engine.runtime.cuda.bind()?;
        let stream = self.raw_stream();
        let rows = self
            .context
            .pin_mut()
            .enqueue_profiled(stream)
            .map_err(|exception| failure("measure the layers", &exception))?;
        self.synchronize()?;
        Ok(rows.into_iter().map(|row| LayerTime { name: row.name, milliseconds: row.milliseconds }).collect())
    }

    fn raw_stream(&self) -> usize {
        self.stream.cu_stream() as usize
    }

    fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| Error::TensorRt {
            action: "finish its work on the GPU",
            reason: error.to_string(),
            next: "`nvidia-smi` shows whether the GPU still answers.",
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Work in flight reads the context's memory, which goes next.
        if let Err(error) = self.engine.runtime.cuda.bind().and_then(|()| self.synchronize()) {
            log::warn!("while closing an execution context: {error}");
        }
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
            next: "Build an engine from a graph exported by `trt-embed export`.",
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

fn address(memory: &dyn DeviceMemory) -> usize {
    // Checked by `check_memory`.
    usize::try_from(memory.address()).unwrap_or(0)
}

/// TensorRT wants addresses aligned to 256 bytes.
fn check_memory(memory: &dyn DeviceMemory, needed: usize) -> Result<(), String> {
    match usize::try_from(memory.address()) {
        Ok(address) if address != 0 && address % 256 == 0 && memory.bytes() >= needed => Ok(()),
        _ => Err(format!(
            "{} bytes at device address {:#x} were given, {needed} bytes aligned to 256 are needed",
            memory.bytes(),
            memory.address()
        )),
    }
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
