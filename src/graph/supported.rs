//! What graphs cannot have: refused by name, never approximated.

use crate::model::Architecture;
use crate::model::architecture::{Norm, NormKind, Reach, ScoreBias};
use crate::{Error, Result};

/// # Errors
/// [`Error::NotInGraph`] for the first part of `architecture` that no graph can have.
pub(super) fn check(architecture: &Architecture) -> Result<()> {
    let refused = |part: String| Err(Error::NotInGraph { model: architecture.name, part });
    match architecture.score_bias {
        ScoreBias::None | ScoreBias::Relative(_) => {}
        ScoreBias::Alibi(_) => return refused("a slope for each head times the distance (ALiBi)".to_owned()),
    }
    for layer in &architecture.layers {
        let attention = &layer.attention;
        if let Some(rotary) = &attention.rotary {
            return refused(format!("rotary positions (base {}) in {}", rotary.base, attention.output.name));
        }
        if let Reach::Window(reach) = attention.reach {
            return refused(format!("attention to {reach} tokens each side in {}", attention.output.name));
        }
    }
    let of_layers = architecture.layers.iter().flat_map(|layer| [&layer.attention_norm, &layer.feed_forward_norm]);
    let mut norms = [&architecture.embeddings.norm, &architecture.final_norm].into_iter().chain(of_layers).flatten();
    match norms.find(|norm| norm.kind != NormKind::LayerNorm) {
        Some(Norm { name, .. }) => refused(format!("a norm of mean squares (RMSNorm), {name}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Graph, Precision};
    use crate::model::ModelFolder;
    use crate::model::architecture::{Alibi, Layer, Rotary, RotaryScaling};

    /// What the writer says of the fixture after `change`.
    fn refusal(change: impl FnOnce(&mut Architecture)) -> String {
        let model = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bert")).unwrap();
        let mut architecture = model.architecture().unwrap();
        change(&mut architecture);
        let error = Graph::new(&architecture, Precision::Fp32).unwrap_err();
        assert!(matches!(error, Error::NotInGraph { model: "bert", .. }), "{error:?}");
        error.to_string()
    }

    /// The same, of a change of the second layer.
    fn layer_refusal(change: impl FnOnce(&mut Layer)) -> String {
        refusal(|architecture| change(&mut architecture.layers[1]))
    }

    #[test]
    fn what_a_graph_cannot_have_is_refused_by_name() {
        let output = "encoder.layer.1.attention.output.dense";
        let rms = |norm: &mut Option<Norm>| norm.as_mut().unwrap().kind = NormKind::RmsNorm;
        let rotary = Rotary { base: 160_000.0, size: 8, scaling: RotaryScaling::None };
        for (refusal, parts) in [
            (refusal(|architecture| architecture.score_bias = ScoreBias::Alibi(Alibi)), ["bert has a slope", "ALiBi"]),
            (layer_refusal(|layer| layer.attention.rotary = Some(rotary)), ["rotary positions (base 160000)", output]),
            (layer_refusal(|layer| layer.attention.reach = Reach::Window(64)), ["attention to 64 tokens each side", output]),
            (layer_refusal(|layer| rms(&mut layer.feed_forward_norm)), ["RMSNorm", "encoder.layer.1.output.LayerNorm"]),
            (refusal(|architecture| rms(&mut architecture.embeddings.norm)), ["RMSNorm", "embeddings.LayerNorm"]),
        ] {
            assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
        }
    }
}
