//! Model arguments that are neither a model folder nor a hub id, though clear enough to say what to give instead.

use crate::model::HubId;
use std::fs;
use std::path::{Path, PathBuf};

/// Hosts of the public hub and its best-known mirror.
const HUB_HOSTS: [&str; 4] = ["huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com"];

/// How the folder of a model in the hub's cache begins.
const CACHED_MODEL: &str = "models--";

/// The most models of a cache that a message lists.
const MAX_LISTED: usize = 5;

/// The organisation of a name without one, as sentence-transformers has it.
const ORGANISATION: &str = "sentence-transformers";

/// Names without an organisation that sentence-transformers does not take for its own (its `ORIGINAL_TRANSFORMER_MODELS`): the
/// hub's first models, which have got organisations since.
const FIRST_MODELS: [&str; 68] = [
    "albert-base-v1",
    "albert-base-v2",
    "albert-large-v1",
    "albert-large-v2",
    "albert-xlarge-v1",
    "albert-xlarge-v2",
    "albert-xxlarge-v1",
    "albert-xxlarge-v2",
    "bert-base-cased-finetuned-mrpc",
    "bert-base-cased",
    "bert-base-chinese",
    "bert-base-german-cased",
    "bert-base-german-dbmdz-cased",
    "bert-base-german-dbmdz-uncased",
    "bert-base-multilingual-cased",
    "bert-base-multilingual-uncased",
    "bert-base-uncased",
    "bert-large-cased-whole-word-masking-finetuned-squad",
    "bert-large-cased-whole-word-masking",
    "bert-large-cased",
    "bert-large-uncased-whole-word-masking-finetuned-squad",
    "bert-large-uncased-whole-word-masking",
    "bert-large-uncased",
    "camembert-base",
    "ctrl",
    "distilbert-base-cased-distilled-squad",
    "distilbert-base-cased",
    "distilbert-base-german-cased",
    "distilbert-base-multilingual-cased",
    "distilbert-base-uncased-distilled-squad",
    "distilbert-base-uncased-finetuned-sst-2-english",
    "distilbert-base-uncased",
    "distilgpt2",
    "distilroberta-base",
    "gpt2-large",
    "gpt2-medium",
    "gpt2-xl",
    "gpt2",
    "openai-gpt",
    "roberta-base-openai-detector",
    "roberta-base",
    "roberta-large-mnli",
    "roberta-large-openai-detector",
    "roberta-large",
    "t5-11b",
    "t5-3b",
    "t5-base",
    "t5-large",
    "t5-small",
    "transfo-xl-wt103",
    "xlm-clm-ende-1024",
    "xlm-clm-enfr-1024",
    "xlm-mlm-100-1280",
    "xlm-mlm-17-1280",
    "xlm-mlm-en-2048",
    "xlm-mlm-ende-1024",
    "xlm-mlm-enfr-1024",
    "xlm-mlm-enro-1024",
    "xlm-mlm-tlm-xnli15-1024",
    "xlm-mlm-xnli15-1024",
    "xlm-roberta-base",
    "xlm-roberta-large-finetuned-conll02-dutch",
    "xlm-roberta-large-finetuned-conll02-spanish",
    "xlm-roberta-large-finetuned-conll03-english",
    "xlm-roberta-large-finetuned-conll03-german",
    "xlm-roberta-large",
    "xlnet-base-cased",
    "xlnet-large-cased",
];

/// Ends of names that are files, not models.
const FILE_ENDS: [&str; 6] = [".onnx", ".engine", ".safetensors", ".json", ".bin", ".gguf"];

/// A name without organisation, e.g. `all-MiniLM-L6-v2`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ShortName {
    /// A model of sentence-transformers.
    Ours(HubId),
    /// One of the hub's first models; what to give instead.
    First(String),
}

/// What sentence-transformers takes `name` for, if it is a name without organisation.
pub(super) fn short_name(name: &str) -> Option<ShortName> {
    if name.contains('/') || FILE_ENDS.iter().any(|end| name.ends_with(end)) {
        return None;
    }
    let id = HubId::parse(&format!("{ORGANISATION}/{name}"))?;
    if !FIRST_MODELS.contains(&id.name.to_ascii_lowercase().as_str()) {
        return Some(ShortName::Ours(id));
    }
    let of_google = id.name.starts_with("bert-") && !id.name.contains("dbmdz");
    let example = format!("{}/{name}", if of_google { "google-bert" } else { "ORGANISATION" });
    Some(ShortName::First(format!("a hub id has an organisation: give {example}")))
}

