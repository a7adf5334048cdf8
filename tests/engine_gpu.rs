//! From a model to a proven engine, on a GPU: the gate, the cache, and graphs of other exporters.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

#[path = "common/phases.rs"]
mod phases;

use phases::Phases;
use prost::Message;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use trt_embed::backend::tensorrt::{
    Arithmetic, Cache, Candidate, EngineFile, EngineRequest, Fastest, FastestRequest, Gate, Library, Source, Unproven,
    build_engine, build_fastest, cached_engine, load_engine, prove,
};
use trt_embed::cuda::Device;
use trt_embed::graph::onnx::{self, AttributeProto, Dim, ElementType, NodeProto, ValueInfoProto};
use trt_embed::graph::{Precision, export_to_folder};
use trt_embed::model::ModelFolder;
use trt_embed::quantization::{Calibration, CalibrationSettings, Samples, calibrate};
use trt_embed::{BackendChoice, Embedder, Error, NoProgress, Progress, Setting};

/// A bucket of several rows and a wide profile, up to the fixture's longest text.
const PROFILES: [&str; 2] = ["8x24", "1x1:2x32:4x208"];

struct Place {
    library: Arc<Library>,
    device: Device,
    folder: ModelFolder,
    cache: Cache,
    disk: tempfile::TempDir,
}

/// Whether something was built for the `kind` candidate.
fn built(phases: &Phases, kind: &str) -> bool {
    let phases = phases.0.lock().unwrap();
    let of_kind = phases.iter().skip_while(|phase| **phase != format!("the {kind} candidate")).skip(1);
    of_kind.take_while(|phase| !phase.ends_with(" candidate")).any(|phase| phase.starts_with("building the engine"))
}

impl Place {
    fn new() -> Self {
        let disk = tempfile::tempdir().unwrap();
        Self {
            library: Library::load().unwrap(),
            device: Device::open(0).unwrap(),
            folder: ModelFolder::open("tests/fixtures/mpnet").unwrap(),
            cache: Cache::at(disk.path().join("cache")),
            disk,
        }
    }

