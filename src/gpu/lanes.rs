//! A pool of things that one caller at a time uses: first come, first served; broken ones are made anew.

use crate::cuda::CudaError;
use crate::executor::permits::{Permit, Permits};
use crate::{Error, Result};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module. Checking out and returning allocates nothing.
pub(super) struct Pool<T> {
    state: Mutex<State<T>>,
    /// One for each item.
    permits: Permits,
}

struct State<T> {
    /// `None` in the place of one that broke.
    idle: Vec<Option<T>>,
    /// Why nothing will ever run again.
    lost: Option<CudaError>,
}

/// Returns what was checked out, also where the caller panics.
struct Return<'a, T> {
    pool: &'a Pool<T>,
    item: Option<T>,
    lost: Option<CudaError>,
    // Dropped after the item is back.
    _permit: Permit<'a>,
}

impl<T> Pool<T> {
    /// A pool of `items`.
    pub fn new(items: Vec<T>) -> Self {
        let permits = Permits::new(items.len());
        Self { state: Mutex::new(State { idle: items.into_iter().map(Some).collect(), lost: None }), permits }
    }

    /// Waits for an item, uses it and returns it. One that fails with a fault of the GPU or executor is dropped, and whoever comes
    /// next in its place makes another with `make`. A lost device loses the pool: from then on every call says so.
    ///
    /// # Errors
    /// What `work` or `make` says; [`CudaError::DeviceLost`] from an earlier call.
    pub fn with<R>(&self, make: impl FnOnce() -> Result<T>, work: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let permit = self.permits.take();
        let item = {
            let mut state = self.lock();
            if let Some(lost) = &state.lost {
                return Err(lost.clone().into());
            }
            // With as many permits as items there is one.
            state.idle.pop().flatten()
        };
        // Until the work is done the item counts as broken: that is what a panic leaves.
        let mut back = Return { pool: self, item: None, lost: None, _permit: permit };
        let mut item = match item {
            Some(item) => item,
            None => make().inspect_err(|error| back.lost = lost(error))?,
        };
        let result = work(&mut item);
        match &result {
            Err(error) if breaks(error) => {
                back.lost = lost(error);
                log::warn!("a lane is dropped: {error}");
            }
            _ => back.item = Some(item),
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Drop for Return<'_, T> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.idle.push(self.item.take());
        if let Some(lost) = self.lost.take() {
            state.lost = Some(lost);
        }
    }
}

/// Whether an item may be damaged after this error.
fn breaks(error: &Error) -> bool {
    matches!(error, Error::Cuda(_) | Error::TensorRt { .. })
}

fn lost(error: &Error) -> Option<CudaError> {
    match error {
        Error::Cuda(error) if error.is_lost() => Some(error.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn never() -> Result<u32> {
        panic!("made anew although none is broken")
    }

    fn driver_error() -> Error {
        CudaError::Driver { during: "launch a graph", reason: "refused".into() }.into()
    }

    #[test]
    fn an_item_is_used_by_one_caller_at_a_time() {
        let pool = Pool::new(vec![0_u32, 1]);
        let used = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let calls = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.with(never, |item| {
                            let used = &used[*item as usize];
                            assert_eq!(used.fetch_add(1, Ordering::SeqCst), 0, "two callers have item {item}");
                            std::hint::spin_loop();
                            used.fetch_sub(1, Ordering::SeqCst);
                            calls.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        })
                        .unwrap();
                    }
                });
            }
        });
        assert_eq!(calls.into_inner(), 4000);
    }

    #[test]
    fn a_broken_item_is_made_anew_and_a_harmless_error_keeps_it() {
        let pool = Pool::new(vec![7_u32]);
        let harmless = pool.with(never, |_| Err::<(), _>(Error::OutsideProfile { shape: "2x2".into(), profiles: "1x1".into() }));
        assert!(matches!(harmless, Err(Error::OutsideProfile { .. })));
        assert_eq!(pool.with(never, |item| Ok(*item)).unwrap(), 7);

        assert!(pool.with(never, |_| Err::<(), _>(driver_error())).is_err());
        // The first attempt to make another fails: that is told, and the next caller tries again.
        assert!(matches!(pool.with(|| Err(driver_error()), |item| Ok(*item)), Err(Error::Cuda(CudaError::Driver { .. }))));
        assert_eq!(pool.with(|| Ok(8), |item| Ok(*item)).unwrap(), 8);
        assert_eq!(pool.with(never, |item| Ok(*item)).unwrap(), 8);
    }

    #[test]
    fn a_panic_gives_the_place_back() {
        let pool = Pool::new(vec![7_u32]);
        let work = std::panic::AssertUnwindSafe(|| pool.with(never, |_| -> Result<()> { panic!("in the work") }));
        assert!(std::panic::catch_unwind(work).is_err());
        assert_eq!(pool.with(|| Ok(8), |item| Ok(*item)).unwrap(), 8);
    }

    #[test]
    fn a_lost_device_is_told_to_everybody_who_waits_and_comes() {
        let pool = Pool::new(vec![7_u32]);
        let lost = || CudaError::DeviceLost { during: "wait for the stream", reason: "illegal address".into() };
        std::thread::scope(|scope| {
            pool.with(never, |_| {
                for waiting in 1..=20 {
                    let pool = &pool;
                    scope.spawn(move || {
                        let error = pool.with(never, |_| Ok(())).unwrap_err();
                        assert!(matches!(error, Error::Cuda(CudaError::DeviceLost { .. })), "{error}");
                    });
                    while pool.permits.waiting() != waiting {
                        std::thread::yield_now();
                    }
                }
                Err::<(), _>(lost().into())
            })
            .unwrap_err();
        });
        assert!(matches!(pool.with(|| Ok(8), |_| Ok(())), Err(Error::Cuda(error)) if error == lost()));
    }
}
