//! The kernels of loading and of the stream against sums in f64, over odd shapes, with poisoned outputs. What stands behind the tokens is NaN: nothing may come of it.

use super::*;
use crate::cuda::CubinCache;
use crate::native::kernels::DeviceLinear;
use crate::native::load::{LoadJob, LoadKernels};
use crate::native::shape::Precision;
use crate::native::test_support::*;
use half::{bf16, f16};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn weights_are_laid_out_and_norms_folded() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        let load = LoadKernels::load(&device, &CubinCache::of_user(), &arch(&device), precision).unwrap();
        for (dtype, inputs, parts) in [(0, 64, vec![64]), (1, 128, vec![64, 64, 64]), (2, 192, vec![128]), (3, 64, vec![192, 64])]
        {
            let mut random = Random(inputs as u64 + dtype as u64);
            let outputs: usize = parts.iter().sum();
            let (gamma, beta) = (random.values(inputs, 2.0), random.values(inputs, 1.0));
            let as_stored = |value: f32| match dtype {
                1 => f16::from_f32(value).to_f32(),
                2 => bf16::from_f32(value).to_f32(),
                _ => value,
            };
            let w: Vec<f32> = random.values(outputs * inputs, 0.5).into_iter().map(as_stored).collect();
            let bias = random.values(outputs, 1.0);
            let raw: Vec<u8> = w
                .iter()
                .flat_map(|&value| match dtype {
                    1 => stored_bytes(Precision::Fp16, value),
                    2 => stored_bytes(Precision::Bf16, value),
                    3 => f64::from(value).to_le_bytes().to_vec(),
                    _ => stored_bytes(Precision::Fp32, value),
                })
                .collect();
            let into = DeviceLinear {
                weight: matrix(&mut stream, precision, &[], outputs, inputs),
                bias: upload(&mut stream, &vec![f32::NAN; outputs]),
                sums: Some(upload(&mut stream, &vec![f32::NAN; outputs])),
            };
            let fault = upload(&mut stream, &[0]);
            let (device_gamma, device_beta) = (upload(&mut stream, &gamma), upload(&mut stream, &beta));
            let mut first = 0;
            for rows in parts {
                let width = raw.len() / outputs;
                let source = upload(&mut stream, &raw[first * width..(first + rows) * width]);
                let part_bias = upload(&mut stream, &bias[first..first + rows]);
                let job = LoadJob {
                    source: &source,
                    dtype,
                    rows,
                    inputs,
                    first,
                    gamma: Some(&device_gamma),
                    beta: Some(&device_beta),
                    bias: Some(&part_bias),
                    fault: &fault,
                };
                load.linear(&mut stream, &job, &into).unwrap();
                first += rows;
            }
            let found = download(&mut stream, precision, &into.weight, outputs);
            let expected: Vec<f32> =
                w.iter().enumerate().map(|(i, &value)| stored(precision, value * gamma[i % inputs])).collect();
            assert_eq!(found, expected, "{precision:?} {dtype}");
            let (mut folded, mut sums, mut faults) = (vec![0.0; outputs], vec![0.0; outputs], [0]);
            stream.download(&into.bias, &mut folded).unwrap();
            stream.download(into.sums.as_ref().unwrap(), &mut sums).unwrap();
            stream.download(&fault, &mut faults).unwrap();
            assert_eq!(faults, [0]);
            for row in 0..outputs {
                let of_row = |i: usize| row * inputs + i;
                let shift: f64 = (0..inputs).map(|i| f64::from(w[of_row(i)]) * f64::from(beta[i])).sum();
                let sum: f64 = (0..inputs).map(|i| f64::from(expected[of_row(i)])).sum();
                assert!((f64::from(folded[row]) - f64::from(bias[row]) - shift).abs() < 1e-4, "{precision:?} {dtype} bias {row}");
                assert!((f64::from(sums[row]) - sum).abs() < 1e-4, "{precision:?} {dtype} sum {row}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn values_that_do_not_fit_are_noted() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for (precision, value, expected) in [
        (Precision::Fp16, 1.0, 0),
        (Precision::Fp16, 70_000.0, 2),
        (Precision::Bf16, 70_000.0, 0),
        (Precision::Fp32, 1e38, 0),
        (Precision::Fp16, f32::NAN, 1),
        (Precision::Bf16, f32::INFINITY, 1),
        (Precision::Fp32, f32::NEG_INFINITY, 1),
    ] {
        let load = LoadKernels::load(&device, &CubinCache::of_user(), &arch(&device), precision).unwrap();
        let mut values = vec![0.5_f32; 64 * 64];
        values[64 * 63 + 63] = value;
        let source = upload(&mut stream, bytemuck::cast_slice::<f32, u8>(&values));
        let fault = upload(&mut stream, &[0]);
        let into = DeviceLinear {
            weight: matrix(&mut stream, precision, &[], 64, 64),
            bias: upload(&mut stream, &[0.0; 64]),
            sums: None,
        };
        let job = LoadJob {
            source: &source,
            dtype: 0,
            rows: 64,
            inputs: 64,
            first: 0,
            gamma: None,
            beta: None,
            bias: None,
            fault: &fault,
        };
        load.linear(&mut stream, &job, &into).unwrap();
        let mut found = [0];
        stream.download(&fault, &mut found).unwrap();
        assert_eq!(found[0], expected, "{precision:?} {value}, linear");

        stream.fill_bytes(&fault, 0).unwrap();
        let table = device.alloc::<u8>(64 * 64 * precision.bytes()).unwrap();
        load.table(&mut stream, &job, &table).unwrap();
        stream.download(&fault, &mut found).unwrap();
        assert_eq!(found[0], expected, "{precision:?} {value}, table");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_stream_is_made_measured_and_given_out() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        let kernels = kernels(&device, precision, 1);
        for (hidden, lengths, rms) in
            [(64, vec![1], 0), (320, vec![3, 0, 9, 1], 0), (768, vec![128, 5, 0], 1), (2048, vec![7], 0)]
        {
            let mut random = Random(hidden as u64);
            let real: usize = lengths.iter().sum();
            let tokens = real + 3;
            let capacity = tokens.next_multiple_of(128);
            let words: Vec<f32> = random.values(20 * hidden, 1.0).into_iter().map(|v| stored(precision, v)).collect();
            let added = random.values(130 * hidden, 1.0);
            let (gamma, beta) = (random.values(hidden, 2.0), random.values(hidden, 1.0));
            let ids: Vec<i32> = (0..tokens).map(|_| (random.next() % 20) as i32).collect();
            let starts: Vec<i32> = lengths.iter().scan(0, |sum, &n| Some(std::mem::replace(sum, *sum + n as i32))).collect();
            let counts: Vec<i32> = lengths.iter().map(|&n| n as i32).collect();
            let raw: Vec<u8> = words.iter().flat_map(|&value| stored_bytes(precision, value)).collect();
            let (device_ids, device_words, device_added) =
                (upload(&mut stream, &ids), upload(&mut stream, &raw), upload(&mut stream, &added));
            let (device_starts, device_lengths) = (upload(&mut stream, &starts), upload(&mut stream, &counts));
            let rows = Rows { starts: &device_starts, lengths: &device_lengths, rows: lengths.len(), tokens };
            let norm =
                DeviceNorm { gamma: upload(&mut stream, &gamma), beta: Some(upload(&mut stream, &beta)), epsilon: 1e-5, rms };
            let residual = matrix(&mut stream, precision, &[], capacity, hidden);
            let statistics = upload(&mut stream, &vec![f32::NAN; 2 * capacity]);
            let (fault, seen) = (upload(&mut stream, &[i32::MAX]), upload(&mut stream, &[0]));
            let out = upload(&mut stream, &vec![f32::NAN; tokens * hidden]);

            let mut expected = Vec::new();
            for (row, &length) in lengths.iter().enumerate() {
                for place in 0..length {
                    let id = ids[starts[row] as usize + place] as usize;
                    expected.extend((0..hidden).map(|i| stored(precision, words[id * hidden + i] + added[place * hidden + i])));
                }
            }
            let into = (&residual, &statistics);
            kernels.embed(&mut stream, &device_ids, &rows, (&device_words, Some(&device_added)), Some(&norm), into).unwrap();
            assert_eq!(download(&mut stream, precision, &residual, real), expected, "{precision:?} {hidden}");

            let check = |found: &[f32], what: &str| {
                for (t, row) in expected.chunks(hidden).enumerate() {
                    let mean = if rms == 1 { 0.0 } else { row.iter().map(|&v| f64::from(v)).sum::<f64>() / hidden as f64 };
                    let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / hidden as f64;
                    let rs = 1.0 / (variance + 1e-5).sqrt();
                    for (place, expected) in [mean, rs].into_iter().enumerate() {
                        let found = f64::from(found[2 * t + place]);
                        assert!(
                            (found - expected).abs() < 1e-5 * (1.0 + expected.abs()),
                            "{what}: token {t}: {found} {expected}"
                        );
                    }
                }
            };
            let mut found = vec![0.0; 2 * capacity];
            stream.download(&statistics, &mut found).unwrap();
            check(&found, "embed");
            stream.upload(&vec![f32::NAN; 2 * capacity], &statistics).unwrap();
            kernels.measure(&mut stream, into, &rows, &norm, (5, &fault)).unwrap();
            stream.download(&statistics, &mut found).unwrap();
            check(&found, "measure");

            let through = |t: usize, i: usize| {
                let of = |place: usize| f64::from(found[2 * t + place]);
                (f64::from(expected[t * hidden + i]) - of(0)) * of(1) * f64::from(gamma[i]) + f64::from(beta[i])
            };
            kernels.hidden_states(&mut stream, into, &rows, Some(&norm), &out, (&fault, &seen)).unwrap();
            let mut given = vec![0.0; tokens * hidden];
            stream.download(&out, &mut given).unwrap();
            for t in 0..real {
                for i in 0..hidden {
                    let (found, expected) = (f64::from(given[t * hidden + i]), through(t, i));
                    assert!((found - expected).abs() < 2e-6 * (1.0 + expected.abs()), "({t}, {i}): {found} {expected}");
                }
            }
            kernels.normalise(&mut stream, into, &rows, &norm).unwrap();
            let normal = download(&mut stream, precision, &residual, real);
            for (i, found) in normal.iter().enumerate() {
                let expected = through(i / hidden, i % hidden);
                let allowed = 1.01 * unit(precision) * expected.abs() + 2e-6 * (1.0 + expected.abs());
                assert!((f64::from(*found) - expected).abs() < allowed, "{i}: {found} {expected}");
            }
            kernels.hidden_states(&mut stream, into, &rows, None, &out, (&fault, &seen)).unwrap();
            stream.download(&out, &mut given).unwrap();
            assert_eq!(given[..real * hidden], normal);
            let mut noted = [0];
            stream.download(&seen, &mut noted).unwrap();
            assert_eq!(noted[0], i32::MAX, "a fault where there is none");
        }
    }
}

/// What attention gave through a norm of its own, added to the stream as it is or as its norm makes it, and measured for the next.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_has_a_norm_of_its_own_is_added_and_measured() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        let kernels = kernels(&device, precision, 1);
        for (hidden, through, rms, next_rms) in [(64, true, 0, 0), (768, true, 0, 0), (320, false, 0, 1), (2048, true, 1, 0)] {
            let mut random = Random(hidden as u64);
            let (tokens, real, capacity) = (13, 11, 128);
            let (starts, lengths) = (upload(&mut stream, &[0, 9]), upload(&mut stream, &[9, 2]));
            let rows = Rows { starts: &starts, lengths: &lengths, rows: 2, tokens };
            let values = |random: &mut Random| -> Vec<f32> {
                random.values(real * hidden, 3.0).into_iter().map(|value| stored(precision, value)).collect()
            };
            let (old, x) = (values(&mut random), values(&mut random));
            let weights: Vec<Vec<f32>> = (0..4).map(|_| random.values(hidden, 1.5)).collect();
            let mut norm = |gamma: usize, beta: usize, epsilon, rms| DeviceNorm {
                gamma: upload(&mut stream, &weights[gamma]),
                beta: Some(upload(&mut stream, &weights[beta])),
                epsilon,
                rms,
            };
            let (view, own, next) = (norm(0, 1, 0.5, 0), norm(2, 3, 1e-3, rms), norm(0, 1, 1e-5, next_rms));
            let (residual, added) =
                (matrix(&mut stream, precision, &old, capacity, hidden), matrix(&mut stream, precision, &x, capacity, hidden));
            // The statistics of the stream are taken as they are given.
            let given: Vec<f32> = (0..2 * capacity).map(|i| if i % 2 == 0 { 0.25 } else { 0.5 + i as f32 / 64.0 }).collect();
            let statistics = upload(&mut stream, &given);
            let fault = upload(&mut stream, &[i32::MAX]);
            let view = through.then_some(&view);
            let into = (&residual, &statistics, view);
            kernels.add_normed(&mut stream, into, (&added, &own), &rows, Some(&next), (3, &fault)).unwrap();
            let found = download(&mut stream, precision, &residual, real);
            let mut left = vec![0.0; 2 * capacity];
            stream.download(&statistics, &mut left).unwrap();

            let measure = |row: &[f32], rms: i32, epsilon: f64| {
                let mean = if rms == 1 { 0.0 } else { row.iter().map(|&v| f64::from(v)).sum::<f64>() / hidden as f64 };
                let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / hidden as f64;
                [mean, 1.0 / (variance + epsilon).sqrt()]
            };
            for t in 0..real {
                let of_row = t * hidden..(t + 1) * hidden;
                let [mean, rs] = measure(&x[of_row.clone()], rms, 1e-3);
                for i in 0..hidden {
                    let weight = |which: usize| f64::from(weights[which][i]);
                    let normed = (f64::from(x[t * hidden + i]) - mean) * rs * weight(2) + weight(3);
                    let seen = f64::from(old[t * hidden + i]);
                    let of = |place: usize| f64::from(given[2 * t + place]);
                    let seen = if through { (seen - of(0)) * of(1) * weight(0) + weight(1) } else { seen };
                    let (found, expected) = (f64::from(found[t * hidden + i]), seen + normed);
                    let allowed = 1.01 * unit(precision) * expected.abs() + 1e-5 * (1.0 + seen.abs() + normed.abs());
                    assert!((found - expected).abs() <= allowed, "{precision:?} {hidden} ({t}, {i}): {found} {expected}");
                }
                for (place, expected) in measure(&found[of_row], next_rms, 1e-5).into_iter().enumerate() {
                    let found = f64::from(left[2 * t + place]);
                    assert!((found - expected).abs() < 1e-5 * (1.0 + expected.abs()), "token {t}: {found} {expected}");
                }
            }
            let mut noted = [0];
            stream.download(&fault, &mut noted).unwrap();
            assert_eq!(noted[0], i32::MAX, "a fault where there is none");
            // Infinities are noted.
            let infinite = matrix(&mut stream, precision, &vec![f32::INFINITY; real * hidden], capacity, hidden);
            kernels.add_normed(&mut stream, into, (&infinite, &own), &rows, None, (3, &fault)).unwrap();
            stream.download(&fault, &mut noted).unwrap();
            assert_eq!(noted[0], 3);
            let other = matrix(&mut stream, precision, &[], capacity, hidden + 64);
            kernels.add_normed(&mut stream, into, (&other, &own), &rows, None, (3, &fault)).unwrap_err();
        }
    }
}

