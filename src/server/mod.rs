//! The server: TEI's and OpenAI's routes over HTTP, and TEI's services over gRPC, for models that are loaded once and shared by all requests.
//!
//! A request's way: `listen` (connection) -> `access` (key, limits, log) -> `body` (JSON) -> `native`, `openai` or `tokens` (what is asked)
//! -> `work` (ids, submission, vectors) -> `body` (JSON). What goes wrong is a `failure::Failure`, which the front door writes in the route's dialect.
//! Over gRPC: `listen` -> `grpc::door` -> `grpc` (messages to inputs) -> `work`. `admin` changes the models that all of them find in the `registry`.

mod access;
mod admin;
mod body;
mod encoding;
mod failure;
#[cfg(any(test, feature = "internals"))]
pub mod fuzzed;
mod grpc;
mod health;
mod inputs;
mod keys;
mod listen;
mod metrics;
mod model;
mod native;
mod offers;
mod openai;
mod openapi;
mod otlp;
mod page;
mod recovery;
mod registry;
mod settings;
mod state;
mod status;
#[cfg(all(test, feature = "cpu"))]
mod tests;
mod tls;
mod tokens;
mod work;

pub use admin::{Admin, Opener};
pub use listen::Address;
pub use otlp::Collector;
pub use settings::Settings;
pub use tls::TlsFiles;

use crate::{EmbedderBuilder, Error};
use access::front_door;
use admin::Desk;
use axum::Router;
use axum::http::{HeaderValue, Method, header};
use axum::routing::{get, post};
use failure::{Failure, Kind};
use listen::{Bound, Purpose};
use metrics::Metrics;
use model::Model;
use otlp::{Exporter, Tracer};
use registry::{Loader, Slot};
use state::{Phase, State};
use std::sync::Arc;
use tls::Tls;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tower_http::cors::{AllowOrigin, CorsLayer};

/// A model to serve.
pub struct Served {
    /// Its names in requests: the first is told in answers, others are aliases.
    pub names: Vec<String>,
    /// How it is opened. What it says of normalising, the cut and the queue's length is left to requests and [`Settings`].
    pub builder: EmbedderBuilder,
}

/// Why a server does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}; is another server there?")]
    Bind {
        /// The address.
        address: Address,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A setting, or the names of the models, cannot be.
    #[error("{reason}")]
    Setting {
        /// What is wrong.
        reason: String,
    },
    /// A model cannot be loaded.
    #[error("the model {name} cannot be served: {source}")]
    Load {
        /// Its name.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// The executor of a model failed, and did not come back.
    #[error("the executor of the model {name} is lost: {reason}; what it runs on needs a look, then start the server again")]
    Lost {
        /// The model's name.
        name: String,
        /// What it last failed with.
        reason: String,
    },
    /// The system gives no threads or no events.
    #[error("the server cannot run: {source}")]
    Runtime {
        /// The system's reason.
        source: std::io::Error,
    },
}

/// How a server that was asked to stop has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// All that was under way was answered.
    Drained,
    /// [`Settings::shutdown_timeout`] was over before all requests were answered.
    Cut {
        /// How many were not.
        requests: usize,
    },
}

/// A server that listens; [`Server::run`] serves.
///
/// ```no_run
/// use trt_embed::Embedder;
/// use trt_embed::server::{Address, Served, Server, Settings};
///
/// let address = Address::Tcp("127.0.0.1:3000".parse()?);
/// let model = Served { names: vec!["minilm".into()], builder: Embedder::builder("models/all-MiniLM-L6-v2") };
/// Server::bind(&[address], vec![model], Settings::default())?.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Server {
    bound: Vec<Bound>,
    addresses: Vec<Address>,
    tls: Option<Tls>,
    exporter: Option<Exporter>,
    state: Arc<State>,
}

/// Stops a [`Server`], from any thread.
#[derive(Clone)]
pub struct Handle {
    state: Arc<State>,
}

