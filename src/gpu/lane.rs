//! A lane: one stream with all that a call needs — pinned staging, device buffers, a session for each profile and captured graphs —
//! so that a call writes its ids, launches one graph, waits once and reads its vectors.

use super::encoder::{EncoderIo, GpuEncoder, GpuSession, HiddenBuffer, IntegerBuffer, LaneMemory, LayerTime};
use super::kernels::{Kernels, PoolJob, PoolShape, StageJob, StagedRows};
use super::pool_plan::{Hardware, PoolPlan};
use super::values::{Hidden, NormedStream};
use crate::cuda::steps::{step_names, step_times};
use crate::cuda::{CudaError, DeviceBuffer, Graph, HostMemory, PinnedBuffer, Stream};
use crate::pooling::PoolingMode;
use crate::tokens::{BatchSize, Layout, SizeRange, TokenBatch};
use crate::{Error, Result};
use std::sync::Arc;

/// What lanes are made of; kept to make broken ones anew.
#[derive(Clone)]
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
    /// Whether a row's sums have the same order in every batch.
    pub invariant: bool,
}

pub(super) struct Lane {
    sessions: Vec<Session>,
    staging: PinnedBuffer<i32>,
    vectors: PinnedBuffer<f32>,
    work: Work,
    // Dropped last: it waits for what the others still have under way.
    stream: Stream,
}

/// The encoder at one of its ranges.
struct Session {
    encoder: Box<dyn GpuSession>,
    layout: Layout,
    /// The whole call at a fixed size.
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
    /// Allocates, makes the sessions and captures the fixed ranges, each of which runs once on the way.
    pub fn new(parts: &LaneParts) -> Result<Self> {
        let encoder = &parts.encoder;
        let device = encoder.device();
        let io = encoder.io();
        let capacity = encoder.capacity();

        let mut stream = device.stream()?;
        let memory = lane_memory(encoder.as_ref(), io, capacity, &mut stream)?;
        let staging = device.pinned::<i32>(2 + capacity.rows + capacity.tokens, HostMemory::WriteCombined)?;
        let mut vectors = device.pinned::<f32>(capacity.rows * parts.pooling.dim, HostMemory::Cached)?;
        let several = parts.pooling.modes.len() > 1 && parts.pooling.normalise;
        let out = if several { Out::Device(device.alloc(vectors.len())?) } else { Out::Host(vectors.mapped()?) };
        let work = Work {
            kernels: parts.kernels.clone(),
            pooling: parts.pooling.clone(),
            pad: parts.pad,
            hidden_size: io.hidden_size,
            staged: staging.mapped()?,
            skip: device.alloc(1)?,
            memory,
            out,
        };
        let mut sessions = Vec::with_capacity(encoder.ranges().len());
        for (place, &SizeRange { layout, max, .. }) in encoder.ranges().iter().enumerate() {
            let mut session = Session { encoder: encoder.session(place, &mut stream, &work.memory)?, layout, graph: None };
            if encoder.ranges()[place].is_fixed() {
                // What is set up at the first run cannot be captured.
                work.enqueue(&mut stream, &mut session, &mut vectors, max)?;
                stream.synchronize()?;
                let capture = |stream: &mut Stream| work.enqueue(stream, &mut session, &mut vectors, max);
                let graph = stream.capture(capture)?;
                session.graph = Some(graph);
            }
            sessions.push(session);
        }
        Ok(Self { sessions, staging, vectors, work, stream })
    }

    /// Runs `batch` in a session, at `size`, which holds it; the vectors of its rows go into `out`.
    pub fn encode(&mut self, session: usize, size: BatchSize, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.run(session, size, batch)?;
        Ok(self.vectors.read(0, out)?)
    }

