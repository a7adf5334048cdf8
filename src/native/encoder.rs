//! The engine as an encoder that lanes run: its size classes, and a session that interprets the program.

use super::arch::Arch;
use super::attention::AttentionJob;
use super::elementwise::QueriesKeys;
use super::floor::{self, Statistics};
use super::kernels::{DeviceLinear, DeviceNorm, Matrix, NativeKernels, Rows};
use super::latency::{self, LatencyClass, LatencyJob};
use super::linear::{LinearJob, Measured, Tile};
use super::load::LoadKernels;
use super::packs;
use super::program::{LinearId, NormId, Residual, Step, program, stage_name};
use super::scratch::{Scratch, capacity};
use super::shape::{Precision, Shape, window};
use super::weights::DeviceModel;
use crate::cuda::{CubinCache, Device, DeviceBuffer, HostMemory, PinnedBuffer, Stream};
use crate::gpu::{
    EncoderIo, FloatType, GpuEncoder, GpuSession, HiddenBuffer, IntegerBuffer, IntegerType, LaneMemory, LayerTime, LayerWork,
    NormedStream, Peaks,
};
use crate::model::Architecture;
use crate::model::architecture::ScoreBias;
use crate::tokens::{BatchSize, Layout, SizeRange};
use crate::trace::stage;
use crate::{Error, Result};
use rayon::prelude::*;
use std::sync::Arc;

/// Tokens of the classes that are captured, each for one text. The first ones have kernels of their own where the model and the GPU are theirs.
const CLASSES: [usize; 6] = [16, 32, 64, 128, 256, 512];
/// Tokens of the largest pack: the products reach their full speed well below.
const MOST_TOKENS: usize = 16_384;
/// Rows of the largest pack.
const MOST_ROWS: usize = 4096;

/// How a [`NativeEncoder`] is set up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NativeSettings {
    /// How values are stored.
    pub precision: Precision,
    /// Where compiled kernels are kept.
    pub cubins: CubinCache,
    /// Whether a text's vector is the same bits whatever shares its batch: one fixed order of all sums, at the cost of the kernels for few tokens.
    pub invariant: bool,
    /// Runs the kernels of an older architecture, as `TRT_EMBED_CUDA_ARCH` says where it is set: `80` for those of an A100.
    pub arch: Option<String>,
}

impl Default for NativeSettings {
    fn default() -> Self {
        let arch = std::env::var("TRT_EMBED_CUDA_ARCH").ok();
        Self { precision: Precision::default(), cubins: CubinCache::of_user(), invariant: false, arch }
    }
}

/// An architecture on a GPU, run by this crate's own kernels.
pub struct NativeEncoder {
    parts: Arc<Parts>,
    /// The first are those of [`Parts::latency`].
    ranges: Vec<SizeRange>,
    device: Device,
}

/// What sessions share.
struct Parts {
    program: Vec<Step>,
    /// For each layer, what a token sees; -1 for all.
    windows: Vec<i32>,
    model: DeviceModel,
    kernels: NativeKernels,
    latency: Vec<Arc<LatencyClass>>,
    shape: Shape,
}

