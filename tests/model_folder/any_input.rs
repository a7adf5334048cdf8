//! Random and damaged files of every kind: errors at most, never a panic.

use crate::tiny_model::{Folder, HIDDEN, module, old_modules};
use crate::{family, file_with, only_weights};
use proptest::prelude::*;
use serde_json::{Value, json};
use trt_embed::model::{ModelFolder, Weights};

/// The files of a folder that has every module.
fn whole_folder() -> Folder {
    let folder = Folder::sentence_transformers();
    let mut modules = old_modules();
    modules.as_array_mut().unwrap().insert(2, module("sentence_transformers.models.Dense", "2_Dense"));
    folder.json("modules.json", &modules);
    folder.dense("2_Dense", HIDDEN, 3, "torch.nn.modules.activation.Tanh");
    folder.json("tokenizer_config.json", &json!({"model_max_length": 9}));
    folder.json("config_sentence_transformers.json", &json!({"prompts": {"a": "x"}, "default_prompt_name": "a"}));
    folder
}

const FILES: [&str; 9] = [
    "modules.json",
    "config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
];

/// Opens the folder, and reads all that it gives; only a panic fails.
fn read_all(folder: &Folder) {
    let Ok(model) = ModelFolder::open(folder.path()) else { return };
    assert!(model.max_tokens() >= 1 && model.embedding_size() >= 1);
    let Ok(weights) = model.weights() else { return };
    for name in weights.tensor_names() {
        let shape = [HIDDEN];
        if let Ok(tensor) = weights.tensor(name, &shape) {
            assert_eq!(tensor.to_f32().len(), HIDDEN);
        }
    }
}

/// A JSON value of any form, with the numbers that hurt.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        (0_i64..9).prop_map(Value::from),
        "[a-z/.]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,8}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(file in 0..FILES.len(), bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let folder = whole_folder();
        folder.write(FILES[file], &bytes);
        read_all(&folder);
        folder.remove("model.safetensors");
        folder.write("model.safetensors.index.json", &bytes);
        read_all(&folder);
    }

    #[test]
    fn changed_bytes_never_panic(
        file in 0..FILES.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let folder = whole_folder();
        let mut bytes = std::fs::read(folder.join(FILES[file])).unwrap();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        folder.write(FILES[file], &bytes);
        read_all(&folder);
    }

    #[test]
    fn any_value_of_any_field_never_panics(
        file in prop::sample::select(vec![0_usize, 1, 2, 3, 5, 6, 7]),
        field in any::<prop::sample::Index>(),
        value in any_json(),
    ) {
        let folder = whole_folder();
        let mut json: Value = serde_json::from_slice(&std::fs::read(folder.join(FILES[file])).unwrap()).unwrap();
        match &mut json {
            Value::Object(fields) => {
                let place = field.index(fields.len());
                *fields.values_mut().nth(place).unwrap() = value;
            }
            Value::Array(entries) => {
                let entry = field.index(entries.len());
                entries[entry]["path"] = value;
            }
            _ => unreachable!("configuration files are objects or lists"),
        }
        folder.json(FILES[file], &json);
        read_all(&folder);
    }

    #[test]
    fn any_header_never_panics(header in any_json(), data in 0..64_usize) {
        let (_folder, weights) = only_weights(&file_with(&json!({"a": header}).to_string(), data));
        drop(weights);
        let offsets = |begin: u64, end: u64| json!({"a": {"dtype": "F32", "shape": [begin, 1], "data_offsets": [begin, end]}});
        let (_folder, weights) = only_weights(&file_with(&offsets(data as u64, u64::MAX - data as u64).to_string(), data));
        prop_assert!(weights.is_err());
    }

    #[test]
    fn any_index_never_panics(map in any_json()) {
        let folder = Folder::empty();
        folder.json("model.safetensors.index.json", &json!({"weight_map": map}));
        prop_assert!(Weights::open(folder.path(), family("mpnet")).is_err());
    }
}
