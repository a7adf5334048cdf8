//! Pooling, Dense modules and normalisation against f64 oracles written from sentence-transformers' formulas.

use proptest::prelude::*;
use trt_embed::model::{Dense, DenseActivation, Residual};
use trt_embed::pooling::{Head, HiddenRows, Pooling, PoolingMode, Scaling, apply_dense, check_finite, cut_and_scale, pool};
use trt_embed::tokens::TokenBatch;
use trt_embed::{Error, Setting};

/// Half a unit in the last place of f32, relative: the error of one rounding.
const ROUNDING: f64 = f32::EPSILON as f64 / 2.0;

fn batch(lengths: &[u32], seq: usize, skip: u32) -> TokenBatch {
    TokenBatch::from_padded(&vec![0; lengths.len() * seq], lengths, seq, skip).unwrap()
}

/// Reproducible values, roughly normal around an offset (hidden states are not centred).
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 2.0 - 3.5).collect()
}

/// One component of one text by the masked formulas of `Pooling._forward_padded`, and the mean of |x| that its error scales with.
/// `column` holds the component at every position of the padded row.
fn oracle(mode: PoolingMode, column: &[f64], length: usize, skip: usize) -> (f64, f64) {
    let mask: Vec<f64> = (0..column.len()).map(|p| f64::from(u8::from(p >= skip && p < length))).collect();
    let kept = |p: &usize| mask[*p] > 0.0;
    let count: f64 = mask.iter().sum();
    let masked_sum: f64 = column.iter().zip(&mask).map(|(x, m)| x * m).sum();
    let magnitude = column.iter().zip(&mask).map(|(x, m)| x.abs() * m).sum::<f64>() / count.max(1.0);
    let any = (0..column.len()).find(kept).is_some();
    let value = match mode {
        PoolingMode::Cls => (0..column.len()).find(kept).map_or(0.0, |p| column[p]),
        PoolingMode::LastToken => (0..column.len()).rev().find(kept).map_or(0.0, |p| column[p]),
        PoolingMode::Max if !any => 0.0,
        PoolingMode::Max => column
            .iter()
            .zip(&mask)
            .map(|(&x, &m)| if m == 0.0 { f64::NEG_INFINITY } else { x })
            .fold(f64::NEG_INFINITY, f64::max),
        PoolingMode::Mean => masked_sum / count.max(1e-9),
        PoolingMode::MeanSqrtLen => masked_sum / count.max(1e-9).sqrt(),
        PoolingMode::WeightedMean => {
            let weight = |p: usize| mask[p] * (p + 1) as f64;
            let total: f64 = (0..column.len()).map(weight).sum();
            column.iter().enumerate().map(|(p, x)| x * weight(p)).sum::<f64>() / total.max(1e-9)
        }
        _ => unreachable!("a mode without an oracle"),
    };
    (value, magnitude)
}

/// Pools with every mode of `modes` and compares each component to the oracle. Values that must not be read are NaN.
fn check(lengths: &[u32], seq: usize, hidden_size: usize, skip: u32, modes: &[PoolingMode], seed: u64) {
    let batch = batch(lengths, seq, skip);
    let clean = values(lengths.len() * seq * hidden_size, seed);
    let mut hidden = clean.clone();
    for (row, &length) in lengths.iter().enumerate() {
        for position in (0..seq).filter(|&p| p < skip as usize || p >= length as usize) {
            hidden[(row * seq + position) * hidden_size..][..hidden_size].fill(f32::NAN);
        }
    }
    let pooling = Pooling::new(modes.iter().copied(), skip == 0).unwrap();
    let width = pooling.width(hidden_size);
    let mut out = vec![f32::NAN; lengths.len() * width];
    pool(&hidden, HiddenRows::Padded(seq), &batch, hidden_size, &pooling, &mut out).unwrap();
    // The same rows side by side.
    let row = |(row, &length): (usize, &u32)| &hidden[row * seq * hidden_size..][..length as usize * hidden_size];
    let packed = lengths.iter().enumerate().map(row).collect::<Vec<_>>().concat();
    let mut out_of_packed = vec![f32::NAN; out.len()];
    pool(&packed, HiddenRows::Packed, &batch, hidden_size, &pooling, &mut out_of_packed).unwrap();
    assert_eq!(out_of_packed, out);
    for (row, &length) in lengths.iter().enumerate() {
        for (place, &mode) in modes.iter().enumerate() {
            for component in 0..hidden_size {
                let column: Vec<f64> = (0..seq).map(|p| f64::from(clean[(row * seq + p) * hidden_size + component])).collect();
                let (want, magnitude) = oracle(mode, &column, length as usize, skip as usize);
                let found = f64::from(out[row * width + place * hidden_size + component]);
                // Sums are f64 (seq * eps64 * mean|x|, times sqrt(seq) where that is not divided out) and rounded to f32 once.
                let tolerance = want.abs() * ROUNDING + (seq as f64).powf(1.5) * f64::EPSILON * magnitude;
                assert!(
                    (found - want).abs() <= tolerance,
                    "{mode}, row {row} of {length} tokens, component {component}: {found} for {want}"
                );
            }
        }
    }
}

