//! What a warm call on the native CUDA engine does besides computing. Alone in its process: the counts are the whole process' own.
#![cfg(all(feature = "cuda", feature = "internals"))]

#[path = "common/counting.rs"]
mod counting;
mod seeded_model;

use seeded_model::{Kind, Sizes, folder};
use std::sync::Arc;
use trt_embed::backend::Backend;
use trt_embed::backend::gpu::{GpuBackend, GpuSettings, Padding};
use trt_embed::backend::native::{NativeEncoder, NativeSettings};
use trt_embed::cuda::{Device, counters};
use trt_embed::model::ModelFolder;
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};
use trt_embed::tokens::TokenBatch;

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_warm_call_allocates_nothing_and_waits_once() {
    let on_disk = folder(Kind::Bert, Sizes { hidden: 128, heads: 2, wide: 256, layers: 3 }, 1, 1.0);
    let folder = ModelFolder::open(on_disk.path()).unwrap();
    let device = Device::open(0).unwrap();
    let encoder = NativeEncoder::new(&device, &folder.architecture().unwrap(), 512, &NativeSettings::default()).unwrap();
    let pooling = Pooling::new([PoolingMode::Mean], true).unwrap();
    let head = Head::new(pooling, Vec::new(), 128, None, Scaling::AfterCut).unwrap();
    let backend = GpuBackend::new(Arc::new(encoder), head, Padding::of_model(&folder), &GpuSettings::default()).unwrap();
    // One text in a captured class; several as a pack that is put on the stream call by call.
    for lengths in [&[16_u32][..], &[100, 50, 3]] {
        let starts: Vec<u32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |sum, n| {
                *sum += n;
                Some(*sum)
            }))
            .collect();
        let batch = TokenBatch::from_ragged(vec![7; *starts.last().unwrap() as usize], starts, 0).unwrap();
        let mut out = vec![0.0; lengths.len() * 128];
        for _ in 0..3 {
            backend.encode(&batch, &mut out).unwrap();
        }
        let (before, heap) = (counters(), counting::allocations());
        backend.encode(&batch, &mut out).unwrap();
        let (heap, after) = (counting::allocations() - heap, counters());
        assert_eq!(heap, 0, "{lengths:?}: allocations on the heap");
        assert_eq!(after.device_allocations, before.device_allocations);
        assert_eq!(after.pinned_allocations, before.pinned_allocations);
        assert_eq!(after.synchronisations, before.synchronisations + 1);
    }
}
