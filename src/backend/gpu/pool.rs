//! A pool of things that one caller at a time uses: first come, first served; broken ones are made anew.

use crate::cuda::CudaError;
use crate::{Error, Result};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Condition variables that waiting callers are spread over, so that each return wakes few of them.
const TURNS: usize = 16;

/// See the module. Checking out and returning allocates nothing.
pub(super) struct Pool<T> {
    state: Mutex<State<T>>,
    turns: [Condvar; TURNS],
}

struct State<T> {
    /// `None` in the place of one that broke.
    idle: Vec<Option<T>>,
    /// The next caller's number.
    next: u64,
    /// The number of the caller whose turn it is.
    serving: u64,
    /// Why nothing will ever run again.
    lost: Option<CudaError>,
}

/// Returns what was checked out, also where the caller panics.
struct Return<'a, T> {
    pool: &'a Pool<T>,
    item: Option<T>,
    lost: Option<CudaError>,
}

impl<T> Pool<T> {
    /// A pool of `items`.
    pub fn new(items: Vec<T>) -> Self {
        let idle = items.into_iter().map(Some).collect();
        Self { state: Mutex::new(State { idle, next: 0, serving: 0, lost: None }), turns: Default::default() }
    }

    /// Waits for an item, uses it and returns it. One that fails with a fault of the GPU or executor is dropped, and whoever comes
    /// next in its place makes another with `make`. A lost device loses the pool: from then on every call says so.
    ///
    /// # Errors
    /// What `work` or `make` says; [`CudaError::DeviceLost`] from an earlier call.
    pub fn with<R>(&self, make: impl FnOnce() -> Result<T>, work: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let item = self.check_out()?;
        // Until the work is done the item counts as broken: that is what a panic leaves.
        let mut back = Return { pool: self, item: None, lost: None };
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

    fn check_out(&self) -> Result<Option<T>> {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        loop {
            if let Some(lost) = &state.lost {
                return Err(lost.clone().into());
            }
            if state.serving == number
                && let Some(item) = state.idle.pop()
            {
                state.serving += 1;
                if !state.idle.is_empty() {
                    self.turn(state.serving).notify_all();
                }
                return Ok(item);
            }
            state = self.turn(number).wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn turn(&self, number: u64) -> &Condvar {
        &self.turns[(number % TURNS as u64) as usize]
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
            self.pool.turns.iter().for_each(Condvar::notify_all);
        } else {
            self.pool.turn(state.serving).notify_all();
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
    use std::sync::mpsc;

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
    fn callers_are_served_in_the_order_they_came() {
        const CALLERS: usize = 40; // more than there are condition variables
        let pool = Pool::new(vec![0_u32]);
        let (order, served) = mpsc::channel();
        std::thread::scope(|scope| {
            pool.with(never, |_| {
                for caller in 0..CALLERS {
                    let (order, pool) = (order.clone(), &pool);
                    let work = move |_: &mut u32| {
                        order.send(caller).unwrap();
                        Ok(())
                    };
                    scope.spawn(move || pool.with(never, work).unwrap());
                    // The next one starts when this one has its number.
                    while pool.lock().next != caller as u64 + 2 {
                        std::thread::yield_now();
                    }
                }
                Ok(())
            })
            .unwrap();
        });
        drop(order);
        assert_eq!(served.iter().collect::<Vec<_>>(), (0..CALLERS).collect::<Vec<_>>());
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
                for caller in 0..20 {
                    let pool = &pool;
                    scope.spawn(move || {
                        let error = pool.with(never, |_| Ok(())).unwrap_err();
                        assert!(matches!(error, Error::Cuda(CudaError::DeviceLost { .. })), "{error}");
                    });
                    while pool.lock().next != caller + 2 {
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
