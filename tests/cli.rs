//! The command as its users meet it: child processes on a tiny model folder.

mod cli_model;
mod cli_place;

use cli_model::{HIDDEN, MAX_TOKENS};
use cli_place::{Place, npy, rows, values};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

/// Vectors of one text in different batches: the CPU backend's sums may be ordered otherwise. Unit vectors of 8 values, two
/// LayerNorms: some tens of roundings.
#[track_caller]
fn assert_near(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 100.0 * f32::EPSILON, "{a} {b}");
    }
}

#[test]
fn rows_of_arguments() {
    let rows = rows(&Place::new().embed(&["the cat sat", "stocks fell.", ""]).ok());
    assert_eq!(rows.iter().map(|row| row.tokens).collect::<Vec<_>>(), [5, 5, 2]);
    for row in &rows {
        assert_eq!(row.embedding.len(), HIDDEN);
        assert!(row.hidden_states.is_none());
        let norm: f32 = row.embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm - 1.0).abs() <= 8.0 * f32::EPSILON, "{norm}");
    }
    assert_ne!(rows[0].embedding, rows[1].embedding);
}

#[test]
fn stdin_files_and_arguments_agree() {
    let place = Place::new();
    let expected = place.embed(&["the cat", "", "a dog\u{e9} ran"]).ok();
    let lines = "the cat\r\n\r\na dog\u{e9} ran".as_bytes();
    assert_eq!(place.embed_with(&[], lines).ok(), expected);
    assert_eq!(place.embed_with(&["-i", "-"], lines).ok(), expected);
    place.put("lines.txt", lines);
    assert_eq!(place.embed(&["-i", "lines.txt"]).ok(), expected);
    let jsonl = "{\"text\":\"the cat\"}\n{\"id\":2,\"text\":\"\"}\n{\"text\":\"a dog\\u00e9 ran\"}\n";
    place.put("texts.jsonl", jsonl);
    assert_eq!(place.embed(&["-i", "texts.jsonl"]).ok(), expected);
    assert_eq!(place.embed_with(&["--input-format", "jsonl"], jsonl.as_bytes()).ok(), expected);
    // Written to a file instead.
    assert_eq!(place.embed(&["-i", "lines.txt", "-o", "out.jsonl"]).ok(), "");
    assert_eq!(std::fs::read_to_string(place.path("out.jsonl")).unwrap(), expected);
}

#[test]
fn npy_holds_the_same_numbers_as_jsonl() {
    let place = Place::new();
    let texts = ["the cat", "a red dog", "", "blue", "stocks fell on the mat"];
    let expected = values(&rows(&place.embed(&texts).ok()));
    let (shape, got) = npy(&place.embed(&[&["-f", "npy"], &texts[..]].concat()).stdout);
    assert_eq!((shape, &got), (vec![5, HIDDEN as u64], &expected));
    // A name that ends in .npy says the format.
    place.embed(&[&["-o", "out.npy"], &texts[..]].concat()).ok();
    assert_eq!(npy(&std::fs::read(place.path("out.npy")).unwrap()).1, expected);
    assert_eq!(place.files(), ["out.npy"]);
}

#[test]
fn no_texts_give_no_rows() {
    let place = Place::new();
    assert_eq!(place.embed_with(&[], b"").ok(), "");
    assert_eq!(npy(&place.embed(&["-f", "npy"]).stdout), (vec![0, HIDDEN as u64], vec![]));
    place.embed(&["-o", "out.npy"]).ok();
    assert_eq!(npy(&std::fs::read(place.path("out.npy")).unwrap()).0, [0, HIDDEN as u64]);
    place.embed(&["-o", "out.jsonl"]).ok();
    assert_eq!(std::fs::read(place.path("out.jsonl")).unwrap(), b"");
}

