//! Making an engine: from a model, through TensorRT's builder and the comparison with the CPU, to an engine file.

mod choice;
mod first_load;
mod observer;
mod pipeline;
mod proof;
mod reference;
mod source;
mod timing;

pub use choice::{Candidate, Fastest, FastestRequest, build_fastest};
pub use first_load::prove;
pub(crate) use first_load::{loaded, prove_as, recall_proof};
pub use observer::TensorRtObserver;
pub use pipeline::{EngineRequest, Gate, build_engine, cached_engine, load_engine};
pub use source::machine;
