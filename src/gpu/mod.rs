//! The GPU backend, whatever executor runs the encoder: a pool of lanes, each of which takes token ids and gives vectors with one
//! captured graph, and the choice of the shape that serves a batch fastest.
//!
//! An executor implements [`GpuEncoder`]; staging, pooling, capture and measuring are the same for all.

mod encoder;
mod kernels;
mod lane;
mod lanes;
mod pool_plan;
mod values;

pub use encoder::{LayerTime, LayerWork, Peaks};
pub use lane::GpuMicros;

// What serves this crate alone; its own tests and benchmarks see it through the feature `internals`.
#[cfg(not(feature = "internals"))]
#[allow(unused_imports)] // some are for tests alone
pub(crate) use {
    encoder::{EncoderIo, FloatType, GpuEncoder, GpuSession, HiddenBuffer, IntegerBuffer, IntegerType, LaneMemory},
    kernels::{Kernels, PoolJob, PoolShape, StageJob, StagedRows, kernel_sources},
    pool_plan::{Hardware, PoolPlan},
    values::{Hidden, Integers, NormedStream},
};
#[cfg(feature = "internals")]
pub use {
    encoder::{EncoderIo, FloatType, GpuEncoder, GpuSession, HiddenBuffer, IntegerBuffer, IntegerType, LaneMemory},
    kernels::{Kernels, PoolJob, PoolShape, StageJob, StagedRows, kernel_sources},
    pool_plan::{Hardware, PoolPlan},
    values::{Hidden, Integers, NormedStream},
};

use crate::compare;
pub use crate::compare::Padding;
use crate::cuda::{CubinCache, CudaError, Device};
use crate::executor::{Backend, Limits};
use crate::pooling::{Head, Scaling, check_output};
use crate::tokens::{BatchSize, Layout, ShapeCost, ShapeCosts, SizeRange, TokenBatch};
use crate::trace::stage;
use crate::{Error, Result, Setting};
use lane::{DevicePooling, Lane, LaneParts};
use lanes::Pool;
use rayon::prelude::*;
use std::sync::Arc;

/// Runs of each shape, the fastest of which counts, where its time is measured at load.
const MEASURED_RUNS: usize = 7;

/// How a [`GpuBackend`] is set up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GpuSettings {
    /// Calls that may be under way at the same time; each takes device memory for a batch of the largest shape.
    pub lanes: usize,
    /// Where compiled kernels are kept.
    pub cubins: CubinCache,
    /// What each of the encoder's shapes costs, measured before, in their order. Where it is not told it is measured, so that two loads may
    /// choose different shapes for the same batch.
    pub costs: Option<ShapeCosts>,
}

impl Default for GpuSettings {
    fn default() -> Self {
        Self { lanes: 2, cubins: CubinCache::of_user(), costs: None }
    }
}

/// Runs batches on a GPU.
///
/// A call writes its ids into pinned memory, launches one graph (staging, encoder, pooling and normalisation, which writes into pinned
/// memory), waits once and reads. Calls of different threads wait for a free lane in the order they came. After a fault of the GPU
/// the lane is made anew; where the device is lost, every later call says so.
pub struct GpuBackend {
    lanes: Pool<Box<Lane>>,
    parts: LaneParts,
    head: Head,
    costs: Arc<ShapeCosts>,
    limits: Limits,
    /// Rows of the token embedding table.
    vocab_size: usize,
    device_bytes: usize,
}

