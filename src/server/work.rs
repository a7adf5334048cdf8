//! A request's inputs to vectors: checked, tokenised, submitted and awaited.

use super::failure::{Failure, Kind};
use super::inputs::{Inputs, Item};
use super::model::{Model, Reading, Rows, Shape};
use super::state::State;
use crate::{Class, Submission, SubmitSettings};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Inputs whose bytes are fewer than these are tokenised at once, which takes some milliseconds at most; others beside the runtime's threads.
const SHORT: usize = 16 * 1024;

/// Requests of more inputs than these are taken for bulk, where they do not say: nobody asks so many questions at once.
const QUESTIONS: usize = 8;

/// What the front door knows of a request.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub arrived: Instant,
    /// What has not begun to run by then is given up.
    pub deadline: Instant,
    /// The class that the client asked for.
    pub class: Option<Class>,
    /// Whether its task works on other messages of a stream too, so that nothing may hold it up.
    pub streamed: bool,
}

/// What a request took, or some that were sent as a stream, for its headers, the metrics and the log.
#[derive(Debug, Clone, Default)]
pub(super) struct Usage {
    pub model: String,
    /// Whether it ran on a GPU.
    pub on_gpu: bool,
    pub inputs: usize,
    /// Whether the inputs came as a list.
    pub listed: bool,
    pub characters: usize,
    pub tokens: usize,
    pub tokenization: Duration,
    /// Mean of the inputs.
    pub queue: Duration,
    /// Mean of the inputs.
    pub inference: Duration,
}

/// Refuses lists without inputs, with too many, and inputs without anything in them.
///
/// # Errors
/// See above.
pub(super) fn check_counts(state: &State, inputs: &Inputs, param: &'static str) -> Result<(), Failure> {
    let nothing = |item: &Item| match item {
        Item::Text(text) => text.is_empty(),
        Item::Ids(ids) => ids.is_empty(),
    };
    if inputs.items.is_empty() || inputs.items.iter().any(nothing) {
        return Err(Failure::empty(param));
    }
    check_count(state, inputs.items.len(), param)
}

/// # Errors
/// More inputs than a request may have.
pub(super) fn check_count(state: &State, count: usize, param: &'static str) -> Result<(), Failure> {
    let most = state.settings.max_client_batch_size;
    if count > most {
        let message = format!("batch size {count} > maximum allowed batch size {most}; send several requests");
        return Err(Failure { reason: "batch_size", ..Failure::validation(param, message) });
    }
    Ok(())
}

/// The ids of `inputs`, and the time that they took.
///
/// # Errors
/// As [`Model::rows`], and [`check_counts`].
pub(super) async fn rows(state: &State, model: &Arc<Model>, inputs: Inputs, reading: Reading) -> Result<(Rows, Usage), Failure> {
    state.metrics.request_count.with_label_values(&[method(inputs.listed)]).inc();
    state.metrics.embed_count.inc_by(inputs.items.len() as u64);
    check_counts(state, &inputs, reading.param)?;
    let began = Instant::now();
    let mut usage = Usage {
        model: model.name.clone(),
        on_gpu: model.embedder.info().backend != "cpu",
        inputs: inputs.items.len(),
        listed: inputs.listed,
        characters: inputs.characters(),
        ..Usage::default()
    };
    let bytes: usize = inputs.items.iter().map(|item| if let Item::Text(text) = item { text.len() } else { 0 }).sum();
    let rows = if bytes <= SHORT {
        model.rows(&inputs, &reading)?
    } else {
        let model = model.clone();
        aside(&state.helpers, move || model.rows(&inputs, &reading)).await??
    };
    (usage.tokens, usage.tokenization) = (rows.tokens(), began.elapsed());
    rows.rows.iter().for_each(|row| state.metrics.input_length.observe(row.ids.len() as f64));
    Ok((rows, usage))
}

