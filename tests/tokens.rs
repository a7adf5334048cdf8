//! Tokenizing and batching: `trt_embed::tokens` against the `tokenizers` library used plainly, and the batching rules as properties.

use proptest::prelude::*;
use serde_json::{Value, json};
use trt_embed::model::{TokenizerFiles, TokenizerModel};
use trt_embed::tokens::{BatchPlan, TokenBatch, Tokenized, Tokenizer, TokenizerSettings, batches_from_ids};
use trt_embed::{Error, Setting};

const VOCAB: [&str; 24] = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "##s", "##at", "a", "query", ":", ",", "中",
    "文", "cafe", "s", "The", "q", "##uery", "i",
];
const PAD: u32 = 0;
const SEP: u32 = 3;
const ADDED: u32 = 24;
const TABLE: usize = 25;

/// A WordPiece tokenizer with truncation and padding of its own, as published files have them: overriding must undo both.
fn tokenizer_json(post_processor: &Value, added: Option<Value>) -> Value {
    let vocab: serde_json::Map<String, Value> =
        VOCAB.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let special = |id: usize| json!({"id": id, "content": VOCAB[id], "single_word": false, "lstrip": id == 4, "rstrip": false, "normalized": false, "special": true});
    let mut added_tokens: Vec<Value> = (0..5).map(special).collect();
    added_tokens.extend(added);
    json!({
        "version": "1.0",
        "truncation": {"direction": "Left", "max_length": 6, "strategy": "LongestFirst", "stride": 1},
        "padding": {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": added_tokens,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": post_processor,
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab}
    })
}

fn bert_processing() -> Value {
    json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]})
}

