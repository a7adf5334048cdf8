//! `trt-embed inspect`: what a model folder, an ONNX file or an engine file holds.

#[cfg(feature = "tensorrt")]
mod engine;

use super::{Usage, output, settings};
use anyhow::{Context, Result};
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use trt_embed::graph::onnx;
use trt_embed::model::{DenseActivation, ModelFolder};

/// Describes a model folder, an ONNX file or an engine file.
///
/// Of an engine file it tells the manifest on any machine; inputs, outputs, profiles and layers where TensorRT can load the engine.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed inspect models/all-MiniLM-L6-v2
  trt-embed inspect exported/model.onnx --json
  trt-embed inspect mpnet.engine --layers")]
pub struct Args {
    /// Model folder, hub id `org/name[@revision]`, or a file whose name ends in .onnx or .engine.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Lists every layer of an engine, with the types that it reads and writes; an error where the engine cannot be loaded.
    #[arg(long)]
    layers: bool,
    /// The GPU that an engine is loaded on, counted from 0.
    #[cfg(feature = "tensorrt")]
    #[arg(long, env = "TRT_EMBED_DEVICE", value_name = "N", default_value_t = 0)]
    device: usize,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// What a model folder says.
#[derive(Debug, Serialize)]
struct FolderReport {
    model: String,
    folder: PathBuf,
    family: &'static str,
    /// Values of one vector.
    dimensions: usize,
    /// Longest text in tokens.
    max_tokens: usize,
    pooling: Vec<&'static str>,
    include_prompt: bool,
    dense: Vec<DenseReport>,
    normalize: bool,
    prompts: BTreeMap<String, String>,
    default_prompt: Option<String>,
    hidden_size: usize,
    layers: usize,
    heads: usize,
    intermediate_size: usize,
    activation: String,
    vocab_size: usize,
    positions: usize,
    parameters: u64,
    weight_bytes: u64,
    /// What is merged into the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct DenseReport {
    in_features: usize,
    out_features: usize,
    bias: bool,
    activation: &'static str,
}

/// What an ONNX file says.
#[derive(Debug, Serialize)]
struct OnnxReport {
    file: PathBuf,
    bytes: u64,
    ir_version: i64,
    producer: String,
    opsets: Vec<Opset>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Number of nodes.
    nodes: usize,
    /// Number of nodes of each operator.
    operators: BTreeMap<String, usize>,
    /// Values of all constants.
    parameters: u64,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Opset {
    domain: String,
    version: i64,
}

/// An input or output.
#[derive(Debug, Serialize)]
struct Port {
    name: String,
    r#type: String,
    /// Numbers, names where a dimension varies, null where it is not said.
    shape: Vec<Value>,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let path = Path::new(&args.model);
    if is_engine(path) {
        return engine(path, &args);
    }
    if args.layers {
        return Err(Usage(format!("--layers goes with an engine file, {} is none", args.model)).into());
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) && !path.is_dir() {
        let report = onnx_report(path)?;
        return output::print(&if args.json { serde_json::to_string(&report)? + "\n" } else { onnx_table(&report) });
    }
    let report = folder_report(&args.model, &settings::open_folder(&args.model)?)?;
    output::print(&if args.json { serde_json::to_string(&report)? + "\n" } else { folder_table(&report) })
}

/// Whether `path` names an engine file, by its extension or its first bytes.
fn is_engine(path: &Path) -> bool {
    // As the feature `tensorrt` writes them; known without it, too.
    const MAGIC: &[u8; 8] = b"trtembed";
    let begins_so = |mut file: File| {
        let mut first = [0; MAGIC.len()];
        file.read_exact(&mut first).is_ok() && &first == MAGIC
    };
    let named_so = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("engine"));
    !path.is_dir() && (named_so || File::open(path).is_ok_and(begins_so))
}

#[cfg(feature = "tensorrt")]
fn engine(path: &Path, args: &Args) -> Result<()> {
    engine::run(path, args)
}

#[cfg(not(feature = "tensorrt"))]
fn engine(path: &Path, _: &Args) -> Result<()> {
    let (path, how) = (path.display(), super::doctor::HOW_TO_BUILD);
    anyhow::bail!("{path}: this build lacks the feature `tensorrt`, which reads engine files; {how}")
}

fn folder_report(name: &str, model: &ModelFolder) -> Result<FolderReport> {
    let config = &model.config;
    let weights = model.weights()?;
    Ok(FolderReport {
        model: name.to_owned(),
        folder: model.root.clone(),
        family: config.family.name(),
        dimensions: model.embedding_size(),
        max_tokens: model.max_tokens(),
        pooling: model.pooling.modes.iter().map(|mode| mode.name()).collect(),
        include_prompt: model.pooling.include_prompt,
        dense: model
            .dense
            .iter()
            .map(|dense| DenseReport {
                in_features: dense.in_features,
                out_features: dense.out_features,
                bias: dense.bias.is_some(),
                activation: activation_name(dense.activation),
            })
            .collect(),
        normalize: model.normalize,
        prompts: model.prompts.by_name.clone(),
        default_prompt: model.prompts.default_name.clone(),
        hidden_size: config.hidden_size,
        layers: config.num_hidden_layers,
        heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        activation: format!("{:?}", config.activation).to_lowercase(),
        vocab_size: config.vocab_size,
        positions: config.max_position_embeddings,
        parameters: weights.parameters(),
        weight_bytes: weights.size_in_bytes(),
        adapter: weights.has_adapter().then_some("LoRA"),
    })
}

fn folder_table(report: &FolderReport) -> String {
    let mut lines = vec![
        ("model", report.model.clone()),
        ("folder", report.folder.display().to_string()),
        ("family", report.family.into()),
        ("dimensions", report.dimensions.to_string()),
        ("max tokens", report.max_tokens.to_string()),
        ("pooling", report.pooling.join(" + ") + if report.include_prompt { "" } else { " (prompt left out)" }),
    ];
    for dense in &report.dense {
        let bias = if dense.bias { "" } else { ", no bias" };
        lines.push(("dense", format!("{} -> {}, {}{bias}", dense.in_features, dense.out_features, dense.activation)));
    }
    lines.push(("normalize", if report.normalize { "yes" } else { "no" }.into()));
    for (name, text) in &report.prompts {
        let default = if report.default_prompt.as_ref() == Some(name) { " (default)" } else { "" };
        lines.push(("prompt", format!("{name} = {text:?}{default}")));
    }
    lines.extend([
        ("hidden size", report.hidden_size.to_string()),
        ("layers", report.layers.to_string()),
        ("heads", format!("{} of {}", report.heads, report.hidden_size / report.heads.max(1))),
        ("feed-forward", format!("{}, {}", report.intermediate_size, report.activation)),
        ("vocabulary", report.vocab_size.to_string()),
        ("positions", report.positions.to_string()),
        ("parameters", HumanCount(report.parameters).to_string()),
        ("weights", HumanBytes(report.weight_bytes).to_string() + report.adapter.map_or("", |_| ", a LoRA adapter merged")),
    ]);
    table(&lines)
}

fn onnx_report(path: &Path) -> Result<OnnxReport> {
    let model = onnx::read_model(path)?;
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    let graph = model.graph.unwrap_or_default();
    let mut operators = BTreeMap::new();
    for node in &graph.node {
        *operators.entry(node.op_type.clone()).or_default() += 1;
    }
    // Files of old IR versions list constants among the inputs.
    let constants: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let values =
        |tensor: &onnx::TensorProto| tensor.dims.iter().fold(1u64, |n, dim| n.saturating_mul(u64::try_from(*dim).unwrap_or(0)));
    Ok(OnnxReport {
        file: path.to_owned(),
        bytes,
        ir_version: model.ir_version,
        producer: [model.producer_name, model.producer_version].join(" ").trim().to_owned(),
        opsets: model.opset_import.into_iter().map(|set| Opset { domain: set.domain, version: set.version }).collect(),
        inputs: graph.input.iter().filter(|input| !constants.contains(input.name.as_str())).map(port).collect(),
        outputs: graph.output.iter().map(port).collect(),
        nodes: graph.node.len(),
        operators,
        parameters: graph.initializer.iter().map(values).fold(0, u64::saturating_add),
        metadata: model.metadata_props.into_iter().map(|entry| (entry.key, entry.value)).collect(),
    })
}

fn port(value: &onnx::ValueInfoProto) -> Port {
    let tensor = value.r#type.as_ref().and_then(|of| of.tensor_type.as_ref());
    let dims = tensor.and_then(|tensor| tensor.shape.as_ref()).map(|shape| shape.dim.as_slice()).unwrap_or_default();
    Port {
        name: value.name.clone(),
        r#type: tensor.map_or_else(|| "not a tensor".into(), |tensor| onnx::element_type_name(tensor.elem_type)),
        shape: dims
            .iter()
            .map(|dim| match (dim.dim_value, &dim.dim_param) {
                (Some(size), _) => size.into(),
                (None, Some(name)) if !name.is_empty() => name.as_str().into(),
                _ => Value::Null,
            })
            .collect(),
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dims = self.shape.iter().map(|dim| match dim {
            Value::String(name) => name.clone(),
            Value::Null => "?".into(),
            size => size.to_string(),
        });
        write!(f, "{}  {} [{}]", self.name, self.r#type, dims.collect::<Vec<_>>().join(", "))
    }
}

fn onnx_table(report: &OnnxReport) -> String {
    let opsets = report
        .opsets
        .iter()
        .map(|set| format!("{} {}", if set.domain.is_empty() { "ai.onnx" } else { &set.domain }, set.version));
    let mut lines = vec![
        ("file", report.file.display().to_string()),
        ("size", HumanBytes(report.bytes).to_string()),
        ("IR version", report.ir_version.to_string()),
        ("producer", report.producer.clone()),
        ("opset", opsets.collect::<Vec<_>>().join(", ")),
    ];
    for (what, ports) in [("input", &report.inputs), ("output", &report.outputs)] {
        for port in ports {
            lines.push((what, port.to_string()));
        }
    }
    lines.push(("parameters", HumanCount(report.parameters).to_string()));
    lines.push(("nodes", report.nodes.to_string()));
    let mut operators: Vec<_> = report.operators.iter().collect();
    operators.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
    lines.extend(operators.into_iter().map(|(name, count)| ("", format!("{count:>5}  {name}"))));
    lines.extend(report.metadata.iter().map(|(key, value)| ("metadata", format!("{key} = {value}"))));
    table(&lines)
}

/// Names in a column, values beside them; a name is written once for a run of equal ones.
fn table(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut before = "";
    let mut out = String::new();
    for (name, value) in lines {
        let shown = if *name == before { "" } else { name };
        out.push_str(format!("{shown:width$}  {value}").trim_end());
        out.push('\n');
        before = name;
    }
    out
}

fn activation_name(activation: DenseActivation) -> &'static str {
    match activation {
        DenseActivation::Identity => "identity",
        DenseActivation::Tanh => "tanh",
        DenseActivation::Relu => "relu",
        DenseActivation::Gelu => "gelu",
        DenseActivation::Sigmoid => "sigmoid",
        other => other.class(),
    }
}
