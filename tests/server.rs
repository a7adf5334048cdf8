//! The server over loopback on tiny models: every route gives the library's vectors bit for bit, in TEI's and OpenAI's forms.

mod cli_model;
mod server_client;

use base64::Engine;
use serde_json::{Value, json};
use server_client::{PATIENCE, Running, read, rows, served, start, until};
use std::io::{Read, Write};
use std::sync::LazyLock;
use std::time::Duration;
use tempfile::TempDir;
use trt_embed::server::{Address, Ended, ServeError, Served, Server, Settings};
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Normalize, Similarity};

const BERT: &str = "tests/fixtures/bert";
const LONG: &str = "the cat sat on the mat the dog ran on the mat stocks fell the red cat sat on the blue mat the dog sat";

static TINY: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    cli_model::write(folder.path());
    folder
});

fn tiny_folder() -> &'static str {
    TINY.path().to_str().unwrap()
}

/// The library with the first model.
fn tiny() -> EmbedderBuilder {
    library(tiny_folder())
}

/// As [`served`] has it.
fn library(folder: &str) -> EmbedderBuilder {
    Embedder::builder(folder).backend(BackendChoice::Cpu).batch_size(1)
}

/// A server of `tiny` and, as another model, `bert`.
fn server(change: impl FnOnce(&mut Settings)) -> Running {
    let mut settings = Settings::default();
    change(&mut settings);
    start(vec![served("tiny", tiny_folder()), served("bert", BERT)], settings)
}

#[track_caller]
fn vectors(builder: EmbedderBuilder, texts: &[&str]) -> Vec<Vec<f32>> {
    builder.build().unwrap().embed(texts).unwrap().rows().map(<[f32]>::to_vec).collect()
}

#[test]
fn embed_gives_the_librarys_vectors() {
    let server = server(|_| {});
    let embed = |body: Value| rows(&server.post("/embed", &body).ok());
    let unit = || tiny().normalize(Normalize::On);
    let texts = ["the cat sat", "a red dog", "stocks fell."];
    assert_eq!(embed(json!({ "inputs": "the cat sat" })), vectors(unit(), &texts[..1]));
    assert_eq!(embed(json!({ "inputs": texts })), vectors(unit(), &texts));
    assert_eq!(embed(json!({ "inputs": texts, "normalize": false })), vectors(tiny().normalize(Normalize::Off), &texts));
    assert_eq!(embed(json!({ "inputs": texts, "dimensions": 3 })), vectors(unit().dim(3), &texts));
    let cut = tiny().normalize(Normalize::Off).dim(3);
    assert_eq!(embed(json!({ "inputs": texts, "dimensions": 3, "normalize": false })), vectors(cut, &texts));
    assert_eq!(embed(json!({ "inputs": "cat", "prompt_name": "query" })), vectors(unit().prompt_name("query"), &["cat"]));
    assert_eq!(embed(json!({ "inputs": "cat", "model": "bert" })), vectors(library(BERT).normalize(Normalize::On), &["cat"]));
    // Keys that are not known are passed over, and null means the default.
    let nulls = json!({ "inputs": "cat", "truncate": null, "prompt_name": null, "dimensions": null, "raw_scores": false });
    assert_eq!(embed(nulls), vectors(unit(), &["cat"]));
    for path in ["/", "/invocations"] {
        assert_eq!(rows(&server.post(path, &json!({ "inputs": texts })).ok()), vectors(unit(), &texts), "{path}");
    }
    let instances = json!({ "instances": [{ "inputs": "cat" }, { "inputs": texts, "dimensions": 3 }] });
    let predictions = server.post("/vertex", &instances).ok();
    assert_eq!(rows(&predictions["predictions"][0]), vectors(unit(), &["cat"]));
    assert_eq!(rows(&predictions["predictions"][1]), vectors(unit().dim(3), &texts));
}

#[test]
fn texts_that_share_batches_have_the_librarys_vectors() {
    let model = Served { names: vec!["bert".into()], builder: Embedder::builder(BERT).backend(BackendChoice::Cpu) };
    let server = start(vec![model], Settings::default());
    let texts: Vec<String> =
        (1..=32).map(|words| vec!["the cat sat on a mat"; words % 7 + 1].join(" ") + &".".repeat(words)).collect();
    let expected: Vec<&str> = texts.iter().map(String::as_str).collect();
    let expected = vectors(library(BERT).normalize(Normalize::On), &expected);
    let got = rows(&server.post("/embed", &json!({ "inputs": texts })).ok());
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(&expected) {
        // Sums are ordered otherwise: unit vectors of 40 values, some tens of roundings.
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 100.0 * f32::EPSILON), "{got:?} {expected:?}");
    }
}

