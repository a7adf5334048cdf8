//! Builds plans: an ONNX graph and settings in, a serialised engine out.

use super::Library;
use super::capability::{ComputeCapability, ahead_of_time_capabilities, check_targets};
use super::ffi::{BuildWatch, bridge};
use super::profile::Profile;
use super::turn::wait_for_turn;
use crate::cuda::Device;
use crate::{Error, Progress, Result, Setting};
use cxx::UniquePtr;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, TryLockError};

/// What an error says was being done.
const ACTION: &str = "build the engine";

/// Held while TensorRT builds. One build at a time in a process: tactics are chosen by measured time, which another build on the GPU
/// spoils, and what TensorRT's own threads log belongs to the one build that is under way.
static ONE_BUILD: Mutex<()> = Mutex::new(());

/// What an engine's arithmetic may use.
///
/// With TensorRT 8.6 an fp32 graph may be built as [`Arithmetic::Fp16`]; from TensorRT 10 on the types of the graph decide, and a
/// graph of other types than asked for is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Arithmetic {
    /// 24 bits of mantissa everywhere: TF32 is off.
    Fp32,
    /// Half precision where TensorRT finds it faster.
    #[default]
    Fp16,
    /// As [`Arithmetic::Fp16`], with 8-bit integers between the Q/DQ pairs of a quantised graph.
    Int8,
}

/// How much of each layer an engine's inspector can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum LayerDetails {
    /// Names.
    Names,
    /// Also types, shapes and tactics. Costs some plan size, no time.
    #[default]
    Full,
}

/// How to build. `None` leaves a choice to TensorRT.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct BuildSettings {
    /// fp16 unless set.
    pub arithmetic: Arithmetic,
    /// At least one. A context is made for one of them, by its place here.
    pub profiles: Vec<Profile>,
    /// Most device memory that a tactic may use for intermediate results, in bytes.
    pub workspace_bytes: Option<usize>,
    /// 0 (fast build) to 5 (fast engine).
    pub optimization_level: Option<u8>,
    /// Most streams besides the caller's.
    pub auxiliary_streams: Option<u8>,
    /// Layers of an fp16 engine that compute in fp32: those whose name contains one of these. For TensorRT 8.6; from 10 on the types of
    /// the graph decide.
    pub fp32_layers: Vec<String>,
    /// What the inspector can tell later.
    pub layer_details: LayerDetails,
    /// [`Plan::timing_cache`] of an earlier build; empty, or of another GPU or version, it is started anew.
    pub timing_cache: Vec<u8>,
    /// The file that the graph was read from, where it keeps tensors in files beside it.
    pub onnx_path: Option<PathBuf>,
}

/// Where a plan is to run.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Target<'a> {
    /// On this GPU.
    Device(&'a Device),
    /// On any GPU of one of these compute capabilities, none of which need be here: what TensorRT for RTX alone can build.
    Capabilities(&'a [ComputeCapability]),
}

/// A built engine.
#[non_exhaustive]
pub struct Plan {
    /// The serialised engine: for this version of TensorRT and this kind of GPU.
    pub bytes: Vec<u8>,
    /// What the build learnt about tactics, for [`BuildSettings::timing_cache`].
    pub timing_cache: Vec<u8>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Plan")
            .field("bytes", &self.bytes.len())
            .field("timing_cache", &self.timing_cache.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Int8 => "int8",
        })
    }
}

impl<'a> From<&'a Device> for Target<'a> {
    fn from(device: &'a Device) -> Self {
        Self::Device(device)
    }
}

