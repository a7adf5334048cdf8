//! In which order what runs: an architecture as steps over one residual stream.
//!
//! The stream is kept before its norm: a norm is folded into the linear that follows it, and what a post-norm layer adds to a branch is the view of the
//! stream through the norm. So a norm needs a step of its own, [`Step::Measure`], only for its statistics.

use crate::model::Architecture;
use crate::model::architecture::{Expansion, Norm, NormPlacement};

/// Which norm of an architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum NormId {
    Embeddings,
    Attention(usize),
    /// Of a layer's queries, before they are cut into heads.
    Query(usize),
    /// Of its keys.
    Key(usize),
    /// Of what attention gives with a residual branch of its own, within the layer's.
    AttentionOutput(usize),
    FeedForward(usize),
    Final,
}

/// Which linear of a layer, queries, keys and values being one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum LinearId {
    /// Of the stream: queries, keys and values.
    Qkv,
    /// Of what attention gives, into the stream; beside it where that has a norm of its own.
    Output,
    /// Of the stream: the wide half, activated; or gate and value, of which a step of its own makes it.
    Expansion,
    /// Of the wide half, into the stream.
    Contraction,
}

/// What is added to a linear's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Residual {
    /// The stream as it is (pre-norm).
    Raw,
    /// The stream through this norm (post-norm).
    Through(NormId),
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The stream becomes the sum of each token's rows, with statistics for `norm`.
    Embed {
        norm: Option<NormId>,
    },
    /// The stream becomes its own norm, where it is needed as such.
    Normalise {
        norm: NormId,
    },
    /// Statistics of the stream for `norm`.
    Measure {
        norm: NormId,
        stage: usize,
    },
    Linear {
        layer: usize,
        linear: LinearId,
        /// Folded into the weights.
        norm: Option<NormId>,
        residual: Option<Residual>,
    },
    /// Queries and keys go through their norms and are turned by their positions, as far as they have either.
    QueriesKeys {
        layer: usize,
    },
    Attention {
        layer: usize,
    },
    /// What attention gave, which has a norm of its own, is added to the stream, with statistics for `norm`.
    AddAttended {
        layer: usize,
        /// The stream, to which it is added.
        residual: Residual,
        norm: Option<NormId>,
        stage: usize,
    },
    /// The wide half of a gated feed-forward part, of what its linear gave.
    Gate {
        layer: usize,
    },
    /// Hidden states of the stream.
    Give {
        norm: Option<NormId>,
    },
}

/// The steps of `architecture`.
pub(super) fn program(architecture: &Architecture) -> Vec<Step> {
    let of_embeddings = architecture.embeddings.norm.as_ref().map(|_| NormId::Embeddings);
    let mut writer = Writer { steps: Vec::new(), stage: 0, pending: of_embeddings };
    let places: Vec<NormPlacement> = architecture.layers.iter().map(|layer| layer.placement).collect();
    // What the statistics of the embeddings are for.
    let first = architecture.layers.first().and_then(|layer| layer.attention_norm.as_ref());
    let first_pre = first.filter(|_| places.first() == Some(&NormPlacement::Pre)).map(|_| NormId::Attention(0));
    let last = architecture.final_norm.as_ref().map(|_| NormId::Final);
    writer.steps.push(Step::Embed { norm: of_embeddings.or(first_pre).or(last.filter(|_| places.is_empty())) });
    for (layer, parts) in architecture.layers.iter().enumerate() {
        let attention = parts.attention_norm.as_ref().map(|_| NormId::Attention(layer));
        let feed_forward = parts.feed_forward_norm.as_ref().map(|_| NormId::FeedForward(layer));
        let pre = parts.placement == NormPlacement::Pre;
        for (norm, before, after) in
            [(attention, LinearId::Qkv, LinearId::Output), (feed_forward, LinearId::Expansion, LinearId::Contraction)]
        {
            if pre {
                writer.materialise();
                if let Some(norm) = norm.filter(|_| layer > 0 || before != LinearId::Qkv || of_embeddings.is_some()) {
                    writer.measure(norm);
                }
            }
            let (folded, residual) = match (pre, writer.pending) {
                (true, _) => (norm, Residual::Raw),
                (false, Some(pending)) => (Some(pending), Residual::Through(pending)),
                (false, None) => (None, Residual::Raw),
            };
            writer.steps.push(Step::Linear { layer, linear: before, norm: folded, residual: None });
            if before == LinearId::Qkv {
                let attention = &parts.attention;
                if attention.rotary.is_some() || attention.query_norm.is_some() || attention.key_norm.is_some() {
                    writer.steps.push(Step::QueriesKeys { layer });
                }
                writer.steps.push(Step::Attention { layer });
            } else if !matches!(parts.feed_forward.expansion, Expansion::Plain(_)) {
                writer.steps.push(Step::Gate { layer });
            }
            writer.steps.push(Step::Linear { layer, linear: after, norm: None, residual: Some(residual) });
            if !pre {
                writer.pending = norm;
                if after == LinearId::Output && parts.attention.output_norm.is_some() {
                    writer.stage += 1;
                    writer.steps.push(Step::AddAttended { layer, residual, norm, stage: writer.stage });
                } else if let Some(norm) = norm {
                    writer.measure(norm);
                }
            }
        }
    }
    if last.is_some() {
        writer.materialise();
        if let Some(norm) = last.filter(|_| !places.is_empty()) {
            writer.measure(norm);
        }
    }
    writer.steps.push(Step::Give { norm: last.or(writer.pending) });
    writer.steps
}

