//! Waiting for another build, of this process or of another, to end.

use crate::{Error, Progress, Result};
use std::thread;
use std::time::Duration;

/// Between two looks at a lock that another build holds; builds take from seconds to minutes.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);

/// Tries until `attempt` gives something, as a phase that `progress` hears of and may cancel.
pub(in crate::tensorrt) fn wait_for_turn<T>(progress: &dyn Progress, attempt: impl Fn() -> Result<Option<T>>) -> Result<T> {
    const WAITING: &str = "waiting for another build";
    if let Some(turn) = attempt()? {
        return Ok(turn);
    }
    log::info!("{WAITING}");
    progress.phase_started(WAITING, None, 0);
    let turn = loop {
        if progress.cancelled() {
            break Err(Error::Cancelled { what: WAITING });
        }
        thread::sleep(LOCK_INTERVAL);
        match attempt() {
            Ok(None) => {}
            Ok(Some(turn)) => break Ok(turn),
            Err(error) => break Err(error),
        }
    };
    progress.phase_finished(WAITING);
    turn
}
