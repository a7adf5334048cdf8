//! Texts from arguments, files and stdin, read in chunks of bounded size.

use super::Usage;
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::Deserialize;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};

/// The longest line that is read, in bytes: far above any model's limit, low enough that a file without line ends
/// (a binary one) is refused before it fills the memory.
const LONGEST_LINE: u64 = 16 << 20;

/// Where the texts come from.
#[derive(Debug, Clone, clap::Args)]
pub struct InputArgs {
    /// Texts; without any (and without -i) they are read from stdin, one a line.
    #[arg(value_name = "TEXT", conflicts_with = "input")]
    pub texts: Vec<String>,
    /// File of texts, one a line (an empty line is an empty text); JSON Lines with a `text` field when its name ends in .jsonl; `-` is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// What the input's lines are; `auto` goes by the file's name.
    #[arg(long, env = "TRT_EMBED_INPUT_FORMAT", value_enum, default_value_t = InputFormat::Auto)]
    pub input_format: InputFormat,
}

/// `--input-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum InputFormat {
    /// JSON Lines when the name ends in .jsonl, else plain lines
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

/// A stream of texts.
pub struct Texts {
    source: Source,
    /// Size of the input where it is a file: what a progress bar runs to.
    size: Option<u64>,
    /// Bytes read so far.
    read: u64,
    /// A fault met while filling a chunk: raised after the texts before it were handed out.
    fault: Option<anyhow::Error>,
}

enum Source {
    Arguments(std::vec::IntoIter<String>),
    Lines(Lines),
}

impl Texts {
    /// Opens the input that `args` name.
    ///
    /// # Errors
    /// A file that cannot be opened; nothing named while stdin is a terminal (usage).
    pub fn open(args: &InputArgs) -> Result<Self> {
        let lines = |name: &str, reader: Box<dyn BufRead>, size| {
            let json = match args.input_format {
                InputFormat::Auto => name.to_ascii_lowercase().ends_with(".jsonl"),
                InputFormat::Lines => false,
                InputFormat::Jsonl => true,
            };
            let lines = Lines { reader, name: name.to_owned(), json, line: 0, buffer: Vec::new() };
            Self { source: Source::Lines(lines), size, read: 0, fault: None }
        };
        match &args.input {
            None if !args.texts.is_empty() => {
                Ok(Self { source: Source::Arguments(args.texts.clone().into_iter()), size: None, read: 0, fault: None })
            }
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

    /// The next texts in order, as many as `limits` allow; none at the end.
    ///
    /// # Errors
    /// A line that cannot be read or is no text, with its number. The texts before it come first.
    pub fn next_chunk(&mut self, limits: ChunkLimits) -> Result<Vec<String>> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let mut chunk = Vec::new();
        let mut bytes = 0;
        while chunk.len() < limits.texts && bytes < limits.bytes {
            match self.next() {
                Ok(Some(text)) => {
                    bytes += text.len();
                    chunk.push(text);
                }
                Ok(None) => break,
                Err(fault) if chunk.is_empty() => return Err(fault),
                Err(fault) => {
                    self.fault = Some(fault);
                    break;
                }
            }
        }
        Ok(chunk)
    }

    /// Bytes of the input, where known.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.read
    }

    fn next(&mut self) -> Result<Option<String>> {
        match &mut self.source {
            Source::Arguments(texts) => Ok(texts.next()),
            Source::Lines(lines) => {
                let (text, bytes) = lines.next()?;
                self.read += bytes;
                Ok(text)
            }
        }
    }
}

/// A reader of lines that knows where it is.
struct Lines {
    reader: Box<dyn BufRead>,
    /// What messages call the input.
    name: String,
    json: bool,
    /// Number of the line read last, from 1.
    line: u64,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next text (none at the end) and the bytes that its line took.
    fn next(&mut self) -> Result<(Option<String>, u64)> {
        self.buffer.clear();
        let mut line = self.reader.by_ref().take(LONGEST_LINE + 1);
        let bytes = line.read_until(b'\n', &mut self.buffer).with_context(|| format!("cannot read {}", self.name))? as u64;
        if bytes == 0 {
            return Ok((None, 0));
        }
        self.line += 1;
        if bytes > LONGEST_LINE {
            return Err(self.fault(format!("is longer than {} MiB; is this a file of texts?", LONGEST_LINE >> 20)));
        }
        let line = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line = match std::str::from_utf8(line) {
            Ok(line) => line,
            Err(error) => {
                let at = error.valid_up_to();
                let byte = line.get(at).copied().unwrap_or_default();
                return Err(self.fault(format!("is not UTF-8 (byte 0x{byte:02X} at column {}); convert the file first", at + 1)));
            }
        };
        // Some editors put a byte order mark before the first line; it is no part of the text.
        let line = if self.line == 1 { line.strip_prefix('\u{feff}').unwrap_or(line) } else { line };
        if !self.json {
            return Ok((Some(line.to_owned()), bytes));
        }
        match json_text(line) {
            Ok(text) => Ok((Some(text), bytes)),
            Err(reason) => Err(self.fault(reason)),
        }
    }

    fn fault(&self, reason: String) -> anyhow::Error {
        anyhow!("{}: line {} {reason}", self.name, self.line)
    }
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
