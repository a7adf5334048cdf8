//! The admin's door: models are told, loaded, reloaded and removed while the server serves. It has addresses and keys of its own, and is there only
//! where it is asked for.

use super::access::{self, Open};
use super::body::{self, Json};
use super::failure::{Failure, Kind};
use super::keys::Keys;
use super::registry::{Loader, Slot};
use super::state::{Phase, State};
use super::{ServeError, loader, openapi, recovery};
use crate::EmbedderBuilder;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// Models that a server has, those that are being loaded included.
const MOST_MODELS: usize = 64;
/// Models that are loaded at a time: each takes the memory of a model, and cores that requests want.
const MOST_LOADS: usize = 2;
/// Characters of a name.
const LONGEST_NAME: usize = 200;

/// How a model is opened that is loaded later: from a folder or hub id, as the server's first ones were. An error is for whoever asked.
pub type Opener = Arc<dyn Fn(&str) -> Result<EmbedderBuilder, String> + Send + Sync>;

/// What operators may do while the server serves, over [`Address::Admin`](super::Address::Admin) and
/// [`Address::AdminUnix`](super::Address::AdminUnix).
#[derive(Clone)]
#[non_exhaustive]
pub struct Admin {
    /// Keys of which each request must bring one; without any only loopback and Unix sockets are listened on. Those of
    /// [`Settings::api_keys`](super::Settings::api_keys) do not count here, nor these there.
    pub keys: Vec<String>,
    /// Opens what a request names as a source.
    pub open: Opener,
}

impl Admin {
    /// Without keys.
    pub fn new(open: Opener) -> Self {
        Self { keys: Vec::new(), open }
    }
}

/// What all requests of the admin share.
pub(super) struct Desk {
    state: Arc<State>,
    keys: Keys,
    open: Opener,
    lost: UnboundedSender<ServeError>,
    /// What is being done, by the name of its model.
    under_way: Mutex<BTreeMap<String, Action>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Load,
    Reload,
    Remove,
}