    /// As [`Lane::encode`]; hidden states `[tokens, hidden]` of the batch's rows side by side instead of vectors.
    pub fn hidden(&mut self, session: usize, size: BatchSize, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        // Not by the graph, which may pool without writing them.
        stage(&mut self.staging, size, batch)?;
        let Self { sessions, work, stream, .. } = self;
        let of = sessions.get_mut(session).ok_or_else(|| no_session(session))?;
        if of.graph.is_none() {
            of.encoder.set_size(size)?;
        }
        work.stage(stream, of.layout, size)?;
        of.encoder.enqueue(stream)?;
        stream.synchronize()?;
        of.encoder.check(stream)?;
        let width = self.work.hidden_size;
        let hidden = self.work.memory.hidden.download(&mut self.stream, size.tokens * width)?;
        let padded = self.sessions.get(session).is_some_and(|session| session.layout == Layout::Padded);
        for (row, ends) in batch.starts().windows(2).enumerate() {
            let (start, end) = (ends[0] as usize, ends[1] as usize);
            let first = if padded { row * size.longest } else { start };
            out[start * width..end * width].copy_from_slice(&hidden[first * width..(first + end - start) * width]);
        }
        Ok(())
    }

    /// The way of vectors through a lane: write, launch, wait.
    fn run(&mut self, session: usize, size: BatchSize, batch: &TokenBatch) -> Result<()> {
        stage(&mut self.staging, size, batch)?;
        let session = self.sessions.get_mut(session).ok_or_else(|| no_session(session))?;
        match &session.graph {
            Some(graph) => self.stream.launch(graph)?,
            None => {
                session.encoder.set_size(size)?;
                self.work.enqueue(&mut self.stream, session, &mut self.vectors, size)?;
            }
        }
        self.stream.synchronize()?;
        session.encoder.check(&mut self.stream)
    }

    /// The GPU's time of a call in a session at `size`: the least of `runs` runs, which other work on the GPU disturbs least.
    pub fn measure_call(&mut self, session: usize, size: BatchSize, runs: usize) -> Result<f64> {
        self.stage_full(size)?;
        let Self { sessions, work, vectors, stream, .. } = self;
        let session = sessions.get_mut(session).ok_or_else(|| no_session(session))?;
        match &session.graph {
            Some(graph) => least(runs, stream, &mut |stream| Ok(stream.launch(graph)?)),
            None => {
                session.encoder.set_size(size)?;
                least(runs, stream, &mut |stream| work.enqueue(stream, session, vectors, size))
            }
        }
    }

    /// The GPU's time of a call in a session at `size` and of its parts: medians of `runs` runs. A fixed range's are those of captured
    /// graphs. The rows are full and hold padding's id.
    pub fn measure(&mut self, session: usize, size: BatchSize, runs: usize) -> Result<GpuMicros> {
        self.stage_full(size)?;
        let Self { sessions, work, vectors, stream, .. } = self;
        let session = sessions.get_mut(session).ok_or_else(|| no_session(session))?;
        let mut time = |fixed: bool, enqueue: &mut dyn FnMut(&mut Stream) -> Result<()>| -> Result<f64> {
            enqueue(stream)?;
            stream.synchronize()?;
            if fixed {
                let graph = stream.capture(|stream| enqueue(stream))?;
                return median(runs, IN_A_ROW, stream, &mut |stream| Ok(stream.launch(&graph)?));
            }
            median(runs, 1, stream, enqueue)
        };
        let (fixed, layout) = (session.graph.is_some(), session.layout);
        if !fixed {
            session.encoder.set_size(size)?;
        }
        let call = time(fixed, &mut |stream| work.enqueue(stream, session, vectors, size))?;
        let mut pooled = None;
        let encoder = time(fixed, &mut |stream| {
            pooled = session.encoder.enqueue_for_pooling(stream)?;
            Ok(())
        })?;
        Ok(GpuMicros {
            call,
            encoder,
            stage: time(true, &mut |stream| work.stage(stream, layout, size))?,
            pool: time(true, &mut |stream| work.pool(stream, vectors, (layout, size), pooled.as_ref()))?,
        })
    }

    /// The time of each layer, the least of `runs` runs. Slows the lane's session down for good.
    pub fn measure_layers(&mut self, place: usize, size: BatchSize, runs: usize) -> Result<Vec<LayerTime>> {
        self.stage_full(size)?;
        let Self { sessions, work, stream, .. } = self;
        let session = sessions.get_mut(place).ok_or_else(|| no_session(place))?;
        session.encoder.set_size(size)?;
        work.stage(stream, session.layout, size)?;
        stream.synchronize()?;
        let mut least = session.encoder.measure_layers(stream)?;
        for _ in 1..runs {
            for (least, layer) in least.iter_mut().zip(session.encoder.measure_layers(stream)?) {
                least.milliseconds = least.milliseconds.min(layer.milliseconds);
            }
        }
        self.note_work(place, &mut least);
        Ok(least)
    }

