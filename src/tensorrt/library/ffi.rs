//! The bridge to `cpp/tensorrt.cc`: the only place where Rust and TensorRT meet.
//!
//! TensorRT renumbers its enums between major versions, so their integers never cross: the enums below are this crate's own.
#![allow(unsafe_code)]

use crate::Progress;

/// Carries progress out of a build and the wish to stop into it.
pub(in crate::tensorrt) struct BuildWatch<'a>(pub &'a dyn Progress);

impl BuildWatch<'_> {
    fn phase_started(&self, phase: String, parent: String, steps: i32) {
        let parent = if parent.is_empty() { None } else { Some(parent.as_str()) };
        self.0.phase_started(&phase, parent, u32::try_from(steps).unwrap_or(0));
    }

    fn step_done(&self, phase: String, step: i32) {
        self.0.step_done(&phase, u32::try_from(step).unwrap_or(0));
    }

    fn phase_finished(&self, phase: String) {
        self.0.phase_finished(&phase);
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

fn level(severity: bridge::Severity) -> log::Level {
    match severity {
        bridge::Severity::Error => log::Level::Error,
        // What it warns of when it builds (int64 indices, weights that fp16 rounds) is no fault, and the parity gate sees what matters.
        bridge::Severity::Warning => log::Level::Info,
        // Its information is a page for every load.
        bridge::Severity::Information => log::Level::Debug,
        _ => log::Level::Trace,
    }
}

fn is_logged(severity: bridge::Severity) -> bool {
    log::log_enabled!(target: "trt_embed::tensorrt", level(severity))
}

fn log_message(severity: bridge::Severity, message: String) {
    log::log!(target: "trt_embed::tensorrt", level(severity), "{message}");
}

#[cxx::bridge(namespace = "trt_embed")]
pub(super) mod bridge {
    enum Severity {
        Error,
        Warning,
        Information,
        Verbose,
    }

    #[derive(Debug)]
    enum Element {
        F32,
        F16,
        Bf16,
        I8,
        U8,
        I32,
        I64,
        Bool,
        Other,
    }

    /// Who allocates a context's device memory for intermediate results.
    enum Scratch {
        Own,
        Given,
    }

    /// What an engine's arithmetic may use.
    #[derive(Debug)]
    enum Arithmetic {
        Fp32,
        Fp16,
        Int8,
    }

    #[derive(Debug)]
    struct Version {
        /// TensorRT for RTX, which counts its versions by itself.
        rtx: bool,
        major: u32,
        minor: u32,
        patch: u32,
    }

    /// A GPU's compute capability.
    struct Capability {
        major: u32,
        minor: u32,
    }

    /// `[batch, seq]` of every input.
    struct Range {
        min: [i64; 2],
        opt: [i64; 2],
        max: [i64; 2],
    }

    struct BuildRequest<'a> {
        onnx: &'a [u8],
        /// Where the bytes come from, for tensors stored beside the file; empty without such tensors.
        onnx_path: String,
        arithmetic: Arithmetic,
        profiles: Vec<Range>,
        /// 0: TensorRT's default.
        workspace_bytes: usize,
        /// Below 0: TensorRT's default.
        optimization_level: i32,
        /// Below 0: TensorRT's default.
        auxiliary_streams: i32,
        detailed_layers: bool,
        /// Layers whose name contains one of these compute in fp32.
        fp32_layers: Vec<String>,
        /// For TensorRT for RTX: none for all that it knows and newer ones. Not looked at elsewhere.
        capabilities: Vec<Capability>,
        /// Not looked at by TensorRT for RTX, which times nothing.
        timing_cache: &'a [u8],
    }

    #[derive(Debug)]
    struct IoTensor {
        name: String,
        is_input: bool,
        /// In host memory (a shape tensor).
        on_host: bool,
        element: Element,
        /// -1 where dynamic.
        shape: Vec<i64>,
        /// Row-major, neither vectorised nor padded.
        linear: bool,
        /// TensorRT's own words for the memory layout.
        format: String,
    }

    #[derive(Debug)]
    struct InputRange {
        profile: u32,
        tensor: String,
        min: Vec<i64>,
        opt: Vec<i64>,
        max: Vec<i64>,
    }

    #[derive(Debug)]
    struct LayerTime {
        name: String,
        milliseconds: f32,
    }

    extern "Rust" {
        type BuildWatch<'a>;
        fn phase_started(self: &BuildWatch, phase: String, parent: String, steps: i32);
        fn step_done(self: &BuildWatch, phase: String, step: i32);
        fn phase_finished(self: &BuildWatch, phase: String);
        fn cancelled(self: &BuildWatch) -> bool;

        fn is_logged(severity: Severity) -> bool;
        fn log_message(severity: Severity, message: String);
    }

    // SAFETY (`unsafe extern`): each function checks what it is given and reports by exception, so a call with any values is
    // sound, save for two promises that the safe types around it keep: `Context` (engine.rs) takes addresses only of buffers
    // and streams that then hold what they use, and `create_runtime` and `create_builder` are called with an open `Device` at hand, but
    // with TensorRT for RTX, which needs neither driver nor GPU for them.
    unsafe extern "C++" {
        include!("trt-embed/cpp/tensorrt.h");

        type Library;
        fn open_library(path: &str) -> Result<UniquePtr<Library>>;
        fn header_version() -> Version;
        fn ahead_of_time_capabilities() -> Vec<Capability>;
        fn raw_version(self: &Library) -> i32;
        fn path(self: &Library) -> String;
        /// TensorRT 8.6 dereferences null here without a usable CUDA driver.
        fn create_runtime(self: &Library) -> Result<UniquePtr<Runtime>>;
        fn create_builder(self: &Library) -> Result<UniquePtr<Builder>>;

        type ParserLibrary;
        fn open_parser(path: &str) -> Result<UniquePtr<ParserLibrary>>;
        /// Does not return.
        fn end_process(status: i32);

        type Builder;
        fn build(self: &Builder, parser: &ParserLibrary, request: &BuildRequest, watch: &BuildWatch) -> Result<UniquePtr<Plan>>;

        type Plan;
        fn bytes(self: &Plan) -> &[u8];
        fn timing_cache(self: &Plan) -> &[u8];

        type Runtime;
        fn deserialize(self: &Runtime, plan: &[u8]) -> Result<UniquePtr<Engine>>;
        fn is_for_another_gpu(self: &Runtime, plan: &[u8]) -> bool;

        type Engine;
        fn io(self: &Engine) -> Result<Vec<IoTensor>>;
        fn profiles(self: &Engine) -> Result<Vec<InputRange>>;
        fn profile_count(self: &Engine) -> u32;
        fn layer_count(self: &Engine) -> u32;
        fn scratch_bytes(self: &Engine, profile: u32) -> Result<u64>;
        fn layers_json(self: &Engine) -> Result<String>;
        fn create_context(self: &Engine, scratch: Scratch) -> Result<UniquePtr<Context>>;
        fn load_kernels(self: &Engine, bytes: &[u8]) -> bool;
        fn kernels(self: &Engine) -> Result<Vec<u8>>;

        type Context;
        fn set_scratch(self: Pin<&mut Context>, address: usize, bytes: usize) -> Result<()>;
        fn set_profile(self: Pin<&mut Context>, profile: u32, stream: usize) -> Result<()>;
        fn set_input_shape(self: Pin<&mut Context>, tensor: u32, shape: &[i64]) -> Result<()>;
        fn shape(self: &Context, tensor: u32) -> Result<Vec<i64>>;
        fn set_address(self: Pin<&mut Context>, tensor: u32, address: usize, bytes: usize) -> Result<()>;
        fn enqueue(self: Pin<&mut Context>, stream: usize) -> Result<()>;
        fn enqueue_profiled(self: Pin<&mut Context>, stream: usize) -> Result<Vec<LayerTime>>;
    }
}

