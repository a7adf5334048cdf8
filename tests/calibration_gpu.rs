//! Calibration on a GPU beside calibration on the CPU: the same samples must give the same ranges but for rounding.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

mod common;
#[path = "common/phases.rs"]
mod phases;

use phases::Phases;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use trt_embed::backend::tensorrt::{Arithmetic, Cache, EngineFile, Library, Source, TensorRtObserver};
use trt_embed::cuda::Device;
use trt_embed::graph::{Graph, Precision, Range};
use trt_embed::model::ModelFolder;
use trt_embed::quantization::{Calibration, CalibrationSettings, Method, Observer, Samples, calibrate, calibrate_with};
use trt_embed::tokens::TokenBatch;
use trt_embed::{Error, NoProgress, Progress};

/// Bins that a tensor's values lie in at the least (src/quantization/histogram.rs: 4096, of which at least half are in use).
const BINS: f32 = 2048.0;

struct Place {
    library: Arc<Library>,
    device: Device,
    cache: Cache,
    disk: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let disk = tempfile::tempdir().unwrap();
        let cache = Cache::at(disk.path().join("cache"));
        Self { device: Device::open(0).unwrap(), library: Library::load().unwrap(), cache, disk }
    }

    fn observer(&self, model: &ModelFolder, longest: usize, progress: &dyn Progress) -> TensorRtObserver {
        TensorRtObserver::new(&self.library, &self.device, &self.cache, model, longest, progress).unwrap()
    }

    fn engines(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.cache.folder()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|extension| extension == "engine")).collect()
    }
}

fn model(name: &str) -> ModelFolder {
    ModelFolder::open(common::fixtures().join(name)).unwrap()
}

/// 80 rows, from one token to the most that the model takes.
fn samples(model: &ModelFolder) -> Samples {
    let limit = model.config.max_tokens();
    let row = |n: usize| (0..1 + n * 37 % limit).map(|i| ((i * 31 + n * 17) % model.config.vocab_size) as u32).collect();
    let mut rows: Vec<Vec<u32>> = (0..79).map(row).collect();
    rows.push((0..limit).map(|i| (i * 7 % model.config.vocab_size) as u32).collect());
    Samples::from_ids(model, rows).unwrap()
}

/// How far rounding may set the two apart, relative to a range: a range is a largest magnitude or an order statistic, which moves no
/// further than the values do, and the values of such a tensor are as large as the sums that round ([`common::rounding`]).
fn rounding(model: &ModelFolder) -> f32 {
    common::rounding(model.config.num_hidden_layers, model.config.intermediate_size)
}

