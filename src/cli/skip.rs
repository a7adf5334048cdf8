//! Texts that cannot be embedded: which of a call's texts it is, and where those that are left out are written down.

use super::input::{Fault, OnError, Texts};
use super::output::{OutputFile, Target, reason};
use super::{Usage, message, say};
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use trt_embed::Error;

/// What is wrong with one text, where `error` is about one: the index that the error gives, and the reason without it.
pub fn text_fault(error: &Error) -> Option<(usize, String)> {
    match error {
        Error::TokenId { id, text, vocab_size } => Some((
            *text,
            format!(
                "token id {id} is outside the embedding table of {vocab_size} rows; do tokenizer.json and the weights belong together?"
            ),
        )),
        Error::NotFinite { text, component, value } => Some((
            *text,
            format!(
                "its vector holds {value} (value {} of it); the weights are damaged or overflow in this precision",
                component + 1
            ),
        )),
        Error::Text { text, reason } => Some((*text, format!("the tokenizer refuses it: {reason}"))),
        _ => None,
    }
}

/// Whether `error` may be about a single text; any other ends a run.
pub fn is_about_texts(error: &Error) -> bool {
    text_fault(error).is_some() || matches!(error, Error::OutsideProfile { .. })
}

/// Why a text that was run alone cannot be used.
pub fn reason_alone(error: &Error) -> String {
    text_fault(error).map_or_else(|| message::of(error), |(_, reason)| reason)
}

/// `error` of a call with `texts`, which stand at `rows` of `input`, with the place of the text that it is about. `call` is that call, with
/// some of the texts.
pub fn placed(
    error: Error,
    input: &Texts,
    texts: &[String],
    rows: &[u64],
    call: impl Fn(&[String]) -> trt_embed::Result<()>,
) -> anyhow::Error {
    let found = match text_fault(&error) {
        Some(found) => Some(found),
        None if is_about_texts(&error) => first_fault(texts, call),
        None => None,
    };
    match found.and_then(|(index, reason)| Some((rows.get(index)?, reason))) {
        Some((&row, reason)) => anyhow!("{}: {reason}", input.place(row)),
        None => error.into(),
    }
}

/// The first of `texts` that `call` fails on, as it does on all together, and why.
fn first_fault(texts: &[String], call: impl Fn(&[String]) -> trt_embed::Result<()>) -> Option<(usize, String)> {
    let (mut first, mut texts) = (0, texts);
    while texts.len() > 1 {
        let (left, right) = texts.split_at(texts.len() / 2);
        if call(left).is_err() {
            texts = left;
        } else {
            (first, texts) = (first + left.len(), right);
        }
    }
    call(texts).err().map(|error| (first, reason_alone(&error)))
}

/// The lines that a run leaves out.
pub struct Skipped {
    on_error: OnError,
    side: Option<SideFile>,
    /// How many there were.
    pub count: u64,
}

/// Where they are written down.
struct SideFile {
    lines: BufWriter<Box<dyn Write>>,
    /// What is completed at the end; none for a stream.
    file: Option<OutputFile>,
    path: PathBuf,
}

/// One line of the side file.
#[derive(Serialize)]
struct Line<'a> {
    /// From 1.
    line: u64,
    reason: &'a str,
    /// The beginning.
    text: &'a str,
    /// Of the whole.
    bytes: u64,
}

/// How many lines are named on stderr where there is no side file.
const SAID: u64 = 10;

impl Skipped {
    /// Opens the side file: `errors`, else `OUTPUT.errors.jsonl` beside an `output` that is a file; it is `growing` with it.
    ///
    /// # Errors
    /// As [`Target::open`]; a side file that nothing would be written to (usage).
    pub fn open(on_error: OnError, errors: Option<&Path>, output: &Target, growing: bool) -> Result<Self> {
        if on_error == OnError::Fail {
            return match errors {
                Some(_) => Err(Usage("--errors goes with --on-error skip".into()).into()),
                None => Ok(Self { on_error, side: None, count: 0 }),
            };
        }
        let path = match (errors, output) {
            (Some(path), Target::File { path: output, .. }) if is_same(path, output) => {
                return Err(Usage(format!("--errors: {} is the output already", path.display())).into());
            }
            (Some(path), _) => Some(path.to_owned()),
            (None, Target::File { path, .. }) => {
                let mut path = path.as_os_str().to_owned();
                path.push(".errors.jsonl");
                Some(path.into())
            }
            (None, Target::Stream { .. }) => None,
        };
        let side = path.map(|path| SideFile::open(path, growing)).transpose()?;
        Ok(Self { on_error, side, count: 0 })
    }

    /// Whether lines are left out at all.
    pub fn allowed(&self) -> bool {
        self.on_error == OnError::Skip
    }

