//! The plans of an engine file onto a device.
#![allow(unsafe_code)]

use super::EngineFile;
use crate::Result;
use crate::tensorrt::library::{Engine, Runtime};
use rayon::prelude::*;
use std::sync::Arc;

impl EngineFile {
    /// Loads the plans onto `runtime`'s device, in their order.
    ///
    /// # Errors
    /// As [`Engine::deserialize`]; [`Error::EngineMismatch`](crate::Error::EngineMismatch) where the manifest cuts the plans elsewhere
    /// than they end.
    pub fn load(&self, runtime: &Arc<Runtime>) -> Result<Vec<Arc<Engine>>> {
        let plans = self.manifest.split(self.plan())?;
        // Side by side: a plan's weights are unpacked on the host before they go to the device.
        // SAFETY: an engine file's plans came from a build, or whole from a file that the caller chose to trust.
        plans.into_par_iter().map(|plan| unsafe { Engine::deserialize(runtime, plan) }).collect()
    }
}