#[test]
fn hidden_states_pool_to_the_vector() {
    let place = Place::new();
    let rows = rows(&place.embed(&["--hidden-states", "--normalize", "off", "the cat sat", "dog"]).ok());
    for (row, tokens) in rows.iter().zip([5, 3]) {
        let states = row.hidden_states.as_ref().unwrap();
        assert_eq!((row.tokens, states.len()), (tokens, tokens));
        assert!(states.iter().all(|state| state.len() == HIDDEN));
        let mean: Vec<f32> = (0..HIDDEN).map(|c| states.iter().map(|state| state[c]).sum::<f32>() / tokens as f32).collect();
        assert_near(&row.embedding, &mean);
    }
}

#[test]
fn settings_reach_the_vectors() {
    let place = Place::new();
    let row = |args: &[&str]| rows(&place.embed(&[args, &["the cat"]].concat()).ok()).remove(0);
    let plain = row(&["--normalize", "off"]);
    assert_eq!(row(&["--normalize", "off", "--dim", "3"]).embedding, plain.embedding[..3]);
    let both = row(&["--normalize", "off", "--pooling", "mean,cls"]);
    assert_eq!(both.embedding.len(), 2 * HIDDEN);
    assert_eq!(both.embedding[..HIDDEN], plain.embedding, "modes are concatenated in the order given");
    let cls = row(&["--normalize", "off", "--pooling", "cls"]);
    assert_ne!(cls.embedding, plain.embedding);
    let swapped = row(&["--normalize", "off", "--pooling", "cls,mean"]);
    assert_eq!(swapped.embedding, [cls.embedding, plain.embedding.clone()].concat());
    // A prompt is text before the text.
    let prompted = row(&["--prompt", "query"]);
    assert_eq!(prompted.tokens, 6);
    let spelled = rows(&place.embed(&["query: the cat"]).ok()).remove(0);
    assert_near(&prompted.embedding, &spelled.embedding);
    // Settings come from the environment, too; the command line wins.
    let out = place.command(&["embed", "the cat"]).env("TRT_EMBED_MODEL", "model").env("TRT_EMBED_DIM", "3").output().unwrap();
    assert_eq!(rows(std::str::from_utf8(&out.stdout).unwrap())[0].embedding.len(), 3);
    let out = place.command(&["embed", "-m", "model", "--dim", "4", "the cat"]).env("TRT_EMBED_DIM", "3").output().unwrap();
    assert_eq!(rows(std::str::from_utf8(&out.stdout).unwrap())[0].embedding.len(), 4);
}

#[test]
fn long_texts_are_cut_and_counted_once() {
    let place = Place::new();
    let long = "cat ".repeat(100);
    let run = place.embed(&[&long, "cat", &long]);
    assert_eq!(run.stderr, format!("trt-embed: 2 of 3 texts were longer than {MAX_TOKENS} tokens and were cut\n"));
    assert_eq!(rows(&run.ok()).iter().map(|row| row.tokens).collect::<Vec<_>>(), [MAX_TOKENS, 3, MAX_TOKENS]);
    let run = place.embed(&["--max-tokens", "4", "the cat sat on the mat"]);
    assert!(run.stderr.contains("1 of 1 texts was longer than 4 tokens"), "{}", run.stderr);
    assert_eq!(rows(&run.ok())[0].tokens, 4);
}