    /// The side file.
    pub fn path(&self) -> Option<&Path> {
        self.side.as_ref().map(|side| side.path.as_path())
    }

    /// Goes on behind `count` lines, which take the first `bytes` of the side file.
    ///
    /// # Errors
    /// The side file cannot be written, or holds less.
    pub fn go_on(&mut self, count: u64, bytes: u64) -> Result<()> {
        self.count = count;
        match self.side.as_mut().map(|side| (&mut side.file, &side.path)) {
            Some((Some(OutputFile::Growing(file)), path)) => super::resume::cut(file, path, bytes),
            _ => Ok(()),
        }
    }

    /// Writes down a line that is left out.
    ///
    /// # Errors
    /// The side file cannot be written.
    pub fn note(&mut self, fault: &Fault, input: &Texts) -> Result<()> {
        self.count += 1;
        let Some(SideFile { lines, path, .. }) = &mut self.side else {
            if self.count <= SAID {
                say(&format!("skipped: {}: {}", input.place(fault.row), fault.reason));
            }
            if self.count == SAID {
                say("skipped lines are not named any more; --errors FILE keeps all of them");
            }
            return Ok(());
        };
        let line = Line { line: fault.row + 1, reason: &fault.reason, text: &fault.excerpt, bytes: fault.bytes };
        let written = serde_json::to_writer(&mut *lines, &line).map_err(std::io::Error::from);
        written.and_then(|()| lines.write_all(b"\n")).map_err(|error| reason(&path.display(), &error))
    }

    /// Waits until what was noted is on the disk, and gives the side file's bytes; 0 without one.
    ///
    /// # Errors
    /// The side file cannot be written.
    pub fn sync(&mut self) -> Result<u64> {
        let Some(SideFile { lines, file, path }) = &mut self.side else { return Ok(0) };
        lines.flush().map_err(|error| reason(&path.display(), &error))?;
        file.as_mut().map_or(Ok(0), OutputFile::sync)
    }

    /// Leaves what is written so far to a later run.
    pub fn keep(&mut self) {
        if let Some(SideFile { file: Some(OutputFile::Growing(file)), .. }) = &mut self.side {
            file.keep();
        }
    }

    /// Completes the side file and says how many of `lines` are in it.
    ///
    /// # Errors
    /// The side file cannot be written; all lines were skipped, so that it is not the lines that are wrong.
    pub fn finish(mut self, lines: u64) -> Result<()> {
        self.sync()?;
        let mut place = String::new();
        if let Some(SideFile { file, path, .. }) = self.side {
            if let Some(file) = file {
                file.commit()?;
            }
            place = format!("; see {}", path.display());
        }
        match self.count {
            0 => Ok(()), // also of an input without lines
            count if count == lines => {
                Err(anyhow!("all {lines} lines were skipped{place}: is this the right input, and the right model?"))
            }
            count => {
                say(&format!("{count} of {lines} lines {} skipped{place}", if count == 1 { "was" } else { "were" }));
                Ok(())
            }
        }
    }
}

/// Whether both paths name one file, which need not exist.
fn is_same(a: &Path, b: &Path) -> bool {
    let whole = |path: &Path| {
        let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        path.canonicalize().ok().or_else(|| Some(folder.canonicalize().ok()?.join(path.file_name()?)))
    };
    whole(a).is_some_and(|a| Some(a) == whole(b))
}

impl SideFile {
    fn open(path: PathBuf, growing: bool) -> Result<Self> {
        let context = || "the file of --errors";
        let (lines, file): (Box<dyn Write>, _) = match Target::open(Some(&path), growing).with_context(context)? {
            Target::Stream { to, .. } => (to, None),
            Target::File { mut file, .. } => (Box::new(file.handle().with_context(context)?), Some(file)),
        };
        Ok(Self { lines: BufWriter::new(lines), file, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_about_a_text_are_told_from_others() {
        let token = Error::TokenId { id: 7, text: 3, vocab_size: 5 };
        assert_eq!(text_fault(&token).unwrap().0, 3);
        let nan = Error::NotFinite { text: 2, component: 0, value: f32::NAN };
        assert!(text_fault(&nan).unwrap().1.contains("NaN (value 1 of it)"));
        let refused = Error::Text { text: 0, reason: "no [UNK]".into() };
        assert!(is_about_texts(&refused));
        assert!(!is_about_texts(&Error::Tokenizer { reason: "tokenizer.json: damaged".into() }));
        assert_eq!(reason_alone(&refused), "the tokenizer refuses it: no [UNK]");
        assert!(!is_about_texts(&Error::Backend { backend: "cpu", reason: String::new() }));
    }
}
