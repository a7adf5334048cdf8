//! Tokenizers that are served in one pass: the ids that the library gives, without allocations on a warm thread. Which ones they are, and which of
//! their texts, stands in the files of their kinds; all else is the library's own.

use super::added::{AddedTokens, Part};
use super::byte_level_bpe::{self, ByteLevelBpe};
use super::compact::{Reader, Writer};
use super::unigram::{self, UnigramPieces};
use super::windows::Kept;
use super::word_piece::{self, WordPieces};
use super::words;
use tokenizers::{ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, Tokenizer};

/// See the module.
#[derive(Debug)]
pub(super) struct OnePass {
    /// Tokens that are found in the text as it is.
    raw: AddedTokens,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    WordPiece(Box<WordPieces>),
    ByteLevelBpe(Box<ByteLevelBpe>),
    Unigram(Box<UnigramPieces>),
}

/// Memory of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    words: words::Kept,
    word_piece: word_piece::Scratch,
    byte_level_bpe: byte_level_bpe::Scratch,
    unigram: unigram::Scratch,
}

impl Scratch {
    pub const fn new() -> Self {
        Self {
            words: words::Kept::new(),
            word_piece: word_piece::Scratch::new(),
            byte_level_bpe: byte_level_bpe::Scratch::new(),
            unigram: unigram::Scratch::new(),
        }
    }
}

/// How many ids of a text are wanted, of which end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Where the text's ids begin among all.
    pub begin: usize,
    pub needed: usize,
    pub kept: Kept,
}

impl Wanted {
    /// Whether no more ids are wanted. Of a long text whose end is kept, the beginning is let go now and then.
    #[inline]
    pub fn enough(&self, ids: &mut Vec<u32>) -> bool {
        let found = ids.len() - self.begin;
        match self.kept {
            Kept::Start => found >= self.needed,
            Kept::End => {
                if found > self.needed.saturating_mul(2).saturating_add(4096) {
                    ids.drain(self.begin..ids.len() - self.needed);
                }
                false
            }
        }
    }
}

impl OnePass {
    /// `None` where `inner` has parts, or settings, that are not served.
    pub fn of(inner: &Tokenizer) -> Option<Self> {
        // Special tokens within a text are then plain text.
        if inner.get_encode_special_tokens() || inner.get_truncation().is_some() || inner.get_padding().is_some() {
            return None;
        }
        let (mut raw, mut normalized) = (Vec::new(), Vec::new());
        for (&id, token) in &inner.get_added_tokens_decoder() {
            if token.normalized {
                normalized.push((normal_form(inner.get_normalizer(), &token.content)?, id, token.clone()));
            } else {
                raw.push((token.content.clone(), id, token.clone()));
            }
        }
        let kind = match inner.get_model() {
            ModelWrapper::WordPiece(_) => Kind::WordPiece(Box::new(WordPieces::of(inner, &normalized)?)),
            ModelWrapper::BPE(_) => Kind::ByteLevelBpe(Box::new(ByteLevelBpe::of(inner, &normalized)?)),
            ModelWrapper::Unigram(_) => Kind::Unigram(Box::new(UnigramPieces::of(inner, &normalized)?)),
            _ => return None,
        };
        Some(Self { raw: AddedTokens::new(&raw)?, kind })
    }

    /// Whether every text is served, so that the library is not needed beside it.
    pub fn serves_all(&self) -> bool {
        match self.kind {
            Kind::WordPiece(_) => false,
            Kind::ByteLevelBpe(_) | Kind::Unigram(_) => true,
        }
    }

    /// Writes one that serves every text; `false` for another.
    pub fn write(&self, to: &mut Writer) -> bool {
        self.raw.write(to);
        match &self.kind {
            Kind::WordPiece(_) => return false,
            Kind::ByteLevelBpe(bpe) => {
                to.flag(false);
                bpe.write(to);
            }
            Kind::Unigram(pieces) => {
                to.flag(true);
                pieces.write(to);
            }
        }
        true
    }

    /// What [`OnePass::write`] wrote.
    pub fn read(from: &mut Reader<'_>) -> Option<Self> {
        let raw = AddedTokens::read(from)?;
        let kind = match from.flag()? {
            false => Kind::ByteLevelBpe(Box::new(ByteLevelBpe::read(from)?)),
            true => Kind::Unigram(Box::new(UnigramPieces::read(from)?)),
        };
        Some(Self { raw, kind })
    }

    /// Appends the ids of `text` to `ids`: all of them, or at least `needed` of those at the kept side. `false` where the text is not served; what was
    /// appended is then of no use.
    pub fn ids(&self, text: &str, needed: usize, kept: Kept, scratch: &mut Scratch, ids: &mut Vec<u32>) -> bool {
        let wanted = Wanted { begin: ids.len(), needed, kept };
        for part in self.raw.split(text) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    let served = match &self.kind {
                        Kind::WordPiece(pieces) => pieces.ids(text, wanted, &mut scratch.word_piece, ids),
                        Kind::ByteLevelBpe(bpe) => {
                            bpe.ids(text, wanted, &mut scratch.words, &mut scratch.byte_level_bpe, ids);
                            true
                        }
                        Kind::Unigram(pieces) => {
                            pieces.ids(text, wanted, &mut scratch.words, &mut scratch.unigram, ids);
                            true
                        }
                    };
                    if !served {
                        return false;
                    }
                }
            }
            if wanted.enough(ids) {
                break;
            }
        }
        true
    }
}

#[cfg(test)]
impl OnePass {
    /// As it is when it was kept on disk, which is all that tests of ids need to know of both.
    pub fn written_and_read(&self) -> Self {
        let mut to = Writer::default();
        assert!(self.write(&mut to), "served in one pass, but not kept");
        Self::read(&mut Reader::new(&to.into_bytes())).expect("what was written")
    }
}

/// The normal form of `text`, where the library gives one.
pub(super) fn normal_form(normalizer: Option<&NormalizerWrapper>, text: &str) -> Option<String> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = normalizer {
        normalizer.normalize(&mut normalized).ok()?;
    }
    Some(normalized.get().to_owned())
}
