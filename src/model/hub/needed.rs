//! Which files of a repository this crate needs; the same list decides what to download and whether a cached snapshot is whole.

use crate::model::adapter::WEIGHTS_FILE;
use crate::model::adapter_config::CONFIG_FILE;
use crate::model::modules::{ModuleKind, read_modules};
use crate::model::pointer::check_link;
use crate::model::weights::{CONVERT, INDEX_FILE, SINGLE_FILE, read_index};
use crate::model::{FOREIGN_TOKENIZER_FILES, TOKENIZER_FILES, TOKENIZER_JSON, VOCABULARY, transformer_module};
use crate::{Error, Result};
use std::path::PathBuf;

use super::cache::Repo;

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
                    collect_settings(files, &module.path)?;
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
    let adapter = files.get(&within(&encoder, CONFIG_FILE))?.is_some();
    if adapter {
        files.get(&within(&encoder, WEIGHTS_FILE))?;
    }
    let config = within(&encoder, "config.json");
    if files.get(&config)?.is_none() {
        // What an adapter alone is to be put on is told by the reader of the folder.
        let next = "it is no encoder in Hugging Face's layout; choose another model";
        return if adapter { Ok(()) } else { Err(files.missing(&config, next)) };
    }
    collect_tokenizer(files, &encoder)?;
    collect_weights(files, &encoder)
}

fn collect_tokenizer(files: &mut dyn Files, encoder: &str) -> Result<()> {
    let mut found = [false; TOKENIZER_FILES.len()];
    for (found, file) in found.iter_mut().zip(TOKENIZER_FILES) {
        *found = files.get(&within(encoder, file))?.is_some();
    }
    let has = |wanted: &str| found.iter().zip(TOKENIZER_FILES).any(|(found, file)| *found && file == wanted);
    if has(TOKENIZER_JSON) {
        return Ok(());
    }
    // Whether vocab.txt alone will do is for the reader of the folder to say, who looks at what lies beside it.
    for file in FOREIGN_TOKENIZER_FILES {
        files.get(&within(encoder, file))?;
    }
    if has(VOCABULARY) {
        return Ok(());
    }
    let next = "download it and make the file with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)";
    Err(files.missing(&within(encoder, TOKENIZER_JSON), next))
}

/// The settings of the Transformer module in `folder`, and those of other names that count while none before them holds anything.
fn collect_settings(files: &mut dyn Files, folder: &str) -> Result<()> {
    for name in transformer_module::FILES {
        if let Some(path) = files.get(&within(folder, name))? {
            let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
            // What is no JSON is told by the reader of the folder.
            if !serde_json::from_slice::<serde_json::Map<_, _>>(&text).is_ok_and(|settings| settings.is_empty()) {
                break;
            }
        }
    }
    Ok(())
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
    /// Those of the unknown files that would change the vectors. vocab.txt does not where there is a tokenizer.json, and without one it
    /// is asked for by the reader of the folder.
    pub fn assumed_absent(&self) -> Vec<&str> {
        self.unknown.iter().map(String::as_str).filter(|file| !file.ends_with(VOCABULARY)).collect()
    }
}

impl Files for Cached<'_> {
    fn get(&mut self, file: &str) -> Result<Option<PathBuf>> {
        let path = self.repo.file(&self.commit, file);
        if path.is_file() {
            return Ok(Some(path));
        }
        // The repository has a file that is linked here.
        check_link(&path)?;
        if !self.repo.is_known_absent(&self.commit, file) {
            self.unknown.push(file.to_owned());
        }
        Ok(None)
    }

    fn missing(&self, file: &str, next: &str) -> Error {
        Error::NotFound { what: file.to_owned(), path: self.repo.file(&self.commit, file), next: next.to_owned() }
    }
}
