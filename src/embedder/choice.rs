//! Which executor runs a graph: what a caller asks for, and what comes of it on this machine.

use super::auto;
use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda::Device;
use crate::model::ModelFolder;
#[cfg(feature = "tensorrt")]
use crate::tensorrt::Library;
#[cfg(feature = "tensorrt")]
use std::sync::Arc;

/// Which executor runs the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BackendChoice {
    /// The best executor that this build and this machine have and that serves the model: this crate's own kernels, then TensorRT, then the CPU.
    /// [`Info::backend`](crate::Info::backend) says which it was, [`Info::backend_reason`](crate::Info::backend_reason) why no better one. It goes on to
    /// the next where something is not there (driver, GPU, NVRTC, TensorRT), too old, or where the kernels do not serve a part of the model; what is wrong
    /// (damaged weights, a GPU that is full) is an error. Weights or values that overflow fp16 are run in bf16, unless
    /// `EmbedderBuilder::precision` was asked for.
    #[default]
    Auto,
    /// `tract` on the CPU.
    Cpu,
    /// This crate's own kernels on an NVIDIA GPU; an error where there is none, never another executor instead.
    Cuda,
    /// TensorRT on an NVIDIA GPU; an error where there is none, never the CPU instead.
    TensorRt,
}

/// What a [`BackendChoice`] came to: an executor that this build has, with what it needs of this machine.
#[derive(Debug)]
#[non_exhaustive]
pub enum ChosenBackend {
    /// `tract` on the CPU.
    #[cfg(feature = "cpu")]
    Cpu {
        /// Why [`BackendChoice::Auto`] did not take the GPU.
        reason: Option<String>,
    },
    /// This crate's own kernels on an NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda {
        /// The GPU.
        device: Device,
    },
    /// TensorRT on an NVIDIA GPU.
    #[cfg(feature = "tensorrt")]
    TensorRt {
        /// The GPU.
        device: Device,
        /// TensorRT.
        library: Arc<Library>,
    },
}

impl BackendChoice {
    /// Decides, once, what runs a graph: [`BackendChoice::Auto`] takes GPU `device` where this build has TensorRT, and this machine driver, GPU and
    /// library, else the CPU; never [`BackendChoice::Cuda`], which runs no graphs. (An [`Embedder`](crate::Embedder) needs no graph, and may.)
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) for an executor that this build lacks; what this machine lacks for the one that is asked for
    /// (`Error::Cuda`, `Error::TensorRtLibrary`, `Error::TensorRtVersion`).
    pub fn decide(self, device: usize) -> Result<ChosenBackend> {
        match self {
            Self::Cpu => on_cpu(None),
            Self::Cuda => by_kernels(device),
            Self::TensorRt => on_gpu(device),
            Self::Auto if cfg!(feature = "tensorrt") => on_gpu(device).or_else(|error| on_cpu(Some(error.to_string()))),
            Self::Auto => on_cpu(None),
        }
    }
}

impl BackendChoice {
    /// What [`BackendChoice::Auto`] would take on GPU `device` for `model` (without one, for a model that all executors serve): the executor's name, and
    /// why no better one. Loads neither weights nor engines: what is wrong with those is found when the model is opened.
    ///
    /// # Errors
    /// What is wrong with the model or the machine whoever runs it; [`Error::Backend`](crate::Error::Backend) where nothing is left to take.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // the others run whatever has a graph
    pub fn auto_would_take(device: usize, model: Option<&ModelFolder>) -> Result<(&'static str, Option<String>)> {
        let wishes = auto::Wishes { engine_settings: false, cuda_precision: false };
        auto::first(&auto::candidates(auto::Built::THIS, wishes), |candidate| {
            candidate.choice().decide(device).map_err(|error| auto::refusal(auto::Stage::Finding, error))?;
            #[cfg(feature = "cuda")]
            if let Some(model) = model.filter(|_| candidate == auto::Candidate::Cuda) {
                let served = |architecture| crate::native::check_architecture(&architecture, crate::native::Precision::default());
                model.architecture().and_then(served).map_err(|error| auto::refusal(auto::Stage::Opening, error))?;
            }
            Ok(candidate.name())
        })
    }
}

#[cfg(feature = "cuda")]
fn by_kernels(device: usize) -> Result<ChosenBackend> {
    let device = crate::trace::stage("opening the GPU", || Device::open(device))?;
    crate::native::check_device(&device)?;
    Ok(ChosenBackend::Cuda { device })
}

#[cfg(not(feature = "cuda"))]
fn by_kernels(_: usize) -> Result<ChosenBackend> {
    let reason = "this build has no CUDA kernels; choose the backend `cpu`, or build with the feature `cuda`".into();
    Err(crate::Error::Backend { backend: "cuda", reason })
}

#[cfg(feature = "tensorrt")]
fn on_gpu(device: usize) -> Result<ChosenBackend> {
    let (device, library) = super::tensorrt::find(device)?;
    Ok(ChosenBackend::TensorRt { device, library })
}

#[cfg(not(feature = "tensorrt"))]
fn on_gpu(_: usize) -> Result<ChosenBackend> {
    Err(no_tensorrt())
}

/// What is said where a build without TensorRT is asked for it.
#[cfg(not(feature = "tensorrt"))]
pub(super) fn no_tensorrt() -> crate::Error {
    let reason = "this build has no TensorRT support; choose the backend `cpu`, or build with the feature `tensorrt`".into();
    crate::Error::Backend { backend: "tensorrt", reason }
}

#[cfg(feature = "cpu")]
fn on_cpu(reason: Option<String>) -> Result<ChosenBackend> {
    Ok(ChosenBackend::Cpu { reason })
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(reason: Option<String>) -> Result<ChosenBackend> {
    Err(auto::no_executor(reason.map(|why| format!("tensorrt: {why}"))))
}
