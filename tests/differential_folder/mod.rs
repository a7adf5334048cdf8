//! Builds the model folders of `tests/fixtures/differential`: a base, edits of its JSON files, operations on its weights.
//! `scripts/differential` writes the set (fixtures.py) and builds the same folders (folders.py).

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// `cases.json`.
#[derive(Deserialize)]
pub struct Set {
    pub texts: Vec<String>,
    pub cases: Vec<Case>,
}

/// One folder and what is expected of it.
#[derive(Deserialize)]
pub struct Case {
    /// Family and values, as `scripts/differential --folder` takes them.
    pub name: String,
    base: String,
    /// By file: `[pointer, value]` sets, `[pointer]` removes.
    #[serde(default)]
    edits: BTreeMap<String, Vec<Vec<Value>>>,
    #[serde(default)]
    removed: Vec<String>,
    /// Whole files by path.
    #[serde(default)]
    files: BTreeMap<String, String>,
    #[serde(default)]
    weights: Vec<Vec<Value>>,
    /// Files of `parts/` by path.
    #[serde(default)]
    parts: BTreeMap<String, String>,
    /// The encoder's subfolder; empty for the root.
    #[serde(default)]
    encoder: String,
    /// Numbers of the texts whose vectors are kept under the case's name.
    #[serde(default)]
    pub texts: Vec<usize>,
    /// Words of the refusal: the file, and the key where one is at fault.
    pub refusal: Option<Vec<String>>,
}

/// A tensor of the encoder: its values in f32, and the type it is stored in.
#[derive(Clone)]
struct Stored {
    values: Vec<f32>,
    shape: Vec<usize>,
    dtype: Dtype,
}

/// How the tensors are laid out in files.
struct Layout {
    shards: usize,
    /// Names that the index has beside those of the shards.
    index: Vec<String>,
    metadata: bool,
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/differential")
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

impl Set {
    pub fn read() -> Self {
        serde_json::from_slice(&read(&root().join("cases.json"))).unwrap()
    }
}

impl Case {
    /// Writes the folder.
    pub fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let base = root().parent().unwrap().join(&self.base);
        let own = root().join(&self.base);
        for path in json_files(&base) {
            if self.removed.contains(&path) || self.files.contains_key(&path) || self.parts.contains_key(&path) {
                continue;
            }
            let source = if own.join(&path).exists() { own.join(&path) } else { base.join(&path) };
            let mut value: Value = serde_json::from_slice(&read(&source)).unwrap();
            for edit in self.edits.get(&path).into_iter().flatten() {
                apply(&mut value, edit);
            }
            write(&folder.path().join(self.place(&path)), value.to_string().as_bytes());
        }
        for (path, text) in &self.files {
            write(&folder.path().join(self.place(path)), text.as_bytes());
        }
        for (path, part) in &self.parts {
            write(&folder.path().join(self.place(path)), &read(&root().join("parts").join(part)));
        }
        self.write_weights(&base.join("model.safetensors"), folder.path());
        folder
    }

    /// Where a file is written: the encoder's move with it.
    fn place(&self, path: &str) -> String {
        let at_root = path.contains('/') || ["modules.json", "config_sentence_transformers.json"].contains(&path);
        if self.encoder.is_empty() || at_root { path.to_owned() } else { format!("{}/{path}", self.encoder) }
    }

    fn write_weights(&self, source: &Path, folder: &Path) {
        let mut tensors = stored(source);
        let mut layout = Layout { shards: 1, index: Vec::new(), metadata: true };
        for operation in &self.weights {
            operate(operation, &mut tensors, &mut layout);
        }
        let write_file = |name: &str, part: &BTreeMap<String, Stored>| {
            let bytes: Vec<(&String, Vec<u8>, &Stored)> = part.iter().map(|(name, t)| (name, t.bytes(), t)).collect();
            let views = bytes.iter().map(|(name, bytes, t)| (*name, TensorView::new(t.dtype, t.shape.clone(), bytes).unwrap()));
            let metadata = layout.metadata.then(|| HashMap::from([("format".to_owned(), "pt".to_owned())]));
            write(&folder.join(self.place(name)), &serialize(views, metadata).unwrap());
        };
        if layout.shards == 1 {
            write_file("model.safetensors", &tensors);
            return;
        }
        let mut weight_map = serde_json::Map::new();
        let mut last = String::new();
        for shard in 0..layout.shards {
            last = format!("model-{:05}-of-{:05}.safetensors", shard + 1, layout.shards);
            let part: BTreeMap<String, Stored> =
                tensors.iter().skip(shard).step_by(layout.shards).map(|(name, t)| (name.clone(), t.clone())).collect();
            weight_map.extend(part.keys().map(|name| (name.clone(), Value::from(last.clone()))));
            write_file(&last, &part);
        }
        weight_map.extend(layout.index.iter().map(|name| (name.clone(), Value::from(last.clone()))));
        let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
        write(&folder.join(self.place("model.safetensors.index.json")), index.to_string().as_bytes());
    }
}

