//! Models by hub id, against a hub on loopback: what is downloaded, what the cache serves, and every way to fail.
#![cfg(feature = "hub")]

mod arguments;
mod files;
#[path = "../loopback_hub/mod.rs"]
mod loopback_hub;
mod mirrors;
#[path = "../tiny_model/mod.rs"]
mod tiny_model;

use loopback_hub::{COMMIT, Fault, Hub, REPO, etag};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tiny_model::{Folder, HIDDEN, module, weights};
use trt_embed::model::hub::{HubOptions, fetch_with};
use trt_embed::model::{HubId, ModelFolder};
use trt_embed::{Error, Progress};

const MODEL: &str = "model.safetensors";

fn options(endpoint: &str, cache: &TempDir) -> HubOptions {
    let mut options = HubOptions::from_env();
    options.endpoint = endpoint.to_owned();
    options.cache = cache.path().join("hub");
    options.offline = false;
    options
}

fn offline(cache: &TempDir) -> HubOptions {
    let mut options = options(&Hub::unreachable(), cache);
    options.offline = true;
    options
}

fn id(text: &str) -> HubId {
    HubId::parse(text).unwrap()
}

fn fetch(options: &HubOptions, model: &str) -> Result<PathBuf, Error> {
    fetch_with(options, &id(model), None)
}