#[test]
fn a_limit_beyond_a_table_of_positions_is_said() {
    let place = Place::new();
    std::fs::write(place.path("model/sentence_bert_config.json"), r#"{"max_seq_length": 50}"#).unwrap();
    let run = place.embed(&["the cat"]);
    assert!(run.stderr.contains("max_seq_length or max_length is 50, and positions serve 32 tokens"), "{}", run.stderr);
    assert_eq!(rows(&run.ok())[0].tokens, 4);
    std::fs::write(place.path("model/sentence_bert_config.json"), r#"{"max_seq_length": 32}"#).unwrap();
    assert_eq!(place.embed(&["the cat"]).stderr, "");
}

#[test]
fn auto_says_what_it_chose() {
    let place = Place::new();
    // No GPU, whatever this machine has.
    let out = place.command(&["embed", "-m", "model", "cat"]).env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    // A build for GPUs adds why they are not used.
    let end = match (cfg!(feature = "cuda"), cfg!(feature = "tensorrt")) {
        (true, true) => ": cuda and tensorrt: ",
        (true, false) => ": cuda: ",
        _ => ")\n",
    };
    assert!(said.starts_with(&format!("trt-embed: backend: cpu (chosen by --backend auto{end}")), "{said}");
    assert!(out.status.success() && said.lines().count() == 1, "{said}");
}

#[test]
fn order_holds_across_chunks() {
    let place = Place::new();
    let text = |i: usize| format!("{} {}", ["the", "cat sat", "a red dog ran on"][i % 3], i % 1000);
    let lines: String = (0..3000).map(|i| text(i) + "\n").collect();
    let got = rows(&place.embed_with(&[], lines.as_bytes()).ok());
    assert_eq!(got.len(), 3000);
    let sample = [0, 1, 31, 32, 33, 95, 96, 991, 2015, 2016, 2999];
    let texts: Vec<String> = sample.iter().map(|i| text(*i)).collect();
    let alone = rows(&place.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>()).ok());
    for (i, row) in sample.iter().zip(&alone) {
        assert_eq!(got[*i].tokens, row.tokens);
        assert_near(&got[*i].embedding, &row.embedding);
    }
}

#[test]
fn a_reader_that_leaves_early_ends_the_run_quietly() {
    let place = Place::new();
    place.put("lines.txt", "the cat sat on the mat\n".repeat(20_000));
    for args in [&["-i", "lines.txt"][..], &["-i", "lines.txt", "--max-tokens", "3"]] {
        let mut child = place
            .command(&[&["embed", "-m", "model", "--backend", "cpu"], args].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut first).unwrap();
        assert_eq!(rows(&first).len(), 1);
        drop(out);
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
    }
}

#[test]
fn faults_of_input_and_output_come_before_the_model() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    let run = |args: &[&str]| place.run(&[&["embed", "-m", "no/such/model/here"], args].concat());
    run(&["-i", "absent.txt"]).fails(&["cannot read absent.txt", "No such file"]);
    run(&["-i", "folder"]).fails(&["cannot read folder", "it is a folder"]);
    run(&["-o", "absent/out.jsonl", "cat"]).fails(&["cannot write absent/out.jsonl", "the folder absent does not exist"]);
    run(&["-o", "folder", "cat"]).fails(&["cannot write folder", "it is a folder"]);
    run(&["cat"]).fails(&["no/such/model/here"]);
}

#[test]
fn settings_that_the_model_cannot_give() {
    let place = Place::new();
    place.embed(&["--dim", "9", "cat"]).fails(&["--dim", "9", "8"]);
    place.embed(&["--max-tokens", "33", "cat"]).fails(&["--max-tokens", "33", "32"]);
    place.embed(&["--prompt", "passage", "cat"]).fails(&["--prompt", "passage", "query"]);
    let tensorrt =
        place.command(&["embed", "-m", "model", "--backend", "tensorrt", "cat"]).env("CUDA_VISIBLE_DEVICES", "").output();
    let tensorrt = tensorrt.unwrap();
    let said = String::from_utf8(tensorrt.stderr).unwrap();
    assert_eq!(tensorrt.status.code(), Some(1), "{said}");
    assert!(said.contains(if cfg!(feature = "tensorrt") { "NVIDIA driver" } else { "tensorrt" }), "{said}");
}

