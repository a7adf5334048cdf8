//! A call's batches over threads of its own.

use crate::Result;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Runs `work` on each of `batches`, on the caller's thread and up to `workers - 1` others, and gives what each made, in their order.
///
/// A thread takes the next batch when it is done with the one before, so that a call waits for the executor with no more than `workers`
/// batches. The executor serves those who wait in the order they came: a call of one batch is let in after the batches that run, however many
/// another call has.
///
/// # Errors
/// After the first failure no further batch is begun. Of several failures it is the first batch's, always the same one: batches are
/// begun in their order, so that all before it have run.
pub(super) fn in_order<T: Sync, R: Send>(batches: &[T], workers: usize, work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || {
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(batch) = batches.get(place) else { break };
            let result = work(batch);
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            done.push((place, result));
        }
        done
    };
    let mut done = thread::scope(|scope| {
        // Where the system gives no further thread, those that there are do the work.
        let start = |_| thread::Builder::new().name("trt-embed".into()).spawn_scoped(scope, run).ok();
        let others: Vec<_> = (1..workers.min(batches.len())).map_while(start).collect();
        let mut done = run();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(all(test, any(feature = "cpu", feature = "tensorrt")))]
mod tests {
    use super::*;
    use crate::Error;
    use crate::executor::permits::Permits;
    use std::sync::{Barrier, Mutex};

    fn failure(batch: usize) -> Error {
        Error::Backend { backend: "test", reason: batch.to_string() }
    }

    #[test]
    fn results_stand_in_the_order_of_the_batches() {
        for (batches, workers) in [(0, 3), (1, 3), (2, 1), (100, 7), (100, 0)] {
            let batches: Vec<usize> = (0..batches).collect();
            let doubled = in_order(&batches, workers, |batch| Ok(2 * batch)).unwrap();
            assert_eq!(doubled, batches.iter().map(|batch| 2 * batch).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_failure_stops_the_batches_that_nobody_has_begun() {
        const WORKERS: usize = 4;
        let batches: Vec<usize> = (0..1000).collect();
        let begun = AtomicUsize::new(0);
        let work = |&batch: &usize| {
            begun.fetch_add(1, Ordering::SeqCst);
            if batch == 10 { Err(failure(batch)) } else { Ok(()) }
        };
        // One thread: exactly up to the failure.
        assert!(in_order(&batches, 1, work).unwrap_err().to_string().ends_with(" 10"));
        assert_eq!(begun.swap(0, Ordering::SeqCst), 11);
        // Several: those under way end, and the failure waits for them all, so that no thread can have taken more than one since.
        let together = Barrier::new(WORKERS);
        let work = |&batch: &usize| {
            begun.fetch_add(1, Ordering::SeqCst);
            together.wait();
            if batch < WORKERS { Err(failure(batch)) } else { Ok(()) }
        };
        in_order(&batches, WORKERS, work).unwrap_err();
        assert_eq!(begun.into_inner(), WORKERS);
    }

    #[test]
    fn of_several_failures_the_first_batch_s_is_told() {
        // Batch 1 fails at once, batch 0 only then.
        let batches = [0, 1];
        for _ in 0..50 {
            let later = Barrier::new(2);
            let work = |&batch: &usize| -> Result<()> {
                later.wait();
                if batch == 0 {
                    thread::yield_now();
                }
                Err(failure(batch))
            };
            assert!(in_order(&batches, 2, work).unwrap_err().to_string().ends_with(" 0"));
        }
    }

    #[test]
    fn a_short_call_waits_for_the_batches_that_run_and_not_for_a_long_call() {
        const WORKERS: usize = 2;
        // One runs at a time, so that who has the permit is the only one to write itself down.
        let (permits, begun, gate) = (Permits::new(1), Mutex::new(Vec::new()), Barrier::new(2));
        let waits = |count| {
            while permits.waiting() != count {
                thread::yield_now();
            }
        };
        let bulk: Vec<usize> = (0..500).collect();
        thread::scope(|scope| {
            let long = || {
                let work = |_: &usize| {
                    let _permit = permits.take();
                    let first = {
                        let mut begun = begun.lock().unwrap();
                        begun.push("long");
                        begun.len() == 1
                    };
                    if first {
                        gate.wait();
                    }
                    Ok(())
                };
                in_order(&bulk, WORKERS, work).unwrap();
            };
            scope.spawn(long);
            while begun.lock().unwrap().is_empty() {
                thread::yield_now();
            }
            waits(1);
            let short = || {
                let work = |_: &usize| {
                    let _permit = permits.take();
                    begun.lock().unwrap().push("short");
                    Ok(())
                };
                in_order(&[0, 1], WORKERS, work).unwrap();
            };
            scope.spawn(short);
            waits(3);
            gate.wait();
        });
        let begun = begun.into_inner().unwrap();
        assert_eq!(begun.len(), bulk.len() + 2);
        // The one that ran when it came and the one that waited already; then its own, before the 498 others.
        assert_eq!(begun[..4], ["long", "long", "short", "short"]);
    }
}
