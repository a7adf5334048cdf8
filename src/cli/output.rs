//! Where rows go: JSON Lines and NumPy writers, to stdout or to a file that appears whole or not at all.

use super::{Usage, npy};
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, IsTerminal, Seek, Write};
use std::path::{Path, PathBuf};
use trt_embed::files::{AtomicFile, GrowingFile};
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
    File { file: OutputFile, path: PathBuf },
}

/// A regular file that is being written beside its final name.
pub enum OutputFile {
    /// By this run alone: gone with it unless it is completed.
    Whole(AtomicFile),
    /// By one run after the other.
    Growing(GrowingFile),
}

impl Target {
    /// Opens `path`, or stdout where there is none or it is `-`; a regular file as one that may be `growing` over several runs.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written to; `path` is a folder.
    pub fn open(path: Option<&Path>, growing: bool) -> Result<Self> {
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
        let file = if growing {
            GrowingFile::open(&path).map(OutputFile::Growing)
        } else {
            AtomicFile::create(&path).map(OutputFile::Whole)
        };
        let mut file = file.map_err(|error| match error {
            trt_embed::Error::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                anyhow!("{}: the folder {} cannot be written to; name a file in another one", cannot(), folder.display())
            }
            trt_embed::Error::Io { source, .. } => reason(&path.display(), &source),
            other => other.into(),
        })?;
        if let Some(about) = existing {
            if about.permissions().readonly() {
                bail!("{}: the file is read-only", cannot());
            }
            file.handle()?.set_permissions(about.permissions()).with_context(cannot)?;
        }
        Ok(Self::File { file, path })
    }

    /// Whether rows reach the terminal.
    pub fn is_stdout(&self) -> bool {
        matches!(self, Self::Stream { name, .. } if name == "stdout")
    }
}

impl OutputFile {
    /// A second handle, at the same place in the file.
    ///
    /// # Errors
    /// The system has no more handles.
    pub fn handle(&mut self) -> Result<File> {
        let file = match self {
            Self::Whole(file) => file.file()?,
            Self::Growing(file) => file.file(),
        };
        Ok(file.try_clone()?)
    }

    /// Waits until what was written is on the disk, and gives its bytes.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn sync(&mut self) -> Result<u64> {
        match self {
            Self::Whole(file) => {
                let file = file.file()?;
                file.sync_all()?;
                Ok(file.metadata()?.len())
            }
            Self::Growing(file) => Ok(file.sync()?),
        }
    }

    /// Gives it its final name.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn commit(self) -> Result<()> {
        match self {
            Self::Whole(file) => file.commit()?,
            Self::Growing(file) => file.commit()?,
        }
        Ok(())
    }
}

/// Writes rows in order.
pub struct RowWriter {
    rows: BufWriter<Box<dyn Write>>,
    /// Of a NumPy file, whose first bytes hold the number of its rows.
    array: Option<Array>,
    end: End,
}

struct Array {
    file: File,
    dim: u64,
    rows: u64,
}

/// What is left to do when all rows are written.
enum End {
    /// Nothing: the rows went straight to the stream.
    Stream { name: String },
    /// The file gets its name.
    Commit { file: OutputFile, path: PathBuf },
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
    /// Begins the output of vectors of `dim` values, or goes on with it after `done` rows.
    ///
    /// # Errors
    /// The file or the spool cannot be written; binary output to a terminal (usage).
    pub fn begin(format: Format, target: Target, dim: usize, done: u64) -> Result<Self> {
        let to_terminal = target.is_stdout() && std::io::stdout().is_terminal();
        let (to, array, end): (Box<dyn Write>, _, _) = match (format, target) {
            (Format::Npy, _) if to_terminal => {
                return Err(Usage("npy is binary and stdout is a terminal; name a file with -o or pipe it on".into()).into());
            }
            (Format::Jsonl, Target::Stream { to, name }) => (to, None, End::Stream { name }),
            (Format::Npy, Target::Stream { to, name }) => {
                let cannot = "cannot create a temporary file; TMPDIR says where it lies";
                let spool = tempfile::tempfile().context(cannot)?;
                let handle = || spool.try_clone().context(cannot);
                (Box::new(handle()?), Some(handle()?), End::Copy { spool: handle()?, to, name })
            }
            (format, Target::File { mut file, path }) => {
                let cannot = || format!("cannot write {}", path.display());
                let array = (format == Format::Npy).then(|| file.handle()).transpose().with_context(cannot)?;
                (Box::new(file.handle().with_context(cannot)?), array, End::Commit { file, path })
            }
        };
        let array = array.map(|file| Array { file, dim: dim as u64, rows: done });
        let mut writer = Self { rows: BufWriter::with_capacity(1 << 16, to), array, end };
        if let Some(array) = writer.array.as_ref().filter(|array| array.rows == 0) {
            // Room for the number of rows; it is known at the end.
            let header = npy::header(0, array.dim).and_then(|header| writer.rows.write_all(&header));
            header.map_err(|error| writer.end.fault(error))?;
        }
        Ok(writer)
    }

