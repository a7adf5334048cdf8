//! Hears what a build does.

use std::sync::Mutex;
use trt_embed::Progress;

/// Keeps the phases' names.
#[derive(Default)]
pub struct Phases(pub Mutex<Vec<String>>);

impl Progress for Phases {
    fn phase_started(&self, phase: &str, _: Option<&str>, _: u32) {
        self.0.lock().unwrap().push(phase.to_owned());
    }
}

impl Phases {
    /// Whether a phase began whose name begins so: with TensorRT 8 a build's names its profile.
    pub fn has(&self, name: &str) -> bool {
        self.0.lock().unwrap().iter().any(|phase| phase.starts_with(name))
    }
}
