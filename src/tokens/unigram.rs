//! Unigram behind Metaspace, as XLM-RoBERTa has it, in one pass: the ids that the library gives.
//!
//! Served are models with an unknown token and without fallback to bytes; a precompiled character map as normalizer (and runs of spaces made one), or
//! none; Metaspace that puts its mark before every word or before none, behind a split at white space or alone. On a warm thread nothing is allocated but
//! for characters that form clusters with marks, which the library's character map is asked about.

use super::added::{AddedTokens, Part};
use super::compact::{Reader, Writer};
use super::one_pass::Wanted;
use super::trie::Trie;
use super::words::{self, Words};
use std::sync::OnceLock;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Model, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};
use unicode_segmentation::UnicodeSegmentation;

/// Characters of a page, which are asked about together.
const PAGE: usize = 256;
const PAGES: usize = (char::MAX as usize + 1) / PAGE;
/// Most bytes of a normal form that is kept.
const FORM_BYTES: usize = 14;
/// Bytes of the longest cluster that the character map is asked about as a whole.
const CLUSTER_BYTES: usize = 5;
/// How much less than the least likely piece an unknown character is worth.
const UNKNOWN_PENALTY: f64 = 10.0;
/// Bytes of a word after which it is looked for what can no longer change.
const CHUNK: usize = 2048;

/// See the module.
#[derive(Debug)]
pub(super) struct UnigramPieces {
    characters: Characters,
    pages: Box<[OnceLock<Box<Page>>]>,
    /// Whether several spaces become one.
    squeezed: bool,
    /// Added tokens that are looked for in the normalized text.
    added: AddedTokens,
    split: Split,
    words: Words,
    model: Lattice,
}

/// How texts become words.
#[derive(Debug)]
struct Split {
    /// Whether white space ends words and is dropped; else a space becomes a mark.
    at_blanks: bool,
    mark: char,
    prepend: bool,
}

/// The pieces and their scores.
#[derive(Debug)]
struct Lattice {
    pieces: Trie<Piece>,
    unknown: u32,
    unknown_score: f64,
    /// Bytes of the longest piece, or of the longest character.
    longest: usize,
}

/// What is known of a piece.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Piece {
    id: u32,
    /// The bits of its score, in halves: whole they would make the trie's nodes larger.
    score: [u32; 2],
}

/// Asks the library what it makes of characters.
#[derive(Debug)]
struct Characters {
    map: Option<Precompiled>,
}

/// What is known of [`PAGE`] characters.
#[derive(Debug)]
struct Page {
    natures: [Nature; PAGE],
    forms: [Form; PAGE],
}

/// What a character is among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nature {
    /// It may form a cluster with its neighbours.
    Joined,
    /// Nothing joins it with a neighbour that is not [`Nature::Joined`].
    Apart,
    /// As well, and it is its own normal form.
    Plain,
}

/// The normal form of a character.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// [`TOO_LONG`] where it is not kept.
    bytes: u8,
    text: [u8; FORM_BYTES],
}

const TOO_LONG: u8 = u8::MAX;

/// The best way to a place of a word.
#[derive(Debug, Clone, Copy)]
struct Best {
    score: f64,
    /// The last piece: its bytes, 0 where no way is known yet, and its id.
    bytes: u32,
    id: u32,
}

const UNREACHED: Best = Best { score: 0.0, bytes: 0, id: 0 };

/// Memory of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    normal: String,
    word: String,
    best: Vec<Best>,
    marked: Vec<bool>,
    path: Vec<(u32, u32)>,
}

impl Scratch {
    pub const fn new() -> Self {
        Self { normal: String::new(), word: String::new(), best: Vec::new(), marked: Vec::new(), path: Vec::new() }
    }
}

