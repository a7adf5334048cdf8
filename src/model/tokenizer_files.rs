//! The tokenizer of a model folder as its files describe it: tokenizer.json with tokenizer_config.json, special_tokens_map.json and
//! added_tokens.json, put together as `from_pretrained` of transformers 5 does.

use crate::model::json::{config_error, number, shown};
use crate::model::pointer::check_link;
use crate::model::tokenizer_class::TokenizerClass;
use crate::model::tokenizer_keys;
use crate::model::tokenizer_token::TokenForm;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The files of an encoder's folder that a tokenizer is made of.
pub const TOKENIZER_FILES: [&str; 5] =
    [TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", VOCABULARY];

/// The file that describes a whole tokenizer.
pub(crate) const TOKENIZER_JSON: &str = "tokenizer.json";

/// The file of words, one a line, that does without it for some classes.
pub(crate) const VOCABULARY: &str = "vocab.txt";

/// Files by which transformers would take another tokenizer than the one that is read here.
pub(crate) const FOREIGN_TOKENIZER_FILES: [&str; 3] = ["tekken.json", "tokenizer.model", "tiktoken.model"];

/// The special tokens that every class has, in the order in which transformers adds them.
pub(crate) const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What `CamembertTokenizer` adds where no other tokens are given.
const CAMEMBERT_EXTRA: [&str; 3] = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"];

/// From this on `model_max_length` means no limit (`LARGE_INTEGER` of transformers, which itself writes 10^30).
const NO_LIMIT: f64 = 1e20;

/// What config.json says that the choice of the tokenizer depends on.
#[derive(Debug, Clone, Copy)]
pub struct TokenizerModel<'a> {
    /// `model_type`.
    pub model_type: &'a str,
    /// `tokenizer_class`.
    pub tokenizer_class: Option<&'a str>,
}

/// Where the vocabulary lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Vocabulary {
    /// In tokenizer.json, at this path.
    Json(PathBuf),
    /// A token a line in vocab.txt, at this path.
    Lines(PathBuf),
}

/// A special token of the class: what the files say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    /// Not spoken of: the class has a default of its own.
    Absent,
    /// Set to null: the class has none.
    None,
    /// Given.
    Given(TokenForm),
}

/// Everything that the files and overrides say, but for the contents of tokenizer.json. Names are those of transformers' arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenizerInit {
    pub lower_case: bool,
    pub strip_accents: Option<bool>,
    pub tokenize_chinese_chars: bool,
    pub add_prefix_space: Option<bool>,
    pub split_special_tokens: bool,
    /// `Some(true)` for the left side.
    pub truncation_left: Option<bool>,
    /// `add_bos_token` and `add_eos_token` where an override or a folder without tokenizer.json gives them.
    pub add_bos_eos: Option<(bool, bool)>,
    /// In the order of [`NAMED_TOKENS`].
    pub named: Vec<Named>,
    /// Further named tokens of this model (`*_token`).
    pub model_specific: Vec<(String, TokenForm)>,
    pub extra: Vec<TokenForm>,
    /// Tokens by id, of tokenizer_config.json or, where that has none, of added_tokens.json.
    pub added: Vec<(i64, TokenForm)>,
    /// Whether the tokens that tokenizer.json adds join `added` (where tokenizer_config.json has no `added_tokens_decoder`).
    pub added_of_json: bool,
    /// Whether `model_input_names` asks for token types.
    pub token_types: bool,
}

/// The tokenizer of a model folder.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TokenizerFiles {
    class: TokenizerClass,
    vocabulary: Vocabulary,
    init: TokenizerInit,
    model_max_length: Option<usize>,
}

impl TokenizerFiles {
    /// Reads the tokenizer files of the folder `encoder`, as `AutoTokenizer.from_pretrained(encoder, **overrides)` does.
    ///
    /// # Errors
    /// [`Error::NotFound`] without a vocabulary, [`Error::Config`] for a value that cannot be served exactly (named with its file and key).
    pub fn read(encoder: &Path, model: TokenizerModel<'_>, overrides: &Map<String, Value>) -> Result<Self> {
        let config_path = encoder.join("tokenizer_config.json");
        let config = tokenizer_keys::read_fields(&config_path)?.unwrap_or_default();
        let class = TokenizerClass::choose(&config_path, &config, model.model_type, model.tokenizer_class)?;
        let vocabulary = find_vocabulary(encoder, class)?;
        tokenizer_keys::check_config(&config_path, &config)?;
        tokenizer_keys::check_overrides(&encoder.join("sentence_bert_config.json"), overrides)?;
        let mut arguments = Arguments { path: config_path, fields: config };
        if matches!(vocabulary, Vocabulary::Json(_)) {
            arguments.fields.remove("add_bos_token");
            arguments.fields.remove("add_eos_token");
        }
        arguments.fields.extend(overrides.iter().map(|(key, value)| (key.clone(), value.clone())));
        let (init, model_max_length) = arguments.init(encoder, overrides, class)?;
        Ok(Self { class, vocabulary, init, model_max_length })
    }

