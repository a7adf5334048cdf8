//! What is done with every key of a configuration file: a table per file, and the one way to read such a file.
//!
//! A key that no table names cannot be read, and one that is named cannot be passed over: it is honoured, harmless for a reason, or
//! refused with its value. `docs/model-folders.md` is written from the same tables.

use super::json::{config_error, constant, number, read_value, shown};
use crate::notice::warn_once;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// One key of a configuration file. An absent key and one that is null are the same, as they are to the Python readers.
#[derive(Debug)]
pub(crate) struct Key {
    pub name: &'static str,
    pub action: Action,
    /// What it does, why it does nothing, or why other values are refused.
    pub note: &'static str,
}

/// What is done with a key that is set.
#[derive(Debug)]
pub(crate) enum Action {
    /// Does here what it does in the reference.
    Honoured,
    /// Changes no vector.
    Harmless,
    /// Any value but these, written as JSON, is refused.
    Only(&'static [&'static str]),
}

/// What is done with a key that the table does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It is left unused, with a warning that names it: the reference does not use it either.
    Warn,
    /// It is nothing to the file's reader, in the reference as here.
    Ignore,
    /// It is refused: the reference does so too, or would compute something else with it.
    Refuse,
}

/// The keys of one file, or of one object within a file.
#[derive(Debug)]
pub(crate) struct Schema {
    /// How the documentation calls it.
    pub title: &'static str,
    /// In groups, so that files of several families can share some.
    pub keys: &'static [&'static [Key]],
    pub unknown: Unknown,
}

/// A JSON object whose keys were held against a [`Schema`] when it was read.
#[derive(Debug)]
pub(crate) struct JsonObject {
    path: PathBuf,
    /// What stands before its keys in messages: `tokenizer_args.` for an object within a file.
    within: String,
    fields: Map<String, Value>,
    schema: &'static Schema,
}

impl Key {
    pub const fn honoured(name: &'static str, note: &'static str) -> Self {
        Self { name, action: Action::Honoured, note }
    }

    pub const fn harmless(name: &'static str, note: &'static str) -> Self {
        Self { name, action: Action::Harmless, note }
    }

    /// Refused unless its value, written as JSON, is one of `values`; `note` says what is expected.
    pub const fn only(name: &'static str, values: &'static [&'static str], note: &'static str) -> Self {
        Self { name, action: Action::Only(values), note }
    }
}

impl Schema {
    pub fn keys(&self) -> impl Iterator<Item = &'static Key> + use<> {
        self.keys.iter().copied().flatten()
    }

    pub fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys().find(|key| key.name == name)
    }
}

impl JsonObject {
    /// Reads a file that must be there; `next` says what to do when it is not.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Config`] for what is no JSON object or has a key with a value that is refused.
    pub fn read(path: &Path, schema: &'static Schema, next: &str) -> Result<Self> {
        Self::read_if_present(path, schema)?.ok_or_else(|| Error::NotFound {
            what: path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            path: path.to_path_buf(),
            next: next.to_owned(),
        })
    }

    /// Reads a file that may be absent.
    pub fn read_if_present(path: &Path, schema: &'static Schema) -> Result<Option<Self>> {
        match read_value(path)? {
            None => Ok(None),
            Some(value) => Self::new(path, value, schema).map(Some),
        }
    }

    /// `value`, which was read from `path`, held against `schema`.
    pub fn new(path: &Path, value: Value, schema: &'static Schema) -> Result<Self> {
        match value {
            Value::Object(fields) => Self { path: path.to_path_buf(), within: String::new(), fields, schema }.checked(),
            other => Err(config_error(path, format!("an object is expected, not {}", shown(&other)))),
        }
    }

    /// The object that is the value of `field`, held against a schema of its own.
    pub fn child(&self, field: &str, schema: &'static Schema) -> Result<Option<Self>> {
        let Some(fields) = self.object(field)?.cloned() else { return Ok(None) };
        let within = format!("{}{field}.", self.within);
        Self { path: self.path.clone(), within, fields, schema }.checked().map(Some)
    }

    /// The same object with the fields of the object that is the value of `field` in `over`, which win. They are held against this
    /// object's schema, and refused under their own place.
    pub fn overlaid(self, over: &Self, field: &str) -> Result<Self> {
        let Some(over) = over.child(field, self.schema)? else { return Ok(self) };
        let mut fields = self.fields;
        fields.extend(over.fields.into_iter().filter(|(_, value)| !value.is_null()));
        Ok(Self { fields, ..self })
    }

    /// Refuses what the schema refuses, names what it does not know.
    fn checked(self) -> Result<Self> {
        let mut unknown = Vec::new();
        for (name, value) in self.fields.iter().filter(|(_, value)| !value.is_null()) {
            let place = format!("{}: {}{name} = {}", self.path.display(), self.within, shown(value));
            match self.schema.key(name) {
                Some(key) => match key.action {
                    Action::Honoured => log::info!("{place}: honoured"),
                    Action::Harmless => log::info!("{place}: changes no vector ({})", key.note),
                    Action::Only(values) if values.contains(&value.to_string().as_str()) => log::info!("{place}: as it is here"),
                    Action::Only(_) => return Err(self.field_error(name, key.note)),
                },
                None if self.schema.unknown == Unknown::Refuse => {
                    let known: Vec<&str> = self.schema.keys().map(|key| key.name).collect();
                    return Err(self.field_error(name, &format!("no such key is known here ({})", known.join(", "))));
                }
                None if self.schema.unknown == Unknown::Ignore => log::info!("{place}: not read"),
                None => {
                    log::info!("{place}: not known, not used");
                    unknown.push(name.as_str());
                }
            }
        }
        if !unknown.is_empty() {
            let named = unknown.iter().map(|name| format!("{}{name}", self.within)).collect::<Vec<_>>().join(", ");
            warn_once(format!("{}: not known and not used: {named}", self.path.display()));
        }
        Ok(self)
    }

