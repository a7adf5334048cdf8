//! What an encoder computes, in terms of no model family: what stands between model folders and executors.
//!
//! A family (`families/`) reads its configuration and its tensors into an [`Architecture`]. An executor runs an architecture, whatever
//! family it is of, and refuses by name what it cannot compute. Weights are views of the mapped files: nothing is copied here, and
//! the files stay mapped for as long as an architecture lives.

mod positions;

pub use positions::{Alibi, PositionTable, RelativeBias, Rotary, RotaryScaling};

use crate::model::{Activation, TensorView};

/// An encoder: embeddings, layers, and a norm at the end where it has one.
///
/// Rows of a batch are independent: attention reaches over one text, never over padding.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Architecture {
    /// What graphs of it are called, e.g. `bert`.
    pub name: &'static str,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Attention heads of a layer.
    pub num_heads: usize,
    /// Width of one head.
    pub head_size: usize,
    /// Rows of the token embedding table: ids are below this.
    pub vocab_size: usize,
    /// The most tokens of one text that positions serve.
    pub max_tokens: usize,
    /// The id that fills the places behind a text in its batch.
    pub pad_token_id: u32,
    /// The id by which the model counts positions: it takes none itself. An executor that counts tokens is wrong for a text with it.
    pub position_padding: Option<u32>,
    /// What makes the first hidden states.
    pub embeddings: Embeddings,
    /// What is added to the scores of every layer's attention, after their division by the root of `head_size`.
    pub score_bias: ScoreBias,
    /// In the order in which they run.
    pub layers: Vec<Layer>,
    /// Norm of the last layer's output, as pre-norm encoders have it.
    pub final_norm: Option<Norm>,
}

/// The sum of a token's rows, normalised.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Embeddings {
    /// One row a token, `[vocab_size, hidden_size]`.
    pub words: Table,
    /// One row a position; absent where positions enter in attention alone.
    pub positions: Option<PositionTable>,
    /// One row a token type, `[types, hidden_size]`. A sentence encoder is given type 0 alone.
    pub token_types: Option<Table>,
    /// Norm of the sum; a pre-norm encoder may have it too.
    pub norm: Option<Norm>,
}

/// A table of which rows are looked up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Table {
    /// Name of its tensor without `.weight`.
    pub name: String,
    /// `[rows, width]`.
    pub rows: TensorView,
}

/// A bias of attention scores that all layers share.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ScoreBias {
    /// None.
    None,
    /// A learnt value for each head and each bucket of distances.
    Relative(RelativeBias),
    /// A slope for each head times the distance.
    Alibi(Alibi),
}

/// Attention and the feed-forward part, each with a residual branch around it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Layer {
    /// Where both norms stand.
    pub placement: NormPlacement,
    /// Attention.
    pub attention: Attention,
    /// Attention's norm; absent e.g. in ModernBERT's first layer.
    pub attention_norm: Option<Norm>,
    /// The feed-forward part.
    pub feed_forward: FeedForward,
    /// The feed-forward part's norm.
    pub feed_forward_norm: Option<Norm>,
}

/// Where a layer's norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NormPlacement {
    /// `x = norm(x + part(x))`, as BERT.
    Post,
    /// `x = x + part(norm(x))`, as ModernBERT.
    Pre,
}

/// `softmax(q k^T / sqrt(head size) + bias) v`, then a linear, and a norm where it has one.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Attention {
    /// Queries, keys and values.
    pub projections: Projections,
    /// Norm of all queries of a token together, before they are cut into heads.
    pub query_norm: Option<Norm>,
    /// Norm of all keys of a token together.
    pub key_norm: Option<Norm>,
    /// What follows the heads.
    pub output: Linear,
    /// Where attention has a residual branch of its own within that of the layer: `output_norm(x + output)` is what the layer adds to x.
    pub output_norm: Option<Norm>,
    /// Which tokens a token sees.
    pub reach: Reach,
    /// How queries and keys are turned by their positions.
    pub rotary: Option<Rotary>,
}

/// How queries, keys and values are made.
#[derive(Debug, Clone)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "a model has one a layer")]
pub enum Projections {
    /// One linear each.
    Separate {
        /// Queries.
        query: Linear,
        /// Keys.
        key: Linear,
        /// Values.
        value: Linear,
    },
    /// One linear whose rows are those of queries, then keys, then values.
    Packed(Linear),
}

/// Which tokens of its text a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reach {
    /// All of them.
    All,
    /// Those at most so many places before or after it.
    Window(usize),
}

/// The feed-forward part: `output(expansion(x))`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FeedForward {
    /// To the wide half.
    pub expansion: Expansion,
    /// Of the wide half, or of its gate.
    pub activation: Activation,
    /// Back to a hidden state.
    pub output: Linear,
}

/// How the wide half of a feed-forward part is made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Expansion {
    /// `activation(linear(x))`.
    Plain(Linear),
    /// `activation(gate(x)) * value(x)`, with two linears.
    Gated {
        /// What goes through the activation.
        gate: Linear,
        /// What it multiplies.
        value: Linear,
    },
    /// The same with one linear of twice the width.
    GatedPacked {
        /// Its rows are those of one, then of the other.
        both: Linear,
        /// Of which first.
        order: GateOrder,
    },
}