    /// The tokenizer class that transformers takes.
    pub fn class(&self) -> TokenizerClass {
        self.class
    }

    /// The file that holds the vocabulary: tokenizer.json, or vocab.txt where there is none.
    pub fn vocabulary_path(&self) -> &Path {
        match &self.vocabulary {
            Vocabulary::Json(path) | Vocabulary::Lines(path) => path,
        }
    }

    /// `model_max_length` as the tokenizer has it: of the overrides, else of tokenizer_config.json; `None` for no limit.
    pub fn limit(&self) -> Option<usize> {
        self.model_max_length
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    pub(crate) fn init(&self) -> &TokenizerInit {
        &self.init
    }
}

fn find_vocabulary(encoder: &Path, class: TokenizerClass) -> Result<Vocabulary> {
    let json = encoder.join("tokenizer.json");
    if json.is_file() {
        return Ok(Vocabulary::Json(json));
    }
    check_link(&json)?;
    let lines = encoder.join(VOCABULARY);
    let foreign = FOREIGN_TOKENIZER_FILES.iter().find(|name| encoder.join(name).exists());
    if class.reads_vocab_txt() && lines.is_file() && foreign.is_none() {
        return Ok(Vocabulary::Lines(lines));
    }
    let next = "make it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)".to_owned();
    Err(Error::NotFound { what: "tokenizer.json".to_owned(), path: json, next })
}

/// The keyword arguments of a tokenizer class (`init_kwargs` of transformers), with the file to blame for them.
struct Arguments {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Arguments {
    /// Follows `PreTrainedTokenizerBase._from_pretrained`, then `__init__`, step by step: the order decides which file wins.
    fn init(
        mut self,
        encoder: &Path,
        overrides: &Map<String, Value>,
        class: TokenizerClass,
    ) -> Result<(TokenizerInit, Option<usize>)> {
        if self.fields.contains_key("additional_special_tokens") && !truthy(self.fields.get("extra_special_tokens")) {
            self.rename("additional_special_tokens", "extra_special_tokens");
        }
        let mut explicit = self.take_model_specific();
        if let Some(Value::Object(extra)) = self.fields.get("extra_special_tokens").cloned() {
            self.fields.remove("extra_special_tokens");
            explicit.extend(extra);
        }
        if explicit.is_empty() {
            explicit = self.object("model_specific_special_tokens")?;
        }

        let added_of_json = !self.fields.contains_key("added_tokens_decoder");
        let added = if added_of_json {
            self.merge_special_tokens_map(encoder, overrides, &mut explicit)?;
            self.read_added_tokens(encoder)?
        } else {
            self.added_tokens_decoder()?
        };

        if class == TokenizerClass::Camembert && !self.fields.contains_key("additional_special_tokens") {
            self.fields.insert("additional_special_tokens".to_owned(), CAMEMBERT_EXTRA.into_iter().collect());
        }
        if self.fields.contains_key("additional_special_tokens") && !self.fields.contains_key("extra_special_tokens") {
            self.rename("additional_special_tokens", "extra_special_tokens");
        }
        let mut model_specific = Vec::new();
        let mut extra = Vec::new();
        match self.fields.get("extra_special_tokens") {
            None | Some(Value::Null) => {}
            Some(Value::Array(tokens)) => {
                for token in tokens {
                    extra.push(self.token("extra_special_tokens", token)?);
                }
            }
            Some(Value::Object(tokens)) => {
                for (key, token) in tokens {
                    model_specific.push((key.clone(), self.token(key, token)?));
                }
            }
            Some(_) => return Err(self.expected("extra_special_tokens", "a list or an object of tokens is expected")),
        }
        let is_token = |value: &Value| value.is_string() || TokenForm::is_marked(value);
        let found = self.fields.iter().filter(|(key, value)| model_specific_key(key) && is_token(value));
        for (key, value) in found.chain(&explicit) {
            let token = self.token(key, value)?;
            model_specific.retain(|(other, _)| other != key);
            model_specific.push((key.clone(), token));
        }
        let named = NAMED_TOKENS.iter().map(|key| self.named(key)).collect::<Result<_>>()?;
        self.side("padding_side")?;
        let mut init = TokenizerInit {
            lower_case: true,
            strip_accents: None,
            tokenize_chinese_chars: true,
            add_prefix_space: self.fields.get("add_prefix_space").and_then(Value::as_bool),
            split_special_tokens: self.boolean("split_special_tokens")?.unwrap_or(false),
            truncation_left: self.side("truncation_side")?,
            add_bos_eos: match (self.boolean("add_bos_token")?, self.boolean("add_eos_token")?) {
                (None, None) => None,
                (bos, eos) => Some((bos.unwrap_or(false), eos.unwrap_or(false))),
            },
            named,
            model_specific,
            extra,
            added,
            added_of_json,
            token_types: self.input_names()?,
        };
        // Only by the classes that take them: another leaves them unread, whatever they are.
        if class.reads_vocab_txt() {
            init.lower_case = self.boolean("do_lower_case")?.unwrap_or(true);
            init.strip_accents = self.nullable_boolean("strip_accents")?;
            init.tokenize_chinese_chars = self.boolean("tokenize_chinese_chars")?.unwrap_or(true);
        } else if class != TokenizerClass::Backend {
            // These two take null for false, as Python does.
            let unigram = matches!(class, TokenizerClass::XlmRoberta | TokenizerClass::Camembert);
            let null = unigram && self.fields.get("add_prefix_space").is_some_and(Value::is_null);
            init.add_prefix_space = if null { Some(false) } else { self.boolean("add_prefix_space")? };
        }
        Ok((init, self.model_max_length()?))
    }

