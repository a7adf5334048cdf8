//! Captured graphs: many steps launched at once, with all that they refer to.
#![allow(unsafe_code)]

use super::memory::{HostBlock, Keep};
use super::stream::Held;
use cudarc::driver::sys::CUgraph;
use cudarc::driver::{CudaGraph, CudaStream, DriverError};
use std::sync::Arc;

/// What [`super::Stream::capture`] captured. Launch it with [`super::Stream::launch`] on the same stream. The buffers, kernels
/// and foreign owners that it refers to live as long as it does.
pub struct Graph(Arc<Inner>);

struct Inner {
    // Dropped first: it refers to what is held.
    graph: Serial,
    held: Held,
    stream: Arc<CudaStream>,
}

/// A graph that one thread uses at a time.
struct Serial(CudaGraph);

// SAFETY: a CUgraph and its executable may be used from any thread, one at a time (CUDA driver API, "Graph object thread
// safety"). `Stream::launch` takes `&mut` of the one stream that the graph belongs to, which serialises launches; the drop
// happens once, with the last handle.
unsafe impl Send for Serial {}
// SAFETY: as for Send: `&Serial` is used by `Stream::launch` and `super::steps` alone, which need that `&mut Stream`.
unsafe impl Sync for Serial {}

impl Graph {
    pub(super) fn new(graph: CudaGraph, held: Held, stream: Arc<CudaStream>) -> Self {
        Self(Arc::new(Inner { graph: Serial(graph), held, stream }))
    }

    pub(super) fn belongs_to(&self, stream: &Arc<CudaStream>) -> bool {
        Arc::ptr_eq(&self.0.stream, stream)
    }

    pub(super) fn hosts(&self) -> &[Arc<HostBlock>] {
        self.0.held.hosts()
    }

    pub(super) fn keep(&self) -> Keep {
        self.0.clone()
    }

    /// For `super::steps`, whose calls take `&mut` of the graph's own stream.
    pub(super) fn raw(&self) -> CUgraph {
        self.0.graph.0.cu_graph()
    }

    /// Called by `Stream::launch` alone, on the graph's own stream.
    pub(super) fn enqueue(&self) -> Result<(), DriverError> {
        self.0.graph.0.launch()
    }
}