/// Which half of a packed gate comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GateOrder {
    /// `activation(first) * second`, as ModernBERT's `Wi`.
    GateFirst,
    /// `first * activation(second)`, as GTE's `up_gate_proj`.
    ValueFirst,
}

/// `x W^T + b`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Linear {
    /// Name of its tensors without `.weight` and `.bias`, e.g. `encoder.layer.0.intermediate.dense`.
    pub name: String,
    /// W, `[outputs, inputs]`.
    pub weight: TensorView,
    /// b, `[outputs]`, where it has one.
    pub bias: Option<TensorView>,
}

/// A norm over a hidden state.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Norm {
    /// Name of its tensors without `.weight` and `.bias`.
    pub name: String,
    /// Its formula.
    pub kind: NormKind,
    /// `[hidden_size]`.
    pub weight: TensorView,
    /// `[hidden_size]`, where it has one.
    pub bias: Option<TensorView>,
    /// What is added to the variance or to the mean square.
    pub epsilon: f64,
}

/// Formula of a norm, before its weight and bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NormKind {
    /// `(x - mean) / sqrt(variance + epsilon)`.
    LayerNorm,
    /// `x / sqrt(mean of squares + epsilon)`.
    RmsNorm,
}

impl Architecture {
    /// The same encoder with the tanh approximation in the place of GELU.
    #[must_use]
    pub fn with_tanh_gelu(mut self) -> Self {
        for layer in &mut self.layers {
            if layer.feed_forward.activation == Activation::Gelu {
                layer.feed_forward.activation = Activation::GeluTanh;
            }
        }
        self
    }

    /// Every linear, in the order in which they run; packed ones as the parts that they are of.
    pub fn linears(&self) -> impl Iterator<Item = Linear> {
        self.layers.iter().flat_map(|layer| {
            let (activated, multiplied) = layer.feed_forward.expansion.linears();
            let attention = layer.attention.projections.linears().into_iter().chain([layer.attention.output.clone()]);
            attention.chain([activated]).chain(multiplied).chain([layer.feed_forward.output.clone()])
        })
    }
}

impl Attention {
    /// The norms that stand within attention: of queries, of keys, and of what it gives.
    pub fn inner_norms(&self) -> impl Iterator<Item = &Norm> {
        [&self.query_norm, &self.key_norm, &self.output_norm].into_iter().flatten()
    }
}

impl Projections {
    /// The linears of queries, keys and values: of packed ones views of their rows, called `NAME.query`, `NAME.key` and `NAME.value`.
    pub fn linears(&self) -> [Linear; 3] {
        match self {
            Self::Separate { query, key, value } => [query.clone(), key.clone(), value.clone()],
            Self::Packed(packed) => packed.split(["query", "key", "value"]),
        }
    }
}

impl Expansion {
    /// The linear that goes through the activation, and the one that is multiplied with the outcome, where there is a gate. Halves of a
    /// packed one are views of its rows, called `NAME.gate` and `NAME.value`.
    pub fn linears(&self) -> (Linear, Option<Linear>) {
        match self {
            Self::Plain(linear) => (linear.clone(), None),
            Self::Gated { gate, value } => (gate.clone(), Some(value.clone())),
            Self::GatedPacked { both, order: GateOrder::GateFirst } => {
                let [gate, value] = both.split(["gate", "value"]);
                (gate, Some(value))
            }
            Self::GatedPacked { both, order: GateOrder::ValueFirst } => {
                let [value, gate] = both.split(["value", "gate"]);
                (gate, Some(value))
            }
        }
    }
}

impl Embeddings {
    /// What a sentence's tokens are added beside their own rows: the position's row and row 0 of the token types, `[tokens, hidden_size]`
    /// for the first `tokens` positions (fewer where there are fewer). `None` where there is neither.
    pub fn added_rows(&self, tokens: usize) -> Option<Vec<f32>> {
        let types = self.token_types.as_ref().map(|table| table.rows.to_f32());
        let Some(positions) = &self.positions else {
            let (types, table) = types.zip(self.token_types.as_ref())?;
            return Some(types.get(..table.width()).unwrap_or_default().repeat(tokens));
        };
        let mut rows = positions.used_rows(tokens);
        if let Some(types) = types {
            for row in rows.chunks_exact_mut(positions.width().max(1)) {
                for (value, kind) in row.iter_mut().zip(types.iter()) {
                    *value += kind;
                }
            }
        }
        Some(rows)
    }
}

impl Table {
    /// Values of one row.
    pub fn width(&self) -> usize {
        self.rows.shape.last().copied().unwrap_or(0)
    }
}

impl Linear {
    /// Width of a row of its input.
    pub fn inputs(&self) -> usize {
        self.weight.shape.last().copied().unwrap_or(0)
    }

    /// Width of a row of its output.
    pub fn outputs(&self) -> usize {
        self.weight.shape.first().copied().unwrap_or(0)
    }

    /// As many linears as `parts` of equally many rows each, in this order.
    fn split<const N: usize>(&self, parts: [&str; N]) -> [Self; N] {
        let rows = self.outputs() / N;
        let mut first = 0;
        parts.map(|part| {
            let begin = first;
            first += rows;
            Self {
                name: format!("{}.{part}", self.name),
                weight: self.weight.rows(begin, rows),
                bias: self.bias.as_ref().map(|bias| bias.rows(begin, rows)),
            }
        })
    }
}

#[cfg(test)]
#[path = "architecture/tests.rs"]
mod tests;