#[test]
fn every_mode_alone_over_odd_shapes() {
    for (seed, mode) in PoolingMode::ALL.into_iter().enumerate() {
        for hidden_size in [1, 7, 33, 768] {
            let modes = [mode];
            check(&[1], 1, hidden_size, 0, &modes, seed as u64);
            check(&[512], 512, hidden_size, 0, &modes, seed as u64);
            check(&[13, 1, 7, 0, 12], 13, hidden_size, 0, &modes, seed as u64);
            check(&[13, 1, 7, 0, 12], 13, hidden_size, 3, &modes, seed as u64);
            check(&[2, 2], 2, hidden_size, 2, &modes, seed as u64);
            check(&[0, 0], 4, hidden_size, 0, &modes, seed as u64);
        }
    }
}

proptest! {
    #[test]
    fn any_shape_any_combination(
        seq in 1usize..40,
        hidden_size in 1usize..20,
        shares in prop::collection::vec(0.0f64..=1.0, 1..6),
        skip in 0u32..50,
        modes in prop::collection::vec(prop::sample::select(PoolingMode::ALL.to_vec()), 1..8),
        seed in any::<u64>(),
    ) {
        let lengths: Vec<u32> = shares.iter().map(|share| (share * seq as f64).round() as u32).collect();
        check(&lengths, seq, hidden_size, skip, &modes, seed);
    }

    #[test]
    fn a_row_of_a_batch_equals_the_text_alone(lengths in prop::collection::vec(1u32..20, 1..6), hidden_size in 1usize..20, seed in any::<u64>()) {
        let seq = *lengths.iter().max().unwrap() as usize;
        let hidden = values(lengths.len() * seq * hidden_size, seed);
        let head = Head::new(Pooling::new(PoolingMode::ALL, true).unwrap(), Vec::new(), hidden_size, None, Scaling::AfterCut).unwrap();
        let mut together = vec![0.0; lengths.len() * head.dim];
        head.apply(&hidden, HiddenRows::Padded(seq), &batch(&lengths, seq, 0), &mut together).unwrap();
        for (row, &length) in lengths.iter().enumerate() {
            let states = &hidden[row * seq * hidden_size..][..length as usize * hidden_size];
            let mut alone = vec![0.0; head.dim];
            head.apply(states, HiddenRows::Packed, &batch(&[length], length as usize, 0), &mut alone).unwrap();
            prop_assert_eq!(&together[row * head.dim..][..head.dim], alone);
        }
    }

    #[test]
    fn unit_vectors(rows in 1usize..5, width in 1usize..50, cut in 0.0f64..1.0, exponent in -30i32..30, seed in any::<u64>()) {
        let dim = 1 + (cut * width as f64) as usize;
        let dim = dim.min(width);
        // Norms whose squares leave the range of f32 must not overflow or vanish.
        let values: Vec<f32> = values(rows * width, seed).iter().map(|x| x * 10f32.powi(exponent)).collect();
        let mut out = vec![f32::NAN; rows * dim];
        for (scaling, measured) in [(Scaling::AfterCut, dim), (Scaling::BeforeCut, width)] {
            out.fill(f32::NAN);
            cut_and_scale(&values, width, dim, scaling, &mut out).unwrap();
            for (row, found) in values.chunks(width).zip(out.chunks(dim)) {
                let norm = row[..measured].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(1e-12);
                for (&x, &found) in row.iter().zip(found) {
                    let want = f64::from(x) / norm;
                    // One rounding of the result, relative, or of the smallest f32 below the normal range.
                    prop_assert!((f64::from(found) - want).abs() <= want.abs() * ROUNDING * 1.001 + 1e-45, "{found} for {want}");
                }
            }
        }
        cut_and_scale(&values, width, dim, Scaling::None, &mut out).unwrap();
        for (row, found) in values.chunks(width).zip(out.chunks(dim)) {
            prop_assert_eq!(&row[..dim], found);
        }
    }

    #[test]
    fn dense_modules(rows in 1usize..4, inputs in 1usize..70, outputs in 1usize..20, bias in any::<bool>(), kind in 0usize..10, square in any::<bool>(), seed in any::<u64>()) {
        let inputs = if square { outputs } else { inputs };
        let activation = DenseActivation::ALL[kind];
        let dense = dense(inputs, outputs, bias, activation, seed);
        let input = values(rows * inputs, seed ^ 1);
        let mut out = vec![f32::NAN; rows * outputs];
        apply_dense(&dense, &input, &mut out).unwrap();
        for (row, found) in input.chunks(inputs).zip(out.chunks(outputs)) {
            for (o, &found) in found.iter().enumerate() {
                let terms = row.iter().zip(&dense.weight[o * inputs..]).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let bias = dense.bias.as_ref().map_or(0.0, |bias| f64::from(bias[o]));
                let sum = terms.clone().sum::<f64>() + bias;
                let (residual, added): (f64, f64) = match &dense.residual {
                    Residual::Input => (f64::from(row[o]), f64::from(row[o]).abs()),
                    Residual::Projected(matrix) => {
                        let terms = row.iter().zip(&matrix[o * inputs..]).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        (terms.clone().sum(), terms.map(f64::abs).sum())
                    }
                    _ => (0.0, 0.0),
                };
                // A product, up to inputs + 1 additions: n * eps * sum|w x|. No activation is steeper than 1.13 (GELU); f32's own
                // tanh and exp are good to 2 units in the last place of values up to 1. The residual errs as any sum.
                let magnitude = terms.map(f64::abs).sum::<f64>() + bias.abs();
                let tolerance = (inputs as f64 + 2.0) * ROUNDING * (1.13 * magnitude + added)
                    + 8.0 * ROUNDING * (sum.abs().max(1.0) + residual.abs());
                let want = activated(activation, sum) + residual;
                prop_assert!((f64::from(found) - want).abs() <= tolerance, "{activation:?}: {found} for {want}");
            }
        }
    }
}

