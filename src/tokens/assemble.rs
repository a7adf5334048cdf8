//! Puts a tokenizer together from a folder's files, as the tokenizer classes of transformers 5 do.

use crate::model::{NAMED_TOKENS, Named, TokenFlags, TokenForm, TokenizerClass, TokenizerFiles, TokenizerInit, Vocabulary};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedVocabulary, Model, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    TruncationDirection,
};

/// Places in [`NAMED_TOKENS`].
const BOS: usize = 0;
const EOS: usize = 1;
const UNK: usize = 2;
const SEP: usize = 3;
const PAD: usize = 4;
const CLS: usize = 5;

/// Constants of `WordPiece` in transformers' classes.
const WORD_PREFIX: &str = "##";
const WORD_CHARS: usize = 100;

/// The place of `<unk>` in the vocabulary of `XLMRobertaTokenizer`, a constant there.
const XLM_ROBERTA_UNK: usize = 3;

/// A tokenizer without truncation and padding, and what goes with it.
#[derive(Debug, Clone)]
pub(super) struct Assembled {
    pub inner: Tokenizer,
    /// The side on which long texts are cut.
    pub side: TruncationDirection,
    /// Ids of the class's special tokens (`all_special_ids`).
    pub special_ids: HashSet<u32>,
    /// Whether the model is given token types.
    pub token_types: bool,
}

/// What of tokenizer.json the library does not give away.
#[derive(Debug, Deserialize)]
struct Outline {
    added_tokens: Option<Vec<Value>>,
    model: Option<ModelOutline>,
}