impl Handle {
    /// Asks the server to stop: from now on it is not ready, refuses new work, and ends when what is under way is done, or
    /// [`Settings::shutdown_timeout`] is over.
    pub fn stop(&self) {
        self.state.phase.send_replace(Phase::Draining);
    }

    /// Whether requests are answered: models are loaded, their executors work, and nobody asked to stop.
    pub fn is_ready(&self) -> bool {
        self.state.ready().is_ok()
    }
}

impl Server {
    /// Listens on `addresses`. Until [`Server::run`] clients wait.
    ///
    /// # Errors
    /// [`ServeError::Bind`]; [`ServeError::Setting`] where there is no model, two have one name, the certificate cannot be used, or anybody could
    /// administer it.
    pub fn bind(addresses: &[Address], models: Vec<Served>, settings: Settings) -> Result<Self, ServeError> {
        let load = |Served { names, builder }: Served| {
            let loader = loader(names.first().map_or("", String::as_str), builder, &settings);
            (names, loader)
        };
        let models = models.into_iter().map(load).collect();
        Self::with_loaders(addresses, models, settings)
    }

    fn with_loaders(addresses: &[Address], models: Vec<(Vec<String>, Loader)>, settings: Settings) -> Result<Self, ServeError> {
        let slots: Vec<Slot> = models.into_iter().map(|(names, loader)| Slot::new(names, loader)).collect();
        check(&slots, &settings)?;
        check_admin(addresses, &settings)?;
        let metrics = Metrics::new().map_err(|error| ServeError::Setting { reason: format!("metrics: {error}") })?;
        let tls = settings.tls.as_ref().map(Tls::new).transpose().map_err(|reason| ServeError::Setting { reason })?;
        let (mut bound, mut known) = (Vec::new(), Vec::new());
        for address in addresses {
            let failed = |source| ServeError::Bind { address: address.clone(), source };
            for listener in Bound::all(address).map_err(failed)? {
                known.push(listener.address().map_err(failed)?);
                bound.push(listener);
            }
        }
        let (tracer, exporter) = settings.traces.clone().map(Tracer::new).unzip();
        let state = Arc::new(State::new(settings, slots, metrics, tracer));
        Ok(Self { bound, addresses: known, tls, exporter, state })
    }

    /// Where it listens, with the ports that were taken.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// What stops it.
    pub fn handle(&self) -> Handle {
        Handle { state: self.state.clone() }
    }

