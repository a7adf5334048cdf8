//! Settings of rotary positions, in the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

use super::one_of;
use crate::Result;
use crate::model::architecture::{Rotary, RotaryScaling};
use crate::model::json::shown;
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use std::ops::RangeInclusive;

/// Bases that make sense: angles fall from 1 to 1/base.
pub(super) const BASES: RangeInclusive<f64> = 1.0..=1e12;
pub(super) const FACTORS: RangeInclusive<f64> = 1.0..=1e6;

/// Keys of `rope_scaling` and `rope_parameters`, and of each kind of layer within the latter.
pub(in crate::model) static KEYS: Schema = Schema {
    title: "rope_parameters and rope_scaling of config.json",
    keys: &[&[
        Key::honoured("rope_theta", "base of the frequencies"),
        Key::honoured("rope_type", "how frequencies are changed for longer texts (default)"),
        Key::honoured("type", "older name of rope_type"),
        Key::honoured("factor", "how far dynamic and ntk change them"),
        Key::only("partial_rotary_factor", &["1", "1.0"], "whole heads are turned"),
        Key::only("mixed_b", &[], "the mixed variant of ntk is not supported"),
    ]],
    unknown: Unknown::Refuse,
};

/// Keys of `rope_parameters` where layers are of two kinds.
pub(in crate::model) static LAYER_KEYS: Schema = Schema {
    title: "rope_parameters of ModernBERT",
    keys: &[&[
        Key::honoured("full_attention", "rotary positions of layers that see all tokens"),
        Key::honoured("sliding_attention", "rotary positions of layers that see a window"),
    ]],
    unknown: Unknown::Refuse,
};

/// Which types of scaling a family's reference has, beside none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalings {
    None,
    /// transformers' `dynamic`, for texts longer than this.
    Dynamic(usize),
    /// `ntk` of Alibaba's code.
    Ntk,
}

/// What `rope_theta`, `rope_scaling` and `rope_parameters` of config.json say, for heads of `size` values.
pub(super) fn read(json: &JsonObject, base: f64, size: usize, scalings: Scalings) -> Result<Rotary> {
    let field = one_of(json, "rope_parameters", "rope_scaling")?;
    let parameters = json.child(field, &KEYS)?;
    let outer = number(json, "rope_theta", BASES)?;
    match parameters {
        None => rotary(outer.unwrap_or(base), size, json),
        Some(parameters) => read_parameters(&parameters, (outer, "rope_theta"), base, size, scalings),
    }
}

/// One object of parameters. `outer` is the base that stands outside of it, and its name there.
pub(super) fn read_parameters(
    parameters: &JsonObject,
    (outer, name): (Option<f64>, &str),
    base: f64,
    size: usize,
    scalings: Scalings,
) -> Result<Rotary> {
    let inner = number(parameters, "rope_theta", BASES)?;
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner != outer
    {
        return Err(parameters.field_error("rope_theta", &format!("{name}, its older name, is {outer}; give one of them")));
    }
    let field = one_of(parameters, "rope_type", "type")?;
    let factor = || {
        number(parameters, "factor", FACTORS)?
            .ok_or_else(|| parameters.field_error("factor", "a number of at least 1 is expected"))
    };
    let scaling = match (parameters.string(field)?.unwrap_or("default"), scalings) {
        ("default", _) => match number(parameters, "factor", FACTORS)? {
            None | Some(1.0) => RotaryScaling::None,
            Some(_) => {
                return Err(parameters.field_error("factor", "frequencies of the type \"default\" have none; give rope_type"));
            }
        },
        ("dynamic", Scalings::Dynamic(trained)) => RotaryScaling::DynamicNtk { factor: factor()?, trained },
        ("ntk", Scalings::Ntk) => RotaryScaling::Ntk { factor: factor()? },
        (_, scalings) => {
            let known = match scalings {
                Scalings::None => "only \"default\" is supported",
                Scalings::Dynamic(_) => "\"default\" and \"dynamic\" are supported",
                Scalings::Ntk => "\"default\" and \"ntk\" are supported",
            };
            return Err(parameters.field_error(field, known));
        }
    };
    Ok(Rotary { scaling, ..rotary(inner.or(outer).unwrap_or(base), size, parameters)? })
}

/// Unchanged frequencies of this base.
pub(super) fn rotary(base: f64, size: usize, json: &JsonObject) -> Result<Rotary> {
    check_size(size, json)?;
    Ok(Rotary { base, size, scaling: RotaryScaling::None })
}

/// Values are turned in pairs.
pub(super) fn check_size(size: usize, json: &JsonObject) -> Result<()> {
    match size {
        0 => Err(json.error("no value of a head is turned; rotary positions need an even number of them")),
        _ if size.is_multiple_of(2) => Ok(()),
        _ => Err(json.error(format!("{size} values of a head are turned; rotary positions need an even number of them"))),
    }
}

/// A number within `range`.
pub(super) fn number(json: &JsonObject, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
    match json.number(field)? {
        Some(value) if !range.contains(&value) => {
            Err(json.field_error(field, &format!("a number from {} to {} is expected", range.start(), range.end())))
        }
        found => Ok(found),
    }
}

/// Refuses a `head_dim` that is not the width of a head.
pub(super) fn check_head_size(json: &JsonObject, size: usize) -> Result<()> {
    match json.get("head_dim") {
        Some(found) if found.as_u64() != Some(size as u64) => {
            let expected = format!("heads are {size} wide (hidden_size / num_attention_heads), not {}", shown(found));
            Err(json.field_error("head_dim", &expected))
        }
        _ => Ok(()),
    }
}
