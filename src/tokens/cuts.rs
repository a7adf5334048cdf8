//! Where a text may be cut so that the tokens of its parts, put together, are those of the whole.
//!
//! A tokenizer finds added tokens in the text, normalizes what lies between them, finds added tokens again, splits at spaces and the
//! like, and gives each piece to its model. A cut between two characters changes nothing where no added token can reach over it and
//! where normalizer and pre-tokenizer part the two in any case. Which characters do so is asked of the library itself, one character
//! between two letters at a time; that a character does what it does whatever stands beside it is known of the parts named in
//! [`Kind::of`], and of no others.

use std::collections::{HashMap, HashSet};
use tokenizers::{
    ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, Tokenizer,
};

/// White space at which texts are cut: what every normalizer keeps as white space or turns into a space.
const SPACES: [char; 4] = [' ', '\t', '\n', '\r'];

/// How a tokenizer parts characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// BERT's normalizer and pre-tokenizer: spaces, punctuation and ideographs stand alone whatever is beside them.
    Bert,
    /// White space ends pieces and is dropped.
    DropsSpace,
    /// A space begins a piece of which it is a part.
    KeepsSpace,
    /// Unknown parts.
    Whole,
}

/// What the library makes of one character between two others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nature {
    /// Whether it is a piece of its own, or none.
    alone: bool,
    /// Whether nothing of it is left but dropped white space.
    blank: bool,
    /// Whether its normal form begins, and ends, with a character that parts words and that no added token can have to do with.
    parts_before: bool,
    parts_after: bool,
    /// Whether an added token has it, or a character of its normal form.
    in_raw: bool,
    in_normalized: bool,
    /// Whether an added token begins, and ends, with it.
    pub begins_token: bool,
    pub ends_token: bool,
    /// Characters of its normal form.
    pub chars: usize,
}

/// The added tokens of one of the two searches, as far as cuts are concerned.
#[derive(Debug, Clone, Default)]
struct AddedTokens {
    /// Characters that follow each other in a token.
    pairs: HashSet<(char, char)>,
    contents: Vec<String>,
    chars: HashSet<char>,
    /// First and last characters of tokens that must be words of their own.
    word_starts: HashSet<char>,
    word_ends: HashSet<char>,
    /// Last characters of tokens that take the white space after them.
    strip_ends: HashSet<char>,
}

/// The rules of one tokenizer.
#[derive(Debug, Clone)]
pub(super) struct Cuts {
    kind: Kind,
    /// The white space at which this tokenizer may be cut.
    spaces: Vec<char>,
    /// Whether a character beside a space can make one cluster with it.
    clusters: bool,
    raw: AddedTokens,
    normalized: AddedTokens,
    normalizer: Option<NormalizerWrapper>,
    word: Option<WordModel>,
}

/// A WordPiece model as far as words without end are concerned.
#[derive(Debug, Clone)]
pub(super) struct WordModel {
    /// Words of more characters are the unknown token as a whole.
    pub max_chars: usize,
    pub unk_id: Option<u32>,
}

/// What has been learnt of characters within one text.
#[derive(Debug)]
pub(super) struct Known {
    ascii: [Option<Nature>; 128],
    others: HashMap<char, Nature>,
}

impl Default for Known {
    fn default() -> Self {
        Self { ascii: [None; 128], others: HashMap::new() }
    }
}

impl AddedTokens {
    fn add(&mut self, content: &str, token: &tokenizers::AddedToken) {
        self.chars.extend(content.chars());
        self.contents.push(content.to_owned());
        self.pairs.extend(content.chars().zip(content.chars().skip(1)));
        if token.single_word {
            self.word_starts.extend(content.chars().next());
            self.word_ends.extend(content.chars().next_back());
        }
        if token.rstrip {
            self.strip_ends.extend(content.chars().next_back());
        }
    }

    /// Whether no token can reach over the cut between `a` and `b`, nor see past it.
    fn parted(&self, a: char, b: char) -> bool {
        !self.pairs.contains(&(a, b)) && self.unseen(a, b)
    }

    /// Whether no token looks at its neighbour over the cut between `a` and `b`.
    fn unseen(&self, a: char, b: char) -> bool {
        let sees_left = self.word_starts.contains(&b) && may_be_word(a);
        let sees_right = self.word_ends.contains(&a) && may_be_word(b);
        !sees_left && !sees_right
    }
}

