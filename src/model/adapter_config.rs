//! `adapter_config.json`: which modules of the encoder peft's LoRA changes, and with which scale.

use super::json::{number, shown};
use super::schema::{JsonObject, Key, Schema, Unknown};
use crate::model::Family;
use crate::{Error, Result};
use fancy_regex::Regex;
use serde_json::{Map, Value};
use std::path::Path;

/// The configuration of an adapter that lies beside the weights.
pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// Highest rank: a matrix of the widest encoder has no more.
const MAX_RANK: usize = 1 << 16;

/// `target_modules` for every linear layer.
const ALL_LINEAR: &str = "all-linear";

/// A reason, and what helps where an adapter cannot be merged here.
macro_rules! merge_after {
    ($reason:literal) => {
        concat!(
            $reason,
            "merge it with peft: PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), FOLDER).merge_and_unload()",
            ".save_pretrained(FOLDER), then remove adapter_config.json"
        )
    };
}

/// What helps where an adapter cannot be merged here.
pub(super) const MERGE: &str = merge_after!("");

const VARIANT: &str = merge_after!("this variant of LoRA is not merged here; ");
const TRAINING: &str = "of training alone";
const INITIAL: &str = "how training began; the stored tensors count";

/// Keys of the file.
pub(super) static KEYS: Schema = Schema {
    title: CONFIG_FILE,
    keys: &[
        &[
            Key::only("peft_type", &["\"LORA\""], merge_after!("only LORA is merged here; ")),
            Key::honoured("r", "rank of the adapter's matrices (8)"),
            Key::honoured("lora_alpha", "scale, divided by the rank (8)"),
            Key::honoured("use_rslora", "whether the scale is divided by the rank's square root"),
            Key::honoured("rank_pattern", "ranks of single modules"),
            Key::honoured("alpha_pattern", "lora_alpha of single modules"),
            Key::honoured(
                "target_modules",
                "the modules that have matrices: a list of names, a regular expression or \"all-linear\"",
            ),
            Key::honoured("exclude_modules", "modules that target_modules leaves out"),
            Key::honoured("layers_to_transform", "the layers that target_modules is held to"),
            Key::honoured("layers_pattern", "what stands before a layer's number"),
            Key::honoured("modules_to_save", "modules that are replaced as a whole"),
            Key::honoured("trainable_token_indices", "rows of an embedding table that are replaced"),
            Key::only(
                "init_lora_weights",
                &["true", "false", "\"gaussian\"", "\"eva\"", "\"orthogonal\""],
                "this initialisation changes the base model's weights too, and peft computes it anew when it loads the adapter",
            ),
            Key::only("bias", &["\"none\"", "\"all\"", "\"lora_only\""], "none, all or lora_only is expected"),
            Key::only(
                "use_dora",
                &["false"],
                merge_after!("DoRA is not merged here, and sentence-transformers 6.2 leaves its magnitudes out; "),
            ),
            Key::only("target_parameters", &["[]"], VARIANT),
            Key::only("layer_replication", &["[]"], "layers are not repeated"),
            Key::only("alora_invocation_tokens", &["[]"], VARIANT),
            Key::only("use_qalora", &["false"], VARIANT),
            Key::only("use_bdlora", &["false"], VARIANT),
            Key::only("velora_config", &[], VARIANT),
            Key::only("monteclora_config", &[], VARIANT),
            Key::only("arrow_config", &[], VARIANT),
            Key::only("kasa_config", &[], VARIANT),
            Key::only("megatron_config", &[], VARIANT),
        ],
        &[
            Key::harmless("base_model_name_or_path", "the base model is the one that lies beside the adapter"),
            Key::harmless("revision", "of the base model that lies beside the adapter"),
            Key::harmless("lora_bias", "biases are merged where they are stored"),
            Key::harmless("fan_in_fan_out", "peft itself passes it over for linear layers"),
            Key::harmless("ensure_weight_tying", "ties with heads, which are not read"),
            Key::harmless("task_type", "of heads, which are not read"),
            Key::harmless("auto_mapping", "which class the base model has; config.json says it"),
            Key::harmless("peft_version", "which version wrote the file"),
            Key::harmless("inference_mode", TRAINING),
            Key::harmless("lora_dropout", TRAINING),
            Key::harmless("runtime_config", TRAINING),
            Key::harmless("loftq_config", INITIAL),
            Key::harmless("eva_config", INITIAL),
            Key::harmless("corda_config", INITIAL),
            Key::harmless("lora_ga_config", INITIAL),
            Key::harmless("megatron_core", "read with megatron_config alone"),
            Key::harmless("qalora_group_size", "read with use_qalora alone"),
        ],
    ],
    unknown: Unknown::Refuse,
};

