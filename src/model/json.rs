//! JSON as Python reads and writes it: whole files with a size limit, no key twice with two values, `NaN` and `Infinity`.

use crate::model::pointer::{check_link, lfs_pointer};
use crate::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The largest JSON file that is read. The index of a sharded model, the longest of them, has some 100 bytes a tensor.
const MAX_BYTES: u64 = 64 << 20;

/// The most characters of a foreign value that a message repeats.
const MAX_SHOWN: usize = 80;

/// What Python writes for numbers that JSON has no words for, and what stands for each in a [`Value`]. No text of a file begins with
/// a NUL, so that none can be mistaken for one of them.
const CONSTANTS: [(&str, &str, f64); 3] =
    [("NaN", "\0NaN", f64::NAN), ("Infinity", "\0Infinity", f64::INFINITY), ("-Infinity", "\0-Infinity", f64::NEG_INFINITY)];

/// Reads `path` as JSON; `None` where there is no such file.
pub(super) fn read_value(path: &Path) -> Result<Option<Value>> {
    let Some(bytes) = read_bytes(path)? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|reason| config_error(path, reason))
}

/// Reads a configuration file whole; `None` where there is no such file.
pub(super) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        // A link that leads nowhere is a damaged folder, not a file that the model does without.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return check_link(path).map(|()| None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(config_error(path, format!("is larger than {MAX_BYTES} bytes, which no configuration file is")));
    }
    if let Some(pointer) = lfs_pointer(&bytes) {
        return Err(pointer.error(path));
    }
    Ok(Some(bytes))
}

/// `bytes` as JSON, else what is wrong with them.
pub(super) fn parse(bytes: &[u8]) -> Result<Value, String> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err("begins with a byte order mark, which JSON does not have; save it as UTF-8 without one".to_owned());
    }
    let text = std::str::from_utf8(bytes).map_err(|error| format!("not UTF-8 (byte {})", error.valid_up_to() + 1))?;
    let parsed: Parsed = serde_json::from_str(&without_constants(text)).map_err(|error| format!("not valid JSON: {error}"))?;
    Ok(parsed.0)
}

/// `text` with Python's constants, outside of strings, replaced by the strings that stand for them.
fn without_constants(text: &str) -> Cow<'_, str> {
    if !text.contains("NaN") && !text.contains("Infinity") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    // Where strings begin and end; what lies between a backslash and the next character is of no interest.
    while let Some(start) = rest.find('"') {
        let (outside, string) = rest.split_at(start);
        push_without_constants(&mut out, outside);
        let mut escaped = false;
        let end = string.char_indices().skip(1).find(|&(_, c)| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let length = end.map_or(string.len(), |(at, _)| at + 1);
        out.push_str(&string[..length]);
        rest = &string[length..];
    }
    push_without_constants(&mut out, rest);
    Cow::Owned(out)
}

fn push_without_constants(out: &mut String, outside: &str) {
    let quoted = |name: &str| format!("\"\\u0000{name}\"");
    // The signed one first, since the other is a part of it.
    let signed = outside.replace("-Infinity", "\u{1}");
    let plain = signed.replace("Infinity", &quoted("Infinity")).replace("NaN", &quoted("NaN"));
    out.push_str(&plain.replace('\u{1}', &quoted("-Infinity")));
}

/// The number that `value` is: a JSON number or one of Python's constants.
pub(super) fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| constant(value))
}

/// The constant of Python's that `value` stands for.
pub(super) fn constant(value: &Value) -> Option<f64> {
    let text = value.as_str()?;
    CONSTANTS.iter().find(|(_, stand_in, _)| *stand_in == text).map(|(_, _, number)| *number)
}

/// An [`Error::Config`] for `path`.
pub(super) fn config_error(path: &Path, reason: impl Into<String>) -> Error {
    Error::Config { path: path.to_path_buf(), reason: reason.into() }
}

