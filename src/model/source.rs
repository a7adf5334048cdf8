//! What a model argument means: a folder on this machine, or a hub id.

use crate::model::misnamed::{ShortName, address, cache_folder, short_name};
use crate::model::pointer::check_link;
use crate::{Error, Progress, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The longest repository id that the hub takes.
const MAX_ID: usize = 96;

/// A model on the hub: `org/name`, or `org/name@revision` with a branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// The account.
    pub org: String,
    /// The repository.
    pub name: String,
    /// Branch, tag or commit; `main` where the id names none.
    pub revision: String,
}

impl HubId {
    /// Reads `org/name[@revision]`; `None` for anything else.
    ///
    /// Which characters may stand where follows `validate_repo_id` of Python's huggingface_hub. A revision is a git reference:
    /// since it becomes a path in the cache, it may not lead out of it.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = repo.split_once('/')?;
        let valid = repo.len() <= MAX_ID && is_name(org) && is_name(name) && !name.ends_with(".git") && is_revision(revision);
        valid.then(|| Self { org: org.to_owned(), name: name.to_owned(), revision: revision.to_owned() })
    }

    /// `org/name`.
    pub fn repo(&self) -> String {
        format!("{}/{}", self.org, self.name)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.org, self.name, self.revision)
    }
}

fn is_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty()
        && part.chars().all(allowed)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

fn is_revision(revision: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    revision.split('/').all(|part| !part.is_empty() && part.chars().all(allowed) && !part.starts_with('.'))
}

/// The folder that `model` means: an existing path is that folder; otherwise `org/name[@revision]` is fetched from the hub
/// (or found in its cache). A name without organisation is taken for one of `sentence-transformers`, as sentence-transformers does.
///
/// # Errors
/// [`Error::NotFound`] when `model` is neither, or a folder of the hub's cache that holds no model; [`Error::DanglingLink`];
/// [`Error::Hub`] as `hub::fetch` says.
pub fn resolve(model: &str, progress: Option<&Arc<dyn Progress>>) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        let Some(next) = cache_folder(path) else { return Ok(path.to_path_buf()) };
        return Err(Error::NotFound { what: "config.json".to_owned(), path: path.join("config.json"), next });
    }
    check_link(path)?;
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty());
    let not_found = |next| Error::NotFound { what: "model folder".to_owned(), path: path.to_path_buf(), next };
    if let Some(next) = address(model, endpoint.as_deref()) {
        return Err(not_found(next));
    }
    if let Some(id) = HubId::parse(model) {
        return fetch(&id, progress);
    }
    match short_name(model) {
        Some(ShortName::Ours(id)) => fetch(&id, progress).map_err(|error| match error {
            Error::Hub { repo, reason, next } => {
                let taken = format!("{model} is no folder here and has no organisation, so it was taken for {}", id.repo());
                Error::Hub { repo, reason, next: format!("{next} ({taken})") }
            }
            other => other,
        }),
        Some(ShortName::First(next)) => Err(not_found(next)),
        None => {
            let next = "give an existing folder, or a hub id org/name[@revision] such as sentence-transformers/all-mpnet-base-v2";
            Err(not_found(next.to_owned()))
        }
    }
}

#[cfg(feature = "hub")]
fn fetch(id: &HubId, progress: Option<&Arc<dyn Progress>>) -> Result<PathBuf> {
    crate::model::hub::fetch(id, progress)
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &HubId, _: Option<&Arc<dyn Progress>>) -> Result<PathBuf> {
    Err(Error::Hub {
        repo: id.to_string(),
        reason: "no such folder, and this build cannot download (it lacks the feature \"hub\")".to_owned(),
        next: "give a model folder, or build with --features hub".to_owned(),
    })
}
