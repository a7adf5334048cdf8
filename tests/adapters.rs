//! LoRA adapters beside the weights: vectors equal those of sentence-transformers with peft, and what cannot be merged is refused.

mod common;

use common::{MAX_DIFFERENCE, MIN_COSINE, References, agreement, copy_folder, fixtures};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;
use trt_embed::graph::{Graph, Precision};
use trt_embed::model::{ModelFolder, Weights};
use trt_embed::{BackendChoice, Embedder, Error};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Layer 0's query matrix as the adapter names it.
const QUERY: &str = "base_model.model.encoder.layer.0.attention.self.query";

/// `cases.json`, written by `scripts/make_adapter_fixtures.py`.
#[derive(Deserialize)]
struct Cases {
    texts: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    base: String,
}

fn cases() -> Cases {
    serde_json::from_slice(&std::fs::read(fixtures().join("adapters/cases.json")).unwrap()).unwrap()
}

/// `base` with the adapter `name` beside its weights.
fn folder(base: &str, name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixtures().join(base), folder.path());
    copy_folder(&fixtures().join("adapters").join(name), folder.path());
    folder
}

fn embed(folder: &Path, texts: &[String]) -> Vec<f32> {
    let builder = Embedder::builder(folder.to_str().unwrap()).backend(BackendChoice::Cpu).threads(1);
    builder.build().unwrap_or_else(|e| panic!("{e}")).embed(texts).unwrap().values
}

fn weights(folder: &Path) -> Result<Weights, Error> {
    ModelFolder::open(folder)?.weights()
}

fn digest(folder: &Path) -> String {
    let model = ModelFolder::open(folder).unwrap();
    Graph::new(&model.architecture().unwrap(), Precision::Fp32).unwrap().digest_hex()
}