    /// Takes out the keys `*_token` that no class knows, where they are strings.
    fn take_model_specific(&mut self) -> Map<String, Value> {
        let keys: Vec<String> = self
            .fields
            .iter()
            .filter(|(key, value)| model_specific_key(key) && value.is_string())
            .map(|(key, _)| key.clone())
            .collect();
        keys.into_iter().filter_map(|key| self.fields.remove_entry(&key)).collect()
    }

    /// special_tokens_map.json, which is read only where tokenizer_config.json has no `added_tokens_decoder`.
    fn merge_special_tokens_map(
        &mut self,
        encoder: &Path,
        overrides: &Map<String, Value>,
        explicit: &mut Map<String, Value>,
    ) -> Result<()> {
        let path = encoder.join("special_tokens_map.json");
        let Some(map) = tokenizer_keys::read_special_tokens_map(&path)? else { return Ok(()) };
        for (key, value) in map {
            if truthy(overrides.get(&key)) {
                continue;
            }
            let value = match value {
                Value::Object(token) if key != "extra_special_tokens" => TokenForm::marked_special(token),
                Value::Array(tokens) if key == "extra_special_tokens" => {
                    let mut merged = match self.fields.get(&key) {
                        Some(Value::Array(existing)) => existing.clone(),
                        _ => Vec::new(),
                    };
                    for token in tokens {
                        let token = match token {
                            Value::Object(token) => TokenForm::marked_special(token),
                            other => other,
                        };
                        if !merged.contains(&token) {
                            merged.push(token);
                        }
                    }
                    Value::Array(merged)
                }
                other => other,
            };
            self.path.clone_from(&path);
            self.fields.insert(key, value);
        }
        if let Some(Value::Object(extra)) = self.fields.get("extra_special_tokens").cloned() {
            self.fields.remove("extra_special_tokens");
            explicit.extend(extra);
        }
        Ok(())
    }

    /// added_tokens.json: ids by token.
    fn read_added_tokens(&self, encoder: &Path) -> Result<Vec<(i64, TokenForm)>> {
        let path = encoder.join("added_tokens.json");
        let Some(tokens) = tokenizer_keys::read_fields(&path)? else { return Ok(Vec::new()) };
        // An AddedToken of tokenizer_config.json is not one yet where transformers looks, and does not count.
        let content = |value: &Value| match value {
            Value::Object(_) if !TokenForm::is_of_map(value) => None,
            Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
            other => other.as_str().map(str::to_owned),
        };
        let mut special: Vec<String> = NAMED_TOKENS.iter().filter_map(|key| content(self.fields.get(*key)?)).collect();
        if let Some(Value::Array(extra)) = self.fields.get("extra_special_tokens") {
            special.extend(extra.iter().filter_map(content));
        }
        let mut added = Vec::new();
        for (token, id) in tokens {
            let Some(id) = id.as_i64() else {
                return Err(config_error(&path, format!("\"{token}\" is {}; an id is expected", shown(&id))));
            };
            let is_special = special.contains(&token);
            added.push((id, TokenForm::added(token, is_special)));
        }
        Ok(added)
    }

