//! TensorRT: exported graphs built into engines and run on an NVIDIA GPU.
//!
//! Nothing of TensorRT is linked. [`Library::load`] finds it when the program runs; [`build_engine`] goes the whole way
//! from a model to an engine that was compared with the CPU, [`cached_engine`] only where there is none yet, and [`build_fastest`] chooses
//! the arithmetic by measured time. [`Runtime`] and [`Engine`] open what was built. All that reaches CUDA takes a
//! [`Device`](crate::cuda::Device): TensorRT 8.6 crashes where no driver is usable, and having opened one shows that there is.
//!
//! Three rooms, each of which knows those before it alone: `library` (the shim around TensorRT), `engine_file` (engines on disk, and their
//! cache), `make` (from a model to a proven engine). `encoder` is what lanes run.

mod encoder;
mod engine_file;
mod library;
mod make;

pub use engine_file::{Build, Cache, CacheKey, Cost, EngineFile, Fidelity, Machine, Manifest, Model, Source, Speed, Unproven};
pub use library::{
    Arithmetic, BuildSettings, ComputeCapability, Direction, Element, Engine, Flavour, IoTensor, Layer, LayerDetails,
    LayerTensor, Library, Plan, Products, Profile, ProfileRange, Runtime, SearchPath, Shape, Target, Version,
    ahead_of_time_capabilities, build_plan, default_profiles, exit_during_build, header_version,
};
pub use make::{
    Candidate, EngineRequest, Fastest, FastestRequest, Gate, TensorRtObserver, build_engine, build_fastest, cached_engine,
    load_engine, machine, prove,
};

pub(crate) use engine_file::Loaded;
pub(crate) use make::{loaded, prove_as, recall_proof};

// What serves this crate alone; its own tests see it through the feature `internals`.
#[cfg(not(feature = "internals"))]
pub(crate) use encoder::TensorRtEncoder;
#[cfg(feature = "internals")]
pub use {
    encoder::TensorRtEncoder,
    library::{Context, PlanBuilder},
};
