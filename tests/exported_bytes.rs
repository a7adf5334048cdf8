//! What BERT and MPNet export to is pinned, byte by byte: engines in users' caches are found by the digest of their graph, and stay
//! valid as long as it does not change.
//!
//! A change here makes every user build every engine again. Where that is meant, `PIN=1 cargo test --test exported_bytes -- --nocapture`
//! prints the new lines of `fixtures/exported_bytes.txt`.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use trt_embed::graph::{Graph, Inputs, Integers, Precision, Quantization, Range};
use trt_embed::model::ModelFolder;

/// A line a graph: folder, variant, [`Graph::digest_hex`], SHA-256 of the exported file without the version of this crate.
const PINNED: &str = include_str!("fixtures/exported_bytes.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of the file without the field `producer_version` (3), which is this crate's version.
fn file_hash(graph: &Graph) -> String {
    let bytes = graph.encode().unwrap().unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let field = [&[3 << 3 | 2, version.len() as u8], version.as_bytes()].concat();
    let at = bytes.windows(field.len()).position(|window| window == field).unwrap();
    hex(&Sha256::new().chain_update(&bytes[..at]).chain_update(&bytes[at + field.len()..]).finalize())
}

/// Ranges for every linear: the second tensor smoothed, the first linear left in float.
fn quantization(graph: &Graph) -> Quantization {
    let range = |place: usize, channels: usize| Range {
        amax: 4.0 + place as f32,
        smoothing: (place == 1).then(|| (0..channels).map(|channel| 1.0 + channel as f32 / 8.0).collect()),
    };
    let tensors = graph.observed_tensors().into_iter().enumerate();
    let ranges: BTreeMap<String, Range> =
        tensors.map(|(place, (name, channels))| (name.to_owned(), range(place, channels))).collect();
    Quantization { ranges, float: [graph.linears()[0].name.clone()].into() }
}

/// Every kind of graph of the fixture `folder`.
fn graphs(folder: &str) -> Vec<(&'static str, Graph)> {
    let model = ModelFolder::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder)).unwrap();
    let architecture = model.architecture().unwrap();
    let with_inputs = |precision, quantization: Option<&Quantization>, inputs| {
        Graph::with_inputs(&architecture, precision, quantization, inputs).unwrap()
    };
    let fp32 = with_inputs(Precision::Fp32, None, Inputs::default());
    let int8 = quantization(&fp32);
    let mut graphs = vec![
        ("fp16", with_inputs(Precision::Fp16, None, Inputs::default())),
        ("int64", with_inputs(Precision::Fp32, None, Inputs::new(Integers::Int64))),
        ("int8", with_inputs(Precision::Fp32, Some(&int8), Inputs::default())),
        ("int8 in fp16", with_inputs(Precision::Fp16, Some(&int8), Inputs::default())),
        ("observed", Graph::observed(&architecture).unwrap()),
        ("tanh", Graph::new(&architecture.clone().with_tanh_gelu(), Precision::Fp32).unwrap()),
        ("fp32", fp32),
    ];
    if folder.starts_with("bert") {
        let typed = Inputs::new(Integers::Int64).with_token_types();
        graphs.push(("int64 with types", with_inputs(Precision::Fp32, None, typed)));
        graphs.push(("int64 with types, int8", with_inputs(Precision::Fp32, Some(&int8), typed)));
    }
    graphs
}

#[test]
fn exported_graphs_are_those_of_every_earlier_version() {
    let mut found = String::new();
    for folder in ["bert", "mpnet", "bert-fp16-plain", "mpnet-bf16-shards"] {
        for (variant, graph) in graphs(folder) {
            found.push_str(&format!("{folder} | {variant} | {} | {}\n", graph.digest_hex(), file_hash(&graph)));
        }
    }
    if std::env::var_os("PIN").is_some() {
        println!("{found}");
        return;
    }
    for (found, pinned) in found.lines().zip(PINNED.lines()) {
        assert_eq!(found, pinned);
    }
    assert_eq!(found.lines().count(), PINNED.lines().count());
}
