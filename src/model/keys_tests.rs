//! Every key of every table: honoured, harmless or refused as its table says, and written down in `docs/model-folders.md`.

use super::families::rope;
use super::schema::{Action, Key, Schema, Unknown};
use super::{
    Family, ModelFolder, adapter_config, dense, modules, sentence_transformers, tokenizer_keys, transformer_module, weights,
};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Where the keys of a table stand in the folder that the tests build.
struct Table {
    schema: &'static Schema,
    /// The base folder below `tests/fixtures`.
    base: &'static str,
    file: &'static str,
    /// Keys that lead from the file's top to the object that the table is about.
    within: &'static [&'static str],
    /// Values that matter, of honoured keys: with each the folder reads otherwise than without, or is refused by name.
    matters: &'static [(&'static str, &'static str)],
}

fn tables() -> Vec<Table> {
    let st = "sentence_bert_config.json";
    let table = |schema, base, file, within, matters| Table { schema, base, file, within, matters };
    const CONFIG: &[(&str, &str)] = &[
        ("model_type", "\"t5\""),
        ("hidden_size", "64"),
        ("num_hidden_layers", "1"),
        ("num_attention_heads", "2"),
        ("intermediate_size", "24"),
        ("vocab_size", "500"),
        ("max_position_embeddings", "300"),
        ("layer_norm_eps", "1e-6"),
        ("hidden_act", "\"relu\""),
        ("tokenizer_class", "\"BertTokenizer\""),
        ("pad_token_id", "3"),
        ("type_vocab_size", "3"),
        ("relative_attention_num_buckets", "16"),
        ("dim", "64"),
        ("n_layers", "1"),
        ("n_heads", "2"),
        ("hidden_dim", "24"),
        ("activation", "\"relu\""),
        ("norm_eps", "1e-6"),
        ("norm_bias", "false"),
        ("hidden_activation", "\"relu\""),
        ("attention_bias", "false"),
        ("mlp_bias", "false"),
        ("global_attn_every_n_layers", "2"),
        ("layer_types", "[\"full_attention\"]"),
        ("local_attention", "4"),
        ("sliding_window", "3"),
        ("global_rope_theta", "300"),
        ("local_rope_theta", "300"),
        ("rope_parameters", "{\"full_attention\": {\"rope_theta\": 300}, \"rope_theta\": 300}"),
        ("rope_theta", "300"),
        ("rope_scaling", "{\"type\": \"linear\"}"),
        ("head_dim", "3"),
        ("auto_map", "{\"AutoModel\": \"code.OtherModel\"}"),
        ("n_embd", "64"),
        ("n_layer", "1"),
        ("n_head", "2"),
        ("n_inner", "24"),
        ("pad_vocab_size_multiple", "64"),
        ("n_positions", "300"),
        ("layer_norm_epsilon", "1e-6"),
        ("activation_function", "\"geglu\""),
        ("rotary_emb_base", "300"),
        ("rotary_emb_fraction", "0.5"),
        ("rotary_scaling_factor", "4"),
        ("max_trained_positions", "30"),
        ("qkv_proj_bias", "true"),
        ("mlp_fc1_bias", "true"),
        ("mlp_fc2_bias", "true"),
        ("feed_forward_type", "\"reglu\""),
    ];
    // Whose names are of rotary positions alone.
    const ROPE: &[(&str, &str)] = &[
        ("rope_theta", "300"),
        ("rope_type", "\"linear\""),
        ("type", "\"linear\""),
        ("factor", "\"two\""),
        ("full_attention", "{\"rope_theta\": 300}"),
        ("sliding_attention", "{\"rope_theta\": 300}"),
    ];
    const TOKENIZER: &[(&str, &str)] = &[
        ("tokenizer_class", "\"PreTrainedTokenizerFast\""),
        ("auto_map", "{\"AutoTokenizer\": [null, \"code.Tokenizer\"]}"),
        ("bos_token", "\"<s>\""),
        ("eos_token", "\"</s>\""),
        ("unk_token", "\"<unk>\""),
        ("sep_token", "\"</s>\""),
        ("pad_token", "\"<pad>\""),
        ("cls_token", "\"<s>\""),
        ("mask_token", "\"<mask>\""),
        ("additional_special_tokens", "[\"<e>\"]"),
        ("extra_special_tokens", "[\"<e>\"]"),
        ("model_specific_special_tokens", "{\"tool_token\": \"<tool>\"}"),
        ("added_tokens_decoder", "{\"0\": {\"content\": \"[PAD]\"}}"),
        ("truncation_side", "\"left\""),
        ("model_max_length", "7"),
        ("max_len", "\"long\""),
        ("do_lower_case", "false"),
        ("strip_accents", "false"),
        ("tokenize_chinese_chars", "false"),
        ("add_prefix_space", "true"),
        ("split_special_tokens", "true"),
        ("add_bos_token", "true"),
        ("add_eos_token", "true"),
        ("model_input_names", "[\"input_ids\", \"token_type_ids\"]"),
        ("padding_side", "\"up\""),
    ];
    // The folder of a family's fixture has the name of its graphs.
    let families =
        Family::all().map(|family| table(&family.definition().keys, family.definition().graph_name, "config.json", &[], CONFIG));
    let others = vec![
        table(&rope::KEYS, "new", "config.json", &["rope_scaling"], ROPE),
        table(&rope::LAYER_KEYS, "modernbert", "config.json", &["rope_parameters"], ROPE),
        table(
            &modules::MODULE_KEYS,
            "bert",
            "modules.json",
            &["1"],
            &[("type", "\"sentence_transformers.models.LSTM\""), ("path", "\"elsewhere\""), ("name", "\"0\"")],
        ),
        table(
            &modules::POOLING_KEYS,
            "bert",
            "1_Pooling/config.json",
            &[],
            &[
                ("pooling_mode", "\"lasttoken\""),
                ("pooling_mode_cls_token", "true"),
                ("pooling_mode_max_tokens", "true"),
                ("pooling_mode_mean_tokens", "3"),
                ("pooling_mode_mean_sqrt_len_tokens", "true"),
                ("pooling_mode_weightedmean_tokens", "true"),
                ("pooling_mode_lasttoken", "true"),
                ("include_prompt", "false"),
                ("embedding_dimension", "\"wide\""),
                ("word_embedding_dimension", "\"wide\""),
            ],
        ),
        table(&modules::NORMALIZE_KEYS, "bert", "2_Normalize/config.json", &[], &[]),
        table(&modules::DROPOUT_KEYS, "bert", "3_Dropout/config.json", &[], &[]),
        table(
            &sentence_transformers::KEYS,
            "bert",
            "config_sentence_transformers.json",
            &[],
            &[
                ("prompts", "{\"query\": \"q: \"}"),
                ("default_prompt_name", "\"document\""),
                ("truncate_dim", "8"),
                ("similarity_fn_name", "\"dot\""),
            ],
        ),
        table(
            &transformer_module::KEYS,
            "bert",
            st,
            &[],
            &[
                ("max_seq_length", "7"),
                ("do_lower_case", "true"),
                ("config_args", "{\"hidden_act\": \"relu\"}"),
                ("config_kwargs", "{\"hidden_act\": \"relu\"}"),
                ("tokenizer_args", "{\"do_lower_case\": false}"),
                ("processor_kwargs", "{\"do_lower_case\": false}"),
                ("model_args", "{\"load_in_8bit\": true}"),
                ("model_kwargs", "{\"load_in_8bit\": true}"),
                ("processing_kwargs", "{\"text\": {\"max_length\": 5}}"),
                ("modality_config", "{\"text\": {\"method\": \"get_text_features\"}}"),
            ],
        ),
        table(&transformer_module::MODEL_KEYS, "bert", st, &["model_args"], &[]),
        table(
            &transformer_module::PROCESSING_KEYS,
            "bert",
            st,
            &["processing_kwargs"],
            &[("text", "{\"max_length\": 5}"), ("common", "{\"add_special_tokens\": false}")],
        ),
        table(
            &transformer_module::TEXT_KEYS,
            "bert",
            st,
            &["processing_kwargs", "text"],
            &[("max_length", "5"), ("add_special_tokens", "false")],
        ),
        table(
            &transformer_module::MODALITY_KEYS,
            "bert",
            st,
            &["modality_config"],
            &[("text", "{\"method\": \"get_text_features\"}")],
        ),
        table(&transformer_module::TEXT_MODALITY_KEYS, "bert", st, &["modality_config", "text"], &[]),
        table(&tokenizer_keys::CONFIG_KEYS, "bert", "tokenizer_config.json", &[], TOKENIZER),
        table(&tokenizer_keys::MAP_KEYS, "bert", "special_tokens_map.json", &[], TOKENIZER),
        table(&tokenizer_keys::OVERRIDE_KEYS, "bert", st, &["tokenizer_args"], TOKENIZER),
        table(
            &dense::DENSE_KEYS,
            "bert",
            "4_Dense/config.json",
            &[],
            &[
                ("in_features", "8"),
                ("out_features", "8"),
                ("bias", "false"),
                ("activation_function", "\"torch.nn.modules.linear.Identity\""),
                ("use_residual", "true"),
            ],
        ),
        table(
            &adapter_config::KEYS,
            "bert",
            adapter_config::CONFIG_FILE,
            &[],
            &[
                ("r", "3"),
                ("lora_alpha", "16"),
                ("use_rslora", "true"),
                ("rank_pattern", "{\"query\": 3}"),
                ("alpha_pattern", "{\"query\": 9}"),
                ("target_modules", "[\"query\"]"),
                ("exclude_modules", "\".*query\""),
                ("layers_to_transform", "[1]"),
                ("layers_pattern", "\"layer\""),
                ("modules_to_save", "[\"LayerNorm\"]"),
                ("trainable_token_indices", "[1]"),
            ],
        ),
        table(
            &weights::INDEX_KEYS,
            "mpnet-bf16-shards",
            "model.safetensors.index.json",
            &[],
            &[("weight_map", "{\"a\": \"../b\"}")],
        ),
    ];
    families.chain(others).collect()
}

