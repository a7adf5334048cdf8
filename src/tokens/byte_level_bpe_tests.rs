//! The ids of one pass against the library's own.

use super::super::one_pass::{OnePass, Scratch};
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// A tokenizer of all bytes and of `merges`, each of two tokens that are there before it.
fn tokenizer(merges: &[(String, String)], add_prefix_space: bool, added: &Value) -> Tokenizer {
    let mut pieces: Vec<String> = byte_chars().iter().map(char::to_string).collect();
    for (left, right) in merges {
        let token = format!("{left}{right}");
        if !pieces.contains(&token) {
            pieces.push(token);
        }
    }
    let mut vocab: serde_json::Map<String, Value> = pieces.into_iter().zip(0..).map(|(piece, id)| (piece, json!(id))).collect();
    for token in added.as_array().unwrap() {
        vocab.insert(token["content"].as_str().unwrap().to_owned(), token["id"].clone());
    }
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

/// Merges of tokens drawn by `draws`, in no order that training would give: some tokens come about in two ways, others never.
fn merges(draws: &[(u16, u16)], seeds: &[&str]) -> Vec<(String, String)> {
    let mut tokens: Vec<String> = seeds.iter().map(|&seed| seed.to_owned()).collect();
    let mut merges = Vec::new();
    for &(left, right) in draws {
        let (left, right) = (&tokens[usize::from(left) % tokens.len()], &tokens[usize::from(right) % tokens.len()]);
        let merge = (left.clone(), right.clone());
        let token = format!("{left}{right}");
        if token.chars().count() <= 12 && !merges.contains(&merge) {
            merges.push(merge);
            tokens.push(token);
        }
    }
    merges
}

fn words_of_english() -> Vec<(String, String)> {
    let pairs = "h e,Ġ t,Ġt he,a t,Ġ c,Ġc at,' s,e r,i n,in g,Ġ Ġ,ĠĠ ĠĠ,1 2,l l,' l,'l l,a a,aa aa,- -,-- --,ä ¸,ä¸ Ń,Ċ Ċ,Ġ a,n d,Ġa nd,( ),Ã ©";
    pairs.split(',').map(|pair| pair.split_once(' ').unwrap()).map(|(left, right)| (left.to_owned(), right.to_owned())).collect()
}

static TOKENIZERS: LazyLock<Vec<(Tokenizer, OnePass)>> = LazyLock::new(|| {
    let token = |id: u32, content: &str, normalized: bool, [single_word, lstrip, rstrip]: [bool; 3]| {
        json!({"id": id, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip, "normalized": normalized,
               "special": true})
    };
    let plain = json!([
        token(1000, "<s>", true, [false; 3]),
        token(1001, "</s>", true, [false; 3]),
        token(1002, "<mask>", false, [false, true, false])
    ]);
    let flags = json!([
        token(1000, "<s>", false, [false, true, true]),
        token(1001, "he", true, [true, false, false]),
        token(1002, "<mask>", true, [false, true, true]),
        token(1003, "cat", false, [true, true, false]),
    ]);
    [(false, json!([])), (true, json!([])), (false, plain.clone()), (true, plain), (true, flags)]
        .into_iter()
        .map(|(add_prefix_space, added)| {
            let inner = tokenizer(&words_of_english(), add_prefix_space, &added);
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
        "   ",
        "the cat's  ring\n\n  12 and (é) 中中\t\tx",
        "'s''s 's 're've'm'll'd'l 'S 're",
        "\u{a0}\u{a0}a \u{2003} b\u{3000}",
        "a\r\n\r\nb \r",
        "١٢ ½ ² ⅷ x2y",
        "e\u{301} \u{301}a \u{e000}\u{10ffff}",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "<s> the cat</s>  <mask> he he. cat _cat <mask>",
        "\u{85}\u{200b}\u{feff} x",
    ] {
        same(text);
    }
}

/// Of each character: its class, and its bytes.
#[test]
fn every_character_is_what_the_library_makes_of_it() {
    use rayon::prelude::*;
    // Of the planes in which nothing is assigned, some of each.
    let asked = |c: &u32| !(0x4_0000..0xe_0000).contains(c) || c.is_multiple_of(64);
    (0..=u32::from(char::MAX)).into_par_iter().filter(asked).filter_map(char::from_u32).for_each(|c| {
        let text = format!("a{c}1{c}{c} {c}.{c} {c}");
        let (inner, one_pass) = &TOKENIZERS[0];
        assert_eq!(in_one_pass(one_pass, &text, usize::MAX, Kept::Start), by_library(inner, &text), "U+{:04X}", c as u32);
    });
}

/// The first and last ids of a word without end, told from a part of it, against those of the whole.
#[test]
fn of_long_words_no_more_is_read_than_is_kept() {
    let (inner, one_pass) = &TOKENIZERS[0];
    let mut random = 1_u32;
    let mut letters = |count: usize, of: &[u8]| -> String {
        let letter = |_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(of[(random >> 16) as usize % of.len()])
        };
        (0..count).map(letter).collect()
    };
    for text in ["a".repeat(5001), letters(5000, b"he"), letters(5000, b"aingl"), "中".repeat(1500), letters(3000, b"-")] {
        let expected = by_library(inner, &text);
        for needed in [1, 3, 20] {
            assert!(in_one_pass(one_pass, &text, needed, Kept::Start) == expected[..needed], "{needed}");
            // Where the end of the word depends on its beginning, all of it is read.
            assert!(expected.ends_with(&in_one_pass(one_pass, &text, needed, Kept::End)), "{needed}");
        }
    }
    let text = "aaab".repeat(3_000_000);
    assert_eq!(in_one_pass(one_pass, &text, 513, Kept::Start).len(), 513);
    assert_eq!(in_one_pass(one_pass, &text, 513, Kept::End).len(), 513);
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-eghit]{1,9}",
        3 => "[ \\t\\n\\r]{1,3}",
        2 => "[!-~]{1,3}",
        1 => any::<char>().prop_map(String::from),
        1 => "[\\p{L}\\p{N}\\p{M}\\p{Z}\\p{C}]{1,3}",
        1 => prop::sample::select(vec!["<s>", "</s>", "<mask>", "he", "cat", " the", "'s", "'ll", "'r", "<", "中中", "é", "\u{a0}"]).prop_map(str::to_owned),
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
    fn any_merges_are_done_in_the_library_s_order(
        draws in prop::collection::vec(any::<(u16, u16)>(), 0..60),
        texts in prop::collection::vec("[abc]{0,90}|[abc ]{0,20}|(abca){0,30}", 1..8),
    ) {
        let inner = tokenizer(&merges(&draws, &["a", "b", "c", "Ġ"]), false, &json!([]));
        let one_pass = OnePass::of(&inner).unwrap().written_and_read();
        for text in &texts {
            same_by(&inner, &one_pass, text);
        }
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
    assert!(!served(|json| json["pre_tokenizer"] = Value::Null));
    assert!(!served(|json| json["pre_tokenizer"]["use_regex"] = json!(false)));
    assert!(!served(|json| json["normalizer"] = json!({"type": "NFC"})));
    assert!(!served(|json| json["model"]["dropout"] = json!(0.5)));
    assert!(!served(|json| json["model"]["ignore_merges"] = json!(true)));
    assert!(!served(|json| json["model"]["end_of_word_suffix"] = json!("</w>")));
    assert!(!served(|json| {
        json["model"]["vocab"].as_object_mut().unwrap().remove("ÿ");
    }));
}
