//! Encoder weights: one safetensors file or several shards, looked up by name.

use crate::model::json::shown;
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use crate::model::tensors::TensorFile;
use crate::model::{Family, TensorView};
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

/// The encoder's weight files, mapped read-only. Tensor names are looked up with or without the family's prefix.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    family: Family,
    files: Vec<TensorFile>,
    /// Which of `files` holds a tensor.
    file_of: HashMap<String, usize>,
}

impl Weights {
    /// Maps `model.safetensors` or, where it is absent, every shard that `model.safetensors.index.json` names in `folder`.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::WeightFile`] for a header that does not parse, lies outside the file or disagrees with its
    /// size, for a tensor in two shards or in none; [`Error::Config`] for an index that is not one.
    pub fn open(folder: &Path, family: Family) -> Result<Self> {
        let single = folder.join(SINGLE_FILE);
        let index = folder.join(INDEX_FILE);
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
                if !path.is_file() {
                    let next = format!("{INDEX_FILE} names it; fetch the model again").to_owned();
                    return Err(Error::NotFound { what: format!("shard {shard}"), path, next });
                }
                TensorFile::open(&path)
            })
            .collect::<Result<Vec<_>>>()?;
        let weights = Self::collect(folder, family, files)?;
        for (name, shard) in &shard_of {
            let holder = weights.file_of.get(name).and_then(|file| weights.files.get(*file));
            if holder.is_none_or(|file| file.path() != folder.join(shard)) {
                let reason = format!("{INDEX_FILE} says that it holds tensor \"{name}\", which it does not");
                return Err(Error::WeightFile { path: folder.join(shard), reason });
            }
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
        Ok(Self { folder: folder.to_path_buf(), family, files, file_of })
    }

    /// The tensor called `name` (without the family's prefix), checked against `shape`. Found as `name` or `PREFIX.name`, and with
    /// the `gamma` and `beta` that old checkpoints have for a LayerNorm's `weight` and `bias`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorType`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView> {
        let found = self.stored_name(name).and_then(|(stored, file)| file.tensor(&stored, shape).transpose());
        found.unwrap_or_else(|| {
            Err(Error::MissingTensor { name: name.to_owned(), expected: shape.to_vec(), path: self.folder.clone() })
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

    /// Values of all stored tensors together.
    pub fn parameters(&self) -> u64 {
        self.files.iter().map(TensorFile::parameters).sum()
    }

    /// Bytes of all mapped files.
    pub fn size_in_bytes(&self) -> u64 {
        self.files.iter().map(TensorFile::len).sum()
    }

    /// The name under which `name` is stored, and its file.
    fn stored_name(&self, name: &str) -> Option<(String, &TensorFile)> {
        let old = name
            .strip_suffix("LayerNorm.weight")
            .map(|stem| format!("{stem}LayerNorm.gamma"))
            .or_else(|| name.strip_suffix("LayerNorm.bias").map(|stem| format!("{stem}LayerNorm.beta")));
        [Some(name.to_owned()), old].into_iter().flatten().find_map(|name| {
            let prefixed = format!("{}.{name}", self.family.name());
            [name, prefixed].into_iter().find_map(|name| {
                let file = self.files.get(*self.file_of.get(&name)?)?;
                Some((name, file))
            })
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
