//! CUDA without TensorRT: the device, its memory and streams, captured graphs, and this crate's own kernels.
//!
//! Nothing is linked: the driver (`libcuda`) and NVRTC are opened when they are first needed, and each that is missing is a
//! [`CudaError`] that says what was looked for.
//!
//! Lifetimes: a stream holds every buffer, kernel and graph that is enqueued on it until it has waited,
//! and a captured graph holds all that it refers to for as long as it lives. So dropping a buffer never frees memory that
//! the device still uses. Device memory itself is shared (a clone of a buffer is the same memory): order its use by
//! putting it on one stream.

mod counters;
mod cubin;
mod device;
pub(crate) mod error;
mod graph;
mod held;
pub(crate) mod launch;
mod library;
mod memory;
pub(crate) mod nvrtc;
pub(crate) mod steps;
mod stream;

pub use counters::{Counters, counters};
pub use cubin::CubinCache;
pub use device::{Device, Memory, Properties};
pub use error::{CudaError, Result};
pub use library::OLDEST_CUDA;
pub use nvrtc::{FoundNvrtc, find_nvrtc};

// What serves this crate alone; its own tests and benchmarks see it through the feature `internals`.
#[cfg(not(feature = "internals"))]
#[allow(unused_imports)] // some are for tests alone
pub(crate) use {
    cubin::Source,
    graph::Graph,
    memory::{DeviceBuffer, DeviceValue, HostMemory, PinnedBuffer},
    stream::{Event, Stream},
};
#[cfg(feature = "internals")]
pub use {
    cubin::Source,
    graph::Graph,
    memory::{DeviceBuffer, DeviceValue, HostMemory, PinnedBuffer},
    stream::{Event, Stream},
};