impl UnigramPieces {
    /// `None` where `inner` has parts that are not served. `added`: normal forms, ids and rules of the added tokens that are looked for in the
    /// normalized text.
    pub fn of(inner: &Tokenizer, added: &[(String, u32, AddedToken)]) -> Option<Self> {
        let ModelWrapper::Unigram(model) = inner.get_model() else { return None };
        let parts: &[NormalizerWrapper] = match inner.get_normalizer() {
            None => &[],
            Some(NormalizerWrapper::Sequence(sequence)) => sequence.as_ref(),
            Some(one) => std::slice::from_ref(one),
        };
        let (map, squeezed) = match parts {
            [] => (None, false),
            [NormalizerWrapper::Precompiled(map)] => (Some(map.clone()), false),
            [NormalizerWrapper::Precompiled(map), NormalizerWrapper::Replace(replace)] if squeezes(replace) => {
                (Some(map.clone()), true)
            }
            _ => return None,
        };
        Some(Self {
            characters: Characters { map },
            pages: pages(),
            squeezed,
            added: AddedTokens::new(added)?,
            split: Split::of(inner.get_pre_tokenizer()?)?,
            words: Words::new(model.iter().zip(0..).map(|((piece, _), id)| (piece, id))),
            model: Lattice::of(model)?,
        })
    }

    pub fn write(&self, to: &mut Writer) {
        let Self { characters: Characters { map }, pages: _, squeezed, added, split, words, model } = self;
        // Of the library's character map only its JSON can be had.
        to.text(&map.as_ref().map_or_else(String::new, |map| serde_json::json!(map).to_string()));
        to.flag(*squeezed);
        added.write(to);
        let Split { at_blanks, mark, prepend } = *split;
        to.flag(at_blanks);
        to.number(u32::from(mark).into());
        to.flag(prepend);
        words.write(to);
        let Lattice { pieces, unknown, unknown_score, longest } = model;
        to.records(pieces.places().map(|(base, parent, Piece { id, score: [low, high] })| [base, parent, id, low, high]));
        to.number((*unknown).into());
        to.number(unknown_score.to_bits());
        to.number(*longest as u64);
    }

    pub fn read(from: &mut Reader<'_>) -> Option<Self> {
        let map = match from.text()? {
            "" => None,
            map => Some(serde_json::from_str(map).ok()?),
        };
        let squeezed = from.flag()?;
        let added = AddedTokens::read(from)?;
        let split = Split { at_blanks: from.flag()?, mark: char::from_u32(from.id()?)?, prepend: from.flag()? };
        let (words, pieces) = (from.records()?, from.records()?);
        let (unknown, unknown_score) = (from.id()?, f64::from_bits(from.number()?));
        let longest = usize::try_from(from.number()?).ok()?;
        let words = || Words::from_records(words.clone());
        let pieces = pieces.map(|[base, parent, id, low, high]| (base, parent, Piece { id, score: [low, high] }));
        // The system gives the memory page by page, which takes most of the time; on two cores half of it.
        let (words, pieces) = std::thread::scope(|scope| {
            let beside = std::thread::Builder::new().spawn_scoped(scope, words);
            let pieces = Trie::from_places(pieces);
            (beside.ok().and_then(|beside| beside.join().ok()).unwrap_or_else(words), pieces)
        });
        let model = Lattice { pieces: pieces?, unknown, unknown_score, longest };
        Some(Self { characters: Characters { map }, pages: pages(), squeezed, added, split, words, model })
    }