    /// An error about this file.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        config_error(&self.path, reason)
    }

    /// An error about one field: `field is VALUE; EXPECTED`.
    pub fn field_error(&self, field: &str, expected: &str) -> Error {
        let value = self.fields.get(field).map_or_else(|| "absent".to_owned(), shown);
        self.error(format!("{}{field} is {value}; {expected}", self.within))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All fields, those that no schema names included.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The value of `field`; absent and null are the same.
    pub fn get(&self, field: &str) -> Option<&Value> {
        debug_assert!(
            self.schema.key(field).is_some_and(|key| !matches!(key.action, Action::Harmless)),
            "{field} is read, but not honoured by the table of {}",
            self.schema.title
        );
        self.fields.get(field).filter(|value| !value.is_null())
    }

    pub fn string(&self, field: &str) -> Result<Option<&str>> {
        self.typed(field, "a string is expected", |value| value.as_str().filter(|_| constant(value).is_none()))
    }

    pub fn boolean(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false is expected", Value::as_bool)
    }

    pub fn object(&self, field: &str) -> Result<Option<&Map<String, Value>>> {
        self.typed(field, "an object is expected", Value::as_object)
    }

    /// A number; Python's `NaN` and `Infinity` are some.
    pub fn number(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number is expected", number)
    }

    /// A whole number within `range`.
    pub fn size(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let expected = match *range.end() {
            usize::MAX => format!("a whole number of at least {} is expected", range.start()),
            end => format!("a whole number from {} to {end} is expected", range.start()),
        };
        self.typed(field, &expected, |value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)))
    }

    fn typed<'a, T>(&'a self, field: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.field_error(field, expected)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    static INNER: Schema = Schema { title: "inner", keys: &[&[Key::honoured("size", "a size")]], unknown: Unknown::Refuse };

    static OUTER: Schema = Schema {
        title: "outer",
        keys: &[
            &[Key::honoured("inner", "an object"), Key::harmless("note", "nobody reads it")],
            &[Key::only("is_decoder", &["false"], "only encoders are supported"), Key::honoured("size", "a size")],
        ],
        unknown: Unknown::Warn,
    };

    fn outer(value: Value) -> Result<JsonObject> {
        JsonObject::new(Path::new("config.json"), value, &OUTER)
    }

    fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn keys_are_honoured_harmless_or_refused_with_their_value() {
        let read = outer(json!({"size": 3, "note": [1], "is_decoder": false, "unheard_of": 1})).unwrap();
        assert_eq!(read.size("size", 1..=4).unwrap(), Some(3));
        assert_eq!(
            refused(read.size("size", 4..=usize::MAX)),
            "config.json: size is 3; a whole number of at least 4 is expected"
        );
        assert_eq!(refused(outer(json!({"is_decoder": true}))), "config.json: is_decoder is true; only encoders are supported");
        assert!(outer(json!({"is_decoder": null})).is_ok());
        assert_eq!(refused(outer(json!([1]))), "config.json: an object is expected, not [1]");
    }

    #[test]
    fn an_inner_object_names_its_place_and_can_refuse_what_it_does_not_know() {
        let read = outer(json!({"inner": {"size": 0}})).unwrap().child("inner", &INNER).unwrap().unwrap();
        assert_eq!(refused(read.size("size", 1..=2)), "config.json: inner.size is 0; a whole number from 1 to 2 is expected");
        let unknown = outer(json!({"inner": {"other": 1}})).unwrap().child("inner", &INNER);
        assert_eq!(refused(unknown), "config.json: inner.other is 1; no such key is known here (size)");
        assert!(outer(json!({"inner": null})).unwrap().child("inner", &INNER).unwrap().is_none());
    }

    #[test]
    fn what_is_laid_over_wins_and_is_held_against_the_same_table() {
        let read = outer(json!({"size": 3})).unwrap();
        let over = |inner| JsonObject::new(Path::new("other.json"), json!({"inner": inner}), &OUTER).unwrap();
        let laid = read.overlaid(&over(json!({"size": 4, "inner": null})), "inner").unwrap();
        assert_eq!(laid.size("size", 1..=9).unwrap(), Some(4));
        let refusal = refused(laid.overlaid(&over(json!({"is_decoder": true})), "inner"));
        assert_eq!(refusal, "other.json: inner.is_decoder is true; only encoders are supported");
    }

    #[test]
    #[should_panic(expected = "is read, but not honoured")]
    fn a_key_that_the_table_calls_harmless_is_not_read() {
        let _ = outer(json!({"note": 1})).unwrap().get("note");
    }
}
