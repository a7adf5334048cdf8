//! Runs samples through the fp32 graph and measures the tensors that feed linears.

use super::histogram::Histogram;
use super::{Calibration, CalibrationSettings, MIN_SAMPLES, ModelIdentity, Samples};
use crate::graph::{Graph, Precision, Range};
use crate::model::ModelFolder;
use crate::tokens::TokenBatch;
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tokens of one batch, padding included: its tensors, the wide ones of the feed-forward part first of all, are held at once.
const BATCH_TOKENS: usize = 512;
/// The smallest smoothing factor and reach that divisions take: channels that are always 0 are left as they are.
const SMALLEST: f32 = 1e-5;

/// Shows the tensors that feed linears, on whatever executor.
pub trait Observer: Sync {
    /// Runs `batch` and shows `visit` every tensor of [`Graph::observed_tensors`]: its name and its values
    /// `[batch, seq, channels]`. Values at padding are not looked at.
    ///
    /// # Errors
    /// The executor's failure.
    fn observe(&self, batch: &TokenBatch, visit: &mut dyn FnMut(&str, &[f32])) -> Result<()>;
}

/// Observes on the CPU.
#[cfg(feature = "cpu")]
pub struct CpuObserver(crate::backend::CpuBackend);

#[cfg(feature = "cpu")]
impl CpuObserver {
    /// Prepares the observed graph of `model`.
    ///
    /// # Errors
    /// As [`Graph::observed`]; [`Error::Backend`].
    pub fn new(model: &ModelFolder) -> Result<Self> {
        let graph = Graph::observed(&model.config, &model.weights()?)?;
        Ok(Self(crate::backend::CpuBackend::from_graph(
            graph,
            crate::pooling::Head::of_model(model)?,
            model.config.max_tokens(),
            1,
        )?))
    }
}

#[cfg(feature = "cpu")]
impl Observer for CpuObserver {
    fn observe(&self, batch: &TokenBatch, visit: &mut dyn FnMut(&str, &[f32])) -> Result<()> {
        self.0.observe(batch, visit)
    }
}