// SAFETY: a Library is two function pointers and a version, written once before the value is shared; the library is never
// unloaded.
unsafe impl Send for bridge::Library {}
// SAFETY: as for Send; its methods only read, and TensorRT's factories may be called from any thread.
unsafe impl Sync for bridge::Library {}

// SAFETY: a ParserLibrary is one function pointer, written once before the value is shared.
unsafe impl Send for bridge::ParserLibrary {}
// SAFETY: as for Send; a build reads the pointer and makes a parser of its own with it.
unsafe impl Sync for bridge::ParserLibrary {}

// SAFETY: TensorRT ties no runtime to the thread that made it.
unsafe impl Send for bridge::Runtime {}
// SAFETY: the methods deserialise, which TensorRT's documentation lists as safe from several threads on one runtime, or read a plan's
// first bytes.
unsafe impl Sync for bridge::Runtime {}

// SAFETY: TensorRT ties no engine to the thread that made it.
unsafe impl Send for bridge::Engine {}
// SAFETY: the methods read the engine or create contexts, both of which TensorRT's documentation lists as safe from several
// threads on one engine; what is compiled for contexts is reached under a lock.
unsafe impl Sync for bridge::Engine {}

// SAFETY: a context may be used by one thread after another, as long as they do not overlap: every method that changes it
// takes `Pin<&mut Self>`, and it is not Sync.
unsafe impl Send for bridge::Context {}
