//! The tokenizer of a model folder: prompts, cutting at the token limit, and ids checked against the embedding table.

use super::assemble::{self, Assembled, as_error};
use super::cache::Cache;
use super::loaded::{Choices, Loaded, frame};
use super::one_pass::Scratch;
use super::windows::Kept;
use super::{BatchPlan, TokenBatch, batches_from_ids};
use crate::model::{ModelFolder, TokenizerFiles, read_file};
use crate::{Error, Result, Setting};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::sync::{Arc, OnceLock};
use tokenizers::{PostProcessorWrapper, TruncationDirection};

/// Texts shorter than this altogether (about a millisecond's work) are not worth spreading over threads.
const PARALLEL_BYTES: usize = 8 * 1024;

/// Bytes of the longest text with its prompt whose memory a thread keeps.
const MOST_JOINED: usize = 1 << 20;

thread_local! {
    /// A prompt with a text behind it.
    static JOINED: Cell<String> = const { Cell::new(String::new()) };
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// What the model folder and the caller ask of a [`Tokenizer`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TokenizerSettings {
    /// Most tokens of a text, special tokens and prompt included; longer texts are cut, on the side that the tokenizer says.
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
    /// Whether texts get the tokenizer's special tokens.
    pub add_special_tokens: bool,
    /// An id that no text may have in it, other than as padding: that by which the model itself counts positions.
    pub position_padding: Option<u32>,
    /// Most threads that texts are spread over, for all callers together; rayon's global ones where `None`.
    pub threads: Option<usize>,
}

impl TokenizerSettings {
    /// Settings without a prompt and without lower-casing.
    pub fn new(max_tokens: usize, pad_token_id: u32, vocab_size: usize) -> Self {
        Self {
            max_tokens,
            pad_token_id,
            vocab_size,
            lower_case: false,
            prompt: None,
            skip_prompt: false,
            add_special_tokens: true,
            position_padding: None,
            threads: None,
        }
    }

