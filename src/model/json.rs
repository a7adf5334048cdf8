//! JSON configuration files: read whole, checked field by field, errors that name the file, the field and its value.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// The largest JSON file that is read. The index of a sharded model, the longest of them, has some 100 bytes a tensor.
const MAX_BYTES: u64 = 64 << 20;

/// The most characters of a foreign value that a message repeats.
const MAX_SHOWN: usize = 80;

/// A JSON file whose top level is an object.
#[derive(Debug)]
pub(super) struct JsonObject {
    path: PathBuf,
    fields: Map<String, Value>,
}

/// Reads `path` as JSON; `None` where there is no such file.
pub(super) fn read_value(path: &Path) -> Result<Option<Value>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut text = Vec::new();
    file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Error::io("read", path))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(config_error(path, format!("is larger than {MAX_BYTES} bytes, which no configuration file is")));
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| config_error(path, format!("not valid JSON: {error}")))
}

/// An [`Error::Config`] for `path`.
pub(super) fn config_error(path: &Path, reason: impl Into<String>) -> Error {
    Error::Config { path: path.to_path_buf(), reason: reason.into() }
}

/// `value` as JSON, cut to a length that fits a message.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= MAX_SHOWN { text } else { text.chars().take(MAX_SHOWN).chain("…".chars()).collect() }
}

impl JsonObject {
    /// Reads a file that must be there; `next` says what to do when it is not.
    pub fn read(path: &Path, next: &str) -> Result<Self> {
        Self::read_if_present(path)?.ok_or_else(|| Error::NotFound {
            what: path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            path: path.to_path_buf(),
            next: next.to_owned(),
        })
    }

    /// Reads a file that may be absent.
    pub fn read_if_present(path: &Path) -> Result<Option<Self>> {
        match read_value(path)? {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Self { path: path.to_path_buf(), fields })),
            Some(other) => Err(config_error(path, format!("an object is expected, not {}", shown(&other)))),
        }
    }

    /// An error about this file.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        config_error(&self.path, reason)
    }

    /// An error about one field: `field is VALUE; EXPECTED`.
    pub fn field_error(&self, field: &str, expected: &str) -> Error {
        let value = self.fields.get(field).map_or_else(|| "absent".to_owned(), shown);
        self.error(format!("{field} is {value}; {expected}"))
    }

    /// The value of `field`; absent and null are the same, as they are to the Python readers.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    pub fn string(&self, field: &str) -> Result<Option<&str>> {
        self.typed(field, "a string is expected", Value::as_str)
    }

    pub fn boolean(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false is expected", Value::as_bool)
    }

    pub fn object(&self, field: &str) -> Result<Option<&Map<String, Value>>> {
        self.typed(field, "an object is expected", Value::as_object)
    }

    /// A whole number within `range`.
    pub fn size(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let expected = format!("a whole number from {} to {} is expected", range.start(), range.end());
        self.typed(field, &expected, |value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)))
    }

    fn typed<'a, T>(&'a self, field: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.field_error(field, expected)),
        }
    }
}