#[test]
fn wrong_usage_exits_with_2() {
    let place = Place::new();
    for (args, part) in [
        (&["embed", "-m", "model", "--frobnicate", "cat"][..], "--frobnicate"),
        (&["embed", "-m", "model", "-i", "a", "cat"], "cannot be used with"),
        (&["embed", "-m", "model", "--dim", "0", "cat"], "--dim"),
        (&["embed", "-m", "model", "--pooling", "auto,mean", "cat"], "stands alone"),
        (&["embed", "-m", "model", "--pooling", "median", "cat"], "median"),
        (&["embed", "-m", "model", "-f", "npy", "--hidden-states", "cat"], "ragged"),
        (&["embed", "-m", "model", "-o", "x.npy", "--hidden-states", "cat"], "ragged"),
        (&["embed", "cat"], "--model"),
        (&["similarity", "-m", "model", "cat"], "--query"),
        (&["bench", "-m", "model", "--shape", "3"], "--shape"),
        (&["frobnicate"], "frobnicate"),
        (&[], "Usage"),
    ] {
        place.run(args).ends(2, &[part]);
    }
    assert!(place.files().is_empty());
}

#[cfg(unix)]
#[test]
fn output_to_links_devices_and_with_normal_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let mode = |name: &str| std::fs::metadata(place.path(name)).unwrap().permissions().mode();
    place.put("plain", "");
    place.embed(&["-o", "out.jsonl", "cat"]).ok();
    assert_eq!(mode("out.jsonl"), mode("plain"));
    // An existing file keeps its own, also behind a link.
    std::fs::set_permissions(place.path("plain"), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("plain", place.path("link")).unwrap();
    place.embed(&["-o", "link", "cat"]).ok();
    assert_eq!(mode("plain") & 0o777, 0o640);
    assert_eq!(rows(&std::fs::read_to_string(place.path("plain")).unwrap()).len(), 1);
    assert!(std::fs::symlink_metadata(place.path("link")).unwrap().is_symlink());
    place.embed(&["-o", "/dev/null", "cat"]).ok();
    assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    let through = place.embed(&["-o", "/dev/stdout", "-f", "npy", "cat"]);
    assert_eq!(npy(&through.stdout).0, [1, HIDDEN as u64]);
}

#[test]
fn similarity_ranks() {
    let place = Place::new();
    let base = ["similarity", "-m", "model", "--backend", "cpu", "--query", "the cat sat"];
    let texts = ["stocks fell", "the cat sat", "a dog ran", "the cat ran"];
    let report: Value = serde_json::from_str(&place.run(&[&base[..], &["--json"], &texts].concat()).ok()).unwrap();
    assert_eq!((&report["query"], &report["texts"]), (&Value::from("the cat sat"), &Value::from(4)));
    let matches = report["matches"].as_array().unwrap();
    assert_eq!(matches.len(), 4);
    assert_eq!((&matches[0]["index"], &matches[0]["text"], &matches[0]["rank"]), (&1.into(), &"the cat sat".into(), &1.into()));
    let scores: Vec<f64> = matches.iter().map(|found| found["score"].as_f64().unwrap()).collect();
    assert!((scores[0] - 1.0).abs() < 1e-5 && scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    // From a file, the best only, as a table.
    place.put("lines.txt", texts.join("\n"));
    let table = place.run(&[&base[..], &["-i", "lines.txt", "--top", "2"]].concat()).ok();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[1].trim().starts_with("1   1.0000") && lines[1].ends_with("the cat sat"), "{table}");
    // A prompt of its own for the query.
    let prompted = place.run(&[&base[..], &["--query-prompt", "query", "--json", "query: the cat sat", "the cat sat"]].concat());
    let report: Value = serde_json::from_str(&prompted.ok()).unwrap();
    assert_eq!(report["matches"][0]["index"], 0);
    assert!((report["matches"][0]["score"].as_f64().unwrap() - 1.0).abs() < 1e-5);
    // No texts, no matches; a long list is cut to the ten best.
    let none: Value = serde_json::from_str(&place.run(&[&base[..], &["--json"]].concat()).ok()).unwrap();
    assert_eq!(none["matches"].as_array().unwrap().len(), 0);
    let many: String = (0..50).map(|i| format!("cat {i}\n")).collect();
    assert_eq!(place.run_with(&base, many.as_bytes()).ok().lines().count(), 11);
}

