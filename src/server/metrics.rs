//! What is counted and timed, under TEI's names where TEI has the metric.

use super::model::Model;
use crate::tokens::BatchSize;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// See the module.
pub(super) struct Metrics {
    registry: Registry,
    pub request_count: IntCounterVec,
    pub request_success: IntCounterVec,
    pub request_failure: IntCounterVec,
    pub embed_count: IntCounter,
    embed_success: IntCounter,
    embed_duration: Histogram,
    embed_tokenization_duration: Histogram,
    embed_queue_duration: Histogram,
    embed_inference_duration: Histogram,
    pub request_duration: Histogram,
    pub tokenization_duration: Histogram,
    pub queue_duration: Histogram,
    pub inference_duration: Histogram,
    pub input_length: Histogram,
    batch_size: Histogram,
    batch_tokens: Histogram,
    device: HistogramVec,
    queue_size: IntGauge,
    pub queue_wait: HistogramVec,
    pub rejected: IntCounterVec,
    pub active: IntGauge,
    pub connections: IntGauge,
    ready: IntGaugeVec,
    queue_tokens: IntGaugeVec,
    batches: IntCounterVec,
    batch_texts: IntCounterVec,
    tokens: IntCounterVec,
    run_tokens: IntCounterVec,
    expired: IntCounterVec,
    cancelled: IntCounterVec,
    /// What each model's queue had counted when it was last read, by one reader at a time.
    counted: Mutex<HashMap<String, [u64; 6]>>,
}

