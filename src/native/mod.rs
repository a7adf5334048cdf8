//! The native CUDA engine: an [`Architecture`](crate::model::Architecture) run by this crate's own kernels, on packed rows of any lengths,
//! without TensorRT and without building anything but the kernels themselves.
//!
//! `shape.rs` says what is served, `program.rs` in which order what runs, `weights.rs` brings the weights to the device, `kernels.rs` launches, `encoder.rs`
//! is all of it as a [`GpuEncoder`](crate::gpu::GpuEncoder). `docs/native-engine.md` tells how a text goes through it.

mod arch;
mod encoder;
mod kernels;
mod load;
mod program;
mod scratch;
mod shape;
mod weights;

pub use encoder::{NativeEncoder, NativeSettings};
pub use shape::Precision;

#[cfg(feature = "internals")]
pub use arch::{Arch, native_sources};