/// The vectors of `inputs` in `shape`, in their order. Where the client goes away this is dropped, and what has not begun to run never does.
///
/// # Errors
/// The first failure of an input: one is enough, as no client could tell which rows are missing.
pub(super) async fn embed(
    state: &State,
    model: &Arc<Model>,
    call: &Call,
    inputs: Inputs,
    reading: Reading,
    shape: Shape,
) -> Result<(Vec<Vec<f32>>, Usage), Failure> {
    let (rows, mut usage) = rows(state, model, inputs, reading).await?;
    let class = call.class.unwrap_or(if usage.inputs > QUESTIONS { Class::Bulk } else { Class::Interactive });
    let settings = SubmitSettings::default().with_deadline(call.deadline).with_class(class);
    let results = submit(model, rows, settings, !call.streamed).map_err(|error| failed(model, error))?.await;
    let label = if class == Class::Bulk { "bulk" } else { "interactive" };
    let waits = state.metrics.queue_wait.with_label_values(&[model.name.as_str(), label]);
    let mut vectors = Vec::with_capacity(results.len());
    for result in results {
        let embedding = result.map_err(|error| failed(model, error))?;
        waits.observe(embedding.queued.as_secs_f64());
        state.metrics.embedded(usage.tokenization / usage.inputs as u32, embedding.queued, embedding.ran);
        usage.queue += embedding.queued / usage.inputs as u32;
        usage.inference += embedding.ran / usage.inputs as u32;
        vectors.push(model.finish(&embedding.values, shape)?);
    }
    succeeded(state, model, &usage);
    Ok((vectors, usage))
}

/// Hands rows to the executor. A single interactive one that need not wait runs here and now, if it may: two changes of threads less, which are most of what a
/// server adds to a short text.
fn submit(model: &Model, rows: Rows, settings: SubmitSettings, may_run_here: bool) -> crate::Result<Submission> {
    let Rows { mut rows, skip } = rows;
    // What comes too late is told so by the queue, and never runs.
    let in_time = settings.deadline.is_none_or(|deadline| deadline > Instant::now());
    if rows.len() == 1
        && may_run_here
        && in_time
        && settings.class == Class::Interactive
        && model.embedder.is_free()
        && let Some(row) = rows.pop()
    {
        // Other tasks of this thread go on elsewhere.
        match tokio::task::block_in_place(|| model.embedder.run_row_at_once(row, skip)) {
            Ok(submission) => return Ok(submission),
            // Another one was faster.
            Err(row) => rows.push(row),
        }
    }
    model.embedder.submit_rows(rows.into_iter().map(Ok).collect(), skip, settings)
}

/// Counts what was given, and takes it for a proof that the executor works.
pub(super) fn succeeded(state: &State, model: &Model, usage: &Usage) {
    model.health.proved();
    state.metrics.request_success.with_label_values(&[method(usage.listed)]).inc();
}

/// TEI's label for requests of one input and of a list.
fn method(listed: bool) -> &'static str {
    if listed { "batch" } else { "single" }
}

/// Runs `work`, which takes more than some milliseconds, beside the runtime's own threads; as many at a time as `places` has permits.
///
/// # Errors
/// A panic of `work`.
pub(super) async fn aside<T: Send + 'static>(
    places: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let broken = |what: String| Failure::new(Kind::Backend, "backend", what);
    let permit = places.clone().acquire_owned().await.map_err(|error| broken(error.to_string()))?;
    let done = tokio::task::spawn_blocking(move || {
        // Kept until the work is done, also where nobody waits for it any more.
        let _permit = permit;
        work()
    });
    done.await.map_err(|panic| broken(format!("the server failed on this request: {panic}")))
}

/// `error` of the executor: one that may be more than this request's is looked into.
pub(super) fn failed(model: &Model, error: crate::Error) -> Failure {
    let failure = Failure::from(error);
    if failure.kind == Kind::Backend {
        model.health.suspect();
    }
    failure
}
