//! A model whose executor is lost: it is loaded anew, and the server ends where that does not help.

use super::model::Model;
use super::registry::Slot;
use super::state::State;
use super::{ServeError, health};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// From one try to the next.
const PAUSE: Duration = Duration::from_secs(1);

/// Watches over `model`, that of `slot`, until the slot is retired. Where its executor has failed for `recovery_delay` it is let go and loaded anew,
/// again and again for `recovery_timeout`; then `lost` is told.
pub(super) fn watch(state: &Arc<State>, slot: &Arc<Slot>, model: Arc<Model>, lost: UnboundedSender<ServeError>) {
    slot.watched_by(tokio::spawn(keep(state.clone(), slot.clone(), model, lost)));
}

async fn keep(state: Arc<State>, slot: Arc<Slot>, mut model: Arc<Model>, lost: UnboundedSender<ServeError>) {
    let (settings, name) = (&state.settings, slot.name());
    loop {
        health::watch(&model, settings.health_timeout, settings.recovery_delay).await;
        let reason = model.health.reason();
        log::warn!("the model {name} is loaded anew: {reason}");
        // Before the other is made: memory and the context of a device go with the last who has the model. That waits for what runs, which a
        // device that hangs never ends.
        slot.set(None);
        let _ = tokio::time::timeout(settings.recovery_delay, tokio::task::spawn_blocking(move || drop(model))).await;
        let until = Instant::now() + settings.recovery_timeout;
        model = match revive(&slot, until).await {
            Ok(model) => Arc::new(state.metrics.observe(name, model)),
            Err(last) => {
                // The server has ended where nobody listens.
                let _ = lost.send(ServeError::Lost { name: name.to_owned(), reason: last.unwrap_or(reason) });
                return;
            }
        };
        slot.set(Some(model.clone()));
        log::warn!("the model {name} is back");
    }
}

/// # Errors
/// Why the last try failed, where one ended; at `until`.
async fn revive(slot: &Slot, until: Instant) -> Result<Model, Option<String>> {
    let mut last = None;
    loop {
        let load = slot.load.clone();
        let loading = tokio::task::spawn_blocking(move || load());
        let failed = match tokio::time::timeout_at(until.into(), loading).await {
            Ok(Ok(Ok(model))) => return Ok(model),
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(panic)) => format!("loading broke off: {panic}"),
            // It hangs with its device.
            Err(_) => return Err(last.or(Some("loading it anew does not end".into()))),
        };
        log::warn!("the model {} does not come back yet: {failed}", slot.name());
        last = Some(failed);
        if Instant::now() + PAUSE >= until {
            return Err(last);
        }
        tokio::time::sleep(PAUSE).await;
    }
}