/// `value` as JSON, cut to a length that fits a message.
pub(super) fn shown(value: &Value) -> String {
    let mut text = value.to_string();
    for (name, _, _) in CONSTANTS {
        text = text.replace(&format!("\"\\u0000{name}\""), name);
    }
    if text.chars().count() <= MAX_SHOWN { text } else { text.chars().take(MAX_SHOWN).chain("…".chars()).collect() }
}

/// A [`Value`] none of whose objects has a key twice with two values: readers differ in which of the two they take.
struct Parsed(Value);

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Parsed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Parsed, E> {
                Ok(Parsed(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Parsed, E> {
                Ok(Parsed(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Parsed, E> {
                Ok(Parsed(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Parsed, E> {
                Ok(Parsed(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Parsed, E> {
                Ok(Parsed(value.into()))
            }

            fn visit_unit<E>(self) -> Result<Parsed, E> {
                Ok(Parsed(Value::Null))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Parsed, A::Error> {
                let mut list = Vec::new();
                while let Some(Parsed(item)) = items.next_element()? {
                    list.push(item);
                }
                Ok(Parsed(Value::Array(list)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Parsed, A::Error> {
                let mut fields = Map::new();
                while let Some((key, Parsed(value))) = entries.next_entry::<String, Parsed>()? {
                    if let Some(first) = fields.get(&key).filter(|first| **first != value) {
                        let (first, second) = (shown(first), shown(&value));
                        return Err(A::Error::custom(format!(
                            "\"{key}\" stands twice, as {first} and as {second}; keep one of them"
                        )));
                    }
                    fields.insert(key, value);
                }
                Ok(Parsed(Value::Object(fields)))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn python_constants_are_numbers_and_strings_of_their_names_are_not() {
        let value = parse(br#"{"a": NaN, "b": [Infinity, -Infinity], "NaN": "Infinity \" NaN", "c\\": -Infinity}"#).unwrap();
        assert!(number(&value["a"]).unwrap().is_nan());
        assert_eq!(number(&value["b"][0]), Some(f64::INFINITY));
        assert_eq!(number(&value["b"][1]), Some(f64::NEG_INFINITY));
        assert_eq!(value["NaN"], "Infinity \" NaN");
        assert_eq!(number(&value["NaN"]), None);
        assert_eq!(number(&value["c\\"]), Some(f64::NEG_INFINITY));
        assert_eq!(shown(&value["b"]), "[Infinity,-Infinity]");
    }

    #[test]
    fn a_key_with_two_values_is_refused_at_any_depth_and_one_repeated_is_not() {
        let refused = parse(b"{\"a\": {\"b\": 1,\n \"b\": 2}}").unwrap_err();
        assert_eq!(refused, "not valid JSON: \"b\" stands twice, as 1 and as 2; keep one of them at line 2 column 8");
        assert!(parse(br#"{"a": 1, "a": 1}"#).is_ok());
        assert!(parse(br#"{"a": 1, "a": true}"#).is_err());
        assert!(parse(br#"[{"a": NaN, "a": null}]"#).is_err());
    }

    #[test]
    fn what_is_no_json_is_told() {
        for (bytes, told) in [
            (&b"\xef\xbb\xbf{}"[..], "byte order mark"),
            (b"{\"a\": \"\xff\"}", "not UTF-8 (byte 8)"),
            (b"{\"a\": 1,}", "trailing comma"),
            (b"{\"a\": 01}", "not valid JSON"),
            (b"{\"a\": infinity}", "not valid JSON"),
            (b"{\"a\": NaNs}", "not valid JSON"),
            (b"", "not valid JSON"),
        ] {
            let refused = parse(bytes).unwrap_err();
            assert!(refused.contains(told), "{refused}");
        }
        let deep = "[".repeat(100_000);
        assert!(parse(deep.as_bytes()).unwrap_err().contains("recursion limit"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_serde_json_reads_is_read_alike(text in "[\\{\\}\\[\\]\",:a1NIx \\\\-]{0,40}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                match parse(text.as_bytes()) {
                    Ok(parsed) => prop_assert_eq!(parsed, value),
                    Err(refused) => prop_assert!(refused.contains("stands twice"), "{}: {}", text, refused),
                }
            }
        }
    }
}
