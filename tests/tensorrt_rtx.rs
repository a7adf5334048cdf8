//! TensorRT for RTX builds without a GPU: every exported graph through a real, strongly typed builder, and what it refuses.
//!
//! `.ci/run` gets its libraries (`scripts/tensorrt-rtx.sh`) and headers (`scripts/tensorrt-headers.sh rtx`). Nothing is executed here: that wants a GPU.
#![cfg(all(feature = "cli", feature = "tensorrt", feature = "cpu"))]

mod cli_model;
mod cli_place;
mod common;

use cli_place::{Place, Run};
use common::{Cases, fixtures};
use prost::Message;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use trt_embed::backend::tensorrt::{
    Arithmetic, BuildSettings, Cache, ComputeCapability, EngineFile, EngineRequest, Flavour, Gate, Library, Plan, Profile,
    Source, Target, ahead_of_time_capabilities, build_engine, build_plan, header_version,
};
use trt_embed::graph::onnx::{self, Dim, ElementType, ModelProto, ValueInfoProto};
use trt_embed::graph::{Graph, Inputs, Integers, Precision};
use trt_embed::model::ModelFolder;
use trt_embed::quantization::{CalibrationSettings, Samples, calibrate};
use trt_embed::{Error, NoProgress, Progress, Setting};

const TINY: &[u8] = include_bytes!("fixtures/tensorrt/tiny.onnx");
/// Short and long buckets, and a wide profile.
const PROFILES: [&str; 3] = ["1x16", "8x32", "1x1:2x16:4x64"];

fn library() -> Arc<Library> {
    let library = Library::load().unwrap();
    assert_eq!(library.version().flavour, Flavour::Rtx, "compiled with the headers of TensorRT {}", header_version());
    library
}

fn ampere() -> ComputeCapability {
    "8.6".parse().unwrap()
}

fn profiles(texts: &[&str]) -> Vec<Profile> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn settings(arithmetic: Arithmetic, texts: &[&str]) -> BuildSettings {
    let mut settings = BuildSettings::default();
    settings.arithmetic = arithmetic;
    settings.profiles = profiles(texts);
    settings
}

fn plan(onnx: &[u8], settings: &BuildSettings) -> trt_embed::Result<Plan> {
    build_plan(&library(), Target::Capabilities(&[ampere()]), onnx, settings, &NoProgress)
}

/// The engine of `folder`, as it is written and read again.
fn engine(folder: &ModelFolder, arithmetic: Arithmetic) -> EngineFile {
    let disk = tempfile::tempdir().unwrap();
    let (library, cache, wanted) = (library(), Cache::at(disk.path().join("cache")), [ampere()]);
    let calibration = (arithmetic == Arithmetic::Int8).then(|| {
        let mut samples = Samples::of_all_lengths(folder).unwrap();
        samples.truncate(32); // the fewest that are taken
        calibrate(folder, &samples, &CalibrationSettings::default(), &NoProgress).unwrap()
    });
    let quantization = calibration.map(|calibration| calibration.quantization([]));
    let mut request = EngineRequest::new(folder);
    request.settings = settings(arithmetic, &PROFILES);
    request.quantization = quantization.as_ref();
    let made = build_engine(&library, Target::Capabilities(&wanted), &cache, &request, &NoProgress);
    let made = made.unwrap_or_else(|error| panic!("{} in {arithmetic}: {error}", folder.root.display()));
    let path = disk.path().join("model.engine");
    EngineFile::write(&path, &made.manifest, made.plan()).unwrap();
    EngineFile::read(&path, |manifest| manifest.check_folder(folder)).unwrap()
}

/// The fixtures' model folders: every family and its spellings.
fn folders() -> Vec<PathBuf> {
    let has = |folder: &PathBuf| folder.join("config.json").is_file() && folder.join("tokenizer.json").is_file();
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path()).filter(has).collect();
    folders.sort();
    assert!(folders.len() >= 14, "{folders:?}");
    folders
}