fn fault(options: &HubOptions, model: &str) -> String {
    fetch(options, model).expect_err("this model must not be had").to_string()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

/// A folder like a published one, its weights large enough to be in LFS.
fn model_folder() -> Folder {
    let folder = Folder::sentence_transformers();
    folder.write(MODEL, &weights(&[("a", &[64], &[0.5; 64])]));
    folder.json("config_sentence_transformers.json", &json!({"prompts": {"query": "q: "}}));
    folder
}

fn repo_folder(cache: &TempDir) -> PathBuf {
    cache.path().join("hub/models--org--tiny")
}

/// The names in `folder`, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn cache() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Keeps what it hears.
#[derive(Default)]
struct Heard(Mutex<Vec<(String, u64, u64)>>);

impl Progress for Heard {
    fn download(&self, file: &str, done: u64, total: u64) {
        self.0.lock().unwrap().push((file.to_owned(), done, total));
    }
}

/// Stops once some bytes of the weights have arrived.
#[derive(Default)]
struct Impatient(Mutex<u64>);

impl Progress for Impatient {
    fn download(&self, file: &str, done: u64, _: u64) {
        if file == MODEL {
            *self.0.lock().unwrap() = done;
        }
    }
    fn cancelled(&self) -> bool {
        *self.0.lock().unwrap() > 0
    }
}

#[test]
fn a_download_can_be_stopped_and_goes_on_later() {
    let (folder, cache) = (model_folder(), cache());
    folder.write(MODEL, &weights(&[("a", &[1 << 16], &[0.5; 1 << 16])]));
    let hub = Hub::serve(&folder);
    let options = options(&hub.endpoint, &cache);
    let impatient = Arc::new(Impatient::default());
    let progress: Arc<dyn Progress> = impatient.clone();
    let error = fetch_with(&options, &id(REPO), Some(&progress)).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    let size = std::fs::metadata(folder.join(MODEL)).unwrap().len();
    assert!(*impatient.0.lock().unwrap() < size, "all {size} bytes had come");
    let left = names(&repo_folder(&cache).join("blobs"));
    assert!(left.iter().all(|name| !name.contains("incomplete") && !name.starts_with('.')), "{left:?}");
    fetch_with(&options, &id(REPO), None).unwrap();
}

#[test]
fn first_run_downloads_what_is_needed_and_the_second_nothing() {
    let (folder, cache) = (model_folder(), cache());
    let hub = Hub::serve(&folder);
    let options = options(&hub.endpoint, &cache);
    let heard = Arc::new(Heard::default());
    let progress: Arc<dyn Progress> = heard.clone();

    let snapshot = fetch_with(&options, &id(REPO), Some(&progress)).unwrap();
    assert_eq!(snapshot, repo_folder(&cache).join("snapshots").join(COMMIT));
    let model = ModelFolder::open(&snapshot).unwrap();
    assert!(model.normalize && model.prompts.by_name.contains_key("query"));
    assert_eq!(&*model.weights().unwrap().tensor("a", &[64]).unwrap().to_f32(), [0.5; 64]);

    // The layout that Python's huggingface_hub reads.
    assert_eq!(std::fs::read_to_string(repo_folder(&cache).join("refs/main")).unwrap(), COMMIT);
    let content = std::fs::read(folder.join(MODEL)).unwrap();
    assert_eq!(std::fs::read(repo_folder(&cache).join("blobs").join(etag(&content))).unwrap(), content);
    #[cfg(unix)]
    {
        let pooling = std::fs::read(folder.join("1_Pooling/config.json")).unwrap();
        let target = |file: &str| std::fs::read_link(snapshot.join(file)).unwrap();
        assert_eq!(target(MODEL), Path::new("../../blobs").join(etag(&content)));
        assert_eq!(target("1_Pooling/config.json"), Path::new("../../../blobs").join(etag(&pooling)));
    }
    assert!(repo_folder(&cache).join(".no_exist").join(COMMIT).join("vocab.txt").is_file());
    assert_eq!(names(&repo_folder(&cache)), [".no_exist", "blobs", "refs", "snapshots"], "nothing is left over");

    let requests = hub.requests();
    for unneeded in ["README.md", "pytorch_model.bin", "onnx"] {
        assert!(!requests.iter().any(|request| request.contains(unneeded)), "{unneeded} in {requests:?}");
    }
    let heard = heard.0.lock().unwrap();
    let of_model: Vec<_> = heard.iter().filter(|(file, ..)| file == MODEL).collect();
    assert!(of_model.is_sorted_by(|a, b| a.1 < b.1), "{of_model:?}");
    assert_eq!(of_model.last().map(|(_, done, total)| (*done, *total)), Some((content.len() as u64, content.len() as u64)));

    assert_eq!(fetch(&options, REPO).unwrap(), snapshot);
    assert_eq!(hub.requests(), [format!("GET /api/models/{REPO}/revision/main")]);
}

#[test]
fn a_commit_that_is_cached_asks_nothing() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    let pinned = format!("{REPO}@{COMMIT}");
    let snapshot = fetch(&options, &pinned).unwrap();
    assert!(!repo_folder(&cache).join("refs").exists(), "a commit needs no reference");
    assert!(!hub.requests().is_empty());
    assert_eq!(fetch(&options, &pinned).unwrap(), snapshot);
    assert_eq!(hub.requests(), [""; 0]);

    // With a file missing, or one of which the cache knows nothing, the hub is asked again.
    for lost in ["snapshots", ".no_exist"] {
        let file = if lost == "snapshots" { "tokenizer.json" } else { "vocab.txt" };
        std::fs::remove_file(repo_folder(&cache).join(lost).join(COMMIT).join(file)).unwrap();
        assert_eq!(fetch(&options, &pinned).unwrap(), snapshot);
        assert!(!hub.requests().is_empty());
        assert!(repo_folder(&cache).join(lost).join(COMMIT).join(file).is_file());
    }
}

#[test]
fn branches_and_tags_have_their_own_reference() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    fetch(&options(&hub.endpoint, &cache), &format!("{REPO}@v1")).unwrap();
    assert_eq!(names(&repo_folder(&cache).join("refs")), ["v1"]);
    assert!(fetch(&offline(&cache), &format!("{REPO}@v1")).is_ok());
    assert_says(&fault(&offline(&cache), REPO), &["org/tiny@main", "not in the cache", "HF_HUB_OFFLINE"]);
}

#[test]
fn a_new_commit_downloads_only_what_changed() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    fetch(&options, REPO).unwrap();
    hub.requests();

    let next = "f".repeat(40);
    hub.commit(&next);
    hub.set_file("sentence_bert_config.json", br#"{"max_seq_length": 7}"#);
    let snapshot = fetch(&options, REPO).unwrap();
    assert_eq!(ModelFolder::open(&snapshot).unwrap().max_seq_length, Some(7));
    assert_eq!(std::fs::read_to_string(repo_folder(&cache).join("refs/main")).unwrap(), next);
    let bodies: Vec<_> =
        hub.requests().into_iter().filter(|request| request.starts_with("GET") && !request.contains("/api/")).collect();
    assert_eq!(bodies, [format!("GET /{REPO}/resolve/{next}/sentence_bert_config.json")]);
}