    fn added_tokens_decoder(&self) -> Result<Vec<(i64, TokenForm)>> {
        let Some(Value::Object(tokens)) = self.fields.get("added_tokens_decoder") else {
            return Err(self.expected("added_tokens_decoder", "an object of tokens by id is expected"));
        };
        let mut added = Vec::new();
        for (id, token) in tokens {
            let number = id.trim().parse::<i64>().ok();
            let form = token.as_object().and_then(|token| TokenForm::from_fields(token).ok());
            let (Some(number), Some(form)) = (number, form) else {
                let reason = format!("added_tokens_decoder has \"{id}\": {}; a token by its id is expected", shown(token));
                return Err(config_error(&self.path, reason));
            };
            added.push((number, form));
        }
        Ok(added)
    }

    fn named(&self, key: &str) -> Result<Named> {
        match self.fields.get(key) {
            None => Ok(Named::Absent),
            Some(Value::Null) => Ok(Named::None),
            Some(value) => self.token(key, value).map(Named::Given),
        }
    }

    fn token(&self, key: &str, value: &Value) -> Result<TokenForm> {
        TokenForm::from_value(value).ok_or_else(|| {
            config_error(
                &self.path,
                format!("{key} is {}; a token is expected: a string, or an AddedToken with its __type", shown(value)),
            )
        })
    }

    fn rename(&mut self, from: &str, to: &str) {
        if let Some(value) = self.fields.remove(from) {
            self.fields.insert(to.to_owned(), value);
        }
    }

    fn object(&self, key: &str) -> Result<Map<String, Value>> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(object)) => Ok(object.clone()),
            Some(_) => Err(self.expected(key, "an object is expected")),
        }
    }

    /// transformers takes no null for these, which would not be the default.
    fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.fields.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.expected(key, "true or false is expected")),
        }
    }

    fn nullable_boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.fields.get(key) {
            Some(Value::Null) => Ok(None),
            _ => self.boolean(key),
        }
    }

    /// Whether the side is the left one.
    fn side(&self, key: &str) -> Result<Option<bool>> {
        match self.fields.get(key) {
            None => Ok(None),
            Some(Value::String(side)) if side == "left" || side == "right" => Ok(Some(side == "left")),
            Some(_) => Err(self.expected(key, "\"left\" or \"right\" is expected")),
        }
    }

    fn input_names(&self) -> Result<bool> {
        match self.fields.get("model_input_names") {
            None => Ok(false),
            Some(Value::Array(names)) if names.iter().all(Value::is_string) => {
                Ok(names.iter().any(|name| name == "token_type_ids"))
            }
            Some(_) => Err(self.expected("model_input_names", "a list of names is expected")),
        }
    }

    fn model_max_length(&self) -> Result<Option<usize>> {
        let old = self.tokens("max_len")?;
        // A null is no limit, and the older name does not count beside it.
        if self.fields.contains_key("model_max_length") { self.tokens("model_max_length") } else { Ok(old) }
    }

    fn tokens(&self, key: &str) -> Result<Option<usize>> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match number(value) {
                Some(limit) if limit > NO_LIMIT => Ok(None),
                // Python's tokenizer takes no number with a point in it, whole or not.
                Some(limit) if limit >= 1.0 && value.is_u64() => Ok(Some(limit as usize)),
                _ => Err(self.expected(key, "a whole number of tokens is expected")),
            },
        }
    }

    fn expected(&self, key: &str, expected: &str) -> Error {
        let value = self.fields.get(key).map_or_else(|| "absent".to_owned(), shown);
        config_error(&self.path, format!("{key} is {value}; {expected}"))
    }
}

fn model_specific_key(key: &str) -> bool {
    key.ends_with("_token") && !NAMED_TOKENS.contains(&key)
}

/// As Python sees a value: absent, null, false, 0 and what is empty are false.
fn truthy(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Bool(value)) => *value,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(object)) => !object.is_empty(),
    }
}
