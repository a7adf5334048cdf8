//! A TensorRT engine as an encoder that lanes run: which of its tensors is what, and a context for each profile of each lane.
#![allow(unsafe_code)]

use super::engine_file::EngineFile;
use super::library::{Context, Direction, Element, Engine, IoTensor, Runtime};
use crate::cuda::{Device, DeviceBuffer, Stream};
use crate::gpu::{EncoderIo, FloatType, GpuEncoder, GpuSession, HiddenBuffer, IntegerBuffer, IntegerType, LaneMemory, LayerTime};
use crate::tokens::{BatchSize, SizeRange};
use crate::{Error, Result};
use std::sync::Arc;

/// Names that exporters give to hidden states, in the order they are looked for: ours and transformers', then sentence-transformers'.
pub(super) const HIDDEN_STATES: [&str; 2] = ["last_hidden_state", "token_embeddings"];

/// Engines of one graph whose inputs are token ids (with mask and token types) and whose output is hidden states: one engine for all
/// profiles, or one for each.
pub struct TensorRtEncoder {
    engines: Vec<Arc<Engine>>,
    io: EncoderIo,
    tensors: Tensors,
    profiles: Vec<SizeRange>,
    /// Of each profile: which engine serves it, and the profile's place there.
    places: Vec<(usize, usize)>,
}

/// Places of the tensors in each engine.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tensors {
    ids: usize,
    mask: Option<usize>,
    token_types: Option<usize>,
    hidden: usize,
    /// Outputs that nobody asked for, which need memory all the same.
    others: Vec<usize>,
}

struct Session {
    context: Context,
    inputs: Vec<usize>,
}

impl TensorRtEncoder {
    /// Loads the plans of an engine file, and checks that they are what its manifest says.
    ///
    /// # Errors
    /// See [`EngineFile::load`], [`TensorRtEncoder::new`] and [`Manifest::check_plan`](super::Manifest::check_plan).
    pub fn load(runtime: &Arc<Runtime>, file: &EngineFile) -> Result<Self> {
        let encoder = Self::join(file.load(runtime)?)?;
        let profiles = encoder.engines.iter().flat_map(|engine| engine.profiles());
        file.manifest.check_plan(profiles, encoder.io.hidden_size)?;
        Ok(encoder)
    }

    /// One encoder of engines that were built from the same graph, profiles in their order.
    fn join(engines: Vec<Arc<Engine>>) -> Result<Self> {
        let mut parts = engines.into_iter().map(Self::new);
        let mut whole = parts.next().unwrap_or_else(|| Err(unfit("it holds no plan".into())))?;
        for part in parts {
            let part = part?;
            if part.io != whole.io || part.tensors != whole.tensors {
                return Err(unfit("its plans have different inputs and outputs".into()));
            }
            let number = whole.engines.len();
            whole.places.extend(part.places.iter().map(|&(_, profile)| (number, profile)));
            whole.profiles.extend(part.profiles);
            whole.engines.extend(part.engines);
        }
        Ok(whole)
    }

