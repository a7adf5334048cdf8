//! Whole models on the native CUDA engine beside the CPU backend. `TRT_EMBED_CUDA_ARCH=80` runs the same on the kernels of older GPUs.
#![cfg(all(feature = "cuda", feature = "cpu", feature = "internals"))]

mod long_text;
mod seeded_model;

use long_text::{KINDS, Long, MAX_HIDDEN_DIFFERENCE, TOKENS};
use seeded_model::{Kind, Random, Sizes, edit, folder};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;
use trt_embed::backend::gpu::{GpuBackend, GpuSettings, Padding};
use trt_embed::backend::native::{NativeEncoder, NativeSettings, Precision};
use trt_embed::backend::{Backend, CpuBackend};
use trt_embed::cuda::Device;
use trt_embed::model::ModelFolder;
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};
use trt_embed::tokens::{BatchPlan, TokenBatch, batches_from_ids};
use trt_embed::{BackendChoice, Embedder, Error};

const SMALL: Sizes = Sizes { hidden: 128, heads: 2, wide: 256, layers: 3 };
/// What the kernels of few tokens serve, with heads of 64.
const FEW_TOKENS: Sizes = Sizes { hidden: 256, heads: 4, wide: 512, layers: 3 };
/// Heads of 32, and more columns than one group of a warp holds.
const NARROW_HEADS: Sizes = Sizes { hidden: 384, heads: 12, wide: 1536, layers: 2 };

fn head(folder: &ModelFolder) -> Head {
    let pooling = Pooling::new([PoolingMode::Mean], true).unwrap();
    Head::new(pooling, Vec::new(), folder.config.hidden_size, None, Scaling::AfterCut).unwrap()
}

fn open(folder: &ModelFolder, precision: Precision, lanes: usize) -> Result<GpuBackend, Error> {
    let mut native = NativeSettings::default();
    native.precision = precision;
    open_as(folder, &native, lanes)
}

fn open_as(folder: &ModelFolder, native: &NativeSettings, lanes: usize) -> Result<GpuBackend, Error> {
    let device = Device::open(0)?;
    let encoder = NativeEncoder::new(&device, &folder.architecture()?, folder.config.max_tokens(), native)?;
    let mut settings = GpuSettings::default();
    settings.lanes = lanes;
    GpuBackend::new(Arc::new(encoder), head(folder), Padding::of_model(folder), &settings)
}

fn reference(folder: &ModelFolder) -> CpuBackend {
    CpuBackend::new(folder.architecture().unwrap(), head(folder), folder.config.max_tokens(), 2).unwrap()
}

/// One batch of rows of these lengths; ids are random but for padding's.
fn batch(folder: &ModelFolder, lengths: &[usize], seed: u64) -> TokenBatch {
    let mut random = Random(seed);
    let vocab = folder.config.vocab_size;
    let pad = folder.config.pad_token_id as usize;
    let id = |random: &mut Random| {
        let id = random.below(vocab - 1);
        (if id >= pad { id + 1 } else { id }) as u32
    };
    let rows: Vec<Vec<u32>> = lengths.iter().map(|&length| (0..length).map(|_| id(&mut random)).collect()).collect();
    let mut batches = batches_from_ids(&rows, vocab, 0, &BatchPlan::new(1 << 20, 1 << 30, 1)).unwrap();
    assert_eq!(batches.len(), 1);
    batches.remove(0)
}

fn encode(backend: &dyn Backend, batch: &TokenBatch, dim: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; batch.batch() * dim];
    backend.encode(batch, &mut out).unwrap();
    out
}

fn smallest_cosine(found: &[f32], expected: &[f32], dim: usize) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let cosine = |(a, b): (&[f32], &[f32])| {
        assert!(a.iter().all(|value| value.is_finite()), "{a:?}");
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    found.chunks(dim).zip(expected.chunks(dim)).map(cosine).fold(1.0, f64::min)
}

const PACKS: [&[usize]; 10] = [
    &[1],
    &[16],
    &[17],
    &[64],
    &[100],
    &[200, 3, 1, 1],
    &[33, 32, 31, 17, 16, 15, 1],
    &[512],
    &[511, 129, 128, 127, 65, 64, 63],
    &[7; 40],
];

/// fp16 and bf16 keep 11 and 8 bits of a value; over a few layers their roundings leave vectors this near in direction.
fn bar(precision: Precision) -> f64 {
    match precision {
        Precision::Fp32 => 0.999_999_9,
        Precision::Fp16 => 0.999_99,
        _ => 0.999,
    }
}

