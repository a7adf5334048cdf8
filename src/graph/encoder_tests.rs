//! Architectures of no family, written as graphs and run on the CPU, against an encoder in f64.

use crate::cpu::CpuBackend;
use crate::executor::Backend;
use crate::graph::{Graph, Inputs, Precision};
use crate::model::architecture::{
    Alibi, Architecture, Attention, Embeddings, Expansion, FeedForward, GateOrder, Layer, Linear, Norm, NormKind, NormPlacement,
    PositionTable, Projections, Reach, RelativeBias, Rotary, RotaryScaling, ScoreBias, Table,
};
use crate::model::{Activation, TensorView};
use crate::pooling::{Head, Pooling, PoolingMode, Scaling};
use crate::tokens::TokenBatch;
use std::cell::Cell;

const HIDDEN: usize = 8;
const HEADS: usize = 2;
const WIDE: usize = 12;
const VOCAB: usize = 20;
const LONGEST: usize = 7;
const LAYERS: usize = 2;

/// Tensors of pseudo-random values between -1 and 1.
struct Tensors {
    state: Cell<u64>,
}

impl Tensors {
    fn tensor(&self, shape: &[usize]) -> TensorView {
        let value = || {
            // Knuth's MMIX generator; its high bits are good enough.
            let state = self.state.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.state.set(state);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        TensorView::owned(shape.to_vec(), (0..shape.iter().product()).map(|_| value()).collect())
    }

    fn linear(&self, name: &str, outputs: usize, inputs: usize, with_bias: bool) -> Linear {
        let bias = with_bias.then(|| self.tensor(&[outputs]));
        Linear { name: name.to_owned(), weight: self.tensor(&[outputs, inputs]), bias }
    }

    fn norm(&self, name: &str, with_bias: bool) -> Option<Norm> {
        let (weight, bias) = (self.tensor(&[HIDDEN]), with_bias.then(|| self.tensor(&[HIDDEN])));
        Some(Norm { name: name.to_owned(), kind: NormKind::LayerNorm, weight, bias, epsilon: 1e-5 })
    }

    fn table(&self, name: &str, rows: usize) -> Table {
        Table { name: name.to_owned(), rows: self.tensor(&[rows, HIDDEN]) }
    }

    /// Post-norm layers with biases everywhere and a plain feed-forward part, as BERT's; no positions.
    fn plain(&self) -> Architecture {
        let layer = |at: usize| {
            let linear = |part: &str, outputs, inputs| self.linear(&format!("layer.{at}.{part}"), outputs, inputs, true);
            Layer {
                placement: NormPlacement::Post,
                attention: Attention {
                    projections: Projections::Separate {
                        query: linear("query", HIDDEN, HIDDEN),
                        key: linear("key", HIDDEN, HIDDEN),
                        value: linear("value", HIDDEN, HIDDEN),
                    },
                    query_norm: None,
                    key_norm: None,
                    output: linear("out", HIDDEN, HIDDEN),
                    output_norm: None,
                    reach: Reach::All,
                    rotary: None,
                },
                attention_norm: self.norm(&format!("layer.{at}.norm1"), true),
                feed_forward: FeedForward {
                    expansion: Expansion::Plain(linear("wide", WIDE, HIDDEN)),
                    activation: Activation::Gelu,
                    output: linear("narrow", HIDDEN, WIDE),
                },
                feed_forward_norm: self.norm(&format!("layer.{at}.norm2"), true),
            }
        };
        let (words, norm) = (self.table("words", VOCAB), self.norm("embeddings.norm", true));
        Architecture {
            name: "synthetic",
            hidden_size: HIDDEN,
            num_heads: HEADS,
            head_size: HIDDEN / HEADS,
            vocab_size: VOCAB,
            max_tokens: LONGEST,
            pad_token_id: 0,
            position_padding: None,
            embeddings: Embeddings { words, positions: None, token_types: None, norm },
            score_bias: ScoreBias::None,
            layers: (0..LAYERS).map(layer).collect(),
            final_norm: None,
        }
    }
}

/// The encoder in f64: hidden states `[ids.len()]` of one text.
fn oracle(encoder: &Architecture, ids: &[i32]) -> Vec<Vec<f64>> {
    let added = encoder.embeddings.added_rows(LONGEST);
    let words = f64s(&encoder.embeddings.words.rows);
    let embed = |(place, id): (usize, &i32)| {
        let row = words[*id as usize * HIDDEN..][..HIDDEN].iter().enumerate();
        row.map(|(i, word)| word + added.as_ref().map_or(0.0, |rows| f64::from(rows[place * HIDDEN + i]))).collect()
    };
    let mut x: Vec<Vec<f64>> = ids.iter().enumerate().map(embed).collect();
    x = norm(encoder.embeddings.norm.as_ref(), &x);
    let by_distance = |head: usize, distance: usize| match &encoder.score_bias {
        ScoreBias::Alibi(alibi) => (-alibi.slopes(HEADS)[head] * distance as f64) as f32,
        _ => 0.0,
    };
    let pairs =
        (0..HEADS).flat_map(|head| (0..ids.len() * ids.len()).map(move |pair| (head, pair / ids.len(), pair % ids.len())));
    let bias = match &encoder.score_bias {
        ScoreBias::Relative(bias) => bias.table(ids.len()),
        _ => pairs.map(|(head, query, key)| by_distance(head, query.abs_diff(key))).collect(),
    };
    for layer in &encoder.layers {
        let (norm1, norm2) = (layer.attention_norm.as_ref(), layer.feed_forward_norm.as_ref());
        let attend = |x: &[Vec<f64>]| attention(&layer.attention, x, &bias);
        let feed = |x: &[Vec<f64>]| feed_forward(&layer.feed_forward, x);
        x = match layer.placement {
            NormPlacement::Post => norm(norm1, &sum(&attend(&x), &x)),
            NormPlacement::Pre => sum(&attend(&norm(norm1, &x)), &x),
        };
        x = match layer.placement {
            NormPlacement::Post => norm(norm2, &sum(&feed(&x), &x)),
            NormPlacement::Pre => sum(&feed(&norm(norm2, &x)), &x),
        };
    }
    norm(encoder.final_norm.as_ref(), &x)
}

fn f64s(view: &TensorView) -> Vec<f64> {
    view.to_f32().iter().map(|&value| f64::from(value)).collect()
}

fn sum(a: &[Vec<f64>], b: &[Vec<f64>]) -> Vec<Vec<f64>> {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
}

fn norm(norm: Option<&Norm>, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let Some(norm) = norm else { return x.to_vec() };
    let (weight, bias) = (f64s(&norm.weight), norm.bias.as_ref().map_or(vec![0.0; HIDDEN], f64s));
    let row = |row: &Vec<f64>| {
        let mean = row.iter().sum::<f64>() / HIDDEN as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / HIDDEN as f64;
        let scale = 1.0 / (variance + norm.epsilon).sqrt();
        row.iter().zip(weight.iter().zip(&bias)).map(|(x, (w, b))| (x - mean) * scale * w + b).collect()
    };
    x.iter().map(row).collect()
}

fn linear(linear: &Linear, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    rows(&f64s(&linear.weight), linear.bias.as_ref().map(f64s), x)
}

/// `x W^T + b`.
fn rows(weight: &[f64], bias: Option<Vec<f64>>, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let dot = |x: &[f64], row: &[f64]| x.iter().zip(row).map(|(a, b)| a * b).sum::<f64>();
    let one = |x: &Vec<f64>| {
        let products = weight.chunks_exact(x.len()).map(|row| dot(x, row)).enumerate();
        products.map(|(i, product)| product + bias.as_ref().map_or(0.0, |bias| bias[i])).collect()
    };
    x.iter().map(one).collect()
}

fn attention(attention: &Attention, x: &[Vec<f64>], bias: &[f32]) -> Vec<Vec<f64>> {
    // Packed rows are cut here from the output, not from the weights as the writer does.
    let [queries, keys, values] = match &attention.projections {
        Projections::Separate { query, key, value } => [query, key, value].map(|part| linear(part, x)),
        Projections::Packed(packed) => {
            let all = linear(packed, x);
            [0, 1, 2].map(|part| all.iter().map(|row| row[part * HIDDEN..][..HIDDEN].to_vec()).collect::<Vec<_>>())
        }
    };
    let (tokens, size) = (x.len(), HIDDEN / HEADS);
    let (queries, keys) = (norm(attention.query_norm.as_ref(), &queries), norm(attention.key_norm.as_ref(), &keys));
    let turn = |rows: &[Vec<f64>]| match &attention.rotary {
        Some(rotary) => rows.iter().enumerate().map(|(place, row)| turned(rotary, row, place, tokens)).collect(),
        None => rows.to_vec(),
    };
    let (queries, keys) = (turn(&queries), turn(&keys));
    let mut context = vec![vec![0.0; HIDDEN]; tokens];
    for head in 0..HEADS {
        let part = |row: &[f64]| row[head * size..][..size].to_vec();
        for query in 0..tokens {
            let score = |key: usize| {
                if matches!(attention.reach, Reach::Window(reach) if query.abs_diff(key) > reach) {
                    return 0.0;
                }
                let dot: f64 = part(&queries[query]).iter().zip(part(&keys[key])).map(|(a, b)| a * b).sum();
                (dot / (size as f64).sqrt() + f64::from(bias[(head * tokens + query) * tokens + key])).exp()
            };
            let scores: Vec<f64> = (0..tokens).map(score).collect();
            let total: f64 = scores.iter().sum();
            for (score, values) in scores.iter().zip(&values) {
                for (i, value) in part(values).into_iter().enumerate() {
                    context[query][head * size + i] += score / total * value;
                }
            }
        }
    }
    let output = linear(&attention.output, &context);
    match &attention.output_norm {
        Some(own) => norm(Some(own), &sum(&output, x)),
        None => output,
    }
}

/// A row of heads at position `place` of `tokens`, turned by the formula: value i and value i + size / 2 as a complex number.
fn turned(rotary: &Rotary, row: &[f64], place: usize, tokens: usize) -> Vec<f64> {
    let mut row = row.to_vec();
    for head in row.chunks_exact_mut(HIDDEN / HEADS) {
        for (pair, frequency) in rotary.frequencies(tokens).into_iter().enumerate() {
            let (sin, cos) = (place as f64 * frequency).sin_cos();
            let (a, b) = (head[pair], head[pair + rotary.size / 2]);
            (head[pair], head[pair + rotary.size / 2]) = (a * cos - b * sin, a * sin + b * cos);
        }
    }
    row
}

fn feed_forward(part: &FeedForward, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let activate = |x: f64| match part.activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x / 2.0 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2)),
        other => panic!("{other:?}"),
    };
    let product = |gate: &[f64], value: &[f64]| gate.iter().zip(value).map(|(gate, value)| activate(*gate) * value).collect();
    let wide: Vec<Vec<f64>> = match &part.expansion {
        Expansion::Plain(wide) => linear(wide, x).into_iter().map(|row| row.into_iter().map(activate).collect()).collect(),
        Expansion::Gated { gate, value } => {
            linear(gate, x).iter().zip(linear(value, x)).map(|(gate, value)| product(gate, &value)).collect()
        }
        Expansion::GatedPacked { both, order } => {
            let halves = linear(both, x);
            let halves = halves.iter().map(|row| row.split_at(WIDE));
            halves
                .map(|(first, second)| match order {
                    GateOrder::GateFirst => product(first, second),
                    GateOrder::ValueFirst => product(second, first),
                })
                .collect()
        }
    };
    linear(&part.output, &wide)
}