#[test]
fn export_and_inspect() {
    let place = Place::new();
    for (precision, element) in [("fp32", "float32"), ("fp16", "float16")] {
        let out = place.run(&["export", "-m", "model", "-o", precision, "--precision", precision]).ok();
        assert!(out.contains("model.onnx") && out.contains("tokenizer.json"), "{out}");
        for file in ["model.onnx", "config.json", "tokenizer.json"] {
            assert!(place.path(precision).join(file).is_file(), "{file}");
        }
        let onnx = Path::new(precision).join("model.onnx");
        let report: Value = serde_json::from_str(&place.run(&["inspect", "--json", onnx.to_str().unwrap()]).ok()).unwrap();
        assert_eq!(report["opsets"][0]["version"], 17);
        assert_eq!(report["inputs"][0]["name"], "input_ids");
        assert_eq!(report["inputs"][0]["type"], "int32");
        assert_eq!(report["outputs"][0]["name"], "last_hidden_state");
        assert_eq!(report["outputs"][0]["type"], element);
        assert_eq!(report["outputs"][0]["shape"][2], HIDDEN);
        assert!(report["nodes"].as_u64().unwrap() > 10);
        let table = place.run(&["inspect", onnx.to_str().unwrap()]).ok();
        assert!(table.contains("input_ids") && table.contains("int32") && table.contains("MatMul"), "{table}");
    }
    let report: Value = serde_json::from_str(&place.run(&["inspect", "model", "--json"]).ok()).unwrap();
    for (field, value) in [
        ("family", Value::from("bert")),
        ("hidden_size", HIDDEN.into()),
        ("layers", 1.into()),
        ("heads", 2.into()),
        ("dimensions", HIDDEN.into()),
        ("max_tokens", MAX_TOKENS.into()),
        ("normalize", true.into()),
        ("pooling", serde_json::json!(["mean"])),
    ] {
        assert_eq!(report[field], value, "{field}");
    }
    assert_eq!(report["prompts"]["query"], "query: ");
    assert!(place.run(&["inspect", "model"]).ok().contains("bert"));
}

#[test]
fn export_and_inspect_faults() {
    let place = Place::new();
    place.put("text.onnx", "this is not a model");
    place.put("empty.onnx", "");
    place.run(&["inspect", "text.onnx"]).fails(&["text.onnx"]);
    place.run(&["inspect", "empty.onnx"]).fails(&["empty.onnx"]);
    place.run(&["inspect", "absent.onnx"]).fails(&["absent.onnx"]);
    place.run(&["export", "-m", "./absent", "-o", "out"]).fails(&["absent"]);
    place.run(&["export", "-m", "model", "-o", "text.onnx"]).fails(&["text.onnx"]);
    place.run(&["export", "-m", "model", "-o", "out", "--opset", "18"]).ends(2, &["--opset"]);
    assert_eq!(place.files(), ["empty.onnx", "text.onnx"]);
}

#[test]
fn bench_reports() {
    let place = Place::new();
    let base = ["bench", "-m", "model", "--backend", "cpu", "--threads", "1", "--iterations", "20", "--mixed", "30"];
    let report: Value =
        serde_json::from_str(&place.run(&[&base[..], &["--shape", "1x4", "--shape", "3x8", "--json"]].concat()).ok()).unwrap();
    assert_eq!((&report["model"], &report["backend"], &report["threads"]), (&"model".into(), &"cpu".into(), &1.into()));
    for (shape, name) in report["shapes"].as_array().unwrap().iter().zip(["1x4", "3x8"]) {
        assert_eq!((&shape["shape"], &shape["calls"]), (&name.into(), &20.into()));
        let us: Vec<f64> = ["p50", "p90", "p99", "p999", "max"].map(|p| shape["ids_to_vector_us"][p].as_f64().unwrap()).to_vec();
        assert!(us[0] > 0.0 && us.is_sorted(), "{us:?}");
    }
    for text in report["text_to_vector"].as_array().unwrap() {
        assert_eq!(text["calls"], 20);
        assert!(text["total_us"]["p50"].as_f64().unwrap() > 0.0 && text["tokenise_us"]["p50"].as_f64().unwrap() > 0.0);
    }
    let mixed = &report["mixed"];
    assert_eq!(mixed["texts"], 30);
    assert!(mixed["sentences_per_s"].as_f64().unwrap() > 0.0 && mixed["padded_tokens"].as_u64() >= mixed["tokens"].as_u64());
    let table = place.run(&[&base[..], &["--shape", "1x4"]].concat()).ok();
    assert!(table.contains("1x4") && table.contains("p99.9") && table.contains("tokens/s"), "{table}");
    place.run(&[&base[..], &["--shape", "1x25"]].concat()).fails(&["--shape", "25", "24"]);
}

