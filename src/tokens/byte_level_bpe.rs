//! Byte-level BPE as GPT-2 and RoBERTa have it, in one pass and without allocations: the ids that the library gives.
//!
//! Served are models without normalizer, with GPT-2's regular expression (with or without a space put before texts) and with all 256 bytes in the
//! vocabulary. The regular expression is followed by hand, with the classes of characters that the library's own tables have. (In one thing the
//! library differs: in a run of a million blanks its regular expression gives up.)

use super::added::{AddedTokens, Part};
use super::compact::{Reader, Writer};
use super::one_pass::Wanted;
use super::windows::Kept;
use super::words::{self, Table, Words};
use regex_syntax::hir::{Class, HirKind};
use serde::Deserialize;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::hash::BuildHasherDefault;
use std::sync::OnceLock;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, ModelWrapper, PreTokenizerWrapper, Tokenizer};

/// No rank.
const NONE: u32 = u32::MAX;
/// Bytes of the longest word in which the best pair is looked for one by one; a heap has it for longer ones.
const SHORT: usize = 32;
/// Bytes that a token covers, as a first guess.
const BYTES_PER_TOKEN: usize = 8;
/// The least that is read of a word: all of those that are kept for other texts, which may want more of their ids.
const LEAST_WINDOW: usize = words::LONGEST + 1;

/// What a character is to the regular expression `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3;

/// See the module.
#[derive(Debug)]
pub(super) struct ByteLevelBpe {
    /// Added tokens that are looked for in the normalized text, which is the text itself here, after the others.
    added: AddedTokens,
    add_prefix_space: bool,
    classes: &'static [u8],
    /// The symbol of each byte.
    bytes: [u32; 256],
    words: Words,
    /// The rank of each pair of bytes, [`NONE`] of those that are not merged: 256 by 256.
    byte_ranks: Vec<u32>,
    /// The rank of each pair of symbols that is merged.
    ranks: Table<u64, u32>,
    /// What becomes of the pair of each rank.
    merged: Vec<u32>,
    /// Bytes of the longest token that merging gives.
    longest: usize,
}

/// Memory of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    spaced: String,
    merging: Merging,
    first: Vec<u32>,
    other: Vec<u32>,
}

/// A word while its symbols are merged.
#[derive(Debug, Default)]
struct Merging {
    symbols: Vec<u32>,
    /// The rank of each symbol and the next.
    ranks: Vec<u32>,
    /// Places of the symbols that are left beside each one.
    next: Vec<u32>,
    previous: Vec<u32>,
    /// Ranks with places, some out of date.
    heap: BinaryHeap<Reverse<u64>>,
}

impl Scratch {
    pub const fn new() -> Self {
        let merging =
            Merging { symbols: Vec::new(), ranks: Vec::new(), next: Vec::new(), previous: Vec::new(), heap: BinaryHeap::new() };
        Self { spaced: String::new(), merging, first: Vec::new(), other: Vec::new() }
    }
}

/// What of a model the library gives away as text alone.
#[derive(Deserialize)]
struct Merges {
    merges: Vec<(String, String)>,
}

impl ByteLevelBpe {
    /// `None` where `inner` has parts that are not served. `added`: spellings, ids and rules of the added tokens that are looked for in the normalized
    /// text.
    pub fn of(inner: &Tokenizer, added: &[(String, u32, AddedToken)]) -> Option<Self> {
        let ModelWrapper::BPE(model) = inner.get_model() else { return None };
        let Some(PreTokenizerWrapper::ByteLevel(pre_tokenizer)) = inner.get_pre_tokenizer() else { return None };
        let plain = |affix: &Option<String>| affix.as_ref().is_none_or(String::is_empty);
        let served = inner.get_normalizer().is_none()
            && pre_tokenizer.use_regex
            && model.dropout.is_none_or(|dropout| dropout == 0.0)
            && !model.ignore_merges
            && plain(&model.continuing_subword_prefix)
            && plain(&model.end_of_word_suffix);
        if !served {
            return None;
        }
        Self::new(model, AddedTokens::new(added)?, pre_tokenizer.add_prefix_space)
    }

