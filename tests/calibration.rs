//! Ranges of activations: the library's calibration, its file, and the command around it.

mod cli_model;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;
use trt_embed::backend::{Backend, CpuBackend};
use trt_embed::graph::{Graph, Precision};
use trt_embed::model::ModelFolder;
use trt_embed::pooling::{Head, Scaling};
use trt_embed::quantization::{
    Calibration, CalibrationSettings, Method, Observer, Samples, Visit, calibrate, calibrate_with, choose_float, fit, sensitivity,
};
use trt_embed::tokens::TokenBatch;
use trt_embed::{Error, NoProgress, Progress, Result};

fn model(name: &str) -> ModelFolder {
    ModelFolder::open(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Rows of very different lengths, so that most batches hold padding.
fn samples(model: &ModelFolder) -> Samples {
    let limit = model.config.max_tokens();
    let row = |n: usize| (0..1 + n * 7 % limit).map(|i| ((i * 31 + n * 17) % model.config.vocab_size) as u32).collect();
    Samples::from_ids(model, (0..40).map(row).collect()).unwrap()
}

fn settings(method: Method, smoothing: Option<f32>) -> CalibrationSettings {
    CalibrationSettings { method, smoothing }
}

fn run(model: &ModelFolder, settings: &CalibrationSettings) -> Calibration {
    calibrate(model, &samples(model), settings, &NoProgress).unwrap()
}

/// Shows 1 at every token, but 1000 at padding and what `odd` says for the first value.
struct Constant<'m> {
    model: &'m ModelFolder,
    odd: Option<f32>,
}

impl Observer for Constant<'_> {
    fn observe(&mut self, batches: &[TokenBatch], visit: &Visit<'_>) -> Result<()> {
        let graph = Graph::new(&self.model.architecture()?, Precision::Fp32)?;
        for batch in batches {
            for (place, (name, channels)) in graph.observed_tensors().into_iter().enumerate() {
                let row = |length: u32| {
                    let length = length as usize * channels;
                    (0..batch.longest() * channels).map(move |i| if i < length { 1.0 } else { 1000.0 })
                };
                let mut values: Vec<f32> = batch.lengths().flat_map(row).collect();
                match self.odd {
                    Some(0.0) if place == 2 => values.fill(0.0),
                    Some(odd) if place == 2 && odd != 0.0 => values[0] = odd,
                    _ => {}
                }
                visit(batch, name, &values)?;
            }
        }
        Ok(())
    }
}

#[test]
fn padding_never_counts() {
    let model = model("bert");
    for method in [Method::MinMax, Method::Percentile(100.0)] {
        let mut observer = Constant { model: &model, odd: None };
        let found = calibrate_with(&mut observer, &model, &samples(&model), &settings(method, None), &NoProgress).unwrap();
        assert_eq!(found.ranges.len(), 4 * model.config.num_hidden_layers);
        assert!(found.ranges.values().all(|range| range.amax == 1.0), "{:?}", found.ranges);
    }
}

#[test]
fn tensors_that_give_no_range_are_named() {
    let model = model("bert");
    let graph = Graph::new(&model.architecture().unwrap(), Precision::Fp32).unwrap();
    let name = graph.observed_tensors()[2].0.to_owned();
    for odd in [f32::NAN, f32::INFINITY, 0.0] {
        let mut observer = Constant { model: &model, odd: Some(odd) };
        let settings = CalibrationSettings::default();
        let error = calibrate_with(&mut observer, &model, &samples(&model), &settings, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Calibration { .. }) && error.to_string().contains(&name), "{odd}: {error}");
    }
}