#[test]
fn bench_draws_no_token_that_the_model_refuses() {
    // MPNet counts positions by its padding token; among 216 tokens a random one would be it within a few calls.
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet");
    let args = ["bench", "-m", model, "--backend", "cpu", "--threads", "1", "--iterations", "20", "--mixed", "30"];
    let report: Value =
        serde_json::from_str(&Place::new().run(&[&args[..], &["--shape", "1x16", "--json"]].concat()).ok()).unwrap();
    assert_eq!((&report["shapes"][0]["calls"], &report["mixed"]["texts"]), (&20.into(), &30.into()));
}

#[test]
fn completions_version_and_help() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.run(&["completions", shell]).ok();
        assert!(script.contains("similarity") && script.contains("hidden-states"), "{shell}");
    }
    let version = place.run(&["--version"]).ok();
    assert!(version.contains(env!("CARGO_PKG_VERSION")) && version.contains("features: cli cpu"), "{version}");
    for verb in ["embed", "similarity", "export", "inspect", "bench", "doctor", "completions"] {
        let help = place.run(&[verb, "--help"]).ok();
        assert!(help.contains("Examples:"), "{verb}");
    }
}

/// A long stream takes no more memory than a short one, but for what the allocator keeps: far less than the texts and
/// vectors of the whole stream would take.
#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_input() {
    let place = Place::new();
    // Cut to four tokens: tokenising is the work.
    let line = format!("{}\n", "cat ".repeat(60));
    let peak = |lines: usize| -> u64 {
        place.put("lines.txt", line.repeat(lines));
        let mut child = place
            .command(&["embed", "-m", "model", "--backend", "cpu", "--max-tokens", "4", "-i", "lines.txt"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut peak = 0;
        let mut got = 0;
        for (i, row) in BufReader::new(child.stdout.take().unwrap()).lines().enumerate() {
            row.unwrap();
            got += 1;
            if i % 1000 == 999 {
                let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
                let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
                peak = line.and_then(|line| line.trim().strip_suffix("kB")).map_or(peak, |kb| kb.trim().parse().unwrap());
            }
        }
        assert!(child.wait().unwrap().success());
        assert_eq!(got, lines);
        peak * 1024
    };
    let short = peak(20_000);
    let long = peak(150_000);
    // The texts alone: 130 000 more lines of 240 bytes.
    let held = 130_000 * line.len() as u64;
    assert!(short > 0 && long < short + held / 2, "{short} {long} {held}");
}

#[cfg(not(feature = "tensorrt"))]
#[test]
fn build_says_what_this_binary_lacks() {
    Place::new().run(&["build", "-m", "model", "-o", "x.engine"]).fails(&["without TensorRT", "--features tensorrt"]);
}

/// What `build` finds wrong before it needs a GPU.
#[cfg(feature = "tensorrt")]
mod build {
    use super::*;

    #[track_caller]
    fn usage(place: &Place, args: &[&str], parts: &[&str]) {
        place.run(&[&["build"], args, &["-o", "x.engine"]].concat()).ends(2, parts);
        assert!(place.files().iter().all(|name| !name.contains("engine")), "{:?}", place.files());
    }

    #[test]
    fn wrong_arguments_are_usage_errors() {
        let place = Place::new();
        usage(&place, &[], &["--model"]);
        for (profile, part) in
            [("1x1:1x128", "MIN:OPT:MAX"), ("0x16", "batch 0"), ("2x8:1x16:4x32", "MIN <= OPT <= MAX"), ("many", "BATCHxLENGTH")]
        {
            usage(&place, &["-m", "model", "--profile", profile], &["--profile", part]);
        }
        usage(&place, &["-m", "model", "--bucket", "16"], &["--bucket", "BATCHxLENGTH"]);
        usage(&place, &["-m", "model", "--bucket", "1x1:1x8:1x16"], &["--bucket", "BATCHxLENGTH"]);
        usage(&place, &["-m", "model", "--workspace", "lots"], &["--workspace", "2GiB"]);
        usage(&place, &["-m", "model", "--opt-level", "6"], &["--opt-level", "6"]);
        usage(&place, &["-m", "model", "--min-cosine", "1.1"], &["--min-cosine", "0 to 1"]);
        usage(&place, &["-m", "model", "--min-cosine", "0.9", "--no-parity"], &["--min-cosine", "--no-parity"]);
        usage(&place, &["--onnx", "model/model.onnx", "--tanh-gelu"], &["--onnx", "--tanh-gelu"]);
        usage(&place, &["-m", "model", "--tanh-gelu=many"], &["--tanh-gelu", "many"]);
        usage(&place, &["-m", "model", "--reference", "r.json", "--no-parity"], &["--reference", "--no-parity"]);
        usage(&place, &["-m", "model", "--precision", "int4"], &["--precision", "[possible values: fp32, fp16, int8, auto]"]);
        place.run(&["build", "-m", "model", "--precision", "int8", "-o", "x.engine"]).fails(&["--calibration", "calibrate"]);
        place.run(&["build", "-m", "model"]).ends(2, &["--output"]);
        place.run(&["build", "-m", "model", "-o", "-"]).ends(2, &["-o", "stdout"]);
    }

    #[test]
    fn an_onnx_file_away_from_its_model_asks_for_one() {
        let place = Place::new();
        place.put("alone.onnx", b"x");
        usage(&place, &["--onnx", "alone.onnx"], &["alone.onnx", "-m"]);
        usage(&place, &["--onnx", "nowhere/alone.onnx"], &["nowhere/alone.onnx", "-m"]);
        // Beside the model, or in a folder of it, it needs none: what is asked next is the profile.
        std::fs::create_dir(place.path("model/onnx")).unwrap();
        for file in ["model/model.onnx", "model/onnx/model.onnx"] {
            place.put(file, b"x");
            place.run(&["build", "--onnx", file, "--bucket", "1x999", "-o", "x.engine"]).fails(&["1x999", "at most"]);
        }
    }

    #[test]
    fn what_the_model_cannot_give_is_said_first() {
        let place = Place::new();
        let build = |args: &[&str]| place.run(&[&["build", "-m", "model"], args].concat());
        build(&["--profile", "1x1:1x8:1x33", "-o", "x.engine"]).fails(&["--profile", "33", "32"]);
        build(&["-o", "no/such/x.engine"]).fails(&["no/such", "does not exist"]);
        build(&["-o", "model"]).fails(&["is a folder"]);
        build(&["-o", "x.engine", "--reference", "nowhere.json"]).fails(&["nowhere.json"]);
        place.put("r.json", br#"{"texts": ["a"], "vectors": [[0.5]]}"#);
        build(&["-o", "x.engine", "--reference", "r.json"]).fails(&["r.json", "1 values", "gpu_references.py"]);
        std::fs::remove_file(place.path("r.json")).unwrap();
        std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
        build(&["-o", "x.engine"]).fails(&["model.safetensors", "--no-parity"]);
        assert!(place.files().is_empty(), "{:?}", place.files());
    }
}
