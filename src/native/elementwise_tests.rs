//! Norms of queries and keys, rotary positions and gates against sums in f64. What stands behind the tokens is NaN: nothing may come of it.

use super::*;
use crate::native::NativeSettings;
use crate::native::shape::Shape;
use crate::native::test_support::*;

fn load(device: &Device, shape: Shape) -> NativeKernels {
    NativeKernels::load(device, &NativeSettings::default(), &arch(device), shape, false).unwrap()
}

fn turned(rotary: &DeviceRotary) -> QueriesKeys<'_> {
    QueriesKeys { query: None, key: None, rotary: Some(rotary) }
}

#[test]
fn turns_begin_at_none_and_keep_lengths() {
    let rotary = Rotary { base: 10_000.0, size: 8, scaling: RotaryScaling::None };
    let turns = turns(&rotary, 3);
    assert_eq!(turns.len(), 3 * 8);
    assert_eq!(turns[..8], [1.0, 0.0].repeat(4));
    // Position 2, frequency 10000^(-2/8) = 0.1.
    assert!((f64::from(turns[2 * 8 + 2]) - 0.2_f64.cos()).abs() < 1e-7);
    assert!((f64::from(turns[2 * 8 + 3]) - 0.2_f64.sin()).abs() < 1e-7);
    assert!(turns.chunks(2).all(|turn| (turn[0].hypot(turn[1]) - 1.0).abs() < 1e-6));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn queries_and_keys_are_turned_by_their_place() {
    let device = device();
    let mut stream = device.stream().unwrap();
    let dynamic = RotaryScaling::DynamicNtk { factor: 2.0, trained: 40 };
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        for (heads, head_size, size, scaling) in [
            (2, 64, 64, RotaryScaling::None),
            (4, 32, 32, RotaryScaling::Ntk { factor: 8.0 }),
            (3, 64, 32, dynamic.clone()),
            (1, 64, 64, dynamic.clone()),
        ] {
            let hidden = heads * head_size;
            let shape = Shape { rotary: true, ..Shape::as_bert(hidden, heads, 64, precision) };
            let kernels = load(&device, shape);
            let rotary = Rotary { base: 1000.0, size, scaling };
            let on_device = DeviceRotary::new(&device, &mut stream, &rotary, 100).unwrap();
            let lengths = [1_i32, 0, 40, 41, 100, 3];
            let starts: Vec<i32> = lengths.iter().scan(0, |end, n| Some(std::mem::replace(end, *end + n))).collect();
            let real = lengths.iter().sum::<i32>() as usize;
            let (tokens, capacity) = (real + 7, (real + 7).next_multiple_of(128));
            let mut random = Random(size as u64);
            let values: Vec<f32> =
                random.values(tokens * 3 * hidden, 2.0).into_iter().map(|value| stored(precision, value)).collect();
            let qkv = matrix(&mut stream, precision, &values, capacity, 3 * hidden);
            let (device_starts, device_lengths) = (upload(&mut stream, &starts), upload(&mut stream, &lengths));
            let rows = Rows { starts: &device_starts, lengths: &device_lengths, rows: lengths.len(), tokens };
            kernels.queries_keys(&mut stream, &qkv, &rows, 100, &turned(&on_device)).unwrap();
            let found = download(&mut stream, precision, &qkv, tokens);

            let mut expected: Vec<f64> = values.iter().copied().map(f64::from).collect();
            for (&start, &length) in starts.iter().zip(&lengths) {
                for place in 0..length as usize {
                    let token = &mut expected[(start as usize + place) * 3 * hidden..][..2 * hidden];
                    for head in token.chunks_mut(head_size) {
                        for (pair, frequency) in rotary.frequencies(length as usize).into_iter().enumerate() {
                            let (sin, cos) = (place as f64 * frequency).sin_cos();
                            let (a, b) = (head[pair], head[pair + size / 2]);
                            (head[pair], head[pair + size / 2]) = (a * cos - b * sin, b * cos + a * sin);
                        }
                    }
                }
            }
            for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                // Half a unit of what is stored; angles below 100 in f32, whose frequencies are rounded as well.
                let allowed = unit(precision) * expected.abs() * 1.01 + 5e-5;
                assert!(
                    (f64::from(found) - expected).abs() <= allowed,
                    "{precision:?} {rotary:?}: value {i} is {found}, not {expected}"
                );
            }
        }
    }
}

