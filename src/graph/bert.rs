//! BERT: absolute positions from 0, token type 0 added to every token unless token types are fed.

use crate::Result;
use crate::graph::Graph;
use crate::graph::blocks::{Builder, LayerNames};
use crate::model::{EncoderConfig, Weights};

pub(super) fn build(mut graph: Builder<'_>, config: &EncoderConfig, weights: &Weights) -> Result<Graph> {
    let types_are_fed = graph.inputs.token_types;
    let mut x = graph.embeddings(positions(config, weights, types_are_fed)?, config)?;
    let mask = graph.attention_mask();
    for layer in 0..config.num_hidden_layers {
        x = graph.layer(&layer_names(layer), &x, &mask, config)?;
    }
    Ok(graph.finish(&x))
}

/// Position embeddings, `[max_tokens, hidden]`, with token type 0 added unless `types_are_fed`: a sentence encoder is given one segment
/// only.
fn positions(config: &EncoderConfig, weights: &Weights, types_are_fed: bool) -> Result<Vec<f32>> {
    let hidden = config.hidden_size;
    let table = weights.tensor("embeddings.position_embeddings.weight", &[config.max_position_embeddings, hidden])?;
    let types = weights.tensor("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, hidden])?;
    let types = types.to_f32();
    let mut positions = table.to_f32().into_owned();
    if types_are_fed {
        return Ok(positions);
    }
    for row in positions.chunks_exact_mut(hidden) {
        for (value, kind) in row.iter_mut().zip(&types[..hidden]) {
            *value += kind;
        }
    }
    Ok(positions)
}

fn layer_names(layer: usize) -> LayerNames {
    let name = |part: &str| format!("encoder.layer.{layer}.{part}");
    LayerNames {
        query: name("attention.self.query"),
        key: name("attention.self.key"),
        value: name("attention.self.value"),
        attention_output: name("attention.output.dense"),
        attention_norm: name("attention.output.LayerNorm"),
        intermediate: name("intermediate.dense"),
        output: name("output.dense"),
        output_norm: name("output.LayerNorm"),
    }
}
