//! What an executor must give to run in lanes: an encoder that reads token ids and gives hidden states, all in device memory.

use super::values::{Hidden, Integers, NormedStream};
use crate::Result;
use crate::cuda::{CudaError, Device, DeviceBuffer, Stream};
use crate::tokens::{BatchSize, SizeRange};
use half::f16;
use std::sync::Arc;

/// An encoder loaded on a GPU. Its sessions run it.
pub trait GpuEncoder: Send + Sync {
    /// The executor's name, as [`Backend::name`](crate::executor::Backend::name) gives it.
    fn name(&self) -> &'static str;

    /// Where it is loaded.
    fn device(&self) -> &Device;

    /// Its inputs and outputs.
    fn io(&self) -> EncoderIo;

    /// The ways it runs, each of which is a session of every lane. A batch runs where it costs least among those that hold it: buckets of
    /// one size, whose work is captured once, wider ranges of rectangles, or packed rows of any lengths.
    fn ranges(&self) -> &[SizeRange];

    /// Whether a row's hidden states are the same bits whatever shares its batch.
    fn is_invariant(&self) -> bool {
        false
    }

    /// The largest batch of all ranges: a lane's memory holds its rows, and the ids and hidden states of its tokens.
    fn capacity(&self) -> BatchSize {
        let most = |of: fn(BatchSize) -> usize| self.ranges().iter().map(|range| of(range.max)).max().unwrap_or(0);
        BatchSize { rows: most(|size| size.rows), longest: most(|size| size.longest), tokens: most(|size| size.tokens) }
    }

    /// Device memory for intermediate results that a session needs, in bytes: the most over all ranges. Sessions of one lane share
    /// it, because their work follows one another.
    ///
    /// # Errors
    /// What the executor says.
    fn scratch_bytes(&self) -> Result<usize>;

    /// The same encoder with smaller batches, for lanes of less memory; `None` where its batches are as small as they get.
    fn smaller(&self) -> Option<Arc<dyn GpuEncoder>> {
        None
    }

    /// The peaks of the GPU in the encoder's precision.
    fn peaks(&self) -> Peaks {
        Peaks::default()
    }

    /// A session at the range of this place in [`GpuEncoder::ranges`] that works on `stream` and reads and writes `memory`.
    ///
    /// # Errors
    /// What the executor says.
    fn session(&self, range: usize, stream: &mut Stream, memory: &LaneMemory) -> Result<Box<dyn GpuSession>>;
}

/// An encoder at one range, on one stream.
pub trait GpuSession: Send {
    /// Sets the size of the next runs, one that the range gave ([`SizeRange::fit`]). A fixed range's size is set from the start.
    ///
    /// # Errors
    /// What the executor says.
    fn set_size(&mut self, size: BatchSize) -> Result<()>;

    /// Puts one run onto the stream, or into the graph that it captures (which fixed ranges allow). It must keep alive all that
    /// the run uses ([`Stream::hold`]).
    ///
    /// # Errors
    /// What the executor says.
    fn enqueue(&mut self, stream: &mut Stream) -> Result<()>;

    /// Puts one run onto the stream whose hidden states are only pooled. Gives what they are made of where that spares writing them; `None` where
    /// [`LaneMemory::hidden`] has them.
    ///
    /// # Errors
    /// What the executor says.
    fn enqueue_for_pooling(&mut self, stream: &mut Stream) -> Result<Option<NormedStream>> {
        self.enqueue(stream)?;
        Ok(None)
    }

    /// Looks at what the last run noted, after the stream has waited: values that are not finite, say.
    ///
    /// # Errors
    /// What the executor says.
    fn check(&mut self, stream: &mut Stream) -> Result<()> {
        let _ = stream;
        Ok(())
    }

    /// What the layers or kernels of these names must move and compute at the size that was set, in the order in which they run. `None` for those of which
    /// the executor does not know.
    fn works(&self, names: &[&str]) -> Vec<Option<LayerWork>> {
        vec![None; names.len()]
    }

    /// Runs once and gives the time of each layer, in order. The session may be slower from then on.
    ///
    /// # Errors
    /// What the executor says.
    fn measure_layers(&mut self, stream: &mut Stream) -> Result<Vec<LayerTime>>;
}

/// The time that one layer took.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerTime {
    /// The executor's name for it; of a compiled graph, the nodes fused into it.
    pub name: String,
    /// Milliseconds.
    pub milliseconds: f32,
    /// What it must move and compute, where the executor knows.
    pub work: Option<LayerWork>,
}

impl LayerTime {
    /// A layer of which the work is not known.
    pub(crate) fn new(name: String, milliseconds: f32) -> Self {
        Self { name, milliseconds, work: None }
    }
}

/// The least that a piece of work moves and computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LayerWork {
    /// Bytes that are read and written, each once.
    pub bytes: u64,
    /// Multiplications and additions of products.
    pub flops: u64,
}

/// The fastest that a GPU can be, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Peaks {
    /// Bytes that its memory moves in a second.
    pub bytes_a_second: Option<f64>,
    /// Multiplications and additions in a second, in the precision of the encoder.
    pub flops: Option<f64>,
}

