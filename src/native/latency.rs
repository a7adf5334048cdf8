//! Few tokens: kernels of their own that stream the weights once, each class of tokens with its own, sized to the model when they are compiled. A checked
//! launch of a whole encoder. `kernels/latency.cu` tells the rest.
#![allow(unsafe_code)]

use super::arch::{Arch, native_source, options};
use super::kernels::{DeviceLinear, DeviceNorm, address, argument, hold};
use super::program::{LinearId, NormId};
use super::shape::{Precision, Shape};
use super::weights::DeviceModel;
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int, enqueue};
use crate::cuda::{CubinCache, CudaError, Device, DeviceBuffer, Result, Source, Stream};
use crate::gpu::LayerTime;
use crate::model::Architecture;
use crate::model::architecture::{Layer, Norm, NormKind, NormPlacement, Rotary, RotaryScaling};
use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;

/// Tokens of each class.
pub(super) const CLASSES: [usize; 4] = [16, 32, 64, 128];
const LARGEST: usize = CLASSES[CLASSES.len() - 1];
/// The size of heads that are turned by their positions.
const ROTARY_HEAD: usize = 64;
/// The class of latency16.cu; the others are of latency128.cu.
const SMALLEST: usize = 16;
/// The widest hidden state and feed-forward part whose weights fit the blocks.
const MOST_HIDDEN: usize = 1024;
const MOST_WIDE: usize = 4096;
/// The same where two blocks share it out.
const MOST_WIDE_OF_TWO: usize = 2688;
/// Where each piece of scratch memory begins.
const ALIGNMENT: usize = 1024;

/// Whether the kernels serve this architecture; the others of the engine serve more.
pub(super) fn serves(architecture: &Architecture, shape: &Shape, arch: &Arch) -> bool {
    let Shape { hidden, heads, head_size, wide, precision, gated, rotary, inner_norms, pre_norm, .. } = *shape;
    // A pre-norm layer's residual branch does not go through its norm, whose bias is folded into the linear behind.
    let norm = |norm: &Option<Norm>| {
        norm.as_ref().is_some_and(|norm| norm.kind == NormKind::LayerNorm && (pre_norm || norm.bias.is_some()))
    };
    let placement = if pre_norm { NormPlacement::Pre } else { NormPlacement::Post };
    let turned = |of: &Option<Rotary>| match of {
        None => !rotary,
        Some(rotary) => {
            let longer = matches!(rotary.scaling, RotaryScaling::DynamicNtk { trained, .. } if trained < LARGEST);
            head_size == ROTARY_HEAD && rotary.size == head_size && !longer
        }
    };
    let layer = |layer: &Layer| {
        layer.placement == placement
            && (norm(&layer.attention_norm) || pre_norm && layer.attention_norm.is_none())
            && norm(&layer.feed_forward_norm)
            && turned(&layer.attention.rotary)
    };
    arch.hopper
        && !inner_norms
        && precision != Precision::Fp32
        && hidden.is_multiple_of(128)
        && hidden <= MOST_HIDDEN
        && serves_wide(wide, gated)
        && heads.is_multiple_of(4)
        && (norm(&architecture.embeddings.norm) || pre_norm && architecture.embeddings.norm.is_none())
        && if pre_norm { norm(&architecture.final_norm) } else { architecture.final_norm.is_none() }
        && architecture.layers.iter().all(layer)
}

/// Whether blocks can share out a feed-forward part so wide: over a cluster of four, and there over up to eight warps, each of which holds its weights in
/// registers.
fn serves_wide(wide: usize, gated: bool) -> bool {
    const MOST_STEPS: usize = 5;
    let steps = wide / 128;
    let warps = (1..=8).rev().find(|warps| steps.is_multiple_of(*warps)).unwrap_or(1);
    // Gates have twice as many outputs. The way back is shared out over two blocks instead of four where there are no 256ths, which must hold the weights.
    let whole = wide.is_multiple_of(256) || gated && wide.is_multiple_of(128) && wide <= MOST_WIDE_OF_TWO;
    whole && (256..=MOST_WIDE).contains(&wide) && steps / warps <= MOST_STEPS
}

