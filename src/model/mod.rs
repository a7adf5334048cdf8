//! Model folders: configuration, weights and where they come from. Knows files, nothing of graphs or devices.

mod adapter;
mod adapter_config;
pub mod architecture;
mod config;
mod config_keys;
mod dense;
mod families;
mod folder;
#[cfg(feature = "hub")]
pub mod hub;
mod json;
#[cfg(test)]
mod keys_tests;
mod mapped;
mod misnamed;
mod modules;
mod pointer;
mod pooling;
mod schema;
mod sentence_transformers;
mod source;
mod stored;
mod tensors;
mod tokenizer_class;
mod tokenizer_files;
mod tokenizer_keys;
mod tokenizer_token;
mod transformer_module;
mod weights;

pub use architecture::Architecture;
pub use config::{Activation, EncoderConfig};
pub use dense::{Dense, DenseActivation, Residual};
pub use families::Family;
pub use folder::ModelFolder;
pub(crate) use mapped::Mapped;
pub(crate) use pointer::read_file;
pub use pooling::{Pooling, PoolingMode, Scaling};
pub use sentence_transformers::Prompts;
pub use source::{HubId, resolve};
#[cfg(feature = "cuda")]
pub(crate) use tensors::Origin;
pub use tensors::TensorView;
pub use tokenizer_class::TokenizerClass;
#[cfg(feature = "hub")]
pub(crate) use tokenizer_files::{FOREIGN_TOKENIZER_FILES, TOKENIZER_JSON, VOCABULARY};
pub(crate) use tokenizer_files::{NAMED_TOKENS, Named, TokenizerInit, Vocabulary};
pub use tokenizer_files::{TOKENIZER_FILES, TokenizerFiles, TokenizerModel};
pub(crate) use tokenizer_token::{TokenFlags, TokenForm};
pub use transformer_module::TextCall;
pub use weights::Weights;
