//! Every encoder family beside BERT and MPNet against PyTorch (fp32, CPU): a small seeded model of each and of its variants.
//! `tests/parity.rs` has what does not depend on the family: pooling, prompts, limits, ways of storing weights.

mod common;

use approx::assert_abs_diff_eq;
use common::{Cases, MAX_DIFFERENCE, MAX_HIDDEN_DIFFERENCE, MIN_COSINE, References, agreement, copy_folder, fixtures, rounding};
use serde_json::{Value, json};
use trt_embed::model::ModelFolder;
use trt_embed::tokens::{Tokenizer, TokenizerSettings};
use trt_embed::{BackendChoice, Embedder};

/// Layers and terms of the widest sum of the small models (see make_family_fixtures.py).
const LAYERS: usize = 3;
const WIDEST: usize = 48;

/// Ids, vectors and hidden states of every case of `family`.
fn check(family: &str) {
    let cases = Cases::read_file("families.json");
    let references = References::read(&fixtures().join("families.safetensors"));
    for case in cases.group(family) {
        let name = &case.name;
        let folder = case.folder();
        let model = ModelFolder::open(folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let settings = TokenizerSettings::of_model(&model, model.max_tokens());
        let tokenizer = Tokenizer::open(&model.tokenizer, settings).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (i, (ids, text)) in tokenizer.ids(&cases.texts).unwrap().into_iter().zip(&cases.texts).enumerate() {
            let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
            assert_eq!(ids, references.ids(&format!("ids.{name}.{i}")), "{name}: {text:?}");
        }

        let embedder = Embedder::builder(folder.path().to_str().unwrap()).backend(BackendChoice::Cpu).threads(2);
        let embedder = embedder.build().unwrap_or_else(|e| panic!("{name}: {e}"));
        // All texts in one call: a ragged batch, while the reference ran each alone.
        let actual = embedder.embed(&cases.texts).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (expected, [texts, dim]) = references.matrix(name);
        assert_eq!((actual.dim, cases.texts.len()), (dim, texts), "{name}");
        assert_eq!(actual.tokens, case.tokens, "{name}");
        let found = agreement(&actual.values, &expected, dim);
        println!("{name}: {found:?}");
        assert!(found.min_cosine >= MIN_COSINE && found.max_difference <= MAX_DIFFERENCE, "{name}: {found:?}");

        let numbers = references.numbers(&format!("hidden.{name}."));
        assert!(numbers.len() >= 5, "{name}");
        let texts: Vec<&str> = numbers.iter().map(|&i| cases.texts[i].as_str()).collect();
        for (number, states) in numbers.iter().zip(embedder.hidden_states(&texts).unwrap()) {
            let (expected, [tokens, hidden]) = references.matrix(&format!("hidden.{name}.{number}"));
            assert_eq!((states.tokens, states.hidden_size), (tokens, hidden), "{name} text {number}");
            let largest = expected.iter().fold(1.0f32, |largest, value| largest.max(value.abs()));
            let tolerance = MAX_HIDDEN_DIFFERENCE.min(rounding(LAYERS, WIDEST) * largest);
            assert_abs_diff_eq!(states.values.as_slice(), expected.as_slice(), epsilon = tolerance);
        }
    }
}

#[test]
fn xlm_roberta() {
    check("xlm-roberta");
}

#[test]
fn roberta() {
    check("roberta");
}

#[test]
fn camembert() {
    check("camembert");
}

#[test]
fn distilbert() {
    check("distilbert");
}

#[test]
fn modernbert() {
    check("modernbert");
}

#[test]
fn nomic_bert() {
    check("nomic_bert");
}

#[test]
fn gte() {
    check("gte");
}

#[test]
fn gte_with_its_authors_configuration() {
    check("new");
}

#[test]
fn jina_bert() {
    check("jina_bert");
}

#[test]
fn a_text_with_the_token_that_positions_are_counted_by_is_refused() {
    for (family, text) in [("xlm-roberta", "a <pad> b"), ("roberta", "a <pad> b"), ("camembert", "a <unk>NOTUSED b")] {
        let folder = fixtures().join(family);
        let embedder = Embedder::builder(folder.to_str().unwrap()).backend(BackendChoice::Cpu).build().unwrap();
        let error = embedder.embed(&["fine", text]).unwrap_err().to_string();
        assert!(error.contains("by which this model counts positions"), "{family}: {error}");
        assert!(embedder.embed(&["fine"]).is_ok());
    }
}

/// A limit above `max_position_embeddings` is the folder's to give where positions are rotary: vectors are those of a configuration that
/// says as much itself.
#[test]
fn texts_beyond_the_positions_of_rotary_families_are_read_to_the_limit_of_the_folder() {
    const LIMIT: usize = 150;
    let text = "a fox near the river ".repeat(LIMIT);
    for family in ["modernbert", "nomic_bert", "gte", "new"] {
        let embed = |positions: Option<usize>| {
            let folder = tempfile::tempdir().unwrap();
            copy_folder(&fixtures().join(family), folder.path());
            let limit = json!({"max_seq_length": LIMIT});
            std::fs::write(folder.path().join("sentence_bert_config.json"), limit.to_string()).unwrap();
            if let Some(positions) = positions {
                let path = folder.path().join("config.json");
                let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
                config["max_position_embeddings"] = json!(positions);
                std::fs::write(path, config.to_string()).unwrap();
            }
            let embedder = Embedder::builder(folder.path().to_str().unwrap()).backend(BackendChoice::Cpu).build().unwrap();
            embedder.embed(&[&text]).unwrap()
        };
        let (found, expected) = (embed(None), embed(Some(LIMIT)));
        assert_eq!(found.tokens, [LIMIT as u32], "{family}");
        assert_eq!(found.values, expected.values, "{family}");
    }
}