impl Kind {
    /// The kind of a tokenizer of these parts.
    fn of(normalizer: Option<&NormalizerWrapper>, pre_tokenizer: Option<&PreTokenizerWrapper>) -> Self {
        let normalizers: &[NormalizerWrapper] = match normalizer {
            None => &[],
            Some(NormalizerWrapper::Sequence(sequence)) => sequence.as_ref(),
            Some(one) => std::slice::from_ref(one),
        };
        use NormalizerWrapper as N;
        let bert = |part: &N| matches!(part, N::BertNormalizer(_) | N::Lowercase(_));
        let local = |part: &N| {
            bert(part) || matches!(part, N::NFC(_) | N::NFD(_) | N::NFKC(_) | N::NFKD(_) | N::StripAccents(_) | N::Precompiled(_))
        };
        let parts: &[PreTokenizerWrapper] = match pre_tokenizer {
            None => &[],
            Some(PreTokenizerWrapper::Sequence(sequence)) => sequence.as_ref(),
            Some(one) => std::slice::from_ref(one),
        };
        use PreTokenizerWrapper as P;
        let within = |part: &P| match part {
            P::Metaspace(metaspace) => {
                metaspace.get_prepend_scheme() != tokenizers::pre_tokenizers::metaspace::PrependScheme::First
            }
            P::BertPreTokenizer(_) | P::Whitespace(_) | P::WhitespaceSplit(_) | P::Digits(_) | P::Punctuation(_) => true,
            _ => false,
        };
        match parts {
            [P::BertPreTokenizer(_)] if normalizers.iter().all(bert) => Self::Bert,
            [P::BertPreTokenizer(_) | P::Whitespace(_) | P::WhitespaceSplit(_), rest @ ..]
                if normalizers.iter().all(local) && rest.iter().all(within) =>
            {
                Self::DropsSpace
            }
            [P::Metaspace(metaspace)] if normalizers.iter().all(local) && metaspace.get_split() => Self::KeepsSpace,
            [P::ByteLevel(bytes)] if normalizers.iter().all(local) && bytes.use_regex => Self::KeepsSpace,
            _ => Self::Whole,
        }
    }
}

impl Cuts {
    pub fn new(inner: &Tokenizer) -> Self {
        let normalizer = inner.get_normalizer().cloned();
        let kind = Kind::of(normalizer.as_ref(), inner.get_pre_tokenizer());
        let (mut raw, mut normalized) = (AddedTokens::default(), AddedTokens::default());
        let mut kind_or_whole = kind;
        for token in inner.get_added_tokens_decoder().values() {
            if !token.normalized {
                raw.add(&token.content, token);
                continue;
            }
            match normal_form(normalizer.as_ref(), &token.content) {
                Some(content) => normalized.add(&content, token),
                None => kind_or_whole = Kind::Whole,
            }
        }
        let clusters = normalizer.as_ref().is_some_and(has_clusters);
        let word = match inner.get_model() {
            ModelWrapper::WordPiece(model) if kind == Kind::Bert => Some(WordModel {
                max_chars: model.max_input_chars_per_word,
                unk_id: tokenizers::Model::token_to_id(model, &model.unk_token),
            }),
            _ => None,
        };
        let mut cuts = Self { kind: kind_or_whole, spaces: Vec::new(), clusters, raw, normalized, normalizer, word };
        cuts.spaces = SPACES.into_iter().filter(|&space| cuts.parts_words(inner, space)).collect();
        cuts
    }

    /// Whether the library parts two words at `space` just as two texts are parted. Of kinds that keep spaces, only ' ' begins a piece.
    fn parts_words(&self, inner: &Tokenizer, space: char) -> bool {
        let pieces = |text: &str| pieces(self.normalizer.as_ref(), inner.get_pre_tokenizer(), text);
        match (pieces(&format!("a{space}a")), pieces("a"), pieces(&format!("{space}a"))) {
            (Some(whole), Some(mut parts), Some(second)) => {
                parts.extend(second);
                whole == parts && (self.kind != Kind::KeepsSpace || space == ' ')
            }
            _ => false,
        }
    }

    pub fn word(&self) -> Option<&WordModel> {
        self.word.as_ref()
    }

    /// Whether a text may be cut between `a` and `b`, which follow each other in it, with what is known of them.
    pub fn between(&self, (a, of_a): (char, Nature), (b, of_b): (char, Nature)) -> bool {
        match self.kind {
            Kind::Whole => false,
            Kind::Bert => {
                (of_a.parts_after || of_b.parts_before)
                    && !(of_a.in_raw && of_b.in_raw && self.raw.pairs.contains(&(a, b)))
                    && self.raw.unseen(a, b)
            }
            Kind::DropsSpace => self.before_space(a, b),
            Kind::KeepsSpace => {
                self.before_space(a, b)
                    && (a.is_alphanumeric() || a.is_ascii_graphic())
                    && !self.raw.strip_ends.contains(&a)
                    && self.normalized.strip_ends.is_empty()
            }
        }
    }

    fn before_space(&self, a: char, b: char) -> bool {
        self.spaces.contains(&b)
            && self.raw.parted(a, b)
            && self.normalized.chars.iter().all(|c| !c.is_whitespace())
            && !(self.clusters && (may_prepend(a) || a == '\r'))
    }

