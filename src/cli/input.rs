//! Texts from arguments, files and stdin, read in chunks of bounded size.

use super::Usage;
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};

/// The longest line that is read, in bytes: far above any model's limit, low enough that a file without line ends
/// (a binary one) is refused before it fills the memory.
const LONGEST_LINE: u64 = 16 << 20;
/// How much of a line that is left out is kept, in bytes.
const EXCERPT: usize = 1000;
/// Names of files that hold JSON Lines end in one of these, in any case.
pub const JSON_LINES: [&str; 2] = ["jsonl", "ndjson"];

/// Where the texts come from.
#[derive(Debug, Clone, clap::Args)]
pub struct InputArgs {
    /// Texts; without any (and without -i) they are read from stdin, one a line.
    #[arg(value_name = "TEXT", conflicts_with = "input")]
    pub texts: Vec<String>,
    /// File of texts, one a line (an empty line is an empty text); JSON Lines with a `text` field when its name ends in .jsonl or .ndjson; `-` is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// What the input's lines are; `auto` goes by the file's name.
    #[arg(long, env = "TRT_EMBED_INPUT_FORMAT", value_enum, default_value_t = InputFormat::Auto)]
    pub input_format: InputFormat,
}

/// `--input-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum InputFormat {
    /// JSON Lines when the name ends in .jsonl or .ndjson, else plain lines
    Auto,
    /// One text a line
    Lines,
    /// One JSON object a line, with a string field `text`
    Jsonl,
}

/// How much of the input is held at once.
#[derive(Debug, Clone, Copy)]
pub struct ChunkLimits {
    /// Most texts.
    pub texts: usize,
    /// Bytes of text after which a chunk is full (one text may exceed it).
    pub bytes: usize,
}

/// What becomes of a line that is no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OnError {
    /// It ends the run
    #[default]
    Fail,
    /// It is left out, counted and written down
    Skip,
}

/// A stream of texts. Its texts are numbered from 0, its lines from 1; every line is a text.
pub struct Texts {
    source: Source,
    /// Size of the input where it is a regular file: what a progress bar runs to.
    size: Option<u64>,
    on_error: OnError,
    /// A fault met while filling a chunk: raised after the texts before it were handed out.
    fault: Option<anyhow::Error>,
    /// Whether the end was met while filling the last chunk.
    ended: bool,
}

/// Texts that are held at once, in order.
#[derive(Debug, Default)]
pub struct Chunk {
    pub texts: Vec<String>,
    /// The number of each text, from 0.
    pub rows: Vec<u64>,
    /// The lines among them that are no texts, where they are skipped.
    pub faults: Vec<Fault>,
}

/// A line or text that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The number of the text, from 0.
    pub row: u64,
    /// What is wrong with it.
    pub reason: String,
    /// Its beginning; what is not UTF-8 is replaced.
    pub excerpt: String,
    /// How many bytes it has.
    pub bytes: u64,
}

/// How far an input was read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    pub lines: u64,
    pub bytes: u64,
    /// Of these bytes, in hexadecimal.
    pub sha256: String,
}

enum Source {
    Arguments { texts: std::vec::IntoIter<String>, row: u64 },
    Lines(Lines),
}

impl Chunk {
    /// Whether the input has ended.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty() && self.faults.is_empty()
    }

    /// Lines that were read.
    fn lines(&self) -> usize {
        self.texts.len() + self.faults.len()
    }
}

impl Fault {
    /// About the text or line `bytes`, the first of its `length` bytes.
    pub fn new(row: u64, reason: String, bytes: &[u8], length: u64) -> Self {
        let excerpt = String::from_utf8_lossy(&bytes[..bytes.len().min(EXCERPT)]).into_owned();
        Self { row, reason, excerpt, bytes: length }
    }
}

