//! The models of a server by their names. They may change while it serves: requests that have begun keep the model that they have.

use super::model::Model;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio::task::JoinHandle;

/// Makes the model of a slot; more than once where its executor is lost.
pub(super) type Loader = Arc<dyn Fn() -> crate::Result<Model> + Send + Sync>;

/// A model by its names, while it is loaded.
pub(super) struct Slot {
    /// The first is its own, others are aliases.
    pub names: Vec<String>,
    pub load: Loader,
    model: RwLock<Option<Arc<Model>>>,
    /// What watches over the model.
    watch: Mutex<Option<JoinHandle<()>>>,
}

impl Slot {
    pub fn new(names: Vec<String>, load: Loader) -> Self {
        Self { names, load, model: RwLock::default(), watch: Mutex::default() }
    }

    /// The name that answers tell.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Whether requests may call it `name`.
    pub fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
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

    /// Keeps the task that watches over the model, for [`Slot::retire`].
    pub fn watched_by(&self, watch: JoinHandle<()>) {
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch);
    }

    /// Ends the watch over a slot that no new request finds, and lets its model go. What has begun on it is ended by who has it.
    pub async fn retire(self: Arc<Self>) {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(watch) = watch {
            watch.abort();
            // It was aborted, or has ended by itself.
            let _ = watch.await;
        }
        // That waits for what runs, so that it is done beside the runtime's own threads; nobody waits for it.
        drop(tokio::task::spawn_blocking(move || drop(self)));
    }
}

/// See the module.
pub(super) struct Registry {
    /// The first serves requests that name none.
    slots: RwLock<Arc<[Arc<Slot>]>>,
}

impl Registry {
    pub fn new(slots: Vec<Slot>) -> Self {
        Self { slots: RwLock::new(slots.into_iter().map(Arc::new).collect()) }
    }

    /// All slots as they are now.
    pub fn all(&self) -> Arc<[Arc<Slot>]> {
        // Replaced at once: whole after any panic.
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The slot that requests call so.
    pub fn find(&self, name: &str) -> Option<Arc<Slot>> {
        self.all().iter().find(|slot| slot.has(name)).cloned()
    }

    /// The slot of requests that name none.
    pub fn first(&self) -> Option<Arc<Slot>> {
        self.all().first().cloned()
    }

    /// Puts `slot` behind all others.
    pub fn add(&self, slot: Arc<Slot>) {
        self.change(|slots| slots.push(slot));
    }

    /// Puts `new` in the place of `old`.
    pub fn replace(&self, old: &Arc<Slot>, new: Arc<Slot>) {
        self.change(|slots| slots.iter_mut().filter(|slot| Arc::ptr_eq(slot, old)).for_each(|slot| *slot = new.clone()));
    }

    pub fn remove(&self, old: &Arc<Slot>) {
        self.change(|slots| slots.retain(|slot| !Arc::ptr_eq(slot, old)));
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Slot>>)) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = slots.to_vec();
        change(&mut changed);
        *slots = changed.into();
    }
}
