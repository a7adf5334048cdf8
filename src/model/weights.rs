//! Encoder weights: one safetensors file or several shards, looked up by name, with an adapter beside them merged.

use crate::model::adapter::Adapter;
use crate::model::json::shown;
use crate::model::pointer::check_link;
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use crate::model::stored::{check_names, encoder_tensor, is_of_encoder, spellings};
use crate::model::tensors::TensorFile;
use crate::model::{Family, TensorView};
use crate::notice::warn_once;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// The single weight file of a folder.
pub(super) const SINGLE_FILE: &str = "model.safetensors";

/// Names the shards of a folder without [`SINGLE_FILE`].
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Keys of [`INDEX_FILE`].
pub(super) static INDEX_KEYS: Schema = Schema {
    title: INDEX_FILE,
    keys: &[&[
        Key::honoured("weight_map", "the shard of every tensor; shards lie beside the index"),
        Key::harmless("metadata", "total sizes, for display"),
    ]],
    unknown: Unknown::Warn,
};

/// Weights in Python's own format, which is code to run rather than data to read.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// How to get [`SINGLE_FILE`] out of them.
pub(super) const CONVERT: &str = "convert the folder with transformers: \
     AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)";

/// The encoder's weight files, mapped read-only. Tensor names are looked up with or without the family's prefix; what an adapter
/// beside the files changes is merged when it is looked up.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    family: Family,
    files: Vec<TensorFile>,
    /// Which of `files` holds a tensor.
    file_of: HashMap<String, usize>,
    adapter: Option<Adapter>,
}

impl Weights {
    /// Maps `model.safetensors` or, where it is absent, every shard that `model.safetensors.index.json` names in `folder`.
    ///
    /// A LoRA adapter beside them is merged.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::DanglingLink`]; [`Error::LfsPointer`]; [`Error::WeightFile`] for a header that does not parse,
    /// lies outside the file or disagrees with its size, or for a tensor in two shards; [`Error::Config`] for an index that is not
    /// one, or an adapter that cannot be merged; [`Error::OtherModel`] for a tensor that only another model has.
    pub fn open(folder: &Path, family: Family) -> Result<Self> {
        Self::open_layers(folder, family, usize::MAX)
    }

    /// [`Self::open`] for an encoder of `layers` layers: those that the files hold beyond them are left unused, with a warning.
    pub(super) fn open_layers(folder: &Path, family: Family, layers: usize) -> Result<Self> {
        let mut weights = Self::open_files(folder, family)?;
        check_names(weights.tensor_names(), family, layers, folder)?;
        let base = weights.shapes(layers);
        weights.adapter = Adapter::open_if_present(folder, family, &base)?;
        Ok(weights)
    }

    /// The shapes of the tensors of an encoder of `layers` layers.
    fn shapes(&self, layers: usize) -> BTreeMap<String, Vec<usize>> {
        let names: BTreeSet<String> = self
            .tensor_names()
            .filter_map(|stored| encoder_tensor(stored, self.family))
            .filter(|name| is_of_encoder(name, self.family, layers))
            .collect();
        let shape = |name: &str| self.stored_name(name).and_then(|(stored, file)| Some(file.shape(&stored)?.to_vec()));
        names.into_iter().filter_map(|name| shape(&name).map(|shape| (name, shape))).collect()
    }

    fn open_files(folder: &Path, family: Family) -> Result<Self> {
        let single = folder.join(SINGLE_FILE);
        let index = folder.join(INDEX_FILE);
        // A link to a deleted file is no reason to read another file in its place.
        check_link(&single)?;
        check_link(&index)?;
        if single.is_file() {
            return Self::collect(folder, family, vec![TensorFile::open(&single)?]);
        }
        if !index.is_file() {
            return Err(not_found(&single));
        }
        let shard_of = read_index(&index)?;
        let shards: BTreeSet<&str> = shard_of.values().map(String::as_str).collect();
        let files = shards
            .into_iter()
            .map(|shard| {
                let path = folder.join(shard);
                check_link(&path)?;
                if !path.is_file() {
                    let next = format!("{INDEX_FILE} names it; fetch the model again").to_owned();
                    return Err(Error::NotFound { what: format!("shard {shard}"), path, next });
                }
                TensorFile::open(&path)
            })
            .collect::<Result<Vec<_>>>()?;
        let weights = Self::collect(folder, family, files)?;
        // transformers reads every shard whole; where the index disagrees with them, they count.
        let absent: Vec<&str> = shard_of.keys().map(String::as_str).filter(|name| !weights.file_of.contains_key(*name)).collect();
        if let [first, ..] = absent.as_slice() {
            let count = absent.len();
            warn_once(format!("{}: {count} tensors that it names are in no shard, \"{first}\" among them", index.display()));
        }
        Ok(weights)
    }

