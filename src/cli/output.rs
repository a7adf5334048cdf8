//! Where rows go: JSON Lines and NumPy writers, to stdout or to a file that appears whole or not at all.

use super::Usage;
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use npyz::{NpyWriter, WriteOptions, WriterBuilder};
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, IsTerminal, Seek, Write};
use std::path::{Path, PathBuf};
use trt_embed::files::AtomicFile;
use trt_embed::{Embeddings, HiddenStates};

/// The reader of stdout went away (`| head`): the end of the run, not a fault.
#[derive(Debug)]
pub struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the reader of the output went away")
    }
}

impl std::error::Error for ReaderGone {}

/// `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One JSON object a text: {"index":0,"tokens":7,"embedding":[…]}
    Jsonl,
    /// NumPy array, float32, [texts, dim]
    Npy,
}

/// A place for output, opened before any work is done.
pub enum Target {
    /// Stdout, or a device or pipe named by `-o`: written as it goes.
    Stream { to: Box<dyn Write>, name: String },
    /// A regular file: appears when it is complete.
    File { file: AtomicFile, path: PathBuf },
}

impl Target {
    /// Opens `path`, or stdout where there is none or it is `-`.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written to; `path` is a folder.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path.filter(|path| *path != Path::new("-")) else {
            return Ok(Self::Stream { to: Box::new(std::io::stdout()), name: "stdout".into() });
        };
        let cannot = || format!("cannot write {}", path.display());
        let existing = match std::fs::metadata(path) {
            Ok(about) => Some(about),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(cannot),
        };
        let path = match &existing {
            Some(about) if about.is_dir() => bail!("{}: it is a folder; -o takes a file", cannot()),
            // A device or a named pipe is written to, never replaced.
            Some(about) if !about.is_file() => {
                let to = File::options().write(true).open(path).with_context(cannot)?;
                return Ok(Self::Stream { to: Box::new(to), name: path.display().to_string() });
            }
            // Through a link, to the file that it names.
            Some(_) => path.canonicalize().with_context(cannot)?,
            None => path.to_owned(),
        };
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            Some(_) => Path::new("."),
            None => bail!("{}: it names no file", cannot()),
        };
        if path.file_name().is_none() {
            bail!("{}: it names no file", cannot());
        }
        if !folder.is_dir() {
            bail!("{}: the folder {} does not exist; make it first", cannot(), folder.display());
        }
        let mut file = AtomicFile::create(&path)?;
        if let Some(about) = existing {
            if about.permissions().readonly() {
                bail!("{}: the file is read-only", cannot());
            }
            file.file()?.set_permissions(about.permissions()).with_context(cannot)?;
        }
        Ok(Self::File { file, path })
    }

    /// Whether rows reach the terminal.
    pub fn is_stdout(&self) -> bool {
        matches!(self, Self::Stream { name, .. } if name == "stdout")
    }
}

/// Writes rows in order.
pub enum RowWriter {
    JsonLines { rows: BufWriter<Box<dyn Write>>, end: End },
    Npy { rows: NpyWriter<f32, BufWriter<File>>, end: End },
}

/// What is left to do when all rows are written.
pub enum End {
    /// Nothing: the rows went straight to the stream.
    Stream { name: String },
    /// The file gets its name.
    Commit { file: AtomicFile, path: PathBuf },
    /// The spool file is copied to the stream: a .npy header holds the number of rows, and a stream cannot go back.
    Copy { spool: File, to: Box<dyn Write>, name: String },
}

/// One line of JSON Lines output.
#[derive(Serialize)]
struct Row<'a> {
    index: u64,
    tokens: u32,
    embedding: &'a [f32],
    #[serde(skip_serializing_if = "Option::is_none")]
    hidden_states: Option<Vec<&'a [f32]>>,
}

