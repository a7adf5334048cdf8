//! A model's weights on the device: read once from the mapped files, laid out there, with every norm folded into the linears behind it. All who run the
//! same files on one device share them, but for what depends on the longest text.

use super::attention::Bias;
use super::elementwise::DeviceRotary;
use super::kernels::{DeviceLinear, DeviceNorm, Matrix};
use super::load::{LoadJob, LoadKernels};
use super::program::{LinearId, NormId, Step};
use super::shape::{Precision, Shape, by_distance, rms};
use crate::cuda::{Device, DeviceBuffer, Stream};
use crate::model::architecture::{Layer, Linear, NormKind, Rotary};
use crate::model::{Architecture, Origin, TensorView};
use crate::shared::Registry;
use crate::{Error, Result};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a file that are on the device at a time, before they are laid out.
const PIECE: usize = 32 << 20;
/// Where each array of the one allocation begins.
const ALIGNMENT: usize = 256;

/// The weights of this process' models, by what decides them.
static WEIGHTS: Registry<Key, Weights> = Registry::new();

/// All weights of a model.
pub(super) struct DeviceModel {
    /// `[vocabulary, hidden]` in the stored type, row-major.
    pub words: DeviceBuffer<u8>,
    /// What is added to a token's row by its place, `[positions, hidden]`.
    pub added: Option<DeviceBuffer<f32>>,
    pub bias: Option<Bias>,
    /// Of each layer, where it has them.
    pub rotaries: Vec<Option<DeviceRotary>>,
    pub norms: BTreeMap<NormId, DeviceNorm>,
    linears: Vec<[DeviceLinear; 4]>,
    /// Of all of it, in bytes; shared ones count for each who shares them.
    pub bytes: usize,
    /// What the handles above are of, which is found as long as this lives.
    _shared: Arc<Weights>,
}

/// What does not depend on the longest text.
struct Weights {
    words: DeviceBuffer<u8>,
    norms: BTreeMap<NormId, DeviceNorm>,
    linears: Vec<[DeviceLinear; 4]>,
    bytes: usize,
}

/// All that decides [`Weights`].
#[derive(Debug, PartialEq)]
struct Key {
    device: usize,
    shape: Shape,
    program: Vec<Step>,
    /// Epsilon, by its bits, and formula.
    norms: Vec<(NormId, u64, NormKind)>,
    tensors: Vec<Tensor>,
}

