//! Added tokens in a text, found as the library finds them (`AddedVocabulary::find_matches`), one after the other and without allocations.

use super::compact::{Reader, Writer};
use aho_corasick::{AhoCorasick, Input, MatchKind};
use tokenizers::AddedToken;

/// The added tokens of one search: of that in texts as they are, or of that in normalized ones.
#[derive(Debug)]
pub(super) struct AddedTokens {
    /// `None` where there are no tokens.
    finder: Option<AhoCorasick>,
    /// In the order of the finder's patterns.
    rules: Vec<Rule>,
}

/// A token: its spelling and what goes with it.
#[derive(Debug, Clone)]
struct Rule {
    spelling: String,
    id: u32,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'t> {
    /// An added token by its id.
    Token(u32),
    /// What lies between them; never empty.
    Text(&'t str),
}

impl AddedTokens {
    /// Tokens by spelling, with their ids. `None` where one cannot be searched for.
    pub fn new(tokens: &[(String, u32, AddedToken)]) -> Option<Self> {
        let rule = |(spelling, id, token): &(String, u32, AddedToken)| Rule {
            spelling: spelling.clone(),
            id: *id,
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
        };
        Self::of(tokens.iter().map(rule).collect())
    }

    fn of(rules: Vec<Rule>) -> Option<Self> {
        if rules.iter().any(|rule| rule.spelling.is_empty()) {
            return None;
        }
        let finder = match &rules[..] {
            [] => None,
            rules => {
                let spellings = rules.iter().map(|rule| &rule.spelling);
                Some(AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(spellings).ok()?)
            }
        };
        Some(Self { finder, rules })
    }

    pub fn write(&self, to: &mut Writer) {
        to.number(self.rules.len() as u64);
        for Rule { spelling, id, single_word, lstrip, rstrip } in &self.rules {
            to.text(spelling);
            to.number((*id).into());
            [single_word, lstrip, rstrip].into_iter().for_each(|&flag| to.flag(flag));
        }
    }

    pub fn read(from: &mut Reader<'_>) -> Option<Self> {
        let rule = |from: &mut Reader<'_>| {
            let (spelling, id) = (from.text()?.to_owned(), from.id()?);
            Some(Rule { spelling, id, single_word: from.flag()?, lstrip: from.flag()?, rstrip: from.flag()? })
        };
        // Not made room for at once: the number is not known to be right.
        let count = from.number()?;
        Self::of((0..count).map(|_| rule(from)).collect::<Option<_>>()?)
    }

    /// The parts of `text` in order.
    pub fn split<'t>(&'t self, text: &'t str) -> Parts<'t> {
        Parts { tokens: self, text, searched: 0, given: 0, token: None }
    }
}

/// See [`AddedTokens::split`].
#[derive(Debug)]
pub(super) struct Parts<'t> {
    tokens: &'t AddedTokens,
    text: &'t str,
    /// Bytes that are searched.
    searched: usize,
    /// Bytes that parts cover.
    given: usize,
    /// Found, behind the text that was given last.
    token: Option<u32>,
}

impl Parts<'_> {
    /// The next token with the bytes that it takes, some of which may be given already.
    fn find(&mut self) -> Option<(u32, usize, usize)> {
        let finder = self.tokens.finder.as_ref()?;
        while let Some(found) = finder.find(Input::new(self.text).span(self.searched..self.text.len())) {
            self.searched = found.end();
            let rule = &self.tokens.rules[found.pattern()];
            let (before, after) = (&self.text[..found.start()], &self.text[found.end()..]);
            if rule.single_word && (before.ends_with(is_word) || after.starts_with(is_word)) {
                continue;
            }
            let start = if rule.lstrip { before.trim_end().len() } else { found.start() };
            let end = if rule.rstrip { self.text.len() - after.trim_start().len() } else { found.end() };
            return Some((rule.id, start, end));
        }
        None
    }
}

impl<'t> Iterator for Parts<'t> {
    type Item = Part<'t>;

    fn next(&mut self) -> Option<Part<'t>> {
        if let Some(id) = self.token.take() {
            return Some(Part::Token(id));
        }
        let text = self.text;
        let given = self.given;
        match self.find() {
            Some((id, start, end)) => {
                self.given = end;
                if given >= start {
                    return Some(Part::Token(id));
                }
                self.token = Some(id);
                Some(Part::Text(&text[given..start]))
            }
            None => {
                self.searched = text.len();
                self.given = text.len();
                (given < text.len()).then(|| Part::Text(&text[given..]))
            }
        }
    }
}

/// A regular expression's `\w`.
fn is_word(c: char) -> bool {
    regex_syntax::try_is_word_character(c).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::models::wordlevel::WordLevel;

    /// What the library splits `text` into: the ids of its tokens, and `None` for each text between them.
    fn by_library(inner: &tokenizers::Tokenizer, text: &str) -> Vec<Option<u32>> {
        let encoding = inner.encode_fast(text, false).unwrap();
        encoding.get_ids().iter().map(|&id| (id != 0).then_some(id)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn tokens_are_found_as_the_library_finds_them(
            contents in prop::collection::hash_set("[ab <>é]{1,3}", 1..6),
            flags in prop::collection::vec(any::<[bool; 3]>(), 6),
            text in "[ab <>é\u{a0}_.]{0,24}",
        ) {
            // Without a pre-tokenizer the text between two tokens is one unknown word.
            let vocab = [("[UNK]".to_owned(), 0)].into_iter().collect();
            let model = WordLevel::builder().vocab(vocab).unk_token("[UNK]".to_owned()).build().unwrap();
            let mut inner = tokenizers::Tokenizer::new(model);
            // Tokens that begin or end with white space and strip it as well make the library panic.
            let tokens: Vec<AddedToken> = contents.iter().zip(&flags).map(|(content, &[single_word, lstrip, rstrip])| {
                let edged = contents.iter().any(|content| content.trim() != content);
                AddedToken::from(content.clone(), true).single_word(single_word).lstrip(lstrip && !edged).rstrip(rstrip && !edged)
            }).collect();
            inner.add_special_tokens(tokens).unwrap();
            let decoder = inner.get_added_tokens_decoder();
            let tokens: Vec<_> = decoder.iter().map(|(&id, token)| (token.content.clone(), id, token.clone())).collect();
            let added = AddedTokens::new(&tokens).unwrap();
            let parts: Vec<Part<'_>> = added.split(&text).collect();
            let found: Vec<_> = parts.iter().map(|part| match part { Part::Token(id) => Some(*id), Part::Text(_) => None }).collect();
            prop_assert_eq!(found, by_library(&inner, &text), "{:?}", text);
            prop_assert!(parts.iter().all(|part| *part != Part::Text("")));
        }
    }

    #[test]
    fn without_tokens_a_text_is_one_part() {
        let none = AddedTokens::new(&[]).unwrap();
        assert_eq!(none.split("a <b>").collect::<Vec<_>>(), [Part::Text("a <b>")]);
        assert_eq!(none.split("").count(), 0);
    }
}
