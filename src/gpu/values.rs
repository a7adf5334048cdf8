//! Device memory of either width, as kernels take it.

use crate::cuda::{Device, DeviceBuffer, Stream};

/// Hidden states `[tokens, hidden]`, row-major.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Hidden<'a> {
    /// fp16.
    F16(&'a DeviceBuffer<half::f16>),
    /// fp32.
    F32(&'a DeviceBuffer<f32>),
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
            Self::F16(_) => 8,
            Self::F32(_) => 4,
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F16(buffer) => buffer.len(),
            Self::F32(buffer) => buffer.len(),
        }
    }

    pub(super) fn address(&self) -> u64 {
        match self {
            Self::F16(buffer) => buffer.address(),
            Self::F32(buffer) => buffer.address(),
        }
    }

    pub(super) fn device(&self) -> &Device {
        match self {
            Self::F16(buffer) => buffer.device(),
            Self::F32(buffer) => buffer.device(),
        }
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
