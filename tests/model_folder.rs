//! Model folders: every layout that is read, every fault that is told, and no input that panics.

mod tiny_model;

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use tiny_model::{Folder, HIDDEN, bert, module, mpnet, old_modules, pooling, weights, weights_of};
use trt_embed::Error;
use trt_embed::model::{Activation, DenseActivation, EncoderConfig, Family, ModelFolder, Weights};
use trt_embed::pooling::PoolingMode;

fn open(folder: &Folder) -> ModelFolder {
    ModelFolder::open(folder.path()).unwrap()
}

/// The message for opening `folder`, weights included.
fn fault(folder: &Folder) -> String {
    let opened = ModelFolder::open(folder.path()).and_then(|folder| folder.weights().map(drop));
    opened.expect_err("this folder must not open").to_string()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

/// Sets `field` of the JSON object `value`.
fn with(mut value: Value, field: &str, to: Value) -> Value {
    value[field] = to;
    value
}

// ---- good folders ----

#[test]
fn published_layout() {
    let folder = Folder::sentence_transformers();
    folder.json(
        "config_sentence_transformers.json",
        &json!({"prompts": {"query": "query: ", "none": null}, "default_prompt_name": "query"}),
    );
    let model = open(&folder);
    assert_eq!(model.config.family, Family::Bert);
    assert_eq!(model.pooling.modes, [PoolingMode::Mean]);
    assert!(model.pooling.include_prompt && model.normalize && !model.do_lower_case);
    assert_eq!((model.max_seq_length, model.max_tokens(), model.embedding_size()), (Some(12), 12, HIDDEN));
    assert_eq!(model.prompts.default_name.as_deref(), Some("query"));
    assert_eq!(model.prompts.by_name["query"], "query: ");
    assert_eq!(model.prompts.by_name["none"], "");
    assert_eq!(model.tokenizer_path(), folder.join("tokenizer.json"));
    assert_eq!(model.weights().unwrap().size_in_bytes(), std::fs::metadata(folder.join("model.safetensors")).unwrap().len());
}

/// sentence-transformers 6 names modules by the classes' full paths, pools by name, and keeps the limit with the tokenizer.
#[test]
fn layout_of_version_6() {
    let folder = Folder::plain();
    let modules = json!([
        module("sentence_transformers.base.modules.transformer.Transformer", ""),
        module("sentence_transformers.sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
        module("sentence_transformers.base.modules.dense.Dense", "2_Dense"),
        module("sentence_transformers.base.modules.normalize.Normalize", "3_Normalize"),
    ]);
    folder.json("modules.json", &modules);
    folder.json("1_Pooling/config.json", &json!({"embedding_dimension": HIDDEN, "pooling_mode": "cls", "include_prompt": false}));
    folder.dense("2_Dense", HIDDEN, 3, "torch.nn.modules.activation.GELU");
    folder.json("3_Normalize/config.json", &json!({"module_input_name": "sentence_embedding"}));
    folder.json("sentence_bert_config.json", &json!({"transformer_task": "feature-extraction"}));
    folder.json("tokenizer_config.json", &json!({"model_max_length": 9}));
    let model = open(&folder);
    assert_eq!(model.pooling.modes, [PoolingMode::Cls]);
    assert!(!model.pooling.include_prompt && model.normalize);
    assert_eq!(model.dense[0].activation, DenseActivation::Gelu);
    assert_eq!((model.max_tokens(), model.embedding_size()), (9, 3));
}

#[test]
fn encoder_in_its_own_folder() {
    let folder = Folder::empty();
    let mut modules = old_modules();
    modules[0]["path"] = json!("./0_Transformer/");
    folder.json("modules.json", &modules);
    folder.json("0_Transformer/config.json", &mpnet());
    folder.write("0_Transformer/tokenizer.json", b"{}");
    folder.json("0_Transformer/sentence_bert_config.json", &json!({"max_seq_length": null, "do_lower_case": true}));
    folder.write("0_Transformer/model.safetensors", &weights(&[("mpnet.x", &[1], &[1.0])]));
    folder.json("1_Pooling/config.json", &pooling(&["lasttoken", "cls_token", "max_tokens"]));
    let model = open(&folder);
    assert_eq!(model.tokenizer_path(), folder.join("0_Transformer/tokenizer.json"));
    assert_eq!(model.pooling.modes, [PoolingMode::Cls, PoolingMode::Max, PoolingMode::LastToken]);
    assert_eq!(model.embedding_size(), 3 * HIDDEN);
    assert!(model.do_lower_case);
    // MPNet's positions start at 2.
    assert_eq!((model.max_seq_length, model.max_tokens()), (None, 14));
    assert!(model.weights().unwrap().contains("x"));
}

#[test]
fn plain_folder_pools_by_the_mean() {
    let folder = Folder::plain();
    // transformers' VERY_LARGE_INTEGER: no limit.
    folder.write("tokenizer_config.json", br#"{"model_max_length": 1000000000000000019884624838656}"#);
    let model = open(&folder);
    assert_eq!(model.pooling.modes, [PoolingMode::Mean]);
    assert!(model.pooling.include_prompt && !model.normalize && model.dense.is_empty());
    assert_eq!((model.max_seq_length, model.max_tokens()), (None, 16));
}

#[test]
fn dense_modules_in_a_row() {
    let folder = Folder::sentence_transformers();
    let mut modules = old_modules();
    let normalize = modules.as_array_mut().unwrap().pop().unwrap();
    for path in ["2_Dense", "3_Dense"] {
        modules.as_array_mut().unwrap().push(module("sentence_transformers.models.Dense", path));
    }
    modules.as_array_mut().unwrap().push(normalize);
    folder.json("modules.json", &modules);
    folder.dense("2_Dense", HIDDEN, 6, "torch.nn.modules.linear.Identity");
    folder.dense("3_Dense", 6, 2, "torch.nn.modules.activation.Tanh");
    let model = open(&folder);
    assert_eq!(model.dense.len(), 2);
    assert_eq!((model.dense[0].in_features, model.dense[0].out_features), (HIDDEN, 6));
    assert_eq!(model.dense[0].weight, [0.5; 6 * HIDDEN]);
    assert_eq!(model.dense[0].bias.as_deref(), Some(&[0.25; 6][..]));
    assert_eq!(model.dense[1].activation, DenseActivation::Tanh);
    assert_eq!(model.embedding_size(), 2);
}

#[test]
fn pooling_without_any_mode_field_is_the_mean() {
    let folder = Folder::sentence_transformers();
    folder.json("1_Pooling/config.json", &json!({"word_embedding_dimension": HIDDEN}));
    assert_eq!(open(&folder).pooling.modes, [PoolingMode::Mean]);
    folder.json("1_Pooling/config.json", &json!({"pooling_mode": ["cls", "mean"], "pooling_mode_max_tokens": true}));
    assert_eq!(open(&folder).pooling.modes, [PoolingMode::Cls, PoolingMode::Mean]);
}

#[test]
fn absent_fields_have_the_values_of_transformers() {
    let folder = Folder::empty();
    folder.json("config.json", &json!({"model_type": "mpnet", "max_position_embeddings": 514}));
    let config = EncoderConfig::read(&folder.join("config.json")).unwrap();
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.num_attention_heads), (768, 12, 12));
    assert_eq!((config.intermediate_size, config.vocab_size, config.pad_token_id), (3072, 30527, 1));
    assert_eq!((config.type_vocab_size, config.relative_attention_num_buckets), (0, 32));
    assert_eq!((config.layer_norm_eps, config.activation), (1e-12, Activation::Gelu));
    assert_eq!((config.max_tokens(), config.head_size()), (512, 64));

    folder.json("config.json", &json!({"model_type": "bert", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}));
    let config = EncoderConfig::read(&folder.join("config.json")).unwrap();
    assert_eq!((config.vocab_size, config.pad_token_id, config.type_vocab_size), (30522, 0, 2));
    assert_eq!((config.relative_attention_num_buckets, config.max_tokens()), (0, 512));
    assert_eq!((config.layer_norm_eps, config.activation), (1e-5, Activation::GeluTanh));
}

// ---- bad folders ----

#[test]
fn missing_files_are_named_with_the_next_step() {
    let missing = ModelFolder::open("/no/such/folder").unwrap_err().to_string();
    assert_says(&missing, &["model folder not found", "/no/such/folder", "config.json"]);
    let file = Folder::plain();
    let message = ModelFolder::open(file.join("config.json")).unwrap_err().to_string();
    assert_says(&message, &["it is a file"]);

    assert_says(&fault(&Folder::empty()), &["config.json not found"]);
    for (name, parts) in [
        ("config.json", &["config.json not found"][..]),
        ("tokenizer.json", &["tokenizer.json not found", "save_pretrained"]),
        ("1_Pooling/config.json", &["1_Pooling", "config.json not found"]),
        ("model.safetensors", &["model.safetensors not found", "index.json"]),
    ] {
        let folder = Folder::sentence_transformers();
        folder.remove(name);
        assert_says(&fault(&folder), parts);
    }
    let folder = Folder::plain();
    folder.remove("model.safetensors");
    folder.write("pytorch_model.bin", b"");
    assert_says(&fault(&folder), &["only pytorch_model.bin", "safe_serialization=True"]);
}

#[test]
fn faults_of_config_json() {
    for (field, value, parts) in [
        ("model_type", json!("t5"), &["model_type \"t5\" is not supported", "mpnet, bert"][..]),
        ("model_type", json!(3), &["model_type is 3", "a string"]),
        ("model_type", Value::Null, &["model_type is null", "mpnet, bert"]),
        ("hidden_size", json!(0), &["hidden_size is 0", "from 1 to 65536"]),
        ("hidden_size", json!(5), &["hidden_size is 5", "num_attention_heads (2)"]),
        ("hidden_size", json!(-4), &["hidden_size is -4"]),
        ("hidden_size", json!(4.5), &["hidden_size is 4.5"]),
        ("hidden_size", json!("4"), &["hidden_size is \"4\""]),
        ("num_attention_heads", json!(0), &["num_attention_heads is 0"]),
        ("num_hidden_layers", json!(1_u64 << 60), &["num_hidden_layers is 1152921504606846976"]),
        ("intermediate_size", json!(u64::MAX), &["intermediate_size is 18446744073709551615"]),
        ("vocab_size", json!(1e300), &["vocab_size is 1e+300"]),
        ("max_position_embeddings", json!([16]), &["max_position_embeddings is [16]"]),
        ("type_vocab_size", json!(0), &["type_vocab_size is 0"]),
        ("layer_norm_eps", json!(0.0), &["layer_norm_eps is 0.0"]),
        ("layer_norm_eps", json!(-1e-12), &["layer_norm_eps is -1e-12"]),
        ("layer_norm_eps", json!("tiny"), &["layer_norm_eps is \"tiny\""]),
        ("pad_token_id", json!(10), &["pad_token_id is 10", "vocab_size only 10"]),
        ("hidden_act", json!("swish"), &["hidden_act is \"swish\"", "gelu_new"]),
        ("position_embedding_type", json!("relative_key"), &["position_embedding_type is \"relative_key\"", "absolute"]),
        ("is_decoder", json!(true), &["is_decoder is true"]),
    ] {
        let folder = Folder::plain();
        folder.json("config.json", &with(bert(), field, value));
        assert_says(&fault(&folder), parts);
    }
    for (field, value, parts) in [
        ("pad_token_id", json!(0), &["pad_token_id is 0", "padding id 1"][..]),
        ("max_position_embeddings", json!(2), &["max_position_embeddings is 2", "start at 2"]),
        ("relative_attention_num_buckets", json!(2), &["relative_attention_num_buckets is 2"]),
    ] {
        let folder = Folder::plain();
        folder.json("config.json", &with(mpnet(), field, value));
        assert_says(&fault(&folder), parts);
    }
    for (text, parts) in [
        (&b"{\"model_type\": \"bert\""[..], &["not valid JSON"][..]),
        (b"", &["not valid JSON"]),
        (b"\xff\xfe{}", &["not valid JSON"]),
        (b"[1, 2]", &["an object is expected", "[1,2]"]),
        (b"{\"model_type\": \"bert\", \"layer_norm_eps\": NaN}", &["not valid JSON"]),
    ] {
        let folder = Folder::plain();
        folder.write("config.json", text);
        assert_says(&fault(&folder), &[parts, &["config.json"]].concat());
    }
}

#[test]
fn faults_of_modules_json() {
    let transformer = || module("sentence_transformers.models.Transformer", "");
    let pooling = || module("sentence_transformers.models.Pooling", "1_Pooling");
    let normalize = || module("sentence_transformers.models.Normalize", "2_Normalize");
    let dense = || module("sentence_transformers.models.Dense", "2_Dense");
    for (modules, parts) in [
        (json!({}), &["a list of modules"][..]),
        (json!([]), &["the modules are []"]),
        (json!(["x"]), &["\"x\"", "no \"type\""]),
        (json!([transformer()]), &["the modules are [Transformer]", "Transformer, Pooling"]),
        (json!([pooling(), transformer()]), &["[Pooling, Transformer]"]),
        (json!([transformer(), pooling(), normalize(), dense()]), &["[Transformer, Pooling, Normalize, Dense]"]),
        (json!([transformer(), pooling(), pooling()]), &["[Transformer, Pooling, Pooling]"]),
        (json!([transformer(), pooling(), normalize(), normalize()]), &["Normalize, Normalize"]),
        (
            json!([transformer(), module("sentence_transformers.models.LSTM", "1_LSTM"), pooling()]),
            &["sentence_transformers.models.LSTM", "known: Transformer, Pooling, Dense, Normalize"],
        ),
        (json!([module("custom_st.Transformer", ""), pooling()]), &["custom_st.Transformer", "known"]),
        (json!([transformer(), with(pooling(), "path", json!("../other"))]), &["../other", "inside"]),
        (json!([transformer(), with(pooling(), "path", json!("/etc"))]), &["/etc", "inside"]),
        (json!([transformer(), with(pooling(), "path", json!("a/../../b"))]), &["a/../../b", "inside"]),
        (json!([transformer(), with(pooling(), "path", json!("..\\b"))]), &["inside"]),
        (json!([transformer(), with(pooling(), "path", json!(7))]), &["path of module Pooling is 7"]),
    ] {
        let folder = Folder::sentence_transformers();
        folder.json("modules.json", &modules);
        assert_says(&fault(&folder), &[parts, &["modules.json"]].concat());
    }
}

#[test]
fn faults_of_pooling() {
    for (config, parts) in [
        (pooling(&[]), &["no pooling mode is true", "pooling_mode_mean_tokens"][..]),
        (
            with(pooling(&["cls_token"]), "word_embedding_dimension", json!(8)),
            &["word_embedding_dimension is 8", "hidden_size is 4"],
        ),
        (json!({"pooling_mode": "mean", "embedding_dimension": 5}), &["embedding_dimension is 5"]),
        (json!({"pooling_mode": "median"}), &["pooling_mode is \"median\"", "weightedmean"]),
        (json!({"pooling_mode": []}), &["pooling_mode is []"]),
        (json!({"pooling_mode": ["mean", "mean"]}), &["different modes"]),
        (json!({"pooling_mode": ["mean", "cls"]}), &["in the order cls, max, mean"]),
        (json!({"pooling_mode_mean_tokens": "yes"}), &["pooling_mode_mean_tokens is \"yes\"", "true or false"]),
        (json!({"include_prompt": 1}), &["include_prompt is 1"]),
    ] {
        let folder = Folder::sentence_transformers();
        folder.json("1_Pooling/config.json", &config);
        assert_says(&fault(&folder), parts);
    }
}

#[test]
fn faults_of_the_other_settings() {
    for (name, value, parts) in [
        ("sentence_bert_config.json", json!({"max_seq_length": 0}), &["max_seq_length is 0"][..]),
        ("sentence_bert_config.json", json!({"max_seq_length": -1}), &["max_seq_length is -1"]),
        ("sentence_bert_config.json", json!({"do_lower_case": "no"}), &["do_lower_case is \"no\""]),
        ("sentence_bert_config.json", json!({"transformer_task": "fill-mask"}), &["transformer_task is \"fill-mask\""]),
        ("tokenizer_config.json", json!({"model_max_length": "long"}), &["model_max_length is \"long\""]),
        ("config_sentence_transformers.json", json!({"default_prompt_name": "query"}), &["default_prompt_name is \"query\""]),
        (
            "config_sentence_transformers.json",
            json!({"prompts": {"a": "x", "b": "y"}, "default_prompt_name": "c"}),
            &["default_prompt_name is \"c\"", "a, b"],
        ),
        ("config_sentence_transformers.json", json!({"prompts": {"a": 1}}), &["prompt \"a\" is 1"]),
        ("config_sentence_transformers.json", json!({"prompts": ["a"]}), &["prompts is [\"a\"]"]),
        ("2_Normalize/config.json", json!({"module_input_name": "token_embeddings"}), &["module_input_name", "token_embeddings"]),
    ] {
        let folder = Folder::sentence_transformers();
        folder.json(name, &value);
        assert_says(&fault(&folder), &[parts, &[name]].concat());
    }
}

#[test]
fn faults_of_dense() {
    let good = json!({"in_features": HIDDEN, "out_features": 3, "bias": true});
    let folder = || {
        let folder = Folder::sentence_transformers();
        let mut modules = old_modules();
        modules[2] = module("sentence_transformers.models.Dense", "2_Dense");
        folder.json("modules.json", &modules);
        folder.dense("2_Dense", HIDDEN, 3, "torch.nn.modules.activation.Tanh");
        folder
    };
    for (field, value, parts) in [
        ("in_features", json!(7), &["in_features is 7", "gives 4 values"][..]),
        ("in_features", Value::Null, &["in_features is null"]),
        ("out_features", json!(0), &["out_features is 0"]),
        ("out_features", Value::Null, &["out_features is null"]),
        ("activation_function", json!("torch.nn.modules.activation.Mish"), &["Mish", "known: Identity, Tanh"]),
        ("activation_function", json!("my_code.Tanh"), &["my_code.Tanh"]),
        ("use_residual", json!(true), &["use_residual is true"]),
        ("module_output_name", json!("token_embeddings"), &["module_output_name"]),
    ] {
        let folder = folder();
        folder.json("2_Dense/config.json", &with(good.clone(), field, value));
        assert_says(&fault(&folder), parts);
    }
    let misshapen = folder();
    misshapen.json("2_Dense/config.json", &with(good.clone(), "out_features", json!(5)));
    assert_says(&fault(&misshapen), &["linear.weight", "[3, 4]", "[5, 4]"]);

    let without_bias = folder();
    without_bias.write("2_Dense/model.safetensors", &weights(&[("linear.weight", &[3, HIDDEN], &[0.5; 3 * HIDDEN])]));
    assert_says(&fault(&without_bias), &["linear.bias", "[3]", "missing"]);
    without_bias.json("2_Dense/config.json", &with(good, "bias", json!(false)));
    assert_eq!(open(&without_bias).dense[0].bias, None);

    let pickle = folder();
    pickle.remove("2_Dense/model.safetensors");
    pickle.write("2_Dense/pytorch_model.bin", b"");
    assert_says(&fault(&pickle), &["Dense", "pytorch_model.bin", "save the model again"]);
}

// ---- weights ----

fn only_weights(file: &[u8]) -> (Folder, Result<Weights, Error>) {
    let folder = Folder::empty();
    folder.write("model.safetensors", file);
    let weights = Weights::open(folder.path(), Family::Bert);
    (folder, weights)
}

#[test]
fn tensors_are_found_by_every_spelling() {
    let names = ["plain.weight", "bert.prefixed.weight", "bert.old.LayerNorm.gamma", "old.LayerNorm.beta"];
    let tensors: Vec<_> = names.iter().map(|name| (*name, &[1][..], &[1.5][..])).collect();
    let (_folder, weights) = only_weights(&weights(&tensors));
    let weights = weights.unwrap();
    for name in ["plain.weight", "prefixed.weight", "old.LayerNorm.weight", "old.LayerNorm.bias"] {
        assert!(weights.contains(name), "{name}");
        assert_eq!(&*weights.tensor(name, &[1]).unwrap().to_f32(), [1.5], "{name}");
    }
    assert!(!weights.contains("other.weight") && !weights.contains("plain.LayerNorm.weight"));
    let mut found: Vec<_> = weights.tensor_names().collect();
    found.sort_unstable();
    let mut names = names.to_vec();
    names.sort_unstable();
    assert_eq!(found, names);
    let message = weights.tensor("other.weight", &[2, 3]).unwrap_err().to_string();
    assert_says(&message, &["other.weight", "[2, 3]", "missing"]);
    let message = weights.tensor("prefixed.weight", &[2, 3]).unwrap_err().to_string();
    assert_says(&message, &["bert.prefixed.weight", "[1]", "[2, 3]"]);
}

#[test]
fn every_stored_type_gives_the_same_values() {
    // Exact in all three types, so equality is the right comparison.
    let values = [0.0_f32, -1.5, 2.0, 0.25, -0.0, 96.0];
    let full: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let half: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    let brain: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let ids = [0_u8; 8];
    let shape = &[2, 3][..];
    let file = weights_of([
        ("full", Dtype::F32, shape, &full[..]),
        ("half", Dtype::F16, shape, &half[..]),
        ("brain", Dtype::BF16, shape, &brain[..]),
        ("ids", Dtype::I64, &[1][..], &ids[..]),
        ("nothing", Dtype::F32, &[0, 3][..], &[][..]),
    ]);
    let (_folder, weights) = only_weights(&file);
    let weights = weights.unwrap();
    for name in ["full", "half", "brain"] {
        assert_eq!(&*weights.tensor(name, shape).unwrap().to_f32(), values, "{name}");
    }
    assert_eq!(weights.tensor("full", shape).unwrap().bytes(), full);
    assert_eq!(weights.tensor("half", shape).unwrap().dtype, Dtype::F16);
    assert!(weights.tensor("nothing", &[0, 3]).unwrap().to_f32().is_empty());
    let message = weights.tensor("ids", &[1]).unwrap_err().to_string();
    assert_says(&message, &["\"ids\"", "I64", "F32, F16 and BF16"]);
}

#[test]
fn unaligned_values_are_read_too() {
    // A header of odd length, which the format allows, puts the values off any alignment.
    let header = br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} "#;
    for padding in 0..4 {
        let mut file = ((header.len() + padding) as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.resize(file.len() + padding, b' ');
        file.extend([1.5_f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        let (_folder, weights) = only_weights(&file);
        assert_eq!(&*weights.unwrap().tensor("x", &[2]).unwrap().to_f32(), [1.5, -2.0]);
    }
}

#[test]
fn a_tensor_outlives_the_weights_and_the_file() {
    let (folder, weights) = only_weights(&weights(&[("a", &[1], &[0.5]), ("b", &[2], &[1.0, 2.0])]));
    let weights = weights.unwrap();
    let tensor = weights.tensor("b", &[2]).unwrap();
    drop(weights);
    drop(folder);
    assert_eq!(&*tensor.clone().to_f32(), [1.0, 2.0]);
}

#[test]
fn shards_are_one_set_of_weights() {
    let folder = Folder::empty();
    folder.write("model-00001-of-00002.safetensors", &weights(&[("a", &[1], &[1.0])]));
    folder.write("model-00002-of-00002.safetensors", &weights(&[("bert.b", &[1], &[2.0])]));
    let map = json!({"a": "model-00001-of-00002.safetensors", "bert.b": "model-00002-of-00002.safetensors"});
    folder.json("model.safetensors.index.json", &json!({"metadata": {"total_size": 8}, "weight_map": map}));
    let sharded = Weights::open(folder.path(), Family::Bert).unwrap();
    assert_eq!(&*sharded.tensor("a", &[1]).unwrap().to_f32(), [1.0]);
    assert_eq!(&*sharded.tensor("b", &[1]).unwrap().to_f32(), [2.0]);

    let fault = || Weights::open(folder.path(), Family::Bert).unwrap_err().to_string();
    let index = |map: Value| folder.json("model.safetensors.index.json", &json!({"weight_map": map}));
    index(with(map.clone(), "c", json!("model-00002-of-00002.safetensors")));
    assert_says(&fault(), &["model-00002-of-00002.safetensors", "holds tensor \"c\", which it does not"]);
    index(with(map.clone(), "a", json!("model-00002-of-00002.safetensors")));
    assert_says(&fault(), &["holds tensor \"a\", which it does not"]);
    index(with(map.clone(), "c", json!("model-00003-of-00003.safetensors")));
    assert_says(&fault(), &["shard model-00003-of-00003.safetensors not found", "fetch the model again"]);
    for outside in ["../model.safetensors", "/etc/passwd", "", ".", "..", "a\\b"] {
        index(with(map.clone(), "c", json!(outside)));
        assert_says(&fault(), &["weight_map gives", "for \"c\"", "in this folder"]);
    }
    index(with(map.clone(), "c", json!(3)));
    assert_says(&fault(), &["weight_map gives 3"]);
    index(json!({}));
    assert_says(&fault(), &["weight_map is {}"]);
    folder.write("model.safetensors.index.json", b"{}");
    assert_says(&fault(), &["weight_map is absent"]);

    folder.write("model-00002-of-00002.safetensors", &weights(&[("bert.b", &[1], &[2.0]), ("a", &[1], &[3.0])]));
    index(map);
    assert_says(&fault(), &["tensor \"a\" is in", "model-00001-of-00002.safetensors too"]);
}

/// A file with `header` and `data` bytes of tensors.
fn file_with(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

#[test]
fn damaged_weight_files_are_told_with_their_sizes() {
    let good = weights(&[("a", &[2], &[1.0, 2.0])]);
    let longer = [&good[..], &[0]].concat();
    let mut huge_header = good.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let max = u64::MAX;
    let size = good.len().to_string();
    for (file, parts) in [
        (Vec::new(), &["it has 0 bytes"][..]),
        (b"PK\x03\x04".to_vec(), &["it has 4 bytes"]),
        (good[..good.len() - 1].to_vec(), &["describes 8 bytes of tensors, the file holds 7"]),
        (longer, &["describes 8 bytes of tensors, the file holds 9"]),
        (good[..20].to_vec(), &["the header should have", "the file has 20"]),
        (huge_header, &["should have 18446744073709551615 bytes", &size]),
        (file_with("not json", 0), &["header: "]),
        (file_with(&entry("F32", "[1]", "[0,4]"), 0), &["describes 4 bytes of tensors, the file holds 0"]),
        (file_with(&entry("F99", "[1]", "[0,4]"), 4), &["header: ", "F99"]),
        (file_with(&entry("F32", "[1]", "[4,8]"), 8), &["header: ", "offset"]),
        (file_with(&entry("F32", "[1]", "[4,0]"), 8), &["header: "]),
        (file_with(&entry("F32", "[2]", "[0,4]"), 4), &["header: "]),
        (file_with(&entry("F32", "[-1]", "[0,4]"), 4), &["header: "]),
        (file_with(&entry("U8", &format!("[{max}]"), &format!("[0,{max}]")), 4), &["header: ", "overflow"]),
        (
            file_with(&entry("U8", &format!("[{}]", 1_u64 << 60), &format!("[0,{}]", 1_u64 << 60)), 4),
            &["describes 1152921504606846976 bytes"],
        ),
        (file_with(&entry("F32", &format!("[{max},{max}]"), "[0,4]"), 4), &["header: ", "overflow"]),
    ] {
        let (_folder, weights) = only_weights(&file);
        assert_says(&weights.unwrap_err().to_string(), &[parts, &["model.safetensors", "fetch it again"]].concat());
    }
}

// ---- no input panics ----

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
        prop_assert!(Weights::open(folder.path(), Family::MpNet).is_err());
    }
}
