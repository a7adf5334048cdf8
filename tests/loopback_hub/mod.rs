//! A hub on loopback: the routes that a download uses, with faults on demand.
//!
//! Routes and headers: <https://huggingface.co/docs/hub/api> and what `resolve` answers (`X-Repo-Commit`, `X-Linked-Etag`,
//! `X-Linked-Size`, a redirect for files in LFS). Written on a plain socket, because broken answers are the point.

use crate::tiny_model::Folder;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const REPO: &str = "org/tiny";

/// What the hub does to one request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// Answers with this status and `X-Error-Code`.
    Status(u16, &'static str),
    /// The body breaks off before the length that was announced.
    BrokenOff,
    /// A whole, shorter body.
    Short,
    /// The same length, other bytes.
    OtherBytes,
}

/// How the hub, or what stands before it, answers.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Way {
    #[default]
    Plain,
    /// 307 for each file, to a path with a query; what the file is stands on the last answer alone.
    ResolveCache,
    /// As before, with the address of this host.
    ResolveCacheAbsolute,
    /// The repository has moved: 307 to its new name.
    Renamed,
    /// A proxy takes Content-Length off answers to HEAD.
    HeadWithoutLength,
    /// Bodies come in chunks, without Content-Length.
    Chunked,
    /// Bodies end with the connection, without Content-Length.
    UntilClosed,
    /// Bodies are said to be compressed.
    Compressed,
    /// Nothing is said of the commit.
    WithoutCommit,
    /// Every answer is 308 to this address.
    Elsewhere(String),
}

/// The ETag of files that are not in LFS.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Tag {
    /// Git's id, as the hub has it.
    #[default]
    Git,
    /// SHA-1 of the content.
    Sha1,
    /// A web server's own, the same for every file.
    Same,
    None,
}

#[derive(Default)]
struct State {
    way: Way,
    tag: Tag,
    /// The listing tells sizes and hashes, as the hub does when it is asked to.
    details: bool,
    /// Where bodies of files in LFS are, if not here.
    cdn: Option<String>,
    /// Requests that carried a token.
    with_token: Vec<String>,
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// By the end of `METHOD PATH`.
    faults: Vec<(String, Fault)>,
    token: Option<String>,
    requests: Vec<String>,
}

