//! What each family's configuration and tensors can have wrong: every trap of a look-alike or a spelling, told by name.

use super::{Folder, assert_says};
use crate::common::{copy_folder, fixtures};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use trt_embed::Result;
use trt_embed::model::architecture::{Reach, RotaryScaling, ScoreBias};
use trt_embed::model::{Activation, Architecture, ModelFolder};

/// Fixtures of all families and forms, by their folders.
const FIXTURES: [&str; 13] = [
    "bert",
    "mpnet",
    "xlm-roberta",
    "roberta",
    "camembert",
    "distilbert",
    "modernbert",
    "nomic_bert",
    "gte",
    "new",
    "jina_bert",
    "jina_bert_later",
    "bert-fp16-plain",
];

/// A copy of the fixture `base` with these fields in its config.json; null takes a field out.
fn folder(base: &str, changes: Value) -> Folder {
    let folder = Folder::empty();
    copy_folder(&fixtures().join(base), folder.path());
    let mut config: Map<String, Value> = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.remove(field)),
            value => drop(config.insert(field.clone(), value.clone())),
        }
    }
    folder.json("config.json", &Value::Object(config));
    folder
}

fn architecture(folder: &Folder) -> Result<Architecture> {
    ModelFolder::open(folder.path())?.architecture()
}

fn read(base: &str, changes: Value) -> Architecture {
    architecture(&folder(base, changes.clone())).unwrap_or_else(|error| panic!("{base} with {changes}: {error}"))
}

