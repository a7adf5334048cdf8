//! Model folders: configuration, weights and where they come from. Knows files, nothing of graphs or devices.

mod config;
mod dense;
mod folder;
#[cfg(feature = "hub")]
pub mod hub;
mod json;
mod mapped;
mod misnamed;
mod modules;
mod pointer;
mod source;
mod tensors;
mod weights;

pub use config::{Activation, EncoderConfig, Family};
pub use dense::{Dense, DenseActivation};
pub use folder::{ModelFolder, Prompts};
pub(crate) use mapped::Mapped;
#[allow(unused_imports)] // the readers of JSON and of tokenizer.json
pub(crate) use pointer::{check_link, lfs_pointer};
pub use source::{HubId, resolve};
pub use tensors::TensorView;
pub use weights::Weights;
