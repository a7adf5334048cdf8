//! Names the stages of a call in Nsight's timelines (NVTX ranges), with the feature `nvtx`, and notes how long the stages of loading
//! take.

use std::marker::PhantomData;

/// A range on this thread, from its creation to its drop; ranges within it show as a stack. Not `Send`: a range ends on the thread
/// that it began on.
#[must_use = "the range ends when this is dropped"]
pub(crate) struct Range(PhantomData<*const ()>);

/// Does `work`, a stage of loading, and notes its time for the log at level debug.
#[cfg(feature = "cuda")]
pub(crate) fn stage<T>(name: &'static str, work: impl FnOnce() -> T) -> T {
    let (_range, start) = (range(name), std::time::Instant::now());
    let result = work();
    log::debug!("{name}: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

/// Begins a range called `name`, which has no zero byte. The nvtx crate copies the name at every call, profiler or not.
#[cfg(feature = "nvtx")]
pub(crate) fn range(name: &'static str) -> Range {
    nvtx::range_push!("{name}");
    Range(PhantomData)
}

/// Does nothing in this build.
#[cfg(not(feature = "nvtx"))]
#[inline(always)]
pub(crate) fn range(_name: &'static str) -> Range {
    Range(PhantomData)
}

#[cfg(feature = "nvtx")]
impl Drop for Range {
    fn drop(&mut self) {
        nvtx::range_pop!();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_range_takes_no_room_and_nests() {
        let outer = super::range("outer");
        let inner = super::range("inner");
        assert_eq!(size_of_val(&outer) + size_of_val(&inner), 0);
    }
}