    /// Appends the rows of `embeddings`, of the texts with these numbers.
    ///
    /// # Errors
    /// The output cannot be written; [`ReaderGone`].
    pub fn write(&mut self, texts: &[u64], embeddings: &Embeddings, hidden: Option<&[HiddenStates]>) -> Result<()> {
        let written = match &mut self.array {
            None => json_rows(&mut self.rows, texts, embeddings, hidden),
            Some(array) => {
                array.rows += embeddings.len() as u64;
                embeddings.values.iter().try_for_each(|value| self.rows.write_all(&value.to_le_bytes()))
            }
        };
        written.map_err(|error| self.end.fault(error))
    }

    /// Waits until all rows so far are on the disk, and gives the output's bytes; 0 for a stream.
    ///
    /// # Errors
    /// As [`RowWriter::write`].
    pub fn sync(&mut self) -> Result<u64> {
        self.rows.flush().map_err(|error| self.end.fault(error))?;
        match &mut self.end {
            End::Commit { file, .. } => file.sync(),
            _ => Ok(0),
        }
    }

    /// Leaves what is written so far to a later run, where the file may grow over several.
    pub fn keep(&mut self) {
        if let End::Commit { file: OutputFile::Growing(file), .. } = &mut self.end {
            file.keep();
        }
    }

    /// Leaves nothing of a file.
    ///
    /// # Errors
    /// What earlier runs have left of it cannot be removed.
    pub fn discard(self) -> Result<()> {
        match self.end {
            End::Commit { file: OutputFile::Growing(file), .. } => Ok(file.discard()?),
            _ => Ok(()),
        }
    }

    /// Completes the output: the file gets its name, the spool reaches the stream.
    ///
    /// # Errors
    /// As [`RowWriter::write`].
    pub fn finish(mut self) -> Result<()> {
        let finished = self.rows.flush().and_then(|()| self.array.as_mut().map_or(Ok(()), Array::finish));
        finished.map_err(|error| self.end.fault(error))?;
        self.end.complete()
    }
}

impl Array {
    /// Writes the number of rows where the header has it.
    fn finish(&mut self) -> std::io::Result<()> {
        self.file.rewind()?;
        self.file.write_all(&npy::header(self.rows, self.dim)?)
    }
}

/// One JSON object a text, flushed: a reader at the other end of a pipe gets whole chunks as they are done.
fn json_rows(
    out: &mut impl Write,
    texts: &[u64],
    embeddings: &Embeddings,
    hidden: Option<&[HiddenStates]>,
) -> std::io::Result<()> {
    for (i, ((embedding, tokens), &index)) in embeddings.rows().zip(&embeddings.tokens).zip(texts).enumerate() {
        let hidden_states =
            hidden.and_then(|hidden| hidden.get(i)).map(|states| states.values.chunks_exact(states.hidden_size.max(1)).collect());
        serde_json::to_writer(&mut *out, &Row { index, tokens: *tokens, embedding, hidden_states })?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

impl End {
    fn complete(self) -> Result<()> {
        match self {
            Self::Stream { .. } => Ok(()),
            Self::Commit { file, .. } => file.commit(),
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
            Self::Commit { path, .. } => reason(&path.display(), &error),
            Self::Copy { .. } => anyhow!("cannot write the temporary file: {error}; TMPDIR says where it lies"),
        }
    }
}

/// The fault of a stream called `name`.
fn fault(name: &str, error: std::io::Error) -> anyhow::Error {
    if error.kind() == ErrorKind::BrokenPipe { ReaderGone.into() } else { reason(&name, &error) }
}

/// Why `name` cannot be written, and what to do about it.
pub fn reason(name: &dyn std::fmt::Display, error: &std::io::Error) -> anyhow::Error {
    let next = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room there, or name another place",
        ErrorKind::FileTooLarge => "; the limit on the size of files is reached (`ulimit -f`, or the file system's)",
        ErrorKind::ReadOnlyFilesystem => "; name a file in another place",
        _ => "",
    };
    anyhow!("cannot write {name}: {error}{next}")
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
