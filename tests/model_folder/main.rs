//! Model folders: every layout that is read, every fault that is told, and no input that panics.

mod any_input;
#[path = "../common/mod.rs"]
mod common;
mod families;
mod faults;
mod layouts;
#[path = "../tiny_model/mod.rs"]
mod tiny_model;
mod weight_files;

use serde_json::Value;
use tiny_model::Folder;
use trt_embed::Error;
use trt_embed::model::{Family, ModelFolder, Weights};

/// The family of this `model_type`.
fn family(model_type: &str) -> Family {
    Family::of_model_type(model_type).unwrap()
}

fn open(folder: &Folder) -> ModelFolder {
    ModelFolder::open(folder.path()).unwrap()
}

/// The message for opening `folder`, weights included.
fn fault(folder: &Folder) -> String {
    let opened = ModelFolder::open(folder.path()).and_then(|folder| folder.weights().map(drop));
    opened.expect_err("this folder must not open").to_string()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

/// Sets `field` of the JSON object `value`.
fn with(mut value: Value, field: &str, to: Value) -> Value {
    value[field] = to;
    value
}

/// Opens `file` as the weights of a BERT; the folder must outlive them.
fn only_weights(file: &[u8]) -> (Folder, Result<Weights, Error>) {
    let folder = Folder::empty();
    folder.write("model.safetensors", file);
    let weights = Weights::open(folder.path(), family("bert"));
    (folder, weights)
}

/// A file with `header` and `data` bytes of tensors.
fn file_with(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}
