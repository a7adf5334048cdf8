//! The settings that errors speak of, by the library's names. Each face spells them its own way.

use std::fmt;

/// A setting of the library that an [`Error::Setting`](crate::Error::Setting) is about. `Display` gives its name here; a command, a server
/// or a binding that has another name for it matches on the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Setting {
    /// The ranges that INT8 needs.
    Calibration,
    /// GPUs that an engine is built for.
    ComputeCapability,
    /// Measured times of an executor's shapes.
    Costs,
    /// Dense modules of a [`Head`](crate::pooling::Head).
    Dense,
    /// Values that are kept of each vector.
    Dim,
    /// The engine file.
    Engine,
    /// The cache of engines.
    EngineCache,
    /// Layers of an fp16 engine that compute in fp32.
    Fp32Layers,
    /// Width of the engine's hidden states.
    HiddenSize,
    /// Rows of token ids.
    Ids,
    /// The same bits of a text's vector in every batch.
    Invariant,
    /// Linears that an INT8 graph leaves in float.
    KeepFloat,
    /// The longest text in tokens.
    MaxTokens,
    /// The percentage of the values that a range of activations holds.
    Percentile,
    /// Pooling modes.
    Pooling,
    /// Arithmetic of a graph or an engine.
    Precision,
    /// Shapes that an engine serves.
    Profiles,
    /// A prompt of the model, by its name.
    PromptName,
    /// SmoothQuant's alpha.
    Smoothing,
    /// GELU by its tanh approximation.
    TanhGelu,
    /// Token types as an input of the graph.
    TokenTypes,
}

impl Setting {
    /// Every setting, in the order of their names: for faces that spell them all.
    pub const ALL: [Self; 21] = [
        Self::Calibration,
        Self::ComputeCapability,
        Self::Costs,
        Self::Dense,
        Self::Dim,
        Self::Engine,
        Self::EngineCache,
        Self::Fp32Layers,
        Self::HiddenSize,
        Self::Ids,
        Self::Invariant,
        Self::KeepFloat,
        Self::MaxTokens,
        Self::Percentile,
        Self::Pooling,
        Self::Precision,
        Self::Profiles,
        Self::PromptName,
        Self::Smoothing,
        Self::TanhGelu,
        Self::TokenTypes,
    ];

    /// Its name in the library, e.g. `max_tokens`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calibration => "calibration",
            Self::ComputeCapability => "compute_capability",
            Self::Costs => "costs",
            Self::Dense => "dense",
            Self::Dim => "dim",
            Self::Engine => "engine",
            Self::EngineCache => "engine_cache",
            Self::Fp32Layers => "fp32_layers",
            Self::HiddenSize => "hidden_size",
            Self::Ids => "ids",
            Self::Invariant => "invariant",
            Self::KeepFloat => "keep_float",
            Self::MaxTokens => "max_tokens",
            Self::Percentile => "percentile",
            Self::Pooling => "pooling",
            Self::Precision => "precision",
            Self::Profiles => "profiles",
            Self::PromptName => "prompt_name",
            Self::Smoothing => "smoothing",
            Self::TanhGelu => "tanh_gelu",
            Self::TokenTypes => "token_types",
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_settings_are_listed_once_by_name() {
        assert!(Setting::ALL.is_sorted_by(|a, b| a.name() < b.name()));
    }
}
