//! OpenAI's routes: /v1/embeddings and /v1/models.

use super::body::{self, Json};
use super::encoding::{Encoded, Encoding};
use super::failure::Failure;
use super::inputs::Inputs;
use super::model::Reading;
use super::state::State;
use super::work::{self, Call};
use axum::Extension;
use axum::extract::State as Shared;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Of /v1/embeddings. `user` is passed over, as all keys that are not known.
#[derive(Debug, Deserialize)]
pub(super) struct Request {
    input: Inputs,
    model: Option<String>,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
    /// Not OpenAI's: a prompt of the model folder.
    prompt_name: Option<String>,
}

#[derive(Serialize)]
struct List<T> {
    object: &'static str,
    data: Vec<T>,
    model: String,
    usage: Tokens,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    embedding: Encoded,
    index: usize,
}

#[derive(Serialize)]
struct Tokens {
    prompt_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct Models {
    object: &'static str,
    data: Vec<ModelEntry>,
}

#[derive(Serialize)]
struct ModelEntry {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

/// POST /v1/embeddings. Vectors have unit length.
pub(super) async fn embeddings(
    Shared(state): Shared<Arc<State>>,
    Extension(call): Extension<Call>,
    Json(request): Json<Request>,
) -> Result<Response, Failure> {
    let Request { input, model, encoding_format, dimensions, prompt_name } = request;
    let encoding = encoding_format.map_or(Ok(Encoding::Float), |name| Encoding::by_name(&name))?;
    let model = state.model(model.as_deref())?;
    let shape = model.shape(dimensions, true)?;
    let ranges = if encoding.needs_ranges() { model.ranges(shape.dim)? } else { Arc::default() };
    let reading = Reading { param: "input", truncate: state.settings.auto_truncate, side: None, prompt_name };
    let (vectors, usage) = work::embed(&state, &model, &call, input, reading, shape).await?;
    let numbers = vectors.len() * shape.dim;
    let entry = |(index, vector)| Embedding { object: "embedding", embedding: encoding.encode(vector, &ranges), index };
    let list = List {
        object: "list",
        data: vectors.into_iter().enumerate().map(entry).collect(),
        model: model.name.clone(),
        usage: Tokens { prompt_tokens: usage.tokens, total_tokens: usage.tokens },
    };
    body::answer(&state, list, numbers, Some(usage)).await
}

/// GET /v1/models: every name that a request may give.
pub(super) async fn models(Shared(state): Shared<Arc<State>>) -> Result<Response, Failure> {
    let entry = |name: &String| ModelEntry { id: name.clone(), object: "model", created: state.started, owned_by: "trt-embed" };
    let data = state.models.all().iter().flat_map(|slot| &slot.names).map(entry).collect();
    body::answer(&state, Models { object: "list", data }, 0, None).await
}
