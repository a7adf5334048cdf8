//! Whether a model's executor works: what proves it, and the watchdog that asks when nothing else did.

use super::model::Model;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A success proves the executor for so long. With [`PERIOD`], and a probe that fails at once, a failure is seen within 1.5 s.
const PROOF: Duration = Duration::from_secs(1);
/// How often the watchdog looks.
const PERIOD: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub(super) struct Health {
    well: AtomicBool,
    state: Mutex<State>,
    /// Told when a request has failed.
    suspected: Notify,
}

#[derive(Debug)]
struct State {
    proved: Instant,
    /// What the executor last failed with.
    reason: String,
}

impl Default for Health {
    fn default() -> Self {
        let state = State { proved: Instant::now(), reason: String::new() };
        Self { well: AtomicBool::new(true), state: Mutex::new(state), suspected: Notify::new() }
    }
}

impl Health {
    /// Whether the executor worked when it was last seen.
    pub fn is_well(&self) -> bool {
        self.well.load(Ordering::SeqCst)
    }

    /// What it failed with.
    pub fn reason(&self) -> String {
        self.lock().reason.clone()
    }

    /// A request has succeeded: nothing needs to be asked for a while.
    pub fn proved(&self) {
        self.lock().proved = Instant::now();
    }

    /// A request has failed on the executor: it is asked at once whether it still works.
    pub fn suspect(&self) {
        self.suspected.notify_one();
    }

    fn age(&self) -> Duration {
        self.lock().proved.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, model: &str, outcome: Result<(), String>) {
        let was = self.well.swap(outcome.is_ok(), Ordering::SeqCst);
        match outcome {
            Ok(()) => {
                self.proved();
                if !was {
                    log::warn!("model {model}: its executor works again");
                }
            }
            Err(reason) => {
                if was {
                    log::error!("model {model} is not ready: {reason}");
                }
                self.lock().reason = reason;
            }
        }
    }
}

/// Asks `model`'s executor for one token whenever nothing has proved it for [`PROOF`]. It is asked beside the queue; one that does not answer within
/// `patience`, while no request succeeds either, is taken for dead until it does. Returns when it has been dead for `lost_after`.
pub(super) async fn watch(model: &Arc<Model>, patience: Duration, lost_after: Duration) {
    let health = &model.health;
    let mut dead_since: Option<Instant> = None;
    loop {
        let suspected = tokio::select! {
            () = tokio::time::sleep(PERIOD) => false,
            () = health.suspected.notified() => true,
        };
        if !suspected && health.is_well() && health.age() < PROOF {
            continue;
        }
        let asked = model.clone();
        let mut probe = tokio::task::spawn_blocking(move || asked.embedder.probe());
        let outcome = loop {
            let wait = dead_since.map_or(patience, |since| lost_after.saturating_sub(since.elapsed()));
            match tokio::time::timeout(wait, &mut probe).await {
                Ok(Ok(answer)) => break answer.map_err(|error| error.to_string()),
                Ok(Err(panic)) => break Err(format!("the executor panicked: {panic}")),
                // Behind batches that run; they prove it too. The same probe is waited for: others would only pile up.
                Err(_) if health.age() < patience => {}
                Err(_) => {
                    health.set(&model.name, Err(format!("the executor has not answered for {patience:?}")));
                    if dead_since.get_or_insert_with(Instant::now).elapsed() >= lost_after {
                        return;
                    }
                }
            }
        };
        dead_since = outcome.is_err().then(|| dead_since.unwrap_or_else(Instant::now));
        health.set(&model.name, outcome);
        if dead_since.is_some_and(|since| since.elapsed() >= lost_after) {
            return;
        }
    }
}
