//! The tokenizer of a model folder: prompts, cutting at the token limit, and ids checked against the embedding table.

use super::{BatchPlan, TokenBatch, batches_from_ids};
use crate::model::ModelFolder;
use crate::{Error, Result};
use rayon::prelude::*;
use std::borrow::Cow;
use std::path::Path;
use tokenizers::normalizers::{Lowercase, Sequence};
use tokenizers::{
    NormalizerWrapper, PostProcessor, PreTokenizerWrapper, TruncationDirection, TruncationParams, TruncationStrategy,
};

/// Texts shorter than this altogether (about a millisecond's work) are not worth spreading over threads.
const PARALLEL_BYTES: usize = 8 * 1024;

/// First guess at how much of a long text its first `max_tokens` tokens cover; English has about 5 bytes a token.
const BYTES_PER_TOKEN: usize = 8;

/// What the model folder and the caller ask of a [`Tokenizer`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TokenizerSettings {
    /// Most tokens of a text, special tokens and prompt included; longer texts are cut on the right.
    pub max_tokens: usize,
    /// Id that fills rows up to the width of their batch.
    pub pad_token_id: u32,
    /// Rows of the token embedding table.
    pub vocab_size: usize,
    /// `do_lower_case` of sentence_bert_config.json.
    pub lower_case: bool,
    /// Put before every text as it is.
    pub prompt: Option<String>,
    /// Whether pooling leaves the prompt's tokens out (`include_prompt: false`). Without a prompt it changes nothing.
    pub skip_prompt: bool,
}

impl TokenizerSettings {
    /// Settings without a prompt and without lower-casing.
    pub fn new(max_tokens: usize, pad_token_id: u32, vocab_size: usize) -> Self {
        Self { max_tokens, pad_token_id, vocab_size, lower_case: false, prompt: None, skip_prompt: false }
    }

    /// As `model`'s folder asks for, without a prompt.
    pub fn of_model(model: &ModelFolder, max_tokens: usize) -> Self {
        Self {
            lower_case: model.do_lower_case,
            skip_prompt: !model.pooling.include_prompt,
            ..Self::new(max_tokens, model.config.pad_token_id, model.config.vocab_size)
        }
    }
}

/// Texts as batches of ids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Tokenized {
    /// Every text once, longest first.
    pub batches: Vec<TokenBatch>,
    /// Tokens of each text as run, in the caller's order.
    pub tokens: Vec<u32>,
    /// How many texts were longer than the limit and were cut.
    pub truncated: usize,
}

/// A `tokenizer.json` made ready for one model. Its own truncation and padding are overridden: the published MPNet file, for one,
/// cuts at 128 tokens and pads every text to 128.
///
/// Texts are passed on as they are, as sentence-transformers 6.2 does (older releases stripped surrounding whitespace, which the BERT
/// pre-tokenizer drops in any case).
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    settings: TokenizerSettings,
    skip: u32,
    cuts_at_whitespace: bool,
}

/// Ids of one text.
struct Row {
    ids: Vec<u32>,
    truncated: bool,
}