/// Two special tokens before the text and two after it.
fn template() -> Value {
    let piece = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({
        "type": "TemplateProcessing",
        "single": [piece("[CLS]"), piece("[MASK]"), {"Sequence": {"id": "A", "type_id": 0}}, piece("[SEP]"), piece("[SEP]")],
        "pair": [piece("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[CLS]": special("[CLS]", 2), "[SEP]": special("[SEP]", 3), "[MASK]": special("[MASK]", 4)}
    })
}

fn post_processors() -> [(Value, usize); 3] {
    [(bert_processing(), 2), (template(), 4), (Value::Null, 0)]
}

/// An added token that spans a space, or whose normal form does; or one that does neither.
fn added_tokens() -> [Option<Value>; 4] {
    let token = |content: &str, normalized: bool| {
        Some(
            json!({"id": ADDED, "content": content, "single_word": false, "lstrip": false, "rstrip": true, "normalized": normalized, "special": false}),
        )
    };
    [None, token("sat on", false), token("mat中the", true), token("catmat", true)]
}

fn open(json: &Value, settings: TokenizerSettings) -> Tokenizer {
    Tokenizer::from_bytes(json.to_string().as_bytes(), settings).unwrap()
}

fn settings(max_tokens: usize) -> TokenizerSettings {
    TokenizerSettings::new(max_tokens, PAD, TABLE)
}

fn roomy() -> BatchPlan {
    BatchPlan::new(64, 1 << 20, 1)
}

/// Ids of each text in the caller's order.
fn restore(tokenized: &Tokenized) -> Vec<Vec<u32>> {
    let mut rows = vec![None; tokenized.tokens.len()];
    for batch in &tokenized.batches {
        for (place, &row) in batch.rows().iter().enumerate() {
            let ids = batch.row(place).iter().map(|&id| id as u32).collect();
            assert!(rows[row].replace(ids).is_none(), "text {row} appears twice");
        }
    }
    rows.into_iter().map(|row| row.expect("every text appears")).collect()
}

fn encode(tokenizer: &Tokenizer, texts: &[&str]) -> Vec<Vec<u32>> {
    restore(&tokenizer.encode(texts, &roomy()).unwrap())
}

/// The library on its own: truncation at `max_tokens` (none when `None`) on the file's side, no padding.
fn reference(json: &Value, text: &str, max_tokens: Option<usize>) -> Vec<u32> {
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
    tokenizer.with_padding(None);
    let direction = tokenizer.get_truncation().unwrap().direction;
    let truncation = max_tokens.map(|max_length| tokenizers::TruncationParams { max_length, direction, ..Default::default() });
    tokenizer.with_truncation(truncation).unwrap();
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

#[test]
fn the_files_truncation_and_padding_are_overridden() {
    let tokenizer = open(&tokenizer_json(&bert_processing(), None), settings(12));
    let tokenized = tokenizer.encode(&["the cat sat on the mat, the cats", "cat"], &roomy()).unwrap();
    assert_eq!(restore(&tokenized), [vec![2, 5, 6, 7, 8, 5, 9, 15, 5, 6, 10, 3], vec![2, 6, 3]]);
    assert_eq!((tokenized.tokens, tokenized.truncated), (vec![12, 3], 0));
    let batch = &tokenized.batches[0];
    assert_eq!((batch.batch(), batch.longest(), batch.skip()), (2, 12, 0));
    assert_eq!((batch.starts(), batch.row(1)), ([0, 12, 15].as_slice(), [2, 6, 3].as_slice()));
}

#[test]
fn a_text_at_the_limit_is_not_cut_and_one_beyond_it_is() {
    for (post_processor, added) in post_processors() {
        let json = tokenizer_json(&post_processor, None);
        for max_tokens in added.max(1)..added + 6 {
            let tokenizer = open(&json, settings(max_tokens));
            for words in 0..12 {
                let text = "cat ".repeat(words);
                let tokenized = tokenizer.encode(&[&text], &roomy()).unwrap();
                assert_eq!(
                    restore(&tokenized)[0],
                    reference(&json, &text, Some(max_tokens)),
                    "{max_tokens} tokens of {words} words"
                );
                assert_eq!(tokenized.truncated, usize::from(words + added > max_tokens), "{max_tokens} tokens of {words} words");
            }
        }
    }
}

#[test]
fn special_tokens_without_room_are_an_error() {
    for (post_processor, added) in post_processors() {
        let json = tokenizer_json(&post_processor, None).to_string();
        let error = Tokenizer::from_bytes(json.as_bytes(), settings(added.max(1) - 1)).unwrap_err();
        assert!(matches!(error, Error::Setting { setting: Setting::MaxTokens, .. }), "{error}");
    }
}

#[test]
fn an_empty_text_has_its_special_tokens() {
    let tokenizer = open(&tokenizer_json(&bert_processing(), None), settings(8));
    assert_eq!(encode(&tokenizer, &[""]), [vec![2, 3]]);
    // Without special tokens nothing is left; a rectangle of it keeps a column.
    let tokenizer = open(&tokenizer_json(&Value::Null, None), settings(8));
    let tokenized = tokenizer.encode(&[""], &roomy()).unwrap();
    let batch = &tokenized.batches[0];
    assert_eq!((batch.ids(), batch.starts(), batch.longest()), ([].as_slice(), [0, 0].as_slice(), 1));
    assert_eq!(batch.padded(9), (vec![9], vec![0]));
}

#[test]
fn no_texts_give_no_batches() {
    let tokenizer = open(&tokenizer_json(&bert_processing(), None), settings(8));
    let tokenized = tokenizer.encode(&[] as &[&str], &roomy()).unwrap();
    assert_eq!(tokenized, Tokenized::default());
}

#[test]
fn a_prompt_is_put_before_every_text_and_counted_without_its_last_special_token() {
    let json = tokenizer_json(&bert_processing(), None);
    let mut with_prompt = settings(8);
    with_prompt.prompt = Some("query: ".to_owned());
    let tokenizer = open(&json, with_prompt.clone());
    assert_eq!(encode(&tokenizer, &["the cat", ""]), [vec![2, 13, 14, 5, 6, 3], vec![2, 13, 14, 3]]);
    assert_eq!(tokenizer.skip(), 0);

    with_prompt.skip_prompt = true;
    let tokenizer = open(&json, with_prompt.clone());
    assert_eq!(tokenizer.skip(), 3);
    assert!(tokenizer.encode(&["the cat"], &roomy()).unwrap().batches.iter().all(|batch| batch.skip() == 3));
    // The prompt alone is cut at the limit too.
    with_prompt.max_tokens = 3;
    assert_eq!(open(&json, with_prompt.clone()).skip(), 2);
    // No special token at the end, so none is left out.
    with_prompt.max_tokens = 8;
    assert_eq!(open(&tokenizer_json(&Value::Null, None), with_prompt.clone()).skip(), 2);
    with_prompt.prompt = Some(String::new());
    assert_eq!(open(&json, with_prompt.clone()).skip(), 0);
    with_prompt.prompt = None;
    assert_eq!(open(&json, with_prompt).skip(), 0);
}

#[test]
fn lower_casing_spares_special_tokens_in_the_text() {
    let mut json = tokenizer_json(&bert_processing(), None);
    for normalizer in [
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": true, "lowercase": false}),
        json!({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}),
        json!({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]}),
        Value::Null,
    ] {
        json["normalizer"] = normalizer.clone();
        let mut lower = settings(8);
        lower.lower_case = true;
        assert_eq!(encode(&open(&json, lower), &["The CAT [SEP]"]), [vec![2, 5, 6, SEP, 3]], "{normalizer}");
        if !normalizer.to_string().contains("Lowercase") {
            assert_eq!(encode(&open(&json, settings(8)), &["The CAT [SEP]"]), [vec![2, 20, 1, SEP, 3]], "{normalizer}");
        }
    }
}

#[test]
fn ids_outside_the_table_name_the_text() {
    let tokenizer = open(&tokenizer_json(&bert_processing(), None), TokenizerSettings::new(8, PAD, 9));
    let error = tokenizer.encode(&["the cat", "sat on", "the mat"], &roomy()).unwrap_err();
    assert!(matches!(error, Error::TokenId { id: 9, text: 2, vocab_size: 9 }), "{error}");
    let error = batches_from_ids(&[vec![u32::MAX]], usize::MAX, 0, &roomy()).unwrap_err();
    assert!(matches!(error, Error::TokenId { id: u32::MAX, text: 0, .. }), "{error}");
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let model = TokenizerModel { model_type: "bert", tokenizer_class: None };
    let files = || TokenizerFiles::read(folder.path(), model, &serde_json::Map::new());
    let open = |limit: usize| Tokenizer::open(&files()?, settings(limit));
    let error = open(8).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");

    let whole = tokenizer_json(&bert_processing(), None).to_string();
    std::fs::write(&path, &whole).unwrap();
    // The file's truncation is on the left, which the tokenizer's class takes from it.
    assert_eq!(encode(&open(3).unwrap(), &["cat sat"]), [vec![2, 7, 3]]);

    for damaged in [&whole[..whole.len() / 2], "", "{}", "[]", "\u{feff}", &whole.replace("WordPiece", "Word")] {
        std::fs::write(&path, damaged).unwrap();
        let error = open(8).unwrap_err();
        assert!(matches!(&error, Error::Tokenizer { reason } if reason.contains("tokenizer.json")), "{error}");
    }
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(matches!(open(8).unwrap_err(), Error::Tokenizer { .. }));
    std::fs::write(&path, &whole).unwrap();
    let files = files().unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(Tokenizer::open(&files, settings(8)).unwrap_err(), Error::Io { .. }));
    assert!(matches!(
        Tokenizer::from_bytes(whole.as_bytes(), TokenizerSettings::new(8, 9, 9)).unwrap_err(),
        Error::Tokenizer { .. }
    ));
}

