//! Attention against sums in f64, on the values as they are stored.

use super::*;
use crate::native::test_support::{Random, arch, device, download, matrix, stored, unit, upload};
use crate::native::{NativeSettings, Precision};
use crate::tokens::BatchSize;

/// One pack and what attention makes of it.
struct Case {
    precision: Precision,
    heads: usize,
    head_size: usize,
    biased: bool,
    window: i32,
    lengths: Vec<usize>,
}

/// Values `[tokens, 3 hidden]` of queries, keys and values, and the bias `[heads, 2 reach + 1]`.
fn inputs(case: &Case, seed: u64) -> (Vec<f32>, Vec<f32>, usize) {
    let mut random = Random(seed);
    let tokens: usize = case.lengths.iter().sum();
    let reach = case.lengths.iter().copied().max().unwrap_or(1);
    let qkv = random.values(tokens * 3 * case.heads * case.head_size, 2.0);
    (
        qkv.into_iter().map(|value| stored(case.precision, value)).collect(),
        random.values(case.heads * (2 * reach + 1), 3.0),
        reach,
    )
}

fn starts(lengths: &[usize]) -> Vec<i32> {
    lengths.iter().scan(0, |end, &length| Some(std::mem::replace(end, *end + length as i32))).collect()
}

/// `[tokens, hidden]`, the tokens behind the last row included, which nobody wrote: they are NaN.
fn run(case: &Case, kernels: &NativeKernels, qkv: &[f32], (bias, reach): (&[f32], usize)) -> Vec<f32> {
    let Case { precision, heads, head_size, .. } = *case;
    let hidden = heads * head_size;
    let tokens: usize = case.lengths.iter().sum();
    let longest = case.lengths.iter().copied().max().unwrap_or(0);
    let capacity = (tokens + 1).next_multiple_of(128);
    let mut stream = device().stream().unwrap();
    let stream = &mut stream;
    let qkv = matrix(stream, precision, qkv, capacity, 3 * hidden);
    let context = matrix(stream, precision, &[], capacity, hidden);
    let lengths: Vec<i32> = case.lengths.iter().map(|&length| length as i32).collect();
    let (starts, lengths) = (upload(stream, &starts(&case.lengths)), upload(stream, &lengths));
    let rows = Rows { starts: &starts, lengths: &lengths, rows: case.lengths.len(), tokens };
    let work = kernels.work_bytes(BatchSize { rows: rows.rows, longest, tokens });
    let list = upload(stream, &vec![0xff_u8; work.max(1)]);
    let bias = case.biased.then(|| {
        let bias = Bias { by_distance: upload(stream, bias), reach, table: None };
        kernels.prepare_bias(stream, &bias).unwrap()
    });
    kernels.plan_attention(stream, &rows, longest, &list).unwrap();
    let job = AttentionJob { qkv: &qkv, context: &context, rows, longest, bias: bias.as_ref(), window: case.window, list: &list };
    kernels.attention(stream, &job).unwrap();
    download(stream, precision, &context, tokens + 1)
}

/// Of token `t` of the row `start..start + length` and a head: the result, and how far a kernel may be from it.
fn expected(
    case: &Case,
    qkv: &[f32],
    (bias, reach): (&[f32], usize),
    (start, length, t, head): (usize, usize, usize, usize),
) -> (Vec<f64>, f64) {
    let Case { precision, heads, head_size, biased, window, .. } = *case;
    let hidden = heads * head_size;
    let at = |token: usize, part: usize| {
        let first = (start + token) * 3 * hidden + part * hidden + head * head_size;
        &qkv[first..first + head_size]
    };
    let scale = 1.0 / (head_size as f64).sqrt();
    let sees = |key: usize| window < 0 || key.abs_diff(t) <= window as usize;
    let (mut scores, mut largest) = (Vec::new(), 0.0_f64);
    for key in (0..length).filter(|&key| sees(key)) {
        let products = at(t, 0).iter().zip(at(key, 1)).map(|(q, k)| f64::from(*q) * f64::from(*k));
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
        let added = if biased { f64::from(bias[head * (2 * reach + 1) + reach + key - t]) } else { 0.0 };
        largest = largest.max(size * scale + added.abs());
        scores.push((key, sum * scale + added));
    }
    let most = scores.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|(_, score)| (score - most).exp()).sum();
    let mut out = vec![0.0; head_size];
    for &(key, score) in &scores {
        let weight = (score - most).exp() / sum;
        for (out, value) in out.iter_mut().zip(at(key, 2)) {
            *out += weight * f64::from(*value);
        }
    }
    // Values are up to 2. A weight is off by the rounding of its stored form, by that of its score in f32 (whose relative error in the weight is the
    // absolute one of the score) and of exp2; the result by its own rounding and by f32 sums over the keys. Twice the first, for weights and their sum.
    let f32_unit = 2f64.powi(-24);
    let score_error = (head_size as f64 + 4.0) * largest * f32_unit + 2f64.powi(-21);
    let tolerance = 2.0 * (3.0 * unit(precision) + 2.0 * score_error + (length as f64) * f32_unit);
    (out, tolerance)
}

