//! Files from the hub into the cache, each checked before it gets its name there.

use super::HubOptions;
use super::cache::{Repo, is_commit};
use super::client::{Client, Response, header};
use super::content::{self, Expected, Hash, is_hex};
use super::failure::{Failure, explain};
use super::needed::Files;
use crate::files::AtomicFile;
use crate::model::HubId;
use crate::{Error, Progress, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use ureq::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, ETAG, TRANSFER_ENCODING};

/// The largest listing that is read. The repositories with most files have some 10 MB of it.
const MAX_LISTING: u64 = 64 << 20;

/// Bytes read at a time.
const PIECE_BYTES: usize = 1 << 16;

/// What to do about a file that is not what the hub says.
const DAMAGED: &str = "run again; if it stays so, check HF_ENDPOINT and any proxy on the way";

/// One repository on the hub.
pub(super) struct Remote<'a> {
    options: &'a HubOptions,
    id: &'a HubId,
    client: Client,
}

/// What a revision means, and what it holds.
pub(super) struct Listing {
    pub commit: String,
    files: BTreeMap<String, Expected>,
}

/// The hub's answer about a revision, as far as it is read. A mirror may leave out all but the names.
#[derive(Deserialize)]
struct RepoInfo {
    sha: Option<String>,
    siblings: Option<Vec<RepoFile>>,
}

#[derive(Deserialize)]
struct RepoFile {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<LfsFile>,
}

#[derive(Deserialize)]
struct LfsFile {
    sha256: Option<String>,
    size: Option<u64>,
}

/// What the head of a file's answer says.
struct Metadata {
    etag: Option<String>,
    size: Option<u64>,
}

impl<'a> Remote<'a> {
    pub fn connect(options: &'a HubOptions, id: &'a HubId) -> Result<Self> {
        let token = options.token()?;
        let client = Client::new(options, token.as_deref()).map_err(|failure| explain(options, id, &failure))?;
        Ok(Self { options, id, client })
    }

    /// Asks the hub what the revision means, and with the names of its files for their sizes and hashes.
    pub fn list(&self) -> Result<Listing, Failure> {
        let HubId { org, name, revision } = self.id;
        let response = self.client.get(&["api", "models", org, name, "revision", revision], Some("blobs=true"))?;
        let mut text = Vec::new();
        response
            .into_body()
            .into_reader()
            .take(MAX_LISTING)
            .read_to_end(&mut text)
            .map_err(|source| broken_off("the list of files", source))?;
        let info: RepoInfo =
            serde_json::from_slice(&text).map_err(|error| Failure::Answer(format!("the list of files is no hub's: {error}")))?;
        let commit = info.sha.filter(|sha| is_commit(sha));
        let commit = commit.ok_or_else(|| Failure::Answer("the answer names no commit".to_owned()))?;
        let siblings = info.siblings.ok_or_else(|| Failure::Answer("the answer lists no files".to_owned()))?;
        let files = siblings.into_iter().map(|file| (file.rfilename.clone(), file.expected())).collect();
        Ok(Listing { commit, files })
    }

    /// The files of `listing`, downloaded as they are asked for.
    pub fn files(&'a self, repo: &'a Repo, listing: Listing, progress: Option<&'a Arc<dyn Progress>>) -> Download<'a> {
        Download { remote: self, repo, listing, absent: Vec::new(), progress }
    }

    /// What the hub says of `file` at `commit`, without its content.
    fn metadata(&self, commit: &str, file: &str) -> Result<Metadata, Failure> {
        let response = self.client.head_of_file(&self.path(commit, file), file)?;
        let Some(answered) = header(&response, "x-repo-commit") else {
            return Err(Failure::Answer(format!("the answer for {file} has no X-Repo-Commit, which every hub gives")));
        };
        if !answered.eq_ignore_ascii_case(commit) {
            return Err(Failure::Answer(format!("{file} was asked for at commit {commit}, the answer is of {answered}")));
        }
        // On a redirect, ETag and Content-Length are those of the redirect.
        let own = response.status().is_success();
        let etag = header(&response, "x-linked-etag").or_else(|| own.then(|| header(&response, ETAG.as_str())).flatten());
        let size =
            header(&response, "x-linked-size").or_else(|| own.then(|| header(&response, CONTENT_LENGTH.as_str())).flatten());
        let size =
            size.map(|size| size.parse().map_err(|_| Failure::Answer(format!("{file} has size {size:?}, which is no number"))));
        Ok(Metadata { etag: etag.map(normalized), size: size.transpose()? })
    }

    /// The answer with the content of `file` at `commit`.
    fn content(&self, commit: &str, file: &str) -> Result<Response, Failure> {
        let response = self.client.get_file(&self.path(commit, file), file)?;
        match header(&response, CONTENT_ENCODING.as_str()) {
            None | Some("identity") => Ok(response),
            Some(other) => Err(Failure::Answer(format!("{file} comes as {other}, though it was asked for as it is"))),
        }
    }

    fn path<'b>(&'b self, commit: &'b str, file: &'b str) -> Vec<&'b str> {
        [self.id.org.as_str(), &self.id.name, "resolve", commit].into_iter().chain(file.split('/')).collect()
    }

    fn explain(&self, failure: &Failure) -> Error {
        explain(self.options, self.id, failure)
    }
}