impl NativeEncoder {
    /// Brings the weights of `architecture` to `device` and makes the kernels ready, for texts of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// [`Error::NotServed`] for a part or size that no kernel serves; [`Error::WeightValue`] for weights that are not finite or do not fit the precision;
    /// [`Error::Cuda`] for a GPU before compute capability 8.0, for NVRTC, memory and the driver; [`Error::FileChanged`].
    pub fn new(device: &Device, architecture: &Architecture, max_tokens: usize, settings: &NativeSettings) -> Result<Self> {
        let shape = Shape::of(architecture, settings.precision)?;
        let max_tokens = max_tokens.clamp(1, architecture.max_tokens.max(1));
        let arch = Arch::of(device, settings.arch.as_deref())?;
        let program = program(architecture);
        let biased = !matches!(architecture.score_bias, ScoreBias::None);
        // Kernels are compiled while weights are read, where they are not in the cache.
        let weights = || -> Result<DeviceModel> {
            let load = LoadKernels::load(device, &settings.cubins, &arch, shape.precision)?;
            stage("loading the weights", || DeviceModel::load(device, &load, (architecture, &program, &shape), max_tokens))
        };
        let kernels = || stage("making the kernels", || NativeKernels::load(device, settings, &arch, shape, biased));
        let few: Vec<usize> = match !settings.invariant && latency::serves(architecture, &shape, &arch) {
            true => classes(&latency::CLASSES, max_tokens).collect(),
            false => Vec::new(),
        };
        let latency = || -> Result<Vec<Arc<LatencyClass>>> {
            let load = |&tokens: &usize| Ok(Arc::new(LatencyClass::load(device, &settings.cubins, &arch, shape, tokens)?));
            stage("making the kernels of few tokens", || few.par_iter().map(load).collect())
        };
        let (model, (kernels, latency)) = rayon::join(weights, || rayon::join(kernels, latency));
        let (mut model, kernels, latency) = (model?, kernels?, latency?);
        if let Some(bias) = &mut model.bias {
            let mut stream = device.stream()?;
            *bias = kernels.prepare_bias(&mut stream, bias)?;
            stream.synchronize()?;
        }
        let windows = architecture.layers.iter().map(|layer| window(layer.attention.reach)).collect();
        let parts = Arc::new(Parts { program, windows, model, kernels, latency, shape });
        Ok(Self { parts, ranges: ranges(max_tokens, &few), device: device.clone() })
    }

    /// Device memory of the weights, in bytes.
    pub fn weight_bytes(&self) -> usize {
        self.parts.model.bytes
    }
}

/// Those of `sizes` that serve texts of up to `max_tokens` tokens: up to the first that holds them.
fn classes(sizes: &[usize], max_tokens: usize) -> impl Iterator<Item = usize> {
    let needed = sizes.iter().position(|&tokens| tokens >= max_tokens).map_or(sizes.len(), |last| last + 1);
    sizes[..needed].iter().copied()
}

/// One class a power of two for single texts, the first ones those of `few` tokens, and one range for packs of all sizes.
fn ranges(max_tokens: usize, few: &[usize]) -> Vec<SizeRange> {
    let single = |longest, tokens| {
        let size = BatchSize { rows: 1, longest, tokens };
        SizeRange { layout: Layout::Packed, min: size, max: size }
    };
    // A class of few tokens always runs all of them; the others as many as the longest text has.
    let of_few = few.iter().map(|&tokens| single(tokens.min(max_tokens), tokens));
    let most_of_few = few.last().copied().unwrap_or(0);
    let others = classes(&CLASSES, max_tokens).filter(|&tokens| tokens > most_of_few).map(|tokens| tokens.min(max_tokens));
    let most = BatchSize { rows: MOST_ROWS, longest: max_tokens, tokens: MOST_TOKENS.max(max_tokens) };
    let packs = SizeRange { layout: Layout::Packed, min: BatchSize::padded(1, 1), max: most };
    of_few.chain(others.map(|tokens| single(tokens, tokens))).chain([packs]).collect()
}

impl GpuEncoder for NativeEncoder {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn io(&self) -> EncoderIo {
        EncoderIo {
            ids: IntegerType::I32,
            mask: None,
            token_types: None,
            hidden: FloatType::F32,
            hidden_size: self.parts.shape.hidden,
        }
    }

    fn ranges(&self) -> &[SizeRange] {
        &self.ranges
    }

    fn is_invariant(&self) -> bool {
        self.parts.kernels.0.invariant
    }

    fn scratch_bytes(&self) -> Result<usize> {
        let tokens = self.capacity().tokens;
        let packs = Scratch::of(&self.parts.shape, tokens, self.parts.kernels.work_bytes(self.capacity())).bytes;
        Ok(self.parts.latency.iter().map(|class| class.scratch().bytes).fold(packs, usize::max))
    }

    fn smaller(&self) -> Option<Arc<dyn GpuEncoder>> {
        let ranges = packs::smaller(&self.ranges)?;
        Some(Arc::new(Self { parts: self.parts.clone(), ranges, device: self.device.clone() }))
    }