fn packs_equal_the_cpu(folder: &ModelFolder, precision: Precision) {
    let (backend, reference) = (open(folder, precision, 1).unwrap(), reference(folder));
    let dim = folder.config.hidden_size;
    let longest = folder.config.max_tokens();
    let mut smallest = 1.0_f64;
    for (seed, lengths) in PACKS.into_iter().enumerate() {
        let lengths: Vec<usize> = lengths.iter().map(|&length| length.min(longest)).collect();
        let batch = batch(folder, &lengths, seed as u64);
        let expected = encode(&reference, &batch, dim);
        for _ in 0..2 {
            let found = encode(&backend, &batch, dim);
            let cosine = smallest_cosine(&found, &expected, dim);
            smallest = smallest.min(cosine);
            assert!(cosine >= bar(precision), "{precision:?} {lengths:?}: cosine {cosine}");
        }
        // Every size class that holds it.
        for (place, range) in backend.profiles().iter().enumerate() {
            let mut found = vec![f32::NAN; batch.batch() * dim];
            match backend.encode_with(place, &batch, &mut found) {
                Ok(()) => {
                    let cosine = smallest_cosine(&found, &expected, dim);
                    smallest = smallest.min(cosine);
                    assert!(cosine >= bar(precision), "{precision:?} {lengths:?} at {range}: cosine {cosine}");
                }
                Err(Error::OutsideProfile { .. }) => assert_eq!(range.fit(batch.size()), None),
                Err(other) => panic!("{other}"),
            }
        }
    }
    println!("{} {dim} wide in {precision:?}: smallest cosine 1 - {:.1e}", folder.config.family.title(), 1.0 - smallest);
}