#[test]
fn the_padding_token_within_a_text_is_refused_where_positions_are_counted_by_it() {
    let json = tokenizer_json(&bert_processing(), None);
    let mut counted = settings(6);
    counted.position_padding = Some(PAD);
    let tokenizer = open(&json, counted);
    // Beyond what is kept it does no harm (the file keeps the end).
    assert_eq!(encode(&tokenizer, &["the cat", "[PAD] cat cat cat cat"]), [vec![2, 5, 6, 3], vec![2, 6, 6, 6, 6, 3]]);
    let error = tokenizer.encode(&["cat", "the [PAD] cat"], &roomy()).unwrap_err().to_string();
    assert!(["text index 1", "[PAD]", "positions"].iter().all(|part| error.contains(part)), "{error}");
    let error = tokenizer.batches_from_ids(&[vec![2, 3], vec![2, PAD, 3]], &roomy()).unwrap_err().to_string();
    assert!(error.contains("row index 1") && error.contains("[PAD]"), "{error}");
    assert_eq!(encode(&open(&json, settings(6)), &["[PAD] cat"]), [vec![2, PAD, 6, 3]]);
}

#[test]
fn special_tokens_are_left_out_where_the_settings_say_so() {
    let json = tokenizer_json(&template(), None);
    let mut bare = settings(3);
    bare.add_special_tokens = false;
    bare.skip_prompt = true;
    bare.prompt = Some("query: ".to_owned());
    let tokenizer = open(&json, bare);
    assert_eq!(tokenizer.skip(), 2);
    let tokenized = tokenizer.encode(&["", "the cat"], &roomy()).unwrap();
    assert_eq!(restore(&tokenized), [vec![13, 14], vec![14, 5, 6]]);
    assert_eq!(tokenized.truncated, 1);
}

