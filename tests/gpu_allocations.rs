//! What a warm call must not do, counted. Alone in its file: the counts are the process's.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

#[path = "common/small_gpu.rs"]
mod small_gpu;

use small_gpu::Gpu;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use trt_embed::backend::Backend;
use trt_embed::cuda::counters;
use trt_embed::pooling::PoolingMode;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: the system's allocator, counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_warm_call_allocates_nothing_and_waits_once() {
    const CALLS: u64 = 1000;
    let gpu = Gpu::open();
    let head = gpu.head(&[PoolingMode::Mean], None, true);
    let backend = gpu.backend(head.clone(), 1);
    // A bucket by its graph, another padded up, and the dynamic profile without a graph.
    for lengths in [&[8][..], &[13, 2, 1], &[20, 3]] {
        let batch = gpu.batch(lengths, 0, 1);
        let mut out = vec![0.0; lengths.len() * head.dim];
        for _ in 0..20 {
            backend.encode(&batch, &mut out).unwrap();
        }
        let free = backend.device().memory().unwrap().free;
        let (heap, before) = (ALLOCATIONS.get(), counters());
        for _ in 0..CALLS {
            backend.encode(&batch, &mut out).unwrap();
        }
        let (allocated, after) = (ALLOCATIONS.get() - heap, counters());
        assert_eq!(allocated, 0, "allocations on the heap in {CALLS} calls of {lengths:?}");
        assert_eq!(after.device_allocations, before.device_allocations);
        assert_eq!(after.pinned_allocations, before.pinned_allocations);
        assert_eq!(after.synchronisations - before.synchronisations, CALLS, "waits in {CALLS} calls");
        assert_eq!(backend.device().memory().unwrap().free, free, "free device memory changed");
    }
}
