//! The ids of one pass against the library's own.

use super::super::one_pass::{OnePass, Scratch};
use super::super::windows::Kept;
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// Added tokens: content, normalized, single_word, lstrip, rstrip.
type Added<'a> = (&'a str, bool, [bool; 3]);

const SPECIAL: [Added<'static>; 5] = [
    ("[PAD]", false, [false; 3]),
    ("[UNK]", false, [false; 3]),
    ("[CLS]", false, [false; 3]),
    ("[SEP]", false, [false; 3]),
    ("[MASK]", false, [false, true, false]),
];

/// A tokenizer with BERT's parts and a vocabulary of the fixtures' letters.
fn tokenizer(normalizer: &Value, added: &[Added<'_>], most_chars: usize) -> Tokenizer {
    let mut vocabulary: Vec<String> = added.iter().map(|(content, ..)| (*content).to_owned()).collect();
    let letters = "abcdefghijklmnopqrstuvwxyz0123456789éßñüöα\u{4e00}\u{3042}ı\u{301}";
    let words = [
        "the",
        "cat",
        "sat",
        "new",
        "york",
        "hello",
        "un",
        "able",
        "aff",
        "İ",
        "ab",
        "abc",
        "##bc",
        "##",
        "#",
        "!",
        "<",
        "s",
        ">",
        "[",
        "]",
        "\u{ac00}",
        "ᄀ",
        "ᅡ",
        "\u{1f600}",
        "A",
        "É",
        "Cat",
    ];
    let pieces = letters.chars().flat_map(|c| [c.to_string(), format!("##{c}")]);
    let more = ["##at", "##ing", "##able", "##ork", "##\u{4e00}\u{4e01}", "##ᅡ"];
    for piece in words.iter().chain(&more).map(|&word| word.to_owned()).chain(pieces) {
        if !vocabulary.contains(&piece) {
            vocabulary.push(piece);
        }
    }
    let vocab: serde_json::Map<String, Value> =
        vocabulary.iter().zip(0..).map(|(piece, id)| (piece.clone(), json!(id))).collect();
    let tokens: Vec<Value> = added
        .iter()
        .map(|(content, normalized, [single_word, lstrip, rstrip])| {
            json!({"id": vocab[*content], "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
                   "normalized": normalized, "special": !normalized})
        })
        .collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": tokens, "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": most_chars, "vocab": vocab},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn bert(clean_text: bool, handle_chinese_chars: bool, strip_accents: Option<bool>, lowercase: bool) -> Value {
    json!({"type": "BertNormalizer", "clean_text": clean_text, "handle_chinese_chars": handle_chinese_chars,
           "strip_accents": strip_accents, "lowercase": lowercase})
}

/// Tokenizers of all settings that are served.
static TOKENIZERS: LazyLock<Vec<(Tokenizer, OnePass)>> = LazyLock::new(|| {
    let tokens_of_all_kinds: Vec<Added<'_>> = [
        &SPECIAL[..],
        &[
            ("<s>", true, [false; 3]),
            ("New", true, [true, false, true]),
            ("cat sat", true, [false; 3]),
            ("é!", true, [false, true, true]),
            ("中a", true, [false; 3]),
        ],
    ]
    .concat();
    let lowered = json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, bert(true, true, Some(true), false)]});
    [
        tokenizer(&bert(true, true, None, true), &SPECIAL, 100),
        tokenizer(&bert(true, true, None, true), &tokens_of_all_kinds, 10),
        tokenizer(&bert(true, true, None, false), &SPECIAL, 100),
        tokenizer(&bert(false, false, Some(false), true), &tokens_of_all_kinds, 5),
        tokenizer(&bert(false, true, Some(true), false), &SPECIAL, 100),
        tokenizer(&lowered, &SPECIAL, 100),
        tokenizer(&Value::Null, &SPECIAL, 100),
    ]
    .into_iter()
    .map(|inner| {
        let pieces = OnePass::of(&inner).expect("a tokenizer that is served");
        (inner, pieces)
    })
    .collect()
});