/// A tensor as it is stored.
#[derive(Debug, PartialEq)]
struct Tensor {
    name: String,
    origin: Origin,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Key {
    /// `None` where a file cannot be known again.
    fn of(device: usize, architecture: &Architecture, program: &[Step], shape: &Shape) -> Option<Self> {
        let mut key = Self { device, shape: *shape, program: program.to_vec(), norms: Vec::new(), tensors: Vec::new() };
        let words = &architecture.embeddings.words;
        key.add(&words.name, Some(&words.rows))?;
        for id in norms_of(program) {
            if let Some(norm) = id.of(architecture).filter(|_| !key.norms.iter().any(|(of, ..)| *of == id)) {
                key.norms.push((id, norm.epsilon.to_bits(), norm.kind));
                key.add(&norm.name, Some(&norm.weight))?;
                key.add(&norm.name, norm.bias.as_ref())?;
            }
        }
        for linear in architecture.layers.iter().flat_map(parts).flatten() {
            key.add(&linear.name, Some(&linear.weight))?;
            key.add(&linear.name, linear.bias.as_ref())?;
        }
        Some(key)
    }

    fn add(&mut self, name: &str, view: Option<&TensorView>) -> Option<()> {
        if let Some(view) = view {
            let (dtype, shape) = (view.dtype, view.shape.clone());
            self.tensors.push(Tensor { name: name.to_owned(), origin: view.origin()?, dtype, shape });
        }
        Some(())
    }
}

impl DeviceModel {
    /// The weights that `program` asks for, for texts of up to `max_tokens` tokens; shared with those who have loaded the same ones and still run.
    ///
    /// # Errors
    /// [`Error::WeightValue`] for a tensor with values that are not finite, [`Error::WeightOverflow`] for those that do not fit the precision;
    /// [`Error::FileChanged`] where a file was written to meanwhile; [`Error::Cuda`], also for memory that does not suffice.
    pub fn load(
        device: &Device,
        kernels: &LoadKernels,
        (architecture, program, shape): (&Architecture, &[Step], &Shape),
        max_tokens: usize,
    ) -> Result<Self> {
        let load = || Weights::load(device, kernels, (architecture, program, shape));
        // Who finds them loaded needs not look whether the files changed since: whoever loaded them did, after the reading, and the key says that they are
        // still in that state.
        let shared = match Key::of(device.properties().ordinal, architecture, program, shape) {
            Some(key) => WEIGHTS.get_or_make(key, load)?,
            None => Arc::new(load()?),
        };
        let Weights { words, norms, linears, bytes } = &*shared;
        let mut stream = device.stream()?;
        let mut upload = |name, values: &[f32]| -> Result<DeviceBuffer<f32>> {
            let buffer = device.alloc(check_finite(name, values)?.len())?;
            stream.upload(values, &buffer)?;
            Ok(buffer)
        };
        let added = architecture.embeddings.added_rows(max_tokens).map(|rows| upload("embeddings", &rows)).transpose()?;
        let bias = by_distance(architecture, max_tokens)
            .map(|(values, reach)| {
                Ok::<_, Error>(Bias { by_distance: upload("the bias of scores", &values)?, reach, table: None })
            })
            .transpose()?;
        let mut known: Vec<(&Rotary, DeviceRotary)> = Vec::new();
        let mut rotaries = Vec::with_capacity(architecture.layers.len());
        for rotary in architecture.layers.iter().map(|layer| layer.attention.rotary.as_ref()) {
            let Some(rotary) = rotary else {
                rotaries.push(None);
                continue;
            };
            if !known.iter().any(|(of, _)| *of == rotary) {
                known.push((rotary, DeviceRotary::new(device, &mut stream, rotary, max_tokens)?));
            }
            rotaries.push(known.iter().find(|(of, _)| *of == rotary).map(|(_, made)| made.clone()));
        }
        let turns = known.iter().map(|(_, rotary)| &rotary.turns);
        let own = [added.as_ref(), bias.as_ref().map(|bias| &bias.by_distance)]
            .into_iter()
            .flatten()
            .chain(turns)
            .map(|own| own.len() * 4);
        let bytes = bytes + own.sum::<usize>();
        let (words, norms, linears) = (words.clone(), norms.clone(), linears.clone());
        Ok(Self { words, added, bias, rotaries, norms, linears, bytes, _shared: shared })
    }

