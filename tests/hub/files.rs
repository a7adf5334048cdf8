//! Which files are fetched, and what a cache that lacks some of them may still serve.

use super::loopback_hub::{COMMIT, Hub, REPO};
use super::tiny_model::{Folder, weights};
use super::{MODEL, assert_says, cache, fault, fetch, model_folder, names, offline, options, repo_folder};
use serde_json::json;
use trt_embed::model::ModelFolder;

/// What the tokenizer and the encoder are made of beside their main files, and under every name that sentence-transformers reads.
#[test]
fn files_that_change_vectors_are_fetched_or_known_to_be_absent() {
    let cache = cache();
    let folder = model_folder();
    let fetched = [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "sentence_roberta_config.json",
    ];
    for file in fetched {
        folder.write(file, b"{\"a\": 1}");
    }
    folder.write("sentence_bert_config.json", b" {} ");
    folder.write("sentence_xlnet_config.json", b"{\"a\": 2}");
    folder.write("chat_template.jinja", b"");
    let hub = Hub::serve(&folder);
    let snapshot = fetch(&options(&hub.endpoint, &cache), REPO).unwrap();
    for file in fetched {
        assert!(snapshot.join(file).is_file(), "{file}");
    }
    // Empty settings do not count, the first others do.
    assert!(!snapshot.join("sentence_xlnet_config.json").exists());
    assert!(!snapshot.join("chat_template.jinja").exists());
    let absent = repo_folder(&cache).join(".no_exist").join(COMMIT);
    assert_eq!(names(&absent), ["2_Normalize", "vocab.txt"]);
}

/// What a cache does not know of, because an earlier version did not ask for it, is asked for once; until then its absence is assumed.
#[test]
fn a_cache_of_an_earlier_version_serves() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    let pinned = format!("{REPO}@{COMMIT}");
    let snapshot = fetch(&options, &pinned).unwrap();
    let absent = repo_folder(&cache).join(".no_exist").join(COMMIT);
    let new = ["added_tokens.json", "adapter_config.json", "special_tokens_map.json"];
    new.iter().for_each(|file| std::fs::remove_file(absent.join(file)).unwrap());
    hub.requests();
    assert_eq!(fetch(&offline(&cache), &pinned).unwrap(), snapshot);
    assert_eq!(fetch(&options, &pinned).unwrap(), snapshot);
    assert_eq!(hub.requests(), [format!("GET /api/models/{REPO}/revision/{COMMIT}")]);
    assert!(new.iter().all(|file| absent.join(file).is_file()));
    assert_eq!(fetch(&options, &pinned).unwrap(), snapshot);
    assert_eq!(hub.requests(), [""; 0]);
}

/// An adapter's weights lie beside settings only; what an adapter without an encoder needs is told by the reader of the folder.
#[test]
fn an_adapter_alone_is_fetched_for_the_folders_reader() {
    let cache = cache();
    let folder = Folder::empty();
    folder.json("adapter_config.json", &json!({"base_model_name_or_path": "org/base"}));
    folder.write("adapter_model.safetensors", &weights(&[("a", &[2], &[1.0; 2])]));
    let hub = Hub::serve(&folder);
    let snapshot = fetch(&options(&hub.endpoint, &cache), REPO).unwrap();
    assert_eq!(names(&snapshot), ["adapter_config.json", "adapter_model.safetensors"]);
    assert_eq!(fetch(&offline(&cache), REPO).unwrap(), snapshot);
}

/// A link whose blob was deleted is a file that the repository has: offline it is not taken to be absent, online it comes back.
#[cfg(unix)]
#[test]
fn a_deleted_blob_is_no_absent_file() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    let snapshot = fetch(&options, &format!("{REPO}@{COMMIT}")).unwrap();
    for file in ["sentence_bert_config.json", MODEL] {
        std::fs::remove_file(snapshot.join(file).canonicalize().unwrap()).unwrap();
        let message = fault(&offline(&cache), &format!("{REPO}@{COMMIT}"));
        assert_says(&message, &[file, "is a link to ../../blobs/", "does not exist", "HF_HUB_OFFLINE"]);
        let opened = ModelFolder::open(&snapshot).and_then(|folder| folder.weights().map(drop));
        if file == MODEL {
            assert_says(&opened.unwrap_err().to_string(), &[file, "is a link to", "fetch the model again"]);
        }
        fetch(&options, &format!("{REPO}@{COMMIT}")).unwrap();
        assert!(snapshot.join(file).is_file());
    }
}