/// Compares all ranges, which may differ by `rounding` of their own and by `bins` of the histogram, whose width follows from the largest
/// magnitudes, `reach`. Gives how many differ by more than two bins.
fn compare(found: &Calibration, expected: &Calibration, rounding: f32, bins: f32, reach: &Calibration) -> usize {
    let what = format!("{}, {}, smoothing {:?}", expected.model.name, expected.method, expected.smoothing);
    assert_eq!((found.samples, found.tokens, &found.model), (expected.samples, expected.tokens, &expected.model));
    assert_eq!(found.ranges.len(), expected.ranges.len());
    let (mut worst, mut moved) = (0_f32, 0);
    for (name, expected) in &expected.ranges {
        let found = &found.ranges[name];
        let difference = (found.amax - expected.amax).abs();
        worst = worst.max(difference / expected.amax);
        let steps = (difference - rounding * expected.amax) / (reach.ranges[name].amax / BINS);
        assert!(steps <= bins, "{what}, {name}: {} on the GPU, {} on the CPU", found.amax, expected.amax);
        moved += usize::from(steps > 2.0);
        let factors = |range: &Range| range.smoothing.clone().unwrap_or_default();
        let (found, expected) = (factors(found), factors(expected));
        assert_eq!(found.len(), expected.len(), "{what}, {name}");
        for (channel, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // max|X|^alpha / max|W|^(1 - alpha), alpha at most 1, moves no further than a channel's reach, which rounds as the tensor's
            // does but may be a few times smaller.
            let difference = (found - expected).abs() / expected;
            assert!(difference <= 4.0 * rounding, "{what}, {name}, channel {channel}: {found} on the GPU, {expected} on the CPU");
        }
    }
    println!("{what}: largest relative difference {worst:.2e}, rounding {rounding:.2e}, {moved} moved");
    moved
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn ranges_equal_those_of_the_cpu_with_every_method() {
    let place = Place::new();
    for name in ["mpnet", "bert"] {
        let model = model(name);
        let samples = samples(&model);
        let mut observer = place.observer(&model, samples.longest(), &NoProgress);
        for smoothing in [None, Some(0.5)] {
            let on_cpu = |method| calibrate(&model, &samples, &CalibrationSettings { method, smoothing }, &NoProgress).unwrap();
            let reach = on_cpu(Method::MinMax);
            // A smoothed value is a value over a factor: both round.
            let rounding = rounding(&model) * if smoothing.is_some() { 5.0 } else { 1.0 };
            // The divergence that entropy looks for the minimum of is flat around it: on the CPU, noise of 1e-5 of the values moved
            // two cuts of eight by up to 47 bins, noise of 1e-6 one by 5, and noise of 1e-7, which is what is expected here, none.
            for (method, bins) in [(Method::MinMax, 0.0), (Method::Percentile(99.9), 1.0), (Method::Entropy, 64.0)] {
                let settings = CalibrationSettings { method, smoothing };
                let found = calibrate_with(&mut observer, &model, &samples, &settings, &NoProgress).unwrap();
                let moved = compare(&found, &on_cpu(method), rounding, bins, &reach);
                assert!(4 * moved <= found.ranges.len(), "{moved} of {}", found.ranges.len());
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn the_engine_is_built_once_and_says_what_it_is() {
    let place = Place::new();
    let model = model("mpnet");
    let built = |longest: usize| {
        let phases = Phases::default();
        place.observer(&model, longest, &phases);
        phases.has("building the engine")
    };
    assert!(built(100));
    assert!(!built(100), "built twice");
    assert!(!built(128), "100 and 128 tokens share an engine");
    let engines = place.engines();
    assert_eq!(engines.len(), 1, "{engines:?}");
    let manifest = EngineFile::read_manifest(&engines[0]).unwrap();
    assert_eq!((manifest.arithmetic, &manifest.model.source), (Arithmetic::Fp32, &Source::Exported(Precision::Fp32)));
    let observed = Graph::observed(&model.architecture().unwrap()).unwrap();
    assert_eq!(manifest.model.graph, observed.digest_hex());
    assert!(manifest.fidelity.is_none() && manifest.speed.is_empty());
    // It is no encoder to embed with: its graph is not the model's own.
    let error = manifest.check_folder(&model).unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { field: "the hash of the graph", .. }), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn batches_outside_the_profile_are_refused_and_the_observer_goes_on() {
    let place = Place::new();
    let model = model("bert");
    let mut observer = place.observer(&model, 20, &NoProgress);
    let batch = |rows: usize, tokens: usize| {
        let mut batch = TokenBatch::default();
        batch.refill(&vec![vec![5; tokens]; rows], model.config.vocab_size, 0).unwrap();
        batch
    };
    let seen = Mutex::new(0);
    let mut run = |batches: &[TokenBatch]| {
        observer.observe(batches, &|_, _, _| {
            *seen.lock().unwrap() += 1;
            Ok(())
        })
    };
    for (rows, tokens) in [(1, 33), (65, 32)] {
        let error = run(&[batch(rows, tokens)]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::OutsideProfile { .. }), "{text}");
        assert!(text.contains(&format!("{rows}x{tokens}")) && text.contains("1x1:64x32:64x32"), "{text}");
    }
    run(&[batch(64, 32), batch(1, 1)]).unwrap();
    assert_eq!(*seen.lock().unwrap(), 2 * 4 * model.config.num_hidden_layers);
}

#[cfg(feature = "cli")]
#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn the_command_calibrates_on_the_gpu() {
    let place = Place::new();
    let lines: String = (0..64).map(|n| format!("text number {n} {}\n", "of several words ".repeat(n % 7))).collect();
    let at = place.disk.path();
    std::fs::write(at.join("lines.txt"), lines).unwrap();
    let model = common::fixtures().join("mpnet");
    let run = |backend: &str, file: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_trt-embed"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TRT_EMBED_")) {
            command.env_remove(name);
        }
        command.env("TRT_EMBED_CACHE", place.cache.folder()).current_dir(at);
        command.args(["calibrate", "-i", "lines.txt", "-o", file, "--backend", backend, "-m"]).arg(&model);
        let out = command.output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        (said, Calibration::read(&at.join(file)).unwrap())
    };
    let (said, first) = run("tensorrt", "gpu.json");
    assert!(said.contains("building the engine") && !said.contains("backend:"), "{said}");
    let (said, second) = run("auto", "auto.json");
    assert!(said.starts_with("trt-embed: backend: tensorrt (chosen by --backend auto)\n"), "{said}");
    assert!(!said.contains("building the engine"), "{said}");
    assert_eq!(first, second, "the same engine and samples");
    let (_, on_cpu) = run("cpu", "cpu.json");
    compare(&first, &on_cpu, rounding(&ModelFolder::open(&model).unwrap()), 0.0, &on_cpu);
}