/// Measures `model`'s ranges on the CPU, on all cores. See [`calibrate_with`].
///
/// # Errors
/// As [`calibrate_with`] and [`CpuObserver::new`].
#[cfg(feature = "cpu")]
pub fn calibrate(
    model: &ModelFolder,
    samples: &Samples,
    settings: &CalibrationSettings,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Calibration> {
    check(samples, settings)?;
    calibrate_with(&CpuObserver::new(model)?, model, samples, settings, progress)
}

/// Measures `model`'s ranges over the real tokens of `samples`: in one pass, or with smoothing in two.
///
/// `progress` is told the texts done and their number in all passes, from any thread.
///
/// # Errors
/// [`Error::Calibration`] for fewer than [`MIN_SAMPLES`] samples, or a tensor whose values are all 0 or not finite;
/// [`Error::Setting`] for settings out of bounds; the observer's failure.
pub fn calibrate_with(
    observer: &dyn Observer,
    model: &ModelFolder,
    samples: &Samples,
    settings: &CalibrationSettings,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Calibration> {
    check(samples, settings)?;
    let weights = model.weights()?;
    let graph = Graph::new(&model.config, &weights, Precision::Fp32)?;
    let channels: HashMap<&str, usize> = graph.observed_tensors().into_iter().collect();
    let batches = samples.batches(model, BATCH_TOKENS)?;
    let passes = if settings.smoothing.is_some() { 2 } else { 1 };
    let (done, total) = (AtomicUsize::new(0), passes * samples.len());
    let tell = |batch: &TokenBatch| progress(done.fetch_add(batch.batch(), Ordering::Relaxed) + batch.batch(), total);

    let smoothing = match settings.smoothing {
        None => HashMap::new(),
        Some(alpha) => {
            let reach = channel_reach(observer, &batches, &channels, &tell)?;
            smoothing_factors(model, &graph, &reach, alpha)?
        }
    };
    let measure = |batch: &TokenBatch| -> Result<_> {
        let mut histograms: BTreeMap<String, Histogram> = BTreeMap::new();
        let mut smoothed = Vec::new();
        observer.observe(batch, &mut |name, values| {
            let Some(&channels) = channels.get(name) else { return };
            let histogram = histograms.entry(name.to_owned()).or_insert_with(Histogram::new);
            for row in real_rows(batch, values, channels) {
                match smoothing.get(name) {
                    None => histogram.add(row),
                    Some(factors) => {
                        smoothed.clear();
                        smoothed.extend(row.iter().zip(factors.iter().cycle()).map(|(value, factor)| value / factor));
                        histogram.add(&smoothed);
                    }
                }
            }
        })?;
        tell(batch);
        Ok(histograms)
    };
    let histograms =
        batches.par_iter().map(measure).try_reduce(BTreeMap::new, |all, more| Ok(merge(all, more, Histogram::merge)))?;
    let measured = histograms.into_par_iter().map(|(name, histogram)| {
        let reaches = |what: String| Error::Calibration {
            reason: format!("tensor \"{name}\" {what}; are the weights damaged, or all texts empty?"),
        };
        if let Some(value) = histogram.not_finite() {
            return Err(reaches(format!("holds {value}")));
        }
        let amax = histogram.range(settings.method);
        if !amax.is_normal() {
            return Err(reaches(format!("reaches to {amax} only")));
        }
        let smoothing = smoothing.get(name.as_str()).cloned();
        Ok((name, Range { amax, smoothing }))
    });
    let ranges: BTreeMap<String, Range> = measured.collect::<Result<_>>()?;
    Ok(Calibration::new(ModelIdentity::of(model)?, settings, samples.len(), samples.tokens(), ranges))
}

fn check(samples: &Samples, settings: &CalibrationSettings) -> Result<()> {
    settings.check()?;
    if samples.len() < MIN_SAMPLES {
        let reason = format!(
            "{} texts are too few; give at least {MIN_SAMPLES}, better some hundred, like those to be embedded",
            samples.len()
        );
        return Err(Error::Calibration { reason });
    }
    Ok(())
}

/// The values of each row's real tokens, `[tokens, channels]`.
fn real_rows<'v>(batch: &'v TokenBatch, values: &'v [f32], channels: usize) -> impl Iterator<Item = &'v [f32]> {
    let rows = values.chunks_exact((batch.seq * channels).max(1)).zip(&batch.lengths);
    rows.map(move |(row, &length)| &row[..length as usize * channels])
}

fn merge<T>(mut all: BTreeMap<String, T>, more: BTreeMap<String, T>, join: impl Fn(T, T) -> T) -> BTreeMap<String, T> {
    for (name, value) in more {
        let joined = match all.remove(&name) {
            Some(before) => join(before, value),
            None => value,
        };
        all.insert(name, joined);
    }
    all
}

/// The largest magnitude of each channel of each tensor.
fn channel_reach(
    observer: &dyn Observer,
    batches: &[TokenBatch],
    channels: &HashMap<&str, usize>,
    tell: &(dyn Fn(&TokenBatch) + Sync),
) -> Result<BTreeMap<String, Vec<f32>>> {
    let widest = |reach: &mut [f32], values: &[f32]| {
        reach.iter_mut().zip(values).for_each(|(reach, value)| *reach = reach.max(value.abs()));
    };
    let measure = |batch: &TokenBatch| {
        let mut all: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        observer.observe(batch, &mut |name, values| {
            let Some(&channels) = channels.get(name) else { return };
            let reach = all.entry(name.to_owned()).or_insert_with(|| vec![0.0; channels]);
            for row in real_rows(batch, values, channels) {
                row.chunks_exact(channels).for_each(|token| widest(reach, token));
            }
        })?;
        tell(batch);
        Ok(all)
    };
    let join = |mut a: Vec<f32>, b: Vec<f32>| {
        widest(&mut a, &b);
        a
    };
    batches.par_iter().map(measure).try_reduce(BTreeMap::new, |all, more| Ok(merge(all, more, join)))
}

/// `max|X_j|^alpha / max|W_j|^(1-alpha)` for each channel j, W being all weights that the tensor feeds.
fn smoothing_factors(
    model: &ModelFolder,
    graph: &Graph,
    reach: &BTreeMap<String, Vec<f32>>,
    alpha: f32,
) -> Result<HashMap<String, Vec<f32>>> {
    let weights = model.weights()?;
    let mut columns: HashMap<&str, Vec<f32>> = HashMap::new();
    for linear in graph.linears() {
        let view = weights.tensor(&format!("{}.weight", linear.name), &[linear.outputs, linear.inputs])?;
        let reach = columns.entry(&linear.input).or_insert_with(|| vec![0.0; linear.inputs]);
        for row in view.to_f32().chunks_exact(linear.inputs.max(1)) {
            reach.iter_mut().zip(row).for_each(|(reach, value)| *reach = reach.max(value.abs()));
        }
    }
    let factors = reach.iter().filter_map(|(name, reach)| {
        let columns = columns.get(name.as_str())?;
        let factor = |(x, w): (&f32, &f32)| {
            if !x.is_finite() || *x < SMALLEST || *w < SMALLEST {
                1.0
            } else {
                (x.powf(alpha) / w.powf(1.0 - alpha)).max(SMALLEST)
            }
        };
        Some((name.clone(), reach.iter().zip(columns).map(factor).collect()))
    });
    Ok(factors.collect())
}
