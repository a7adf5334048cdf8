//! Routes that tell of the server: /info, health, /metrics.

use super::body;
use super::failure::{Failure, Kind};
use super::page;
use super::state::State;
use axum::extract::{Query, State as Shared};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Deserialize)]
pub(super) struct InfoQuery {
    model: Option<String>,
}

/// As TEI's, for one model.
#[derive(Serialize)]
struct Info {
    model_id: String,
    model_sha: Option<String>,
    /// None where the executor does not tell.
    model_dtype: Option<&'static str>,
    served_model_name: String,
    model_type: BTreeMap<&'static str, BTreeMap<&'static str, String>>,
    max_concurrent_requests: usize,
    max_input_length: usize,
    max_batch_tokens: usize,
    max_batch_requests: usize,
    max_client_batch_size: usize,
    auto_truncate: bool,
    tokenization_workers: usize,
    version: &'static str,
    sha: Option<&'static str>,
    docker_label: Option<&'static str>,
    /// Not TEI's.
    backend: &'static str,
    dimensions: usize,
    prompts: Vec<String>,
}

/// GET /info, of the first model, or of `?model=NAME`.
pub(super) async fn info(Shared(state): Shared<Arc<State>>, Query(query): Query<InfoQuery>) -> Result<Response, Failure> {
    let model = state.model(query.model.as_deref())?;
    let info = model.embedder.info();
    let pooling = info.pooling.modes.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(",");
    let answer = Info {
        model_id: info.model.clone(),
        model_sha: None,
        model_dtype: (info.backend == "cpu").then_some("float32"),
        served_model_name: model.name.clone(),
        model_type: BTreeMap::from([("embedding", BTreeMap::from([("pooling", pooling)]))]),
        max_concurrent_requests: state.settings.max_concurrent_requests,
        max_input_length: info.max_tokens,
        max_batch_tokens: info.limits.batch_tokens,
        max_batch_requests: info.limits.max_batch,
        max_client_batch_size: state.settings.max_client_batch_size,
        auto_truncate: state.settings.auto_truncate,
        tokenization_workers: state.tokenizing,
        version: env!("CARGO_PKG_VERSION"),
        sha: None,
        docker_label: None,
        backend: info.backend,
        dimensions: model.shape(None, true)?.dim,
        prompts: model.folder.prompts.by_name.keys().cloned().collect(),
    };
    body::answer(&state, answer, 0, None).await
}

/// GET /: the page for browsers, else as /health.
pub(super) async fn front(shared: Shared<Arc<State>>, headers: HeaderMap) -> Result<Response, Failure> {
    if page::is_wanted(&headers) { Ok(page::page()) } else { ready(shared).await }
}

/// GET /health, /ping, /health/ready: whether requests are answered.
pub(super) async fn ready(Shared(state): Shared<Arc<State>>) -> Result<Response, Failure> {
    state.ready().map(|()| "ok".into_response())
}

/// GET /health/live: whether the process answers at all.
pub(super) async fn live() -> &'static str {
    "ok"
}

/// GET /metrics.
pub(super) async fn metrics(Shared(state): Shared<Arc<State>>) -> Result<Response, Failure> {
    let slots = state.models.all();
    let models = slots.iter().map(|slot| (slot.name(), slot.model()));
    let text = state.metrics.text(models);
    let text = text.map_err(|error| Failure::new(Kind::Backend, "metrics", format!("the metrics cannot be written: {error}")))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
