//! What follows the encoder, as a model folder says it: which states a vector is made of, and how it is scaled.

use crate::{Error, Result, Setting};
use std::fmt;
use std::str::FromStr;

/// One way to make a vector of a text's hidden states. The order of the variants is the order in which sentence-transformers
/// concatenates the modes that a `pooling_mode_*` flag of 1_Pooling/config.json switches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum PoolingMode {
    /// The first token (the first after the prompt when prompts are left out, as sentence-transformers does).
    Cls,
    /// The largest value of each component.
    Max,
    /// The mean.
    Mean,
    /// The sum over the square root of the number of tokens.
    MeanSqrtLen,
    /// The mean weighted by position (1, 2, 3, …). A prompt that is left out still counts in the positions.
    WeightedMean,
    /// The last token.
    LastToken,
}

impl PoolingMode {
    /// Every mode, in the order of the `pooling_mode_*` flags.
    pub const ALL: [Self; 6] = [Self::Cls, Self::Max, Self::Mean, Self::MeanSqrtLen, Self::WeightedMean, Self::LastToken];

    /// The name on the command line, which [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cls => "cls",
            Self::Max => "max",
            Self::Mean => "mean",
            Self::MeanSqrtLen => "mean_sqrt_len",
            Self::WeightedMean => "weightedmean",
            Self::LastToken => "lasttoken",
        }
    }

    /// The boolean of this mode in 1_Pooling/config.json as sentence-transformers before 6 writes it.
    pub fn config_flag(self) -> &'static str {
        match self {
            Self::Cls => "pooling_mode_cls_token",
            Self::Max => "pooling_mode_max_tokens",
            Self::Mean => "pooling_mode_mean_tokens",
            Self::MeanSqrtLen => "pooling_mode_mean_sqrt_len_tokens",
            Self::WeightedMean => "pooling_mode_weightedmean_tokens",
            Self::LastToken => "pooling_mode_lasttoken",
        }
    }
}

impl fmt::Display for PoolingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for PoolingMode {
    type Err = Error;

    /// Reads [`PoolingMode::name`], or sentence-transformers' longer name `mean_sqrt_len_tokens`.
    fn from_str(name: &str) -> Result<Self> {
        let wanted = if name == "mean_sqrt_len_tokens" { "mean_sqrt_len" } else { name };
        Self::ALL.into_iter().find(|mode| mode.name() == wanted).ok_or_else(|| Error::Setting {
            setting: Setting::Pooling,
            reason: format!("\"{name}\" is not a pooling mode; known: {}", known_modes()),
        })
    }
}

fn known_modes() -> String {
    PoolingMode::ALL.map(PoolingMode::name).join(", ")
}

/// The Pooling module: one or several modes, concatenated.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pooling {
    /// In the order of concatenation; never empty.
    pub modes: Vec<PoolingMode>,
    /// Whether the prompt's tokens count (`include_prompt`, true where absent).
    pub include_prompt: bool,
}

impl Pooling {
    /// Pools by `modes`, concatenated as given, which is how sentence-transformers 6 treats a `pooling_mode` list. Flags of older
    /// configurations have the order of [`PoolingMode::ALL`].
    ///
    /// # Errors
    /// [`Error::Setting`] when there is no mode.
    pub fn new(modes: impl IntoIterator<Item = PoolingMode>, include_prompt: bool) -> Result<Self> {
        let modes: Vec<_> = modes.into_iter().collect();
        if modes.is_empty() {
            let reason = format!("no mode given; choose one or several of {}", known_modes());
            return Err(Error::Setting { setting: Setting::Pooling, reason });
        }
        Ok(Self { modes, include_prompt })
    }

    /// Width of the pooled vector for hidden states of `hidden_size`.
    pub fn width(&self, hidden_size: usize) -> usize {
        self.modes.len().saturating_mul(hidden_size)
    }
}

/// Whether and when a vector is scaled to unit length, with respect to the cut to its first components.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scaling {
    /// It stays as it is.
    None,
    /// The whole vector is scaled, then cut: what a model with a Normalize module and `truncate_dim` gives. A vector that was cut is
    /// shorter than 1.
    BeforeCut,
    /// What is left by the cut is scaled: `encode(truncate_dim=.., normalize_embeddings=True)` of sentence-transformers.
    AfterCut,
}
