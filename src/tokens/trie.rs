//! A double-array trie over bytes (Aoe 1989): which keys of a fixed set stand at the beginning of a text.

/// No unit.
const NONE: u32 = u32::MAX;

/// Set in a base where a key ends.
const ENDS: u32 = 1 << 31;

/// A place of the array: a node of the trie, or free.
#[derive(Debug, Clone, Copy)]
struct Unit<V> {
    /// The child by byte `b` is at `base ^ b`, the bit [`ENDS`] left aside.
    base: u32,
    /// The parent; [`NONE`] where the place is free.
    parent: u32,
    /// Of the key that ends here; beside the node, so that both are read at once.
    value: V,
}

/// Keys and their values.
#[derive(Debug, Clone)]
pub(super) struct Trie<V> {
    /// A multiple of 256, so that no child of a node is outside.
    units: Vec<Unit<V>>,
}

impl<V: Copy + Default> Trie<V> {
    /// The trie of `entries`, whose keys are distinct and not empty.
    pub fn new(mut entries: Vec<(&[u8], V)>) -> Self {
        entries.sort_unstable_by_key(|&(key, _)| key);
        let mut trie = Self { units: vec![Self::free(); 256] };
        trie.units[0].parent = 0;
        let mut first_free = 1;
        // Node, its keys, and how many bytes of them lead to it.
        let mut open = vec![(0_usize, &entries[..], 0_usize)];
        while let Some((node, mut keys, depth)) = open.pop() {
            if let Some(((key, value), rest)) = keys.split_first()
                && key.len() == depth
            {
                trie.units[node].base |= ENDS;
                trie.units[node].value = *value;
                keys = rest;
            }
            let children: Vec<&[(&[u8], V)]> = keys.chunk_by(|(a, _), (b, _)| a[depth] == b[depth]).collect();
            let bytes: Vec<u8> = children.iter().map(|keys| keys[0].0[depth]).collect();
            let Some(&first) = bytes.first() else { continue };
            let base = trie.free_base(&mut first_free, first, &bytes);
            trie.units[node].base |= base as u32;
            for (byte, keys) in bytes.into_iter().zip(children) {
                let child = base ^ usize::from(byte);
                trie.units[child].parent = node as u32;
                open.push((child, keys, depth + 1));
            }
        }
        trie
    }

    /// Base, parent and value of each place, of which [`Trie::from_places`] makes the trie again.
    pub fn places(&self) -> impl ExactSizeIterator<Item = (u32, u32, V)> {
        self.units.iter().map(|unit| (unit.base, unit.parent, unit.value))
    }

    /// `None` where the places cannot be those of a trie.
    pub fn from_places(places: impl ExactSizeIterator<Item = (u32, u32, V)>) -> Option<Self> {
        let units: Vec<Unit<V>> = places.map(|(base, parent, value)| Unit { base, parent, value }).collect();
        (!units.is_empty() && units.len().is_multiple_of(256)).then_some(Self { units })
    }

    fn free() -> Unit<V> {
        Unit { base: 0, parent: NONE, value: V::default() }
    }

    /// A base by which all of `bytes` lead to free places; `first` is one of them.
    fn free_base(&mut self, first_free: &mut usize, first: u8, bytes: &[u8]) -> usize {
        while self.units.get(*first_free).is_some_and(|unit| unit.parent != NONE) {
            *first_free += 1;
        }
        let mut place = *first_free;
        loop {
            if place >= self.units.len() {
                self.units.resize(self.units.len() + 256, Self::free());
            }
            let base = place ^ usize::from(first);
            let free = |byte: &u8| self.units[base ^ usize::from(*byte)].parent == NONE;
            if free(&first) && bytes.iter().all(free) {
                return base;
            }
            place += 1;
        }
    }

    /// The longest key at the beginning of `text`: its length and value.
    #[inline]
    pub fn longest(&self, text: &[u8]) -> Option<(usize, V)> {
        let mut found = None;
        self.prefixes(text, |length, value| found = Some((length, value)));
        found
    }

    /// Calls `visit` with length and value of each key at the beginning of `text`, the shortest first.
    #[inline]
    pub fn prefixes(&self, text: &[u8], mut visit: impl FnMut(usize, V)) {
        let (mut node, mut base) = (0_u32, self.units[0].base);
        for (at, &byte) in text.iter().enumerate() {
            let child = (base & !ENDS) ^ u32::from(byte);
            match self.units.get(child as usize) {
                // The root is its own parent, and no child.
                Some(unit) if unit.parent == node && child != 0 => {
                    (node, base) = (child, unit.base);
                    if base & ENDS != 0 {
                        visit(at + 1, unit.value);
                    }
                }
                _ => break,
            }
        }
    }

    /// The value of `key`, where it is one.
    #[inline]
    pub fn get(&self, key: &[u8]) -> Option<V> {
        let mut found = None;
        self.prefixes(key, |length, value| found = (length == key.len()).then_some(value));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn the_longest_key_is_that_of_a_search_through_all(
            keys in prop::collection::vec(prop::collection::vec(prop::sample::select(vec![0_u8, 1, 97, 98, 255]), 1..6), 0..60),
            texts in prop::collection::vec(prop::collection::vec(prop::sample::select(vec![0_u8, 1, 97, 98, 254, 255]), 0..9), 1..40),
        ) {
            let entries: BTreeMap<&[u8], u32> = keys.iter().map(Vec::as_slice).zip(0..).collect();
            let trie = Trie::new(entries.iter().map(|(&key, &value)| (key, value)).collect());
            for text in &texts {
                let expected = (1..=text.len()).rev().find_map(|length| entries.get(&text[..length]).map(|&value| (length, value)));
                prop_assert_eq!(trie.longest(text), expected, "{:?}", text);
                let mut found = Vec::new();
                trie.prefixes(text, |length, value| found.push((length, value)));
                let expected: Vec<_> = (1..=text.len()).filter_map(|length| entries.get(&text[..length]).map(|&value| (length, value))).collect();
                prop_assert_eq!(found, expected, "{:?}", text);
                prop_assert_eq!(trie.get(text), entries.get(&text[..]).copied(), "{:?}", text);
            }
            for (key, value) in entries {
                prop_assert_eq!(trie.longest(key), Some((key.len(), value)));
            }
        }
    }
}
