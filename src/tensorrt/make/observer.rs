//! Calibration on the GPU: an fp32 engine of the observed graph, whose further outputs come down batch by batch.
#![allow(unsafe_code)]

use super::pipeline::{EngineRequest, Gate, Job};
use super::source::GraphSource;
use crate::cuda::{Device, DeviceBuffer, HostMemory, PinnedBuffer, Stream};
use crate::graph::{Graph, Precision};
use crate::model::ModelFolder;
use crate::quantization::{Observer, Visit};
use crate::tensorrt::encoder::{HIDDEN_STATES, TensorRtEncoder};
use crate::tensorrt::engine_file::Cache;
use crate::tensorrt::library::{Arithmetic, Context, Direction, Element, Engine, Library, Profile, Runtime, Shape, misuse};
use crate::tokens::{BatchPlan, TokenBatch};
use crate::trace::stage;
use crate::{Progress, Result};
use rayon::prelude::*;
use std::sync::Arc;

/// Values of one batch, in bytes: as much device memory and as much pinned memory, whatever the model and the number of texts.
const BATCH_BYTES: usize = 512 << 20;
/// Tokens of one batch of a small model, whose values would let it have far more: by estimate enough to keep a GPU busy.
const BATCH_TOKENS: usize = 4096;
/// Rows of one batch.
const BATCH_ROWS: usize = 64;
/// The shortest longest row: samples of a few tokens share one engine.
const SHORTEST: usize = 32;
/// What errors name.
const ACTION: &str = "use the engine to calibrate";

/// Shows the tensors that feed linears, from an fp32 engine (TF32 off) on a GPU. Looking at them is spread over all cores.
pub struct TensorRtObserver {
    context: Context,
    ids: Input,
    mask: Input,
    tensors: Vec<Tensor>,
    largest: Shape,
    /// The id of padding.
    pad: i32,
    /// Rows of the token embedding table.
    vocab_size: usize,
    // Dropped last: it waits for what the others still have under way.
    stream: Stream,
}

/// An input, int32 `[batch, seq]`.
struct Input {
    place: usize,
    device: DeviceBuffer<i32>,
}

/// A tensor that feeds a linear, fp32 `[batch, seq, channels]`.
struct Tensor {
    name: String,
    channels: usize,
    device: DeviceBuffer<f32>,
    host: PinnedBuffer<f32>,
}

impl TensorRtObserver {
    /// Takes the engine of `model`'s observed graph out of `cache`, or builds it into it, and loads it. It serves rows of up to `longest`
    /// tokens, rounded up to a power of two, so that samples of similar lengths share an engine.
    ///
    /// Device memory: the weights, the values of a batch (512 MiB at most, unless one row has more) and TensorRT's intermediate
    /// results; as much pinned memory as values.
    ///
    /// # Errors
    /// As [`Graph::observed`], [`build_plan`](crate::backend::tensorrt::build_plan) and [`Engine::deserialize`]; [`Error::Cancelled`](crate::Error::Cancelled);
    /// [`Error::Io`](crate::Error::Io) where the cache cannot be written; [`Error::Cuda`](crate::Error::Cuda), also for memory that does
    /// not suffice.
    pub fn new(
        library: &Arc<Library>,
        device: &Device,
        cache: &Cache,
        model: &ModelFolder,
        longest: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let graph = Graph::new(&model.architecture()?, Precision::Fp32)?;
        let observed = graph.observed_tensors();
        let values = observed.iter().map(|(_, channels)| channels).sum();
        let profile = profile(values, longest, model.config.max_tokens())?;
        let mut request = EngineRequest::new(model);
        request.settings.arithmetic = Arithmetic::Fp32;
        request.settings.profiles = vec![profile];
        // Its vectors are not used; an fp32 engine's values are the CPU's but for rounding.
        request.gate = Gate::Off;
        let source = || GraphSource::observe(model);
        let (file, _) = Job::of_graph(library, device.into(), cache, &request, progress, source)?.cached(&request)?;

        let runtime = Runtime::new(library, device)?;
        let encoder = stage("loading the engine", || TensorRtEncoder::load(&runtime, &file))?;
        let engine = encoder.engines()[0].clone(); // never empty
        let mut stream = device.stream()?;
        // SAFETY: the ids are those of batches that `run` checks against the model's embedding table.
        let mut context = unsafe { engine.create_context(0, &mut stream, None) }?;
        let tokens = profile.max().tokens() as usize;
        let mut input = |name| -> Result<Input> {
            let place = place(&engine, name, Direction::Input, Element::I32, None)?;
            let device = device.alloc(tokens)?;
            context.set_buffer(place, &device)?;
            Ok(Input { place, device })
        };
        let (ids, mask) = (input("input_ids")?, input("attention_mask")?);
        let mut output = |name: &str, channels: usize| -> Result<DeviceBuffer<f32>> {
            let place = place(&engine, name, Direction::Output, Element::F32, Some(channels))?;
            let device = device.alloc(tokens * channels)?;
            context.set_buffer(place, &device)?;
            Ok(device)
        };
        // Nobody reads it: the context keeps it.
        output(HIDDEN_STATES[0], model.config.hidden_size)?;
        let tensor = |&(name, channels): &(&str, usize)| {
            let host = device.pinned(tokens * channels, HostMemory::Cached)?;
            Ok(Tensor { name: name.to_owned(), channels, device: output(name, channels)?, host })
        };
        let tensors = observed.iter().map(tensor).collect::<Result<_>>()?;
        Ok(Self {
            context,
            ids,
            mask,
            tensors,
            largest: profile.max(),
            pad: model.config.pad_token_id as i32,
            vocab_size: model.config.vocab_size,
            stream,
        })
    }