impl RowWriter {
    /// Begins the output of vectors of `dim` values.
    ///
    /// # Errors
    /// The file or the spool cannot be written; binary output to a terminal (usage).
    pub fn begin(format: Format, target: Target, dim: usize) -> Result<Self> {
        match (format, target) {
            (Format::Jsonl, Target::Stream { to, name }) => {
                Ok(Self::JsonLines { rows: BufWriter::with_capacity(1 << 16, to), end: End::Stream { name } })
            }
            (Format::Jsonl, Target::File { mut file, path }) => {
                let to: Box<dyn Write> = Box::new(handle(&mut file, &path)?);
                Ok(Self::JsonLines { rows: BufWriter::with_capacity(1 << 16, to), end: End::Commit { file, path } })
            }
            (Format::Npy, target) => {
                if target.is_stdout() && std::io::stdout().is_terminal() {
                    return Err(Usage("npy is binary and stdout is a terminal; name a file with -o or pipe it on".into()).into());
                }
                let (file, end) = match target {
                    Target::File { mut file, path } => (handle(&mut file, &path)?, End::Commit { file, path }),
                    Target::Stream { to, name } => {
                        let cannot = "cannot create a temporary file; TMPDIR says where it lies";
                        let spool = tempfile::tempfile().context(cannot)?;
                        (spool.try_clone().context(cannot)?, End::Copy { spool, to, name })
                    }
                };
                let rows = WriteOptions::new()
                    .default_dtype()
                    .writer(BufWriter::with_capacity(1 << 16, file))
                    .begin_2d(dim as u64)
                    .map_err(|error| end.fault(error))?;
                Ok(Self::Npy { rows, end })
            }
        }
    }

    /// Appends the rows of `embeddings`, the first of which is text number `first`.
    ///
    /// # Errors
    /// The output cannot be written; [`ReaderGone`].
    pub fn write(&mut self, first: u64, embeddings: &Embeddings, hidden: Option<&[HiddenStates]>) -> Result<()> {
        match self {
            Self::JsonLines { rows, end } => json_rows(rows, first, embeddings, hidden).map_err(|error| end.fault(error)),
            Self::Npy { rows, end } => rows.extend(embeddings.values.iter().copied()).map_err(|error| end.fault(error)),
        }
    }

    /// Completes the output: the file gets its name, the spool reaches the stream.
    ///
    /// # Errors
    /// As [`RowWriter::write`].
    pub fn finish(self) -> Result<()> {
        let end = match self {
            Self::JsonLines { mut rows, end } => {
                rows.flush().map_err(|error| end.fault(error))?;
                end
            }
            Self::Npy { rows, end } => {
                rows.finish().map_err(|error| end.fault(error))?;
                end
            }
        };
        end.complete()
    }
}

/// A second handle of `file`, at the same place in it.
fn handle(file: &mut AtomicFile, path: &Path) -> Result<File> {
    file.file()?.try_clone().with_context(|| format!("cannot write {}", path.display()))
}

/// One JSON object a text, flushed: a reader at the other end of a pipe gets whole chunks as they are done.
fn json_rows(out: &mut impl Write, first: u64, embeddings: &Embeddings, hidden: Option<&[HiddenStates]>) -> std::io::Result<()> {
    for (i, (embedding, tokens)) in embeddings.rows().zip(&embeddings.tokens).enumerate() {
        let hidden_states =
            hidden.and_then(|hidden| hidden.get(i)).map(|states| states.values.chunks_exact(states.hidden_size.max(1)).collect());
        serde_json::to_writer(&mut *out, &Row { index: first + i as u64, tokens: *tokens, embedding, hidden_states })?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

impl End {
    fn complete(self) -> Result<()> {
        match self {
            Self::Stream { .. } => Ok(()),
            Self::Commit { mut file, path } => {
                // On the disk before it has its name: a machine that fails leaves no half file either.
                file.file()?.sync_all().with_context(|| format!("cannot write {}", path.display()))?;
                Ok(file.commit()?)
            }
            Self::Copy { mut spool, mut to, name } => spool
                .rewind()
                .and_then(|()| std::io::copy(&mut spool, &mut to))
                .and_then(|_| to.flush())
                .map_err(|error| fault(&name, error)),
        }
    }

    fn fault(&self, error: std::io::Error) -> anyhow::Error {
        match self {
            Self::Stream { name } => fault(name, error),
            Self::Commit { path, .. } => anyhow!("cannot write {}: {error}", path.display()),
            Self::Copy { .. } => anyhow!("cannot write the temporary file: {error}; TMPDIR says where it lies"),
        }
    }
}

/// The fault of a stream called `name`.
fn fault(name: &str, error: std::io::Error) -> anyhow::Error {
    if error.kind() == ErrorKind::BrokenPipe { ReaderGone.into() } else { anyhow!("cannot write {name}: {error}") }
}

/// The width that a table may have: the terminal's, none when stdout is no terminal.
pub fn terminal_width() -> Option<usize> {
    std::io::stdout().is_terminal().then(|| usize::from(console::Term::stdout().size().1))
}

/// Writes `text` to stdout.
///
/// # Errors
/// Stdout cannot be written; [`ReaderGone`].
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| fault("stdout", error))
}