/// The message for opening `folder`.
#[track_caller]
fn refusal(folder: &Path) -> String {
    weights(folder).map(drop).expect_err("this adapter must not be merged").to_string()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

/// Sets fields of the adapter's configuration; null removes one.
fn configure(folder: &Path, fields: &Value) {
    let path = folder.join(CONFIG);
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (name, value) in fields.as_object().unwrap() {
        config[name] = value.clone();
    }
    std::fs::write(path, config.to_string()).unwrap();
}

/// Writes a safetensors file of `folder` anew: each name gives the names under which its tensor is stored.
fn rename(folder: &Path, file: &str, names: impl Fn(&str) -> Vec<String>) {
    let path = folder.join(file);
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let renamed: Vec<(String, TensorView)> = tensors
        .tensors()
        .into_iter()
        .flat_map(|(name, view)| names(&name).into_iter().map(move |new| (new, view.clone())))
        .collect();
    std::fs::write(path, safetensors::serialize(renamed, None).unwrap()).unwrap();
}

#[test]
fn vectors_are_those_of_the_reference_with_the_adapter() {
    let Cases { texts, cases } = cases();
    let references = References::read(&fixtures().join("adapters/references.safetensors"));
    assert!(cases.len() >= 19);
    for Case { name, base } in cases {
        let (mut expected, [rows, dim]) = references.matrix(&name);
        assert_eq!(rows, texts.len());
        let folder = folder(&base, &name);
        let mut found = embed(folder.path(), &texts);
        // The bar is meant for unit vectors: a folder without a Normalize module gives others.
        for (row, expected) in found.chunks_exact_mut(dim).zip(expected.chunks_exact_mut(dim)) {
            let length = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.iter_mut().chain(expected).for_each(|x| *x /= length);
        }
        let found = agreement(&found, &expected, dim);
        println!("{name}: {found:?}");
        assert!(found.min_cosine >= MIN_COSINE && found.max_difference <= MAX_DIFFERENCE, "{name}: {found:?}");
    }
}

#[test]
fn a_merged_model_is_told_from_its_base_and_known_as_what_it_is() {
    let adapted = folder("bert", "patterns");
    let base = digest(&fixtures().join("bert"));
    let merged = digest(adapted.path());
    assert_ne!(merged, base);
    assert_eq!(merged, digest(adapted.path()), "merging is not the same every time");
    assert_ne!(merged, digest(folder("bert", "plain").path()));

    // The same weights, merged and stored, are the same model.
    let weights = weights(adapted.path()).unwrap();
    assert!(weights.has_adapter());
    let bytes = std::fs::read(adapted.path().join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let views: BTreeMap<String, _> = stored
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.ends_with("position_ids"))
        .map(|(name, view)| (name.clone(), weights.tensor(&name, view.shape()).unwrap()))
        .collect();
    let merged_views =
        views.iter().map(|(name, view)| (name, TensorView::new(view.dtype, view.shape.clone(), view.bytes()).unwrap()));
    std::fs::write(adapted.path().join("model.safetensors"), safetensors::serialize(merged_views, None).unwrap()).unwrap();
    for file in [CONFIG, WEIGHTS] {
        std::fs::remove_file(adapted.path().join(file)).unwrap();
    }
    assert_eq!(digest(adapted.path()), merged);
}

#[test]
fn untouched_tensors_stay_in_their_file_and_merged_ones_are_exact() {
    let adapted = folder("bert", "plain");
    let (base, merged) = (weights(&fixtures().join("bert")).unwrap(), weights(adapted.path()).unwrap());
    let key = "encoder.layer.0.attention.self.key.weight";
    assert_eq!(base.tensor(key, &[40, 40]).unwrap().bytes(), merged.tensor(key, &[40, 40]).unwrap().bytes());

    let bytes = std::fs::read(adapted.path().join(WEIGHTS)).unwrap();
    let adapter = SafeTensors::deserialize(&bytes).unwrap();
    let values = |name: &str| -> Vec<f64> {
        let data = adapter.tensor(&format!("{QUERY}.{name}.weight")).unwrap().data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
    };
    let (a, b) = (values("lora_A"), values("lora_B"));
    let query = "encoder.layer.0.attention.self.query.weight";
    let (base, merged) = (base.tensor(query, &[40, 40]).unwrap(), merged.tensor(query, &[40, 40]).unwrap());
    let (base, merged) = (base.to_f32(), merged.to_f32());
    for row in 0..40 {
        for column in 0..40 {
            // Rank 2, lora_alpha 4.
            let product = b[2 * row] * a[column] + b[2 * row + 1] * a[40 + column];
            let exact = (f64::from(base[40 * row + column]) + 2.0 * product) as f32;
            let found = merged[40 * row + column];
            // Sums of two products in f64 may differ in their last bit, and so the f32 by one step.
            assert!((found - exact).abs() <= exact.abs() * f32::EPSILON, "[{row}, {column}]: {found} for {exact}");
        }
    }
}

#[test]
fn every_spelling_of_names_is_merged_alike() {
    let plain = folder("bert", "modules-to-save");
    let expected = digest(plain.path());
    let spellings: [fn(&str) -> String; 4] = [
        |name| name.replace("base_model.model.", ""),
        |name| name.replace("base_model.model.", "base_model.model.bert."),
        |name| name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        |name| match name.rsplit_once('.') {
            Some((module, part)) if !name.contains("lora_") => format!("{module}.modules_to_save.default.{part}"),
            _ => name.to_owned(),
        },
    ];
    for (i, spelling) in spellings.iter().enumerate() {
        let folder = folder("bert", "modules-to-save");
        rename(folder.path(), WEIGHTS, |name| vec![spelling(name)]);
        assert_eq!(digest(folder.path()), expected, "spelling {i}");
    }
    // Heads of the model that the adapter was trained on change nothing.
    rename(plain.path(), WEIGHTS, |name| match name == format!("{QUERY}.lora_A.weight") {
        true => vec![name.to_owned(), "base_model.model.classifier.weight".to_owned()],
        false => vec![name.to_owned()],
    });
    assert_eq!(digest(plain.path()), expected);
}

#[test]
fn what_an_adapter_asks_for_and_cannot_have_is_refused_by_name() {
    let both = json!({"query": 1, "self.query": 2});
    for (fields, parts) in [
        (json!({"peft_type": "IA3"}), &["peft_type is \"IA3\"", "only LORA is merged", "merge_and_unload"][..]),
        (json!({"peft_type": null}), &["peft_type is null"]),
        (json!({"use_dora": true}), &["use_dora is true", "merge_and_unload"]),
        (json!({"target_parameters": ["query.weight"]}), &["target_parameters is [\"query.weight\"]"]),
        (json!({"init_lora_weights": "pissa_niter_4"}), &["init_lora_weights is \"pissa_niter_4\"", "base model's weights"]),
        (json!({"layer_replication": [[0, 1]]}), &["layer_replication is [[0,1]]"]),
        (json!({"alora_invocation_tokens": [1]}), &["alora_invocation_tokens is [1]"]),
        (json!({"use_xlora": true}), &["use_xlora is true", "no such key is known"]),
        (json!({"bias": "some"}), &["bias is \"some\""]),
        (json!({"r": 3}), &["layer.0.attention.self.query have the rank 2", "say 3"]),
        (json!({"r": 0}), &["r is 0"]),
        (json!({"rank_pattern": {"query": 5}}), &["self.query have the rank 2", "say 5"]),
        (json!({"alpha_pattern": both}), &["alpha_pattern gives", "self.query both 1 and 2"]),
        (json!({"alpha_pattern": {"query": "x"}}), &["alpha_pattern gives \"x\" for \"query\""]),
        (json!({"rank_pattern": {"(": 2}}), &["the pattern", "cannot be used here"]),
        (
            json!({"target_modules": ["query"]}),
            &["target_modules does not reach", "layer.0.attention.self.value", "leave it out"],
        ),
        (json!({"target_modules": ["query", "value", "key"]}), &["target_modules names", "self.key", "no tensors", "at random"]),
        (json!({"target_modules": ["query", "value", "LayerNorm"]}), &["target_modules names", "LayerNorm"]),
        (json!({"target_modules": "("}), &["the pattern", "cannot be used here"]),
        (json!({"target_modules": "query|value"}), &["target_modules does not reach encoder.layer.0.attention.self.query"]),
        (json!({"target_modules": "all-linear"}), &["target_modules names", "attention.output.dense"]),
        (json!({"target_modules": 3}), &["target_modules is 3"]),
        (json!({"exclude_modules": ["layer.1.attention.self.value"]}), &["does not reach encoder.layer.1.attention.self.value"]),
        (json!({"layers_to_transform": [1]}), &["does not reach encoder.layer.0.attention.self.query"]),
        (json!({"layers_to_transform": "1"}), &["layers_to_transform is \"1\""]),
        (json!({"layers_pattern": "layer"}), &["layers_pattern is \"layer\"", "layers_to_transform"]),
        (json!({"layers_to_transform": 1, "target_modules": ".*(query|value)"}), &["layers_to_transform is 1", "list of names"]),
        (json!({"modules_to_save": ["intermediate.dense"]}), &["modules_to_save names", "intermediate.dense", "at random"]),
        (json!({"trainable_token_indices": [3]}), &["trainable_token_indices names embeddings.word_embeddings"]),
        (json!({"trainable_token_indices": [-3]}), &["trainable_token_indices is [-3]"]),
    ] {
        let folder = folder("bert", "plain");
        configure(folder.path(), &fields);
        assert_says(&refusal(folder.path()), &[parts, &["adapter_config.json: "]].concat());
    }
    // Without target_modules they are peft's own for BERT.
    let folder = folder("bert", "plain");
    let before = digest(folder.path());
    configure(folder.path(), &json!({"target_modules": null, "use_dora": null, "lora_dropout": 0.3, "revision": "x"}));
    assert_eq!(digest(folder.path()), before);
}

#[test]
fn tensors_that_are_not_understood_or_do_not_fit_are_refused_by_name() {
    let a = format!("{QUERY}.lora_A.weight");
    let b = format!("{QUERY}.lora_B.weight");
    let also = |name: &str| name.to_owned();
    let with = |new: String| {
        move |name: &str| if name == format!("{QUERY}.lora_A.weight") { vec![also(name), new.clone()] } else { vec![also(name)] }
    };
    for (new, parts) in [
        (format!("{QUERY}.lora_magnitude_vector"), &["lora_magnitude_vector\" belongs to no module", "merge_and_unload"][..]),
        (format!("{QUERY}.lora_C.weight"), &["lora_C.weight\" belongs to no module"]),
        (a.replace("layer.0", "layer.7"), &["layer.7.attention.self.query.lora_A.weight\" belongs to no module"]),
        (a.replace("base_model.model", "model"), &["\"model.encoder.layer.0"]),
        (a.replace("lora_A", "lora_A.other"), &["lora_A.other.weight\" belongs to no module"]),
        (format!("{QUERY}.weight"), &["query.weight\" should be called base_layer.weight"]),
        (format!("{QUERY}.base_layer.weight"), &["has shape [2, 40], the encoder asks for [40, 40]"]),
        (a.replace("query.lora_A", "key.base_layer"), &["stands beside no matrices"]),
        (a.replace("query", "key"), &["key, for which adapter_model.safetensors has", "leave it out"]),
        (a.replace("lora_A.weight", "lora_embedding_A"), &["lora_embedding_A\" is not of the kind"]),
        (a.replace("query.lora_A", "key"), &["key.weight\" has shape [2, 40], the encoder asks for [40, 40]"]),
        (
            "base_model.model.embeddings.word_embeddings.token_adapter.trainable_tokens_delta".to_owned(),
            &["trainable_token_indices does not name embeddings.word_embeddings"],
        ),
    ] {
        let folder = folder("bert", "plain");
        rename(folder.path(), WEIGHTS, with(new));
        assert_says(&refusal(folder.path()), &[parts, &["adapter_"]].concat());
    }
    let folder_of = |names: &dyn Fn(&str) -> Vec<String>| {
        let folder = folder("bert", "plain");
        rename(folder.path(), WEIGHTS, names);
        folder
    };
    // The same matrix under two names is one; two matrices are not.
    weights(
        folder_of(&|name| if name == a { vec![also(name), a.replace("lora_A", "lora_A.default")] } else { vec![also(name)] })
            .path(),
    )
    .unwrap();
    let other = a.replace("layer.0", "layer.1");
    let two =
        folder_of(&|name| if name == other { vec![also(name), a.replace("lora_A", "lora_A.default")] } else { vec![also(name)] });
    assert_says(&refusal(two.path()), &["are the same one's", "lora_A.default.weight"]);
    let alone = folder_of(&|name| if name == b { vec![] } else { vec![also(name)] });
    assert_says(&refusal(alone.path()), &[&a, "one of a pair"]);
    let swapped = folder_of(&|name| {
        vec![match name {
            _ if name == a => b.clone(),
            _ if name == b => a.clone(),
            _ => also(name),
        }]
    });
    assert_says(&refusal(swapped.path()), &["have the rank 40"]);

    let tokens = folder("bert", "tokens");
    configure(tokens.path(), &json!({"trainable_token_indices": [2, 12, 7, 205]}));
    assert_says(&refusal(tokens.path()), &["trainable_token_indices holds 205", "205 rows"]);
    configure(tokens.path(), &json!({"trainable_token_indices": [2, 12, 7, 2]}));
    assert_says(&refusal(tokens.path()), &["trainable_token_indices holds 2 twice"]);
    configure(tokens.path(), &json!({"trainable_token_indices": [2, 12]}));
    assert_says(&refusal(tokens.path()), &["has shape [4, 40], the encoder asks for [2, 40]"]);
}

#[test]
fn layers_beyond_those_of_config_json_count_neither_here_nor_there() {
    let folder = folder("bert", "plain");
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(1);
    std::fs::write(path, config.to_string()).unwrap();
    assert_says(&refusal(folder.path()), &["layer.1.attention.self.query.lora_A.weight\" belongs to no module"]);
    rename(folder.path(), WEIGHTS, |name| if name.contains("layer.1") { vec![] } else { vec![name.to_owned()] });
    assert!(weights(folder.path()).unwrap().has_adapter());
}

#[test]
fn an_adapter_without_its_files_says_what_to_do() {
    let pickled = folder("bert", "plain");
    std::fs::rename(pickled.path().join(WEIGHTS), pickled.path().join("adapter_model.bin")).unwrap();
    assert_says(&refusal(pickled.path()), &["there is only adapter_model.bin, which is not read", "merge_and_unload"]);
    std::fs::remove_file(pickled.path().join("adapter_model.bin")).unwrap();
    assert_says(&refusal(pickled.path()), &["adapter_model.safetensors not found", "adapter_config.json asks for it"]);

    // Nothing asks for the adapter: the reference does not look at it either.
    let unasked = folder("bert", "plain");
    std::fs::remove_file(unasked.path().join(CONFIG)).unwrap();
    assert_eq!(digest(unasked.path()), digest(&fixtures().join("bert")));

    let alone = folder("bert", "plain");
    for file in ["config.json", "model.safetensors"] {
        std::fs::remove_file(alone.path().join(file)).unwrap();
    }
    let place = alone.path().display().to_string();
    for (fields, parts) in [
        (
            json!({"base_model_name_or_path": "org/base", "revision": "v2"}),
            &[
                "an adapter alone",
                "\"org/base@v2\"",
                "hf download org/base config.json model.safetensors --revision v2 --local-dir",
                &place,
            ][..],
        ),
        (
            json!({"base_model_name_or_path": "bert-base-uncased", "revision": null}),
            &["hf download bert-base-uncased config.json"],
        ),
        (json!({"base_model_name_or_path": "../base"}), &["\"../base\"", "copy config.json and model.safetensors", &place]),
        (json!({"base_model_name_or_path": "/models/base"}), &["\"/models/base\"", "copy config.json"]),
        (json!({"base_model_name_or_path": null}), &["not named", "copy config.json"]),
        (json!({"peft_type": "IA3"}), &["an adapter alone"]),
    ] {
        configure(alone.path(), &fields);
        assert_says(&refusal(alone.path()), parts);
    }
    // The step works.
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixtures().join("bert").join(file), alone.path().join(file)).unwrap();
    }
    std::fs::copy(fixtures().join("adapters/plain").join(CONFIG), alone.path().join(CONFIG)).unwrap();
    assert_eq!(digest(alone.path()), digest(folder("bert", "plain").path()));
}
