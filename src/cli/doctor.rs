//! `trt-embed doctor`: what this machine has for the GPU path, and what to do about what is missing.

#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "tensorrt")]
mod tensorrt;

// The build script's own search, so that both look in the same folders and say the same.
#[allow(dead_code)]
#[path = "../../cpp/find_headers.rs"]
mod find_headers;

use super::{BUILT_IN, output, settings};
use anyhow::{Result, bail};
use serde::Serialize;
use std::env;
use std::path::{Path, PathBuf};
use trt_embed::BackendChoice;

/// Says what this machine has for models on a GPU, what to do about what is missing, and what `--backend auto` would take.
///
/// Exit status 0 where `--backend cuda` or `--backend tensorrt` (without an engine at hand) works, 1 where something is missing for both.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed doctor
  trt-embed doctor -m sentence-transformers/all-mpnet-base-v2
  trt-embed doctor --json")]
pub struct Args {
    /// Says what `--backend auto` would take for this model (folder or hub id, which is downloaded), and why.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// GPU that would run it, as the driver numbers them.
    #[arg(long, env = "TRT_EMBED_DEVICE", value_name = "N", default_value_t = 0)]
    device: usize,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// Worth knowing; what runs on a GPU works without it.
    Warn,
    /// What runs on a GPU needs it.
    Missing,
}

/// What runs models on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnGpu {
    Cuda,
    TensorRt,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Check {
    state: State,
    what: String,
    value: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
    /// Who does not work where it is missing.
    #[serde(skip)]
    needed_by: &'static [OnGpu],
}

#[derive(Debug, Serialize)]
struct Report {
    /// Whether `--backend cuda` would work.
    cuda_works: bool,
    /// Whether `--backend tensorrt` would work.
    tensorrt_works: bool,
    /// What `--backend auto` would take; none where nothing works, or the model cannot be read.
    auto: Option<String>,
    checks: Vec<Check>,
}

impl Check {
    fn new(state: State, what: impl Into<String>, value: impl Into<String>) -> Self {
        Self { state, what: what.into(), value: value.into(), next: None, needed_by: &[OnGpu::Cuda, OnGpu::TensorRt] }
    }

    fn ok(what: impl Into<String>, value: impl Into<String>) -> Self {
        Self::new(State::Ok, what, value)
    }

    /// What a check that needs another one's success says without it.
    #[cfg(feature = "cuda")]
    fn not_checked(what: impl Into<String>, first: &str) -> Self {
        Self::new(State::Warn, what, format!("not checked: needs {first}"))
    }

    fn for_cuda(self) -> Self {
        Self { needed_by: &[OnGpu::Cuda], ..self }
    }

    fn for_tensorrt(self) -> Self {
        Self { needed_by: &[OnGpu::TensorRt], ..self }
    }

    fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// What an error says: its first line or clause is the value, the others are the next step.
    fn of_error(state: State, what: impl Into<String>, error: &dyn std::fmt::Display) -> Self {
        let text = error.to_string();
        match (text.split_once('\n'), text.split_once("; ")) {
            (Some((value, next)), _) => Self::new(state, what, value).next(next),
            (None, Some((value, next))) => Self::new(state, what, value).next(next.replace("; ", "\n")),
            (None, None) => Self::new(state, what, text),
        }
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let mut checks = checks(args.device);
    let (auto, line) = auto(args.model.as_deref(), args.device);
    checks.push(line);
    let report = Report {
        cuda_works: missing(&checks, &[OnGpu::Cuda]).is_empty(),
        tensorrt_works: missing(&checks, &[OnGpu::TensorRt]).is_empty(),
        auto,
        checks,
    };
    output::print(&if args.json { serde_json::to_string(&report)? + "\n" } else { table(&report) })?;
    if report.cuda_works || report.tensorrt_works {
        return Ok(());
    }
    let names = missing(&report.checks, &[OnGpu::Cuda, OnGpu::TensorRt]).join(", ");
    bail!("neither `--backend cuda` nor `--backend tensorrt` would work here; missing: {names}")
}

/// What any of `backends` needs and is not there.
fn missing<'a>(checks: &'a [Check], backends: &[OnGpu]) -> Vec<&'a str> {
    let needed =
        |check: &&Check| check.state == State::Missing && backends.iter().any(|backend| check.needed_by.contains(backend));
    checks.iter().filter(needed).map(|check| check.what.as_str()).collect()
}

