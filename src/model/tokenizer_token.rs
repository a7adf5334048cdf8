//! A token as the files of a tokenizer give it: a bare string, or an `AddedToken` some of whose flags are left open.

use serde_json::{Map, Value};
use tokenizers::AddedToken;

/// Tells an entry of special_tokens_map.json from one of tokenizer_config.json, both of which may come to stand in the same place.
const OF_MAP: &str = "\0special_tokens_map";

/// A token with the flags that a file gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TokenForm {
    /// A string: each use of it has flags of its own.
    Text(String),
    /// `AddedToken` of Python's tokenizers.
    Flags(TokenFlags),
}

/// The flags of an `AddedToken`. `normalized` is the contrary of `special` as long as it is not given, also when `special` is set later.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct TokenFlags {
    pub content: String,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub normalized: Option<bool>,
    pub special: bool,
}

impl TokenFlags {
    /// The token as tokenizers takes it.
    pub fn resolve(&self) -> AddedToken {
        AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

impl TokenForm {
    pub fn content(&self) -> &str {
        match self {
            Self::Text(content) => content,
            Self::Flags(flags) => &flags.content,
        }
    }

    /// Whether transformers takes `value` for an `AddedToken`: an object that says so itself.
    pub fn is_marked(value: &Value) -> bool {
        value.get("__type").is_some_and(|kind| kind == "AddedToken")
    }

    /// A string or a marked `AddedToken`; `None` for anything else and for flags of a wrong type.
    pub fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::String(content) => Some(Self::Text(content.clone())),
            Value::Object(fields) if Self::is_marked(value) => Self::from_fields(fields).ok(),
            _ => None,
        }
    }

    /// `AddedToken(**fields)`. Keys that it does not know change nothing there either.
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Self, ()> {
        let flag = |key: &str| match fields.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(()),
        };
        let content = match fields.get("content") {
            Some(Value::String(content)) => content.clone(),
            _ => return Err(()),
        };
        Ok(Self::Flags(TokenFlags {
            content,
            single_word: flag("single_word")?.unwrap_or(false),
            lstrip: flag("lstrip")?.unwrap_or(false),
            rstrip: flag("rstrip")?.unwrap_or(false),
            normalized: flag("normalized")?,
            special: flag("special")?.unwrap_or(false),
        }))
    }

    /// An entry of special_tokens_map.json, which is special whatever it says.
    pub fn marked_special(mut fields: Map<String, Value>) -> Value {
        fields.insert("special".to_owned(), Value::Bool(true));
        fields.insert("__type".to_owned(), Value::String("AddedToken".to_owned()));
        fields.insert(OF_MAP.to_owned(), Value::Bool(true));
        Value::Object(fields)
    }

    /// Whether `value` is of [`TokenForm::marked_special`].
    pub fn is_of_map(value: &Value) -> bool {
        value.get(OF_MAP).is_some()
    }

    /// An entry of added_tokens.json.
    pub fn added(content: String, special: bool) -> Self {
        Self::Flags(TokenFlags { content, normalized: Some(!special), special, ..TokenFlags::default() })
    }

    /// Whether transformers takes two tokens for the same: a string is never the same as an `AddedToken`.
    pub fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Flags(a), Self::Flags(b)) => a.resolve() == b.resolve(),
            _ => false,
        }
    }
}