/// Infinities of real tokens are noted with the first stage that saw them, those of padding are not.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn overflow_is_noted_with_its_stage() {
    let device = device();
    let mut stream = device.stream().unwrap();
    let precision = Precision::Fp16;
    let kernels = kernels(&device, precision, 1);
    let norm = DeviceNorm { gamma: upload(&mut stream, &[1.0; 64]), beta: None, epsilon: 1e-5, rms: 0 };
    let (starts, lengths) = (upload(&mut stream, &[0, 2]), upload(&mut stream, &[2, 1]));
    let statistics = upload(&mut stream, &[0.0; 256]);
    let fault = upload(&mut stream, &[i32::MAX]);
    let rows = Rows { starts: &starts, lengths: &lengths, rows: 2, tokens: 5 };
    let mut noted = [0];
    for (token, expected) in [(3, i32::MAX), (2, 7), (0, 4)] {
        let mut values = vec![1.0; 5 * 64];
        values[token * 64 + 9] = f32::INFINITY;
        let residual = matrix(&mut stream, precision, &values, 128, 64);
        for stage in [expected, 9] {
            if let Ok(stage) = usize::try_from(stage) {
                kernels.measure(&mut stream, (&residual, &statistics), &rows, &norm, (stage.min(9), &fault)).unwrap();
            }
        }
        stream.download(&fault, &mut noted).unwrap();
        assert_eq!(noted[0], if expected == i32::MAX { i32::MAX } else { expected }, "token {token}");
    }
}