fn dense(inputs: usize, outputs: usize, bias: bool, activation: DenseActivation, seed: u64) -> Dense {
    let weight: Vec<f32> = values(inputs * outputs, seed ^ 2).iter().map(|w| w / inputs as f32).collect();
    let bias = bias.then(|| values(outputs, seed ^ 3));
    let residual = match seed % 3 {
        0 if inputs == outputs => Residual::Input,
        1 => Residual::Projected(values(inputs * outputs, seed ^ 4).iter().map(|w| w / inputs as f32).collect()),
        _ => Residual::None,
    };
    Dense { in_features: inputs, out_features: outputs, weight, bias, activation, residual }
}

fn activated(activation: DenseActivation, x: f64) -> f64 {
    match activation {
        DenseActivation::Identity => x,
        DenseActivation::Tanh => x.tanh(),
        DenseActivation::Relu => x.max(0.0),
        DenseActivation::Gelu => x / 2.0 * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        DenseActivation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        DenseActivation::Silu => x / (1.0 + (-x).exp()),
        DenseActivation::LeakyRelu => x.max(0.01 * x),
        DenseActivation::Elu => x.max(0.0) + x.min(0.0).exp() - 1.0,
        DenseActivation::Mish => x * (1.0 + x.exp()).ln().tanh(),
        DenseActivation::Softplus => (1.0 + x.exp()).ln(),
        _ => unreachable!("an activation without an oracle"),
    }
}

