//! What a running build says on stderr, and how a signal stops it.

use super::signals::{self, Stoppable};
use super::{progress, say};
use indicatif::ProgressBar;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use trt_embed::backend::tensorrt::Library;

/// A watched build: a spinner with the running phase and the time on a terminal, a line a phase elsewhere.
pub struct Watch {
    bar: ProgressBar,
    plain: bool,
    stop: Arc<AtomicBool>,
    signals: Mutex<Option<Stoppable>>,
    phases: Mutex<Vec<Phase>>,
}

/// A phase under way, after the phases that it lies within.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Phase {
    name: String,
    depth: usize,
    done: u32,
    steps: u32,
}

/// Watches a build with `library`. Where TensorRT can be stopped, the first signal asks for that, until the build is over; where it
/// cannot, it ends the process. Nothing half-written is left in any case.
pub fn watch(library: &Library) -> Watch {
    let stop = Arc::new(AtomicBool::new(false));
    let stoppable = library.version().reports_progress();
    let reason = if stoppable { String::new() } else { format!("TensorRT {} cannot be asked to stop", library.version()) };
    let signals = signals::stop_with(stoppable.then(|| stop.clone()), reason);
    let plain = !std::io::stderr().is_terminal();
    Watch { bar: progress::step("starting"), plain, stop, signals: Mutex::new(Some(signals)), phases: Mutex::default() }
}

impl Watch {
    /// Takes the spinner away: the build is over.
    pub fn finish(&self) {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.bar.finish_and_clear();
    }

    fn phases(&self) -> MutexGuard<'_, Vec<Phase>> {
        // A list of phases is whole after any panic.
        self.phases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl trt_embed::Progress for Watch {
    fn phase_started(&self, name: &str, parent: Option<&str>, steps: u32) {
        let mut phases = self.phases();
        let depth = begin(&mut phases, name, parent, steps);
        // TensorRT has hundreds of phases below those of its first two levels.
        if self.plain && depth <= 1 {
            say(&format!("{}{name}", "  ".repeat(depth)));
        }
        self.bar.set_message(message(&phases));
    }

    fn step_done(&self, name: &str, step: u32) {
        let mut phases = self.phases();
        if let Some(phase) = phases.iter_mut().rfind(|phase| phase.name == name) {
            phase.done = step.saturating_add(1);
        }
        self.bar.set_message(message(&phases));
    }

    fn phase_finished(&self, name: &str) {
        let mut phases = self.phases();
        if let Some(place) = phases.iter().rposition(|phase| phase.name == name) {
            phases.remove(place);
        }
        self.bar.set_message(message(&phases));
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Puts a phase after its parent and gives its depth. One without a parent lies within what runs already.
fn begin(phases: &mut Vec<Phase>, name: &str, parent: Option<&str>, steps: u32) -> usize {
    let depth = match parent {
        Some(parent) => phases.iter().rfind(|phase| phase.name == parent).map_or(0, |phase| phase.depth + 1),
        None => usize::from(!phases.is_empty()),
    };
    phases.push(Phase { name: name.to_owned(), depth, done: 0, steps });
    depth
}

/// The outermost phase and, of those within it, the latest that counts its steps.
fn message(phases: &[Phase]) -> String {
    let Some((outer, inner)) = phases.split_first() else { return String::new() };
    match inner.iter().rfind(|phase| phase.steps > 1).or(inner.last()) {
        Some(phase) if phase.steps > 1 => format!("{}: {} {}/{}", outer.name, phase.name, phase.done, phase.steps),
        Some(phase) => format!("{}: {}", outer.name, phase.name),
        None => outer.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_tells_the_outer_phase_and_the_steps_of_the_inner() {
        let mut phases = Vec::new();
        assert_eq!(message(&phases), "");
        assert_eq!(begin(&mut phases, "building the engine", None, 0), 0);
        assert_eq!(message(&phases), "building the engine");
        assert_eq!(begin(&mut phases, "Building", None, 1), 1);
        assert_eq!(begin(&mut phases, "Timing", Some("Building"), 80), 2);
        assert_eq!(begin(&mut phases, "Tactics of node 7", Some("Timing"), 1), 3);
        phases[2].done = 12;
        assert_eq!(message(&phases), "building the engine: Timing 12/80");
        phases.truncate(2);
        assert_eq!(message(&phases), "building the engine: Building");
        assert_eq!(begin(&mut phases, "Orphan", Some("gone"), 1), 0);
    }
}
