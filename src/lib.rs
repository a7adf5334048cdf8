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
//! Features: `cpu` (runs graphs with `tract`), `hub` (downloads models), `cli` (the command), `tensorrt` (builds TensorRT engines and
//! runs them on NVIDIA GPUs), `nvtx` (names the stages of a call in Nsight's timelines).
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod backend;
#[cfg(feature = "tensorrt")]
pub mod cuda;
mod digest;
mod embedder;
mod error;
pub mod files;
pub mod graph;
pub mod model;
mod notice;
pub mod pooling;
mod progress;
pub mod quantization;
mod scheduler;
mod setting;
mod similarity;
pub mod tokens;
mod trace;

pub use embedder::{
    BackendChoice, ChosenBackend, Embedder, EmbedderBuilder, Embedding, Embeddings, HiddenStates, Info, Normalize, Submission,
    SubmitSettings,
};
pub use error::{Error, Result};
pub use progress::{NoProgress, Progress};
pub use setting::Setting;
pub use similarity::Similarity;