#[test]
fn minmax_is_the_largest_magnitude_of_each_sample_run_alone() {
    for name in ["bert", "mpnet"] {
        let model = model(name);
        let graph = Graph::observed(&model.architecture().unwrap()).unwrap();
        let head = Head::new(model.pooling.clone(), vec![], model.config.hidden_size, None, Scaling::None).unwrap();
        let backend = CpuBackend::from_graph(graph, head, model.config.max_tokens(), 1).unwrap();
        let mut expected: BTreeMap<String, f32> = BTreeMap::new();
        let limit = model.config.max_tokens();
        for n in 0..40usize {
            let row: Vec<u32> = (0..1 + n * 7 % limit).map(|i| ((i * 31 + n * 17) % model.config.vocab_size) as u32).collect();
            let mut batch = TokenBatch::default();
            batch.refill(&[row], model.config.vocab_size, 0).unwrap();
            backend
                .observe(&batch, &mut |name, values| {
                    let amax = expected.entry(name.to_owned()).or_default();
                    *amax = values.iter().fold(*amax, |amax, value| amax.max(value.abs()));
                })
                .unwrap();
        }
        let found = run(&model, &settings(Method::MinMax, None));
        assert_eq!(found.ranges.len(), expected.len());
        for (tensor, range) in &found.ranges {
            // A row's values depend on its batch by rounding alone.
            assert!((range.amax - expected[tensor]).abs() <= 1e-5 * expected[tensor], "{tensor}: {range:?} {}", expected[tensor]);
        }
    }
}

#[test]
fn smoothing_with_alpha_one_makes_every_channel_reach_to_one() {
    let model = model("bert");
    let smooth = run(&model, &settings(Method::MinMax, Some(1.0)));
    for range in smooth.ranges.values() {
        assert!((range.amax - 1.0).abs() < 1e-5, "{range:?}");
        assert!(range.smoothing.is_some());
    }
}

#[test]
fn a_calibrated_graph_is_near_the_model() {
    let model = model("mpnet");
    let head =
        || Head::new(model.pooling.clone(), model.dense.clone(), model.config.hidden_size, None, Scaling::AfterCut).unwrap();
    let vectors = |graph| {
        let backend = CpuBackend::from_graph(graph, head(), model.config.max_tokens(), 1).unwrap();
        let rows: Vec<Vec<u32>> = (1..9u32).map(|n| (0..n).map(|i| i * 13 + n).collect()).collect();
        let mut batch = TokenBatch::default();
        batch.refill(&rows, model.config.vocab_size, 0).unwrap();
        let mut out = vec![0.0; batch.batch() * head().dim];
        backend.encode(&batch, &mut out).unwrap();
        out
    };
    let architecture = model.architecture().unwrap();
    let reference = vectors(Graph::new(&architecture, Precision::Fp32).unwrap());
    for smoothing in [None, Some(0.5)] {
        let quantization = run(&model, &settings(Method::MinMax, smoothing)).quantization([]);
        let found = vectors(Graph::quantized(&architecture, Precision::Fp32, &quantization).unwrap());
        for (a, b) in reference.chunks_exact(head().dim).zip(found.chunks_exact(head().dim)) {
            let cosine: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
            assert!(cosine > 0.98, "{smoothing:?}: {cosine}");
        }
    }
}

#[test]
fn the_file_comes_back_as_written_and_faults_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("calibration.json");
    let bert = model("bert");
    let calibration = run(&bert, &settings(Method::Percentile(99.5), Some(0.5)));
    calibration.write(&path).unwrap();
    assert_eq!(Calibration::read(&path).unwrap(), calibration);
    calibration.check(&bert, None).unwrap();
    calibration.check(&bert, Some(Method::Percentile(99.5))).unwrap();
    let other = calibration.check(&model("mpnet"), None).unwrap_err();
    assert!(matches!(other, Error::CalibrationMismatch { field: "model", .. }), "{other}");
    let method = calibration.check(&bert, Some(Method::Entropy)).unwrap_err();
    assert!(matches!(method, Error::CalibrationMismatch { field: "method", .. }), "{method}");

    let json = std::fs::read_to_string(&path).unwrap();
    let field = "\"amax\": ";
    let amax = json.find(field).unwrap() + field.len();
    let end = amax + json[amax..].find(|c: char| c == ',' || c.is_whitespace()).unwrap();
    let faulty = [
        json[..json.len() / 2].to_owned(),
        json.replacen("\"format\": 1", "\"format\": 2", 1),
        json.replacen("\"tokens\"", "\"token\"", 1),
        format!("{}-1.0{}", &json[..amax], &json[end..]),
        String::new(),
    ];
    for text in faulty {
        assert_ne!(text, json);
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Calibration::read(&path), Err(Error::CalibrationFile { .. })));
    }
}

