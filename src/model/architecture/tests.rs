//! Each fixture, read into its architecture.

use super::*;
use crate::model::{Activation, ModelFolder};
use std::path::Path;

fn fixture(name: &str) -> (ModelFolder, Architecture) {
    let model = ModelFolder::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap();
    let architecture = model.architecture().unwrap();
    (model, architecture)
}

/// What BERT and MPNet have in common.
fn check_post_norm(model: &ModelFolder, found: &Architecture) {
    let config = &model.config;
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    assert_eq!((found.hidden_size, found.num_heads * found.head_size), (hidden, hidden));
    assert_eq!((found.vocab_size, found.max_tokens), (config.vocab_size, config.max_tokens()));
    assert_eq!(found.pad_token_id, config.pad_token_id);
    assert_eq!(found.layers.len(), config.num_hidden_layers);
    assert_eq!(found.embeddings.words.rows.shape, [config.vocab_size, hidden]);
    assert_eq!(found.embeddings.norm.as_ref().unwrap().name, "embeddings.LayerNorm");
    assert!(found.final_norm.is_none());
    for layer in &found.layers {
        assert_eq!((layer.placement, layer.attention.reach), (NormPlacement::Post, Reach::All));
        assert!(layer.attention.rotary.is_none());
        assert!(matches!(layer.attention.projections, Projections::Separate { .. }));
        assert!(matches!(layer.feed_forward.expansion, Expansion::Plain(_)));
        assert_eq!(layer.feed_forward.activation, Activation::Gelu);
        for norm in [&layer.attention_norm, &layer.feed_forward_norm].map(|norm| norm.as_ref().unwrap()) {
            assert_eq!((norm.kind, norm.epsilon), (NormKind::LayerNorm, config.layer_norm_eps));
            assert_eq!((&*norm.weight.shape, &*norm.bias.as_ref().unwrap().shape), (&[hidden][..], &[hidden][..]));
        }
    }
    let shapes: Vec<(usize, usize)> = found.linears().map(|linear| (linear.inputs(), linear.outputs())).collect();
    let layer = [(hidden, hidden), (hidden, hidden), (hidden, hidden), (hidden, hidden), (hidden, wide), (wide, hidden)];
    assert_eq!(shapes, layer.repeat(config.num_hidden_layers));
    assert!(found.linears().all(|linear| linear.bias.is_some_and(|bias| bias.shape == [linear.weight.shape[0]])));
}

#[test]
fn bert_has_absolute_positions_from_0_and_token_types() {
    for name in ["bert", "bert-fp16-plain"] {
        let (model, found) = fixture(name);
        check_post_norm(&model, &found);
        assert_eq!((found.name, found.position_padding), ("bert", None));
        assert!(matches!(found.score_bias, ScoreBias::None));
        let positions = found.embeddings.positions.as_ref().unwrap();
        assert_eq!((positions.first, positions.max_tokens()), (0, found.max_tokens));
        let types = found.embeddings.token_types.as_ref().unwrap();
        assert_eq!(types.rows.shape, [2, found.hidden_size]);
        assert_eq!(found.linears().next().unwrap().name, "encoder.layer.0.attention.self.query");

        // Row 0 of the types is folded in; rows are cut to what is asked for.
        let (kinds, rows) = (types.rows.to_f32(), positions.rows.to_f32());
        let added = found.embeddings.added_rows(3).unwrap();
        let expected: Vec<f32> = (0..3 * found.hidden_size).map(|i| rows[i] + kinds[i % found.hidden_size]).collect();
        assert_eq!(added, expected);
    }
}

#[test]
fn mpnet_has_a_relative_bias_and_positions_from_2() {
    for name in ["mpnet", "mpnet-bf16-shards"] {
        let (model, found) = fixture(name);
        check_post_norm(&model, &found);
        assert_eq!((found.name, found.pad_token_id, found.position_padding), ("mpnet", 1, Some(1)));
        let ScoreBias::Relative(bias) = &found.score_bias else { panic!("{:?}", found.score_bias) };
        assert_eq!(
            (bias.name.as_str(), bias.heads(), bias.max_distance),
            ("encoder.relative_attention_bias", found.num_heads, 128)
        );
        let positions = found.embeddings.positions.as_ref().unwrap();
        assert_eq!((positions.first, positions.max_tokens()), (2, found.max_tokens));
        assert!(found.embeddings.token_types.is_none());
        assert_eq!(found.linears().next().unwrap().name, "encoder.layer.0.attention.attn.q");
        assert_eq!(
            found.embeddings.added_rows(2).unwrap(),
            positions.rows.to_f32()[2 * found.hidden_size..4 * found.hidden_size]
        );
    }
}

