//! Texts that cannot be embedded: how messages name them, and `--on-error skip`.

mod cli_model;
mod cli_place;

use cli_model::HIDDEN;
use cli_place::{Place, npy, numbered, rows};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Words that the model of [`broken`] chokes on: each in its own way.
const NO_ROW: &str = "stocks";
const NOT_FINITE: &str = "fell";
const NOT_KNOWN: &str = "\u{e9}\u{4e00}";

/// A model whose tokenizer gives [`NO_ROW`] an id beyond the table and refuses unknown characters, and whose table holds NaN for
/// [`NOT_FINITE`].
fn broken() -> Place {
    let place = Place::new();
    let path = place.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let row = usize::try_from(vocabulary[NOT_FINITE].as_u64().unwrap()).unwrap();
    vocabulary[NO_ROW] = json!(9999);
    tokenizer["model"]["unk_token"] = json!("[NONE]");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    // BERT's own class would make the unknown token anew.
    place.put("model/tokenizer_config.json", json!({"tokenizer_class": "PreTrainedTokenizerFast"}).to_string());

    let path = place.path("model/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let table = tensors.tensor("embeddings.word_embeddings.weight").unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    let at = table + row * HIDDEN * 4;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    place
}

#[track_caller]
fn side_file(place: &Place, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Who is asked for the same bits in every batch, and cannot promise it, says so.
#[test]
fn invariance_is_refused_by_other_backends() {
    let place = Place::new();
    place.embed(&["--invariant", "the cat"]).fails(&["--invariant", "only the backend `cuda`"]);
    let auto = place.run(&["embed", "-m", "model", "--invariant", "the cat"]);
    // Never the CPU in its place.
    auto.fails(&[if cfg!(feature = "cuda") { "driver" } else { "no CUDA kernels" }]);
}

#[test]
fn messages_name_lines_and_texts_from_1() {
    let place = broken();
    let parts = |word: &str| -> &'static str {
        match word {
            NO_ROW => "token id 9999 is outside the embedding table",
            NOT_FINITE => "NaN",
            _ => "the tokenizer refuses it: ",
        }
    };
    for word in [NO_ROW, NOT_FINITE, NOT_KNOWN] {
        // In the second chunk, too: a call's own numbers would begin again there.
        for good in [0usize, 2, 40] {
            let lines = "the cat\n".repeat(good) + word + "\nthe dog\n";
            place.put("lines.txt", &lines);
            let named = format!("lines.txt: line {}: ", good + 1);
            place.embed(&["-i", "lines.txt"]).fails(&[&named, parts(word)]);
            place.embed_with(&[], lines.as_bytes()).fails(&[&format!("stdin: line {}: ", good + 1), parts(word)]);
            place
                .run(&["similarity", "-m", "model", "--backend", "cpu", "--query", "cat", "-i", "lines.txt"])
                .fails(&[&named, parts(word)]);
            if word != NOT_FINITE {
                // Calibration does not look at vectors.
                place.run(&["calibrate", "-m", "model", "--backend", "cpu", "-i", "lines.txt"]).fails(&[&named, parts(word)]);
            }
        }
        place.embed(&["the cat", word]).fails(&["text 2: ", parts(word)]);
        let similar = ["similarity", "-m", "model", "--backend", "cpu", "--query"];
        place.run(&[&similar[..], &["cat", "the dog", "a mat", word]].concat()).fails(&["text 3: ", parts(word)]);
        place.run(&[&similar[..], &[word, "the dog"]].concat()).fails(&["the query: ", parts(word)]);
    }
    assert_eq!(place.files(), ["lines.txt"]);
}

#[test]
fn bad_lines_are_named_and_leave_nothing() {
    let place = Place::new();
    place.put("latin1.txt", b"fine\ncaf\xe9\n");
    place.put("broken.jsonl", "{\"text\":\"fine\"}\n{\"text\":\n");
    place.put("fields.jsonl", "{\"text\":\"fine\"}\n{\"body\":\"x\"}\n");
    let before = place.files();
    for (name, parts) in [
        ("latin1.txt", &["latin1.txt: line 2 is not UTF-8", "0xE9", "column 4"]),
        ("broken.jsonl", &["broken.jsonl: line 2 is not JSON", "EOF", "column 8"]),
        ("fields.jsonl", &["fields.jsonl: line 2 has no field `text`", "body", "trt-embed: "]),
    ] {
        for out in ["out.npy", "out.jsonl"] {
            place.embed(&["-i", name, "-o", out]).fails(parts);
            assert_eq!(place.files(), before);
        }
        let run = place.embed(&["-i", name]);
        run.fails(parts);
        assert_eq!(rows(std::str::from_utf8(&run.stdout).unwrap()).len(), 1, "the rows before the fault");
    }
    // What was there before stays.
    place.put("out.jsonl", "old");
    place.embed(&["-i", "latin1.txt", "-o", "out.jsonl"]).fails(&["line 2"]);
    assert_eq!(std::fs::read(place.path("out.jsonl")).unwrap(), b"old");
}

#[test]
fn skipped_lines_are_counted_and_written_down() {
    let place = broken();
    let lines = [
        "{\"text\":\"the cat\"}",
        "{\"text\":\"stocks fell\"}",
        "{\"body\":\"x\"}",
        "{\"text\":\"a fell dog\"}",
        "{\"text\":",
        "{\"text\":\"the mat\"}",
        "",
    ];
    let mut bytes = lines.join("\n").into_bytes();
    bytes.extend(b"\n\xff\xfe\n{\"text\":\"\\u00e9\\u4e00\"}\n{\"text\":\"\"}");
    place.put("in.ndjson", &bytes);
    let run = place.embed(&["-i", "in.ndjson", "-o", "out.jsonl", "--on-error", "skip"]);
    assert_eq!(run.stderr, "trt-embed: 7 of 10 lines were skipped; see out.jsonl.errors.jsonl\n");
    run.ok();
    let got = numbered(&std::fs::read_to_string(place.path("out.jsonl")).unwrap());
    assert_eq!(got.iter().map(|row| row.index).collect::<Vec<_>>(), [0, 5, 9]);
    // Each row is that of its own text.
    let alone = rows(&place.embed(&["the cat", "the mat", ""]).ok());
    for (row, alone) in got.iter().zip(&alone) {
        assert_eq!(row.tokens, alone.tokens);
        assert!(row.embedding.iter().zip(&alone.embedding).all(|(a, b)| (a - b).abs() < 1e-5));
    }
    let faults = side_file(&place, "out.jsonl.errors.jsonl");
    let expected = [
        (2, "token id 9999", "stocks fell", 11),
        (3, "has no field `text`", "{\"body\":\"x\"}", 12),
        (4, "NaN", "a fell dog", 10),
        (5, "is not JSON", "{\"text\":", 8),
        (7, "is empty", "", 0),
        (8, "is not UTF-8", "\u{fffd}\u{fffd}", 2),
        (9, "the tokenizer refuses it", NOT_KNOWN, 5),
    ];
    assert_eq!(faults.len(), expected.len());
    for (fault, (line, reason, text, bytes)) in faults.iter().zip(expected) {
        assert_eq!((&fault["line"], &fault["text"], &fault["bytes"]), (&line.into(), &text.into(), &bytes.into()));
        assert!(fault["reason"].as_str().unwrap().contains(reason), "{fault}");
    }
    // The K-th row of npy is the K-th line that was not skipped.
    place.embed(&["-i", "in.ndjson", "-o", "out.npy", "--on-error", "skip", "--errors", "bad.jsonl"]).ok();
    let (shape, array) = npy(&std::fs::read(place.path("out.npy")).unwrap());
    assert_eq!(shape, [3, HIDDEN as u64]);
    assert_eq!(array, cli_place::values(&got));
    assert_eq!(side_file(&place, "bad.jsonl"), faults);
    // Hidden states follow their rows.
    let hidden = numbered(&place.embed(&["-i", "in.ndjson", "--on-error", "skip", "--hidden-states"]).ok());
    assert_eq!(hidden.len(), 3);
    assert!(hidden.iter().all(|row| row.hidden_states.as_ref().unwrap().len() == row.tokens));
}

#[test]
fn many_bad_texts_among_many() {
    let place = broken();
    // Every 7th is bad, over several chunks.
    let text = |i: usize| if i % 7 == 3 { [NO_ROW, NOT_FINITE, NOT_KNOWN][i / 7 % 3].into() } else { format!("the cat {i}") };
    place.put("lines.txt", (0..2000).map(|i| text(i) + "\n").collect::<String>());
    let run = place.embed(&["-i", "lines.txt", "--on-error", "skip", "--errors", "bad.jsonl"]);
    assert_eq!(run.stderr, "trt-embed: 286 of 2000 lines were skipped; see bad.jsonl\n");
    let got = numbered(&run.ok());
    assert_eq!(got.iter().map(|row| row.index).collect::<Vec<_>>(), (0..2000).filter(|i| i % 7 != 3).collect::<Vec<_>>());
    let lines: Vec<u64> = side_file(&place, "bad.jsonl").iter().map(|fault| fault["line"].as_u64().unwrap()).collect();
    assert_eq!(lines, (0..2000).filter(|i| i % 7 == 3).map(|i| i + 1).collect::<Vec<_>>());
}

#[test]
fn skipping_to_stdout_names_the_first_lines() {
    let place = broken();
    let run = place.embed(&["--on-error", "skip", "the cat", "stocks", "the dog"]);
    assert!(run.stderr.starts_with("trt-embed: skipped: text 2: token id 9999"), "{}", run.stderr);
    assert!(run.stderr.ends_with("trt-embed: 1 of 3 lines was skipped\n"), "{}", run.stderr);
    assert_eq!(numbered(&run.ok()).iter().map(|row| row.index).collect::<Vec<_>>(), [0, 2]);
    let run = place.embed_with(&["--on-error", "skip"], ("stocks\n".repeat(50) + "cat\n").as_bytes());
    assert_eq!(run.stderr.matches("skipped: stdin: line ").count(), 10, "{}", run.stderr);
    assert!(run.stderr.contains("--errors FILE"), "{}", run.stderr);
    assert_eq!(numbered(&run.ok())[0].index, 50);
}

#[test]
fn a_long_line_is_skipped_whole() {
    let place = Place::new();
    let mut bytes = b"the cat\n".to_vec();
    bytes.extend(vec![b'x'; 17 << 20]);
    bytes.extend(b"\nthe dog\n");
    place.put("lines.txt", &bytes);
    place.embed(&["-i", "lines.txt", "-o", "out.jsonl"]).fails(&["lines.txt: line 2 is longer than 16 MiB"]);
    place.embed(&["-i", "lines.txt", "-o", "out.jsonl", "--on-error", "skip"]).ok();
    let got = numbered(&std::fs::read_to_string(place.path("out.jsonl")).unwrap());
    assert_eq!(got.iter().map(|row| row.index).collect::<Vec<_>>(), [0, 2]);
    let faults = side_file(&place, "out.jsonl.errors.jsonl");
    assert_eq!((faults.len(), &faults[0]["bytes"], &faults[0]["line"]), (1, &(17 << 20).into(), &2.into()));
    assert_eq!(faults[0]["text"].as_str().unwrap().len(), 1000);
}

#[test]
fn where_all_lines_are_bad_it_is_not_the_lines() {
    let place = broken();
    place.put("lines.txt", "stocks\nfell\n");
    let args = ["-i", "lines.txt", "-o", "out.npy", "--on-error", "skip"];
    place.embed(&args).fails(&["all 2 lines were skipped", "out.npy.errors.jsonl"]);
    assert_eq!(place.files(), ["lines.txt", "out.npy.errors.jsonl"]);
    place.embed(&[&args[..], &["--resume"]].concat()).fails(&["all 2 lines were skipped"]);
    assert_eq!(place.files(), ["lines.txt", "out.npy.errors.jsonl"]);
    // No lines are no bad lines.
    place.put("lines.txt", "");
    place.embed(&args).ok();
    assert_eq!(side_file(&place, "out.npy.errors.jsonl"), Vec::<Value>::new());
}

#[test]
fn what_does_not_go_together() {
    let place = Place::new();
    place.embed(&["--errors", "e.jsonl", "cat"]).ends(2, &["--errors", "--on-error skip"]);
    place.embed(&["--on-error", "skip", "-o", "x.jsonl", "--errors", "./x.jsonl", "cat"]).ends(2, &["--errors", "x.jsonl"]);
    place.embed(&["--on-error", "skip", "--errors", "no/such/e.jsonl", "cat"]).fails(&["--errors", "no/such", "does not exist"]);
    place.embed(&["--on-error", "ignore", "cat"]).ends(2, &["--on-error", "fail", "skip"]);
    assert!(place.files().is_empty());
}

#[test]
fn both_names_of_json_lines_are_known_in_any_case() {
    let place = Place::new();
    for name in ["a.ndjson", "a.NDJSON", "a.jsonl", "a.JsonL"] {
        place.put(name, "{\"text\":\"the cat\"}\n");
        assert_eq!(rows(&place.embed(&["-i", name]).ok())[0].tokens, 4, "{name}");
        place.embed(&["-i", name, "-o", name]).ok();
        assert_eq!(rows(&std::fs::read_to_string(place.path(name)).unwrap()).len(), 1, "{name}");
    }
    // Others are plain lines.
    place.put("a.json", "{\"text\":\"the cat\"}\n");
    assert!(rows(&place.embed(&["-i", "a.json"]).ok())[0].tokens > 4);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_with_what_to_do() {
    let place = Place::new();
    for format in ["jsonl", "npy"] {
        place.embed(&["-o", "/dev/full", "-f", format, "cat"]).fails(&["cannot write /dev/full", "No space left", "make room"]);
    }
    place.embed(&["-o", "/proc/no-file-here.jsonl", "cat"]).fails(&["cannot write /proc/no-file-here.jsonl"]);
}