/// The kernels of a class, and how they are launched.
pub(super) struct LatencyClass {
    pub tokens: usize,
    embed: Function,
    layer: Vec<Kernel>,
    hidden: Function,
    /// Partial sums of a token's norm; none where a linear measures its input itself.
    parts: usize,
    shape: Shape,
    device: Device,
}

struct Kernel {
    which: Which,
    function: Function,
    grid: Grid,
    /// At which of its points it lets the next kernel start, as its file numbers them.
    trigger: i32,
}

/// A kernel of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Qkv,
    /// With the linear behind it in the smallest class.
    Attention,
    Output,
    Wide,
    Narrow,
}

/// Bytes of each piece of a class' scratch memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LatencyScratch {
    /// The engine's own fault, at its place in every scratch.
    fault: Range<usize>,
    stream: Range<usize>,
    attended: Range<usize>,
    qkv: Range<usize>,
    context: Range<usize>,
    wide: Range<usize>,
    /// Of the stream and of what attention left.
    measures: [Range<usize>; 2],
    spans: Range<usize>,
    pub bytes: usize,
}

impl LatencyScratch {
    fn of(shape: &Shape, tokens: usize, parts: usize) -> Self {
        let matrix = |columns: usize| tokens * columns * shape.precision.bytes();
        let mut end = 0;
        let mut piece = |bytes: usize| {
            let begin = end;
            end = (begin + bytes).next_multiple_of(ALIGNMENT);
            begin..begin + bytes
        };
        let fault = piece(4);
        let stream = piece(matrix(shape.hidden));
        let attended = piece(matrix(shape.hidden));
        let qkv = piece(matrix(shape.qkv()));
        let context = piece(matrix(shape.hidden));
        let wide = piece(matrix(shape.wide));
        let measures = [piece(tokens * parts.max(1) * 8), piece(tokens * parts.max(1) * 8)];
        let spans = piece(tokens * 8);
        Self { fault, stream, attended, qkv, context, wide, measures, spans, bytes: end }
    }
}

/// What a whole encoder reads and writes.
pub(super) struct LatencyJob<'a> {
    pub model: &'a DeviceModel,
    /// For each layer, the places that a token sees to each side; -1 for all.
    pub windows: &'a [i32],
    pub ids: &'a DeviceBuffer<i32>,
    pub starts: &'a DeviceBuffer<i32>,
    pub lengths: &'a DeviceBuffer<i32>,
    pub rows: usize,
    /// f32 `[tokens, hidden]`, padding included.
    pub hidden: &'a DeviceBuffer<f32>,
    pub scratch: &'a DeviceBuffer<u8>,
    /// Is set to 0 where a token of a row is not finite.
    pub seen: &'a DeviceBuffer<i32>,
}

impl LatencyClass {
    /// Compiles the kernels for up to `tokens` tokens of a model of `shape`, or takes them from `cache`.
    ///
    /// # Errors
    /// As [`NativeKernels::load`](super::kernels::NativeKernels::load).
    pub fn load(device: &Device, cache: &CubinCache, arch: &Arch, shape: Shape, tokens: usize) -> Result<Self> {
        let file = source_file(tokens);
        let text = native_source(file);
        let options = latency_options(&shape, tokens);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let module = Module::compile_for(device, cache, &Source::new(file, &text, &options), &arch.target)?;
        let names: &[(Which, &CStr)] = if tokens == SMALLEST {
            &[
                (Which::Qkv, c"latency16_qkv"),
                (Which::Attention, c"latency16_attention"),
                (Which::Wide, c"latency16_wide"),
                (Which::Narrow, c"latency16_narrow"),
            ]
        } else {
            &[
                (Which::Qkv, c"latency128_qkv"),
                (Which::Attention, c"latency128_attention"),
                (Which::Output, c"latency128_output"),
                (Which::Wide, c"latency128_wide"),
                (Which::Narrow, c"latency128_narrow"),
            ]
        };
        let mut launches = vec![0; 4 * names.len()];
        module.read_global(c"latency_launches", &mut launches)?;
        let mut triggers = vec![0; names.len()];
        module.read_global(c"latency_triggers", &mut triggers)?;
        let mut parts = [0];
        if tokens != SMALLEST {
            module.read_global(c"latency_parts", &mut parts)?;
        }
        let kernel = |((which, name), (launch, trigger)): (&(Which, &CStr), (&[i32], &i32))| -> Result<Kernel> {
            let [x, block, cluster, shared] = [launch[0], launch[1], launch[2], launch[3]].map(i32::cast_unsigned);
            let function = module.function_with_shared(name, shared as usize)?;
            if tokens != SMALLEST {
                function.prefer_shared()?;
            }
            Ok(Kernel {
                which: *which,
                function,
                grid: Grid { x, y: 1, block, cluster, shared, dependent: true },
                trigger: *trigger,
            })
        };
        Ok(Self {
            tokens,
            embed: module.function(c"latency_embed")?,
            layer: names.iter().zip(launches.chunks(4).zip(&triggers)).map(kernel).collect::<Result<_>>()?,
            hidden: module.function(c"latency_hidden")?,
            parts: usize::try_from(parts[0]).unwrap_or(0),
            shape,
            device: device.clone(),
        })
    }