impl Texts {
    /// Opens the input that `args` name.
    ///
    /// # Errors
    /// A file that cannot be opened; nothing named while stdin is a terminal (usage).
    pub fn open(args: &InputArgs) -> Result<Self> {
        let of = |source, size| Self { source, size, on_error: OnError::Fail, fault: None, ended: false };
        let lines = |name: &str, reader: Box<dyn BufRead>, size| {
            let json = match args.input_format {
                InputFormat::Auto => Path::new(name)
                    .extension()
                    .is_some_and(|extension| JSON_LINES.iter().any(|known| extension.eq_ignore_ascii_case(known))),
                InputFormat::Lines => false,
                InputFormat::Jsonl => true,
            };
            of(Source::Lines(Lines::new(reader, name.to_owned(), json)), size)
        };
        match &args.input {
            None if !args.texts.is_empty() => Ok(of(Source::Arguments { texts: args.texts.clone().into_iter(), row: 0 }, None)),
            None if std::io::stdin().is_terminal() => {
                Err(Usage("no texts: name them as arguments, with -i FILE, or pipe them in".into()).into())
            }
            None => Ok(lines("stdin", Box::new(BufReader::new(std::io::stdin())), None)),
            Some(path) if path == Path::new("-") => Ok(lines("stdin", Box::new(BufReader::new(std::io::stdin())), None)),
            Some(path) => {
                let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
                let about = file.metadata().with_context(|| format!("cannot read {}", path.display()))?;
                if about.is_dir() {
                    bail!("cannot read {}: it is a folder; -i takes a file of texts", path.display());
                }
                let size = about.is_file().then_some(about.len());
                Ok(lines(&path.display().to_string(), Box::new(BufReader::with_capacity(1 << 16, file)), size))
            }
        }
    }

    /// The same texts, where lines that are none are treated as `on_error` says.
    pub fn on_error(self, on_error: OnError) -> Self {
        Self { on_error, ..self }
    }

    /// The next texts in order, as many as `limits` allow; none at the end.
    ///
    /// # Errors
    /// A line that cannot be read; unless such lines are skipped, one that is no text, with its number. The texts before it come first.
    pub fn next_chunk(&mut self, limits: ChunkLimits) -> Result<Chunk> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let mut chunk = Chunk::default();
        let mut bytes = 0;
        while chunk.lines() < limits.texts && bytes < limits.bytes {
            match self.next(&mut chunk) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(read) => bytes += read,
                Err(fault) if chunk.is_empty() => return Err(fault),
                Err(fault) => {
                    self.fault = Some(fault);
                    break;
                }
            }
        }
        Ok(chunk)
    }

    /// Whether the last chunk ended before it was full: at the end, or because the line after it is at fault.
    pub fn stopped(&self) -> bool {
        self.ended || self.fault.is_some()
    }

    /// Bytes of the input, where it is a regular file.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Bytes of the texts handed out so far.
    pub fn bytes_read(&self) -> u64 {
        match &self.source {
            Source::Arguments { .. } => 0,
            Source::Lines(lines) => lines.read.bytes,
        }
    }

    /// Where text number `row` (from 0) stands, as its user counts: `text 1`, `lines.txt: line 1`.
    pub fn place(&self, row: u64) -> String {
        let number = row.saturating_add(1);
        match &self.source {
            Source::Arguments { .. } => format!("text {number}"),
            Source::Lines(lines) => format!("{}: line {number}", lines.name),
        }
    }

    /// Whether every line is a JSON object.
    pub fn is_json(&self) -> bool {
        matches!(&self.source, Source::Lines(lines) if lines.json)
    }

    /// Hashes what is read from now on, for [`Texts::position`], after the part up to `position`, which must be as it was.
    ///
    /// # Errors
    /// The input cannot be read, or does not begin as the one that `position` was taken of.
    pub fn go_on(&mut self, position: &Position) -> Result<()> {
        let Source::Lines(lines) = &mut self.source else { return Ok(()) };
        lines.go_on(position)
    }

    /// How far texts were handed out.
    pub fn position(&self) -> Position {
        match &self.source {
            Source::Arguments { .. } => Position::default(),
            Source::Lines(lines) => lines.position(),
        }
    }

    /// Puts the next text into `chunk`, or the fault of its line, and gives its bytes; 0 at the end.
    fn next(&mut self, chunk: &mut Chunk) -> Result<usize> {
        match &mut self.source {
            Source::Arguments { texts, row } => {
                let Some(text) = texts.next() else { return Ok(0) };
                // An empty text counts, too.
                let bytes = text.len().max(1);
                chunk.texts.push(text);
                chunk.rows.push(*row);
                *row += 1;
                Ok(bytes)
            }
            Source::Lines(lines) => lines.next(self.on_error, chunk),
        }
    }
}

