//! One safetensors file: mapped, its header checked against the file, its tensors handed out in place.
//!
//! Format: <https://huggingface.co/docs/safetensors>: header length (u64, little-endian), header (JSON), then the tensors' bytes.

use crate::model::mapped::Mapped;
use crate::model::pointer::{check_link, lfs_pointer};
use crate::{Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// The longest header that the format's own reader takes.
const MAX_HEADER: u64 = 100_000_000;

/// One mapped file and where its tensors lie.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    map: Arc<Mapped>,
    /// Where the tensors' bytes begin.
    data: usize,
    tensors: HashMap<String, TensorInfo>,
}

/// One tensor in place: its type, its shape and its little-endian bytes.
///
/// It keeps its file mapped for as long as it lives. Cloning copies no bytes.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// F32, F16 or BF16.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    map: Arc<Mapped>,
    range: Range<usize>,
}

impl TensorFile {
    /// Maps `path` and checks that header and file agree.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::LfsPointer`]; [`Error::DanglingLink`]; [`Error::WeightFile`] when the header does not parse, a
    /// tensor's place is not where it must be, or the file is shorter or longer than the header says.
    pub fn open(path: &Path) -> Result<Self> {
        check_link(path)?;
        let map = Mapped::open(path)?;
        if let Some(pointer) = lfs_pointer(&map) {
            return Err(pointer.error(path));
        }
        let (data, tensors) = read_header(&map).map_err(|reason| Error::WeightFile { path: path.to_path_buf(), reason })?;
        Ok(Self { path: path.to_path_buf(), map: Arc::new(map), data, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Values of all tensors together.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|info| info.shape.iter().map(|&dim| dim as u64).product::<u64>()).sum()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor stored as `name`, checked against `shape`; `None` where there is none.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Option<TensorView>> {
        let Some(info) = self.tensors.get(name) else { return Ok(None) };
        if info.shape != shape {
            return Err(Error::TensorShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
                path: self.path.clone(),
            });
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::TensorType { name: name.to_owned(), found: info.dtype.to_string(), path: self.path.clone() });
        }
        let (begin, end) = info.data_offsets;
        let range = self.data + begin..self.data + end;
        if self.map.get(range.clone()).is_none() {
            let reason = format!("tensor \"{name}\" lies at {begin}..{end}, outside the file");
            return Err(Error::WeightFile { path: self.path.clone(), reason });
        }
        Ok(Some(TensorView { dtype: info.dtype, shape: info.shape.clone(), map: Arc::clone(&self.map), range }))
    }
}

/// Where the tensors' bytes begin, and the tensors by name.
///
/// `SafeTensors::read_metadata` checks the same, but its errors carry no sizes.
fn read_header(file: &[u8]) -> Result<(usize, HashMap<String, TensorInfo>), String> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("it has {} bytes, too few for a header", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().filter(|_| length <= MAX_HEADER).and_then(|length| rest.get(..length));
    let Some(header) = header else {
        return Err(format!("the header should have {length} bytes, the file has {}", file.len()));
    };
    let metadata: Metadata = serde_json::from_slice(header).map_err(|error| format!("header: {error}"))?;
    let data = LENGTH_BYTES + header.len();
    let found = file.len() - data;
    if metadata.data_len() != found {
        return Err(format!("the header describes {} bytes of tensors, the file holds {found}", metadata.data_len()));
    }
    let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    Ok((data, tensors))
}

impl TensorView {
    /// `shape.product() * dtype size` little-endian bytes, not necessarily aligned.
    pub fn bytes(&self) -> &[u8] {
        // The range was checked against this very map.
        self.map.get(self.range.clone()).unwrap_or_default()
    }

    /// The values as f32; borrowed when they are stored so and aligned.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        let bytes = self.bytes();
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::F16 => Cow::Owned(pairs().map(|pair| f16::from_le_bytes(*pair)).collect::<Vec<_>>().to_f32_vec()),
            Dtype::BF16 => Cow::Owned(pairs().map(|pair| bf16::from_le_bytes(*pair)).collect::<Vec<_>>().to_f32_vec()),
            _ => match bytemuck::try_cast_slice(bytes) {
                Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
                _ => Cow::Owned(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
            },
        }
    }
}