#[test]
fn too_little_data_and_settings_out_of_bounds_are_refused() {
    let model = model("bert");
    let mut few = samples(&model);
    few.truncate(31);
    let error = calibrate(&model, &few, &CalibrationSettings::default(), &NoProgress).unwrap_err().to_string();
    assert!(error.contains("31 texts") && error.contains("at least 32"), "{error}");
    for bad in [
        settings(Method::Percentile(0.0), None),
        settings(Method::Percentile(f64::NAN), None),
        settings(Method::MinMax, Some(1.5)),
    ] {
        assert!(matches!(calibrate(&model, &samples(&model), &bad, &NoProgress), Err(Error::Setting { .. })));
    }
    assert!(matches!(Samples::from_ids(&model, vec![vec![]]), Err(Error::Setting { .. })));
    assert!(matches!(Samples::from_ids(&model, vec![vec![1], vec![9_999_999]]), Err(Error::TokenId { text: 1, .. })));
}

#[test]
fn the_fewest_groups_stay_in_float_that_reach_the_bar() {
    let model = model("mpnet");
    let calibration = run(&model, &settings(Method::MinMax, None));
    let texts = samples(&model);
    let loose = fit(&model, &calibration, &texts, 0.5).unwrap();
    assert!(loose.quantization.float.is_empty() && loose.report.groups.is_empty());
    let groups = sensitivity(&model, &calibration, &texts).unwrap();
    assert_eq!(groups.len(), 4 * model.config.num_hidden_layers);
    assert!(groups.is_sorted_by(|a, b| a.alone.mean <= b.alone.mean));
    assert_eq!(groups.iter().map(|report| report.group.linears.len()).sum::<usize>(), 6 * model.config.num_hidden_layers);

    // A bar between all in INT8 and the least sensitive group alone.
    let bar = (loose.report.all_int8.min + groups.last().unwrap().alone.min) / 2.0;
    let fitted = fit(&model, &calibration, &texts, bar).unwrap();
    assert!(fitted.report.chosen.min >= bar && !fitted.quantization.float.is_empty());
    let kept: usize = fitted.report.groups.iter().filter(|report| report.float).map(|report| report.group.linears.len()).sum();
    assert_eq!(kept, fitted.quantization.float.len());
    assert!(kept < 6 * model.config.num_hidden_layers);
    assert_eq!(
        fitted.report.to_string().matches("kept in float").count(),
        fitted.report.groups.iter().filter(|r| r.float).count()
    );

    let error = fit(&model, &calibration, &texts, 1.1).unwrap_err();
    assert!(matches!(error, Error::QuantizedFidelity { bar: 1.1, .. }), "{error}");

    // Told linears, or no bar: nothing is looked for.
    let told = [calibration.quantization([]).ranges.keys().next().unwrap().clone()];
    for (keep_float, bar) in [(&told[..], Some(1.1)), (&told[..], None), (&[], None)] {
        let (chosen, report) = choose_float(&model, &calibration, &texts, keep_float, bar).unwrap();
        assert!(report.is_none() && chosen == calibration.quantization(keep_float.iter().cloned()));
    }
    let (chosen, report) = choose_float(&model, &calibration, &texts, &[], Some(0.5)).unwrap();
    assert_eq!((chosen, report.unwrap().bar), (calibration.quantization([]), 0.5));
}

fn place() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    cli_model::write(&folder.path().join("model"));
    let lines: String = (0..40).map(|i| format!("the cat sat on mat {i} {}\n", "dog ran ".repeat(i % 5))).collect();
    std::fs::write(folder.path().join("lines.txt"), lines).unwrap();
    folder
}

fn command(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trt-embed"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TRT_EMBED_")) {
        command.env_remove(name);
    }
    // No GPU, whatever this machine has.
    command.env("CUDA_VISIBLE_DEVICES", "").current_dir(folder).args(args).output().unwrap()
}

/// The command's stderr; it must have ended with `status`.
fn stderr(folder: &Path, status: i32, args: &[&str]) -> String {
    let out = command(folder, args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(status), "{args:?}: {said}");
    said
}

