//! The `inputs` of a request: a text, a row of token ids, or a list of either.

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Unexpected, Visitor};
use std::fmt;

/// What is to be embedded, in the client's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Inputs {
    pub items: Vec<Item>,
    /// Whether it came as a list of inputs, though perhaps of one.
    pub listed: bool,
}

/// One input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    Text(String),
    /// Token ids, special tokens included.
    Ids(Vec<u32>),
}

impl Inputs {
    pub fn texts(texts: Vec<String>) -> Self {
        Self { items: texts.into_iter().map(Item::Text).collect(), listed: true }
    }

    /// Characters of the texts; an id counts as one, as TEI counts it.
    pub fn characters(&self) -> usize {
        let count = |item: &Item| match item {
            Item::Text(text) => text.chars().count(),
            Item::Ids(ids) => ids.len(),
        };
        self.items.iter().map(count).sum()
    }
}

const EXPECTED: &str = "a string, a list of token ids, or a list of either";

impl<'de> Deserialize<'de> for Inputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputsVisitor)
    }
}

struct InputsVisitor;

impl<'de> Visitor<'de> for InputsVisitor {
    type Value = Inputs;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Inputs, E> {
        Ok(Inputs { items: vec![Item::Text(text.to_owned())], listed: false })
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Inputs, E> {
        Ok(Inputs { items: vec![Item::Text(text)], listed: false })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Inputs, A::Error> {
        let mut items = Vec::new();
        match list.next_element()? {
            None => return Ok(Inputs { items, listed: true }),
            Some(Element::Id(first)) => {
                let mut ids = vec![first];
                while let Some(Id(id)) = list.next_element()? {
                    ids.push(id);
                }
                return Ok(Inputs { items: vec![Item::Ids(ids)], listed: false });
            }
            Some(Element::Item(first)) => items.push(first),
        }
        while let Some(element) = list.next_element()? {
            match element {
                Element::Item(item) => items.push(item),
                Element::Id(id) => return Err(A::Error::invalid_type(Unexpected::Unsigned(id.into()), &"a list of inputs")),
            }
        }
        Ok(Inputs { items, listed: true })
    }
}

/// An element of the outer list.
enum Element {
    Id(u32),
    Item(Item),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                whole_id(id).map(Element::Id)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Item(Item::Text(text.to_owned())))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Element, E> {
                Ok(Element::Item(Item::Text(text)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
                let mut ids = Vec::new();
                while let Some(Id(id)) = list.next_element()? {
                    ids.push(id);
                }
                Ok(Element::Item(Item::Ids(ids)))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// A token id.
struct Id(u32);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole_id(u64::deserialize(deserializer)?).map(Id)
    }
}

fn whole_id<E: Error>(id: u64) -> Result<u32, E> {
    u32::try_from(id).map_err(|_| E::invalid_value(Unexpected::Unsigned(id), &"a token id, 0 to 4294967295"))
}

/// `inputs` of /tokenize: texts alone.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings is expected")]
pub(super) enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Texts {
    pub fn into_list(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// `ids` of /decode.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a list of token ids or a list of such lists is expected")]
pub(super) enum Rows {
    One(Vec<u32>),
    Many(Vec<Vec<u32>>),
}

impl Rows {
    /// An empty list is one without rows.
    pub fn into_list(self) -> Vec<Vec<u32>> {
        match self {
            Self::One(ids) if ids.is_empty() => Vec::new(),
            Self::One(ids) => vec![ids],
            Self::Many(rows) => rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Inputs, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_is_told_apart() {
        let text = |text: &str| Item::Text(text.to_owned());
        for (json, items, listed) in [
            (r#""a""#, vec![text("a")], false),
            (r#""\u0061""#, vec![text("a")], false),
            ("[1,2]", vec![Item::Ids(vec![1, 2])], false),
            (r#"["a","b"]"#, vec![text("a"), text("b")], true),
            ("[[1],[2,3]]", vec![Item::Ids(vec![1]), Item::Ids(vec![2, 3])], true),
            (r#"["a",[2,3]]"#, vec![text("a"), Item::Ids(vec![2, 3])], true),
            ("[]", vec![], true),
            ("[[]]", vec![Item::Ids(vec![])], true),
        ] {
            assert_eq!(read(json), Ok(Inputs { items, listed }), "{json}");
        }
    }

    #[test]
    fn other_values_are_refused_in_words() {
        for (json, said) in [
            ("1", EXPECTED),
            ("null", EXPECTED),
            ("{}", EXPECTED),
            (r#"[1,"a"]"#, "u64"),
            (r#"["a",1]"#, "a list of inputs"),
            ("[1.5]", "a token id"),
            ("[-1]", "a token id"),
            ("[4294967296]", "4294967295"),
            ("[[[1]]]", "u64"),
            ("[null]", "a token id"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(said), "{json}: {error}");
        }
    }
}