impl GpuBackend {
    /// Makes the lanes: allocates, captures every fixed profile, and measures what each profile costs. Where memory does not suffice, an executor that can
    /// runs smaller batches, with a warning.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for memory that does not suffice for the smallest batches that the executor has; what the executor says; [`Error::Setting`] for a hidden size that the
    /// kernels do not serve, and for [`GpuSettings::costs`] of other shapes; [`Error::TokenId`] for a padding token outside the table.
    pub fn new(encoder: Arc<dyn GpuEncoder>, head: Head, padding: Padding, settings: &GpuSettings) -> Result<Self> {
        let io = encoder.io();
        if io.hidden_size != head.hidden_size || !io.hidden_size.is_multiple_of(8) {
            let reason =
                format!("the engine's is {}, the model's {}; multiples of 8 are served", io.hidden_size, head.hidden_size);
            return Err(Error::Setting { setting: Setting::HiddenSize, reason });
        }
        let device = encoder.device().clone();
        let before = device.memory()?.free;
        // What the kernels cannot do in one pass runs on the host, on the pooled vector.
        let modes = head.pooling.modes.clone();
        let invariant = encoder.is_invariant();
        let pooling = match head.has_more_steps() {
            false => DevicePooling { modes, dim: head.dim, normalise: head.scaling != Scaling::None, invariant },
            true => DevicePooling { modes, dim: head.pooled_width(), normalise: false, invariant },
        };
        let kernels = stage("loading the kernels", || Kernels::load(&device, &settings.cubins))?;
        let Padding { id, vocab_size } = padding;
        let pad = i32::try_from(id).ok().filter(|_| (id as usize) < vocab_size);
        let pad = pad.ok_or(Error::TokenId { id, text: 0, vocab_size })?;
        let parts = LaneParts { encoder, kernels, pooling, pad };
        let make_lanes = |parts: &LaneParts| -> Result<Vec<Box<Lane>>> {
            (0..settings.lanes.max(1)).into_par_iter().map(|_| Ok(Box::new(Lane::new(parts)?))).collect()
        };
        let smaller = |parts: &LaneParts| Some(LaneParts { encoder: parts.encoder.smaller()?, ..parts.clone() });
        let (parts, mut lanes) = stage("making the lanes", || in_memory(parts, make_lanes, smaller))?;
        let ranges = parts.encoder.ranges();
        let costs = match (&settings.costs, lanes.first_mut()) {
            (Some(costs), _) => known_costs(costs, ranges)?,
            (None, Some(lane)) => stage("measuring the shapes", || measure(lane, ranges))?,
            (None, None) => ShapeCosts::default(),
        };
        let capacity = parts.encoder.capacity();
        let limits =
            Limits { max_batch: capacity.rows, max_seq: capacity.longest, batch_tokens: usize::MAX, parallelism: lanes.len() };
        let device_bytes = before.saturating_sub(device.memory()?.free);
        Ok(Self { lanes: Pool::new(lanes), parts, head, costs: Arc::new(costs), limits, vocab_size, device_bytes })
    }

    /// The encoder.
    pub fn encoder(&self) -> &Arc<dyn GpuEncoder> {
        &self.parts.encoder
    }

    /// The peaks of the GPU in the encoder's precision, which [`LayerTime::work`] is held against; none where the executor does not know.
    pub fn peaks(&self) -> Peaks {
        self.parts.encoder.peaks()
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.parts.encoder.device()
    }

    /// The sizes of batches that it serves, a range for each way that its encoder runs.
    pub fn profiles(&self) -> &[SizeRange] {
        self.parts.encoder.ranges()
    }

    /// Device memory that kernels and lanes took, in bytes, as the driver counts it (other programs' allocations at the same time
    /// are counted too).
    pub fn device_bytes(&self) -> usize {
        self.device_bytes
    }

    /// As [`Backend::encode`], at one profile.
    ///
    /// # Errors
    /// [`Error::OutsideProfile`] where the batch does not fit it; [`Error::TokenId`]; [`Error::OutputLength`]; [`Error::Cuda`]; what the
    /// executor says.
    pub fn encode_with(&self, profile: usize, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        let size = self.fit(profile, batch.size())?;
        batch.check_ids(self.vocab_size)?;
        check_output(out, batch.batch(), self.head.dim)?;
        if batch.batch() == 0 {
            return Ok(());
        }
        if !self.head.has_more_steps() {
            return self.with_lane(|lane| lane.encode(profile, size, batch, out));
        }
        self.head.apply_to(batch.batch(), out, |pooled| self.with_lane(|lane| lane.encode(profile, size, batch, pooled)))
    }

