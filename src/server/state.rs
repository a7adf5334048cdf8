//! What all requests share: the models, the limits, and where the server is in its life.

use super::failure::{Failure, Kind};
use super::keys::Keys;
use super::metrics::Metrics;
use super::model::Model;
use super::otlp::Tracer;
use super::registry::{Registry, Slot};
use super::settings::Settings;
use std::num::NonZeroUsize;
use std::sync::Arc;
use tokio::sync::{Semaphore, watch};

/// Where the server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Models are being loaded.
    Loading,
    Serving,
    /// It was asked to stop: what is under way is ended, nothing new is begun.
    Draining,
}

/// See the module.
pub(super) struct State {
    pub settings: Settings,
    pub models: Registry,
    pub metrics: Metrics,
    pub phase: watch::Sender<Phase>,
    pub tracer: Option<Tracer>,
    /// One for each request under way.
    pub requests: Arc<Semaphore>,
    /// One for each long text or answer that is worked on beside the runtime's own threads.
    pub helpers: Arc<Semaphore>,
    /// One for each request that runs on the executor from such a thread, apart from those: an executor that hangs holds up nothing else.
    pub direct: Arc<Semaphore>,
    /// Permits of `helpers`.
    pub tokenizing: usize,
    keys: Keys,
    /// Seconds since 1970 of the start.
    pub started: u64,
}

impl State {
    pub fn new(settings: Settings, slots: Vec<Slot>, metrics: Metrics, tracer: Option<Tracer>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let tokenizing = settings.tokenization_workers.map_or(cores, NonZeroUsize::get);
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            requests: Arc::new(Semaphore::new(settings.max_concurrent_requests)),
            helpers: Arc::new(Semaphore::new(tokenizing.min(Semaphore::MAX_PERMITS))),
            direct: Arc::new(Semaphore::new(cores)),
            tokenizing,
            keys: Keys::new(&settings.api_keys),
            phase: watch::Sender::new(Phase::Loading),
            tracer,
            started: since.map_or(0, |since| since.as_secs()),
            settings,
            models: Registry::new(slots),
            metrics,
        }
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether requests need no key, or `key` is one that is known.
    pub fn admits(&self, key: Option<&[u8]>) -> bool {
        self.keys.admit(key)
    }

    /// The model that a request names, or the first one.
    ///
    /// # Errors
    /// A name that no model has; a model that is loading or whose executor fails.
    pub fn model(&self, name: Option<&str>) -> Result<Arc<Model>, Failure> {
        let slot = name.map_or_else(|| self.models.first(), |name| self.models.find(name));
        model_of(&*slot.ok_or_else(|| self.unknown(name.unwrap_or_default()))?)
    }

    /// What a request is told that names a model that there is not.
    pub fn unknown(&self, name: &str) -> Failure {
        let slots = self.models.all();
        let known: Vec<&str> = slots.iter().flat_map(|slot| &slot.names).map(String::as_str).collect();
        // It goes into a line of the log.
        let name: String = name.chars().take(200).flat_map(char::escape_debug).collect();
        let message = format!("The model `{name}` does not exist; there are: {}", known.join(", "));
        Failure { param: Some("model"), ..Failure::new(Kind::UnknownModel, "model", message) }
    }

    /// Whether requests are answered.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self) -> Result<(), Failure> {
        match self.phase() {
            Phase::Draining => Err(unhealthy("the server is shutting down")),
            Phase::Loading => Err(unhealthy("models are being loaded")),
            Phase::Serving => self.models.all().iter().try_for_each(|slot| model_of(slot).map(drop)),
        }
    }
}

/// # Errors
/// A model that is loading or whose executor fails.
fn model_of(slot: &Slot) -> Result<Arc<Model>, Failure> {
    let model = slot.model().ok_or_else(|| unhealthy(format!("the model `{}` is being loaded", slot.name())))?;
    if model.health.is_well() {
        Ok(model)
    } else {
        Err(unhealthy(format!("the model `{}` fails: {}", slot.name(), model.health.reason())))
    }
}

fn unhealthy(message: impl Into<String>) -> Failure {
    Failure::new(Kind::Unhealthy, "unhealthy", message)
}
