//! What the engine serves: sizes and parts of an architecture, each refused by name where it is not.

use crate::model::architecture::{Expansion, Layer, NormKind, NormPlacement, Reach, ScoreBias};
use crate::model::{Activation, Architecture};
use crate::{Error, Result};

/// How values are stored. Sums and statistics are f32 in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Precision {
    /// fp16: the most exact of the fast ones, for values up to 65,504.
    #[default]
    Fp16,
    /// bf16: as fast, less exact, for models whose values overflow fp16.
    Bf16,
    /// fp32, by plain multiply-adds: exact and slow.
    Fp32,
}

/// Columns of a chunk, of which the fast kernels' matrices are made.
pub(super) const CHUNK: usize = 64;
/// The widest hidden state that the stream's kernels hold in registers.
const MOST_HIDDEN: usize = 2048;
/// Head sizes of the fast attention.
const HEAD_SIZES: [usize; 2] = [32, 64];

/// Of how many values of a head the fast kernels turn multiples.
const ROTARY_GRANULE: usize = 16;

/// The sizes of an architecture that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub hidden: usize,
    pub heads: usize,
    pub head_size: usize,
    /// Width of the feed-forward part.
    pub wide: usize,
    /// As the kernels number it.
    pub activation: i32,
    pub precision: Precision,
    /// Whether the feed-forward part is gated.
    pub gated: bool,
    /// Whether queries and keys are turned by their positions.
    pub rotary: bool,
    /// Whether there are norms within attention.
    pub inner_norms: bool,
    /// Whether all layers are pre-norm.
    pub pre_norm: bool,
}

impl Precision {
    /// Bytes of a stored value.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Fp16 | Self::Bf16 => 2,
            Self::Fp32 => 4,
        }
    }

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Fp32 => "fp32",
        }
    }
}

impl Shape {
    /// As BERT is built, with GELU.
    #[cfg(test)]
    pub const fn as_bert(hidden: usize, heads: usize, wide: usize, precision: Precision) -> Self {
        Self {
            hidden,
            heads,
            head_size: hidden / heads,
            wide,
            activation: 1,
            precision,
            gated: false,
            rotary: false,
            inner_norms: false,
            pre_norm: false,
        }
    }

    /// # Errors
    /// [`Error::NotServed`] for the first part or size that no kernel serves.
    pub fn of(architecture: &Architecture, precision: Precision) -> Result<Self> {
        let refused = |part: String, served: &str| Err(Error::NotServed { backend: "cuda", part, served: served.to_owned() });
        let Architecture { hidden_size: hidden, num_heads: heads, head_size, .. } = *architecture;
        let Some(first) = architecture.layers.first() else {
            return refused("an encoder without layers".to_owned(), "at least one");
        };
        let wide = first.feed_forward.output.inputs();
        let granule = if precision == Precision::Fp32 { 8 } else { CHUNK };
        for (size, what) in [(hidden, "hidden size"), (wide, "feed-forward size")] {
            if size == 0 || !size.is_multiple_of(granule) {
                return refused(format!("a {what} of {size} in {}", precision.name()), &format!("multiples of {granule}"));
            }
        }
        if hidden > MOST_HIDDEN {
            return refused(format!("a hidden size of {hidden}"), &format!("up to {MOST_HIDDEN}"));
        }
        if heads * head_size != hidden {
            return refused(
                format!("{heads} heads of {head_size} with a hidden size of {hidden}"),
                "heads that make the hidden size",
            );
        }
        if precision != Precision::Fp32 && !HEAD_SIZES.contains(&head_size) {
            let served = HEAD_SIZES.map(|size| size.to_string()).join(" and ");
            return refused(format!("a head size of {head_size} in {}", precision.name()), &format!("{served}; any in fp32"));
        }
        let activation = match first.feed_forward.activation {
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::Relu => 3,
            Activation::Silu => 4,
            other => return refused(format!("the activation {other:?}"), "gelu, its tanh approximation, relu and silu"),
        };
        let gated = !matches!(first.feed_forward.expansion, Expansion::Plain(_));
        let rotary = architecture.layers.iter().any(|layer| layer.attention.rotary.is_some());
        let inner_norms = architecture.layers.iter().any(|layer| layer.attention.inner_norms().next().is_some());
        let pre_norm = architecture.layers.iter().all(|layer| layer.placement == NormPlacement::Pre);
        let shape = Self { hidden, heads, head_size, wide, activation, precision, gated, rotary, inner_norms, pre_norm };
        architecture.layers.iter().try_for_each(|layer| shape.check(layer, first.feed_forward.activation))?;
        Ok(shape)
    }

