//! What decides a model's weights, and that they are shared.

use super::*;
use crate::cuda::CubinCache;
use crate::model::ModelFolder;
use crate::native::program::program;
use crate::native::test_support::{arch, device};
use std::path::Path;

fn fixture(name: &str) -> Architecture {
    opened(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
}

fn opened(folder: &Path) -> Architecture {
    ModelFolder::open(folder).unwrap().architecture().unwrap()
}

fn key_on(device: usize, architecture: &Architecture, precision: Precision) -> Key {
    let shape = Shape { precision, ..Shape::of(architecture, Precision::Fp32).unwrap() };
    Key::of(device, architecture, &program(architecture), &shape).unwrap()
}

fn key(architecture: &Architecture) -> Key {
    key_on(0, architecture, Precision::Fp32)
}

/// A folder with the files of `fixtures/bert`.
fn copied() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert");
    for entry in std::fs::read_dir(from).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    for folder in ["1_Pooling", "2_Normalize", "2_Dense", "3_Normalize"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert").join(folder);
        if from.is_dir() {
            std::fs::create_dir(copy.path().join(folder)).unwrap();
            for entry in std::fs::read_dir(from).unwrap().flatten() {
                std::fs::copy(entry.path(), copy.path().join(folder).join(entry.file_name())).unwrap();
            }
        }
    }
    copy
}

#[test]
fn the_same_files_have_the_same_key_and_nothing_else_has() {
    for name in ["bert", "mpnet", "mpnet-bf16-shards"] {
        assert_eq!(key(&fixture(name)), key(&fixture(name)), "{name}");
    }
    let bert = fixture("bert");
    let first = key(&bert);
    assert_ne!(key(&fixture("mpnet")), first);
    assert_ne!(key_on(1, &bert, Precision::Fp32), first);
    assert_ne!(key_on(0, &bert, Precision::Bf16), first);

    let mut changed = bert.clone();
    changed.layers[1].attention_norm.as_mut().unwrap().epsilon *= 2.0;
    assert_ne!(key(&changed), first);
    let mut changed = bert.clone();
    changed.layers.swap(0, 1);
    assert_ne!(key(&changed), first);
    let mut changed = bert.clone();
    changed.layers[0].feed_forward.output.bias = None;
    assert_ne!(key(&changed), first);
    let mut changed = bert.clone();
    changed.layers.pop();
    assert_ne!(key(&changed), first);
}

#[test]
fn a_copy_and_a_file_that_was_written_to_are_others() {
    let copy = copied();
    let first = key(&opened(copy.path()));
    assert_ne!(first, key(&fixture("bert")));
    assert_eq!(first, key(&opened(copy.path())));
    let weights = copy.path().join("model.safetensors");
    let later = std::fs::metadata(&weights).unwrap().modified().unwrap() + std::time::Duration::from_secs(3);
    std::fs::File::options().append(true).open(&weights).unwrap().set_modified(later).unwrap();
    assert_ne!(key(&opened(copy.path())), first);
}

/// Values that are not in a file, as those that an adapter changed, are known by their contents.
#[test]
fn merged_values_are_known_by_what_they_are() {
    let merged = |value: f32| {
        let mut architecture = fixture("bert");
        let weight = &mut architecture.layers[0].attention.output.weight;
        let mut values = weight.to_f32().into_owned();
        values[7] = value;
        *weight = TensorView::owned(weight.shape.clone(), values);
        key(&architecture)
    };
    assert_eq!(merged(1.5), merged(1.5));
    assert_ne!(merged(1.5), merged(2.5));
}

fn load(architecture: &Architecture, max_tokens: usize) -> DeviceModel {
    let device = device();
    let kernels = LoadKernels::load(&device, &CubinCache::of_user(), &arch(&device), Precision::Fp32).unwrap();
    let shape = Shape::of(architecture, Precision::Fp32).unwrap();
    DeviceModel::load(&device, &kernels, (architecture, &program(architecture), &shape), max_tokens).unwrap()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn models_of_the_same_files_share_their_weights_and_the_last_one_frees_them() {
    let copy = copied();
    let architecture = opened(copy.path());
    let (first, second) = (load(&architecture, 16), load(&opened(copy.path()), 32));
    assert_eq!(first.words.address(), second.words.address());
    for (a, b) in first.linears.iter().flatten().zip(second.linears.iter().flatten()) {
        assert_eq!(a.weight.values.address(), b.weight.values.address());
    }
    // What depends on the longest text is each one's own.
    assert_eq!(second.added.as_ref().unwrap().len(), 2 * first.added.as_ref().unwrap().len());
    let weak = Arc::downgrade(&first._shared);
    drop(first);
    assert!(weak.upgrade().is_some());
    drop(second);
    assert!(weak.upgrade().is_none());
    let others = load(&fixture("bert"), 16);
    assert_ne!(others.words.address(), load(&architecture, 16).words.address());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn models_that_are_loaded_at_the_same_time_share_their_weights() {
    let copy = copied();
    let models: Vec<DeviceModel> = std::thread::scope(|scope| {
        let loaders: Vec<_> = (0..6).map(|_| scope.spawn(|| load(&opened(copy.path()), 16))).collect();
        loaders.into_iter().map(|loader| loader.join().unwrap()).collect()
    });
    assert!(models.iter().all(|model| model.words.address() == models[0].words.address()));
}
