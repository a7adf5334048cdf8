//! Floors against numbers that were computed by hand, for MPNet-base: 12 layers, hidden size 768, 12 heads, 3072 wide.

use super::*;
use crate::model::ModelFolder;
use crate::native::program::{NormId, program};
use std::path::Path;

const MPNET: Shape = Shape::as_bert(768, 12, 3072, Precision::Fp16);
const WINDOWS: [i32; 12] = [-1; 12];

fn load(rows: usize, longest: usize) -> Load<'static> {
    let size = BatchSize::padded(rows, longest);
    Load { rows: full_rows(size), tokens: size.tokens, windows: &WINDOWS, biased: true, statistics: &[] }
}

fn linear(linear: LinearId, norm: bool, residual: Option<Residual>) -> Step {
    Step::Linear { layer: 0, linear, norm: norm.then_some(NormId::Embeddings), residual }
}

const THROUGH: Option<Residual> = Some(Residual::Through(NormId::Embeddings));

/// The program of a post-norm encoder of two layers (three in the fixture of MPNet).
fn fixture_program() -> Vec<Step> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert");
    program(&ModelFolder::open(&folder).unwrap().architecture().unwrap())
}

#[test]
fn steps_of_one_text_of_16_tokens() {
    let load = load(1, 16);
    let of = |step: &Step| work(step, Statistics::Joined, &MPNET, &load);
    // 16 ids of 4 bytes; 16 x 768 of 2 bytes read and written, 16 x 768 of 4 bytes read; 16 x 8.
    assert_eq!(of(&Step::Embed { norm: None }), LayerWork { bytes: 64 + 24_576 + 49_152 + 24_576 + 128, flops: 0 });
    // 2304 x 768 x 2, bias and sums 2304 x 4 each, in 16 x 768 x 2, out 16 x 2304 x 2, statistics 128; 2 x 16 x 2304 x 768.
    let qkv = of(&linear(LinearId::Qkv, true, None));
    assert_eq!(qkv, LayerWork { bytes: 3_538_944 + 9_216 + 9_216 + 24_576 + 73_728 + 128, flops: 56_623_104 });
    // 768 x 768 x 2, bias 3072, in and out 24,576 each, the stream 24,576 with statistics 128 and a norm of 6144.
    let output = of(&linear(LinearId::Output, false, THROUGH));
    assert_eq!(output, LayerWork { bytes: 1_179_648 + 3_072 + 3 * 24_576 + 128 + 6_144, flops: 18_874_368 });
    let expansion = of(&linear(LinearId::Expansion, true, None));
    assert_eq!(expansion, LayerWork { bytes: 4_718_592 + 12_288 + 12_288 + 24_576 + 98_304 + 128, flops: 75_497_472 });
    let contraction = of(&linear(LinearId::Contraction, false, Some(Residual::Raw)));
    assert_eq!(contraction, LayerWork { bytes: 4_718_592 + 3_072 + 98_304 + 2 * 24_576, flops: 75_497_472 });
    // 16 x 2304 x 2 in, 16 x 768 x 2 out, a bias of 12 x 31 x 4; 4 x 16 x 16 x 768.
    assert_eq!(of(&Step::Attention { layer: 0 }), LayerWork { bytes: 73_728 + 24_576 + 1_488, flops: 786_432 });
    // 12 chunks.
    assert_eq!(of(&Step::Measure { norm: NormId::Embeddings, stage: 1 }), LayerWork { bytes: 16 * 12 * 8 + 128, flops: 0 });
    let give = Step::Give { norm: Some(NormId::Embeddings) };
    assert_eq!(of(&give), LayerWork { bytes: 24_576 + 128 + 6_144 + 49_152, flops: 0 });
    assert_eq!(of(&Step::Normalise { norm: NormId::Embeddings }), LayerWork { bytes: 2 * 24_576 + 128 + 6_144, flops: 0 });
}

#[test]
fn statistics_cost_what_they_read() {
    let measure = Step::Measure { norm: NormId::Embeddings, stage: 1 };
    let with = |statistics| work(&measure, statistics, &MPNET, &load(1, 128));
    assert_eq!(with(Statistics::Inline), LayerWork::default());
    assert_eq!(with(Statistics::Joined).bytes, 128 * 12 * 8 + 1_024);
    assert_eq!(with(Statistics::Read).bytes, 128 * 768 * 2 + 1_024);
}

