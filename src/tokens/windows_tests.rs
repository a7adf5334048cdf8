//! Texts read in windows against the same texts read whole, with small windows and texts that reach for every rule.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// Windows so small that a text of some dozen characters has several.
const SMALL: Limits = Limits { window: 6, word: 10, unbroken: usize::MAX };

fn added(id: usize, content: &str, flags: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": flags.contains('w'), "lstrip": flags.contains('l'),
        "rstrip": flags.contains('r'), "normalized": flags.contains('n'), "special": flags.contains('s'),
    })
}

/// Added tokens of every flag; of several words, of one character, with marks, and such as normalization makes or hides.
fn added_tokens(set: usize) -> Vec<Value> {
    let sets: [&[(&str, &str)]; 8] = [
        &[("[SEP]", "s"), ("[MASK]", "sl")],
        &[("[SEP]", "s"), ("the cat", ""), ("aa", "w")],
        &[("b.", "r"), (".", "w"), ("ab", "n")],
        &[("中a", "n"), ("[SEP]", "slr")],
        &[("é", "n"), ("a_", "w"), ("_", "wn")],
        &[("a", ""), ("\u{301}", ""), ("..", "n")],
        &[(" ", "s"), ("b b", "n")],
        &[],
    ];
    let set = sets[set % sets.len()];
    set.iter().enumerate().map(|(place, (content, flags))| added(60 + place, content, flags)).collect()
}

fn word_piece(normalizer: Value, added: Vec<Value>) -> Tokenizer {
    let words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "##a",
        "b",
        "##b",
        "aa",
        "##aa",
        "the",
        "cat",
        ".",
        "中",
        "国",
        "e",
        "##e",
        "é",
        "##é",
        "[",
        "]",
        "_",
        "se",
        "##p",
        "s",
        "##s",
        "\u{301}",
        "A",
        "##A",
        "!",
        "##\u{301}",
        "🙂",
        "##🙂",
    ];
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), json!(id))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 12, "vocab": vocab},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn unigram(pre_tokenizer: Value, normalizer: Value, added: Vec<Value>) -> Tokenizer {
    let pieces = [
        "<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "a", "b", "ab", "▁the", "▁cat", "cat", ".", "..", "中", "国", "é", "e", "se",
        "[", "]",
    ];
    let vocab: Vec<Value> = pieces.iter().enumerate().map(|(place, piece)| json!([piece, -((place + 1) as f64).ln()])).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": false},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

/// XLM-RoBERTa's parts, with a precompiled character map.
fn precompiled(added: Vec<Value>) -> Tokenizer {
    let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizers/unigram.json"));
    let mut json: Value = serde_json::from_slice(json).unwrap();
    json["added_tokens"].as_array_mut().unwrap().extend(added);
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn byte_level(add_prefix_space: bool, normalizer: Value, added: Vec<Value>) -> Tokenizer {
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut letters: Vec<String> = alphabet.iter().map(char::to_string).collect();
    letters.sort_unstable();
    letters.extend(["aa", "Ġa", "the", "Ġthe", "ca"].map(str::to_owned));
    let vocab: serde_json::Map<String, Value> =
        letters.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id + 100))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "vocab": vocab, "merges": ["a a", "Ġ a", "c a"]},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn bert(lowercase: bool, strip_accents: Option<bool>, chinese: bool) -> Value {
    json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": chinese, "strip_accents": strip_accents, "lowercase": lowercase})
}

/// Every kind of tokenizer, with each set of added tokens.
fn tokenizer(kind: usize, set: usize) -> Tokenizer {
    let added = added_tokens(set);
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let words = |scheme: &str| json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace(scheme)]});
    match kind {
        0 => word_piece(bert(true, None, true), added),
        1 => word_piece(bert(false, Some(false), false), added),
        2 => {
            word_piece(json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, bert(false, Some(true), true)]}), added)
        }
        3 => word_piece(Value::Null, added),
        4 => unigram(words("always"), json!({"type": "NFKC"}), added),
        5 => unigram(
            words("never"),
            json!({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}),
            added,
        ),
        6 => unigram(metaspace("first"), Value::Null, added),
        7 => unigram(metaspace("always"), json!({"type": "NFC"}), added),
        8 => byte_level(false, json!({"type": "NFC"}), added),
        9 => byte_level(true, Value::Null, added),
        10 => precompiled(added),
        _ => unigram(words("first"), json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b"}), added),
    }
}
const KINDS: usize = 12;

fn whole(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
}

fn windowed(tokenizer: &Tokenizer, text: &str, needed: usize, kept: Kept, limits: Limits) -> Result<Vec<u32>, String> {
    let cuts = Cuts::new(tokenizer);
    Windows { cuts: &cuts, encode: |part: &str| Ok(whole(tokenizer, part)), limits }.ids(text, needed, kept)
}