    /// The GPU's own time for a batch of `batch` rows of `seq` tokens, at the profile that would serve it: medians of `runs` runs, and
    /// the shape that is run.
    ///
    /// # Errors
    /// [`Error::OutsideProfile`]; [`Error::Cuda`]; what the executor says.
    pub fn gpu_micros(&self, batch: usize, seq: usize, runs: usize) -> Result<(BatchSize, GpuMicros)> {
        let (profile, size) = self.place(BatchSize::padded(batch, seq))?;
        Ok((size, self.with_lane(|lane| lane.measure(profile, size, runs))?))
    }

    /// The time of each layer of the encoder for such a batch, in order, the least of `runs` runs, and the shape that is run. Layers
    /// are timed one by one, so that together they take longer than the encoder. Takes a lane's memory besides.
    ///
    /// # Errors
    /// As [`GpuBackend::gpu_micros`].
    pub fn layer_times(&self, batch: usize, seq: usize, runs: usize) -> Result<(BatchSize, Vec<LayerTime>)> {
        let (profile, size) = self.place(BatchSize::padded(batch, seq))?;
        Ok((size, Lane::new(&self.parts)?.measure_layers(profile, size, runs)?))
    }

    /// Names of the encoder's kernels at a profile of one shape, in the order they run; `None` for a profile of several shapes.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for drivers before CUDA 12.3, which do not tell names; what the executor says.
    pub fn kernels(&self, profile: usize) -> Result<Option<Vec<String>>> {
        self.with_lane(|lane| lane.kernels(profile))
    }

    /// The time of each of the encoder's kernels for such a batch, in order, medians of `runs` runs. They run one after the other with
    /// an event between them, so that together they take longer than the encoder. `None` where the batch is served by a profile of several shapes. And the shape that is run.
    ///
    /// # Errors
    /// As [`GpuBackend::gpu_micros`] and [`GpuBackend::kernels`].
    pub fn kernel_times(&self, batch: usize, seq: usize, runs: usize) -> Result<(BatchSize, Option<Vec<LayerTime>>)> {
        let (profile, size) = self.place(BatchSize::padded(batch, seq))?;
        Ok((size, self.with_lane(|lane| lane.measure_kernels(profile, size, runs))?))
    }

    fn with_lane<R>(&self, work: impl FnOnce(&mut Lane) -> Result<R>) -> Result<R> {
        self.lanes.with(|| Ok(Box::new(Lane::new(&self.parts)?)), |lane| work(lane))
    }

    /// The profile that serves such a batch fastest.
    fn choose(&self, size: BatchSize) -> Result<usize> {
        self.costs.cheapest(size).map(|(profile, _)| profile).ok_or_else(|| self.outside(size))
    }

    /// The profile that serves such a batch fastest, and the size that is run there.
    fn place(&self, size: BatchSize) -> Result<(usize, BatchSize)> {
        let profile = self.choose(size)?;
        Ok((profile, self.fit(profile, size)?))
    }

    /// What is run for such a batch in one profile.
    fn fit(&self, profile: usize, size: BatchSize) -> Result<BatchSize> {
        self.profiles().get(profile).and_then(|range| range.fit(size)).ok_or_else(|| self.outside(size))
    }

    fn outside(&self, size: BatchSize) -> Error {
        let profiles = self.profiles().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let packed = self.profiles().iter().any(|range| range.layout == Layout::Packed);
        let size = if packed { size } else { BatchSize::padded(size.rows, size.longest) };
        Error::OutsideProfile { shape: size.to_string(), profiles }
    }
}

impl Backend for GpuBackend {
    fn name(&self) -> &'static str {
        self.parts.encoder.name()
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.encode_with(self.choose(batch.size())?, batch, out)
    }

    fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        let (profile, size) = self.place(batch.size())?;
        batch.check_ids(self.vocab_size)?;
        check_output(out, batch.ids().len(), self.head.hidden_size)?;
        if batch.batch() == 0 {
            return Ok(());
        }
        self.with_lane(|lane| lane.hidden(profile, size, batch, out))
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn costs(&self) -> Option<Arc<ShapeCosts>> {
        Some(self.costs.clone())
    }
}