    /// A linear of a layer.
    pub fn linear(&self, layer: usize, linear: LinearId) -> Option<&DeviceLinear> {
        let place = match linear {
            LinearId::Qkv => 0,
            LinearId::Output => 1,
            LinearId::Expansion => 2,
            LinearId::Contraction => 3,
        };
        self.linears.get(layer).map(|linears| &linears[place])
    }
}

impl Weights {
    /// Reads them and lays them out; they are on the device when this returns.
    fn load(
        device: &Device,
        kernels: &LoadKernels,
        (architecture, program, shape): (&Architecture, &[Step], &Shape),
    ) -> Result<Self> {
        let bytes = Sizes::of(architecture, shape).total();
        let mut loader = Loader {
            kernels,
            precision: shape.precision,
            stream: device.stream()?,
            source: device.alloc(PIECE)?,
            arena: Arena { memory: device.alloc(bytes)?, next: 0 },
            faults: device.alloc(architecture.layers.len() * 7 + 1)?,
            names: Vec::new(),
        };
        let faults = loader.faults.clone();
        loader.stream.fill_bytes(&faults, 0)?;

        let mut norms = BTreeMap::new();
        for id in norms_of(program) {
            if let Some(norm) = id.of(architecture).filter(|_| !norms.contains_key(&id)) {
                let gamma = loader.vector(&norm.name, &norm.weight)?;
                let beta = norm.bias.as_ref().map(|bias| loader.vector(&norm.name, bias)).transpose()?;
                norms.insert(id, DeviceNorm { gamma, beta, epsilon: norm.epsilon as f32, rms: rms(norm.kind) });
            }
        }
        let folded = |layer: usize, wanted: LinearId| {
            program.iter().find_map(|step| match step {
                Step::Linear { layer: of, linear, norm, .. } if *of == layer && *linear == wanted => {
                    norm.and_then(|id| norms.get(&id))
                }
                _ => None,
            })
        };
        let words = &architecture.embeddings.words;
        let words = loader.table(&words.name, &words.rows)?;
        let mut linears = Vec::with_capacity(architecture.layers.len());
        for (number, layer) in architecture.layers.iter().enumerate() {
            let [qkv, output, expansion, contraction] = parts(layer);
            linears.push([
                loader.linear(&qkv, folded(number, LinearId::Qkv))?,
                loader.linear(&output, folded(number, LinearId::Output))?,
                loader.linear(&expansion, folded(number, LinearId::Expansion))?,
                loader.linear(&contraction, folded(number, LinearId::Contraction))?,
            ]);
        }
        loader.finish()?;
        let views = architecture.linears().map(|linear| linear.weight).chain([architecture.embeddings.words.rows.clone()]);
        for view in views {
            view.check_unchanged()?;
        }
        Ok(Self { words, norms, linears, bytes })
    }
}

/// The linears of a layer, each in the parts that make it.
fn parts(layer: &Layer) -> [Vec<Linear>; 4] {
    let (gate, value) = layer.feed_forward.expansion.linears();
    [
        layer.attention.projections.linears().to_vec(),
        vec![layer.attention.output.clone()],
        [gate].into_iter().chain(value).collect(),
        vec![layer.feed_forward.output.clone()],
    ]
}

fn norms_of(program: &[Step]) -> impl Iterator<Item = NormId> {
    let of_step = |step: &Step| match *step {
        Step::Embed { norm } | Step::Linear { norm, .. } | Step::Give { norm } => [norm, None],
        Step::Normalise { norm } | Step::Measure { norm, .. } => [Some(norm), None],
        // Either of which may be missing in the architecture.
        Step::QueriesKeys { layer } => [Some(NormId::Query(layer)), Some(NormId::Key(layer))],
        Step::AddAttended { layer, norm, .. } => [Some(NormId::AttentionOutput(layer)), norm],
        Step::Attention { .. } | Step::Gate { .. } => [None, None],
    };
    program.iter().flat_map(of_step).flatten()
}

/// Values of a model's arrays, by which the one allocation is made.
struct Sizes {
    bytes: usize,
}

impl Sizes {
    fn of(architecture: &Architecture, shape: &Shape) -> Self {
        let mut sizes = Self { bytes: 0 };
        let value = shape.precision.bytes();
        let Shape { hidden, wide, .. } = *shape;
        sizes.add(architecture.vocab_size * hidden * value);
        for (outputs, inputs) in [(shape.qkv(), hidden), (hidden, hidden), (shape.expanded(), hidden), (hidden, wide)] {
            for _ in &architecture.layers {
                sizes.add(outputs * inputs * value);
                sizes.add(outputs * 4);
                sizes.add(outputs * 4);
                // A linear's own bias before its norm's is folded in, in up to three parts.
                sizes.add(outputs * 4 + 2 * ALIGNMENT);
            }
        }
        // Weight and bias of up to five norms a layer, and of two more.
        for _ in 0..2 * (5 * architecture.layers.len() + 2) {
            sizes.add(hidden * 4);
        }
        sizes
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes.next_multiple_of(ALIGNMENT);
    }

    fn total(&self) -> usize {
        self.bytes
    }
}

/// One allocation, handed out from its start.
struct Arena {
    memory: DeviceBuffer<u8>,
    next: usize,
}

impl Arena {
    fn take(&mut self, bytes: usize) -> Result<DeviceBuffer<u8>> {
        let begin = self.next;
        self.next = (begin + bytes).next_multiple_of(ALIGNMENT);
        Ok(self.memory.slice(begin..begin + bytes)?)
    }

    fn floats(&mut self, count: usize) -> Result<DeviceBuffer<f32>> {
        Ok(self.take(count * 4)?.cast()?)
    }
}

struct Loader<'a> {
    kernels: &'a LoadKernels,
    precision: Precision,
    stream: Stream,
    /// A piece of a file, before it is laid out.
    source: DeviceBuffer<u8>,
    arena: Arena,
    /// What was found in each tensor, by its place in `names`.
    faults: DeviceBuffer<i32>,
    names: Vec<String>,
}