    /// Says of what ran in a session what it must move and compute, as far as the executor knows.
    fn note_work(&self, session: usize, layers: &mut [LayerTime]) {
        let Some(session) = self.sessions.get(session) else { return };
        let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
        let works = session.encoder.works(&names);
        for (layer, work) in layers.iter_mut().zip(works) {
            layer.work = work;
        }
    }

    /// Names of the encoder's kernels in a session of one size, in order; `None` for a session without a graph.
    pub fn kernels(&mut self, session: usize) -> Result<Option<Vec<String>>> {
        let Some(graph) = self.capture_encoder(session)? else { return Ok(None) };
        Ok(Some(step_names(&graph, &mut self.stream)?))
    }

    /// The time of each of the encoder's kernels in a session of one size, the median of `runs` runs; `None` for a session without a graph.
    pub fn measure_kernels(&mut self, session: usize, size: BatchSize, runs: usize) -> Result<Option<Vec<LayerTime>>> {
        self.stage_full(size)?;
        let layout = self.sessions.get(session).ok_or_else(|| no_session(session))?.layout;
        self.work.stage(&mut self.stream, layout, size)?;
        self.stream.synchronize()?;
        let Some(graph) = self.capture_encoder(session)? else { return Ok(None) };
        let names = step_names(&graph, &mut self.stream)?;
        let times = step_times(graph, &mut self.stream, runs)?;
        let kernel = |(name, micros): (String, f64)| LayerTime::new(name, (micros / 1e3) as f32);
        let mut kernels: Vec<LayerTime> = names.into_iter().zip(times).map(kernel).collect();
        self.note_work(session, &mut kernels);
        Ok(Some(kernels))
    }

    /// The encoder alone in a session of one size, captured.
    fn capture_encoder(&mut self, session: usize) -> Result<Option<Graph>> {
        let session = self.sessions.get_mut(session).ok_or_else(|| no_session(session))?;
        if session.graph.is_none() {
            return Ok(None);
        }
        Ok(Some(self.stream.capture(|stream| session.encoder.enqueue(stream))?))
    }

    /// Rows of padding's id that fill `size`: full ones as far as its tokens reach.
    fn stage_full(&mut self, size: BatchSize) -> Result<()> {
        let (starts, tokens) = full_rows(size);
        let batch = TokenBatch::from_ragged(vec![self.work.pad; tokens], starts, 0)?;
        Ok(stage(&mut self.staging, size, &batch)?)
    }
}

/// Where the rows of a batch of `size` begin when each is as long as it may be while tokens are left, and how many tokens they have.
fn full_rows(size: BatchSize) -> (Vec<u32>, usize) {
    let mut starts = vec![0];
    let mut end = 0;
    for _ in 0..size.rows {
        end = size.tokens.min(end + size.longest);
        starts.push(u32::try_from(end).unwrap_or(u32::MAX));
    }
    (starts, end)
}