impl Target<'_> {
    /// What the GPUs can do that a plan is for.
    fn capabilities(&self) -> Vec<ComputeCapability> {
        match self {
            Self::Device(device) => vec![device.properties().compute_capability.into()],
            Self::Capabilities(wanted) => wanted.to_vec(),
        }
    }

    fn bind(&self) -> Result<()> {
        match self {
            Self::Device(device) => Ok(device.bind()?),
            Self::Capabilities(_) => Ok(()),
        }
    }

    /// Whether all GPUs that a plan is for have 8-bit arithmetic: Pascal's data centre and embedded GPUs, and what is older, compute fp16
    /// fast but not int8.
    pub(in crate::tensorrt) fn check_int8(&self) -> Result<()> {
        let Some(without) = self.capabilities().into_iter().find(|&capability| !has_int8(capability)) else { return Ok(()) };
        let name = match self {
            Self::Device(device) => &device.properties().name,
            Self::Capabilities(_) => "a GPU",
        };
        let reason = format!("{name} (compute capability {without}) has no 8-bit arithmetic for int8: use fp16");
        Err(Error::Setting { setting: Setting::Precision, reason })
    }
}

/// Builds an engine for `onnx`, whose inputs are all `[batch, seq]`. Takes from seconds to many minutes; one build runs at a time.
///
/// # Errors
/// [`Error::TensorRt`] with what TensorRT logged; [`Error::Setting`] for settings that this version or device does not have;
/// [`Error::Cancelled`].
pub fn build_plan<'a>(
    library: &'a Library,
    target: impl Into<Target<'a>>,
    onnx: &[u8],
    settings: &BuildSettings,
    progress: &dyn Progress,
) -> Result<Plan> {
    PlanBuilder::new(library, target)?.build(onnx, settings, progress)
}

/// Builds engines one after the other. What TensorRT loads to build, for which 8.6 needs seconds, it loads once.
pub struct PlanBuilder<'a> {
    library: &'a Library,
    target: Target<'a>,
    handle: UniquePtr<bridge::Builder>,
}

impl fmt::Debug for PlanBuilder<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("PlanBuilder").field("library", self.library).field("target", &self.target).finish_non_exhaustive()
    }
}

impl<'a> PlanBuilder<'a> {
    /// For engines that run where `target` says.
    ///
    /// # Errors
    /// [`Error::TensorRtLibrary`] without the parser's library; [`Error::Setting`] for compute capabilities that this TensorRT does not build
    /// for ahead of time; [`Error::GpuNotServed`]; [`Error::TensorRt`], e.g. where the GPU's memory is full.
    pub fn new(library: &'a Library, target: impl Into<Target<'a>>) -> Result<Self> {
        let target = target.into();
        match target {
            Target::Device(device) => library.check_device(device)?,
            Target::Capabilities(wanted) => check_targets(library.version(), &ahead_of_time_capabilities(), wanted)?,
        }
        library.load_parser()?;
        target.bind()?;
        let handle = library.handle().create_builder().map_err(|exception| failure(ACTION, &exception))?;
        Ok(Self { library, target, handle })
    }

