//! Progress of slow work, and how its caller stops it.

/// Hears of slow work (downloads, building an engine, calibration) and may stop it. Every method may be called from any thread, from
/// several at once. A panic in a method that a build calls ends the process.
///
/// TensorRT 8.6 reports no phases of its own and cannot be stopped while it builds: there [`Progress::cancelled`] is asked between builds.
pub trait Progress: Send + Sync {
    /// `done` of `total` bytes of `file` have arrived. `total` is 0 while the hub does not say how many there are; the last call
    /// has `done` equal to `total` then too.
    fn download(&self, file: &str, done: u64, total: u64) {
        let _ = (file, done, total);
    }

    /// A phase of `steps` steps begins, within `parent` or within what runs already; 0 steps where they are not counted.
    fn phase_started(&self, phase: &str, parent: Option<&str>, steps: u32) {
        let _ = (phase, parent, steps);
    }

    /// Step `step` of a phase, counted from 0, is done.
    fn step_done(&self, phase: &str, step: u32) {
        let _ = (phase, step);
    }

    /// A phase is over, perhaps before its last step: every phase that began ends, also when the work fails or is stopped.
    fn phase_finished(&self, phase: &str) {
        let _ = phase;
    }

    /// Asked between steps; `true` stops the work with [`Error::Cancelled`](crate::Error::Cancelled).
    fn cancelled(&self) -> bool {
        false
    }
}

/// Work that nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {}