#[test]
fn long_texts_are_cut_at_the_end_that_is_asked_for_or_refused() {
    let server = server(|_| {});
    let embed = |body: Value| rows(&server.post("/embed", &body).ok());
    let unit = || tiny().normalize(Normalize::On);
    let library = vectors(unit(), &[LONG]);
    assert_eq!(embed(json!({ "inputs": LONG })), library);
    assert_eq!(embed(json!({ "inputs": LONG, "truncate": true, "truncation_direction": "Right" })), library);
    // All words are one token each; two special tokens go around them.
    let words: Vec<&str> = LONG.split(' ').collect();
    let end = words[words.len() - (cli_model::MAX_TOKENS - 2)..].join(" ");
    let left = embed(json!({ "inputs": LONG, "truncation_direction": "left" }));
    assert_eq!(left, vectors(unit(), &[&end]));
    assert_ne!(left, library);
    let refused = server.post("/embed", &json!({ "inputs": ["cat", LONG], "truncate": false }));
    assert_eq!(refused.status, 422);
    assert_eq!(refused.json()["error_type"], "Validation");
    assert!(refused.json()["error"].as_str().unwrap().contains("index 1 (from 0) has more than 24 tokens"), "{}", refused.json());
    // A text that just fits is not too long.
    let fits = words[..cli_model::MAX_TOKENS - 2].join(" ");
    assert_eq!(embed(json!({ "inputs": fits, "truncate": false })), vectors(unit(), &[&fits]));
}

#[test]
fn token_ids_are_used_as_they_are() {
    let server = server(|_| {});
    let embedder = tiny().normalize(Normalize::On).build().unwrap();
    let expected = |rows: &[&[u32]]| -> Vec<Vec<f32>> { embedder.embed_ids(rows).unwrap().rows().map(<[f32]>::to_vec).collect() };
    let embed = |inputs: Value| rows(&server.post("/embed", &json!({ "inputs": inputs })).ok());
    assert_eq!(embed(json!([2, 8, 9, 3])), expected(&[&[2, 8, 9, 3]]));
    assert_eq!(embed(json!([[2, 8, 3], [7, 9, 11, 12]])), expected(&[&[2, 8, 3], &[7, 9, 11, 12]]));
    let openai = server.post("/v1/embeddings", &json!({ "input": [[2, 8, 3]], "model": "tiny" })).ok();
    assert_eq!(rows(&json!([openai["data"][0]["embedding"]])), expected(&[&[2, 8, 3]]));
    let mixed = embed(json!(["the cat", [2, 8, 9, 3]]));
    let [text, ids] = mixed.as_slice() else { panic!("{mixed:?}") };
    assert_eq!((text.len(), ids), (cli_model::HIDDEN, &expected(&[&[2, 8, 9, 3]])[0]));
}

#[test]
fn embed_all_gives_every_tokens_state() {
    let server = server(|_| {});
    let texts = ["the cat sat", "dog"];
    let states = tiny().build().unwrap().hidden_states(&texts).unwrap();
    let answer = server.post("/embed_all", &json!({ "inputs": texts })).ok();
    for (answer, states) in answer.as_array().unwrap().iter().zip(&states) {
        assert_eq!(rows(answer).concat(), states.values);
        assert_eq!(answer.as_array().unwrap().len(), states.tokens);
    }
    assert_eq!(answer.as_array().unwrap().len(), 2);
    let limited = start(vec![served("tiny", tiny_folder())], {
        let mut settings = Settings::default();
        settings.max_response_values = 5 * cli_model::HIDDEN;
        settings
    });
    assert_eq!(limited.post("/embed_all", &json!({ "inputs": "the cat sat" })).status, 200);
    let refused = limited.post("/embed_all", &json!({ "inputs": "the cat sat on" }));
    assert_eq!(refused.status, 422);
    assert!(refused.json()["error"].as_str().unwrap().contains("would have 48 numbers, at most 40"), "{}", refused.json());
}

#[test]
fn similarity_is_the_cosine() {
    let server = server(|_| {});
    let all = vectors(tiny().normalize(Normalize::On), &["the cat", "the cat", "a dog ran", "stocks fell"]);
    let expected: Vec<f32> = all[1..].iter().map(|vector| Similarity::Cosine.score(&all[0], vector)).collect();
    let body = json!({ "inputs": { "source_sentence": "the cat", "sentences": ["the cat", "a dog ran", "stocks fell"] } });
    assert_eq!(rows(&json!([server.post("/similarity", &body).ok()])), [expected]);
    let empty = json!({ "inputs": { "source_sentence": "the cat", "sentences": [] } });
    assert_eq!(server.post("/similarity", &empty).status, 400);
    let cut = json!({ "inputs": { "source_sentence": LONG, "sentences": ["a"] }, "parameters": { "truncate": false } });
    assert_eq!(server.post("/similarity", &cut).status, 422);
}