/// Runs `encoder` as a graph on texts of one token, of the longest row, and between, and compares every real token.
fn check(encoder: &Architecture, what: &str) {
    let graph = Graph::new(encoder, Precision::Fp32).unwrap();
    let pooling = Pooling::new([PoolingMode::Mean], true).unwrap();
    let head = Head::new(pooling, Vec::new(), HIDDEN, None, Scaling::None).unwrap();
    let backend = CpuBackend::from_graph(graph, head, LONGEST, 1).unwrap();
    let lengths = [LONGEST, 4, 1];
    let text = |length: usize| (0..length).map(move |place| ((place * 7 + length * 3) % VOCAB) as i32);
    let rows: Vec<Vec<u32>> = lengths.iter().map(|&length| text(length).map(|id| id as u32).collect()).collect();
    let mut batch = TokenBatch::default();
    batch.refill(&rows, VOCAB, 0).unwrap();
    let mut found = vec![0.0; batch.ids().len() * HIDDEN];
    backend.hidden(&batch, &mut found).unwrap();
    for (&first, &length) in batch.starts().iter().zip(&lengths) {
        let expected = oracle(encoder, &text(length).collect::<Vec<_>>());
        let largest = expected.iter().flatten().fold(1.0, |largest: f64, value| largest.max(value.abs()));
        // Each layer rounds sums of at most 3 HIDDEN + WIDE terms, and its norms carry the error of all before.
        let bound = (LAYERS * (3 * HIDDEN + WIDE)) as f64 * f64::from(f32::EPSILON) * largest * 4.0;
        for (place, expected) in expected.iter().enumerate() {
            for (i, expected) in expected.iter().enumerate() {
                let found = f64::from(found[(first as usize + place) * HIDDEN + i]);
                assert!((found - expected).abs() <= bound, "{what}: {found}, expected {expected} within {bound}");
            }
        }
    }
}