/// The error function from its definition, 2/sqrt(pi) times the integral of exp(-t^2) from 0 to x, by Simpson's rule.
fn erf(x: f64) -> f64 {
    let (x, sign) = (x.abs().min(6.0), x.signum());
    let steps = 2000;
    let h = x / f64::from(steps);
    let inner: f64 = (1..steps).map(|i| f64::from(2 + 2 * (i % 2)) * (-(h * f64::from(i)).powi(2)).exp()).sum();
    sign * 2.0 / std::f64::consts::PI.sqrt() * h / 3.0 * (1.0 + inner + (-x * x).exp())
}

#[test]
fn prompt_positions_still_count_in_the_weights() {
    // Tokens 1, 10, 100 with the first left out: (2 * 10 + 3 * 100) / (2 + 3).
    let pooling = Pooling::new([PoolingMode::WeightedMean], false).unwrap();
    let mut out = [0.0];
    pool(&[1.0, 10.0, 100.0], HiddenRows::Packed, &batch(&[3], 3, 1), 1, &pooling, &mut out).unwrap();
    assert_eq!(out, [64.0]);
}

#[test]
fn modes_are_concatenated_as_given() {
    let hidden = [1.0, 2.0, 6.0];
    let modes = [PoolingMode::Mean, PoolingMode::LastToken, PoolingMode::Cls, PoolingMode::Mean];
    let pooling = Pooling::new(modes, true).unwrap();
    let mut out = [0.0; 4];
    pool(&hidden, HiddenRows::Padded(3), &batch(&[3], 3, 0), 1, &pooling, &mut out).unwrap();
    assert_eq!(out, [3.0, 6.0, 1.0, 3.0]);
}

#[test]
fn a_nan_among_the_tokens_is_not_hidden() {
    for mode in PoolingMode::ALL {
        let pooling = Pooling::new([mode], true).unwrap();
        for place in 0..3 {
            let mut hidden = [1.0, 2.0, 3.0];
            hidden[place] = f32::NAN;
            let mut out = [0.0];
            pool(&hidden, HiddenRows::Padded(3), &batch(&[3], 3, 0), 1, &pooling, &mut out).unwrap();
            let read = match mode {
                PoolingMode::Cls => place == 0,
                PoolingMode::LastToken => place == 2,
                _ => true,
            };
            assert_eq!(out[0].is_nan(), read, "{mode}, NaN at {place}");
        }
    }
    let mut out = [0.0; 2];
    cut_and_scale(&[f32::NAN, 1.0], 2, 2, Scaling::AfterCut, &mut out).unwrap();
    assert!(out[0].is_nan());
    for activation in DenseActivation::ALL {
        let mut out = [0.0];
        let layer =
            Dense { in_features: 1, out_features: 1, weight: vec![1.0], bias: None, activation, residual: Residual::None };
        apply_dense(&layer, &[f32::NAN], &mut out).unwrap();
        assert!(out[0].is_nan(), "{activation:?}");
    }
}

#[test]
fn a_row_without_tokens_gives_zeros_and_stays_zero() {
    let head = Head::new(Pooling::new(PoolingMode::ALL, false).unwrap(), Vec::new(), 3, None, Scaling::AfterCut).unwrap();
    for (lengths, skip) in [([0, 2], 0), ([2, 3], 2)] {
        let mut out = vec![f32::NAN; 2 * head.dim];
        head.apply(&values(2 * 3 * 3, 7), HiddenRows::Padded(3), &batch(&lengths, 3, skip), &mut out).unwrap();
        assert_eq!(out[..head.dim], vec![0.0; head.dim]);
        assert!(out[head.dim..].iter().all(|x| x.is_finite() && *x != 0.0));
        check_finite(&out, head.dim, &[0, 1]).unwrap();
    }
}