    /// As `model`'s folder asks for, without a prompt.
    pub fn of_model(model: &ModelFolder, max_tokens: usize) -> Self {
        Self {
            lower_case: model.do_lower_case,
            skip_prompt: !model.pooling.include_prompt,
            add_special_tokens: model.text_call.add_special_tokens,
            position_padding: model.config.position_padding(),
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

/// A tokenizer made ready for one model. Its files' own truncation and padding are overridden: the published MPNet file, for one, cuts at
/// 128 tokens and pads every text to 128.
///
/// Texts are passed on as they are, as sentence-transformers 6.2 does (older releases stripped surrounding whitespace, which the BERT
/// pre-tokenizer drops in any case). Memory and time for a text are bounded by what is kept of it, as far as the tokenizer can be cut
/// exactly; a longer run without such a place is an error.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    pub(super) loaded: Arc<Loaded>,
    settings: TokenizerSettings,
    /// The threads of [`TokenizerSettings::threads`], made when they are first needed; `None` within where there are none to be had.
    pool: Arc<OnceLock<Option<ThreadPool>>>,
    skip: u32,
    /// What is kept of long texts; the tokenizer's own side unless a caller asked for another.
    kept: Kept,
}

/// Ids of one text.
pub(crate) struct Row {
    pub ids: Vec<u32>,
    pub truncated: bool,
}

impl AsRef<[u32]> for Row {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

impl Tokenizer {
    /// The tokenizer that a model folder's files describe. Those that are alive, of files and settings that come to the same tokenizer, share its memory.
    ///
    /// A large tokenizer of which every text is served in one pass (byte-level BPE, Unigram behind Metaspace) is kept in `TRT_EMBED_CACHE`, or in
    /// `trt-embed` in the user's cache folder, in a form that is read many times faster than its files are parsed.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Tokenizer`] when a file does not parse, parts of it do not fit the tokenizer's class or the pad id is
    /// outside the table, [`Error::Setting`] when `max_tokens` has no room for the special tokens of every text.
    pub fn open(files: &TokenizerFiles, settings: TokenizerSettings) -> Result<Self> {
        let loaded = Cache::of_user().open(files, Choices::of(&settings))?;
        Self::new(loaded, settings).map_err(assemble::at(files.vocabulary_path()))
    }

    /// The tokenizer of `tokenizer.json` alone, given as its bytes.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_bytes(json: &[u8], settings: TokenizerSettings) -> Result<Self> {
        let loaded = Loaded::new(assemble::from_json(json)?, Choices::of(&settings))?;
        Self::new(Arc::new(loaded), settings)
    }

    fn new(loaded: Arc<Loaded>, settings: TokenizerSettings) -> Result<Self> {
        if settings.pad_token_id as usize >= settings.vocab_size {
            let (id, size) = (settings.pad_token_id, settings.vocab_size);
            return Err(Error::Tokenizer { reason: format!("pad_token_id {id} is outside the embedding table of {size} rows") });
        }
        let added = loaded.before.len() + loaded.after.len();
        if settings.max_tokens < added.max(1) {
            let reason = format!("{} leaves no room for the {added} special tokens of every text", settings.max_tokens);
            return Err(Error::Setting { setting: Setting::MaxTokens, reason });
        }
        let prompt = settings.prompt.clone();
        let kept = loaded.kept;
        Self { loaded, settings, pool: Arc::default(), skip: 0, kept }.prompted(prompt)
    }

    /// SHA-256, as hexadecimal digits, of what `files` make of texts: that of tokenizer.json where its own parts are all that counts.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn content_hash(files: &TokenizerFiles) -> Result<String> {
        let path = files.vocabulary_path();
        let bytes = read_file(path)?;
        let effective = description(assemble::from_files(files, &bytes)?)?;
        let plain =
            assemble::from_json(&bytes).and_then(|plain| description(Assembled { side: TruncationDirection::Right, ..plain }));
        Ok(match plain {
            Ok(plain) if plain == effective => crate::digest::hex(&Sha256::digest(&bytes)),
            _ => crate::digest::hex(&Sha256::digest(effective)),
        })
    }

    /// The same tokenizer with another prompt, or none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the prompt cannot be encoded.
    pub fn with_prompt(&self, prompt: Option<String>) -> Result<Self> {
        self.clone().prompted(prompt)
    }

    /// The same tokenizer, which of long texts keeps their end, or else their start.
    #[cfg(feature = "serve")]
    pub(crate) fn keeping_end(mut self, end: bool) -> Self {
        self.kept = if end { Kept::End } else { Kept::Start };
        self
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

    /// The id of a token that any text may have: the first that stands before every text, where one does.
    #[cfg(feature = "serve")]
    pub(crate) fn probe_id(&self) -> u32 {
        self.loaded.before.first().copied().unwrap_or(0)
    }

    /// Tokenizes `texts` (over several threads when there is enough to do) and cuts them into batches.
    ///
    /// # Errors
    /// [`Error::Text`] for the first text that cannot be encoded, [`Error::TokenId`] for an id outside the embedding table.
    pub fn encode(&self, texts: &[impl AsRef<str> + Sync], plan: &BatchPlan) -> Result<Tokenized> {
        let rows = self.encode_all(texts)?;
        Ok(Tokenized {
            batches: batches_from_ids(&rows, self.settings.vocab_size, self.skip, plan)?,
            tokens: rows.iter().map(|row| row.ids.len() as u32).collect(),
            truncated: rows.iter().filter(|row| row.truncated).count(),
        })
    }

    /// The ids of each text, special tokens and prompt included, cut at the limit, in the caller's order.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn ids(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Vec<u32>>> {
        let rows = self.encode_all(texts)?.into_iter().enumerate();
        rows.map(|(text, row)| self.check_ids(text, &row.ids).map(|()| row.ids)).collect()
    }

    /// As [`Tokenizer::ids`], each text with its own result; one without any token is an [`Error::Text`].
    pub(crate) fn rows(&self, texts: &[impl AsRef<str> + Sync]) -> Vec<Result<Row>> {
        let whole = |(text, row): (usize, Result<Row>)| {
            let row = row?;
            self.check_ids(text, &row.ids)?;
            if row.ids.is_empty() { Err(without_tokens(text)) } else { Ok(row) }
        };
        self.encode_each(texts).into_iter().enumerate().map(whole).collect()
    }

    /// Checks that ids of text `text` are in the embedding table.
    fn check_ids(&self, text: usize, ids: &[u32]) -> Result<()> {
        let vocab_size = self.settings.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(Error::TokenId { id, text, vocab_size }),
            None => Ok(()),
        }
    }

