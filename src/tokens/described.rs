//! Tokens as they are shown to people: their text and place beside the id, and ids turned back into text.
//!
//! Embedding needs neither, so that a [`Loaded`](super::loaded::Loaded) tokenizer keeps neither; this one is made apart, by who asks for it.

use super::assemble::{self, as_error};
use super::loaded::lower_case_first;
use crate::model::{ModelFolder, read_file};
use crate::{Error, Result};
use serde::Serialize;

/// A token of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DescribedToken {
    pub id: u32,
    /// What it stands for in the text; the token's own name where it is special.
    pub text: String,
    /// Whether the tokenizer put it there.
    pub special: bool,
    /// Its place in the text in bytes, from 0; none for a special one.
    pub start: Option<usize>,
    pub stop: Option<usize>,
}

/// See the module.
pub(crate) struct Describer {
    inner: tokenizers::Tokenizer,
}

impl Describer {
    /// The tokenizer of `folder`'s files.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Tokenizer`].
    pub fn open(folder: &ModelFolder) -> Result<Self> {
        let bytes = read_file(folder.tokenizer.vocabulary_path())?;
        let mut inner = assemble::from_files(&folder.tokenizer, &bytes)?.inner;
        if folder.do_lower_case {
            lower_case_first(&mut inner)?;
        }
        Ok(Self { inner })
    }

    /// All tokens of text `index`, uncut.
    ///
    /// # Errors
    /// [`Error::Text`].
    pub fn tokens(&self, index: usize, text: &str, add_special_tokens: bool) -> Result<Vec<DescribedToken>> {
        let encoding = self
            .inner
            .encode(text, add_special_tokens)
            .map_err(|error| Error::Text { text: index, reason: error.to_string() })?;
        let describe = |place: usize| {
            let (id, name) = (encoding.get_ids()[place], &encoding.get_tokens()[place]);
            if encoding.get_special_tokens_mask()[place] == 1 {
                return DescribedToken { id, text: name.clone(), special: true, start: None, stop: None };
            }
            let (start, stop) = encoding.get_offsets()[place];
            // A token of bytes may lie within a character.
            let bytes = text.as_bytes().get(start..stop).unwrap_or_default();
            let text = String::from_utf8_lossy(bytes).into_owned();
            DescribedToken { id, text, special: false, start: Some(start), stop: Some(stop) }
        };
        Ok((0..encoding.len()).map(describe).collect())
    }

    /// The text that `ids` stand for. Ids that the vocabulary does not have are an error: the library leaves them out.
    ///
    /// # Errors
    /// [`Error::TokenId`], [`Error::Tokenizer`].
    pub fn decode(&self, index: usize, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(Error::TokenId { id, text: index, vocab_size: self.inner.get_vocab_size(true) });
        }
        self.inner.decode(ids, skip_special_tokens).map_err(as_error)
    }
}