    pub fn scratch(&self) -> LatencyScratch {
        LatencyScratch::of(&self.shape, self.tokens, self.parts)
    }

    /// Enqueues the encoder.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for buffers that are too short, weights of other sizes than the kernels', or another device.
    pub fn enqueue(self: &Arc<Self>, stream: &mut Stream, job: &LatencyJob<'_>) -> Result<()> {
        self.run(stream, job, &mut |_, _| Ok(()))
    }

    /// The time of each kernel, which runs with nothing beside it.
    ///
    /// # Errors
    /// As [`LatencyClass::enqueue`].
    pub fn measure(self: &Arc<Self>, stream: &mut Stream, job: &LatencyJob<'_>) -> Result<Vec<LayerTime>> {
        let (start, end) = (stream.device().event()?, stream.device().event()?);
        let mut times = Vec::new();
        stream.record(&start)?;
        self.run(stream, job, &mut |stream, name| {
            stream.record(&end)?;
            stream.synchronize()?;
            times.push(LayerTime::new(name, start.micros_until(&end)? / 1e3));
            stream.record(&start)
        })?;
        Ok(times)
    }

    /// Puts all kernels on the stream, and calls `after` behind each.
    fn run(
        self: &Arc<Self>,
        stream: &mut Stream,
        job: &LatencyJob<'_>,
        after: &mut dyn FnMut(&mut Stream, String) -> Result<()>,
    ) -> Result<()> {
        const CALL: &str = "run a latency class";
        let places = self.scratch();
        let Shape { hidden, .. } = self.shape;
        let tokens = self.tokens;
        let enough = job.ids.len() >= tokens
            && job.rows <= job.starts.len().min(job.lengths.len())
            && job.hidden.len() >= tokens * hidden
            && job.scratch.len() >= places.bytes
            && !job.seen.is_empty();
        if !enough {
            return Err(argument(CALL, format!("{} rows in buffers that are too short for {tokens} tokens", job.rows)));
        }
        let at = |place: &Range<usize>| job.scratch.address() + place.start as u64;
        let DeviceModel { words, added, bias, .. } = job.model;
        stream.hold(self.clone());
        hold(stream, &[Some(job.scratch), Some(words)]);
        hold(stream, &[Some(job.ids), Some(job.starts), Some(job.lengths), Some(job.seen)]);
        hold(stream, &[added.as_ref(), bias.as_ref().map(|bias| &bias.by_distance), Some(job.hidden)]);

        let measures = |of: usize| if self.parts == 0 { 0 } else { at(&places.measures[of]) };
        let mut embed = Parameters::new();
        for ids in [job.ids, job.starts, job.lengths] {
            embed.address(ids.address());
        }
        embed.int(c_int(CALL, job.rows)?);
        // Positions and types are one table of f32 rows, `added`.
        for address in [words.address(), 0, 0, added.as_ref().map_or(0, DeviceBuffer::address)] {
            embed.address(address);
        }
        embed.int(0);
        embed.address(at(&places.stream));
        embed.address(measures(0));
        embed.int(c_int(CALL, self.parts)?);
        embed.address(at(&places.spans));
        // A pre-norm encoder's stream begins behind the norm of its embeddings; a post-norm one is seen through it.
        let of_embeddings = match self.shape.pre_norm && job.model.norms.contains_key(&NormId::Embeddings) {
            true => Some(self.norm(stream, job, NormId::Embeddings)?),
            false => None,
        };
        norm_addresses(&mut embed, of_embeddings);
        embed.float(of_embeddings.map_or(1.0, |norm| norm.epsilon));
        let row = hidden.div_ceil(8).next_multiple_of(32) as u32;
        let by_token = Grid { x: tokens as u32, y: 1, block: row, cluster: 1, shared: 0, dependent: true };
        // SAFETY: latency.cu's parameters, in order; what it reads and writes is of the sizes checked above. Ids were checked against the table where the
        // batch entered, and rows are no longer than the positions, which the encoder's ranges see to.
        unsafe { self.launch(stream, &self.embed, CALL, by_token, embed) }?;
        after(stream, "embed".to_owned())?;

        for layer in 0..job.windows.len() {
            let norms = self.norms(stream, job, layer)?;
            for kernel in &self.layer {
                let parameters = self.parameters(stream, job, &places, (layer, norms), kernel)?;
                // SAFETY: latency16.cu's or latency128.cu's parameters, in order; sizes were checked above and in `linear` and `norm`, and the grid is the
                // kernel's own.
                unsafe { self.launch(stream, &kernel.function, CALL, kernel.grid, parameters) }?;
                after(stream, format!("layer {layer}: {:?}", kernel.which))?;
            }
        }

        let last = NormId::FeedForward(job.windows.len().saturating_sub(1));
        let last = self.norm(stream, job, if self.shape.pre_norm { NormId::Final } else { last })?;
        let mut give = Parameters::new();
        give.address(at(&places.stream));
        norm_addresses(&mut give, Some(last));
        give.address(at(&places.spans));
        give.float(last.epsilon);
        give.address(job.hidden.address());
        give.address(job.seen.address());
        // SAFETY: latency.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.hidden, CALL, by_token, give) }?;
        after(stream, "hidden states".to_owned())
    }

