//! Vectors and hidden states of small seeded models equal sentence-transformers' (fp32, CPU), over every pooling mode and setting.

mod common;

use approx::assert_abs_diff_eq;
use common::{
    Case, Cases, MAX_DIFFERENCE, MAX_HIDDEN_DIFFERENCE, MIN_COSINE, References, agreement, fixtures, rounding, unit_rounding,
};
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Normalize};

/// Layers, terms of the widest sum and hidden size of the small models (see make_fixtures.py).
const SMALL_MODELS: [(&str, usize, usize, usize); 2] = [("mpnet", 3, 64, 32), ("bert", 2, 80, 40)];

fn references() -> References {
    References::read(&fixtures().join("references.safetensors"))
}

fn builder(case: &Case, folder: &tempfile::TempDir) -> EmbedderBuilder {
    let mut builder = Embedder::builder(folder.path().to_str().unwrap()).backend(BackendChoice::Cpu).threads(2);
    if let Some(prompt) = &case.settings.prompt {
        builder = builder.prompt_name(prompt);
    }
    if let Some(dim) = case.settings.dim {
        builder = builder.dim(dim);
    }
    if let Some(tokens) = case.settings.max_tokens {
        builder = builder.max_tokens(tokens);
    }
    match case.settings.normalize.as_deref() {
        None => builder,
        Some("on") => builder.normalize(Normalize::On),
        Some(other) => panic!("{}: normalize {other}", case.name),
    }
}

fn embedder(case: &Case) -> Embedder {
    builder(case, &case.folder()).build().unwrap_or_else(|e| panic!("{}: {e}", case.name))
}

/// Every case of `group` gives the reference's vectors and token counts, all texts in one call: a ragged batch.
fn check(group: &str) {
    let cases = Cases::read();
    let references = references();
    for case in cases.group(group) {
        let (expected, [texts, dim]) = references.matrix(&case.name);
        assert_eq!(texts, cases.texts.len());
        let actual = embedder(case).embed(&cases.texts).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        assert_eq!(actual.dim, dim, "{}", case.name);
        assert_eq!(actual.tokens, case.tokens, "{}", case.name);

        // The bar is meant for unit vectors: other rows are scaled by the reference's length. Rows need not be equally long.
        let lengths: Vec<f64> =
            expected.chunks_exact(dim).map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()).collect();
        let scale = |values: &[f32]| -> Vec<f32> {
            let rows = values.chunks_exact(dim).zip(&lengths);
            rows.flat_map(|(row, length)| row.iter().map(move |&x| (f64::from(x) / length) as f32)).collect()
        };
        let found = agreement(&scale(&actual.values), &scale(&expected), dim);
        println!("{}: {found:?}", case.name);
        assert!(found.min_cosine >= MIN_COSINE, "{}: {found:?}", case.name);
        assert!(found.max_difference <= MAX_DIFFERENCE, "{}: {found:?}", case.name);
    }
}

#[test]
fn every_pooling_mode() {
    check("pooling");
}

#[test]
fn several_modes_are_concatenated() {
    check("concatenation");
}

#[test]
fn without_a_normalize_module_rows_keep_their_length() {
    check("not-normalized");
}

#[test]
fn prompts_are_put_before_texts_and_left_out_of_pooling_when_the_model_says_so() {
    check("prompts");
}

#[test]
fn dense_modules_follow_pooling() {
    check("dense");
}

#[test]
fn dim_and_max_tokens_cut() {
    check("settings");
}

#[test]
fn shards_half_types_prefixes_plain_folders_and_new_formats_load() {
    check("stored");
}

#[test]
fn vectors_have_unit_length() {
    let cases = Cases::read();
    for name in ["mpnet-mean", "bert-all", "mpnet-dim", "bert-dense-tanh", "bert-cls-forced-unit"] {
        let embeddings = embedder(cases.get(name)).embed(&cases.texts).unwrap();
        for row in embeddings.rows() {
            let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            // A sum of `dim` squares in fp32, its root and a division: far below sqrt(240) * 2^-24 * 4 = 3.7e-6.
            assert_abs_diff_eq!(length, 1.0, epsilon = 4e-6);
        }
    }
}

#[test]
fn hidden_states_equal_pytorch() {
    let cases = Cases::read();
    let references = references();
    for (base, layers, width, _) in SMALL_MODELS {
        let tolerance = MAX_HIDDEN_DIFFERENCE.min(rounding(layers, width));
        let numbers = references.numbers(&format!("hidden.{base}."));
        let texts: Vec<&str> = numbers.iter().map(|&i| cases.texts[i].as_str()).collect();
        let all = embedder(cases.get(&format!("{base}-mean"))).hidden_states(&texts).unwrap();
        assert_eq!(all.len(), texts.len());
        assert!(all.len() >= 5);
        for (number, states) in numbers.into_iter().zip(all) {
            let (expected, [tokens, hidden]) = references.matrix(&format!("hidden.{base}.{number}"));
            assert_eq!((states.tokens, states.hidden_size), (tokens, hidden), "{base} text {number}");
            println!("{base} text {number}: {:?}", agreement(&states.values, &expected, hidden));
            assert_abs_diff_eq!(states.values.as_slice(), expected.as_slice(), epsilon = tolerance);
        }
    }
}