    fn peaks(&self) -> Peaks {
        floor::peaks(self.device.properties(), self.parts.shape.precision)
    }

    fn session(&self, range: usize, stream: &mut Stream, memory: &LaneMemory) -> Result<Box<dyn GpuSession>> {
        let latency = self.parts.latency.get(range).cloned();
        let range = self.ranges.get(range).ok_or_else(|| unfit(format!("there is no size class number {range}")))?;
        let (IntegerBuffer::I32(ids), HiddenBuffer::F32(hidden), Some(starts)) = (&memory.ids, &memory.hidden, &memory.starts)
        else {
            return Err(unfit("its lanes have other inputs and outputs than it asked for".to_owned()));
        };
        let mut fault_seen = self.device.pinned(1, HostMemory::Cached)?;
        fault_seen.fill(0, 1, NO_FAULT)?;
        let places = Scratch::of(&self.parts.shape, range.max.tokens, self.parts.kernels.work_bytes(range.max));
        let fault = memory.scratch.slice(places.fault)?.cast()?;
        stream.fill_bytes(&fault, NO_FAULT_BYTE)?;
        Ok(Box::new(Session {
            parts: self.parts.clone(),
            ids: ids.clone(),
            starts: starts.clone(),
            lengths: memory.lengths.clone(),
            hidden: hidden.clone(),
            scratch: memory.scratch.clone(),
            size: range.max,
            latency,
            fault,
            seen: fault_seen.mapped()?,
            fault_seen,
        }))
    }
}

/// The engine at one size, on one stream.
struct Session {
    parts: Arc<Parts>,
    ids: DeviceBuffer<i32>,
    starts: DeviceBuffer<i32>,
    lengths: DeviceBuffer<i32>,
    hidden: DeviceBuffer<f32>,
    scratch: DeviceBuffer<u8>,
    size: BatchSize,
    /// What runs it where it is of few tokens; the program otherwise.
    latency: Option<Arc<LatencyClass>>,
    /// The first stage that found a value which is not finite, of all sessions of the lane.
    fault: DeviceBuffer<i32>,
    /// What it was after the last run.
    fault_seen: PinnedBuffer<i32>,
    /// The same memory as the device addresses it.
    seen: DeviceBuffer<i32>,
}

/// The bytes of what no stage has.
const NO_FAULT_BYTE: u8 = 0x7f;
const NO_FAULT: i32 = i32::from_ne_bytes([NO_FAULT_BYTE; 4]);

/// The pieces of a session's scratch memory, at one size.
struct Work {
    stream: Matrix,
    statistics: DeviceBuffer<f32>,
    qkv: Matrix,
    context: Matrix,
    /// None without norms within attention.
    attended: Option<Matrix>,
    /// None without gates.
    expanded: Option<Matrix>,
    wide: Matrix,
    partials: DeviceBuffer<f32>,
    list: DeviceBuffer<u8>,
}

impl Session {
    fn work(&self) -> Result<Work> {
        let shape = &self.parts.shape;
        let places = Scratch::of(shape, self.size.tokens, self.parts.kernels.work_bytes(self.size));
        let rows = capacity(self.size.tokens);
        let matrix = |place: &std::ops::Range<usize>, columns| -> Result<Matrix> {
            Ok(Matrix { values: self.scratch.slice(place.clone())?, capacity: rows, columns })
        };
        Ok(Work {
            stream: matrix(&places.stream, shape.hidden)?,
            statistics: self.scratch.slice(places.statistics.clone())?.cast()?,
            qkv: matrix(&places.qkv, shape.qkv())?,
            context: matrix(&places.context, shape.hidden)?,
            attended: shape.inner_norms.then(|| matrix(&places.attended, shape.hidden)).transpose()?,
            expanded: shape.gated.then(|| matrix(&places.expanded, shape.expanded())).transpose()?,
            wide: matrix(&places.wide, shape.wide)?,
            partials: self.scratch.slice(places.partials.clone())?.cast()?,
            list: self.scratch.slice(places.work.clone())?,
        })
    }

