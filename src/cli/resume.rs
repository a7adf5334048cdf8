//! `embed --resume`: what an interrupted run leaves beside its output, and going on from there.
//!
//! The rows lie in `OUTPUT.partial`, and `OUTPUT.resume` tells how far they are whole: it is written after they are on the disk, so that
//! it is true whenever the run ends, also by SIGKILL. Runs are cut into chunks at the same lines whether they were interrupted or not,
//! because the last bits of a vector may depend on the batch that it was computed in.

use super::input::{Position, Texts, hex};
use super::output::{Format, OutputFile, Target};
use super::settings::ModelArgs;
use super::skip::Skipped;
use super::{Usage, say, signals};
use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use trt_embed::Embedder;
use trt_embed::files::{AtomicFile, GrowingFile};

/// Of the sidecar's form.
const FORMAT: u32 = 1;
/// The largest sidecar that is read.
const MAX_BYTES: u64 = 1 << 20;
/// How much longer than writing one checkpoint the work between two of them takes at least.
const CHECKPOINT_SHARE: u32 = 20;
/// Files of a model folder with these endings decide its vectors.
const MODEL_FILES: [&str; 4] = ["json", "txt", "model", "safetensors"];
/// How deep below the model folder they lie: its modules have folders of their own.
const MODEL_DEPTH: usize = 2;

/// `OUTPUT.resume`, as JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sidecar {
    format: u32,
    /// Everything that decides the rows, by the name that the user knows it by.
    settings: BTreeMap<String, String>,
    /// Where the skipped lines are, where there are any.
    errors: Option<PathBuf>,
    done: Done,
}

/// How far a run has come.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// What was read of the input.
    pub input: Position,
    /// Rows written, and the bytes that they take in the output.
    pub rows: u64,
    pub output_bytes: u64,
    /// Lines skipped, and the bytes that they take in the side file.
    pub skipped: u64,
    pub errors_bytes: u64,
    /// Texts that were cut.
    pub truncated: u64,
    /// Most texts of the next chunk.
    pub next_chunk: usize,
}

/// A run that can be interrupted.
pub struct Job {
    sidecar: PathBuf,
    partial: PathBuf,
    found: Option<Sidecar>,
    settings: BTreeMap<String, String>,
    /// When the last checkpoint was written, and how long that took.
    last: Option<(Instant, Duration)>,
    /// Lines that the sidecar tells of.
    kept: u64,
}

impl Job {
    /// Looks for what an interrupted run has left, and lets `texts` go on where that run stopped.
    ///
    /// # Errors
    /// Input or output that cannot be gone on with (usage); another input; a sidecar that cannot be read.
    pub fn open(target: &mut Target, skipped: &Skipped, texts: &mut Texts) -> Result<Self> {
        if texts.size().is_none() {
            return Err(Usage("--resume reads from a regular file: name it with -i FILE".into()).into());
        }
        let Target::File { file: OutputFile::Growing(file), path } = target else {
            return Err(Usage("--resume writes to a regular file: name it with -o FILE".into()).into());
        };
        let sidecar = sidecar_path(path);
        let mut found = read(&sidecar)?;
        if found.as_ref().is_some_and(|found| found.done.output_bytes > 0) && file.length()? == 0 {
            say(&format!("beginning anew: {} is gone", file.partial().display()));
            found = None;
        }
        if let Some(found) = &found {
            match (&found.errors, skipped.path()) {
                (Some(_), _) if found.done.skipped == 0 => {}
                (Some(before), Some(now)) if before == now => {}
                (None, _) => {}
                (Some(before), now) => bail!(
                    "{}: the interrupted run has skipped {} lines into {}, {}; go on with --on-error skip and that file, or remove {} to \
                     begin anew",
                    sidecar.display(),
                    found.done.skipped,
                    before.display(),
                    now.map_or_else(
                        || "this one would fail on them".into(),
                        |now| format!("this one writes to {}", now.display())
                    ),
                    sidecar.display(),
                ),
            }
        }
        let position = found.as_ref().map(|found| found.done.input.clone()).unwrap_or_default();
        texts.go_on(&position)?;
        Ok(Self { sidecar, partial: file.partial().to_owned(), found, settings: BTreeMap::new(), last: None, kept: 0 })
    }

