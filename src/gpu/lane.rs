//! A lane: one stream with all that a call needs — pinned staging, device buffers, a session for each profile and captured graphs —
//! so that a call writes its ids, launches one graph, waits once and reads its vectors.

use super::encoder::{EncoderIo, GpuEncoder, GpuSession, HiddenBuffer, IntegerBuffer, LaneMemory, LayerTime, Rectangle};
use super::kernels::{Kernels, PoolJob, PoolShape, StageJob};
use crate::cuda::steps::{step_names, step_times};
use crate::cuda::{CudaError, DeviceBuffer, Graph, HostMemory, PinnedBuffer, Stream};
use crate::pooling::PoolingMode;
use crate::tokens::TokenBatch;
use crate::{Error, Result};
use std::sync::Arc;

/// What lanes are made of; kept to make broken ones anew.
pub(super) struct LaneParts {
    pub encoder: Arc<dyn GpuEncoder>,
    pub kernels: Kernels,
    /// What the device does to hidden states.
    pub pooling: DevicePooling,
    /// The id of padding.
    pub pad: i32,
}

/// Pooling, cut and normalisation as the kernels do them.
#[derive(Debug, Clone)]
pub(super) struct DevicePooling {
    pub modes: Vec<PoolingMode>,
    /// Values of a vector.
    pub dim: usize,
    pub normalise: bool,
}

pub(super) struct Lane {
    profiles: Vec<Profile>,
    staging: PinnedBuffer<i32>,
    vectors: PinnedBuffer<f32>,
    work: Work,
    // Dropped last: it waits for what the others still have under way.
    stream: Stream,
}

struct Profile {
    session: Box<dyn GpuSession>,
    /// The whole call at a fixed shape.
    graph: Option<Graph>,
}

/// What work that is put on the stream refers to.
struct Work {
    kernels: Kernels,
    pooling: DevicePooling,
    pad: i32,
    hidden_size: usize,
    memory: LaneMemory,
    /// The staging memory as the device addresses it.
    staged: DeviceBuffer<i32>,
    skip: DeviceBuffer<i32>,
    lengths: DeviceBuffer<i32>,
    out: Out,
}

/// Where the kernels write vectors.
enum Out {
    /// The pinned memory itself, over the bus.
    Host(DeviceBuffer<f32>),
    /// Device memory, from where they are copied: normalisation reads what pooling wrote, which over the bus would take long.
    Device(DeviceBuffer<f32>),
}

/// The time of the GPU's work at one shape, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct GpuMicros {
    /// A whole call: staging, encoder, pooling into host memory.
    pub call: f64,
    /// The encoder alone.
    pub encoder: f64,
    /// Staging alone.
    pub stage: f64,
    /// Pooling and normalisation alone.
    pub pool: f64,
}

impl Lane {
    /// Allocates, makes the sessions and captures the fixed profiles, each of which runs once on the way.
    pub fn new(parts: &LaneParts) -> Result<Self> {
        let encoder = &parts.encoder;
        let device = encoder.device();
        let io = encoder.io();
        let most = |of: fn(Rectangle) -> usize| encoder.profiles().iter().map(|range| of(range.max)).max().unwrap_or(0);
        let (rows, tokens) = (most(|shape| shape.batch), most(Rectangle::tokens));

        let mut stream = device.stream()?;
        let memory = lane_memory(encoder.as_ref(), io, tokens, &mut stream)?;
        let staging = device.pinned::<i32>(1 + rows + tokens, HostMemory::WriteCombined)?;
        let mut vectors = device.pinned::<f32>(rows * parts.pooling.dim, HostMemory::Cached)?;
        let several = parts.pooling.modes.len() > 1 && parts.pooling.normalise;
        let out = if several { Out::Device(device.alloc(vectors.len())?) } else { Out::Host(vectors.mapped()?) };
        let work = Work {
            kernels: parts.kernels.clone(),
            pooling: parts.pooling.clone(),
            pad: parts.pad,
            hidden_size: io.hidden_size,
            staged: staging.mapped()?,
            skip: device.alloc(1)?,
            lengths: device.alloc(rows)?,
            memory,
            out,
        };
        let mut profiles = Vec::with_capacity(encoder.profiles().len());
        for (place, range) in encoder.profiles().iter().enumerate() {
            let mut session = encoder.session(place, &mut stream, &work.memory)?;
            let mut graph = None;
            if range.is_fixed() {
                // What is set up at the first run cannot be captured.
                work.enqueue(&mut stream, session.as_mut(), &mut vectors, range.max)?;
                stream.synchronize()?;
                let capture = |stream: &mut Stream| work.enqueue(stream, session.as_mut(), &mut vectors, range.max);
                graph = Some(stream.capture(capture)?);
            }
            profiles.push(Profile { session, graph });
        }
        Ok(Self { profiles, staging, vectors, work, stream })
    }

