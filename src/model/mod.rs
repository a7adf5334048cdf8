//! Model folders: configuration, weights and where they come from. Knows files, nothing of graphs or devices.

mod config;
mod dense;
mod folder;
#[cfg(feature = "hub")]
pub mod hub;
mod json;
mod mapped;
mod modules;
mod source;
mod tensors;
mod weights;

pub use config::{Activation, EncoderConfig, Family};
pub use dense::{Dense, DenseActivation};
pub use folder::{ModelFolder, Prompts};
pub(crate) use mapped::Mapped;
pub use source::{HubId, resolve};
pub use tensors::TensorView;
pub use weights::Weights;