    /// Finds the tensors of `engine`: inputs `input_ids`, `attention_mask` and `token_type_ids` (the last two may be missing), int32 or
    /// int64 `[batch, seq]`; an output `last_hidden_state` or `token_embeddings`, fp16 or fp32 `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for an engine with other inputs or without such an output.
    pub fn new(engine: Arc<Engine>) -> Result<Self> {
        let (mut ids, mut mask, mut token_types) = (None, None, None);
        for (place, tensor) in engine.io().iter().enumerate().filter(|(_, tensor)| tensor.direction == Direction::Input) {
            match tensor.name.as_str() {
                "input_ids" => ids = Some((place, integer(tensor)?)),
                "attention_mask" => mask = Some((place, integer(tensor)?)),
                "token_type_ids" => token_types = Some((place, integer(tensor)?)),
                other => return Err(unfit(format!("input {other} is none of input_ids, attention_mask, token_type_ids"))),
            }
        }
        let (ids, id_type) = ids.ok_or_else(|| unfit("it has no input input_ids".into()))?;
        let hidden = HIDDEN_STATES
            .iter()
            .find_map(|name| engine.tensor(name))
            .ok_or_else(|| unfit(format!("it has none of the outputs {}", HIDDEN_STATES.join(", "))))?;
        let tensor = &engine.io()[hidden];
        let hidden_size = match (tensor.shape.as_slice(), tensor.direction) {
            (&[_, _, size], Direction::Output) if size > 0 => usize::try_from(size).unwrap_or(0),
            (shape, _) => return Err(unfit(format!("{} {shape:?} is no output [batch, seq, hidden]", tensor.name))),
        };
        let float = match tensor.element {
            Element::F16 => FloatType::F16,
            Element::F32 => FloatType::F32,
            other => return Err(unfit(format!("{} is {other:?}; fp16 and fp32 are pooled", tensor.name))),
        };
        let others = engine.io().iter().enumerate();
        let others = others.filter(|(place, tensor)| tensor.direction == Direction::Output && *place != hidden);
        let tensors = Tensors {
            ids,
            mask: mask.map(|(place, _)| place),
            token_types: token_types.map(|(place, _)| place),
            hidden,
            others: others.map(|(place, _)| place).collect(),
        };
        let io = EncoderIo {
            ids: id_type,
            mask: mask.map(|(_, width)| width),
            token_types: token_types.map(|(_, width)| width),
            hidden: float,
            hidden_size,
        };
        let profiles = engine
            .profiles()
            .iter()
            .map(|ranges| {
                let range = ranges.iter().find(|range| range.tensor == ids);
                let range = range.ok_or_else(|| unfit("a profile says nothing of input_ids".into()))?;
                Ok(SizeRange::padded(rectangle(&range.min)?, rectangle(&range.max)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let places = (0..profiles.len()).map(|profile| (0, profile)).collect();
        Ok(Self { engines: vec![engine], io, tensors, profiles, places })
    }

    /// The engines.
    pub fn engines(&self) -> &[Arc<Engine>] {
        &self.engines
    }
}

impl GpuEncoder for TensorRtEncoder {
    fn name(&self) -> &'static str {
        "tensorrt"
    }

    fn device(&self) -> &Device {
        self.engines[0].runtime().device() // never empty
    }

    fn io(&self) -> EncoderIo {
        self.io
    }

    fn ranges(&self) -> &[SizeRange] {
        &self.profiles
    }

    fn scratch_bytes(&self) -> Result<usize> {
        let bytes = self.places.iter().map(|&(engine, profile)| self.engines[engine].scratch_bytes(profile));
        bytes.into_iter().try_fold(0, |most, bytes| Ok(most.max(bytes?)))
    }

    fn session(&self, range: usize, stream: &mut Stream, memory: &LaneMemory) -> Result<Box<dyn GpuSession>> {
        let place = self.places.get(range).ok_or_else(|| unfit(format!("it has no profile number {range}")))?;
        let engine = &self.engines[place.0];
        // SAFETY: the inputs are a lane's memory, which only `Kernels::stage` writes: ids of batches that were checked against the model's
        // embedding table, and padding.
        let mut context = unsafe { engine.create_context(place.1, stream, Some(memory.scratch.clone())) }?;
        let Tensors { ids, mask, token_types, hidden, others } = &self.tensors;
        set_integers(&mut context, *ids, &memory.ids)?;
        for (tensor, buffer) in [(mask, &memory.mask), (token_types, &memory.token_types)] {
            if let (Some(tensor), Some(buffer)) = (tensor, buffer) {
                set_integers(&mut context, *tensor, buffer)?;
            }
        }
        match &memory.hidden {
            HiddenBuffer::F16(buffer) => context.set_buffer(*hidden, buffer)?,
            HiddenBuffer::F32(buffer) => context.set_buffer(*hidden, buffer)?,
        }
        for &other in others {
            let values = context.shape(other)?.into_iter().map(|size| usize::try_from(size).unwrap_or(0)).product::<usize>();
            // No element is wider than 8 bytes.
            let unread: DeviceBuffer<u8> = self.device().alloc(values.saturating_mul(8).max(1))?;
            context.set_buffer(other, &unread)?;
        }
        let inputs = [Some(*ids), *mask, *token_types].into_iter().flatten().collect();
        Ok(Box::new(Session { context, inputs }))
    }
}

impl GpuSession for Session {
    fn set_size(&mut self, size: BatchSize) -> Result<()> {
        let dims = [size.rows as i64, size.longest as i64];
        self.inputs.iter().try_for_each(|&input| self.context.set_input_shape(input, &dims))
    }

    fn enqueue(&mut self, stream: &mut Stream) -> Result<()> {
        self.context.enqueue(stream)
    }

    fn measure_layers(&mut self, stream: &mut Stream) -> Result<Vec<LayerTime>> {
        self.context.measure_layers(stream)
    }
}

fn set_integers(context: &mut Context, tensor: usize, buffer: &IntegerBuffer) -> Result<()> {
    match buffer {
        IntegerBuffer::I32(buffer) => context.set_buffer(tensor, buffer),
        IntegerBuffer::I64(buffer) => context.set_buffer(tensor, buffer),
    }
}

fn integer(tensor: &IoTensor) -> Result<IntegerType> {
    match (tensor.element, tensor.shape.len()) {
        (Element::I32, 2) => Ok(IntegerType::I32),
        (Element::I64, 2) => Ok(IntegerType::I64),
        (element, _) => Err(unfit(format!("input {} is {element:?} {:?}, not integers [batch, seq]", tensor.name, tensor.shape))),
    }
}

/// Rows and tokens of a row.
fn rectangle(dims: &[i64]) -> Result<(usize, usize)> {
    let side = |size: i64| usize::try_from(size).ok().filter(|&size| size > 0);
    match *dims {
        [batch, seq] => side(batch).zip(side(seq)),
        _ => None,
    }
    .ok_or_else(|| unfit(format!("a profile's shape is {dims:?}, not [batch, seq]")))
}

fn unfit(reason: String) -> Error {
    Error::TensorRt {
        action: "use the engine as an encoder",
        reason,
        next: "Build it from a graph exported by this crate, or by Optimum for feature extraction.",
    }
}