#[test]
fn shards_dense_modules_and_an_encoder_in_its_own_folder() {
    let cache = cache();
    let folder = Folder::empty();
    folder.json(
        "modules.json",
        &json!([
            module("sentence_transformers.models.Transformer", "0_Transformer"),
            module("sentence_transformers.models.Pooling", "1_Pooling"),
            module("sentence_transformers.models.Dense", "2_Dense"),
        ]),
    );
    folder.json("0_Transformer/config.json", &tiny_model::mpnet());
    folder.write("0_Transformer/tokenizer.json", b"{}");
    folder.json(
        "0_Transformer/model.safetensors.index.json",
        &json!({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}),
    );
    folder.write("0_Transformer/m-1.safetensors", &weights(&[("a", &[64], &[1.0; 64])]));
    folder.write("0_Transformer/m-2.safetensors", &weights(&[("b", &[64], &[2.0; 64])]));
    folder.json("1_Pooling/config.json", &tiny_model::pooling(&["mean_tokens"]));
    folder.dense("2_Dense", HIDDEN, 3, "torch.nn.modules.activation.Tanh");
    let hub = Hub::serve(&folder);
    let model = ModelFolder::open(fetch(&options(&hub.endpoint, &cache), REPO).unwrap()).unwrap();
    assert_eq!(model.embedding_size(), 3);
    assert_eq!(&*model.weights().unwrap().tensor("b", &[64]).unwrap().to_f32(), [2.0; 64]);
    assert!(fetch(&offline(&cache), REPO).is_ok());
    std::fs::remove_file(model.encoder.join("m-2.safetensors")).unwrap();
    assert_says(&fault(&offline(&cache), REPO), &["not wholly in the cache", "m-2.safetensors"]);
}

#[test]
fn runs_at_the_same_time_download_once() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| fetch(&options, REPO).unwrap())).collect();
        for run in runs {
            assert!(ModelFolder::open(run.join().unwrap()).unwrap().weights().is_ok());
        }
    });
    let mut bodies = hub.requests();
    bodies.retain(|request| request.starts_with("GET /cdn/"));
    bodies.sort();
    assert!(!bodies.is_empty() && bodies.is_sorted_by(|a, b| a < b), "each body once: {bodies:#?}");
}

#[test]
fn the_token_is_sent() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    hub.require_token("hf_secret");
    let mut options = options(&hub.endpoint, &cache);
    options.token = Some("hf_other".to_owned());
    let message = fault(&options, REPO);
    assert_says(&message, &["org/tiny@main", "401", "token required", "HF_TOKEN"]);
    assert!(!message.contains("hf_other"), "a token is never shown: {message}");
    options.token = Some("hf_secret".to_owned());
    assert!(fetch(&options, REPO).is_ok());
}

#[test]
fn refusals_are_told_apart() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    assert_says(&fault(&options, "org/other"), &["org/other@main", "404", "no such repository", "spelling"]);
    assert_says(&fault(&options, "org/tiny@v9"), &["org/tiny@v9", "404", "no such revision"]);
    for (end, status, code, parts) in [
        ("revision/main", 403, "GatedRepo", &["403", "licence", "HF_TOKEN"][..]),
        ("revision/main", 429, "", &["429", "too many requests"]),
        ("revision/main", 418, "", &["418", "run again later"]),
        ("config.json", 404, "EntryNotFound", &["404 for", "config.json"]),
        ("tokenizer.json", 401, "", &["401", "HF_TOKEN"]),
        ("tokenizer.json", 403, "", &["403", "licence"]),
    ] {
        hub.fault(end, Fault::Status(status, code));
        assert_says(&fault(&options, REPO), &[parts, &[hub.endpoint.as_str()]].concat());
    }
    hub.heal();
    assert!(fetch(&options, REPO).is_ok());
}

#[test]
fn an_answer_that_is_no_hubs_is_told() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    hub.commit("not-a-commit");
    assert_says(&fault(&options(&hub.endpoint, &cache), REPO), &["names no commit", "HF_ENDPOINT"]);
    assert_says(&fault(&options("not an address", &cache), REPO), &["HF_ENDPOINT", "not an address"]);
    assert!(!cache.path().join("hub").exists(), "nothing is written before the hub has answered");
}

