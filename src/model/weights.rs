//! Encoder weights, memory-mapped from safetensors files.

use crate::Result;
use crate::model::Family;
use std::borrow::Cow;
use std::path::Path;

/// The encoder's weight files, mapped read-only. Tensor names are looked up with or without the family's prefix.
#[derive(Debug)]
pub struct Weights {}

/// One tensor in place: its type, its shape and its little-endian bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// F32, F16 or BF16.
    pub dtype: safetensors::Dtype,
    /// Row-major shape.
    pub shape: &'a [usize],
    /// `shape.product() * dtype size` bytes, not necessarily aligned.
    pub bytes: &'a [u8],
}

impl Weights {
    /// Maps `model.safetensors` or every shard that `model.safetensors.index.json` names in `folder`.
    ///
    /// # Errors
    /// Not found; a header that does not parse, lies outside the file or repeats a tensor; a file shorter than its header says.
    pub fn open(_folder: &Path, _family: Family) -> Result<Self> {
        todo!()
    }

    /// The tensor called `name` (without the family's prefix), checked against `shape`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`](crate::Error::MissingTensor), [`Error::TensorShape`](crate::Error::TensorShape),
    /// [`Error::TensorType`](crate::Error::TensorType).
    pub fn tensor(&self, _name: &str, _shape: &[usize]) -> Result<TensorView<'_>> {
        todo!()
    }

    /// Bytes of all mapped files.
    pub fn size_in_bytes(&self) -> u64 {
        todo!()
    }
}

impl TensorView<'_> {
    /// The values as f32; borrowed when they are stored so and aligned.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        todo!()
    }
}
