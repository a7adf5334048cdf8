//! `trt-embed doctor`: what this machine has for the GPU path, and what to do about what is missing.

#[cfg(feature = "tensorrt")]
mod gpu;

// The build script's own search, so that both look in the same folders and say the same.
#[allow(dead_code)]
#[path = "../../cpp/find_headers.rs"]
mod find_headers;

use super::{BUILT_IN, output};
use anyhow::{Result, bail};
use serde::Serialize;
use std::env;
use std::path::{Path, PathBuf};

/// Says what this machine has for the GPU path, and what to do about what is missing.
///
/// Exit status 0 where `--backend tensorrt` works without an engine at hand, 1 where something that it needs is missing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed doctor
  trt-embed doctor --json")]
pub struct Args {
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// Worth knowing; `--backend tensorrt` works without it.
    Warn,
    /// `--backend tensorrt` needs it.
    Missing,
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
}

#[derive(Debug, Serialize)]
struct Report {
    /// Whether `--backend tensorrt` would work.
    tensorrt_works: bool,
    checks: Vec<Check>,
}

impl Check {
    fn new(state: State, what: impl Into<String>, value: impl Into<String>) -> Self {
        Self { state, what: what.into(), value: value.into(), next: None }
    }

    fn ok(what: impl Into<String>, value: impl Into<String>) -> Self {
        Self::new(State::Ok, what, value)
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
    let checks = checks();
    let missing: Vec<&str> =
        checks.iter().filter(|check| check.state == State::Missing).map(|check| check.what.as_str()).collect();
    let verdict = match missing.as_slice() {
        [] => None,
        names => Some(format!("`--backend tensorrt` would not work here; missing: {}", names.join(", "))),
    };
    let report = Report { tensorrt_works: verdict.is_none(), checks };
    output::print(&if args.json { serde_json::to_string(&report)? + "\n" } else { table(&report) })?;
    match verdict {
        None => Ok(()),
        Some(verdict) => bail!(verdict),
    }
}

/// All checks. None stops the others.
fn checks() -> Vec<Check> {
    let mut checks = vec![features()];
    #[cfg(feature = "tensorrt")]
    checks.extend(gpu::checks());
    #[cfg(not(feature = "tensorrt"))]
    checks.push(Check::new(State::Missing, "feature tensorrt", "not in this build").next(HOW_TO_BUILD));
    checks.push(build_headers());
    #[cfg(feature = "hub")]
    checks.push(hub_cache());
    checks.extend(environment());
    checks
}

/// What to do about a build without the feature `tensorrt`.
#[cfg(not(feature = "tensorrt"))]
pub const HOW_TO_BUILD: &str = "build it with `cargo build --release --features tensorrt`";

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
    for Check { state, what, value, next } in &report.checks {
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
    if report.tensorrt_works {
        out.push_str("\n`--backend tensorrt` works here.\n");
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

        let report = Report { tensorrt_works: false, checks: vec![lines, clauses, Check::ok("c", "\u{1b}[31m red")] };
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
}