/// A body that is not what the hub announced never gets a name in the cache, and the next run is not harmed by it.
#[test]
fn damaged_bodies_stay_out_of_the_cache() {
    let folder = model_folder();
    let content = std::fs::read(folder.join(MODEL)).unwrap();
    let size = content.len().to_string();
    for (fault_of_body, end, parts) in [
        (Fault::OtherBytes, "cdn", &["model.safetensors has SHA-256", "the hub says", "run again"][..]),
        (Fault::Short, "cdn", &["model.safetensors has", &size, "run again"]),
        (Fault::BrokenOff, "cdn", &["broke off"]),
        (Fault::Status(404, ""), "cdn", &["says 404 for model.safetensors"]),
        (Fault::Short, "tokenizer.json", &["tokenizer.json has 1 bytes, the hub says 2"]),
        (
            Fault::OtherBytes,
            "tokenizer.json",
            &["tokenizer.json has git's id", "the hub says 9e26dfeeb6e641a33dae4961196235bdb965b21b"],
        ),
        (Fault::BrokenOff, "tokenizer.json", &["broke off"]),
    ] {
        let cache = cache();
        let hub = Hub::serve(&folder);
        let options = options(&hub.endpoint, &cache);
        let (end, name) = match end {
            "cdn" => (format!("GET /cdn/{}", etag(&content)), MODEL),
            file => (format!("{COMMIT}/{file}"), file),
        };
        hub.fault(&end, fault_of_body);
        assert_says(&fault(&options, REPO), parts);
        let damaged = std::fs::read(folder.join(name)).unwrap();
        assert!(!repo_folder(&cache).join("blobs").join(etag(&damaged)).exists());
        assert!(repo_folder(&cache).join("snapshots").join(COMMIT).join(name).symlink_metadata().is_err());
        let left = [names(&repo_folder(&cache)), names(&repo_folder(&cache).join("blobs"))].concat();
        assert!(!left.iter().any(|name| name.starts_with(".trt")), "nothing unfinished stays: {left:?}");
        assert!(!repo_folder(&cache).join("refs").exists(), "main means nothing yet");
        hub.heal();
        assert!(ModelFolder::open(fetch(&options, REPO).unwrap()).unwrap().weights().is_ok());
    }
}

#[test]
fn a_killed_runs_leftovers_are_removed_and_a_running_ones_are_not() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let blobs = repo_folder(&cache).join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(repo_folder(&cache).join(".trt-embed-killed/blobs")).unwrap();
    std::fs::write(blobs.join(".trt-embed-killed"), b"half a file").unwrap();
    let running = std::fs::File::create(blobs.join(".trt-embed-running")).unwrap();
    running.lock().unwrap();
    fetch(&options(&hub.endpoint, &cache), REPO).unwrap();
    assert_eq!(names(&repo_folder(&cache)), [".no_exist", "blobs", "refs", "snapshots"]);
    let left: Vec<_> = names(&blobs).into_iter().filter(|name| name.starts_with('.')).collect();
    assert_eq!(left, [".trt-embed-running"]);
}

#[test]
fn offline_serves_the_cache_alone() {
    let cache = cache();
    assert_says(&fault(&offline(&cache), REPO), &["not in the cache", "HF_HUB_OFFLINE is set", "HF_HUB_CACHE"]);
    let hub = Hub::serve(&model_folder());
    let snapshot = fetch(&options(&hub.endpoint, &cache), REPO).unwrap();
    hub.requests();
    let mut offline = offline(&cache);
    offline.endpoint = hub.endpoint.clone();
    assert_eq!(fetch(&offline, REPO).unwrap(), snapshot);
    assert_eq!(fetch(&offline, &format!("{REPO}@{COMMIT}")).unwrap(), snapshot);
    assert_eq!(hub.requests(), [""; 0]);
    for lost in ["1_Pooling/config.json", "tokenizer.json", MODEL] {
        let kept = std::fs::read(snapshot.join(lost)).unwrap();
        std::fs::remove_file(snapshot.join(lost)).unwrap();
        assert_says(&fault(&offline, REPO), &["not wholly in the cache", lost]);
        std::fs::write(snapshot.join(lost), kept).unwrap();
    }
}

