//! TensorRT: exported graphs built into engines and run on an NVIDIA GPU.
//!
//! Nothing of TensorRT is linked. [`Library::load`] finds it when the program runs; building goes through [`build_plan`],
//! running through [`Runtime`], [`Engine`] and [`Context`], each of which keeps the one before it alive. [`build_engine`] goes the whole
//! way from a model to an engine that was compared with the CPU, [`cached_engine`] only where there is none yet, and [`build_fastest`]
//! chooses the arithmetic by measured time. All that reaches CUDA takes a [`Device`](crate::cuda::Device): TensorRT 8.6 crashes where no driver is usable, and having opened one shows that
//! there is.

mod builder;
mod cache;
mod choice;
mod encoder;
mod engine;
mod engine_file;
mod ffi;
mod layers;
mod library;
mod manifest;
mod observer;
mod pipeline;
mod products;
mod profile;
mod proof;
mod reference;
mod source;
mod timing;

pub use builder::{Arithmetic, BuildSettings, LayerDetails, Plan, PlanBuilder, build_plan, exit_during_build};
pub use cache::{Cache, CacheKey};
pub use choice::{Candidate, Fastest, FastestRequest, build_fastest};
pub use encoder::TensorRtEncoder;
pub use engine::{Context, Direction, Element, Engine, IoTensor, ProfileRange, Runtime};
pub use engine_file::EngineFile;
pub use layers::{Layer, LayerTensor};
pub use library::{Library, SearchPath, Version, header_version};
pub use manifest::{Build, Cost, Fidelity, Machine, Manifest, Model, Source, Speed};
pub use observer::TensorRtObserver;
pub use pipeline::{EngineRequest, Gate, build_engine, cached_engine, load_engine};
pub use products::Products;
pub use profile::{Profile, Shape, default_profiles};
pub use source::machine;
