//! The identity of models: what changes it, and which ONNX files are taken for encoders.

use super::*;
use crate::graph::{Range, export_to_folder};
use crate::tensorrt::engine_file::manifest;
use prost::Message;
use std::fs;

fn folder() -> ModelFolder {
    ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap()
}

/// The fixture as an ONNX file, after `change`.
fn written(change: impl FnOnce(&mut ModelProto)) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    export_to_folder(&folder(), Precision::Fp32, place.path()).unwrap();
    let path = place.path().join("model.onnx");
    let mut model = onnx::read_model(&path).unwrap();
    change(&mut model);
    fs::write(place.path().join("changed.onnx"), model.encode_to_vec()).unwrap();
    (place, path.with_file_name("changed.onnx"))
}

fn open(path: &Path) -> Result<Model> {
    GraphSource::open(path, &folder())?.model(&folder())
}

fn manifest_of(model: Model) -> Manifest {
    Manifest { model, ..manifest() }
}

#[test]
fn an_exported_graph_is_checked_against_the_folder_s_weights() {
    let exported = GraphSource::export(&folder(), Precision::Fp32, false).unwrap().model(&folder()).unwrap();
    assert_eq!((exported.hidden_size, exported.positions), (32, 208));
    assert_eq!(exported.source, Source::Exported(Precision::Fp32));
    manifest_of(exported.clone()).check_folder(&folder()).unwrap();

    let half = GraphSource::export(&folder(), Precision::Fp16, false).unwrap().model(&folder()).unwrap();
    assert_ne!(half.graph, exported.graph);
    manifest_of(half).check_folder(&folder()).unwrap();

    let tanh = GraphSource::export(&folder(), Precision::Fp32, true).unwrap().model(&folder()).unwrap();
    assert!(tanh.tanh_gelu && tanh.graph != exported.graph);
    manifest_of(tanh.clone()).check_folder(&folder()).unwrap();
    let error = manifest_of(Model { tanh_gelu: false, ..tanh }).check_folder(&folder()).unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { field: "the hash of the graph", .. }), "{error}");

    // The fixture of another family has another tokenizer, width and graph.
    let bert = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bert")).unwrap();
    let error = manifest_of(exported.clone()).check_folder(&bert).unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { field: "the hidden size", .. }), "{error}");
    let other = manifest_of(Model { graph: "0".repeat(64), ..exported }).check_folder(&folder()).unwrap_err();
    assert!(matches!(other, Error::EngineMismatch { field: "the hash of the graph", .. }), "{other}");
}

#[test]
fn an_int8_graph_with_gelu_by_tanh_is_known_by_the_model_s_own_graph() {
    let folder = folder();
    let own = Graph::new(&folder.architecture().unwrap(), Precision::Fp32).unwrap();
    let range = |(name, _): (&str, usize)| (name.to_owned(), Range { amax: 4.0, smoothing: None });
    let quantization =
        Quantization { ranges: own.observed_tensors().into_iter().map(range).collect(), ..Quantization::default() };
    let [exact, tanh] = [false, true].map(|tanh_gelu| {
        let source = GraphSource::quantise(&folder, Precision::Fp32, tanh_gelu, &quantization).unwrap();
        source.model(&folder).unwrap()
    });
    assert!(tanh.tanh_gelu && !exact.tanh_gelu && tanh.graph != exact.graph);
    for model in [exact, tanh] {
        assert_eq!(model.source, Source::Quantised { precision: Precision::Fp32, base: own.digest_hex() });
        manifest_of(model).check_folder(&folder).unwrap();
    }
}

#[test]
fn another_head_is_the_same_engine() {
    let built = manifest_of(GraphSource::export(&folder(), Precision::Fp32, false).unwrap().model(&folder()).unwrap());
    let mut other = folder();
    other.pooling.modes = vec![crate::pooling::PoolingMode::Cls, crate::pooling::PoolingMode::Max];
    other.pooling.include_prompt = false;
    other.normalize = !other.normalize;
    built.check_folder(&other).unwrap();
    assert!(pooling_words(&other).starts_with("cls + max, without the prompt"), "{}", pooling_words(&other));
}

