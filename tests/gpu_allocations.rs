//! What a warm call must not do, counted. Alone in its file: the counts are the process's.
//!
//! Without the feature `nvtx`, whose crate copies the name of every range.
#![cfg(all(feature = "tensorrt", feature = "cpu", not(feature = "nvtx")))]

#[path = "common/counting.rs"]
mod counting;
#[path = "common/small_gpu.rs"]
mod small_gpu;

use counting::allocations;
use small_gpu::Gpu;
use trt_embed::backend::Backend;
use trt_embed::cuda::counters;
use trt_embed::pooling::{PoolingMode, Scaling};

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_warm_call_allocates_nothing_and_waits_once() {
    const CALLS: u64 = 1000;
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, Scaling::AfterCut);
    let backend = gpu.backend(head.clone(), 1);
    // A bucket by its graph, another padded up, and the dynamic profile without a graph.
    for lengths in [&[8][..], &[13, 2, 1], &[20, 3]] {
        let batch = gpu.batch(lengths, 0, 1);
        let mut out = vec![0.0; lengths.len() * head.dim];
        for _ in 0..20 {
            backend.encode(&batch, &mut out).unwrap();
        }
        let free = backend.device().memory().unwrap().free;
        let (heap, before) = (allocations(), counters());
        for _ in 0..CALLS {
            backend.encode(&batch, &mut out).unwrap();
        }
        let (allocated, after) = (allocations() - heap, counters());
        assert_eq!(allocated, 0, "allocations on the heap in {CALLS} calls of {lengths:?}");
        assert_eq!(after.device_allocations, before.device_allocations);
        assert_eq!(after.pinned_allocations, before.pinned_allocations);
        assert_eq!(after.synchronisations - before.synchronisations, CALLS, "waits in {CALLS} calls");
        assert_eq!(backend.device().memory().unwrap().free, free, "free device memory changed");
    }
}