    /// Runs `batch` and waits until its tensors are in host memory.
    fn run(&mut self, batch: &TokenBatch) -> Result<()> {
        batch.check_ids(self.vocab_size)?;
        let shape = [batch.batch() as i64, batch.longest() as i64];
        let (ids, mask) = batch.padded(self.pad);
        for (input, values) in [(&self.ids, &ids), (&self.mask, &mask)] {
            self.context.set_input_shape(input.place, &shape)?;
            self.stream.upload(values, &input.device)?;
        }
        self.context.enqueue(&mut self.stream)?;
        for tensor in &mut self.tensors {
            let count = batch.batch() * batch.longest() * tensor.channels;
            self.stream.copy_to_host(&tensor.device, &mut tensor.host, count)?;
        }
        Ok(self.stream.synchronize()?)
    }
}

impl Observer for TensorRtObserver {
    fn plan(&self) -> BatchPlan {
        BatchPlan::new(self.largest.batch as usize, self.largest.tokens() as usize, 1)
    }

    /// One batch after the other, the tensors of each on all cores.
    ///
    /// # Errors
    /// [`Error::OutsideProfile`](crate::Error::OutsideProfile) for a batch beyond [`Observer::plan`] or the longest row;
    /// [`Error::Cuda`](crate::Error::Cuda), [`Error::TensorRt`](crate::Error::TensorRt).
    fn observe(&mut self, batches: &[TokenBatch], visit: &Visit<'_>) -> Result<()> {
        for batch in batches {
            self.run(batch)?;
            let look = |values: &mut Vec<f32>, tensor: &Tensor| -> Result<()> {
                values.resize(batch.batch() * batch.longest() * tensor.channels, 0.0);
                tensor.host.read(0, values)?;
                visit(batch, &tensor.name, values)
            };
            self.tensors.par_iter().try_for_each_init(Vec::new, look)?;
        }
        Ok(())
    }
}

/// The shapes of batches whose rows have up to `longest` tokens and whose tokens have `values` fp32 values each.
fn profile(values: usize, longest: usize, positions: usize) -> Result<Profile> {
    let seq = longest.clamp(1, positions.max(1)).next_power_of_two().max(SHORTEST).min(positions.max(1));
    let tokens = (BATCH_BYTES / (values * size_of::<f32>()).max(1)).min(BATCH_TOKENS);
    let rows = (tokens / seq).clamp(1, BATCH_ROWS);
    let side = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    let largest = Shape::new(side(rows), side(seq))?;
    Profile::new(Shape::new(1, 1)?, largest, largest)
}

/// The place in `engine` of the tensor called `name`, which must be as the observed graph has it.
fn place(engine: &Engine, name: &str, direction: Direction, element: Element, channels: Option<usize>) -> Result<usize> {
    let found = engine.tensor(name).and_then(|place| Some((place, engine.io().get(place)?)));
    let (place, tensor) = found.ok_or_else(|| misuse(ACTION, format!("it has no tensor {name}")))?;
    let width = tensor.shape.get(2).and_then(|&width| usize::try_from(width).ok());
    if (tensor.direction, tensor.element, width) != (direction, element, channels) {
        let wanted = format!("{direction:?} of {element:?} with {channels:?} channels");
        return Err(misuse(ACTION, format!("tensor {name} is {tensor:?}, expected {wanted}")));
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_hold_the_longest_row_in_bounded_memory_and_are_few() {
        // MPNet-base and all-MiniLM-L6-v2: the inputs of four groups of linears in each layer.
        let (base, mini) = (12 * (3 * 768 + 3072), 6 * (3 * 384 + 1536));
        for (values, longest, positions, expected) in [
            (base, 512, 512, "1x1:4x512:4x512"),
            (base, 100, 512, "1x1:16x128:16x128"),
            (mini, 512, 512, "1x1:8x512:8x512"),
            (mini, 300, 384, "1x1:10x384:10x384"),
            (mini, 3, 512, "1x1:64x32:64x32"),
            (mini, 3, 20, "1x1:64x20:64x20"),
            // One row alone has more: it must be held all the same.
            (1 << 20, 8192, 8192, "1x1:1x8192:1x8192"),
        ] {
            let found = profile(values, longest, positions).unwrap();
            assert_eq!(found.to_string(), expected);
            let bytes = found.max().tokens() as usize * values * 4;
            assert!(bytes <= BATCH_BYTES || found.max().batch == 1, "{found}: {bytes}");
        }
    }

    #[test]
    fn an_observed_engine_is_told_from_the_model_s_own() {
        let folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
        let own = GraphSource::export(&folder, Precision::Fp32, false).unwrap().model(&folder).unwrap();
        let observed = GraphSource::observe(&folder).unwrap().model(&folder).unwrap();
        assert_eq!(observed.source, own.source);
        assert_ne!(observed.graph, own.graph);
        assert_eq!(observed.graph, Graph::observed(&folder.architecture().unwrap()).unwrap().digest_hex());
    }
}