/// What `--backend auto` would take, and its line.
fn auto(model: Option<&str>, device: usize) -> (Option<String>, Check) {
    let what = "--backend auto";
    let folder = model.map(settings::open_folder).transpose();
    let taken = folder.and_then(|folder| Ok(BackendChoice::auto_would_take(device, folder.as_ref())?));
    match taken {
        Ok((backend, reason)) => {
            let of = model.map_or_else(|| "a model that is served".to_owned(), str::to_owned);
            let line = Check::ok(what, format!("takes {backend} for {of}"));
            (Some(backend.to_owned()), Check { next: reason, ..line })
        }
        // The model, or that there is nothing to run it, is no matter of a GPU.
        Err(error) => (None, Check::of_error(State::Warn, what, &error)),
    }
}

/// All checks. None stops the others.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // there is no GPU to ask
fn checks(device: usize) -> Vec<Check> {
    let mut checks = vec![features()];
    #[cfg(feature = "tensorrt")]
    checks.push(tensorrt::feature());
    #[cfg(feature = "cuda")]
    checks.extend(gpu::checks(device));
    #[cfg(not(feature = "cuda"))]
    checks.push(Check::new(State::Missing, "feature cuda", "not in this build").next(HOW_TO_BUILD_CUDA).for_cuda());
    #[cfg(feature = "tensorrt")]
    checks.extend(tensorrt::checks(device));
    #[cfg(not(feature = "tensorrt"))]
    checks.push(Check::new(State::Missing, "feature tensorrt", "not in this build").next(HOW_TO_BUILD).for_tensorrt());
    checks.push(build_headers());
    #[cfg(feature = "hub")]
    checks.push(hub_cache());
    checks.extend(environment());
    checks
}

/// What to do about a build without the feature `tensorrt`.
#[cfg(not(feature = "tensorrt"))]
pub const HOW_TO_BUILD: &str = "build it with `cargo build --release --features tensorrt`";

/// What to do about a build without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
const HOW_TO_BUILD_CUDA: &str = "build it with `cargo build --release --features cuda`";

fn features() -> Check {
    let names = |wanted| -> Vec<&str> { BUILT_IN.iter().filter(|(_, is)| *is == wanted).map(|(name, _)| *name).collect() };
    let without = match names(false).as_slice() {
        [] => String::new(),
        others => format!("; without {}", others.join(" ")),
    };
    Check::ok("build", format!("trt-embed {} with {}{without}", env!("CARGO_PKG_VERSION"), names(true).join(" ")))
}

/// TensorRT's headers, which only a build of this crate needs.
fn build_headers() -> Check {
    const WHAT: &str = "headers to build with";
    let usual: Vec<PathBuf> = find_headers::USUAL_FOLDERS.iter().map(PathBuf::from).collect();
    let found = find_headers::find(folder_of("TENSORRT_INCLUDE_DIR").as_deref(), folder_of("TENSORRT_ROOT").as_deref(), &usual);
    match found {
        Ok(folder) => Check::ok(WHAT, folder.display().to_string()),
        Err(_) if cfg!(feature = "tensorrt") => Check::ok(WHAT, "none here; this program is built already"),
        Err(message) => Check::of_error(State::Warn, WHAT, &message),
    }
}

#[cfg(feature = "hub")]
fn hub_cache() -> Check {
    let cache = trt_embed::model::hub::HubOptions::from_env().cache;
    let there = if cache.is_dir() { "" } else { " (made by the first download)" };
    Check::ok("hub cache", format!("{}{there}", cache.display()))
}

/// The variables that decide what is found; each that is set has its line. None of them is a secret.
fn environment() -> Vec<Check> {
    const ONE_FOLDER: [&str; 9] = [
        "TENSORRT_LIB_DIR",
        "VIRTUAL_ENV",
        "CUDA_HOME",
        "CUDA_PATH",
        "TENSORRT_INCLUDE_DIR",
        "TENSORRT_ROOT",
        "TRT_EMBED_CACHE",
        "HF_HOME",
        "HF_HUB_CACHE",
    ];
    // These are made when they are first needed.
    const MADE: [&str; 3] = ["TRT_EMBED_CACHE", "HF_HOME", "HF_HUB_CACHE"];
    const OTHERS: [&str; 3] = ["CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TRT_EMBED_BACKEND"];

    let mut checks = Vec::new();
    let mut unset = Vec::new();
    for name in OTHERS.into_iter().chain(ONE_FOLDER) {
        let Some(value) = env::var_os(name) else {
            unset.push(name);
            continue;
        };
        let shown = value.to_string_lossy();
        let lost = !value.is_empty() && ONE_FOLDER.contains(&name) && !MADE.contains(&name) && !Path::new(&value).is_dir();
        checks.push(if lost {
            let next = format!("set {name} to a folder, or unset it");
            Check::new(State::Warn, name, format!("{shown} is no folder")).next(next)
        } else if value.is_empty() {
            Check::ok(name, "set, and empty")
        } else {
            Check::ok(name, shown)
        });
    }
    checks.push(Check::ok("not set", unset.join(" ")));
    checks
}

