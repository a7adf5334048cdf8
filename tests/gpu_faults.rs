//! What goes wrong on a GPU, from the engine file to running: each a typed error, after which the process goes on.
//!
//! One test at a time (`--test-threads 1`): one of them fills the GPU's memory.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

use std::fs;
use std::path::{Path, PathBuf};
use trt_embed::backend::tensorrt::{
    Arithmetic, BuildSettings, Cache, EngineFile, EngineRequest, Gate, Library, NoProgress, build_engine,
};
use trt_embed::cuda::{CudaError, Device, DeviceBuffer};
use trt_embed::model::ModelFolder;
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Error};

const MODEL: &str = "tests/fixtures/mpnet";

/// A small engine and the folder that it lies in.
fn engine() -> (tempfile::TempDir, PathBuf) {
    let out = tempfile::tempdir().unwrap();
    let folder = ModelFolder::open(Path::new(MODEL)).unwrap();
    let mut request = EngineRequest::new(&folder);
    request.settings = BuildSettings::default();
    request.settings.arithmetic = Arithmetic::Fp32;
    request.settings.profiles = ["1x16", "1x1:2x16:8x64"].iter().map(|text| text.parse().unwrap()).collect();
    request.gate = Gate::Standard;
    let (library, device) = (Library::load().unwrap(), Device::open(0).unwrap());
    let file = build_engine(&library, &device, &Cache::at(out.path().join("cache")), &request, &NoProgress).unwrap();
    let path = out.path().join("small.engine");
    EngineFile::write(&path, &file.manifest, &file.plan).unwrap();
    (out, path)
}

fn builder(engine: &Path) -> EmbedderBuilder {
    Embedder::builder(MODEL).backend(BackendChoice::TensorRt).engine(engine)
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn an_engine_of_another_machine_or_model_is_refused_by_the_field() {
    let (out, path) = engine();
    builder(&path).build().unwrap();
    let file = EngineFile::read(&path, |_| Ok(())).unwrap();
    type Change = (fn(&mut trt_embed::backend::tensorrt::Manifest), &'static str);
    let changes: [Change; 7] = [
        (|manifest| manifest.machine.tensorrt = "8.5.3".into(), "the version of TensorRT"),
        (|manifest| manifest.machine.compute_capability = "8.0".into(), "the compute capability"),
        (|manifest| manifest.machine.gpu = "NVIDIA L4".into(), "the GPU"),
        (|manifest| manifest.model.graph = "0".repeat(64), "the hash of the graph"),
        (|manifest| manifest.model.tokenizer = "0".repeat(64), "the hash of the tokenizer"),
        (|manifest| manifest.model.hidden_size = 768, "the hidden size"),
        (|manifest| manifest.profiles[0] = "1x8".parse().unwrap(), "the plan's list of profiles"),
    ];
    for (change, name) in changes {
        let mut manifest = file.manifest.clone();
        change(&mut manifest);
        let other = out.path().join("other.engine");
        EngineFile::write(&other, &manifest, &file.plan).unwrap();
        let error = builder(&other).build().unwrap_err();
        assert!(matches!(&error, Error::EngineMismatch { field, .. } if *field == name), "{name}: {error}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn damaged_and_foreign_files_are_refused() {
    let (out, path) = engine();
    let whole = fs::read(&path).unwrap();
    let other = out.path().join("other.engine");
    let mut flipped = whole.clone();
    let last = flipped.len() - 100;
    flipped[last] ^= 1;
    for (bytes, reason) in
        [(&whole[..whole.len() / 2], "bytes"), (&flipped, "SHA-256"), (b"not an engine", "does not begin"), (&[], "ends within")]
    {
        fs::write(&other, bytes).unwrap();
        let error = builder(&other).build().unwrap_err();
        assert!(matches!(error, Error::EngineFile { .. }) && error.to_string().contains(reason), "{reason}: {error}");
    }
    let error = builder(&out.path().join("nowhere.engine")).build().unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    // A plan that TensorRT itself refuses, in a file that is whole.
    let file = EngineFile::read(&path, |_| Ok(())).unwrap();
    let mut manifest = file.manifest.clone();
    manifest.plan_bytes = Vec::new();
    EngineFile::write(&other, &manifest, &file.plan[..file.plan.len() / 4]).unwrap();
    let error = builder(&other).build().unwrap_err();
    assert!(matches!(error, Error::TensorRt { action: "load the engine", .. }), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn texts_beyond_every_profile_and_unknown_devices_are_errors() {
    let (_out, path) = engine();
    let embedder = builder(&path).build().unwrap();
    let long = vec!["word"; 150].join(" ");
    let error = embedder.embed(&[long.as_str()]).unwrap_err();
    assert!(matches!(error, Error::OutsideProfile { .. }), "{error}");
    assert_eq!(embedder.embed(&["short"; 100]).unwrap().len(), 100);
    let error = builder(&path).device(99).build().unwrap_err();
    assert!(matches!(error, Error::Cuda(CudaError::NoSuchDevice { ordinal: 99, .. })), "{error}");
    let error = Embedder::builder(MODEL).backend(BackendChoice::Cpu).engine(&path).build().unwrap_err();
    assert!(matches!(error, Error::Setting { setting: "--engine", .. }), "{error}");
    // The engine is of this model, not of another.
    let error = Embedder::builder("tests/fixtures/bert").engine(&path).build().unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { .. }), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_full_gpu_is_an_error_and_the_process_goes_on() {
    let (_out, path) = engine();
    let device = Device::open(0).unwrap();
    let mut taken: Vec<DeviceBuffer<u8>> = Vec::new();
    let mut piece = 1 << 36;
    while piece >= 1 << 16 {
        match device.alloc(piece) {
            Ok(buffer) => taken.push(buffer),
            Err(CudaError::OutOfMemory { .. }) => piece /= 2,
            Err(other) => panic!("{other}"),
        }
    }
    let error = builder(&path).lanes(64).build().unwrap_err();
    let says_so = matches!(&error, Error::Cuda(CudaError::OutOfMemory { .. })) || error.to_string().contains("memory is full");
    assert!(says_so, "{error}");
    drop(taken);
    assert_eq!(builder(&path).build().unwrap().embed(&["It goes on."]).unwrap().len(), 1);
}
