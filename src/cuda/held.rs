//! What work of the device uses, kept alive until the work is done.

use super::memory::{HostBlock, Keep};
use std::sync::Arc;

/// What some work of the device uses.
#[derive(Default)]
pub(super) struct Held {
    pub(super) keeps: Vec<Keep>,
    /// Host memory that the work touches.
    pub(super) hosts: Vec<Arc<HostBlock>>,
}