    /// Appends the ids of `text`, in which no added token of the first search stands, as far as they are wanted.
    pub fn ids(&self, text: &str, wanted: Wanted, kept: &mut words::Kept, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let mut normal = std::mem::take(&mut scratch.normal);
        normal.clear();
        self.normalize(text, &mut normal);
        for part in self.added.split(&normal) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => self.part(text, wanted, kept, scratch, ids),
            }
            if wanted.enough(ids) {
                break;
            }
        }
        scratch.normal = normal;
    }

    /// Appends the normal form of `text` to `normal`.
    fn normalize(&self, text: &str, normal: &mut String) {
        if self.characters.map.is_none() {
            normal.push_str(text);
            return;
        }
        let mut rest = text;
        while !rest.is_empty() {
            let (mut end, mut last, mut next) = (0, 0, None);
            for (at, c) in rest.char_indices() {
                let nature = self.nature(c);
                if nature != Nature::Plain {
                    next = Some((c, nature));
                    break;
                }
                (last, end) = (at, at + c.len_utf8());
            }
            // The last one may form a cluster with what follows.
            if next.is_some_and(|(_, nature)| nature == Nature::Joined) {
                end = last;
            }
            normal.push_str(&rest[..end]);
            rest = &rest[end..];
            let Some((c, nature)) = next else { break };
            let behind = &rest[rest.chars().next().map_or(0, char::len_utf8)..];
            let alone = nature == Nature::Apart && behind.chars().next().is_none_or(|c| self.nature(c) != Nature::Joined);
            if alone {
                match self.form(c).text().and_then(|text| std::str::from_utf8(text).ok()) {
                    Some(text) => normal.push_str(text),
                    None => self.characters.push(c.encode_utf8(&mut [0; 4]), normal),
                }
                rest = behind;
            } else if let Some(cluster) = rest.graphemes(true).next() {
                self.characters.push(cluster, normal);
                rest = &rest[cluster.len()..];
            }
        }
        if self.squeezed {
            let mut last = '\0';
            normal.retain(|c| (c, std::mem::replace(&mut last, c)) != (' ', ' '));
        }
    }

    fn part(&self, text: &str, wanted: Wanted, kept: &mut words::Kept, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let mut word = std::mem::take(&mut scratch.word);
        let Split { at_blanks, mark, prepend } = self.split;
        let mut spaced = |text: &str| {
            word.clear();
            if prepend && !text.starts_with(mark) && (at_blanks || !text.starts_with(' ')) {
                word.push(mark);
            }
            if at_blanks {
                word.push_str(text);
            } else {
                word.extend(text.chars().map(|c| if c == ' ' { mark } else { c }));
            }
            // Each mark begins a word.
            let mut rest = word.as_str();
            while let Some(first) = rest.chars().next() {
                let behind = first.len_utf8();
                let end = rest[behind..].find(mark).map_or(rest.len(), |at| behind + at);
                let word = &rest[..end];
                self.words.ids(kept, word.as_bytes(), ids, |ids| self.model.ids(word, wanted, scratch, ids));
                if wanted.enough(ids) {
                    return true;
                }
                rest = &rest[end..];
            }
            false
        };
        if at_blanks {
            text.split(char::is_whitespace).filter(|word| !word.is_empty()).any(spaced);
        } else {
            spaced(text);
        }
        scratch.word = word;
    }

    #[inline]
    fn nature(&self, c: char) -> Nature {
        self.page(c).natures[c as usize % PAGE]
    }

    fn form(&self, c: char) -> &Form {
        &self.page(c).forms[c as usize % PAGE]
    }

    #[inline]
    fn page(&self, c: char) -> &Page {
        let page = c as usize / PAGE;
        self.pages[page].get_or_init(|| {
            let unknown = Form { bytes: TOO_LONG, text: [0; FORM_BYTES] };
            let mut made = Box::new(Page { natures: [Nature::Joined; PAGE], forms: [unknown; PAGE] });
            for place in 0..PAGE {
                if let Some(c) = u32::try_from(page * PAGE + place).ok().and_then(char::from_u32) {
                    (made.natures[place], made.forms[place]) = self.characters.form(c);
                }
            }
            made
        })
    }
}

fn pages() -> Box<[OnceLock<Box<Page>>]> {
    (0..PAGES).map(|_| OnceLock::new()).collect()
}

/// Whether `replace` makes several spaces one, and nothing else.
fn squeezes(replace: &tokenizers::normalizers::Replace) -> bool {
    let expected = serde_json::json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "});
    serde_json::to_value(replace).is_ok_and(|replace| replace == expected)
}

impl Form {
    fn text(&self) -> Option<&[u8]> {
        self.text.get(..usize::from(self.bytes))
    }
}

impl Characters {
    /// Appends what the library makes of one cluster.
    fn push(&self, cluster: &str, normal: &mut String) {
        let Some(map) = &self.map else {
            normal.push_str(cluster);
            return;
        };
        if cluster.len() <= CLUSTER_BYTES
            && let Some(form) = map.transform(cluster)
        {
            normal.push_str(form);
            return;
        }
        for c in cluster.chars() {
            match map.transform(c.encode_utf8(&mut [0; 4])) {
                Some(form) => normal.push_str(form),
                None => normal.push(c),
            }
        }
    }

