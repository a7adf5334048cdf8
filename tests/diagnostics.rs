//! `doctor` and `inspect FILE.engine` as their users meet them, on machines with and without a GPU.

use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// What a finished run left behind.
struct Run {
    status: i32,
    stdout: String,
    stderr: String,
}

/// The command in `folder`, away from the caller's settings.
fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trt-embed"));
    command.current_dir(folder).args(args);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TRT_EMBED_") || name == "RUST_LOG") {
        command.env_remove(name);
    }
    command
}

fn finish(command: &mut Command) -> Run {
    let out = command.output().unwrap();
    Run {
        status: out.status.code().expect("ended by a signal"),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// Runs the command where the driver, if there is one, shows no GPU.
fn run(folder: &Path, args: &[&str], env: &[(&str, &str)]) -> Run {
    finish(command(folder, args).env("CUDA_VISIBLE_DEVICES", "-1").envs(env.iter().copied()))
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The checks of a `doctor --json` by what they are about.
fn check<'a>(report: &'a Value, what: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["what"] == what).unwrap_or_else(|| panic!("no {what} in {report:#}"))
}

#[test]
fn doctor_names_what_is_missing_and_the_next_step() {
    let place = folder();
    let done = run(place.path(), &["doctor"], &[]);
    assert_eq!(done.status, 1, "{}{}", done.stdout, done.stderr);
    let verdict = "trt-embed: neither `--backend cuda` nor `--backend tensorrt` would work here; missing: ";
    assert!(done.stderr.starts_with(verdict), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    let decides = if cfg!(feature = "cuda") { ["NVIDIA driver", "GPU"].as_slice() } else { &["feature cuda"] };
    assert!(decides.iter().any(|what| done.stderr.contains(what)), "{}", done.stderr);
    let lines: Vec<&str> = done.stdout.lines().collect();
    for pair in lines.windows(2).filter(|pair| pair[0].starts_with("missing")) {
        assert!(pair[1].starts_with("           "), "no next step: {}", done.stdout);
    }
    assert!(lines[0].starts_with("ok       build  "), "{}", done.stdout);
    assert!(!done.stdout.contains("works here"), "{}", done.stdout);
}

#[test]
fn doctor_as_json_agrees_with_its_exit_status() {
    let place = folder();
    let lib = place.path().join("gone");
    let lib = lib.to_str().unwrap();
    let done = run(place.path(), &["doctor", "--json"], &[("TENSORRT_LIB_DIR", lib), ("HF_TOKEN", "hf_a_secret")]);
    let report: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((done.status, &report["tensorrt_works"], &report["cuda_works"]), (1, &false.into(), &false.into()));
    for found in report["checks"].as_array().unwrap() {
        assert!(["ok", "warn", "missing"].contains(&found["state"].as_str().unwrap()), "{found}");
        let missing = found["state"] == "missing";
        let named = done.stderr.split_once("missing: ").unwrap().1.trim_end().split(", ").any(|name| found["what"] == name);
        assert_eq!(missing, named, "{found}: {}", done.stderr);
    }
    let variable = check(&report, "TENSORRT_LIB_DIR");
    assert_eq!((&variable["state"], &variable["value"]), (&"warn".into(), &format!("{lib} is no folder").into()));
    assert_eq!(check(&report, "CUDA_VISIBLE_DEVICES")["value"], "-1");
    assert!(!done.stdout.contains("hf_a_secret"), "{}", done.stdout);
}

/// Without a GPU: the CPU, or nothing where the build has none.
#[test]
fn doctor_says_what_auto_would_take_and_why() {
    let place = folder();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet");
    for (args, of) in [(&["doctor", "--json"][..], "a model that is served"), (&["doctor", "--json", "-m", model], model)] {
        let report: Value = serde_json::from_str(&run(place.path(), args, &[]).stdout).unwrap();
        let line = check(&report, "--backend auto");
        let told = line.to_string();
        if cfg!(feature = "cpu") {
            assert_eq!((&report["auto"], &line["state"]), (&"cpu".into(), &"ok".into()), "{told}");
            assert_eq!(line["value"], format!("takes cpu for {of}"));
        } else {
            assert_eq!((&report["auto"], &line["state"]), (&Value::Null, &"warn".into()), "{told}");
        }
        assert_eq!(told.contains("driver"), cfg!(feature = "cuda"), "{told}");
    }
    let report: Value = serde_json::from_str(&run(place.path(), &["doctor", "--json", "-m", "./gone"], &[]).stdout).unwrap();
    let line = check(&report, "--backend auto");
    assert_eq!((&report["auto"], &line["state"]), (&Value::Null, &"warn".into()));
    assert!(line["value"].as_str().unwrap().contains("gone"), "{line}");
}

#[cfg(feature = "cuda")]
#[test]
fn doctor_looks_at_the_native_engine_s_kernels_and_their_cache() {
    let place = folder();
    let kernels = place.path().join("kernels");
    std::fs::create_dir(&kernels).unwrap();
    std::fs::write(kernels.join("a.cubin"), b"").unwrap();
    let env = [("TRT_EMBED_CACHE", place.path().to_str().unwrap())];
    let report: Value = serde_json::from_str(&run(place.path(), &["doctor", "--json"], &env).stdout).unwrap();
    let cache = check(&report, "kernel cache");
    assert_eq!((&cache["state"], &cache["value"]), (&"ok".into(), &format!("{}: 1 kernels", kernels.display()).into()));
    let engine = check(&report, "kernels for GPU 0")["value"].as_str().unwrap();
    assert!(["not checked: needs the driver", "not checked: needs a GPU"].contains(&engine), "{engine}");

    // A cache that can hold nothing.
    let file = kernels.join("a.cubin");
    let env = [("TRT_EMBED_CACHE", file.to_str().unwrap())];
    let report: Value = serde_json::from_str(&run(place.path(), &["doctor", "--json"], &env).stdout).unwrap();
    let cache = check(&report, "kernel cache");
    assert_eq!((&cache["state"], cache["next"].as_str().unwrap().contains("TRT_EMBED_CACHE")), (&"warn".into(), true), "{cache}");
    assert!(cache["value"].as_str().unwrap().contains("cannot be written"), "{cache}");
}

#[cfg(feature = "tensorrt")]
mod with_tensorrt {
    use super::*;
    use serde_json::json;
    use std::fs;
    use trt_embed::NoProgress;
    use trt_embed::backend::tensorrt::{
        Arithmetic, BuildSettings, EngineFile, Library, Manifest, Products, Speed, build_plan, header_version,
    };
    use trt_embed::cuda::Device;

    fn manifest() -> Manifest {
        serde_json::from_value(json!({
            "machine": {"tensorrt": "8.6.0", "compute_capability": "9.0", "gpu": "NVIDIA H200"},
            "model": {
                "source": {"exported": "fp32"},
                "graph": "a".repeat(64),
                "tokenizer": "b".repeat(64),
                "pooling": "mean, normalize",
                "hidden_size": 384,
                "positions": 512,
            },
            "arithmetic": "fp16",
            "profiles": ["1x1:1x128:8x512", "1x16"],
            "build": {
                "by": "trt-embed 0.1.0", "cuda_driver": "13.0", "seconds": 45,
                "workspace_bytes": 1 << 30, "optimization_level": 3,
            },
            "fidelity": {
                "texts": 200, "reference": "cpu", "min_cosine": 0.99995, "max_abs_difference": 3.1e-4, "not_finite": 0,
                "worst_profile": "1x16", "worst_tokens": 9,
            },
        }))
        .unwrap()
    }

    fn engine(place: &TempDir, name: &str) -> Vec<u8> {
        let path = place.path().join(name);
        EngineFile::write(&path, &manifest(), &[7; 5000]).unwrap();
        fs::read(path).unwrap()
    }

    #[test]
    fn doctor_lists_the_paths_tried_and_the_caches() {
        let (place, lib) = (folder(), folder());
        engine(&place, "cached.engine");
        let env = [
            ("TENSORRT_LIB_DIR", lib.path().to_str().unwrap()),
            ("LD_LIBRARY_PATH", ""),
            ("TRT_EMBED_CACHE", place.path().to_str().unwrap()),
        ];
        let report: Value = serde_json::from_str(&run(place.path(), &["doctor", "--json"], &env).stdout).unwrap();
        let built = check(&report, "feature tensorrt");
        assert!(built["value"].as_str().unwrap().ends_with(&header_version().to_string()), "{built}");
        // Where the system has TensorRT, the folder that lacks it does not matter.
        let (stem, parser) = (header_version().flavour.library_stem(), header_version().flavour.parser_stem());
        let library = check(&report, stem);
        if library["state"] == "missing" {
            let next = library["next"].as_str().unwrap();
            let tried = lib.path().join(format!("{stem}.so.{}", header_version().major));
            assert!(next.contains(tried.to_str().unwrap()) && next.contains("set TENSORRT_LIB_DIR"), "{next}");
            assert_eq!(check(&report, parser)["value"], format!("not checked: needs {stem}"));
        }
        let cache = check(&report, "engine cache");
        assert_eq!(cache["state"], "ok");
        assert!(cache["value"].as_str().unwrap().contains(": 1 engine, "), "{cache}");
        check(&report, "NVRTC");
        check(&report, "kernel cache");

        // A cache that can hold nothing and holds nothing.
        let file = place.path().join("cached.engine");
        let env = [("TRT_EMBED_CACHE", file.to_str().unwrap())];
        let report: Value = serde_json::from_str(&run(place.path(), &["doctor", "--json"], &env).stdout).unwrap();
        let cache = check(&report, "engine cache");
        assert_eq!((&cache["state"], cache["next"].as_str().unwrap().contains("TRT_EMBED_CACHE")), (&"missing".into(), true));
    }

    #[test]
    fn a_manifest_is_shown_on_any_machine() {
        let place = folder();
        let bytes = engine(&place, "model.engine").len();
        fs::copy(place.path().join("model.engine"), place.path().join("renamed")).unwrap();
        for name in ["model.engine", "renamed"] {
            let done = run(place.path(), &["inspect", name], &[]);
            assert_eq!(done.status, 0, "{}", done.stderr);
            for part in [
                "NVIDIA H200, compute capability 9.0",
                "0: 1x1:1x128:8x512\n",
                "1: 1x16 (bucket)\n",
                "fp16",
                "mean, normalize",
                "trt-embed 0.1.0 in 45 s",
                "at most 1.00 GiB",
                "200 texts against cpu: min cosine 0.99995, largest difference 3.1e-4, 0 not finite",
            ] {
                assert!(done.stdout.contains(part), "no {part:?} in {}", done.stdout);
            }
            assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
            assert!(done.stderr.contains("the manifest alone, the engine cannot be loaded here: "), "{}", done.stderr);

            let done = run(place.path(), &["inspect", name, "--json"], &[]);
            let report: Value = serde_json::from_str(&done.stdout).unwrap();
            assert_eq!((&report["bytes"], &report["engine"]), (&bytes.into(), &Value::Null));
            assert_eq!(report["manifest"]["profiles"][1], "1x16");
            assert_eq!(report["manifest"], serde_json::to_value(manifest()).unwrap());

            let done = run(place.path(), &["inspect", name, "--layers"], &[]);
            assert_eq!((done.status, done.stdout.as_str()), (1, ""));
            assert!(done.stderr.contains("driver"), "{}", done.stderr);
        }
    }

    #[test]
    fn damaged_and_foreign_files_are_named() {
        let place = folder();
        let whole = engine(&place, "model.engine");
        let cases: [(&str, &[u8], &str); 5] = [
            ("manifest.engine", &whole[..100], "it ends within its manifest"),
            ("plan.engine", &whole[..whole.len() - 1], "its header says 56 + "),
            ("renamed", &whole[..whole.len() - 1], "its header says 56 + "),
            ("foreign.engine", b"ftrtsomething else", "it does not begin with \"trtembed\""),
            ("empty.engine", b"", "it ends within its header"),
        ];
        for (name, bytes, reason) in cases {
            fs::write(place.path().join(name), bytes).unwrap();
            let done = run(place.path(), &["inspect", name], &[]);
            assert_eq!((done.status, done.stdout.as_str()), (1, ""), "{name}");
            for part in [name, "not a readable engine file", reason, "trt-embed build"] {
                assert!(done.stderr.contains(part), "{name}: no {part:?} in {}", done.stderr);
            }
        }
        let absent = run(place.path(), &["inspect", "absent.engine"], &[]);
        assert!(absent.status == 1 && absent.stderr.contains("absent.engine"), "{}", absent.stderr);
    }

    #[test]
    fn an_int8_engine_tells_what_stayed_in_float_what_it_multiplies_in_and_how_fast_it_is_beside_it() {
        let place = folder();
        let mut manifest = manifest();
        manifest.arithmetic = Arithmetic::Int8;
        manifest.build.float_linears = vec!["encoder.layer.0.output.dense".into(), "encoder.layer.1.output.dense".into()];
        manifest.speed =
            vec![Speed { profile: manifest.profiles[1], micros: 230.6, fp16_micros: Some(141.2), int8_micros: None }];
        let kernels = ["gemm_i8f32_i8i32", "norm", "gemm_i8i8_i8i32", "gemm_f32f32_f32f32"];
        manifest.products = vec![Products::count(manifest.profiles[1], &kernels)];
        manifest.build.int8_inputs = 2;
        EngineFile::write(&place.path().join("int8.engine"), &manifest, b"plan").unwrap();
        let done = run(place.path(), &["inspect", "int8.engine"], &[]);
        assert_eq!(done.status, 0, "{}", done.stderr);
        let lines: Vec<Vec<&str>> = done.stdout.lines().map(|line| line.splitn(2, "  ").map(str::trim).collect()).collect();
        for expected in [
            ["arithmetic", "int8"],
            ["in float", "encoder.layer.0.output.dense, encoder.layer.1.output.dense"],
            ["speed", "1x16: 230.6 us, fp16 141.2 us (1.63)"],
            ["products", "1x16: 2 int8, 1 fp32"],
        ] {
            assert!(lines.iter().any(|line| line.as_slice() == expected), "no {expected:?} in {}", done.stdout);
        }
        let done = run(place.path(), &["inspect", "int8.engine", "--json"], &[]);
        let report: Value = serde_json::from_str(&done.stdout).unwrap();
        assert_eq!(report["manifest"]["speed"][0]["fp16_micros"], 141.2, "{report}");
        assert_eq!(report["manifest"]["products"][0]["int8"], 2, "{report}");
        assert!(!done.stderr.contains("int8"), "{}", done.stderr);

        // Linears that were quantised and do not run in int8 must not go unheard.
        manifest.build.int8_inputs = 3;
        EngineFile::write(&place.path().join("int8.engine"), &manifest, b"plan").unwrap();
        let done = run(place.path(), &["inspect", "int8.engine"], &[]);
        let said = "3 quantised tensors feed do not all run in int8: 1x16: 2 int8, 1 fp32";
        assert!(done.stderr.contains(said), "{}", done.stderr);
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU and TensorRT"]
    fn a_whole_machine_and_its_engine() {
        let place = folder();
        let done = finish(&mut command(place.path(), &["doctor"]));
        assert_eq!(done.status, 0, "{}{}", done.stdout, done.stderr);
        assert!(done.stdout.ends_with("`--backend tensorrt` works here.\n"), "{}", done.stdout);

        // A tiny graph, built for the profiles that the manifest names.
        let device = Device::open(0).unwrap();
        let library = Library::load().unwrap();
        let mut manifest = manifest();
        let mut settings = BuildSettings::default();
        settings.arithmetic = Arithmetic::Fp32;
        settings.profiles = manifest.profiles.clone();
        let onnx = include_bytes!("fixtures/tensorrt/tiny.onnx");
        let plan = build_plan(&library, &device, onnx, &settings, &NoProgress).unwrap().bytes;
        let about = device.properties();
        manifest.machine.tensorrt = library.version().to_string();
        manifest.machine.compute_capability = format!("{}.{}", about.compute_capability.0, about.compute_capability.1);
        manifest.machine.gpu = about.name.clone();
        EngineFile::write(&place.path().join("tiny.engine"), &manifest, &plan).unwrap();

        let done = finish(&mut command(place.path(), &["inspect", "tiny.engine", "--json"]));
        assert_eq!(done.status, 0, "{}", done.stderr);
        let engine = &serde_json::from_str::<Value>(&done.stdout).unwrap()["engine"];
        assert_eq!(engine["inputs"][0], json!({"name": "input_ids", "type": "int32", "shape": [null, null]}));
        assert_eq!(engine["outputs"][0]["name"], "last_hidden_state");
        assert_eq!(engine["profiles"][0]["ranges"][0]["max"], json!([8, 512]));
        assert_eq!(engine["profiles"][1]["ranges"][0]["min"], json!([1, 16]));
        let layers = engine["layers"].as_array().unwrap();
        assert!(!layers.is_empty());
        for layer in layers {
            assert!(layer["profile"].as_u64().unwrap() < 2, "{layer}");
            assert!(!layer["name"].as_str().unwrap().contains("[profile"), "{layer}");
        }
        // TensorRT 8.6 tells no types where one of the profiles is dynamic.
        for profile in 0..2 {
            let of_profile = layers.iter().filter(|layer| layer["profile"] == profile);
            let mut written = of_profile.filter_map(|layer| layer["outputs"].as_array()).flatten();
            let is_output = |tensor: &Value| {
                let element = tensor["element"].as_str().unwrap();
                tensor["name"] == "last_hidden_state" && (element == "float32" || element.starts_with("N/A"))
            };
            assert!(written.any(is_output), "{layers:#?}");
        }

        let short = finish(&mut command(place.path(), &["inspect", "tiny.engine"])).stdout;
        let long = finish(&mut command(place.path(), &["inspect", "tiny.engine", "--layers"])).stdout;
        assert!(short.contains("input_ids  int32 [?, ?]") && short.contains("1: input_ids 1x16, "), "{short}");
        assert!(long.starts_with(&short) && long.lines().count() == short.lines().count() + 2 + layers.len(), "{long}");

        // An engine of another GPU is not loaded.
        manifest.machine.gpu = "another GPU".into();
        EngineFile::write(&place.path().join("other.engine"), &manifest, &plan).unwrap();
        let done = finish(&mut command(place.path(), &["inspect", "other.engine"]));
        assert_eq!(done.status, 0, "{}", done.stderr);
        assert!(done.stderr.contains("the engine does not fit: the GPU is another GPU"), "{}", done.stderr);
    }
}

#[cfg(not(feature = "tensorrt"))]
#[test]
fn an_engine_file_says_what_the_build_lacks() {
    let place = folder();
    std::fs::write(place.path().join("by-content"), b"trtembed and more").unwrap();
    for name in ["by-content", "absent.engine"] {
        let done = run(place.path(), &["inspect", name], &[]);
        assert_eq!((done.status, done.stdout.as_str()), (1, ""));
        for part in [name, "lacks the feature `tensorrt`", "cargo build --release --features tensorrt"] {
            assert!(done.stderr.contains(part), "no {part:?} in {}", done.stderr);
        }
    }
}

#[test]
fn layers_go_with_engine_files_alone() {
    let place = folder();
    std::fs::write(place.path().join("model.onnx"), b"").unwrap();
    let done = run(place.path(), &["inspect", "model.onnx", "--layers"], &[]);
    assert_eq!(done.status, 2, "{}", done.stderr);
    assert!(done.stderr.contains("--layers goes with an engine file, model.onnx is none"), "{}", done.stderr);
}

#[test]
fn the_version_lists_the_features_built_in() {
    let done = run(folder().path(), &["--version"], &[]);
    let features = done.stdout.lines().find_map(|line| line.strip_prefix("features: ")).unwrap().split(' ');
    let expected = [
        ("cli", true),
        ("cpu", cfg!(feature = "cpu")),
        ("hub", cfg!(feature = "hub")),
        ("cuda", cfg!(feature = "cuda")),
        ("tensorrt", cfg!(feature = "tensorrt")),
        ("nvtx", cfg!(feature = "nvtx")),
    ];
    assert!(features.eq(expected.into_iter().filter(|(_, is)| *is).map(|(name, _)| name)), "{}", done.stdout);
}
