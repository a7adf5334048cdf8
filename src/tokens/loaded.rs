//! A tokenizer that is ready to give ids, without what its users may each have otherwise: the prompt, the most tokens, the threads.

use super::assemble::{Assembled, as_error};
use super::compact::{Reader, Writer};
use super::cuts::Cuts;
use super::one_pass::{OnePass, Scratch};
use super::tokenizer::TokenizerSettings;
use super::windows::{Kept, Limits, Windows};
use crate::{Error, Result};
use std::collections::HashSet;
use tokenizers::normalizers::{Lowercase, Sequence};
use tokenizers::{Encoding, NormalizerWrapper, Token, TruncationDirection};

/// Stands for the text's own tokens where the special tokens around them are found out.
const TEXT: u32 = u32::MAX;

/// The settings that a loaded tokenizer depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choices {
    pub lower_case: bool,
    pub add_special_tokens: bool,
    pub position_padding: Option<u32>,
}

impl Choices {
    pub fn of(settings: &TokenizerSettings) -> Self {
        let &TokenizerSettings { lower_case, add_special_tokens, position_padding, .. } = settings;
        Self { lower_case, add_special_tokens, position_padding }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Loaded {
    pub kept: Kept,
    /// Special tokens before and after every text.
    pub before: Vec<u32>,
    pub after: Vec<u32>,
    pub special_ids: HashSet<u32>,
    /// The token of [`Choices::position_padding`].
    pub position_padding: String,
    way: Way,
}

/// How texts become ids.
#[derive(Debug)]
enum Way {
    /// Every text in one pass.
    OnePass(OnePass),
    /// By the library, but for texts that are served in one pass.
    Library(Box<Library>),
}

#[derive(Debug)]
struct Library {
    one_pass: Option<OnePass>,
    inner: tokenizers::Tokenizer,
    cuts: Cuts,
}

impl Loaded {
    pub fn new(assembled: Assembled, choices: Choices) -> Result<Self> {
        let Assembled { mut inner, side, special_ids, token_types } = assembled;
        if choices.lower_case {
            lower_case_first(&mut inner)?;
        }
        let (before, after) = match choices.add_special_tokens {
            true => frame(&inner, token_types)?,
            false => (Vec::new(), Vec::new()),
        };
        let kept = if side == TruncationDirection::Left { Kept::End } else { Kept::Start };
        let position_padding = choices.position_padding.and_then(|id| inner.id_to_token(id)).unwrap_or_default();
        let way = match OnePass::of(&inner) {
            Some(one_pass) if one_pass.serves_all() => Way::OnePass(one_pass),
            one_pass => Way::Library(Box::new(Library { one_pass, cuts: Cuts::new(&inner), inner })),
        };
        Ok(Self { kept, before, after, special_ids, position_padding, way })
    }

    /// Appends the ids of `text` to `ids`, without special tokens around them: all of them, or at least `needed` of those at the kept side. Where it
    /// fails, `ids` is of no use.
    pub fn append(&self, text: &str, needed: usize, kept: Kept, scratch: &mut Scratch, ids: &mut Vec<u32>) -> Result<(), String> {
        let begin = ids.len();
        match &self.way {
            Way::OnePass(one_pass) => {
                one_pass.ids(text, needed, kept, scratch, ids);
            }
            Way::Library(library) => {
                let Library { one_pass, inner, cuts } = &**library;
                if one_pass.as_ref().is_some_and(|one_pass| one_pass.ids(text, needed, kept, scratch, ids)) {
                    return Ok(());
                }
                ids.truncate(begin);
                let encode = |part: &str| {
                    inner.encode_fast(part, false).map(|encoding| encoding.get_ids().to_vec()).map_err(|error| error.to_string())
                };
                ids.extend(Windows { cuts, encode, limits: Limits::default() }.ids(text, needed, kept)?);
            }
        }
        Ok(())
    }

    /// As bytes; `None` for one that the library is needed for.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let Self { kept, before, after, special_ids, position_padding, way } = self;
        let Way::OnePass(one_pass) = way else { return None };
        let mut to = Writer::default();
        to.flag(*kept == Kept::End);
        to.records(before.iter().map(|&id| [id]));
        to.records(after.iter().map(|&id| [id]));
        to.records(special_ids.iter().map(|&id| [id]));
        to.text(position_padding);
        one_pass.write(&mut to).then(|| to.into_bytes())
    }

    /// What [`Loaded::to_bytes`] gave; `None` where it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut from = Reader::new(bytes);
        let loaded = Self {
            kept: if from.flag()? { Kept::End } else { Kept::Start },
            before: from.records()?.map(|[id]| id).collect(),
            after: from.records()?.map(|[id]| id).collect(),
            special_ids: from.records()?.map(|[id]| id).collect(),
            position_padding: from.text()?.to_owned(),
            way: Way::OnePass(OnePass::read(&mut from)?),
        };
        from.is_at_end().then_some(loaded)
    }
}

/// The special tokens before and after a text.
pub(super) fn frame(inner: &tokenizers::Tokenizer, token_types: bool) -> Result<(Vec<u32>, Vec<u32>)> {
    let text = Encoding::from_tokens(vec![Token::new(TEXT, String::new(), (0, 0))], 0);
    let framed = inner.post_process(text, None, true).map_err(as_error)?;
    let ids = framed.get_ids();
    let (Some(place), 1) = (ids.iter().position(|&id| id == TEXT), ids.iter().filter(|&&id| id == TEXT).count()) else {
        let reason = "post_processor: a text is expected once between its special tokens".to_owned();
        return Err(Error::Tokenizer { reason });
    };
    if token_types && framed.get_type_ids().iter().any(|&kind| kind != 0) {
        let reason = "post_processor: token types other than 0, which model_input_names asks for, are not supported".to_owned();
        return Err(Error::Tokenizer { reason });
    }
    Ok((ids[..place].to_vec(), ids[place + 1..].to_vec()))
}

/// `do_lower_case` as sentence-transformers does it: a `Lowercase` normalizer before the others unless there is one. Added tokens
/// written in the text (`[SEP]`) are found before any normalizer runs and stay what they are.
pub(super) fn lower_case_first(inner: &mut tokenizers::Tokenizer) -> Result<()> {
    let mut normalizers = vec![NormalizerWrapper::from(Lowercase)];
    match inner.get_normalizer() {
        Some(NormalizerWrapper::Sequence(sequence)) => normalizers.extend(sequence.as_ref().iter().cloned()),
        Some(other) => normalizers.push(other.clone()),
        None => {}
    }
    if !normalizers.iter().skip(1).any(|normalizer| matches!(normalizer, NormalizerWrapper::Lowercase(_))) {
        inner.with_normalizer(Some(Sequence::new(normalizers))).map_err(as_error)?;
    }
    Ok(())
}
