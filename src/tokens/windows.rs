//! Reads no more of a text than its kept tokens need: window after window from the side that is kept, each cut where that changes
//! nothing.

use super::cuts::{Cuts, Known, Nature};

/// First guess at how much of a text a token covers; English has about 5 bytes a token.
const BYTES_PER_TOKEN: usize = 8;

/// How much is read at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// The least that a window holds, in bytes.
    pub window: usize,
    /// Words longer than this are counted, where that is enough, before they are read.
    pub word: usize,
    /// The most bytes without a cut that are read at once.
    pub unbroken: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { window: 256, word: 16 << 10, unbroken: 1 << 20 }
    }
}

/// Which end of a text is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Start,
    End,
}

/// A tokenizer that is given parts of a text.
pub(super) struct Windows<'a, F> {
    pub cuts: &'a Cuts,
    /// The ids of a part, without special tokens around it.
    pub encode: F,
    pub limits: Limits,
}

/// A run of text without a cut, at the kept side of what is left.
struct Run {
    bytes: usize,
    /// Where it is one word and no more: its characters that are left after normalization, as far as they matter, and their number.
    word: Option<(String, usize)>,
}

impl<F: Fn(&str) -> Result<Vec<u32>, String>> Windows<'_, F> {
    /// The ids of `text`, in order: all of them, or at least `needed` of those at the kept side.
    pub fn ids(&self, text: &str, needed: usize, kept: Kept) -> Result<Vec<u32>, String> {
        let mut known = Known::default();
        let mut rest = text;
        let mut parts: Vec<Vec<u32>> = Vec::new();
        let mut found = 0;
        while found < needed {
            let window = (needed - found).saturating_mul(BYTES_PER_TOKEN).max(self.limits.window);
            if rest.len() > window {
                rest = self.without_blanks(&mut known, rest, kept);
            }
            if rest.is_empty() {
                break;
            }
            let (ids, bytes) = self.next(&mut known, rest, window, kept)?;
            found += ids.len();
            if !ids.is_empty() {
                parts.push(ids);
            }
            rest = match kept {
                Kept::Start => &rest[bytes..],
                Kept::End => &rest[..rest.len() - bytes],
            };
        }
        if kept == Kept::End {
            parts.reverse();
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { parts.concat() })
    }

    /// The ids of the next part of `rest`, and its bytes.
    fn next(&self, known: &mut Known, rest: &str, window: usize, kept: Kept) -> Result<(Vec<u32>, usize), String> {
        let part = |bytes: usize| match kept {
            Kept::Start => &rest[..bytes],
            Kept::End => &rest[rest.len() - bytes..],
        };
        if rest.len() <= window {
            return Ok(((self.encode)(rest)?, rest.len()));
        }
        if let Some(bytes) = self.largest_part(known, rest, window, kept) {
            return Ok(((self.encode)(part(bytes))?, bytes));
        }
        let run = self.run(known, rest, kept);
        if run.bytes > self.limits.word
            && let Some((word, chars)) = &run.word
            && let Some(ids) = self.long_word(word, *chars)?
        {
            return Ok((ids, run.bytes));
        }
        if run.bytes > self.limits.unbroken {
            let most = self.limits.unbroken;
            return Err(format!(
                "more than {most} bytes follow each other without a place at which this tokenizer can be cut exactly; put spaces between them"
            ));
        }
        Ok(((self.encode)(part(run.bytes))?, run.bytes))
    }

    /// The largest part of at most `window` bytes that ends at a cut.
    fn largest_part(&self, known: &mut Known, rest: &str, window: usize, kept: Kept) -> Option<usize> {
        match kept {
            Kept::Start => {
                let end = rest.floor_char_boundary(window);
                let mut after = rest[end..].chars().next().map(|c| (c, self.cuts.nature(known, c)))?;
                for (at, c) in rest[..end].char_indices().rev() {
                    let before = (c, self.cuts.nature(known, c));
                    if self.cuts.between(before, after) {
                        return Some(at + c.len_utf8());
                    }
                    after = before;
                }
            }
            Kept::End => {
                let start = rest.ceil_char_boundary(rest.len() - window);
                let mut before = rest[..start].chars().next_back().map(|c| (c, self.cuts.nature(known, c)))?;
                for (at, c) in rest[start..].char_indices() {
                    let after = (c, self.cuts.nature(known, c));
                    if self.cuts.between(before, after) {
                        return Some(rest.len() - start - at);
                    }
                    before = after;
                }
            }
        }
        None
    }

    /// The shortest part of `rest` that ends at a cut, or all of it; where it is too long to be read anyway, a part of it.
    fn run(&self, known: &mut Known, rest: &str, kept: Kept) -> Run {
        let mut forward = rest.chars();
        let mut backward = rest.chars().rev();
        let mut bytes = 0;
        let mut word = self.cuts.word().map(|model| (String::new(), 0, model.max_chars));
        let mut last: Option<(char, Nature)> = None;
        loop {
            let next = match kept {
                Kept::Start => forward.next(),
                Kept::End => backward.next(),
            };
            let Some(c) = next else { break };
            let this = match last {
                Some((same, nature)) if same == c => (c, nature),
                _ => (c, self.cuts.nature(known, c)),
            };
            if let Some(last) = last {
                let cut = match kept {
                    Kept::Start => self.cuts.between(last, this),
                    Kept::End => self.cuts.between(this, last),
                };
                if cut {
                    break;
                }
            }
            if let Some((letters, chars, max_chars)) = &mut word {
                let end = bytes + c.len_utf8();
                let token = match kept {
                    Kept::Start => this.1.ends_token && self.cuts.token_ends(&rest[..end]),
                    Kept::End => this.1.begins_token && self.cuts.token_begins(&rest[rest.len() - end..]),
                };
                let plain = self.cuts.within_word(this.1) && !token;
                if plain {
                    if this.1.chars > 0 && *chars <= *max_chars {
                        letters.push(c);
                    }
                    *chars += this.1.chars;
                } else {
                    word = None;
                }
            }
            bytes += c.len_utf8();
            if word.is_none() && bytes > self.limits.unbroken {
                break;
            }
            last = Some(this);
        }
        let word = word.map(|(letters, chars, _)| match kept {
            Kept::Start => (letters, chars),
            Kept::End => (letters.chars().rev().collect(), chars),
        });
        Run { bytes, word }
    }

    /// The ids of a word of which `letters` are what normalization leaves, `chars` characters in all; `None` where they must be read in
    /// their places after all.
    fn long_word(&self, letters: &str, chars: usize) -> Result<Option<Vec<u32>>, String> {
        let Some(model) = self.cuts.word() else { return Ok(None) };
        if chars > model.max_chars {
            let missing = || "a word is too long, and the vocabulary lacks the unknown token".to_owned();
            return Ok(Some(vec![model.unk_id.ok_or_else(missing)?]));
        }
        // Marks that are dropped stand between others in the text; here they do not, which must change neither their order nor make an
        // added token of what remains.
        let one_by_one: Option<String> = letters
            .chars()
            .map(|c| self.cuts.normal_form(c.encode_utf8(&mut [0; 4])))
            .collect::<Option<Vec<_>>>()
            .map(|forms| forms.concat());
        if one_by_one != self.cuts.normal_form(letters) || self.cuts.holds_token(letters) {
            return Ok(None);
        }
        (self.encode)(letters).map(Some)
    }

    /// `rest` without the white space at its kept side that leaves no token, up to a last character of it.
    fn without_blanks<'t>(&self, known: &mut Known, rest: &'t str, kept: Kept) -> &'t str {
        let mut last: Option<((char, char), bool)> = None;
        // Whether a text may begin, or end, at the cut between `a` and `b`, one of which is `blank`.
        let mut dropped = |blank: char, (a, b): (char, char)| match last {
            Some((same, dropped)) if same == (a, b) => dropped,
            _ => {
                let (of_a, of_b) = (self.cuts.nature(known, a), self.cuts.nature(known, b));
                let of_blank = if blank == a { of_a } else { of_b };
                let dropped = self.cuts.is_blank(blank, of_blank) && self.cuts.between((a, of_a), (b, of_b));
                last = Some(((a, b), dropped));
                dropped
            }
        };
        match kept {
            Kept::Start => {
                let pairs = rest.char_indices().zip(rest.char_indices().skip(1));
                let kept = pairs.take_while(|&((_, a), (_, b))| dropped(a, (a, b))).last();
                kept.map_or(rest, |(_, (at, _))| &rest[at..])
            }
            Kept::End => {
                let pairs = rest.char_indices().rev().zip(rest.char_indices().rev().skip(1));
                let kept = pairs.take_while(|&((_, b), (_, a))| dropped(b, (a, b))).last();
                kept.map_or(rest, |((at, _), _)| &rest[..at])
            }
        }
    }
}

#[cfg(test)]
#[path = "windows_tests.rs"]
mod tests;
