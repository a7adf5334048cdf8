//! What a fuzz target and a test of many seeded bodies check of every body: it is read as the format says, or refused, and nothing panics.

pub use super::grpc::fuzzed::check as check_call;

use super::encoding::{Encoded, Encoding, Ranges};
use super::inputs::{Inputs, Item};
use super::{body, native, openai, tokens};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// Any bytes as the body of every route, as the value of `inputs`, and as a vector in base64.
///
/// # Panics
/// Where something else comes of them than the format says.
pub fn check(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        // Each is read or refused.
        let _ = body::parse::<native::EmbedRequest>(text);
        let _ = body::parse::<native::EmbedAllRequest>(text);
        let _ = body::parse::<native::SimilarityRequest>(text);
        let _ = body::parse::<native::VertexRequest>(text);
        let _ = body::parse::<openai::Request>(text);
        let _ = body::parse::<tokens::TokenizeRequest>(text);
        let _ = body::parse::<tokens::DecodeRequest>(text);
        let expected = serde_json::from_str::<Value>(text).ok().and_then(|value| inputs(&value));
        assert_eq!(serde_json::from_str::<Inputs>(text).ok(), expected, "{text:?}");
    }
    let vector: Vec<f32> = bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
    let Encoded::Base64(said) = Encoding::Base64.encode(vector.clone(), &Ranges::default()) else { unreachable!() };
    assert_eq!(STANDARD.decode(said).ok().as_deref(), Some(&bytes[..vector.len() * 4]));
    let ranges = Ranges::of([vector.as_slice()].into_iter()).unwrap_or_default();
    for encoding in [Encoding::Int8, Encoding::Uint8, Encoding::Binary, Encoding::Ubinary] {
        let count = match encoding.encode(vector.clone(), &ranges) {
            Encoded::Signed(values) => values.len(),
            Encoded::Unsigned(values) => values.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(count, if encoding.needs_ranges() { vector.len() } else { vector.len().div_ceil(8) });
    }
}

/// `inputs` by the words of its documentation: a text, a list of token ids, or a list of either.
fn inputs(value: &Value) -> Option<Inputs> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = |list: &Vec<Value>| list.iter().map(id).collect::<Option<Vec<u32>>>();
    match value {
        Value::String(text) => Some(Inputs { items: vec![Item::Text(text.clone())], listed: false }),
        Value::Array(list) if !list.is_empty() && list[0].is_number() => {
            Some(Inputs { items: vec![Item::Ids(ids(list)?)], listed: false })
        }
        Value::Array(list) => {
            let item = |value: &Value| match value {
                Value::String(text) => Some(Item::Text(text.clone())),
                Value::Array(list) => ids(list).map(Item::Ids),
                _ => None,
            };
            Some(Inputs { items: list.iter().map(item).collect::<Option<_>>()?, listed: true })
        }
        _ => None,
    }
}

/// Numbers below what it is given: SplitMix64, as in tests/common/random.rs.
#[cfg(test)]
pub(super) fn seeded(mut state: u64) -> impl FnMut(usize) -> usize {
    move |n| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bodies are made of; some are whole, so that not everything breaks off at the first byte.
    const PARTS: [&str; 40] = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\"a\"",
        "\"inputs\":",
        "\"input\":",
        "\"ids\":",
        "\"instances\":",
        "\"truncate\":",
        "\"normalize\":",
        "\"dimensions\":",
        "\"prompt_name\":",
        "\"encoding_format\":",
        "\"source_sentence\":",
        "\"sentences\":",
        "\"parameters\":",
        "0",
        "-1",
        "1.5",
        "1e9",
        "4294967295",
        "4294967296",
        "18446744073709551616",
        "true",
        "null",
        "\\u0061",
        "\"\\ud83d\\ude00\"",
        "\"\\ud800\"",
        "é",
        " ",
        "\n",
        "[1,2]",
        "[\"a\",\"b\"]",
        "[[1],[2]]",
        "{\"inputs\":[\"a\",[1]]}",
        "[[[",
    ];

    #[test]
    fn seeded_bodies_are_read_as_the_format_says() {
        let mut next = seeded(17);
        let mut read = 0;
        for _ in 0..20_000 {
            let mut bytes: Vec<u8> = (0..1 + next(6)).flat_map(|_| PARTS[next(PARTS.len())].bytes()).collect();
            if next(4) == 0 {
                let place = next(bytes.len());
                bytes[place] = next(256) as u8;
            }
            check(&bytes);
            read += usize::from(serde_json::from_slice::<Inputs>(&bytes).is_ok());
        }
        assert!(read > 200, "only {read} of them are inputs");
    }
}