impl LayerWork {
    /// Microseconds that the work takes at least on a GPU of these `peaks`: the longer of moving and computing. `None` where a peak that counts is not
    /// known.
    pub fn floor_micros(&self, peaks: &Peaks) -> Option<f64> {
        let micros = |amount: u64, a_second: Option<f64>| match amount {
            0 => Some(0.0),
            amount => a_second.map(|a_second| amount as f64 / a_second * 1e6),
        };
        Some(micros(self.bytes, peaks.bytes_a_second)?.max(micros(self.flops, peaks.flops)?))
    }
}

/// The width of an integer input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntegerType {
    /// int32.
    I32,
    /// int64.
    I64,
}

/// The type of hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// fp16.
    F16,
    /// fp32.
    F32,
}

/// Inputs and outputs of an encoder, one of each for every token that is run: as a rectangle `[batch, seq]`, hidden states
/// `[batch, seq, hidden_size]`; or packed, `[tokens]` and `[tokens, hidden_size]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderIo {
    /// Token ids.
    pub ids: IntegerType,
    /// Attention mask: 1 at tokens. Packed rows have none: [`LaneMemory::starts`] and lengths say what is a row.
    pub mask: Option<IntegerType>,
    /// Token types, all 0.
    pub token_types: Option<IntegerType>,
    /// Type of the hidden states.
    pub hidden: FloatType,
    /// Width of a hidden state.
    pub hidden_size: usize,
}

/// Device memory that a lane's sessions share, each buffer large enough for every range. Lanes alone make it, and put checked ids into it.
#[cfg_attr(not(feature = "tensorrt"), allow(dead_code))] // an executor reads them
pub struct LaneMemory {
    /// Token ids.
    pub(crate) ids: IntegerBuffer,
    /// Attention mask, where the encoder takes one.
    pub(crate) mask: Option<IntegerBuffer>,
    /// Zeros, where the encoder takes token types.
    pub(crate) token_types: Option<IntegerBuffer>,
    /// Tokens of each row, `[rows]`, those of the batch that runs.
    pub(crate) lengths: DeviceBuffer<i32>,
    /// Where each row begins among the tokens, `[rows]`, for encoders that take rows packed.
    pub(crate) starts: Option<DeviceBuffer<i32>>,
    /// Hidden states.
    pub(crate) hidden: HiddenBuffer,
    /// Intermediate results, [`GpuEncoder::scratch_bytes`].
    pub(crate) scratch: DeviceBuffer<u8>,
}

/// Integers in device memory.
#[derive(Debug, Clone)]
pub enum IntegerBuffer {
    /// int32.
    I32(DeviceBuffer<i32>),
    /// int64.
    I64(DeviceBuffer<i64>),
}

/// Hidden states in device memory.
#[derive(Debug, Clone)]
pub enum HiddenBuffer {
    /// fp16.
    F16(DeviceBuffer<f16>),
    /// fp32.
    F32(DeviceBuffer<f32>),
}

impl IntegerBuffer {
    pub(super) fn alloc(device: &Device, width: IntegerType, len: usize) -> Result<Self, CudaError> {
        Ok(match width {
            IntegerType::I32 => Self::I32(device.alloc(len)?),
            IntegerType::I64 => Self::I64(device.alloc(len)?),
        })
    }

    pub(super) fn fill_bytes(&self, stream: &mut Stream, byte: u8) -> Result<(), CudaError> {
        match self {
            Self::I32(buffer) => stream.fill_bytes(buffer, byte),
            Self::I64(buffer) => stream.fill_bytes(buffer, byte),
        }
    }

    pub(super) fn integers(&self) -> Integers<'_> {
        match self {
            Self::I32(buffer) => Integers::I32(buffer),
            Self::I64(buffer) => Integers::I64(buffer),
        }
    }
}

impl HiddenBuffer {
    pub(super) fn alloc(device: &Device, float: FloatType, len: usize) -> Result<Self, CudaError> {
        Ok(match float {
            FloatType::F16 => Self::F16(device.alloc(len)?),
            FloatType::F32 => Self::F32(device.alloc(len)?),
        })
    }

    pub(super) fn hidden(&self) -> Hidden<'_> {
        match self {
            Self::F16(buffer) => Hidden::F16(buffer),
            Self::F32(buffer) => Hidden::F32(buffer),
        }
    }

    /// The first `len` values as f32.
    pub(super) fn download(&self, stream: &mut Stream, len: usize) -> Result<Vec<f32>, CudaError> {
        match self {
            Self::F16(buffer) => {
                let mut values = vec![f16::ZERO; len];
                stream.download(buffer, &mut values)?;
                Ok(values.into_iter().map(f16::to_f32).collect())
            }
            Self::F32(buffer) => {
                let mut values = vec![0.0; len];
                stream.download(buffer, &mut values)?;
                Ok(values)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_is_the_longer_of_moving_and_computing() {
        let peaks = Peaks { bytes_a_second: Some(2e12), flops: Some(5e14) };
        let floor = |bytes, flops| LayerWork { bytes, flops }.floor_micros(&peaks);
        assert_eq!([floor(4_000_000, 0), floor(4_000_000, 500_000_000)], [Some(2.0); 2]);
        assert_eq!([floor(4_000_000, 5_000_000_000), floor(0, 0)], [Some(10.0), Some(0.0)]);
        let unknown = Peaks { flops: None, ..peaks };
        let floor = |bytes, flops| LayerWork { bytes, flops }.floor_micros(&unknown);
        assert_eq!([floor(4_000_000, 0), floor(4_000_000, 1)], [Some(2.0), None]);
    }
}