#[test]
fn a_batch_gives_each_text_the_vector_it_has_alone() {
    let cases = Cases::read();
    for (base, layers, width, hidden) in SMALL_MODELS {
        let embedder = embedder(cases.get(&format!("{base}-mean")));
        let together = embedder.embed(&cases.texts).unwrap();
        for (text, row) in cases.texts.iter().zip(together.rows()) {
            let alone = embedder.embed(&[text]).unwrap();
            assert_abs_diff_eq!(alone.values.as_slice(), row, epsilon = MAX_DIFFERENCE.min(unit_rounding(layers, width, hidden)));
        }
    }
}

#[test]
fn batch_limits_change_nothing() {
    let cases = Cases::read();
    for (base, layers, width, hidden) in SMALL_MODELS {
        let case = cases.get(&format!("{base}-mean"));
        let together = embedder(case).embed(&cases.texts).unwrap();
        for rows in [1, 3, 64] {
            let folder = case.folder();
            let limited = builder(case, &folder).batch_size(rows).build().unwrap().embed(&cases.texts).unwrap();
            assert_eq!(limited.tokens, together.tokens);
            assert_abs_diff_eq!(
                limited.values.as_slice(),
                together.values.as_slice(),
                epsilon = MAX_DIFFERENCE.min(unit_rounding(layers, width, hidden))
            );
        }
    }
}

#[test]
fn rows_keep_the_callers_order() {
    let cases = Cases::read();
    let embedder = embedder(cases.get("mpnet-mean"));
    let (expected, [_, dim]) = references().matrix("mpnet-mean");
    // 7 is coprime to the number of texts: a permutation that sorting by length does not undo.
    let count = cases.texts.len();
    let order: Vec<usize> = (0..count).map(|i| (i * 7 + 3) % count).collect();
    let texts: Vec<&str> = order.iter().map(|&i| cases.texts[i].as_str()).collect();
    let embeddings = embedder.embed(&texts).unwrap();
    for (&i, row) in order.iter().zip(embeddings.rows()) {
        assert_abs_diff_eq!(row, &expected[i * dim..(i + 1) * dim], epsilon = MAX_DIFFERENCE);
    }
}

#[test]
fn texts_over_the_limit_are_counted() {
    let cases = Cases::read();
    for (base, limit) in [("mpnet", 192), ("bert", 96)] {
        let embedder = embedder(cases.get(&format!("{base}-mean")));
        assert_eq!(embedder.info().max_tokens, limit);
        let long = cases.texts.last().unwrap();
        let embeddings = embedder.embed(&["short", long, "", long]).unwrap();
        assert_eq!(embeddings.truncated, 2);
        assert_eq!(embeddings.tokens[1] as usize, limit);
    }
}

#[test]
fn no_texts_give_no_rows() {
    let cases = Cases::read();
    let embedder = embedder(cases.get("bert-mean"));
    let none = embedder.embed::<&str>(&[]).unwrap();
    assert!(none.is_empty() && none.values.is_empty() && none.rows().len() == 0);
    assert!(embedder.hidden_states::<&str>(&[]).unwrap().is_empty());
    embedder.embed_into::<&str>(&[], &mut []).unwrap();
}

#[test]
fn embed_into_fills_the_callers_rows() {
    let cases = Cases::read();
    let embedder = embedder(cases.get("mpnet-mean"));
    let (expected, [texts, dim]) = references().matrix("mpnet-mean");
    let mut rows = vec![f32::NAN; texts * dim];
    embedder.embed_into(&cases.texts, &mut rows).unwrap();
    assert_abs_diff_eq!(rows.as_slice(), expected.as_slice(), epsilon = MAX_DIFFERENCE);
    let error = embedder.embed_into(&cases.texts, &mut rows[1..]).unwrap_err();
    assert!(matches!(error, trt_embed::Error::OutputLength { .. }), "{error}");
}

#[test]
fn one_embedder_serves_many_threads() {
    let cases = Cases::read();
    let embedder = embedder(cases.get("bert-mean"));
    let (expected, _) = references().matrix("bert-mean");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let embeddings = embedder.embed(&cases.texts).unwrap();
                assert_abs_diff_eq!(embeddings.values.as_slice(), expected.as_slice(), epsilon = MAX_DIFFERENCE);
            });
        }
    });
}

#[test]
fn another_prompt_shares_the_executor_and_equals_an_embedder_of_its_own() {
    let model = fixtures().join("mpnet");
    let open = || Embedder::builder(model.to_str().unwrap()).backend(BackendChoice::Cpu).threads(2);
    let (plain, own) = (open().build().unwrap(), open().prompt_name("query").build().unwrap());
    let texts = ["the cat sat", "a longer text of several words", ""];
    let shared = plain.with_prompt_name("query").unwrap();
    assert_eq!(shared.info().prompt.as_deref(), Some("query: "));
    assert_eq!(shared.embed(&texts).unwrap(), own.embed(&texts).unwrap());
    assert_ne!(shared.embed(&texts).unwrap(), plain.embed(&texts).unwrap());
    // And back again; the first one is as it was.
    assert_eq!(shared.with_prompt_name("").unwrap().embed(&texts).unwrap(), plain.embed(&texts).unwrap());
    let error = plain.with_prompt_name("nowhere").unwrap_err().to_string();
    assert!(error.contains("nowhere") && error.contains("passage, query"), "{error}");
}