impl Metrics {
    /// # Errors
    /// None but mistakes in the names below.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntCounterVec> {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok(counters)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntGaugeVec> {
            let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauges.clone()))?;
            Ok(gauges)
        };
        let gauge = |name: &str, help: &str| -> prometheus::Result<IntGauge> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        // 0.1 ms to 97 s, 1 to 32,768 tokens; of batches as TEI has them, 1 to 4,096 inputs and 1 to 1,048,576 tokens.
        let seconds = prometheus::exponential_buckets(0.0001, 1.5, 35)?;
        let lengths = prometheus::exponential_buckets(1.0, 2.0, 16)?;
        let sizes = prometheus::exponential_buckets(1.0, 2.0, 13)?;
        let tokens = prometheus::exponential_buckets(1.0, 2.0, 21)?;
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> prometheus::Result<Histogram> {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let queue_wait = HistogramVec::new(
            HistogramOpts::new("trt_embed_queue_wait_seconds", "Time from submitting an input to the begin of its batch")
                .buckets(seconds.clone()),
            &["model", "class"],
        )?;
        registry.register(Box::new(queue_wait.clone()))?;
        // From 10 us on: a GPU runs a short text in 100.
        let device = HistogramVec::new(
            HistogramOpts::new(
                "trt_embed_device_seconds",
                "Time that the executor took for a batch, by the clock on the wall, on a GPU too (copies and waits included)",
            )
            .buckets(prometheus::exponential_buckets(0.00001, 1.5, 40)?),
            &["model"],
        )?;
        registry.register(Box::new(device.clone()))?;
        Ok(Self {
            request_count: counters("te_request_count", "Requests for vectors", &["method"])?,
            request_success: counters("te_request_success", "Requests for vectors that were answered", &["method"])?,
            request_failure: counters("te_request_failure", "Requests that were not answered, by reason", &["err"])?,
            request_duration: histogram("te_request_duration", "Seconds from a request's headers to its answer", &seconds)?,
            tokenization_duration: histogram("te_request_tokenization_duration", "Seconds for a request's ids", &seconds)?,
            queue_duration: histogram("te_request_queue_duration", "Seconds in the queue, mean of a request's inputs", &seconds)?,
            inference_duration: histogram(
                "te_request_inference_duration",
                "Seconds in the executor, mean of a request's inputs",
                &seconds,
            )?,
            embed_count: counter("te_embed_count", "Inputs that were asked to be embedded")?,
            embed_success: counter("te_embed_success", "Inputs that were embedded")?,
            embed_duration: histogram("te_embed_duration", "Seconds of an input: ids, queue and inference", &seconds)?,
            embed_tokenization_duration: histogram(
                "te_embed_tokenization_duration",
                "Seconds for an input's ids, mean of its request's inputs",
                &seconds,
            )?,
            embed_queue_duration: histogram("te_embed_queue_duration", "Seconds of an input in the queue", &seconds)?,
            embed_inference_duration: histogram(
                "te_embed_inference_duration",
                "Seconds of the batch in which an input ran",
                &seconds,
            )?,
            input_length: histogram("te_request_input_length", "Tokens of an input", &lengths)?,
            batch_size: histogram("te_batch_next_size", "Inputs of a batch", &sizes)?,
            batch_tokens: histogram("te_batch_next_tokens", "Tokens of a batch, without padding", &tokens)?,
            device,
            queue_size: gauge("te_queue_size", "Inputs that wait")?,
            queue_wait,
            rejected: counters("trt_embed_rejected", "Requests turned away by a limit or for health, by reason", &["reason"])?,
            active: gauge("trt_embed_active_requests", "Requests under way")?,
            connections: gauge("trt_embed_connections", "Open connections")?,
            ready: gauges("trt_embed_model_ready", "Whether the model is loaded and its executor works", &["model"])?,
            queue_tokens: gauges("trt_embed_queue_tokens", "Tokens that wait", &["model", "class"])?,
            batches: counters("trt_embed_batches", "Batches that were begun", &["model"])?,
            batch_texts: counters("trt_embed_batch_texts", "Inputs of these batches", &["model"])?,
            tokens: counters("trt_embed_tokens", "Tokens of these inputs", &["model"])?,
            run_tokens: counters("trt_embed_run_tokens", "Tokens that the executor ran for them, padding included", &["model"])?,
            expired: counters("trt_embed_expired", "Inputs never begun because their deadline had passed", &["model"])?,
            cancelled: counters("trt_embed_cancelled", "Inputs never begun because their client had gone", &["model"])?,
            counted: Mutex::default(),
            registry,
        })
    }

    /// Tells of an input that was embedded.
    pub fn embedded(&self, tokenization: Duration, queued: Duration, ran: Duration) {
        self.embed_success.inc();
        self.embed_duration.observe((tokenization + queued + ran).as_secs_f64());
        self.embed_tokenization_duration.observe(tokenization.as_secs_f64());
        self.embed_queue_duration.observe(queued.as_secs_f64());
        self.embed_inference_duration.observe(ran.as_secs_f64());
    }

    /// The same model, whose batches are told of from now on: those that it ran to become warm are not.
    pub fn observe(&self, name: &str, mut model: Model) -> Model {
        let (sizes, tokens) = (self.batch_size.clone(), self.batch_tokens.clone());
        // Looked up once: a batch then adds to atomic numbers, and takes no lock.
        let device = self.device.with_label_values(&[name]);
        let observer = move |size: BatchSize, took: Duration| {
            sizes.observe(size.rows as f64);
            tokens.observe(size.tokens as f64);
            device.observe(took.as_secs_f64());
        };
        model.embedder = model.embedder.observed(Box::new(observer));
        model
    }

    /// The queue of the model that has taken the place of `name` counts from 0.
    pub fn begin_anew(&self, name: &str) {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Nothing is told any more of a model that was removed: names come and go.
    pub fn forget(&self, name: &str) {
        self.begin_anew(name);
        // What was never told has no label.
        for class in ["interactive", "bulk"] {
            let _ = self.queue_wait.remove_label_values(&[name, class]);
            let _ = self.queue_tokens.remove_label_values(&[name, class]);
        }
        let _ = self.ready.remove_label_values(&[name]);
        let _ = self.device.remove_label_values(&[name]);
        for counters in [&self.batches, &self.batch_texts, &self.tokens, &self.run_tokens, &self.expired, &self.cancelled] {
            let _ = counters.remove_label_values(&[name]);
        }
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn text<'a>(&self, models: impl Iterator<Item = (&'a str, Option<Arc<Model>>)>) -> prometheus::Result<Vec<u8>> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut waiting = 0;
        for (name, model) in models {
            let well = model.as_ref().is_some_and(|model| model.health.is_well());
            self.ready.with_label_values(&[name]).set(well.into());
            let Some(model) = model else { continue };
            let queue = model.embedder.queue();
            waiting += queue.interactive.texts + queue.bulk.texts;
            self.queue_tokens.with_label_values(&[name, "interactive"]).set(queue.interactive.tokens as i64);
            self.queue_tokens.with_label_values(&[name, "bulk"]).set(queue.bulk.tokens as i64);
            let now = [queue.batches, queue.texts, queue.tokens, queue.run_tokens, queue.expired, queue.cancelled];
            let before = counted.entry(name.to_owned()).or_default();
            let counters = [&self.batches, &self.batch_texts, &self.tokens, &self.run_tokens, &self.expired, &self.cancelled];
            for ((counters, now), before) in counters.into_iter().zip(now).zip(before) {
                // The queue of a model that was loaded anew counts from 0.
                counters.with_label_values(&[name]).inc_by(now.checked_sub(*before).unwrap_or(now));
                *before = now;
            }
        }
        self.queue_size.set(waiting as i64);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}