/// Settings of a model that a class may have otherwise.
#[derive(Debug, Default, Deserialize)]
struct ModelOutline {
    unk_id: Option<usize>,
    byte_fallback: Option<bool>,
    unk_token: Option<String>,
    fuse_unk: Option<bool>,
    dropout: Option<f32>,
    ignore_merges: Option<bool>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// tokenizer.json alone, as transformers' plain backend takes it.
pub(super) fn from_json(json: &[u8]) -> Result<Assembled> {
    let mut inner = Tokenizer::from_bytes(json).map_err(as_error)?;
    let side = inner.get_truncation().map_or(TruncationDirection::Right, |truncation| truncation.direction);
    let added = inner.get_added_tokens_decoder();
    let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
    without_limits(&mut inner)?;
    Ok(Assembled { inner, side, special_ids, token_types: false })
}

/// The tokenizer that `files` describe, `bytes` being those of their vocabulary.
pub(super) fn from_files(files: &TokenizerFiles, bytes: &[u8]) -> Result<Assembled> {
    build(files, bytes).map_err(at(files.vocabulary_path()))
}

fn build(files: &TokenizerFiles, bytes: &[u8]) -> Result<Assembled> {
    let init = files.init();
    let (mut inner, outline) = match files.vocabulary() {
        Vocabulary::Json(_) => {
            let outline: Outline = serde_json::from_slice(bytes).map_err(|error| reason(error.to_string()))?;
            (Tokenizer::from_bytes(bytes).map_err(as_error)?, outline)
        }
        Vocabulary::Lines(_) => {
            let vocab = WordPiece::read_bytes(bytes).map_err(as_error)?;
            let model = WordPiece::builder().vocab(vocab).build().map_err(as_error)?;
            (Tokenizer::new(model), Outline { added_tokens: None, model: None })
        }
    };
    let added = added_tokens(init, outline.added_tokens)?;
    let mut special = SpecialTokens::new(files.class(), init, &added);
    if let Some(padding) = inner.get_padding()
        && init.named[PAD] == Named::Absent
        && files.class() == TokenizerClass::Backend
    {
        special.named[PAD] = Some(TokenForm::Text(padding.pad_token.clone()));
    }
    let side = match init.truncation_left {
        Some(true) => TruncationDirection::Left,
        Some(false) => TruncationDirection::Right,
        None => inner.get_truncation().map_or(TruncationDirection::Right, |truncation| truncation.direction),
    };
    without_limits(&mut inner)?;
    rebuild(&mut inner, files, bytes, outline.model.unwrap_or_default(), &special)?;
    inner.set_encode_special_tokens(init.split_special_tokens);
    special.add_to(&mut inner, init, added)?;
    post_process(&mut inner, files, &special)?;
    let special_ids = special.all().filter_map(|token| inner.token_to_id(token.content())).collect();
    let token_types = init.token_types;
    Ok(Assembled { inner, side, special_ids, token_types })
}

/// The tokens that are added by their ids, ascending.
fn added_tokens(init: &TokenizerInit, of_json: Option<Vec<Value>>) -> Result<BTreeMap<i64, TokenForm>> {
    let mut added: BTreeMap<i64, TokenForm> = init.added.iter().cloned().collect();
    if init.added_of_json {
        for token in of_json.unwrap_or_default() {
            let id = token.get("id").and_then(Value::as_i64);
            let form = token.as_object().and_then(|fields| TokenForm::from_fields(fields).ok());
            let (Some(id), Some(form)) = (id, form) else {
                return Err(reason(format!("added_tokens has {token}; a token with its id is expected")));
            };
            added.insert(id, form);
        }
    }
    Ok(added)
}

/// The special tokens of a class as transformers keeps them.
struct SpecialTokens {
    /// In the order of [`NAMED_TOKENS`].
    named: Vec<Option<TokenForm>>,
    /// Named by this model, in the order of their names; one may take the place of a standard one.
    model_specific: Vec<(String, TokenForm)>,
    extra: Vec<TokenForm>,
}

impl SpecialTokens {
    fn new(class: TokenizerClass, init: &TokenizerInit, added: &BTreeMap<i64, TokenForm>) -> Self {
        // Of two added tokens of one spelling, transformers takes the later one's flags.
        let flags = |token: &TokenForm| added.values().rfind(|added| added.content() == token.content()).cloned();
        let named = init.named.iter().zip(defaults(class)).zip(NAMED_TOKENS);
        let named = named.map(|((named, default), key)| {
            let token = match named {
                Named::Given(token) => Some(flags(token).unwrap_or_else(|| token.clone())),
                Named::None => None,
                Named::Absent => default.map(|content| TokenForm::Text(content.to_owned())),
            };
            match (class, token) {
                // MPNetTokenizer gives strings flags of its own.
                (TokenizerClass::MpNet, Some(TokenForm::Text(content))) => {
                    Some(TokenForm::Flags(TokenFlags { content, lstrip: key == "mask_token", ..TokenFlags::default() }))
                }
                // CamembertTokenizer the mask alone.
                (TokenizerClass::Camembert, Some(TokenForm::Text(content))) if key == "mask_token" => {
                    Some(TokenForm::Flags(TokenFlags { content, lstrip: true, special: true, ..TokenFlags::default() }))
                }
                (_, token) => token,
            }
        });
        let mut tokens = Self { named: named.collect(), model_specific: Vec::new(), extra: init.extra.clone() };
        for (key, token) in &init.model_specific {
            match NAMED_TOKENS.iter().position(|name| name == key) {
                Some(place) => tokens.named[place] = Some(token.clone()),
                None => tokens.model_specific.push((key.clone(), token.clone())),
            }
        }
        tokens
    }

    /// Every named token, then the extra ones.
    fn all(&self) -> impl Iterator<Item = &TokenForm> {
        self.all_named().chain(&self.extra)
    }

    fn all_named(&self) -> impl Iterator<Item = &TokenForm> {
        self.named.iter().flatten().chain(self.model_specific.iter().map(|(_, token)| token))
    }

    /// How Python writes a token into a template.
    fn content(&self, place: usize) -> &str {
        self.named[place].as_ref().map_or("None", TokenForm::content)
    }

    /// The id of a token, or `default` where the class has none.
    fn id(&self, inner: &Tokenizer, place: usize, default: Option<u32>) -> Result<u32> {
        let Some(token) = &self.named[place] else {
            return default.ok_or_else(|| reason(format!("{} is null, and the class needs one", NAMED_TOKENS[place])));
        };
        let unknown = || self.named[UNK].as_ref().and_then(|unk| inner.token_to_id(unk.content()));
        inner
            .token_to_id(token.content())
            .or_else(unknown)
            .ok_or_else(|| reason(format!("{} is \"{}\", which has no id", NAMED_TOKENS[place], token.content())))
    }

