//! TensorRT: exported graphs built into engines and run on an NVIDIA GPU.
//!
//! Nothing of TensorRT is linked. [`Library::load`] finds it when the program runs; building goes through [`build_plan`],
//! running through [`Runtime`], [`Engine`] and [`Context`], each of which keeps the one before it alive. All that reaches CUDA
//! takes a [`Device`](crate::cuda::Device): TensorRT 8.6 crashes where no driver is usable, and having opened one shows that
//! there is.

mod builder;
mod cache;
mod engine;
mod engine_file;
mod ffi;
mod layers;
mod library;
mod profile;

pub use builder::{Arithmetic, BuildProgress, BuildSettings, LayerDetails, NoProgress, Plan, build_plan};
pub use cache::{Cache, CacheKey};
pub use engine::{Context, Direction, Element, Engine, IoTensor, LayerTime, ProfileRange, Runtime};
pub use engine_file::{Build, EngineFile, Fidelity, Machine, Manifest, Model};
pub use layers::{Layer, LayerTensor};
pub use library::{Library, SearchPath, Version, header_version};
pub use profile::{Profile, Shape};