/// The two keys that lead to the base model.
static BASE_KEYS: Schema = Schema {
    title: "adapter_config.json without weights beside it",
    keys: &[&[Key::honoured("base_model_name_or_path", "the base model"), Key::honoured("revision", "its revision")]],
    unknown: Unknown::Ignore,
};

/// A LoRA adapter's configuration.
#[derive(Debug)]
pub(super) struct LoraConfig {
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
    targets: Modules,
    exclude: Option<Modules>,
    layers: Option<Layers>,
    /// Names of `modules_to_save`, and each as the pattern that keeps matrices away from it.
    save: Vec<(String, Regex)>,
    tokens: Tokens,
    json: JsonObject,
}

/// Modules as peft names them.
#[derive(Debug)]
enum Modules {
    AllLinear,
    /// The whole name matches.
    Pattern(Regex),
    /// The whole name, or its end after a dot.
    Names(Vec<String>),
}

/// The layers that [`Modules::Names`] is held to.
#[derive(Debug)]
struct Layers {
    numbers: Vec<usize>,
    /// Each finds a layer's number in a module's name.
    patterns: Vec<Regex>,
}

/// Rows of embedding tables.
#[derive(Debug)]
enum Tokens {
    None,
    /// Of the token embeddings.
    Input(Vec<usize>),
    /// By the end of a table's name.
    ByTable(Vec<(String, Vec<usize>)>),
}

/// What a module of the encoder is to peft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ModuleKind {
    Linear,
    Embedding,
    Norm,
}

impl LoraConfig {
    /// Reads `adapter_config.json` in `folder`; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Config`] for another kind of adapter, or for a key whose value is not honoured.
    pub fn read_if_present(folder: &Path, family: Family) -> Result<Option<Self>> {
        let Some(json) = JsonObject::read_if_present(&folder.join(CONFIG_FILE), &KEYS)? else { return Ok(None) };
        if json.string("peft_type")?.is_none() {
            return Err(json.field_error("peft_type", "\"LORA\" is expected"));
        }
        let pattern = |text: &str| regex(&json, text);
        let targets = match (json.get("target_modules"), family.definition().lora_targets) {
            (None, Some(names)) => Modules::Names(names.iter().map(|name| (*name).to_owned()).collect()),
            (None, None) => {
                return Err(
                    json.field_error("target_modules", "peft has no default for this family; the modules' names are expected")
                );
            }
            (Some(_), _) => modules(&json, "target_modules")?,
        };
        let numbered = !matches!(targets, Modules::Names(_));
        let layers = layers(&json)?;
        if numbered && layers.is_some() {
            return Err(json.field_error("layers_to_transform", "it needs target_modules to be a list of names"));
        }
        let exclude = match json.get("exclude_modules") {
            None => None,
            Some(_) => Some(modules(&json, "exclude_modules")?),
        };
        let save = names(&json, "modules_to_save")?.unwrap_or_default();
        let save = save.into_iter().map(|name| Ok((pattern(&format!("^(?:(^|.*\\.){name}($|\\..*))"))?, name)));
        let save = save.map(|pair| pair.map(|(pattern, name)| (name, pattern))).collect::<Result<_>>()?;
        let rank = |value: &Value| value.as_u64().and_then(|r| usize::try_from(r).ok()).filter(|r| (1..=MAX_RANK).contains(r));
        let alpha = |value: &Value| number(value).filter(|alpha| alpha.is_finite());
        Ok(Some(Self {
            rank: json.size("r", 1..=MAX_RANK)?.unwrap_or(8),
            alpha: json.number("lora_alpha")?.unwrap_or(8.0),
            rank_stabilised: json.boolean("use_rslora")?.unwrap_or(false),
            rank_pattern: by_module(&json, "rank_pattern", rank)?,
            alpha_pattern: by_module(&json, "alpha_pattern", alpha)?,
            targets,
            exclude,
            layers,
            save,
            tokens: tokens(&json)?,
            json,
        }))
    }