/// What to give instead of an address of the hub; `None` when `text` is no address. `endpoint` is the hub's own.
pub(super) fn address(text: &str, endpoint: Option<&str>) -> Option<String> {
    let below = |endpoint: &str| text.strip_prefix(endpoint.trim_end_matches('/'))?.strip_prefix('/');
    let path = match text.split_once("://") {
        Some(("hf", path)) => Some(path),
        Some((_, rest)) => {
            let known = rest.split_once('/').filter(|(host, _)| HUB_HOSTS.contains(host)).map(|(_, path)| path);
            known.or_else(|| endpoint.and_then(below))
        }
        None => {
            let (host, path) = text.split_once('/')?;
            Some(HUB_HOSTS.contains(&host).then_some(path)?)
        }
    };
    Some(match path.map(id_of_path) {
        Some(Ok(id)) => format!("that is an address: give the hub id {id}"),
        Some(Err(kind)) => format!("that is the address of {kind}: give the hub id of a model, org/name[@revision]"),
        None => "that is an address, but not of the hub (HF_ENDPOINT): give a hub id org/name[@revision], \
                 or download the model and give its folder"
            .to_owned(),
    })
}

/// The id of a model by the path of its page, file or API; else what the path is.
fn id_of_path(path: &str) -> Result<String, &'static str> {
    let path = path.split(['?', '#']).next().unwrap_or_default().replace("%2F", "/").replace("%2f", "/");
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    parts.next_if_eq(&"api");
    parts.next_if_eq(&"models");
    let (org, name) = match (parts.next(), parts.next()) {
        (Some("datasets"), _) => return Err("a dataset"),
        (Some("spaces"), _) => return Err("a space"),
        (Some(org), Some(name)) => (org, name),
        _ => return Err("no model"),
    };
    let (name, mut revision) = match name.split_once('@') {
        Some((name, revision)) => (name, revision.to_owned()),
        None => (name.strip_suffix(".git").unwrap_or(name), String::new()),
    };
    let page = parts.next();
    if matches!(page, Some("tree" | "blob" | "raw" | "resolve" | "commit" | "commits" | "revision")) {
        // References such as refs/pr/3 hold slashes.
        let words = if parts.peek() == Some(&"refs") { 3 } else { 1 };
        revision = parts.take(words).collect::<Vec<_>>().join("/");
    }
    let id = if revision.is_empty() || revision == "main" { format!("{org}/{name}") } else { format!("{org}/{name}@{revision}") };
    if HubId::parse(&id).is_some() { Ok(id) } else { Err("no model") }
}

/// What to give instead of a folder of the hub's cache that holds no model itself; `None` for any other folder.
pub(super) fn cache_folder(path: &Path) -> Option<String> {
    if ["config.json", "modules.json", "adapter_config.json"].iter().any(|file| path.join(file).exists()) {
        return None;
    }
    // A path such as `.` has no name of its own.
    let full = path.canonicalize().ok()?;
    let parent = full.parent().unwrap_or(&full);
    if let Some(id) = cached_id(&full) {
        return Some(format!("that is the hub cache's folder of {id}, which keeps models by commit: {}", instead(&full, &id)));
    }
    if let Some(id) = cached_id(parent).filter(|_| ["snapshots", "blobs", "refs"].iter().any(|name| full.ends_with(name))) {
        return Some(format!(
            "that lies in the hub cache's folder of {id}, which keeps models by commit: {}",
            instead(parent, &id)
        ));
    }
    let mut ids: Vec<_> = fs::read_dir(&full).ok()?.flatten().filter_map(|entry| cached_id(&entry.path())).collect();
    ids.sort();
    let more = if ids.len() > MAX_LISTED { ", …" } else { "" };
    ids.truncate(MAX_LISTED);
    (!ids.is_empty()).then(|| format!("that is the hub's cache: give the id of a model in it ({}{more})", ids.join(", ")))
}

/// `org/name`, where `folder` is that of a model in the hub's cache.
fn cached_id(folder: &Path) -> Option<String> {
    let name = folder.file_name()?.to_str()?.strip_prefix(CACHED_MODEL)?;
    let (org, name) = name.split_once("--")?;
    let id = format!("{org}/{name}");
    (HubId::parse(&id).is_some() && (folder.join("snapshots").is_dir() || folder.join("blobs").is_dir())).then_some(id)
}