    fn check(&self, layer: &Layer, activation: Activation) -> Result<()> {
        let name = &layer.attention.output.name;
        let refused = |part: String, served: &str| {
            Err(Error::NotServed { backend: "cuda", part: format!("{part} ({name})"), served: served.to_owned() })
        };
        if let Some(rotary) = &layer.attention.rotary {
            let granule = if self.precision == Precision::Fp32 { 2 } else { ROTARY_GRANULE };
            if rotary.size == 0 || rotary.size > self.head_size || !rotary.size.is_multiple_of(granule) {
                let part = format!("rotary positions of {} values of a head in {}", rotary.size, self.precision.name());
                return refused(part, &format!("multiples of {granule} up to the head size of {}", self.head_size));
            }
        }
        if let Some(norm) = layer.attention.output_norm.as_ref().filter(|_| layer.placement == NormPlacement::Pre) {
            return refused(
                format!("a norm of what attention gives in a pre-norm layer, {}", norm.name),
                "such norms in post-norm layers",
            );
        }
        let feed_forward = &layer.feed_forward;
        let gated = !matches!(feed_forward.expansion, Expansion::Plain(_));
        if feed_forward.output.inputs() != self.wide || feed_forward.activation != activation || gated != self.gated {
            return refused("a feed-forward part unlike that of the first layer".to_owned(), "layers that are alike");
        }
        Ok(())
    }

    /// Outputs of queries, keys and values.
    pub fn qkv(&self) -> usize {
        3 * self.hidden
    }

    /// Outputs of the linear to the wide half: with a gate as many again.
    pub fn expanded(&self) -> usize {
        if self.gated { 2 * self.wide } else { self.wide }
    }
}

/// The places that a token sees to each side; `-1` for all.
pub(super) fn window(reach: Reach) -> i32 {
    match reach {
        Reach::All => -1,
        Reach::Window(tokens) => i32::try_from(tokens).unwrap_or(-1),
    }
}

/// Whether a norm is without a mean, as the kernels take it.
pub(super) fn rms(kind: NormKind) -> i32 {
    i32::from(kind == NormKind::RmsNorm)
}

