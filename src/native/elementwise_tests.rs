//! Rotary positions and gates against sums in f64. What stands behind the tokens is NaN: nothing may come of it.

use super::*;
use crate::native::NativeSettings;
use crate::native::shape::Shape;
use crate::native::test_support::*;

fn load(device: &Device, shape: Shape) -> NativeKernels {
    NativeKernels::load(device, &NativeSettings::default(), &arch(device), shape, false).unwrap()
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
            let shape = Shape { hidden, heads, head_size, wide: 64, activation: 1, precision, gated: false, rotary: true };
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
            kernels.rotate(&mut stream, &qkv, &rows, 100, &on_device).unwrap();
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

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gates_multiply_what_was_activated() {
    let device = device();
    let mut stream = device.stream().unwrap();
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
        for (activation, tokens, wide) in [(1, 1_usize, 64_usize), (4, 77, 192), (1, 300, 1152), (3, 128, 64)] {
            let shape = Shape { hidden: 128, heads: 2, head_size: 64, wide, activation, precision, gated: true, rotary: false };
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
    let shape = Shape { hidden: 128, heads: 2, head_size: 64, wide: 64, activation: 1, precision, gated: true, rotary: true };
    let kernels = load(&device, shape);
    let rotary = Rotary { base: 1000.0, size: 64, scaling: RotaryScaling::None };
    let rotary = DeviceRotary::new(&device, &mut stream, &rotary, 10).unwrap();
    let qkv = matrix(&mut stream, precision, &[], 128, 384);
    let (starts, lengths) = (upload(&mut stream, &[0]), upload(&mut stream, &[10]));
    let rows = Rows { starts: &starts, lengths: &lengths, rows: 1, tokens: 10 };
    kernels.rotate(&mut stream, &qkv, &rows, 10, &rotary).unwrap();
    kernels.rotate(&mut stream, &qkv, &rows, 11, &rotary).unwrap_err();
    kernels
        .rotate(&mut stream, &matrix(&mut device.stream().unwrap(), precision, &[], 128, 256), &rows, 10, &rotary)
        .unwrap_err();
    let [expanded, out] = [128, 64].map(|columns| matrix(&mut stream, precision, &[], 128, columns));
    kernels.gate(&mut stream, &expanded, &out, 128).unwrap();
    kernels.gate(&mut stream, &expanded, &out, 129).unwrap_err();
    kernels.gate(&mut stream, &qkv, &out, 10).unwrap_err();
    // A model without such parts has not the kernels.
    let plain = load(&device, Shape { gated: false, rotary: false, ..shape });
    plain.gate(&mut stream, &expanded, &out, 10).unwrap_err();
    plain.rotate(&mut stream, &qkv, &rows, 10, &rotary).unwrap_err();
    stream.synchronize().unwrap();
}