/// The JSON files below `base`, `/` between parts.
fn json_files(base: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(base).unwrap_or_else(|e| panic!("{}: {e}", base.display())) {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(json_files(&entry.path()).into_iter().map(|inner| format!("{name}/{inner}")));
        } else if name.ends_with(".json") {
            found.push(name);
        }
    }
    found.sort();
    found
}

fn apply(document: &mut Value, edit: &[Value]) {
    let pointer = edit[0].as_str().unwrap();
    let Some((parent, key)) = pointer.rsplit_once('/') else {
        *document = edit[1].clone();
        return;
    };
    let key = key.replace("~1", "/").replace("~0", "~");
    let object = document.pointer_mut(parent).and_then(Value::as_object_mut).unwrap_or_else(|| panic!("{pointer}"));
    match edit.get(1) {
        Some(value) => object.insert(key, value.clone()),
        None => object.remove(&key),
    };
}

fn stored(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = read(path);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, tensor)| {
        let stored = match tensor.dtype() {
            Dtype::F32 => Stored {
                values: tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                shape: tensor.shape().to_vec(),
                dtype: Dtype::F32,
            },
            Dtype::I64 => positions(tensor.shape()[1]),
            other => panic!("{name} is {other:?}"),
        };
        (name, stored)
    });
    tensors.collect()
}

/// The buffer that older checkpoints carry: 0, 1, …
fn positions(count: usize) -> Stored {
    Stored { values: (0..count).map(|i| i as f32).collect(), shape: vec![1, count], dtype: Dtype::I64 }
}

impl Stored {
    fn bytes(&self) -> Vec<u8> {
        let each = self.values.iter();
        match self.dtype {
            Dtype::F16 => each.flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::BF16 => each.flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F64 => each.flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
            Dtype::I64 => each.flat_map(|&x| (x as i64).to_le_bytes()).collect(),
            _ => each.flat_map(|&x| x.to_le_bytes()).collect(),
        }
    }
}

/// One of the operations that `Folder.tensors` in folders.py lists.
fn operate(operation: &[Value], tensors: &mut BTreeMap<String, Stored>, layout: &mut Layout) {
    let text = |i: usize| operation[i].as_str().unwrap().to_owned();
    let number = |i: usize| operation[i].as_u64().unwrap() as usize;
    let renamed = |tensors: &mut BTreeMap<String, Stored>, new: &dyn Fn(String) -> String| {
        *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (new(name), tensor)).collect();
    };
    match text(0).as_str() {
        "prefix" => renamed(tensors, &|name| text(1) + &name),
        "gamma_beta" => renamed(tensors, &|name| {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        }),
        "cast" => {
            let dtype = match text(1).as_str() {
                "F16" => Dtype::F16,
                "BF16" => Dtype::BF16,
                "F64" => Dtype::F64,
                other => panic!("{other}"),
            };
            tensors.values_mut().filter(|tensor| tensor.dtype != Dtype::I64).for_each(|tensor| tensor.dtype = dtype);
        }
        "rows" => {
            let tensor = tensors.get_mut(&text(1)).unwrap();
            tensor.values.truncate(number(2) * tensor.shape[1]);
            tensor.shape[0] = number(2);
        }
        "copy" => {
            let mut tensor = tensors[&text(1)].clone();
            let scale = operation[3].as_f64().unwrap() as f32;
            tensor.values.iter_mut().for_each(|value| *value *= scale);
            tensors.insert(text(2), tensor);
        }
        "remove" => drop(tensors.remove(&text(1)).unwrap()),
        "positions" => drop(tensors.insert(text(1), positions(96))),
        "shards" => {
            layout.shards = number(1);
            layout.index = operation[2].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect();
        }
        "no_metadata" => layout.metadata = false,
        other => panic!("{other}"),
    }
}
