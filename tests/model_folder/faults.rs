//! Folders that do not open, and what is said about them.

use crate::tiny_model::{Folder, HIDDEN, bert, module, mpnet, old_modules, weights};
use crate::{assert_says, fault, open, with};
use serde_json::{Value, json};
use trt_embed::model::ModelFolder;

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
    // Weights that can run code, alone in a folder of either kind: in one file, or in shards.
    for pickle in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        for folder in [Folder::plain(), Folder::sentence_transformers()] {
            folder.remove("model.safetensors");
            folder.write(pickle, b"");
            let only = format!("only {pickle}, which is not read");
            assert_says(&fault(&folder), &["model.safetensors not found", &only, "convert", "safe_serialization=True"]);
        }
    }
}

#[test]
fn faults_of_config_json() {
    for (field, value, parts) in [
        ("model_type", json!("t5"), &["model_type \"t5\" is not supported", "bert, mpnet"][..]),
        ("model_type", json!(3), &["model_type is 3", "a string"]),
        ("model_type", Value::Null, &["model_type is absent", "bert, mpnet"]),
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
        ("layer_norm_eps", json!(1.5), &["layer_norm_eps is 1.5"]),
        ("layer_norm_eps", json!(-1e-12), &["layer_norm_eps is -1e-12"]),
        ("layer_norm_eps", json!("tiny"), &["layer_norm_eps is \"tiny\""]),
        ("pad_token_id", json!(10), &["pad_token_id is 10", "vocab_size only 10"]),
        ("hidden_act", json!("xielu"), &["hidden_act is \"xielu\"", "gelu_new"]),
        ("position_embedding_type", json!("relative_key"), &["position_embedding_type is \"relative_key\"", "absolute"]),
        ("is_decoder", json!(true), &["is_decoder is true"]),
    ] {
        let folder = Folder::plain();
        folder.json("config.json", &with(bert(), field, value));
        assert_says(&fault(&folder), parts);
    }
    for (field, value, parts) in [
        ("max_position_embeddings", json!(2), &["max_position_embeddings is 2", "start at 2"][..]),
        ("relative_attention_num_buckets", json!(2), &["relative_attention_num_buckets is 2"]),
    ] {
        let folder = Folder::plain();
        folder.json("config.json", &with(mpnet(), field, value));
        assert_says(&fault(&folder), parts);
    }
    for (text, parts) in [
        (&b"{\"model_type\": \"bert\""[..], &["not valid JSON"][..]),
        (b"", &["not valid JSON"]),
        (b"\xff\xfe{}", &["not UTF-8 (byte 1)"]),
        (b"\xef\xbb\xbf{}", &["byte order mark"]),
        (b"{\"model_type\": \"bert\", \"hidden_size\": 4, \"hidden_size\": 8}", &["\"hidden_size\" stands twice, as 4 and as 8"]),
        (b"[1, 2]", &["an object is expected", "[1,2]"]),
        (b"{\"model_type\": \"bert\", \"layer_norm_eps\": NaN}", &["layer_norm_eps is NaN; a number from 0 to 1"]),
        (b"{\"model_type\": \"bert\", \"hidden_size\": Infinity}", &["hidden_size is Infinity; a whole number"]),
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
        (json!(["x"]), &["an object is expected, not \"x\""]),
        (json!([{"path": ""}]), &["no \"type\""]),
        (
            json!([with(transformer(), "name", json!("0")), with(pooling(), "name", json!("0"))]),
            &["two modules have the name \"0\""],
        ),
        (json!([transformer()]), &["the modules are [Transformer]", "Transformer, Pooling"]),
        (json!([pooling(), transformer()]), &["[Pooling, Transformer]"]),
        (json!([transformer(), pooling(), normalize(), dense()]), &["[Transformer, Pooling, Normalize, Dense]"]),
        (json!([transformer(), pooling(), pooling()]), &["[Transformer, Pooling, Pooling]"]),
        (
            json!([transformer(), module("sentence_transformers.models.LSTM", "1_LSTM"), pooling()]),
            &["sentence_transformers.models.LSTM", "known: Transformer, Pooling, Dense, Dropout, Normalize"],
        ),
        (json!([module("custom_st.Transformer", ""), pooling()]), &["custom_st.Transformer", "own Python code", "known"]),
        (
            json!([module("sentence_transformers.models.Nothing", ""), pooling()]),
            &["sentence_transformers.models.Nothing", "no such module", "known"],
        ),
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

/// Each module of sentence-transformers that is not served, in both spellings, wherever it stands in the chain.
#[test]
fn modules_that_are_not_served_are_refused_by_name() {
    let dense = "sentence_transformers.sentence_transformer.modules";
    let sparse = "sentence_transformers.sparse_encoder.modules";
    let multi = "sentence_transformers.multi_vector_encoder.modules";
    for (package, file, name, parts) in [
        ("sentence_transformers.base.modules", "router", "Router", ["routes", "save the modules of one route"]),
        ("sentence_transformers.base.modules", "router", "Asym", ["routes", "save the modules of one route"]),
        (dense, "static_embedding", "StaticEmbedding", ["without an encoder", "give a model"]),
        (dense, "weighted_layer_pooling", "WeightedLayerPooling", ["every layer", "pools the last layer"]),
        (dense, "lstm", "LSTM", ["recurrent", "give a model"]),
        (dense, "cnn", "CNN", ["convolutions", "give a model"]),
        (dense, "layer_norm", "LayerNorm", ["norms behind the pooling", "give a model"]),
        (dense, "word_weights", "WordWeights", ["single words", "give a model"]),
        (dense, "word_embeddings", "WordEmbeddings", ["tokenizer", "give a model"]),
        (dense, "bow", "BoW", ["tokenizer", "give a model"]),
        (dense, "clip_model", "CLIPModel", ["images", "give a model"]),
        (sparse, "mlm_transformer", "MLMTransformer", ["sparse vectors", "give a model"]),
        (sparse, "splade_pooling", "SpladePooling", ["sparse vectors", "give a model"]),
        (sparse, "sparse_auto_encoder", "SparseAutoEncoder", ["sparse vectors", "give a model"]),
        (sparse, "sparse_static_embedding", "SparseStaticEmbedding", ["sparse vectors", "give a model"]),
        (multi, "multi_vector_mask", "MultiVectorMask", ["every token", "give a model"]),
        (multi, "token_pooling", "HierarchicalTokenPooling", ["every token", "give a model"]),
        (multi, "token_pooling", "LambdaTokenPooling", ["every token", "give a model"]),
        ("sentence_transformers.cross_encoder.modules", "logit_score", "LogitScore", ["pairs of texts", "give a model"]),
    ] {
        for class in [format!("sentence_transformers.models.{name}"), format!("{package}.{file}.{name}")] {
            for place in [0, 1, 2] {
                let mut modules = old_modules();
                modules.as_array_mut().unwrap().insert(place, module(&class, "other"));
                let folder = Folder::sentence_transformers();
                folder.json("modules.json", &modules);
                assert_says(
                    &fault(&folder),
                    &[&["modules.json", &format!("module {name} is not supported"), "known: Transformer"], &parts[..]].concat(),
                );
            }
        }
    }
}

#[test]
fn faults_of_pooling() {
    for (config, parts) in [
        (json!({"pooling_mode": "median"}), &["pooling_mode is \"median\"", "weightedmean"][..]),
        (json!({"pooling_mode": []}), &["pooling_mode is []"]),
        (json!({"pooling_mode_mean_tokens": "yes"}), &["pooling_mode_mean_tokens is \"yes\"", "true or false"]),
        (json!({"include_prompt": 1}), &["include_prompt is 1"]),
        (
            json!({"pooling_mode_mean_token": true}),
            &["pooling_mode_mean_token is true", "no such key is known", "pooling_mode_mean_tokens"],
        ),
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
        ("sentence_bert_config.json", json!({"max_seq_len": 9}), &["max_seq_len is 9", "no such key is known"]),
        ("sentence_bert_config.json", json!({"config_args": {"is_decoder": true}}), &["config_args.is_decoder is true"]),
        ("sentence_bert_config.json", json!({"config_args": {"model_type": "mpnet"}}), &["config_args.model_type is \"mpnet\""]),
        ("sentence_bert_config.json", json!({"model_args": {"variant": "fp16"}}), &["model_args.variant is \"fp16\""]),
        (
            "sentence_bert_config.json",
            json!({"model_kwargs": {"output_loading_info": 1}}),
            &["model_kwargs.output_loading_info is 1"],
        ),
        (
            "sentence_bert_config.json",
            json!({"processing_kwargs": {"text": {"truncation": false}}}),
            &["processing_kwargs.text.truncation is false"],
        ),
        ("sentence_bert_config.json", json!({"modality_config": {"image": {}}}), &["modality_config.image is {}"]),
        (
            "sentence_bert_config.json",
            json!({"modality_config": {"text": {"method": "forward"}}}),
            &["module_output_name is absent"],
        ),
        ("config_sentence_transformers.json", json!({"truncate_dim": 0}), &["truncate_dim is 0", "at least 1"]),
        ("config_sentence_transformers.json", json!({"model_type": "SparseEncoder"}), &["model_type is \"SparseEncoder\""]),
        (
            "config_sentence_transformers.json",
            json!({"similarity_fn_name": "maxsim"}),
            &["similarity_fn_name is \"maxsim\"", "cosine, dot"],
        ),
        ("config_sentence_transformers.json", json!({"default_prompt_name": "passage"}), &["default_prompt_name is \"passage\""]),
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
        ("activation_function", json!("torch.nn.modules.activation.PReLU"), &["PReLU", "known: Identity, Tanh", "Softplus"]),
        ("activation_function", json!("my_code.Tanh"), &["my_code.Tanh"]),
        ("use_residual", json!(true), &["residual.weight", "[3, 4]", "missing"]),
        ("bias", json!(false), &["\"linear.bias\"", "belongs to no such Dense module"]),
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
