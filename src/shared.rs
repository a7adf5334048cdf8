//! Values that are made once and shared by all who ask for the same one while it lives: tokenizers, and the weights of a model on a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Values by key. It holds none of them: each is dropped with its last user.
pub(crate) struct Registry<K, V> {
    /// A handful at most: searched one by one.
    slots: Mutex<Vec<(K, Arc<Slot<V>>)>>,
}

/// The place of one value; locked while it is made.
struct Slot<V>(Mutex<Weak<V>>);

impl<K: PartialEq, V> Registry<K, V> {
    pub const fn new() -> Self {
        Self { slots: Mutex::new(Vec::new()) }
    }

    /// The living value of `key`, else what `make` makes. Those who ask for the same key at the same time wait for one that is made, and where that fails
    /// the next of them tries; other keys are made meanwhile.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get_or_make<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        let slot = self.slot(key);
        let mut value = lock(&slot.0);
        if let Some(value) = value.upgrade() {
            return Ok(value);
        }
        let made = Arc::new(make()?);
        *value = Arc::downgrade(&made);
        Ok(made)
    }

    /// The slot of `key`; those that nobody uses any more are let go.
    fn slot(&self, key: K) -> Arc<Slot<V>> {
        let mut slots = lock(&self.slots);
        // A slot that only the registry holds is not being filled: whoever fills it got it under this lock.
        slots.retain(|(_, slot)| Arc::strong_count(slot) > 1 || lock(&slot.0).strong_count() > 0);
        if let Some((_, slot)) = slots.iter().find(|(of, _)| *of == key) {
            return slot.clone();
        }
        let slot = Arc::new(Slot(Mutex::new(Weak::new())));
        slots.push((key, slot.clone()));
        slot
    }
}

/// What a panic of `make` leaves is a slot without a value.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    fn made(registry: &Registry<u32, u32>, key: u32, value: u32) -> Arc<u32> {
        registry.get_or_make(key, || Ok::<_, ()>(value)).unwrap()
    }

    fn never(registry: &Registry<u32, u32>, key: u32) -> Arc<u32> {
        registry.get_or_make(key, || -> Result<u32, ()> { panic!("{key} is made although it lives") }).unwrap()
    }

    #[test]
    fn a_value_is_shared_while_it_lives_and_made_anew_after() {
        let registry = Registry::new();
        let first = made(&registry, 1, 10);
        let second = never(&registry, 1);
        assert!(Arc::ptr_eq(&first, &second));
        drop(first);
        assert_eq!(*never(&registry, 1), 10);
        let weak = Arc::downgrade(&second);
        drop(second);
        assert!(weak.upgrade().is_none(), "the registry holds the value");
        assert_eq!(*made(&registry, 1, 11), 11);
    }

    #[test]
    fn keys_have_values_of_their_own_and_dead_ones_leave_no_slot() {
        let registry = Registry::new();
        let (one, two) = (made(&registry, 1, 10), made(&registry, 2, 20));
        assert_eq!((*one, *two, lock(&registry.slots).len()), (10, 20, 2));
        drop(two);
        for key in 3..100 {
            made(&registry, key, key);
        }
        // The one that lives, and the last one that was asked for.
        assert_eq!(lock(&registry.slots).len(), 2);
        assert!(Arc::ptr_eq(&one, &never(&registry, 1)));
    }

    #[test]
    fn threads_that_ask_at_once_make_one() {
        const THREADS: usize = 8;
        let registry = Registry::new();
        for round in 0..50 {
            let (count, start) = (AtomicUsize::new(0), Barrier::new(THREADS));
            let values: Vec<Arc<u32>> = std::thread::scope(|scope| {
                let ask = || {
                    start.wait();
                    let make = || {
                        count.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_micros(200));
                        Ok::<_, ()>(round)
                    };
                    registry.get_or_make(7, make).unwrap()
                };
                let askers: Vec<_> = (0..THREADS).map(|_| scope.spawn(ask)).collect();
                askers.into_iter().map(|asker| asker.join().unwrap()).collect()
            });
            assert_eq!(count.into_inner(), 1, "round {round}");
            assert!(values.iter().all(|value| Arc::ptr_eq(value, &values[0]) && **value == round));
        }
    }

    #[test]
    fn one_that_is_being_made_hinders_no_other_key_and_keeps_its_slot() {
        let registry = Registry::new();
        let (begun, has_begun) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let registry = &registry;
            let slow = scope.spawn(move || {
                let make = || {
                    begun.send(()).unwrap();
                    may_go.recv().unwrap();
                    Ok::<_, ()>(10)
                };
                registry.get_or_make(1, make).unwrap()
            });
            has_begun.recv().unwrap();
            // While it is made: this would hang on one lock for all.
            assert_eq!(*made(registry, 2, 20), 20);
            let waiting = scope.spawn(|| never(registry, 1));
            go.send(()).unwrap();
            assert!(Arc::ptr_eq(&slow.join().unwrap(), &waiting.join().unwrap()));
        });
    }

    #[test]
    fn a_failure_or_a_panic_is_told_to_who_made_and_the_next_one_tries() {
        let registry = Registry::new();
        assert_eq!(registry.get_or_make(1, || Err::<u32, _>("full")).unwrap_err(), "full");
        let work = std::panic::AssertUnwindSafe(|| registry.get_or_make(1, || -> Result<u32, &str> { panic!("in the work") }));
        assert!(std::panic::catch_unwind(work).is_err());
        assert_eq!(*made(&registry, 1, 12), 12);
    }
}
