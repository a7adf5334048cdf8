//! WordPiece behind BERT's normalizer and pre-tokenizer, in one pass and without allocations: the ids that the library gives, for the texts that
//! this serves exactly. The others are left to the library.
//!
//! What makes one pass possible: BERT's normalizer and pre-tokenizer look at one character at a time. (But for the order of combining marks, and a text
//! with one that is left after normalization is not served.) So what the library makes of each character is asked of it once, and kept.

use super::one_pass::{Wanted, normal_form};
use super::trie::Trie;
use std::collections::HashMap;
use std::sync::OnceLock;
use tokenizers::{
    AddedToken, Model, ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, Tokenizer,
};
use unicode_normalization_alignments::char::canonical_combining_class;

/// Characters of a page, which are asked about together.
const PAGE: usize = 256;
const PAGES: usize = (char::MAX as usize + 1) / PAGE;
/// Most bytes of a normal form that is kept.
const FORM_BYTES: usize = 12;

/// What becomes of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A part of a word.
    Word,
    /// The end of a word, and no more.
    Blank,
    /// Nothing.
    Dropped,
    /// A word of its own.
    Alone,
    /// More than these, or what depends on its neighbours.
    Other,
}

/// The normal form of a character.
#[derive(Debug, Clone, Copy)]
struct Form {
    kind: Kind,
    /// Whether an added token that is found in the normalized text begins with its normal form, or a part of that.
    begins_token: bool,
    /// Of [`Kind::Word`] and [`Kind::Alone`]: characters and bytes.
    chars: u8,
    bytes: u8,
    text: [u8; FORM_BYTES],
}

impl Form {
    const OTHER: Self = Self { kind: Kind::Other, begins_token: false, chars: 0, bytes: 0, text: [0; FORM_BYTES] };

    fn text(&self) -> &[u8] {
        &self.text[..usize::from(self.bytes)]
    }
}

/// Asks the library what it makes of characters.
#[derive(Debug)]
struct Characters {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    /// Whether the normalizer puts combining marks into an order.
    orders_marks: bool,
    /// First characters of the added tokens that are found in the normalized text.
    firsts: Vec<char>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct WordPieces {
    characters: Characters,
    /// For ASCII, the byte of a plain part of a word as it is normalized; 0 for all others.
    plain: [u8; 256],
    pages: Box<[OnceLock<Box<[Form; PAGE]>>]>,
    /// The added tokens that are found in the normalized text: their normal forms without white space.
    normalized: Vec<String>,
    /// Pieces at the beginning of a word, and behind it.
    beginnings: Trie<u32>,
    continuations: Trie<u32>,
    /// Characters of the longest word that is not the unknown token as a whole.
    most_chars: usize,
    unknown: u32,
}

/// Memory of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    word: Vec<u8>,
    chars: usize,
}

impl Scratch {
    pub const fn new() -> Self {
        Self { word: Vec::new(), chars: 0 }
    }
}

impl WordPieces {
    /// `None` where `inner` has parts that are not served. `normalized`: normal forms, ids and rules of the added tokens that are found in the
    /// normalized text.
    pub fn of(inner: &Tokenizer, normalized: &[(String, u32, AddedToken)]) -> Option<Self> {
        let ModelWrapper::WordPiece(model) = inner.get_model() else { return None };
        let pre_tokenizer = match inner.get_pre_tokenizer()? {
            bert @ PreTokenizerWrapper::BertPreTokenizer(_) => bert.clone(),
            _ => return None,
        };
        let normalizer = inner.get_normalizer().cloned();
        let parts: &[NormalizerWrapper] = match &normalizer {
            None => &[],
            Some(NormalizerWrapper::Sequence(sequence)) => sequence.as_ref(),
            Some(one) => std::slice::from_ref(one),
        };
        let mut orders_marks = false;
        for part in parts {
            match part {
                NormalizerWrapper::BertNormalizer(bert) => orders_marks |= bert.strip_accents.unwrap_or(bert.lowercase),
                NormalizerWrapper::Lowercase(_) => {}
                _ => return None,
            }
        }
        let without_blanks = |(form, ..): &(String, u32, AddedToken)| form.chars().filter(|c| !c.is_whitespace()).collect();
        let normalized: Vec<String> = normalized.iter().map(without_blanks).collect();
        let firsts = normalized.iter().map(|token| token.chars().next()).collect::<Option<Vec<char>>>()?;
        let vocabulary = model.get_vocab();
        let unknown = *vocabulary.get(&model.unk_token)?;
        let (beginnings, continuations) = tries(&vocabulary, &model.continuing_subword_prefix)?;
        let characters = Characters { normalizer, pre_tokenizer, orders_marks, firsts };
        let mut pieces = Self {
            characters,
            plain: [0; 256],
            pages: (0..PAGES).map(|_| OnceLock::new()).collect(),
            normalized,
            beginnings,
            continuations,
            most_chars: model.max_input_chars_per_word,
            unknown,
        };
        for byte in 0..128_u8 {
            let form = pieces.form(char::from(byte));
            if form.kind == Kind::Word && form.bytes == 1 && !form.begins_token {
                pieces.plain[usize::from(byte)] = form.text[0];
            }
        }
        Some(pieces)
    }