    fn norm(&self, id: NormId) -> Result<&DeviceNorm> {
        self.parts.model.norms.get(&id).ok_or_else(|| unfit(format!("there are no weights of {id:?}")))
    }

    /// How the statistics of the measuring step at `place` are taken. Anything for other steps.
    fn statistics(&self, place: usize) -> Statistics {
        let steps = &self.parts.program;
        let before = place.checked_sub(1).and_then(|before| steps.get(before));
        let has_sums = self.parts.kernels.leaves_partials(self.size.tokens)
            && matches!(before, Some(Step::Linear { residual: Some(_), .. }));
        let by_next = match (steps.get(place), steps.get(place + 1)) {
            (Some(Step::Measure { norm, .. }), Some(&Step::Linear { layer, linear, norm: Some(of), .. })) if of == *norm => {
                let joins =
                    |weights: &DeviceLinear| has_sums && self.parts.kernels.should_join(self.tile(weights), self.size.tokens);
                self.measures_itself() || self.parts.model.linear(layer, linear).is_some_and(joins)
            }
            _ => false,
        };
        match (by_next, has_sums) {
            (true, _) => Statistics::Inline,
            (false, true) => Statistics::Joined,
            (false, false) => Statistics::Read,
        }
    }

    fn tile(&self, linear: &DeviceLinear) -> Tile {
        self.parts.kernels.tile(self.size.tokens, linear.weight.capacity, linear.weight.columns)
    }

    /// Whether linears take the statistics of what they read by themselves, of the stream.
    fn measures_itself(&self) -> bool {
        let Shape { hidden, precision, .. } = self.parts.shape;
        precision != Precision::Fp32 && self.parts.kernels.tile(self.size.tokens, hidden, hidden) == Tile::Few
    }