#[test]
fn tokens_are_shown_and_put_together_again() {
    let server = server(|_| {});
    let tokens = server.post("/tokenize", &json!({ "inputs": "The caté" })).ok();
    let token = |id: u32, text: &str, place: Option<(usize, usize)>| json!({ "id": id, "text": text, "special": place.is_none(), "start": place.map(|p| p.0), "stop": place.map(|p| p.1) });
    // The accent is stripped by the normaliser; its place in the text is two bytes long.
    let expected = [
        token(2, "[CLS]", None),
        token(7, "The", Some((0, 3))),
        token(8, "cat", Some((4, 7))),
        token(28, "é", Some((7, 9))),
        token(3, "[SEP]", None),
    ];
    assert_eq!(tokens, json!([expected]));
    // The ids are those that the library embeds.
    let ids: Vec<u64> = tokens[0].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).collect();
    let embed = |inputs: Value| rows(&server.post("/embed", &json!({ "inputs": inputs })).ok());
    assert_eq!(embed(json!([ids])), embed(json!(["The caté"])));
    let bare = server.post("/tokenize", &json!({ "inputs": ["cat", "dog"], "add_special_tokens": false })).ok();
    assert_eq!(bare, json!([[token(8, "cat", Some((0, 3)))], [token(9, "dog", Some((0, 3)))]]));
    let prompted = server.post("/tokenize", &json!({ "inputs": "cat", "prompt_name": "query" })).ok();
    assert_eq!(prompted[0][3], token(8, "cat", Some((7, 10))));
    assert_eq!(server.post("/decode", &json!({ "ids": [2, 7, 8, 3] })).ok(), json!(["the cat"]));
    let whole = server.post("/decode", &json!({ "ids": [[2, 7, 8, 3], [9]], "skip_special_tokens": false })).ok();
    assert_eq!(whole, json!(["[CLS] the cat [SEP]", "dog"]));
    let beyond = server.post("/decode", &json!({ "ids": [[8], [9999]] }));
    assert_eq!((beyond.status, beyond.json()["error_type"].clone()), (422, json!("Validation")));
}

#[test]
fn openais_route_answers_in_openais_form() {
    let server = server(|_| {});
    let texts = ["the cat sat", "dog"];
    let expected = vectors(tiny().normalize(Normalize::On), &texts);
    for path in ["/v1/embeddings", "/embeddings"] {
        let answer = server.post(path, &json!({ "input": texts, "model": "tiny", "user": "u" })).ok();
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("tiny")));
        assert_eq!(answer["usage"], json!({ "prompt_tokens": 8, "total_tokens": 8 }));
        for (index, (entry, expected)) in answer["data"].as_array().unwrap().iter().zip(&expected).enumerate() {
            assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
            assert_eq!(&rows(&json!([entry["embedding"]]))[0], expected);
        }
    }
    let encoded = |format: &str| server.post("/v1/embeddings", &json!({ "input": "dog", "encoding_format": format })).ok();
    let base64 = encoded("base64")["data"][0]["embedding"].as_str().unwrap().to_owned();
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64).unwrap();
    let floats: Vec<f32> = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    assert_eq!(floats, vectors(tiny().normalize(Normalize::On), &["dog"])[0]);
    let bits = floats.iter().fold(0u8, |bits, &value| bits << 1 | u8::from(value > 0.0));
    assert_eq!(encoded("ubinary")["data"][0]["embedding"], json!([bits]));
    assert_eq!(encoded("binary")["data"][0]["embedding"], json!([i16::from(bits) - 128]));
    let short = server.post("/v1/embeddings", &json!({ "input": "dog", "dimensions": 3 })).ok();
    assert_eq!(rows(&json!([short["data"][0]["embedding"]])), vectors(tiny().normalize(Normalize::On).dim(3), &["dog"]));
    let models = server.get("/v1/models").ok();
    let names: Vec<&Value> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(names, ["tiny", "bert"]);
}

