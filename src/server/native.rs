//! TEI's own routes that give vectors: /embed and its aliases, /embed_all, /similarity.

use super::body::{self, Json};
use super::failure::{Failure, Kind};
use super::inputs::Inputs;
use super::model::{Model, Reading, Side};
use super::state::State;
use super::work::{self, Call, Usage};
use crate::{HiddenStates, Similarity};
use axum::Extension;
use axum::extract::State as Shared;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of /embed, /, /invocations.
#[derive(Debug, Deserialize)]
pub(super) struct EmbedRequest {
    inputs: Inputs,
    truncate: Option<bool>,
    truncation_direction: Option<Side>,
    prompt_name: Option<String>,
    #[serde(default = "body::yes")]
    normalize: bool,
    dimensions: Option<usize>,
    /// Not TEI's, which has one model.
    model: Option<String>,
}

/// Of /embed_all.
#[derive(Debug, Deserialize)]
pub(super) struct EmbedAllRequest {
    inputs: Inputs,
    truncate: Option<bool>,
    truncation_direction: Option<Side>,
    prompt_name: Option<String>,
    model: Option<String>,
}

/// Of /similarity.
#[derive(Debug, Deserialize)]
pub(super) struct SimilarityRequest {
    inputs: SimilarityInputs,
    parameters: Option<SimilarityParameters>,
    model: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct SimilarityInputs {
    source_sentence: String,
    sentences: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SimilarityParameters {
    truncate: Option<bool>,
    truncation_direction: Option<Side>,
    prompt_name: Option<String>,
}

/// Of /vertex.
#[derive(Debug, Deserialize)]
pub(super) struct VertexRequest {
    instances: Vec<EmbedRequest>,
}

#[derive(Serialize)]
struct VertexResponse {
    predictions: Vec<Vec<Vec<f32>>>,
}

/// How texts under `inputs` are read.
fn reading(state: &State, truncate: Option<bool>, side: Option<Side>, prompt_name: Option<String>) -> Reading {
    Reading { param: "inputs", truncate: truncate.unwrap_or(state.settings.auto_truncate), side, prompt_name }
}

async fn vectors(state: &State, call: &Call, request: EmbedRequest) -> Result<(Vec<Vec<f32>>, Usage), Failure> {
    let EmbedRequest { inputs, truncate, truncation_direction, prompt_name, normalize, dimensions, model } = request;
    let model = state.model(model.as_deref())?;
    let shape = model.shape(dimensions, normalize)?;
    let reading = reading(state, truncate, truncation_direction, prompt_name);
    work::embed(state, &model, call, inputs, reading, shape).await
}

/// POST /embed: `[[f32]]`, also for a single input.
pub(super) async fn embed(
    Shared(state): Shared<Arc<State>>,
    Extension(call): Extension<Call>,
    Json(request): Json<EmbedRequest>,
) -> Result<Response, Failure> {
    let (vectors, usage) = vectors(&state, &call, request).await?;
    let numbers = vectors.iter().map(Vec::len).sum();
    body::answer(&state, vectors, numbers, Some(usage)).await
}

/// POST /vertex: requests of /embed side by side, their answers under `predictions`.
pub(super) async fn vertex(
    Shared(state): Shared<Arc<State>>,
    Extension(call): Extension<Call>,
    Json(request): Json<VertexRequest>,
) -> Result<Response, Failure> {
    // All inputs together are one request, and have its limit.
    work::check_count(&state, request.instances.iter().map(|instance| instance.inputs.items.len()).sum(), "instances")?;
    let (mut predictions, mut sum) = (Vec::with_capacity(request.instances.len()), Usage::default());
    let instances = request.instances.len().max(1) as u32;
    for instance in request.instances {
        let (vectors, usage) = vectors(&state, &call, instance).await?;
        predictions.push(vectors);
        sum = Usage {
            listed: true,
            inputs: sum.inputs + usage.inputs,
            characters: sum.characters + usage.characters,
            tokens: sum.tokens + usage.tokens,
            tokenization: sum.tokenization + usage.tokenization,
            queue: sum.queue + usage.queue / instances,
            inference: sum.inference + usage.inference / instances,
            ..usage
        };
    }
    if predictions.is_empty() {
        return Err(Failure::empty("instances"));
    }
    let numbers = predictions.iter().flatten().map(Vec::len).sum();
    body::answer(&state, VertexResponse { predictions }, numbers, Some(sum)).await
}

/// POST /similarity: the cosine between the source and each sentence.
pub(super) async fn similarity(
    Shared(state): Shared<Arc<State>>,
    Extension(call): Extension<Call>,
    Json(request): Json<SimilarityRequest>,
) -> Result<Response, Failure> {
    let SimilarityInputs { source_sentence, sentences } = request.inputs;
    if sentences.is_empty() {
        return Err(Failure::empty("inputs.sentences"));
    }
    let SimilarityParameters { truncate, truncation_direction, prompt_name } = request.parameters.unwrap_or_default();
    let model = state.model(request.model.as_deref())?;
    let inputs = Inputs::texts(std::iter::once(source_sentence).chain(sentences).collect());
    let reading = reading(&state, truncate, truncation_direction, prompt_name);
    let shape = model.shape(None, true)?;
    let (vectors, usage) = work::embed(&state, &model, &call, inputs, reading, shape).await?;
    let (source, sentences) = vectors.split_first().ok_or_else(|| Failure::empty("inputs"))?;
    let scores: Vec<f32> = sentences.iter().map(|vector| Similarity::Cosine.score(source, vector)).collect();
    body::answer(&state, scores, sentences.len(), Some(usage)).await
}

/// POST /embed_all: `[[[f32]]]`, the hidden state of every token of every input. They are no vectors of the text: neither pooled nor scaled.
pub(super) async fn embed_all(
    Shared(state): Shared<Arc<State>>,
    Extension(call): Extension<Call>,
    Json(request): Json<EmbedAllRequest>,
) -> Result<Response, Failure> {
    let EmbedAllRequest { inputs, truncate, truncation_direction, prompt_name, model } = request;
    let model = state.model(model.as_deref())?;
    let reading = reading(&state, truncate, truncation_direction, prompt_name);
    let (states, usage) = states(&state, &model, &call, inputs, reading).await?;
    let numbers = states.iter().map(|text| text.values.len()).sum();
    let all: Vec<Vec<Vec<f32>>> =
        states.iter().map(|text| text.values.chunks_exact(text.hidden_size.max(1)).map(<[f32]>::to_vec).collect()).collect();
    body::answer(&state, all, numbers, Some(usage)).await
}

/// The hidden states of every token of every input.
///
/// # Errors
/// Those of [`work::rows`] and of the executor; more numbers than an answer may have.
pub(super) async fn states(
    state: &State,
    model: &Arc<Model>,
    call: &Call,
    inputs: Inputs,
    reading: Reading,
) -> Result<(Vec<HiddenStates>, Usage), Failure> {
    let (rows, mut usage) = work::rows(state, model, inputs, reading).await?;
    let (numbers, most) = (rows.tokens() * model.embedder.info().config.hidden_size, state.settings.max_response_values);
    if numbers > most {
        let message =
            format!("the answer would have {numbers} numbers, at most {most} are given at a time; send fewer or shorter inputs");
        return Err(Failure { reason: "response_limit", ..Failure::validation("inputs", message) });
    }
    let began = Instant::now();
    let runner = model.clone();
    let run = work::aside(&state.direct, move || runner.embedder.hidden_states_of_rows(&rows.rows));
    // It is not submitted, so that the deadline is looked at here.
    let late =
        |_| Failure::new(Kind::Overloaded, "deadline", "the deadline passed before the states were there; try again later");
    let states = tokio::time::timeout_at(call.deadline.into(), run).await.map_err(late)??;
    let states = states.map_err(|error| work::failed(model, error))?;
    work::succeeded(state, model, &usage);
    usage.inference = began.elapsed();
    let tokenization = usage.tokenization / usage.inputs as u32;
    (0..usage.inputs).for_each(|_| state.metrics.embedded(tokenization, Duration::ZERO, usage.inference));
    Ok((states, usage))
}
