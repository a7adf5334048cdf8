//! What an executor must give to run in lanes: an encoder that reads token ids and gives hidden states, all in device memory.

use super::kernels::{Hidden, Integers};
use crate::Result;
use crate::cuda::{CudaError, Device, DeviceBuffer, Stream};
use half::f16;

/// An encoder loaded on a GPU. Its sessions run it.
pub trait GpuEncoder: Send + Sync {
    /// The executor's name, as [`Backend::name`](crate::executor::Backend::name) gives it.
    fn name(&self) -> &'static str;

    /// Where it is loaded.
    fn device(&self) -> &Device;

    /// Its inputs and outputs.
    fn io(&self) -> EncoderIo;

    /// The shapes that it serves. A session is made for one of them, by its place here.
    fn profiles(&self) -> &[ShapeRange];

    /// Device memory for intermediate results that a session needs, in bytes: the most over all profiles. Sessions of one lane share
    /// it, because their work follows one another.
    ///
    /// # Errors
    /// What the executor says.
    fn scratch_bytes(&self) -> Result<usize>;

    /// A session at `profile` that works on `stream` and reads and writes `memory`.
    ///
    /// # Errors
    /// What the executor says.
    fn session(&self, profile: usize, stream: &mut Stream, memory: &LaneMemory) -> Result<Box<dyn GpuSession>>;
}

/// An encoder at one profile, on one stream.
pub trait GpuSession: Send {
    /// Sets the shape of the next runs, which the profile must hold. A fixed profile's shape is set from the start.
    ///
    /// # Errors
    /// What the executor says.
    fn set_shape(&mut self, shape: Rectangle) -> Result<()>;

    /// Puts one run onto the stream, or into the graph that it captures (which fixed profiles allow). It must keep alive all that
    /// the run uses ([`Stream::hold`]).
    ///
    /// # Errors
    /// What the executor says.
    fn enqueue(&mut self, stream: &mut Stream) -> Result<()>;

    /// Runs once and gives the time of each layer, in order. The session may be slower from then on.
    ///
    /// # Errors
    /// What the executor says.
    fn measure_layers(&mut self, stream: &mut Stream) -> Result<Vec<LayerTime>>;
}

/// The time that one layer took.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTime {
    /// The executor's name for it; of a compiled graph, the nodes fused into it.
    pub name: String,
    /// Milliseconds.
    pub milliseconds: f32,
}

/// The size of a batch, padding included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rectangle {
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
}

/// The shapes that one profile serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ShapeRange {
    /// Smallest.
    pub min: Rectangle,
    /// Largest.
    pub max: Rectangle,
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

/// Inputs and outputs of an encoder: integers `[batch, seq]` in, hidden states `[batch, seq, hidden_size]` out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderIo {
    /// Token ids.
    pub ids: IntegerType,
    /// Attention mask: 1 at tokens.
    pub mask: Option<IntegerType>,
    /// Token types, all 0.
    pub token_types: Option<IntegerType>,
    /// Type of the hidden states.
    pub hidden: FloatType,
    /// Width of a hidden state.
    pub hidden_size: usize,
}

/// Device memory that a lane's sessions share, each buffer large enough for every profile. Lanes alone make it, and put checked ids into it.
#[cfg_attr(not(feature = "tensorrt"), allow(dead_code))] // an executor reads them
pub struct LaneMemory {
    /// Token ids.
    pub(crate) ids: IntegerBuffer,
    /// Attention mask, where the encoder takes one.
    pub(crate) mask: Option<IntegerBuffer>,
    /// Zeros, where the encoder takes token types.
    pub(crate) token_types: Option<IntegerBuffer>,
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

impl Rectangle {
    /// Tokens, padding included.
    pub fn tokens(self) -> usize {
        self.batch * self.seq
    }
}

impl std::fmt::Display for Rectangle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.batch, self.seq)
    }
}

impl ShapeRange {
    /// Whether it serves one shape only, whose work can be captured.
    pub fn is_fixed(&self) -> bool {
        self.min == self.max
    }

    /// The shape that `batch` rows of up to `seq` tokens are run at: padded up to the smallest. `None` where they do not fit.
    pub fn fit(&self, batch: usize, seq: usize) -> Option<Rectangle> {
        let fits = batch <= self.max.batch && seq <= self.max.seq;
        fits.then(|| Rectangle { batch: batch.max(self.min.batch), seq: seq.max(self.min.seq) })
    }
}

impl std::fmt::Display for ShapeRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_fixed() { self.max.fmt(f) } else { write!(f, "{}:{}", self.min, self.max) }
    }
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

    fn range(min: (usize, usize), max: (usize, usize)) -> ShapeRange {
        let rectangle = |(batch, seq)| Rectangle { batch, seq };
        ShapeRange { min: rectangle(min), max: rectangle(max) }
    }

    #[test]
    fn batches_are_padded_up_to_what_a_profile_serves() {
        let bucket = range((4, 16), (4, 16));
        assert!(bucket.is_fixed());
        assert_eq!(bucket.fit(1, 3), Some(Rectangle { batch: 4, seq: 16 }));
        assert_eq!(bucket.fit(4, 16), Some(Rectangle { batch: 4, seq: 16 }));
        assert_eq!((bucket.fit(5, 3), bucket.fit(1, 17)), (None, None));
        let wide = range((2, 8), (16, 512));
        assert!(!wide.is_fixed());
        assert_eq!(wide.fit(1, 100), Some(Rectangle { batch: 2, seq: 100 }));
        assert_eq!(wide.fit(3, 5), Some(Rectangle { batch: 3, seq: 8 }));
        assert_eq!([bucket.to_string(), wide.to_string()], ["4x16", "2x8:16x512"]);
    }
}