/// The ids of `text` in one pass; `None` where it is not served.
fn in_one_pass(pieces: &OnePass, text: &str, needed: usize, kept: Kept) -> Option<Vec<u32>> {
    let mut ids = vec![7];
    pieces.ids(text, needed, kept, &mut Scratch::new(), &mut ids).then(|| ids.split_off(1))
}

fn by_library(inner: &Tokenizer, text: &str) -> Vec<u32> {
    inner.encode_fast(text, false).unwrap().get_ids().to_vec()
}

/// Compares all tokenizers; how many of them served the text.
#[track_caller]
fn same(text: &str) -> usize {
    let mut served = 0;
    for (place, (inner, pieces)) in TOKENIZERS.iter().enumerate() {
        let expected = by_library(inner, text);
        for kept in [Kept::Start, Kept::End] {
            let Some(found) = in_one_pass(pieces, text, usize::MAX, kept) else { continue };
            assert_eq!(found, expected, "tokenizer {place}: {text:?}");
            served += 1;
            let needed = 1 + text.len() % 7;
            let some = in_one_pass(pieces, text, needed, kept).expect("less of a text that was served");
            let enough = expected.len().min(needed);
            let equal = match kept {
                Kept::Start => some.len() >= enough && expected.starts_with(&some),
                Kept::End => some.len() >= enough && expected.ends_with(&some),
            };
            assert!(equal, "tokenizer {place}, {needed} of {text:?}: {some:?} of {expected:?}");
        }
    }
    served / 2
}

#[test]
fn plain_texts_are_served_by_all() {
    for text in [
        "",
        " ",
        "The cat sits.",
        "Hello, YORK!  unaffable\tcat\ncats",
        "a\u{301}b É\u{300} ñ",
        "\u{4e00}\u{4e8c} 中文abc",
        "naïve café",
        "\u{ac00}\u{ac01} 한국어",
        "🙂 emoji 🙂🙂",
        "x\u{0}y\u{200d}z\u{fffd}",
        "İstanbul ΑΒΓ ς Σ",
        "abcdefghijkl abcdefghijklmnopqrstuvwxyz",
        "[ SEP ] [SE [sep] <s",
        "a_b-c/d\\e\u{a0}f\u{2003}g",
        "\u{1d400} 𝔘𝔫𝔦",
        "١٢٣ १२३",
    ] {
        // Two of them have added tokens that some of these hold.
        assert!(same(text) >= TOKENIZERS.len() - 2, "{text:?}");
    }
}

#[test]
fn added_tokens_are_found_or_left_to_the_library() {
    for text in ["a [SEP] b", "[MASK]", "x[CLS]", "new york [PAD]", "a\u{85} [MASK]\t[MASK] b[[SEP]]", "[SEP][SEP]\u{301}"] {
        // Two of them have tokens that are found in the normalized text, which some of these hold.
        assert!(same(text) >= TOKENIZERS.len() - 2, "{text:?}");
    }
    for text in [
        "a <s> b",
        "<\u{0}S>",
        "brand new car",
        "The cat\tsat",
        "the cat  sat",
        "e\u{301}!",
        "É!",
        "newt",
        "x中a",
        "中 a",
        "x中\u{0}A",
    ] {
        same(text);
    }
    // The second one has tokens that are found in the normalized text.
    assert_eq!(in_one_pass(&TOKENIZERS[1].1, "a <S> b", usize::MAX, Kept::Start), None);
    assert_eq!(in_one_pass(&TOKENIZERS[1].1, "a <\u{0}s> b", usize::MAX, Kept::Start), None);
    assert!(in_one_pass(&TOKENIZERS[1].1, "a < q> b <t>", usize::MAX, Kept::Start).is_some());
}