/// 85 million weights of the layers, twice each and 128 times.
#[test]
fn a_layer_of_128_texts_of_128_tokens() {
    let load = load(128, 128);
    assert_eq!((load.rows.len(), load.tokens), (128, 16_384));
    let linears = [LinearId::Qkv, LinearId::Output, LinearId::Expansion, LinearId::Contraction];
    let flops: u64 = linears.iter().map(|&id| work(&linear(id, false, None), Statistics::Joined, &MPNET, &load).flops).sum();
    // 12 x 768^2 = 7,077,888 weights.
    assert_eq!(flops, 2 * 16_384 * 7_077_888);
    // 128 rows of 128 x 128 pairs.
    assert_eq!(work(&Step::Attention { layer: 3 }, Statistics::Joined, &MPNET, &load).flops, 4 * 128 * 128 * 128 * 768);
}

#[test]
fn fp32_values_are_twice_as_wide_and_operations_as_many() {
    let exact = Shape { precision: Precision::Fp32, ..MPNET };
    let (load, step) = (Load { biased: false, ..load(1, 16) }, Step::Attention { layer: 0 });
    let (half, full) = (work(&step, Statistics::Joined, &MPNET, &load), work(&step, Statistics::Joined, &exact, &load));
    assert_eq!((full.bytes, full.flops), (2 * half.bytes, half.flops));
}

#[test]
fn rows_and_windows_decide_attention() {
    let size = BatchSize { rows: 3, longest: 8, tokens: 17 };
    assert_eq!(full_rows(size), [8, 8, 1]);
    // Rows that the tokens do not reach are not there.
    assert_eq!(full_rows(BatchSize { rows: 4096, longest: 512, tokens: 1024 }), [512, 512]);
    assert_eq!([pairs(5, -1), pairs(5, 0), pairs(5, 1), pairs(5, 4), pairs(5, 100), pairs(1, -1)], [25, 5, 13, 25, 25, 1]);
    let windowed = Load { windows: &[2, -1], rows: vec![10, 4], tokens: 14, ..load(1, 1) };
    // 10 x 5 less 2 + 1 at each end; 4 x 4 less the two pairs that are three apart.
    assert_eq!(work(&Step::Attention { layer: 0 }, Statistics::Joined, &MPNET, &windowed).flops, 4 * (44 + 14) * 768);
    assert_eq!(work(&Step::Attention { layer: 1 }, Statistics::Joined, &MPNET, &windowed).flops, 4 * (100 + 16) * 768);
}

#[test]
fn steps_are_found_by_their_own_names() {
    let program = fixture_program();
    // Every third is read, joined, or taken by the next linear.
    let taken = [Statistics::Read, Statistics::Joined, Statistics::Inline].into_iter().cycle().take(program.len());
    let statistics: Vec<Statistics> = taken.collect();
    let load = Load { statistics: &statistics, ..load(1, 16) };
    let names: Vec<String> = program.iter().map(layer_name).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let expected: Vec<Option<LayerWork>> =
        program.iter().zip(&statistics).map(|(step, &taken)| Some(work(step, taken, &MPNET, &load))).collect();
    assert_eq!(works(&program, &MPNET, &load, &names), expected);
}

#[test]
fn kernels_are_found_in_the_order_of_the_program() {
    let (program, load) = (fixture_program(), load(1, 128));
    let of = |step: &Step| Some(work(step, Statistics::Joined, &MPNET, &load));
    let mut names = vec!["embed", "plan_attention"];
    let mut expected = vec![of(&program[0]), None];
    for step in &program[1..] {
        names.push(match step {
            Step::Linear { linear: LinearId::Qkv, .. } => "linear_sm90_192_plain",
            Step::Linear { linear: LinearId::Expansion, .. } => "linear_sm90_64_activated",
            Step::Linear { .. } => "linear_sm90_split_residual",
            Step::Attention { .. } => "attention",
            Step::Measure { .. } => "join_statistics",
            _ => "hidden_states",
        });
        expected.push(of(step));
    }
    assert_eq!(works(&program, &MPNET, &load, &names), expected);
    // As statistics read off the stream.
    let place = names.iter().position(|name| *name == "join_statistics").unwrap();
    names[place] = "statistics";
    let found = works(&program, &MPNET, &load, &names);
    assert_eq!(found[place], Some(work(&program[place - 1], Statistics::Read, &MPNET, &load)));
    // One linear more: no telling which is which, but attention is attention.
    names.push("linear_64");
    let found = works(&program, &MPNET, &load, &names);
    for (name, work) in names.iter().zip(found) {
        assert_eq!(work.is_none(), name.starts_with("linear_") || *name == "plan_attention", "{name}");
    }
}

