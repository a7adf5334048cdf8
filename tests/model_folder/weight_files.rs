//! Weight files: names, types, shards and damage.

use crate::tiny_model::{Folder, weights, weights_of};
use crate::{assert_says, family, file_with, only_weights, with};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};
use trt_embed::model::{Family, Weights};

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
    let double: Vec<u8> = [0.1_f64, -1.5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = &[2, 3][..];
    let file = weights_of([
        ("full", Dtype::F32, shape, &full[..]),
        ("half", Dtype::F16, shape, &half[..]),
        ("brain", Dtype::BF16, shape, &brain[..]),
        ("ids", Dtype::I64, &[1][..], &ids[..]),
        ("bytes", Dtype::U8, &[1][..], &ids[..1]),
        ("eight", Dtype::F8_E4M3, &[1][..], &ids[..1]),
        ("signed", Dtype::I8, &[1][..], &ids[..1]),
        ("flags", Dtype::BOOL, &[1][..], &ids[..1]),
        ("double", Dtype::F64, &[2][..], &double[..]),
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
    for (name, found) in [("ids", "I64"), ("bytes", "U8"), ("eight", "F8_E4M3"), ("signed", "I8"), ("flags", "BOOL")] {
        let message = weights.tensor(name, &[1]).unwrap_err().to_string();
        assert_says(&message, &[&format!("\"{name}\""), found, "F32, F16, BF16 and F64"]);
    }
    // As torch narrows it: to the nearest f32.
    assert_eq!(&*weights.tensor("double", &[2]).unwrap().to_f32(), [0.1_f32, -1.5]);
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
    let sharded = Weights::open(folder.path(), family("bert")).unwrap();
    assert_eq!(&*sharded.tensor("a", &[1]).unwrap().to_f32(), [1.0]);
    assert_eq!(&*sharded.tensor("b", &[1]).unwrap().to_f32(), [2.0]);

    let fault = || Weights::open(folder.path(), family("bert")).unwrap_err().to_string();
    let index = |map: Value| folder.json("model.safetensors.index.json", &json!({"weight_map": map}));
    // What the shards hold counts, as it does to transformers: a tensor that they do not have is missed where it is needed.
    let other = json!("model-00002-of-00002.safetensors");
    index(with(map.clone(), "c", other.clone()));
    let absent = Weights::open(folder.path(), family("bert")).unwrap();
    assert_eq!(&*absent.tensor("a", &[1]).unwrap().to_f32(), [1.0]);
    assert!(!absent.contains("c"));
    assert_says(&absent.tensor("c", &[1]).unwrap_err().to_string(), &["tensor \"c\"", "is missing"]);
    index(with(with(map.clone(), "a", other.clone()), "c", map["a"].clone()));
    assert_eq!(&*Weights::open(folder.path(), family("bert")).unwrap().tensor("a", &[1]).unwrap().to_f32(), [1.0]);
    // A shard that the index does not name is not looked into.
    index(with(map.clone(), "a", other));
    assert!(!Weights::open(folder.path(), family("bert")).unwrap().contains("a"));
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

#[test]
fn damaged_weight_files_are_told_with_their_sizes() {
    let good = weights(&[("a", &[2], &[1.0, 2.0])]);
    let longer = [&good[..], &[0]].concat();
    let mut huge_header = good.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, place: &str, second: &str, other: &str| {
        let entry = |name: &str, place: &str| format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":{place}}}"#);
        format!("{{{},{}}}", entry(first, place), entry(second, other))
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
        // Two tensors over each other, a hole between two, one name twice.
        (file_with(&two("a", "[0,4]", "b", "[2,6]"), 6), &["header: ", "offset"]),
        (file_with(&two("a", "[0,4]", "b", "[0,4]"), 4), &["header: ", "offset"]),
        (file_with(&two("a", "[0,4]", "b", "[8,12]"), 12), &["header: ", "offset"]),
        (file_with(&two("a", "[0,4]", "a", "[4,8]"), 8), &["header: ", "\"a\" stands twice"]),
    ] {
        let (_folder, weights) = only_weights(&file);
        assert_says(&weights.unwrap_err().to_string(), &[parts, &["model.safetensors", "fetch it again"]].concat());
    }
}

#[test]
fn of_several_spellings_the_one_that_transformers_takes_is_read() {
    // transformers 5.24 sorts the stored names and keeps the first of those that spell one tensor.
    let query = "encoder.layer.0.attention.self.query.weight";
    let norm = "encoder.layer.0.output.LayerNorm.weight";
    let old = "encoder.layer.0.output.LayerNorm.gamma";
    let read = |kind: Family, name: &str, stored: &[(&str, f32)]| {
        let folder = Folder::empty();
        let values: Vec<[f32; 1]> = stored.iter().map(|(_, value)| [*value]).collect();
        let tensors: Vec<_> = stored.iter().zip(&values).map(|((name, _), value)| (*name, &[1][..], &value[..])).collect();
        folder.write("model.safetensors", &weights(&tensors));
        Weights::open(folder.path(), kind).unwrap().tensor(name, &[1]).unwrap().to_f32()[0]
    };
    let (bert, mpnet) = (|name: &str| format!("bert.{name}"), |name: &str| format!("mpnet.{name}"));
    assert_eq!(read(family("bert"), query, &[(query, 1.0), (&bert(query), 2.0)]), 2.0);
    assert_eq!(read(family("bert"), query, &[(query, 1.0), (&mpnet(query), 2.0)]), 1.0, "another family's prefix");
    assert_eq!(read(family("mpnet"), query, &[(query, 1.0), (&mpnet(query), 2.0)]), 1.0);
    for kind in Family::all() {
        assert_eq!(read(kind, norm, &[(norm, 1.0), (old, 3.0)]), 3.0, "{kind:?}");
    }
    assert_eq!(read(family("bert"), norm, &[(norm, 1.0), (&bert(old), 3.0)]), 3.0);
    assert_eq!(read(family("bert"), norm, &[(&bert(norm), 1.0), (old, 3.0)]), 1.0);
    assert_eq!(read(family("mpnet"), norm, &[(norm, 1.0), (&mpnet(old), 3.0)]), 1.0);
    assert_eq!(read(family("mpnet"), norm, &[(&mpnet(norm), 1.0), (old, 3.0)]), 3.0);
}

#[test]
fn tensors_of_another_model_are_refused_and_others_are_left_unused() {
    let open = |name: &str| only_weights(&weights(&[("embeddings.LayerNorm.weight", &[1], &[1.0]), (name, &[1], &[1.0])])).1;
    for (name, sign) in [
        ("encoder.layer.0.attention.self.distance_embedding.weight", "positions relative to each other"),
        ("bert.encoder.layer.11.attention.self.distance_embedding.weight", "positions relative to each other"),
        ("encoder.layer.0.mlp.gated_layers.weight", "JinaBERT"),
        ("encoder.layer.0.attention.self.layer_norm_q.weight", "normalised queries"),
        ("encoder.layer.0.attention.self.query.weight_scale", "quantised weights"),
        ("encoder.layer.0.attention.self.query.SCB", "quantised weights"),
        ("encoder.layer.0.attention.self.query.qweight", "quantised weights"),
        ("encoder.layer.0.attention.self.query.lora_A.default.weight", "an adapter that was not merged"),
        ("encoder.layer.0.attention.self.query.base_layer.weight", "an adapter that was not merged"),
        ("encoder.layer.0.attention.self.rotary_emb.inv_freq", "rotary positions"),
        ("encoder.layer.0.output.adapters.x.adapter_up.weight", "bottleneck adapters"),
        ("embeddings.word_embeddings.parametrizations.weight.original0", "computed from others"),
    ] {
        assert_says(&open(name).unwrap_err().to_string(), &[name, sign, "only plain BERT, MPNet,"]);
    }
    // transformers drops these too, with a warning; heads it drops without one.
    for name in [
        "encoder.layer.7.attention.self.query.weight",
        "encoder.layer.0.crossattention.self.query.weight",
        "encoder.layer.0.attention.self.query.unheard_of",
        "embeddings.position_ids",
        "pooler.dense.weight",
        "cls.predictions.bias",
        "distance_embedding.weight",
    ] {
        assert!(open(name).is_ok(), "{name}");
    }
}

#[test]
fn what_wrote_the_file_does_not_matter() {
    // transformers 5 reads them all alike.
    for metadata in
        ["", r#""__metadata__":{"format":"tf"},"#, r#""__metadata__":{"format":"mlx"},"#, r#""__metadata__":{"a":"b"},"#]
    {
        let header = format!(r#"{{{metadata}"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let (_folder, weights) = only_weights(&file_with(&header, 4));
        assert_eq!(&*weights.unwrap().tensor("a", &[1]).unwrap().to_f32(), [0.0], "{metadata}");
    }
}

#[test]
fn pointers_and_links_in_the_place_of_weights_are_told() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n";
    let (_folder, opened) = only_weights(pointer);
    assert_says(
        &opened.unwrap_err().to_string(),
        &["model.safetensors is a Git LFS pointer to a file of 90868376 bytes", "git lfs pull", "hub id"],
    );
    // An index beside a link to nothing is not read in its place.
    #[cfg(unix)]
    for linked in ["model.safetensors", "model.safetensors.index.json", "m-1.safetensors"] {
        let folder = Folder::empty();
        folder.json("model.safetensors.index.json", &json!({"weight_map": {"a": "m-1.safetensors"}}));
        folder.write("m-1.safetensors", &weights(&[("a", &[1], &[1.0])]));
        let _ = std::fs::remove_file(folder.join(linked));
        std::os::unix::fs::symlink("../blobs/gone", folder.join(linked)).unwrap();
        let message = Weights::open(folder.path(), family("bert")).unwrap_err().to_string();
        assert_says(&message, &[linked, "is a link to ../blobs/gone", "fetch the model again"]);
    }
}
