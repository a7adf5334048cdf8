//! Folders that open, and what is read from them.

use crate::tiny_model::{Folder, HIDDEN, module, mpnet, old_modules, pooling, weights};
use crate::{assert_says, family, fault, open, with};
use serde_json::json;
use trt_embed::model::{Activation, DenseActivation, EncoderConfig, Residual};
use trt_embed::pooling::PoolingMode;

#[test]
fn published_layout() {
    let folder = Folder::sentence_transformers();
    folder.json(
        "config_sentence_transformers.json",
        &json!({"prompts": {"query": "query: ", "none": null}, "default_prompt_name": "query"}),
    );
    let model = open(&folder);
    assert_eq!(model.config.family, family("bert"));
    assert_eq!(model.pooling.modes, [PoolingMode::Mean]);
    assert!(model.pooling.include_prompt && model.normalize && !model.do_lower_case);
    assert_eq!((model.max_seq_length, model.max_tokens(), model.embedding_size()), (Some(12), 12, HIDDEN));
    assert_eq!(model.prompts.default_name.as_deref(), Some("query"));
    assert_eq!(model.prompts.by_name["query"], "query: ");
    assert_eq!(model.prompts.by_name["none"], "");
    assert_eq!(model.cut(HIDDEN), None);
    folder.json("config_sentence_transformers.json", &json!({"truncate_dim": 3}));
    assert_eq!((open(&folder).cut(HIDDEN), open(&folder).cut(2)), (Some(3), Some(2)), "a cut above the width keeps all");
    assert_eq!(model.tokenizer.vocabulary_path(), folder.join("tokenizer.json"));
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

/// The module names that sentence-transformers 5.4 gave to what was `models.NAME` before; the reference reads both.
#[test]
fn served_modules_in_every_spelling() {
    for (old, new) in [
        ("Transformer", "base.modules.transformer.Transformer"),
        ("Transformer", "sentence_transformer.modules.transformer.Transformer"),
        ("Pooling", "sentence_transformer.modules.pooling.Pooling"),
        ("Dense", "base.modules.dense.Dense"),
        ("Dense", "sentence_transformer.modules.dense.Dense"),
        ("Dropout", "sentence_transformer.modules.dropout.Dropout"),
        ("Normalize", "base.modules.normalize.Normalize"),
        ("Normalize", "sentence_transformer.modules.normalize.Normalize"),
    ] {
        let mut modules = old_modules();
        let list = modules.as_array_mut().unwrap();
        list.insert(2, module("sentence_transformers.models.Dropout", "3_Dropout"));
        list.insert(3, module("sentence_transformers.models.Dense", "4_Dense"));
        let found = list.iter_mut().find(|module| module["type"] == format!("sentence_transformers.models.{old}")).unwrap();
        found["type"] = json!(format!("sentence_transformers.{new}"));
        let folder = Folder::sentence_transformers();
        folder.json("modules.json", &modules);
        folder.json("3_Dropout/config.json", &json!({"dropout": 0.2}));
        folder.dense("4_Dense", HIDDEN, 3, "torch.nn.modules.activation.Tanh");
        let model = open(&folder);
        assert_eq!((model.embedding_size(), model.dense.len(), model.normalize), (3, 1, true), "{new}");
    }
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
    assert_eq!(model.tokenizer.vocabulary_path(), folder.join("0_Transformer/tokenizer.json"));
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
    assert_eq!((config.layer_norm_eps, config.activation), (1e-12, Activation::Gelu));
    assert_eq!((config.max_tokens(), config.head_size()), (512, 64));

    folder.json("config.json", &json!({"model_type": "bert", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}));
    let config = EncoderConfig::read(&folder.join("config.json")).unwrap();
    assert_eq!((config.vocab_size, config.pad_token_id, config.max_tokens()), (30522, 0, 512));
    assert_eq!((config.layer_norm_eps, config.activation), (1e-5, Activation::GeluTanh));
}

#[test]
fn a_dense_module_may_add_its_input_and_take_any_known_activation() {
    let folder = |outputs: usize, activation: &str| {
        let folder = Folder::sentence_transformers();
        let mut modules = old_modules();
        modules[2] = module("sentence_transformers.models.Dense", "2_Dense");
        folder.json("modules.json", &modules);
        folder.dense("2_Dense", HIDDEN, outputs, &format!("torch.nn.modules.activation.{activation}"));
        let config = json!({"in_features": HIDDEN, "out_features": outputs, "use_residual": true});
        folder.json("2_Dense/config.json", &with(config, "activation_function", json!(format!("torch.nn.{activation}"))));
        folder
    };
    for activation in DenseActivation::ALL {
        let model = open(&folder(HIDDEN, activation.class()));
        assert_eq!((model.dense[0].activation, &model.dense[0].residual), (activation, &Residual::Input));
    }
    let projected = folder(2, "SiLU");
    assert_says(&fault(&projected), &["residual.weight", "[2, 4]", "missing"]);
    let (weight, matrix) = ([0.5; 2 * HIDDEN], [0.125; 2 * HIDDEN]);
    let tensors: [(&str, &[usize], &[f32]); 3] =
        [("linear.weight", &[2, HIDDEN], &weight), ("linear.bias", &[2], &[0.0; 2]), ("residual.weight", &[2, HIDDEN], &matrix)];
    projected.write("2_Dense/model.safetensors", &weights(&tensors));
    assert_eq!(open(&projected).dense[0].residual, Residual::Projected(matrix.to_vec()));
}
