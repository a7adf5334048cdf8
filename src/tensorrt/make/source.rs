//! What an engine is built from and for: the graph, exported or read from an ONNX file, and the identity of model and machine.

use crate::cuda::Device;
use crate::digest::hex;
use crate::files::TemporaryFolder;
use crate::graph::onnx::{self, ModelProto, TensorProto, ValueInfoProto};
use crate::graph::{Graph, Precision, Quantization};
use crate::model::{Architecture, Mapped, ModelFolder};
use crate::tensorrt::encoder::HIDDEN_STATES;
use crate::tensorrt::engine_file::{Machine, Manifest, Model, Source};
use crate::tensorrt::library::Library;
use crate::tokens::Tokenizer;
use crate::{Error, Result};
use prost::bytes::Bytes;
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashSet};
use std::path::{Component, Path, PathBuf};

/// Inputs that an encoder must have, and one that it may have.
const INPUTS: [&str; 3] = ["input_ids", "attention_mask", "token_type_ids"];
const REQUIRED_INPUTS: usize = 2;

/// A graph that a plan can be built from.
pub(super) enum GraphSource {
    /// Weights still in the model folder's files.
    Exported { graph: Graph, precision: Precision, tanh_gelu: bool },
    /// The same with Q/DQ pairs, and the hash of the model's own graph, without them.
    Quantised { graph: Graph, precision: Precision, tanh_gelu: bool, base: String },
    /// Mapped, so that what is hashed is what is built.
    File { path: PathBuf, bytes: Bytes, digest: String },
}

/// A graph as the builder takes it.
pub(super) struct Serialised {
    pub bytes: Bytes,
    /// Where tensors lie beside it.
    pub path: Option<PathBuf>,
    _folder: Option<TemporaryFolder>,
}

impl GraphSource {
    /// The graph of `folder`, with weights of type `precision`, and with `tanh_gelu` as [`Architecture::with_tanh_gelu`].
    pub fn export(folder: &ModelFolder, precision: Precision, tanh_gelu: bool) -> Result<Self> {
        let graph = Graph::new(&architecture(folder, tanh_gelu)?, precision)?;
        Ok(Self::Exported { graph, precision, tanh_gelu })
    }

    /// As [`GraphSource::export`] in fp32, with every tensor that feeds a linear as a further output.
    pub fn observe(folder: &ModelFolder) -> Result<Self> {
        let graph = Graph::observed(&folder.architecture()?)?;
        Ok(Self::Exported { graph, precision: Precision::Fp32, tanh_gelu: false })
    }

    /// As [`GraphSource::export`], with linears in INT8.
    pub fn quantise(folder: &ModelFolder, precision: Precision, tanh_gelu: bool, quantization: &Quantization) -> Result<Self> {
        let graph = Graph::quantized(&architecture(folder, tanh_gelu)?, precision, quantization)?;
        let base = Graph::new(&folder.architecture()?, precision)?.digest_hex();
        Ok(Self::Quantised { graph, precision, tanh_gelu, base })
    }

    /// The graph in the file at `path`, which must be an encoder of `folder`'s width.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Onnx`] for a file that is not ONNX, other inputs or outputs than an encoder's, hidden states of
    /// another width, or data files outside the file's own folder.
    pub fn open(path: &Path, folder: &ModelFolder) -> Result<Self> {
        let (bytes, model) = onnx::map_model(path)?;
        let refused = |reason: String| Error::Onnx { reason: format!("{}: {reason}", path.display()) };
        check_ports(&model, folder.config.hidden_size).map_err(refused)?;
        let digest = file_digest(path, &bytes, &data_files(&model).map_err(refused)?)?;
        Ok(Self::File { path: path.to_path_buf(), bytes, digest })
    }

    /// The model that a plan of this graph computes, with `folder`'s tokenizer and pooling.
    pub fn model(&self, folder: &ModelFolder) -> Result<Model> {
        let (source, tanh_gelu) = match self {
            Self::Exported { precision, tanh_gelu, .. } => (Source::Exported(*precision), *tanh_gelu),
            Self::Quantised { precision, tanh_gelu, base, .. } => {
                (Source::Quantised { precision: *precision, base: base.clone() }, *tanh_gelu)
            }
            Self::File { path, .. } => {
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
                (Source::Onnx(name), false)
            }
        };
        Ok(Model { tanh_gelu, ..model(folder, source, self.digest()?)? })
    }