/// Builds every fixture, and checks what its manifest says and what its plan takes.
fn build_all(arithmetic: Arithmetic) {
    for path in folders() {
        let folder = ModelFolder::open(&path).unwrap();
        let built = engine(&folder, arithmetic);
        let (manifest, name) = (&built.manifest, path.display());
        assert_eq!(
            (manifest.machine.tensorrt.as_str(), manifest.machine.compute_capability.as_str()),
            ("RTX 1.7.1", "8.6"),
            "{name}"
        );
        assert!(manifest.machine.is_ahead_of_time() && manifest.fidelity.is_none(), "{name}");
        let bar = Gate::Standard.bar(arithmetic).unwrap();
        assert_eq!(manifest.unproven.as_ref().map(|wanted| wanted.min_cosine), Some(bar), "{name}");
        assert_eq!((manifest.arithmetic, &manifest.profiles), (arithmetic, &profiles(&PROFILES)), "{name}");
        assert_eq!(manifest.plan_bytes, [built.plan().len() as u64], "{name}: one plan for all profiles");
        let precision = if arithmetic == Arithmetic::Fp32 { Precision::Fp32 } else { Precision::Fp16 };
        match &manifest.model.source {
            Source::Exported(found) => assert!(arithmetic != Arithmetic::Int8 && *found == precision, "{name}"),
            Source::Quantised { precision: found, .. } => {
                assert!(arithmetic == Arithmetic::Int8 && *found == precision, "{name}")
            }
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(arithmetic == Arithmetic::Int8, manifest.build.int8_inputs > 0, "{name}");
    }
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn every_family_builds_in_fp32() {
    build_all(Arithmetic::Fp32);
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn every_family_builds_in_fp16() {
    build_all(Arithmetic::Fp16);
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn every_family_builds_in_int8() {
    build_all(Arithmetic::Int8);
}

/// The variants of `families.json` whose graphs differ from the families' own and from each other's.
#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn every_variant_of_a_family_builds() {
    let graph = |folder: &ModelFolder| Graph::new(&folder.architecture().unwrap(), Precision::Fp16).unwrap();
    let mut seen: BTreeSet<String> = folders().iter().map(|path| graph(&ModelFolder::open(path).unwrap()).digest_hex()).collect();
    let mut built = 0;
    for case in Cases::read_file("families.json").cases {
        let disk = case.folder();
        let folder = ModelFolder::open(disk.path()).unwrap();
        let graph = graph(&folder);
        if seen.insert(graph.digest_hex()) {
            let bytes = graph.encode().unwrap().unwrap();
            plan(&bytes, &settings(Arithmetic::Fp16, &PROFILES)).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            built += 1;
        }
    }
    assert!(built >= 10, "{built} graphs were built");
}

/// What is built beside families' own graphs: those that calibration observes, linears smoothed before int8, and int64 inputs with token types, as
/// other exporters feed graphs.
#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn every_other_form_of_a_graph_builds() {
    let (mut observed, mut typed) = (0, 0);
    for path in folders() {
        let folder = ModelFolder::open(&path).unwrap();
        let architecture = folder.architecture().unwrap();
        let build = |what: &str, graph: Graph, arithmetic| {
            let bytes = graph.encode().unwrap().unwrap();
            plan(&bytes, &settings(arithmetic, &PROFILES))
                .unwrap_or_else(|error| panic!("{what} of {}: {error}", path.display()));
        };
        build("what calibration observes", Graph::observed(&architecture).unwrap(), Arithmetic::Fp32);
        observed += 1;
        if architecture.embeddings.token_types.is_some() {
            let inputs = Inputs::new(Integers::Int64).with_token_types();
            let graph = Graph::with_inputs(&architecture, Precision::Fp16, None, inputs).unwrap();
            build("int64 inputs with token types", graph, Arithmetic::Fp16);
            typed += 1;
        }
    }
    assert!(observed >= 14 && typed >= 8, "{observed} {typed}");

    let folder = ModelFolder::open(fixtures().join("mpnet")).unwrap();
    let samples = Samples::of_all_lengths(&folder).unwrap();
    let smoothed = CalibrationSettings { smoothing: Some(0.5), ..CalibrationSettings::default() };
    let ranges = calibrate(&folder, &samples, &smoothed, &NoProgress).unwrap();
    let float = folder.architecture().unwrap().linears().next().unwrap().name;
    let quantised = Graph::quantized(&folder.architecture().unwrap(), Precision::Fp16, &ranges.quantization([float])).unwrap();
    assert!(!plan(&quantised.encode().unwrap().unwrap(), &settings(Arithmetic::Int8, &PROFILES)).unwrap().bytes.is_empty());
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn every_capability_that_is_known_can_be_built_for_and_all_together() {
    let (library, known) = (library(), ahead_of_time_capabilities());
    assert!(known.len() >= 6 && known.contains(&ampere()), "{known:?}");
    let build = |wanted: &[ComputeCapability]| {
        build_plan(&library, Target::Capabilities(wanted), TINY, &settings(Arithmetic::Fp32, &PROFILES), &NoProgress)
    };
    for one in &known {
        assert!(!build(&[*one]).unwrap().bytes.is_empty(), "{one}");
    }
    assert!(!build(&known).unwrap().bytes.is_empty());
    for (wanted, part) in
        [(vec![], "at least one of"), (vec![ampere(), (9, 0).into()], "9.0 is none"), (vec![ampere(); 2], "twice")]
    {
        let error = build(&wanted).unwrap_err();
        assert!(matches!(&error, Error::Setting { setting: Setting::ComputeCapability, .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn what_is_no_graph_or_has_unknown_nodes_is_an_error() {
    let settings = settings(Arithmetic::Fp32, &PROFILES);
    for graph in [&b"not a graph"[..], &TINY[..TINY.len() / 2], b""] {
        let error = plan(graph, &settings).unwrap_err();
        assert!(matches!(&error, Error::TensorRt { action: "build the engine", .. }), "{error}");
    }
    // An operator that nobody knows, in the place of the Gather.
    let place = TINY.windows(6).position(|name| name == b"Gather").unwrap();
    let mut graph = TINY.to_vec();
    graph[place..place + 6].copy_from_slice(b"Bather");
    let error = plan(&graph, &settings).unwrap_err().to_string();
    assert!(error.contains("node 0") && error.contains("Bather"), "{error}");
    // An operator on what does not fit it. That there is no driver is true, and no cause.
    let flat = changed(|model| {
        model.graph.as_mut().unwrap().input[1] =
            ValueInfoProto::tensor("attention_mask", ElementType::Int32, &[Dim::Named("batch")]);
    });
    let error = plan(&flat, &settings).unwrap_err().to_string();
    assert!(error.contains("node 2 Unsqueeze mask_column") && !error.contains("CUDA driver"), "{error}");
}

/// The tiny graph after `change`.
fn changed(change: impl FnOnce(&mut ModelProto)) -> Vec<u8> {
    let disk = tempfile::tempdir().unwrap();
    let path = disk.path().join("tiny.onnx");
    std::fs::write(&path, TINY).unwrap();
    let mut model = onnx::read_model(&path).unwrap();
    change(&mut model);
    model.encode_to_vec()
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn impossible_profiles_are_errors() {
    let fp32 = |texts: &[&str]| settings(Arithmetic::Fp32, texts);
    assert!(matches!(plan(TINY, &fp32(&[])), Err(Error::Setting { setting: Setting::Profiles, .. })));
    // Rows of 16 tokens alone.
    let fixed = changed(|model| {
        let input = |name: &str| ValueInfoProto::tensor(name, ElementType::Int32, &[Dim::Named("batch"), Dim::Fixed(16)]);
        model.graph.as_mut().unwrap().input = ["input_ids", "attention_mask"].map(input).into();
    });
    assert!(!plan(&fixed, &fp32(&["1x16", "1x16:2x16:4x16"])).unwrap().bytes.is_empty());
    let error = plan(&fixed, &fp32(&["1x17"])).unwrap_err();
    assert!(matches!(&error, Error::TensorRt { action: "build the engine", .. }), "{error}");
    assert!(["17", "16"].iter().all(|part| error.to_string().contains(part)), "{error}");
    // A third input, of another rank.
    let flat = changed(|model| {
        let input = ValueInfoProto::tensor("weight_of_row", ElementType::Float32, &[Dim::Named("batch")]);
        model.graph.as_mut().unwrap().input.push(input);
    });
    let error = plan(&flat, &fp32(&["1x16"])).unwrap_err().to_string();
    assert!(error.contains("weight_of_row") && error.contains("[batch, seq]"), "{error}");
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn graphs_of_other_types_than_asked_for_are_errors() {
    let folder = ModelFolder::open(fixtures().join("mpnet")).unwrap();
    let architecture = folder.architecture().unwrap();
    let graph = |precision| Graph::new(&architecture, precision).unwrap().encode().unwrap().unwrap();
    let samples = Samples::of_all_lengths(&folder).unwrap();
    let ranges = calibrate(&folder, &samples, &CalibrationSettings::default(), &NoProgress).unwrap().quantization([]);
    let quantised = Graph::quantized(&architecture, Precision::Fp16, &ranges).unwrap().encode().unwrap().unwrap();
    let (fp32, fp16) = (graph(Precision::Fp32), graph(Precision::Fp16));
    for (graph, arithmetic, part) in [
        (&fp32, Arithmetic::Fp16, "export it with --precision fp16"),
        (&fp16, Arithmetic::Fp32, "holds fp16 tensors"),
        (&quantised, Arithmetic::Fp16, "build it with --precision int8"),
        (&fp16, Arithmetic::Int8, "no QuantizeLinear"),
    ] {
        let error = plan(graph, &settings(arithmetic, &PROFILES)).unwrap_err();
        assert!(matches!(&error, Error::TensorRt { action: "build the engine", .. }), "{error}");
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
    // Strongly typed: layers have no precision of their own.
    let mut kept = settings(Arithmetic::Fp16, &PROFILES);
    kept.fp32_layers = vec!["LayerNorm".into()];
    assert!(matches!(plan(&fp16, &kept), Err(Error::Setting { setting: Setting::Fp32Layers, .. })));
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn a_build_that_is_cancelled_says_so() {
    struct Cancel(AtomicUsize);
    impl Progress for Cancel {
        fn step_done(&self, _: &str, _: u32) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::Relaxed) > 0
        }
    }
    let progress = Cancel(AtomicUsize::new(0));
    let built =
        build_plan(&library(), Target::Capabilities(&[ampere()]), TINY, &settings(Arithmetic::Fp32, &PROFILES), &progress);
    assert!(matches!(built, Err(Error::Cancelled { .. })));
    assert!(progress.0.into_inner() > 0);
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn vectors_of_a_file_are_no_proof_where_nothing_runs() {
    let folder = ModelFolder::open(fixtures().join("bert")).unwrap();
    let disk = tempfile::tempdir().unwrap();
    let file = disk.path().join("vectors.json");
    let vector = vec![1.0; folder.config.hidden_size];
    std::fs::write(&file, serde_json::json!({"texts": ["a"], "vectors": [vector]}).to_string()).unwrap();
    let (library, cache, wanted) = (library(), Cache::at(disk.path()), [ampere()]);
    let mut request = EngineRequest::new(&folder);
    request.settings = settings(Arithmetic::Fp16, &PROFILES);
    request.reference = Some(&file);
    let error = build_engine(&library, Target::Capabilities(&wanted), &cache, &request, &NoProgress).unwrap_err();
    assert!(matches!(&error, Error::Setting { setting: Setting::ComputeCapability, .. }), "{error}");
    // Nor is anything to be shown where nobody asked for it.
    request.reference = None;
    request.gate = Gate::Off;
    let engine = build_engine(&library, Target::Capabilities(&wanted), &cache, &request, &NoProgress).unwrap();
    assert_eq!((engine.manifest.unproven, engine.manifest.fidelity), (None, None));
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn gelu_by_tanh_is_for_all_shapes_of_a_plan_or_for_none() {
    let folder = ModelFolder::open(fixtures().join("bert")).unwrap();
    let disk = tempfile::tempdir().unwrap();
    let (library, cache, wanted) = (library(), Cache::at(disk.path()), [ampere()]);
    let mut request = EngineRequest::new(&folder);
    request.settings = settings(Arithmetic::Fp16, &PROFILES);
    let build = |request: &EngineRequest<'_>| build_engine(&library, Target::Capabilities(&wanted), &cache, request, &NoProgress);
    for all in [0, 16] {
        request.tanh_gelu = Some(all);
        let model = build(&request).unwrap().manifest.model;
        assert_eq!((model.tanh_gelu, model.tanh_gelu_from), (true, 0));
    }
    request.tanh_gelu = Some(17);
    let error = build(&request).unwrap_err();
    assert!(matches!(&error, Error::Setting { setting: Setting::TanhGelu, .. }), "{error}");
    assert!(error.to_string().contains("RTX 1.7.1 keeps all shapes in one plan"), "{error}");
}

/// The command with its caches in `place`.
fn run(place: &Place, args: &[&str]) -> Run {
    let out = place.command(args).env("TRT_EMBED_CACHE", place.path("cache")).output().unwrap();
    Run { status: out.status.code().unwrap(), stdout: out.stdout, stderr: String::from_utf8(out.stderr).unwrap() }
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers"]
fn the_command_builds_for_a_gpu_that_is_not_here() {
    let place = Place::new();
    let build = ["build", "-m", "model", "--bucket", "1x16", "-o", "a.engine", "--compute-capability"];
    let said = run(&place, &[&build[..], &["8.6", "--compute-capability", "8.9"]].concat()).ok();
    for part in ["any GPU of compute capability 8.6, 8.9, TensorRT RTX 1.7.1", "unproven: a cosine of at least 0.9999"] {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
    let read = run(&place, &["inspect", "a.engine"]).ok();
    for part in ["RTX 1.7.1", "any GPU of compute capability 8.6, 8.9", "ahead of time", "unproven"] {
        assert!(read.contains(part), "no {part:?} in: {read}");
    }
    let doctor = String::from_utf8(run(&place, &["doctor"]).stdout).unwrap();
    for part in [
        "compiled with the headers of TensorRT RTX 1.7.1",
        "TensorRT RTX 1.7.1 from ",
        "loads: engines can be built, with --compute-capability also for GPUs that are not here",
    ] {
        assert!(doctor.contains(part), "no {part:?} in: {doctor}");
    }
    std::fs::remove_file(place.path("a.engine")).unwrap();
    run(&place, &[&build[..], &["9.0"]].concat()).fails(&["--compute-capability: 9.0 is none", "7.5, 8.0, 8.6"]);
    run(&place, &[&build[..], &["8.6", "--tanh-gelu=17"]].concat())
        .fails(&["--tanh-gelu: it begins at 17 tokens", "more than 16"]);
    run(&place, &[&build[..], &["sm_86"]].concat()).fails(&["--compute-capability: \"sm_86\" is not MAJOR.MINOR"]);
    run(&place, &[&build[..], &["8.6", "--precision", "auto"]].concat()).ends(2, &["--precision auto", "--compute-capability"]);
    run(&place, &[&build[..], &["8.6", "--reference", "a.json"]].concat()).ends(2, &["--reference"]);
    run(&place, &["embed", "-m", "model", "--require-proof", "a"]).ends(2, &["--engine"]);
    assert!(!place.path("a.engine").exists());
}

#[test]
#[ignore = "needs TensorRT for RTX and its headers, and no NVIDIA driver"]
fn without_a_driver_an_engine_is_refused_and_not_a_crash() {
    let place = Place::new();
    let build = ["build", "-m", "model", "--bucket", "1x16", "--compute-capability", "8.6", "-o", "a.engine"];
    run(&place, &build).ok();
    for more in [&[][..], &["--require-proof"], &["--backend", "tensorrt"]] {
        run(&place, &[&["embed", "-m", "model", "--engine", "a.engine", "a"], more].concat()).fails(&["no NVIDIA driver"]);
    }
    // Without a capability it is for this machine's GPU.
    run(&place, &["build", "-m", "model", "--bucket", "1x16", "-o", "b.engine"]).fails(&["no NVIDIA driver"]);
}
