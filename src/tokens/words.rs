//! Words that were met before. What a vocabulary has of the parts of a word lies far apart in memory; of a word that is known, all is in one place.
//!
//! Most words of a text are in the vocabulary as they are. Whether such a word comes to its token alone is found out when it is first met. Of the other words
//! a thread keeps the ids of those that it met last: a language's frequent words are few.

use super::compact::{Reader, Writer};
use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// Bytes of the longest word that is known.
pub(super) const LONGEST: usize = 31;
/// Most ids of a word that a thread keeps.
const IDS: usize = 6;
/// Words that a thread keeps, in 64 bytes each. A word has one place; the last one that came there has it.
const SLOTS: usize = 4096;

/// Maps of numbers that cost little to look up.
pub(super) type Table<K, V> = HashMap<K, V, BuildHasherDefault<Folded>>;

/// The words of one tokenizer.
#[derive(Debug)]
pub(super) struct Words {
    /// Those that are tokens, bucket after bucket: a hash table without free places, which is filled as fast as memory is.
    whole: Vec<Whole>,
    /// One more than there are: the last one begins where the last words end.
    buckets: Vec<Bucket>,
    /// Tells the tokenizer from all others.
    owner: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    /// Where its words begin.
    begin: u32,
    /// A bit of each of its words: for most words that are in no bucket, no word is read.
    signs: u32,
}

/// A word and its token.
#[derive(Debug)]
struct Whole {
    word: Word,
    id: u32,
    /// Whether the word comes to that token alone, which is the same for all threads.
    alone: AtomicU8,
}

const NOT_KNOWN: u8 = 0;
const ALONE: u8 = 1;
const IN_PARTS: u8 = 2;

/// A word's bytes, and in the last one how many they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Word([u64; 4]);

/// The words that a thread keeps, of all tokenizers.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Empty until the first word.
    slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Slot {
    word: Word,
    /// 0 where the place is empty.
    owner: u32,
    count: u32,
    ids: [u32; IDS],
}

impl Words {
    /// Of `tokens` and the words that are spelled like them; of two that are spelled alike the last counts.
    pub fn new(tokens: impl IntoIterator<Item = (impl AsRef<[u8]>, u32)>) -> Self {
        let whole = |(word, id): (_, u32)| Some(Whole::new(Word::new(AsRef::as_ref(&word))?, id));
        let mut whole: Vec<Whole> = tokens.into_iter().filter_map(whole).collect();
        let buckets = buckets_of(whole.len());
        whole.sort_by_cached_key(|whole| whole.word.place(buckets).0);
        Self::of(whole)
    }

    /// Of words in the order of their buckets. Those that are out of order are not found, and no harm is done: they are made as other words are.
    fn of(whole: Vec<Whole>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let count = buckets_of(whole.len());
        let mut buckets = vec![Bucket::default(); count + 1];
        for Whole { word, .. } in &whole {
            let (bucket, sign) = word.place(count);
            buckets[bucket].signs |= sign;
            buckets[bucket + 1].begin += 1;
        }
        let mut so_far = 0;
        for bucket in &mut buckets {
            so_far += bucket.begin;
            bucket.begin = so_far;
        }
        Self { whole, buckets, owner: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    #[inline]
    fn find(&self, word: Word) -> Option<&Whole> {
        let (place, sign) = word.place(self.buckets.len() - 1);
        let bucket = self.buckets[place];
        if bucket.signs & sign == 0 {
            return None;
        }
        let (begin, end) = (bucket.begin as usize, self.buckets[place + 1].begin as usize);
        self.whole[begin..end].iter().rfind(|whole| whole.word == word)
    }

    pub fn write(&self, to: &mut Writer) {
        to.records(self.whole.iter().map(|Whole { word, id, .. }| {
            let [a, b, c, d, e, f, g, h] = bytemuck::cast::<_, [[u8; 4]; 8]>(word.0).map(u32::from_le_bytes);
            [a, b, c, d, e, f, g, h, *id]
        }));
    }

    pub fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self::from_records(from.records()?))
    }

    /// Of what [`Words::write`] wrote.
    pub fn from_records(records: impl ExactSizeIterator<Item = [u32; 9]>) -> Self {
        let whole = |[a, b, c, d, e, f, g, h, id]: [u32; 9]| {
            Whole::new(Word(bytemuck::cast([a, b, c, d, e, f, g, h].map(u32::to_le_bytes))), id)
        };
        Self::of(records.map(whole).collect())
    }

    /// Appends the ids of the word `bytes`: those that are known, or those that `make` appends, which must be the same whenever it is called.
    #[inline]
    pub fn ids(&self, kept: &mut Kept, bytes: &[u8], ids: &mut Vec<u32>, make: impl FnOnce(&mut Vec<u32>)) {
        let Some(word) = Word::new(bytes) else { return make(ids) };
        let whole = self.find(word);
        let known = whole.map_or(IN_PARTS, |whole| whole.alone.load(Ordering::Relaxed));
        match whole {
            Some(whole) if known == ALONE => ids.push(whole.id),
            Some(whole) if known == NOT_KNOWN => {
                let before = ids.len();
                make(ids);
                whole.alone.store(if ids[before..] == [whole.id] { ALONE } else { IN_PARTS }, Ordering::Relaxed);
            }
            _ => kept.ids(self.owner, word, ids, make),
        }
    }
}

