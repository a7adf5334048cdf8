//! Which files of a repository this crate needs; the same list decides what to download and whether a cached snapshot is whole.

use crate::model::modules::{ModuleKind, read_modules};
use crate::model::weights::{CONVERT, INDEX_FILE, SINGLE_FILE, read_index};
use crate::{Error, Result};
use std::path::PathBuf;

use super::cache::Repo;

/// Fetched though this crate does not read them: they go beside an exported model.
const COMPANIONS: [&str; 2] = ["special_tokens_map.json", "vocab.txt"];

/// The files of one commit.
pub(super) trait Files {
    /// The local path of `file`, brought here first where need be; `None` when the repository has no such file.
    fn get(&mut self, file: &str) -> Result<Option<PathBuf>>;

    /// The error for a file that must be there.
    fn missing(&self, file: &str, next: &str) -> Error;
}

/// Gets every file that [`ModelFolder`](crate::model::ModelFolder) and [`Weights`](crate::model::Weights) read.
pub(super) fn collect(files: &mut dyn Files) -> Result<()> {
    let mut encoder = String::new();
    if let Some(modules) = files.get("modules.json")? {
        files.get("config_sentence_transformers.json")?;
        for module in read_modules(&modules)? {
            let config = within(&module.path, "config.json");
            match module.kind {
                ModuleKind::Transformer => {
                    files.get(&within(&module.path, "sentence_bert_config.json"))?;
                    encoder = module.path;
                }
                ModuleKind::Pooling => require(files, &config, "modules.json names it; tell the model's author")?,
                ModuleKind::Dense => {
                    require(files, &config, "modules.json names it; tell the model's author")?;
                    require(
                        files,
                        &within(&module.path, SINGLE_FILE),
                        "save the model again with a newer sentence-transformers",
                    )?;
                }
                ModuleKind::Normalize | ModuleKind::Dropout => {
                    files.get(&config)?;
                }
            }
        }
    }
    require(files, &within(&encoder, "config.json"), "it is no encoder in Hugging Face's layout; choose another model")?;
    require(
        files,
        &within(&encoder, "tokenizer.json"),
        "download it and make the file with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )?;
    files.get(&within(&encoder, "tokenizer_config.json"))?;
    for companion in COMPANIONS {
        files.get(&within(&encoder, companion))?;
    }
    collect_weights(files, &encoder)
}

fn collect_weights(files: &mut dyn Files, encoder: &str) -> Result<()> {
    let single = within(encoder, SINGLE_FILE);
    if files.get(&single)?.is_some() {
        return Ok(());
    }
    let Some(index) = files.get(&within(encoder, INDEX_FILE))? else {
        return Err(files.missing(&single, &format!("other weight files are not read; download it and {CONVERT}")));
    };
    let mut shards: Vec<String> = read_index(&index)?.into_values().collect();
    shards.sort_unstable();
    shards.dedup();
    for shard in shards {
        require(files, &within(encoder, &shard), &format!("{INDEX_FILE} names it; tell the model's author"))?;
    }
    Ok(())
}

fn require(files: &mut dyn Files, file: &str, next: &str) -> Result<()> {
    match files.get(file)? {
        Some(_) => Ok(()),
        None => Err(files.missing(file, next)),
    }
}

fn within(folder: &str, file: &str) -> String {
    if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") }
}

/// The files of a commit as far as the cache has them.
pub(super) struct Cached<'a> {
    repo: &'a Repo,
    commit: String,
    /// Asked for, not cached, and not known to be absent from the repository either.
    pub unknown: Vec<String>,
}

impl<'a> Cached<'a> {
    pub fn new(repo: &'a Repo, commit: &str) -> Self {
        Self { repo, commit: commit.to_owned(), unknown: Vec::new() }
    }
}

impl Cached<'_> {
    /// Those of the unknown files that would change the vectors.
    pub fn assumed_absent(&self) -> Vec<&str> {
        let read = |file: &&str| !COMPANIONS.iter().any(|companion| file.ends_with(companion));
        self.unknown.iter().map(String::as_str).filter(read).collect()
    }
}

impl Files for Cached<'_> {
    fn get(&mut self, file: &str) -> Result<Option<PathBuf>> {
        let path = self.repo.file(&self.commit, file);
        if path.is_file() {
            return Ok(Some(path));
        }
        if !self.repo.is_known_absent(&self.commit, file) {
            self.unknown.push(file.to_owned());
        }
        Ok(None)
    }

    fn missing(&self, file: &str, next: &str) -> Error {
        Error::NotFound { what: file.to_owned(), path: self.repo.file(&self.commit, file), next: next.to_owned() }
    }
}
