//! Every linear against sums in f64, over odd shapes, with poisoned outputs. What stands behind the tokens is NaN: nothing may come of it.

use super::*;
use crate::cuda::CudaError;
use crate::native::test_support::*;
use rayon::prelude::*;

fn activation(which: i32, x: f64) -> f64 {
    match which {
        1 => 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        2 => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()),
        3 => x.max(0.0),
        4 => x / (1.0 + (-x).exp()),
        _ => x,
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    normed: bool,
    /// Whether it makes the statistics of its input of sums.
    joins: bool,
    /// 0 none, 1 the stream as it is, 2 through a norm.
    residual: u8,
    activation: i32,
    tile: Tile,
}

/// The largest of |found - expected| over what roundings may make of it.
fn linear_error(kernels: &NativeKernels, precision: Precision, case: Case, seed: u64) -> f64 {
    let Case { tokens, inputs, outputs, normed, joins, residual, activation: which, tile } = case;
    let few = tile == Tile::Few && precision != Precision::Fp32;
    let device = device();
    let mut stream = device.stream().unwrap();
    let mut random = Random(seed);
    let capacity = tokens.next_multiple_of(128);
    let rounded = |values: Vec<f32>| values.into_iter().map(|value| stored(precision, value)).collect::<Vec<f32>>();
    let a = rounded(random.values(tokens * inputs, 2.0));
    let w = rounded(random.values(outputs * inputs, 0.2));
    let bias = random.values(outputs, 1.0);
    let old = rounded(random.values(tokens * outputs, 2.0));
    let (gamma, beta) = (random.values(outputs, 1.5), random.values(outputs, 0.5));
    let sums: Vec<f32> = w.chunks(inputs).map(|row| row.iter().map(|&v| f64::from(v)).sum::<f64>() as f32).collect();
    let epsilon = 1e-5_f32;
    // A normed linear for few tokens measures its input, and one that joins is told sums; all others are told statistics, whatever the truth.
    let mut statistics: Vec<f32> = (0..capacity).flat_map(|_| [random.value() * 0.3, 0.5 + random.value().abs()]).collect();
    let measured = |row: &[f32]| {
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / row.len() as f64;
        [mean as f32, (1.0 / (variance + f64::from(epsilon)).sqrt()) as f32]
    };
    let truly = (few && normed) || joins;
    if truly {
        for (t, row) in a.chunks(inputs).enumerate() {
            statistics[2 * t..2 * t + 2].copy_from_slice(&measured(row));
        }
    }

    let linear = DeviceLinear {
        weight: matrix(&mut stream, precision, &w, outputs, inputs),
        bias: upload(&mut stream, &bias),
        sums: normed.then(|| upload(&mut stream, &sums)),
    };
    let norm = DeviceNorm { gamma: upload(&mut stream, &gamma), beta: Some(upload(&mut stream, &beta)), epsilon, rms: 0 };
    let input = matrix(&mut stream, precision, &a, capacity, inputs);
    let out = match residual {
        // In place, as the engine does it.
        1 | 2 => matrix(&mut stream, precision, &old, capacity, outputs),
        _ => matrix(&mut stream, precision, &[], capacity, outputs),
    };
    let device_statistics =
        if joins { upload(&mut stream, &vec![f32::NAN; 2 * capacity]) } else { upload(&mut stream, &statistics) };
    let (starts, lengths) = (upload(&mut stream, &[0]), upload(&mut stream, &[tokens as i32]));
    let fault = upload(&mut stream, &[i32::MAX]);
    let mut sums_of_chunks = vec![f32::NAN; outputs.max(inputs).div_ceil(64) * capacity * 2];
    if joins {
        for (t, row) in a.chunks(inputs).enumerate() {
            for (chunk, values) in row.chunks(64).enumerate() {
                let at = (chunk * capacity + t) * 2;
                sums_of_chunks[at] = values.iter().sum();
                sums_of_chunks[at + 1] = values.iter().map(|value| value * value).sum();
            }
        }
    }
    let partials = upload(&mut stream, &sums_of_chunks);
    let rows = Rows { starts: &starts, lengths: &lengths, rows: 1, tokens };
    let job = LinearJob {
        input: &input,
        linear: &linear,
        statistics: &device_statistics,
        residual: match residual {
            1 => Some((&out, None)),
            2 => Some((&out, Some(&norm))),
            _ => None,
        },
        activated: which != 0,
        out: &out,
        tokens,
        partials: &partials,
        joins,
    };
    let measures = Measured { norm: normed.then_some(&norm), rows, stage: 3, fault: &fault };
    kernels.linear(&mut stream, &job, tile, &measures).unwrap();
    let found = download(&mut stream, precision, &out, tokens);
    if residual != 0 && !matches!(tile, Tile::Few | Tile::Small | Tile::Large) {
        let joined = upload(&mut stream, &vec![f32::NAN; 2 * capacity]);
        kernels.join(&mut stream, &partials, (&out, &joined), &rows, &norm, (1, &fault)).unwrap();
        let mut values = vec![0.0; 2 * capacity];
        stream.download(&joined, &mut values).unwrap();
        for (t, row) in found.chunks(outputs).enumerate() {
            for (found, expected) in values[2 * t..2 * t + 2].iter().zip(measured(row)) {
                assert!(
                    (found - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                    "{case:?}: token {t} has {found}, expected {expected}"
                );
            }
        }
    }
    if joins {
        let mut left = vec![0.0; 2 * capacity];
        stream.download(&device_statistics, &mut left).unwrap();
        for (place, (found, expected)) in left.iter().zip(&statistics).enumerate().take(2 * tokens) {
            assert!(
                (found - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                "{case:?}: {place} is {found}, expected {expected}"
            );
        }
    }
    let mut noted = [0];
    stream.download(&fault, &mut noted).unwrap();
    assert_eq!(noted[0], i32::MAX, "{case:?}: a fault where there is none");

    let of_token = |t: usize| {
        let mut worst = 0.0_f64;
        let [mean, rs] = [f64::from(statistics[2 * t]), f64::from(statistics[2 * t + 1])];
        for n in 0..outputs {
            let row = a[t * inputs..(t + 1) * inputs].iter().zip(&w[n * inputs..(n + 1) * inputs]);
            let (mut acc, mut magnitude) = (0.0, 0.0);
            for (x, y) in row {
                let product = f64::from(*x) * f64::from(*y);
                acc += product;
                magnitude += product.abs();
            }
            let mut value = acc;
            if normed {
                value = rs * (acc - mean * f64::from(sums[n]));
                magnitude = rs * (magnitude + (mean * f64::from(sums[n])).abs());
            }
            value = activation(which, value + f64::from(bias[n]));
            let view = f64::from(old[t * outputs + n]);
            let [mean, rs] = [f64::from(statistics[2 * t]), f64::from(statistics[2 * t + 1])];
            value += match residual {
                1 => view,
                2 => (view - mean) * rs * f64::from(gamma[n]) + f64::from(beta[n]),
                _ => 0.0,
            };
            // Half a unit of what is stored; sums in f32, whose errors grow at most with the number of terms; the activations' own 4e-7, and what
            // linear_sm90.cu says of its GELU.
            let hopper = !matches!(tile, Tile::Few | Tile::Small | Tile::Large);
            let gelu = if hopper && which == 1 { 8.4e-5 * value.abs() + 1.3e-5 } else { 0.0 };
            let allowed = gelu
                + unit(precision) * value.abs() * 1.01
                + (inputs as f64).sqrt() * 4.0 * 2f64.powi(-24) * (magnitude + 1.0)
                + if truly { 1e-5 * (1.0 + value.abs()) } else { 1e-6 * (1.0 + value.abs()) };
            let error = (f64::from(found[t * outputs + n]) - value).abs() / allowed;
            assert!(error.is_finite(), "{case:?} {precision:?}: ({t}, {n}) is {}", found[t * outputs + n]);
            worst = worst.max(error);
        }
        worst
    };
    (0..tokens).into_par_iter().map(of_token).reduce(|| 0.0, f64::max)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn linears_equal_sums_in_f64() {
    let sizes = [(64, 64), (128, 192), (192, 320), (384, 128), (768, 64)];
    let mut seed = 1;
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        let all: Vec<NativeKernels> = (0..5).map(|activation| kernels(&device(), precision, activation)).collect();
        for (place, tokens) in [1, 5, 16, 17, 33, 64, 77, 128, 129, 300].into_iter().enumerate() {
            let (inputs, outputs) = sizes[place % sizes.len()];
            for tile in tiles(precision) {
                if tile == Tile::Few && tokens > FEW {
                    continue;
                }
                let joins = all[0].joins(tile);
                let joining = EPILOGUES.into_iter().filter(|(normed, ..)| *normed && joins).map(|epilogue| (epilogue, true));
                for ((normed, residual, activation), joins) in
                    EPILOGUES.into_iter().map(|epilogue| (epilogue, false)).chain(joining)
                {
                    let case = Case { tokens, inputs, outputs, normed, joins, residual, activation, tile };
                    seed += 1;
                    let error = linear_error(&all[activation as usize], precision, case, seed);
                    assert!(error <= 1.0, "{precision:?} {case:?}: {error} times what roundings may make");
                }
            }
        }
    }
}

/// With a norm or not; residual; activation.
const EPILOGUES: [(bool, u8, i32); 8] =
    [(false, 0, 0), (true, 0, 0), (true, 0, 1), (false, 1, 0), (false, 2, 0), (true, 0, 2), (true, 0, 3), (false, 0, 4)];

/// All kernels that this GPU has.
fn tiles(precision: Precision) -> Vec<Tile> {
    let hopper = arch(&device()).hopper;
    match (precision, hopper) {
        (Precision::Fp32, _) => vec![Tile::Small],
        (_, false) => vec![Tile::Few, Tile::Small, Tile::Large],
        (_, true) => {
            let own = [Tile::Pingpong, Tile::Wide, Tile::Medium, Tile::Narrow, Tile::Split(1), Tile::Split(2), Tile::Split(4)];
            [Tile::Few, Tile::Small, Tile::Large].into_iter().chain(own).collect()
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn large_tiles_equal_sums_in_f64() {
    // Enough tiles of 128 x 128 for any GPU that there is.
    for precision in [Precision::Fp16, Precision::Bf16] {
        for tile in tiles(precision).into_iter().filter(|&tile| tile != Tile::Few) {
            for (residual, activation) in [(0, 1), (2, 0)] {
                let kernels = kernels(&device(), precision, activation);
                let joins = residual == 0 && kernels.joins(tile);
                let case =
                    Case { tokens: 2200, inputs: 64, outputs: 1280, normed: residual == 0, joins, residual, activation, tile };
                let error = linear_error(&kernels, precision, case, 77);
                assert!(error <= 1.0, "{precision:?} {case:?}: {error}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_does_not_fit_is_an_error() {
    let device = device();
    let mut stream = device.stream().unwrap();
    let kernels = kernels(&device, Precision::Fp16, 1);
    let input = matrix(&mut stream, Precision::Fp16, &[], 128, 64);
    let out = matrix(&mut stream, Precision::Fp16, &[], 128, 128);
    let statistics = upload(&mut stream, &[0.0; 256]);
    let linear = |stream: &mut Stream, outputs: usize, bias: usize| DeviceLinear {
        weight: matrix(stream, Precision::Fp16, &[], outputs, 64),
        bias: upload(stream, &vec![0.0; bias]),
        sums: None,
    };
    let (good, short, other) = (linear(&mut stream, 128, 128), linear(&mut stream, 128, 127), linear(&mut stream, 192, 192));
    let (starts, fault) = (upload(&mut stream, &[0]), upload(&mut stream, &[0]));
    let rows = Rows { starts: &starts, lengths: &starts, rows: 1, tokens: 128 };
    let measures = Measured { norm: None, rows, stage: 0, fault: &fault };
    let job = LinearJob {
        input: &input,
        linear: &good,
        statistics: &statistics,
        residual: None,
        activated: false,
        out: &out,
        tokens: 128,
        partials: &statistics,
        joins: false,
    };
    kernels.linear(&mut stream, &job, Tile::Small, &measures).unwrap();
    let cut = Matrix { values: out.values.slice(0..100).unwrap(), ..out.clone() };
    for bad in [
        LinearJob { tokens: 129, ..job },
        LinearJob { linear: &short, ..job },
        LinearJob { linear: &other, ..job },
        LinearJob { input: &out, ..job },
        LinearJob { out: &cut, ..job },
        LinearJob { residual: Some((&input, None)), ..job },
        LinearJob { joins: true, ..job },
    ] {
        let error = kernels.linear(&mut stream, &bad, Tile::Small, &measures).unwrap_err();
        assert!(matches!(error, CudaError::Argument { call: "linear", .. }), "{error}");
    }
    assert!(kernels.linear(&mut stream, &job, Tile::Few, &measures).is_err());
}
