//! Progress on stderr: bars on a terminal, and elsewhere a line for each step that may take minutes.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A bar over `total` bytes of input, or a spinner when the size is not known. Counts texts in its message.
/// Hidden where stdout is a terminal too: rows and a bar would overwrite each other.
pub fn texts(total: Option<u64>, rows_on_stdout: bool) -> ProgressBar {
    if !std::io::stderr().is_terminal() || rows_on_stdout && std::io::stdout().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    bar.set_style(style(match total {
        Some(_) => "{bar:30} {percent:>3}% {msg} [{elapsed} < {eta}]",
        None => "{spinner} {msg} [{elapsed}]",
    }));
    bar
}

/// A spinner with `message` for a step whose length is not known.
pub fn step(message: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    spin(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()), message.to_owned())
}

/// Lets `bar` turn beside `message` and the time.
fn spin(bar: ProgressBar, message: String) -> ProgressBar {
    bar.set_style(style("{spinner} {msg} [{elapsed}]"));
    bar.set_message(message);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A phase's steps, which are texts, on a bar.
pub struct Counted<'a>(pub &'a ProgressBar);

impl trt_embed::Progress for Counted<'_> {
    fn phase_started(&self, _: &str, _: Option<&str>, steps: u32) {
        self.0.set_length(u64::from(steps));
    }

    fn step_done(&self, _: &str, step: u32) {
        let (done, total) = (u64::from(step) + 1, self.0.length().unwrap_or(0));
        self.0.set_position(done);
        self.0.set_message(format!("{done} of {total} texts"));
    }
}

/// One bar a file that the hub sends, and a spinner or a line for each phase of a build.
pub fn downloads() -> Arc<dyn trt_embed::Progress> {
    Arc::new(Downloads { bars: MultiProgress::new(), by_file: Mutex::default(), phases: Mutex::default() })
}

/// Bars of downloads under way, by file name, and of the phases under way.
struct Downloads {
    bars: MultiProgress,
    by_file: Mutex<HashMap<String, ProgressBar>>,
    phases: Mutex<Vec<(String, ProgressBar)>>,
}

impl trt_embed::Progress for Downloads {
    fn download(&self, file: &str, done: u64, total: u64) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let mut by_file = self.by_file.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = by_file.entry(file.to_owned()).or_insert_with(|| {
            let bar = self.bars.add(ProgressBar::no_length());
            bar.set_style(style(if total == 0 {
                "{msg:28} {spinner} {bytes} {bytes_per_sec} [{elapsed}]"
            } else {
                "{msg:28} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} [{eta}]"
            }));
            bar.set_message(file.to_owned());
            bar
        });
        if total != 0 {
            bar.set_length(total);
        }
        bar.set_position(done);
        if done == total && total != 0 {
            bar.finish();
        }
    }

    fn phase_started(&self, phase: &str, parent: Option<&str>, _: u32) {
        // The phases within TensorRT's own are for those who build on purpose.
        if parent.is_some() {
            return;
        }
        if !std::io::stderr().is_terminal() {
            return super::say(phase);
        }
        let bar = spin(self.bars.add(ProgressBar::new_spinner()), phase.to_owned());
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push((phase.to_owned(), bar));
    }

    fn phase_finished(&self, phase: &str) {
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = phases.iter().rposition(|(name, _)| name == phase) {
            phases.remove(place).1.finish_and_clear();
        }
    }
}

/// Templates are constants of this file; a faulty one falls back to indicatif's own.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
