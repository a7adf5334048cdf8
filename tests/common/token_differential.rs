//! Texts through this crate's tokenizer and through the `tokenizers` crate used plainly: what the bounded test and the fuzz target share.

use serde_json::{Value, json};
use std::path::Path;
use trt_embed::tokens::{Tokenizer, TokenizerSettings};

/// A tokenizer, by both.
pub struct Pair {
    name: String,
    library: tokenizers::Tokenizer,
    /// By the room that they leave for a text: [`ROOMS`].
    ours: Vec<Tokenizer>,
    left: bool,
}

/// Tokens that are kept of a text at most.
const ROOMS: [usize; 6] = [0, 1, 2, 5, 9, 24];
/// The special tokens of all of them: one before a text, one behind it.
const SPECIAL: usize = 2;

/// The fixtures' tokenizers: WordPiece, byte-level BPE and Unigram, with and without added tokens of every flag, cut on either side.
pub fn pairs() -> Vec<Pair> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|folder| folder.join("tests/fixtures/tokenizers"));
    let folder = folder.into_iter().find(|folder| folder.is_dir()).expect("the fixtures' folder");
    let mut pairs = Vec::new();
    for name in ["wordpiece", "mpnet", "bpe", "unigram"] {
        let json = std::fs::read(folder.join(format!("{name}.json"))).expect("a tokenizer among the fixtures");
        let plain: Value = serde_json::from_slice(&json).expect("JSON");
        for (flags, left) in [(false, false), (true, false), (true, true)] {
            let mut json = plain.clone();
            if flags {
                add_tokens(&mut json);
            }
            if name == "bpe" && left {
                json["pre_tokenizer"]["add_prefix_space"] = json!(true);
            }
            if left {
                json["truncation"] = json!({"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0});
            }
            let json = json.to_string().into_bytes();
            let mut library = tokenizers::Tokenizer::from_bytes(&json).expect("a tokenizer");
            library.with_truncation(None).expect("no truncation");
            let open =
                |room| Tokenizer::from_bytes(&json, TokenizerSettings::new(room + SPECIAL, 0, 1 << 20)).expect("a tokenizer");
            let ours = ROOMS.map(open).into();
            pairs.push(Pair { name: format!("{name}, flags {flags}, left {left}"), library, ours, left });
        }
    }
    pairs
}

/// A token of each flag, found in the text as it is and in the normalized one.
fn add_tokens(json: &mut Value) {
    let first = json["model"]["vocab"]
        .as_object()
        .map_or_else(|| json["model"]["vocab"].as_array().map_or(0, Vec::len), serde_json::Map::len);
    let contents = ["<a>", "[b]", "the", "é!", "中", "x y", "<s>x", "Cat", "]["];
    for (content, place) in contents.into_iter().zip(0..) {
        let flag = |bit: usize| (place * 5 + 3) >> bit & 1 == 1;
        let token = json!({"id": first + place, "content": content, "single_word": flag(0), "lstrip": flag(1), "rstrip": flag(2),
                           "normalized": flag(3), "special": flag(1)});
        json["added_tokens"].as_array_mut().expect("added tokens").push(token);
    }
}

/// Compares the ids of a text, of which the first byte chooses the tokenizer and the second how much is kept of it.
pub fn check(pairs: &[Pair], input: &[u8]) {
    let [which, most, text @ ..] = input else { return };
    let text = String::from_utf8_lossy(text);
    let Pair { name, library, ours, left } = &pairs[usize::from(*which) % pairs.len()];
    let plain = library.encode_fast(&*text, false).expect("ids").get_ids().to_vec();
    let framed = library.encode_fast("", true).expect("ids").get_ids().to_vec();
    assert_eq!(framed.len(), SPECIAL, "{name}");
    let place = usize::from(*most) % ROOMS.len();
    let room = ROOMS[place];
    let kept = match left {
        false => &plain[..plain.len().min(room)],
        true => &plain[plain.len() - plain.len().min(room)..],
    };
    let expected = [&framed[..1], kept, &framed[1..]].concat();
    let mut ids = Vec::new();
    let truncated = ours[place].ids_into(&text, &mut ids).expect("ids");
    assert_eq!(ids, expected, "{name}, {room} of {text:?}");
    assert_eq!(truncated, plain.len() > room, "{name}, {room} of {text:?}");
}
