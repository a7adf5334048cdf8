//! What `build` says of a new engine: the table on stdout, and where int8 loses.

use indicatif::HumanBytes;
use std::path::Path;
use trt_embed::backend::tensorrt::{Arithmetic, Candidate, EngineFile, Manifest, Profile, Speed, Unproven};

/// A line of the table: its name and its value.
pub type Line = (&'static str, String);

/// `lines` below each other.
pub fn table(lines: &[Line]) -> String {
    lines.iter().map(|(name, value)| format!("{name:<9}  {value}\n")).collect()
}

/// What the engine at `path` is.
pub fn engine_lines(path: &Path, engine: &EngineFile) -> Vec<Line> {
    let manifest = &engine.manifest;
    let profiles = manifest.profiles.iter().map(Profile::to_string).collect::<Vec<_>>().join(", ");
    let fidelity = match (&manifest.fidelity, &manifest.unproven) {
        (Some(found), _) => format!(
            "smallest cosine {:.7} ({} tokens at {}), largest difference {:.1e}, {} texts",
            found.min_cosine, found.worst_tokens, found.worst_profile, found.max_abs_difference, found.texts
        ),
        (None, Some(wanted)) => unproven_words(wanted),
        (None, None) => "not measured".into(),
    };
    let machine = &manifest.machine;
    let mut lines = vec![
        ("engine", path.display().to_string()),
        ("size", HumanBytes(engine.plan().len() as u64).to_string()),
        ("built in", format!("{} s", manifest.build.seconds)),
        (
            "for",
            match machine.is_ahead_of_time() {
                true => format!("{}, TensorRT {}", machine.gpu_words(), machine.tensorrt),
                false => format!("{}, TensorRT {}", machine.gpu, machine.tensorrt),
            },
        ),
        ("precision", precision(manifest)),
        ("profiles", profiles),
        ("fidelity", fidelity),
    ];
    if manifest.arithmetic == Arithmetic::Int8 {
        lines.push((
            "in float",
            match manifest.build.float_linears.as_slice() {
                [] => "no linear".into(),
                some => some.join(", "),
            },
        ));
    }
    lines.extend(manifest.speed.iter().map(|speed| ("speed", speed.to_string())));
    lines.extend(manifest.products.iter().map(|products| ("products", products.to_string())));
    lines
}

/// What is said in the place of the fidelity of an engine that was built ahead of time.
pub fn unproven_words(wanted: &Unproven) -> String {
    format!("unproven: a cosine of at least {} is to be shown when it is first loaded on a GPU", wanted.min_cosine)
}

/// In which arithmetic, and where that is not the model's own function.
pub fn precision(manifest: &Manifest) -> String {
    let gelu = match (manifest.model.tanh_gelu, manifest.model.tanh_gelu_from) {
        (false, _) => String::new(),
        (true, 0) => ", GELU by tanh".into(),
        (true, least) => format!(", GELU by tanh from {least} tokens on"),
    };
    format!("{}{gelu}", manifest.arithmetic)
}

/// The candidates of `--precision auto`, of which the engine with the manifest `chosen` came: verdict, fidelity and times.
pub fn candidate_lines(candidates: &[Candidate], chosen: &Manifest) -> Vec<Line> {
    let best = candidates.iter().find(|candidate| candidate.arithmetic == chosen.arithmetic).and_then(Candidate::mean_micros);
    let line = |candidate: &Candidate| {
        let verdict = match (&candidate.refused, candidate.mean_micros(), best) {
            (Some(_), ..) => "refused".into(),
            _ if candidate.arithmetic == chosen.arithmetic => "chosen".into(),
            (None, Some(own), Some(best)) => {
                format!("not chosen, it takes {:.2} times as long as {}", own / best, chosen.arithmetic)
            }
            (None, ..) => "not chosen".into(),
        };
        let mut words = vec![format!("{}: {verdict}", candidate.arithmetic)];
        words.extend(candidate.fidelity.as_ref().map(|found| format!("smallest cosine {:.7}", found.min_cosine)));
        let times = chosen.profiles.iter().zip(&candidate.micros).map(|(profile, micros)| format!("{profile} {micros} us"));
        words.extend(Some(times.collect::<Vec<_>>().join(", ")).filter(|times| !times.is_empty()));
        words.extend(candidate.refused.as_ref().map(ToString::to_string));
        ("candidate", words.join("; "))
    };
    candidates.iter().map(line).collect()
}

/// Where int8 loses to fp16, which must not go unheard; none where it does not. `half_refused` tells that the fp16 engine missed its bar.
pub fn slower_int8(manifest: &Manifest, half_refused: bool) -> Option<String> {
    let slower = |speed: &&Speed| match manifest.arithmetic {
        Arithmetic::Int8 => speed.fp16_micros.is_some_and(|fp16| speed.micros > fp16),
        Arithmetic::Fp16 => speed.int8_micros.is_some_and(|int8| int8 > speed.micros),
        _ => false,
    };
    let (slower, all) = (manifest.speed.iter().filter(slower).count(), manifest.speed.len());
    let next = match (slower, manifest.arithmetic, half_refused) {
        (0, ..) => return None,
        (_, Arithmetic::Fp16, _) => "fp16 was chosen",
        (_, _, true) => {
            "but fp16 misses its bar; `trt-embed build` with --precision fp16 and a lower --min-cosine is faster there"
        }
        _ => "`trt-embed build` with --precision fp16 is faster there",
    };
    Some(format!("int8 is slower than fp16 at {slower} of {all} shapes: {next}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn manifest(arithmetic: &str, speed: serde_json::Value) -> Manifest {
        serde_json::from_value(json!({
            "machine": {"tensorrt": "8.6.0", "compute_capability": "9.0", "gpu": "NVIDIA H200"},
            "model": {
                "source": {"exported": "fp32"}, "graph": "a", "tokenizer": "b", "pooling": "mean", "hidden_size": 384, "positions": 512,
            },
            "arithmetic": arithmetic,
            "profiles": ["1x32", "16x256"],
            "build": {
                "by": "trt-embed", "cuda_driver": "13.0", "seconds": 45, "workspace_bytes": null, "optimization_level": null,
            },
            "fidelity": {
                "texts": 56, "reference": "cpu", "min_cosine": 0.99995, "max_abs_difference": 3.1e-4, "not_finite": 0,
                "worst_profile": "1x32", "worst_tokens": 9,
            },
            "speed": speed,
        }))
        .unwrap()
    }

    fn candidate(arithmetic: Arithmetic, micros: &[f64], refused: Option<trt_embed::Error>) -> Candidate {
        Candidate { arithmetic, micros: micros.into(), fidelity: manifest("fp16", json!([])).fidelity, refused }
    }

    #[test]
    fn every_candidate_has_its_verdict_fidelity_and_times() {
        let refused = || trt_embed::Error::QuantizedFidelity { cosine: 0.5, bar: 0.99, tried: "all".into(), next: "use fp16" };
        let lines = |candidates: &[Candidate]| {
            candidate_lines(candidates, &manifest("fp16", json!([]))).into_iter().map(|(_, value)| value).collect::<Vec<_>>()
        };
        let half = || candidate(Arithmetic::Fp16, &[100.0, 1000.0], None);
        assert_eq!(
            lines(&[candidate(Arithmetic::Int8, &[200.0, 1125.0], None), half()]),
            [
                "int8: not chosen, it takes 1.50 times as long as fp16; smallest cosine 0.9999500; 1x32 200 us, 16x256 1125 us",
                "fp16: chosen; smallest cosine 0.9999500; 1x32 100 us, 16x256 1000 us",
            ]
        );
        let mut unbuilt = candidate(Arithmetic::Int8, &[], Some(refused()));
        unbuilt.fidelity = None;
        assert_eq!(lines(&[unbuilt, half()])[0], format!("int8: refused; {}", refused()));
        let built = lines(&[candidate(Arithmetic::Int8, &[20.0, 30.0], Some(refused())), half()]);
        assert_eq!(built[0], format!("int8: refused; smallest cosine 0.9999500; 1x32 20 us, 16x256 30 us; {}", refused()));
    }

    #[test]
    fn int8_that_is_slower_somewhere_is_told() {
        let beside = |own: f64, name: &str, other: f64| json!({"profile": "1x32", "micros": own, name: other});
        let int8 = manifest("int8", json!([beside(2.0, "fp16_micros", 1.0), beside(1.0, "fp16_micros", 1.0)]));
        let said = slower_int8(&int8, false).unwrap();
        assert!(said.contains("1 of 2 shapes") && said.contains("--precision fp16 is faster there"), "{said}");
        let said = slower_int8(&int8, true).unwrap();
        assert!(said.contains("1 of 2 shapes") && said.contains("fp16 misses its bar"), "{said}");
        let fp16 = manifest("fp16", json!([beside(1.0, "int8_micros", 2.0), beside(1.0, "int8_micros", 3.0)]));
        let said = slower_int8(&fp16, false).unwrap();
        assert!(said.contains("2 of 2 shapes") && said.contains("fp16 was chosen"), "{said}");
        assert_eq!(slower_int8(&manifest("int8", json!([beside(1.0, "fp16_micros", 2.0)])), false), None);
        assert_eq!(slower_int8(&manifest("fp16", json!([{"profile": "1x32", "micros": 1.0}])), false), None);
    }
}
