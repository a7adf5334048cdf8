//! What SIGINT, SIGTERM and SIGHUP do: the process ends with 128 + the signal's number and leaves no temporary file behind.
//!
//! The signals are blocked in every thread and waited for in one of their own, which may therefore do anything. A verb that can be asked
//! to stop says so with [`stop_with`]: then the first signal asks, and the second ends the process.

use super::say;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a signal finds.
struct State {
    /// How the first signal asks, where the verb can be asked to stop.
    stop: Option<Stop>,
    /// Why a verb that could be asked at other times cannot be now; in brackets behind the signal's name.
    reason: String,
    /// What an interrupted run leaves on purpose; said last.
    kept: String,
}

/// How a verb is asked to stop.
enum Stop {
    /// By setting this.
    Flag(Arc<AtomicBool>),
    /// By calling this; nothing is left of it after that.
    #[cfg_attr(not(feature = "serve"), allow(dead_code))]
    Call(Option<Box<dyn FnOnce() + Send>>),
}

static STATE: Mutex<State> = Mutex::new(State { stop: None, reason: String::new(), kept: String::new() });

/// The exit status that the last signal asks for; 0 while there was none.
static STATUS: AtomicU8 = AtomicU8::new(0);

/// The state of a verb that can be asked to stop, until this is dropped.
#[must_use]
#[cfg_attr(not(any(feature = "tensorrt", feature = "serve")), allow(dead_code))] // builds and the server alone can be asked
pub struct Stoppable;

impl Drop for Stoppable {
    fn drop(&mut self) {
        let mut state = state();
        state.stop = None;
        state.reason.clear();
    }
}

/// Lets the first signal set `flag`, where there is one; without, it ends the process, and `reason` tells why.
#[cfg_attr(not(feature = "tensorrt"), allow(dead_code))]
pub fn stop_with(flag: Option<Arc<AtomicBool>>, reason: String) -> Stoppable {
    let mut state = state();
    (state.stop, state.reason) = (flag.map(Stop::Flag), reason);
    Stoppable
}

/// Lets the first signal call `call`.
#[cfg(feature = "serve")]
pub fn stop_by(call: impl FnOnce() + Send + 'static) -> Stoppable {
    state().stop = Some(Stop::Call(Some(Box::new(call))));
    Stoppable
}

/// What a signal says of that which the run leaves on purpose; empty for nothing.
pub fn say_kept(kept: String) {
    state().kept = kept;
}

/// The exit status of a run that a signal stopped (128 + its number); that of SIGINT where none came.
pub fn status() -> u8 {
    match STATUS.load(Ordering::SeqCst) {
        0 => 130,
        status => status,
    }
}

fn state() -> MutexGuard<'static, State> {
    // Three independent fields: whole after any panic.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for signals from now on. Called before any other thread is started: threads inherit what they leave to this one.
#[cfg(unix)]
pub fn install() {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    // `nohup` starts its command with SIGHUP ignored; so it stays.
    if !ignored(Signal::SIGHUP as u32) {
        signals.add(Signal::SIGHUP);
    }
    if let Err(error) = signals.thread_block() {
        return log::warn!("signals end this process at once, and leave temporary files behind: {error}");
    }
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            arrived(signal.as_str(), u8::try_from(signal as i32).unwrap_or(0));
        }
    };
    if let Err(error) = std::thread::Builder::new().name("signals".into()).spawn(wait) {
        // Blocked and not waited for, they would be lost.
        let _ = signals.thread_unblock();
        log::warn!("signals end this process at once, and leave temporary files behind: {error}");
    }
}

/// Elsewhere the system ends the process; a later start removes what it left.
#[cfg(not(unix))]
pub fn install() {}

/// Whether this process was started with `signal` ignored. Where the system does not tell, it was not.
#[cfg(unix)]
fn ignored(signal: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignored_by(&status, signal)
}

#[cfg(unix)]
fn ignored_by(status: &str, signal: u32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(unix)]
fn arrived(name: &str, number: u8) {
    let status = 128 + number;
    STATUS.store(status, Ordering::SeqCst);
    let mut state = state();
    match &mut state.stop {
        Some(Stop::Flag(stop)) if !stop.swap(true, Ordering::SeqCst) => {
            return say(&format!("{name}: stopping at the next step; another one ends at once"));
        }
        Some(Stop::Call(call)) => {
            if let Some(call) = call.take() {
                call();
                return say(&format!("{name}: ending what is under way; another one ends at once"));
            }
        }
        _ => {}
    }
    // From here on nothing is committed any more: what is said is true.
    let discarded = trt_embed::files::discard_unfinished();
    let mut message = format!("ended by {name}");
    if !state.reason.is_empty() {
        message.push_str(&format!(" ({})", state.reason));
    }
    message.push_str(if discarded > 0 { "; the unfinished output was removed" } else { "" });
    if !state.kept.is_empty() {
        message.push_str(&format!("; {}", state.kept));
    }
    say(&message);
    end(status.into())
}

/// Without what is registered for the process's end: other threads may be within TensorRT.
#[cfg(all(unix, feature = "tensorrt"))]
fn end(status: i32) -> ! {
    trt_embed::backend::tensorrt::exit_during_build(status)
}

#[cfg(all(unix, not(feature = "tensorrt")))]
fn end(status: i32) -> ! {
    std::process::exit(status)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_their_mask() {
        let status = "Name:\tcat\nSigBlk:\t0000000000000003\nSigIgn:\t0000000000001001\nSigCgt:\t0\n";
        assert!(ignored_by(status, 1) && ignored_by(status, 13));
        assert!(!ignored_by(status, 2) && !ignored_by(status, 15) && !ignored_by("", 1));
    }
}