    /// An error about the file.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        self.json.error(reason)
    }

    /// Whether peft gives `module` matrices.
    ///
    /// # Errors
    /// A pattern that takes too long to match.
    pub fn targets(&self, module: &str, kind: ModuleKind) -> Result<bool> {
        if let Some(exclude) = &self.exclude
            && self.named(exclude, module)?
        {
            return Ok(false);
        }
        for (_, pattern) in &self.save {
            if self.matches(pattern, module)? {
                return Ok(false);
            }
        }
        match &self.targets {
            Modules::AllLinear => Ok(kind == ModuleKind::Linear),
            Modules::Names(names) if names.iter().any(|name| name == module) => Ok(true),
            targets => Ok(self.named(targets, module)? && self.is_in_layers(module)?),
        }
    }

    /// The scale of `module`'s product, whose inner size is `rank`.
    ///
    /// # Errors
    /// [`Error::Config`] when `rank` is not the one that the file gives the module, or two patterns give it two scales.
    pub fn scale(&self, module: &str, rank: usize) -> Result<f64> {
        let mut ranks = Vec::new();
        for (pattern, rank) in &self.rank_pattern {
            if self.matches(pattern, module)? {
                ranks.push(*rank);
            }
        }
        if ranks.is_empty() {
            ranks.push(self.rank);
        }
        if !ranks.contains(&rank) {
            let found = format!("the matrices of {module} have the rank {rank}, r and rank_pattern say {}", ranks[0]);
            return Err(self.error(format!("{found}; do {CONFIG_FILE} and the adapter's weights belong together?")));
        }
        let mut alphas = Vec::new();
        for (pattern, alpha) in &self.alpha_pattern {
            if self.matches(pattern, module)? {
                alphas.push(*alpha);
            }
        }
        // peft takes the first in the file's order, which JSON does not keep.
        if let Some(other) = alphas.iter().find(|alpha| **alpha != alphas[0]) {
            return Err(self
                .error(format!("alpha_pattern gives {module} both {} and {other}; one pattern may match a module", alphas[0])));
        }
        let alpha = alphas.first().copied().unwrap_or(self.alpha);
        Ok(if self.rank_stabilised { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 })
    }

    /// Whether `module` is replaced as a whole.
    pub fn saves(&self, module: &str) -> bool {
        self.save.iter().any(|(name, _)| module.ends_with(name.as_str()))
    }

    /// The rows of the embedding table `module` that are replaced.
    pub fn token_rows(&self, module: &str) -> Option<&[usize]> {
        match &self.tokens {
            Tokens::None => None,
            Tokens::Input(rows) => (module == "embeddings.word_embeddings").then_some(rows),
            Tokens::ByTable(tables) => {
                tables.iter().find(|(name, _)| module.ends_with(name.as_str())).map(|(_, rows)| rows.as_slice())
            }
        }
    }

    fn named(&self, modules: &Modules, module: &str) -> Result<bool> {
        match modules {
            Modules::AllLinear => Ok(false),
            Modules::Pattern(pattern) => self.matches(pattern, module),
            Modules::Names(names) => Ok(names.iter().any(|name| ends_with(module, name))),
        }
    }

    fn is_in_layers(&self, module: &str) -> Result<bool> {
        let Some(layers) = &self.layers else { return Ok(true) };
        for pattern in &layers.patterns {
            let found = pattern.captures(module).map_err(|error| self.error(format!("layers_pattern: {error}")))?;
            if let Some(number) = found.and_then(|found| found.name("idx").map(|idx| idx.as_str().to_owned())) {
                return Ok(number.parse().is_ok_and(|number| layers.numbers.contains(&number)));
            }
        }
        Ok(false)
    }

    fn matches(&self, pattern: &Regex, module: &str) -> Result<bool> {
        pattern.is_match(module).map_err(|error| self.error(format!("the pattern {} on {module}: {error}", pattern.as_str())))
    }
}

