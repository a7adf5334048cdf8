//! Model folders over every setting mean what they mean to sentence-transformers: the same vectors, or a refusal that names file and key.
//! `scripts/differential` draws them, compares and writes this set; here it runs without Python.

mod common;
mod differential_folder;

use common::References;
use differential_folder::{Case, Set, root};
use trt_embed::{BackendChoice, Embedder, Result};

/// The bar of the differential run.
const MIN_COSINE: f64 = 0.999999;
/// Largest difference of a component, as a part of the reference's length.
const MAX_DIFFERENCE: f64 = 1e-5;

fn embed(case: &Case, texts: &[&str]) -> Result<trt_embed::Embeddings> {
    let folder = case.folder();
    let open = Embedder::builder(folder.path().to_str().unwrap()).backend(BackendChoice::Cpu).threads(1);
    // One text at a time would be slower and no stricter: a row does not depend on its batch.
    open.build()?.embed(texts)
}

fn length(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// What is wrong with `actual`, row by row.
fn differences(expected: &[f32], actual: &[f32], dim: usize) -> Option<String> {
    if expected.len() != actual.len() {
        return Some(format!("{} values, {} in the reference", actual.len(), expected.len()));
    }
    let rows = expected.chunks_exact(dim).zip(actual.chunks_exact(dim)).enumerate();
    let wrong: Vec<String> = rows
        .filter_map(|(row, (e, a))| {
            let scale = length(e).max(1e-12);
            let far = e.iter().zip(a).map(|(x, y)| f64::from(x - y).abs()).fold(0.0, f64::max) / scale;
            let dot: f64 = e.iter().zip(a).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            let cosine = dot / scale / length(a).max(1e-12);
            // Written so that NaN does not pass.
            let good = cosine >= MIN_COSINE && far <= MAX_DIFFERENCE;
            (!good).then(|| format!("row {row}: cosine {cosine:.7}, difference {far:.1e}"))
        })
        .collect();
    (!wrong.is_empty()).then(|| wrong.join("; "))
}

/// All faults at once: with one of them alone the next run would find the next.
fn report(faults: &[String], of: usize) {
    assert!(faults.is_empty(), "{} of {of} folders:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn folders_that_the_reference_loads_give_its_vectors() {
    let set = Set::read();
    let references = References::read(&root().join("references.safetensors"));
    let cases: Vec<&Case> = set.cases.iter().filter(|case| case.refusal.is_none()).collect();
    assert!(cases.len() >= 60, "{}", cases.len());
    let mut faults = Vec::new();
    for case in &cases {
        let texts: Vec<&str> = case.texts.iter().map(|&i| set.texts[i].as_str()).collect();
        let (expected, [rows, dim]) = references.matrix(&case.name);
        assert_eq!(rows, texts.len());
        let fault = match embed(case, &texts) {
            Ok(actual) => differences(&expected, &actual.values, dim),
            Err(error) => Some(error.to_string()),
        };
        faults.extend(fault.map(|fault| format!("{}: {fault}", case.name)));
    }
    report(&faults, cases.len());
}

#[test]
fn folders_that_are_refused_say_which_file_and_key() {
    let set = Set::read();
    let cases: Vec<&Case> = set.cases.iter().filter(|case| case.refusal.is_some()).collect();
    assert!(cases.len() >= 60, "{}", cases.len());
    // The last text has MPNet's padding token in it, which is refused whatever the folder.
    let texts: Vec<&str> = set.texts.iter().rev().skip(1).map(String::as_str).collect();
    let mut faults = Vec::new();
    for case in &cases {
        assert!(case.refusal.as_ref().is_some_and(|words| !words.is_empty()), "{}", case.name);
        match embed(case, &texts) {
            Ok(_) => faults.push(format!("{}: no refusal", case.name)),
            Err(error) => {
                let said = error.to_string();
                let missing = case.refusal.iter().flatten().filter(|word| !said.contains(word.as_str()));
                faults.extend(missing.map(|word| format!("{}: {word} is not in: {said}", case.name)));
            }
        }
    }
    report(&faults, cases.len());
}
