//! Files from the hub into the cache, each checked before it gets its name there.

use super::HubOptions;
use super::cache::{Repo, Staging, is_commit};
use super::failure::explain;
use super::needed::Files;
use crate::model::HubId;
use crate::{Error, Progress, Result};
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTypeModel;
use hf_hub::{HFClient, HFError, HFRepositorySync};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a connection may take to come about: as Python's huggingface_hub waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a request is tried in all.
const ATTEMPTS: usize = 3;

/// One repository on the hub.
pub(super) struct Remote<'a> {
    options: &'a HubOptions,
    id: &'a HubId,
    client: reqwest::Client,
}

/// What a revision means, and what it holds.
pub(super) struct Listing {
    pub commit: String,
    files: BTreeSet<String>,
}

impl<'a> Remote<'a> {
    pub fn connect(options: &'a HubOptions, id: &'a HubId) -> Result<Self> {
        let client = reqwest::Client::builder()
            .user_agent(concat!("trt-embed/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|error| explain(options, id, &HFError::from(error)))?;
        Ok(Self { options, id, client })
    }

    fn repository(&self, cache: &Path) -> Result<HFRepositorySync<RepoTypeModel>, HFError> {
        let mut builder = HFClient::builder()
            .endpoint(&self.options.endpoint)
            .cache_dir(cache)
            .client(self.client.clone())
            .retry_max_attempts(ATTEMPTS);
        if let Some(token) = &self.options.token {
            builder = builder.token(token);
        }
        Ok(builder.build_sync()?.model(&self.id.org, &self.id.name))
    }

    /// Asks the hub what the revision means.
    pub fn list(&self) -> Result<Listing, HFError> {
        let info = self.repository(&self.options.cache)?.info().revision(&self.id.revision).send()?;
        let commit = info.sha.filter(|sha| is_commit(sha));
        let commit = commit.ok_or_else(|| HFError::malformed_response("the revision's commit"))?;
        let files = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
        Ok(Listing { commit, files })
    }

    /// The files of `listing`, downloaded as they are asked for.
    pub fn files(&'a self, repo: &'a Repo, listing: Listing, progress: Option<&'a Arc<dyn Progress>>) -> Download<'a> {
        Download { remote: self, repo, listing, staged: None, absent: Vec::new(), progress }
    }

    fn explain(&self, error: &HFError) -> Error {
        explain(self.options, self.id, error)
    }
}

/// The files of one commit, brought into the cache as they are asked for.
pub(super) struct Download<'a> {
    remote: &'a Remote<'a>,
    repo: &'a Repo,
    listing: Listing,
    /// Made for the first file that must be downloaded.
    staged: Option<Staged>,
    absent: Vec<String>,
    progress: Option<&'a Arc<dyn Progress>>,
}

/// A staging cache, and the client that fills it.
struct Staged {
    repository: HFRepositorySync<RepoTypeModel>,
    cache: Staging,
}

impl Files for Download<'_> {
    fn get(&mut self, file: &str) -> Result<Option<PathBuf>> {
        if !self.listing.files.contains(file) {
            self.absent.push(file.to_owned());
            return Ok(None);
        }
        let path = self.repo.file(&self.listing.commit, file);
        // A pointer to a blob that was deleted is no file.
        if path.is_file() {
            return Ok(Some(path));
        }
        let staged = match self.staged.take() {
            Some(staged) => staged,
            None => self.stage()?,
        };
        let path = self.download(&staged, file)?;
        self.staged = Some(staged);
        Ok(Some(path))
    }

    fn missing(&self, file: &str, next: &str) -> Error {
        self.error(format!("the repository has no {file}"), next)
    }
}

impl Download<'_> {
    /// Notes which files the repository does not have, so that the cache alone can tell next time.
    pub fn finish(&self) -> Result<()> {
        self.absent.iter().try_for_each(|file| self.repo.note_absent(&self.listing.commit, file))
    }