#[test]
fn an_unreachable_hub_leaves_the_cache() {
    let cache = cache();
    let nobody = Hub::unreachable();
    assert_says(
        &fault(&options(&nobody, &cache), REPO),
        &["org/tiny@main", &nobody, "cannot be reached", "refused", "HF_ENDPOINT"],
    );
    let hub = Hub::serve(&model_folder());
    let snapshot = fetch(&options(&hub.endpoint, &cache), REPO).unwrap();
    assert_eq!(fetch(&options(&nobody, &cache), REPO).unwrap(), snapshot);
    hub.fault("revision/main", Fault::Status(503, ""));
    assert_eq!(fetch(&options(&hub.endpoint, &cache), REPO).unwrap(), snapshot);
    // A refusal is no outage: the cache does not hide it.
    hub.fault("revision/main", Fault::Status(401, ""));
    assert_says(&fault(&options(&hub.endpoint, &cache), REPO), &["401"]);
    assert_says(&fault(&options(&nobody, &cache), "org/tiny@v1"), &["cannot be reached"]);
}

/// What `huggingface_hub.snapshot_download` leaves: links from snapshots to blobs, `refs/main` without a line end.
#[cfg(unix)]
#[test]
fn a_cache_written_by_python_is_found() {
    let (folder, cache) = (model_folder(), cache());
    let repo = repo_folder(&cache);
    let files = ["modules.json", "config.json", "tokenizer.json", MODEL, "1_Pooling/config.json", "sentence_bert_config.json"];
    std::fs::create_dir_all(repo.join("blobs")).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for file in files {
        let content = std::fs::read(folder.join(file)).unwrap();
        std::fs::write(repo.join("blobs").join(etag(&content)), &content).unwrap();
        let pointer = repo.join("snapshots").join(COMMIT).join(file);
        std::fs::create_dir_all(pointer.parent().unwrap()).unwrap();
        let up = if file.contains('/') { "../../../blobs" } else { "../../blobs" };
        std::os::unix::fs::symlink(Path::new(up).join(etag(&content)), pointer).unwrap();
    }
    let snapshot = fetch(&offline(&cache), REPO).unwrap();
    assert!(ModelFolder::open(&snapshot).unwrap().weights().is_ok());
    // Online the missing settings are added; what is there is not downloaded again.
    let hub = Hub::serve(&folder);
    assert_eq!(fetch(&options(&hub.endpoint, &cache), REPO).unwrap(), snapshot);
    let requests = hub.requests();
    assert!(requests.iter().any(|request| request.ends_with("/config_sentence_transformers.json")));
    assert!(!requests.iter().any(|request| request.contains(MODEL) || request.contains("/cdn/")), "{requests:?}");
    assert_eq!(ModelFolder::open(snapshot).unwrap().prompts.by_name["query"], "q: ");
}

#[test]
fn repositories_that_hold_no_such_model() {
    for (lost, parts) in [
        ("config.json", &["the repository has no config.json"][..]),
        ("tokenizer.json", &["the repository has no tokenizer.json", "save_pretrained"]),
        (MODEL, &["the repository has no model.safetensors", "safe_serialization=True"]),
        ("1_Pooling/config.json", &["the repository has no 1_Pooling/config.json"]),
    ] {
        let cache = cache();
        let hub = Hub::serve(&model_folder());
        hub.remove_file(lost);
        assert_says(&fault(&options(&hub.endpoint, &cache), REPO), parts);
    }
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    hub.set_file("modules.json", br#"[{"type": "sentence_transformers.models.Transformer", "path": "../../../outside"}]"#);
    assert_says(&fault(&options(&hub.endpoint, &cache), REPO), &["../../../outside", "inside the model's"]);
}

#[test]
fn a_cache_that_cannot_be_written() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    std::fs::write(cache.path().join("hub"), b"a file where the cache should be").unwrap();
    assert_says(&fault(&options(&hub.endpoint, &cache), REPO), &["cannot create", "hub/models--org--tiny"]);
}
