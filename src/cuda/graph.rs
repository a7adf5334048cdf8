//! Captured graphs: many steps launched at once, with all that they refer to.
#![allow(unsafe_code)]

use super::device::Device;
use super::error::{Result, driver};
use super::held::Held;
use super::memory::{HostBlock, Keep};
use cudarc::driver::sys::{CUgraph, CUgraphExec, CUgraphInstantiate_flags};
use cudarc::driver::{CudaStream, DriverError, result};
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

/// A graph and what is launched of it, used by one thread at a time.
struct Serial {
    graph: CUgraph,
    /// Null until it is made.
    executable: CUgraphExec,
    device: Device,
}

// SAFETY: a CUgraph and its executable may be used from any thread, one at a time (CUDA driver API, "Graph object thread
// safety"). `Stream::launch` takes `&mut` of the one stream that the graph belongs to, which serialises launches; the drop
// happens once, with the last handle.
unsafe impl Send for Serial {}
// SAFETY: as for Send: `&Serial` is used by `Stream::launch` and `super::steps` alone, which need that `&mut Stream`.
unsafe impl Sync for Serial {}

impl Drop for Serial {
    fn drop(&mut self) {
        self.device.bind_to_free();
        if !self.executable.is_null() {
            // SAFETY: made by `Graph::end_capture`, destroyed once. The driver lets a run that is under way come to its end.
            if let Err(error) = unsafe { result::graph::exec_destroy(self.executable) } {
                log::warn!("{}", driver("destroy a graph")(error));
            }
        }
        // SAFETY: the end of a capture gave it to this value alone, which destroys it once.
        if let Err(error) = unsafe { result::graph::destroy(self.graph) } {
            log::warn!("{}", driver("destroy a graph")(error));
        }
    }
}

impl Graph {
    /// Ends the capture on `stream`: what was captured, which refers to `held`; `None` where that is nothing.
    pub(super) fn end_capture(stream: &Arc<CudaStream>, device: &Device, held: Held) -> Result<Option<Self>> {
        const DURING: &str = "end a capture";
        device.bind_to_free();
        // SAFETY: the stream lives, and the caller has `&mut` of its one owner.
        let graph = unsafe { result::stream::end_capture(stream.cu_stream()) }.map_err(driver(DURING))?;
        if graph.is_null() {
            return Ok(None);
        }
        let mut graph = Serial { graph, executable: std::ptr::null_mut(), device: device.clone() };
        // SAFETY: the graph is whole and nobody else knows of it.
        graph.executable =
            unsafe { result::graph::instantiate(graph.graph, CUgraphInstantiate_flags(0)) }.map_err(driver(DURING))?;
        Ok(Some(Self(Arc::new(Inner { graph, held, stream: stream.clone() }))))
    }

    pub(super) fn belongs_to(&self, stream: &Arc<CudaStream>) -> bool {
        Arc::ptr_eq(&self.0.stream, stream)
    }

    pub(super) fn hosts(&self) -> &[Arc<HostBlock>] {
        &self.0.held.hosts
    }

    pub(super) fn keep(&self) -> Keep {
        self.0.clone()
    }

    /// For `super::steps`, whose calls take `&mut` of the graph's own stream.
    pub(super) fn raw(&self) -> CUgraph {
        self.0.graph.graph
    }

    /// Called by `Stream::launch` alone, on the graph's own stream.
    pub(super) fn enqueue(&self) -> Result<(), DriverError> {
        // SAFETY: the executable lives as long as this value, which the stream holds until the run is done.
        unsafe { result::graph::launch(self.0.graph.executable, self.0.stream.cu_stream()) }
    }
}