/// What to give instead of `folder`, that of model `id` in the cache.
fn instead(folder: &Path, id: &str) -> String {
    let snapshots = folder.join("snapshots");
    let main = fs::read_to_string(folder.join("refs/main")).ok().map(|commit| snapshots.join(commit.trim()));
    if let Some(snapshot) = main.filter(|snapshot| snapshot.is_dir() && *snapshot != snapshots) {
        return format!("give the id {id}, or {}", snapshot.display());
    }
    let found: Vec<PathBuf> = fs::read_dir(&snapshots).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    match found.as_slice() {
        [] => format!("give the id {id}, which is downloaded"),
        [snapshot] => format!("give the id {id}, or {}", snapshot.display()),
        _ => format!("give the id {id}, or one of the folders in {}", snapshots.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_the_id_to_give() {
        for (text, id) in [
            ("https://huggingface.co/org/name", "org/name"),
            ("https://huggingface.co/org/name/", "org/name"),
            ("http://hf.co/org/name/tree/main", "org/name"),
            ("hf.co/org/name/tree/v1", "org/name@v1"),
            ("huggingface.co/org/name", "org/name"),
            ("https://huggingface.co/org/name.git", "org/name"),
            ("https://huggingface.co/org/name/blob/main/model.safetensors?download=true", "org/name"),
            ("https://huggingface.co/org/name/resolve/refs%2Fpr%2F3/config.json", "org/name@refs/pr/3"),
            ("https://huggingface.co/org/name/tree/refs/pr/3", "org/name@refs/pr/3"),
            ("https://huggingface.co/api/models/org/name/revision/v2", "org/name@v2"),
            ("hf://org/name@v1", "org/name@v1"),
            ("hf://models/org/name", "org/name"),
            ("https://mirror.test:8080/hf/org/name/tree/v1", "org/name@v1"),
        ] {
            let next = address(text, Some("https://mirror.test:8080/hf/"));
            assert_eq!(next.as_deref(), Some(format!("that is an address: give the hub id {id}").as_str()), "{text}");
        }
        for (text, part) in [
            ("https://huggingface.co/datasets/org/name", "address of a dataset"),
            ("https://huggingface.co/spaces/org/name", "address of a space"),
            ("https://huggingface.co/", "address of no model"),
            ("https://huggingface.co/org/..", "address of no model"),
            ("https://example.test/model.zip", "not of the hub"),
            ("s3://bucket/model", "not of the hub"),
        ] {
            let next = address(text, None).unwrap_or_default();
            assert!(next.contains(part), "{text}: {next}");
        }
        for no in ["org/name", "models/huggingface.co", "./huggingface.co/org/name", "name"] {
            assert_eq!(address(no, Some("https://huggingface.co")), None, "{no}");
        }
    }

    #[test]
    fn short_names_are_those_of_sentence_transformers() {
        let ours = |name: &str| match short_name(name) {
            Some(ShortName::Ours(id)) => id.to_string(),
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(ours("all-MiniLM-L6-v2"), "sentence-transformers/all-MiniLM-L6-v2@main");
        assert_eq!(ours("bert-base-nli-mean-tokens@v1"), "sentence-transformers/bert-base-nli-mean-tokens@v1");
        for (first, part) in [("bert-base-uncased", "google-bert/bert-base-uncased"), ("GPT2", "ORGANISATION/GPT2")] {
            assert!(matches!(short_name(first), Some(ShortName::First(next)) if next.contains(part)), "{first}");
        }
        for no in ["", "org/name", "./name", "model.onnx", "a name", "-x", "name.git", "all--x"] {
            assert_eq!(short_name(no), None, "{no}");
        }
    }

    #[test]
    fn folders_of_the_cache_name_the_id_and_the_snapshot() {
        let cache = tempfile::tempdir().unwrap();
        let root = cache.path().canonicalize().unwrap();
        let folder = root.join("models--org--name");
        let snapshots = folder.join("snapshots");
        assert_eq!(cache_folder(&root), None, "an empty folder is no cache");
        fs::create_dir_all(snapshots.join("c1")).unwrap();
        let says = |path: &Path, parts: &[&str]| {
            let next = cache_folder(path).unwrap_or_default();
            assert!(parts.iter().all(|part| next.contains(part)), "{parts:?} in {next:?} of {}", path.display());
        };
        let only = snapshots.join("c1");
        says(&folder, &["folder of org/name", "give the id org/name", only.to_str().unwrap()]);
        says(&snapshots, &["folder of org/name", only.to_str().unwrap()]);
        says(&root, &["the hub's cache", "org/name"]);
        assert_eq!(cache_folder(&only), None);
        fs::create_dir_all(snapshots.join("c2")).unwrap();
        says(&folder, &["one of the folders in", snapshots.to_str().unwrap()]);
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), "c2").unwrap();
        says(&folder, &[snapshots.join("c2").to_str().unwrap()]);
        // Whatever its name, a folder that holds a model is one.
        fs::write(folder.join("config.json"), "{}").unwrap();
        assert_eq!(cache_folder(&folder), None);
    }
}