fn seeded(kind: Kind, sizes: Sizes) -> (TempDir, ModelFolder) {
    let folder_on_disk = folder(kind, sizes, 42, 1.0);
    let opened = ModelFolder::open(folder_on_disk.path()).unwrap();
    (folder_on_disk, opened)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn fixtures_in_fp32_equal_the_cpu() {
    for name in ["mpnet", "bert", "bert-fp16-plain", "xlm-roberta", "distilbert", "modernbert", "nomic_bert", "gte", "new"] {
        packs_equal_the_cpu(&ModelFolder::open(Path::new("tests/fixtures").join(name)).unwrap(), Precision::Fp32);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn models_with_heads_of_64_equal_the_cpu() {
    for kind in [Kind::Mpnet, Kind::Bert, Kind::ModernBert] {
        for sizes in [SMALL, FEW_TOKENS] {
            let (_keep, folder) = seeded(kind, sizes);
            for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
                packs_equal_the_cpu(&folder, precision);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn models_with_heads_of_32_equal_the_cpu() {
    let (_keep, folder) = seeded(Kind::Bert, NARROW_HEADS);
    for precision in [Precision::Fp16, Precision::Bf16] {
        packs_equal_the_cpu(&folder, precision);
    }
}

/// A model like the fixture of `name`, in sizes that kernels of few tokens do not serve, and in sizes that they do.
fn family_equals_the_cpu(name: &'static str) {
    for (sizes, precisions) in [(SMALL, &[Precision::Fp16, Precision::Fp32][..]), (FEW_TOKENS, &[Precision::Fp16])] {
        let (_keep, folder) = seeded(Kind::Like(name), sizes);
        for &precision in precisions {
            packs_equal_the_cpu(&folder, precision);
        }
    }
}

macro_rules! families {
    ($($test:ident: $name:literal),*) => {$(
        #[test]
        #[ignore = "needs an NVIDIA GPU"]
        fn $test() {
            family_equals_the_cpu($name);
        }
    )*};
}

families!(
    family_xlm_roberta: "xlm-roberta",
    family_roberta: "roberta",
    family_camembert: "camembert",
    family_distilbert: "distilbert",
    family_modernbert: "modernbert",
    family_nomic_bert: "nomic_bert",
    family_gte: "gte",
    family_new: "new"
);

/// Slopes for heads that are no power of two; the later form has norms within attention.
fn jina_bert_equals_the_cpu(name: &'static str) {
    const SIX_HEADS: Sizes = Sizes { hidden: 384, heads: 6, ..SMALL };
    for sizes in [SIX_HEADS, FEW_TOKENS] {
        let (_keep, folder) = seeded(Kind::Like(name), sizes);
        for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
            packs_equal_the_cpu(&folder, precision);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn family_jina_bert() {
    jina_bert_equals_the_cpu("jina_bert");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn family_jina_bert_later() {
    jina_bert_equals_the_cpu("jina_bert_later");
}

/// A family with another configuration.
fn variant_equals_the_cpu(name: &'static str, change: fn(&mut Value)) {
    for sizes in [SMALL, FEW_TOKENS] {
        let on_disk = folder(Kind::Like(name), sizes, 7, 1.0);
        edit(on_disk.path(), "config.json", change);
        let folder = ModelFolder::open(on_disk.path()).unwrap();
        for precision in [Precision::Fp16, Precision::Fp32] {
            packs_equal_the_cpu(&folder, precision);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn frequencies_by_a_fixed_factor() {
    variant_equals_the_cpu("new", |config| config["rope_scaling"] = json!({"type": "ntk", "factor": 8.0}));
}

/// Of texts of more than 32 tokens.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn frequencies_by_the_length_of_the_text() {
    variant_equals_the_cpu("nomic_bert", |config| {
        config["max_position_embeddings"] = 32.into();
        config["rope_parameters"] = json!({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0});
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn windows_that_are_narrow_and_wide() {
    variant_equals_the_cpu("modernbert", |config| config["local_attention"] = 8.into());
    variant_equals_the_cpu("modernbert", |config| config["local_attention"] = 300.into());
}

/// In fp32 the small models of all kinds of positions, but for JinaBERT's, whose size of 36 no kernel has.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn texts_of_8192_tokens_equal_pytorch() {
    for name in KINDS.into_iter().filter(|name| *name != "slopes") {
        let long = Long::open(name);
        let backend = open(&long.folder, Precision::Fp32, 1).unwrap();
        let mut states = vec![f32::NAN; TOKENS * long.folder.config.hidden_size];
        backend.hidden(&long.batch, &mut states).unwrap();
        let (furthest, of_mean) = long.differences(&states);
        assert!(furthest <= MAX_HIDDEN_DIFFERENCE && of_mean <= 1e-5, "{name}: {furthest:e} {of_mean:e}");
    }
}

/// The fast attention of long texts beside the exact one.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn texts_of_8192_tokens_in_16_bits_equal_those_in_32() {
    const SIX_HEADS: Sizes = Sizes { hidden: 384, heads: 6, ..SMALL };
    for name in ["modernbert", "nomic_bert", "new", "jina_bert", "jina_bert_later"] {
        let on_disk = folder(Kind::Like(name), SIX_HEADS, 9, 1.0);
        edit(on_disk.path(), "config.json", |config| config["max_position_embeddings"] = TOKENS.into());
        edit(on_disk.path(), "sentence_bert_config.json", |transformer| transformer["max_seq_length"] = TOKENS.into());
        let folder = ModelFolder::open(on_disk.path()).unwrap();
        let dim = folder.config.hidden_size;
        for lengths in [&[TOKENS][..], &[8190, 4097, 30]] {
            let batch = batch(&folder, lengths, 1);
            let vectors = |precision| encode(&open(&folder, precision, 1).unwrap(), &batch, dim);
            let cosine = smallest_cosine(&vectors(Precision::Fp16), &vectors(Precision::Fp32), dim);
            println!("{name}, {lengths:?} tokens: smallest cosine 1 - {:.1e}", 1.0 - cosine);
            assert!(cosine >= bar(Precision::Fp16), "{name} {lengths:?}: cosine {cosine}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn hidden_states_equal_the_cpu() {
    let (_keep, folder) = seeded(Kind::Mpnet, SMALL);
    let (backend, reference) = (open(&folder, Precision::Fp16, 1).unwrap(), reference(&folder));
    let batch = batch(&folder, &[40, 17, 3], 1);
    let values = batch.ids().len() * folder.config.hidden_size;
    let (mut found, mut expected) = (vec![f32::NAN; values], vec![0.0; values]);
    backend.hidden(&batch, &mut found).unwrap();
    reference.hidden(&batch, &mut expected).unwrap();
    assert!(smallest_cosine(&found, &expected, folder.config.hidden_size) >= 0.9999);
}

/// The same bits on every run, and from every lane.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn runs_give_the_same_bits() {
    let (_keep, folder) = seeded(Kind::Mpnet, FEW_TOKENS);
    let backend = open(&folder, Precision::Fp16, 2).unwrap();
    let dim = folder.config.hidden_size;
    for (seed, lengths) in PACKS.into_iter().enumerate() {
        let batch = batch(&folder, lengths, seed as u64);
        let first = encode(&backend, &batch, dim);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        assert_eq!(encode(&backend, &batch, dim), first, "{lengths:?}");
                    }
                });
            }
        });
    }
}

/// A text's vector alone, and in packs of random others, at every place and in every precision: the same bits.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn invariant_vectors_are_the_same_bits_in_every_pack() {
    for (kind, sizes) in [(Kind::Mpnet, FEW_TOKENS), (Kind::Bert, NARROW_HEADS)] {
        let (_keep, folder) = seeded(kind, sizes);
        let dim = folder.config.hidden_size;
        for precision in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
            let mut native = NativeSettings::default();
            (native.precision, native.invariant) = (precision, true);
            let backend = open_as(&folder, &native, 1).unwrap();
            let mut random = Random(5);
            for round in 0..if precision == Precision::Fp32 { 3 } else { 40 } {
                let few = [1, 3, 17, 150][round % 4];
                let longest = [16, 40, 130, 512][random.below(4)];
                let lengths: Vec<usize> = (0..1 + random.below(few)).map(|_| 1 + random.below(longest)).collect();
                let fits =
                    lengths.iter().scan(0, |sum, length| Some(std::mem::replace(sum, *sum + length))).filter(|sum| *sum < 15_000);
                let lengths = &lengths[..fits.count()];
                let pack = batch(&folder, lengths, round as u64);
                let together = encode(&backend, &pack, dim);
                for _ in 0..4 {
                    let row = random.below(lengths.len());
                    let (start, end) = (pack.starts()[row] as usize, pack.starts()[row + 1] as usize);
                    let alone =
                        TokenBatch::from_ragged(pack.ids()[start..end].to_vec(), vec![0, (end - start) as u32], 0).unwrap();
                    let vector = encode(&backend, &alone, dim);
                    assert_eq!(vector, together[row * dim..(row + 1) * dim], "{precision:?}, row {row} of {lengths:?}");
                }
            }
        }
    }
}

/// Weights so large that the residual stream leaves fp16: an error that says where, and a vector in bf16.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn overflow_is_an_error_that_says_where() {
    for sizes in [SMALL, FEW_TOKENS] {
        overflow_is_told(sizes);
    }
}

fn overflow_is_told(sizes: Sizes) {
    let on_disk = folder(Kind::Bert, sizes, 3, 3000.0);
    let folder = ModelFolder::open(on_disk.path()).unwrap();
    let backend = open(&folder, Precision::Fp16, 1).unwrap();
    let dim = folder.config.hidden_size;
    for lengths in [&[9][..], &[100, 50]] {
        let batch = batch(&folder, lengths, 1);
        let mut out = vec![0.0; batch.batch() * dim];
        let error = backend.encode(&batch, &mut out).unwrap_err();
        let Error::Overflow { place, precision } = &error else { panic!("{error}") };
        assert!(place.starts_with("layer 0") && *precision == "fp16", "{error}");
    }
    let backend = open(&folder, Precision::Bf16, 1).unwrap();
    encode(&backend, &batch(&folder, &[9, 8], 1), dim);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn an_embedder_runs_on_it() {
    let (keep, _) = seeded(Kind::Mpnet, FEW_TOKENS);
    let build = |choice| Embedder::builder(keep.path().to_str().unwrap()).backend(choice).build().unwrap();
    let (gpu, cpu) = (build(BackendChoice::Cuda), build(BackendChoice::Cpu));
    assert_eq!((gpu.info().backend, cpu.info().backend), ("cuda", "cpu"));
    let texts: Vec<String> = (1..200).map(|words| "a b c d e f g ".repeat(words % 40 + 1)).collect();
    let (found, expected) = (gpu.embed(&texts).unwrap(), cpu.embed(&texts).unwrap());
    assert!(smallest_cosine(&found.values, &expected.values, expected.dim) >= 0.9999);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_is_not_served_is_refused_by_name() {
    let folder = ModelFolder::open(Path::new("tests/fixtures/mpnet")).unwrap();
    let error = open(&folder, Precision::Fp16, 1).err().unwrap();
    assert!(matches!(&error, Error::NotServed { backend: "cuda", .. }), "{error}");
    let damaged = folder_with_nan();
    let folder = ModelFolder::open(damaged.path()).unwrap();
    let error = open(&folder, Precision::Fp16, 1).err().unwrap();
    assert!(matches!(&error, Error::WeightValue { name, .. } if name.contains("encoder.layer.2.output.dense")), "{error}");
}

/// The last value of the last linear is NaN.
fn folder_with_nan() -> TempDir {
    let on_disk = folder(Kind::Bert, SMALL, 3, 1.0);
    let path = on_disk.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let end = names["encoder.layer.2.output.dense.weight"]["data_offsets"][1].as_u64().unwrap() as usize;
    bytes[8 + header + end - 4..8 + header + end].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
    on_disk
}