#[test]
fn an_empty_batch_gives_nothing() {
    let head = Head::new(Pooling::new([PoolingMode::Mean], true).unwrap(), Vec::new(), 3, None, Scaling::AfterCut).unwrap();
    head.apply(&[], HiddenRows::Packed, &TokenBatch::default(), &mut []).unwrap();
}

#[test]
fn buffers_of_another_length_are_refused_and_left_alone() {
    let pooling = Pooling::new([PoolingMode::Mean, PoolingMode::Max], true).unwrap();
    let layer = dense(6, 2, true, DenseActivation::Identity, 1);
    let head = Head::new(pooling.clone(), vec![layer.clone()], 3, Some(1), Scaling::AfterCut).unwrap();
    let batch = batch(&[2, 4], 4, 0);
    // [2, 4, 3] hidden states, pooled [2, 6], vectors [2, 1].
    let (hidden, pooled) = (values(24, 1), values(12, 2));
    let input = |result: trt_embed::Result<()>, wrong: usize| match result {
        Err(Error::InputLength { expected, found, .. }) => assert!(found == wrong && expected != wrong, "{found} for {expected}"),
        other => panic!("{other:?}"),
    };
    let output = |result: trt_embed::Result<()>, wrong: usize| match result {
        Err(Error::OutputLength { found, .. }) => assert_eq!(found, wrong),
        other => panic!("{other:?}"),
    };
    for wrong in [0, 23, 25, 48] {
        input(pool(&vec![0.0; wrong], HiddenRows::Padded(4), &batch, 3, &pooling, &mut [7.0; 12]), wrong);
        input(head.apply(&vec![0.0; wrong], HiddenRows::Padded(4), &batch, &mut [7.0; 2]), wrong);
        input(pool(&vec![0.0; wrong], HiddenRows::Packed, &batch, 3, &pooling, &mut [7.0; 12]), wrong);
    }
    // The longest row has 4 tokens: rows of 3 cannot hold it.
    input(pool(&[0.0; 18], HiddenRows::Padded(3), &batch, 3, &pooling, &mut [7.0; 12]), 18);
    for wrong in [0, 1, 3, 11, 13] {
        let mut out = vec![7.0; wrong];
        output(pool(&hidden, HiddenRows::Padded(4), &batch, 3, &pooling, &mut out), wrong);
        output(head.apply(&hidden, HiddenRows::Padded(4), &batch, &mut out), wrong);
        output(apply_dense(&layer, &pooled, &mut out), wrong);
        output(cut_and_scale(&pooled, 6, 1, Scaling::AfterCut, &mut out), wrong);
        assert!(out.iter().all(|&value| value == 7.0));
    }
    for wrong in [1, 5, 13] {
        input(apply_dense(&layer, &vec![0.0; wrong], &mut [7.0; 4]), wrong);
        input(cut_and_scale(&vec![0.0; wrong], 6, 1, Scaling::AfterCut, &mut [7.0; 2]), wrong);
    }
    for (width, dim) in [(0, 0), (6, 0), (6, 7), (0, 1)] {
        assert!(matches!(cut_and_scale(&pooled, width, dim, Scaling::AfterCut, &mut [7.0; 2]), Err(Error::Setting { .. })));
    }
    for broken in [
        Dense { in_features: 0, ..layer.clone() },
        Dense { weight: vec![1.0], ..layer.clone() },
        Dense { bias: Some(vec![]), ..layer },
    ] {
        assert!(matches!(apply_dense(&broken, &pooled, &mut [7.0; 4]), Err(Error::Setting { .. })));
    }
}

#[test]
fn a_head_whose_parts_were_changed_is_checked_again() {
    let whole = Head::new(Pooling::new([PoolingMode::Mean], true).unwrap(), Vec::new(), 3, None, Scaling::AfterCut).unwrap();
    let mut out = [0.0; 8];
    let changes: [fn(&mut Head); 4] = [
        |head| head.dim = 4,
        |head| head.dim = 0,
        |head| head.pooling.modes.clear(),
        |head| head.dense = vec![dense(2, 3, false, DenseActivation::Tanh, 1)],
    ];
    for change in changes {
        let mut head = whole.clone();
        change(&mut head);
        let out = &mut out[..head.dim];
        assert!(
            matches!(head.apply(&[1.0; 3], HiddenRows::Packed, &batch(&[1], 1, 0), out), Err(Error::Setting { .. })),
            "{head:?}"
        );
    }
    // Without a mode there is nothing to pool, and nothing to panic over.
    let mut none = whole.pooling;
    none.modes.clear();
    pool(&[1.0; 3], HiddenRows::Packed, &batch(&[1], 1, 0), 3, &none, &mut []).unwrap();
}