    /// Adds the tokens to the library's in transformers' order, which decides what ids new ones get and whose flags are the last.
    fn add_to(&self, inner: &mut Tokenizer, init: &TokenizerInit, added: BTreeMap<i64, TokenForm>) -> Result<()> {
        let mut tokens: Vec<TokenForm> = added.into_values().collect();
        let known: HashSet<String> = inner
            .get_added_tokens_decoder()
            .values()
            .map(|token| token.content.clone())
            .chain(tokens.iter().map(|token| token.content().to_owned()))
            .collect();
        for token in self.all() {
            if !known.contains(token.content()) && !tokens.iter().any(|other| other.same(token)) {
                tokens.push(token.clone());
            }
        }
        self.check_order(inner, init, &known)?;
        let named: HashSet<&str> = self.all_named().map(TokenForm::content).collect();
        let tokens = tokens.into_iter().map(|token| match token {
            TokenForm::Text(content) => tokenizers::AddedToken::from(content, true),
            TokenForm::Flags(mut flags) => {
                flags.special |= named.contains(flags.content.as_str());
                flags.resolve()
            }
        });
        inner.add_tokens(tokens).map_err(as_error)?;
        Ok(())
    }

    /// Tokens of the model's own names get new ids in the order in which the file lists them, which a JSON object does not keep here.
    fn check_order(&self, inner: &Tokenizer, init: &TokenizerInit, known: &HashSet<String>) -> Result<()> {
        let is_new = |token: &&TokenForm| !known.contains(token.content()) && inner.token_to_id(token.content()).is_none();
        let new: HashSet<&str> =
            init.model_specific.iter().map(|(_, token)| token).filter(is_new).map(TokenForm::content).collect();
        if new.len() > 1 {
            let mut names: Vec<&str> = new.into_iter().collect();
            names.sort_unstable();
            let names = names.join(", ");
            return Err(reason(format!("the special tokens {names} have no ids; add them to tokenizer.json")));
        }
        Ok(())
    }
}

/// The special tokens that a class has where the files give none, in the order of [`NAMED_TOKENS`].
fn defaults(class: TokenizerClass) -> [Option<&'static str>; 7] {
    match class {
        TokenizerClass::Bert | TokenizerClass::Dpr => {
            [None, None, Some("[UNK]"), Some("[SEP]"), Some("[PAD]"), Some("[CLS]"), Some("[MASK]")]
        }
        TokenizerClass::MpNet => ["<s>", "</s>", "[UNK]", "</s>", "<pad>", "<s>", "<mask>"].map(Some),
        TokenizerClass::XlmRoberta | TokenizerClass::Camembert | TokenizerClass::Roberta => {
            ["<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"].map(Some)
        }
        _ => [None; 7],
    }
}

/// Replaces the parts of tokenizer.json that the class has of its own.
fn rebuild(
    inner: &mut Tokenizer,
    files: &TokenizerFiles,
    bytes: &[u8],
    outline: ModelOutline,
    special: &SpecialTokens,
) -> Result<()> {
    let init = files.init();
    match files.class() {
        TokenizerClass::Bert | TokenizerClass::Dpr | TokenizerClass::MpNet => {
            word_piece(inner, special.content(UNK))?;
            let lower_case = init.lower_case || files.class() == TokenizerClass::Dpr;
            let normalizer = BertNormalizer::new(true, init.tokenize_chinese_chars, init.strip_accents, lower_case);
            // Before the normalizer, which is applied to every added token.
            inner.with_added_vocabulary(AddedVocabulary::new());
            inner.with_normalizer(Some(normalizer)).map_err(as_error)?;
            inner.with_pre_tokenizer(Some(BertPreTokenizer));
        }
        class @ (TokenizerClass::XlmRoberta | TokenizerClass::Camembert) => {
            let unigram = unigram(inner.get_model(), &outline, class, special)?;
            if let Some(unigram) = unigram {
                inner.with_model(unigram);
            }
            let charsmap = inner.get_normalizer().and_then(precompiled);
            inner.with_added_vocabulary(AddedVocabulary::new());
            inner.with_normalizer(charsmap).map_err(as_error)?;
            let scheme = if init.add_prefix_space.unwrap_or(true) { PrependScheme::Always } else { PrependScheme::Never };
            let metaspace = Metaspace::new('\u{2581}', scheme, true);
            let parts = vec![PreTokenizerWrapper::from(WhitespaceSplit), PreTokenizerWrapper::from(metaspace)];
            inner.with_pre_tokenizer(Some(Sequence::new(parts)));
        }
        TokenizerClass::Roberta => {
            byte_level_bpe(inner, bytes, &outline)?;
            inner.with_added_vocabulary(AddedVocabulary::new());
            inner.with_normalizer(None::<NormalizerWrapper>).map_err(as_error)?;
            inner.with_pre_tokenizer(Some(ByteLevel::new(init.add_prefix_space.unwrap_or(false), true, true)));
        }
        _ => return Ok(()),
    }
    inner.with_post_processor(None::<PostProcessorWrapper>);
    Ok(())
}

fn word_piece(inner: &mut Tokenizer, unk_token: &str) -> Result<()> {
    let is_it = |model: &WordPiece| {
        model.unk_token == unk_token
            && model.continuing_subword_prefix == WORD_PREFIX
            && model.max_input_chars_per_word == WORD_CHARS
    };
    match inner.get_model() {
        ModelWrapper::WordPiece(model) if is_it(model) => {}
        ModelWrapper::WordPiece(model) => {
            let mut model = model.clone();
            model.unk_token = unk_token.to_owned();
            model.continuing_subword_prefix = WORD_PREFIX.to_owned();
            model.max_input_chars_per_word = WORD_CHARS;
            inner.with_model(model);
        }
        other => {
            let model = json!({
                "type": "WordPiece", "unk_token": unk_token, "continuing_subword_prefix": WORD_PREFIX,
                "max_input_chars_per_word": WORD_CHARS, "vocab": other.get_vocab(),
            });
            inner.with_model(model_of(&model)?);
        }
    }
    Ok(())
}

/// The model of `XLMRobertaTokenizer` or `CamembertTokenizer` where it is not that of tokenizer.json.
fn unigram(
    model: &ModelWrapper,
    outline: &ModelOutline,
    class: TokenizerClass,
    special: &SpecialTokens,
) -> Result<Option<Unigram>> {
    let ModelWrapper::Unigram(unigram) = model else {
        return Err(reason(format!("model: {} needs a Unigram vocabulary", class.name())));
    };
    let unk = match class {
        TokenizerClass::Camembert => {
            // Where it is missing the first piece takes its place, there as here.
            unigram.iter().position(|(piece, _)| piece == special.content(UNK)).unwrap_or(0)
        }
        _ => XLM_ROBERTA_UNK,
    };
    if outline.unk_id == Some(unk) && outline.byte_fallback != Some(true) {
        return Ok(None);
    }
    Unigram::from(unigram.iter().cloned().collect(), Some(unk), false).map(Some).map_err(as_error)
}

/// The first precompiled character map among the normalizers of tokenizer.json, which is all that the classes of Unigram take of them.
fn precompiled(normalizer: &NormalizerWrapper) -> Option<NormalizerWrapper> {
    match normalizer {
        NormalizerWrapper::Precompiled(_) => Some(normalizer.clone()),
        NormalizerWrapper::Sequence(sequence) => {
            sequence.as_ref().iter().find(|part| matches!(part, NormalizerWrapper::Precompiled(_))).cloned()
        }
        _ => None,
    }
}

/// The model of `RobertaTokenizer`: the vocabulary and merges of tokenizer.json without its other settings.
fn byte_level_bpe(inner: &mut Tokenizer, bytes: &[u8], outline: &ModelOutline) -> Result<()> {
    let empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
    let off = |flag: Option<bool>| flag != Some(true);
    let is_bpe = matches!(inner.get_model(), ModelWrapper::BPE(_));
    let as_it_is = is_bpe
        && outline.unk_token.is_none()
        && outline.dropout.is_none()
        && off(outline.fuse_unk)
        && off(outline.byte_fallback)
        && off(outline.ignore_merges)
        && empty(&outline.continuing_subword_prefix)
        && empty(&outline.end_of_word_suffix);
    if as_it_is {
        return Ok(());
    }
    let merges = match is_bpe {
        true => {
            let mut whole: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| reason(error.to_string()))?;
            whole.get_mut("model").and_then(|model| model.get_mut("merges")).map_or(Value::Null, Value::take)
        }
        // A vocabulary of another kind has none.
        false => json!([]),
    };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": inner.get_model().get_vocab(), "merges": merges,
    });
    inner.with_model(model_of(&model)?);
    Ok(())
}