struct Writer {
    steps: Vec<Step>,
    /// Statistics that were taken so far.
    stage: usize,
    /// The norm through which the stream is to be seen.
    pending: Option<NormId>,
}

impl Writer {
    fn measure(&mut self, norm: NormId) {
        self.stage += 1;
        self.steps.push(Step::Measure { norm, stage: self.stage });
    }

    fn materialise(&mut self) {
        if let Some(norm) = self.pending.take() {
            self.steps.push(Step::Normalise { norm });
        }
    }
}

impl NormId {
    /// That norm of `architecture`; a norm of which a program speaks is there.
    pub fn of(self, architecture: &Architecture) -> Option<&Norm> {
        match self {
            Self::Embeddings => architecture.embeddings.norm.as_ref(),
            Self::Attention(layer) => architecture.layers.get(layer)?.attention_norm.as_ref(),
            Self::Query(layer) => architecture.layers.get(layer)?.attention.query_norm.as_ref(),
            Self::Key(layer) => architecture.layers.get(layer)?.attention.key_norm.as_ref(),
            Self::AttentionOutput(layer) => architecture.layers.get(layer)?.attention.output_norm.as_ref(),
            Self::FeedForward(layer) => architecture.layers.get(layer)?.feed_forward_norm.as_ref(),
            Self::Final => architecture.final_norm.as_ref(),
        }
    }
}