#[test]
fn the_command_calibrates_and_exports_int8() {
    let folder = place();
    let at = folder.path();
    stderr(at, 0, &["calibrate", "-m", "model", "-i", "lines.txt", "-o", "c.json", "--method", "minmax"]);
    let calibration = Calibration::read(&at.join("c.json")).unwrap();
    assert_eq!((calibration.samples, calibration.method), (40, Method::MinMax));
    stderr(at, 0, &["export", "-m", "model", "-o", "out", "--precision", "int8", "--calibration", "c.json"]);
    let count = |file: &str| {
        let model = trt_embed::graph::onnx::read_model(&at.join(file)).unwrap();
        model.graph.unwrap().node.iter().filter(|node| node.op_type == "QuantizeLinear").count()
    };
    // Four tensors and six weights.
    assert_eq!(count("out/model.onnx"), 10);
    let keep = ["--keep-float", "encoder.layer.0.output.dense", "--keep-float", "encoder.layer.0.attention.self.key"];
    let args = [&["export", "-m", "model", "-o", "kept", "--precision", "int8", "--calibration", "c.json"][..], &keep].concat();
    stderr(at, 0, &args);
    // The weight and the tensor of ffn2, the weight of the keys.
    assert_eq!(count("kept/model.onnx"), 7);
    let said = stderr(
        at,
        1,
        &["export", "-m", "model", "-o", "x", "--precision", "int8", "--calibration", "c.json", "--keep-float", "no"],
    );
    assert!(said.contains("\"no\" is no linear"), "{said}");
    stderr(at, 2, &["export", "-m", "model", "-o", "x", "--precision", "int8"]);
    stderr(at, 2, &["export", "-m", "model", "-o", "x", "--calibration", "c.json"]);
    stderr(at, 2, &["calibrate", "-m", "model", "-i", "lines.txt", "--method", "entropy", "--percentile", "99"]);
    assert!(stderr(at, 1, &["calibrate", "-m", "model", "one text"]).contains("1 texts are too few"));
}

/// What `build --precision auto` finds wrong before it needs a GPU, and what it says first.
#[cfg(feature = "tensorrt")]
#[test]
fn a_choice_that_cannot_be_made_is_told_before_anything_is_built() {
    let folder = place();
    let at = folder.path();
    stderr(at, 0, &["calibrate", "-m", "model", "-i", "lines.txt", "-o", "c.json"]);
    stderr(at, 0, &["export", "-m", "model", "-o", "float"]);
    stderr(at, 0, &["export", "-m", "model", "-o", "int8", "--precision", "int8", "--calibration", "c.json"]);
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet");
    let auto = |status: i32, args: &[&str], parts: &[&str]| {
        // No machine has so many GPUs.
        let always = ["build", "--precision", "auto", "-o", "x.engine", "--device", "999"];
        let said = stderr(at, status, &[&always[..], args].concat());
        for part in parts {
            assert!(said.contains(part), "{args:?}: no {part:?} in {said}");
        }
        assert!(!at.join("x.engine").exists(), "{args:?}");
        said
    };
    auto(1, &["-m", other, "--calibration", "c.json"], &["the calibration does not fit: model is model (bert", "mpnet"]);
    auto(1, &["-m", "model", "--calibration", "none.json"], &["none.json"]);
    auto(1, &["-m", "model", "--onnx", "int8/model.onnx"], &["int8/model.onnx is quantised", "--precision", "use int8"]);
    auto(1, &["-m", "model", "--onnx", "float/model.onnx", "--calibration", "c.json"], &["--calibration", "not with --onnx"]);
    auto(2, &["-m", "model", "--keep-float", "encoder.layer.0.output.dense"], &["--calibration"]);
    auto(2, &["-m", "model", "--calibration", "c.json", "--min-cosine", "2"], &["--min-cosine", "0 to 1"]);

    let calibrated = auto(1, &["-m", "model", "--calibration", "c.json"], &[]);
    assert!(!calibrated.contains("int8 is no candidate"), "{calibrated}");
    auto(1, &["-m", "model"], &["int8 is no candidate without --calibration"]);
    auto(1, &["-m", "model", "--onnx", "float/model.onnx"], &["int8 is no candidate with an --onnx file that is not quantised"]);
    auto(1, &["-m", "model", "--no-parity"], &["by time alone", "--no-parity"]);

    // What the machine lacks is told before minutes are spent on what INT8 may take.
    let int8 = ["build", "-m", "model", "--precision", "int8", "--calibration", "c.json", "-o", "x.engine", "--device", "999"];
    let said = stderr(at, 1, &int8);
    assert!(!said.contains("quantisation on the CPU") && said.lines().count() == 1, "{said}");

    // The other verbs build one precision, and so does every other precision of this one.
    let said = stderr(at, 2, &["embed", "-m", "model", "--engine-precision", "auto", "text"]);
    assert!(said.contains("auto") && said.contains("[possible values: fp32, fp16, int8]"), "{said}");
    let said = stderr(at, 1, &["build", "-m", "model", "-o", "x.engine", "--calibration", "c.json", "--no-parity"]);
    assert!(said.contains("--precision int8 or auto"), "{said}");
}