#[test]
fn a_text_that_cannot_be_encoded_is_named() {
    // WordPiece has no id for an unknown word when its unknown token is not in the vocabulary.
    let mut json = tokenizer_json(&bert_processing(), None);
    json["model"]["unk_token"] = json!("<unknown>");
    let tokenizer = open(&json, settings(8));
    // Long enough for the parallel path, which must still report the first of the two.
    let texts: Vec<String> =
        (0..2000).map(|i| if i == 700 || i == 1900 { "xyz".to_owned() } else { "the cat".to_owned() }).collect();
    let error = tokenizer.encode(&texts, &roomy()).unwrap_err();
    assert!(matches!(&error, Error::Text { text: 700, .. }), "{error}");
}

#[test]
fn many_texts_at_once_equal_each_alone_in_input_order() {
    let tokenizer = open(&tokenizer_json(&bert_processing(), None), settings(20));
    let texts: Vec<String> = (0..500).map(|i| format!("the {}cat {}", "sat on ".repeat(i % 13), "a ".repeat(i % 7))).collect();
    let together = restore(&tokenizer.encode(&texts, &BatchPlan::new(32, 256, 4)).unwrap());
    for (text, ids) in texts.iter().zip(together) {
        assert_eq!(encode(&tokenizer, &[text]), [ids]);
    }
}

#[test]
fn a_tokenizer_serves_many_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    shared(&open(&tokenizer_json(&bert_processing(), None), settings(8)));
}

/// Pieces that meet every rule of the tokenizer: words, punctuation, several scripts, marks, control characters, special tokens.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => Just(" ".to_owned()),
        6 => prop::sample::select(vec!["the", "cats", "sat", "on", "sat on", "mat", "mat中the", "catmat", "query", "THE", "xyz"]).prop_map(str::to_owned),
        2 => prop::sample::select(vec!["[SEP]", "[MASK]", "[CLS", "中文", "café", "e\u{301}", "\u{301}", ",", ":", "\t", "\n", "\r\n", "\u{0}", "\u{a0}", "\u{3000}", "\u{200b}", "\u{fffd}", "İ", "🙂"])
            .prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..300).prop_map(|pieces| pieces.concat())
}

