//! Runs samples through the fp32 graph and measures the tensors that feed linears.

use super::histogram::Histogram;
use super::{Calibration, CalibrationSettings, MIN_SAMPLES, ModelIdentity, Samples};
use crate::graph::{Graph, Precision, Range};
use crate::model::{Architecture, ModelFolder};
use crate::tokens::{BatchPlan, TokenBatch};
use crate::{Error, Progress, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tokens of one batch, padding included: its tensors, the wide ones of the feed-forward part first of all, are held at once.
const BATCH_TOKENS: usize = 512;
/// What progress calls the measuring.
const PHASE: &str = "calibrating";
/// Rows of one batch.
const BATCH_ROWS: usize = 64;
/// The smallest smoothing factor and reach that divisions take: channels that are always 0 are left as they are.
const SMALLEST: f32 = 1e-5;

/// Hears of a tensor: the batch that gave it, its name and its values `[batch, longest, channels]`. Called from any thread, from several at
/// the same time. An error ends the observation.
pub type Visit<'v> = dyn Fn(&TokenBatch, &str, &[f32]) -> Result<()> + Sync + 'v;

/// Shows the tensors that feed linears, on whatever executor.
pub trait Observer {
    /// How large its batches are: 64 rows and 512 padded tokens unless it says otherwise, because each core holds a batch's tensors.
    fn plan(&self) -> BatchPlan {
        BatchPlan::new(BATCH_ROWS, BATCH_TOKENS, 1)
    }

    /// Runs each of `batches` and shows `visit` every tensor of [`Graph::observed_tensors`] once. Values at padding are not looked at.
    ///
    /// Which work is done side by side is the executor's choice: on the CPU batches are, on a GPU the looking at one batch's tensors.
    ///
    /// # Errors
    /// The executor's failure; the first error of `visit`, after which no further batch is begun.
    fn observe(&mut self, batches: &[TokenBatch], visit: &Visit<'_>) -> Result<()>;
}

/// Observes on the CPU, on all cores.
#[cfg(feature = "cpu")]
pub struct CpuObserver(crate::cpu::CpuBackend);

#[cfg(feature = "cpu")]
impl CpuObserver {
    /// Prepares the observed graph of `model`.
    ///
    /// # Errors
    /// As [`Graph::observed`]; [`Error::Backend`].
    pub fn new(model: &ModelFolder) -> Result<Self> {
        let graph = Graph::observed(&model.architecture()?)?;
        Ok(Self(crate::cpu::CpuBackend::from_graph(
            graph,
            crate::pooling::Head::of_model(model)?,
            model.config.max_tokens(),
            rayon::current_num_threads(),
        )?))
    }
}

#[cfg(feature = "cpu")]
impl Observer for CpuObserver {
    fn observe(&mut self, batches: &[TokenBatch], visit: &Visit<'_>) -> Result<()> {
        let run = |batch: &TokenBatch| {
            let mut seen = Ok(());
            self.0.observe(batch, &mut |name, values| {
                if seen.is_ok() {
                    seen = visit(batch, name, values);
                }
            })?;
            seen
        };
        batches.par_iter().try_for_each(run)
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
    progress: &dyn Progress,
) -> Result<Calibration> {
    check_calibration(samples, settings)?;
    calibrate_with(&mut CpuObserver::new(model)?, model, samples, settings, progress)
}

/// Measures `model`'s ranges over the real tokens of `samples`: in one pass, or with smoothing in two.
///
/// `progress` hears of one phase, whose steps are the texts of all passes, and may stop it between batches.
///
/// # Errors
/// As [`check_calibration`]; [`Error::Calibration`] for a tensor whose values are all 0 or not finite; [`Error::Cancelled`]; the observer's
/// failure.
pub fn calibrate_with(
    observer: &mut dyn Observer,
    model: &ModelFolder,
    samples: &Samples,
    settings: &CalibrationSettings,
    progress: &dyn Progress,
) -> Result<Calibration> {
    check_calibration(samples, settings)?;
    let passes = if settings.smoothing.is_some() { 2 } else { 1 };
    progress.phase_started(PHASE, None, u32::try_from(passes * samples.len()).unwrap_or(u32::MAX));
    let measured = measure(observer, model, samples, settings, progress);
    progress.phase_finished(PHASE);
    measured
}

fn measure(
    observer: &mut dyn Observer,
    model: &ModelFolder,
    samples: &Samples,
    settings: &CalibrationSettings,
    progress: &dyn Progress,
) -> Result<Calibration> {
    let architecture = model.architecture()?;
    let graph = Graph::new(&architecture, Precision::Fp32)?;
    let tensors = graph.observed_tensors();
    let batches = samples.batches(model, &observer.plan())?;
    // A text is done when all its tensors are.
    let seen = AtomicUsize::new(0);
    let tell = |batch: &TokenBatch| {
        let seen = seen.fetch_add(batch.batch(), Ordering::Relaxed) + batch.batch();
        if let Some(last) = (seen / tensors.len().max(1)).checked_sub(1) {
            progress.step_done(PHASE, u32::try_from(last).unwrap_or(u32::MAX));
        }
        if progress.cancelled() { Err(Error::Cancelled { what: "the calibration" }) } else { Ok(()) }
    };

    let smoothing = match settings.smoothing {
        None => HashMap::new(),
        Some(alpha) => {
            let reach = over_tensors(observer, &batches, &tensors, &channel_reach, &wider, &tell)?;
            smoothing_factors(&architecture, &graph, &reach, alpha)
        }
    };
    let count = |tensor: &Seen<'_>| {
        let mut histogram = Histogram::new();
        let mut smoothed = Vec::new();
        for row in tensor.real_rows() {
            match smoothing.get(tensor.name) {
                None => histogram.add(row),
                Some(factors) => {
                    smoothed.clear();
                    smoothed.extend(row.iter().zip(factors.iter().cycle()).map(|(value, factor)| value / factor));
                    histogram.add(&smoothed);
                }
            }
        }
        histogram
    };
    let histograms = over_tensors(observer, &batches, &tensors, &count, &Histogram::merge, &tell)?;
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

/// Checks what a calibration asks of its samples and settings: for callers whose observer takes long to make.
///
/// # Errors
/// [`Error::Calibration`] for fewer than [`MIN_SAMPLES`] samples; [`Error::Setting`] for settings out of bounds.
pub fn check_calibration(samples: &Samples, settings: &CalibrationSettings) -> Result<()> {
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

/// A tensor of one batch.
struct Seen<'a> {
    name: &'a str,
    channels: usize,
    batch: &'a TokenBatch,
    values: &'a [f32],
}

impl Seen<'_> {
    /// The values of each row's real tokens, `[tokens, channels]`.
    fn real_rows(&self) -> impl Iterator<Item = &[f32]> {
        let rows = self.values.chunks_exact((self.batch.longest() * self.channels).max(1)).zip(self.batch.lengths());
        rows.map(|(row, length)| &row[..length as usize * self.channels])
    }
}

/// Runs all batches and gives, for each of `tensors` (name and channels), what `measure` made of it in every batch, joined.
fn over_tensors<T: Send>(
    observer: &mut dyn Observer,
    batches: &[TokenBatch],
    tensors: &[(&str, usize)],
    measure: &(dyn Fn(&Seen<'_>) -> T + Sync),
    join: &(dyn Fn(T, T) -> T + Sync),
    tell: &(dyn Fn(&TokenBatch) -> Result<()> + Sync),
) -> Result<BTreeMap<String, T>> {
    let all: HashMap<&str, (usize, Mutex<Option<T>>)> =
        tensors.iter().map(|&(name, channels)| (name, (channels, Mutex::new(None)))).collect();
    observer.observe(batches, &|batch, name, values| {
        let Some((channels, joined)) = all.get(name) else { return Ok(()) };
        // Before the lock: what follows is short.
        let more = measure(&Seen { name, channels: *channels, batch, values });
        let mut joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
        *joined = Some(match joined.take() {
            Some(before) => join(before, more),
            None => more,
        });
        drop(joined);
        tell(batch)
    })?;
    let whole = |(name, (_, joined)): (&str, (usize, Mutex<Option<T>>))| {
        Some((name.to_owned(), joined.into_inner().unwrap_or_else(PoisonError::into_inner)?))
    };
    Ok(all.into_iter().filter_map(whole).collect())
}

/// The largest magnitude of each channel.
fn channel_reach(tensor: &Seen<'_>) -> Vec<f32> {
    let mut reach = vec![0.0; tensor.channels];
    for row in tensor.real_rows() {
        row.chunks_exact(tensor.channels).for_each(|token| widen(&mut reach, token));
    }
    reach
}

fn wider(mut reach: Vec<f32>, other: Vec<f32>) -> Vec<f32> {
    widen(&mut reach, &other);
    reach
}

fn widen(reach: &mut [f32], values: &[f32]) {
    reach.iter_mut().zip(values).for_each(|(reach, value)| *reach = reach.max(value.abs()));
}

/// `max|X_j|^alpha / max|W_j|^(1-alpha)` for each channel j, W being all weights that the tensor feeds.
fn smoothing_factors(
    architecture: &Architecture,
    graph: &Graph,
    reach: &BTreeMap<String, Vec<f32>>,
    alpha: f32,
) -> HashMap<String, Vec<f32>> {
    let mut columns: HashMap<&str, Vec<f32>> = HashMap::new();
    // Both list them in the order in which they run.
    for (linear, stored) in graph.linears().iter().zip(architecture.linears()) {
        let reach = columns.entry(&linear.input).or_insert_with(|| vec![0.0; linear.inputs]);
        stored.weight.to_f32().chunks_exact(linear.inputs.max(1)).for_each(|row| widen(reach, row));
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
    factors.collect()
}
