//! INT8 graphs on the CPU, held against the fp32 graph.

use std::collections::BTreeSet;
use trt_embed::Error;
use trt_embed::backend::{Backend, CpuBackend};
use trt_embed::graph::{Graph, Precision, Quantization, Range, Role};
use trt_embed::model::ModelFolder;
use trt_embed::pooling::Head;
use trt_embed::tokens::TokenBatch;

const MODELS: [&str; 2] = ["mpnet", "bert"];

fn model(name: &str) -> ModelFolder {
    ModelFolder::open(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn head(model: &ModelFolder) -> Head {
    Head::new(model.pooling.clone(), model.dense.clone(), model.config.hidden_size, None, model.scaling()).unwrap()
}

fn backend(model: &ModelFolder, graph: Graph) -> CpuBackend {
    CpuBackend::from_graph(graph, head(model), model.max_tokens(), 1).unwrap()
}

fn batch(model: &ModelFolder) -> TokenBatch {
    let rows: Vec<Vec<u32>> =
        (1..8u32).map(|n| (0..2 * n).map(|i| (i * 37 + n) % model.config.vocab_size as u32).collect()).collect();
    let mut batch = TokenBatch::default();
    batch.refill(&rows, model.config.vocab_size, 0).unwrap();
    batch
}

/// Every tensor's largest magnitude over the batch, padding included.
fn ranges(model: &ModelFolder) -> Quantization {
    let mut quantization = Quantization::default();
    let observed = backend(model, Graph::observed(&model.architecture().unwrap()).unwrap());
    observed
        .observe(&batch(model), &mut |name, values| {
            let amax = values.iter().fold(0f32, |amax, value| amax.max(value.abs()));
            quantization.ranges.insert(name.into(), Range { amax, smoothing: None });
        })
        .unwrap();
    quantization
}

fn hidden(model: &ModelFolder, graph: Graph) -> Vec<f32> {
    let batch = batch(model);
    let mut hidden = vec![0.0; batch.ids().len() * model.config.hidden_size];
    backend(model, graph).hidden(&batch, &mut hidden).unwrap();
    hidden
}

fn quantized(model: &ModelFolder, quantization: &Quantization) -> trt_embed::Result<Graph> {
    Graph::quantized(&model.architecture()?, Precision::Fp32, quantization)
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let difference = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    (difference / a.iter().map(|a| a * a).sum::<f32>()).sqrt()
}

#[test]
fn every_linear_is_listed_and_fed_by_what_can_be_observed() {
    for name in MODELS {
        let model = model(name);
        let graph = Graph::observed(&model.architecture().unwrap()).unwrap();
        assert_eq!(graph.linears().len(), 6 * model.config.num_hidden_layers);
        assert_eq!(graph.observed_tensors().len(), 4 * model.config.num_hidden_layers);
        let outputs: BTreeSet<&str> = graph.outputs().collect();
        assert!(graph.linears().iter().all(|linear| outputs.contains(linear.input.as_str())));
        let last = graph.linears().last().unwrap();
        assert_eq!((last.role, last.layer), (Role::Ffn2, model.config.num_hidden_layers - 1));
        assert_eq!((last.inputs, last.outputs), (model.config.intermediate_size, model.config.hidden_size));
    }
}

#[test]
fn int8_is_near_fp32_and_not_equal_and_smoothing_too() {
    for name in MODELS {
        let model = model(name);
        let reference = hidden(&model, Graph::new(&model.architecture().unwrap(), Precision::Fp32).unwrap());
        let plain = ranges(&model);
        let mut smooth = plain.clone();
        let graph = quantized(&model, &plain).unwrap();
        for (tensor, channels) in graph.observed_tensors() {
            let range = smooth.ranges.get_mut(tensor).unwrap();
            range.smoothing = Some((0..channels).map(|i| 0.75 + 0.5 * (i % 2) as f32).collect());
            range.amax /= 0.75;
        }
        for quantization in [&plain, &smooth] {
            let distance = distance(&reference, &hidden(&model, quantized(&model, quantization).unwrap()));
            // A step is amax/127; its error, 0.3 steps rms, is some percent of values that are a quarter of amax rms, and 12 to 18
            // linears add theirs.
            assert!((1e-4..0.15).contains(&distance), "{name}: {distance}");
        }
    }
}

#[test]
fn all_linears_in_float_are_the_fp32_graph_and_each_one_changes_it() {
    let model = model("bert");
    let reference = hidden(&model, Graph::new(&model.architecture().unwrap(), Precision::Fp32).unwrap());
    let mut quantization = ranges(&model);
    let all: BTreeSet<String> =
        quantized(&model, &quantization).unwrap().linears().iter().map(|linear| linear.name.clone()).collect();
    quantization.float = all.clone();
    assert_eq!(hidden(&model, quantized(&model, &quantization).unwrap()), reference);
    let mut digests = BTreeSet::from([quantized(&model, &quantization).unwrap().digest()]);
    for one in &all {
        quantization.float = all.clone();
        quantization.float.remove(one);
        assert_ne!(hidden(&model, quantized(&model, &quantization).unwrap()), reference, "{one}");
        assert!(digests.insert(quantized(&model, &quantization).unwrap().digest()), "{one}");
    }
}

#[test]
fn a_range_changes_the_digest() {
    let model = model("mpnet");
    let mut quantization = ranges(&model);
    let before = quantized(&model, &quantization).unwrap().digest();
    assert_eq!(quantized(&model, &quantization).unwrap().digest(), before);
    let range = quantization.ranges.values_mut().next().unwrap();
    range.amax *= 1.5;
    assert_ne!(quantized(&model, &quantization).unwrap().digest(), before);
}

#[test]
fn ranges_that_cannot_be_used_are_named() {
    let model = model("bert");
    let good = ranges(&model);
    let tensor = good.ranges.keys().next().unwrap().clone();
    let fault = |change: &dyn Fn(&mut Quantization), precision| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = Graph::quantized(&model.architecture().unwrap(), precision, &bad).unwrap_err();
        assert!(error.to_string().contains(&tensor), "{error}");
        assert!(matches!(error, Error::Calibration { .. }), "{error:?}");
    };
    fault(&|bad| drop(bad.ranges.remove(&tensor)), Precision::Fp32);
    for amax in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-39] {
        fault(&|bad| bad.ranges.get_mut(&tensor).unwrap().amax = amax, Precision::Fp32);
    }
    // 0.007 / 127 is below fp16's smallest normal value, 6.1e-5; 0.008 / 127 is not.
    fault(&|bad| bad.ranges.get_mut(&tensor).unwrap().amax = 0.007, Precision::Fp16);
    fault(&|bad| bad.ranges.get_mut(&tensor).unwrap().smoothing = Some(vec![1.0]), Precision::Fp32);
    let mut small = good.clone();
    small.ranges.get_mut(&tensor).unwrap().amax = 0.008;
    Graph::quantized(&model.architecture().unwrap(), Precision::Fp16, &small).unwrap();

    let mut unknown = good;
    unknown.float.insert("encoder.layer.9.nothing".into());
    let error = quantized(&model, &unknown).unwrap_err().to_string();
    assert!(error.contains("encoder.layer.9.nothing") && error.contains("intermediate.dense"), "{error}");
}