fn check(kind: usize, set: usize, text: &str, needed: usize) -> Result<(), TestCaseError> {
    let tokenizer = tokenizer(kind, set);
    let expected = whole(&tokenizer, text);
    for kept in [Kept::Start, Kept::End] {
        let found = windowed(&tokenizer, text, needed, kept, SMALL).unwrap();
        let count = needed.min(expected.len());
        prop_assert!(found.len() >= count, "{found:?} of {expected:?}");
        let (found, expected) = match kept {
            Kept::Start => (&found[..count], &expected[..count]),
            Kept::End => (&found[found.len() - count..], &expected[expected.len() - count..]),
        };
        prop_assert_eq!(found, expected, "kind {} set {} {:?} {:?}", kind, set, kept, text);
    }
    Ok(())
}

fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => prop::sample::select(vec!["a", "b", "aa", "ab", " ", "  ", ".", "..", "the cat", "[SEP]", "[MASK]", "_", "b b"]).prop_map(str::to_owned),
        4 => prop::sample::select(vec!["中", "国", "é", "e\u{301}", "\u{301}", "\u{302}\u{327}", "\u{302e}", "\u{1d165}", "\u{200d}", "\u{200b}", "\u{0}",
            "\t", "\n", "\r\n", "\u{a0}", "\u{3000}", "\u{85}", "🙂", "👩\u{200d}👩", "İ", "Σ", "ﬁ", "≠", "\u{600}", "▁", "\u{344}", "'s", "1", "A", "。"])
            .prop_map(str::to_owned),
        1 => (1usize..30).prop_flat_map(|n| prop::sample::select(vec!["a", "\u{301}", "\u{200d}", " ", "🙂", "中", ".", "[SEP]", "e", "\u{302e}"]).prop_map(move |c| c.repeat(n))),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn windows_give_what_the_whole_text_gives(text in text(), kind in 0..KINDS, set in 0usize..8, needed in 1usize..40) {
        check(kind, set, &text, needed)?;
    }
}

#[test]
fn every_kind_is_read_in_windows_where_it_can_be() {
    // Ordinary words; the last kind has parts that are not known.
    for kind in 0..KINDS {
        let tokenizer = tokenizer(kind, 0);
        let text = "the cat ab ".repeat(2000);
        let limits = Limits { unbroken: 100, ..SMALL };
        for kept in [Kept::Start, Kept::End] {
            let found = windowed(&tokenizer, &text, 8, kept, limits);
            assert_eq!(found.is_ok(), kind != KINDS - 1, "{kind} {kept:?} {found:?}");
            assert!(found.is_err() || found.unwrap().len() < 100, "{kind}");
        }
    }
}

/// Texts without a space, much longer than what is kept of them: none is read whole.
#[test]
fn unbroken_texts_are_read_as_far_as_they_are_kept() {
    let tokenizer = word_piece(bert(true, None, true), added_tokens(0));
    let limits = Limits { window: 64, word: 256, unbroken: 1024 };
    for (unit, expected) in [
        (".", Some(13)),
        ("中", Some(14)),
        ("[SEP]", Some(3)),
        ("a", Some(1)),
        ("🙂", Some(1)),
        (" ", None),
        ("\u{3000}", None),
        ("\u{200d}", None),
        ("\u{301}", None),
    ] {
        let text = unit.repeat(20_000);
        for kept in [Kept::Start, Kept::End] {
            let found = windowed(&tokenizer, &text, 5, kept, limits).unwrap();
            assert!(found.len() < 100 && found.iter().all(|&id| Some(id) == expected), "{unit:?}: {found:?}");
            assert_eq!(found.is_empty(), expected.is_none(), "{unit:?}: {found:?}");
        }
        // What stands behind it, or before it, is reached.
        let (start, end) = (format!("the cat {text} b"), format!("b {text} the cat"));
        assert_eq!(windowed(&tokenizer, &start, 2, Kept::Start, limits).unwrap()[..2], [11, 12], "{unit:?}");
        let found = windowed(&tokenizer, &end, 2, Kept::End, limits).unwrap();
        assert_eq!(found[found.len() - 2..], [11, 12], "{unit:?}");
    }
    // One letter with marks without end, in a word that is left of it.
    let text = format!("b{}b the", "\u{301}".repeat(20_000));
    assert_eq!(windowed(&tokenizer, &text, 9, Kept::Start, limits).unwrap(), [7, 8, 11]);
    assert_eq!(windowed(&tokenizer, &text, 9, Kept::End, limits).unwrap(), [7, 8, 11]);
}

#[test]
fn a_run_that_cannot_be_cut_is_an_error() {
    let tokenizer = tokenizer(4, 0);
    let limits = Limits { unbroken: 1000, ..SMALL };
    let (short, long) = ("ab".repeat(500), "ab".repeat(501));
    for kept in [Kept::Start, Kept::End] {
        assert_eq!(windowed(&tokenizer, &short, 3, kept, limits).unwrap(), whole(&tokenizer, &short));
        let error = windowed(&tokenizer, &long, 3, kept, limits).unwrap_err();
        assert!(error.contains("1000 bytes") && error.contains("spaces"), "{error}");
        // Behind what is kept it is not seen.
        let text = if kept == Kept::Start { format!("a a a a a a {long}") } else { format!("{long} a a a a a a") };
        assert!(windowed(&tokenizer, &text, 2, kept, limits).is_ok());
    }
}
