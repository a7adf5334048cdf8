//! Vectors of another program, e.g. sentence-transformers, that engines are compared with instead of the CPU's.

use crate::compare::{Padding, Reference};
use crate::model::ModelFolder;
use crate::pooling::Head;
use crate::tokens::{Tokenizer, TokenizerSettings};
use crate::{Error, Result};
use serde::Deserialize;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The largest file that is read: 240 vectors of 768 values take 3 MB.
const MAX_BYTES: u64 = 1 << 30;

/// A JSON file as `scripts/gpu_references.py` writes it; further fields do not count.
pub(super) struct ReferenceFile {
    path: PathBuf,
    contents: Contents,
}

#[derive(Deserialize)]
struct Contents {
    /// As they were given to the other program.
    texts: Vec<String>,
    /// One for each text, as it comes out of the model: pooled, and normalised where the model does that.
    vectors: Vec<Vec<f32>>,
    /// Tokens of each text, special tokens included, cut at the model's limit.
    tokens: Option<Vec<usize>>,
    /// Programs and versions.
    made_by: Option<String>,
}

impl ReferenceFile {
    /// Reads the file at `path` and checks what needs no model.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::ReferenceFile`] for other contents, no texts, numbers that do not fit together or are not finite.
    pub fn read(path: &Path) -> Result<Self> {
        let fault = |reason: String| Err(Error::ReferenceFile { path: path.into(), reason });
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(Error::io("read", path))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        if bytes.len() as u64 > MAX_BYTES {
            return fault(format!("it is larger than {MAX_BYTES} bytes"));
        }
        let contents: Contents = match serde_json::from_slice(&bytes) {
            Ok(contents) => contents,
            Err(error) => return fault(error.to_string()),
        };
        let Contents { texts, vectors, tokens, .. } = &contents;
        if texts.is_empty() || vectors.len() != texts.len() {
            return fault(format!("{} texts and {} vectors; a vector for each text is expected", texts.len(), vectors.len()));
        }
        if let Some(tokens) = tokens.as_ref().filter(|tokens| tokens.len() != texts.len()) {
            return fault(format!("{} texts and {} numbers of tokens", texts.len(), tokens.len()));
        }
        let not_finite = |vector: &Vec<f32>| vector.iter().any(|value| !value.is_finite());
        if let Some(text) = vectors.iter().position(not_finite) {
            return fault(format!("the vector of text index {text} (from 0) is not finite"));
        }
        Ok(Self { path: path.into(), contents })
    }

    /// Who made it, for the manifest.
    pub fn name(&self) -> String {
        let file = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy();
        match &self.contents.made_by {
            Some(made_by) => format!("{file}, made by {made_by}"),
            None => file.into_owned(),
        }
    }

    /// The texts as `folder`'s tokens, with the model's default prompt, beside their vectors.
    ///
    /// # Errors
    /// [`Error::ReferenceFile`] for vectors of another length than the model's, and texts that have another number of tokens than in the
    /// file; [`Error::Tokenizer`], [`Error::TokenId`].
    pub fn of_model(&self, folder: &ModelFolder) -> Result<Reference> {
        let fault = |reason: String| Error::ReferenceFile { path: self.path.clone(), reason };
        let Contents { texts, vectors, tokens, .. } = &self.contents;
        let dim = Head::of_model(folder)?.dim;
        if let Some(text) = vectors.iter().position(|vector| vector.len() != dim) {
            let length = vectors[text].len();
            return Err(fault(format!("the vector of text index {text} (from 0) has {length} values, the model's have {dim}")));
        }
        let mut settings = TokenizerSettings::of_model(folder, folder.max_tokens());
        settings.prompt = folder.prompts.default_text().map(str::to_owned);
        let tokenizer = Tokenizer::open(&folder.tokenizer, settings)?;
        let rows = tokenizer.ids(texts)?;
        let counted = tokens.iter().flatten().zip(&rows).map(|(&expected, row)| (expected, row.len()));
        if let Some((text, (expected, found))) = counted.enumerate().find(|(_, (expected, found))| expected != found) {
            let reason =
                format!("text index {text} (from 0) has {expected} tokens there and {found} with this model's tokenizer");
            return Err(fault(reason));
        }
        let padding = Padding::of_model(folder);
        Ok(Reference::given(rows, vectors.concat(), dim, padding, tokenizer.skip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn folder() -> ModelFolder {
        ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap()
    }

    fn read(contents: &Value) -> Result<ReferenceFile> {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("references.json");
        std::fs::write(&path, contents.to_string()).unwrap();
        ReferenceFile::read(&path)
    }

    fn reason(error: Error) -> String {
        match error {
            Error::ReferenceFile { reason, path } => {
                assert!(path.ends_with("references.json"));
                reason
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_file_that_fits_the_model_is_taken_and_named() {
        let folder = folder();
        let dim = Head::of_model(&folder).unwrap().dim;
        let file = read(&json!({
            "model": "m", "made_by": "torch 2", "dim": dim, "texts": ["the", "a sentence"], "vectors": [vec![0.5; dim], vec![0.1; dim]],
        }))
        .unwrap();
        assert_eq!(file.name(), "references.json, made by torch 2");
        file.of_model(&folder).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = folder();
        let dim = Head::of_model(&folder).unwrap().dim;
        let full = |texts: &[&str], vectors: Vec<Vec<f32>>| json!({"texts": texts, "vectors": vectors});
        for (contents, part) in [
            (json!(3), "invalid type"),
            (json!({"texts": ["a"]}), "missing field `vectors`"),
            (full(&[], vec![]), "0 texts and 0 vectors"),
            (full(&["a", "b"], vec![vec![0.0; dim]]), "2 texts and 1 vectors"),
            (json!({"texts": ["a"], "vectors": [[1.0, 1e300]]}), "text index 0 (from 0) is not finite"),
            (json!({"texts": ["a"], "vectors": [[1.0]], "tokens": [1, 2]}), "1 texts and 2 numbers of tokens"),
        ] {
            let found = reason(read(&contents).err().unwrap());
            assert!(found.contains(part), "no {part:?} in {found}");
        }
        let short = read(&full(&["a"], vec![vec![0.5; dim - 1]])).unwrap();
        let found = reason(short.of_model(&folder).unwrap_err());
        assert!(found.contains(&format!("{} values, the model's have {dim}", dim - 1)), "{found}");
        let other = read(&json!({"texts": ["the"], "vectors": [vec![0.5; dim]], "tokens": [77]})).unwrap();
        let found = reason(other.of_model(&folder).unwrap_err());
        assert!(found.contains("text index 0 (from 0) has 77 tokens there and 3 with"), "{found}");
        assert!(matches!(ReferenceFile::read(Path::new("nowhere.json")), Err(Error::Io { .. })));
    }
}
