//! Mirrors and proxies between the hub and here: what they leave out, what they redirect, and what must not reach them.

use super::loopback_hub::{COMMIT, Fault, Hub, REPO, Tag, Way, etag, sha256};
use super::{Heard, MODEL, assert_says, cache, fault, fetch, id, model_folder, names, offline, options, repo_folder};
use std::sync::Arc;
use trt_embed::Progress;
use trt_embed::model::ModelFolder;
use trt_embed::model::hub::fetch_with;

/// The download works, and what lies in the cache is what the hub has, found by the next run without asking for a file.
#[test]
fn ways_that_work() {
    let folder = model_folder();
    for way in [
        Way::Plain,
        Way::ResolveCache,
        Way::ResolveCacheAbsolute,
        Way::Renamed,
        Way::HeadWithoutLength,
        Way::Chunked,
        Way::UntilClosed,
    ] {
        for (tag, details) in
            [(Tag::Git, true), (Tag::Git, false), (Tag::Sha1, true), (Tag::Sha1, false), (Tag::Same, false), (Tag::None, true)]
        {
            let cache = cache();
            let hub = Hub::serve(&folder);
            hub.way(way.clone());
            hub.says(tag, details);
            let snapshot =
                fetch(&options(&hub.endpoint, &cache), REPO).unwrap_or_else(|error| panic!("{way:?} {tag:?} {details}: {error}"));
            for file in ["modules.json", "tokenizer.json", "1_Pooling/config.json", "config.json", MODEL] {
                assert_eq!(
                    std::fs::read(snapshot.join(file)).unwrap(),
                    std::fs::read(folder.join(file)).unwrap(),
                    "{way:?} {file}"
                );
            }
            assert!(ModelFolder::open(&snapshot).unwrap().weights().is_ok());
            assert_eq!(fetch(&offline(&cache), REPO).unwrap(), snapshot);
        }
    }
}

/// Without an ETag that is a hash, a blob is named by its content: one ETag for two files does not make them one.
#[test]
fn blobs_are_never_named_by_an_etag_that_is_no_hash() {
    let (folder, cache) = (model_folder(), cache());
    let hub = Hub::serve(&folder);
    hub.says(Tag::Same, false);
    fetch(&options(&hub.endpoint, &cache), REPO).unwrap();
    let blobs = names(&repo_folder(&cache).join("blobs"));
    assert!(blobs.contains(&sha256(&std::fs::read(folder.join("modules.json")).unwrap())), "{blobs:?}");
    assert!(!blobs.iter().any(|name| name.contains('-')), "{blobs:?}");
}

/// What the hub does not say is not taken for zero: neither in checks nor in what is reported.
#[test]
fn a_size_that_is_not_told_is_unknown() {
    let (folder, cache) = (model_folder(), cache());
    let size = std::fs::metadata(folder.join("tokenizer.json")).unwrap().len();
    let hub = Hub::serve(&folder);
    hub.way(Way::Chunked);
    hub.says(Tag::Git, false);
    let heard = Arc::new(Heard::default());
    let progress: Arc<dyn Progress> = heard.clone();
    fetch_with(&options(&hub.endpoint, &cache), &id(REPO), Some(&progress)).unwrap();
    let heard = heard.0.lock().unwrap();
    let of_tokenizer: Vec<_> =
        heard.iter().filter(|(file, ..)| file == "tokenizer.json").map(|(_, done, total)| (*done, *total)).collect();
    assert_eq!((of_tokenizer.first(), of_tokenizer.last()), (Some(&(0, 0)), Some(&(size, size))), "{of_tokenizer:?}");
    assert!(of_tokenizer[..of_tokenizer.len() - 1].iter().all(|(_, total)| *total == 0), "{of_tokenizer:?}");
    // That of a file in LFS stands in a header of its own.
    assert!(heard.iter().filter(|(file, ..)| file == MODEL).all(|(_, _, total)| *total > 100));
}