    fn collect(folder: &Path, family: Family, files: Vec<TensorFile>) -> Result<Self> {
        let mut file_of = HashMap::new();
        for (place, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(first) = file_of.insert(name.to_owned(), place).and_then(|first| files.get(first)) {
                    let reason = format!("tensor \"{name}\" is in {} too", first.path().display());
                    return Err(Error::WeightFile { path: file.path().to_path_buf(), reason });
                }
            }
        }
        Ok(Self { folder: folder.to_path_buf(), family, files, file_of, adapter: None })
    }

    /// The tensor called `name` (without the family's prefix), checked against `shape`. Found as `name` or `PREFIX.name`, and with
    /// the `gamma` and `beta` that old checkpoints have for a LayerNorm's `weight` and `bias`; of several spellings the one that
    /// transformers takes.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorType`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView> {
        let found = self.stored_name(name).and_then(|(stored, file)| file.tensor(&stored, shape).transpose());
        let Some(view) = found.transpose()? else {
            return Err(Error::MissingTensor { name: name.to_owned(), expected: shape.to_vec(), path: self.folder.clone() });
        };
        Ok(match &self.adapter {
            Some(adapter) => adapter.merged(name, view),
            None => view,
        })
    }

    /// Whether [`Self::tensor`] would find `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.stored_name(name).is_some()
    }

    /// Names as stored, in no particular order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Whether an adapter is merged.
    pub fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }

    /// Values of all stored tensors together, without an adapter's.
    pub fn parameters(&self) -> u64 {
        self.files.iter().map(TensorFile::parameters).sum()
    }

    /// Bytes of all mapped files.
    pub fn size_in_bytes(&self) -> u64 {
        self.files.iter().map(TensorFile::len).sum::<u64>() + self.adapter.as_ref().map_or(0, Adapter::len)
    }

    /// The name under which `name` is stored, and its file.
    fn stored_name(&self, name: &str) -> Option<(String, &TensorFile)> {
        spellings(name, self.family).into_iter().find_map(|name| {
            let file = self.files.get(*self.file_of.get(&name)?)?;
            Some((name, file))
        })
    }
}

/// The error for a folder without safetensors.
fn not_found(single: &Path) -> Error {
    let pickle = PICKLES.into_iter().find(|name| single.with_file_name(name).exists());
    let next = match pickle {
        Some(name) => format!("there is only {name}, which is not read; {CONVERT}"),
        None => format!("neither is {INDEX_FILE}; fetch the model again"),
    };
    Error::NotFound { what: SINGLE_FILE.to_owned(), path: single.to_path_buf(), next }
}

/// The shard of every tensor, from `weight_map`. Shards lie beside the index.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let json = JsonObject::read(path, &INDEX_KEYS, "fetch the model again")?;
    let Some(map) = json.object("weight_map")?.filter(|map| !map.is_empty()) else {
        return Err(json.field_error("weight_map", "an object of tensor names and file names is expected"));
    };
    map.iter()
        .map(|(name, shard)| match shard.as_str() {
            Some(file) if is_file_name(file) => Ok((name.clone(), file.to_owned())),
            _ => {
                Err(json
                    .error(format!("weight_map gives {} for \"{name}\"; a file name in this folder is expected", shown(shard))))
            }
        })
        .collect()
}

/// Whether `name` is the name of a file, and nothing that leads out of its folder on any system.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}
