//! Model folders of any size with seeded weights, made of a fixture's tokenizer.
#![allow(dead_code)] // each test file uses a part

#[path = "../common/random.rs"]
mod random;

pub use random::Random;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::Path;
use tempfile::TempDir;

/// Nearly normal: the sum of 12 uniform values.
fn normal(random: &mut Random) -> f32 {
    (0..12).map(|_| (random.next() >> 40) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0
}

/// Sizes of a model.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub heads: usize,
    pub wide: usize,
    pub layers: usize,
}

/// Which family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Mpnet,
    Bert,
    ModernBert,
    /// The family of this fixture, whose tensors it has, in three layers.
    Like(&'static str),
}

/// A folder of such a model; its weights grow with `scale`, 1 being what training gives.
pub fn folder(kind: Kind, sizes: Sizes, seed: u64, scale: f32) -> TempDir {
    let name = match kind {
        Kind::Mpnet => "mpnet",
        Kind::Bert => "bert",
        Kind::ModernBert => "modernbert",
        Kind::Like(name) => return like(name, sizes, seed, scale),
    };
    let fixture = Path::new("tests/fixtures").join(name);
    let out = tempfile::tempdir().unwrap();
    copy(&fixture, out.path());
    let Sizes { hidden, heads, wide, layers } = sizes;
    let positions = POSITIONS;
    edit(out.path(), "config.json", |config| {
        config["hidden_size"] = hidden.into();
        config["num_attention_heads"] = heads.into();
        config["intermediate_size"] = wide.into();
        config["num_hidden_layers"] = layers.into();
        config["max_position_embeddings"] = positions.into();
        if kind == Kind::ModernBert {
            for bias in ["norm_bias", "attention_bias", "mlp_bias"] {
                config[bias] = false.into();
            }
        }
    });
    edit(out.path(), "1_Pooling/config.json", |pooling| pooling["word_embedding_dimension"] = hidden.into());
    edit(out.path(), "sentence_bert_config.json", |transformer| transformer["max_seq_length"] = 512.into());
    let config: Value = serde_json::from_slice(&std::fs::read(out.path().join("config.json")).unwrap()).unwrap();
    let vocabulary = config["vocab_size"].as_u64().unwrap() as usize;

    let mut tensors: Vec<(String, Vec<usize>, f32, f32)> = Vec::new(); // name, shape, mean, deviation
    let mut add =
        |name: String, shape: &[usize], mean: f32, deviation: f32| tensors.push((name, shape.to_vec(), mean, deviation));
    let words = if kind == Kind::ModernBert { "embeddings.tok_embeddings.weight" } else { "embeddings.word_embeddings.weight" };
    add(words.into(), &[vocabulary, hidden], 0.0, 0.5);
    if kind == Kind::ModernBert {
        for norm in ["embeddings.norm.weight", "final_norm.weight"] {
            add(norm.into(), &[hidden], 1.0, 0.1);
        }
        for layer in 0..layers {
            let name = |part: &str| format!("layers.{layer}.{part}.weight");
            let linears = [
                ("attn.Wqkv", 3 * hidden, hidden),
                ("attn.Wo", hidden, hidden),
                ("mlp.Wi", 2 * wide, hidden),
                ("mlp.Wo", hidden, wide),
            ];
            for (part, outputs, inputs) in linears {
                add(name(part), &[outputs, inputs], 0.0, scale / (inputs as f32).sqrt());
            }
            if layer > 0 {
                add(name("attn_norm"), &[hidden], 1.0, 0.1);
            }
            add(name("mlp_norm"), &[hidden], 1.0, 0.1);
        }
        write(out.path(), tensors, seed);
        return out;
    }
    add("embeddings.position_embeddings.weight".into(), &[positions, hidden], 0.0, 0.2);
    if kind == Kind::Bert {
        add("embeddings.token_type_embeddings.weight".into(), &[2, hidden], 0.0, 0.2);
    } else {
        add("encoder.relative_attention_bias.weight".into(), &[32, heads], 0.0, 1.0);
    }
    let mut norms = vec!["embeddings.LayerNorm".to_owned()];
    let mut linears = Vec::new();
    for layer in 0..layers {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let (attention, norm, output) = if kind == Kind::Mpnet {
            (["attention.attn.q", "attention.attn.k", "attention.attn.v"], "attention.LayerNorm", "attention.attn.o")
        } else {
            (
                ["attention.self.query", "attention.self.key", "attention.self.value"],
                "attention.output.LayerNorm",
                "attention.output.dense",
            )
        };
        linears.extend(attention.map(|part| (name(part), hidden, hidden)));
        linears.push((name(output), hidden, hidden));
        linears.push((name("intermediate.dense"), wide, hidden));
        linears.push((name("output.dense"), hidden, wide));
        norms.extend([name(norm), name("output.LayerNorm")]);
    }
    for (name, outputs, inputs) in linears {
        add(format!("{name}.weight"), &[outputs, inputs], 0.0, scale / (inputs as f32).sqrt());
        add(format!("{name}.bias"), &[outputs], 0.0, 0.1);
    }
    for name in norms {
        add(format!("{name}.weight"), &[hidden], 1.0, 0.1);
        add(format!("{name}.bias"), &[hidden], 0.0, 0.1);
    }
    write(out.path(), tensors, seed);
    out
}

