//! What goes wrong on a GPU, from the engine file to running: each a typed error, after which the process goes on.
//!
//! One test at a time (`--test-threads 1`): one of them fills the GPU's memory.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

use std::fs;
use std::path::{Path, PathBuf};
use trt_embed::backend::Backend;
use trt_embed::backend::tensorrt::{
    Arithmetic, BuildSettings, Cache, EngineFile, EngineRequest, Gate, Library, build_engine, cached_engine,
};
use trt_embed::cuda::{CudaError, Device, DeviceBuffer};
use trt_embed::model::ModelFolder;
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Error, NoProgress, Setting};

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
    EngineFile::write(&path, &file.manifest, file.plan()).unwrap();
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
        EngineFile::write(&other, &manifest, file.plan()).unwrap();
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
    EngineFile::write(&other, &manifest, &file.plan()[..file.plan().len() / 4]).unwrap();
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
    assert!(matches!(error, Error::Setting { setting: Setting::Engine, .. }), "{error}");
    // The engine is of this model, not of another.
    let error = Embedder::builder("tests/fixtures/bert").engine(&path).build().unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { .. }), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_limit_that_the_engine_does_not_serve_is_refused_at_opening() {
    let (_out, path) = engine();
    for (tokens, parts) in [(65, ["65", "64"]), (208, ["208", "64"])] {
        let error = builder(&path).max_tokens(tokens).build().unwrap_err();
        assert!(matches!(error, Error::Setting { setting: Setting::MaxTokens, .. }), "{error}");
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error}");
    }
    let long = vec!["word"; 150].join(" ");
    for tokens in [64, 20] {
        let embedder = builder(&path).max_tokens(tokens).build().unwrap();
        assert_eq!(embedder.embed(&[&long]).unwrap().tokens, [tokens as u32]);
    }
}

/// Above the model's own limit the cache has an engine of its own, which gives what the CPU gives.
#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_limit_above_the_model_s_own_reaches_the_cached_engine() {
    let place = tempfile::tempdir().unwrap();
    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(MODEL).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    fs::remove_file(model.join("modules.json")).ok();
    fs::write(model.join("tokenizer_config.json"), r#"{"model_max_length": 32}"#).unwrap();
    let folder = ModelFolder::open(&model).unwrap();
    assert_eq!(folder.max_tokens(), 32);
    let (library, device) = (Library::load().unwrap(), Device::open(0).unwrap());
    let cache = Cache::at(place.path().join("cache"));
    let cached = |max_tokens| {
        let mut request = EngineRequest::new(&folder);
        request.settings.arithmetic = Arithmetic::Fp32;
        request.max_tokens = max_tokens;
        cached_engine(&library, &device, &cache, &request, &NoProgress).unwrap()
    };
    let (own, path) = cached(None);
    assert_eq!(cached(Some(20)).1, path);
    let (wider, other) = cached(Some(100));
    assert_ne!(path, other);
    own.manifest.check_max_tokens(32).unwrap();
    own.manifest.check_max_tokens(33).unwrap_err();
    wider.manifest.check_max_tokens(100).unwrap();
    let text = vec!["word"; 90].join(" ");
    let at = |builder: EmbedderBuilder| builder.max_tokens(100).build().unwrap().embed(&[&text]).unwrap();
    let model = model.to_str().unwrap();
    let found = at(Embedder::builder(model).backend(BackendChoice::TensorRt).engine(&other));
    let expected = at(Embedder::builder(model).backend(BackendChoice::Cpu));
    assert_eq!(found.tokens, expected.tokens);
    assert!(found.tokens[0] > 32);
    let largest = found.values.iter().zip(&expected.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let scale = expected.values.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
    // As tests/gpu_backend.rs: fp32 in another order of summation.
    assert!(largest <= 1e-5 * scale, "{largest}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn shapes_cost_what_the_engine_file_says_at_every_load() {
    let (out, path) = engine();
    let mut file = EngineFile::read(&path, |_| Ok(())).unwrap();
    let profiles: Vec<_> = file.manifest.costs.iter().map(|cost| cost.profile).collect();
    assert_eq!(profiles, file.manifest.profiles, "a build measures what its shapes cost");
    let costs = |path: &Path| builder(path).build().unwrap().gpu().unwrap().costs().unwrap();
    for _ in 0..2 {
        assert_eq!(Some(&*costs(&path)), file.manifest.shape_costs().as_ref());
    }
    // Files of earlier versions have none: they are measured then.
    file.manifest.costs.clear();
    let older = out.path().join("older.engine");
    EngineFile::write(&older, &file.manifest, file.plan()).unwrap();
    assert!(costs(&older).shapes().iter().all(|cost| cost.min_micros > 0.0 && cost.max_micros > 0.0));
}

/// Captures are under way in the one while the other opens the device, makes streams and frees memory.
#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn embedders_that_open_and_close_together_do_not_disturb_one_another() {
    let (_out, path) = engine();
    let expected = builder(&path).build().unwrap().embed(&["They open together."]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let found = builder(&path).build().unwrap().embed(&["They open together."]).unwrap();
                    let largest = found.values.iter().zip(&expected.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(largest <= 1e-6, "{largest}");
                }
            });
        }
    });
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
