//! Permits: so many calls run at a time, first come, first served.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Condition variables that waiting callers are spread over, so that each return wakes few of them.
const TURNS: usize = 16;

/// See the module. Taking a permit and giving it back allocates nothing, and locks only for the moment of doing so.
pub(crate) struct Permits {
    state: Mutex<State>,
    turns: [Condvar; TURNS],
}

struct State {
    free: usize,
    /// The next caller's number.
    next: u64,
    /// The number of the caller whose turn it is.
    serving: u64,
}

/// Leave to run, given back when dropped.
pub(crate) struct Permit<'a>(&'a Permits);

impl Permits {
    /// So many permits; at least one.
    pub fn new(count: usize) -> Self {
        Self { state: Mutex::new(State { free: count.max(1), next: 0, serving: 0 }), turns: Default::default() }
    }

    /// Waits for a permit, behind all who asked before.
    pub fn take(&self) -> Permit<'_> {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        while state.serving != number || state.free == 0 {
            state = self.turn(number).wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.serving += 1;
        state.free -= 1;
        self.tell(&state);
        Permit(self)
    }

    /// Callers that have asked and still wait.
    #[cfg(test)]
    pub fn waiting(&self) -> u64 {
        let state = self.lock();
        state.next - state.serving
    }

    /// Wakes who is next, where a permit is free; where nobody waits that would be a system call for nothing.
    fn tell(&self, state: &State) {
        if state.free > 0 && state.next > state.serving {
            self.turn(state.serving).notify_all();
        }
    }

    fn turn(&self, number: u64) -> &Condvar {
        &self.turns[(number % TURNS as u64) as usize]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.free += 1;
        self.0.tell(&state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    #[test]
    fn no_more_run_at_a_time_than_there_are_permits() {
        for count in [1, 3] {
            let (permits, running, done) = (Permits::new(count), AtomicUsize::new(0), AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        for _ in 0..500 {
                            let _permit = permits.take();
                            assert!(running.fetch_add(1, Ordering::SeqCst) < count);
                            std::hint::spin_loop();
                            running.fetch_sub(1, Ordering::SeqCst);
                            done.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                }
            });
            assert_eq!((done.into_inner(), permits.waiting()), (4000, 0));
        }
    }

    #[test]
    fn callers_are_served_in_the_order_they_came() {
        const CALLERS: u64 = 40; // more than there are condition variables
        let permits = Permits::new(1);
        let (order, served) = mpsc::channel();
        std::thread::scope(|scope| {
            let first = permits.take();
            for caller in 0..CALLERS {
                let (order, permits) = (order.clone(), &permits);
                scope.spawn(move || {
                    let _permit = permits.take();
                    order.send(caller).unwrap();
                });
                // The next one starts when this one has its number.
                while permits.waiting() != caller + 1 {
                    std::thread::yield_now();
                }
            }
            drop(first);
        });
        drop(order);
        assert_eq!(served.iter().collect::<Vec<_>>(), (0..CALLERS).collect::<Vec<_>>());
    }
}
