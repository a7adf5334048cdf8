//! What kernels take in device memory: hidden states, the stream that becomes them, and integers.

use crate::cuda::{Device, DeviceBuffer, Stream};

/// Hidden states `[tokens, hidden]`.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Hidden<'a> {
    /// fp16, row-major.
    F16(&'a DeviceBuffer<half::f16>),
    /// fp32, row-major.
    F32(&'a DeviceBuffer<f32>),
    /// What a stream becomes through its norm.
    Stream(&'a NormedStream),
}

/// A stream of 16-bit values and the norm that makes hidden states of it, which need not be written to be pooled.
#[derive(Debug, Clone)]
pub struct NormedStream {
    /// `[capacity, hidden]` in chunks of 64 columns, as kernels/prelude.cuh says; hidden is a multiple of 64.
    pub values: DeviceBuffer<u8>,
    /// Whether values are bf16 and not fp16.
    pub bf16: bool,
    /// Tokens that there is room for.
    pub capacity: usize,
    /// (mean, 1 / deviation) of each token.
    pub statistics: DeviceBuffer<f32>,
    /// Weight and bias of the norm, `[hidden]` each; `None` for the stream as it is, and for no bias.
    pub norm: Option<(DeviceBuffer<f32>, Option<DeviceBuffer<f32>>)>,
    /// What the encoder noted, and where the host reads it: pooling copies it.
    pub noted: [DeviceBuffer<i32>; 2],
}

/// Integers in device memory, as wide as an encoder's input.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Integers<'a> {
    /// int32.
    I32(&'a DeviceBuffer<i32>),
    /// int64.
    I64(&'a DeviceBuffer<i64>),
}

impl Hidden<'_> {
    /// Columns in 16 bytes.
    pub(super) fn lane(&self) -> usize {
        match self {
            Self::F16(_) | Self::Stream(_) => 8,
            Self::F32(_) => 4,
        }
    }

    /// Values that there is room for.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F16(buffer) => buffer.len(),
            Self::F32(buffer) => buffer.len(),
            Self::Stream(stream) => stream.values.len() / 2,
        }
    }

    pub(super) fn hold(&self, stream: &mut Stream) {
        match self {
            Self::F16(buffer) => stream.hold_buffer(buffer),
            Self::F32(buffer) => stream.hold_buffer(buffer),
            Self::Stream(NormedStream { values, statistics, norm, noted, .. }) => {
                stream.hold_buffer(values);
                let norm = norm.iter().flat_map(|(weight, bias)| [Some(weight), bias.as_ref()]).flatten();
                for buffer in norm.chain([statistics]) {
                    stream.hold_buffer(buffer);
                }
                for buffer in noted {
                    stream.hold_buffer(buffer);
                }
            }
        }
    }

    pub(super) fn address(&self) -> u64 {
        match self {
            Self::F16(buffer) => buffer.address(),
            Self::F32(buffer) => buffer.address(),
            Self::Stream(stream) => stream.values.address(),
        }
    }

    pub(super) fn device(&self) -> &Device {
        match self {
            Self::F16(buffer) => buffer.device(),
            Self::F32(buffer) => buffer.device(),
            Self::Stream(stream) => stream.values.device(),
        }
    }
}

impl NormedStream {
    /// Why `tokens` tokens of `hidden` values are not in it.
    pub(super) fn fault(&self, tokens: usize, hidden: usize) -> Option<String> {
        let Self { values, capacity, statistics, norm, noted, .. } = self;
        let short = |buffer: &DeviceBuffer<f32>, needed: usize| buffer.len() < needed;
        let fits = hidden.is_multiple_of(64)
            && tokens <= *capacity
            && capacity.checked_mul(hidden).is_some_and(|n| n <= values.len() / 2)
            && !short(statistics, 2 * tokens)
            && norm
                .iter()
                .flat_map(|(weight, bias)| [Some(weight), bias.as_ref()])
                .flatten()
                .all(|vector| !short(vector, hidden))
            && noted.iter().all(|noted| !noted.is_empty());
        (!fits).then(|| format!("{tokens} tokens of {hidden} values are not in {self:?}"))
    }
}

impl Integers<'_> {
    pub(super) fn wide(&self) -> bool {
        matches!(self, Self::I64(_))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::I32(buffer) => buffer.len(),
            Self::I64(buffer) => buffer.len(),
        }
    }

    pub(super) fn address(&self) -> u64 {
        match self {
            Self::I32(buffer) => buffer.address(),
            Self::I64(buffer) => buffer.address(),
        }
    }

    pub(super) fn device(&self) -> &Device {
        match self {
            Self::I32(buffer) => buffer.device(),
            Self::I64(buffer) => buffer.device(),
        }
    }

    pub(super) fn hold(&self, stream: &mut Stream) {
        match self {
            Self::I32(buffer) => stream.hold_buffer(buffer),
            Self::I64(buffer) => stream.hold_buffer(buffer),
        }
    }
}