/// A reader of lines that knows where it is.
struct Lines {
    reader: Box<dyn BufRead>,
    /// What messages call the input.
    name: String,
    json: bool,
    /// The lines that were handed out or skipped, and their bytes.
    read: Position,
    /// Of these bytes, where someone wants to go on there.
    hash: Option<Sha256>,
    buffer: Vec<u8>,
}

impl Lines {
    fn new(reader: Box<dyn BufRead>, name: String, json: bool) -> Self {
        Self { reader, name, json, read: Position::default(), hash: None, buffer: Vec::new() }
    }

    /// Puts the text of the next line into `chunk`, or its fault, and gives the line's bytes; 0 at the end.
    fn next(&mut self, on_error: OnError, chunk: &mut Chunk) -> Result<usize> {
        self.buffer.clear();
        let mut line = self.reader.by_ref().take(LONGEST_LINE + 1);
        let bytes = line.read_until(b'\n', &mut self.buffer).with_context(|| format!("cannot read {}", self.name))?;
        if bytes == 0 {
            return Ok(0);
        }
        let row = self.read.lines;
        match text_of(&self.buffer, row == 0, self.json) {
            Err(reason) if on_error == OnError::Fail => bail!("{}: line {} {reason}", self.name, row + 1),
            Ok(text) => {
                chunk.texts.push(text);
                chunk.rows.push(row);
                self.count();
            }
            Err(reason) => {
                self.count();
                let rest = self.skip_rest()?;
                let line = without_end(&self.buffer);
                chunk.faults.push(Fault::new(row, reason, line, line.len() as u64 + rest));
            }
        }
        Ok(bytes)
    }