impl Loader<'_> {
    /// A small vector, as f32.
    fn vector(&mut self, name: &str, view: &TensorView) -> Result<DeviceBuffer<f32>> {
        self.upload(name, &view.to_f32())
    }

    fn upload(&mut self, name: &str, values: &[f32]) -> Result<DeviceBuffer<f32>> {
        let buffer = self.arena.floats(check_finite(name, values)?.len())?;
        self.stream.upload(values, &buffer)?;
        Ok(buffer)
    }

    fn table(&mut self, name: &str, view: &TensorView) -> Result<DeviceBuffer<u8>> {
        let values: usize = view.shape.iter().product();
        let table = self.arena.take(values * self.precision.bytes())?;
        let fault = self.fault(name)?;
        self.rows(view, &fault, |kernels, stream, job| kernels.table(stream, &job, &table))?;
        Ok(table)
    }

    /// One linear of those in `parts`, below each other.
    fn linear(&mut self, parts: &[Linear], norm: Option<&DeviceNorm>) -> Result<DeviceLinear> {
        let outputs: usize = parts.iter().map(Linear::outputs).sum();
        let inputs = parts.first().map_or(0, Linear::inputs);
        let values = self.arena.take(outputs * inputs * self.precision.bytes())?;
        let into = DeviceLinear {
            weight: Matrix { values, capacity: outputs, columns: inputs },
            bias: self.arena.floats(outputs)?,
            sums: norm.map(|_| self.arena.floats(outputs)).transpose()?,
        };
        let mut first_of_part = 0;
        for part in parts {
            let bias = part.bias.as_ref().map(|bias| self.vector(&part.name, bias)).transpose()?;
            let fault = self.fault(&part.name)?;
            self.rows(&part.weight, &fault, |kernels, stream, job| {
                let first = job.first;
                let bias = bias.as_ref().map(|bias| bias.slice(first..first + job.rows)).transpose()?;
                let job = LoadJob {
                    first: first_of_part + first,
                    gamma: norm.map(|norm| &norm.gamma),
                    beta: norm.and_then(|norm| norm.beta.as_ref()),
                    bias: bias.as_ref(),
                    ..job
                };
                kernels.linear(stream, &job, &into)
            })?;
            first_of_part += part.outputs();
        }
        Ok(into)
    }

    /// Brings the rows of `view` to the device, piece by piece, and lets `place` lay out each and note what is wrong in `fault`.
    fn rows(
        &mut self,
        view: &TensorView,
        fault: &DeviceBuffer<i32>,
        mut place: impl FnMut(&LoadKernels, &mut Stream, LoadJob<'_>) -> crate::cuda::Result<()>,
    ) -> Result<()> {
        let (total, dtype) = (view.shape.first().copied().unwrap_or(0), dtype_number(view.dtype));
        let inputs: usize = view.shape.iter().skip(1).product();
        let bytes = view.bytes();
        let row = bytes.len() / total.max(1);
        let most = (PIECE / row.max(1)).max(1);
        for first in (0..total).step_by(most) {
            let rows = most.min(total - first);
            let piece = &bytes[first * row..(first + rows) * row];
            if piece.len() > self.source.len() {
                self.source = self.stream.device().alloc(piece.len())?;
            }
            self.stream.upload(piece, &self.source)?;
            let job = LoadJob { source: &self.source, dtype, rows, inputs, first, gamma: None, beta: None, bias: None, fault };
            place(self.kernels, &mut self.stream, job)?;
        }
        Ok(())
    }

    fn fault(&mut self, name: &str) -> Result<DeviceBuffer<i32>> {
        let place = self.names.len();
        self.names.push(name.to_owned());
        Ok(self.faults.slice(place..place + 1)?)
    }

    /// Waits, and says what was found.
    fn finish(mut self) -> Result<()> {
        let mut faults = vec![0; self.names.len()];
        self.stream.download(&self.faults, &mut faults)?;
        match faults.iter().zip(&self.names).find(|(fault, _)| **fault != 0) {
            None => Ok(()),
            Some((fault, name)) if fault & 1 != 0 => Err(not_finite(name)),
            Some((_, name)) => Err(Error::WeightOverflow { name: format!("{name}.weight"), precision: self.precision.name() }),
        }
    }
}

fn check_finite<'a>(name: &str, values: &'a [f32]) -> Result<&'a [f32]> {
    if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(not_finite(name)) }
}

fn not_finite(name: &str) -> Error {
    Error::WeightValue {
        name: name.to_owned(),
        reason: "has values that are not finite (NaN or infinity)".to_owned(),
        next: "the file is damaged: fetch it again",
    }
}

/// As load.cu numbers types of files.
fn dtype_number(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
        Dtype::F64 => 3,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "weights_tests.rs"]
mod tests;