/// Bias of the scores by distance alone, `[heads, 2 reach + 1]`, for texts of up to `tokens` tokens, and the reach. `None` where there is none.
pub(super) fn by_distance(architecture: &Architecture, tokens: usize) -> Option<(Vec<f32>, usize)> {
    let reach = tokens.max(1) - 1;
    match &architecture.score_bias {
        ScoreBias::None => None,
        ScoreBias::Relative(bias) => Some((bias.by_distance(tokens.max(1)), reach)),
        ScoreBias::Alibi(alibi) => {
            let distances = || (0..=2 * reach).map(|i| i.abs_diff(reach) as f64);
            let slopes = alibi.slopes(architecture.num_heads);
            Some((slopes.iter().flat_map(|slope| distances().map(move |distance| (-slope * distance) as f32)).collect(), reach))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelFolder;
    use crate::model::architecture::{Alibi, Attention, Norm, Rotary, RotaryScaling};
    use std::path::Path;

    fn fixture() -> Architecture {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mpnet");
        ModelFolder::open(&folder).unwrap().architecture().unwrap()
    }

    fn refusal(change: impl FnOnce(&mut Architecture), precision: Precision) -> String {
        let mut architecture = fixture();
        change(&mut architecture);
        let error = Shape::of(&architecture, precision).unwrap_err();
        assert!(matches!(error, Error::NotServed { backend: "cuda", .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn what_is_not_served_is_named_with_what_is() {
        let rotary = Rotary { base: 160_000.0, size: 10, scaling: RotaryScaling::None };
        let layer = |architecture: &mut Architecture| architecture.layers[1].clone();
        let exact = Precision::Fp32;
        for (refusal, parts) in [
            (refusal(|_| (), Precision::Fp16), ["hidden size of 32 in fp16", "multiples of 64"]),
            (refusal(|a| (a.num_heads, a.head_size) = (4, 16), exact), ["4 heads of 16", "hidden size of 32"]),
            (refusal(|a| a.layers.clear(), exact), ["without layers", "at least one"]),
            (
                refusal(|a| a.layers[1].attention.rotary = Some(rotary), exact),
                ["rotary positions of 10 values", "head size of 8"],
            ),
            (refusal(|a| a.layers[0].feed_forward.activation = Activation::Mish, exact), ["Mish", "gelu"]),
            (
                refusal(|a| a.layers[2].feed_forward.activation = Activation::Relu, exact),
                ["unlike that of the first", "encoder.layer.2"],
            ),
            (
                refusal(
                    |a| {
                        let linear = layer(a).feed_forward.output;
                        a.layers[1].feed_forward.expansion = Expansion::Gated { gate: linear.clone(), value: linear };
                    },
                    exact,
                ),
                ["unlike that of the first", "encoder.layer.1"],
            ),
        ] {
            assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
        }
    }

    #[test]
    fn families_are_served() {
        let of = |name: &str| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
            Shape::of(&ModelFolder::open(&folder).unwrap().architecture().unwrap(), Precision::Fp32)
        };
        for name in ["bert", "mpnet", "xlm-roberta", "roberta", "camembert", "distilbert"] {
            of(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        for (name, gated) in [("modernbert", true), ("nomic_bert", true), ("gte", true), ("new", true)] {
            let shape = of(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!((shape.rotary, shape.gated, shape.expanded()), (true, gated, 2 * shape.wide), "{name}");
        }
    }

    #[test]
    fn norms_within_attention_are_served_where_norms_follow_it() {
        let set: [fn(&mut Attention, Option<Norm>); 3] = [
            |attention, norm| attention.query_norm = norm,
            |attention, norm| attention.key_norm = norm,
            |attention, norm| attention.output_norm = norm,
        ];
        assert!(!Shape::of(&fixture(), Precision::Fp32).unwrap().inner_norms);
        for set in set {
            let mut architecture = fixture();
            let norm = architecture.embeddings.norm.clone();
            set(&mut architecture.layers[1].attention, norm);
            assert!(Shape::of(&architecture, Precision::Fp32).unwrap().inner_norms);
        }
        let refusal = refusal(
            |a| {
                a.layers[1].placement = NormPlacement::Pre;
                a.layers[1].attention.output_norm = a.embeddings.norm.clone();
            },
            Precision::Fp32,
        );
        assert!(refusal.contains("what attention gives in a pre-norm layer, embeddings.LayerNorm (encoder.layer.1"), "{refusal}");
    }

    #[test]
    fn the_fixture_is_served_in_fp32() {
        let shape = Shape::of(&fixture(), Precision::Fp32).unwrap();
        let Shape { hidden, heads, head_size, wide, activation, .. } = shape;
        assert_eq!((hidden, heads, head_size, wide, activation, shape.qkv()), (32, 4, 8, 64, 1, 96));
    }

    #[test]
    fn slopes_and_buckets_are_biases_by_distance() {
        let mut architecture = fixture();
        let ScoreBias::Relative(relative) = &architecture.score_bias else { panic!("MPNet's bias is relative") };
        assert_eq!(by_distance(&architecture, 9), Some((relative.by_distance(9), 8)));
        architecture.score_bias = ScoreBias::Alibi(Alibi);
        let (bias, reach) = by_distance(&architecture, 3).unwrap();
        // Four heads: slopes 1/4, 1/16, 1/64, 1/256.
        assert_eq!((reach, &bias[..10]), (2, &[-0.5, -0.25, 0.0, -0.25, -0.5, -0.125, -0.0625, 0.0, -0.0625, -0.125][..]));
        architecture.score_bias = ScoreBias::None;
        assert_eq!(by_distance(&architecture, 3), None);
    }
}