/// The library reads models from text alone.
fn model_of(json: &Value) -> Result<ModelWrapper> {
    serde_json::from_str(&json.to_string()).map_err(|error| reason(error.to_string()))
}

/// Sets the post-processor that the class has of its own.
fn post_process(inner: &mut Tokenizer, files: &TokenizerFiles, special: &SpecialTokens) -> Result<()> {
    match files.class() {
        TokenizerClass::Bert | TokenizerClass::Dpr => {
            let (cls, sep) = (special.content(CLS), special.content(SEP));
            let ids = vec![(cls, special.id(inner, CLS, Some(2))?), (sep, special.id(inner, SEP, Some(3))?)];
            inner.with_post_processor(Some(template(&format!("{cls}:0 $A:0 {sep}:0"), ids)?));
        }
        TokenizerClass::MpNet => {
            let cls = (special.content(CLS).to_owned(), special.id(inner, CLS, Some(0))?);
            let sep = (special.content(SEP).to_owned(), special.id(inner, SEP, Some(2))?);
            inner.with_post_processor(Some(RobertaProcessing::new(sep, cls).add_prefix_space(false)));
        }
        TokenizerClass::XlmRoberta | TokenizerClass::Camembert => {
            let (bos, eos) = (special.content(BOS), special.content(EOS));
            let ids = vec![(bos, special.id(inner, BOS, None)?), (eos, special.id(inner, EOS, None)?)];
            inner.with_post_processor(Some(template(&format!("{bos} $A {eos}"), ids)?));
        }
        TokenizerClass::Roberta => {
            let cls = (special.content(CLS).to_owned(), special.id(inner, CLS, None)?);
            let sep = (special.content(SEP).to_owned(), special.id(inner, SEP, None)?);
            let prefix = files.init().add_prefix_space.unwrap_or(false);
            inner.with_post_processor(Some(RobertaProcessing::new(sep, cls).add_prefix_space(prefix)));
        }
        _ => {
            if let Some((bos, eos)) = files.init().add_bos_eos {
                add_bos_eos(inner, special, bos, eos)?;
            }
        }
    }
    Ok(())
}