    /// What the graph and its weights are recognised by.
    fn digest(&self) -> Result<String> {
        match self {
            Self::Exported { graph, .. } | Self::Quantised { graph, .. } => {
                let digest = graph.digest_hex();
                graph.check_unchanged()?;
                Ok(digest)
            }
            Self::File { digest, .. } => Ok(digest.clone()),
        }
    }

    /// How many tensors feed linears that are quantised, which are all but `float`; 0 for a graph from a file.
    pub fn int8_inputs(&self, float: &[String]) -> usize {
        let Self::Quantised { graph, .. } = self else { return 0 };
        let quantised = graph.linears().iter().filter(|linear| !float.contains(&linear.name));
        quantised.map(|linear| linear.input.as_str()).collect::<BTreeSet<_>>().len()
    }

    pub fn serialise(&self) -> Result<Serialised> {
        let graph = match self {
            Self::Exported { graph, .. } | Self::Quantised { graph, .. } => graph,
            Self::File { path, bytes, .. } => {
                return Ok(Serialised { bytes: bytes.clone(), path: Some(path.clone()), _folder: None });
            }
        };
        if let Some(bytes) = graph.encode()? {
            return Ok(Serialised { bytes: bytes.into(), path: None, _folder: None });
        }
        let folder = TemporaryFolder::create()?;
        let path = folder.path().join("model.onnx");
        graph.write(&path)?;
        let bytes = Bytes::from_owner(Mapped::open(&path)?);
        Ok(Serialised { bytes, path: Some(path), _folder: Some(folder) })
    }
}

/// Whether the graph in the file at `path` quantises anything by Q/DQ pairs: then only int8 engines can be built of it.
///
/// # Errors
/// [`Error::Io`]; [`Error::Onnx`] for a file that is not ONNX.
pub(super) fn is_quantised(path: &Path) -> Result<bool> {
    let model = onnx::read_model(path)?;
    let mut nodes = model.graph.iter().flat_map(|graph| &graph.node);
    Ok(nodes.any(|node| ["QuantizeLinear", "DequantizeLinear"].contains(&node.op_type.as_str())))
}

/// What plans for `device` depend on.
pub fn machine(library: &Library, device: &Device) -> Machine {
    let properties = device.properties();
    let (major, minor) = properties.compute_capability;
    Machine {
        tensorrt: library.version().to_string(),
        compute_capability: format!("{major}.{minor}"),
        gpu: properties.name.clone(),
    }
}

impl Manifest {
    /// Checks that the plan computes the model in `folder`: its sizes, its tokenizer and, where the graph was exported from a model
    /// folder, its graph and weights (an INT8 graph's before quantisation). A graph from an ONNX file is not compared: the folder may not have that file.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs; what opening the weights says.
    pub fn check_folder(&self, folder: &ModelFolder) -> Result<()> {
        // Without the weights first, which take longer to hash.
        let found = model(folder, self.model.source.clone(), self.model.graph.clone())?;
        self.check_model(&found)?;
        match &self.model.source {
            Source::Exported(precision) => {
                let graph = GraphSource::export(folder, *precision, self.model.tanh_gelu)?.digest()?;
                self.check_model(&Model { graph, ..found })
            }
            Source::Quantised { precision, base } => {
                self.check_base(base, &GraphSource::export(folder, *precision, false)?.digest()?)
            }
            Source::Onnx(_) => Ok(()),
        }
    }
}

fn model(folder: &ModelFolder, source: Source, graph: String) -> Result<Model> {
    Ok(Model {
        source,
        graph,
        tokenizer: Tokenizer::content_hash(&folder.tokenizer)?,
        pooling: pooling_words(folder),
        hidden_size: folder.config.hidden_size,
        positions: folder.config.max_tokens(),
        tanh_gelu: false,
        tanh_gelu_from: 0,
    })
}

