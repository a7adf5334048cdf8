//! What `auto` makes of models on a GPU: the native engine where it serves them, bf16 where fp16 overflows, smaller packs where memory is short. One test
//! fills the GPU's memory: run them one at a time (`--test-threads 1`).
#![cfg(all(feature = "cuda", feature = "cpu", feature = "internals"))]

mod seeded_model;

use seeded_model::{Kind, Sizes, folder};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;
use trt_embed::backend::gpu::{GpuBackend, GpuSettings, Padding};
use trt_embed::backend::native::{NativeEncoder, NativeSettings, Precision};
use trt_embed::cuda::{CudaError, Device};
use trt_embed::model::ModelFolder;
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Error};

const SMALL: Sizes = Sizes { hidden: 128, heads: 2, wide: 256, layers: 3 };
/// One layer with lanes as large as those of a real model.
const WIDE: Sizes = Sizes { hidden: 768, heads: 12, wide: 3072, layers: 1 };

fn builder(folder: &Path) -> EmbedderBuilder {
    Embedder::builder(folder.to_str().unwrap())
}

fn texts() -> Vec<String> {
    (1..60).map(|words| "a b c d e f g ".repeat(words % 20 + 1)).collect()
}

fn smallest_cosine(found: &[f32], expected: &[f32], dim: usize) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let cosine = |(a, b): (&[f32], &[f32])| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    found.chunks(dim).zip(expected.chunks(dim)).map(cosine).fold(1.0, f64::min)
}