impl AsRef<[u32]> for Row {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` at `path`.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Io`], [`Error::Tokenizer`] when it does not parse or the pad id is outside the table, [`Error::Setting`] when `max_tokens` has no
    /// room for the special tokens that the file adds.
    pub fn open(path: &Path, settings: TokenizerSettings) -> Result<Self> {
        if !path.exists() {
            let next = "save it with transformers' AutoTokenizer.save_pretrained (a fast tokenizer)".to_owned();
            return Err(Error::NotFound { what: "tokenizer.json".to_owned(), path: path.to_owned(), next });
        }
        let json = std::fs::read(path).map_err(Error::io("read", path))?;
        Self::from_bytes(&json, settings).map_err(|error| match error {
            Error::Tokenizer { reason } => Error::Tokenizer { reason: format!("{}: {reason}", path.display()) },
            other => other,
        })
    }

    /// As [`Tokenizer::open`], from the file's bytes.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_bytes(json: &[u8], settings: TokenizerSettings) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(as_error)?;
        let added = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if settings.max_tokens < added.max(1) {
            let reason = format!("{} leaves no room for the {added} special tokens of every text", settings.max_tokens);
            return Err(Error::Setting { setting: "--max-tokens", reason });
        }
        if settings.pad_token_id as usize >= settings.vocab_size {
            let (id, size) = (settings.pad_token_id, settings.vocab_size);
            return Err(Error::Tokenizer { reason: format!("pad_token_id {id} is outside the embedding table of {size} rows") });
        }
        if settings.lower_case {
            lower_case_first(&mut inner)?;
        }
        inner.with_padding(None);
        // One token more than asked for: a text that reaches it was longer than the limit. (Asked for the limit itself, the library
        // stops early without a word when no special tokens are added.) `Tokenizer::cut` takes the token off again.
        let truncation = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: settings.max_tokens.saturating_add(1),
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        inner.with_truncation(Some(truncation)).map_err(as_error)?;
        let cuts_at_whitespace = cuts_at_whitespace(&inner);
        let prompt = settings.prompt.clone();
        Self { inner, settings, skip: 0, cuts_at_whitespace }.prompted(prompt)
    }

    /// The same tokenizer with another prompt, or none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the prompt cannot be encoded.
    pub fn with_prompt(&self, prompt: Option<String>) -> Result<Self> {
        self.clone().prompted(prompt)
    }

    fn prompted(mut self, prompt: Option<String>) -> Result<Self> {
        self.settings.prompt = prompt.filter(|prompt| !prompt.is_empty());
        self.skip = match (self.settings.skip_prompt, self.settings.prompt.as_deref()) {
            (true, Some(prompt)) => self.prompt_length(prompt)?,
            _ => 0,
        };
        Ok(self)
    }

    /// Most tokens of a text, special tokens and prompt included.
    pub fn max_tokens(&self) -> usize {
        self.settings.max_tokens
    }

    /// Leading tokens that pooling leaves out; 0 unless the settings ask for it.
    pub fn skip(&self) -> u32 {
        self.skip
    }

    /// Tokenizes `texts` (over all cores when there is enough to do) and cuts them into batches.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the first text that could not be encoded, [`Error::TokenId`] for an id outside the embedding table.
    pub fn encode(&self, texts: &[impl AsRef<str> + Sync], plan: &BatchPlan) -> Result<Tokenized> {
        let rows = self.encode_all(texts)?;
        Ok(Tokenized {
            batches: batches_from_ids(&rows, self.settings.pad_token_id, self.settings.vocab_size, self.skip, plan)?,
            tokens: rows.iter().map(|row| row.ids.len() as u32).collect(),
            truncated: rows.iter().filter(|row| row.truncated).count(),
        })
    }

    /// The ids of each text, special tokens and prompt included, cut at the limit, in the caller's order.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn ids(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Vec<u32>>> {
        let vocab_size = self.settings.vocab_size;
        let checked = |(text, row): (usize, Row)| match row.ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(Error::TokenId { id, text, vocab_size }),
            None => Ok(row.ids),
        };
        self.encode_all(texts)?.into_iter().enumerate().map(checked).collect()
    }

    fn encode_all(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Row>> {
        let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        let rows: Vec<Result<Row>> = if texts.len() > 1 && bytes >= PARALLEL_BYTES {
            texts.par_iter().enumerate().map(|(index, text)| self.encode_one(index, text.as_ref())).collect()
        } else {
            texts.iter().enumerate().map(|(index, text)| self.encode_one(index, text.as_ref())).collect()
        };
        // Gathered one by one, so that of several faults the first is the one reported.
        rows.into_iter().collect()
    }

    /// Cuts rows of ids, special tokens included, into batches: what [`Tokenizer::encode`] does with the ids of texts.
    ///
    /// # Errors
    /// [`Error::Setting`] for a row that is empty or longer than the limit, [`Error::TokenId`] for an id outside the embedding table.
    pub fn batches_from_ids(&self, rows: &[impl AsRef<[u32]>], plan: &BatchPlan) -> Result<Tokenized> {
        self.check_lengths(rows)?;
        Ok(Tokenized {
            batches: batches_from_ids(rows, self.settings.pad_token_id, self.settings.vocab_size, 0, plan)?,
            tokens: rows.iter().map(|row| row.as_ref().len() as u32).collect(),
            truncated: 0,
        })
    }

    /// As [`Tokenizer::batches_from_ids`], all rows as one batch in the caller's order, in the memory that `batch` has already.
    ///
    /// # Errors
    /// As [`Tokenizer::batches_from_ids`].
    pub fn refill_from_ids(&self, rows: &[impl AsRef<[u32]>], batch: &mut TokenBatch) -> Result<()> {
        self.check_lengths(rows)?;
        batch.refill(rows, self.settings.pad_token_id, self.settings.vocab_size, 0)
    }

    fn check_lengths(&self, rows: &[impl AsRef<[u32]>]) -> Result<()> {
        let limit = self.settings.max_tokens;
        for (index, row) in rows.iter().enumerate() {
            let length = row.as_ref().len();
            if !(1..=limit).contains(&length) {
                let reason = format!("row {index} has {length} ids; 1 to {limit} are accepted");
                return Err(Error::Setting { setting: "ids", reason });
            }
        }
        Ok(())
    }

    fn encode_one(&self, index: usize, text: &str) -> Result<Row> {
        let text = match &self.settings.prompt {
            Some(prompt) => Cow::Owned(format!("{prompt}{text}")),
            None => Cow::Borrowed(text),
        };
        self.cut(&text).map_err(|error| Error::Tokenizer { reason: format!("text {index}: {error}") })
    }

    /// Ids of `text`, at most `max_tokens`, with the special tokens around what is left of it.
    fn cut(&self, text: &str) -> tokenizers::Result<Row> {
        let encoding = self.encode_start(text)?;
        let mut ids = encoding.get_ids().to_vec();
        let truncated = ids.len() > self.settings.max_tokens;
        if truncated && let Some(last) = encoding.get_special_tokens_mask().iter().rposition(|&special| special == 0) {
            ids.remove(last);
        }
        Ok(Row { ids, truncated })
    }

    /// Encodes no more of a long text than the limit needs, where that provably gives the same ids.
    fn encode_start(&self, text: &str) -> tokenizers::Result<tokenizers::Encoding> {
        let mut window = self.settings.max_tokens.saturating_add(1).saturating_mul(BYTES_PER_TOKEN);
        while self.cuts_at_whitespace && window < text.len() {
            if let Some(start) = up_to_last_space(text, window) {
                let encoding = self.inner.encode_fast(start, true)?;
                if encoding.len() > self.settings.max_tokens {
                    return Ok(encoding);
                }
            }
            window = window.saturating_mul(4);
        }
        self.inner.encode_fast(text, true)
    }

    /// The prompt's tokens as sentence-transformers counts them: the prompt tokenized alone, less a special token at its end
    /// (`Transformer._get_prompt_length`).
    fn prompt_length(&self, prompt: &str) -> Result<u32> {
        let ids = self.cut(prompt).map_err(|error| Error::Tokenizer { reason: format!("prompt \"{prompt}\": {error}") })?.ids;
        let special = self.inner.get_added_tokens_decoder();
        let ends_special = ids.last().and_then(|id| special.get(id)).is_some_and(|token| token.special);
        Ok(ids.len() as u32 - u32::from(ends_special))
    }
}

