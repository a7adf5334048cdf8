//! Lanes on a GPU: a small MPNet built as a TensorRT engine, run through the GPU backend and compared with the CPU backend.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

#[path = "common/small_gpu.rs"]
mod small_gpu;

use small_gpu::{Gpu, Random};
use std::sync::Arc;
use trt_embed::Error;
use trt_embed::backend::Backend;
use trt_embed::backend::gpu::{GpuBackend, GpuSettings, Padding};
use trt_embed::backend::tensorrt::{Products, TensorRtEncoder};
use trt_embed::model::{Dense, DenseActivation, Residual};
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};
use trt_embed::tokens::{ShapeCost, ShapeCosts, TokenBatch};

/// fp32 without TF32, another order of summation: differences of a few ulp of the largest intermediate values, as between the CPU
/// backend and PyTorch (tests/parity.rs).
const TOLERANCE: f32 = 1e-5;

fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    let scale = expected.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance * scale, "{what}: value {i} is {found}, expected {expected}");
    }
}

const RAGGED: [&[usize]; 9] =
    [&[1], &[8], &[5, 3], &[16, 2, 1], &[9, 8, 7, 6], &[24], &[24, 1], &[11; 8], &[24, 20, 16, 12, 8, 4, 2, 1]];

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn every_shape_and_mode_equals_the_cpu() {
    use PoolingMode::{Cls, LastToken, Max, Mean, MeanSqrtLen, WeightedMean};
    let gpu = Gpu::open();
    let heads: [(&[PoolingMode], Option<usize>, Scaling); 8] = [
        (&[Mean], None, Scaling::AfterCut),
        (&[Cls], None, Scaling::AfterCut),
        (&[Max], None, Scaling::None),
        (&[MeanSqrtLen], Some(12), Scaling::AfterCut),
        (&[WeightedMean], None, Scaling::None),
        (&[LastToken], None, Scaling::AfterCut),
        (&[Cls, Mean], None, Scaling::AfterCut),
        (&[Mean, Max, LastToken], Some(40), Scaling::None),
    ];
    for (place, (modes, dim, scaling)) in heads.into_iter().enumerate() {
        let head = gpu.head(modes, dim, scaling);
        let (backend, reference) = (gpu.backend(head.clone(), 1), gpu.reference(head.clone()));
        for (seed, lengths) in RAGGED.into_iter().enumerate() {
            for skip in [0, 2] {
                let batch = gpu.batch(lengths, skip, (place * 100 + seed) as u64);
                let (mut found, mut expected) = (vec![f32::NAN; lengths.len() * head.dim], vec![0.0; lengths.len() * head.dim]);
                reference.encode(&batch, &mut expected).unwrap();
                backend.encode(&batch, &mut found).unwrap();
                close(&found, &expected, TOLERANCE, &format!("{modes:?} {lengths:?} skip {skip}"));
                for (profile, range) in backend.profiles().iter().enumerate() {
                    found.fill(f32::NAN);
                    match backend.encode_with(profile, &batch, &mut found) {
                        Ok(()) => close(&found, &expected, TOLERANCE, &format!("{modes:?} {lengths:?} at {range}")),
                        Err(Error::OutsideProfile { .. }) => assert_eq!(range.fit(batch.size()), None),
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn dense_modules_and_hidden_states_equal_the_cpu() {
    let gpu = Gpu::open();
    let width = gpu.folder.config.hidden_size;
    let mut random = Random(5);
    let mut values = |n: usize| (0..n).map(|_| random.below(2000) as f32 / 1000.0 - 1.0).collect::<Vec<f32>>();
    let dense = Dense {
        in_features: width,
        out_features: 10,
        weight: values(width * 10),
        bias: Some(values(10)),
        activation: DenseActivation::Tanh,
        residual: Residual::None,
    };
    let pooling = || Pooling::new([PoolingMode::Mean], true).unwrap();
    // A cut of vectors that were scaled whole goes the same way as Dense modules: by the host, from the pooled vector.
    let cut_late = Head::new(pooling(), vec![], width, Some(7), Scaling::BeforeCut).unwrap();
    let (backend, reference) = (gpu.backend(cut_late.clone(), 1), gpu.reference(cut_late));
    let batch = gpu.batch(RAGGED[0], 0, 1);
    let (mut found, mut expected) = (vec![f32::NAN; batch.batch() * 7], vec![0.0; batch.batch() * 7]);
    reference.encode(&batch, &mut expected).unwrap();
    backend.encode(&batch, &mut found).unwrap();
    close(&found, &expected, TOLERANCE, "scaled, then cut");

    let head = Head::new(pooling(), vec![dense], width, Some(7), Scaling::AfterCut).unwrap();
    let (backend, reference) = (gpu.backend(head.clone(), 1), gpu.reference(head));
    for (seed, lengths) in RAGGED.into_iter().enumerate() {
        let batch = gpu.batch(lengths, 0, seed as u64);
        let (mut found, mut expected) = (vec![f32::NAN; lengths.len() * 7], vec![0.0; lengths.len() * 7]);
        reference.encode(&batch, &mut expected).unwrap();
        backend.encode(&batch, &mut found).unwrap();
        close(&found, &expected, 10.0 * TOLERANCE, &format!("dense {lengths:?}"));

        let values = batch.ids().len() * width;
        let (mut found, mut expected) = (vec![f32::NAN; values], vec![0.0; values]);
        reference.hidden(&batch, &mut expected).unwrap();
        backend.hidden(&batch, &mut found).unwrap();
        close(&found, &expected, 10.0 * TOLERANCE, &format!("hidden {lengths:?}"));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn many_threads_share_a_backend_and_each_gets_its_own_vectors() {
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, Scaling::AfterCut);
    let (backend, reference) = (gpu.backend(head.clone(), 3), gpu.reference(head.clone()));
    std::thread::scope(|scope| {
        for thread in 0..12_u64 {
            let (backend, reference, gpu, dim) = (&backend, &reference, &gpu, head.dim);
            scope.spawn(move || {
                let lengths = RAGGED[thread as usize % RAGGED.len()];
                let batch = gpu.batch(lengths, 0, thread);
                let (mut found, mut expected) = (vec![0.0; lengths.len() * dim], vec![0.0; lengths.len() * dim]);
                reference.encode(&batch, &mut expected).unwrap();
                for _ in 0..200 {
                    found.fill(f32::NAN);
                    backend.encode(&batch, &mut found).unwrap();
                    close(&found, &expected, TOLERANCE, &format!("thread {thread}"));
                }
            });
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn batches_outside_every_profile_and_wrong_buffers_are_refused_and_the_lane_goes_on() {
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, Scaling::AfterCut);
    let backend = gpu.backend(head.clone(), 1);
    for lengths in [&[3; 9][..], &[8; 20]] {
        let error = backend.encode(&gpu.batch(lengths, 0, 1), &mut vec![0.0; lengths.len() * head.dim]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::OutsideProfile { .. }) && text.contains("4x16") && text.contains("2x2:8x24"), "{text}");
    }
    let batch = gpu.batch(&[5], 0, 1);
    let error = backend.encode(&batch, &mut vec![0.0; head.dim + 1]).unwrap_err();
    assert!(matches!(error, Error::OutputLength { .. }), "{error}");
    backend.encode(&batch, &mut vec![0.0; head.dim]).unwrap();
    let narrow = Head::new(Pooling::new([PoolingMode::Mean], true).unwrap(), Vec::new(), 24, None, Scaling::AfterCut).unwrap();
    let encoder = Arc::new(TensorRtEncoder::new(gpu.engine.clone()).unwrap());
    assert!(matches!(
        GpuBackend::new(encoder, narrow, Padding::of_model(&gpu.folder), &GpuSettings::default()),
        Err(Error::Setting { .. })
    ));
    let (shape, micros) = backend.gpu_micros(1, 6, 5).unwrap();
    assert_eq!(shape.to_string(), "1x8");
    assert!(micros.call > 0.0 && micros.encoder > 0.0 && micros.stage > 0.0 && micros.pool > 0.0, "{micros:?}");
    let (_, layers) = backend.layer_times(1, 6, 2).unwrap();
    assert!(!layers.is_empty() && layers.iter().all(|layer| !layer.name.is_empty() && layer.milliseconds >= 0.0), "{layers:?}");
}

/// Alone in the lane's memory lie the ids of the batch before: nothing of them may come out again.
#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn what_does_not_fit_the_model_is_refused_as_on_the_cpu_and_runs_nothing() {
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, Scaling::AfterCut);
    let (backend, reference) = (gpu.backend(head.clone(), 1), gpu.reference(head.clone()));
    let vocab_size = gpu.folder.config.vocab_size;
    let before = gpu.batch(&[5, 3], 0, 1);
    let mut first = vec![0.0; 2 * head.dim];
    backend.encode(&before, &mut first).unwrap();
    for backend in [&backend as &dyn Backend, &reference] {
        for outside in [vocab_size as i32, i32::MAX] {
            let batch = TokenBatch::from_padded(&[5, outside, 7, 8], &[2, 2], 2, 0).unwrap();
            let mut out = vec![7.0; 2 * head.dim];
            let error = backend.encode(&batch, &mut out).unwrap_err();
            assert!(matches!(error, Error::TokenId { text: 0, .. }), "{error}");
            assert!(out.iter().all(|&value| value == 7.0), "{}", backend.name());
            let error = backend.hidden(&batch, &mut vec![0.0; 4 * head.hidden_size]).unwrap_err();
            assert!(matches!(error, Error::TokenId { text: 0, .. }), "{error}");
        }
        for wrong in [0, head.dim, 2 * head.dim + 1] {
            assert!(matches!(backend.encode(&before, &mut vec![0.0; wrong]), Err(Error::OutputLength { .. })));
        }
        for wrong in [0, 5 * head.hidden_size, 8 * head.hidden_size + 1, 10 * head.hidden_size] {
            assert!(matches!(backend.hidden(&before, &mut vec![0.0; wrong]), Err(Error::OutputLength { .. })));
        }
        backend.encode(&TokenBatch::default(), &mut []).unwrap();
        backend.hidden(&TokenBatch::default(), &mut []).unwrap();
        // A row without tokens, and one of which pooling leaves all out.
        let empty = TokenBatch::from_padded(&[5, 6, 1, 1], &[2, 0], 2, 2).unwrap();
        let mut out = vec![7.0; 2 * head.dim];
        backend.encode(&empty, &mut out).unwrap();
        assert!(out.iter().all(|&value| value == 0.0), "{}", backend.name());
    }
    let mut again = vec![0.0; 2 * head.dim];
    backend.encode(&before, &mut again).unwrap();
    assert_eq!(again, first);
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn costs_of_other_shapes_and_padding_outside_the_table_are_refused() {
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, Scaling::AfterCut);
    let known = gpu.backend(head.clone(), 1).costs().unwrap();
    let with = |costs: Vec<ShapeCost>, padding| {
        let mut settings = GpuSettings::default();
        settings.costs = Some(ShapeCosts::new(costs));
        let encoder = Arc::new(TensorRtEncoder::new(gpu.engine.clone()).unwrap());
        GpuBackend::new(encoder, head.clone(), padding, &settings)
    };
    let padding = Padding::of_model(&gpu.folder);
    let told = with(known.shapes().to_vec(), padding).unwrap();
    assert_eq!(told.costs().unwrap(), known);
    for wrong in [known.shapes()[1..].to_vec(), known.shapes().iter().rev().copied().collect()] {
        assert!(matches!(with(wrong, padding), Err(Error::Setting { .. })));
    }
    let outside = Padding { id: padding.vocab_size as u32, ..padding };
    assert!(matches!(with(known.shapes().to_vec(), outside), Err(Error::TokenId { .. })));
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn kernels_of_buckets_are_named_and_timed_and_vectors_stay_the_same() {
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, Scaling::AfterCut);
    let backend = gpu.backend(head.clone(), 1);
    let batch = gpu.batch(&[6], 0, 3);
    let encode = || {
        let mut out = vec![f32::NAN; head.dim];
        backend.encode(&batch, &mut out).unwrap();
        out
    };
    let before = encode();
    for (place, range) in backend.profiles().iter().enumerate() {
        let kernels = backend.kernels(place).unwrap();
        assert_eq!(kernels.is_some(), range.is_fixed(), "{range}");
        let Some(kernels) = kernels else { continue };
        // An engine in fp32 multiplies in nothing else.
        let products = Products::count(range.to_string().parse().unwrap(), &kernels);
        println!("{products}\n{}", kernels.join("\n"));
        assert!(kernels.len() > 2 && kernels.iter().all(|name| !name.is_empty()), "{kernels:?}");
        assert_eq!((products.int8, products.fp16), (0, 0), "{kernels:?}");
    }
    let (shape, timed) = backend.kernel_times(1, 6, 5).unwrap();
    let timed = timed.unwrap();
    assert_eq!(shape.to_string(), "1x8");
    let place = backend.profiles().iter().position(|range| range.to_string() == "1x8").unwrap();
    let names: Vec<String> = timed.iter().map(|kernel| kernel.name.clone()).collect();
    assert_eq!(names, backend.kernels(place).unwrap().unwrap());
    assert!(timed.iter().all(|kernel| kernel.milliseconds > 0.0), "{timed:?}");
    let (shape, none) = backend.kernel_times(8, 20, 5).unwrap();
    assert!(none.is_none(), "{shape} is no bucket");
    assert_eq!(encode(), before);
}
