//! Encoder families: each reads its own keys of config.json and its own tensors into an [`Architecture`].
//!
//! To add one, write a file beside `bert.rs` with a `FAMILY` and name it in the list below. Nothing outside this room asks which family a model is
//! of.

mod absolute;
mod post_norm;
pub(in crate::model) mod rope;
mod tensors;

use crate::Result;
use crate::model::adapter_config::ModuleKind;
use crate::model::config::EncoderConfig;
use crate::model::json::shown;
use crate::model::schema::{JsonObject, Schema};
use crate::model::{Architecture, Weights};
use serde_json::Value;
use std::fmt;
use std::hash::{Hash, Hasher};

/// Makes a module of each file, and the list of what they define.
macro_rules! families {
    ($($file:ident,)*) => {
        $(mod $file;)*
        /// Every family, in the order in which messages and documentation list them.
        static FAMILIES: &[&Definition] = &[$(&$file::FAMILY),*];
    };
}

families! {
    bert,
    mpnet,
    xlm_roberta,
    roberta,
    camembert,
    distilbert,
    modernbert,
    nomic_bert,
    gte,
    new,
    jina_bert,
}

/// What is particular to a family.
pub(in crate::model) struct Definition {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// How it is told from the family whose `model_type` it bears, where it bears another one's.
    pub variant: Option<Variant>,
    /// How people write it.
    pub title: &'static str,
    /// What may stand before tensor names, with a dot, in checkpoints that carry a head.
    pub tensor_prefixes: &'static [&'static str],
    /// What its graphs are called; part of their digest, and so of the name of every engine in a cache.
    pub graph_name: &'static str,
    /// The keys of its config.json.
    pub keys: Schema,
    /// The modules whose tensors are the encoder's.
    pub modules: Modules,
    /// peft's own `target_modules` for it (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`), where it has some.
    pub lora_targets: Option<&'static [&'static str]>,
    /// Reads what stands in config.json. The family is given so that the configuration can name it.
    pub read: fn(Family, &JsonObject) -> Result<EncoderConfig>,
}

/// A family that bears the `model_type` of another one.
pub(in crate::model) struct Variant {
    /// Whether a config.json of that `model_type` is of this family.
    pub recognises: fn(&Value) -> bool,
}

/// Names of an encoder's modules, which are those of its tensors without prefix and without `.weight` and `.bias`.
pub(in crate::model) struct Modules {
    /// With what a name of the encoder begins; all others are of heads.
    pub roots: &'static [&'static str],
    /// What stands before the number of a layer.
    pub layers: &'static str,
    /// Linears of a layer, by what follows its number and a dot.
    pub layer_linears: &'static [&'static str],
    /// Norms of a layer.
    pub layer_norms: &'static [&'static str],
    /// Tables outside the layers.
    pub tables: &'static [&'static str],
    /// Norms outside the layers.
    pub norms: &'static [&'static str],
    /// What a layer's stored tensors may hold that is computed from the configuration here.
    pub buffers: &'static [&'static str],
}

/// What only one family's configuration has, and how the family's tensors make an architecture.
pub(in crate::model) trait OwnConfig: fmt::Debug + Send + Sync {
    /// The encoder that `config`, which this is a part of, and `weights` describe.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, see [`Weights::tensor`].
    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture>;

    /// Whether positions are computed for a text of any length (rotary ones alone), so that `max_position_embeddings` is no end.
    fn computes_positions(&self) -> bool {
        false
    }
}

/// A family of encoders: what `model_type` in config.json names.
#[derive(Clone, Copy)]
pub struct Family(&'static Definition);

impl Family {
    /// Every family that is supported.
    pub fn all() -> impl Iterator<Item = Self> {
        FAMILIES.iter().copied().map(Self)
    }

    /// The family of this `model_type`: of several, the one that is nobody's look-alike.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        Self::all().find(|family| family.model_type() == model_type && family.0.variant.is_none())
    }

    /// The family of a config.json with this `model_type`.
    pub(in crate::model) fn of_config(model_type: &str, config: &Value) -> Option<Self> {
        let recognises = |family: &Self| family.0.variant.as_ref().is_some_and(|variant| (variant.recognises)(config));
        let look_alike = Self::all().find(|family| family.model_type() == model_type && recognises(family));
        look_alike.or_else(|| Self::of_model_type(model_type))
    }

    /// Every `model_type` that is known, comma-separated.
    pub(in crate::model) fn model_types() -> String {
        let own = Self::all().filter(|family| family.0.variant.is_none());
        own.map(Self::model_type).collect::<Vec<_>>().join(", ")
    }

    /// `model_type` in config.json, e.g. `bert`. JinaBERT bears BERT's.
    pub fn model_type(self) -> &'static str {
        self.0.model_type
    }

    /// Its own name, which no other family has: its `model_type`, and `jina_bert` of JinaBERT.
    pub fn name(self) -> &'static str {
        self.0.graph_name
    }

    /// How people write it, e.g. `BERT`.
    pub fn title(self) -> &'static str {
        self.0.title
    }

    /// Titles of all families, for messages: `A, B and C`.
    pub(crate) fn titles() -> String {
        let titles: Vec<&str> = Self::all().map(Self::title).collect();
        match titles.split_last() {
            Some((last, [])) => (*last).to_owned(),
            Some((last, others)) => format!("{} and {last}", others.join(", ")),
            None => String::new(),
        }
    }

    pub(in crate::model) fn definition(self) -> &'static Definition {
        self.0
    }
}

