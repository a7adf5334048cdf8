//! Model folders: configuration, weights and where they come from. Knows files, nothing of graphs or devices.

mod config;
mod folder;
#[cfg(feature = "hub")]
pub mod hub;
mod weights;

pub use config::{Activation, EncoderConfig, Family};
pub use folder::{Dense, DenseActivation, ModelFolder, Prompts};
pub use weights::{TensorView, Weights};
