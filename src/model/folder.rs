//! A model folder as sentence-transformers or plain Hugging Face lay it out.

use super::pooling::{Pooling, PoolingMode, Scaling};
use crate::model::adapter::check_not_alone;
use crate::model::dense::Dense;
use crate::model::json::config_error;
use crate::model::modules::{ModuleKind, check_dropout, check_normalize, read_modules, read_pooling};
use crate::model::sentence_transformers::{Prompts, WholeModel};
use crate::model::transformer_module::{TextCall, TransformerModule};
use crate::model::{Architecture, EncoderConfig, TokenizerFiles, TokenizerModel, Weights};
use crate::notice::warn_once;
use crate::similarity::Similarity;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

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
    /// `truncate_dim`: how many values of a finished vector are kept, where not all. They are not scaled again.
    pub truncate_dim: Option<usize>,
    /// How the model's vectors are compared.
    pub similarity: Similarity,
    /// Prompts, possibly none.
    pub prompts: Prompts,
    /// `max_length` of `processing_kwargs`, else `max_seq_length`, else `model_max_length` of tokenizer_config.json.
    pub max_seq_length: Option<usize>,
    /// `do_lower_case` of sentence_bert_config.json: texts are put into lower case before the tokenizer's own normalisation.
    pub do_lower_case: bool,
    /// How the tokenizer is called (`processing_kwargs` of sentence_bert_config.json).
    pub text_call: TextCall,
    /// The tokenizer's files, with what sentence_bert_config.json lays over them.
    pub tokenizer: TokenizerFiles,
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
        let folder = Self::open_encoder(root, TransformerModule::default())?;
        warn_once(format!("{} has no modules.json: its vectors are means of its hidden states, not normalised", root.display()));
        Ok(folder)
    }

    fn open_modules(root: &Path, path: &Path) -> Result<Self> {
        let whole = WholeModel::read(&root.join("config_sentence_transformers.json"))?;
        let mut folder: Option<Self> = None;
        for module in read_modules(path)? {
            let path = if module.path.is_empty() { root.to_path_buf() } else { root.join(&module.path) };
            match (&mut folder, module.kind) {
                (None, ModuleKind::Transformer) => folder = Some(Self::open_encoder(&path, TransformerModule::read(&path)?)?),
                (Some(folder), ModuleKind::Pooling) => {
                    folder.pooling = read_pooling(&path.join("config.json"), folder.config.hidden_size)?;
                }
                (Some(folder), ModuleKind::Dense) => {
                    let dense = Dense::read(&path, folder.embedding_size())?;
                    folder.dense.push(dense);
                }
                (Some(_), ModuleKind::Dropout) => check_dropout(&path)?,
                (Some(folder), ModuleKind::Normalize) => {
                    check_normalize(&path)?;
                    folder.normalize = true;
                }
                // read_modules lets no other order through.
                (None, _) | (Some(_), ModuleKind::Transformer) => {}
            }
        }
        let Some(folder) = folder else { return Err(config_error(path, "no Transformer module")) };
        let WholeModel { prompts, truncate_dim, similarity } = whole;
        Ok(Self { root: root.to_path_buf(), prompts, truncate_dim, similarity, ..folder })
    }

    /// The encoder in the folder `encoder`, pooled by the mean.
    fn open_encoder(encoder: &Path, module: TransformerModule) -> Result<Self> {
        check_not_alone(encoder)?;
        let over = module.config_overrides.as_ref().map(|(json, field)| (json, *field));
        let mut config = EncoderConfig::read_with(&encoder.join("config.json"), over)?;
        let model = TokenizerModel { model_type: config.family.model_type(), tokenizer_class: config.tokenizer_class.as_deref() };
        let tokenizer = TokenizerFiles::read(encoder, model, &module.tokenizer_overrides)?;
        let max_seq_length = module.text.max_length.or(tokenizer.limit());
        if let Some(tokens) = max_seq_length.filter(|_| module.limits_texts()) {
            serve_limit(encoder, &mut config, tokens)?;
        }
        Ok(Self {
            root: encoder.to_path_buf(),
            encoder: encoder.to_path_buf(),
            config,
            pooling: Pooling { modes: vec![PoolingMode::Mean], include_prompt: true },
            dense: Vec::new(),
            normalize: false,
            truncate_dim: None,
            similarity: Similarity::default(),
            prompts: Prompts::default(),
            max_seq_length,
            do_lower_case: module.do_lower_case,
            text_call: module.text,
            tokenizer,
        })
    }

    /// Memory-maps the encoder's weights (`model.safetensors`, or the shards of `model.safetensors.index.json`).
    ///
    /// # Errors
    /// See [`Weights::open`].
    pub fn weights(&self) -> Result<Weights> {
        Weights::open_layers(&self.encoder, self.config.family, self.config.num_hidden_layers)
    }

    /// The encoder: what is computed, with its weights, which stay in the mapped files.
    ///
    /// # Errors
    /// As [`ModelFolder::weights`] and [`EncoderConfig::architecture`].
    pub fn architecture(&self) -> Result<Architecture> {
        self.config.architecture(&self.weights()?)
    }

    /// The most tokens a text may have: min(`max_seq_length`, positions).
    pub fn max_tokens(&self) -> usize {
        let positions = self.config.max_tokens();
        self.max_seq_length.map_or(positions, |n| n.min(positions))
    }

    /// How many values of vectors of `width` values the model keeps, where it cuts them at all: [`ModelFolder::truncate_dim`], which may
    /// also be above the width, as in the reference.
    pub fn cut(&self, width: usize) -> Option<usize> {
        self.truncate_dim.map(|dim| dim.min(width))
    }

    /// How the model scales its vectors: whole ones, before [`ModelFolder::cut`].
    pub fn scaling(&self) -> Scaling {
        if self.normalize { Scaling::BeforeCut } else { Scaling::None }
    }

    /// Values of one vector before any cut: the pooled width, or the last Dense module's output.
    pub fn embedding_size(&self) -> usize {
        self.dense.last().map_or(self.pooling.width(self.config.hidden_size), |dense| dense.out_features)
    }
}

/// Lets the encoder in the folder `encoder` serve the limit that the Transformer module itself gives. The reference cuts texts there, and
/// not at `max_position_embeddings`, which bounds the tokenizer's own limit alone; beyond the last row of a table it fails.
fn serve_limit(encoder: &Path, config: &mut EncoderConfig, tokens: usize) -> Result<()> {
    config.lengthen(tokens).map_err(|reason| config_error(encoder, format!("max_seq_length or max_length: {reason}")))?;
    let longest = config.max_tokens();
    if tokens > longest {
        let folder = encoder.display();
        warn_once(format!(
            "{folder}: max_seq_length or max_length is {tokens}, and positions serve {longest} tokens: longer texts are cut there"
        ));
    }
    Ok(())
}