    fn new(model: &BPE, added: AddedTokens, add_prefix_space: bool) -> Option<Self> {
        let vocabulary = model.get_vocab();
        // Two tokens of one id could be taken for each other.
        if vocabulary.values().collect::<HashSet<_>>().len() < vocabulary.len() || vocabulary.values().any(|&id| id == NONE) {
            return None;
        }
        let chars = byte_chars();
        let mut bytes = [NONE; 256];
        for (symbol, c) in bytes.iter_mut().zip(chars) {
            *symbol = *vocabulary.get(c.encode_utf8(&mut [0; 4]) as &str)?;
        }
        let Merges { merges } = serde_json::from_str(&serde_json::to_string(model).ok()?).ok()?;
        let (mut ranks, mut merged, mut longest) = (Table::<u64, u32>::default(), Vec::new(), 1);
        for ((left, right), rank) in merges.iter().zip(0..NONE) {
            let token = format!("{left}{right}");
            ranks.insert(pair(*vocabulary.get(left)?, *vocabulary.get(right)?), rank);
            merged.push(*vocabulary.get(&token)?);
            longest = longest.max(token.chars().count());
        }
        let rank = |left, right| ranks.get(&pair(left, right)).copied().unwrap_or(NONE);
        let byte_ranks = bytes.iter().flat_map(|&left| bytes.map(|right| rank(left, right))).collect();
        let byte_of: HashMap<char, u8> = chars.into_iter().zip(0..=u8::MAX).collect();
        let word = |token: &str| token.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>();
        let words = Words::new(vocabulary.iter().filter_map(|(token, &id)| Some((word(token)?, id))));
        Some(Self { added, add_prefix_space, classes: classes()?, bytes, words, byte_ranks, ranks, merged, longest })
    }

    pub fn write(&self, to: &mut Writer) {
        let Self { added, add_prefix_space, classes: _, bytes, words, byte_ranks, ranks, merged, longest } = self;
        added.write(to);
        to.flag(*add_prefix_space);
        to.records(bytes.iter().map(|&id| [id]));
        words.write(to);
        to.records(byte_ranks.iter().map(|&rank| [rank]));
        to.records(ranks.iter().map(|(&pair, &rank)| [pair as u32, (pair >> 32) as u32, rank]));
        to.records(merged.iter().map(|&id| [id]));
        to.number(*longest as u64);
    }

    pub fn read(from: &mut Reader<'_>) -> Option<Self> {
        let column = |from: &mut Reader<'_>| Some(from.records()?.map(|[number]| number).collect::<Vec<u32>>());
        let (added, add_prefix_space) = (AddedTokens::read(from)?, from.flag()?);
        let bytes = column(from)?.try_into().ok()?;
        let words = Words::read(from)?;
        let byte_ranks = column(from)?;
        let records = from.records()?;
        let mut ranks = Table::with_capacity_and_hasher(records.len(), BuildHasherDefault::default());
        ranks.extend(records.map(|[low, high, rank]| (u64::from(high) << 32 | u64::from(low), rank)));
        let (merged, longest) = (column(from)?, usize::try_from(from.number()?).ok()?);
        let fits = byte_ranks.len() == 1 << 16
            && byte_ranks.iter().chain(ranks.values()).all(|&rank| rank == NONE || (rank as usize) < merged.len());
        fits.then_some(Self { added, add_prefix_space, classes: classes()?, bytes, words, byte_ranks, ranks, merged, longest })
    }