#[test]
fn kernels_of_a_latency_class_are_found_too() {
    let (program, load) = (fixture_program(), load(1, 16));
    let linears: Vec<LayerWork> = program
        .iter()
        .filter(|step| matches!(step, Step::Linear { .. }))
        .map(|step| work(step, Statistics::Joined, &MPNET, &load))
        .collect();
    let attention = work(&Step::Attention { layer: 0 }, Statistics::Joined, &MPNET, &load);
    // The smallest class: attention and the linear behind it are one kernel.
    let by_kernel = ["latency16_qkv", "latency16_attention", "latency16_wide", "latency16_narrow"];
    let by_layer = ["layer 0: Qkv", "layer 0: Attention", "layer 0: Wide", "layer 0: Narrow"];
    for layer in [by_kernel, by_layer] {
        let (first, last) = if layer == by_kernel { ("latency_embed", "latency_hidden") } else { ("embed", "hidden states") };
        let names: Vec<&str> = [&[first][..], &layer, &layer, &[last]].concat();
        let found = works(&program, &MPNET, &load, &names);
        assert!(found.iter().all(Option::is_some), "{names:?}: {found:?}");
        let fused = found[2].unwrap();
        assert_eq!(fused.flops, attention.flops + linears[1].flops);
        assert_eq!(fused.bytes, attention.bytes + linears[1].bytes - 2 * 24_576);
        assert_eq!([found[1], found[3], found[4], found[5]], [0, 2, 3, 4].map(|place| Some(linears[place])));
    }
    let layer = ["latency128_qkv", "latency128_attention", "latency128_output", "latency128_wide", "latency128_narrow"];
    let names: Vec<&str> = [&["latency_embed"][..], &layer, &layer, &["latency_hidden"]].concat();
    let found = works(&program, &MPNET, &load, &names);
    assert_eq!((found[2], found[3]), (Some(attention), Some(linears[1])));
}

#[test]
fn names_that_are_none_of_the_engine_s_have_no_work() {
    assert_eq!(works(&fixture_program(), &MPNET, &load(1, 16), &["gemm", "[copy]", ""]), [None; 3]);
    assert_eq!(works(&fixture_program(), &MPNET, &load(1, 16), &[]), []);
}

#[test]
fn peaks_are_those_of_the_data_sheets() {
    let gpu = |compute_capability, multiprocessors, clock_khz, memory_clock_khz, memory_bus_bits| Properties {
        compute_capability,
        multiprocessors,
        clock_khz,
        memory_clock_khz,
        memory_bus_bits,
        ..Properties::unknown()
    };
    let near = |found: Option<f64>, sheet: f64| (found.unwrap() / sheet - 1.0).abs() < 0.01;
    // H100 SXM at its boost clock for tensor cores: 989.4 TFLOP/s, 66.9 in fp32, 3.35 TB/s.
    let h100 = gpu((9, 0), 132, 1_830_000, 2_619_000, 5120);
    let found = peaks(&h100, Precision::Fp16);
    assert!(near(found.flops, 989.4e12) && near(found.bytes_a_second, 3.35e12), "{found:?}");
    let found = peaks(&h100, Precision::Fp32);
    assert!((found.flops.unwrap() / 66.9e12 - 1.0).abs() < 0.1, "{found:?}");
    // A100 40 GB: 312 TFLOP/s, 19.5 in fp32, 1.555 TB/s.
    let a100 = gpu((8, 0), 108, 1_410_000, 1_215_000, 5120);
    let found = peaks(&a100, Precision::Bf16);
    assert!(near(found.flops, 312e12) && near(found.bytes_a_second, 1.555e12), "{found:?}");
    assert!(near(peaks(&a100, Precision::Fp32).flops, 19.5e12));
    // L4: 121 TFLOP/s, 300 GB/s.
    let found = peaks(&gpu((8, 9), 58, 2_040_000, 6_251_000, 192), Precision::Fp16);
    assert!(near(found.flops, 121e12) && near(found.bytes_a_second, 300e9), "{found:?}");
    // One that is not known, and a driver that does not tell.
    assert_eq!(peaks(&gpu((13, 0), 100, 2_000_000, 0, 0), Precision::Fp16), Peaks { bytes_a_second: None, flops: None });
}