    /// Runs `batch` at a profile, at `shape`, which holds it; the vectors of its rows go into `out`.
    pub fn encode(&mut self, profile: usize, shape: Rectangle, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.run(profile, shape, batch)?;
        Ok(self.vectors.read(0, out)?)
    }

    /// As [`Lane::encode`]; hidden states `[shape.batch, shape.seq, hidden]` instead of vectors.
    pub fn hidden(&mut self, profile: usize, shape: Rectangle, batch: &TokenBatch) -> Result<Vec<f32>> {
        self.run(profile, shape, batch)?;
        Ok(self.work.memory.hidden.download(&mut self.stream, shape.tokens() * self.work.hidden_size)?)
    }

    /// The one way through a lane: write, launch, wait.
    fn run(&mut self, profile: usize, shape: Rectangle, batch: &TokenBatch) -> Result<()> {
        stage(&mut self.staging, shape, batch)?;
        let profile = self.profiles.get_mut(profile).ok_or_else(|| no_profile(profile))?;
        match &profile.graph {
            Some(graph) => self.stream.launch(graph)?,
            None => {
                profile.session.set_shape(shape)?;
                self.work.enqueue(&mut self.stream, profile.session.as_mut(), &mut self.vectors, shape)?;
            }
        }
        Ok(self.stream.synchronize()?)
    }

    /// The GPU's time of a call at a profile's `shape`: the least of `runs` runs, which other work on the GPU disturbs least.
    pub fn measure_call(&mut self, profile: usize, shape: Rectangle, runs: usize) -> Result<f64> {
        self.stage_full(shape)?;
        let Self { profiles, work, vectors, stream, .. } = self;
        let profile = profiles.get_mut(profile).ok_or_else(|| no_profile(profile))?;
        let session = profile.session.as_mut();
        match &profile.graph {
            Some(graph) => least(runs, stream, &mut |stream| Ok(stream.launch(graph)?)),
            None => {
                session.set_shape(shape)?;
                least(runs, stream, &mut |stream| work.enqueue(stream, session, vectors, shape))
            }
        }
    }

    /// The GPU's time of a call at a profile's `shape` and of its parts: medians of `runs` runs. A fixed profile's are those of
    /// captured graphs. The rows are full and hold padding's id.
    pub fn measure(&mut self, profile: usize, shape: Rectangle, runs: usize) -> Result<GpuMicros> {
        self.stage_full(shape)?;
        let Self { profiles, work, vectors, stream, .. } = self;
        let profile = profiles.get_mut(profile).ok_or_else(|| no_profile(profile))?;
        let session = profile.session.as_mut();
        let mut time = |fixed: bool, enqueue: &mut dyn FnMut(&mut Stream) -> Result<()>| -> Result<f64> {
            enqueue(stream)?;
            stream.synchronize()?;
            if fixed {
                let graph = stream.capture(|stream| enqueue(stream))?;
                return median(runs, IN_A_ROW, stream, &mut |stream| Ok(stream.launch(&graph)?));
            }
            median(runs, 1, stream, enqueue)
        };
        let fixed = profile.graph.is_some();
        if !fixed {
            session.set_shape(shape)?;
        }
        Ok(GpuMicros {
            call: time(fixed, &mut |stream| work.enqueue(stream, session, vectors, shape))?,
            encoder: time(fixed, &mut |stream| session.enqueue(stream))?,
            stage: time(true, &mut |stream| work.stage(stream, shape))?,
            pool: time(true, &mut |stream| work.pool(stream, vectors, shape))?,
        })
    }