    /// Appends the ids of `text`, in which no added token of the first search stands, as far as they are wanted.
    pub fn ids(&self, text: &str, wanted: Wanted, kept: &mut words::Kept, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        for part in self.added.split(text) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) if self.add_prefix_space && !text.starts_with(' ') => {
                    let mut spaced = std::mem::take(&mut scratch.spaced);
                    spaced.clear();
                    spaced.push(' ');
                    spaced.push_str(text);
                    self.text(&spaced, wanted, kept, scratch, ids);
                    scratch.spaced = spaced;
                }
                Part::Text(text) => self.text(text, wanted, kept, scratch, ids),
            }
            if wanted.enough(ids) {
                break;
            }
        }
    }

    fn text(&self, text: &str, wanted: Wanted, kept: &mut words::Kept, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let mut at = 0;
        while at < text.len() {
            let end = self.word_end(text, at);
            let word = &text.as_bytes()[at..end];
            self.words.ids(kept, word, ids, |ids| self.word(word, wanted, scratch, ids));
            if wanted.enough(ids) {
                break;
            }
            at = end;
        }
    }

    /// The end of the regular expression's match that begins at `at`, where there is a character.
    fn word_end(&self, text: &str, at: usize) -> usize {
        let bytes = text.as_bytes();
        match bytes[at] {
            b'\'' => match bytes.get(at + 1..) {
                Some([b's' | b't' | b'm' | b'd', ..]) => return at + 2,
                Some([b'r' | b'v', b'e', ..] | [b'l', b'l', ..]) => return at + 3,
                _ => {}
            },
            b' ' => match self.class(text, at + 1) {
                Some((class, _)) if class != SPACE => return self.run_end(text, at + 1, class),
                _ => {}
            },
            _ => {}
        }
        let Some((class, first)) = self.class(text, at) else { return text.len() };
        let end = self.run_end(text, at, class);
        if class != SPACE || end == text.len() {
            return end;
        }
        // What follows is no blank: the last blank is left to it, unless it is the only one.
        let last = text[at..end].chars().next_back().map_or(first, char::len_utf8);
        if end - last > at { end - last } else { end }
    }

    /// The end of the characters from `at` on that are of `class`.
    #[inline]
    fn run_end(&self, text: &str, mut at: usize, class: u8) -> usize {
        while let Some((other, bytes)) = self.class(text, at)
            && other == class
        {
            at += bytes;
        }
        at
    }

    /// The class of the character at `at`, and its bytes.
    #[inline]
    fn class(&self, text: &str, at: usize) -> Option<(u8, usize)> {
        let byte = *text.as_bytes().get(at)?;
        if byte.is_ascii() {
            return Some((self.classes[usize::from(byte)], 1));
        }
        let c = text.get(at..)?.chars().next()?;
        Some((self.classes[c as usize], c.len_utf8()))
    }

    /// Appends the ids of a word, as far as they are wanted.
    fn word(&self, word: &[u8], wanted: Wanted, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let missing = match wanted.kept {
            Kept::Start => wanted.needed.saturating_sub(ids.len() - wanted.begin),
            Kept::End => wanted.needed,
        };
        let mut window = missing.saturating_mul(BYTES_PER_TOKEN).max(LEAST_WINDOW);
        // Reading as many windows as a token has bytes is worth it.
        while window.saturating_mul(self.longest) < word.len() {
            if self.is_settled(word, window, missing, wanted.kept, scratch) {
                let found = &scratch.first;
                match wanted.kept {
                    Kept::Start => ids.extend_from_slice(&found[..missing]),
                    Kept::End => {
                        ids.truncate(wanted.begin);
                        ids.extend_from_slice(&found[found.len() - missing..]);
                    }
                }
                return;
            }
            window = window.saturating_mul(2);
        }
        self.merge(word, &mut scratch.merging, ids);
    }

    /// Whether the first (or last) `missing` ids of a long word can be told from about `window` bytes of it; they are then within `scratch.first`.
    ///
    /// No token is longer than the longest, so one ends at one of as many places that follow each other. Wherever it does, merging the part before
    /// that place alone gives the same ids as in the word: no pair over the place is ever merged. So what is the same for all places is so for the
    /// word.
    fn is_settled(&self, word: &[u8], window: usize, missing: usize, kept: Kept, scratch: &mut Scratch) -> bool {
        let Scratch { merging, first, other, .. } = scratch;
        for place in window..window + self.longest {
            let part = match kept {
                Kept::Start => &word[..place],
                Kept::End => &word[word.len() - place..],
            };
            let found = if place == window { &mut *first } else { &mut *other };
            found.clear();
            self.merge(part, merging, found);
            if found.len() < missing {
                return false;
            }
            let same = match kept {
                _ if place == window => true,
                Kept::Start => first[..missing] == other[..missing],
                Kept::End => first[first.len() - missing..] == other[other.len() - missing..],
            };
            if !same {
                return false;
            }
        }
        true
    }

    /// Appends what merging all of `word` gives: the pair of the least rank first, of several the leftmost, until none is left that has one.
    fn merge(&self, word: &[u8], merging: &mut Merging, ids: &mut Vec<u32>) {
        let Merging { symbols, ranks, .. } = merging;
        symbols.clear();
        symbols.extend(word.iter().map(|&byte| self.bytes[usize::from(byte)]));
        ranks.clear();
        ranks.extend(word.windows(2).map(|two| self.byte_ranks[usize::from(two[0]) << 8 | usize::from(two[1])]));
        if symbols.len() > SHORT {
            self.merge_by_heap(merging, ids);
            return;
        }
        while let Some((at, rank)) = least(ranks) {
            symbols[at] = self.merged[rank as usize];
            symbols.remove(at + 1);
            ranks.remove(at);
            if let Some(rank) = ranks.get_mut(at) {
                *rank = self.rank(symbols[at], symbols[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.rank(symbols[at - 1], symbols[at]);
            }
        }
        ids.extend_from_slice(symbols);
    }

    fn merge_by_heap(&self, merging: &mut Merging, ids: &mut Vec<u32>) {
        let Merging { symbols, ranks, next, previous, heap } = merging;
        let count = symbols.len() as u32;
        ranks.push(NONE);
        next.clear();
        next.extend(1..=count);
        previous.clear();
        previous.extend((0..count).map(|at| at.wrapping_sub(1)));
        let mut entries = std::mem::take(heap).into_vec();
        entries.clear();
        entries.extend(ranks.iter().zip(0..).filter(|&(&rank, _)| rank != NONE).map(|(&rank, at)| entry(rank, at)));
        *heap = BinaryHeap::from(entries);
        while let Some(Reverse(top)) = heap.pop() {
            let (rank, at) = ((top >> 32) as u32, top as u32 as usize);
            if ranks[at] != rank {
                continue;
            }
            let right = next[at] as usize;
            symbols[at] = self.merged[rank as usize];
            ranks[right] = NONE;
            next[at] = next[right];
            let (left, right) = (previous[at], next[at]);
            ranks[at] = NONE;
            if right < count {
                previous[right as usize] = at as u32;
            }
            for (left, right) in [(left, at as u32), (at as u32, right)] {
                // Before the first symbol, or behind the last.
                if left >= count || right >= count {
                    continue;
                }
                let rank = self.rank(symbols[left as usize], symbols[right as usize]);
                ranks[left as usize] = rank;
                if rank != NONE {
                    heap.push(entry(rank, left));
                }
            }
        }
        let mut at = 0;
        while at < count {
            ids.push(symbols[at as usize]);
            at = next[at as usize];
        }
    }

    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&pair(left, right)).copied().unwrap_or(NONE)
    }
}