/// Vectors pooled of a stream are those of its hidden states: every mode, rows in any order, leading tokens left out, with and without a norm.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_stream_is_pooled_through_its_norm() {
    use crate::gpu::{Hidden, Kernels, NormedStream, PoolJob, PoolShape};
    use crate::pooling::PoolingMode;

    const MODES: [PoolingMode; 6] = PoolingMode::ALL;
    let device = device();
    let mut stream = device.stream().unwrap();
    let pooling = Kernels::load(&device, &CubinCache::of_user()).unwrap();
    let mut random = Random(23);
    for precision in [Precision::Fp16, Precision::Bf16] {
        for (hidden, lengths, skip) in
            [(64, vec![1], 0), (128, vec![5, 0, 17], 2), (384, vec![33; 7], 0), (768, vec![300, 1, 64, 9], 3)]
        {
            let real: usize = lengths.iter().sum();
            let capacity = (real + 3).next_multiple_of(128);
            let values: Vec<f32> = random.values(real * hidden, 4.0).iter().map(|&value| stored(precision, value)).collect();
            let (gamma, beta) = (random.values(hidden, 2.0), random.values(hidden, 1.0));
            let mut measured = vec![f32::NAN; 2 * capacity];
            for t in 0..real {
                measured[2 * t] = random.value();
                measured[2 * t + 1] = 1.0 + random.value().abs();
            }
            let longest = lengths.iter().copied().max().unwrap_or(0);
            let starts: Vec<i32> = lengths.iter().scan(0, |sum, &n| Some(std::mem::replace(sum, *sum + n as i32))).collect();
            let counts: Vec<i32> = lengths.iter().map(|&n| n as i32).collect();
            let (device_starts, device_lengths) = (upload(&mut stream, &starts), upload(&mut stream, &counts));
            let device_skip = upload(&mut stream, &[skip as i32]);
            let (device_gamma, device_beta) = (upload(&mut stream, &gamma), upload(&mut stream, &beta));
            for (norm, what) in [
                (Some((device_gamma.clone(), Some(device_beta.clone()))), "weight and bias"),
                (Some((device_gamma.clone(), None)), "weight"),
                (None, "no norm"),
            ] {
                let state = |t: usize, i: usize| {
                    let value = f64::from(values[t * hidden + i]);
                    let through = (value - f64::from(measured[2 * t])) * f64::from(measured[2 * t + 1]) * f64::from(gamma[i]);
                    match what {
                        "no norm" => value,
                        "weight" => through,
                        _ => through + f64::from(beta[i]),
                    }
                };
                let seen = upload(&mut stream, &[0]);
                let normed = NormedStream {
                    values: matrix(&mut stream, precision, &values, capacity, hidden).values,
                    bf16: precision == Precision::Bf16,
                    capacity,
                    statistics: upload(&mut stream, &measured),
                    norm,
                    noted: [upload(&mut stream, &[77]), seen.clone()],
                };
                let dim = MODES.len() * hidden;
                let out = upload(&mut stream, &vec![f32::NAN; lengths.len() * dim]);
                let shape = PoolShape { batch: lengths.len(), seq: longest, tokens: real, hidden, dim, normalise: false };
                let job = PoolJob {
                    hidden: Hidden::Stream(&normed),
                    starts: Some(&device_starts),
                    lengths: &device_lengths,
                    skip: Some(&device_skip),
                    out: &out,
                    modes: &MODES,
                    shape,
                };
                pooling.pool(&mut stream, &job).unwrap();
                let mut found = vec![0.0; lengths.len() * dim];
                stream.download(&out, &mut found).unwrap();
                let mut noted = [0];
                stream.download(&seen, &mut noted).unwrap();
                assert_eq!(noted, [77], "what the encoder noted");
                for (row, &length) in lengths.iter().enumerate() {
                    let (first, start) = (starts[row] as usize, skip.min(length));
                    let n = (length - start) as f64;
                    for i in 0..hidden {
                        let states: Vec<f64> = (start..length).map(|t| state(first + t, i)).collect();
                        let weights: Vec<f64> = (start..length).map(|t| (t + 1) as f64).collect();
                        let sum: f64 = states.iter().sum();
                        let weighted: f64 = states.iter().zip(&weights).map(|(state, weight)| state * weight).sum();
                        let expected = match states.last() {
                            None => [0.0; 6],
                            Some(&last) => {
                                let most = states.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                                [states[0], most, sum / n, sum / n.sqrt(), weighted / weights.iter().sum::<f64>(), last]
                            }
                        };
                        for (mode, expected) in expected.into_iter().enumerate() {
                            let found = f64::from(found[row * dim + mode * hidden + i]);
                            // f32 sums of up to 300 values of up to 20.
                            assert!(
                                (found - expected).abs() < 2e-5 * (1.0 + expected.abs()),
                                "{precision:?}, {what}, row {row}, {:?}, column {i}: {found} for {expected}",
                                MODES[mode]
                            );
                        }
                    }
                }
                let short = NormedStream { statistics: normed.statistics.slice(0..1).unwrap(), ..normed.clone() };
                let bad = PoolJob { hidden: Hidden::Stream(&short), ..job };
                assert!(pooling.pool(&mut stream, &bad).is_err(), "statistics of half a token");
            }
        }
    }
}