/// A mark that is kept changes places with another by its class: such texts are not served.
#[test]
fn marks_whose_order_counts_are_left_to_the_library() {
    assert_eq!(in_one_pass(&TOKENIZERS[0].1, "a\u{302e}\u{1d165}", usize::MAX, Kept::Start), None);
    same("a\u{302e}\u{1d165}b\u{1d165}\u{302e}");
}

/// Each character of Unicode beside letters, spaces, marks and itself.
#[test]
fn every_character_is_what_the_library_makes_of_it() {
    use rayon::prelude::*;
    let served: usize = (0..=u32::from(char::MAX))
        .into_par_iter()
        .filter_map(char::from_u32)
        .map(|c| {
            let text = format!("a{c}b {c} {c}{c}\u{301}{c}");
            let expected = by_library(&TOKENIZERS[0].0, &text);
            let Some(found) = in_one_pass(&TOKENIZERS[0].1, &text, usize::MAX, Kept::Start) else { return 0 };
            assert_eq!(found, expected, "{c:?}, U+{:04X}", c as u32);
            1
        })
        .sum();
    // All but some dozens of marks.
    assert!(served > 1_111_900, "{served}");
}

#[test]
fn a_text_without_white_space_takes_linear_time() {
    let (inner, pieces) = &TOKENIZERS[0];
    let unknown = inner.token_to_id("[UNK]").unwrap();
    let text = "a".repeat(10_000_000);
    assert_eq!(in_one_pass(pieces, &text, 513, Kept::Start), Some(vec![unknown]));
    let text = "ab!".repeat(3_000_000);
    let kept = in_one_pass(pieces, &text, 513, Kept::Start).unwrap();
    assert!((513..516).contains(&kept.len()), "{}", kept.len());
    let kept = in_one_pass(pieces, &text, 513, Kept::End).unwrap();
    assert!((513..10_000).contains(&kept.len()), "{}", kept.len());
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-zA-Z]{1,8}",
        2 => "[ \\t\\n]{1,2}",
        2 => "[!-~]{1,3}",
        1 => any::<char>().prop_map(String::from),
        1 => proptest::char::ranges(vec!['\u{80}'..='\u{24f}', '\u{300}'..='\u{36f}', '\u{370}'..='\u{3ff}', '\u{4e00}'..='\u{4e20}', '\u{ac00}'..='\u{ac20}', '\u{900}'..='\u{97f}', '\u{2000}'..='\u{206f}', '\u{1b00}'..='\u{1b7f}'].into())
            .prop_map(String::from),
        1 => prop::sample::select(vec!["[SEP]", "[MASK]", "<s>", "<", "new", "New", "cat sat", "cat", "\u{0}", "é!", "e\u{301}!", "[", "[UNK", "]", "中", "中a", "中 a"])
            .prop_map(str::to_owned),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn random_texts_are_what_the_library_makes_of_them(pieces in prop::collection::vec(piece(), 0..16)) {
        same(&pieces.concat());
    }
}

#[test]
fn other_tokenizers_are_not_served() {
    let served = |change: fn(&mut Value)| {
        let mut json: Value = serde_json::from_str(&TOKENIZERS[0].0.to_string(false).unwrap()).unwrap();
        change(&mut json);
        OnePass::of(&Tokenizer::from_bytes(json.to_string()).unwrap()).is_some()
    };
    assert!(served(|_| ()));
    assert!(!served(|json| json["pre_tokenizer"] = json!({"type": "Whitespace"})));
    assert!(!served(|json| json["pre_tokenizer"] = Value::Null));
    assert!(!served(|json| json["normalizer"] = json!({"type": "NFC"})));
    assert!(!served(
        |json| json["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}, {"type": "NFKC"}]})
    ));
    assert!(!served(|json| json["model"]["unk_token"] = json!("[GONE]")));
    let mut whole = TOKENIZERS[0].0.clone();
    whole.set_encode_special_tokens(true);
    assert!(OnePass::of(&whole).is_none());
}
