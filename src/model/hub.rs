//! Models by hub id (`org/name[@revision]`), downloaded once into the cache that other Hugging Face tools share.

mod address;
mod cache;
mod client;
mod content;
mod download;
mod failure;
mod needed;
mod proxy;
mod tls;

use crate::model::HubId;
use crate::{Error, Progress, Result};
use cache::Repo;
use download::Remote;
use needed::{Cached, collect};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// The public hub.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Where models come from and where they are kept.
#[derive(Clone)]
#[non_exhaustive]
pub struct HubOptions {
    /// Base address of the hub (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The cache that Hugging Face tools share (`HF_HUB_CACHE`, or `hub` in `HF_HOME`).
    pub cache: PathBuf,
    /// Sent to the hub (`HF_TOKEN`); where it is `None`, the token file of `HF_TOKEN_PATH` or `HF_HOME` is read.
    pub token: Option<String>,
    /// Only the cache is consulted (`HF_HUB_OFFLINE`).
    pub offline: bool,
}

/// Without the token: it must not get into logs.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish()
    }
}

impl HubOptions {
    /// From the environment: the variables that Python's huggingface_hub documents.
    pub fn from_env() -> Self {
        Self {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            cache: cache_folder(),
            token: if implicit_token() { set("HF_TOKEN") } else { None },
            offline: set("HF_HUB_OFFLINE")
                .is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())),
        }
    }

    /// The token to send.
    fn token(&self) -> Result<Option<String>> {
        match &self.token {
            Some(token) => Ok(Some(token.clone())),
            None if implicit_token() => stored_token(),
            None => Ok(None),
        }
    }
}

/// Whether a token is sent that the caller has not given.
fn implicit_token() -> bool {
    set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none()
}

/// The value of an environment variable, unless it is empty.
fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// `HF_HUB_CACHE`, else `hub` in [`home_folder`]: the order of Python's huggingface_hub.
fn cache_folder() -> PathBuf {
    let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
    cache.map_or_else(|| home_folder().join("hub"), |cache| expand_home(&cache))
}

/// `HF_HOME`, else `huggingface` in the user's cache folder.
fn home_folder() -> PathBuf {
    match (set("HF_HOME"), set("XDG_CACHE_HOME")) {
        (Some(home), _) => expand_home(&home),
        (None, Some(caches)) => expand_home(&caches).join("huggingface"),
        (None, None) => expand_home("~/.cache/huggingface"),
    }
}

/// The token that `hf auth login` has left: `HF_TOKEN_PATH`, else `token` in [`home_folder`].
fn stored_token() -> Result<Option<String>> {
    let path = set("HF_TOKEN_PATH").map_or_else(|| home_folder().join("token"), |path| expand_home(&path));
    match std::fs::read_to_string(&path) {
        Ok(token) => Ok(Some(token.trim().to_owned()).filter(|token| !token.is_empty())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read the token in", path)(error)),
    }
}

/// `path` with a leading `~/` replaced by the home folder.
fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

/// The folder of a model from the hub or its cache, with the settings of the environment. See [`fetch_with`].
///
/// # Errors
/// See [`fetch_with`].
pub fn fetch(id: &HubId, progress: Option<&Arc<dyn Progress>>) -> Result<PathBuf> {
    fetch_with(&HubOptions::from_env(), id, progress)
}

/// The folder (a snapshot in the cache) of a model from the hub.
///
/// Only what this crate reads is downloaded: configuration, tokenizer and safetensors. A file is checked against whatever the hub
/// says of it (size, SHA-256, git's id) before it gets its name in the cache. A commit that is wholly cached asks nothing of the
/// hub; a branch or tag asks for its commit, and when the hub cannot be reached the cached one serves, with a warning in the log.
///
/// # Errors
/// [`Error::Hub`]: not reachable and not cached; a certificate that is not trusted; no such repository, revision or file; not
/// allowed; another server in the hub's place; size or checksum differ; offline and not cached. [`Error::Io`] when the cache cannot
/// be written. What the model's own modules.json or index is at fault for.
pub fn fetch_with(options: &HubOptions, id: &HubId, progress: Option<&Arc<dyn Progress>>) -> Result<PathBuf> {
    let repo = Repo::new(&options.cache, id);
    if options.offline {
        return from_cache(&repo, id).map_err(|reason| Error::Hub {
            repo: id.to_string(),
            reason: format!("{reason}, and HF_HUB_OFFLINE is set"),
            next: format!(
                "run once without HF_HUB_OFFLINE, or set HF_HUB_CACHE to the cache that has it (now {})",
                options.cache.display()
            ),
        });
    }
    if let Some(snapshot) = whole(&repo, &id.revision) {
        return Ok(snapshot);
    }
    // On a thread of its own: the client waits for its runtime, which a caller on a thread of another such runtime may not.
    std::thread::scope(|scope| {
        let fetched = scope.spawn(|| from_hub(options, &repo, id, progress)).join();
        fetched.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The snapshot of what `id` means now on the hub, its missing files downloaded; where the hub cannot be asked, the cached one.
fn from_hub(options: &HubOptions, repo: &Repo, id: &HubId, progress: Option<&Arc<dyn Progress>>) -> Result<PathBuf> {
    let remote = Remote::connect(options, id)?;
    let listing = match remote.list() {
        Ok(listing) => listing,
        Err(error) if failure::is_unreachable(&error) => {
            let cached = from_cache(repo, id);
            let error = failure::explain(options, id, &error);
            return match cached {
                Ok(snapshot) => {
                    log::warn!("{error}; using the cached {}", snapshot.display());
                    Ok(snapshot)
                }
                Err(_) => Err(error),
            };
        }
        Err(error) => return Err(failure::explain(options, id, &error)),
    };
    let commit = listing.commit.clone();
    if whole(repo, &commit).is_none() {
        // One download at a time: a second process waits here and then finds the files.
        let _lock = repo.lock();
        let mut files = remote.files(repo, listing, progress);
        collect(&mut files)?;
        files.finish()?;
    }
    repo.write_ref(&id.revision, &commit)?;
    Ok(repo.snapshot(&commit))
}

/// The snapshot of `commit`, if it is a full commit id, every file is there and nothing is unknown about it.
fn whole(repo: &Repo, commit: &str) -> Option<PathBuf> {
    if !cache::is_commit(commit) {
        return None;
    }
    let mut files = Cached::new(repo, commit);
    collect(&mut files).ok()?;
    files.unknown.is_empty().then(|| repo.snapshot(commit))
}

/// The snapshot that the cache has of `id`; else why it cannot serve.
fn from_cache(repo: &Repo, id: &HubId) -> Result<PathBuf, String> {
    let commit = repo.commit_of(&id.revision).ok_or_else(|| format!("not in the cache {}", repo.folder().display()))?;
    let mut files = Cached::new(repo, &commit);
    collect(&mut files).map_err(|error| match error {
        Error::NotFound { path, .. } => format!("not wholly in the cache: {} is missing", path.display()),
        other => format!("not usable from the cache: {other}"),
    })?;
    let snapshot = repo.snapshot(&commit);
    let assumed = files.assumed_absent();
    if !assumed.is_empty() {
        log::warn!("{id}: taken to be without {}, which {} does not hold", assumed.join(", "), snapshot.display());
    }
    Ok(snapshot)
}