/// RoBERTa's families count positions from the padding id, whatever it is, and have BERT's token types.
#[test]
fn positions_start_one_above_the_padding_id() {
    for (name, pad, types) in [("xlm-roberta", 1, 1), ("roberta", 1, 2), ("camembert", 4, 1)] {
        let (model, found) = fixture(name);
        check_post_norm(&model, &found);
        assert_eq!((found.name, found.pad_token_id, found.position_padding), (name, pad, Some(pad)));
        let positions = found.embeddings.positions.as_ref().unwrap();
        assert_eq!(positions.first, pad as usize + 1, "{name}");
        assert_eq!(found.max_tokens, model.config.max_position_embeddings - pad as usize - 1, "{name}");
        assert_eq!(found.embeddings.token_types.as_ref().unwrap().rows.shape, [types, found.hidden_size], "{name}");
    }
}

#[test]
fn distilbert_has_positions_from_0_and_no_token_types() {
    let (model, found) = fixture("distilbert");
    check_post_norm(&model, &found);
    assert_eq!((found.name, found.position_padding), ("distilbert", None));
    assert_eq!(found.embeddings.positions.as_ref().unwrap().first, 0);
    assert!(found.embeddings.token_types.is_none());
    assert_eq!(found.linears().next().unwrap().name, "transformer.layer.0.attention.q_lin");
    assert_eq!(model.config.layer_norm_eps, 1e-12);
}

#[test]
fn only_the_exact_gelu_becomes_its_tanh_form() {
    let (_, exact) = fixture("bert");
    let activations =
        |found: &Architecture| -> Vec<Activation> { found.layers.iter().map(|l| l.feed_forward.activation).collect() };
    let tanh = exact.clone().with_tanh_gelu();
    assert!(activations(&tanh).iter().all(|&activation| activation == Activation::GeluTanh));
    let mut silu = exact;
    silu.layers.iter_mut().for_each(|layer| layer.feed_forward.activation = Activation::Silu);
    assert!(activations(&silu.with_tanh_gelu()).iter().all(|&activation| activation == Activation::Silu));
}

#[test]
fn packed_linears_are_views_of_their_rows() {
    let tensor = |shape: Vec<usize>| {
        let values = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
        TensorView::owned(shape, values)
    };
    let packed = Linear { name: "Wqkv".to_owned(), weight: tensor(vec![6, 4]), bias: Some(tensor(vec![6])) };
    let [query, key, value] = Projections::Packed(packed.clone()).linears();
    assert_eq!([&query, &key, &value].map(|linear| linear.name.as_str()), ["Wqkv.query", "Wqkv.key", "Wqkv.value"]);
    assert_eq!((&*key.weight.shape, &*key.weight.to_f32()), (&[2, 4][..], &packed.weight.to_f32()[8..16]));
    assert_eq!(&*value.bias.unwrap().to_f32(), [4.0, 5.0]);
    let halves = |order| Expansion::GatedPacked { both: packed.clone(), order }.linears();
    let (gate, values) = halves(GateOrder::GateFirst);
    let first = |linear: Linear| linear.weight.to_f32()[0];
    assert_eq!((first(gate), first(values.unwrap())), (0.0, 12.0));
    let (gate, values) = halves(GateOrder::ValueFirst);
    assert_eq!((first(gate), first(values.unwrap())), (12.0, 0.0));

    // Mapped files too, in place.
    let (_, found) = fixture("mpnet-bf16-shards");
    let whole = &found.embeddings.words.rows;
    let width = found.hidden_size;
    assert_eq!(&*whole.rows(3, 2).to_f32(), &whole.to_f32()[3 * width..5 * width]);
    assert!(whole.bytes().as_ptr_range().contains(&whole.rows(3, 2).bytes().as_ptr()));
    assert_eq!(whole.rows(found.vocab_size, 2).shape, [0, width]);
}