    /// The norms of a layer.
    fn norms<'a>(&self, stream: &mut Stream, job: &LatencyJob<'a>, layer: usize) -> Result<LayerNorms<'a>> {
        if self.shape.pre_norm {
            let attention = NormId::Attention(layer);
            let qkv = job.model.norms.contains_key(&attention).then(|| self.norm(stream, job, attention)).transpose()?;
            let wide = self.norm(stream, job, NormId::FeedForward(layer))?;
            return Ok(LayerNorms { qkv, output: None, wide, narrow: None });
        }
        let before = if layer == 0 { NormId::Embeddings } else { NormId::FeedForward(layer - 1) };
        let (before, attention) = (self.norm(stream, job, before)?, self.norm(stream, job, NormId::Attention(layer))?);
        Ok(LayerNorms { qkv: Some(before), output: Some(before), wide: attention, narrow: Some(attention) })
    }

    /// Those of a kernel of a layer.
    fn parameters(
        &self,
        stream: &mut Stream,
        job: &LatencyJob<'_>,
        places: &LatencyScratch,
        (layer, norms): (usize, LayerNorms<'_>),
        kernel: &Kernel,
    ) -> Result<Parameters> {
        const CALL: &str = "run a latency class";
        let at = |place: &Range<usize>| job.scratch.address() + place.start as u64;
        let [stream_measures, attended_measures] = [at(&places.measures[0]), at(&places.measures[1])];
        let Shape { hidden, wide, .. } = self.shape;
        let mut parameters = Parameters::new();
        let addresses = |parameters: &mut Parameters, of: &[u64]| of.iter().for_each(|&address| parameters.address(address));
        // Of no meaning without a norm.
        let epsilon = |norm: Option<&DeviceNorm>| norm.map_or(1.0, |norm| norm.epsilon);
        match kernel.which {
            Which::Qkv => {
                let linear = linear(stream, job, (layer, LinearId::Qkv), [3 * hidden, hidden], norms.qkv.is_some())?;
                parameters.address(at(&places.stream));
                linear_addresses(&mut parameters, linear, true);
                addresses(&mut parameters, &[at(&places.qkv), stream_measures]);
                parameters.float(epsilon(norms.qkv));
                let turns = self.turns(stream, job, layer)?;
                addresses(&mut parameters, &[address(turns), at(&places.spans)]);
            }
            Which::Attention => {
                let bias = job.model.bias.as_ref();
                addresses(&mut parameters, &[at(&places.qkv), bias.map_or(0, |bias| bias.by_distance.address())]);
                parameters.int(c_int(CALL, bias.map_or(0, |bias| bias.reach))?);
                parameters.address(at(&places.spans));
                parameters.int(job.windows.get(layer).copied().unwrap_or(-1));
                if self.tokens == SMALLEST {
                    // The linear behind it is part of it.
                    let linear = linear(stream, job, (layer, LinearId::Output), [hidden, hidden], false)?;
                    linear_addresses(&mut parameters, linear, false);
                    addresses(&mut parameters, &[at(&places.stream), stream_measures]);
                    norm_addresses(&mut parameters, norms.output);
                    parameters.address(at(&places.attended));
                } else {
                    parameters.address(at(&places.context));
                }
            }
            Which::Output => {
                let linear = linear(stream, job, (layer, LinearId::Output), [hidden, hidden], false)?;
                parameters.address(at(&places.context));
                linear_addresses(&mut parameters, linear, false);
                addresses(&mut parameters, &[at(&places.stream), stream_measures]);
                norm_addresses(&mut parameters, norms.output);
                addresses(&mut parameters, &[at(&places.attended), attended_measures]);
                parameters.float(epsilon(norms.output));
            }
            Which::Wide => {
                let outputs = self.shape.expanded();
                let linear = linear(stream, job, (layer, LinearId::Expansion), [outputs, hidden], true)?;
                parameters.address(at(&places.attended));
                linear_addresses(&mut parameters, linear, true);
                addresses(&mut parameters, &[at(&places.wide), attended_measures]);
                parameters.float(norms.wide.epsilon);
            }
            Which::Narrow => {
                let linear = linear(stream, job, (layer, LinearId::Contraction), [hidden, wide], false)?;
                parameters.address(at(&places.wide));
                linear_addresses(&mut parameters, linear, false);
                addresses(&mut parameters, &[at(&places.attended), attended_measures]);
                norm_addresses(&mut parameters, norms.narrow);
                parameters.address(at(&places.stream));
                if self.tokens != SMALLEST {
                    parameters.address(stream_measures);
                    parameters.float(epsilon(norms.narrow));
                }
            }
        }
        parameters.int(kernel.trigger);
        Ok(parameters)
    }

    /// The turns of a layer's queries and keys, for all places of the class; `None` where they are not turned.
    fn turns<'a>(&self, stream: &mut Stream, job: &LatencyJob<'a>, layer: usize) -> Result<Option<&'a DeviceBuffer<f32>>> {
        if !self.shape.rotary {
            return Ok(None);
        }
        let rotary = job.model.rotaries.get(layer).and_then(Option::as_ref);
        let rotary = rotary.filter(|rotary| {
            let all_same = rotary.frequencies.is_none() || rotary.trained >= self.tokens;
            rotary.size == self.shape.head_size && all_same
        });
        let rotary =
            rotary.ok_or_else(|| unfit(format!("layer {layer} has no rotary positions of {} values", self.shape.head_size)))?;
        hold(stream, &[Some(&rotary.turns)]);
        Ok(Some(&rotary.turns))
    }

    fn norm<'a>(&self, stream: &mut Stream, job: &LatencyJob<'a>, id: NormId) -> Result<&'a DeviceNorm> {
        let Shape { hidden, pre_norm, .. } = self.shape;
        let norm = job.model.norms.get(&id).filter(|norm| {
            let beta = norm.beta.as_ref().map_or(pre_norm, |beta| beta.len() >= hidden);
            norm.gamma.len() >= hidden && beta
        });
        let norm = norm.ok_or_else(|| unfit(format!("{id:?} is not a norm of {hidden} weights and biases")))?;
        hold(stream, &[Some(&norm.gamma), norm.beta.as_ref()]);
        Ok(norm)
    }

    /// # Safety
    /// As [`enqueue`]; the stream holds the buffers.
    unsafe fn launch(
        &self,
        stream: &mut Stream,
        function: &Function,
        during: &'static str,
        grid: Grid,
        parameters: Parameters,
    ) -> Result<()> {
        // SAFETY: the caller's promise; the function's module lives in `self`, which the stream holds.
        unsafe { enqueue(&self.device, stream, function, during, grid, parameters) }
    }
}