fn folder_of(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// State, what and value in columns; next steps below their value.
fn table(report: &Report) -> String {
    let width = report.checks.iter().map(|check| check.what.len()).max().unwrap_or(0);
    let mut out = String::new();
    for Check { state, what, value, next, .. } in &report.checks {
        let state = match state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Missing => "missing",
        };
        out.push_str(&format!("{state:<7}  {what:<width$}  {}\n", printable(value)));
        for line in next.iter().flat_map(|next| next.lines()) {
            out.push_str(&format!("{:11}{}\n", "", printable(line)));
        }
    }
    // Where neither works, the error says so.
    if report.cuda_works || report.tensorrt_works {
        out.push('\n');
        for (name, backend) in [("cuda", OnGpu::Cuda), ("tensorrt", OnGpu::TensorRt)] {
            match missing(&report.checks, &[backend]).as_slice() {
                [] => out.push_str(&format!("`--backend {name}` works here.\n")),
                names => out.push_str(&format!("`--backend {name}` would not work here; missing: {}\n", names.join(", "))),
            }
        }
    }
    out
}

/// Control characters, which paths and variables may hold, would break the table or the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errors_next_step_stands_below_its_value() {
        let lines = Check::of_error(State::Missing, "a", &"libx could not be loaded:\n  /x: none\nInstall x.");
        assert_eq!((lines.value.as_str(), lines.next.as_deref()), ("libx could not be loaded:", Some("  /x: none\nInstall x.")));
        let clauses = Check::of_error(State::Warn, "bb", &"no driver; install it; then restart");
        assert_eq!((clauses.value.as_str(), clauses.next.as_deref()), ("no driver", Some("install it\nthen restart")));
        let bare = Check::of_error(State::Warn, "c", &"no driver");
        assert_eq!((bare.value.as_str(), bare.next.as_deref()), ("no driver", None));

        let checks = vec![lines, clauses, Check::ok("c", "\u{1b}[31m red")];
        let report = Report { cuda_works: false, tensorrt_works: false, auto: None, checks };
        let expected = "\
missing  a   libx could not be loaded:
             /x: none
           Install x.
warn     bb  no driver
           install it
           then restart
ok       c    [31m red
";
        assert_eq!(table(&report), expected);
    }

    #[test]
    fn each_backend_is_told_what_it_lacks() {
        let missing_for = |check: fn(Check) -> Check, what: &str| check(Check::new(State::Missing, what, "none"));
        let warning = Check::new(State::Warn, "kernel cache", "none");
        let checks =
            vec![missing_for(Check::for_tensorrt, "libnvinfer"), warning, missing_for(Check::for_tensorrt, "engine cache")];
        assert!(missing(&checks, &[OnGpu::Cuda]).is_empty());
        assert_eq!(missing(&checks, &[OnGpu::TensorRt]), ["libnvinfer", "engine cache"]);
        let report = Report { cuda_works: true, tensorrt_works: false, auto: Some("cuda".into()), checks };
        let end =
            "\n\n`--backend cuda` works here.\n`--backend tensorrt` would not work here; missing: libnvinfer, engine cache\n";
        assert!(table(&report).ends_with(end), "{}", table(&report));

        let checks = vec![missing_for(|check| check, "NVIDIA driver"), missing_for(Check::for_cuda, "kernels for GPU 0")];
        assert_eq!(missing(&checks, &[OnGpu::Cuda]), ["NVIDIA driver", "kernels for GPU 0"]);
        assert_eq!(missing(&checks, &[OnGpu::TensorRt]), ["NVIDIA driver"]);
        let report = Report { cuda_works: false, tensorrt_works: false, auto: None, checks };
        assert!(!table(&report).contains("work"), "{}", table(&report));
    }
}