#[test]
fn every_form_that_is_written_is_what_it_stands_for() {
    let tensors = Tensors { state: Cell::new(7) };
    check(&tensors.plain(), "post-norm");

    let mut absolute = tensors.plain();
    let rows = tensors.tensor(&[LONGEST + 2, HIDDEN]);
    absolute.embeddings.positions = Some(PositionTable { name: "positions".to_owned(), rows, first: 2 });
    check(&absolute, "positions from 2");
    absolute.embeddings.token_types = Some(tensors.table("types", 2));
    check(&absolute, "positions and types");

    let mut relative = tensors.plain();
    let table = tensors.tensor(&[8, HEADS]);
    relative.score_bias = ScoreBias::Relative(RelativeBias { name: "bias".to_owned(), table, max_distance: 6 });
    relative.embeddings.norm = None;
    check(&relative, "relative bias, no norm of the embeddings");

    // As ModernBERT without its rotary positions and windows.
    let mut modern = tensors.plain();
    for (at, layer) in modern.layers.iter_mut().enumerate() {
        layer.placement = NormPlacement::Pre;
        let packed = tensors.linear(&format!("layer.{at}.Wqkv"), 3 * HIDDEN, HIDDEN, false);
        layer.attention.projections = Projections::Packed(packed);
        layer.attention.output = tensors.linear(&format!("layer.{at}.Wo"), HIDDEN, HIDDEN, false);
        layer.attention_norm = tensors.norm(&format!("layer.{at}.norm1"), false).filter(|_| at > 0);
        let both = tensors.linear(&format!("layer.{at}.Wi"), 2 * WIDE, HIDDEN, false);
        layer.feed_forward.expansion = Expansion::GatedPacked { both, order: GateOrder::GateFirst };
    }
    modern.final_norm = tensors.norm("final_norm", false);
    check(&modern, "pre-norm, packed, gate first, no biases");

    // As GTE without its rotary positions, and with the types that it may have.
    let mut gte = tensors.plain();
    gte.embeddings.token_types = Some(tensors.table("types", 1));
    for (at, layer) in gte.layers.iter_mut().enumerate() {
        layer.attention.projections = Projections::Packed(tensors.linear(&format!("layer.{at}.qkv"), 3 * HIDDEN, HIDDEN, true));
        let both = tensors.linear(&format!("layer.{at}.up_gate"), 2 * WIDE, HIDDEN, false);
        layer.feed_forward.expansion = Expansion::GatedPacked { both, order: GateOrder::ValueFirst };
    }
    check(&gte, "packed, value first, types without positions");

    // As the later JinaBERT, without its slopes.
    let mut jina = tensors.plain();
    for (at, layer) in jina.layers.iter_mut().enumerate() {
        let norm = |part: &str| tensors.norm(&format!("layer.{at}.{part}"), true);
        let attention = &mut layer.attention;
        (attention.query_norm, attention.key_norm, attention.output_norm) = (norm("norm_q"), norm("norm_k"), norm("norm_out"));
    }
    check(&jina, "norms of queries and keys, and of the attention's own residual");

    // As NomicBERT without its rotary positions.
    let mut nomic = tensors.plain();
    for (at, layer) in nomic.layers.iter_mut().enumerate() {
        let [gate, value] = ["fc12", "fc11"].map(|part| tensors.linear(&format!("layer.{at}.{part}"), WIDE, HIDDEN, false));
        layer.feed_forward.expansion = Expansion::Gated { gate, value };
        layer.feed_forward.activation = Activation::Silu;
    }
    check(&nomic, "two linears of a gate");
}

