//! Writes an architecture as nodes: embeddings, the attention mask, and layers of attention and feed-forward parts.
//!
//! The forms are those that TensorRT fuses best: `[B,S,N,H]` heads, one Add before the softmax, `LayerNormalization` whole,
//! GELU by `Erf`, and 1/sqrt(head size) folded into the query's weights. Names of nodes are part of a graph's digest: one that changes
//! makes users build their engines again.

use crate::Result;
use crate::graph::Graph;
use crate::graph::builder::Builder;
use crate::graph::constant::Values;
use crate::graph::onnx::AttributeProto;
use crate::graph::positions::Turns;
use crate::graph::quantization::{Linear as GraphLinear, Role};
use crate::graph::supported::check;
use crate::model::Architecture;
use crate::model::architecture::{
    Attention, Embeddings, FeedForward, Layer, Linear, Norm, NormPlacement, Reach, RelativeBias, Rotary, ScoreBias,
};

/// Added to the scores of padding: large enough that softmax gives 0 in fp32 and fp16, small enough to be finite in fp16,
/// so that a row of padding alone gives no NaN.
const MASKED: f32 = -1e4;

/// Writes one architecture.
struct Writer<'a, 'q> {
    architecture: &'a Architecture,
    graph: Builder<'q>,
    /// Layers written so far.
    layers: usize,
    /// The mask with what is added to the scores of all layers.
    bias: String,
    /// The same for each window that a layer had so far.
    windows: Vec<(usize, String)>,
    /// The rotations that a layer had so far.
    rotations: Vec<(Rotary, Turns)>,
}

/// Writes `architecture` into `graph`.
///
/// # Errors
/// [`crate::Error::NotInGraph`] for a part of it that graphs cannot have; what is wrong with a quantisation.
pub(super) fn write(architecture: &Architecture, graph: Builder<'_>) -> Result<Graph> {
    check(architecture)?;
    let (bias, windows, rotations) = (String::new(), Vec::new(), Vec::new());
    let mut writer = Writer { architecture, graph, layers: 0, bias, windows, rotations };
    let mut x = writer.embeddings(&architecture.embeddings);
    let mask = writer.attention_mask();
    writer.bias = match &architecture.score_bias {
        ScoreBias::None => mask,
        ScoreBias::Relative(relative) => writer.position_bias(relative, &mask),
        ScoreBias::Alibi(_) if writer.graph.one_attention => mask,
        ScoreBias::Alibi(alibi) => writer.graph.with_alibi(*alibi, architecture.num_heads, architecture.max_tokens, &mask),
    };
    for layer in &architecture.layers {
        x = writer.layer(layer, &x)?;
        writer.layers += 1;
    }
    x = writer.norm(architecture.final_norm.as_ref(), &x);
    Ok(writer.graph.finish(&x))
}

