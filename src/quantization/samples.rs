//! What a calibration runs over: rows of token ids.

use crate::model::ModelFolder;
use crate::tokens::{BatchPlan, TokenBatch, Tokenizer, TokenizerSettings, batches_from_ids};
use crate::{Error, Result, Setting};

/// Fewest samples that a calibration takes. Texts of some ten tokens then give about 10^5 values of each tensor: the percentile 99.999
/// rests on one of them, and fewer texts would leave ranges to chance altogether.
pub const MIN_SAMPLES: usize = 32;

/// Rows of token ids, special tokens included. The ids alone are held: some kilobytes a text at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Samples {
    rows: Vec<Vec<u32>>,
}

impl Samples {
    /// Tokenizes texts as [`Embedder`](crate::Embedder) does, with the model's default prompt.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], [`Error::TokenId`].
    pub fn from_texts<T: AsRef<str> + Sync>(model: &ModelFolder, texts: &[T]) -> Result<Self> {
        let mut settings = TokenizerSettings::of_model(model, model.max_tokens());
        settings.prompt = model.prompts.default_text().map(str::to_owned);
        Ok(Self { rows: Tokenizer::open(&model.tokenizer, settings)?.ids(texts)? })
    }

    /// Takes rows of ids, special tokens included, none of them padding.
    ///
    /// # Errors
    /// [`Error::Setting`] for a row that is empty or longer than the model's positions, [`Error::TokenId`].
    pub fn from_ids(model: &ModelFolder, rows: Vec<Vec<u32>>) -> Result<Self> {
        let limit = model.config.max_tokens();
        for (row, ids) in rows.iter().enumerate() {
            if !(1..=limit).contains(&ids.len()) {
                let reason = format!("row index {row} (from 0) has {} ids; 1 to {limit} are accepted", ids.len());
                return Err(Error::Setting { setting: Setting::Ids, reason });
            }
            let vocab_size = model.config.vocab_size;
            if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab_size) {
                return Err(Error::TokenId { id, text: row, vocab_size });
            }
        }
        Ok(Self { rows })
    }

    /// The texts that engines are compared with: one of every length up to the model's limit.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], [`Error::TokenId`].
    #[cfg(feature = "tensorrt")]
    pub fn of_all_lengths(model: &ModelFolder) -> Result<Self> {
        let settings = TokenizerSettings::of_model(model, model.max_tokens());
        let rows = crate::compare::rows_of_all_lengths(&Tokenizer::open(&model.tokenizer, settings)?)?;
        Ok(Self { rows })
    }

    /// Adds other samples after these.
    pub fn extend(&mut self, more: Self) {
        self.rows.extend(more.rows);
    }

    /// Keeps the first `samples`.
    pub fn truncate(&mut self, samples: usize) {
        self.rows.truncate(samples);
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Tokens of all samples together.
    pub fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.len() as u64).sum()
    }

    /// Tokens of the longest sample; 0 where there is none.
    pub fn longest(&self) -> usize {
        self.rows.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Batches as `plan` wants them, longest rows first.
    pub(super) fn batches(&self, model: &ModelFolder, plan: &BatchPlan) -> Result<Vec<TokenBatch>> {
        batches_from_ids(&self.rows, model.config.vocab_size, 0, plan)
    }
}
