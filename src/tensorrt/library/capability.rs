//! Compute capabilities: which GPUs an engine is for, and which TensorRT runs on which.

use super::ffi::bridge;
use super::{Flavour, Library, Version};
use crate::cuda::Device;
use crate::{Error, Result, Setting};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What a GPU can do, as NVIDIA counts it, written `8.6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ComputeCapability {
    /// The architecture.
    pub major: u32,
    /// Differences within it.
    pub minor: u32,
}

/// The newest that TensorRT for RTX knows by number; its plans for all capabilities also run on newer ones.
const RTX_NEWEST: ComputeCapability = ComputeCapability { major: 12, minor: 1 };

/// What engines can be built for where no such GPU is there, with the headers that this crate was compiled with. Those of TensorRT for RTX
/// have such a list; with the others it is empty.
pub fn ahead_of_time_capabilities() -> Vec<ComputeCapability> {
    bridge::ahead_of_time_capabilities().into_iter().map(|one| ComputeCapability { major: one.major, minor: one.minor }).collect()
}

/// Checks that engines can be built for GPUs of the capabilities `wanted`, of which `version` knows `known`.
///
/// # Errors
/// [`Error::Setting`] for none, for one that is not known or stands there twice, and for a TensorRT that builds on the GPU alone.
pub(super) fn check_targets(version: Version, known: &[ComputeCapability], wanted: &[ComputeCapability]) -> Result<()> {
    let refused = |reason| Err(Error::Setting { setting: Setting::ComputeCapability, reason });
    if !version.builds_ahead_of_time() {
        return refused(format!(
            "TensorRT {version} builds on the GPU that the engine is for; TensorRT for RTX builds for GPUs that are not there"
        ));
    }
    if wanted.is_empty() {
        return refused(format!("TensorRT {version} builds for at least one of {}", list(known)));
    }
    for (place, one) in wanted.iter().enumerate() {
        if !known.contains(one) {
            return refused(format!("{one} is none that TensorRT {version} builds for; it knows {}", list(known)));
        }
        if wanted[..place].contains(one) {
            return refused(format!("{one} is named twice"));
        }
    }
    Ok(())
}

/// Whether TensorRT `version`, which builds ahead for `known`, runs on GPUs of `capability`.
fn runs_on(version: Version, known: &[ComputeCapability], capability: ComputeCapability) -> bool {
    match version.flavour {
        // It says itself what it does not run on: that changes from version to version.
        Flavour::Standard => true,
        Flavour::Rtx => known.contains(&capability) || capability > RTX_NEWEST,
    }
}

impl Library {
    /// Checks that this TensorRT runs on `device`. (TensorRT but that for RTX says so itself, when it builds.)
    ///
    /// # Errors
    /// [`Error::GpuNotServed`].
    pub fn check_device(&self, device: &Device) -> Result<()> {
        let (properties, known) = (device.properties(), ahead_of_time_capabilities());
        let capability = ComputeCapability::from(properties.compute_capability);
        if runs_on(self.version(), &known, capability) {
            return Ok(());
        }
        let served = format!("{} and newer", list(&known));
        Err(not_served(format!("TensorRT {}", self.version()), properties.name.clone(), capability, served, ANOTHER_EXECUTOR))
    }
}

/// What to do where TensorRT for RTX does not run on a GPU at all.
pub(super) const ANOTHER_EXECUTOR: &str = "Choose the backend cuda, this crate's own kernels, or build with the headers of TensorRT 8.6, 10 or 11, \
                                           which serve GPUs of data centres.";

/// `what` does not run on the GPU.
pub(super) fn not_served(what: String, gpu: String, capability: ComputeCapability, served: String, next: &'static str) -> Error {
    Error::GpuNotServed { what, gpu, capability: capability.to_string(), served, next }
}

/// `8.6, 8.9`.
pub(in crate::tensorrt) fn list(capabilities: &[ComputeCapability]) -> String {
    capabilities.iter().map(ComputeCapability::to_string).collect::<Vec<_>>().join(", ")
}

impl From<(u32, u32)> for ComputeCapability {
    fn from((major, minor): (u32, u32)) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for ComputeCapability {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // `parse` would take a sign.
        let number = |digits: &str| digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
        let parts = text.split_once('.').and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
        parts.map(Self::from).ok_or_else(|| Error::Setting {
            setting: Setting::ComputeCapability,
            reason: format!("\"{text}\" is not MAJOR.MINOR, e.g. 8.6"),
        })
    }
}

impl TryFrom<String> for ComputeCapability {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ComputeCapability> for String {
    fn from(capability: ComputeCapability) -> Self {
        capability.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTX: Version = Version { flavour: Flavour::Rtx, major: 1, minor: 7, patch: 1 };

    fn known() -> Vec<ComputeCapability> {
        [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)].map(ComputeCapability::from).into()
    }

    #[test]
    fn capabilities_are_read_as_they_are_written() {
        for text in ["8.6", "12.0", "7.5"] {
            assert_eq!(text.parse::<ComputeCapability>().unwrap().to_string(), text);
        }
        for text in ["", "86", "8.", ".6", "8.6.0", "+8.6", "8.-6", "sm_86", "8,6", "99999999999.0"] {
            let error = text.parse::<ComputeCapability>().unwrap_err();
            assert!(matches!(error, Error::Setting { setting: Setting::ComputeCapability, .. }), "{text}: {error}");
            assert!(error.to_string().contains(&format!("\"{text}\"")), "{error}");
        }
    }

    #[test]
    fn what_no_engine_can_be_built_for_is_refused_by_name() {
        check_targets(RTX, &known(), &known()).unwrap();
        let standard = Version { flavour: Flavour::Standard, major: 8, minor: 6, patch: 0 };
        let (ampere, hopper) = (ComputeCapability::from((8, 6)), ComputeCapability::from((9, 0)));
        for (version, wanted, parts) in [
            (RTX, vec![], ["at least one of", "7.5, 8.0, 8.6"]),
            (RTX, vec![ampere, hopper], ["9.0 is none", "RTX 1.7.1"]),
            (RTX, vec![ampere, ampere], ["8.6", "twice"]),
            (standard, vec![ampere], ["8.6.0 builds on the GPU", "TensorRT for RTX"]),
        ] {
            let error = check_targets(version, &known(), &wanted).unwrap_err();
            assert!(matches!(error, Error::Setting { setting: Setting::ComputeCapability, .. }), "{error}");
            assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error}");
        }
    }

    #[test]
    fn gpus_that_tensorrt_for_rtx_does_not_run_on_are_known() {
        for (capability, runs) in
            [((7, 0), false), ((7, 5), true), ((8, 6), true), ((8, 7), false), ((9, 0), false), ((10, 0), false)]
                .into_iter()
                .chain([((12, 0), true), ((12, 1), true), ((13, 0), true)])
        {
            assert_eq!(runs_on(RTX, &known(), capability.into()), runs, "{capability:?}");
        }
        let standard = Version { flavour: Flavour::Standard, ..RTX };
        assert!(runs_on(standard, &[], (9, 0).into()));
        let error =
            not_served("TensorRT RTX 1.7.1".into(), "NVIDIA H100".into(), (9, 0).into(), list(&known()), ANOTHER_EXECUTOR);
        for part in ["RTX 1.7.1", "NVIDIA H100", "9.0", "8.6, 8.9", "backend cuda", "TensorRT 8.6"] {
            assert!(error.to_string().contains(part), "no {part:?} in: {error}");
        }
    }
}