impl compare::ByProfile for GpuBackend {
    fn profiles(&self) -> Vec<([usize; 2], [usize; 2])> {
        let sides = |size: BatchSize| [size.rows, size.longest];
        self.profiles().iter().map(|range| (sides(range.min), sides(range.max))).collect()
    }

    fn encode_with(&self, profile: usize, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.encode_with(profile, batch, out)
    }
}

/// What `make` makes of `first` or, where memory does not suffice for that, of the next `smaller` one; and of which.
///
/// # Errors
/// Those of `make`, of [`CudaError::OutOfMemory`] that of the smallest one.
fn in_memory<P, T>(first: P, make: impl Fn(&P) -> Result<T>, smaller: impl Fn(&P) -> Option<P>) -> Result<(P, T)> {
    let mut parts = first;
    loop {
        let error = match make(&parts) {
            Ok(made) => return Ok((parts, made)),
            Err(error @ Error::Cuda(CudaError::OutOfMemory { .. })) => error,
            Err(error) => return Err(error),
        };
        let Some(less) = smaller(&parts) else { return Err(error) };
        log::warn!("{error}; trying batches of half as many tokens");
        parts = less;
    }
}

/// `costs`, where they are those of `ranges`.
fn known_costs(costs: &ShapeCosts, ranges: &[SizeRange]) -> Result<ShapeCosts> {
    if costs.shapes().iter().map(|cost| cost.range).eq(ranges.iter().copied()) {
        return Ok(costs.clone());
    }
    let ranges = ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let reason = format!("they are those of other shapes than the engine's, {ranges}");
    Err(Error::Setting { setting: Setting::Costs, reason })
}

/// What each range costs, at its smallest and largest size.
fn measure(lane: &mut Lane, ranges: &[SizeRange]) -> Result<ShapeCosts> {
    let mut costs = Vec::with_capacity(ranges.len());
    for (place, &range) in ranges.iter().enumerate() {
        let max_micros = lane.measure_call(place, range.max, MEASURED_RUNS)?;
        let min_micros = if range.is_fixed() { max_micros } else { lane.measure_call(place, range.min, MEASURED_RUNS)? };
        costs.push(ShapeCost { range, min_micros, max_micros });
    }
    Ok(ShapeCosts::new(costs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    fn full(asked: usize, free: usize) -> Error {
        CudaError::OutOfMemory { what: "GPU memory", asked, free, total: 1 << 20 }.into()
    }

    proptest! {
        /// The largest that fits is taken, and where none does the smallest one's error is told.
        #[test]
        fn the_first_that_fits_into_memory_is_made(first in 1usize..100_000, least in 1usize..2000, free in 0usize..120_000) {
            let tried = RefCell::new(Vec::new());
            let make = |&size: &usize| {
                tried.borrow_mut().push(size);
                if size <= free { Ok(size * 10) } else { Err(full(size, free)) }
            };
            let smaller = |&size: &usize| (size > least).then(|| (size / 2).max(least));
            let made = in_memory(first, make, smaller);
            let tried = tried.into_inner();
            prop_assert!(tried[0] == first && tried.windows(2).all(|pair| pair[1] < pair[0]));
            let last = *tried.last().unwrap();
            match made {
                Ok((size, value)) => prop_assert!(size == last && size <= free && value == size * 10),
                Err(Error::Cuda(CudaError::OutOfMemory { asked, free: told, .. })) => {
                    prop_assert!((asked, told) == (last, free) && last > free && last == first.min(least.max(last)));
                    prop_assert!(smaller(&last).is_none());
                }
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn other_errors_try_nothing_smaller() {
        let lost = || Error::from(CudaError::DeviceLost { during: "launch", reason: "gone".into() });
        let made = in_memory(8, |_| Err::<(), _>(lost()), |_| panic!("a smaller one is asked for"));
        assert!(matches!(made, Err(Error::Cuda(CudaError::DeviceLost { .. }))));
    }
}