    /// Appends the ids of `text`, in which no added token stands as it is, as far as they are wanted. `false` where the text is not served.
    pub fn ids(&self, text: &str, wanted: Wanted, scratch: &mut Scratch, ids: &mut Vec<u32>) -> bool {
        scratch.word.clear();
        scratch.chars = 0;
        let bytes = text.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            let run = at;
            while let Some(&byte) = bytes.get(at)
                && self.plain[usize::from(byte)] != 0
            {
                at += 1;
            }
            if at > run {
                self.extend(scratch, at - run, bytes[run..at].iter().map(|&byte| self.plain[usize::from(byte)]));
                continue;
            }
            let rest = &text[at..];
            let Some(c) = rest.chars().next() else { break };
            let form = self.form(c);
            if form.begins_token && self.normalized.iter().any(|token| self.may_begin(rest, token)) {
                return false;
            }
            at += c.len_utf8();
            match form.kind {
                Kind::Word => {
                    self.extend(scratch, usize::from(form.chars), form.text().iter().copied());
                    continue;
                }
                Kind::Dropped => continue,
                Kind::Other => return false,
                Kind::Blank => self.finish_word(scratch, ids),
                Kind::Alone => {
                    self.finish_word(scratch, ids);
                    self.word(form.text(), usize::from(form.chars), ids);
                }
            }
            if wanted.enough(ids) {
                return true;
            }
        }
        self.finish_word(scratch, ids);
        true
    }

    /// Adds `chars` characters to the word; those beyond the longest one are counted and no more.
    #[inline]
    fn extend(&self, scratch: &mut Scratch, chars: usize, bytes: impl Iterator<Item = u8>) {
        scratch.chars += chars;
        if scratch.chars <= self.most_chars {
            scratch.word.extend(bytes);
        }
    }

    #[inline]
    fn finish_word(&self, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if scratch.chars > 0 {
            self.word(&scratch.word, scratch.chars, ids);
            scratch.word.clear();
            scratch.chars = 0;
        }
    }

    /// Appends the pieces of a word, or the unknown token.
    fn word(&self, word: &[u8], chars: usize, ids: &mut Vec<u32>) {
        let begin = ids.len();
        if chars <= self.most_chars {
            let (mut rest, mut trie) = (word, &self.beginnings);
            loop {
                if rest.is_empty() {
                    return;
                }
                let Some((length, id)) = trie.longest(rest) else { break };
                ids.push(id);
                (rest, trie) = (&rest[length..], &self.continuations);
            }
        }
        ids.truncate(begin);
        ids.push(self.unknown);
    }

    /// Whether the normal form of `text` may begin with `token`, or have it begin within that of its first character, white space left aside.
    fn may_begin(&self, text: &str, token: &str) -> bool {
        let mut left = token.as_bytes();
        for c in text.chars() {
            let form = self.form(c);
            match form.kind {
                Kind::Dropped | Kind::Blank => continue,
                Kind::Word | Kind::Alone => {}
                Kind::Other => return true,
            }
            let common = left.len().min(form.text().len());
            if left[..common] != form.text()[..common] {
                let first = left.len() == token.len();
                return first && form.chars > 1;
            }
            left = &left[common..];
            if left.is_empty() {
                return true;
            }
        }
        false
    }

    #[inline]
    fn form(&self, c: char) -> &Form {
        let (page, place) = (c as usize / PAGE, c as usize % PAGE);
        let forms = self.pages[page].get_or_init(|| {
            let mut forms = Box::new([Form::OTHER; PAGE]);
            for (place, form) in forms.iter_mut().enumerate() {
                if let Some(c) = u32::try_from(page * PAGE + place).ok().and_then(char::from_u32) {
                    *form = self.characters.form(c);
                }
            }
            forms
        });
        &forms[place]
    }
}

