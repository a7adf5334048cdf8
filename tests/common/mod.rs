//! Parity tests' common part: the committed references, model folders built from them, and how far vectors lie apart.
#![allow(dead_code)] // each test file uses its own part

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The bars for unit vectors, against sentence-transformers in fp32.
pub const MIN_COSINE: f64 = 0.99999;
/// Largest difference of two components of unit vectors.
pub const MAX_DIFFERENCE: f32 = 1e-5;
/// Largest difference of two hidden states.
pub const MAX_HIDDEN_DIFFERENCE: f32 = 1e-4;

/// `tests/fixtures/cases.json`, written by `scripts/make_fixtures.py`, or `families.json`, by `scripts/make_family_fixtures.py`.
#[derive(Deserialize)]
pub struct Cases {
    pub texts: Vec<String>,
    pub cases: Vec<Case>,
}

/// One model folder, its settings and the tokens that each text has with them.
#[derive(Deserialize)]
pub struct Case {
    pub name: String,
    pub group: String,
    pub base: String,
    files: BTreeMap<String, serde_json::Value>,
    copies: BTreeMap<String, String>,
    pub settings: Settings,
    pub tokens: Vec<u32>,
}

#[derive(Deserialize)]
pub struct Settings {
    pub prompt: Option<String>,
    pub dim: Option<usize>,
    pub max_tokens: Option<usize>,
    pub normalize: Option<String>,
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

impl Cases {
    pub fn read() -> Self {
        Self::read_file("cases.json")
    }

    /// Those of another file of that kind.
    pub fn read_file(name: &str) -> Self {
        let path = fixtures().join(name);
        serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
    }

    /// The case of that name.
    pub fn get(&self, name: &str) -> &Case {
        self.cases.iter().find(|case| case.name == name).unwrap_or_else(|| panic!("no case {name} in cases.json"))
    }

    /// The cases of `group`; never none.
    pub fn group(&self, group: &str) -> Vec<&Case> {
        let cases: Vec<_> = self.cases.iter().filter(|case| case.group == group).collect();
        assert!(!cases.is_empty(), "no case of group {group} in cases.json");
        cases
    }
}

impl Case {
    /// Builds the case's model folder: the base, then its own files, then its copies. `materialise` in make_fixtures.py does the same.
    pub fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&fixtures().join(&self.base), folder.path());
        for (file, value) in &self.files {
            write(&folder.path().join(file), serde_json::to_string_pretty(value).unwrap().as_bytes());
        }
        for (file, part) in &self.copies {
            write(&folder.path().join(file), &std::fs::read(fixtures().join("parts").join(part)).unwrap());
        }
        folder
    }
}

pub fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A safetensors file of references.
pub struct References {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl References {
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { path: path.to_owned(), bytes }
    }

    /// The f32 tensor `name`, row-major, and its shape `[rows, columns]`.
    pub fn matrix(&self, name: &str) -> (Vec<f32>, [usize; 2]) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name} in {}: {e}", self.path.display()));
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        let shape = tensor.shape().try_into().unwrap_or_else(|_| panic!("{name} has shape {:?}", tensor.shape()));
        (tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(), shape)
    }

    /// The i32 tensor `name`.
    pub fn ids(&self, name: &str) -> Vec<i32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name} in {}: {e}", self.path.display()));
        assert_eq!(tensor.dtype(), Dtype::I32, "{name}");
        tensor.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The numbers of the texts whose tensor is called `prefix` and a number.
    pub fn numbers(&self, prefix: &str) -> Vec<usize> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let mut numbers: Vec<usize> = tensors.names().iter().filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }
}

/// How far rows lie apart, in f64.
#[derive(Debug, Clone, Copy)]
pub struct Agreement {
    /// Cosine of the row that agrees least.
    pub min_cosine: f64,
    /// Its number.
    pub worst_row: usize,
    /// Largest difference of two components.
    pub max_difference: f32,
}

/// Compares rows of `dim` values.
pub fn agreement(actual: &[f32], expected: &[f32], dim: usize) -> Agreement {
    assert_eq!(actual.len(), expected.len());
    assert!(dim > 0 && !expected.is_empty() && expected.len().is_multiple_of(dim));
    let mut result = Agreement { min_cosine: f64::INFINITY, worst_row: 0, max_difference: 0.0 };
    for (row, (a, b)) in actual.chunks_exact(dim).zip(expected.chunks_exact(dim)).enumerate() {
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        // NaN must not pass as agreement.
        if cosine.is_nan() || cosine < result.min_cosine {
            (result.min_cosine, result.worst_row) = (cosine, row);
        }
        assert!(!cosine.is_nan(), "row {row} has no direction: {a:?}");
        result.max_difference = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(result.max_difference, f32::max);
    }
    result
}

/// How far rounding alone may set two computations of a hidden state apart, in a graph of `layers` layers whose widest sum has `width` terms.
///
/// A sum of n products in fp32 errs by about sqrt(n) * 2^-24 of its terms' size: errors have random signs (Higham, Accuracy and
/// Stability of Numerical Algorithms, 2.6). About 8 such steps follow each other in a layer (query or key, scores, softmax, context,
/// output, two feed-forward matrices, LayerNorm), and LayerNorm brings terms back to size 1; independent errors add as squares.
/// 4 standard deviations hold for all but one in ten thousand values, most sums are shorter than the widest, and both sides round.
pub fn rounding(layers: usize, width: usize) -> f32 {
    let unit_roundoff = 2f32.powi(-24);
    2.0 * 4.0 * (8.0 * layers as f32).sqrt() * (width as f32).sqrt() * unit_roundoff
}

/// The same for the components of a unit vector: the mean of hidden states errs no more than they do and is about
/// sqrt(`hidden`) / 2 long.
pub fn unit_rounding(layers: usize, width: usize, hidden: usize) -> f32 {
    rounding(layers, width) / ((hidden as f32).sqrt() / 2.0)
}
