//! What a model argument means, and which variables of the environment count.

use super::loopback_hub::Hub;
use super::tiny_model::Folder;
use super::{assert_says, cache, id, model_folder};
use trt_embed::model::hub::HubOptions;
use trt_embed::model::{HubId, resolve};

#[test]
fn model_arguments() {
    let parsed = id("sentence-transformers/all-mpnet-base-v2@refs/pr/3");
    assert_eq!((parsed.org.as_str(), parsed.name.as_str()), ("sentence-transformers", "all-mpnet-base-v2"));
    assert_eq!(parsed.revision, "refs/pr/3");
    assert_eq!(id("org/name").revision, "main");
    for bad in [
        "",
        "name",
        "org/",
        "/name",
        "org/name/more",
        "../name",
        "org/..",
        "./name",
        "org/name@",
        "org/name@../x",
        "org/na me",
        "org/name@a//b",
        "org/name@/x",
        "org/name@.x",
        "org/na--me",
        "org/name.git",
        "~/name",
        "org\\name",
        "-org/name",
        "org/né",
    ] {
        assert_eq!(HubId::parse(bad), None, "{bad}");
    }
    assert_eq!(HubId::parse(&format!("org/{}", "n".repeat(93))), None);

    let folder = Folder::plain();
    assert_eq!(resolve(folder.path().to_str().unwrap(), None).unwrap(), folder.path());
    for neither in ["/no/such/folder", "no-such-file.onnx", "./models/x", "a/b/c"] {
        let message = resolve(neither, None).unwrap_err().to_string();
        assert_says(&message, &["model folder not found", neither, "org/name[@revision]"]);
    }
}

/// An argument that is clear, though no folder and no id, gets the one that works; asks no hub.
#[test]
fn arguments_that_are_nearly_right() {
    let cache = cache();
    let hub = Hub::serve(&model_folder());
    let snapshot = super::fetch(&super::options(&hub.endpoint, &cache), super::REPO).unwrap();
    let repo = super::repo_folder(&cache);
    for (model, parts) in [
        (
            repo.to_str().unwrap(),
            &["config.json not found", "the hub cache's folder of org/tiny", snapshot.to_str().unwrap()][..],
        ),
        (repo.join("snapshots").to_str().unwrap(), &["the hub cache's folder of org/tiny", snapshot.to_str().unwrap()]),
        (repo.parent().unwrap().to_str().unwrap(), &["the hub's cache", "org/tiny"]),
        ("https://huggingface.co/org/name/tree/v1", &["that is an address: give the hub id org/name@v1"]),
        ("hf://org/name", &["that is an address: give the hub id org/name"]),
        ("bert-base-uncased", &["give google-bert/bert-base-uncased"]),
    ] {
        assert_says(&resolve(model, None).unwrap_err().to_string(), parts);
    }
    assert_eq!(resolve(snapshot.to_str().unwrap(), None).unwrap(), snapshot);
    #[cfg(unix)]
    {
        let link = cache.path().join("moved");
        std::os::unix::fs::symlink("/no/such/model", &link).unwrap();
        assert_says(
            &resolve(link.to_str().unwrap(), None).unwrap_err().to_string(),
            &["moved", "/no/such/model", "does not exist"],
        );
    }
}

/// Not a test of its own: [`the_environment_is_read`] runs it with variables set, which a process can do only for its children.
#[test]
#[ignore = "run by the_environment_is_read"]
fn print_options() {
    println!("{:?}", HubOptions::from_env());
    println!("{}", resolve("org/absent", None).unwrap_err());
    println!("{}", resolve("all-MiniLM-L6-v2", None).unwrap_err());
}

#[test]
fn the_environment_is_read() {
    const VARIABLES: [&str; 13] = [
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "XDG_CACHE_HOME",
        "HF_ENDPOINT",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_OFFLINE",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    ];
    let run = |set: &[(&str, &str)]| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "arguments::print_options", "--ignored", "--nocapture"]);
        for name in VARIABLES {
            command.env_remove(name);
        }
        let output =
            command.env("HOME", "/home/u").env("HF_ENDPOINT", "http://127.0.0.1:1").envs(set.iter().copied()).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let usual = run(&[]);
    assert_says(&usual, &["cache: \"/home/u/.cache/huggingface/hub\"", "token: None", "offline: false"]);
    assert_says(&usual, &["endpoint: \"http://127.0.0.1:1\"", "http://127.0.0.1:1 cannot be reached"]);
    // As sentence-transformers takes it.
    assert_says(&usual, &["sentence-transformers/all-MiniLM-L6-v2@main: http", "all-MiniLM-L6-v2 is no folder here"]);
    for variable in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        assert_says(&run(&[(variable, "/no/such.pem")]), &[variable, "/no/such.pem cannot be used: No such file", "unset it"]);
    }
    assert_says(&run(&[("HF_TOKEN", "a\u{7f}b")]), &["the token holds characters that no token has", "HF_TOKEN_PATH"]);
    assert_says(&run(&[("HF_TOKEN_PATH", "/proc")]), &["cannot read the token in /proc"]);
    assert_says(&run(&[("XDG_CACHE_HOME", "/x")]), &["cache: \"/x/huggingface/hub\""]);
    assert_says(&run(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]), &["cache: \"/home/u/hf/hub\""]);
    assert_says(&run(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]), &["cache: \"/c\""]);
    for yes in ["1", "ON", "yes", "True"] {
        assert_says(
            &run(&[("HF_HUB_OFFLINE", yes)]),
            &["offline: true", "org/absent@main: not in the cache", "HF_HUB_OFFLINE is set"],
        );
    }
    assert_says(&run(&[("HF_HUB_OFFLINE", "0")]), &["offline: false"]);
    let with_token = run(&[("HF_TOKEN", " hf_x\n")]);
    assert_says(&with_token, &["token: Some("]);
    assert!(!with_token.contains("hf_x"), "a token is never shown");
    assert_says(&run(&[("HF_TOKEN", "hf_x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), &["token: None"]);
}