#[test]
fn an_onnx_file_is_known_by_its_sha256() {
    let (_place, path) = written(|_| ());
    let model = open(&path).unwrap();
    assert_eq!(model.graph, hex(&Sha256::digest(fs::read(&path).unwrap())));
    assert_eq!(model.source, Source::Onnx("changed.onnx".into()));
    // Its graph is not compared with the folder's, the rest is.
    manifest_of(model.clone()).check_folder(&folder()).unwrap();
    let other = Model { tokenizer: "0".repeat(64), ..model };
    let error = manifest_of(other).check_folder(&folder()).unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { field: "the hash of the tokenizer", .. }), "{error}");
}

#[test]
fn data_files_count_and_must_lie_beside_the_model() {
    let moved = |to: &str| {
        let to = to.to_owned();
        written(move |model| {
            let tensor = model.graph.as_mut().unwrap().initializer.iter_mut().find(|tensor| tensor.raw_data.len() > 64).unwrap();
            tensor.raw_data = Bytes::new();
            tensor.data_location = Some(1);
            tensor.external_data = vec![onnx::StringStringEntryProto { key: "location".into(), value: to }];
        })
    };
    let (place, path) = moved("weights.bin");
    assert!(matches!(open(&path), Err(Error::NotFound { .. })));
    let digest = |bytes: &[u8]| {
        fs::write(place.path().join("weights.bin"), bytes).unwrap();
        open(&path).unwrap().graph
    };
    let (one, two) = (digest(b"one"), digest(b"two"));
    assert_ne!(one, two);
    assert_eq!(digest(b"one"), one);

    let error = open(&moved("../weights.bin").1).unwrap_err().to_string();
    assert!(error.contains("\"../weights.bin\", outside"), "{error}");
    let error = open(&moved("/etc/passwd").1).unwrap_err().to_string();
    assert!(error.contains("outside"), "{error}");
}

#[test]
fn what_is_no_encoder_is_refused_with_what_it_has() {
    let refused = |change: fn(&mut onnx::GraphProto)| {
        let (_place, path) = written(|model| change(model.graph.as_mut().unwrap()));
        let error = open(&path).unwrap_err();
        assert!(matches!(error, Error::Onnx { .. }), "{error}");
        error.to_string()
    };
    let message = refused(|graph| graph.input[0].name = "pixels".into());
    assert!(message.contains("its inputs are pixels, attention_mask"), "{message}");
    let message = refused(|graph| graph.input.truncate(1));
    assert!(message.contains("its inputs are input_ids;"), "{message}");
    let message = refused(|graph| graph.output[0].name = "logits".into());
    assert!(message.contains("its outputs are logits") && message.contains("token_embeddings"), "{message}");
    let message = refused(|graph| {
        let tensor = graph.output[0].r#type.as_mut().unwrap().tensor_type.as_mut().unwrap();
        tensor.shape.as_mut().unwrap().dim[2].dim_value = Some(768);
    });
    assert!(message.contains("768 values, config.json says 32"), "{message}");

    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("text.onnx");
    fs::write(&path, "not ONNX").unwrap();
    assert!(matches!(open(&path), Err(Error::Onnx { .. })));
    assert!(matches!(open(&place.path().join("absent.onnx")), Err(Error::Io { .. })));
}

#[test]
fn what_optimum_adds_is_taken() {
    let (_place, path) = written(|model| {
        let graph = model.graph.as_mut().unwrap();
        let mut types = graph.input[0].clone();
        types.name = "token_type_ids".into();
        graph.input.push(types);
        // Files of old IR versions list constants among the inputs.
        let mut constant = graph.input[0].clone();
        constant.name = graph.initializer[0].name.clone();
        graph.input.push(constant);
        let mut pooled = graph.output[0].clone();
        pooled.name = "sentence_embedding".into();
        graph.output.insert(0, pooled);
    });
    open(&path).unwrap();
}