impl Writer<'_, '_> {
    fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        self.graph.node(op, name, inputs, attributes)
    }

    /// Word embeddings plus the first `sequence` rows of what a sentence's tokens are added, plus token types where they are an input,
    /// normalised.
    fn embeddings(&mut self, embeddings: &Embeddings) -> String {
        let name = "embeddings";
        let (hidden, longest) = (self.architecture.hidden_size, self.architecture.max_tokens);
        let words = &embeddings.words;
        let table = self.graph.stored(&format!("{}.weight", words.name), &words.rows, 1.0);
        let mut sum = self.node("Gather", &words.name, &[&table, "input_ids"], vec![]);
        let types_are_fed = self.graph.inputs.token_types;
        if let Some(positions) = &embeddings.positions {
            let rows = if types_are_fed { Some(positions.used_rows(longest)) } else { embeddings.added_rows(longest) };
            let table = positions.name.as_str();
            let rows = self.graph.floats(&format!("{table}.weight"), &[longest, hidden], rows.unwrap_or_default());
            let length = self.graph.sequence_length();
            let (start, axis) = (self.graph.ints("zero", &[0]), self.graph.ints("axis_0", &[0]));
            let rows = self.node("Slice", table, &[&rows, &start, &length, &axis], vec![]);
            sum = self.node("Add", name, &[&sum, &rows], vec![]);
        } else if let Some(types) = embeddings.token_types.as_ref().filter(|_| !types_are_fed) {
            // The row of type 0 is what every position has.
            let row = embeddings.added_rows(1).unwrap_or_default();
            let row = self.graph.floats(&format!("{}.weight", types.name), &[1, hidden], row);
            sum = self.node("Add", name, &[&sum, &row], vec![]);
        }
        if let Some(types) = embeddings.token_types.as_ref().filter(|_| types_are_fed) {
            let table = self.graph.stored(&format!("{}.weight", types.name), &types.rows, 1.0);
            let rows = self.node("Gather", &types.name, &[&table, "token_type_ids"], vec![]);
            sum = self.node("Add", &types.name, &[&sum, &rows], vec![]);
        }
        self.norm(embeddings.norm.as_ref(), &sum)
    }

    /// `[batch, 1, 1, sequence]`: 0 at tokens, [`MASKED`] at padding.
    fn attention_mask(&mut self) -> String {
        let name = "attention_mask";
        let to_float = vec![AttributeProto::int("to", self.graph.float as i64)];
        let mask = self.node("Cast", name, &["attention_mask"], to_float);
        let one = self.graph.scalar("attention_mask.one", 1.0);
        let masked = self.graph.scalar("attention_mask.masked", MASKED);
        let padding = self.node("Sub", name, &[&one, &mask], vec![]);
        let scores = self.node("Mul", name, &[&padding, &masked], vec![]);
        let axes = self.graph.ints("attention_mask.axes", &[1, 2]);
        self.node("Unsqueeze", name, &[&scores, &axes], vec![])
    }

    /// The first `sequence` rows and columns of the bias of all pairs of positions, plus `mask`.
    fn position_bias(&mut self, bias: &RelativeBias, mask: &str) -> String {
        let name = "position_bias";
        let (heads, longest) = (self.architecture.num_heads, self.architecture.max_tokens);
        let table = self.graph.floats("position_bias.table", &[1, heads, longest, longest], bias.table(longest));
        let length = self.graph.sequence_length();
        let ends = self.node("Concat", name, &[&length, &length], vec![AttributeProto::int("axis", 0)]);
        let starts = self.graph.ints("position_bias.starts", &[0, 0]);
        let axes = self.graph.ints("position_bias.axes", &[2, 3]);
        let bias = self.node("Slice", name, &[&table, &starts, &ends, &axes], vec![]);
        self.node("Add", name, &[&bias, mask], vec![])
    }

    /// What is added to the scores of a layer's heads.
    fn score_bias(&mut self, reach: Reach) -> String {
        let longest = self.architecture.max_tokens;
        match reach {
            Reach::Window(tokens) if tokens < longest.saturating_sub(1) => {
                if let Some((_, bias)) = self.windows.iter().find(|(window, _)| *window == tokens) {
                    return bias.clone();
                }
                let bias = self.graph.within_window(tokens, longest, &self.bias, MASKED);
                self.windows.push((tokens, bias.clone()));
                bias
            }
            // A window that is as wide as the longest text is none.
            Reach::All | Reach::Window(_) => self.bias.clone(),
        }
    }

    /// The cosines and sines of `rotary`, written once.
    fn turns(&mut self, rotary: &Rotary) -> Turns {
        if let Some((_, turns)) = self.rotations.iter().find(|(known, _)| known == rotary) {
            return turns.clone();
        }
        let name = format!("rotary.{}", self.rotations.len());
        let turns = self.graph.turns(&name, rotary, self.architecture.max_tokens);
        self.rotations.push((rotary.clone(), turns.clone()));
        turns
    }

    fn layer(&mut self, layer: &Layer, x: &str) -> Result<String> {
        let (attention, feed_forward) = (&layer.attention, &layer.feed_forward);
        let (attention_norm, feed_forward_norm) = (layer.attention_norm.as_ref(), layer.feed_forward_norm.as_ref());
        match layer.placement {
            NormPlacement::Post => {
                let attended = self.attention(attention, x)?;
                let sum = self.residual(&attention.output, &attended, x);
                let x = self.norm(attention_norm, &sum);
                let narrow = self.feed_forward(feed_forward, &x)?;
                let sum = self.residual(&feed_forward.output, &narrow, &x);
                Ok(self.norm(feed_forward_norm, &sum))
            }
            NormPlacement::Pre => {
                let normed = self.norm(attention_norm, x);
                let attended = self.attention(attention, &normed)?;
                let x = self.residual(&attention.output, &attended, x);
                let normed = self.norm(feed_forward_norm, &x);
                let narrow = self.feed_forward(feed_forward, &normed)?;
                Ok(self.residual(&feed_forward.output, &narrow, &x))
            }
        }
    }

    fn residual(&mut self, last: &Linear, part: &str, x: &str) -> String {
        self.node("Add", &format!("{}.residual", last.name), &[part, x], vec![])
    }

    fn attention(&mut self, attention: &Attention, x: &str) -> Result<String> {
        let hidden = self.architecture.num_heads * self.architecture.head_size;
        let [query, key, value] = attention.projections.linears();
        let scale = 1.0 / (self.architecture.head_size as f32).sqrt();
        // The scale goes into what makes the queries last.
        let (linear_scale, norm_scale) = if attention.query_norm.is_some() { (1.0, scale) } else { (scale, 1.0) };
        let queries = self.linear(Role::Query, &query, x, linear_scale)?;
        let queries = self.scaled_norm(attention.query_norm.as_ref(), &queries, norm_scale);
        let keys = self.linear(Role::Key, &key, x, 1.0)?;
        let keys = self.norm(attention.key_norm.as_ref(), &keys);
        let values = self.linear(Role::Value, &value, x, 1.0)?;
        let turns = attention.rotary.as_ref().map(|rotary| self.turns(rotary));
        let name = attention.output.name.as_str();
        let context = if self.graph.one_attention {
            let [queries, keys] =
                [(&query, &queries), (&key, &keys)].map(|(linear, x)| self.heads(&linear.name, x, turns.as_ref(), &[0, 2, 1, 3]));
            let values = self.heads(&value.name, &values, None, &[0, 2, 1, 3]);
            self.one_attention(name, [&queries, &keys, &values], attention.reach)
        } else {
            let bias = self.score_bias(attention.reach);
            let queries = self.heads(&query.name, &queries, turns.as_ref(), &[0, 2, 1, 3]);
            let keys = self.heads(&key.name, &keys, turns.as_ref(), &[0, 2, 3, 1]);
            let values = self.heads(&value.name, &values, None, &[0, 2, 1, 3]);
            let scores = self.node("MatMul", &format!("{name}.scores"), &[&queries, &keys], vec![]);
            let scores = self.node("Add", &format!("{name}.scores"), &[&scores, &bias], vec![]);
            let probabilities = self.node("Softmax", name, &[&scores], vec![AttributeProto::int("axis", -1)]);
            self.node("MatMul", &format!("{name}.context"), &[&probabilities, &values], vec![])
        };
        let context = self.node("Transpose", name, &[&context], vec![AttributeProto::ints("perm", &[0, 2, 1, 3])]);
        let shape = self.graph.ints("merged_heads", &[0, 0, hidden as i64]);
        let context = self.node("Reshape", name, &[&context, &shape], vec![]);
        let output = self.linear(Role::AttentionOutput, &attention.output, &context, 1.0)?;
        if attention.output_norm.is_none() {
            return Ok(output);
        }
        let sum = self.node("Add", &format!("{name}.own_residual"), &[&output, x], vec![]);
        Ok(self.norm(attention.output_norm.as_ref(), &sum))
    }

    /// The operator of [`Graph::with_one_attention`].
    fn one_attention(&mut self, name: &str, [queries, keys, values]: [&str; 3], reach: Reach) -> String {
        let Architecture { num_heads, head_size, .. } = *self.architecture;
        let window = match reach {
            Reach::All => -1,
            Reach::Window(tokens) => i64::try_from(tokens).unwrap_or(-1),
        };
        let sizes = [("heads", num_heads as i64), ("head_size", head_size as i64), ("window", window)];
        let attributes = sizes.map(|(name, value)| AttributeProto::int(name, value)).into();
        let bias = self.bias.clone();
        let slopes = match &self.architecture.score_bias {
            ScoreBias::Alibi(alibi) => {
                let slopes = alibi.slopes(num_heads).into_iter().map(|slope| slope as f32).collect();
                Some(self.graph.floats("alibi.slopes", &[num_heads], slopes))
            }
            ScoreBias::None | ScoreBias::Relative(_) => None,
        };
        let mut inputs = vec![queries, keys, values, &bias];
        inputs.extend(slopes.as_deref());
        self.node("Attention", name, &inputs, attributes)
    }

    /// `[batch, sequence, hidden]` to heads, turned by their positions and transposed by `perm` of `[batch, sequence, heads, head size]`.
    fn heads(&mut self, name: &str, x: &str, turns: Option<&Turns>, perm: &[i64]) -> String {
        let (heads, size) = (self.architecture.num_heads as i64, self.architecture.head_size as i64);
        // 0 keeps the input's own dimension.
        let shape = self.graph.ints("split_heads", &[0, 0, heads, size]);
        let mut heads = self.node("Reshape", name, &[x, &shape], vec![]);
        if let Some(turns) = turns {
            heads = self.graph.rotated(name, &heads, turns, self.architecture.head_size);
        }
        self.node("Transpose", name, &[&heads], vec![AttributeProto::ints("perm", perm)])
    }

    fn feed_forward(&mut self, part: &FeedForward, x: &str) -> Result<String> {
        let (activated, multiplied) = part.expansion.linears();
        let wide = self.linear(Role::Ffn1, &activated, x, 1.0)?;
        let mut wide = self.graph.activation(&activated.name, &wide, part.activation);
        if let Some(multiplied) = multiplied {
            let values = self.linear(Role::Ffn1, &multiplied, x, 1.0)?;
            wide = self.node("Mul", &multiplied.name, &[&wide, &values], vec![]);
        }
        self.linear(Role::Ffn2, &part.output, &wide, 1.0)
    }

    /// `x W^T + b`, both times `factor`; without b where there is none.
    fn linear(&mut self, role: Role, linear: &Linear, x: &str, factor: f32) -> Result<String> {
        let (name, inputs, outputs) = (linear.name.as_str(), linear.inputs(), linear.outputs());
        let (input, layer) = (x.to_owned(), self.layers);
        self.graph.linears.push(GraphLinear { name: name.into(), input, layer, role, inputs, outputs });
        let view = linear.weight.clone();
        let (x, weight) = match self.graph.quantization {
            Some(quantization) if !quantization.float.contains(name) => {
                let range = Builder::range(quantization, x, inputs)?;
                (self.graph.quantized_input(x, range)?, self.graph.quantized_weight(name, view, factor, range)?)
            }
            _ => {
                let (values, float) = (Values::Transposed { view, factor }, self.graph.float);
                (x.into(), self.graph.constant(&format!("{name}.weight"), &[inputs, outputs], float, values))
            }
        };
        let bias = linear.bias.as_ref().map(|bias| self.graph.stored(&format!("{name}.bias"), bias, factor));
        let product = self.node("MatMul", name, &[&x, &weight], vec![]);
        Ok(match bias {
            Some(bias) => self.node("Add", name, &[&product, &bias], vec![]),
            None => product,
        })
    }

    /// `x` through a norm over the last axis, where there is one.
    fn norm(&mut self, norm: Option<&Norm>, x: &str) -> String {
        self.scaled_norm(norm, x, 1.0)
    }

    /// The same times `factor`.
    fn scaled_norm(&mut self, norm: Option<&Norm>, x: &str, factor: f32) -> String {
        let Some(norm) = norm else { return x.to_owned() };
        let weight = self.graph.stored(&format!("{}.weight", norm.name), &norm.weight, factor);
        let bias = format!("{}.bias", norm.name);
        let bias = match &norm.bias {
            Some(stored) => self.graph.stored(&bias, stored, factor),
            // Zeros in its place: every reader knows this form of the operator.
            None => self.graph.constant(&bias, &[self.architecture.hidden_size], self.graph.float, Values::Zeros),
        };
        let attributes = vec![AttributeProto::int("axis", -1), AttributeProto::float("epsilon", norm.epsilon as f32)];
        self.node("LayerNormalization", &norm.name, &[x, &weight, &bias], attributes)
    }
}

#[cfg(all(test, feature = "cpu"))]
#[path = "encoder_tests.rs"]
mod tests;