/// Which of two names of one size a file has: `own`, unless only `other` is there.
///
/// # Errors
/// [`crate::Error::Config`] where both are there and differ.
fn one_of(json: &JsonObject, own: &'static str, other: &'static str) -> Result<&'static str> {
    match (json.get(own), json.get(other)) {
        (Some(one), Some(another)) if one != another => {
            Err(json.field_error(own, &format!("{other}, another name of it, is {}; give one of them", shown(another))))
        }
        (None, Some(_)) => Ok(other),
        _ => Ok(own),
    }
}

/// Holds the classes of `auto_map`, code of the model's own, against those whose computation the family has here.
///
/// # Errors
/// [`crate::Error::Config`] for any other class: it may compute anything.
fn check_code(json: &JsonObject, known: &[&str]) -> Result<()> {
    let Some(map) = json.object("auto_map")? else { return Ok(()) };
    // "ORG/NAME--FILE.CLASS".
    let class = |value: &Value| value.as_str().and_then(|name| name.rsplit('.').next()).map(str::to_owned);
    match map.iter().find(|(key, value)| {
        matches!(key.as_str(), "AutoConfig" | "AutoModel") && !class(value).is_some_and(|class| known.contains(&class.as_str()))
    }) {
        None => Ok(()),
        Some((key, value)) => {
            let expected = format!("{key} is {}; of code of their own only {} are served", shown(value), known.join(", "));
            Err(json.field_error("auto_map", &expected))
        }
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.title)
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.0.graph_name == other.0.graph_name
    }
}

impl Eq for Family {}

impl Hash for Family {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.graph_name.hash(state);
    }
}

impl Modules {
    /// What `module` is; `None` for one that the encoder of `layers` layers does not have.
    pub fn kind(&self, module: &str, layers: usize) -> Option<ModuleKind> {
        let (linears, norms, tables, name) = match self.layer(module) {
            Some((layer, part)) if layer < layers => (self.layer_linears, self.layer_norms, &[][..], part),
            Some(_) => return None,
            None => (&[][..], self.norms, self.tables, module),
        };
        let is_in = |names: &[&str]| names.contains(&name);
        match () {
            () if is_in(linears) => Some(ModuleKind::Linear),
            () if is_in(norms) => Some(ModuleKind::Norm),
            () if is_in(tables) => Some(ModuleKind::Embedding),
            () => None,
        }
    }

    /// Whether the tensor `name` is a buffer of a layer.
    pub fn is_buffer(&self, name: &str) -> bool {
        self.layer(name).is_some_and(|(_, part)| self.buffers.contains(&part))
    }

    /// The layer that `name` is of, and what follows its number.
    pub fn layer<'n>(&self, name: &'n str) -> Option<(usize, &'n str)> {
        let (number, part) = name.strip_prefix(self.layers)?.split_once('.')?;
        Some((number.parse().ok()?, part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn families_are_found_by_their_model_type() {
        let names: BTreeSet<&str> = Family::all().map(|family| family.definition().graph_name).collect();
        assert_eq!(names.len(), FAMILIES.len(), "two families of one name");
        for family in Family::all().filter(|family| family.definition().variant.is_none()) {
            assert_eq!(Family::of_model_type(family.model_type()), Some(family));
        }
        assert_eq!(Family::of_model_type("BERT"), None);
        assert_eq!(
            Family::titles(),
            "BERT, MPNet, XLM-RoBERTa, RoBERTa, CamemBERT, DistilBERT, ModernBERT, NomicBERT, GTE, GTE v1.5 and JinaBERT v2"
        );
    }

    #[test]
    fn a_family_has_its_own_modules_and_no_others() {
        let (bert, mpnet) = (&bert::FAMILY.modules, &mpnet::FAMILY.modules);
        for (modules, module, kind) in [
            (bert, "encoder.layer.1.attention.self.query", Some(ModuleKind::Linear)),
            (bert, "encoder.layer.1.output.LayerNorm", Some(ModuleKind::Norm)),
            (bert, "encoder.layer.2.output.LayerNorm", None),
            (bert, "encoder.layer.x.output.LayerNorm", None),
            (bert, "encoder.layer.1.attention.attn.q", None),
            (bert, "embeddings.token_type_embeddings", Some(ModuleKind::Embedding)),
            (bert, "encoder.relative_attention_bias", None),
            (mpnet, "encoder.layer.1.attention.attn.q", Some(ModuleKind::Linear)),
            (mpnet, "encoder.layer.1.attention.self.query", None),
            (mpnet, "encoder.relative_attention_bias", Some(ModuleKind::Embedding)),
            (mpnet, "embeddings.token_type_embeddings", None),
            (mpnet, "embeddings.LayerNorm", Some(ModuleKind::Norm)),
        ] {
            assert_eq!(modules.kind(module, 2), kind, "{module}");
        }
    }
}