    /// The time of each layer, the least of `runs` runs. Slows the lane's session down for good.
    pub fn measure_layers(&mut self, profile: usize, shape: Rectangle, runs: usize) -> Result<Vec<LayerTime>> {
        self.stage_full(shape)?;
        let Self { profiles, work, stream, .. } = self;
        let session = profiles.get_mut(profile).ok_or_else(|| no_profile(profile))?.session.as_mut();
        session.set_shape(shape)?;
        work.stage(stream, shape)?;
        stream.synchronize()?;
        let mut least = session.measure_layers(stream)?;
        for _ in 1..runs {
            for (least, layer) in least.iter_mut().zip(session.measure_layers(stream)?) {
                least.milliseconds = least.milliseconds.min(layer.milliseconds);
            }
        }
        Ok(least)
    }

    /// Names of the encoder's kernels at a fixed profile, in order; `None` for a profile without a graph.
    pub fn kernels(&mut self, profile: usize) -> Result<Option<Vec<String>>> {
        let Some(graph) = self.capture_encoder(profile)? else { return Ok(None) };
        Ok(Some(step_names(&graph, &mut self.stream)?))
    }

    /// The time of each of the encoder's kernels at a fixed profile, the median of `runs` runs; `None` for a profile without a graph.
    pub fn measure_kernels(&mut self, profile: usize, shape: Rectangle, runs: usize) -> Result<Option<Vec<LayerTime>>> {
        self.stage_full(shape)?;
        self.work.stage(&mut self.stream, shape)?;
        self.stream.synchronize()?;
        let Some(graph) = self.capture_encoder(profile)? else { return Ok(None) };
        let names = step_names(&graph, &mut self.stream)?;
        let times = step_times(graph, &mut self.stream, runs)?;
        let kernel = |(name, micros)| LayerTime { name, milliseconds: (micros / 1e3) as f32 };
        Ok(Some(names.into_iter().zip(times).map(kernel).collect()))
    }

    /// The encoder alone at a fixed profile, captured.
    fn capture_encoder(&mut self, profile: usize) -> Result<Option<Graph>> {
        let profile = self.profiles.get_mut(profile).ok_or_else(|| no_profile(profile))?;
        if profile.graph.is_none() {
            return Ok(None);
        }
        let session = profile.session.as_mut();
        Ok(Some(self.stream.capture(|stream| session.enqueue(stream))?))
    }

    fn stage_full(&mut self, shape: Rectangle) -> Result<()> {
        let length = u32::try_from(shape.seq).unwrap_or(u32::MAX);
        let ids = vec![self.work.pad; shape.tokens()];
        let batch = TokenBatch::from_padded(ids, vec![length; shape.batch], shape.seq, 0)?;
        Ok(stage(&mut self.staging, shape, &batch)?)
    }
}

fn no_profile(profile: usize) -> Error {
    Error::Backend { backend: "gpu", reason: format!("there is no profile number {profile}") }
}

/// Launches of a graph between two events: the host's way to the first is then no part of the time.
const IN_A_ROW: usize = 8;

/// The least time of a piece of work over `runs` runs.
fn least(runs: usize, stream: &mut Stream, enqueue: &mut dyn FnMut(&mut Stream) -> Result<()>) -> Result<f64> {
    Ok(sorted_times(runs, 1, stream, enqueue)?.first().copied().unwrap_or(0.0))
}

/// The median time of one of `in_a_row` pieces of work between two events, over `runs` runs.
fn median(runs: usize, in_a_row: usize, stream: &mut Stream, enqueue: &mut dyn FnMut(&mut Stream) -> Result<()>) -> Result<f64> {
    let times = sorted_times(runs, in_a_row, stream, enqueue)?;
    Ok(times.get(times.len() / 2).copied().unwrap_or(0.0))
}