/// The place of the least rank, the leftmost of several, where there is one.
#[inline]
fn least(ranks: &[u32]) -> Option<(usize, u32)> {
    let mut found = (0, NONE);
    for (at, &rank) in ranks.iter().enumerate() {
        if rank < found.1 {
            found = (at, rank);
        }
    }
    (found.1 != NONE).then_some(found)
}

fn entry(rank: u32, at: u32) -> Reverse<u64> {
    Reverse(u64::from(rank) << 32 | u64::from(at))
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// How a vocabulary spells each byte: GPT-2's `bytes_to_unicode`.
fn byte_chars() -> [char; 256] {
    let mut unprintable = (256..).filter_map(char::from_u32);
    std::array::from_fn(|byte| match char::from(byte as u8) {
        c @ ('!'..='~' | '¡'..='¬' | '®'..='ÿ') => c,
        c => unprintable.next().unwrap_or(c),
    })
}

/// The class of every character; `None` only where regular expressions know no Unicode.
fn classes() -> Option<&'static [u8]> {
    static CLASSES: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    let make = || {
        let mut classes = vec![OTHER; char::MAX as usize + 1];
        for (class, expression) in [(LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")] {
            let parsed = regex_syntax::parse(expression).ok()?;
            let HirKind::Class(Class::Unicode(ranges)) = parsed.kind() else { return None };
            for range in ranges.iter() {
                classes[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        Some(classes)
    };
    CLASSES.get_or_init(make).as_deref()
}

#[cfg(test)]
#[path = "byte_level_bpe_tests.rs"]
mod tests;
