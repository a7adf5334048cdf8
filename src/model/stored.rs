//! Names of stored tensors: which belong to the encoder, under which spellings, and which tell that the model is another one.

use crate::model::Family;
use crate::model::adapter_config::ModuleKind;
use crate::notice::warn_once;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// Parts of names that only other models have, and which. transformers drops such tensors with a warning and computes without them.
const OTHER_MODELS: [(&str, &str); 27] = [
    ("distance_embedding", "positions relative to each other, which BERT no longer has in transformers 5"),
    ("gated_layers", "the gated feed-forward part of JinaBERT"),
    ("up_gated_layer", "the gated feed-forward part of JinaBERT"),
    ("layernorm_qk", "normalised queries and keys, as some JinaBERT have"),
    ("layer_norm_q", "normalised queries and keys, as some JinaBERT have"),
    ("layer_norm_k", "normalised queries and keys, as some JinaBERT have"),
    ("q_norm", "normalised queries and keys"),
    ("k_norm", "normalised queries and keys"),
    ("rotary_emb", "rotary positions"),
    ("adapters", "bottleneck adapters"),
    ("lora_A", "an adapter that was not merged"),
    ("lora_B", "an adapter that was not merged"),
    ("lora_embedding_A", "an adapter that was not merged"),
    ("lora_embedding_B", "an adapter that was not merged"),
    ("base_layer", "an adapter that was not merged"),
    ("token_adapter", "an adapter that was not merged"),
    ("ia3_l", "an adapter that was not merged"),
    ("parametrizations", "weights that are computed from others (torch parametrizations)"),
    ("weight_orig", "weights that are computed from others (torch pruning)"),
    ("weight_scale", "quantised weights"),
    ("weight_scale_inv", "quantised weights"),
    ("weight_zero_point", "quantised weights"),
    ("weight_packed", "quantised weights"),
    ("qweight", "quantised weights"),
    ("SCB", "quantised weights"),
    ("absmax", "quantised weights"),
    ("input_scale", "quantised weights"),
];

/// Spellings of an encoder's tensor in a checkpoint, in the order of their names: `name`, `PREFIX.name`, and for a LayerNorm the
/// `gamma` and `beta` of old checkpoints. Of several that are stored transformers takes the first in this order, and so BERT's
/// `bert.X` before `X`, MPNet's `X` before `mpnet.X`, and `gamma` before `weight`.
pub(super) fn spellings(name: &str, family: Family) -> Vec<String> {
    let old = name
        .strip_suffix("LayerNorm.weight")
        .map(|stem| format!("{stem}LayerNorm.gamma"))
        .or_else(|| name.strip_suffix("LayerNorm.bias").map(|stem| format!("{stem}LayerNorm.beta")));
    let mut all: Vec<String> = [Some(name.to_owned()), old].into_iter().flatten().collect();
    let prefixed = |prefix: &&str| all.iter().map(|name| format!("{prefix}.{name}")).collect::<Vec<_>>();
    let prefixed: Vec<String> = family.definition().tensor_prefixes.iter().flat_map(prefixed).collect();
    all.extend(prefixed);
    all.sort_unstable();
    all
}

/// The encoder's tensor that `stored` spells; `None` for one of a head.
pub(super) fn encoder_tensor(stored: &str, family: Family) -> Option<String> {
    encoder_part(without_prefix(stored, family), family)
}

/// `stored` without the family's prefix, where it has one.
pub(super) fn without_prefix(stored: &str, family: Family) -> &str {
    let without = |prefix: &&str| stored.strip_prefix(prefix)?.strip_prefix('.');
    family.definition().tensor_prefixes.iter().find_map(without).unwrap_or(stored)
}

/// `name`, which has no prefix, as transformers 5 spells it; `None` for a tensor of a head.
pub(super) fn encoder_part(name: &str, family: Family) -> Option<String> {
    if !family.definition().modules.roots.iter().any(|root| name.starts_with(root)) {
        return None;
    }
    let new = |old: &str, new: &str| name.strip_suffix(old).map(|stem| format!("{stem}{new}"));
    Some(
        new("LayerNorm.gamma", "LayerNorm.weight").or_else(|| new("LayerNorm.beta", "LayerNorm.bias")).unwrap_or(name.to_owned()),
    )
}

/// Whether the family's encoder of `layers` layers has the tensor `name`.
pub(super) fn is_of_encoder(name: &str, family: Family, layers: usize) -> bool {
    let Some((module, part)) = name.rsplit_once('.') else { return false };
    match family.definition().modules.kind(module, layers) {
        Some(ModuleKind::Embedding) => part == "weight",
        Some(ModuleKind::Linear | ModuleKind::Norm) => part == "weight" || part == "bias",
        None => false,
    }
}

/// Holds the names of all stored tensors against the encoder of `layers` layers: warns of what is left unused, as transformers does.
///
/// # Errors
/// [`Error::OtherModel`] for a tensor that only another model has.
pub(super) fn check_names<'a>(names: impl Iterator<Item = &'a str>, family: Family, layers: usize, folder: &Path) -> Result<()> {
    let (mut unused, mut beyond, mut again) = (Vec::new(), Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for stored in names {
        let Some(name) = encoder_tensor(stored, family) else { continue };
        if !seen.insert(name.clone()) {
            again.push(stored);
        }
        if is_of_encoder(&name, family, layers)
            || matches!(name.as_str(), "embeddings.position_ids" | "embeddings.token_type_ids")
            || family.definition().modules.is_buffer(&name)
        {
            continue;
        }
        let of_other = name.split('.').find_map(|part| OTHER_MODELS.into_iter().find(|(other, _)| *other == part));
        if let Some((_, sign)) = of_other {
            return Err(Error::OtherModel { name: stored.to_owned(), sign, path: folder.to_path_buf(), known: Family::titles() });
        }
        match family.definition().modules.layer(&name) {
            Some((layer, _)) if layer >= layers => beyond.push(stored),
            _ => unused.push(stored),
        }
    }
    let folder = folder.display();
    if let Some(first) = beyond.iter().min() {
        let count = beyond.len();
        warn_once(format!(
            "{folder}: num_hidden_layers is {layers}: {count} tensors of further layers are not used, \"{first}\" among them"
        ));
    }
    if let Some(first) = again.iter().min() {
        let count = again.len();
        warn_once(format!(
            "{folder}: {count} tensors are stored under two names, \"{first}\" among them; the first in their order is read"
        ));
    }
    if let Some(first) = unused.iter().min() {
        warn_once(format!(
            "{folder}: {} tensors that the encoder does not have are not used, \"{first}\" among them",
            unused.len()
        ));
    }
    Ok(())
}