/// Times of one of `in_a_row` pieces of work between two events, of at least one run, after one that does not count.
fn sorted_times(
    runs: usize,
    in_a_row: usize,
    stream: &mut Stream,
    enqueue: &mut dyn FnMut(&mut Stream) -> Result<()>,
) -> Result<Vec<f64>> {
    let (start, end) = (stream.device().event()?, stream.device().event()?);
    enqueue(stream)?;
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs.max(1) {
        stream.record(&start)?;
        for _ in 0..in_a_row {
            enqueue(stream)?;
        }
        stream.record(&end)?;
        stream.synchronize()?;
        times.push(f64::from(start.micros_until(&end)?) / in_a_row as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

impl Work {
    /// Puts one whole call on the stream, or into the graph that it captures.
    fn enqueue(
        &self,
        stream: &mut Stream,
        session: &mut dyn GpuSession,
        vectors: &mut PinnedBuffer<f32>,
        shape: Rectangle,
    ) -> Result<()> {
        self.stage(stream, shape)?;
        session.enqueue(stream)?;
        self.pool(stream, vectors, shape)
    }

    fn stage(&self, stream: &mut Stream, Rectangle { batch, seq }: Rectangle) -> Result<()> {
        let job = StageJob {
            staged: &self.staged,
            skip: &self.skip,
            lengths: &self.lengths,
            ids: self.memory.ids.integers(),
            mask: self.memory.mask.as_ref().map(IntegerBuffer::integers),
            batch,
            seq,
            pad: self.pad,
        };
        Ok(self.kernels.stage(stream, &job)?)
    }

    fn pool(&self, stream: &mut Stream, vectors: &mut PinnedBuffer<f32>, Rectangle { batch, seq }: Rectangle) -> Result<()> {
        let DevicePooling { modes, dim, normalise } = &self.pooling;
        let (Out::Host(out) | Out::Device(out)) = &self.out;
        let job = PoolJob {
            hidden: self.memory.hidden.hidden(),
            lengths: &self.lengths,
            skip: Some(&self.skip),
            out,
            modes,
            shape: PoolShape { batch, seq, hidden: self.hidden_size, dim: *dim, normalise: *normalise },
        };
        self.kernels.pool(stream, &job)?;
        if let Out::Device(out) = &self.out {
            stream.copy_to_host(out, vectors, batch * dim)?;
        }
        Ok(())
    }
}

/// Writes `[skip, lengths[shape.batch], ids[shape.batch, shape.seq]]`. Rows that the batch does not have are empty; ids behind a
/// row's tokens stay what they were, nobody reads them.
fn stage(staging: &mut PinnedBuffer<i32>, shape: Rectangle, batch: &TokenBatch) -> Result<(), CudaError> {
    let rows = batch.batch();
    staging.fill(0, 1, i32::try_from(batch.skip()).unwrap_or(i32::MAX))?;
    let ids = 1 + shape.batch;
    for (row, (&length, tokens)) in batch.lengths().iter().zip(batch.ids().chunks_exact(batch.seq())).enumerate() {
        // Of a whole batch: no row is longer than it is wide, which is less than `shape` is.
        let tokens = &tokens[..length as usize];
        staging.fill(1 + row, 1, length as i32)?;
        staging.write(ids + row * shape.seq, tokens)?;
    }
    staging.fill(1 + rows, shape.batch.saturating_sub(rows), 0)
}

fn lane_memory(encoder: &dyn GpuEncoder, io: EncoderIo, tokens: usize, stream: &mut Stream) -> Result<LaneMemory> {
    let device = encoder.device();
    let integers = |width| IntegerBuffer::alloc(device, width, tokens);
    let token_types = io.token_types.map(integers).transpose()?;
    if let Some(zeros) = &token_types {
        zeros.fill_bytes(stream, 0)?;
    }
    Ok(LaneMemory {
        ids: integers(io.ids)?,
        mask: io.mask.map(integers).transpose()?,
        token_types,
        hidden: HiddenBuffer::alloc(device, io.hidden, tokens * io.hidden_size)?,
        scratch: device.alloc(encoder.scratch_bytes()?.max(1))?,
    })
}