    fn latency_job(&self) -> LatencyJob<'_> {
        LatencyJob {
            model: &self.parts.model,
            windows: &self.parts.windows,
            ids: &self.ids,
            starts: &self.starts,
            lengths: &self.lengths,
            rows: self.size.rows,
            hidden: &self.hidden,
            scratch: &self.scratch,
            seen: &self.seen,
        }
    }

    fn enqueue_program(&self, stream: &mut Stream) -> Result<()> {
        let work = self.work()?;
        (0..self.parts.program.len()).try_for_each(|place| self.step(place, &work, stream))
    }

    /// The first stage of the last run that found a value which is not finite.
    fn seen(&self) -> Result<i32> {
        let mut fault = [0];
        self.fault_seen.read(0, &mut fault)?;
        Ok(fault[0])
    }

    fn step(&self, place: usize, work: &Work, stream: &mut Stream) -> Result<()> {
        let steps = &self.parts.program;
        let step = &steps[place];
        let before = place.checked_sub(1).and_then(|before| steps.get(before));
        let after = steps.get(place + 1);
        let Parts { kernels, model, windows, .. } = &*self.parts;
        let Work { stream: residual, statistics, qkv, context, attended, expanded, wide, partials, list } = work;
        let fault = &self.fault;
        let BatchSize { rows, longest, tokens } = self.size;
        let rows = Rows { starts: &self.starts, lengths: &self.lengths, rows, tokens };
        match *step {
            Step::Embed { norm } => {
                let norm = norm.map(|id| self.norm(id)).transpose()?;
                kernels.embed(stream, &self.ids, &rows, (&model.words, model.added.as_ref()), norm, (residual, statistics))?;
                Ok(kernels.plan_attention(stream, &rows, longest, list)?)
            }
            Step::Normalise { norm } => Ok(kernels.normalise(stream, (residual, statistics), &rows, self.norm(norm)?)?),
            Step::Measure { norm, stage } => {
                let (norm_weights, fault) = (self.norm(norm)?, (stage, fault));
                match self.statistics(place) {
                    Statistics::Inline => Ok(()),
                    Statistics::Joined => {
                        Ok(kernels.join(stream, partials, (residual, statistics), &rows, norm_weights, fault)?)
                    }
                    Statistics::Read => Ok(kernels.measure(stream, (residual, statistics), &rows, norm_weights, fault)?),
                }
            }
            Step::Linear { layer, linear, norm, residual: added } => {
                let (input, out) = match linear {
                    LinearId::Qkv => (residual, qkv),
                    LinearId::Output => (
                        context,
                        attended.as_ref().filter(|_| matches!(after, Some(Step::AddAttended { .. }))).unwrap_or(residual),
                    ),
                    LinearId::Expansion => (residual, expanded.as_ref().unwrap_or(wide)),
                    LinearId::Contraction => (wide, residual),
                };
                let through = match added {
                    Some(Residual::Through(id)) => Some(self.norm(id)?),
                    Some(Residual::Raw) | None => None,
                };
                let weights = model.linear(layer, linear).ok_or_else(|| unfit(format!("there is no layer {layer}")))?;
                let tile = self.tile(weights);
                let stage = match before {
                    Some(Step::Measure { stage, .. } | Step::AddAttended { stage, .. }) => Some(*stage),
                    _ => None,
                };
                let inline = matches!(before, Some(Step::Measure { .. })) && self.statistics(place - 1) == Statistics::Inline;
                let job = LinearJob {
                    input,
                    linear: weights,
                    statistics,
                    residual: added.map(|_| (residual, through)),
                    activated: linear == LinearId::Expansion && expanded.is_none(),
                    out,
                    tokens,
                    partials,
                    joins: inline && tile != Tile::Few,
                };
                let (norm, stage) = (norm.map(|id| self.norm(id)).transpose()?, stage.unwrap_or(0));
                let measured = Measured { norm, rows, stage, fault };
                Ok(kernels.linear(stream, &job, tile, &measured)?)
            }
            Step::QueriesKeys { layer } => {
                let norm = |id| model.norms.get(&id);
                let (query, key) = (norm(NormId::Query(layer)), norm(NormId::Key(layer)));
                let rotary = model.rotaries.get(layer).and_then(Option::as_ref);
                Ok(kernels.queries_keys(stream, qkv, &rows, longest, &QueriesKeys { query, key, rotary })?)
            }
            Step::AddAttended { layer, residual: through, norm, stage } => {
                let attended = attended.as_ref().ok_or_else(|| unfit(format!("layer {layer} has no norms within attention")))?;
                let view = match through {
                    Residual::Through(id) => Some(self.norm(id)?),
                    Residual::Raw => None,
                };
                let next = norm.map(|id| self.norm(id)).transpose()?;
                let of_attended = (attended, self.norm(NormId::AttentionOutput(layer))?);
                Ok(kernels.add_normed(stream, (residual, statistics, view), of_attended, &rows, next, (stage, fault))?)
            }
            Step::Gate { layer } => {
                let expanded = expanded.as_ref().ok_or_else(|| unfit(format!("layer {layer} has no gate")))?;
                Ok(kernels.gate(stream, expanded, wide, tokens)?)
            }
            Step::Attention { layer } => {
                let window = windows.get(layer).copied().unwrap_or(-1);
                let job = AttentionJob { qkv, context, rows, longest, bias: model.bias.as_ref(), window, list };
                Ok(kernels.attention(stream, &job)?)
            }
            Step::Give { norm } => {
                let norm = norm.map(|id| self.norm(id)).transpose()?;
                Ok(kernels.hidden_states(stream, (residual, statistics), &rows, norm, &self.hidden, (fault, &self.seen))?)
            }
        }
    }
}

impl GpuSession for Session {
    fn set_size(&mut self, size: BatchSize) -> Result<()> {
        self.size = size;
        Ok(())
    }

    fn enqueue(&mut self, stream: &mut Stream) -> Result<()> {
        match &self.latency {
            Some(class) => Ok(class.enqueue(stream, &self.latency_job())?),
            None => self.enqueue_program(stream),
        }
    }

