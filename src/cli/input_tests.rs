//! Tests of the text readers.

use super::*;
use proptest::prelude::*;

fn reader(bytes: &[u8], json: bool) -> Texts {
    let reader = Box::new(std::io::Cursor::new(bytes.to_vec()));
    Texts {
        source: Source::Lines(Lines::new(reader, "in".into(), json)),
        size: None,
        on_error: OnError::Fail,
        fault: None,
        ended: false,
    }
}

fn all(bytes: &[u8], json: bool, limits: ChunkLimits) -> (Vec<String>, Option<String>) {
    let mut texts = reader(bytes, json);
    let mut got = Vec::new();
    loop {
        match texts.next_chunk(limits) {
            Ok(chunk) if chunk.is_empty() => return (got, None),
            Ok(chunk) => {
                assert!(chunk.lines() <= limits.texts && chunk.faults.is_empty());
                assert_eq!(chunk.rows, (got.len() as u64..).take(chunk.texts.len()).collect::<Vec<_>>());
                got.extend(chunk.texts);
            }
            Err(fault) => return (got, Some(fault.to_string())),
        }
    }
}

const LIMITS: ChunkLimits = ChunkLimits { texts: 2, bytes: 1 << 20 };

#[test]
fn line_ends_and_empty_lines() {
    let (texts, fault) = all("\u{feff}a\r\n\r\n\nb \nlast".as_bytes(), false, LIMITS);
    assert_eq!(texts, ["a", "", "", "b ", "last"]);
    assert_eq!(fault, None);
    assert_eq!(all(b"", false, LIMITS), (vec![], None));
    assert_eq!(all(b"\n", false, LIMITS), (vec![String::new()], None));
}

#[test]
fn the_texts_before_a_bad_line_come_first() {
    let (texts, fault) = all(b"one\ntwo\nthree\nba\xffd\n", false, LIMITS);
    assert_eq!(texts, ["one", "two", "three"]);
    assert_eq!(fault.as_deref(), Some("in: line 4 is not UTF-8 (byte 0xFF at column 3); convert the file first"));
}

#[test]
fn a_line_without_end_is_refused_before_it_fills_the_memory() {
    let limit = usize::try_from(LONGEST_LINE).unwrap();
    let (_, fault) = all(&vec![b'x'; limit + 10], false, LIMITS);
    assert!(fault.unwrap().contains("line 1 is longer than 16 MiB"));
    let (texts, fault) = all(&vec![b'x'; limit - 1], false, LIMITS);
    assert_eq!((texts[0].len(), fault), (limit - 1, None));
}

#[test]
fn json_lines() {
    let (texts, fault) = all(b"{\"text\":\"a\"}\r\n{\"id\":1,\"text\":\"b\\n\\u00e9\"}", true, LIMITS);
    assert_eq!((texts, fault), (vec!["a".to_owned(), "b\né".to_owned()], None));
}

#[test]
fn json_faults_say_what_was_found() {
    for (line, expected) in [
        ("{\"text\": \"a\"", "is not JSON: EOF while parsing an object at column 12"),
        ("{\"txt\": \"a\", \"id\": 1}", "has no field `text` (its fields: id, txt)"),
        ("{}", "has no field `text` (its fields: none)"),
        ("{\"text\": 7}", "has a number as its field `text`; a string is needed"),
        ("{\"text\": \"a\", \"text\": \"b\"}", "cannot be used: duplicate field `text` at column"),
        ("[\"text\"]", "is an array; a JSON object with a string field `text` is needed"),
        ("", "is empty;"),
    ] {
        let (texts, fault) = all(format!("{{\"text\":\"ok\"}}\n{line}\n").as_bytes(), true, LIMITS);
        assert_eq!(texts, ["ok"]);
        let fault = fault.unwrap();
        assert!(fault.starts_with(&format!("in: line 2 {expected}")), "{fault}");
    }
}

proptest! {
    #[test]
    fn any_bytes_give_texts_or_a_numbered_fault(bytes in proptest::collection::vec(any::<u8>(), 0..200), json: bool, texts in 1usize..5, cap in 1usize..50) {
        let (_, fault) = all(&bytes, json, ChunkLimits { texts, bytes: cap });
        if let Some(fault) = fault {
            prop_assert!(fault.starts_with("in: line "), "{}", fault);
        }
    }

    #[test]
    fn chunks_join_to_the_lines(lines in proptest::collection::vec("[^\\r\\n\u{feff}]{0,20}", 0..40), texts in 1usize..5, cap in 1usize..50) {
        let file: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
        let (got, fault) = all(file.as_bytes(), false, ChunkLimits { texts, bytes: cap });
        prop_assert_eq!(fault, None);
        prop_assert_eq!(got, lines);
    }

    #[test]
    fn any_string_survives_json(text in ".{0,40}") {
        let line = serde_json::json!({ "text": text }).to_string();
        prop_assert_eq!(json_text(&line), Ok(text));
    }
}