#[test]
fn positions_in_attention_are_what_they_stand_for() {
    let tensors = Tensors { state: Cell::new(8) };
    let with = |what: &str, change: &dyn Fn(usize, &mut Attention)| {
        let mut encoder = tensors.plain();
        encoder.layers.iter_mut().enumerate().for_each(|(at, layer)| change(at, &mut layer.attention));
        check(&encoder, what);
    };
    let rotary = |base, size, scaling| Some(Rotary { base, size, scaling });
    with("rotary", &|_, attention| attention.rotary = rotary(100.0, 4, RotaryScaling::None));
    with("rotary of half a head", &|_, attention| attention.rotary = rotary(100.0, 2, RotaryScaling::None));
    with("two bases", &|at, attention| attention.rotary = rotary([100.0, 7.0][at], 4, RotaryScaling::None));
    with("ntk", &|_, attention| attention.rotary = rotary(100.0, 4, RotaryScaling::Ntk { factor: 8.0 }));
    // Rows of 7, 4 and 1 tokens in one batch: the first is longer than what was trained, the others are not.
    let dynamic = RotaryScaling::DynamicNtk { factor: 2.0, trained: 5 };
    with("dynamic ntk", &|_, attention| attention.rotary = rotary(100.0, 4, dynamic.clone()));
    for reach in [0, 1, 2, LONGEST - 2, LONGEST - 1, LONGEST, usize::MAX - 1] {
        with(&format!("a window of {reach}"), &|at, attention| {
            attention.reach = if at == 0 { Reach::All } else { Reach::Window(reach) };
        });
    }
    with("two windows and rotary", &|at, attention| {
        attention.reach = Reach::Window(at + 1);
        attention.rotary = rotary(50.0, 4, RotaryScaling::None);
    });
    let mut alibi = tensors.plain();
    alibi.score_bias = ScoreBias::Alibi(Alibi);
    check(&alibi, "alibi");
    alibi.layers[1].attention.reach = Reach::Window(2);
    check(&alibi, "alibi and a window");
}

#[test]
fn token_types_are_an_input_without_positions_too() {
    let tensors = Tensors { state: Cell::new(9) };
    let mut encoder = tensors.plain();
    let typed = |encoder: &Architecture| {
        Graph::with_inputs(encoder, Precision::Fp32, None, Inputs::default().with_token_types()).map(|graph| graph.digest_hex())
    };
    let refusal = typed(&encoder).unwrap_err().to_string();
    assert!(refusal.contains("synthetic has no token types"), "{refusal}");
    encoder.embeddings.token_types = Some(tensors.table("types", 2));
    assert_ne!(typed(&encoder).unwrap(), Graph::new(&encoder, Precision::Fp32).unwrap().digest_hex());
}
