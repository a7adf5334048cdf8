//! The ids of one pass against the library's own.

use super::super::one_pass::{OnePass, Scratch};
use super::super::windows::Kept;
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// A character map made by sentencepiece of some rules of NFKC: white space to spaces, controls to nothing, "ﬁ" to "fi", U+FDFA to a phrase, letters
/// with marks to one letter, jamo to syllables.
const MAP: &str = concat!(
    "AAQAAAAMAAAAAACAAQ0AAMwwAgABAACAig0AAB8AAIDMsAIAozwDAAo1AAAJOQAAzBQCAIIFAABMAACADSkAAMx4AgCBBQAAIgAAgA8AAIAJAACAhgUAABgAAIAlAACAhA",
    "UAAIQEAgCAiAMA4RACAIWcAgAfdQAAoQ0AAG0AAICo9QAAoJEAAIZYAgBxAACAAwAAgKIFAAATAACABwAAgKAFAACAqAMAgLUAAIuIAwDjHAIAhKgCAK2xAACCYAIAmXEA",
    "AIBkAgCBQAIAsoEAAFAAAICABQAAWAAAgBwAAIC6NQAAgTkAAJH4AgAqAACAv+kAAIwgAgC9uQAAEQAAgBYAAICs5AMAgxUBAEE0AgCRlQEAgu0BAGUAAIC+fAIAnj0AAG",
    "kAAICLNQEAngUAAFQAAICdRAIAkAwCAIDBAQCNOQEAvAgCAL1cAgC+GAIAUQAAAFYAAABXAAAAVAAAALtMAwBaAAAAWwAAAFgAAAC3WAMAXgAAAF8AAABcAAAAXQAAAGIA",
    "AABjAAAAYaQCAGEAAACmHQEAZwAAAGWUAgBlAAAAagAAAGsAAACouQEAaQAAAG4AAABvAAAAbAAAAG0AAAC21QAAcwAAAHAAAAChNQEAdgAAAHcAAAB0AAAAdQAAAHoAAA",
    "B7AAAAeAAAAHkAAAB/9QEAfwAAAHwAAAB9AAAAggAAAIMAAACAAAAAgQAAAIYAAACHAAAAhAAAAIUAAACKAAAAiwAAAIgAAACJAAAAjgAAAI8AAACMAAAAjQAAAJIAAACT",
    "AAAAkAAAAJEAAACWAAAAlwAAAJQAAACVAAAAmgAAAJsAAACYAAAAmQAAAJ4AAACfAAAAnAAAAJ0AAACiAAAAowAAAKAAAAChAAAApgAAAKcAAACkAAAApQAAAKoAAACrAA",
    "AA70gBAKkAAACuAAAArwAAAKwAAACtAAAAsgAAALMAAACwAAAAsQAAALYAAAC3AAAAtAAAALUAAAC6AAAAuwAAALgAAAC5AAAAvgAAAL8AAAC8AAAAvQAAAMIAAADCBAEA",
    "wAAAAMEAAADHWAEAxwAAAMQAAADFAAAAygAAAMsAAADIAAAAyQAAAM4AAADPAAAAzXQBAM0AAADSAAAA0wAAANAAAADRAAAA1gAAANcAAADUAAAA1QAAANoAAADbAAAA2A",
    "AAANkAAADeAAAA3wAAANwAAADdAAAA40ABAOIkAQDh+AEA4QAAAOYAAADnAAAA5AAAAOUAAADqAAAA6wAAAOgAAADpAAAA7wAAAO8AAADsAAAA7QAAAPIAAADzAAAA8AAA",
    "APCIAAD2AAAA9wAAAPQAAAD1AAAA+gAAAPsAAAD4AAAA+QAAAP4AAAD/AAAA/AAAAOFgAQAAIAAuLi4AMQAx4oGEMgAyAEEAVE0AYgBkxb4AZmkAw4UAw6kAzIjMgQDYtd",
    "mE2Ykg2KfZhNmE2Ycg2LnZhNmK2Ycg2YjYs9mE2YUA4bqtAOOBjADjgpkA44Ki44OR44O844OIAOOCqwDjgqwA6rCAAOqwgQA=",
);

fn tokenizer(vocab: &[(String, f64)], normalizer: &Value, pre_tokenizer: &Value, added: &Value) -> Tokenizer {
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null,
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": vocab},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn map() -> Value {
    json!({"type": "Precompiled", "precompiled_charsmap": MAP})
}

fn metaspace(prepend_scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": prepend_scheme, "split": true})
}

fn split(prepend_scheme: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace(prepend_scheme)]})
}

