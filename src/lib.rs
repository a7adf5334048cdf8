//! Sentence embeddings from text to unit vector.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod backend;
#[cfg(feature = "tensorrt")]
pub mod cuda;
mod embedder;
mod error;
pub mod files;
pub mod graph;
pub mod model;
pub mod pooling;
pub mod tokens;

pub use embedder::{BackendChoice, Embedder, EmbedderBuilder, Embeddings, HiddenStates, Info, Normalize, Progress};
pub use error::{Error, Result};