    /// Counts the line in the buffer as read.
    fn count(&mut self) {
        self.read.lines += 1;
        self.read.bytes += self.buffer.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(&self.buffer);
        }
    }

    /// Reads what follows the buffer up to the line's end without keeping it, and gives the number of these bytes.
    fn skip_rest(&mut self) -> Result<u64> {
        let mut length = 0;
        let mut ended = self.buffer.ends_with(b"\n");
        while !ended {
            let more = self.reader.fill_buf().with_context(|| format!("cannot read {}", self.name))?;
            if more.is_empty() {
                break;
            }
            let end = more.iter().position(|byte| *byte == b'\n');
            let bytes = end.map_or(more.len(), |end| end + 1);
            if let Some(hash) = &mut self.hash {
                hash.update(&more[..bytes]);
            }
            length += end.unwrap_or(bytes) as u64;
            ended = end.is_some();
            self.reader.consume(bytes);
            self.read.bytes += bytes as u64;
        }
        Ok(length)
    }

    fn go_on(&mut self, position: &Position) -> Result<()> {
        let changed = |what: String| {
            anyhow!(
                "{} is not what the interrupted run read: {what}; go on with that input, or leave --resume out to begin anew",
                self.name
            )
        };
        let mut hash = Sha256::new();
        let (mut read, mut last) = (0, b'\n');
        while read < position.bytes {
            let more = self.reader.fill_buf().with_context(|| format!("cannot read {}", self.name))?;
            if more.is_empty() {
                return Err(changed(format!("it has {read} bytes, of which {} were read", position.bytes)));
            }
            let bytes = more.len().min(usize::try_from(position.bytes - read).unwrap_or(usize::MAX));
            hash.update(&more[..bytes]);
            last = more[bytes - 1];
            self.reader.consume(bytes);
            read += bytes as u64;
        }
        if position.bytes > 0 && hex(&hash.clone().finalize()) != position.sha256 {
            return Err(changed(format!("its first {} lines ({} bytes) have changed", position.lines, position.bytes)));
        }
        if last != b'\n' && !self.reader.fill_buf().with_context(|| format!("cannot read {}", self.name))?.is_empty() {
            return Err(changed(format!("its line {}, then the last one, is longer now", position.lines)));
        }
        self.read = position.clone();
        self.hash = Some(hash);
        Ok(())
    }

    fn position(&self) -> Position {
        let sha256 = self.hash.as_ref().map(|hash| hex(&hash.clone().finalize())).unwrap_or_default();
        Position { sha256, ..self.read.clone() }
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `line` without what ends it.
fn without_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// The text that `line` is, or what is wrong with it.
fn text_of(line: &[u8], first: bool, json: bool) -> Result<String, String> {
    if line.len() as u64 > LONGEST_LINE {
        return Err(format!("is longer than {} MiB; is this a file of texts?", LONGEST_LINE >> 20));
    }
    let line = without_end(line);
    let line = std::str::from_utf8(line).map_err(|error| {
        let at = error.valid_up_to();
        let byte = line.get(at).copied().unwrap_or_default();
        format!("is not UTF-8 (byte 0x{byte:02X} at column {}); convert the file first", at + 1)
    })?;
    // Some editors put a byte order mark before the first line; it is no part of the text.
    let line = if first { line.strip_prefix('\u{feff}').unwrap_or(line) } else { line };
    if json { json_text(line) } else { Ok(line.to_owned()) }
}

/// The string field `text` of a JSON object, or what is wrong with `line`.
fn json_text(line: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Row<'a> {
        #[serde(borrow)]
        text: Cow<'a, str>,
    }
    if line.trim().is_empty() {
        return Err("is empty; every line of JSON Lines is a JSON object with a string field `text`".into());
    }
    let fault = match serde_json::from_str::<Row>(line) {
        // serde reads an array as a row too, field by field; the format is objects.
        Ok(row) if line.trim_start().starts_with('{') => return Ok(row.text.into_owned()),
        Ok(_) => None,
        Err(fault) => Some(fault),
    };
    Err(match serde_json::from_str::<serde_json::Value>(line) {
        Err(fault) => format!("is not JSON: {}", without_line(&fault)),
        Ok(serde_json::Value::Object(fields)) => match fields.get("text") {
            None => {
                let names: Vec<&str> = fields.keys().map(String::as_str).take(8).collect();
                format!("has no field `text` (its fields: {})", if names.is_empty() { "none".into() } else { names.join(", ") })
            }
            Some(serde_json::Value::String(_)) => match &fault {
                Some(fault) => format!("cannot be used: {}", without_line(fault)),
                None => "cannot be used".into(),
            },
            Some(other) => format!("has {} as its field `text`; a string is needed", kind(other)),
        },
        Ok(other) => format!("is {}; a JSON object with a string field `text` is needed", kind(&other)),
    })
}

/// serde_json counts lines within what it was given, always 1 here: only its column is of use.
fn without_line(fault: &serde_json::Error) -> String {
    fault.to_string().replace("at line 1 column", "at column")
}

fn kind(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "a boolean",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a string",
        serde_json::Value::Array(_) => "an array",
        serde_json::Value::Object(_) => "an object",
    }
}

#[cfg(test)]
#[path = "input_tests.rs"]
mod tests;