/// Pieces with ties among their scores, one that is there twice, and one of characters that are not there alone.
fn vocabulary() -> Vec<(String, f64)> {
    let mut vocab: Vec<(String, f64)> =
        [("<unk>", 0.0), ("<s>", 0.0), ("<mask>", 0.0)].map(|(piece, score)| (piece.to_owned(), score)).into();
    let pieces = "\u{2581} a b c d e h i n s t . , fi A é 가 カ ガ 中 中文 文 \u{2581}the \u{2581}cat the he ca at t\u{2581} s\u{2581}a \u{2581}\u{2581} ab cab aa aaa zz qz \u{301} \u{308} ص \u{2581}a in ing ab";
    vocab.extend(pieces.split(' ').zip(0..).map(|(piece, place)| (piece.to_owned(), -f64::from(place % 7) * 0.5 - 1.0)));
    vocab
}

static TOKENIZERS: LazyLock<Vec<(Tokenizer, OnePass)>> = LazyLock::new(|| {
    let token = |id: u32, content: &str, normalized: bool, [single_word, lstrip, rstrip]: [bool; 3]| {
        json!({"id": id, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip, "normalized": normalized,
               "special": true})
    };
    let plain = json!([token(1, "<s>", false, [false; 3]), token(2, "<mask>", false, [false, true, false])]);
    let flags = json!([
        token(1, "<s>", false, [false, true, true]),
        token(2, "<mask>", true, [false, true, true]),
        token(100, "cat", true, [true, false, false]),
        token(101, "ﬁ\u{a0}a", true, [false, false, false]),
    ]);
    let squeezed =
        json!({"type": "Sequence", "normalizers": [map(), {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]});
    [
        (map(), split("always"), json!([])),
        (map(), split("always"), plain.clone()),
        (map(), split("never"), flags.clone()),
        (map(), metaspace("always"), plain.clone()),
        (squeezed.clone(), metaspace("always"), flags),
        (squeezed, metaspace("never"), plain.clone()),
        (Value::Null, metaspace("always"), plain),
    ]
    .into_iter()
    .map(|(normalizer, pre_tokenizer, added)| {
        let inner = tokenizer(&vocabulary(), &normalizer, &pre_tokenizer, &added);
        let one_pass = OnePass::of(&inner).expect("a tokenizer that is served").written_and_read();
        (inner, one_pass)
    })
    .collect()
});

fn in_one_pass(one_pass: &OnePass, text: &str, needed: usize, kept: Kept) -> Vec<u32> {
    let mut ids = vec![7];
    assert!(one_pass.ids(text, needed, kept, &mut Scratch::new(), &mut ids));
    ids.split_off(1)
}

fn by_library(inner: &Tokenizer, text: &str) -> Vec<u32> {
    inner.encode_fast(text, false).unwrap().get_ids().to_vec()
}

#[track_caller]
fn same_by(inner: &Tokenizer, one_pass: &OnePass, text: &str) {
    let expected = by_library(inner, text);
    assert_eq!(in_one_pass(one_pass, text, usize::MAX, Kept::Start), expected, "{text:?}");
    assert_eq!(in_one_pass(one_pass, text, usize::MAX, Kept::End), expected, "{text:?}");
    let needed = 1 + text.len() % 7;
    let enough = expected.len().min(needed);
    let first = in_one_pass(one_pass, text, needed, Kept::Start);
    assert!(first.len() >= enough && expected.starts_with(&first), "{needed} of {text:?}: {first:?} of {expected:?}");
    let last = in_one_pass(one_pass, text, needed, Kept::End);
    assert!(last.len() >= enough && expected.ends_with(&last), "{needed} of {text:?}: {last:?} of {expected:?}");
}

#[track_caller]
fn same(text: &str) {
    TOKENIZERS.iter().for_each(|(inner, one_pass)| same_by(inner, one_pass, text));
}

#[test]
fn texts_are_what_the_library_makes_of_them() {
    for text in [
        "",
        " ",
        "  \t ",
        "the cat  sat\r\nthe\rcats",
        "ﬁ the Ａcat… e\u{301} e\u{308} \u{301}a",
        "\u{fdfa}\u{fdfa} x\u{1}y",
        "\u{1100}\u{1161}\u{11a8} \u{ac00}\u{11a8} \u{ac00}\u{1161} か\u{3099} ｶ\u{ff9e}",
        "\u{1f1e6}\u{1f1e7}\u{1f1e8} 👩\u{200d}👩\u{200d}👧 क\u{94d}क \u{600}a",
        "\u{2581}a\u{2581}\u{2581}the \u{2581}",
        "zz qz z q qzz zq <unk><unk>x <unk>",
        "<s> the cat<s>  <mask> cat _cat <mask> ﬁ\u{a0}a fi a",
        "中文中中文",
    ] {
        same(text);
    }
}

#[test]
fn every_character_is_what_the_library_makes_of_it() {
    use rayon::prelude::*;
    // Of the planes in which nothing is assigned, some of each.
    let asked = |c: &u32| !(0x4_0000..0xe_0000).contains(c) || c.is_multiple_of(64);
    (0..=u32::from(char::MAX)).into_par_iter().filter(asked).filter_map(char::from_u32).for_each(|c| {
        let text = format!("a{c}b{c}{c} {c}\u{301}{c}\u{ac00}{c}\u{1f600}{c}\u{1100}{c}\u{200d}{c}");
        let (inner, one_pass) = &TOKENIZERS[0];
        assert_eq!(in_one_pass(one_pass, &text, usize::MAX, Kept::Start), by_library(inner, &text), "U+{:04X}", c as u32);
    });
}

/// Words of several chunks: what is told early is what the whole gives.
#[test]
fn long_words_are_told_chunk_by_chunk() {
    let mut random = 1_u32;
    let mut letters = |count: usize, of: &[&str]| -> String {
        let letter = |_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            of[(random >> 16) as usize % of.len()]
        };
        (0..count).map(letter).collect()
    };
    let texts = [
        "a".repeat(9001),
        letters(9000, &["a", "b", "c"]),
        letters(5000, &["z", "q", "a", "中", "文"]),
        letters(5000, &["z"]),
        "the".repeat(3000),
    ];
    for text in &texts {
        same_by(&TOKENIZERS[0].0, &TOKENIZERS[0].1, text);
    }
    let start = in_one_pass(&TOKENIZERS[0].1, &texts[1].repeat(300), 513, Kept::Start);
    assert!((513..4000).contains(&start.len()), "{}", start.len());
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-ehinstzq]{1,9}",
        3 => "[ \\t\\n\\r]{1,3}",
        2 => "[!-~]{1,3}",
        1 => any::<char>().prop_map(String::from),
        1 => "[\\p{L}\\p{N}\\p{M}\\p{Z}\\p{C}]{1,3}",
        1 => "[\u{300}-\u{36f}\u{1100}-\u{11ff}\u{ac00}-\u{ac20}\u{900}-\u{97f}\u{1f1e6}-\u{1f1ff}\u{1f3fb}-\u{1f3ff}\u{200d}👩\u{600}]{1,4}",
        1 => prop::sample::select(vec!["<s>", "<mask>", "cat", " the", "\u{2581}", "<unk>", "ﬁ", "ﬁ\u{a0}a", "fi a", "e\u{301}", "中文", "\u{a0}", "\u{fdfa}"]).prop_map(str::to_owned),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_texts_are_what_the_library_makes_of_them(pieces in prop::collection::vec(piece(), 0..16)) {
        same(&pieces.concat());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_scores_are_weighed_as_the_library_weighs_them(
        vocab in prop::collection::vec(("[abc\u{2581}é]{1,5}", prop::sample::select(vec![-3.0, -2.5, -1.0, -0.1, 0.0, 0.3, 20.5, 30.0])), 0..30),
        texts in prop::collection::vec("[abcé ]{0,40}", 1..8),
    ) {
        let whole: Vec<(String, f64)> = std::iter::once(("<unk>".to_owned(), 0.0)).chain(vocab).collect();
        let inner = tokenizer(&whole, &Value::Null, &metaspace("always"), &json!([]));
        let one_pass = OnePass::of(&inner).unwrap().written_and_read();
        for text in &texts {
            same_by(&inner, &one_pass, text);
        }
    }
}

#[test]
fn other_tokenizers_are_not_served() {
    let served = |change: fn(&mut Value)| {
        let mut json: Value = serde_json::from_str(&TOKENIZERS[3].0.to_string(false).unwrap()).unwrap();
        change(&mut json);
        OnePass::of(&Tokenizer::from_bytes(json.to_string()).unwrap()).is_some()
    };
    assert!(served(|_| ()));
    assert!(!served(|json| json["pre_tokenizer"] = Value::Null));
    assert!(!served(|json| json["pre_tokenizer"]["split"] = json!(false)));
    assert!(!served(|json| json["pre_tokenizer"] = metaspace("first")));
    assert!(!served(|json| json["normalizer"] = json!({"type": "NFKC"})));
    assert!(!served(|json| json["normalizer"] =
        json!({"type": "Sequence", "normalizers": [map(), {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}]})));
    assert!(!served(|json| json["model"]["unk_id"] = Value::Null));
    assert!(!served(|json| json["model"]["byte_fallback"] = json!(true)));
}