/// Only the kept end of a long text is looked at; wherever that part ends, nothing may show it: neither in a text whose part holds just
/// as many tokens as the limit, nor inside an added token of several words.
#[test]
fn long_texts_are_cut_as_whole_ones() {
    let phrase = json!({"id": ADDED, "content": "the cat sat on the mat", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false});
    for (added, side) in [(None, "Left"), (None, "Right"), (Some(phrase.clone()), "Left"), (Some(phrase), "Right")] {
        let mut json = tokenizer_json(&bert_processing(), added);
        json["truncation"]["direction"] = json!(side);
        for max_tokens in 3..8 {
            let tokenizer = open(&json, settings(max_tokens));
            for letters in 1..60 {
                let word = "x".repeat(letters);
                for text in [format!("{word} ").repeat(80), format!("{word} {}", "the cat sat on the mat ".repeat(30))] {
                    let tokenized = tokenizer.encode(&[&text], &roomy()).unwrap();
                    assert_eq!(
                        restore(&tokenized)[0],
                        reference(&json, &text, Some(max_tokens)),
                        "{max_tokens} tokens of \"{text}\""
                    );
                    assert_eq!(tokenized.truncated, 1, "{max_tokens} tokens of \"{text}\"");
                }
            }
        }
    }
}

proptest! {
    /// The library's own truncation, on any text and with any added token, whether or not we look at a part of the text only.
    #[test]
    fn ids_equal_the_library(text in text(), max_tokens in 4usize..30, post in 0usize..3, added in 0usize..4, left in any::<bool>()) {
        let mut json = tokenizer_json(&post_processors()[post].0, added_tokens()[added].clone());
        json["truncation"]["direction"] = json!(if left { "Left" } else { "Right" });
        let tokenized = open(&json, settings(max_tokens)).encode(&[&text], &roomy()).unwrap();
        prop_assert_eq!(&restore(&tokenized)[0], &reference(&json, &text, Some(max_tokens)));
        prop_assert_eq!(tokenized.truncated, usize::from(reference(&json, &text, None).len() > max_tokens));
    }

    #[test]
    fn batches_hold_every_row_once_within_the_limits(
        lengths in prop::collection::vec(0usize..40, 0..60),
        max_batch in 0usize..12,
        batch_tokens in 0usize..200,
        parallelism in 0usize..6,
        skip in 0u32..4,
    ) {
        // Ids tell the row and the place in it.
        let rows: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(row, &n)| (0..n).map(|i| (row * 64 + i + 1) as u32).collect()).collect();
        let batches = batches_from_ids(&rows, 64 * 64, skip, &BatchPlan::new(max_batch, batch_tokens, parallelism)).unwrap();
        let mut order = Vec::new();
        for batch in &batches {
            let (lengths, places): (Vec<u32>, _) = (batch.lengths().collect(), batch.rows());
            let (longest, tokens) = (batch.longest(), batch.batch() * batch.longest());
            prop_assert_eq!(batch.batch(), places.len());
            prop_assert_eq!(batch.skip(), skip);
            prop_assert!(batch.batch() >= 1 && batch.batch() <= max_batch.max(1));
            prop_assert!(tokens <= batch_tokens || batch.batch() == 1);
            prop_assert_eq!(longest, lengths.iter().max().map_or(1, |&longest| (longest as usize).max(1)));
            prop_assert_eq!(batch.starts().len(), batch.batch() + 1);
            let size = batch.size();
            prop_assert_eq!((size.rows, size.longest, size.tokens), (batch.batch(), longest, batch.ids().len()));
            let (ids, mask) = batch.padded(-1);
            prop_assert_eq!((ids.len(), mask.len()), (tokens, tokens));
            for (row, &place) in places.iter().enumerate() {
                prop_assert!(batch.row(row).iter().map(|&id| id as u32).eq(rows[place].iter().copied()));
                let (real, padding) = ids[row * longest..][..longest].split_at(rows[place].len());
                prop_assert!(real == batch.row(row) && padding.iter().all(|&id| id == -1));
                prop_assert!(mask[row * longest..][..longest].iter().zip(0..).all(|(&mask, t)| mask == i32::from(t < real.len())));
                order.push(place);
            }
        }
        // Longest first, and stable.
        prop_assert!(order.is_sorted_by_key(|&place| (std::cmp::Reverse(rows[place].len()), place)));
        order.sort_unstable();
        prop_assert!(order.into_iter().eq(0..rows.len()));
    }

    /// Against every way to cut the sorted rows: filled batches are the fewest possible; over several workers the number of rounds
    /// stays the fewest possible and the costliest batch is the cheapest that so many batches allow.
    #[test]
    fn work_is_shared_as_evenly_as_batches_allow(
        lengths in prop::collection::vec(1usize..20, 1..10),
        max_batch in 1usize..8,
        batch_tokens in 10usize..120,
        parallelism in 1usize..6,
    ) {
        let rows: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![1; n]).collect();
        let batches = batches_from_ids(&rows, 2, 0, &BatchPlan::new(max_batch, batch_tokens, parallelism)).unwrap();
        let found = batches.iter().map(|batch| batch.batch() * batch.longest()).max().unwrap();

        let mut sorted = lengths;
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        // Bit i of `cuts` starts a new batch after row i.
        let cuttings: Vec<(usize, usize)> = (0u32..1 << (sorted.len() - 1))
            .filter_map(|cuts| {
                let (mut start, mut costs) = (0, Vec::new());
                for end in 1..=sorted.len() {
                    if end == sorted.len() || cuts >> (end - 1) & 1 == 1 {
                        let cost = (end - start) * sorted[start];
                        if end - start > max_batch || (cost > batch_tokens && end - start > 1) {
                            return None;
                        }
                        costs.push(cost);
                        start = end;
                    }
                }
                Some((costs.len(), costs.into_iter().max()?))
            })
            .collect();
        let fewest = cuttings.iter().map(|&(count, _)| count).min().unwrap();
        let rounds = fewest.div_ceil(parallelism);
        prop_assert_eq!(batches.len().div_ceil(parallelism), rounds);
        if parallelism == 1 {
            prop_assert_eq!(batches.len(), fewest);
        } else if fewest % parallelism != 0 {
            let best = cuttings.iter().filter(|&&(count, _)| count <= rounds * parallelism).map(|&(_, cost)| cost).min().unwrap();
            prop_assert_eq!(found, best);
        }
    }
}

