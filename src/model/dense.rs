//! The Dense module: a linear layer and an activation on the pooled vector.

use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use crate::model::tensors::TensorFile;
use crate::model::weights::SINGLE_FILE;
use crate::{Error, Result};
use std::path::Path;

/// Widest output; above it the product with the widest pooled vector would leave any memory behind.
const MAX_WIDTH: usize = 1 << 16;

/// Keys of a Dense module's `config.json`.
pub(super) static DENSE_KEYS: Schema = Schema {
    title: "config.json of a Dense module",
    keys: &[&[
        Key::honoured("in_features", "must be the width of what the module before it gives"),
        Key::honoured("out_features", "width of the output"),
        Key::honoured("bias", "whether there is one (true where absent)"),
        Key::honoured("activation_function", "Tanh where absent; a class of torch.nn without parameters"),
        Key::harmless("init_weight", "how training began; the stored tensors count"),
        Key::harmless("init_bias", "how training began; the stored tensors count"),
        Key::honoured("use_residual", "whether the input is added to the result, through a matrix where widths differ"),
        Key::only("module_input_name", &["\"sentence_embedding\""], "only \"sentence_embedding\" is supported"),
        Key::only("module_output_name", &["\"sentence_embedding\""], "only \"sentence_embedding\" is supported"),
    ]],
    unknown: Unknown::Warn,
};

/// Activation of a [`Dense`] module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DenseActivation {
    /// `torch.nn.modules.linear.Identity`.
    Identity,
    /// `torch.nn.modules.activation.Tanh`.
    Tanh,
    /// `torch.nn.modules.activation.ReLU`.
    Relu,
    /// `torch.nn.modules.activation.GELU` (the erf form).
    Gelu,
    /// `torch.nn.modules.activation.Sigmoid`.
    Sigmoid,
    /// `torch.nn.modules.activation.SiLU`: x sigmoid(x).
    Silu,
    /// `torch.nn.modules.activation.LeakyReLU`: a hundredth of x below 0.
    LeakyRelu,
    /// `torch.nn.modules.activation.ELU`: exp(x) - 1 below 0.
    Elu,
    /// `torch.nn.modules.activation.Mish`: x tanh(softplus(x)).
    Mish,
    /// `torch.nn.modules.activation.Softplus`: ln(1 + exp(x)), x above 20.
    Softplus,
}

/// What a [`Dense`] module adds to its activation's result.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Residual {
    /// Nothing.
    None,
    /// Its input; `in_features` and `out_features` are equal.
    Input,
    /// Its input through a matrix `[out_features, in_features]`, row-major.
    Projected(Vec<f32>),
}

/// A `Dense` module applied to the pooled vector: `activation(x W^T + b) + residual`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// `[out_features, in_features]`, row-major.
    pub weight: Vec<f32>,
    /// `[out_features]`, absent when the module has no bias.
    pub bias: Option<Vec<f32>>,
    /// Applied to the sums.
    pub activation: DenseActivation,
    /// Added last.
    pub residual: Residual,
}

impl DenseActivation {
    /// Every activation, in the order in which messages list them.
    pub const ALL: [Self; 10] = [
        Self::Identity,
        Self::Tanh,
        Self::Relu,
        Self::Gelu,
        Self::Sigmoid,
        Self::Silu,
        Self::LeakyRelu,
        Self::Elu,
        Self::Mish,
        Self::Softplus,
    ];

    /// The class of `torch.nn`.
    pub fn class(self) -> &'static str {
        match self {
            Self::Identity => "Identity",
            Self::Tanh => "Tanh",
            Self::Relu => "ReLU",
            Self::Gelu => "GELU",
            Self::Sigmoid => "Sigmoid",
            Self::Silu => "SiLU",
            Self::LeakyRelu => "LeakyReLU",
            Self::Elu => "ELU",
            Self::Mish => "Mish",
            Self::Softplus => "Softplus",
        }
    }

    fn by_class(class: &str) -> Option<Self> {
        if !class.starts_with("torch.nn.") {
            return None;
        }
        let name = class.rsplit('.').next()?;
        Self::ALL.into_iter().find(|activation| activation.class() == name)
    }
}

impl Dense {
    /// Reads `config.json` and `model.safetensors` of the module in `folder`; `width` is what comes out of the module before it.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Config`] for a width that does not follow or a variant that is not supported; what a weight
    /// file can be at fault for.
    pub(super) fn read(folder: &Path, width: usize) -> Result<Self> {
        let json = JsonObject::read(
            &folder.join("config.json"),
            &DENSE_KEYS,
            "modules.json names a Dense module there; fetch the model again",
        )?;
        let in_features = json.size("in_features", 1..=usize::MAX)?;
        if in_features != Some(width) {
            return Err(json.field_error("in_features", &format!("the module before it gives {width} values")));
        }
        let Some(out_features) = json.size("out_features", 1..=MAX_WIDTH)? else {
            return Err(json.field_error("out_features", "the width of the output is expected"));
        };
        let activation = match json.string("activation_function")? {
            None if json.fields().contains_key("activation_function") => {
                return Err(
                    json.field_error("activation_function", "leave it out for Tanh, or name torch.nn.modules.linear.Identity")
                );
            }
            None => DenseActivation::Tanh, // sentence-transformers' default
            Some(class) => DenseActivation::by_class(class).ok_or_else(|| {
                let known = DenseActivation::ALL.map(DenseActivation::class).join(", ");
                json.field_error("activation_function", &format!("known: {known} of torch.nn"))
            })?,
        };

        let path = folder.join(SINGLE_FILE);
        if !path.is_file() {
            let next = if folder.join("pytorch_model.bin").exists() {
                "there is only pytorch_model.bin, which is not read; save the model again with a newer sentence-transformers"
            } else {
                "fetch the model again"
            };
            return Err(Error::NotFound { what: format!("the Dense module's {SINGLE_FILE}"), path, next: next.to_owned() });
        }
        let file = TensorFile::open(&path)?;
        let read = |name: &str, shape: &[usize]| {
            let tensor = file.tensor(name, shape)?.ok_or_else(|| Error::MissingTensor {
                name: name.to_owned(),
                expected: shape.to_vec(),
                path: path.clone(),
            })?;
            Ok::<_, Error>(tensor.to_f32().into_owned())
        };
        let weight = read("linear.weight", &[out_features, width])?;
        let bias = match json.boolean("bias")?.unwrap_or(true) {
            true => Some(read("linear.bias", &[out_features])?),
            false => None,
        };
        let residual = match json.boolean("use_residual")?.unwrap_or(false) {
            false => Residual::None,
            true if width == out_features => Residual::Input,
            true => Residual::Projected(read("residual.weight", &[out_features, width])?),
        };
        // As sentence-transformers, which refuses a tensor that the module does not have.
        let projected = matches!(residual, Residual::Projected(_));
        let has = |name: &str| match name {
            "linear.weight" => true,
            "linear.bias" => bias.is_some(),
            "residual.weight" => projected,
            _ => false,
        };
        if let Some(other) = file.names().filter(|name| !has(name)).min() {
            let reason = format!("tensor \"{other}\" of {} belongs to no such Dense module", path.display());
            return Err(json.error(format!("{reason}; do they belong together?")));
        }
        Ok(Self { in_features: width, out_features, weight, bias, activation, residual })
    }
}