    /// Whether nothing of `c` is left where it is cut off alone.
    pub fn is_blank(&self, c: char, of_c: Nature) -> bool {
        match self.kind {
            Kind::Bert => of_c.blank && !of_c.in_raw && !of_c.in_normalized,
            Kind::DropsSpace => self.spaces.contains(&c) && !of_c.in_raw,
            _ => false,
        }
    }

    /// Whether a character can be nothing but a part of a word, as long as no added token is found in the text.
    pub fn within_word(&self, nature: Nature) -> bool {
        !nature.alone && !nature.in_normalized
    }

    /// Whether an added token that is found in the text as it is ends at the end of `text`.
    pub fn token_ends(&self, text: &str) -> bool {
        self.raw.contents.iter().any(|token| text.ends_with(token.as_str()))
    }

    /// As [`Cuts::token_ends`], at its beginning.
    pub fn token_begins(&self, text: &str) -> bool {
        self.raw.contents.iter().any(|token| text.starts_with(token.as_str()))
    }

    /// Whether an added token that is found in the text as it is stands anywhere in `text`.
    pub fn holds_token(&self, text: &str) -> bool {
        self.raw.contents.iter().any(|token| text.contains(token.as_str()))
    }

    /// The normal form of `text`, where the library gives one.
    pub fn normal_form(&self, text: &str) -> Option<String> {
        normal_form(self.normalizer.as_ref(), text)
    }

    /// What the library makes of `c`.
    pub fn nature(&self, known: &mut Known, c: char) -> Nature {
        match known.ascii.get_mut(c as usize) {
            Some(known) => *known.get_or_insert_with(|| self.ask(c)),
            None => *known.others.entry(c).or_insert_with(|| self.ask(c)),
        }
    }

    fn ask(&self, c: char) -> Nature {
        let bert = PreTokenizerWrapper::from(tokenizers::pre_tokenizers::bert::BertPreTokenizer);
        let form = self.normal_form(c.encode_utf8(&mut [0; 4])).unwrap_or_default();
        let split = pieces(self.normalizer.as_ref(), Some(&bert), &format!("a{c}a")).unwrap_or_default();
        let alone =
            split.len() > 1 && split.first().is_some_and(|piece| piece == "a") && split.last().is_some_and(|piece| piece == "a");
        let parts = |edge: Option<char>| {
            alone && edge.is_some_and(|edge| !self.normalized.chars.contains(&edge) && !self.seen_as_word(edge))
        };
        Nature {
            alone,
            blank: alone && form.chars().all(char::is_whitespace),
            parts_before: parts(form.chars().next()),
            parts_after: parts(form.chars().next_back()),
            in_raw: self.raw.chars.contains(&c),
            begins_token: self.raw.contents.iter().any(|token| token.starts_with(c)),
            ends_token: self.raw.contents.iter().any(|token| token.ends_with(c)),
            in_normalized: form.chars().any(|c| self.normalized.chars.contains(&c)),
            chars: form.chars().count(),
        }
    }

    /// Whether a token that must be a word of its own would see `c` beside it as a part of a word.
    fn seen_as_word(&self, c: char) -> bool {
        !self.normalized.word_starts.is_empty() && may_be_word(c)
    }
}

/// Whether `c` may be a character of a word to a regular expression's `\w`; in doubt it is.
fn may_be_word(c: char) -> bool {
    !(c.is_whitespace() || (c.is_ascii() && !c.is_ascii_alphanumeric() && c != '_'))
}

/// Whether `c` may be of the class that joins what follows it (Unicode's Prepend, some letters of Indic and Arabic scripts); in doubt it is.
fn may_prepend(c: char) -> bool {
    !matches!(c, '\0'..'\u{600}' | '\u{2010}'..='\u{d7ff}' | '\u{f900}'..='\u{ffef}')
}

fn has_clusters(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::Sequence(sequence) => sequence.as_ref().iter().any(has_clusters),
        other => matches!(other, NormalizerWrapper::Precompiled(_)),
    }
}

fn normal_form(normalizer: Option<&NormalizerWrapper>, text: &str) -> Option<String> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = normalizer {
        normalizer.normalize(&mut normalized).ok()?;
    }
    Some(normalized.get().to_owned())
}

/// The pieces of `text`, normalized and split.
fn pieces(
    normalizer: Option<&NormalizerWrapper>,
    pre_tokenizer: Option<&PreTokenizerWrapper>,
    text: &str,
) -> Option<Vec<String>> {
    let mut split = PreTokenizedString::from(normal_form(normalizer, text)?);
    pre_tokenizer?.pre_tokenize(&mut split).ok()?;
    let pieces = split.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Some(pieces.into_iter().map(|(piece, _, _)| piece.to_owned()).collect())
}