    fn download(&self, staged: &Staged, file: &str) -> Result<PathBuf> {
        let commit = &self.listing.commit;
        let meter = Arc::new(Meter::new(file, self.progress.cloned()));
        let pointer = staged
            .repository
            .download_file()
            .filename(file)
            .revision(commit)
            .progress(Arc::clone(&meter))
            .send()
            .map_err(|error| self.remote.explain(&error))?;
        let filed = staged.cache.blob_of(&pointer);
        let (etag, downloaded) =
            filed.ok_or_else(|| self.error(format!("the hub gave no usable ETag for {file}"), "check HF_ENDPOINT"))?;
        let blob = self.repo.blob(&etag);
        match downloaded {
            Some(downloaded) => {
                self.check(file, &etag, &downloaded, meter.expected())?;
                fs::rename(&downloaded, &blob).map_err(Error::io("write", &blob))?;
            }
            None => self.check_size(file, &blob, meter.expected(), &format!("remove {} and run again", blob.display()))?,
        }
        self.repo.point(commit, file, &etag)
    }

    fn stage(&self) -> Result<Staged> {
        let cache = self.repo.stage(self.remote.id)?;
        let repository = self.remote.repository(cache.path()).map_err(|error| self.remote.explain(&error))?;
        Ok(Staged { repository, cache })
    }

    /// Checks a downloaded file: its size, and its SHA-256 where the ETag is one (files in LFS).
    fn check(&self, file: &str, etag: &str, path: &Path, expected: u64) -> Result<()> {
        self.check_size(file, path, expected, "run again; if it stays so, check HF_ENDPOINT and any proxy on the way")?;
        if etag.len() != 64 || !etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(());
        }
        let mut hash = Sha256::new();
        let mut content = File::open(path).map_err(Error::io("open", path))?;
        std::io::copy(&mut content, &mut HashWriter(&mut hash)).map_err(Error::io("read", path))?;
        let found = crate::digest::hex(&hash.finalize());
        if found.eq_ignore_ascii_case(etag) {
            return Ok(());
        }
        let reason = format!("{file} has SHA-256 {found}, the hub says {etag}");
        Err(self.error(reason, "run again; if it stays so, check HF_ENDPOINT and any proxy on the way"))
    }

    fn check_size(&self, file: &str, path: &Path, expected: u64, next: &str) -> Result<()> {
        let found = fs::metadata(path).map_err(Error::io("read", path))?.len();
        if found == expected {
            return Ok(());
        }
        Err(self.error(format!("{file} has {found} bytes, the hub says {expected}"), next))
    }

    fn error(&self, reason: String, next: &str) -> Error {
        Error::Hub { repo: self.remote.id.to_string(), reason, next: next.to_owned() }
    }
}

/// Feeds a hash with what is copied into it.
struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Hears how a file's download goes: passes it on, and keeps the size that the hub announced.
struct Meter {
    file: String,
    progress: Option<Arc<dyn Progress>>,
    expected: AtomicU64,
    /// Bytes last reported; what the client repeats is not passed on.
    reported: Mutex<Option<u64>>,
}

impl Meter {
    fn new(file: &str, progress: Option<Arc<dyn Progress>>) -> Self {
        Self { file: file.to_owned(), progress, expected: AtomicU64::new(0), reported: Mutex::new(None) }
    }

    /// Size by the hub's headers.
    fn expected(&self) -> u64 {
        self.expected.load(Ordering::Acquire)
    }

    fn report(&self, done: u64) {
        let Some(progress) = &self.progress else { return };
        let Ok(mut reported) = self.reported.lock() else { return };
        if reported.is_none_or(|before| done > before) {
            *reported = Some(done);
            progress.download(&self.file, done, self.expected());
        }
    }
}

impl ProgressHandler for Meter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => self.expected.store(*total_bytes, Ordering::Release),
            DownloadEvent::Progress { files } => files.iter().for_each(|file| self.report(file.bytes_completed)),
            DownloadEvent::AggregateProgress { bytes_completed, .. } => self.report(*bytes_completed),
            DownloadEvent::Complete => {}
        }
    }
}