fn check(case: &Case, seed: u64) {
    let (qkv, bias, reach) = inputs(case, seed);
    let Case { precision, heads, head_size, .. } = *case;
    let shape = Shape::as_bert(heads * head_size, heads, 256, precision);
    let device = device();
    let hidden = heads * head_size;
    // The fastest kernels, then those whose bits do not depend on the pack.
    for invariant in [false, true] {
        let settings = NativeSettings { invariant, ..NativeSettings::default() };
        let kernels = NativeKernels::load(&device, &settings, &arch(&device), shape, case.biased).unwrap();
        let found = run(case, &kernels, &qkv, (&bias, reach));
        check_found(case, &found, &qkv, (&bias, reach));
        if !invariant {
            continue;
        }
        for (row, &start) in starts(&case.lengths).iter().enumerate().step_by(5) {
            let (start, length) = (start as usize, case.lengths[row]);
            if length == 0 {
                continue;
            }
            let alone = Case { lengths: vec![length], precision, heads, head_size, biased: case.biased, window: case.window };
            let own = &qkv[start * 3 * hidden..(start + length) * 3 * hidden];
            let alone = run(&alone, &kernels, own, (&bias, reach));
            let together = &found[start * hidden..(start + length) * hidden];
            assert_eq!(alone[..length * hidden], *together, "row {row} of {length}, alone");
        }
    }
}

/// `found` against sums in f64.
fn check_found(case: &Case, found: &[f32], qkv: &[f32], (bias, reach): (&[f32], usize)) {
    let Case { precision, heads, head_size, .. } = *case;
    let hidden = heads * head_size;
    for (row, &start) in starts(&case.lengths).iter().enumerate() {
        let (start, length) = (start as usize, case.lengths[row]);
        // All tokens of short rows, some of long ones.
        for t in (0..length).step_by(1 + length / 40) {
            for head in 0..heads {
                let (expected, tolerance) = expected(case, qkv, (bias, reach), (start, length, t, head));
                let found = &found[(start + t) * hidden + head * head_size..][..head_size];
                for (found, expected) in found.iter().zip(&expected) {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(
                        error <= tolerance,
                        "{precision:?} row {row} of {length}, token {t}, head {head}: {found} for {expected}"
                    );
                }
            }
        }
    }
    let tokens: usize = case.lengths.iter().sum();
    assert!(found[tokens * hidden..].iter().all(|value| value.is_nan()), "what stands behind the rows was written");
}

/// Lengths at the borders of all kinds of work, and random ones; rows without tokens among them.
fn packs() -> Vec<Vec<usize>> {
    let mut random = Random(11);
    let mut packs =
        vec![vec![1], vec![32], vec![33], vec![512], vec![31, 32, 33, 1, 2, 63, 64, 65], vec![0, 5, 0, 129, 127, 128, 0]];
    packs.push((0..60).map(|_| 1 + random.next() as usize % 40).collect());
    packs.push((0..20).map(|_| 1 + random.next() as usize % 512).collect());
    packs
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn attention_equals_sums_in_f64() {
    for (heads, head_size) in [(2, 64), (4, 32)] {
        for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
            for (biased, window) in [(false, -1), (true, -1), (false, 5), (true, 64)] {
                for (seed, lengths) in packs().into_iter().enumerate() {
                    check(&Case { precision, heads, head_size, biased, window, lengths }, seed as u64);
                }
            }
        }
    }
}

/// Entries that plan_attention makes of rows of these lengths.
fn entries_used(lengths: &[usize], heads: usize, wide_from: usize) -> usize {
    let long = lengths.iter().filter(|&&length| length > SHORT_ROW);
    let short = lengths.iter().filter(|&&length| (1..=SHORT_ROW).contains(&length)).count();
    let wide = long.clone().map(|length| length.div_ceil(128)).sum::<usize>() * heads >= wide_from;
    long.map(|length| length.div_ceil(if wide { 128 } else { 64 })).sum::<usize>() + short.div_ceil(4)
}

/// An entry beyond the last is not written, and its row would be left out.
#[test]
fn the_list_holds_every_pack() {
    let mut random = Random(5);
    let mut below = move |n: usize| random.next() as usize % n;
    let borders = [0, 1, 16, 32, 33, 64, 65, 128, 129, 192, 193, 257];
    let mut full = 0;
    for _ in 0..200_000 {
        let heads = [1, 2, 6, 12, 16][below(5)];
        let wide_from = [0, 1, 56, 216, 264][below(5)];
        let (kind, most) = (below(4), 1 + below(600));
        let lengths: Vec<usize> = (0..1 + below(60))
            .map(|_| match kind {
                0 => below(most + 1),
                1 => most,
                2 => borders[below(borders.len())],
                _ => SHORT_ROW + below(2),
            })
            .collect();
        let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let size = BatchSize { rows: lengths.len(), longest, tokens: lengths.iter().sum() };
        let entries = list_entries(size, heads, wide_from);
        let used = entries_used(&lengths, heads, wide_from);
        assert!(used <= entries, "{lengths:?} of {heads} heads, wide from {wide_from}: {used} entries in {entries}");
        full += usize::from(used == entries);
        // What serves a pack serves those that are smaller: scratch memory is made for the largest.
        let larger = BatchSize { rows: size.rows + below(5), longest: longest + below(40), tokens: size.tokens + below(200) };
        assert!(entries <= list_entries(larger, heads, wide_from), "{size:?} and {larger:?}");
    }
    assert!(full > 0, "no pack came near the bound");
}