    /// Loads the models, all at once, and serves until it is asked to stop. It answers from the beginning: until all are loaded, that it is not ready.
    ///
    /// # Errors
    /// [`ServeError::Load`] for the first model that cannot be loaded; [`ServeError::Lost`] for one whose executor failed later and did not come back;
    /// [`ServeError::Runtime`].
    pub fn run(self) -> Result<Ended, ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("trt-embed-http").enable_all().build();
        let runtime = runtime.map_err(|source| ServeError::Runtime { source })?;
        let ended = runtime.block_on(self.serve());
        // An executor that hangs holds up a thread for ever.
        runtime.shutdown_background();
        ended
    }

    async fn serve(self) -> Result<Ended, ServeError> {
        let Self { bound, tls, exporter, state, .. } = self;
        if let Some(exporter) = exporter {
            tokio::spawn(exporter.run());
        }
        let (lose, mut losses) = mpsc::unbounded_channel();
        let desk = state.settings.admin.as_ref().map(|admin| Desk::new(&state, admin, lose.clone()));
        let (close, closing) = watch::channel(false);
        let slots = Arc::new(Semaphore::new(state.settings.max_connections));
        let mut doors = JoinSet::new();
        for bound in bound {
            let router = match (bound.purpose, &desk) {
                (Purpose::Http, _) => router(&state)?,
                (Purpose::Grpc, _) => grpc::router(&state)?,
                (Purpose::Admin, Some(desk)) => admin::router(desk),
                // An admin that may do nothing was refused when it was bound.
                (Purpose::Probes, _) | (Purpose::Admin, None) => probes(&state),
            };
            doors.spawn(listen::serve(bound, router, state.clone(), slots.clone(), closing.clone(), tls.clone()));
        }
        let mut phase = state.phase.subscribe();
        let stopped = async { phase.wait_for(|&phase| phase == Phase::Draining).await.map(drop) };
        let mut stopped = std::pin::pin!(stopped);
        let models = tokio::select! {
            loaded = load(&state) => loaded?,
            _ = &mut stopped => return Ok(Ended::Drained),
        };
        for (slot, model) in models {
            recovery::watch(&state, &slot, model, lose.clone());
        }
        state.phase.send_if_modified(|phase| {
            let first = *phase == Phase::Loading;
            if first {
                *phase = Phase::Serving;
            }
            first
        });
        log::info!("ready");
        // Neither can fail while `state` and this have the senders.
        let lost = tokio::select! {
            _ = stopped => None,
            lost = losses.recv() => lost,
        };
        state.phase.send_replace(Phase::Draining);
        log::info!("stopping: no new requests, {:?} for those under way", state.settings.shutdown_timeout);
        let drain = async {
            listen::idle(&state).await;
            close.send_replace(true);
            while doors.join_next().await.is_some() {}
        };
        let drained = tokio::time::timeout(state.settings.shutdown_timeout, drain).await.is_ok();
        if let Some(tracer) = &state.tracer {
            tracer.flush().await;
        }
        if let Some(lost) = lost {
            return Err(lost);
        }
        if drained {
            return Ok(Ended::Drained);
        }
        let requests = usize::try_from(state.metrics.active.get()).unwrap_or(0);
        // Connections alone may be left, which have nothing to be answered.
        Ok(if requests == 0 { Ended::Drained } else { Ended::Cut { requests } })
    }
}

/// Opens and warms all models, each on a thread, and lets requests use them.
async fn load(state: &Arc<State>) -> Result<Vec<(Arc<Slot>, Arc<Model>)>, ServeError> {
    let mut loading = JoinSet::new();
    for slot in state.models.all().iter().cloned() {
        let state = state.clone();
        loading.spawn_blocking(move || {
            let name = slot.name();
            match (slot.load)() {
                Ok(model) => {
                    log::info!("the model {name} is loaded and runs on {}", model.embedder.info().backend);
                    Ok((slot.clone(), Arc::new(state.metrics.observe(slot.name(), model))))
                }
                Err(source) => Err(ServeError::Load { name: name.to_owned(), source: Box::new(source) }),
            }
        });
    }
    let mut models = Vec::new();
    while let Some(loaded) = loading.join_next().await {
        let panicked =
            |error| ServeError::Runtime { source: std::io::Error::other(format!("a model's loading broke off: {error}")) };
        let (slot, model) = loaded.map_err(panicked)??;
        slot.set(Some(model.clone()));
        models.push((slot, model));
    }
    Ok(models)
}

/// How the model that `builder` describes is loaded and served under `name`.
fn loader(name: &str, builder: EmbedderBuilder, settings: &Settings) -> Loader {
    let (name, queue_tokens) = (name.to_owned(), settings.max_queue_tokens);
    let calibration = settings.calibration_texts.clone();
    Arc::new(move || Model::load(&name, builder.clone(), queue_tokens, &calibration))
}

fn check(slots: &[Slot], settings: &Settings) -> Result<(), ServeError> {
    let refused = |reason: String| Err(ServeError::Setting { reason });
    let names: Vec<&String> = slots.iter().flat_map(|slot| &slot.names).collect();
    if slots.is_empty() || slots.iter().any(|slot| slot.names.is_empty()) {
        return refused("a server needs a model, and each model a name".into());
    }
    if let Some(twice) = names.iter().enumerate().find_map(|(place, name)| names[..place].contains(name).then_some(name)) {
        return refused(format!("two models are called {twice}; give one of them another name"));
    }
    if settings.api_keys.iter().any(String::is_empty) {
        return refused("an API key is empty: every request would have it".into());
    }
    let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize);
    for (what, count) in [("requests", settings.max_concurrent_requests), ("connections", settings.max_connections)] {
        if !(1..=most).contains(&count) {
            return refused(format!("{count} {what} at a time; 1 to {most} may be"));
        }
    }
    Ok(())
}