impl Whole {
    fn new(word: Word, id: u32) -> Self {
        Self { word, id, alone: AtomicU8::new(NOT_KNOWN) }
    }
}

impl Kept {
    pub const fn new() -> Self {
        Self { slots: Vec::new() }
    }

    fn ids(&mut self, owner: u32, word: Word, ids: &mut Vec<u32>, make: impl FnOnce(&mut Vec<u32>)) {
        if self.slots.is_empty() {
            self.slots.resize(SLOTS, Slot::default());
        }
        let place = BuildHasherDefault::<Folded>::default().hash_one((word, owner)) as usize % SLOTS;
        let slot = &mut self.slots[place];
        if slot.word == word && slot.owner == owner {
            ids.extend_from_slice(&slot.ids[..slot.count as usize]);
            return;
        }
        let before = ids.len();
        make(ids);
        let made = &ids[before..];
        if let Some(place) = slot.ids.get_mut(..made.len()) {
            place.copy_from_slice(made);
            (slot.word, slot.owner, slot.count) = (word, owner, made.len() as u32);
        }
    }
}

impl Word {
    /// `None` where it is too long.
    #[inline]
    fn new(word: &[u8]) -> Option<Self> {
        let mut bytes = [0; LONGEST + 1];
        bytes[..LONGEST].get_mut(..word.len())?.copy_from_slice(word);
        bytes[LONGEST] = word.len() as u8;
        Some(Self(bytemuck::cast(bytes)))
    }

    /// Its place among `buckets`, a power of two, and its bit there.
    #[inline]
    fn place(self, buckets: usize) -> (usize, u32) {
        let hash = BuildHasherDefault::<Folded>::default().hash_one(self);
        (hash as usize & (buckets - 1), 1 << (hash >> 59))
    }
}

/// Buckets of so many words: a power of two, with about one word in each.
fn buckets_of(words: usize) -> usize {
    words.max(1).next_power_of_two()
}

impl Hash for Word {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.iter().for_each(|&part| state.write_u64(part));
    }
}

/// Hashes numbers by products folded in two, as wyhash does.
#[derive(Debug, Default)]
pub(super) struct Folded(u64);

impl Hasher for Folded {
    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    #[inline]
    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    #[inline]
    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number ^ 0xa076_1d64_78bd_642f) * 0xe703_7ed1_a0b4_28db;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More words than are kept, each several times, for two tokenizers: some are tokens, some too long, some of too many ids.
    #[test]
    fn words_are_made_once_and_told_apart() {
        let mut kept = Kept::new();
        let spelled = |number: u32| format!("{:1$}", number, number as usize % 40);
        let expected = |number: u32, sign: u32| vec![number ^ sign; number as usize % 9];
        let tokenizers = [7, 9].map(|sign| (sign, Words::new((0..5000).map(|number| (spelled(number), number ^ sign)))));
        for _ in 0..2 {
            for number in 0..12_000 {
                for (sign, words) in &tokenizers {
                    let (word, expected) = (spelled(number), expected(number, *sign));
                    let mut made = 0;
                    for _ in 0..2 {
                        let mut ids = vec![1];
                        words.ids(&mut kept, word.as_bytes(), &mut ids, |ids| {
                            made += 1;
                            ids.extend_from_slice(&expected);
                        });
                        assert_eq!(ids[1..], expected, "{word:?}");
                    }
                    let known = word.len() <= LONGEST && (expected.len() <= IDS || number < 5000 && expected.len() == 1);
                    assert!(made == 2 || known, "{word:?} was made {made} times");
                    assert!(made < 2 || !known || number < 5000, "{word:?} was made {made} times");
                }
            }
        }
    }

    /// More tokenizers than there are places, with one word: each finds the word in its place, of others.
    #[test]
    fn words_of_other_tokenizers_are_not_taken() {
        let mut kept = Kept::new();
        for number in 0..3 * SLOTS as u32 {
            let words = Words::new([] as [(&[u8], u32); 0]);
            let mut ids = Vec::new();
            words.ids(&mut kept, b"word", &mut ids, |ids| ids.push(number));
            assert_eq!(ids, [number]);
        }
    }

    /// A word is not taken for another of the same bytes and zeros behind them.
    #[test]
    fn zeros_at_the_end_count() {
        let (mut kept, words) = (Kept::new(), Words::new([(&b"a"[..], 1), (b"a\0\0", 5)]));
        for (word, id) in [(&b"a"[..], 1), (b"a\0", 2), (b"", 3), (b"\0", 4), (b"a\0\0", 5)] {
            for _ in 0..2 {
                let mut ids = Vec::new();
                words.ids(&mut kept, word, &mut ids, |ids| ids.push(id));
                assert_eq!(ids, [id]);
            }
        }
    }
}
