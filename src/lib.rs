//! Sentence embeddings from text to unit vector.
//!
//! A model folder (or a hub id) becomes an ONNX graph ([`graph`]), an executor runs it ([`backend`]), and what it gives is pooled, cut
//! and normalised ([`pooling`]) as sentence-transformers does. [`Embedder`] is the door to all of it:
//!
//! ```
//! # // A small model of the crate's own tests stands for a real one here.
//! # let model = "tests/fixtures/bert";
//! let embedder = trt_embed::Embedder::builder(model).build()?;
//! let vectors = embedder.embed(&["A sentence.", "Another one, a little longer."])?;
//! assert_eq!(vectors.len(), 2);
//! for vector in vectors.rows() {
//!     let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
//!     assert!((length - 1.0).abs() < 1e-5);
//! }
//! # Ok::<(), trt_embed::Error>(())
//! ```
//!
//! Features: `cpu` (runs graphs with `tract`), `hub` (downloads models), `cli` (the command), `cuda` (runs models on NVIDIA GPUs by this crate's own kernels),
//! `tensorrt` (builds TensorRT engines and runs them there), `serve` (the server), `nvtx` (names the stages of a call in Nsight's timelines).
#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "cuda")]
#[cfg_attr(not(all(feature = "cpu", feature = "tensorrt")), allow(dead_code))] // engines are compared with the CPU
mod compare;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod digest;
mod embedder;
mod error;
mod executor;
pub mod files;
#[cfg(feature = "cuda")]
mod gpu;
pub mod graph;
pub mod model;
#[cfg(feature = "cuda")]
mod native;
mod notice;
pub mod pooling;
mod progress;
pub mod quantization;
mod scheduler;
#[cfg(all(feature = "serve", not(unix)))]
compile_error!("the feature `serve` needs Unix: it listens on Unix sockets, too");
#[cfg(feature = "serve")]
pub mod server;
mod setting;
mod shared;
mod similarity;
#[cfg(feature = "tensorrt")]
mod tensorrt;
pub mod tokens;
mod trace;

/// Executors of a model: what a [`Backend`](backend::Backend) is, and those that there are.
pub mod backend {
    #[cfg(feature = "cpu")]
    pub use crate::cpu::CpuBackend;
    pub use crate::executor::{Backend, Limits};

    /// On a GPU, whatever executor runs the encoder.
    #[cfg(feature = "cuda")]
    pub mod gpu {
        pub use crate::gpu::*;
    }

    /// By this crate's own CUDA kernels.
    #[cfg(feature = "cuda")]
    pub mod native {
        pub use crate::native::*;
    }

    /// As TensorRT engines.
    #[cfg(feature = "tensorrt")]
    pub mod tensorrt {
        pub use crate::tensorrt::*;
    }
}

pub use embedder::{
    BackendChoice, ChosenBackend, Embedder, EmbedderBuilder, Embedding, Embeddings, HiddenStates, Info, Normalize, Submission,
    SubmitSettings,
};
pub use error::{Error, Result};
pub use progress::{NoProgress, Progress};
pub use scheduler::{Class, QueueStatus, Waiting};
pub use setting::Setting;
pub use similarity::Similarity;