fn no_session(session: usize) -> Error {
    Error::Backend { backend: "gpu", reason: format!("there is no profile number {session}") }
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
        session: &mut Session,
        vectors: &mut PinnedBuffer<f32>,
        size: BatchSize,
    ) -> Result<()> {
        self.stage(stream, session.layout, size)?;
        let pooled = session.encoder.enqueue_for_pooling(stream)?;
        self.pool(stream, vectors, (session.layout, size), pooled.as_ref())
    }

    fn stage(&self, stream: &mut Stream, layout: Layout, size: BatchSize) -> Result<()> {
        let rows = match (layout, &self.memory.starts) {
            (Layout::Packed, Some(starts)) => StagedRows::Packed { starts, tokens: size.tokens },
            _ => StagedRows::Padded(size.longest),
        };
        let job = StageJob {
            staged: &self.staged,
            skip: &self.skip,
            lengths: &self.memory.lengths,
            ids: self.memory.ids.integers(),
            mask: self.memory.mask.as_ref().map(IntegerBuffer::integers),
            batch: size.rows,
            rows,
            pad: self.pad,
        };
        Ok(self.kernels.stage(stream, &job)?)
    }

    /// Of the hidden states that `normed` becomes, or of those in the lane's memory.
    fn pool(
        &self,
        stream: &mut Stream,
        vectors: &mut PinnedBuffer<f32>,
        (layout, size): (Layout, BatchSize),
        normed: Option<&NormedStream>,
    ) -> Result<()> {
        let DevicePooling { modes, dim, normalise, invariant } = &self.pooling;
        let (Out::Host(out) | Out::Device(out)) = &self.out;
        let BatchSize { rows: batch, longest: seq, tokens } = size;
        let job = PoolJob {
            hidden: normed.map_or(self.memory.hidden.hidden(), Hidden::Stream),
            starts: self.memory.starts.as_ref().filter(|_| layout == Layout::Packed),
            lengths: &self.memory.lengths,
            skip: Some(&self.skip),
            out,
            modes,
            shape: PoolShape { batch, seq, tokens, hidden: self.hidden_size, dim: *dim, normalise: *normalise },
        };
        if *invariant {
            let lane = job.hidden.lane();
            let hardware = Hardware::of(stream.device().properties());
            self.kernels.pool_planned(stream, &job, |_, columns| PoolPlan::in_one_order(hardware, batch, columns, lane))?;
        } else {
            self.kernels.pool(stream, &job)?;
        }
        if let Out::Device(out) = &self.out {
            stream.copy_to_host(out, vectors, batch * dim)?;
        }
        Ok(())
    }
}

/// Writes `[skip, starts[size.rows + 1], ids]`. Rows that the batch does not have are empty: they begin where the last one ends. What stands
/// behind the ids stays what it was, nobody reads it.
fn stage(staging: &mut PinnedBuffer<i32>, size: BatchSize, batch: &TokenBatch) -> Result<(), CudaError> {
    // Of a whole batch that fits `size`: neither its rows nor its tokens are more, and both are below 2^31, or there were no memory for them.
    let signed = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    staging.fill(0, 1, signed(batch.skip()))?;
    let rows = batch.batch();
    for (row, &start) in batch.starts().iter().enumerate() {
        staging.fill(1 + row, 1, signed(start))?;
    }
    let end = batch.starts().last().copied().unwrap_or(0);
    staging.fill(2 + rows, size.rows.saturating_sub(rows), signed(end))?;
    staging.write(2 + size.rows, batch.ids())
}

fn lane_memory(encoder: &dyn GpuEncoder, io: EncoderIo, capacity: BatchSize, stream: &mut Stream) -> Result<LaneMemory> {
    let device = encoder.device();
    let tokens = capacity.tokens;
    let integers = |width| IntegerBuffer::alloc(device, width, tokens);
    let token_types = io.token_types.map(integers).transpose()?;
    if let Some(zeros) = &token_types {
        zeros.fill_bytes(stream, 0)?;
    }
    // Kernels compute padding rows too, which no vector depends on: of zeros at first, so that nothing is read before it was written.
    let scratch = device.alloc(encoder.scratch_bytes()?.max(1))?;
    stream.fill_bytes(&scratch, 0)?;
    let packed = encoder.ranges().iter().any(|range| range.layout == Layout::Packed);
    Ok(LaneMemory {
        ids: integers(io.ids)?,
        mask: io.mask.map(integers).transpose()?,
        token_types,
        lengths: device.alloc(capacity.rows)?,
        starts: packed.then(|| device.alloc(capacity.rows)).transpose()?,
        hidden: HiddenBuffer::alloc(device, io.hidden, tokens * io.hidden_size)?,
        scratch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_rows_fill_a_rectangle_or_the_tokens_there_are() {
        assert_eq!(full_rows(BatchSize::padded(2, 3)), (vec![0, 3, 6], 6));
        assert_eq!(full_rows(BatchSize { rows: 3, longest: 4, tokens: 6 }), (vec![0, 4, 6, 6], 6));
        // Fewer rows than the tokens would fill.
        assert_eq!(full_rows(BatchSize { rows: 1, longest: 4, tokens: 6 }), (vec![0, 4], 4));
    }
}