/// The pieces at the beginning of a word, and those behind it, without `prefix`.
fn tries(vocabulary: &HashMap<String, u32>, prefix: &str) -> Option<(Trie<u32>, Trie<u32>)> {
    let all = vocabulary.iter().map(|(piece, &id)| (piece.as_str(), id));
    let beginnings = all.clone().filter(|(piece, _)| !piece.is_empty());
    let continuations =
        all.filter_map(|(piece, id)| Some((piece.strip_prefix(prefix)?, id))).filter(|(piece, _)| !piece.is_empty());
    let trie = |entries: Vec<(&str, u32)>| Trie::new(entries.into_iter().map(|(piece, id)| (piece.as_bytes(), id)).collect());
    Some((trie(beginnings.collect()), trie(continuations.collect())))
}

impl Characters {
    /// What the library makes of `c`.
    fn form(&self, c: char) -> Form {
        let Some(normal) = normal_form(self.normalizer.as_ref(), c.encode_utf8(&mut [0; 4])) else { return Form::OTHER };
        let other = Form { begins_token: self.firsts.iter().any(|&first| normal.contains(first)), ..Form::OTHER };
        if self.orders_marks && normal.chars().any(|c| canonical_combining_class(c) != 0) {
            return other;
        }
        let parts: Option<Vec<Part>> = normal.chars().map(|c| self.part(c)).collect();
        let Some(parts) = parts else { return other };
        let is = |part: Part| parts.iter().all(|&of| of == part);
        let kept = normal.trim_matches(char::is_whitespace);
        let spaced = normal.starts_with(char::is_whitespace) && normal.ends_with(char::is_whitespace);
        let inner: Vec<Part> = kept.chars().filter_map(|c| self.part(c)).collect();
        let kind = if normal.is_empty() {
            Kind::Dropped
        } else if is(Part::Space) {
            Kind::Blank
        } else if is(Part::Letter) {
            Kind::Word
        } else if inner == [Part::Mark] || spaced && inner.iter().all(|&part| part == Part::Letter) {
            Kind::Alone
        } else {
            return other;
        };
        let kept = if matches!(kind, Kind::Word | Kind::Alone) { kept } else { "" };
        let mut text = [0; FORM_BYTES];
        let Some(place) = text.get_mut(..kept.len()) else { return other };
        place.copy_from_slice(kept.as_bytes());
        Form { kind, chars: kept.chars().count() as u8, bytes: kept.len() as u8, text, ..other }
    }

    /// What the pre-tokenizer makes of a normalized character.
    fn part(&self, c: char) -> Option<Part> {
        let mut split = PreTokenizedString::from(format!("a{c}a"));
        self.pre_tokenizer.pre_tokenize(&mut split).ok()?;
        let pieces = split.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        match pieces.iter().map(|(piece, ..)| *piece).collect::<Vec<_>>()[..] {
            [_] => Some(Part::Letter),
            ["a", "a"] => Some(Part::Space),
            ["a", _, "a"] => Some(Part::Mark),
            _ => None,
        }
    }
}

/// What a normalized character is to the pre-tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Letter,
    Space,
    /// A piece of its own.
    Mark,
}

#[cfg(test)]
#[path = "word_piece_tests.rs"]
mod tests;
