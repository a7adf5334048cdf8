//! Graphs for other programs: int64 inputs and token types, run by a plain ONNX reader (`tract` without this crate's operators) and
//! compared with PyTorch and with the graphs that this crate runs itself.

use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use tract_onnx::prelude::*;
use trt_embed::graph::{Graph, Inputs, Integers, Precision};
use trt_embed::model::ModelFolder;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// What `scripts/make_token_types.py` wrote.
struct Reference {
    shape: [usize; 2],
    ids: Vec<i64>,
    mask: Vec<i64>,
    types: Vec<i64>,
    hidden: Vec<f32>,
}

impl Reference {
    fn read() -> Self {
        let bytes = std::fs::read(fixture("token_types.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let ints = |name: &str| -> Vec<i64> {
            tensors
                .tensor(name)
                .unwrap()
                .data()
                .chunks_exact(8)
                .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()))
                .collect()
        };
        let hidden = tensors.tensor("last_hidden_state").unwrap();
        let shape = tensors.tensor("input_ids").unwrap().shape().try_into().unwrap();
        let hidden = hidden.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        Self { shape, ids: ints("input_ids"), mask: ints("attention_mask"), types: ints("token_type_ids"), hidden }
    }

    /// The largest difference at real tokens.
    fn difference(&self, hidden: &[f32]) -> f32 {
        assert_eq!(hidden.len(), self.hidden.len());
        let width = hidden.len() / self.mask.len();
        let rows = hidden.chunks_exact(width).zip(self.hidden.chunks_exact(width)).zip(&self.mask);
        let real = rows.filter(|(_, mask)| **mask == 1).flat_map(|((a, b), _)| a.iter().zip(b));
        real.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }
}

fn graph(folder: &str, precision: Precision, inputs: Inputs) -> trt_embed::Result<Graph> {
    let model = ModelFolder::open(fixture(folder)).unwrap();
    Graph::with_inputs(&model.architecture().unwrap(), precision, None, inputs)
}

/// Runs `graph` on these inputs, `[batch, seq]` each.
fn run(graph: &Graph, inputs: Vec<Tensor>) -> Vec<f32> {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.onnx");
    graph.write(&path).unwrap();
    let plan = tract_onnx::onnx().model_for_path(&path).unwrap().into_optimized().unwrap().into_runnable().unwrap();
    let outputs = plan.run(inputs.into_iter().map(TValue::from).collect()).unwrap();
    outputs[0].try_as_plain_ram().unwrap().as_slice::<f32>().unwrap().to_vec()
}

#[test]
fn token_types_are_those_of_pytorch() {
    let reference = Reference::read();
    for integers in [Integers::Int64, Integers::Int32] {
        let graph = graph("bert", Precision::Fp32, Inputs::new(integers).with_token_types()).unwrap();
        let tensor = |values: &[i64]| match integers {
            Integers::Int64 => Tensor::from_shape(&reference.shape, values).unwrap(),
            _ => Tensor::from_shape(&reference.shape, &values.iter().map(|&value| value as i32).collect::<Vec<_>>()).unwrap(),
        };
        let zeros = vec![0; reference.types.len()];
        let [typed, plain] = [&reference.types, &zeros]
            .map(|types| run(&graph, vec![tensor(&reference.ids), tensor(&reference.mask), tensor(types)]));
        let difference = reference.difference(&typed);
        assert!(difference <= 1e-4, "{integers:?}: {difference}");
        assert!(reference.difference(&plain) > 0.1, "the types change nothing");
    }
}

#[test]
fn the_width_of_the_inputs_changes_no_number() {
    let reference = Reference::read();
    for folder in ["bert", "mpnet"] {
        let wide = graph(folder, Precision::Fp32, Inputs::new(Integers::Int64)).unwrap();
        let narrow = graph(folder, Precision::Fp32, Inputs::default()).unwrap();
        let wide = run(
            &wide,
            [&reference.ids, &reference.mask].map(|values| Tensor::from_shape(&reference.shape, values).unwrap()).into(),
        );
        let as_i32 = |values: &Vec<i64>| values.iter().map(|&value| value as i32).collect::<Vec<_>>();
        let narrow = run(
            &narrow,
            [&reference.ids, &reference.mask].map(|values| Tensor::from_shape(&reference.shape, &as_i32(values)).unwrap()).into(),
        );
        assert!(wide == narrow, "{folder}");
    }
}

#[test]
fn default_inputs_are_the_graph_as_it_always_was() {
    for folder in ["bert", "mpnet"] {
        let model = ModelFolder::open(fixture(folder)).unwrap();
        for precision in [Precision::Fp32, Precision::Fp16] {
            let plain = Graph::new(&model.architecture().unwrap(), precision).unwrap();
            let same = graph(folder, precision, Inputs::default()).unwrap();
            assert_eq!(same.digest_hex(), plain.digest_hex());
            assert!(same.encode().unwrap() == plain.encode().unwrap());
            let other = graph(folder, precision, Inputs::new(Integers::Int64)).unwrap();
            assert_ne!(other.digest_hex(), plain.digest_hex());
        }
    }
}

#[test]
fn a_model_without_token_types_refuses_them() {
    let error = graph("mpnet", Precision::Fp32, Inputs::default().with_token_types()).unwrap_err().to_string();
    assert!(error.contains("token_types") && error.contains("mpnet has no token types"), "{error}");
}
