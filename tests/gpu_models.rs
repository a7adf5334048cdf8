//! Full-size models on a GPU against sentence-transformers in fp32, text to vector through [`Embedder`].
//!
//! `TRT_EMBED_GPU_MODELS` names a folder of model folders, each with `references.json` (scripts/gpu_references.py) and one or more
//! engines `*.engine` that `trt-embed build` made of it.
#![cfg(feature = "tensorrt")]

use serde::Deserialize;
use std::path::{Path, PathBuf};
use trt_embed::backend::tensorrt::{Arithmetic, EngineFile};
use trt_embed::{BackendChoice, Embedder};

#[derive(Deserialize)]
struct References {
    texts: Vec<String>,
    tokens: Vec<u32>,
    vectors: Vec<Vec<f32>>,
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// Every model with each of its engines.
fn models() -> Vec<(PathBuf, References, Vec<PathBuf>)> {
    let root = std::env::var_os("TRT_EMBED_GPU_MODELS").expect("TRT_EMBED_GPU_MODELS names the folder of models");
    let mut models: Vec<(PathBuf, References, Vec<PathBuf>)> = Vec::new();
    for folder in entries(Path::new(&root)) {
        let path = folder.join("references.json");
        if path.is_file() {
            let references = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let engines = entries(&folder).into_iter().filter(|path| path.extension().is_some_and(|end| end == "engine"));
            models.push((folder.clone(), references, engines.collect()));
        }
    }
    assert!(models.iter().any(|(_, _, engines)| !engines.is_empty()), "no model with references.json and an engine");
    models
}

fn open(folder: &Path, engine: &Path) -> Embedder {
    Embedder::builder(folder.to_str().unwrap()).backend(BackendChoice::TensorRt).engine(engine).build().unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
#[ignore = "needs an NVIDIA GPU, TensorRT and TRT_EMBED_GPU_MODELS"]
fn vectors_equal_those_of_sentence_transformers() {
    for (folder, references, engines) in models() {
        assert!(references.texts.len() >= 200, "{}: {} texts", folder.display(), references.texts.len());
        for engine in engines {
            let bar = match EngineFile::read_manifest(&engine).unwrap().arithmetic {
                Arithmetic::Fp32 => 0.99999,
                _ => 0.9999,
            };
            let embedder = open(&folder, &engine);
            let embeddings = embedder.embed(&references.texts).unwrap();
            assert_eq!(embeddings.tokens, references.tokens, "tokens");
            let worst = embeddings.rows().zip(&references.vectors).map(|(found, expected)| cosine(found, expected));
            let (text, worst) = worst.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            println!("{}: smallest cosine {worst:.8}, text {text} of {} tokens", engine.display(), references.tokens[text]);
            assert!(worst >= bar, "{}: cosine {worst} of text {text}, below {bar}", engine.display());

            // The same text alone: another shape, the same vector to the precision.
            for text in (0..references.texts.len()).step_by(17) {
                let alone = embedder.embed(&references.texts[text..=text]).unwrap();
                let together = &embeddings.values[text * embeddings.dim..(text + 1) * embeddings.dim];
                let cosine = cosine(&alone.values, together);
                assert!(cosine >= bar, "text {text} alone and in a batch: cosine {cosine}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU, TensorRT and TRT_EMBED_GPU_MODELS"]
fn many_threads_share_an_embedder() {
    let (folder, references, engines) = models().into_iter().find(|(_, _, engines)| !engines.is_empty()).unwrap();
    let embedder = open(&folder, &engines[0]);
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let (embedder, references) = (&embedder, &references);
            scope.spawn(move || {
                for round in 0..20 {
                    let text = (thread * 31 + round * 7) % references.texts.len();
                    let vector = embedder.embed(&references.texts[text..=text]).unwrap();
                    let cosine = cosine(&vector.values, &references.vectors[text]);
                    assert!(cosine >= 0.9999, "thread {thread}, text {text}: {cosine}");
                }
            });
        }
    });
}