/// Hashes count where sizes are missing.
#[test]
fn damaged_bodies_without_a_length_stay_out_of_the_cache() {
    let folder = model_folder();
    let model = std::fs::read(folder.join(MODEL)).unwrap();
    let body = format!("GET /cdn/{}", etag(&model));
    for way in [Way::HeadWithoutLength, Way::Chunked, Way::UntilClosed] {
        for (end, damage, details, parts) in [
            (body.as_str(), Fault::OtherBytes, false, &["model.safetensors has SHA-256", "the hub says", "run again"][..]),
            ("tokenizer.json", Fault::OtherBytes, true, &["tokenizer.json has git's id", "run again"]),
            ("tokenizer.json", Fault::Short, true, &["tokenizer.json has 1 bytes, the hub says 2", "run again"]),
        ] {
            let cache = cache();
            let hub = Hub::serve(&folder);
            hub.way(way.clone());
            hub.says(Tag::Git, details);
            hub.fault(end, damage);
            assert_says(&fault(&options(&hub.endpoint, &cache), REPO), parts);
            assert!(!repo_folder(&cache).join("refs").exists(), "{way:?}: main means nothing yet");
            hub.heal();
            assert!(fetch(&options(&hub.endpoint, &cache), REPO).is_ok());
        }
        let cache = cache();
        let hub = Hub::serve(&folder);
        hub.way(way.clone());
        hub.fault(&body, Fault::BrokenOff);
        let parts = if way == Way::UntilClosed { &["model.safetensors has", "the hub says"][..] } else { &["broke off", MODEL] };
        assert_says(&fault(&options(&hub.endpoint, &cache), REPO), parts);
    }
}

#[test]
fn answers_that_cannot_be_trusted_are_refused() {
    let (cache, other) = (cache(), Hub::serve(&model_folder()));
    let hub = Hub::serve(&model_folder());
    let options = options(&hub.endpoint, &cache);
    for (way, parts) in [
        (
            Way::Elsewhere(other.endpoint.clone()),
            &["leads to another server", other.endpoint.as_str(), "set HF_ENDPOINT=http"][..],
        ),
        (Way::Elsewhere(format!("{}/again", hub.endpoint)), &["more than 10 redirects"]),
        (Way::Compressed, &["comes as gzip"]),
        (Way::WithoutCommit, &["X-Repo-Commit", "HF_ENDPOINT"]),
    ] {
        hub.way(way);
        assert_says(&fault(&options, REPO), parts);
        assert!(!repo_folder(&cache).join("refs").exists());
    }
    assert_eq!(other.requests(), [""; 0]);
    hub.way(Way::Plain);
    hub.says(Tag::None, false);
    assert_says(&fault(&options, REPO), &["neither ETag nor hash for", "HF_ENDPOINT"]);
    hub.says(Tag::Git, true);
    hub.fault("config.json", Fault::Status(204, ""));
    assert_says(&fault(&options, REPO), &["says 204 for", "where 200 is expected"]);
}

/// A server that bodies are redirected to never sees the token, nor does it bring the token back.
#[test]
fn the_token_stays_with_the_hub() {
    let (folder, cache) = (model_folder(), cache());
    let (hub, cdn) = (Hub::serve(&folder), Hub::serve(&folder));
    hub.cdn(&cdn);
    hub.require_token("hf_secret");
    let mut options = options(&hub.endpoint, &cache);
    options.token = Some("hf_secret".to_owned());
    let snapshot = fetch(&options, REPO).unwrap();
    assert!(snapshot.join(MODEL).is_file());
    let model = etag(&std::fs::read(folder.join(MODEL)).unwrap());
    assert!(cdn.requests().contains(&format!("GET /cdn/{model}")));
    assert_eq!(cdn.with_token(), [""; 0]);
    assert!(hub.with_token().contains(&format!("HEAD /{REPO}/resolve/{COMMIT}/{MODEL}")));
    // Back from elsewhere, the hub is asked as by anybody.
    let (hub, back) = (Hub::serve(&folder), Hub::serve(&folder));
    hub.cdn(&back);
    back.way(Way::Elsewhere(hub.endpoint.clone()));
    options.endpoint = hub.endpoint.clone();
    options.cache = cache.path().join("another");
    fetch(&options, REPO).unwrap();
    assert!(hub.requests().contains(&format!("GET /cdn/{model}")));
    assert!(!hub.with_token().iter().any(|request| request.contains("/cdn/")), "{:?}", hub.with_token());
}