#[test]
fn the_description_tells_what_routes_answer() {
    let server = start(vec![served("tiny", tiny_folder())], Settings::default());
    let document = server.get("/openapi.json").ok();
    assert_eq!(document, server.get("/api-doc/openapi.json").ok());
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let page = server.get("/docs");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, route) in methods.as_object().unwrap() {
            let schema = &route["requestBody"]["content"]["application/json"]["schema"];
            let answer = match method.as_str() {
                "get" => server.get(path),
                _ => server.post(path, &described(&document, schema)["example"]),
            };
            assert_eq!(answer.status, 200, "{method} {path}: {}", String::from_utf8_lossy(&answer.body));
            let content = route["responses"]["200"]["content"].as_object();
            let Some((kind, told)) = content.and_then(|content| content.iter().next()) else { continue };
            assert!(answer.header("content-type").unwrap().starts_with(kind.as_str()), "{path}");
            if kind == "application/json" {
                conforms(&document, &told["schema"], &answer.json(), path);
            }
        }
    }
    // Errors, in both forms.
    for (path, status) in [("/embed", "422"), ("/v1/embeddings", "422")] {
        let answer = server.post(path, &json!({}));
        let told = described(&document, &document["paths"][path]["post"]["responses"][status]);
        conforms(&document, &told["content"]["application/json"]["schema"], &answer.json(), path);
    }
}

/// `part`, or what it refers to.
fn described<'a>(document: &'a Value, part: &'a Value) -> &'a Value {
    part["$ref"].as_str().map_or(part, |pointer| document.pointer(&pointer[1..]).unwrap())
}