/// A folder of which the last value of the last linear is `value`.
fn folder_with(value: f32) -> TempDir {
    let on_disk = folder(Kind::Bert, SMALL, 3, 1.0);
    let path = on_disk.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let end = names["encoder.layer.2.output.dense.weight"]["data_offsets"][1].as_u64().unwrap() as usize;
    bytes[8 + header + end - 4..8 + header + end].copy_from_slice(&value.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
    on_disk
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn auto_takes_the_native_engine() {
    let model = folder(Kind::Mpnet, SMALL, 42, 1.0);
    let gpu = builder(model.path()).build().unwrap();
    assert_eq!((gpu.info().backend, &gpu.info().backend_reason), ("cuda", &None));
    let cpu = builder(model.path()).backend(BackendChoice::Cpu).build().unwrap();
    let (found, expected) = (gpu.embed(&texts()).unwrap(), cpu.embed(&texts()).unwrap());
    assert!(smallest_cosine(&found.values, &expected.values, expected.dim) >= 0.9999);
    let opened = ModelFolder::open(model.path()).unwrap();
    assert_eq!(BackendChoice::auto_would_take(0, Some(&opened)).unwrap(), ("cuda", None));
    // What runs graphs is never given it.
    let decided = format!("{:?}", BackendChoice::Auto.decide(0).unwrap());
    assert!(!decided.starts_with("Cuda"), "{decided}");
}

/// The fixture's hidden size is 32, which the fast kernels do not serve.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_the_native_engine_does_not_serve_goes_to_the_next_one_and_is_told() {
    let fixture = Path::new("tests/fixtures/mpnet");
    let error = builder(fixture).backend(BackendChoice::Cuda).build().unwrap_err();
    assert!(matches!(error, Error::NotServed { backend: "cuda", .. }), "{error}");
    let opened = ModelFolder::open(fixture).unwrap();
    let (name, reason) = BackendChoice::auto_would_take(0, Some(&opened)).unwrap();
    assert!(name != "cuda" && reason.unwrap().starts_with("cuda: the cuda backend cannot run a hidden size of 32"), "{name}");
    // With TensorRT it would build an engine, which is not this test's matter.
    if !cfg!(feature = "tensorrt") {
        let auto = builder(fixture).build().unwrap();
        let info = auto.info();
        assert_eq!(info.backend, "cpu");
        assert!(info.backend_reason.as_ref().unwrap().contains("hidden size of 32 in fp16"), "{:?}", info.backend_reason);
    }
    let exact = builder(fixture).precision(Precision::Fp32).build().unwrap();
    assert_eq!((exact.info().backend, &exact.info().backend_reason), ("cuda", &None));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn weights_that_overflow_fp16_are_loaded_in_bf16_by_auto_alone() {
    let model = folder_with(1e5);
    let auto = builder(model.path()).build().unwrap();
    let reason = auto.info().backend_reason.clone().unwrap();
    assert_eq!(auto.info().backend, "cuda");
    assert!(reason.starts_with("cuda in bf16 in the place of fp16: ") && reason.contains("layer.2.output.dense"), "{reason}");
    let cpu = builder(model.path()).backend(BackendChoice::Cpu).build().unwrap();
    let (found, expected) = (auto.embed(&texts()).unwrap(), cpu.embed(&texts()).unwrap());
    let cosine = smallest_cosine(&found.values, &expected.values, expected.dim);
    assert!(cosine >= 0.999, "{cosine}");
    for named in [builder(model.path()).backend(BackendChoice::Cuda), builder(model.path()).precision(Precision::Fp16)] {
        let error = named.build().unwrap_err();
        assert!(matches!(error, Error::WeightOverflow { precision: "fp16", .. }), "{error}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn damaged_weights_are_an_error_under_auto() {
    for value in [f32::NAN, f32::INFINITY] {
        let error = builder(folder_with(value).path()).build().unwrap_err();
        assert!(matches!(error, Error::WeightValue { .. }), "{error}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn values_that_overflow_fp16_are_run_in_bf16_by_auto_alone() {
    let model = folder(Kind::Bert, SMALL, 3, 3000.0);
    for named in [builder(model.path()).backend(BackendChoice::Cuda), builder(model.path()).precision(Precision::Fp16)] {
        let error = named.build().unwrap().embed(&["a"]).unwrap_err();
        assert!(matches!(error, Error::Overflow { precision: "fp16", .. }), "{error}");
    }
    let auto = builder(model.path()).build().unwrap();
    assert_eq!((auto.info().backend, &auto.info().backend_reason), ("cuda", &None));
    let prompted = auto.with_prompt_name("").unwrap();
    let before = auto.gpu().unwrap();
    // Several callers at once: the engine is made once, and none of them hears of it.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| auto.embed(&texts()).unwrap());
        }
    });
    for embedder in [&auto, &prompted] {
        let reason = embedder.info().backend_reason.clone().unwrap();
        assert!(reason.starts_with("cuda in bf16 in the place of fp16: values overflow fp16 in layer 0"), "{reason}");
    }
    assert!(!Arc::ptr_eq(&before, &auto.gpu().unwrap()));
    let wide = builder(model.path()).precision(Precision::Bf16).build().unwrap();
    // Each load measures its own costs and may cut batches otherwise: the same up to roundings.
    let (found, expected) = (auto.embed(&texts()).unwrap(), wide.embed(&texts()).unwrap());
    let cosine = smallest_cosine(&found.values, &expected.values, expected.dim);
    assert!(cosine >= 0.999, "{cosine}");
}

/// With less and less free memory: smaller packs, the same vectors, and at last an error with the bytes.
#[test]
#[ignore = "needs an NVIDIA GPU that nothing else uses, and fills its memory"]
fn where_memory_is_short_packs_are_smaller() {
    let on_disk = folder(Kind::Mpnet, WIDE, 42, 1.0);
    let folder = ModelFolder::open(on_disk.path()).unwrap();
    let head = || {
        let pooling = Pooling::new([PoolingMode::Mean], true).unwrap();
        Head::new(pooling, Vec::new(), folder.config.hidden_size, None, Scaling::AfterCut).unwrap()
    };
    let device = Device::open(0).unwrap();
    let open = |room: Option<usize>| {
        let encoder = NativeEncoder::new(&device, &folder.architecture().unwrap(), 384, &NativeSettings::default()).unwrap();
        let free = device.memory().unwrap().free;
        let _others = room.map(|room| device.alloc::<u8>(free.saturating_sub(room)).unwrap());
        let mut settings = GpuSettings::default();
        settings.lanes = 1;
        GpuBackend::new(Arc::new(encoder), head(), Padding::of_model(&folder), &settings)
    };
    let largest = |backend: &GpuBackend| backend.profiles().last().unwrap().max;
    let whole = open(None).unwrap();
    let size = largest(&whole);
    assert_eq!((size.tokens, size.rows), (16_384, 4096));
    drop(whole);

    let mut sizes = Vec::new();
    for room in [160 << 20, 80 << 20, 40 << 20] {
        let backend = open(Some(room)).unwrap();
        let size = largest(&backend);
        assert!(size.tokens < 16_384 && size.tokens >= 512 && size.longest == 384, "{size:?}");
        sizes.push(size.tokens);
        // It is timed at load, so that it has run at its largest size.
        assert!(backend.gpu_micros(1, 16, 3).unwrap().1.call > 0.0);
    }
    assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
    match open(Some(3 << 20)) {
        Err(error @ Error::Cuda(CudaError::OutOfMemory { .. })) => {
            let told = error.to_string();
            assert!(told.contains("bytes asked") && told.contains("free of"), "{told}");
        }
        // The driver has no room for a kernel.
        Err(Error::Cuda(CudaError::Driver { reason, .. })) => assert!(reason.contains("MEMORY"), "{reason}"),
        Err(other) => panic!("{other}"),
        Ok(backend) => panic!("{:?} in 3 MB", largest(&backend)),
    }
    // What was taken is free again.
    assert_eq!(largest(&open(None).unwrap()).tokens, 16_384);
}
