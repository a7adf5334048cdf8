//! Every kernel against sums in f64, over odd shapes, with poisoned outputs. What stands behind the tokens is NaN: nothing may come of it.

use super::*;
use crate::native::arch::Arch;
use crate::native::linear::{FEW, LinearJob, Measured, Tile};
use crate::native::load::{LoadJob, LoadKernels};
use half::{bf16, f16};
use rayon::prelude::*;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.value() * scale).collect()
    }
}

fn device() -> Device {
    Device::open(0).unwrap()
}

fn arch(device: &Device) -> Arch {
    Arch::of(device, std::env::var("TRT_EMBED_CUDA_ARCH").ok().as_deref()).unwrap()
}

fn kernels(device: &Device, precision: Precision, activation: i32) -> NativeKernels {
    let shape = Shape { hidden: 128, heads: 2, head_size: 64, wide: 256, activation, precision };
    NativeKernels::load(device, &CubinCache::of_user(), &arch(device), shape, false).unwrap()
}

/// What is stored of `value`.
fn stored(precision: Precision, value: f32) -> f32 {
    match precision {
        Precision::Fp16 => f16::from_f32(value).to_f32(),
        Precision::Bf16 => bf16::from_f32(value).to_f32(),
        Precision::Fp32 => value,
    }
}

/// Half a unit of the last place of a stored 1.
fn unit(precision: Precision) -> f64 {
    match precision {
        Precision::Fp16 => 2f64.powi(-11),
        Precision::Bf16 => 2f64.powi(-8),
        Precision::Fp32 => 2f64.powi(-24),
    }
}

/// Where value (row, column) stands, in values: the layout that prelude.cuh describes, written once more.
fn place(precision: Precision, row: usize, column: usize, rows: usize, columns: usize) -> usize {
    if precision == Precision::Fp32 {
        return row * columns + column;
    }
    let (chunk, piece) = (column / 64, column % 64 / 8);
    (chunk * rows + row) * 64 + (piece ^ (row % 8)) * 8 + column % 8
}

/// `[rows, columns]`, row-major, as bytes of the layout with room for `capacity` rows; those behind are NaN.
fn laid_out(precision: Precision, values: &[f32], capacity: usize, columns: usize) -> Vec<u8> {
    let bytes = precision.bytes();
    let mut out = vec![0xff_u8; capacity * columns * bytes];
    for (i, &value) in values.iter().enumerate() {
        let at = place(precision, i / columns, i % columns, capacity, columns) * bytes;
        let raw = match precision {
            Precision::Fp16 => f16::from_f32(value).to_le_bytes().to_vec(),
            Precision::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            Precision::Fp32 => value.to_le_bytes().to_vec(),
        };
        out[at..at + bytes].copy_from_slice(&raw);
    }
    out
}

fn read_back(precision: Precision, bytes: &[u8], rows: usize, capacity: usize, columns: usize) -> Vec<f32> {
    let width = precision.bytes();
    let value = |row, column| {
        let at = place(precision, row, column, capacity, columns) * width;
        let raw = &bytes[at..at + width];
        match precision {
            Precision::Fp16 => f16::from_le_bytes(raw.try_into().unwrap()).to_f32(),
            Precision::Bf16 => bf16::from_le_bytes(raw.try_into().unwrap()).to_f32(),
            Precision::Fp32 => f32::from_le_bytes(raw.try_into().unwrap()),
        }
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).map(|(row, column)| value(row, column)).collect()
}

fn upload<T: DeviceValue>(stream: &mut Stream, values: &[T]) -> DeviceBuffer<T> {
    let buffer = stream.device().alloc(values.len()).unwrap();
    stream.upload(values, &buffer).unwrap();
    buffer
}

fn matrix(stream: &mut Stream, precision: Precision, values: &[f32], capacity: usize, columns: usize) -> Matrix {
    let values = upload(stream, &laid_out(precision, values, capacity, columns));
    Matrix { values, capacity, columns }
}

fn download(stream: &mut Stream, precision: Precision, matrix: &Matrix, rows: usize) -> Vec<f32> {
    let mut bytes = vec![0; matrix.values.len()];
    stream.download(&matrix.values, &mut bytes).unwrap();
    read_back(precision, &bytes, rows, matrix.capacity, matrix.columns)
}

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
    /// 0 none, 1 the stream as it is, 2 through a norm.
    residual: u8,
    activation: i32,
    tile: Tile,
}

