//! The real all-MiniLM-L6-v2 gives sentence-transformers' vectors (fp32, CPU) for varied texts. Ignored while the model is not there.

mod common;

use approx::assert_abs_diff_eq;
use common::{MAX_DIFFERENCE, MAX_HIDDEN_DIFFERENCE, MIN_COSINE, References, agreement, fixtures, rounding, unit_rounding};
use libtest_mimic::{Arguments, Failed, Trial};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use trt_embed::{BackendChoice, Embedder};

/// A line of `tests/fixtures/minilm/texts.json`.
#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: u32,
}

/// The model, opened once for all tests, and what it must give.
struct Setup {
    folder: PathBuf,
    embedder: OnceLock<Embedder>,
    texts: Vec<Text>,
    references: References,
}

impl Setup {
    fn embedder(&self) -> &Embedder {
        self.embedder
            .get_or_init(|| Embedder::builder(self.folder.to_str().unwrap()).backend(BackendChoice::Cpu).build().unwrap())
    }

    fn texts(&self) -> Vec<&str> {
        self.texts.iter().map(|text| text.text.as_str()).collect()
    }
}

fn vectors_equal_sentence_transformers(setup: &Setup) {
    let (expected, [texts, dim]) = setup.references.matrix("embeddings");
    assert_eq!(texts, setup.texts.len());
    assert!(texts >= 60);
    let actual = setup.embedder().embed(&setup.texts()).unwrap();
    assert_eq!((actual.dim, dim), (384, 384));
    assert_eq!(actual.tokens, setup.texts.iter().map(|text| text.tokens).collect::<Vec<_>>());
    let found = agreement(&actual.values, &expected, dim);
    println!("all-MiniLM-L6-v2, {texts} texts: {found:?}");
    let worst = &setup.texts[found.worst_row].text;
    assert!(found.min_cosine >= MIN_COSINE, "{found:?}: {worst:?}");
    assert!(found.max_difference <= MAX_DIFFERENCE, "{found:?}: {worst:?}");
}

fn hidden_states_equal_pytorch(setup: &Setup) {
    let numbers = setup.references.numbers("hidden.");
    assert!(numbers.len() >= 3);
    let texts: Vec<&str> = numbers.iter().map(|&i| setup.texts[i].text.as_str()).collect();
    let all = setup.embedder().hidden_states(&texts).unwrap();
    for (number, states) in numbers.into_iter().zip(all) {
        let (expected, [tokens, hidden]) = setup.references.matrix(&format!("hidden.{number}"));
        assert_eq!((states.tokens, states.hidden_size), (tokens, hidden));
        println!("text {number}: {:?}", agreement(&states.values, &expected, hidden));
        assert_abs_diff_eq!(
            states.values.as_slice(),
            expected.as_slice(),
            epsilon = MAX_HIDDEN_DIFFERENCE.min(rounding(6, 1536))
        );
    }
}

fn a_batch_gives_each_text_the_vector_it_has_alone(setup: &Setup) {
    let texts: Vec<&str> = setup.texts().into_iter().step_by(5).collect();
    let together = setup.embedder().embed(&texts).unwrap();
    for (text, row) in texts.iter().zip(together.rows()) {
        let alone = setup.embedder().embed(&[text]).unwrap();
        assert_abs_diff_eq!(alone.values.as_slice(), row, epsilon = MAX_DIFFERENCE.min(unit_rounding(6, 1536, 384)));
    }
}

fn texts_of_like_meaning_lie_close(setup: &Setup) {
    let embeddings =
        setup.embedder().embed(&["How do I reset my password?", "I forgot my password", "A cheetah chases its prey"]).unwrap();
    let rows: Vec<&[f32]> = embeddings.rows().collect();
    let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let (like, unlike) = (cosine(rows[0], rows[1]), cosine(rows[0], rows[2]));
    assert!(like > 0.6 && unlike < 0.2, "{like} {unlike}");
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/all-MiniLM-L6-v2");
    let missing = !folder.join("model.safetensors").is_file();
    let required = std::env::var_os("TRT_EMBED_REQUIRE_MODELS").is_some_and(|value| value == "1");
    if missing {
        eprintln!("models/all-MiniLM-L6-v2 is not there: its tests are ignored. Get it with ./scripts/get-minilm.sh");
    }
    let references = fixtures().join("minilm");
    let texts = serde_json::from_slice(&std::fs::read(references.join("texts.json")).unwrap()).unwrap();
    let references = References::read(&references.join("embeddings.safetensors"));
    let setup = Arc::new(Setup { folder, embedder: OnceLock::new(), texts, references });

    let trial = |name: &str, test: fn(&Setup)| {
        let setup = Arc::clone(&setup);
        Trial::test(name, move || {
            if missing {
                return Err(Failed::from("models/all-MiniLM-L6-v2 is not there; get it with ./scripts/get-minilm.sh"));
            }
            test(&setup);
            Ok(())
        })
        .with_ignored_flag(missing && !required)
    };
    let trials = vec![
        trial("vectors_equal_sentence_transformers", vectors_equal_sentence_transformers),
        trial("hidden_states_equal_pytorch", hidden_states_equal_pytorch),
        trial("a_batch_gives_each_text_the_vector_it_has_alone", a_batch_gives_each_text_the_vector_it_has_alone),
        trial("texts_of_like_meaning_lie_close", texts_of_like_meaning_lie_close),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}