/// The base model that the adapter in `folder` names, as `NAME` or `NAME@REVISION`.
///
/// # Errors
/// What reading the file can be at fault for.
pub(super) fn base_model(folder: &Path) -> Result<Option<(String, Option<String>)>> {
    let Some(json) = JsonObject::read_if_present(&folder.join(CONFIG_FILE), &BASE_KEYS)? else { return Ok(None) };
    let name = json.string("base_model_name_or_path")?.unwrap_or_default().to_owned();
    Ok(Some((name, json.string("revision")?.map(str::to_owned))))
}

/// Whether `module` is `name` or ends with it after a dot.
fn ends_with(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|stem| stem.is_empty() || stem.ends_with('.'))
}

fn regex(json: &JsonObject, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|error| json.error(format!("the pattern {pattern} cannot be used here: {error}")))
}

fn modules(json: &JsonObject, field: &str) -> Result<Modules> {
    match json.get(field) {
        Some(Value::String(text)) if text.eq_ignore_ascii_case(ALL_LINEAR) => Ok(Modules::AllLinear),
        Some(Value::String(text)) => Ok(Modules::Pattern(regex(json, &format!("\\A(?:{text})\\z"))?)),
        _ => Ok(Modules::Names(names(json, field)?.unwrap_or_default())),
    }
}

fn names(json: &JsonObject, field: &str) -> Result<Option<Vec<String>>> {
    let Some(value) = json.get(field) else { return Ok(None) };
    let names = value.as_array().and_then(|names| names.iter().map(|name| name.as_str().map(str::to_owned)).collect());
    names.map(Some).ok_or_else(|| json.field_error(field, "a list of modules' names is expected"))
}

/// One whole number or a list of them.
fn numbers(value: &Value) -> Option<Vec<usize>> {
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    match value {
        Value::Array(values) => values.iter().map(number).collect(),
        value => number(value).map(|n| vec![n]),
    }
}

fn layers(json: &JsonObject) -> Result<Option<Layers>> {
    let numbers = match json.get("layers_to_transform") {
        None => Vec::new(),
        Some(value) => numbers(value).ok_or_else(|| json.field_error("layers_to_transform", "numbers of layers are expected"))?,
    };
    let before = match json.get("layers_pattern") {
        None => Vec::new(),
        Some(Value::String(one)) if one.is_empty() => Vec::new(),
        Some(Value::String(one)) => vec![one.clone()],
        Some(_) => names(json, "layers_pattern")?.unwrap_or_default(),
    };
    if numbers.is_empty() {
        return if before.is_empty() {
            Ok(None)
        } else {
            Err(json.field_error("layers_pattern", "it needs layers_to_transform"))
        };
    }
    let patterns = match before.is_empty() {
        true => vec![regex(json, r"^.*?\.[^.]*\.(?<idx>\d+)\.")?],
        false => before
            .iter()
            .map(|before| regex(json, &format!(r"^(?:(?:^|.*?\.){before}\.(?<idx>\d+)\.)")))
            .collect::<Result<_>>()?,
    };
    Ok(Some(Layers { numbers, patterns }))
}

/// Values by patterns of modules' names: each is held against the end of a name, from a dot on.
fn by_module<T>(json: &JsonObject, field: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Regex, T)>> {
    let empty = Map::new();
    json.object(field)?
        .unwrap_or(&empty)
        .iter()
        .map(|(name, value)| {
            let value = read(value)
                .ok_or_else(|| json.error(format!("{field} gives {} for \"{name}\"; a number is expected", shown(value))))?;
            Ok((regex(json, &format!("^(?:.*\\.)?(?:{name})$"))?, value))
        })
        .collect()
}

fn tokens(json: &JsonObject) -> Result<Tokens> {
    const FIELD: &str = "trainable_token_indices";
    let rows = |value: &Value| {
        let rows = numbers(value).filter(|_| value.is_array());
        rows.ok_or_else(|| json.field_error(FIELD, "lists of token ids are expected"))
    };
    match json.get(FIELD) {
        None => Ok(Tokens::None),
        Some(Value::Object(tables)) => {
            let tables = tables.iter().map(|(name, ids)| Ok((name.clone(), rows(ids)?))).collect::<Result<_>>()?;
            Ok(Tokens::ByTable(tables))
        }
        Some(ids) => rows(ids).map(Tokens::Input),
    }
}