    fn encode_all(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Row>> {
        // Gathered one by one, so that of several faults the first is the one reported.
        self.encode_each(texts).into_iter().collect()
    }

    fn encode_each(&self, texts: &[impl AsRef<str> + Sync]) -> Vec<Result<Row>> {
        let one_by_one = || texts.iter().enumerate().map(|(index, text)| self.encode_one(index, text.as_ref())).collect();
        let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        if texts.len() < 2 || bytes < PARALLEL_BYTES {
            return one_by_one();
        }
        let spread = || texts.par_iter().enumerate().map(|(index, text)| self.encode_one(index, text.as_ref())).collect();
        match self.settings.threads {
            None => spread(),
            Some(threads) => match self.pool(threads) {
                Some(pool) => pool.install(spread),
                None => one_by_one(),
            },
        }
    }

    /// Cuts rows of ids, special tokens included, into batches: what [`Tokenizer::encode`] does with the ids of texts.
    ///
    /// # Errors
    /// [`Error::Setting`] for a row that is empty or longer than the limit, [`Error::TokenId`] for an id outside the embedding table.
    pub fn batches_from_ids(&self, rows: &[impl AsRef<[u32]>], plan: &BatchPlan) -> Result<Tokenized> {
        self.check_lengths(rows)?;
        Ok(Tokenized {
            batches: batches_from_ids(rows, self.settings.vocab_size, 0, plan)?,
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
        batch.refill(rows, self.settings.vocab_size, 0)
    }

    fn check_lengths(&self, rows: &[impl AsRef<[u32]>]) -> Result<()> {
        rows.iter().enumerate().try_for_each(|(index, row)| self.check_length(index, row.as_ref()))
    }

    fn check_length(&self, index: usize, row: &[u32]) -> Result<()> {
        let (limit, length) = (self.settings.max_tokens, row.len());
        if !(1..=limit).contains(&length) {
            let reason = format!("row index {index} (from 0) has {length} ids; 1 to {limit} are accepted");
            return Err(Error::Setting { setting: Setting::Ids, reason });
        }
        if let Some(id) = self.settings.position_padding.filter(|id| row.contains(id)) {
            let reason = format!("row index {index} (from 0): {}", position_padding(&self.loaded.position_padding, id));
            return Err(Error::Setting { setting: Setting::Ids, reason });
        }
        Ok(())
    }

    /// `row`, the text of index `index` as ids, special tokens included, where it is as [`Tokenizer::batches_from_ids`] takes it.
    pub(crate) fn row_of_ids(&self, index: usize, row: &[u32]) -> Result<Row> {
        self.check_length(index, row)?;
        self.check_ids(index, row)?;
        Ok(Row { ids: row.to_vec(), truncated: false })
    }

    /// Replaces `ids` by those of one text, special tokens and prompt included, cut at the limit, and tells whether it was cut. With a tokenizer
    /// that is served in one pass (WordPiece, byte-level BPE, Unigram behind Metaspace) nothing is allocated where `ids` and the thread have done as much before.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], the text being text 0; `ids` is then of no use.
    pub fn ids_into(&self, text: &str, ids: &mut Vec<u32>) -> Result<bool> {
        let truncated = self.replace_ids(text, ids).map_err(|reason| Error::Text { text: 0, reason })?;
        self.check_ids(0, ids)?;
        Ok(truncated)
    }

    fn encode_one(&self, index: usize, text: &str) -> Result<Row> {
        let mut ids = Vec::new();
        let truncated = self.replace_ids(text, &mut ids).map_err(|reason| Error::Text { text: index, reason })?;
        Ok(Row { ids, truncated })
    }

    fn replace_ids(&self, text: &str, ids: &mut Vec<u32>) -> Result<bool, String> {
        let Some(prompt) = self.settings.prompt.as_deref() else { return self.cut(text, ids) };
        let mut joined = JOINED.take();
        joined.clear();
        joined.push_str(prompt);
        joined.push_str(text);
        let truncated = self.cut(&joined, ids);
        if joined.capacity() <= MOST_JOINED {
            JOINED.set(joined);
        }
        truncated
    }

    /// Replaces `ids` by those of `text`, at most `max_tokens`, with the special tokens around what is kept of it; whether some were left out.
    fn cut(&self, text: &str, ids: &mut Vec<u32>) -> Result<bool, String> {
        let Loaded { before, after, position_padding: token, .. } = &*self.loaded;
        let room = self.settings.max_tokens - before.len() - after.len();
        // One token more than there is room for: a text that has it is longer than the limit.
        let needed = room.saturating_add(1);
        ids.clear();
        ids.extend_from_slice(before);
        let begin = ids.len();
        let mut scratch = SCRATCH.take();
        let appended = self.loaded.append(text, needed, self.kept, &mut scratch, ids);
        SCRATCH.set(scratch);
        appended?;
        let found = ids.len() - begin;
        let truncated = found > room;
        match self.kept {
            Kept::Start => ids.truncate(begin + found.min(room)),
            Kept::End => drop(ids.drain(begin..ids.len() - found.min(room))),
        }
        if let Some(id) = self.settings.position_padding.filter(|id| ids[begin..].contains(id)) {
            return Err(position_padding(token, id));
        }
        ids.extend_from_slice(after);
        Ok(truncated)
    }

    /// The prompt's tokens as sentence-transformers counts them: the prompt tokenized alone, less a special token at its end
    /// (`Transformer._get_prompt_length`).
    fn prompt_length(&self, prompt: &str) -> Result<u32> {
        let mut ids = Vec::new();
        self.cut(prompt, &mut ids).map_err(|error| Error::Tokenizer { reason: format!("prompt \"{prompt}\": {error}") })?;
        let ends_special = ids.last().is_some_and(|id| self.loaded.special_ids.contains(id));
        Ok(ids.len() as u32 - u32::from(ends_special))
    }

    /// A pool of `threads` threads; the same one for all callers, and none where the system gives no threads.
    fn pool(&self, threads: usize) -> Option<&ThreadPool> {
        let name = |thread| format!("trt-embed-tokens-{thread}");
        let pool = || {
            let built = ThreadPoolBuilder::new().num_threads(threads.max(1)).thread_name(name).build();
            built.inspect_err(|error| log::warn!("texts are tokenised one by one: {error}")).ok()
        };
        self.pool.get_or_init(pool).as_ref()
    }
}

/// That a text has no token at all, so that there is no vector of it.
pub(crate) fn without_tokens(text: usize) -> Error {
    Error::Text { text, reason: "it has no tokens, and the model's tokenizer adds none".to_owned() }
}

/// Why the padding token within a text is refused.
fn position_padding(token: &str, id: u32) -> String {
    format!(
        "it has the padding token \"{token}\" (id {id}) in it, by which this model counts positions; the exported graph counts tokens \
         instead. Take it out of the text"
    )
}

/// All that ids depend on, as text.
fn description(assembled: Assembled) -> Result<String> {
    let Assembled { mut inner, side, token_types, .. } = assembled;
    let (before, after) = frame(&inner, token_types)?;
    inner.with_post_processor(None::<PostProcessorWrapper>);
    inner.with_decoder(None::<tokenizers::DecoderWrapper>);
    let json = inner.to_string(false).map_err(as_error)?;
    let whole = !inner.get_encode_special_tokens();
    Ok(format!("{json}\nbefore {before:?} after {after:?} left {} whole {whole}", side == TruncationDirection::Left))
}
