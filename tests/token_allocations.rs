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
