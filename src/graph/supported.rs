//! What graphs cannot have: refused by name, never approximated.

use crate::model::Architecture;
use crate::model::architecture::{Norm, NormKind};
use crate::{Error, Result};

/// # Errors
/// [`Error::NotInGraph`] for the first part of `architecture` that no graph can have.
pub(super) fn check(architecture: &Architecture) -> Result<()> {
    let refused = |part: String| Err(Error::NotInGraph { model: architecture.name, part });
    let of_layers = architecture.layers.iter().flat_map(|layer| {
        let attention = &layer.attention;
        let of_attention = [&attention.query_norm, &attention.key_norm, &attention.output_norm];
        of_attention.into_iter().chain([&layer.attention_norm, &layer.feed_forward_norm])
    });
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
    use crate::model::architecture::Layer;

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
        let rms = |norm: &mut Option<Norm>| norm.as_mut().unwrap().kind = NormKind::RmsNorm;
        for (refusal, parts) in [
            (layer_refusal(|layer| rms(&mut layer.feed_forward_norm)), ["RMSNorm", "encoder.layer.1.output.LayerNorm"]),
            (refusal(|architecture| rms(&mut architecture.embeddings.norm)), ["RMSNorm", "embeddings.LayerNorm"]),
        ] {
            assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
        }
    }
}