fn architecture(folder: &ModelFolder, tanh_gelu: bool) -> Result<Architecture> {
    let architecture = folder.architecture()?;
    Ok(if tanh_gelu { architecture.with_tanh_gelu() } else { architecture })
}

/// E.g. `mean, dense 768 to 512, normalize`.
fn pooling_words(folder: &ModelFolder) -> String {
    let mut words = vec![folder.pooling.modes.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(" + ")];
    if !folder.pooling.include_prompt {
        words.push("without the prompt".into());
    }
    words.extend(folder.dense.iter().map(|dense| format!("dense {} to {}", dense.in_features, dense.out_features)));
    if folder.normalize {
        words.push("normalize".into());
    }
    words.join(", ")
}

/// Whether the graph takes and gives what an encoder of `hidden_size` does.
fn check_ports(model: &ModelProto, hidden_size: usize) -> Result<(), String> {
    let Some(graph) = &model.graph else { return Err("it has no graph".into()) };
    // Files of old IR versions list constants among the inputs.
    let constants: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let inputs: Vec<&str> =
        graph.input.iter().map(|input| input.name.as_str()).filter(|name| !constants.contains(name)).collect();
    let known = inputs.iter().all(|name| INPUTS.contains(name));
    if !known || !INPUTS[..REQUIRED_INPUTS].iter().all(|name| inputs.contains(name)) {
        let (found, may) = (inputs.join(", "), INPUTS.join(", "));
        return Err(format!("its inputs are {found}; an encoder's are {may} (the last may be absent)"));
    }
    let hidden = |output: &&ValueInfoProto| HIDDEN_STATES.contains(&output.name.as_str());
    let Some(output) = graph.output.iter().find(hidden) else {
        let found = graph.output.iter().map(|output| output.name.as_str()).collect::<Vec<_>>().join(", ");
        let next = "export it for feature extraction, e.g. `optimum-cli export onnx --task feature-extraction`";
        return Err(format!("its outputs are {found}; one of {} is needed: {next}", HIDDEN_STATES.join(", ")));
    };
    let dims = output.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.shape.as_ref()).map(|shape| &shape.dim);
    match dims.and_then(|dims| dims.last()?.dim_value) {
        Some(width) if usize::try_from(width) != Ok(hidden_size) => {
            Err(format!("its hidden states have {width} values, config.json says {hidden_size}; do they belong together?"))
        }
        _ => Ok(()),
    }
}

/// Names of the files that hold tensors, relative to the model's, sorted.
fn data_files(model: &ModelProto) -> Result<BTreeSet<String>, String> {
    let graph = model.graph.iter();
    let attributes = graph.clone().flat_map(|graph| &graph.node).flat_map(|node| &node.attribute);
    let tensors = graph.flat_map(|graph| &graph.initializer).chain(attributes.filter_map(|attribute| attribute.t.as_ref()));
    let location =
        |tensor: &TensorProto| tensor.external_data.iter().find(|entry| entry.key == "location").map(|e| e.value.clone());
    let files: BTreeSet<String> = tensors.filter(|tensor| tensor.data_location == Some(1)).filter_map(location).collect();
    let inside =
        |name: &String| Path::new(name).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    match files.iter().find(|name| !inside(name)) {
        Some(name) => Err(format!("it keeps tensors in \"{name}\", outside its own folder; export it again")),
        None => Ok(files),
    }
}

/// SHA-256 of the file, or of `SHA-256  NAME` lines, as sha256sum writes them, where it has data files beside it.
fn file_digest(path: &Path, bytes: &[u8], data_files: &BTreeSet<String>) -> Result<String> {
    let own = hex(&Sha256::digest(bytes));
    if data_files.is_empty() {
        return Ok(own);
    }
    let mut lines = format!("{own}  model\n");
    for name in data_files {
        let path = path.with_file_name(name);
        if !path.is_file() {
            let next = "it holds tensors of the ONNX file and must lie beside it".to_owned();
            return Err(Error::NotFound { what: format!("data file {name}"), path, next });
        }
        lines.push_str(&format!("{}  {name}\n", hex(&Sha256::digest(&*Mapped::open(&path)?))));
    }
    Ok(hex(&Sha256::digest(lines)))
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