/// `add_bos_token` and `add_eos_token` where they are given: they replace the post-processor of tokenizer.json.
fn add_bos_eos(inner: &mut Tokenizer, special: &SpecialTokens, bos: bool, eos: bool) -> Result<()> {
    let mut pieces = vec!["$A:0".to_owned()];
    let mut ids = Vec::new();
    if bos && special.named[BOS].is_some() {
        pieces.insert(0, format!("{}:0", special.content(BOS)));
        ids.push((special.content(BOS), special.id(inner, BOS, None)?));
    }
    if eos && special.named[EOS].is_some() {
        pieces.push(format!("{}:0", special.content(EOS)));
        ids.push((special.content(EOS), special.id(inner, EOS, None)?));
    }
    inner.with_post_processor(Some(template(&pieces.join(" "), ids)?));
    Ok(())
}

fn template(single: &str, ids: Vec<(&str, u32)>) -> Result<TemplateProcessing> {
    let mut builder = TemplateProcessing::builder();
    builder.try_single(single).map_err(reason)?;
    builder.special_tokens(ids);
    builder.build().map_err(|error| reason(format!("special tokens of every text: {error}")))
}

fn without_limits(inner: &mut Tokenizer) -> Result<()> {
    inner.with_padding(None);
    inner.with_truncation(None).map_err(as_error)?;
    Ok(())
}

fn reason(reason: String) -> Error {
    Error::Tokenizer { reason }
}

pub(super) fn as_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}

/// Puts the path of the vocabulary before the reason of an error.
pub(super) fn at(path: &Path) -> impl Fn(Error) -> Error + '_ {
    move |error| match error {
        Error::Tokenizer { reason } => Error::Tokenizer { reason: format!("{}: {reason}", path.display()) },
        other => other,
    }
}