    fn form(&self, c: char) -> (Nature, Form) {
        let mut normal = String::new();
        self.push(c.encode_utf8(&mut [0; 4]), &mut normal);
        let mut text = [0; FORM_BYTES];
        let bytes = match text.get_mut(..normal.len()) {
            Some(place) => {
                place.copy_from_slice(normal.as_bytes());
                normal.len() as u8
            }
            None => TOO_LONG,
        };
        // Two characters are joined only where one of them is of a class that is joined with one of these.
        let parted = |a: char, b: char| [a, b].iter().collect::<String>().graphemes(true).count() == 2;
        let apart = ['a', '\u{ac00}', '\u{ac01}', '\u{1f1e6}', '\n'].into_iter().all(|other| parted(c, other))
            && ['a', '\u{ac00}', '\u{ac01}', '\u{1f1e6}', '\u{1100}', '\u{1161}'].into_iter().all(|other| parted(other, c));
        let form = Form { bytes, text };
        let nature = match (apart, form.text() == Some(c.encode_utf8(&mut [0; 4]).as_bytes())) {
            (false, _) => Nature::Joined,
            (true, false) => Nature::Apart,
            (true, true) => Nature::Plain,
        };
        (nature, form)
    }
}

impl Split {
    fn of(pre_tokenizer: &PreTokenizerWrapper) -> Option<Self> {
        let parts: &[PreTokenizerWrapper] = match pre_tokenizer {
            PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
            one => std::slice::from_ref(one),
        };
        use PreTokenizerWrapper as P;
        match parts {
            [P::Metaspace(metaspace)] => Self::marked(metaspace, false),
            [P::WhitespaceSplit(_), P::Metaspace(metaspace)] => Self::marked(metaspace, true),
            _ => None,
        }
    }

    fn marked(metaspace: &Metaspace, at_blanks: bool) -> Option<Self> {
        let prepend = match metaspace.get_prepend_scheme() {
            PrependScheme::Always => true,
            PrependScheme::Never => false,
            PrependScheme::First => return None,
        };
        metaspace.get_split().then_some(Self { at_blanks, mark: metaspace.get_replacement(), prepend })
    }
}

impl Piece {
    fn new(id: u32, score: f64) -> Self {
        let bits = score.to_bits();
        Self { id, score: [bits as u32, (bits >> 32) as u32] }
    }

    #[inline]
    fn score(self) -> f64 {
        f64::from_bits(u64::from(self.score[1]) << 32 | u64::from(self.score[0]))
    }
}