    fn enqueue_for_pooling(&mut self, stream: &mut Stream) -> Result<Option<NormedStream>> {
        let precision = self.parts.shape.precision;
        let Some((&Step::Give { norm }, before)) = self.parts.program.split_last() else {
            return Err(unfit("its program gives no hidden states".to_owned()));
        };
        if self.latency.is_some() || precision == Precision::Fp32 {
            self.enqueue(stream)?;
            return Ok(None);
        }
        let work = self.work()?;
        (0..before.len()).try_for_each(|place| self.step(place, &work, stream))?;
        let norm = norm.map(|id| self.norm(id)).transpose()?;
        Ok(Some(NormedStream {
            values: work.stream.values,
            bf16: precision == Precision::Bf16,
            capacity: work.stream.capacity,
            statistics: work.statistics,
            norm: norm.map(|norm| (norm.gamma.clone(), norm.beta.clone())),
            noted: [self.fault.clone(), self.seen.clone()],
        }))
    }

    fn check(&mut self, stream: &mut Stream) -> Result<()> {
        if self.seen()? == NO_FAULT {
            return Ok(());
        }
        if self.latency.is_some() {
            // Its kernels see that values overflow, not where: the program, which stages its own checks, runs the batch again.
            self.fault_seen.fill(0, 1, NO_FAULT)?;
            self.enqueue_program(stream)?;
            stream.synchronize()?;
        }
        let place = match usize::try_from(self.seen()?) {
            Ok(stage) if self.seen()? != NO_FAULT => stage_name(&self.parts.program, stage),
            _ => "the hidden states".to_owned(),
        };
        self.fault_seen.fill(0, 1, NO_FAULT)?;
        stream.fill_bytes(&self.fault, NO_FAULT_BYTE)?;
        Err(Error::Overflow { place, precision: self.parts.shape.precision.name() })
    }

    fn works(&self, names: &[&str]) -> Vec<Option<LayerWork>> {
        let Parts { program, windows, model, shape, .. } = &*self.parts;
        let statistics: Vec<Statistics> = (0..program.len()).map(|place| self.statistics(place)).collect();
        let rows = floor::full_rows(self.size);
        let load = floor::Load { rows, tokens: self.size.tokens, windows, biased: model.bias.is_some(), statistics: &statistics };
        floor::works(program, shape, &load, names)
    }

    fn measure_layers(&mut self, stream: &mut Stream) -> Result<Vec<LayerTime>> {
        if let Some(class) = &self.latency {
            return Ok(class.measure(stream, &self.latency_job())?);
        }
        let work = self.work()?;
        let (start, end) = (stream.device().event()?, stream.device().event()?);
        let mut times = Vec::with_capacity(self.parts.program.len());
        for (place, step) in self.parts.program.iter().enumerate() {
            stream.record(&start)?;
            self.step(place, &work, stream)?;
            stream.record(&end)?;
            stream.synchronize()?;
            times.push(LayerTime::new(floor::layer_name(step), start.micros_until(&end)? / 1e3));
        }
        Ok(times)
    }
}

fn unfit(reason: String) -> Error {
    Error::Backend { backend: "cuda", reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_that_the_model_takes_has_a_class_and_a_pack() {
        for longest in [1, 15, 16, 17, 100, 128, 384, 512, 513, 8192] {
            for sizes in [&latency::CLASSES[..], &[]] {
                let few: Vec<usize> = classes(sizes, longest).collect();
                let ranges = ranges(longest, &few);
                for tokens in 1..=longest {
                    let size = BatchSize::padded(1, tokens);
                    let fixed = ranges.iter().filter(|range| range.is_fixed() && range.fit(size).is_some()).count();
                    assert!(fixed > 0 || tokens > 512, "{tokens} of {longest}");
                    assert!(ranges.last().unwrap().fit(size).is_some(), "{tokens} of {longest}");
                }
                assert!(ranges.iter().all(|range| range.max.longest <= longest));
                assert!(ranges.windows(2).all(|pair| pair[0].max.tokens < pair[1].max.tokens), "{ranges:?}");
                // The classes of few tokens come first, and run all of theirs.
                assert!(few.iter().zip(&ranges).all(|(&tokens, range)| range.max.tokens == tokens), "{ranges:?}");
            }
        }
    }
}
