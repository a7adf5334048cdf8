//! A tiny sentence-transformers folder, written file by file, for the tests of folders and of the hub.
#![allow(dead_code)] // each test file uses a part

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Width of the tiny encoder's hidden states.
pub const HIDDEN: usize = 4;

/// A folder that tests add files to.
pub struct Folder(TempDir);

impl Folder {
    pub fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// modules.json with Transformer, mean Pooling and Normalize, in the spelling of the published models.
    pub fn sentence_transformers() -> Self {
        let folder = Self::plain();
        folder.json("modules.json", &old_modules());
        folder.json("1_Pooling/config.json", &pooling(&["mean_tokens"]));
        folder.json("sentence_bert_config.json", &json!({"max_seq_length": 12, "do_lower_case": false}));
        folder
    }

    /// A Hugging Face folder without modules.json.
    pub fn plain() -> Self {
        let folder = Self::empty();
        folder.json("config.json", &bert());
        folder.write("tokenizer.json", b"{}");
        folder.write("model.safetensors", &weights(&[("embeddings.LayerNorm.weight", &[HIDDEN], &[1.0, 2.0, 3.0, 4.0])]));
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    pub fn json(&self, name: &str, value: &Value) {
        self.write(name, value.to_string().as_bytes());
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.join(name)).unwrap();
    }

    /// A Dense module in `name` from `inputs` to `outputs`: all weights 0.5, bias 0.25.
    pub fn dense(&self, name: &str, inputs: usize, outputs: usize, activation: &str) {
        let config = json!({"in_features": inputs, "out_features": outputs, "bias": true, "activation_function": activation});
        self.json(&format!("{name}/config.json"), &config);
        let tensors = [
            ("linear.weight", &[outputs, inputs][..], &vec![0.5; outputs * inputs][..]),
            ("linear.bias", &[outputs][..], &vec![0.25; outputs][..]),
        ];
        self.write(&format!("{name}/model.safetensors"), &weights(&tensors));
    }
}

pub fn bert() -> Value {
    json!({
        "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "vocab_size": 10, "max_position_embeddings": 16
    })
}

pub fn mpnet() -> Value {
    let mut config = bert();
    config["model_type"] = json!("mpnet");
    config
}

pub fn module(class: &str, path: &str) -> Value {
    json!({"idx": 0, "name": format!("{path} {class}"), "path": path, "type": class})
}

pub fn old_modules() -> Value {
    json!([
        module("sentence_transformers.models.Transformer", ""),
        module("sentence_transformers.models.Pooling", "1_Pooling"),
        module("sentence_transformers.models.Normalize", "2_Normalize"),
    ])
}

/// The Pooling module's six booleans, true for `modes` (the end of each field's name).
pub fn pooling(modes: &[&str]) -> Value {
    let mut config = json!({"word_embedding_dimension": HIDDEN});
    for mode in ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"] {
        config[format!("pooling_mode_{mode}")] = json!(modes.contains(&mode));
    }
    config
}

/// A safetensors file of f32 tensors.
pub fn weights(tensors: &[(&str, &[usize], &[f32])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| (*name, Dtype::F32, *shape, bytes.as_slice()));
    weights_of(views)
}

/// A safetensors file of tensors given as bytes.
pub fn weights_of<'a>(tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>) -> Vec<u8> {
    let views: Vec<_> = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap()))
        .collect();
    safetensors::serialize(views, None).unwrap()
}
