//! The command line: which verbs there are, and how a run ends (exit status, message).

mod bench;
mod bench_gpu;
mod build;
#[cfg(feature = "tensorrt")]
mod build_progress;
#[cfg(feature = "tensorrt")]
mod build_summary;
mod calibrate;
mod completions;
mod doctor;
mod embed;
mod export;
mod input;
mod inspect;
mod logging;
mod message;
mod mix;
mod npy;
mod output;
mod profile;
mod progress;
mod resume;
#[cfg(feature = "serve")]
mod serve;
mod settings;
mod signals;
mod similarity;
mod skip;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use std::process::ExitCode;
use std::sync::LazyLock;

/// Sentence embeddings from text to unit vector.
///
/// Opens a Hugging Face sentence encoder (a folder, or a hub id such as sentence-transformers/all-mpnet-base-v2),
/// exports its graph and runs it on the CPU or as a TensorRT engine.
#[derive(Debug, Parser)]
#[command(name = "trt-embed", version, long_version = LONG_VERSION.as_str(), arg_required_else_help = true, after_help = AFTER_HELP)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
    /// Says more on stderr (-v notes, -vv details); RUST_LOG overrides it.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

const AFTER_HELP: &str = "\
Examples:
  trt-embed embed -m sentence-transformers/all-mpnet-base-v2 \"A cat sat.\" \"Stocks fell.\"
  trt-embed embed -m models/all-MiniLM-L6-v2 -i lines.txt -o vectors.npy
  trt-embed similarity -m models/all-MiniLM-L6-v2 --query \"pets\" -i lines.txt

Exit status: 0 success, 1 a fault of the input or while running, 2 wrong usage, 128 + N ended by signal N
(130 Ctrl-C, 143 SIGTERM).";

/// The features, and whether this binary was built with them.
const BUILT_IN: [(&str, bool); 7] = [
    ("cli", true),
    ("cpu", cfg!(feature = "cpu")),
    ("hub", cfg!(feature = "hub")),
    ("cuda", cfg!(feature = "cuda")),
    ("tensorrt", cfg!(feature = "tensorrt")),
    ("serve", cfg!(feature = "serve")),
    ("nvtx", cfg!(feature = "nvtx")),
];

/// The version and the features that this binary was built with.
static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let features: String = BUILT_IN.iter().filter(|(_, is)| *is).map(|(name, _)| format!(" {name}")).collect();
    format!("{}\nfeatures:{features}", env!("CARGO_PKG_VERSION"))
});

// The help of each verb is the comment on its `Args`: one here would hide all but its own line.
#[derive(Debug, Subcommand)]
enum Verb {
    Embed(embed::Args),
    Similarity(similarity::Args),
    Calibrate(calibrate::Args),
    Export(export::Args),
    Build(build::Args),
    Inspect(inspect::Args),
    Bench(bench::Args),
    Profile(profile::Args),
    Doctor(doctor::Args),
    #[cfg(feature = "serve")]
    Serve(Box<serve::Args>),
    Completions(completions::Args),
}

impl Verb {
    /// How this verb logs.
    fn logging(&self) -> logging::Style {
        match self {
            #[cfg(feature = "serve")]
            Self::Serve(args) if args.json_output => logging::Style::ServiceJson,
            #[cfg(feature = "serve")]
            Self::Serve(_) => logging::Style::Service,
            _ => logging::Style::Command,
        }
    }
}

/// A fault of the command line itself: exit status 2.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Parses the command line, runs the verb and turns its end into an exit status.
pub fn run() -> ExitCode {
    let args = Args::parse();
    logging::install(args.verbose, args.verb.logging());
    signals::install();

    let ended = match args.verb {
        Verb::Embed(args) => embed::run(args),
        Verb::Similarity(args) => similarity::run(args),
        Verb::Calibrate(args) => calibrate::run(args),
        Verb::Export(args) => export::run(args),
        Verb::Build(args) => build::run(args),
        Verb::Inspect(args) => inspect::run(args),
        Verb::Bench(args) => bench::run(args),
        Verb::Profile(args) => profile::run(args),
        Verb::Doctor(args) => doctor::run(args),
        #[cfg(feature = "serve")]
        Verb::Serve(args) => serve::run(*args),
        Verb::Completions(args) => completions::run(args, &mut Args::command()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        // `trt-embed … | head`: the reader has what it wanted.
        Err(error) if error.is::<output::ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            say(&message::of_chain(&error));
            if error.is::<Usage>() {
                say("see `trt-embed --help` or `trt-embed VERB --help`");
                ExitCode::from(2)
            } else if matches!(error.downcast_ref(), Some(trt_embed::Error::Cancelled { .. })) {
                ExitCode::from(signals::status())
            } else {
                ExitCode::from(status_of(&error))
            }
        }
    }
}

/// The exit status of a fault: 3 for a server that lost its device and should be started again, 1 for all others.
fn status_of(error: &anyhow::Error) -> u8 {
    #[cfg(feature = "serve")]
    if matches!(error.downcast_ref(), Some(trt_embed::server::ServeError::Lost { .. })) {
        return 3;
    }
    let _ = error;
    1
}

/// Writes `message` to stderr. A closed stderr is no reason to stop.
fn say(message: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "trt-embed: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_definitions_are_consistent() {
        Args::command().debug_assert();
    }
}