    /// Where this run, which has `settings`, begins: the files are cut to what is whole in them.
    ///
    /// # Errors
    /// Other settings than those of the interrupted run; files that hold less than it wrote.
    pub fn begin(&mut self, settings: BTreeMap<String, String>, target: &mut Target, skipped: &mut Skipped) -> Result<Done> {
        let done = match self.found.take() {
            None => Done::default(),
            Some(found) => {
                let differing = differing(&found.settings, &settings);
                if !differing.is_empty() {
                    bail!(
                        "{}: the interrupted run was another one ({}); go on as then, or remove that file to begin anew",
                        self.sidecar.display(),
                        differing.join(", ")
                    );
                }
                found.done
            }
        };
        self.settings = settings;
        if let Target::File { file: OutputFile::Growing(file), path } = target {
            cut(file, path, done.output_bytes)?;
        }
        skipped.go_on(done.skipped, done.errors_bytes)?;
        if done.input.lines > 0 {
            say(&format!("going on behind line {}, with {} rows written", done.input.lines, done.rows));
            self.keep(&done);
        }
        Ok(done)
    }

    /// Whether another checkpoint is due: they take a twentieth of the time at most.
    pub fn is_due(&self) -> bool {
        self.last.is_none_or(|(at, took)| at.elapsed() >= took * CHECKPOINT_SHARE)
    }

    /// Notes that `done` is on the disk.
    ///
    /// # Errors
    /// The sidecar cannot be written.
    pub fn checkpoint(&mut self, done: &Done, errors: Option<&Path>, began: Instant) -> Result<()> {
        let sidecar =
            Sidecar { format: FORMAT, settings: self.settings.clone(), errors: errors.map(Path::to_owned), done: done.clone() };
        let mut file = AtomicFile::create(&self.sidecar)?;
        serde_json::to_writer_pretty(&mut file, &sidecar).with_context(|| format!("cannot write {}", self.sidecar.display()))?;
        writeln!(file).with_context(|| format!("cannot write {}", self.sidecar.display()))?;
        file.commit()?;
        self.keep(done);
        self.last = Some((Instant::now(), began.elapsed()));
        Ok(())
    }

    /// What a user is told whose run ends too early; none while there is nothing to go on with.
    pub fn kept(&self) -> Option<String> {
        let (lines, partial) = (self.kept, self.partial.display());
        (lines > 0).then(|| format!("the first {lines} lines are done, in {partial}: the same command goes on from there"))
    }

    fn keep(&mut self, done: &Done) {
        self.kept = done.input.lines;
        signals::say_kept(self.kept().unwrap_or_default());
    }

