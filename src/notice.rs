//! Warnings about a model, each said once: a folder is opened several times on the way to an engine.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// What this process has said already.
static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Logs `message` as a warning, unless this process has done so before.
pub(crate) fn warn_once(message: String) {
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.contains(&message) {
        log::warn!("{message}");
        said.insert(message);
    }
}