impl RepoFile {
    fn expected(self) -> Expected {
        match self.lfs {
            // `blobId` is that of the pointer in git then.
            Some(lfs) => {
                let hash = lfs.sha256.filter(|hex| is_hex(hex, 64)).map(|hex| Hash::Sha256(hex.to_ascii_lowercase()));
                Expected { size: lfs.size.or(self.size), hashes: hash.into_iter().collect() }
            }
            None => {
                let hash = self.blob_id.filter(|hex| is_hex(hex, 40)).map(|hex| Hash::GitBlob(hex.to_ascii_lowercase()));
                Expected { size: self.size, hashes: hash.into_iter().collect() }
            }
        }
    }
}

fn broken_off(file: &str, source: std::io::Error) -> Failure {
    Failure::BrokenOff { file: file.to_owned(), source }
}

/// An ETag without the quotes and the mark of a weak one, as Hugging Face tools name blobs.
fn normalized(etag: &str) -> String {
    etag.trim_start_matches("W/").trim_matches('"').to_owned()
}

/// The files of one commit, brought into the cache as they are asked for.
pub(super) struct Download<'a> {
    remote: &'a Remote<'a>,
    repo: &'a Repo,
    listing: Listing,
    absent: Vec<String>,
    progress: Option<&'a Arc<dyn Progress>>,
}

impl Files for Download<'_> {
    fn get(&mut self, file: &str) -> Result<Option<PathBuf>> {
        let Some(listed) = self.listing.files.get(file) else {
            self.absent.push(file.to_owned());
            return Ok(None);
        };
        let path = self.repo.file(&self.listing.commit, file);
        // A pointer to a blob that was deleted is no file.
        if path.is_file() {
            return Ok(Some(path));
        }
        self.download(file, listed.clone()).map(Some)
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

    fn download(&self, file: &str, listed: Expected) -> Result<PathBuf> {
        let commit = &self.listing.commit;
        let Metadata { etag, size } = self.remote.metadata(commit, file).map_err(|failure| self.remote.explain(&failure))?;
        let mut expected = Expected { size: listed.size.or(size), ..listed };
        let hash = etag.as_deref().and_then(Hash::of_etag);
        expected.hashes.extend(hash.filter(|hash| !expected.hashes.contains(hash)));
        if etag.is_none() && expected.hashes.is_empty() {
            let next = "check HF_ENDPOINT and any proxy on the way: nothing tells whether such a file arrives whole";
            return Err(self.error(format!("the hub gave neither ETag nor hash for {file}"), next));
        }
        // Other tools look for blobs by ETag. One that is no hash may name several files, so that the content names the blob.
        let etag = etag.filter(|etag| is_hex(etag, 40) || is_hex(etag, 64));
        let name = etag.or_else(|| expected.hashes.first().map(|hash| hash.hex().to_owned()));
        if let Some(name) = &name {
            let blob = self.repo.blob(name);
            if blob.is_file() {
                self.check(file, &blob, &mut File::open(&blob).map_err(Error::io("open", &blob))?, &expected)?;
                return self.repo.point(commit, file, name);
            }
        }
        let name = self.fetch(file, name, &expected)?;
        self.repo.point(commit, file, &name)
    }

    /// Downloads the content of `file` as the blob called `name`, or by its SHA-256. Gives the blob's name.
    fn fetch(&self, file: &str, name: Option<String>, expected: &Expected) -> Result<String> {
        let response = self.remote.content(&self.listing.commit, file).map_err(|failure| self.remote.explain(&failure))?;
        let length = header(&response, CONTENT_LENGTH.as_str()).and_then(|length| length.parse().ok());
        if length.is_none() && header(&response, TRANSFER_ENCODING.as_str()).is_none() && *expected == Expected::default() {
            log::warn!("{}: {file} came without a size or hash; whether it is whole cannot be told", self.remote.id);
        }
        let mut blob = self.repo.new_blob()?;
        self.receive(file, response, expected.size.or(length), &mut blob)?;
        let path = self.repo.blobs();
        let content = blob.file()?;
        self.check(file, &path, content, expected)?;
        let name = name.map_or_else(|| content::sha256(content).map_err(Error::io("read", path)), Ok)?;
        blob.set_path(&self.repo.blob(&name));
        blob.commit()?;
        Ok(name)
    }

    fn receive(&self, file: &str, response: Response, total: Option<u64>, blob: &mut AtomicFile) -> Result<()> {
        let report = |done, total| {
            if let Some(progress) = self.progress {
                progress.download(file, done, total);
            }
        };
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE_BYTES];
        let mut done = 0;
        report(done, total.unwrap_or(0));
        loop {
            if self.progress.is_some_and(|progress| progress.cancelled()) {
                return Err(Error::Cancelled { what: "the download" });
            }
            let read = match body.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.remote.explain(&broken_off(file, source))),
            };
            blob.write_all(&piece[..read]).map_err(|error| self.cannot_write(&error))?;
            done += read as u64;
            report(done, total.unwrap_or(0));
        }
        blob.flush().map_err(|error| self.cannot_write(&error))?;
        if total.is_none() {
            report(done, done);
        }
        Ok(())
    }

    fn check(&self, file: &str, path: &Path, content: &mut File, expected: &Expected) -> Result<()> {
        match content::fault(file, content, expected).map_err(Error::io("read", path))? {
            None => Ok(()),
            Some(fault) if path.is_file() => Err(self.error(fault, &format!("remove {} and run again", path.display()))),
            Some(fault) => Err(self.error(fault, DAMAGED)),
        }
    }

    fn cannot_write(&self, error: &std::io::Error) -> Error {
        let reason = format!("cannot write to the cache {}: {error}", self.remote.options.cache.display());
        self.error(reason, "free space there, or set HF_HUB_CACHE to another folder")
    }

    fn error(&self, reason: String, next: &str) -> Error {
        Error::Hub { repo: self.remote.id.to_string(), reason, next: next.to_owned() }
    }
}
