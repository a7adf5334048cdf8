//! What all requests share: the models, the limits, and where the server is in its life.

use super::failure::{Failure, Kind};
use super::metrics::Metrics;
use super::model::Model;
use super::otlp::Tracer;
use super::settings::Settings;
use sha2::{Digest, Sha256};
use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError, RwLock};
use subtle::ConstantTimeEq;
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

/// Makes the model of a slot; more than once where its executor is lost.
pub(super) type Loader = Arc<dyn Fn() -> crate::Result<Model> + Send + Sync>;

/// A model by its names, while it is loaded.
pub(super) struct Slot {
    /// The first is its own, others are aliases.
    pub names: Vec<String>,
    pub load: Loader,
    model: RwLock<Option<Arc<Model>>>,
}

impl Slot {
    pub fn new(names: Vec<String>, load: Loader) -> Self {
        Self { names, load, model: RwLock::default() }
    }

    /// None while it is being loaded.
    pub fn model(&self) -> Option<Arc<Model>> {
        // Set at once: whole after any panic.
        self.model.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Requests that have begun keep the model that they have.
    pub fn set(&self, model: Option<Arc<Model>>) {
        *self.model.write().unwrap_or_else(PoisonError::into_inner) = model;
    }
}

/// See the module.
pub(super) struct State {
    pub settings: Settings,
    /// The first serves requests that name none.
    pub slots: Vec<Slot>,
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
    /// SHA-256 of the keys, so that all comparisons are of one length.
    keys: Vec<[u8; 32]>,
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
            keys: settings.api_keys.iter().map(|key| Sha256::digest(key).into()).collect(),
            phase: watch::Sender::new(Phase::Loading),
            tracer,
            started: since.map_or(0, |since| since.as_secs()),
            settings,
            slots,
            metrics,
        }
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether requests need no key, or `key` is one that is known. Takes as long whichever key it is.
    pub fn admits(&self, key: Option<&[u8]>) -> bool {
        if self.keys.is_empty() {
            return true;
        }
        let Some(key) = key else { return false };
        let digest: [u8; 32] = Sha256::digest(key).into();
        self.keys.iter().fold(false, |known, one| known | bool::from(one.ct_eq(&digest)))
    }

    /// The model that a request names, or the first one.
    ///
    /// # Errors
    /// A name that no model has; a model that is loading or whose executor fails.
    pub fn model(&self, name: Option<&str>) -> Result<Arc<Model>, Failure> {
        let slot = match name {
            None => self.slots.first(),
            Some(name) => self.slots.iter().find(|slot| slot.names.iter().any(|known| known == name)),
        };
        let slot = slot.ok_or_else(|| {
            let known: Vec<&str> = self.slots.iter().flat_map(|slot| &slot.names).map(String::as_str).collect();
            // It goes into a line of the log.
            let name: String = name.unwrap_or_default().chars().take(200).flat_map(char::escape_debug).collect();
            let message = format!("The model `{name}` does not exist; there are: {}", known.join(", "));
            Failure { param: Some("model"), ..Failure::new(Kind::UnknownModel, "model", message) }
        })?;
        let model = slot.model().ok_or_else(|| unhealthy(format!("the model `{}` is being loaded", slot.names[0])))?;
        if !model.health.is_well() {
            return Err(unhealthy(format!("the model `{}` fails: {}", slot.names[0], model.health.reason())));
        }
        Ok(model)
    }

    /// Whether requests are answered.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self) -> Result<(), Failure> {
        match self.phase() {
            Phase::Draining => Err(unhealthy("the server is shutting down")),
            Phase::Loading => Err(unhealthy("models are being loaded")),
            Phase::Serving => self.slots.iter().try_for_each(|slot| self.model(slot.names.first().map(String::as_str)).map(drop)),
        }
    }
}

fn unhealthy(message: impl Into<String>) -> Failure {
    Failure::new(Kind::Unhealthy, "unhealthy", message)
}