/// Positions of models that have a table of them.
const POSITIONS: usize = 514;

/// A model of the family of fixture `name`: its tensors, made larger.
fn like(name: &str, Sizes { hidden, heads, wide, layers }: Sizes, seed: u64, scale: f32) -> TempDir {
    let fixture = Path::new("tests/fixtures").join(name);
    let out = tempfile::tempdir().unwrap();
    copy(&fixture, out.path());
    assert_eq!(layers, 3, "fixtures have three layers");
    let spellings = [
        ("hidden_size", "dim", hidden),
        ("num_attention_heads", "n_heads", heads),
        ("intermediate_size", "hidden_dim", wide),
        ("max_position_embeddings", "max_position_embeddings", POSITIONS),
    ];
    let mut old = [0; 4];
    edit(out.path(), "config.json", |config| {
        for ((key, other, value), old) in spellings.into_iter().zip(&mut old) {
            let key = if config.get(key).is_some() { key } else { other };
            *old = config[key].as_u64().unwrap() as usize;
            config[key] = value.into();
        }
        if config.get("head_dim").is_some() {
            config["head_dim"] = (hidden / heads).into();
        }
    });
    let [old_hidden, _, old_wide, old_positions] = old;
    edit(out.path(), "1_Pooling/config.json", |pooling| pooling["word_embedding_dimension"] = hidden.into());
    edit(out.path(), "sentence_bert_config.json", |transformer| transformer["max_seq_length"] = 512.into());
    let stored = std::fs::read(fixture.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&stored).unwrap();
    let mut tensors: Vec<_> = stored.tensors();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    let made = tensors.into_iter().map(|(name, tensor)| {
        let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        let table = has(&["embeddings.weight"]);
        let size = |(axis, &size): (usize, &usize)| match size {
            _ if table && axis == 0 => {
                if size == old_positions && has(&["position"]) {
                    POSITIONS
                } else {
                    size
                }
            }
            _ if has(&["qkv"]) && size == 3 * old_hidden => 3 * hidden,
            _ if has(&["Wi.", "gate"]) && size == 2 * old_wide => 2 * wide,
            _ if size == old_hidden => hidden,
            _ if size == old_wide => wide,
            // Of a language model's head.
            other => other,
        };
        let shape: Vec<usize> = tensor.shape().iter().enumerate().map(size).collect();
        let (mean, deviation) = match shape[..] {
            [_, inputs] if !table => (0.0, scale / (inputs as f32).sqrt()),
            [_, _] => (0.0, if has(&["word", "tok_"]) { 0.5 } else { 0.2 }),
            _ => (if name.ends_with("weight") { 1.0 } else { 0.0 }, 0.1),
        };
        (name, shape, mean, deviation)
    });
    write(out.path(), made.collect(), seed);
    out
}

/// Changes a JSON file of `folder`.
pub fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Of each tensor its name, shape, mean and deviation.
fn write(folder: &Path, tensors: Vec<(String, Vec<usize>, f32, f32)>, seed: u64) {
    let mut random = Random(seed);
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, mean, deviation)| {
            let count: usize = shape.iter().product();
            let values = (0..count).flat_map(|_| (mean + deviation * normal(&mut random)).to_le_bytes()).collect();
            (name, shape, values)
        })
        .collect();
    let views =
        bytes.iter().map(|(name, shape, bytes)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_name() != "model.safetensors" {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