/// An action that no other of its model may cross; it has ended when this is dropped.
struct Turn {
    desk: Arc<Desk>,
    name: String,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.desk.under_way().remove(&self.name);
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LoadRequest {
    model: String,
    source: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReloadRequest {
    model: String,
    source: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoveRequest {
    model: String,
}

#[derive(Serialize)]
struct Models {
    models: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    names: Vec<String>,
    /// Whether requests that name no model get it.
    default: bool,
    state: Condition,
    /// Why it fails.
    reason: Option<String>,
    under_way: Option<Action>,
    source: Option<String>,
    backend: Option<&'static str>,
    dimensions: Option<usize>,
    max_input_length: Option<usize>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Condition {
    /// Loaded for the first time.
    Loading,
    Ready,
    /// Its executor fails; requests are answered 503.
    Failing,
    /// Loaded anew because its executor failed; requests are answered 503.
    Recovering,
}

/// The admin's routes.
pub(super) fn router(desk: &Arc<Desk>) -> Router {
    Router::new()
        .route("/admin/models", get(models))
        .route("/admin/load", post(load))
        .route("/admin/reload", post(reload))
        .route("/admin/remove", post(remove))
        .route("/openapi.json", get(openapi::admin_document))
        .route("/docs", get(openapi::page))
        .fallback(async || Failure::new(Kind::UnknownRoute, "route", "there is no such route on the admin's address"))
        .method_not_allowed_fallback(async || Failure::new(Kind::Method, "method", "this route does not answer that method"))
        .layer(axum::middleware::from_fn_with_state(desk.clone(), door))
        .layer(Extension(desk.clone()))
        .with_state(desk.state.clone())
}

/// Lets a request in or turns it away, and tells what came of it. It needs none of the places that requests for vectors take: a server under load can
/// be administered too.
async fn door(Shared(desk): Shared<Arc<Desk>>, request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let id = access::request_id(request.headers(), desk.state.started);
    let mut open = Open::new(&desk.state, arrived, &request, &id).uncounted();
    let mut response = match desk.admit(&request) {
        Err(failure) => failure.into_response(),
        Ok(()) => next.run(request).await,
    };
    let failure = response.extensions_mut().remove::<Failure>();
    if let Some(failure) = &failure {
        response = failure.response(open.uri());
    }
    access::tell_id(response.headers_mut(), &id);
    if desk.state.phase() == Phase::Draining {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    open.end(response.status(), failure.as_ref(), None);
    response
}

impl Desk {
    pub fn new(state: &Arc<State>, admin: &Admin, lost: UnboundedSender<ServeError>) -> Arc<Self> {
        let (keys, open) = (Keys::new(&admin.keys), admin.open.clone());
        Arc::new(Self { state: state.clone(), keys, open, lost, under_way: Mutex::default() })
    }

    fn under_way(&self) -> MutexGuard<'_, BTreeMap<String, Action>> {
        // Whole after any panic: entries come and go at once.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, request: &Request) -> Result<(), Failure> {
        // What describes the routes tells nothing of this server.
        let public = request.method() == Method::GET && matches!(request.uri().path(), "/openapi.json" | "/docs");
        // Without keys anything on this machine may ask, but the pages that somebody's browser shows are not from this machine.
        if self.keys.is_empty() && request.headers().contains_key(header::ORIGIN) {
            let message = "pages of a browser may not administer a server without admin keys: there is an Origin header";
            return Err(Failure::new(Kind::Unauthorized, "origin", message));
        }
        if !public && !self.keys.admit(access::key(request.headers())) {
            let message = "an admin key is needed: `Authorization: Bearer KEY`; keys for embedding do not count here";
            return Err(Failure::new(Kind::Unauthorized, "unauthorized", message));
        }
        Ok(())
    }

    /// # Errors
    /// A server that loads its first models, or that ends.
    fn serving(&self) -> Result<(), Failure> {
        match self.state.phase() {
            Phase::Serving => Ok(()),
            Phase::Loading => Err(Failure::new(Kind::Unhealthy, "loading", "the first models are being loaded; try again later")),
            Phase::Draining => Err(access::draining()),
        }
    }

    /// # Errors
    /// Where the same model, or too many, are being changed.
    fn begin(self: &Arc<Self>, action: Action, name: &str) -> Result<Turn, Failure> {
        self.serving()?;
        let mut under_way = self.under_way();
        if let Some(other) = under_way.get(name) {
            let other = match other {
                Action::Load => "loaded",
                Action::Reload => "reloaded",
                Action::Remove => "removed",
            };
            return Err(conflict("model", format!("the model `{name}` is just being {other}; wait for that")));
        }
        if action != Action::Remove && under_way.values().filter(|&&other| other != Action::Remove).count() >= MOST_LOADS {
            let message = format!("{MOST_LOADS} models are being loaded, as many as may be at a time; try again later");
            return Err(Failure::new(Kind::Overloaded, "loads", message));
        }
        if action == Action::Load {
            // A load that ends just now is seen too: its model is there before its entry goes.
            let models = self.state.models.all();
            let loading = under_way.values().filter(|&&other| other == Action::Load).count();
            if models.iter().any(|slot| slot.has(name)) {
                return Err(conflict("model", format!("there is a model `{name}` already; reload it, or take another name")));
            }
            if models.len() + loading >= MOST_MODELS {
                return Err(conflict("model", format!("there are {MOST_MODELS} models, as many as may be; remove one first")));
            }
        }
        under_way.insert(name.to_owned(), action);
        Ok(Turn { desk: self.clone(), name: name.to_owned() })
    }

    /// The slot that is called `name`, and the turn to change it.
    ///
    /// # Errors
    /// No such model; one that is just being changed.
    fn turn_of(self: &Arc<Self>, action: Action, name: &str) -> Result<(Arc<Slot>, Turn), Failure> {
        let find = || self.state.models.find(name).ok_or_else(|| self.state.unknown(name));
        let own = find()?.name().to_owned();
        let turn = self.begin(action, &own)?;
        // Another turn may have ended in between.
        Ok((find()?, turn))
    }

    /// How `source` is loaded under `name`.
    ///
    /// # Errors
    /// What the opener refuses.
    fn loader(&self, name: &str, source: &str) -> Result<Loader, Failure> {
        if source.is_empty() {
            return Err(Failure::empty("source"));
        }
        let builder = (self.open)(source).map_err(|reason| Failure::validation("source", reason))?;
        Ok(loader(name, builder, &self.state.settings))
    }

    /// All models, and those that are being loaded behind them.
    fn list(&self) -> Models {
        let (slots, under_way) = (self.state.models.all(), self.under_way().clone());
        let of = |slot: &Arc<Slot>| under_way.iter().find(|(name, _)| slot.has(name)).map(|(_, &action)| action);
        let served = slots.iter().enumerate().map(|(place, slot)| self.entry(slot, place == 0, of(slot)));
        let new = under_way.iter().filter(|(name, action)| **action == Action::Load && !slots.iter().any(|slot| slot.has(name)));
        let new = new.map(|(name, &action)| Entry {
            names: vec![name.clone()],
            default: false,
            state: Condition::Loading,
            reason: None,
            under_way: Some(action),
            source: None,
            backend: None,
            dimensions: None,
            max_input_length: None,
        });
        Models { models: served.chain(new).collect() }
    }

    fn entry(&self, slot: &Slot, default: bool, under_way: Option<Action>) -> Entry {
        let model = slot.model();
        let state = match &model {
            Some(model) if model.health.is_well() => Condition::Ready,
            Some(_) => Condition::Failing,
            None if self.state.phase() == Phase::Loading => Condition::Loading,
            None => Condition::Recovering,
        };
        let info = model.as_ref().map(|model| model.embedder.info());
        Entry {
            names: slot.names.clone(),
            default,
            reason: model.as_ref().filter(|_| matches!(state, Condition::Failing)).map(|model| model.health.reason()),
            state,
            under_way,
            source: info.map(|info| info.model.clone()),
            backend: info.map(|info| info.backend),
            dimensions: info.map(|info| info.dim),
            max_input_length: info.map(|info| info.max_tokens),
        }
    }

    /// Loads the model of `slot` and puts it where requests find it: in the place of `old`, or behind all others.
    ///
    /// # Errors
    /// A model that cannot be loaded; nothing has changed then.
    async fn put(&self, slot: Arc<Slot>, old: Option<Arc<Slot>>) -> Result<(), Failure> {
        let (name, load) = (slot.name(), slot.load.clone());
        let failed = |reason: String| {
            log::warn!("the model {name} cannot be loaded: {reason}");
            Failure {
                param: Some("source"),
                ..Failure::new(Kind::Backend, "load", format!("the model `{name}` cannot be loaded: {reason}"))
            }
        };
        let loaded = tokio::task::spawn_blocking(move || load()).await;
        let model =
            loaded.map_err(|panic| failed(format!("loading broke off: {panic}")))?.map_err(|error| failed(error.to_string()))?;
        self.serving()?;
        log::info!("the model {name} is loaded and runs on {}", model.embedder.info().backend);
        let model = Arc::new(self.state.metrics.observe(name, model));
        slot.set(Some(model.clone()));
        recovery::watch(&self.state, &slot, model, self.lost.clone());
        match old {
            None => self.state.models.add(slot),
            Some(old) => {
                self.state.models.replace(&old, slot.clone());
                self.state.metrics.begin_anew(slot.name());
                old.retire().await;
            }
        }
        Ok(())
    }

    /// `put`, also where the client goes away; the server's end is not waited for.
    async fn put_in_turn(self: &Arc<Self>, turn: Turn, slot: Slot, old: Option<Arc<Slot>>) -> Result<Response, Failure> {
        let desk = self.clone();
        let putting = tokio::spawn(async move {
            let put = desk.put(Arc::new(slot), old).await;
            drop(turn);
            put
        });
        let mut phase = self.state.phase.subscribe();
        tokio::select! {
            put = putting => put.map_err(|panic| Failure::new(Kind::Backend, "load", format!("loading broke off: {panic}")))??,
            // Its sender lives as long as the state.
            _ = phase.wait_for(|&phase| phase == Phase::Draining) => return Err(access::draining()),
        }
        self.answer().await
    }

    async fn answer(&self) -> Result<Response, Failure> {
        body::answer(&self.state, self.list(), 0, None).await
    }
}

fn conflict(param: &'static str, message: String) -> Failure {
    Failure { param: Some(param), ..Failure::new(Kind::Conflict, "conflict", message) }
}

/// # Errors
/// What cannot be a model's name.
fn check_name(name: &str) -> Result<(), Failure> {
    if name.is_empty() {
        return Err(Failure::empty("model"));
    }
    if name.chars().count() > LONGEST_NAME || name.chars().any(char::is_control) {
        let message = format!("`model` is a name of at most {LONGEST_NAME} characters, none of which controls a terminal");
        return Err(Failure::validation("model", message));
    }
    Ok(())
}

/// GET /admin/models.
async fn models(Extension(desk): Extension<Arc<Desk>>) -> Result<Response, Failure> {
    desk.answer().await
}

/// POST /admin/load: another model, answered when requests may name it.
async fn load(Extension(desk): Extension<Arc<Desk>>, Json(request): Json<LoadRequest>) -> Result<Response, Failure> {
    let LoadRequest { model: name, source } = request;
    check_name(&name)?;
    let turn = desk.begin(Action::Load, &name)?;
    let slot = Slot::new(vec![name.clone()], desk.loader(&name, &source)?);
    desk.put_in_turn(turn, slot, None).await
}

/// POST /admin/reload: a model again, or another one under its names. The old one serves until the new one is ready.
async fn reload(Extension(desk): Extension<Arc<Desk>>, Json(request): Json<ReloadRequest>) -> Result<Response, Failure> {
    let ReloadRequest { model: name, source } = request;
    let (old, turn) = desk.turn_of(Action::Reload, &name)?;
    let load = match source {
        None => old.load.clone(),
        Some(source) => desk.loader(old.name(), &source)?,
    };
    desk.put_in_turn(turn, Slot::new(old.names.clone(), load), Some(old)).await
}

/// POST /admin/remove: requests that have begun are answered.
async fn remove(Extension(desk): Extension<Arc<Desk>>, Json(request): Json<RemoveRequest>) -> Result<Response, Failure> {
    let RemoveRequest { model: name } = request;
    let (old, turn) = desk.turn_of(Action::Remove, &name)?;
    if desk.state.models.first().is_some_and(|first| Arc::ptr_eq(&first, &old)) {
        let message =
            format!("requests that name no model get `{name}`, which cannot be removed; reload it from another source instead");
        return Err(conflict("model", message));
    }
    desk.state.models.remove(&old);
    log::info!("the model {} is removed", old.name());
    desk.state.metrics.forget(old.name());
    old.retire().await;
    drop(turn);
    desk.answer().await
}