#[test]
fn a_small_load_is_shared_among_the_workers() {
    let rows = vec![vec![1; 10]; 8];
    let sizes = |parallelism| -> Vec<usize> {
        let batches = batches_from_ids(&rows, 2, 0, &BatchPlan::new(64, 1 << 20, parallelism)).unwrap();
        batches.iter().map(TokenBatch::batch).collect()
    };
    assert_eq!(sizes(1), [8]);
    assert_eq!(sizes(3), [3, 3, 2]);
    assert_eq!(sizes(4), [2, 2, 2, 2]);
    assert_eq!(sizes(64), [1; 8]);
    assert_eq!(sizes(usize::MAX), [1; 8]);
}

#[test]
fn rows_whose_parts_do_not_belong_together_are_refused() {
    let whole = TokenBatch::from_ragged(vec![5, 6, 7, 8], vec![0, 3, 4], 1).unwrap();
    assert_eq!((whole.row(0), whole.row(1), whole.row(2)), ([5, 6, 7].as_slice(), [8].as_slice(), [].as_slice()));
    assert_eq!((whole.rows(), whole.skip(), whole.batch(), whole.longest()), ([0, 1].as_slice(), 1, 2, 3));
    let mut refilled = TokenBatch::default();
    refilled.refill(&[vec![5, 6, 7], vec![8]], 9, 1).unwrap();
    assert_eq!(refilled, whole);
    // What stands behind a row's tokens is nobody's.
    assert_eq!(TokenBatch::from_padded(&[5, 6, 7, 8, -1, i32::MAX], &[3, 1], 3, 1).unwrap(), whole);
    for none in [TokenBatch::from_ragged(vec![], vec![0], 0), TokenBatch::from_padded(&[], &[], 1, 0)] {
        assert_eq!(none.unwrap(), TokenBatch::default());
    }
    assert_eq!(TokenBatch::default().starts(), [0]);
    TokenBatch::from_padded(&[1, 2], &[0, 0], 1, u32::MAX).unwrap();
    TokenBatch::from_padded(&[], &[0], 0, 0).unwrap();

    type Ragged = (Vec<i32>, Vec<u32>, &'static [&'static str]);
    let ragged: [Ragged; 6] = [
        (vec![5], vec![], &["starts at None"]),
        (vec![5], vec![1], &["starts at Some(1)"]),
        (vec![5; 3], vec![0, 2, 1, 3], &["row 1", "starts at 2", "ends at 1"]),
        (vec![5; 3], vec![0, 2], &["ends at 2", "3 ids"]),
        (vec![5; 3], vec![0, 4], &["ends at 4", "3 ids"]),
        (vec![5, 6, -8, 7], vec![0, 2, 4], &["-8", "row 1", "negative"]),
    ];
    type Padded = (Vec<i32>, Vec<u32>, usize, &'static [&'static str]);
    let padded: [Padded; 7] = [
        (vec![5, 6, 7], vec![3, 1], 3, &["3 ids", "2 rows of 3"]),
        (vec![5; 7], vec![3, 1], 3, &["7 ids"]),
        (vec![], vec![1], 1, &["0 ids", "1 rows of 1"]),
        (vec![5], vec![], 1, &["1 ids", "0 rows"]),
        (vec![5; 6], vec![3, 4], 3, &["row 1", "4 tokens", "rows of 3"]),
        (vec![5, 6, 7, -8, 0, 0], vec![3, 1], 3, &["-8", "row 1", "negative"]),
        (vec![5; 2], vec![1, 1], usize::MAX, &["2 ids"]),
    ];
    let ragged = ragged.into_iter().map(|(ids, starts, parts)| (TokenBatch::from_ragged(ids, starts, 0), parts));
    let padded = padded.into_iter().map(|(ids, lengths, seq, parts)| (TokenBatch::from_padded(&ids, &lengths, seq, 0), parts));
    for (refused, parts) in ragged.chain(padded) {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::TokenBatch { .. }), "{error}");
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "no {parts:?} in {error}");
    }
}

