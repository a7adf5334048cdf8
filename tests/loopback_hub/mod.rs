//! A hub on loopback: the routes that a download uses, with faults on demand.
//!
//! Routes and headers: <https://huggingface.co/docs/hub/api> and what `resolve` answers (`X-Repo-Commit`, `X-Linked-Etag`,
//! `X-Linked-Size`, a redirect for files in LFS). Written on a plain socket, because broken answers are the point.

use crate::tiny_model::Folder;
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

#[derive(Default)]
struct State {
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
        let mut state = State { commit: COMMIT.to_owned(), ..State::default() };
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
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn is_lfs(content: &[u8]) -> bool {
    content.len() > 100
}

/// The ETag: SHA-256 for files in LFS, a git id of 40 digits for others.
pub fn etag(content: &[u8]) -> String {
    let hash = sha256(content);
    if is_lfs(content) { hash } else { hash[..40].to_owned() }
}

/// One request, one answer, end of connection.
fn answer(mut stream: &TcpStream, state: &Mutex<State>, address: &str) {
    let mut lines = BufReader::new(stream.take(64 << 10)).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let authorization = lines
        .take_while(|line| !line.is_empty())
        .find_map(|line| line.to_ascii_lowercase().starts_with("authorization:").then(|| line[14..].trim().to_owned()));
    let mut words = request.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return };
    let (reply, fault) = {
        let mut state = state.lock().unwrap();
        let line = format!("{method} {path}");
        let fault = state.faults.iter().find(|(end, _)| line.ends_with(end.as_str())).map(|(_, fault)| *fault);
        state.requests.push(line);
        let allowed = state.token.as_ref().is_none_or(|token| authorization == Some(format!("Bearer {token}")));
        match fault {
            Some(Fault::Status(status, code)) => (Reply::new(status).header("X-Error-Code", code), None),
            _ if !allowed => (Reply::new(401).header("X-Error-Message", "token required"), None),
            fault => (route(&state, path, address), fault),
        }
    };
    reply.write(&mut stream, method == "HEAD", fault);
}

fn route(state: &State, path: &str, address: &str) -> Reply {
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        if !["main", "v1", &state.commit].contains(&revision) {
            return Reply::new(404).header("X-Error-Code", "RevisionNotFound");
        }
        let siblings: Vec<_> = state.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"id": REPO, "sha": state.commit, "siblings": siblings});
        return Reply::new(200).body(info.to_string().into_bytes());
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
    let file = path.strip_prefix(&format!("/{REPO}/resolve/{}/", state.commit)).and_then(|name| state.files.get(name));
    match file {
        None => Reply::new(404).header("X-Error-Code", "EntryNotFound"),
        Some(content) if is_lfs(content) => Reply::new(302)
            .header("Location", &format!("{address}/cdn/{}", sha256(content)))
            .header("X-Repo-Commit", &state.commit)
            .header("X-Linked-Etag", &format!("\"{}\"", etag(content)))
            .header("X-Linked-Size", &content.len().to_string()),
        Some(content) => Reply::new(200)
            .header("X-Repo-Commit", &state.commit)
            .header("ETag", &format!("\"{}\"", etag(content)))
            .body(content.clone()),
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

    fn write(mut self, stream: &mut impl Write, head: bool, fault: Option<Fault>) {
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
        let start = format!("HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
        // A client that has gone is its own affair.
        let _ = stream.write_all(start.as_bytes());
        if !head {
            let _ = stream.write_all(&body);
        }
    }
}