impl Lattice {
    fn of(model: &Unigram) -> Option<Self> {
        if model.byte_fallback() || model.alpha.is_some() {
            return None;
        }
        // The library tells it of a character that is not in the vocabulary alone.
        let strange = ('\u{100000}'..='\u{10fffd}').rev().map(String::from).find(|c| model.token_to_id(c).is_none())?;
        let unknown = model.tokenize(&strange).ok()?.first()?.id;
        let mut entries: Vec<(&[u8], Piece)> = Vec::new();
        for ((piece, score), id) in model.iter().zip(0..u32::MAX) {
            // Of a piece that is there twice, the library takes the last.
            if !piece.is_empty() {
                entries.push((piece.as_bytes(), Piece::new(id, *score)));
            }
        }
        entries.sort_by_key(|&(piece, _)| piece);
        entries.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 = next.1;
            }
            same
        });
        let longest = entries.iter().map(|(piece, _)| piece.len()).max().unwrap_or(0).max(char::MAX.len_utf8());
        let unknown_score = model.min_score - UNKNOWN_PENALTY;
        Some(Self { pieces: Trie::new(entries), unknown, unknown_score, longest })
    }

    /// Appends the ids of the likeliest pieces of `word`, as far as they are wanted.
    fn ids(&self, word: &str, wanted: Wanted, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { best, marked, path, .. } = scratch;
        best.clear();
        best.push(UNREACHED);
        // Where `best` begins, and where the unknown characters do that are not yet told.
        let (mut begin, mut unknown_from) = (0, None);
        let (mut at, mut chunk) = (0, CHUNK);
        while at < word.len() {
            let most = (at - begin) + self.longest.min(word.len() - at) + 1;
            if best.len() < most {
                best.resize(most, UNREACHED);
            }
            self.extend(word, begin, at, best);
            at += word[at..].chars().next().map_or(1, char::len_utf8);
            if at - begin >= chunk && at < word.len() {
                let settled = self.settled(&word[begin..at], best, marked);
                self.tell(word, begin, settled, best, path, &mut unknown_from, ids);
                best.drain(..settled);
                begin += settled;
                chunk = if settled == 0 { chunk * 2 } else { CHUNK };
                if wanted.enough(ids) {
                    return;
                }
            }
        }
        self.tell(word, begin, word.len() - begin, best, path, &mut unknown_from, ids);
        if let Some(from) = unknown_from {
            ids.push(self.unknown_run(&word[from..]));
        }
    }

    /// Goes on from place `at` by every piece that begins there, or by an unknown character.
    #[inline]
    fn extend(&self, word: &str, begin: usize, at: usize, best: &mut [Best]) {
        let rest = &word.as_bytes()[at..];
        let place = at - begin;
        let so_far = best[place].score;
        let first = word[at..].chars().next().map_or(1, char::len_utf8);
        let mut reach = |bytes: usize, score: f64, id: u32| {
            let target = &mut best[place + bytes];
            if target.bytes == 0 || score > target.score {
                *target = Best { score, bytes: bytes as u32, id };
            }
        };
        let mut known = false;
        self.pieces.prefixes(rest, |bytes, piece| {
            reach(bytes, piece.score() + so_far, piece.id);
            known |= bytes == first;
        });
        if !known {
            reach(first, self.unknown_score + so_far, self.unknown);
        }
    }

    /// The last place of `part` that every way to its end, or over it, goes through; all of it has been gone through.
    fn settled(&self, part: &str, best: &[Best], marked: &mut Vec<bool>) -> usize {
        marked.clear();
        marked.resize(part.len() + 1, false);
        let mut count = 0;
        for (place, marked) in marked.iter_mut().enumerate().skip(part.len().saturating_sub(self.longest)) {
            *marked = part.is_char_boundary(place);
            count += usize::from(*marked);
        }
        for place in (0..=part.len()).rev().filter(|&place| part.is_char_boundary(place)) {
            if !marked[place] {
                continue;
            }
            if count == 1 {
                return place;
            }
            count -= 1;
            let before = place.saturating_sub(best[place].bytes as usize);
            if !std::mem::replace(&mut marked[before], true) {
                count += 1;
            }
        }
        0
    }

    /// Appends the ids of the best way to place `end` of `best`; unknown characters at its end are left for later.
    #[expect(clippy::too_many_arguments, reason = "parts of one thread's memory")]
    fn tell(
        &self,
        word: &str,
        begin: usize,
        end: usize,
        best: &[Best],
        path: &mut Vec<(u32, u32)>,
        unknown_from: &mut Option<usize>,
        ids: &mut Vec<u32>,
    ) {
        path.clear();
        let mut place = end;
        while place > 0 {
            let Best { bytes, id, .. } = best[place];
            path.push((bytes, id));
            place = place.saturating_sub(bytes.max(1) as usize);
        }
        let mut at = begin;
        for &(bytes, id) in path.iter().rev() {
            if id == self.unknown {
                unknown_from.get_or_insert(at);
            } else {
                if let Some(from) = unknown_from.take() {
                    ids.push(self.unknown_run(&word[from..at]));
                }
                ids.push(id);
            }
            at += bytes as usize;
        }
    }

    /// The id of unknown characters that follow each other: together they may be in the vocabulary after all.
    fn unknown_run(&self, run: &str) -> u32 {
        self.pieces.get(run.as_bytes()).map_or(self.unknown, |piece| piece.id)
    }
}

#[cfg(test)]
#[path = "unigram_tests.rs"]
mod tests;