fn as_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}

/// `do_lower_case` as sentence-transformers does it: a `Lowercase` normalizer before the others unless there is one. Added tokens
/// written in the text (`[SEP]`) are found before any normalizer runs and stay what they are.
fn lower_case_first(inner: &mut tokenizers::Tokenizer) -> Result<()> {
    let mut normalizers = vec![NormalizerWrapper::from(Lowercase)];
    match inner.get_normalizer() {
        Some(NormalizerWrapper::Sequence(sequence)) => normalizers.extend(sequence.as_ref().iter().cloned()),
        Some(other) => normalizers.push(other.clone()),
        None => {}
    }
    if !normalizers.iter().skip(1).any(|normalizer| matches!(normalizer, NormalizerWrapper::Lowercase(_))) {
        inner.with_normalizer(Some(Sequence::new(normalizers))).map_err(as_error)?;
    }
    Ok(())
}

/// Whether the ids of a text cut before an ASCII space begin those of the whole text, special tokens apart.
///
/// So it is with BERT's parts: its normalizer and `Lowercase` work on each character (accents are stripped after a decomposition
/// that a space ends), its pre-tokenizer always splits at a space and drops it, and models see one piece at a time. Added tokens are
/// searched for in the whole text, but one without whitespace in it cannot span the cut; those searched for after normalization must
/// be ASCII, since normalizing other characters can put spaces into them.
fn cuts_at_whitespace(inner: &tokenizers::Tokenizer) -> bool {
    fn local(normalizer: &NormalizerWrapper) -> bool {
        match normalizer {
            NormalizerWrapper::BertNormalizer(_) | NormalizerWrapper::Lowercase(_) => true,
            NormalizerWrapper::Sequence(sequence) => sequence.as_ref().iter().all(local),
            _ => false,
        }
    }
    matches!(inner.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)))
        && inner.get_normalizer().is_none_or(local)
        && inner
            .get_added_tokens_decoder()
            .values()
            .all(|token| !token.content.contains(char::is_whitespace) && (!token.normalized || token.content.is_ascii()))
}

/// The first `window` bytes of `text` up to their last ASCII space.
fn up_to_last_space(text: &str, window: usize) -> Option<&str> {
    let bytes = text.as_bytes().get(..window)?;
    let end = bytes.iter().rposition(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))?;
    text.get(..end)
}