/// The tables in the order of the documentation.
fn documented() -> Vec<&'static Schema> {
    tables().into_iter().map(|table| table.schema).collect()
}

/// A copy of a base folder that also has a Dropout and a Dense module.
fn folder(base: &str) -> TempDir {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let folder = tempfile::tempdir().unwrap();
    copy(&fixtures.join(base), folder.path());
    let class = |name: &str| format!("sentence_transformers.models.{name}");
    let module = |place: usize, name: &str, path: &str| json!({"idx": place, "name": place.to_string(), "path": path, "type": class(name)});
    let list = json!([
        module(0, "Transformer", ""),
        module(1, "Pooling", "1_Pooling"),
        module(3, "Dropout", "3_Dropout"),
        module(4, "Dense", "4_Dense"),
        module(2, "Normalize", "2_Normalize"),
    ]);
    write(folder.path(), "modules.json", &list);
    let width = ModelFolder::open(fixtures.join(base)).unwrap().embedding_size();
    write(folder.path(), "4_Dense/config.json", &json!({"in_features": width, "out_features": 4}));
    let (weight, bias) = (vec![0_u8; 4 * 4 * width], [0_u8; 16]);
    let view = |shape, bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
    let tensors = [("linear.weight", view(vec![4, width], &weight)), ("linear.bias", view(vec![4], &bias))];
    std::fs::write(folder.path().join("4_Dense/model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    folder
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn write(folder: &Path, file: &str, value: &Value) {
    let path = folder.join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value.to_string()).unwrap();
}

/// What is read of the table's folder when these keys have these values: all of it in words, or the refusal. The path of the folder is left out.
fn read(table: &Table, keys: &[(&str, Value)]) -> Result<String, String> {
    let folder = folder(table.base);
    if table.file == adapter_config::CONFIG_FILE {
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters/plain"), folder.path());
    }
    let path = folder.path().join(table.file);
    let mut file: Value = std::fs::read(&path).map_or(json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    if table.file.starts_with("sentence_bert") && table.within.first() == Some(&"modality_config") {
        file["module_output_name"] = json!("token_embeddings");
        file["modality_config"] = json!({"text": {"method": "forward", "method_output_name": "last_hidden_state"}});
    }
    let mut object = &mut file;
    for step in table.within {
        object = match object {
            Value::Array(entries) => &mut entries[step.parse::<usize>().unwrap()],
            Value::Object(fields) => fields.entry(*step).or_insert_with(|| Value::Object(Map::new())),
            other => panic!("{step} within {other}"),
        };
    }
    for (key, value) in keys {
        object[*key] = value.clone();
    }
    write(folder.path(), table.file, &file);
    let place = folder.path().display().to_string();
    let opened = ModelFolder::open(folder.path()).and_then(|model| model.weights().map(|weights| (model, weights)));
    match opened {
        Ok((model, weights)) => {
            // What an adapter changes is in the weights alone.
            let query = weights.tensor("encoder.layer.0.attention.self.query.weight", &[40, 40]);
            let value = query.ok().map(|query| query.to_f32().iter().sum::<f32>());
            Ok(format!("{model:?} {value:?}").replace(&place, "FOLDER"))
        }
        Err(error) => Err(error.to_string().replace(&place, "FOLDER")),
    }
}

/// Values of every kind; a key that only takes some is refused with all others.
fn any_values() -> [Value; 6] {
    [json!(true), json!(3), json!(0.25), json!("surprise"), json!(["surprise"]), json!({"surprise": 1})]
}

fn check(table: &Table, key: &Key, plain: &str) {
    let place = format!("{} of {}", key.name, table.schema.title);
    match key.action {
        // All together, below.
        Action::Harmless => {}
        Action::Only(allowed) => {
            for value in allowed {
                let value: Value = serde_json::from_str(value).unwrap();
                assert_eq!(read(table, &[(key.name, value)]).as_deref(), Ok(plain), "{place}");
            }
            for value in any_values().into_iter().filter(|value| !allowed.contains(&value.to_string().as_str())) {
                let refusal = read(table, &[(key.name, value.clone())]).expect_err(&place);
                let told = refusal.contains(&format!("{} is {value}; {}", key.name, key.note)) && refusal.contains(table.file);
                assert!(told, "{place}: {refusal}");
            }
        }
        Action::Honoured => {
            let value = table.matters.iter().find(|(name, _)| *name == key.name);
            let (_, value) = value.unwrap_or_else(|| panic!("{place} is honoured; give a value that matters"));
            match read(table, &[(key.name, serde_json::from_str(value).unwrap())]) {
                Ok(read) => assert_ne!(read, plain, "{place} = {value} changes nothing"),
                Err(refusal) => assert!(refusal.contains("FOLDER"), "{place}: {refusal}"),
            }
        }
    }
}

/// Values of every kind, of all harmless keys at once: one reading a key and value would take minutes.
fn check_harmless(table: &Table, plain: &str) {
    let names: Vec<&str> = table.schema.keys().filter(|key| matches!(key.action, Action::Harmless)).map(|key| key.name).collect();
    for value in any_values() {
        let set = |names: &[&'static str]| names.iter().map(|name| (*name, value.clone())).collect::<Vec<_>>();
        if read(table, &set(&names)).as_deref() == Ok(plain) {
            continue;
        }
        for name in &names {
            let read = read(table, &set(&[name]));
            assert_eq!(read.as_deref(), Ok(plain), "{name} of {} is harmless, but {value} is not", table.schema.title);
        }
        panic!("{}: {value} of all harmless keys together is not", table.schema.title);
    }
}

#[test]
fn every_key_is_honoured_harmless_or_refused_as_its_table_says() {
    for table in tables() {
        let plain = read(&table, &[]).unwrap_or_else(|refusal| panic!("{}: {refusal}", table.schema.title));
        for key in table.schema.keys() {
            check(&table, key, &plain);
        }
        check_harmless(&table, &plain);
        let unheard_of = read(&table, &[("unheard_of", json!(1))]);
        match table.schema.unknown {
            Unknown::Refuse => assert!(unheard_of.unwrap_err().contains("unheard_of is 1"), "{}", table.schema.title),
            Unknown::Warn | Unknown::Ignore => assert_eq!(unheard_of.as_deref(), Ok(plain.as_str()), "{}", table.schema.title),
        }
    }
}

#[test]
fn a_table_names_a_key_once_and_every_value_that_matters_is_of_a_key() {
    for table in tables() {
        let mut names: Vec<&str> = table.schema.keys().map(|key| key.name).collect();
        names.sort_unstable();
        assert!(names.is_sorted_by(|a, b| a < b), "{}: {names:?}", table.schema.title);
    }
    let all: Vec<&str> = documented().into_iter().flat_map(|schema| schema.keys().map(|key| key.name)).collect();
    for (name, _) in tables().into_iter().flat_map(|table| table.matters) {
        assert!(all.contains(name), "{name}");
    }
}

/// The tables as `docs/model-folders.md` has them.
fn written() -> String {
    let mut text = String::new();
    for schema in documented() {
        let unknown = match schema.unknown {
            Unknown::Warn => "Other keys are not used, and named in a warning.",
            Unknown::Ignore => "Other keys are not read.",
            Unknown::Refuse => "Other keys are refused.",
        };
        text.push_str(&format!(
            "\n### {}\n\n{unknown}\n\n| key | what is done | why, or what it does |\n|---|---|---|\n",
            schema.title
        ));
        for key in schema.keys() {
            let done = match key.action {
                Action::Honoured => "honoured".to_owned(),
                Action::Harmless => "changes no vector".to_owned(),
                Action::Only([]) => "refused".to_owned(),
                Action::Only(values) => {
                    let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
                    format!("refused, except {}", values.join(", "))
                }
            };
            text.push_str(&format!("| `{}` | {done} | {} |\n", key.name, key.note));
        }
    }
    text
}

/// Run with `TRT_EMBED_WRITE_DOCS=1` to write the page's tables anew.
#[test]
fn the_documentation_has_these_tables() {
    const MARK: &str = "<!-- From here on written by the tests of src/model/keys_tests.rs (TRT_EMBED_WRITE_DOCS=1). -->\n";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/model-folders.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (head, tables) = page.split_once(MARK).expect("the mark of the tables");
    if std::env::var_os("TRT_EMBED_WRITE_DOCS").is_some() {
        std::fs::write(&path, format!("{head}{MARK}{}", written())).unwrap();
        return;
    }
    assert!(tables == written(), "docs/model-folders.md is out of date: run this test with TRT_EMBED_WRITE_DOCS=1");
}