#[test]
fn a_head_chains_its_steps() {
    // mean [2, 4] -> dense [[1, 0], [0, 1], [1, 1]] + 1 = [3, 5, 7] -> the first two -> unit length.
    let layer = Dense {
        in_features: 2,
        out_features: 3,
        weight: vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        bias: Some(vec![1.0; 3]),
        activation: DenseActivation::Identity,
        residual: Residual::None,
    };
    let mean = || Pooling::new([PoolingMode::Mean], true).unwrap();
    let head = Head::new(mean(), vec![layer.clone()], 2, Some(2), Scaling::AfterCut).unwrap();
    assert_eq!((head.pooled_width(), head.width(), head.dim), (2, 3, 2));
    let mut out = [0.0; 2];
    head.apply(&[1.0, 3.0, 3.0, 5.0], HiddenRows::Packed, &batch(&[2], 2, 0), &mut out).unwrap();
    let norm = 34f64.sqrt();
    assert_eq!(out, [(3.0 / norm) as f32, (5.0 / norm) as f32]);

    for dim in [0, 4, usize::MAX] {
        let error = Head::new(mean(), vec![layer.clone()], 2, Some(dim), Scaling::AfterCut).unwrap_err();
        assert!(
            matches!(&error, Error::Setting { setting: Setting::Dim, reason } if reason.contains(&dim.to_string())),
            "{error}"
        );
    }
    assert!(matches!(
        Head::new(mean(), vec![layer.clone()], 3, None, Scaling::AfterCut).unwrap_err(),
        Error::Setting { setting: Setting::Dense, .. }
    ));
    for broken in [
        Dense { weight: vec![0.0; 5], ..layer.clone() },
        Dense { bias: Some(vec![0.0; 2]), ..layer.clone() },
        Dense { residual: Residual::Input, ..layer.clone() },
        Dense { residual: Residual::Projected(vec![0.0; 5]), ..layer.clone() },
        Dense { in_features: 0, weight: Vec::new(), ..layer },
    ] {
        assert!(Head::new(mean(), vec![broken], 2, None, Scaling::AfterCut).is_err());
    }
}

#[test]
fn results_that_are_not_finite_are_named() {
    check_finite(&[], 3, &[]).unwrap();
    check_finite(&values(12, 1), 3, &[5, 0, 9, 4]).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut rows = values(12, 1);
        rows[7] = bad;
        rows[11] = bad;
        let error = check_finite(&rows, 3, &[5, 0, 9, 4]).unwrap_err();
        assert!(matches!(error, Error::NotFinite { text: 9, component: 1, .. }), "{error}");
        // Also where nobody says which texts they are.
        let error = check_finite(&rows, 3, &[]).unwrap_err();
        assert!(matches!(error, Error::NotFinite { text: 2, component: 1, .. }), "{error}");
    }
}

#[test]
fn mode_names() {
    for mode in PoolingMode::ALL {
        assert_eq!(mode.to_string().parse::<PoolingMode>().unwrap(), mode);
        assert!(mode.config_flag().starts_with("pooling_mode_"));
    }
    assert!(PoolingMode::ALL.is_sorted());
    assert_eq!("mean_sqrt_len_tokens".parse::<PoolingMode>().unwrap(), PoolingMode::MeanSqrtLen);
    for wrong in ["", "Mean", "mean ", "first"] {
        let error = wrong.parse::<PoolingMode>().unwrap_err().to_string();
        assert!(error.contains(&format!("\"{wrong}\"")) && error.contains("weightedmean"), "{error}");
    }
    assert!(matches!(Pooling::new([], true).unwrap_err(), Error::Setting { setting: Setting::Pooling, .. }));
}
