//! A model folder as sentence-transformers or plain Hugging Face lay it out.

use crate::model::dense::{Dense, check_features};
use crate::model::json::{JsonObject, shown};
use crate::model::modules::{ModuleKind, read_modules, read_pooling};
use crate::model::{EncoderConfig, Weights};
use crate::pooling::{Pooling, PoolingMode};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Prompts of `config_sentence_transformers.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    /// Prompt text by name.
    pub by_name: BTreeMap<String, String>,
    /// The one used when the caller names none.
    pub default_name: Option<String>,
}

impl Prompts {
    /// The prompt that is used when the caller names none.
    pub fn default_text(&self) -> Option<&str> {
        self.default_name.as_ref().and_then(|name| self.by_name.get(name)).map(String::as_str)
    }
}

/// An opened model folder: everything but the encoder's weights is read and checked.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelFolder {
    /// The folder that was opened (holds modules.json where there is one).
    pub root: PathBuf,
    /// The folder of the Transformer module: config.json, weights and tokenizer.json.
    pub encoder: PathBuf,
    /// config.json.
    pub config: EncoderConfig,
    /// The Pooling module; mean pooling for a plain Hugging Face folder.
    pub pooling: Pooling,
    /// Dense modules between pooling and normalisation, in order.
    pub dense: Vec<Dense>,
    /// Whether modules.json has a Normalize module.
    pub normalize: bool,
    /// Prompts, possibly none.
    pub prompts: Prompts,
    /// `max_seq_length` of sentence_bert_config.json; where that is absent, `model_max_length` of tokenizer_config.json.
    pub max_seq_length: Option<usize>,
    /// `do_lower_case` of sentence_bert_config.json: texts are put into lower case before the tokenizer's own normalisation.
    pub do_lower_case: bool,
}

impl ModelFolder {
    /// Opens a sentence-transformers folder (modules.json) or a plain Hugging Face folder (config.json).
    ///
    /// # Errors
    /// A missing file, a field that cannot be used (named with its value), or sizes that disagree.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref();
        if !root.is_dir() {
            let next = match root.exists() {
                true => "it is a file; give the folder that holds config.json",
                false => "give a folder that holds config.json, tokenizer.json and model.safetensors",
            };
            return Err(Error::NotFound { what: "model folder".to_owned(), path: root.to_path_buf(), next: next.to_owned() });
        }
        let modules = root.join("modules.json");
        if modules.is_file() { Self::open_modules(root, &modules) } else { Self::open_plain(root) }
    }

    /// A folder without modules.json: sentence-transformers pools it by the mean and does not normalise.
    fn open_plain(root: &Path) -> Result<Self> {
        let config = EncoderConfig::read(&root.join("config.json"))?;
        require_tokenizer(root)?;
        Ok(Self {
            root: root.to_path_buf(),
            encoder: root.to_path_buf(),
            config,
            pooling: Pooling { modes: vec![PoolingMode::Mean], include_prompt: true },
            dense: Vec::new(),
            normalize: false,
            prompts: Prompts::default(),
            max_seq_length: read_tokenizer_limit(root)?,
            do_lower_case: false,
        })
    }

    fn open_modules(root: &Path, modules: &Path) -> Result<Self> {
        let mut folder: Option<Self> = None;
        for module in read_modules(modules)? {
            let path = if module.path.is_empty() { root.to_path_buf() } else { root.join(&module.path) };
            match (&mut folder, module.kind) {
                (None, ModuleKind::Transformer) => folder = Some(Self::open_encoder(root, path)?),
                (Some(folder), ModuleKind::Pooling) => {
                    folder.pooling = read_pooling(&path.join("config.json"), folder.config.hidden_size)?;
                }
                (Some(folder), ModuleKind::Dense) => {
                    let dense = Dense::read(&path, folder.embedding_size())?;
                    folder.dense.push(dense);
                }
                (Some(folder), ModuleKind::Normalize) => {
                    // Older versions write no configuration for it, and may give it the path of the encoder.
                    let json = JsonObject::read_if_present(&path.join("config.json"))?;
                    json.as_ref().map_or(Ok(()), check_features)?;
                    folder.normalize = true;
                }
                // read_modules lets no other order through.
                (None, _) | (Some(_), ModuleKind::Transformer) => {}
            }
        }
        folder.ok_or_else(|| crate::model::json::config_error(modules, "no Transformer module"))
    }

    /// The Transformer module of a folder with modules.json.
    fn open_encoder(root: &Path, encoder: PathBuf) -> Result<Self> {
        let mut folder = Self::open_plain(&encoder)?;
        folder.root = root.to_path_buf();
        folder.prompts = read_prompts(&root.join("config_sentence_transformers.json"))?;
        if let Some(json) = JsonObject::read_if_present(&encoder.join("sentence_bert_config.json"))? {
            if json.string("transformer_task")?.is_some_and(|task| task != "feature-extraction") {
                return Err(json.field_error("transformer_task", "only \"feature-extraction\" is supported"));
            }
            folder.max_seq_length = json.size("max_seq_length", 1..=usize::MAX)?.or(folder.max_seq_length);
            folder.do_lower_case = json.boolean("do_lower_case")?.unwrap_or(false);
        }
        Ok(folder)
    }

    /// `tokenizer.json`, in the encoder's folder.
    pub fn tokenizer_path(&self) -> PathBuf {
        self.encoder.join("tokenizer.json")
    }

    /// Memory-maps the encoder's weights (`model.safetensors`, or the shards of `model.safetensors.index.json`).
    ///
    /// # Errors
    /// See [`Weights::open`].
    pub fn weights(&self) -> Result<Weights> {
        Weights::open(&self.encoder, self.config.family)
    }

    /// The most tokens a text may have: min(`max_seq_length`, positions).
    pub fn max_tokens(&self) -> usize {
        let positions = self.config.max_tokens();
        self.max_seq_length.map_or(positions, |n| n.min(positions))
    }

    /// Values of one vector before any cut: the pooled width, or the last Dense module's output.
    pub fn embedding_size(&self) -> usize {
        self.dense.last().map_or(self.pooling.width(self.config.hidden_size), |dense| dense.out_features)
    }
}

fn require_tokenizer(encoder: &Path) -> Result<()> {
    let path = encoder.join("tokenizer.json");
    if path.is_file() {
        return Ok(());
    }
    let next = "vocab.txt alone is not read; make it with transformers: \
                AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)";
    Err(Error::NotFound { what: "tokenizer.json".to_owned(), path, next: next.to_owned() })
}

/// `model_max_length` of tokenizer_config.json. transformers writes 10^30 for no limit.
fn read_tokenizer_limit(encoder: &Path) -> Result<Option<usize>> {
    let Some(json) = JsonObject::read_if_present(&encoder.join("tokenizer_config.json"))? else { return Ok(None) };
    match json.get("model_max_length") {
        None => Ok(None),
        Some(value) if value.as_f64().is_some_and(|limit| limit >= 1.0) => {
            Ok(value.as_u64().and_then(|limit| usize::try_from(limit).ok()))
        }
        Some(_) => Err(json.field_error("model_max_length", "a number of tokens is expected")),
    }
}

fn read_prompts(path: &Path) -> Result<Prompts> {
    let Some(json) = JsonObject::read_if_present(path)? else { return Ok(Prompts::default()) };
    let mut by_name = BTreeMap::new();
    for (name, prompt) in json.object("prompts")?.into_iter().flatten() {
        // sentence-transformers reads null as no prompt.
        let text = if prompt.is_null() { Some("") } else { prompt.as_str() };
        let Some(text) = text else {
            return Err(json.error(format!("prompt \"{name}\" is {}; a string is expected", shown(prompt))));
        };
        by_name.insert(name.clone(), text.to_owned());
    }
    let default_name = json.string("default_prompt_name")?.map(str::to_owned);
    if default_name.as_ref().is_some_and(|name| !by_name.contains_key(name)) {
        let known = by_name.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(json.field_error("default_prompt_name", &format!("the prompts are: {known}")));
    }
    Ok(Prompts { by_name, default_name })
}