/// A hub with the repository [`REPO`]; files larger than 100 bytes are in LFS.
pub struct Hub {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    /// Serves the files of `folder` and some that no encoder needs.
    pub fn serve(folder: &Folder) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let mut state = State { commit: COMMIT.to_owned(), details: true, ..State::default() };
        read_files(folder.path(), "", &mut state.files);
        for unneeded in ["README.md", "pytorch_model.bin", "onnx/model.onnx"] {
            state.files.insert(unneeded.to_owned(), b"not needed".to_vec());
        }
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let address = endpoint.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, address) = (Arc::clone(&shared), address.clone());
                std::thread::spawn(move || answer(&stream, &state, &address));
            }
        });
        Self { endpoint, state }
    }

    /// A hub that nobody answers for.
    pub fn unreachable() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    }

    /// Every request whose `METHOD PATH` ends so gets `fault`, instead of any fault before.
    pub fn fault(&self, end: &str, fault: Fault) {
        self.state.lock().unwrap().faults = vec![(end.to_owned(), fault)];
    }

    pub fn heal(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    pub fn way(&self, way: Way) {
        self.state.lock().unwrap().way = way;
    }

    /// What files outside LFS have for an ETag, and whether the listing tells more than names.
    pub fn says(&self, tag: Tag, details: bool) {
        let mut state = self.state.lock().unwrap();
        (state.tag, state.details) = (tag, details);
    }

    /// Bodies of files in LFS come from `other`.
    pub fn cdn(&self, other: &Self) {
        self.state.lock().unwrap().cdn = Some(other.endpoint.clone());
    }

    /// The requests so far that carried a token.
    pub fn with_token(&self) -> Vec<String> {
        self.state.lock().unwrap().with_token.clone()
    }

    pub fn require_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.to_owned());
    }

    pub fn set_file(&self, name: &str, content: &[u8]) {
        self.state.lock().unwrap().files.insert(name.to_owned(), content.to_vec());
    }

    pub fn remove_file(&self, name: &str) {
        self.state.lock().unwrap().files.remove(name).unwrap();
    }

    /// A new commit on every branch.
    pub fn commit(&self, commit: &str) {
        self.state.lock().unwrap().commit = commit.to_owned();
    }

    /// `METHOD PATH` of the requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn read_files(folder: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.path().is_dir() {
            read_files(&entry.path(), &format!("{name}/"), files);
        } else {
            files.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Git's id of a file.
fn git_id(content: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", content.len())).chain_update(content).finalize())
}

pub fn is_lfs(content: &[u8]) -> bool {
    content.len() > 100
}

/// The ETag that the hub gives: SHA-256 for files in LFS, git's id for others.
pub fn etag(content: &[u8]) -> String {
    if is_lfs(content) { sha256(content) } else { git_id(content) }
}

/// One request, one answer, end of connection.
fn answer(mut stream: &TcpStream, state: &Mutex<State>, address: &str) {
    let mut lines = BufReader::new(stream.take(64 << 10)).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let authorization = lines
        .take_while(|line| !line.is_empty())
        .find_map(|line| line.to_ascii_lowercase().starts_with("authorization:").then(|| line[14..].trim().to_owned()));
    let mut words = request.split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (reply, fault, way) = {
        let mut state = state.lock().unwrap();
        let line = format!("{method} {path}");
        let fault = state.faults.iter().find(|(end, _)| line.ends_with(end.as_str())).map(|(_, fault)| *fault);
        if authorization.is_some() {
            state.with_token.push(line.clone());
        }
        state.requests.push(line);
        let allowed = state.token.as_ref().is_none_or(|token| authorization == Some(format!("Bearer {token}")));
        let (reply, fault) = match fault {
            Some(Fault::Status(status, code)) => (Reply::new(status).header("X-Error-Code", code), None),
            _ if !allowed => (Reply::new(401).header("X-Error-Message", "token required"), None),
            fault => (route(&state, path, query, address), fault),
        };
        (reply, fault, state.way.clone())
    };
    reply.write(&mut stream, method == "HEAD", fault, &way);
}

fn route(state: &State, path: &str, query: &str, address: &str) -> Reply {
    let moved = |to: &str| Reply::new(307).header("Location", to);
    let path = match &state.way {
        Way::Elsewhere(other) => return Reply::new(308).header("Location", &format!("{other}{path}?{query}")),
        Way::Renamed if path.contains("/org/tiny") => {
            return moved(&format!("{}?{query}", path.replace("/org/tiny", "/neworg/tiny")));
        }
        Way::Renamed => &path.replace("/neworg/", "/org/"),
        _ => path,
    };
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        if !["main", "v1", &state.commit].contains(&revision) {
            return Reply::new(404).header("X-Error-Code", "RevisionNotFound");
        }
        let siblings: Vec<_> = state.files.iter().map(|(name, content)| state.listed(name, content, query)).collect();
        let info = serde_json::json!({"id": REPO, "sha": state.commit, "siblings": siblings});
        return Reply::new(200).body(info.to_string().into_bytes());
    }
    if let Some(file) = path.strip_prefix(&format!("/api/resolve-cache/models/{REPO}/{}/", state.commit)) {
        return match state.files.get(file).filter(|_| query == "etag=1") {
            Some(content) => state.small(content),
            None => Reply::new(400).header("X-Error-Message", "no such file, or the query is lost"),
        };
    }
    if path.starts_with("/api/") {
        return Reply::new(404).header("X-Error-Code", "RepoNotFound");
    }
    if let Some(hash) = path.strip_prefix("/cdn/") {
        return match state.files.values().find(|content| sha256(content) == hash) {
            Some(content) => Reply::new(200).header("ETag", "\"of-the-cdn\"").body(content.clone()),
            None => Reply::new(404),
        };
    }
    let name = path.strip_prefix(&format!("/{REPO}/resolve/{}/", state.commit)).unwrap_or_default();
    let here = matches!(state.way, Way::ResolveCacheAbsolute).then_some(address).unwrap_or_default();
    match state.files.get(name) {
        None => Reply::new(404).header("X-Error-Code", "EntryNotFound"),
        Some(content) if is_lfs(content) => Reply::new(302)
            .header("Location", &format!("{}/cdn/{}", state.cdn.as_deref().unwrap_or(address), sha256(content)))
            .header("X-Repo-Commit", &state.commit)
            .header("X-Linked-Etag", &format!("\"{}\"", etag(content)))
            .header("X-Linked-Size", &content.len().to_string()),
        Some(_) if matches!(state.way, Way::ResolveCache | Way::ResolveCacheAbsolute) => {
            moved(&format!("{here}/api/resolve-cache/models/{REPO}/{}/{name}?etag=1", state.commit))
        }
        Some(content) => state.small(content),
    }
}