    /// Removes the sidecar: the output is complete.
    ///
    /// # Errors
    /// The sidecar cannot be removed.
    pub fn finish(self) -> Result<()> {
        signals::say_kept(String::new());
        match fs::remove_file(&self.sidecar) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.sidecar.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Says that a run without `--resume` begins anew although an interrupted one could be gone on with.
pub fn say_ignored(target: &Target) {
    if let Target::File { path, .. } = target {
        let sidecar = sidecar_path(path);
        if sidecar.exists() {
            say(&format!("beginning anew; {} is of an interrupted run, which --resume goes on with", sidecar.display()));
        }
    }
}

/// Cuts `file`, which is to be `path`, to its first `bytes`.
///
/// # Errors
/// It holds less.
pub fn cut(file: &mut GrowingFile, path: &Path, bytes: u64) -> Result<()> {
    let length = file.length()?;
    if length < bytes {
        let sidecar = sidecar_path(path);
        bail!(
            "{} has {length} bytes, of {bytes} that the interrupted run wrote; remove {} to begin anew",
            file.partial().display(),
            sidecar.display()
        );
    }
    file.truncate(bytes)?;
    if bytes > 0 {
        file.keep();
    }
    Ok(())
}

/// Everything that decides the rows of a run, but its input.
///
/// # Errors
/// A file of the model that cannot be read.
pub fn settings(
    model: &ModelArgs,
    format: Format,
    hidden_states: bool,
    texts: &Texts,
    embedder: &Embedder,
) -> Result<BTreeMap<String, String>> {
    let info = embedder.info();
    let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    let size = |size: usize| if size == usize::MAX { "unlimited".to_owned() } else { size.to_string() };
    let chosen = |chosen: Option<std::num::NonZeroUsize>, own: usize| size(chosen.map_or(own, std::num::NonZeroUsize::get));
    let mut pooling = info.pooling.modes.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(",");
    if !info.pooling.include_prompt {
        pooling.push_str(" without the prompt");
    }
    let engine = info.engine.as_deref().map(file_digest).transpose()?;
    let named = [
        ("program", format!("trt-embed {}", env!("CARGO_PKG_VERSION"))),
        ("model files", folder_digest(&info.folder)?),
        ("--backend", info.backend.to_owned()),
        ("--engine", engine.unwrap_or_else(|| "none".into())),
        ("--threads", info.limits.parallelism.to_string()),
        ("--batch-size", chosen(model.executor.batch_size, info.limits.max_batch)),
        ("--batch-tokens", chosen(model.executor.batch_tokens, info.limits.batch_tokens)),
        ("--max-tokens", info.max_tokens.to_string()),
        ("--prompt", format!("{:?}", info.prompt.as_deref().unwrap_or_default())),
        ("--dim", info.dim.to_string()),
        ("--normalize", on_off(info.normalize)),
        ("--pooling", pooling),
        ("--format", format!("{format:?}").to_lowercase()),
        ("--hidden-states", on_off(hidden_states)),
        ("--input-format", if texts.is_json() { "jsonl" } else { "lines" }.to_owned()),
    ];
    Ok(named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// What differs, as a user reads it.
fn differing(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let value =
        |of: &BTreeMap<String, String>, name: &String| of.get(name).map_or_else(|| "not known".to_owned(), |value| short(value));
    let mut names: Vec<&String> = before.keys().chain(now.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let differ = names.into_iter().filter(|name| before.get(*name) != now.get(*name));
    differ.map(|name| format!("{name}: {} then, {} now", value(before, name), value(now, name))).collect()
}

/// Enough of `value` to tell it from another.
fn short(value: &str) -> String {
    if value.chars().count() <= 40 { value.to_owned() } else { value.chars().take(12).chain("…".chars()).collect() }
}

fn sidecar_path(output: &Path) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(".resume");
    path.into()
}

/// The sidecar at `path`, where there is one.
fn read(path: &Path) -> Result<Option<Sidecar>> {
    let cannot = || format!("cannot read {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(cannot)?,
    };
    let fault = |reason: String| anyhow!("{}: {reason}; remove it to begin anew", path.display());
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).with_context(cannot)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(fault(format!("it is larger than {MAX_BYTES} bytes, which none is that `--resume` writes")));
    }
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let version: Version = serde_json::from_slice(&bytes).map_err(|error| fault(format!("not what --resume writes: {error}")))?;
    if version.format != FORMAT {
        return Err(fault(format!("its format is {}, this version reads {FORMAT}", version.format)));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|error| fault(format!("not what --resume writes: {error}")))
}

/// SHA-256 over the names and contents of the files in `folder` that decide a model's vectors.
fn folder_digest(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    model_files(folder, MODEL_DEPTH, &mut files).with_context(|| format!("cannot read {}", folder.display()))?;
    files.sort();
    let mut whole = Sha256::new();
    for file in files {
        let name = file.strip_prefix(folder).unwrap_or(&file);
        whole.update(format!("{}\n{}\n", name.display(), file_digest(&file)?));
    }
    Ok(hex(&whole.finalize()))
}

fn model_files(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        // Through links, of which a folder of the hub's cache is made; those that lead nowhere are not read by anyone.
        let Some(about) = fs::metadata(&path).ok().filter(|_| !hidden) else { continue };
        let counts =
            path.extension().is_some_and(|extension| MODEL_FILES.iter().any(|known| extension.eq_ignore_ascii_case(known)));
        if about.is_file() && counts {
            files.push(path);
        } else if about.is_dir() && depth > 1 {
            model_files(&path, depth - 1, files)?;
        }
    }
    Ok(())
}

fn file_digest(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut read = || -> std::io::Result<()> {
        let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
        std::io::copy(&mut reader, &mut HashWriter(&mut hash)).map(drop)
    };
    read().with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&hash.finalize()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