/// # Errors
/// An address for an admin that may do nothing, or one that others than this machine reach and that wants no key.
fn check_admin(addresses: &[Address], settings: &Settings) -> Result<(), ServeError> {
    let refused = |reason: String| Err(ServeError::Setting { reason });
    if settings.admin.as_ref().is_some_and(|admin| admin.keys.iter().any(String::is_empty)) {
        return refused("an admin key is empty: every request would have it".into());
    }
    for address in addresses {
        match (address, &settings.admin) {
            (Address::Admin(_) | Address::AdminUnix(_), None) => {
                return refused(format!("{address}: the settings do not say what an admin may do"));
            }
            (Address::Admin(at), Some(admin)) if admin.keys.is_empty() && !at.ip().is_loopback() => {
                return refused(format!(
                    "{address} can be reached from other machines; give it a key, or take a loopback address or a Unix socket"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What probes and scrapers ask for, alone.
fn probes(state: &Arc<State>) -> Router {
    Router::new()
        .route("/health", get(status::ready))
        .route("/health/ready", get(status::ready))
        .route("/health/live", get(status::live))
        .route("/metrics", get(status::metrics))
        .fallback(async || Failure::new(Kind::UnknownRoute, "route", "there is no such route on this port"))
        .layer(axum::middleware::from_fn_with_state(state.clone(), front_door))
        .with_state(state.clone())
}

/// All routes.
fn router(state: &Arc<State>) -> Result<Router, ServeError> {
    let routes = Router::new()
        .route("/", get(status::front).post(native::embed))
        .route("/embed", post(native::embed))
        .route("/invocations", post(native::embed))
        .route("/embed_all", post(native::embed_all))
        .route("/similarity", post(native::similarity))
        .route("/vertex", post(native::vertex))
        .route("/tokenize", post(tokens::tokenize))
        .route("/decode", post(tokens::decode))
        .route("/embeddings", post(openai::embeddings))
        .route("/v1/embeddings", post(openai::embeddings))
        .route("/v1/models", get(openai::models))
        .route("/info", get(status::info))
        .route("/health", get(status::ready))
        .route("/health/ready", get(status::ready))
        .route("/health/live", get(status::live))
        .route("/ping", get(status::ready))
        .route("/metrics", get(status::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/api-doc/openapi.json", get(openapi::document))
        .route("/docs", get(openapi::page))
        .fallback(async || Failure::new(Kind::UnknownRoute, "route", "there is no such route"))
        .method_not_allowed_fallback(async || Failure::new(Kind::Method, "method", "this route does not answer that method"))
        .layer(axum::middleware::from_fn_with_state(state.clone(), front_door))
        .layer(cors(&state.settings)?)
        .with_state(state.clone());
    Ok(routes)
}

fn cors(settings: &Settings) -> Result<CorsLayer, ServeError> {
    let origins = settings.cors_allow_origin.iter().map(|origin| {
        let refused = || ServeError::Setting { reason: format!("the origin \"{origin}\" cannot stand in a header") };
        HeaderValue::from_str(origin).map_err(|_| refused())
    });
    let origins: Vec<HeaderValue> = origins.collect::<Result<_, _>>()?;
    let allowed = if origins.is_empty() || settings.cors_allow_origin.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins)
    };
    let headers = [header::CONTENT_TYPE, header::AUTHORIZATION];
    Ok(CorsLayer::new().allow_origin(allowed).allow_methods([Method::GET, Method::POST]).allow_headers(headers))
}