    /// Takes from seconds to many minutes; one build runs at a time.
    ///
    /// # Errors
    /// [`Error::Setting`] without a profile; [`Error::Cancelled`] when `progress` asked for it; [`Error::TensorRt`] with what
    /// TensorRT logged, e.g. the node that it does not know.
    pub fn build(&self, onnx: &[u8], settings: &BuildSettings, progress: &dyn Progress) -> Result<Plan> {
        let library = self.library;
        if settings.profiles.is_empty() {
            return Err(Error::Setting {
                setting: Setting::Profiles,
                reason: "an engine needs at least one profile or bucket".into(),
            });
        }
        if library.version().is_strongly_typed() && !settings.fp32_layers.is_empty() {
            let reason = format!("TensorRT {} takes the types of the graph; this is for TensorRT 8.6", library.version());
            return Err(Error::Setting { setting: Setting::Fp32Layers, reason });
        }
        if settings.arithmetic == Arithmetic::Int8 {
            self.target.check_int8()?;
        }
        let request = bridge::BuildRequest {
            onnx,
            onnx_path: settings.onnx_path.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            arithmetic: match settings.arithmetic {
                Arithmetic::Fp32 => bridge::Arithmetic::Fp32,
                Arithmetic::Fp16 => bridge::Arithmetic::Fp16,
                Arithmetic::Int8 => bridge::Arithmetic::Int8,
            },
            profiles: settings
                .profiles
                .iter()
                .map(|profile| bridge::Range { min: profile.min().dims(), opt: profile.opt().dims(), max: profile.max().dims() })
                .collect(),
            workspace_bytes: settings.workspace_bytes.unwrap_or(0),
            optimization_level: settings.optimization_level.map_or(-1, i32::from),
            auxiliary_streams: settings.auxiliary_streams.map_or(-1, i32::from),
            detailed_layers: settings.layer_details == LayerDetails::Full,
            fp32_layers: settings.fp32_layers.clone(),
            // A GPU that is newer than the library runs what is built for all.
            capabilities: self
                .target
                .capabilities()
                .into_iter()
                .filter(|capability| ahead_of_time_capabilities().contains(capability))
                .map(|ComputeCapability { major, minor }| bridge::Capability { major, minor })
                .collect(),
            timing_cache: &settings.timing_cache,
        };
        self.target.bind()?;
        let parser = library.parser()?;
        let one = wait_for_turn(progress, || match ONE_BUILD.try_lock() {
            Ok(turn) => Ok(Some(turn)),
            // A panic in a build's progress leaves nothing behind.
            Err(TryLockError::Poisoned(turn)) => Ok(Some(turn.into_inner())),
            Err(TryLockError::WouldBlock) => Ok(None),
        })?;
        let built = self.handle.build(&parser, &request, &BuildWatch(progress));
        drop(one);
        if progress.cancelled() {
            return Err(Error::Cancelled { what: "building the engine" });
        }
        let plan = built.map_err(|exception| failure(ACTION, &exception))?;
        Ok(Plan { bytes: plan.bytes().to_vec(), timing_cache: plan.timing_cache().to_vec() })
    }
}

/// Whether GPUs of this compute capability multiply 8-bit integers (`dp4a` or tensor cores).
fn has_int8(capability: ComputeCapability) -> bool {
    capability >= (6, 1).into() && capability != (6, 2).into()
}

/// A failed call as an error with a next step.
pub(in crate::tensorrt) fn failure(action: &'static str, exception: &cxx::Exception) -> Error {
    let reason = exception.what().to_owned();
    let lower = reason.to_lowercase();
    let next = if ["out of memory", "outofmemory", "insufficient memory", "cudaerrormemoryallocation"]
        .iter()
        .any(|sign| lower.contains(sign))
    {
        "The GPU's memory is full: stop other programs on it (`nvidia-smi` lists them), build with smaller profiles or fewer buckets."
    } else if action == ACTION {
        "RUST_LOG=trt_embed::tensorrt=debug shows all that TensorRT says."
    } else if action == "load the engine" {
        "A plan runs only with the TensorRT and the kind of GPU that built it: build it again."
    } else {
        "RUST_LOG=trt_embed::tensorrt=debug shows all that TensorRT says."
    };
    Error::TensorRt { action, reason, next }
}

/// Ends the process with exit status `status` while builds may be running on other threads, which TensorRT 8.6 cannot stop.
///
/// Files that this process has begun and not finished are removed. Nothing else is tidied up: what C libraries have registered for
/// the end of the process would meet a build that still uses them.
pub fn exit_during_build(status: i32) -> ! {
    crate::files::discard_unfinished();
    bridge::end_process(status);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::has_int8;

    #[test]
    fn gpus_that_compute_fp16_alone_are_known() {
        for capability in [(5, 3), (6, 0), (6, 2)] {
            assert!(!has_int8(capability.into()), "{capability:?}");
        }
        for capability in [(6, 1), (7, 0), (7, 5), (8, 0), (9, 0), (12, 0)] {
            assert!(has_int8(capability.into()), "{capability:?}");
        }
    }
}