    fn request(&self, arithmetic: Arithmetic, min_cosine: f64) -> EngineRequest<'_> {
        let mut request = EngineRequest::new(&self.folder);
        request.settings.arithmetic = arithmetic;
        request.settings.profiles = PROFILES.iter().map(|text| text.parse().unwrap()).collect();
        request.gate = Gate::MinCosine(min_cosine);
        request
    }

    fn build_fastest(&self, request: &FastestRequest<'_>, phases: &Phases) -> trt_embed::Result<Fastest> {
        build_fastest(&self.library, &self.device, &self.cache, request, phases)
    }

    fn calibration(&self) -> Calibration {
        let samples = Samples::of_all_lengths(&self.folder).unwrap();
        calibrate(&self.folder, &samples, &CalibrationSettings::default(), &NoProgress).unwrap()
    }

    fn build(&self, request: &EngineRequest<'_>) -> trt_embed::Result<EngineFile> {
        build_engine(&self.library, &self.device, &self.cache, request, &NoProgress)
    }

    /// The fixture as Optimum writes such a model: int64 inputs with token types, other names, a second output.
    fn foreign(&self) -> PathBuf {
        let out = self.disk.path().join("onnx");
        export_to_folder(&self.folder, Precision::Fp32, &out).unwrap();
        let mut model = onnx::read_model(&out.join("model.onnx")).unwrap();
        let graph = model.graph.as_mut().unwrap();
        let names = ["input_ids", "attention_mask", "token_type_ids"];
        for name in graph.node.iter_mut().flat_map(|node| &mut node.input) {
            if names.contains(&name.as_str()) {
                *name = format!("{name}.narrow");
            }
        }
        let node = |op: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>| NodeProto {
            input: inputs.iter().map(|input| (*input).to_owned()).collect(),
            output: vec![output.to_owned()],
            name: format!("foreign.{output}"),
            op_type: op.to_owned(),
            attribute,
            domain: String::new(),
        };
        let to = |element: ElementType| vec![AttributeProto::int("to", element as i64)];
        let casts = [
            node("Cast", &["input_ids"], "input_ids.narrow", to(ElementType::Int32)),
            node("Cast", &["attention_mask"], "attention_mask.narrow", to(ElementType::Int32)),
            node("Cast", &["token_type_ids"], "token_types", to(ElementType::Float32)),
        ];
        graph.node.splice(0..0, casts);
        // Token types are 0, and so is what they add.
        let axes = graph.initializer.iter().find(|tensor| tensor.name == "one").unwrap().clone();
        graph.initializer.push(onnx::TensorProto {
            name: "foreign.axis".into(),
            raw_data: 2i64.to_le_bytes().to_vec().into(),
            ..axes
        });
        graph.node.extend([
            node("Unsqueeze", &["token_types", "foreign.axis"], "token_types.wide", vec![]),
            node("Add", &["last_hidden_state", "token_types.wide"], "token_embeddings", vec![]),
            node(
                "ReduceMean",
                &["token_embeddings"],
                "sentence_embedding",
                vec![AttributeProto::ints("axes", &[1]), AttributeProto::int("keepdims", 0)],
            ),
        ]);
        let tokens = [Dim::Named("batch_size"), Dim::Named("sequence_length")];
        let hidden = Dim::Fixed(self.folder.config.hidden_size);
        graph.input = names.map(|name| ValueInfoProto::tensor(name, ElementType::Int64, &tokens)).into();
        graph.output = vec![
            ValueInfoProto::tensor("token_embeddings", ElementType::Float32, &[tokens[0], tokens[1], hidden]),
            ValueInfoProto::tensor("sentence_embedding", ElementType::Float32, &[tokens[0], hidden]),
        ];
        let path = out.join("foreign.onnx");
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        path
    }

    fn entries(&self, extension: &str) -> usize {
        let of = |path: &Path| path.extension().is_some_and(|found| found == extension);
        std::fs::read_dir(self.cache.folder())
            .map_or(0, |folder| folder.filter(|entry| of(&entry.as_ref().unwrap().path())).count())
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn engines_of_both_precisions_pass_and_say_how_well() {
    let place = Place::new();
    for (arithmetic, bar) in [(Arithmetic::Fp32, 0.99999), (Arithmetic::Fp16, 0.999)] {
        let engine = place.build(&place.request(arithmetic, bar)).unwrap();
        let manifest = &engine.manifest;
        let fidelity = manifest.fidelity.as_ref().unwrap();
        println!("{arithmetic}: {fidelity:?}");
        assert!(fidelity.min_cosine >= bar && fidelity.min_cosine <= 1.0 + 1e-9, "{fidelity:?}");
        assert!(fidelity.texts >= 35 && fidelity.not_finite == 0, "{fidelity:?}");
        assert!(fidelity.max_abs_difference > 0.0, "the CPU was compared with itself");
        assert_eq!(manifest.profiles.iter().map(ToString::to_string).collect::<Vec<_>>(), PROFILES);
        assert!(matches!(manifest.model.source, Source::Exported(_)));

        let path = place.disk.path().join("model.engine");
        EngineFile::write(&path, manifest, engine.plan()).unwrap();
        assert!(load_engine(&path, &place.library, &place.device, &place.folder).unwrap() == engine);
        let bert = ModelFolder::open("tests/fixtures/bert").unwrap();
        let error = load_engine(&path, &place.library, &place.device, &bert).unwrap_err();
        assert!(matches!(error, Error::EngineMismatch { .. }), "{error}");
    }
    assert_eq!((place.entries("timing"), place.entries("engine")), (1, 0));
}

/// Tries, whenever a phase begins, what another process that wants to build would: to take the cache's lock.
struct OtherBuild {
    lock: PathBuf,
    /// Each phase's name, and whether another build could have begun in it.
    found: Mutex<Vec<(String, bool)>>,
}

impl Progress for OtherBuild {
    fn phase_started(&self, phase: &str, parent: Option<&str>, _: u32) {
        if parent.is_none() {
            let could = std::fs::File::open(&self.lock).is_ok_and(|file| file.try_lock().is_ok());
            self.found.lock().unwrap().push((phase.to_owned(), could));
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn no_other_build_begins_while_precisions_are_timed() {
    let place = Place::new();
    let (calibration, other) =
        (place.calibration(), OtherBuild { lock: place.cache.folder().join("build.lock"), found: Mutex::default() });
    let mut request = FastestRequest::new(place.request(Arithmetic::Fp16, 0.95));
    request.engine.settings.profiles.truncate(1);
    request.calibration = Some(&calibration);
    build_fastest(&place.library, &place.device, &place.cache, &request, &other).unwrap();
    let quantization = calibration.quantization([]);
    let mut request = place.request(Arithmetic::Int8, 0.95);
    request.settings.profiles.truncate(1);
    request.quantization = Some(&quantization);
    build_engine(&place.library, &place.device, &place.cache, &request, &other).unwrap();
    let found = other.found.into_inner().unwrap();
    let of =
        |begin: &str| found.iter().filter(|(phase, _)| phase.starts_with(begin)).map(|(_, could)| *could).collect::<Vec<_>>();
    assert_eq!(of("measuring"), [false; 2], "{found:?}");
    assert_eq!(of("comparing"), [false; 3], "{found:?}");
    assert_eq!(of("building the engine"), [false; 3], "{found:?}");
    assert!(of("the fp16 candidate").iter().all(|could| *could), "{found:?}");
}

/// As an engine for this GPU that was built where no GPU was; its plan is one that runs here.
fn unproven(place: &Place, min_cosine: f64) -> EngineFile {
    let mut request = place.request(Arithmetic::Fp32, 0.99999);
    request.gate = Gate::Off;
    let mut engine = place.build(&request).unwrap();
    assert!(engine.manifest.fidelity.is_none() && engine.manifest.unproven.is_none());
    engine.manifest.unproven = Some(Unproven { min_cosine });
    engine
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn an_engine_that_was_built_elsewhere_is_proven_once_on_a_machine() {
    let place = Place::new();
    let prove = |engine: &mut EngineFile, phases: &Phases| {
        prove(&place.library, &place.device, &place.cache, &place.folder, engine, phases)
    };
    let fresh = unproven(&place, 0.99999);
    let (mut first, phases) = (fresh.clone(), Phases::default());
    prove(&mut first, &phases).unwrap();
    assert!(phases.has("comparing the engine") && first.manifest.unproven.is_none());
    assert!(first.manifest.fidelity.as_ref().unwrap().min_cosine >= 0.99999, "{:?}", first.manifest.fidelity);
    assert_eq!((first.manifest.costs.len(), place.entries("proof")), (PROFILES.len(), 1));

    let (mut second, phases) = (fresh.clone(), Phases::default());
    prove(&mut second, &phases).unwrap();
    assert!(!phases.has("comparing the engine") && second == first);

    // What misses its bar leaves nothing.
    let mut strict = fresh;
    strict.manifest.unproven = Some(Unproven { min_cosine: 1.5 });
    let error = prove(&mut strict, &Phases::default()).unwrap_err();
    assert!(matches!(error, Error::Fidelity { bar: 1.5, .. }), "{error}");
    assert_eq!(place.entries("proof"), 1);
}

#[cfg(feature = "cli")]
#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn who_requires_proof_gets_it_or_a_refusal() {
    let place = Place::new();
    let engine = unproven(&place, 0.99999);
    let path = place.disk.path().join("a.engine");
    EngineFile::write(&path, &engine.manifest, engine.plan()).unwrap();
    let embed = |more: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_trt-embed"));
        command.env("TRT_EMBED_CACHE", place.cache.folder()).args(["embed", "-m", "tests/fixtures/mpnet", "a"]);
        let out = command.arg("--engine").arg(&path).args(more).output().unwrap();
        (out.status.success(), String::from_utf8(out.stderr).unwrap())
    };
    let (passed, said) = embed(&["--require-proof"]);
    assert!(!passed && said.contains("never compared with its model on"), "{said}");
    for more in [&[][..], &["--require-proof"]] {
        let (passed, said) = embed(more);
        assert!(passed, "{said}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn gelu_by_tanh_is_compared_with_the_model_itself() {
    let place = Place::new();
    let mut request = place.request(Arithmetic::Fp32, 0.9999);
    request.settings.profiles.truncate(1);
    request.tanh_gelu = Some(0);
    let engine = place.build(&request).unwrap();
    let fidelity = engine.manifest.fidelity.as_ref().unwrap();
    println!("{fidelity:?}");
    // fp32 alone loses some 1e-11.
    assert!(engine.manifest.model.tanh_gelu && fidelity.min_cosine < 1.0 - 1e-9, "{fidelity:?}");
    let path = place.disk.path().join("tanh.engine");
    EngineFile::write(&path, &engine.manifest, engine.plan()).unwrap();
    assert!(load_engine(&path, &place.library, &place.device, &place.folder).unwrap() == engine);
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT 8.6"]
fn gelu_by_tanh_from_a_number_of_tokens_on_leaves_small_shapes_exact() {
    let place = Place::new();
    let mut request = place.request(Arithmetic::Fp32, 0.9999);
    request.settings.profiles = ["1x16", "8x208"].map(|text| text.parse().unwrap()).into();
    request.tanh_gelu = Some(1000);
    let engine = place.build(&request).unwrap();
    assert_eq!((engine.manifest.model.tanh_gelu, engine.manifest.model.tanh_gelu_from), (true, 1000));
    let path = place.disk.path().join("divided.engine");
    EngineFile::write(&path, &engine.manifest, engine.plan()).unwrap();

    let open = |choice| Embedder::builder("tests/fixtures/mpnet").backend(choice);
    let gpu = open(BackendChoice::TensorRt).engine(&path).build().unwrap();
    let cpu = open(BackendChoice::Cpu).build().unwrap();
    // How far the engine's vector of `text` is from the CPU's, and the tokens of the text.
    let away = |text: String| {
        let [a, b] = [&gpu, &cpu].map(|embedder| embedder.embed(&[&text]).unwrap());
        let squares = a.values.iter().zip(&b.values).map(|(a, b)| f64::from(a - b).powi(2));
        (squares.sum::<f64>().sqrt(), a.tokens[0])
    };
    // Texts of at most 16 tokens fit the small bucket, which is the faster one; longer ones the large one alone.
    let (mut short, mut long) = (0.0, 0.0);
    for text in ["a cat", "rain", "the hills", "to be"] {
        for repeated in [text.to_owned(), [text].repeat(16).join(" ")] {
            let (distance, tokens) = away(repeated);
            let most: &mut f64 = if tokens <= 16 { &mut short } else { &mut long };
            *most = most.max(distance);
        }
    }
    println!("fp32 beside the CPU: {short:.2e} with the exact GELU, {long:.2e} by tanh");
    assert!(short > 0.0 && short < 1e-5 && long > 3.0 * short, "{short} {long}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn an_engine_below_the_bar_is_not_kept_but_its_timings_are() {
    let place = Place::new();
    let request = place.request(Arithmetic::Fp32, 1.1);
    let error = cached_engine(&place.library, &place.device, &place.cache, &request, &NoProgress).unwrap_err();
    let Error::Fidelity { bar, tokens, ref profile, .. } = error else { panic!("{error}") };
    assert_eq!(bar, 1.1);
    assert!((2..=208).contains(&tokens) && PROFILES.contains(&profile.as_str()), "{error}");
    assert_eq!((place.entries("timing"), place.entries("engine")), (1, 0));
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn the_second_call_takes_the_cached_engine() {
    let place = Place::new();
    let request = place.request(Arithmetic::Fp16, 0.999);
    let open = |request: &EngineRequest<'_>| {
        let phases = Phases::default();
        let found = cached_engine(&place.library, &place.device, &place.cache, request, &phases).unwrap();
        (found, phases.has("building the engine"))
    };
    let ((first, path), built) = open(&request);
    assert!(built && path.is_file());
    let ((second, _), built) = open(&request);
    assert!(!built && second == first, "built twice");

    // The head is no part of an engine, a higher bar is.
    let mut other = place.folder.clone();
    other.normalize = !other.normalize;
    let mut same = request.clone();
    same.folder = &other;
    assert!(!open(&same).1, "built anew for another head");
    let mut proven = request.clone();
    proven.gate = Gate::Off;
    assert!(!open(&proven).1, "a proven engine serves who asks for no proof");
    let mut stricter = request.clone();
    stricter.gate = Gate::MinCosine(1.1);
    let error = cached_engine(&place.library, &place.device, &place.cache, &stricter, &NoProgress).unwrap_err();
    assert!(matches!(error, Error::Fidelity { .. }), "{error}");
    assert!(!open(&request).1, "the engine of the lower bar is gone");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_foreign_graph_builds_runs_and_is_told_from_ours() {
    let place = Place::new();
    let path = place.foreign();
    let mut request = place.request(Arithmetic::Fp32, 0.99999);
    request.onnx = Some(&path);
    let engine = place.build(&request).unwrap();
    assert_eq!(engine.manifest.model.source, Source::Onnx("foreign.onnx".into()));
    println!("{:?}", engine.manifest.fidelity);
    engine.manifest.check_folder(&place.folder).unwrap();

    // A graph of other weights is found out by the folder's own.
    let mut model = onnx::read_model(&path).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let tensor = graph.initializer.iter_mut().find(|tensor| tensor.name.ends_with("word_embeddings.weight")).unwrap();
    let mut bytes = tensor.raw_data.to_vec();
    bytes.rotate_left(4);
    tensor.raw_data = bytes.into();
    let changed = path.with_file_name("changed.onnx");
    std::fs::write(&changed, model.encode_to_vec()).unwrap();
    request.onnx = Some(&changed);
    let error = place.build(&request).unwrap_err();
    assert!(matches!(error, Error::Fidelity { .. }), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_stopped_build_leaves_nothing() {
    struct Stop(AtomicBool);
    impl Progress for Stop {
        fn phase_started(&self, phase: &str, _: Option<&str>, _: u32) {
            self.0.fetch_or(phase == "exporting the graph", Ordering::SeqCst);
        }
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }
    let place = Place::new();
    let request = place.request(Arithmetic::Fp32, 0.99999);
    let stop = Stop(AtomicBool::new(false));
    let error = cached_engine(&place.library, &place.device, &place.cache, &request, &stop).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert_eq!((place.entries("timing"), place.entries("engine")), (0, 0));
    cached_engine(&place.library, &place.device, &place.cache, &request, &NoProgress).unwrap();
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn the_fastest_that_passes_is_chosen_and_fp16_is_built_once() {
    let place = Place::new();
    let calibration = place.calibration();
    let mut request = FastestRequest::new(place.request(Arithmetic::Fp16, 0.95));
    request.calibration = Some(&calibration);
    let phases = Phases::default();
    let Fastest { engine, candidates, fitted, .. } = place.build_fastest(&request, &phases).unwrap();
    println!("{candidates:?}\n{:?}\n{:?}", engine.manifest.speed, engine.manifest.products);
    // Of the bucket alone: a profile of several shapes is not captured.
    assert_eq!(engine.manifest.products.iter().map(|products| products.profile.to_string()).collect::<Vec<_>>(), [PROFILES[0]]);
    assert!(built(&phases, "int8") && built(&phases, "fp16") && !built(&phases, "fp32"));
    assert_eq!(candidates.iter().map(|found| found.arithmetic).collect::<Vec<_>>(), [Arithmetic::Int8, Arithmetic::Fp16]);
    assert_eq!(fitted.unwrap().bar, 0.95);
    assert!(candidates.iter().all(|found| found.refused.is_none() && found.micros.len() == PROFILES.len()));
    assert!(candidates.iter().all(|found| found.fidelity.as_ref().unwrap().min_cosine >= 0.95));
    let mean = |arithmetic| {
        let found = candidates.iter().find(|found| found.arithmetic == arithmetic);
        found.and_then(Candidate::mean_micros).unwrap()
    };
    let (int8, fp16) = (mean(Arithmetic::Int8), mean(Arithmetic::Fp16));
    assert!(int8 > 0.0 && fp16 > 0.0);
    let faster = if int8 < fp16 { Arithmetic::Int8 } else { Arithmetic::Fp16 };
    assert_eq!(engine.manifest.arithmetic, faster);
    for speed in &engine.manifest.speed {
        let beside = if faster == Arithmetic::Int8 { [speed.fp16_micros, None] } else { [None, speed.int8_micros] };
        assert_eq!([speed.fp16_micros, speed.int8_micros], beside);
        assert!(beside.iter().flatten().count() == 1, "{speed:?}");
    }
    let path = place.disk.path().join("fastest.engine");
    EngineFile::write(&path, &engine.manifest, engine.plan()).unwrap();
    assert!(load_engine(&path, &place.library, &place.device, &place.folder).unwrap() == engine);

    // The fp16 candidate lies in the cache, compared, for any later call.
    assert_eq!(place.entries("engine"), 1);
    let phases = Phases::default();
    let half = place.request(Arithmetic::Fp16, 0.95);
    let (cached, _) = cached_engine(&place.library, &place.device, &place.cache, &half, &phases).unwrap();
    assert!(!phases.has("building the engine") && cached.manifest.fidelity.is_some());
    request.calibration = None;
    let phases = Phases::default();
    let again = place.build_fastest(&request, &phases).unwrap();
    assert!(!phases.has("building the engine"), "built twice");
    assert_eq!((again.engine.manifest.arithmetic, again.candidates.len()), (Arithmetic::Fp16, 1));
    let speed = &again.engine.manifest.speed;
    assert!(speed.len() == PROFILES.len() && speed.iter().all(|speed| speed.micros > 0.0 && speed.int8_micros.is_none()));
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn an_fp16_engine_that_was_not_compared_is_compared_and_not_built_again() {
    let place = Place::new();
    let mut half = place.request(Arithmetic::Fp16, 0.95);
    half.gate = Gate::Off;
    let (engine, path) = cached_engine(&place.library, &place.device, &place.cache, &half, &NoProgress).unwrap();
    assert!(engine.manifest.fidelity.is_none());
    let phases = Phases::default();
    let fastest = place.build_fastest(&FastestRequest::new(place.request(Arithmetic::Fp16, 0.95)), &phases).unwrap();
    assert!(!phases.has("building the engine") && fastest.engine.plan() == engine.plan());
    let cached = EngineFile::read_manifest(&path).unwrap();
    assert!(cached.fidelity.is_some() && cached.fidelity == fastest.engine.manifest.fidelity);

    // By time alone the same, without the CPU.
    let phases = Phases::default();
    place.build_fastest(&FastestRequest::new(half), &phases).unwrap();
    assert!(!phases.has("embedding the texts to compare") && !phases.has("comparing"));
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn fp32_is_built_where_nothing_faster_passes_and_none_is_an_error() {
    let place = Place::new();
    let calibration = place.calibration();
    // Between what fp16's 11 bits allow and fp32's rounding.
    let mut request = FastestRequest::new(place.request(Arithmetic::Fp16, 0.999_999_99));
    request.calibration = Some(&calibration);
    let Fastest { engine, candidates, .. } = place.build_fastest(&request, &Phases::default()).unwrap();
    println!("{candidates:?}");
    assert_eq!(engine.manifest.arithmetic, Arithmetic::Fp32);
    let refused: Vec<_> = candidates.iter().map(|found| (found.arithmetic, found.refused.as_ref())).collect();
    assert!(matches!(
        refused.as_slice(),
        [
            (Arithmetic::Int8, Some(Error::QuantizedFidelity { .. })),
            (Arithmetic::Fp16, Some(Error::Fidelity { .. })),
            (Arithmetic::Fp32, None)
        ]
    ));
    assert!(engine.manifest.speed.iter().all(|speed| speed.fp16_micros.is_some() && speed.int8_micros.is_none()));

    request.engine.gate = Gate::MinCosine(1.1);
    let error = place.build_fastest(&request, &Phases::default()).unwrap_err();
    let Error::NoPrecision { refused, .. } = &error else { panic!("{error}") };
    assert_eq!(refused.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["int8", "fp16", "fp32"]);

    // A wrong name ends it before the first build.
    let names = ["encoder.layer.9.nothing".to_owned()];
    request.keep_float = &names;
    let phases = Phases::default();
    let error = place.build_fastest(&request, &phases).unwrap_err();
    assert!(matches!(error, Error::Setting { setting: Setting::KeepFloat, .. }), "{error}");
    assert!(!phases.has("building the engine"));
}