/// The authors' configuration of the fixture `nomic_bert`, with `changes`.
fn nomic(changes: Value) -> Value {
    let mut config = json!({
        "activation_function": "swiglu", "layer_norm_epsilon": 1e-12, "mlp_fc1_bias": false, "mlp_fc2_bias": false, "n_embd": 32, "n_head": 4,
        "n_inner": 48, "n_layer": 3, "n_positions": 96, "qkv_proj_bias": false, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
        "hidden_size": null, "num_attention_heads": null, "intermediate_size": null, "num_hidden_layers": null, "layer_norm_eps": null,
        "max_position_embeddings": null, "hidden_act": null, "rope_parameters": null, "head_dim": null,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn variants_that_are_not_served_are_refused_by_field_and_value() {
    for (base, changes, parts) in [
        // Look-alikes of another family's model_type.
        (
            "xlm-roberta",
            json!({"auto_map": {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"}}),
            &["auto_map", "xlm-roberta-flash-implementation", "code of its own"][..],
        ),
        ("xlm-roberta", json!({"model_type": "jina_embeddings_v3"}), &["model_type \"jina_embeddings_v3\"", "xlm-roberta"]),
        ("bert", json!({"position_embedding_type": "alibi"}), &["position_embedding_type is \"alibi\"", "absolute"]),
        (
            "roberta",
            json!({"position_embedding_type": "relative_key"}),
            &["position_embedding_type is \"relative_key\"", "absolute"],
        ),
        (
            "jina_bert",
            json!({"position_embedding_type": "absolute"}),
            &["position_embedding_type is \"absolute\"", "alibi", "JinaBERT"],
        ),
        ("jina_bert", json!({"position_embedding_type": null}), &["position_embedding_type is absent", "alibi"]),
        ("jina_bert", json!({"feed_forward_type": "original"}), &["feed_forward_type is \"original\"", "geglu and reglu"]),
        ("jina_bert", json!({"feed_forward_type": null}), &["feed_forward_type is absent"]),
        (
            "jina_bert",
            json!({"auto_map": {"AutoConfig": "evil--code.JinaBertConfig", "AutoModel": "evil--code.Other"}}),
            &["auto_map", "evil--code.Other", "JinaBertModel"],
        ),
        ("nomic_bert", json!({"num_experts": 8, "moe_every_n_layers": 2}), &["is", "experts", "v2-moe"]),
        (
            "nomic_bert",
            json!({"auto_map": {"AutoModel": "a--b.GteModel"}}),
            &["AutoModel is \"a--b.GteModel\"", "NomicBertModel"],
        ),
        ("nomic_bert", nomic(json!({"prenorm": true})), &["prenorm is true", "behind each part"]),
        ("nomic_bert", nomic(json!({"use_rms_norm": true})), &["use_rms_norm is true", "LayerNorm"]),
        ("nomic_bert", nomic(json!({"causal": true})), &["causal is true"]),
        ("nomic_bert", nomic(json!({"rotary_emb_interleaved": true})), &["rotary_emb_interleaved is true", "halves"]),
        ("nomic_bert", nomic(json!({"rotary_emb_scale_base": 512})), &["rotary_emb_scale_base is 512", "xPos"]),
        ("nomic_bert", nomic(json!({"activation_function": "gelu"})), &["activation_function is \"gelu\"", "swiglu and geglu"]),
        ("nomic_bert", nomic(json!({"rotary_emb_fraction": 0.0})), &["no value of a head is turned"]),
        ("nomic_bert", nomic(json!({"rotary_emb_fraction": 0.4})), &["3 values of a head", "even"]),
        ("new", json!({"logn_attention_scale": true}), &["logn_attention_scale is true", "length of the text"]),
        ("new", json!({"logn_attention_clip1": true}), &["logn_attention_clip1 is true"]),
        ("new", json!({"layer_norm_type": "rms_norm"}), &["layer_norm_type is \"rms_norm\""]),
        ("new", json!({"pack_qkv": false}), &["pack_qkv is false", "packed"]),
        ("new", json!({"position_embedding_type": "absolute"}), &["position_embedding_type is \"absolute\"", "rope"]),
        (
            "new",
            json!({"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.3}}),
            &["rope_scaling.mixed_b is 0.3", "mixed"],
        ),
        ("new", json!({"rope_scaling": {"type": "linear", "factor": 8.0}}), &["rope_scaling.type is \"linear\"", "ntk"]),
        ("new", json!({"auto_map": {"AutoConfig": "x--y.OtherConfig"}}), &["OtherConfig", "NewConfig"]),
        (
            "gte",
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
            &["rope_parameters.rope_type is \"yarn\"", "dynamic"],
        ),
        ("modernbert", json!({"rope_scaling": {"type": "linear", "factor": 2}}), &["rope_scaling", "default"]),
        (
            "modernbert",
            json!({"global_rope_theta": null, "local_rope_theta": null,
            "rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}),
            &["rope_parameters.full_attention.rope_type is \"yarn\""],
        ),
        ("xlm-roberta", json!({"quantization_config": {"bits": 4}}), &["quantization_config", "quantised"]),
        ("distilbert", json!({"pruned_heads": {"1": [0]}}), &["pruned_heads"]),
    ] {
        let error = architecture(&folder(base, changes.clone())).expect_err(&format!("{base} with {changes}")).to_string();
        assert_says(&error, &[parts, &["config.json"]].concat());
    }
}

#[test]
fn values_that_cannot_be_are_refused_by_field_and_value() {
    for (base, changes, parts) in [
        (
            "xlm-roberta",
            json!({"max_position_embeddings": 2}),
            &["max_position_embeddings is 2", "start at 2", "pad_token_id"][..],
        ),
        ("camembert", json!({"max_position_embeddings": 5}), &["max_position_embeddings is 5", "start at 5"]),
        ("roberta", json!({"pad_token_id": 100_000}), &["pad_token_id is 100000", "vocab_size"]),
        ("distilbert", json!({"hidden_size": 64}), &["dim is 32", "hidden_size", "is 64"]),
        ("distilbert", json!({"n_heads": 5}), &["dim is 32", "n_heads (5)"]),
        ("distilbert", json!({"activation": "xielu"}), &["activation is \"xielu\""]),
        ("modernbert", json!({"global_attn_every_n_layers": 0}), &["global_attn_every_n_layers is 0"]),
        ("modernbert", json!({"layer_types": ["full_attention"]}), &["layer_types is", "a list of 3 layers"]),
        (
            "modernbert",
            json!({"layer_types": ["full_attention", "chunked", "full_attention"]}),
            &["layer_types has \"chunked\"", "sliding_attention"],
        ),
        ("modernbert", json!({"sliding_window": 3}), &["sliding_window is 3", "local_attention, which is 16"]),
        ("modernbert", json!({"local_attention": -1}), &["local_attention is -1"]),
        ("modernbert", json!({"head_dim": 16}), &["head_dim is 16", "8 wide"]),
        ("modernbert", json!({"local_rope_theta": 0.5}), &["local_rope_theta is 0.5", "from 1"]),
        ("modernbert", json!({"norm_bias": "no"}), &["norm_bias is \"no\"", "true or false"]),
        ("modernbert", json!({"rope_parameters": {"rope_theta": 3.0}}), &["rope_parameters.rope_theta is 3.0", "full_attention"]),
        ("gte", json!({"rope_theta": -1}), &["rope_theta is -1"]),
        ("gte", json!({"rope_parameters": {"rope_type": "dynamic"}}), &["rope_parameters.factor is absent", "at least 1"]),
        ("gte", json!({"rope_parameters": {"factor": 4.0}}), &["rope_parameters.factor is 4.0", "rope_type"]),
        ("gte", json!({"num_attention_heads": 32}), &["1 values of a head", "even"]),
        ("gte", json!({"type_vocab_size": -1}), &["type_vocab_size is -1"]),
        ("nomic_bert", nomic(json!({"rotary_emb_base": null})), &["rotary_emb_base is absent", "beside n_embd"]),
        ("nomic_bert", nomic(json!({"rotary_emb_fraction": null})), &["rotary_emb_fraction is absent", "beside n_embd"]),
        ("nomic_bert", nomic(json!({"qkv_proj_bias": null})), &["qkv_proj_bias is absent", "beside n_embd"]),
        ("nomic_bert", json!({"rotary_emb_base": 10_000}), &["rotary_emb_base is 10000", "n_embd"]),
    ] {
        let error = architecture(&folder(base, changes.clone())).expect_err(&format!("{base} with {changes}")).to_string();
        assert_says(&error, &[parts, &["config.json"]].concat());
    }
}

#[test]
fn settings_in_both_spellings_must_agree() {
    let rope = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
    for (base, changes, parts) in [
        (
            "modernbert",
            json!({"rope_parameters": {"full_attention": rope(5.0)}}),
            &["full_attention.rope_theta is 5.0", "global_rope_theta"][..],
        ),
        (
            "modernbert",
            json!({"rope_parameters": {"sliding_attention": rope(5.0)}}),
            &["sliding_attention.rope_theta is 5.0", "local_rope_theta"],
        ),
        ("gte", json!({"rope_theta": 5.0}), &["rope_parameters.rope_theta is 160000.0", "is 5"]),
        ("gte", json!({"rope_scaling": rope(5.0)}), &["rope_parameters is", "rope_scaling, another name of it"]),
        (
            "gte",
            json!({"rope_parameters": {"rope_type": "default", "type": "dynamic"}}),
            &["rope_type is \"default\"", "type, another name of it"],
        ),
        ("nomic_bert", nomic(json!({"hidden_size": 64})), &["hidden_size is 64", "n_embd, another name of it, is 32"]),
        ("nomic_bert", nomic(json!({"rope_parameters": rope(5.0)})), &["rope_parameters is", "rotary_emb_base (1000)"]),
        ("nomic_bert", nomic(json!({"hidden_act": "gelu"})), &["activation_function is \"swiglu\"", "hidden_act"]),
    ] {
        let error = architecture(&folder(base, changes.clone())).expect_err(&format!("{base} with {changes}")).to_string();
        assert_says(&error, &[parts, &["give", "config.json"]].concat());
    }
    // Where they do, both may stand.
    let both = json!({"rope_parameters": {"full_attention": rope(160_000.0), "sliding_attention": rope(10_000.0)}});
    assert_eq!(
        format!("{:?}", read("modernbert", both).layers[1].attention.rotary),
        format!("{:?}", read("modernbert", json!({})).layers[1].attention.rotary)
    );
    read("nomic_bert", nomic(json!({"rope_parameters": rope(1000.0), "hidden_size": 32, "hidden_act": "silu"})));
    assert_eq!(read("distilbert", json!({"hidden_size": 32})).hidden_size, 32);
    assert_eq!(read("distilbert", json!({"dim": null, "hidden_size": 32})).hidden_size, 32);
}

#[test]
fn the_longest_text_is_what_positions_leave() {
    // Without max_seq_length, and with one that is above the positions: sentence-transformers fails beyond the last row (its issue 3879).
    for (base, longest) in [("xlm-roberta", 96), ("roberta", 128), ("camembert", 95), ("distilbert", 96), ("jina_bert", 100)] {
        for limit in [Value::Null, json!(400)] {
            let folder = folder(base, json!({}));
            folder.json("sentence_bert_config.json", &json!({"max_seq_length": limit}));
            let model = ModelFolder::open(folder.path()).unwrap();
            assert_eq!((model.max_tokens(), model.architecture().unwrap().max_tokens), (longest, longest), "{base} with {limit}");
        }
    }
}

/// Rotary positions have no last row: sentence-transformers cuts at the limit that its own file gives, and bounds only the tokenizer's
/// by `max_position_embeddings`.
#[test]
fn the_longest_text_of_rotary_positions_is_what_the_folder_asks_for() {
    for (base, positions) in [("modernbert", 120), ("nomic_bert", 96), ("gte", 100), ("new", 100)] {
        let longest = |sentence_bert: Value, tokenizer: Value| {
            let folder = folder(base, json!({}));
            folder.json("sentence_bert_config.json", &sentence_bert);
            let config: Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer_config.json")).unwrap()).unwrap();
            folder.json("tokenizer_config.json", &super::with(config, "model_max_length", tokenizer));
            let model = ModelFolder::open(folder.path()).map_err(|error| error.to_string())?;
            assert_eq!(model.architecture().unwrap().max_tokens, model.config.max_tokens(), "{base}");
            Ok::<_, String>((model.max_tokens(), model.config.max_tokens()))
        };
        assert_eq!(longest(json!({"max_seq_length": 400}), json!(30)), Ok((400, 400)), "{base}");
        assert_eq!(longest(json!({"max_seq_length": 40}), json!(400)), Ok((40, positions)), "{base}");
        assert_eq!(longest(json!({"processor_kwargs": {"model_max_length": 300}}), json!(30)), Ok((300, 300)), "{base}");
        let call = json!({"max_seq_length": 40, "processing_kwargs": {"text": {"max_length": 200}}});
        assert_eq!(longest(call, json!(30)), Ok((200, 200)), "{base}");
        assert_eq!(longest(json!({}), json!(400)), Ok((positions, positions)), "{base}");
        let refusal = longest(json!({"max_seq_length": 2_000_000}), json!(30)).unwrap_err();
        assert_says(&refusal, &["max_seq_length", "2000000", "1048576", "give a lower one"]);
    }
}

#[test]
fn windows_and_bases_are_those_of_each_layer() {
    let layers = |changes: Value| -> Vec<(Reach, f64)> {
        let layers = read("modernbert", changes).layers;
        layers.iter().map(|layer| (layer.attention.reach, layer.attention.rotary.as_ref().unwrap().base)).collect()
    };
    // Half of local_attention to each side, not all of it.
    let (global, local) = ((Reach::All, 160_000.0), (Reach::Window(8), 10_000.0));
    assert_eq!(layers(json!({})), [global, local, local]);
    assert_eq!(layers(json!({"global_attn_every_n_layers": 2})), [global, local, global]);
    assert_eq!(layers(json!({"global_attn_every_n_layers": null})), [global, local, local]);
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    assert_eq!(layers(json!({"layer_types": types})), [local, global, local]);
    assert_eq!(layers(json!({"local_attention": null}))[1].0, Reach::Window(64));
    assert_eq!(layers(json!({"local_attention": null, "sliding_window": 5}))[1].0, Reach::Window(5));
    assert_eq!(layers(json!({"global_rope_theta": null, "local_rope_theta": null})), [global, local, local]);
    // A base that is null, not absent, is the global one (transformers 38967).
    let null = folder("modernbert", json!({"global_rope_theta": 500}));
    let config: Value = serde_json::from_slice(&std::fs::read(null.join("config.json")).unwrap()).unwrap();
    null.json("config.json", &super::with(config, "local_rope_theta", Value::Null));
    let bases: Vec<f64> =
        architecture(&null).unwrap().layers.iter().map(|layer| layer.attention.rotary.as_ref().unwrap().base).collect();
    assert_eq!(bases, [500.0; 3]);
    // Only the first layer is without a norm.
    let norms: Vec<bool> = read("modernbert", json!({})).layers.iter().map(|layer| layer.attention_norm.is_some()).collect();
    assert_eq!(norms, [false, true, true]);
}

#[test]
fn scaling_is_read_as_it_is_spelled() {
    let of = |base: &str, changes: Value| read(base, changes).layers[0].attention.rotary.clone().unwrap();
    let dynamic = of("nomic_bert", nomic(json!({"rotary_scaling_factor": 2, "max_trained_positions": 64})));
    assert_eq!((dynamic.base, dynamic.scaling), (1000.0, RotaryScaling::DynamicNtk { factor: 2.0, trained: 64 }));
    let trained = of("nomic_bert", nomic(json!({"rotary_scaling_factor": 2})));
    assert_eq!(trained.scaling, RotaryScaling::DynamicNtk { factor: 2.0, trained: 2048 });
    assert_eq!(of("nomic_bert", nomic(json!({"rotary_emb_fraction": 0.5}))).size, 4);
    let ntk = of("new", json!({"rope_theta": 20_000, "rope_scaling": {"type": "ntk", "factor": 8.0}}));
    assert_eq!((ntk.base, ntk.scaling), (20_000.0, RotaryScaling::Ntk { factor: 8.0 }));
    // Defaults: NomicBERT v1 has 1000, not 10000 (vllm 52675); GTE's differ by who wrote the configuration.
    assert_eq!(of("nomic_bert", json!({"rope_parameters": null})).base, 1000.0);
    assert_eq!(of("gte", json!({"rope_parameters": null})).base, 160_000.0);
    assert_eq!(of("new", json!({"rope_theta": null})).base, 10_000.0);
}

#[test]
fn jina_bert_is_told_from_bert_by_its_code_alone() {
    let is_jina = |changes: Value| matches!(read("jina_bert", changes).score_bias, ScoreBias::Alibi(_));
    let (code, class) =
        (json!({"AutoConfig": "jinaai/jina-bert-implementation--configuration_bert.JinaBertConfig"}), json!(["JinaBertModel"]));
    for (path, map, classes) in [
        (json!("jinaai/jina-bert-implementation"), Value::Null, Value::Null),
        (json!("here"), code, Value::Null),
        (json!("here"), json!({"AutoConfig": "configuration_bert.JinaBertConfig"}), Value::Null),
        (json!("here"), Value::Null, class),
    ] {
        assert!(is_jina(json!({"_name_or_path": path, "auto_map": map, "architectures": classes})));
    }
    // Without any of these it is BERT with tensors that BERT has not: refused, not run with weights at random (mteb 1060).
    let lost = json!({"_name_or_path": "here", "auto_map": null, "architectures": null});
    let error = architecture(&folder("jina_bert", lost.clone())).unwrap_err().to_string();
    assert_says(&error, &["position_embedding_type is \"alibi\"", "absolute"]);
    let lost = super::with(lost, "position_embedding_type", Value::Null);
    let error = architecture(&folder("jina_bert", lost)).unwrap_err().to_string();
    assert_says(&error, &["gated_layers", "the gated feed-forward part of JinaBERT"]);
    // The activation is feed_forward_type's, whatever hidden_act says.
    let relu = read("jina_bert", json!({"feed_forward_type": "reglu", "hidden_act": "gelu"}));
    assert_eq!(relu.layers[0].feed_forward.activation, Activation::Relu);
}

#[test]
fn each_tensor_of_each_layout_is_needed_and_has_its_shape() {
    for base in FIXTURES {
        let path = fixtures().join(base).join("model.safetensors");
        let stored = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&stored).unwrap();
        let folder = folder(base, json!({}));
        let mut unused = BTreeSet::new();
        for (lost, view) in tensors.tensors() {
            let others = tensors.iter().filter(|(name, _)| *name != lost);
            folder.write("model.safetensors", &safetensors::serialize(others, None).unwrap());
            let bare =
                ["roberta.", "model.", "new.", "bert."].iter().find_map(|prefix| lost.strip_prefix(prefix)).unwrap_or(&lost);
            match architecture(&folder) {
                Ok(_) => drop(unused.insert(bare.to_owned())),
                Err(error) => {
                    assert_says(&error.to_string(), &[bare, "missing"]);
                    // A row more than it should have.
                    let shape: Vec<usize> =
                        view.shape().iter().enumerate().map(|(axis, &n)| if axis == 0 { n + 1 } else { n }).collect();
                    let bytes = vec![0; view.data().len() / view.shape()[0] * shape[0]];
                    let wrong = TensorView::new(view.dtype(), shape.clone(), &bytes).unwrap();
                    let all = tensors.iter().filter(|(name, _)| *name != lost).chain([(lost.as_str(), wrong)]);
                    folder.write("model.safetensors", &safetensors::serialize(all, None).unwrap());
                    assert_says(&architecture(&folder).unwrap_err().to_string(), &[bare, &format!("{shape:?}")]);
                }
            }
        }
        let expected: &[&str] = match base {
            "bert" | "bert-fp16-plain" => &["cls.predictions.bias", "embeddings.position_ids"],
            "xlm-roberta" => &["lm_head.bias"],
            "modernbert" => &["decoder.bias"],
            // A type table that its configuration does not name, beside a head.
            "new" => &["embeddings.token_type_embeddings.weight", "lm_head.bias"],
            _ => &[],
        };
        let surplus: Vec<&str> = unused.iter().map(String::as_str).filter(|name| !expected.contains(name)).collect();
        assert!(surplus.is_empty() && unused.len() <= expected.len(), "{base}: {surplus:?} are not needed");
    }
}

#[test]
fn a_vocabulary_of_another_size_than_the_table_is_told() {
    for (base, table) in [("xlm-roberta", "word_embeddings"), ("modernbert", "tok_embeddings"), ("nomic_bert", "word_embeddings")]
    {
        let error = architecture(&folder(base, json!({"vocab_size": 600}))).unwrap_err().to_string();
        assert_says(&error, &[table, "600"]);
    }
    // NomicBERT's table is padded to a multiple.
    assert_eq!(read("nomic_bert", nomic(json!({"vocab_size": 205, "pad_vocab_size_multiple": 64}))).vocab_size, 256);
}

#[test]
fn buffers_among_the_weights_are_left_unused() {
    // Frequencies, as old checkpoints store them.
    let folder = folder("nomic_bert", json!({}));
    let stored = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&stored).unwrap();
    let buffer = TensorView::new(safetensors::Dtype::F32, vec![4], &[0; 16]).unwrap();
    let name = "encoder.layers.0.attn.rotary_emb.inv_freq";
    folder.write("model.safetensors", &safetensors::serialize(tensors.iter().chain([(name, buffer)]), None).unwrap());
    architecture(&folder).unwrap();
}