/// The largest of |found - expected| over what roundings may make of it.
fn linear_error(precision: Precision, case: Case, seed: u64) -> f64 {
    let Case { tokens, inputs, outputs, normed, residual, activation: which, tile } = case;
    let few = tile == Tile::Few && precision != Precision::Fp32;
    let device = device();
    let kernels = kernels(&device, precision, which);
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
    // A normed linear for few tokens measures its input; all others are told, whatever the truth.
    let mut statistics: Vec<f32> = (0..capacity).flat_map(|_| [random.value() * 0.3, 0.5 + random.value().abs()]).collect();
    let measured = |row: &[f32]| {
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / row.len() as f64;
        [mean as f32, (1.0 / (variance + f64::from(epsilon)).sqrt()) as f32]
    };
    if few && normed {
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
    let device_statistics = upload(&mut stream, &statistics);
    let (starts, lengths) = (upload(&mut stream, &[0]), upload(&mut stream, &[tokens as i32]));
    let fault = upload(&mut stream, &[i32::MAX]);
    let partials = upload(&mut stream, &vec![f32::NAN; outputs.div_ceil(64) * capacity * 2]);
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
    };
    let measures = Measured { norm: normed.then_some(&norm), rows, stage: 3, fault: &fault };
    kernels.linear(&mut stream, &job, tile, &measures).unwrap();
    let found = download(&mut stream, precision, &out, tokens);
    if residual != 0 && matches!(tile, Tile::Pingpong | Tile::Wide | Tile::Narrow | Tile::Split(_)) {
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
            // Half a unit of what is stored; sums in f32, whose errors grow at most with the number of terms; the activations' own 4e-7.
            let allowed = unit(precision) * value.abs() * 1.01
                + (inputs as f64).sqrt() * 4.0 * 2f64.powi(-24) * (magnitude + 1.0)
                + if few && normed { 1e-5 * (1.0 + value.abs()) } else { 1e-6 * (1.0 + value.abs()) };
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
        for (place, tokens) in [1, 5, 16, 17, 33, 64, 77, 128, 129, 300].into_iter().enumerate() {
            let (inputs, outputs) = sizes[place % sizes.len()];
            for tile in tiles(precision) {
                if tile == Tile::Few && tokens > FEW {
                    continue;
                }
                for (normed, residual, activation) in EPILOGUES {
                    let case = Case { tokens, inputs, outputs, normed, residual, activation, tile };
                    seed += 1;
                    let error = linear_error(precision, case, seed);
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
            let own = [Tile::Pingpong, Tile::Wide, Tile::Narrow, Tile::Split(1), Tile::Split(2), Tile::Split(4)];
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
                let case = Case { tokens: 2200, inputs: 64, outputs: 1280, normed: residual == 0, residual, activation, tile };
                let error = linear_error(precision, case, 77);
                assert!(error <= 1.0, "{precision:?} {case:?}: {error}");
            }
        }
    }
}

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
                    1 => f16::from_f32(value).to_le_bytes().to_vec(),
                    2 => bf16::from_f32(value).to_le_bytes().to_vec(),
                    3 => f64::from(value).to_le_bytes().to_vec(),
                    _ => value.to_le_bytes().to_vec(),
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
            let raw: Vec<u8> = words
                .iter()
                .flat_map(|&v| match precision {
                    Precision::Fp16 => f16::from_f32(v).to_le_bytes().to_vec(),
                    Precision::Bf16 => bf16::from_f32(v).to_le_bytes().to_vec(),
                    Precision::Fp32 => v.to_le_bytes().to_vec(),
                })
                .collect();
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
            kernels.embed(&mut stream, &device_ids, &rows, &device_words, Some(&device_added), Some(&norm), into).unwrap();
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
    ] {
        let error = kernels.linear(&mut stream, &bad, Tile::Small, &measures).unwrap_err();
        assert!(matches!(error, CudaError::Argument { call: "linear", .. }), "{error}");
    }
    assert!(kernels.linear(&mut stream, &job, Tile::Few, &measures).is_err());
}