impl State {
    /// A file's entry in the listing.
    fn listed(&self, name: &str, content: &[u8], query: &str) -> serde_json::Value {
        let mut entry = serde_json::json!({"rfilename": name});
        if self.details && query == "blobs=true" {
            entry["size"] = content.len().into();
            // In git, a file in LFS is its pointer.
            entry["blobId"] = git_id(if is_lfs(content) { b"a pointer" } else { content }).into();
            if is_lfs(content) {
                entry["lfs"] = serde_json::json!({"sha256": sha256(content), "size": content.len(), "pointerSize": 9});
            }
        }
        entry
    }

    /// The answer for a file that is not in LFS.
    fn small(&self, content: &[u8]) -> Reply {
        let tag = match self.tag {
            Tag::Git => etag(content),
            Tag::Sha1 => hex(&Sha1::digest(content)),
            Tag::Same => "5f3b-1a2".to_owned(),
            Tag::None => String::new(),
        };
        let mut reply = Reply::new(200).body(content.to_vec());
        if self.way != Way::WithoutCommit {
            reply = reply.header("X-Repo-Commit", &self.commit);
        }
        if tag.is_empty() { reply } else { reply.header("ETag", &format!("\"{tag}\"")) }
    }
}

struct Reply {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: u16) -> Self {
        Self { status, headers: String::new(), body: Vec::new() }
    }

    fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    fn body(mut self, body: Vec<u8>) -> Self {
        self.body = body;
        self
    }

    fn write(mut self, stream: &mut impl Write, head: bool, fault: Option<Fault>, way: &Way) {
        let mut length = self.body.len();
        match fault {
            Some(Fault::OtherBytes) if !head => self.body.iter_mut().for_each(|byte| *byte ^= 1),
            Some(Fault::BrokenOff) if !head => self.body.truncate(length / 2),
            Some(Fault::Short) if !head => {
                self.body.truncate(length / 2);
                length = self.body.len();
            }
            _ => {}
        }
        let Self { status, headers, body } = self;
        let told = match way {
            Way::HeadWithoutLength if head => String::new(),
            Way::UntilClosed => String::new(),
            Way::Chunked => "Transfer-Encoding: chunked\r\n".to_owned(),
            Way::Compressed if !headers.is_empty() => format!("Content-Length: {length}\r\nContent-Encoding: gzip\r\n"),
            _ => format!("Content-Length: {length}\r\n"),
        };
        let start = format!("HTTP/1.1 {status} x\r\nConnection: close\r\n{told}{headers}\r\n");
        // A client that has gone is its own affair.
        let _ = stream.write_all(start.as_bytes());
        if head {
            return;
        }
        if *way != Way::Chunked {
            let _ = stream.write_all(&body);
            return;
        }
        for piece in body.chunks(64) {
            let _ = stream.write_all(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
        }
        if fault != Some(Fault::BrokenOff) {
            let _ = stream.write_all(b"0\r\n\r\n");
        }
    }
}
