//! Tokenizers from all their files against transformers: `tests/fixtures/tokenizers`, made by `scripts/make_tokenizer_cases.py`.

use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use trt_embed::Error;
use trt_embed::model::{TokenizerFiles, TokenizerModel};
use trt_embed::tokens::{Tokenizer, TokenizerSettings};

const TABLE: usize = 10_000;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// `TRT_EMBED_TOKENIZER_CASES` names another file of cases, made with another seed.
fn cases() -> Value {
    read(&std::env::var_os("TRT_EMBED_TOKENIZER_CASES").map_or_else(|| fixtures().join("cases.json"), PathBuf::from))
}

/// Writes the files of a case into `folder`.
fn write(case: &Value, folder: &Path) {
    let mut json = read(&fixtures().join(format!("{}.json", case["base"].as_str().unwrap())));
    for (key, value) in case["json"].as_object().unwrap() {
        json[key] = value.clone();
    }
    let files = case["files"].as_object().unwrap();
    for (name, value) in files.iter().filter(|(name, _)| *name != "vocab.txt") {
        std::fs::write(folder.join(name), value.to_string()).unwrap();
    }
    if files.contains_key("vocab.txt") {
        let mut vocab: Vec<(&String, u64)> =
            json["model"]["vocab"].as_object().unwrap().iter().map(|(word, id)| (word, id.as_u64().unwrap())).collect();
        vocab.sort_unstable_by_key(|&(_, id)| id);
        let lines: String = vocab.into_iter().map(|(word, _)| format!("{word}\n")).collect();
        std::fs::write(folder.join("vocab.txt"), lines).unwrap();
    } else {
        std::fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
    }
}

fn open(case: &Value, folder: &Path, limit: usize) -> Result<Tokenizer, Error> {
    let model =
        TokenizerModel { model_type: case["model_type"].as_str().unwrap(), tokenizer_class: case["model_class"].as_str() };
    let files = TokenizerFiles::read(folder, model, case["overrides"].as_object().unwrap())?;
    Tokenizer::open(&files, TokenizerSettings::new(limit, 0, TABLE))
}

#[test]
fn ids_are_those_of_transformers() {
    let all = cases();
    let texts: Vec<&str> = all["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let limit = all["limit"].as_u64().unwrap() as usize;
    let mut faults = Vec::new();
    for case in all["cases"].as_array().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        write(case, folder.path());
        let found = open(case, folder.path(), limit).and_then(|tokenizer| tokenizer.ids(&texts));
        let expected = case.get("ids");
        let shown = || format!("{} {} {} {}", case["name"], case["files"], case["json"], case["overrides"]);
        match (found, expected) {
            (Err(_), None) => {}
            (Ok(_), None) => faults.push(format!("{}: transformers: {}", shown(), case["error"])),
            (Err(error), Some(_)) => faults.push(format!("{}: {error}", shown())),
            (Ok(found), Some(expected)) => {
                for (place, (found, expected)) in found.iter().zip(expected.as_array().unwrap()).enumerate() {
                    if json!(found) != *expected {
                        faults.push(format!("{}: {:?}\n  {found:?}\n  {expected}", shown(), texts[place]));
                        break;
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

fn bert(files: &[(&str, Value)], overrides: Value) -> Result<TokenizerFiles, Error> {
    let folder = tempfile::tempdir().unwrap();
    let mut given = Map::new();
    given.extend(files.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    write(&json!({"base": "wordpiece", "json": {}, "files": given}), folder.path());
    let Value::Object(overrides) = overrides else { unreachable!() };
    TokenizerFiles::read(folder.path(), TokenizerModel { model_type: "bert", tokenizer_class: None }, &overrides)
}

#[test]
fn limits_come_from_overrides_then_from_the_tokenizer() {
    for (config, overrides, expected) in [
        (json!({}), json!({}), None),
        (json!({"model_max_length": 12}), json!({}), Some(12)),
        (json!({"max_len": 12}), json!({}), Some(12)),
        (json!({"max_len": 12, "model_max_length": 13}), json!({}), Some(13)),
        (json!({"max_len": 12, "model_max_length": null}), json!({}), None),
        (json!({"model_max_length": 1e30}), json!({}), None),
        (json!({"model_max_length": 12}), json!({"model_max_length": 20}), Some(20)),
    ] {
        let files = bert(&[("tokenizer_config.json", config.clone())], overrides).unwrap();
        assert_eq!(files.limit(), expected, "{config}");
    }
}

#[test]
fn what_cannot_be_served_is_refused_by_file_key_and_value() {
    for (files, overrides, parts) in [
        (
            vec![("tokenizer_config.json", json!({"model_max_length": "long"}))],
            json!({}),
            ["tokenizer_config.json", "model_max_length is \"long\""],
        ),
        (
            vec![("tokenizer_config.json", json!({"model_max_length": 0}))],
            json!({}),
            ["tokenizer_config.json", "model_max_length is 0"],
        ),
        (
            vec![("tokenizer_config.json", json!({"model_max_length": 12.0}))],
            json!({}),
            ["tokenizer_config.json", "model_max_length is 12.0; a whole number"],
        ),
        (
            vec![("tokenizer_config.json", json!({"processor_class": "X"}))],
            json!({}),
            ["tokenizer_config.json", "processor_class is \"X\""],
        ),
        (
            vec![("tokenizer_config.json", json!({"padding_side": "up"}))],
            json!({}),
            ["tokenizer_config.json", "padding_side is \"up\""],
        ),
        (
            vec![("tokenizer_config.json", json!({"added_tokens_decoder": []}))],
            json!({}),
            ["tokenizer_config.json", "added_tokens_decoder is []"],
        ),
        (
            vec![("tokenizer_config.json", json!({"added_tokens_decoder": {"a": {}}}))],
            json!({}),
            ["tokenizer_config.json", "\"a\": {}"],
        ),
        (vec![("special_tokens_map.json", json!({"mask_token": 3}))], json!({}), ["special_tokens_map.json", "mask_token is 3"]),
        (vec![("added_tokens.json", json!({"<e>": "3"}))], json!({}), ["added_tokens.json", "\"<e>\" is \"3\""]),
        (vec![], json!({"no_such_argument": 1}), ["sentence_bert_config.json", "no_such_argument is 1"]),
    ] {
        let error = bert(&files, overrides).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

/// An engine that was built by tokenizer.json alone stays valid as long as the other files change nothing.
#[test]
fn the_content_hash_is_that_of_tokenizer_json_where_nothing_else_counts() {
    use sha2::{Digest, Sha256};
    let folder = tempfile::tempdir().unwrap();
    let hash = |config: Value| {
        let case = json!({"base": "wordpiece", "json": {}, "files": {"tokenizer_config.json": config}});
        write(&case, folder.path());
        let model = TokenizerModel { model_type: "bert", tokenizer_class: None };
        Tokenizer::content_hash(&TokenizerFiles::read(folder.path(), model, &Map::new()).unwrap()).unwrap()
    };
    let same = hash(json!({"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": 9}));
    let json = std::fs::read(folder.path().join("tokenizer.json")).unwrap();
    let digest: String = Sha256::digest(&json).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(same, digest);
    let others = [
        json!({"do_lower_case": false}),
        json!({"truncation_side": "left"}),
        json!({"split_special_tokens": true}),
        json!({"cls_token": "[MASK]"}),
        json!({"extra_special_tokens": ["cat"]}),
    ];
    let mut hashes: Vec<String> = others.map(hash).into();
    hashes.push(digest);
    let count = hashes.len();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), count);
    assert!(hashes.iter().all(|hash| hash.len() == 64));
}
