//! Text to ids on a warm thread: counted in a file of its own, for the counting allocator is the process's.

#[path = "common/counting.rs"]
mod counting;

use counting::allocations;
use serde_json::{Value, json};
use trt_embed::tokens::{Tokenizer, TokenizerSettings};

/// Texts of one kind each; the last is longer than what is kept.
const TEXTS: [&str; 8] = [
    "",
    "the cat sat on the mat",
    "The CAT, sat!  unaffable\tcats\n",
    "中文 the 中",
    "café e\u{301} 🙂",
    "a [MASK] cat[SEP] sat",
    "xyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzyxyzzy",
    "the cat sat on the mat the cat sat on the mat the cat sat on the mat the cat sat on the mat the cat sat on the mat",
];

fn added(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

fn word_piece() -> Value {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let words = ["the", "cat", "sat", "on", "mat", "##s", "un", "##aff", "##able", "中", "文", "cafe", "e", ",", "!", "🙂", "a"];
    let vocab: serde_json::Map<String, Value> =
        special.iter().chain(&words).zip(0..).map(|(piece, id)| ((*piece).to_owned(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": special.iter().enumerate().map(|(id, content)| added(id, content)).collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

fn byte_level_bpe() -> Value {
    let unprintable = (0..=255_u32).filter(|byte| !matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)).count() as u32;
    let bytes = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x100 + unprintable).filter_map(char::from_u32);
    let merges = ["t h", "th e", "c a", "ca t", "Ġ the", "Ġ cat", "x y", "xy z", "a t"];
    let pieces = bytes.map(String::from).chain(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut vocab: serde_json::Map<String, Value> = pieces.zip(0..).map(|(piece, id)| (piece, json!(id))).collect();
    vocab.insert("[MASK]".to_owned(), json!(400));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(400, "[MASK]")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges},
    })
}

fn unigram() -> Value {
    let pieces = "<unk> <s> [MASK] \u{2581} \u{2581}the \u{2581}cat c a t s at on m x y z 中 文";
    let vocab: Vec<(&str, f64)> = pieces.split(' ').zip(0..).map(|(piece, place)| (piece, -f64::from(place))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(2, "[MASK]")], "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}]},
        "post_processor": null, "decoder": null,
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": vocab},
    })
}

/// Counts on a thread that has seen the texts before.
#[track_caller]
fn counted(json: &Value, settings: TokenizerSettings, texts: &[&str]) {
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes(), settings).unwrap();
    let mut ids = Vec::new();
    for text in texts {
        tokenizer.ids_into(text, &mut ids).unwrap();
    }
    for text in texts {
        let before = allocations();
        tokenizer.ids_into(text, &mut ids).unwrap();
        let made = allocations() - before;
        assert_eq!(made, 0, "{text:?}");
        // The count is that of a call which does something.
        assert_eq!(tokenizer.ids(&[text]).unwrap(), [&ids[..]]);
        assert!(allocations() > before);
    }
}

#[test]
fn word_piece_allocates_nothing_when_warm() {
    counted(&word_piece(), TokenizerSettings::new(16, 0, 1000), &TEXTS);
}

#[test]
fn a_prompt_allocates_nothing_when_warm() {
    let mut settings = TokenizerSettings::new(16, 0, 1000);
    settings.prompt = Some("cat: ".to_owned());
    counted(&word_piece(), settings, &TEXTS);
}

#[test]
fn byte_level_bpe_allocates_nothing_when_warm() {
    counted(&byte_level_bpe(), TokenizerSettings::new(16, 0, 1000), &TEXTS);
}

#[test]
fn unigram_allocates_nothing_when_warm() {
    counted(&unigram(), TokenizerSettings::new(16, 0, 1000), &TEXTS);
}