/// Where stage `stage` of a program stands, in words.
pub(super) fn stage_name(steps: &[Step], stage: usize) -> String {
    let place = steps.iter().find_map(|step| match *step {
        Step::Measure { norm, stage: of } if of == stage => Some(norm),
        Step::AddAttended { layer, stage: of, .. } if of == stage => Some(NormId::AttentionOutput(layer)),
        _ => None,
    });
    match place {
        Some(NormId::Attention(layer)) => format!("layer {layer}, at the norm of attention"),
        Some(NormId::AttentionOutput(layer)) => format!("layer {layer}, at the norm of what attention gives"),
        Some(NormId::Query(layer) | NormId::Key(layer)) => format!("layer {layer}, at the norms of queries and keys"),
        Some(NormId::FeedForward(layer)) => format!("layer {layer}, at the norm of the feed-forward part"),
        Some(NormId::Final) => "the last norm".to_owned(),
        Some(NormId::Embeddings) | None => "the embeddings".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelFolder;
    use std::path::Path;

    fn fixture() -> Architecture {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert");
        ModelFolder::open(&folder).unwrap().architecture().unwrap()
    }

    #[test]
    fn post_norm_folds_every_norm_and_adds_through_it() {
        use LinearId::*;
        use NormId::*;
        let linear = |layer, linear, norm, residual| Step::Linear { layer, linear, norm, residual };
        let through = |norm| Some(Residual::Through(norm));
        assert_eq!(
            program(&fixture()),
            [
                Step::Embed { norm: Some(Embeddings) },
                linear(0, Qkv, Some(Embeddings), None),
                Step::Attention { layer: 0 },
                linear(0, Output, None, through(Embeddings)),
                Step::Measure { norm: Attention(0), stage: 1 },
                linear(0, Expansion, Some(Attention(0)), None),
                linear(0, Contraction, None, through(Attention(0))),
                Step::Measure { norm: FeedForward(0), stage: 2 },
                linear(1, Qkv, Some(FeedForward(0)), None),
                Step::Attention { layer: 1 },
                linear(1, Output, None, through(FeedForward(0))),
                Step::Measure { norm: Attention(1), stage: 3 },
                linear(1, Expansion, Some(Attention(1)), None),
                linear(1, Contraction, None, through(Attention(1))),
                Step::Measure { norm: FeedForward(1), stage: 4 },
                Step::Give { norm: Some(FeedForward(1)) },
            ]
        );
        assert_eq!(stage_name(&program(&fixture()), 3), "layer 1, at the norm of attention");
        assert_eq!(stage_name(&program(&fixture()), 0), "the embeddings");
    }

    #[test]
    fn rotary_positions_and_gates_have_steps_of_their_own() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/modernbert");
        let steps = program(&ModelFolder::open(&folder).unwrap().architecture().unwrap());
        let behind = |wanted: LinearId| {
            steps.windows(2).filter_map(move |pair| match pair[0] {
                Step::Linear { layer, linear, .. } if linear == wanted => Some((layer, pair[1])),
                _ => None,
            })
        };
        assert!(behind(LinearId::Qkv).all(|(layer, step)| step == Step::QueriesKeys { layer }));
        assert!(behind(LinearId::Expansion).all(|(layer, step)| step == Step::Gate { layer }));
        assert_eq!(behind(LinearId::Qkv).count(), behind(LinearId::Expansion).count());
    }

    /// JinaBERT's later form: one step puts queries and keys through their norms, one adds what attention gave through its own and measures the sum.
    #[test]
    fn norms_within_attention_are_of_the_steps_beside_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jina_bert_later");
        let architecture = ModelFolder::open(&folder).unwrap().architecture().unwrap();
        let steps = program(&architecture);
        let linear = |layer, linear, norm, residual| Step::Linear { layer, linear, norm, residual };
        let (before, after) = (NormId::FeedForward(0), NormId::Attention(1));
        let through = Residual::Through(before);
        let layer = [
            linear(1, LinearId::Qkv, Some(before), None),
            Step::QueriesKeys { layer: 1 },
            Step::Attention { layer: 1 },
            linear(1, LinearId::Output, None, Some(through)),
            Step::AddAttended { layer: 1, residual: through, norm: Some(after), stage: 3 },
            linear(1, LinearId::Expansion, Some(after), None),
            Step::Gate { layer: 1 },
            linear(1, LinearId::Contraction, None, Some(Residual::Through(after))),
            Step::Measure { norm: NormId::FeedForward(1), stage: 4 },
        ];
        assert!(steps.windows(layer.len()).any(|steps| steps == layer), "{steps:?}");
        assert_eq!(stage_name(&steps, 3), "layer 1, at the norm of what attention gives");
        for id in [NormId::Query(1), NormId::Key(1), NormId::AttentionOutput(1)] {
            let norm = id.of(&architecture).map(|norm| norm.name.as_str());
            assert!(norm.is_some_and(|name| name.starts_with("encoder.layer.1.attention")), "{id:?}: {norm:?}");
        }
    }

    /// ModernBERT's: a norm of the embeddings, no norm before the first attention, one at the end.
    #[test]
    fn pre_norm_adds_the_stream_as_it_is() {
        use LinearId::*;
        use NormId::*;
        let mut architecture = fixture();
        architecture.final_norm = architecture.layers[0].attention_norm.clone();
        for layer in &mut architecture.layers {
            layer.placement = NormPlacement::Pre;
        }
        architecture.layers[0].attention_norm = None;
        let linear = |layer, linear, norm, residual| Step::Linear { layer, linear, norm, residual };
        let raw = Some(Residual::Raw);
        let expected = [
            Step::Embed { norm: Some(Embeddings) },
            Step::Normalise { norm: Embeddings },
            linear(0, Qkv, None, None),
            Step::Attention { layer: 0 },
            linear(0, Output, None, raw),
            Step::Measure { norm: FeedForward(0), stage: 1 },
            linear(0, Expansion, Some(FeedForward(0)), None),
            linear(0, Contraction, None, raw),
            Step::Measure { norm: Attention(1), stage: 2 },
            linear(1, Qkv, Some(Attention(1)), None),
            Step::Attention { layer: 1 },
            linear(1, Output, None, raw),
            Step::Measure { norm: FeedForward(1), stage: 3 },
            linear(1, Expansion, Some(FeedForward(1)), None),
            linear(1, Contraction, None, raw),
            Step::Measure { norm: Final, stage: 4 },
            Step::Give { norm: Some(Final) },
        ];
        assert_eq!(program(&architecture), expected);

        // Without a norm of the embeddings, theirs are measured for the first layer's.
        architecture.embeddings.norm = None;
        architecture.layers[0].attention_norm = architecture.layers[1].attention_norm.clone();
        assert_eq!(
            program(&architecture)[..3],
            [Step::Embed { norm: Some(Attention(0)) }, linear(0, Qkv, Some(Attention(0)), None), Step::Attention { layer: 0 }]
        );
    }
}
