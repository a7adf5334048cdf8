//! Layers and embeddings of the families that are built as BERT is: post-norm, separate biased linears, a plain feed-forward part.

use super::tensors::Tensors;
use crate::Result;
use crate::model::architecture::{
    Architecture, Attention, Embeddings, Expansion, FeedForward, Layer, NormPlacement, PositionTable, Projections, Reach,
    ScoreBias, Table,
};

/// Where the layers stand, and the names of a layer's modules, by what follows its number and a dot.
pub(super) struct LayerNames {
    /// What stands before a layer's number.
    pub layers: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub attention_output: &'static str,
    pub attention_norm: &'static str,
    pub intermediate: &'static str,
    pub output: &'static str,
    pub output_norm: &'static str,
}

/// Names of the modules before the layers.
pub(super) const WORDS: &str = "embeddings.word_embeddings";
pub(super) const POSITIONS: &str = "embeddings.position_embeddings";
pub(super) const EMBEDDINGS_NORM: &str = "embeddings.LayerNorm";

/// What stands before a layer's number in most of them.
pub(super) const LAYERS: &str = "encoder.layer.";

/// With what a name of such an encoder begins.
pub(super) const ROOTS: [&str; 2] = ["embeddings.", "encoder."];

impl LayerNames {
    pub const fn linears(&self) -> [&'static str; 6] {
        [self.query, self.key, self.value, self.attention_output, self.intermediate, self.output]
    }

    pub const fn norms(&self) -> [&'static str; 2] {
        [self.attention_norm, self.output_norm]
    }
}

impl Tensors<'_> {
    /// An encoder whose positions begin at row `first` of their table.
    pub fn architecture(
        &self,
        names: &LayerNames,
        first: usize,
        token_types: Option<Table>,
        score_bias: ScoreBias,
    ) -> Result<Architecture> {
        let config = self.config;
        let positions = self.table(POSITIONS, config.max_position_embeddings, config.hidden_size)?;
        let embeddings = Embeddings {
            words: self.table(WORDS, config.vocab_size, config.hidden_size)?,
            positions: Some(PositionTable { name: positions.name, rows: positions.rows, first }),
            token_types,
            norm: Some(self.norm(EMBEDDINGS_NORM, true)?),
        };
        let layers = (0..config.num_hidden_layers).map(|layer| self.layer(names, layer)).collect::<Result<_>>()?;
        Ok(config.architecture_of(embeddings, score_bias, layers))
    }

    fn layer(&self, names: &LayerNames, layer: usize) -> Result<Layer> {
        let (hidden, wide) = (self.config.hidden_size, self.config.intermediate_size);
        let name = |part: &str| format!("{}{layer}.{part}", names.layers);
        let linear = |part: &str, outputs, inputs| self.linear(&name(part), outputs, inputs, true);
        Ok(Layer {
            placement: NormPlacement::Post,
            attention: Attention {
                projections: Projections::Separate {
                    query: linear(names.query, hidden, hidden)?,
                    key: linear(names.key, hidden, hidden)?,
                    value: linear(names.value, hidden, hidden)?,
                },
                query_norm: None,
                key_norm: None,
                output: linear(names.attention_output, hidden, hidden)?,
                output_norm: None,
                reach: Reach::All,
                rotary: None,
            },
            attention_norm: Some(self.norm(&name(names.attention_norm), true)?),
            feed_forward: FeedForward {
                expansion: Expansion::Plain(linear(names.intermediate, wide, hidden)?),
                activation: self.config.activation,
                output: linear(names.output, hidden, wide)?,
            },
            feed_forward_norm: Some(self.norm(&name(names.output_norm), true)?),
        })
    }
}