/// Whether `value` has the type and exactly the keys that the schema tells.
#[track_caller]
fn conforms(document: &Value, schema: &Value, value: &Value, place: &str) {
    let schema = described(document, schema);
    if let Some(choices) = schema["oneOf"].as_array() {
        assert!(choices.iter().any(|choice| choice["type"] == kind_of(value)), "{place}: {value}");
        return;
    }
    let kinds = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
    if !schema["type"].is_null() {
        let is_integer = kind_of(value) == "number" && kinds.contains(&json!("integer")) && value.is_u64();
        assert!(is_integer || kinds.contains(&json!(kind_of(value))), "{place}: {value} is no {kinds:?}");
    }
    if let Some(items) = value.as_array() {
        items.iter().for_each(|item| conforms(document, &schema["items"], item, place));
    }
    if let (Some(known), Some(object)) = (schema["properties"].as_object(), value.as_object()) {
        assert_eq!(known.keys().collect::<Vec<_>>(), object.keys().collect::<Vec<_>>(), "{place}");
        known.iter().for_each(|(key, schema)| conforms(document, schema, &object[key], &format!("{place} {key}")));
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The same fault on both kinds of routes: its status, `error_type`, and OpenAI's `type` and `code`.
struct Fault {
    what: &'static str,
    /// `INPUT` stands for the key of the inputs.
    body: Vec<u8>,
    headers: Vec<(&'static str, &'static str)>,
    status: u16,
    native: &'static str,
    openai: (&'static str, &'static str),
    says: &'static str,
}

#[test]
fn bad_input_is_answered_in_both_dialects() {
    let server = server(|settings| settings.payload_limit = 20_000);
    const INVALID: &str = "invalid_request_error";
    let fault = |what, body: &str, status, native, code, says| Fault {
        what,
        body: body.as_bytes().to_vec(),
        headers: vec![],
        status,
        native,
        openai: (INVALID, code),
        says,
    };
    let validation = |what, body, says| fault(what, body, 422, "Validation", "invalid_value", says);
    let malformed = |what, body, says| fault(what, body, 400, "Validation", "invalid_json", says);
    let empty = |what, body| fault(what, body, 400, "Empty", "empty_input", "cannot be empty");
    let many = json!({ "INPUT": vec!["a"; 33] }).to_string();
    let deep = format!("{{\"INPUT\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let large = json!({ "INPUT": "a".repeat(20_000) }).to_string();
    let row: Vec<u32> = vec![8; cli_model::MAX_TOKENS + 1];
    let long_row = json!({ "INPUT": [row] }).to_string();
    let faults = [
        empty("no inputs", r#"{"INPUT": []}"#),
        empty("an empty text", r#"{"INPUT": ["a", ""]}"#),
        empty("an empty row of ids", r#"{"INPUT": [[]]}"#),
        validation("too many inputs", &many, "batch size 33 > maximum allowed batch size 32"),
        validation("an id beyond the vocabulary", r#"{"INPUT": [[2, 5000]]}"#, "token id 5000"),
        validation("an id beyond 32 bits", r#"{"INPUT": [4294967296]}"#, "a token id"),
        validation("a row that is too long", &long_row, "25 ids; 1 to 24"),
        validation("a number", r#"{"INPUT": 1}"#, "a string, a list of token ids"),
        validation("a list of numbers and texts", r#"{"INPUT": ["a", 1]}"#, "a list of inputs"),
        validation("no inputs at all", "{}", "missing field"),
        validation("another kind of body", "[1]", "not what this route takes"),
        validation("a wrong type", r#"{"INPUT": "a", "dimensions": "3"}"#, "usize"),
        validation("a negative number", r#"{"INPUT": "a", "dimensions": -1}"#, "usize"),
        validation("no dimensions", r#"{"INPUT": "a", "dimensions": 0}"#, "1 to 8"),
        validation("too many dimensions", r#"{"INPUT": "a", "dimensions": 9}"#, "1 to 8"),
        validation("an unknown prompt", r#"{"INPUT": "a", "prompt_name": "nosuch"}"#, "query"),
        validation("a prompt before ids", r#"{"INPUT": [2, 8], "prompt_name": "query"}"#, "token ids"),
        fault(
            "an unknown model",
            r#"{"INPUT": "a", "model": "nosuch"}"#,
            404,
            "Validation",
            "model_not_found",
            "`nosuch` does not exist",
        ),
        malformed("half a body", r#"{"INPUT": "#, "not JSON"),
        malformed("no body", "", "not JSON"),
        malformed("a lone surrogate", r#"{"INPUT": "\ud800"}"#, "not JSON"),
        malformed("what is behind the body", r#"{"INPUT": "a"} x"#, "not JSON"),
        fault("nested too deep", &deep, 422, "Validation", "invalid_value", "invalid type"),
        fault("a body that is too large", &large, 413, "Validation", "payload_too_large", "more than 20000 bytes"),
        Fault { body: b"{\"INPUT\": \"\xff\"}".to_vec(), ..malformed("bytes that are no UTF-8", "", "not UTF-8") },
        Fault {
            headers: vec![("content-type", "text/plain")],
            ..fault("another content type", r#"{"INPUT": "a"}"#, 415, "Validation", "unsupported_media_type", "text/plain")
        },
        Fault {
            headers: vec![("content-encoding", "gzip")],
            ..fault("a packed body", r#"{"INPUT": "a"}"#, 415, "Validation", "unsupported_media_type", "gzip")
        },
        Fault {
            headers: vec![("x-priority", "high")],
            ..validation("an unknown class", r#"{"INPUT": "a"}"#, "interactive and bulk")
        },
    ];
    for Fault { what, body, headers, status, native, openai, says } in faults {
        for (path, key) in [("/embed", "inputs"), ("/embed_all", "inputs"), ("/v1/embeddings", "input")] {
            if path == "/embed_all" && String::from_utf8_lossy(&body).contains("dimensions") {
                continue; // It has no such key.
            }
            let body = replace(&body, b"INPUT", key.as_bytes());
            let answer = server.post_with(path, &headers, &body);
            let json = answer.json();
            assert_eq!(answer.status, status, "{what} at {path}: {json}");
            let message = if key == "input" {
                let error = &json["error"];
                assert_eq!((&error["type"], &error["code"]), (&json!(openai.0), &json!(openai.1)), "{what}: {json}");
                assert!(error.as_object().unwrap().contains_key("param"), "{what}: {json}");
                &error["message"]
            } else {
                assert_eq!(json["error_type"], native, "{what}: {json}");
                &json["error"]
            };
            assert!(message.as_str().unwrap().contains(says), "{what} at {path}: {json}");
        }
    }
    // Nothing of it was held against the others.
    assert_eq!(server.post("/embed", &json!({ "inputs": "cat" })).status, 200);
}

fn replace(body: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    match body.windows(from.len()).position(|window| window == from) {
        Some(place) => [&body[..place], to, &body[place + from.len()..]].concat(),
        None => body.to_vec(),
    }
}

#[test]
fn texts_that_cannot_be_tokens_or_are_too_long_are_refused_in_both_dialects() {
    let mut settings = Settings::default();
    settings.auto_truncate = false;
    // Its positions are counted by the padding token, which a text may not have in it.
    let server = start(vec![served("mpnet", "tests/fixtures/mpnet")], settings);
    let long = "cat ".repeat(1000);
    for (text, error_type, code, says) in [
        ("<pad>", "Tokenizer", "tokenizer", "padding token"),
        (&long, "Validation", "invalid_value", "index 1 (from 0) has more than"),
    ] {
        let native = server.post("/embed", &json!({ "inputs": ["cat", text] }));
        assert_eq!((native.status, native.json()["error_type"].as_str()), (422, Some(error_type)), "{}", native.json());
        assert!(native.json()["error"].as_str().unwrap().contains(says), "{}", native.json());
        let openai = server.post("/v1/embeddings", &json!({ "input": ["cat", text] }));
        let error = openai.json()["error"].clone();
        assert_eq!((openai.status, error["code"].as_str()), (422, Some(code)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    assert_eq!(server.post("/embed", &json!({ "inputs": ["cat", "dog"] })).status, 200);
}

#[test]
fn deep_json_takes_no_stack() {
    let server = server(|_| {});
    let deep = format!("{}1{}", "[".repeat(500_000), "]".repeat(500_000));
    // Where nobody looks it is passed over, as TEI does.
    for (path, key, status) in
        [("/embed", "x", 200), ("/embed", "inputs", 422), ("/tokenize", "inputs", 400), ("/decode", "ids", 400)]
    {
        let body = format!("{{\"{key}\": {deep}, \"{}\": \"a\"}}", if key == "x" { "inputs" } else { "x" });
        assert_eq!(server.post_with(path, &[], body.as_bytes()).status, status, "{key} of {path}");
    }
}

#[test]
fn what_one_dialect_alone_can_ask_wrongly() {
    let server = server(|_| {});
    let refused = server.post("/v1/embeddings", &json!({ "input": "a", "encoding_format": "hex" }));
    assert_eq!(refused.status, 422);
    assert_eq!(refused.json()["error"]["param"], "encoding_format");
    // Ranges of one request's values would make vectors that cannot be compared with another's.
    for format in ["int8", "uint8"] {
        let refused = server.post("/v1/embeddings", &json!({ "input": "a", "encoding_format": format }));
        assert_eq!(refused.status, 422);
        assert!(refused.json()["error"]["message"].as_str().unwrap().contains("calibrated ranges"), "{}", refused.json());
    }
    assert_eq!(server.post("/embed", &json!({ "inputs": "a", "truncation_direction": "up" })).status, 422);
    assert_eq!(server.post("/vertex", &json!({ "instances": [] })).status, 400);
    let many = json!({ "instances": vec![json!({ "inputs": ["a", "b", "c"] }); 11] });
    assert_eq!(server.post("/vertex", &many).status, 422);
    for (path, status) in [("/nosuch", 404), ("/embed", 405)] {
        let answer = server.get(path);
        assert_eq!(answer.status, status);
        assert!(answer.json()["error"].is_string());
    }
    assert_eq!(server.get("/v1/embeddings").json()["error"]["code"], "method_not_supported");
    assert_eq!(server.get("/v1/nosuch").json()["error"]["code"], "unknown_url");
}

#[test]
fn a_key_opens_all_but_what_probes_need() {
    let server = server(|settings| settings.api_keys = vec!["first".into(), "second".into()]);
    let post = |headers: &[(&str, &str)]| server.post_with("/embed", headers, br#"{"inputs": "a"}"#).status;
    assert_eq!(post(&[]), 401);
    for wrong in ["Bearer third", "Bearer firs", "Bearer first2", "Bearer ", "Basic first", ""] {
        assert_eq!(post(&[("authorization", wrong)]), 401, "{wrong:?}");
    }
    for right in ["Bearer first", "Bearer second", "bearer second", "first"] {
        assert_eq!(post(&[("authorization", right)]), 200, "{right:?}");
    }
    for path in ["/", "/health", "/health/live", "/health/ready", "/ping", "/metrics"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    for path in ["/info", "/v1/models", "/nosuch"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    let openai = server.post("/v1/embeddings", &json!({ "input": "a" }));
    assert_eq!((openai.status, openai.json()["error"]["code"].clone()), (401, json!("invalid_api_key")));
    // Long before the body is looked at.
    assert_eq!(server.post_with("/embed", &[("content-type", "text/plain")], b"\xff").status, 401);
}

#[test]
fn what_the_server_tells_of_itself() {
    let server = server(|_| {});
    let info = server.get("/info").ok();
    assert_eq!(info["model_id"], tiny_folder());
    assert_eq!(info["model_type"], json!({ "embedding": { "pooling": "mean" } }));
    assert_eq!(info["max_input_length"], cli_model::MAX_TOKENS);
    assert_eq!((&info["max_concurrent_requests"], &info["max_client_batch_size"]), (&json!(512), &json!(32)));
    assert_eq!((&info["auto_truncate"], &info["version"]), (&json!(true), &json!(env!("CARGO_PKG_VERSION"))));
    assert_eq!(server.get("/info?model=bert").ok()["dimensions"], 40);
    assert_eq!(server.get("/info?model=nosuch").status, 404);
    let answer = server.post_with("/embed", &[("x-request-id", "mine")], br#"{"inputs": ["the cat", "dog"]}"#);
    assert_eq!(answer.header("x-request-id"), Some("mine"));
    assert_eq!((answer.header("x-compute-tokens"), answer.header("x-compute-characters")), (Some("7"), Some("10")));
    for name in ["x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"] {
        answer.header(name).unwrap_or_else(|| panic!("no {name}")).parse::<u64>().unwrap();
    }
    let first = server.post("/embed", &json!({ "inputs": "a" }));
    let second = server.post("/embed", &json!({ "inputs": "a" }));
    assert_ne!(first.header("x-request-id"), second.header("x-request-id"));
    server.post("/embed", &json!({ "inputs": [] }));
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    for line in [
        "te_request_count{method=\"batch\"} 2",
        "te_request_success{method=\"batch\"} 1",
        "te_request_count{method=\"single\"} 2",
        "te_request_success{method=\"single\"} 2",
        "te_request_failure{err=\"empty\"} 1",
        "te_embed_count 4",
        "te_embed_success 4",
        "te_embed_duration_count 4",
        "te_embed_tokenization_duration_count 4",
        "te_embed_queue_duration_count 4",
        "te_embed_inference_duration_count 4",
        "te_request_duration_count 3",
        "te_request_tokenization_duration_count 3",
        "te_request_queue_duration_count 3",
        "te_request_inference_duration_count 3",
        "te_request_input_length_count 4",
        "te_queue_size 0",
        "trt_embed_queue_wait_seconds_count{class=\"interactive\",model=\"tiny\"} 4",
        "te_batch_next_size_sum 4",
        "te_batch_next_tokens_sum 13",
        "trt_embed_model_ready{model=\"tiny\"} 1",
        "trt_embed_active_requests 0",
    ] {
        assert!(metrics.lines().any(|known| known == line), "no {line} in\n{metrics}");
    }
    for name in ["trt_embed_tokens", "trt_embed_run_tokens", "trt_embed_batches", "trt_embed_device_seconds_sum"] {
        assert!(metrics.contains(&format!("{name}{{model=\"tiny\"}} ")), "no {name} in\n{metrics}");
    }
}

#[test]
fn pages_of_other_origins_may_read_where_they_are_named() {
    let head = |origin: &str| {
        format!(
            "OPTIONS /embed HTTP/1.1\r\nhost: a\r\nconnection: close\r\norigin: {origin}\r\naccess-control-request-method: POST\r\n\r\n"
        )
    };
    let all = server(|settings| settings.api_keys = vec!["k".into()]);
    assert_eq!(all.send(&head("http://a.b"), b"").header("access-control-allow-origin"), Some("*"));
    let some = server(|settings| settings.cors_allow_origin = vec!["http://a.b".into()]);
    assert_eq!(some.send(&head("http://a.b"), b"").header("access-control-allow-origin"), Some("http://a.b"));
    assert_eq!(some.send(&head("http://c.d"), b"").header("access-control-allow-origin"), None);
}

/// A request whose body is not all there: it is under way, and waits.
fn half_sent(server: &Running, body: &str) -> std::net::TcpStream {
    let mut stream = server.connect();
    let head =
        format!("POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&body.as_bytes()[..1]).unwrap();
    until(|| active(server) > 0);
    stream
}

fn active(server: &Running) -> u64 {
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    let line = metrics.lines().find_map(|line| line.strip_prefix("trt_embed_active_requests "));
    line.unwrap().parse().unwrap()
}

#[test]
fn beyond_its_limits_the_server_says_so_at_once() {
    let server = server(|settings| settings.max_concurrent_requests = 1);
    let body = r#"{"inputs": "the cat"}"#;
    let mut first = half_sent(&server, body);
    for (path, kind) in [("/embed", "Overloaded"), ("/tokenize", "Overloaded")] {
        let refused = server.post(path, &json!({ "inputs": "dog" }));
        assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
        assert_eq!(refused.json()["error_type"], kind);
    }
    let refused = server.post("/v1/embeddings", &json!({ "input": "dog" }));
    assert_eq!((refused.status, refused.json()["error"]["type"].clone()), (429, json!("rate_limit_error")));
    assert_eq!(server.get("/health").status, 200);
    // What was let in is answered.
    first.write_all(&body.as_bytes()[1..]).unwrap();
    assert_eq!(rows(&read(&mut first).ok()), vectors(tiny().normalize(Normalize::On), &["the cat"]));
    until(|| active(&server) == 0);
    assert_eq!(server.post("/embed", &json!({ "inputs": "dog" })).status, 200);
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    assert!(metrics.contains("trt_embed_rejected{reason=\"concurrent_requests\"} 3"), "{metrics}");
}

#[test]
fn a_client_that_goes_away_gives_its_place_back() {
    let server = server(|settings| settings.max_concurrent_requests = 1);
    let first = half_sent(&server, r#"{"inputs": "the cat"}"#);
    drop(first);
    until(|| active(&server) == 0);
    assert_eq!(server.post("/embed", &json!({ "inputs": "dog" })).status, 200);
}

#[test]
fn a_request_that_can_never_be_queued_is_told_so() {
    let server = server(|settings| settings.max_queue_tokens = 8);
    assert_eq!(server.post("/embed", &json!({ "inputs": "the cat sat" })).status, 200);
    let refused = server.post("/embed", &json!({ "inputs": ["the cat sat", "the cat sat"] }));
    assert_eq!(refused.status, 422);
    assert!(refused.json()["error"].as_str().unwrap().contains("10 tokens, and at most 8"), "{}", refused.json());
}

#[test]
fn slow_clients_are_cut_off() {
    let server = server(|settings| {
        settings.header_timeout = Duration::from_millis(200);
        settings.body_timeout = Duration::from_millis(200);
    });
    // Half a header, and none: the connection ends, whatever is said before.
    for part in ["POST /embed HTTP/1.1\r\nhost:", ""] {
        let mut stream = server.connect();
        stream.write_all(part.as_bytes()).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(!rest.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&rest));
    }
    let mut stream = half_sent(&server, r#"{"inputs": "the cat"}"#);
    let answer = read(&mut stream);
    assert_eq!(answer.status, 408);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "the connection stayed open");
    // Headers that never end.
    let mut stream = server.connect();
    stream.write_all(b"GET /health HTTP/1.1\r\n").unwrap();
    let flood = (0..5000).try_for_each(|number| stream.write_all(format!("x-{number}: {}\r\n", "a".repeat(100)).as_bytes()));
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    assert!(flood.is_err() || said.is_empty() || said.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn connections_beyond_the_limit_are_told_and_closed() {
    let server = server(|settings| settings.max_connections = 1);
    let mut kept = server.connect();
    kept.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert_eq!(read(&mut kept).status, 200);
    let mut stream = server.connect();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 503 "), "{said}");
    drop(kept);
    until(|| {
        let mut stream = server.connect();
        let _ = stream.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        said.starts_with("HTTP/1.1 200 ")
    });
}

#[test]
fn a_server_that_is_stopped_ends_what_is_under_way() {
    let server = server(|_| {});
    let body = r#"{"inputs": "the cat"}"#;
    let mut first = half_sent(&server, body);
    server.handle.stop();
    assert!(!server.handle.is_ready());
    let ready = server.get("/health/ready");
    assert_eq!((ready.status, ready.json()["error_type"].clone()), (503, json!("Unhealthy")));
    assert_eq!(server.get("/health/live").status, 200);
    let refused = server.post("/embed", &json!({ "inputs": "dog" }));
    assert_eq!((refused.status, refused.header("connection")), (503, Some("close")));
    assert!(!server.has_ended());
    first.write_all(&body.as_bytes()[1..]).unwrap();
    assert_eq!(rows(&read(&mut first).ok()), vectors(tiny().normalize(Normalize::On), &["the cat"]));
    assert_eq!(server.stop(), Ended::Drained);
}

#[test]
fn what_does_not_end_in_time_is_cut_off() {
    let server = server(|settings| settings.shutdown_timeout = Duration::from_millis(100));
    let _first = half_sent(&server, r#"{"inputs": "the cat"}"#);
    assert_eq!(server.stop(), Ended::Cut { requests: 1 });
}

#[test]
fn a_unix_socket_serves_and_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    // What a killed server leaves is no hindrance.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = Server::bind(&[Address::Unix(path.clone())], vec![served("tiny", tiny_folder())], Settings::default()).unwrap();
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.run());
    until(|| handle.is_ready());
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert_eq!(read(&mut stream).status, 200);
    // A server that lives keeps its socket.
    let second = Server::bind(&[Address::Unix(path.clone())], vec![served("tiny", tiny_folder())], Settings::default());
    assert!(matches!(second, Err(ServeError::Bind { .. })));
    handle.stop();
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Drained);
    assert!(!path.exists());
}

#[test]
fn servers_that_cannot_be_are_refused() {
    let bind = |models, settings| Server::bind(&[], models, settings).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(bind(vec![], Settings::default()).contains("needs a model"));
    let twice = vec![served("a", BERT), served("a", BERT)];
    assert!(bind(twice, Settings::default()).contains("two models are called a"));
    let mut settings = Settings::default();
    settings.max_concurrent_requests = 0;
    assert!(bind(vec![served("a", BERT)], settings).contains("0 requests"));
    let mut settings = Settings::default();
    settings.api_keys = vec![String::new()];
    assert!(bind(vec![served("a", BERT)], settings).contains("key is empty"));
    let missing =
        Server::bind(&[], vec![served("tiny", tiny_folder()), served("gone", "tests/fixtures/nosuch")], Settings::default());
    let error = missing.unwrap().run().unwrap_err();
    assert!(matches!(&error, ServeError::Load { name, .. } if name == "gone"), "{error}");
}