/// The norms of a layer: those that are folded into its linears, and those through which its residual branches see the stream (`None`: as it is).
#[derive(Debug, Clone, Copy)]
struct LayerNorms<'a> {
    qkv: Option<&'a DeviceNorm>,
    output: Option<&'a DeviceNorm>,
    wide: &'a DeviceNorm,
    narrow: Option<&'a DeviceNorm>,
}

/// A linear of these outputs and inputs, with or without a norm folded in.
fn linear<'a>(
    stream: &mut Stream,
    job: &LatencyJob<'a>,
    (layer, id): (usize, LinearId),
    [outputs, inputs]: [usize; 2],
    normed: bool,
) -> Result<&'a DeviceLinear> {
    let linear = job.model.linear(layer, id).filter(|linear| {
        (linear.weight.capacity, linear.weight.columns) == (outputs, inputs)
            && linear.bias.len() >= outputs
            && linear.sums.is_some() == normed
            && linear.sums.as_ref().is_none_or(|sums| sums.len() >= outputs)
    });
    let linear =
        linear.ok_or_else(|| unfit(format!("{id:?} of layer {layer} is not of {outputs} outputs and {inputs} inputs")))?;
    hold(stream, &[Some(&linear.weight.values)]);
    hold(stream, &[Some(&linear.bias), linear.sums.as_ref()]);
    Ok(linear)
}

