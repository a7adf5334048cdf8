//! The native CUDA engine: an [`Architecture`](crate::model::Architecture) run by this crate's own kernels, on packed rows of any lengths,
//! without TensorRT and without building anything but the kernels themselves.
//!
//! `shape.rs` says what is served, `served.rs` asks it and the machine before anything is loaded, `program.rs` in which order what runs, `scratch.rs` where intermediate results lie, `packs.rs` how large a batch may be where memory is short, `floor.rs` what a step takes at least,
//! `arch.rs` for which GPU
//! kernels are compiled. `load.rs` and `weights.rs` bring the weights to the device, once for all who
//! run the model there (`shared.rs`). `kernels.rs` has the kernels; `stream.rs`, `linear.rs` and
//! `attention.rs` launch them, `elementwise.rs` norms of queries and keys, rotary positions and gates; `latency.rs` those of few tokens. `encoder.rs` is all of it as a [`GpuEncoder`](crate::gpu::GpuEncoder). `docs/native-engine.md` tells how a text goes
//! through it.

mod arch;
mod attention;
mod elementwise;
mod encoder;
mod floor;
mod kernels;
mod latency;
mod linear;
mod load;
mod packs;
mod program;
mod scratch;
mod served;
mod shape;
mod stream;
#[cfg(test)]
mod test_support;
mod weights;

pub use encoder::{NativeEncoder, NativeSettings};
pub use served::{check_architecture, check_device};
pub use shape::Precision;
