//! A model folder small enough to make in milliseconds: a one-layer BERT with seeded weights and a letter tokenizer.

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};
use std::path::Path;

pub const HIDDEN: usize = 8;
pub const MAX_TOKENS: usize = 24;
const INNER: usize = 16;

/// Whole words of the vocabulary: one token each. Other words fall into letters.
pub const WORDS: [&str; 12] = ["the", "cat", "dog", "sat", "ran", "on", "mat", "stocks", "fell", "query", "red", "blue"];

/// Writes the folder: sentence-transformers layout, mean pooling, Normalize, a prompt named `query` that reads "query: ".
pub fn write(folder: &Path) {
    std::fs::create_dir_all(folder.join("1_Pooling")).unwrap();
    let put = |name: &str, value: &Value| std::fs::write(folder.join(name), value.to_string()).unwrap();
    let vocabulary = vocabulary();
    put(
        "config.json",
        &json!({
            "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": INNER,
            "vocab_size": vocabulary.len(), "max_position_embeddings": 32, "layer_norm_eps": 1e-12, "pad_token_id": 0,
            "hidden_act": "gelu", "type_vocab_size": 2,
        }),
    );
    let module = |idx: usize, path: &str, name: &str| json!({ "idx": idx, "name": idx.to_string(), "path": path, "type": format!("sentence_transformers.models.{name}") });
    put(
        "modules.json",
        &json!([module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling"), module(2, "2_Normalize", "Normalize")]),
    );
    put("sentence_bert_config.json", &json!({ "max_seq_length": MAX_TOKENS, "do_lower_case": false }));
    put("config_sentence_transformers.json", &json!({ "prompts": { "query": "query: " }, "default_prompt_name": null }));
    put(
        "1_Pooling/config.json",
        &json!({
            "word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true,
            "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false,
        }),
    );
    put("tokenizer.json", &tokenizer(&vocabulary));
    weights(&folder.join("model.safetensors"), vocabulary.len());
}

fn vocabulary() -> Vec<String> {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ":", ".", ","].map(String::from);
    let letters = ('a'..='z').chain('0'..='9').flat_map(|c| [c.to_string(), format!("##{c}")]);
    special.into_iter().chain(WORDS.map(String::from)).chain(letters).collect()
}

fn tokenizer(vocabulary: &[String]) -> Value {
    let special = |id: usize| json!({ "id": id, "content": vocabulary[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    let ids: Map<String, Value> = vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let template = |name: &str, id: usize| json!({ "id": name, "ids": [id], "tokens": [name] });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0), special(1), special(2), special(3)],
        "normalizer": { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "[CLS]", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": "[SEP]", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "[CLS]": template("[CLS]", 2), "[SEP]": template("[SEP]", 3) },
        },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": ids },
    })
}

fn weights(path: &Path, vocab: usize) {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![vocab, HIDDEN]),
        ("embeddings.position_embeddings.weight".into(), vec![32, HIDDEN]),
        ("embeddings.token_type_embeddings.weight".into(), vec![2, HIDDEN]),
        ("embeddings.LayerNorm.weight".into(), vec![HIDDEN]),
        ("embeddings.LayerNorm.bias".into(), vec![HIDDEN]),
    ];
    for (name, out, input) in [
        ("attention.self.query", HIDDEN, HIDDEN),
        ("attention.self.key", HIDDEN, HIDDEN),
        ("attention.self.value", HIDDEN, HIDDEN),
        ("attention.output.dense", HIDDEN, HIDDEN),
        ("intermediate.dense", INNER, HIDDEN),
        ("output.dense", HIDDEN, INNER),
    ] {
        shapes.push((format!("encoder.layer.0.{name}.weight"), vec![out, input]));
        shapes.push((format!("encoder.layer.0.{name}.bias"), vec![out]));
    }
    for name in ["attention.output", "output"] {
        shapes.push((format!("encoder.layer.0.{name}.LayerNorm.weight"), vec![HIDDEN]));
        shapes.push((format!("encoder.layer.0.{name}.LayerNorm.bias"), vec![HIDDEN]));
    }
    // A linear congruential generator (Knuth's MMIX constants): any spread of values will do.
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).flat_map(|_| next().to_le_bytes()).collect();
            (name, shape, values)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, values)| (name, TensorView::new(Dtype::F32, shape.clone(), values).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}
