//! A text of 8192 tokens and what PyTorch (fp32) makes of it with a small model of each kind of positions; `scripts/make_long_references.py` wrote them.

#![allow(dead_code)] // each test file uses a part

#[path = "../common/mod.rs"]
mod common;

use common::{Cases, References, fixtures};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use tempfile::TempDir;
use trt_embed::model::ModelFolder;
use trt_embed::tokens::TokenBatch;

pub use common::MAX_HIDDEN_DIFFERENCE;

pub const TOKENS: usize = 8192;

/// Positions of a table, rotary ones with and without windows, those whose frequencies fall with the text's length or by a fixed factor, and slopes.
pub const KINDS: [&str; 6] = ["absolute", "window", "rotary", "dynamic", "ntk", "slopes"];

pub struct Long {
    name: &'static str,
    pub folder: ModelFolder,
    pub batch: TokenBatch,
    _on_disk: TempDir,
}

fn id_of(i: u64) -> i32 {
    (5 + (i * i * 31 + i * 7) % 190) as i32
}

/// Fills a table of positions as the references have it.
fn write_positions(folder: &Path) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    let table = tensors.iter_mut().find(|(name, ..)| name.contains("position_embeddings")).unwrap();
    let (rows, width) = (TOKENS + 2, table.2[1]);
    let value = |row: usize, column: usize| ((row * 7 + column * 13 + row / 64) % 33) as f32 / 32.0 - 0.5;
    let values = (0..rows).flat_map(|row| (0..width).flat_map(move |column| value(row, column).to_le_bytes()));
    *table = (table.0.clone(), Dtype::F32, vec![rows, width], values.collect());
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

impl Long {
    /// Of one of [`KINDS`].
    pub fn open(name: &'static str) -> Self {
        let cases = Cases::read_file("long.json");
        let on_disk = cases.get(name).folder();
        if name == "absolute" {
            write_positions(on_disk.path());
        }
        let folder = ModelFolder::open(on_disk.path()).unwrap();
        assert_eq!(folder.max_tokens(), TOKENS);
        let ids = (0..TOKENS as u64).map(id_of).collect();
        let batch = TokenBatch::from_ragged(ids, vec![0, TOKENS as u32], 0).unwrap();
        Self { name, folder, batch, _on_disk: on_disk }
    }

    /// The largest difference of hidden states of some tokens, and of the mean of all, from PyTorch's.
    pub fn differences(&self, states: &[f32]) -> (f32, f64) {
        let references = References::read(&fixtures().join("long.safetensors"));
        let (expected, [places, width]) = references.matrix(self.name);
        let at = references.ids("places");
        assert_eq!((at.len(), states.len()), (places, TOKENS * width));
        let of_places = at.iter().flat_map(|&place| states[place as usize * width..][..width].iter().copied());
        let furthest = of_places.zip(&expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max);
        let (expected, _) = references.matrix(&format!("{}.mean", self.name));
        let mean =
            |column: usize| states.iter().skip(column).step_by(width).map(|&value| f64::from(value)).sum::<f64>() / TOKENS as f64;
        let of_mean = expected.iter().enumerate().map(|(column, &expected)| (mean(column) - f64::from(expected)).abs());
        let found = (furthest, of_mean.fold(0.0, f64::max));
        assert!(states.iter().all(|state| state.is_finite()));
        println!("{}: states differ by {:e}, their mean by {:e}", self.name, found.0, found.1);
        found
    }
}