/// Norms of either or both, with and without a bias, a mean and a turn behind them; values stay as they are.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn queries_and_keys_go_through_their_norms() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        for (heads, head_size, of_queries, of_keys, rotary) in
            [(1, 64, true, true, false), (12, 64, true, false, true), (12, 32, false, true, false), (16, 128, true, true, false)]
        {
            if precision != Precision::Fp32 && head_size == 128 {
                continue;
            }
            let hidden = heads * head_size;
            let shape = Shape { rotary, inner_norms: true, ..Shape::as_bert(hidden, heads, 64, precision) };
            let kernels = load(&device, shape);
            let mut random = Random(hidden as u64);
            let lengths = [3_i32, 0, 12];
            let (starts, real, tokens, capacity) = ([0, 3, 3], 15_usize, 20_usize, 128_usize);
            let weights: Vec<Vec<f32>> = [2.0, 1.0, 2.0].map(|scale| random.values(hidden, scale)).into();
            // Far from 0 beside their spread, as sums of squares alone would lose them.
            let values: Vec<f32> =
                random.values(tokens * 3 * hidden, 2.0).into_iter().map(|value| stored(precision, value + 3.0)).collect();
            let qkv = matrix(&mut stream, precision, &values, capacity, 3 * hidden);
            let mut norm = |gamma: usize, beta: Option<usize>, rms| DeviceNorm {
                gamma: upload(&mut stream, &weights[gamma]),
                beta: beta.map(|beta| upload(&mut stream, &weights[beta])),
                epsilon: 1e-5,
                rms,
            };
            let (query, key) = (norm(0, Some(1), 0), norm(2, None, 1));
            let turn = Rotary { base: 1000.0, size: head_size, scaling: RotaryScaling::None };
            let on_device = DeviceRotary::new(&device, &mut stream, &turn, 12).unwrap();
            let (device_starts, device_lengths) = (upload(&mut stream, &starts), upload(&mut stream, &lengths));
            let rows = Rows { starts: &device_starts, lengths: &device_lengths, rows: lengths.len(), tokens };
            let job = QueriesKeys {
                query: of_queries.then_some(&query),
                key: of_keys.then_some(&key),
                rotary: rotary.then_some(&on_device),
            };
            kernels.queries_keys(&mut stream, &qkv, &rows, 12, &job).unwrap();
            let found = download(&mut stream, precision, &qkv, tokens);

            let mut expected: Vec<f64> = values.iter().copied().map(f64::from).collect();
            for t in 0..real {
                let place = if t < 3 { t } else { t - 3 };
                for (part, gamma, beta, rms, normed) in
                    [(0, &weights[0], Some(&weights[1]), false, of_queries), (1, &weights[2], None, true, of_keys)]
                {
                    let row = &mut expected[(t * 3 + part) * hidden..][..hidden];
                    if normed {
                        let mean = if rms { 0.0 } else { row.iter().sum::<f64>() / hidden as f64 };
                        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / hidden as f64;
                        for (i, value) in row.iter_mut().enumerate() {
                            let shift = beta.map_or(0.0, |beta| f64::from(beta[i]));
                            *value = (*value - mean) / (variance + 1e-5).sqrt() * f64::from(gamma[i]) + shift;
                        }
                    }
                    for head in row.chunks_mut(head_size).filter(|_| rotary) {
                        for (pair, frequency) in turn.frequencies(12).into_iter().enumerate() {
                            let (sin, cos) = (place as f64 * frequency).sin_cos();
                            let (a, b) = (head[pair], head[pair + head_size / 2]);
                            (head[pair], head[pair + head_size / 2]) = (a * cos - b * sin, b * cos + a * sin);
                        }
                    }
                }
            }
            for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                // Values are stored between norm and turn, and again behind it.
                let allowed = 2.02 * unit(precision) * (1.0 + expected.abs()) * if rotary { 3.0 } else { 1.0 } + 1e-4;
                let changed = i / (3 * hidden) < real;
                assert!(
                    if changed { (f64::from(found) - expected).abs() <= allowed } else { found == values[i] },
                    "{precision:?} {hidden}: value {i} is {found}, not {expected}"
                );
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gates_multiply_what_was_activated() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        for (activation, tokens, wide) in [(1, 1_usize, 64_usize), (4, 77, 192), (1, 300, 1152), (3, 128, 64)] {
            let shape = Shape { activation, gated: true, ..Shape::as_bert(128, 2, wide, precision) };
            let kernels = load(&device, shape);
            let capacity = tokens.next_multiple_of(128);
            let values: Vec<f32> =
                Random(wide as u64).values(tokens * 2 * wide, 4.0).into_iter().map(|value| stored(precision, value)).collect();
            let expanded = matrix(&mut stream, precision, &values, capacity, 2 * wide);
            let out = matrix(&mut stream, precision, &[], capacity, wide);
            kernels.gate(&mut stream, &expanded, &out, tokens).unwrap();
            let found = download(&mut stream, precision, &out, tokens);
            for t in 0..tokens {
                for n in 0..wide {
                    let gate = f64::from(values[t * 2 * wide + n]);
                    let activated = match activation {
                        1 => gate * 0.5 * (1.0 + libm::erf(gate * std::f64::consts::FRAC_1_SQRT_2)),
                        3 => gate.max(0.0),
                        _ => gate / (1.0 + (-gate).exp()),
                    };
                    let expected = activated * f64::from(values[t * 2 * wide + wide + n]);
                    let allowed = unit(precision) * expected.abs() * 1.01 + 4e-6 * (1.0 + expected.abs());
                    let found = f64::from(found[t * wide + n]);
                    assert!(
                        (found - expected).abs() <= allowed,
                        "{precision:?} {activation}: ({t}, {n}) is {found}, not {expected}"
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_does_not_fit_is_an_error() {
    let device = device();
    let mut stream = device.stream().unwrap();
    let precision = Precision::Fp16;
    let shape = Shape { gated: true, rotary: true, ..Shape::as_bert(128, 2, 64, precision) };
    let kernels = load(&device, shape);
    let rotary = Rotary { base: 1000.0, size: 64, scaling: RotaryScaling::None };
    let rotary = DeviceRotary::new(&device, &mut stream, &rotary, 10).unwrap();
    let qkv = matrix(&mut stream, precision, &[], 128, 384);
    let (starts, lengths) = (upload(&mut stream, &[0]), upload(&mut stream, &[10]));
    let rows = Rows { starts: &starts, lengths: &lengths, rows: 1, tokens: 10 };
    let job = turned(&rotary);
    kernels.queries_keys(&mut stream, &qkv, &rows, 10, &job).unwrap();
    kernels.queries_keys(&mut stream, &qkv, &rows, 11, &job).unwrap_err();
    kernels
        .queries_keys(&mut stream, &matrix(&mut device.stream().unwrap(), precision, &[], 128, 256), &rows, 10, &job)
        .unwrap_err();
    let short = DeviceNorm { gamma: upload(&mut stream, &[1.0; 64]), beta: None, epsilon: 1e-5, rms: 0 };
    kernels.queries_keys(&mut stream, &qkv, &rows, 10, &QueriesKeys { key: Some(&short), ..job }).unwrap_err();
    let [expanded, out] = [128, 64].map(|columns| matrix(&mut stream, precision, &[], 128, columns));
    kernels.gate(&mut stream, &expanded, &out, 128).unwrap();
    kernels.gate(&mut stream, &expanded, &out, 129).unwrap_err();
    kernels.gate(&mut stream, &qkv, &out, 10).unwrap_err();
    // A model without such parts has not the kernels.
    let plain = load(&device, Shape { gated: false, rotary: false, inner_norms: false, pre_norm: false, ..shape });
    plain.gate(&mut stream, &expanded, &out, 10).unwrap_err();
    plain.queries_keys(&mut stream, &qkv, &rows, 10, &job).unwrap_err();
    stream.synchronize().unwrap();
}