#[test]
fn a_refill_that_fails_leaves_no_half_a_batch() {
    let mut batch = TokenBatch::default();
    batch.refill(&[vec![1, 2, 3]], 10, 2).unwrap();
    for rows in [vec![vec![1, 2], vec![3, 10]], vec![vec![1, u32::MAX]]] {
        assert!(matches!(batch.refill(&rows, 10, 0), Err(Error::TokenId { .. })));
        assert_eq!(batch, TokenBatch::default());
    }
}

#[test]
fn ids_are_checked_against_the_table_of_who_runs_them() {
    let batches = batches_from_ids(&[vec![1], vec![4, 9, 2], vec![7]], 10, 0, &roomy()).unwrap();
    let [batch] = batches.as_slice() else { panic!("{batches:?}") };
    batch.check_ids(10).unwrap();
    for (vocab_size, id, text) in [(9, 9, 1), (8, 9, 1), (4, 4, 1), (0, 4, 1)] {
        match batch.check_ids(vocab_size) {
            Err(Error::TokenId { id: found, text: place, vocab_size: size }) => {
                assert_eq!((found, place, size), (id, text, vocab_size));
            }
            other => panic!("{other:?}"),
        }
    }
    // An id at the beginning of a row after one without tokens.
    let after_empty = TokenBatch::from_ragged(vec![1, 30], vec![0, 1, 1, 2], 0).unwrap();
    assert!(matches!(after_empty.check_ids(30), Err(Error::TokenId { id: 30, text: 2, .. })));
    TokenBatch::default().check_ids(0).unwrap();
}
