//! One safetensors file: mapped, its header checked against the file, its tensors handed out in place.
//!
//! Format: <https://huggingface.co/docs/safetensors>: header length (u64, little-endian), header (JSON), then the tensors' bytes.

use crate::digest::of_pieces;
use crate::model::json::parse;
use crate::model::mapped::{FileId, Mapped};
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

/// One tensor: its type, its shape and its bytes, in place in its file or, where an adapter was merged, of its own.
///
/// It keeps its file mapped for as long as it lives. Cloning copies no bytes.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// F32, F16, BF16 or F64.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// Little-endian values in a file.
    Mapped { map: Arc<Mapped>, range: Range<usize> },
    /// Values made here, and which of them.
    Owned { values: Arc<[f32]>, range: Range<usize> },
}

/// Where a tensor's values come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// These bytes of a file.
    File(FileId, Range<usize>),
    /// Values made here, by the SHA-256 of their pieces.
    Values(Vec<[u8; 32]>),
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

    /// The shape of the tensor stored as `name`.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.shape.as_slice())
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
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
            return Err(Error::TensorType { name: name.to_owned(), found: info.dtype.to_string(), path: self.path.clone() });
        }
        let (begin, end) = info.data_offsets;
        let range = self.data + begin..self.data + end;
        if self.map.get(range.clone()).is_none() {
            let reason = format!("tensor \"{name}\" lies at {begin}..{end}, outside the file");
            return Err(Error::WeightFile { path: self.path.clone(), reason });
        }
        let data = Data::Mapped { map: Arc::clone(&self.map), range };
        Ok(Some(TensorView { dtype: info.dtype, shape: info.shape.clone(), data }))
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
    // Read in two steps, since the first refuses a name that stands twice.
    let tensors = parse(header).map_err(|reason| format!("header: {reason}"))?;
    let metadata: Metadata = serde_json::from_value(tensors).map_err(|error| format!("header: {error}"))?;
    let data = LENGTH_BYTES + header.len();
    let found = file.len() - data;
    if metadata.data_len() != found {
        return Err(format!("the header describes {} bytes of tensors, the file holds {found}", metadata.data_len()));
    }
    let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    Ok((data, tensors))
}

impl TensorView {
    /// A tensor of its own; `values` `[shape.product()]`.
    pub(crate) fn owned(shape: Vec<usize>, values: Vec<f32>) -> Self {
        let range = 0..values.len();
        Self { dtype: Dtype::F32, shape, data: Data::Owned { values: values.into(), range } }
    }

    /// `shape.product() * dtype size` bytes, not necessarily aligned: little-endian as stored; of merged values in the machine's own
    /// order.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            // The range was checked against this very map.
            Data::Mapped { map, range } => map.get(range.clone()).unwrap_or_default(),
            Data::Owned { values, range } => bytemuck::cast_slice(values.get(range.clone()).unwrap_or_default()),
        }
    }

    /// `count` rows (along the first axis) from row `first` on, in place: as many of them as there are.
    #[must_use]
    pub fn rows(&self, first: usize, count: usize) -> Self {
        let total = self.shape.first().copied().unwrap_or(0);
        let (first, end) = (first.min(total), first.saturating_add(count).min(total));
        let part = |range: &Range<usize>| {
            let row = range.len() / total.max(1);
            range.start + first * row..range.start + end * row
        };
        let data = match &self.data {
            Data::Mapped { map, range } => Data::Mapped { map: Arc::clone(map), range: part(range) },
            Data::Owned { values, range } => Data::Owned { values: Arc::clone(values), range: part(range) },
        };
        let shape = std::iter::once(end - first).chain(self.shape.iter().skip(1).copied()).collect();
        Self { dtype: self.dtype, shape, data }
    }

    /// Where its values come from; `None` for a file that cannot be known again. Tensors of one origin, type and shape are equal.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // weights are shared on devices
    pub(crate) fn origin(&self) -> Option<Origin> {
        match &self.data {
            Data::Mapped { map, range } => Some(Origin::File(map.id()?, range.clone())),
            Data::Owned { .. } => Some(Origin::Values(of_pieces([self.bytes()]))),
        }
    }

    /// Whether the file is still as it was when it was opened.
    ///
    /// # Errors
    /// [`Error::FileChanged`]; [`Error::Io`].
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        match &self.data {
            Data::Mapped { map, .. } => map.check_unchanged(),
            Data::Owned { .. } => Ok(()),
        }
    }

    /// The values as f32, f64 rounded; borrowed when they are stored so and aligned.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        if let Data::Owned { values, range } = &self.data {
            return Cow::Borrowed(values.get(range.clone()).unwrap_or_default());
        }
        let bytes = self.bytes();
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::F16 => Cow::Owned(pairs().map(|pair| f16::from_le_bytes(*pair)).collect::<Vec<_>>().to_f32_vec()),
            Dtype::BF16 => Cow::Owned(pairs().map(|pair| bf16::from_le_bytes(*pair)).collect::<Vec<_>>().to_f32_vec()),
            Dtype::F64 => Cow::Owned(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32).collect()),
            _ => match bytemuck::try_cast_slice(bytes) {
                Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
                _ => Cow::Owned(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
            },
        }
    }
}