/// What is said where TensorRT is asked for: by a build with it on a machine without driver, or whose GPUs are hidden, and by a build
/// without it.
fn no_gpu() -> &'static [&'static str] {
    if cfg!(feature = "tensorrt") {
        &[
            "no NVIDIA driver: libcuda.so.1 (or libcuda.so) on the loader's path cannot be opened; install the driver, or start the \
             container with the GPU (docker run --gpus all)\n",
            "the NVIDIA driver sees no GPU (",
        ]
    } else {
        &["tensorrt backend: this build has no TensorRT support; choose the backend `cpu`, or build with the feature `tensorrt` \
           (--backend cpu)\n"]
    }
}

#[test]
fn the_backend_asked_for_is_used_or_its_lack_is_told() {
    let folder = place();
    let at = folder.path();
    let base = ["calibrate", "-m", "model", "-i", "lines.txt", "-o", "c.json"];
    let run = |status: i32, more: &[&str]| stderr(at, status, &[&base[..], more].concat());
    let said = run(1, &["--backend", "tensorrt"]);
    assert!(no_gpu().iter().any(|why| said.starts_with(&format!("trt-embed: {why}"))), "{said}");
    assert!(!at.join("c.json").exists());

    assert_eq!(run(0, &["--backend", "cpu"]), "");
    let named = std::fs::read_to_string(at.join("c.json")).unwrap();
    let said = run(0, &["--device", "7"]);
    let end = if cfg!(feature = "tensorrt") { ": " } else { ")\n" };
    assert!(said.starts_with(&format!("trt-embed: backend: cpu (chosen by --backend auto{end}")), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(std::fs::read_to_string(at.join("c.json")).unwrap(), named, "the same executor");
    assert!(run(2, &["--backend", "gpu"]).contains("tensorrt"));
    assert!(run(2, &["--device", "first"]).contains("--device"));
}

#[test]
fn progress_ends_at_all_texts_of_all_passes() {
    let model = model("bert");
    for (smoothing, total) in [(None, 40), (Some(0.5), 80)] {
        let heard = Heard { stop_at: u32::MAX, ..Heard::default() };
        calibrate(&model, &samples(&model), &settings(Method::MinMax, smoothing), &heard).unwrap();
        let (phases, steps) = (heard.phases.into_inner().unwrap(), heard.steps.into_inner().unwrap());
        assert_eq!(phases, [format!("calibrating, {total} steps"), "calibrating is over".into()]);
        assert_eq!(steps.iter().max(), Some(&(total - 1)));
    }
}

#[test]
fn a_calibration_can_be_stopped_between_batches() {
    let model = model("bert");
    let heard = Heard { stop_at: 5, ..Heard::default() };
    let mut observer = Constant { model: &model, odd: None };
    let error = calibrate_with(&mut observer, &model, &samples(&model), &settings(Method::MinMax, None), &heard).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    // The phase ends, and nothing runs after the batch that was under way.
    assert_eq!(heard.phases.into_inner().unwrap().len(), 2);
    let steps = heard.steps.into_inner().unwrap();
    assert!(steps.iter().filter(|&&step| step >= 5).count() == 1, "{steps:?}");
}

/// Keeps the phases and steps that it hears of, and asks to stop from step `stop_at` on.
#[derive(Default)]
struct Heard {
    stop_at: u32,
    phases: std::sync::Mutex<Vec<String>>,
    steps: std::sync::Mutex<Vec<u32>>,
}

impl Progress for Heard {
    fn phase_started(&self, phase: &str, _: Option<&str>, steps: u32) {
        self.phases.lock().unwrap().push(format!("{phase}, {steps} steps"));
    }
    fn step_done(&self, _: &str, step: u32) {
        self.steps.lock().unwrap().push(step);
    }
    fn phase_finished(&self, phase: &str) {
        self.phases.lock().unwrap().push(format!("{phase} is over"));
    }
    fn cancelled(&self) -> bool {
        self.steps.lock().unwrap().iter().any(|&step| step >= self.stop_at)
    }
}

/// A NumPy file of format version 1.
fn npy(path: &Path, descr: &str, shape: &str, data: &[u8]) {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let header = format!("{header:<117}\n");
    let bytes = [b"\x93NUMPY\x01\x00", &118u16.to_le_bytes()[..], header.as_bytes(), data].concat();
    std::fs::write(path, bytes).unwrap();
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn token_ids_come_from_numpy_files_and_their_faults_are_located() {
    let folder = place();
    let at = folder.path();
    let (ids, mask) = (at.join("input_ids.npy"), at.join("attention_mask.npy"));
    let good_ids: Vec<i64> = (0..40 * 3).map(|i| 4 + i % 10).collect();
    let good_mask: Vec<i64> = (0..40 * 3).map(|i| i64::from(i % 3 < 2)).collect();
    let args = ["calibrate", "-m", "model", "--npy", ".", "-o", "c.json"];
    let put = |ids_values: &[i64], mask_values: &[i64]| {
        npy(&ids, "<i8", "(40, 3)", &i64s(ids_values));
        npy(&mask, "<i8", "(40, 3)", &i64s(mask_values));
    };
    put(&good_ids, &good_mask);
    stderr(at, 0, &args);
    assert_eq!(Calibration::read(&at.join("c.json")).unwrap().tokens, 80);
    let int32: Vec<u8> = good_ids.iter().flat_map(|&value| (value as i32).to_le_bytes()).collect();
    npy(&ids, "<i4", "(40, 3)", &int32);
    stderr(at, 0, &args);

    let with = |values: &[i64], place: usize, value: i64| {
        let mut values = values.to_vec();
        values[place] = value;
        values
    };
    let faults = [
        (with(&good_ids, 7, -3), good_mask.clone(), "[2, 1] (from 0) is -3"),
        (with(&good_ids, 6, 1_000_000), good_mask.clone(), "1000000 (of text index 2, from 0)"),
        (good_ids.clone(), with(&good_mask, 4, 2), "[1, 1] (from 0) is 2; 0 or 1"),
        (good_ids.clone(), with(&good_mask, 3, 0), "[1, 0] (from 0) is 0, before a 1 at [1, 1]"),
        (good_ids.clone(), with(&with(&good_mask, 3, 0), 4, 0), "row [1] (from 0) has no token"),
    ];
    for (ids, mask, expected) in faults {
        put(&ids, &mask);
        let said = stderr(at, 1, &args);
        assert!(said.contains(expected), "{said}");
    }
    put(&good_ids, &good_mask);
    npy(&mask, "<i8", "(20, 6)", &i64s(&good_mask));
    assert!(stderr(at, 1, &args).contains("its shape is [20, 6], that of input_ids.npy [40, 3]"));
    npy(&ids, "<i8", "(120,)", &i64s(&good_ids));
    assert!(stderr(at, 1, &args).contains("[samples, seq] is expected"));
    npy(&ids, "<f8", "(40, 3)", &i64s(&good_ids));
    assert!(stderr(at, 1, &args).contains("int64 or int32 is expected"));
    npy(&ids, "<i8", "(40, 3)", &i64s(&good_ids[..100]));
    assert!(stderr(at, 1, &args).contains("it ends before"));
    std::fs::write(&ids, "text").unwrap();
    assert!(stderr(at, 1, &args).contains("not a NumPy file"));
}
