//! MPNet: a relative position bias shared by all layers; positions start after the padding id.

use crate::Result;
use crate::graph::Graph;
use crate::graph::blocks::{Builder, LayerNames};
use crate::model::{EncoderConfig, Weights};

/// Distances from here on share the last bucket (`max_distance` of transformers' `MPNetEncoder.relative_position_bucket`).
const MAX_DISTANCE: f64 = 128.0;

pub(super) fn build(mut graph: Builder<'_>, config: &EncoderConfig, weights: &Weights) -> Result<Graph> {
    let mut x = graph.embeddings(positions(config, weights)?, config)?;
    let mask = graph.attention_mask();
    let bias = graph.position_bias(bias_table(config, weights)?, &mask, config);
    for layer in 0..config.num_hidden_layers {
        x = graph.layer(&layer_names(layer), &x, &bias, config)?;
    }
    Ok(graph.finish(&x))
}

/// Position embeddings of real tokens, `[max_tokens, hidden]`: the table without the rows up to the padding id.
fn positions(config: &EncoderConfig, weights: &Weights) -> Result<Vec<f32>> {
    let shape = [config.max_position_embeddings, config.hidden_size];
    let table = weights.tensor("embeddings.position_embeddings.weight", &shape)?;
    let unused = config.max_position_embeddings - config.max_tokens();
    Ok(table.to_f32()[unused * config.hidden_size..].to_vec())
}

/// The bias of every pair of positions up to the longest text, `[1, heads, max_tokens, max_tokens]`.
fn bias_table(config: &EncoderConfig, weights: &Weights) -> Result<Vec<f32>> {
    let (buckets, heads, longest) = (config.relative_attention_num_buckets, config.num_attention_heads, config.max_tokens());
    let table = weights.tensor("encoder.relative_attention_bias.weight", &[buckets, heads])?;
    let table = table.to_f32();
    // It depends on the distance alone: one row of 2 longest - 1 distances a head, of which every query sees a window.
    let distances: Vec<usize> = (0..2 * longest - 1).map(|i| bucket(i as i64 - (longest as i64 - 1), buckets)).collect();
    let mut bias = Vec::with_capacity(heads * longest * longest);
    for head in 0..heads {
        let by_distance: Vec<f32> = distances.iter().map(|bucket| table[bucket * heads + head]).collect();
        for query in 0..longest {
            let first = longest - 1 - query;
            bias.extend_from_slice(&by_distance[first..first + longest]);
        }
    }
    Ok(bias)
}

/// The bucket of a key `distance` positions after the query. Half the buckets serve each direction; of these, half hold one
/// distance each and the others grow with its logarithm. In f32, as the reference computes it.
fn bucket(distance: i64, buckets: usize) -> usize {
    let half = buckets / 2;
    let exact = half / 2;
    let direction = if distance > 0 { half } else { 0 };
    let distance = distance.unsigned_abs() as usize;
    if distance < exact {
        return direction + distance;
    }
    let ratio = (distance as f32 / exact as f32).ln() / (MAX_DISTANCE / exact as f64).ln() as f32;
    let logarithmic = exact + (ratio * (half - exact) as f32) as usize;
    direction + logarithmic.min(half - 1)
}

fn layer_names(layer: usize) -> LayerNames {
    let name = |part: &str| format!("encoder.layer.{layer}.{part}");
    LayerNames {
        query: name("attention.attn.q"),
        key: name("attention.attn.k"),
        value: name("attention.attn.v"),
        attention_output: name("attention.attn.o"),
        attention_norm: name("attention.LayerNorm"),
        intermediate: name("intermediate.dense"),
        output: name("output.dense"),
        output_norm: name("output.LayerNorm"),
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    /// First distance of each bucket of 32 in either direction, read off transformers' `MPNetEncoder.relative_position_bucket`.
    #[test]
    fn buckets_begin_where_the_reference_begins_them() {
        let first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        for distance in 0..600i64 {
            let expected = first.iter().rposition(|&f| f <= distance).unwrap();
            assert_eq!(bucket(-distance, 32), expected, "distance -{distance}");
            if distance > 0 {
                assert_eq!(bucket(distance, 32), 16 + expected, "distance {distance}");
            }
        }
    }
}
