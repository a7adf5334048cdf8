//! An executor that is made again with a wider precision, once, when values overflow the one that `auto` took.

use crate::Result;
use crate::error::Error;
use crate::executor::{Backend, Limits};
use crate::tokens::{ShapeCosts, TokenBatch};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// Makes the wider executor.
pub(super) type Remake<B> = Box<dyn FnOnce() -> Result<B> + Send>;

/// See the module. A batch that overflows runs again in the wider executor, and so does all that comes after it: what was computed before is right,
/// and as exact as it was. The warning and [`Widening::reason`] tell that vectors have another rounding from then on.
pub(super) struct Widening<B> {
    /// Read by every call, for the moment of a clone; written once.
    current: RwLock<Arc<B>>,
    /// Taken by the first call that overflows.
    remake: Mutex<Option<Remake<B>>>,
    overflows: fn(&Error) -> bool,
    reason: OnceLock<String>,
}

impl<B: Backend> Widening<B> {
    /// `first`, until an error of which `overflows` says so.
    pub fn new(first: B, overflows: fn(&Error) -> bool, remake: Remake<B>) -> Self {
        Self { current: RwLock::new(Arc::new(first)), remake: Mutex::new(Some(remake)), overflows, reason: OnceLock::new() }
    }

    /// The executor that runs batches now.
    pub fn current(&self) -> Arc<B> {
        // Nothing panics while it is locked.
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What overflowed, once the wider executor runs.
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    fn run(&self, mut work: impl FnMut(&B) -> Result<()>) -> Result<()> {
        let backend = self.current();
        match work(&backend) {
            Err(error) if (self.overflows)(&error) => work(&*self.wider(&backend, error)?),
            done => done,
        }
    }

    /// The executor that is wider than `narrow`, which has overflowed with `error`.
    ///
    /// # Errors
    /// `error`, where it cannot be made; the log says why.
    fn wider(&self, narrow: &Arc<B>, error: Error) -> Result<Arc<B>> {
        // Those who overflow at the same time wait here for one that is made.
        let mut remake = self.remake.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.current();
        if !Arc::ptr_eq(&current, narrow) {
            return Ok(current);
        }
        let Some(remake) = remake.take() else { return Err(error) };
        let made = match remake() {
            // Batches are cut for the first one.
            Ok(made) if covers(made.limits(), narrow.limits()) => Arc::new(made),
            Ok(made) => {
                let (found, needed) = (made.limits(), narrow.limits());
                log::warn!("{error}; an executor of a wider precision would serve less ({found:?}) than this one ({needed:?})");
                return Err(error);
            }
            Err(reason) => {
                log::warn!("{error}; an executor of a wider precision could not be made: {reason}");
                return Err(error);
            }
        };
        log::warn!("{error}; --backend auto goes on in bf16, from this batch on");
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = made.clone();
        let _ = self.reason.set(format!("cuda in bf16 in the place of fp16: {error}"));
        Ok(made)
    }
}

fn covers(found: Limits, needed: Limits) -> bool {
    found.max_batch >= needed.max_batch && found.max_seq >= needed.max_seq
}

impl<B: Backend> Backend for Widening<B> {
    fn name(&self) -> &'static str {
        self.current().name()
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.run(|backend| backend.encode(batch, out))
    }

    fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.run(|backend| backend.hidden(batch, out))
    }

    fn limits(&self) -> Limits {
        self.current().limits()
    }

    fn costs(&self) -> Option<Arc<ShapeCosts>> {
        self.current().costs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Gives its own number; the narrow one overflows at ids from 100 on.
    struct Fake {
        number: f32,
        narrow: bool,
        rows: usize,
    }

    fn overflow() -> Error {
        Error::Overflow { place: "layer 7".into(), precision: "fp16" }
    }

    fn overflows(error: &Error) -> bool {
        matches!(error, Error::Overflow { precision: "fp16", .. })
    }

    impl Backend for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }

        fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
            if batch.ids().contains(&77) {
                return Err(Error::Backend { backend: "fake", reason: "asked for".into() });
            }
            if self.narrow && batch.ids().iter().any(|&id| id >= 100) {
                return Err(overflow());
            }
            out.fill(self.number);
            Ok(())
        }

        fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
            self.encode(batch, out)
        }

        fn limits(&self) -> Limits {
            Limits { max_batch: self.rows, max_seq: 9, batch_tokens: usize::MAX, parallelism: 1 }
        }
    }

    fn narrow() -> Fake {
        Fake { number: 1.0, narrow: true, rows: 4 }
    }

    fn encode(backend: &dyn Backend, id: i32) -> Result<f32> {
        let mut out = [0.0];
        backend.encode(&TokenBatch::from_ragged(vec![id], vec![0, 1], 0).unwrap(), &mut out)?;
        Ok(out[0])
    }

    #[test]
    fn the_batch_that_overflows_and_all_after_it_run_in_the_wider_one() {
        let wide = Box::new(|| Ok(Fake { number: 2.0, narrow: false, rows: 4 }));
        let backend = Widening::new(narrow(), overflows, wide);
        assert_eq!(encode(&backend, 5).unwrap(), 1.0);
        assert_eq!(backend.reason(), None);
        assert_eq!(encode(&backend, 100).unwrap(), 2.0);
        assert_eq!(encode(&backend, 5).unwrap(), 2.0);
        assert!(backend.reason().unwrap().contains("values overflow fp16 in layer 7"), "{:?}", backend.reason());
        let mut out = [0.0];
        backend.hidden(&TokenBatch::from_ragged(vec![100], vec![0, 1], 0).unwrap(), &mut out).unwrap();
        assert_eq!(out, [2.0]);
    }

    #[test]
    fn hidden_states_widen_too_and_other_errors_do_not() {
        let backend = Widening::new(narrow(), overflows, Box::new(|| Ok(Fake { number: 2.0, narrow: false, rows: 4 })));
        assert!(matches!(encode(&backend, 77), Err(Error::Backend { .. })));
        assert_eq!(backend.reason(), None);
        let mut out = [0.0];
        backend.hidden(&TokenBatch::from_ragged(vec![100], vec![0, 1], 0).unwrap(), &mut out).unwrap();
        assert_eq!((out, backend.reason().is_some()), ([2.0], true));
    }

    #[test]
    fn callers_that_overflow_at_once_make_one() {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let wide = Box::new(|| {
            MADE.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(Fake { number: 2.0, narrow: false, rows: 4 })
        });
        let backend = Widening::new(narrow(), overflows, wide);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        assert_eq!(encode(&backend, 100).unwrap(), 2.0);
                    }
                });
            }
        });
        assert_eq!(MADE.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn one_that_cannot_be_made_or_serves_less_leaves_the_overflow_an_error_and_is_not_tried_again() {
        static TRIED: AtomicUsize = AtomicUsize::new(0);
        let remakes: [Remake<Fake>; 2] = [
            Box::new(|| {
                TRIED.fetch_add(1, Ordering::SeqCst);
                Err(Error::FileChanged { path: "w".into() })
            }),
            Box::new(|| {
                TRIED.fetch_add(1, Ordering::SeqCst);
                Ok(Fake { number: 2.0, narrow: false, rows: 3 })
            }),
        ];
        for (number, remake) in remakes.into_iter().enumerate() {
            let backend = Widening::new(narrow(), overflows, remake);
            for _ in 0..3 {
                let error = encode(&backend, 100).unwrap_err().to_string();
                assert_eq!(error, "values overflow fp16 in layer 7; choose the precision bf16 or fp32");
                assert_eq!(encode(&backend, 5).unwrap(), 1.0);
            }
            assert_eq!((TRIED.load(Ordering::SeqCst), backend.reason()), (number + 1, None));
        }
    }
}