/// Weight and bias, and the sums of the weight's rows where a norm is folded in.
fn linear_addresses(parameters: &mut Parameters, linear: &DeviceLinear, normed: bool) {
    parameters.address(linear.weight.values.address());
    parameters.address(linear.bias.address());
    if normed {
        parameters.address(address(linear.sums.as_ref()));
    }
}

fn norm_addresses(parameters: &mut Parameters, norm: Option<&DeviceNorm>) {
    parameters.address(address(norm.map(|norm| &norm.gamma)));
    parameters.address(address(norm.and_then(|norm| norm.beta.as_ref())));
}

fn unfit(reason: String) -> CudaError {
    argument("run a latency class", reason)
}

/// The kernel file of the class of so many tokens.
pub(super) fn source_file(tokens: usize) -> &'static str {
    if tokens == SMALLEST { "latency16.cu" } else { "latency128.cu" }
}

/// NVRTC's options for a class.
pub(super) fn latency_options(shape: &Shape, tokens: usize) -> Vec<String> {
    let Shape { hidden, heads, head_size, wide, .. } = *shape;
    let mut options = options(shape.precision, shape.activation);
    let sizes = [("HIDDEN", hidden), ("HEADS", heads), ("HEAD_SIZE", head_size), ("WIDE", wide), ("TOKENS", tokens)];
    options.extend(sizes.iter().map(|(name, size)| format!("-D{name}={size}")));
    let kinds = [("PRENORM", shape.pre_norm), ("GATED", shape.gated), ("ROTARY", shape.rotary)];
    options.extend(kinds.iter().map(|(name, is)| format!("-D{name}={}", i32::from(*is))));
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelFolder;
    use crate::model::architecture::Reach;
    use proptest::prelude::*;
    use std::path::Path;

    fn hopper() -> Arch {
        Arch { target: "sm_90a".to_owned(), hopper: true, dependent: true }
    }

    #[test]
    fn post_norm_encoders_of_whole_tiles_are_served() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mpnet");
        let architecture = ModelFolder::open(&folder).unwrap().architecture().unwrap();
        let shape = Shape::as_bert(768, 12, 3072, Precision::Fp16);
        assert!(serves(&architecture, &shape, &hopper()));
        assert!(serves(&architecture, &Shape { precision: Precision::Bf16, ..shape }, &hopper()));
        for other in [
            Shape { precision: Precision::Fp32, ..shape },
            Shape { hidden: 704, heads: 11, ..shape },
            Shape { hidden: 192, heads: 6, head_size: 32, ..shape },
            Shape { hidden: 1152, heads: 36, head_size: 32, ..shape },
            Shape { wide: 3008, ..shape },
            // Too wide, no whole tiles, and a prime number of steps.
            Shape { wide: 4352, ..shape },
            Shape { wide: 640, ..shape },
            Shape { wide: 13 * 256, ..shape },
        ] {
            assert!(!serves(&architecture, &other, &hopper()), "{other:?}");
        }
        assert!(!serves(&architecture, &shape, &Arch { hopper: false, ..hopper() }));
        let changed = |change: fn(&mut Architecture)| {
            let mut changed = architecture.clone();
            change(&mut changed);
            serves(&changed, &shape, &hopper())
        };
        assert!(changed(|_| ()));
        assert!(!changed(|architecture| architecture.embeddings.norm = None));
        assert!(!changed(|architecture| architecture.final_norm = architecture.embeddings.norm.clone()));
        assert!(changed(|architecture| architecture.layers[1].attention.reach = Reach::Window(3)));
        assert!(!changed(|architecture| architecture.layers[0].placement = NormPlacement::Pre));
        assert!(!changed(|architecture| architecture.layers[2].feed_forward_norm = None));
        assert!(!changed(|architecture| architecture.layers[0].attention_norm.as_mut().unwrap().bias = None));
        assert!(!changed(|architecture| architecture.layers[0].attention_norm.as_mut().unwrap().kind = NormKind::RmsNorm));
    }

    #[test]
    fn pre_norm_gates_and_rotary_positions_are_served() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/modernbert");
        let architecture = ModelFolder::open(&folder).unwrap().architecture().unwrap();
        let base = Shape { gated: true, rotary: true, pre_norm: true, ..Shape::as_bert(768, 12, 1152, Precision::Fp16) };
        let turned = |change: fn(&mut Architecture)| {
            let mut changed = architecture.clone();
            for layer in &mut changed.layers {
                layer.attention.rotary.as_mut().unwrap().size = 64;
            }
            change(&mut changed);
            changed
        };
        let serves = |change| serves(&turned(change), &base, &hopper());
        assert!(serves(|_| ()));
        assert!(serves(|a| a.layers[1].attention_norm = None));
        assert!(serves(|a| a.layers[1].feed_forward_norm.as_mut().unwrap().bias = None));
        assert!(serves(|a| a.embeddings.norm = None));
        assert!(serves(
            |a| a.layers[1].attention.rotary.as_mut().unwrap().scaling = RotaryScaling::DynamicNtk { factor: 2.0, trained: 128 }
        ));
        assert!(!serves(
            |a| a.layers[1].attention.rotary.as_mut().unwrap().scaling = RotaryScaling::DynamicNtk { factor: 2.0, trained: 127 }
        ));
        assert!(!serves(|a| a.layers[1].attention.rotary.as_mut().unwrap().size = 32));
        assert!(!serves(|a| a.final_norm = None));
        assert!(!serves(|a| a.layers[1].feed_forward_norm = None));
        assert!(!serves(|a| a.layers[1].placement = NormPlacement::Post));
        for other in [
            Shape { pre_norm: false, ..base },
            Shape { inner_norms: true, ..base },
            Shape { wide: 3200, ..base },
            Shape { wide: 1152 + 64, ..base },
            // Heads of 32 have the halves that are turned with each other in other lanes.
            Shape { heads: 24, head_size: 32, ..base },
        ] {
            assert!(!super::serves(&turned(|_| ()), &other, &hopper()), "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_of_scratch_do_not_overlap(class in 0usize..4, hidden in 1usize..9, wide in 1usize..33, parts in 0usize..65) {
            let shape = Shape { head_size: 64, ..Shape::as_bert(hidden * 128, 4, wide * 128, Precision::Fp16) };
            let LatencyScratch { fault, stream, attended, qkv, context, wide, measures: [first, second], spans, bytes } =
                LatencyScratch::of(&shape, CLASSES[class], parts);
            let all = [&fault, &stream, &attended, &qkv, &context, &wide, &first, &second, &spans];
            prop_assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start && pair[1].start.is_multiple_of(ALIGNMENT)));
            prop_assert!(all.iter().all(|piece| !piece.is_empty()) && spans.end <= bytes);
            prop_assert_eq!(fault, 0..4);
        }
    }
}
