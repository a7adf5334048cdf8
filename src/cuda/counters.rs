//! Counts of what a warm call must not do, over the whole process: allocations and waits.

use std::sync::atomic::{AtomicU64, Ordering};

/// Since the process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Device memory allocated by this crate (not by the executor).
    pub device_allocations: u64,
    /// Page-locked host memory allocated.
    pub pinned_allocations: u64,
    /// Waits of the host for a stream.
    pub synchronisations: u64,
}

pub(super) static DEVICE_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
pub(super) static PINNED_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
pub(super) static SYNCHRONISATIONS: AtomicU64 = AtomicU64::new(0);

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The counts now.
pub fn counters() -> Counters {
    Counters {
        device_allocations: DEVICE_ALLOCATIONS.load(Ordering::Relaxed),
        pinned_allocations: PINNED_ALLOCATIONS.load(Ordering::Relaxed),
        synchronisations: SYNCHRONISATIONS.load(Ordering::Relaxed),
    }
}
