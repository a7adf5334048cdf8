//! `trt-embed completions`: the completion script of a shell.

use super::output;
use anyhow::Result;
use clap_complete::Shell;

/// Prints the completion script of a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed completions bash > ~/.local/share/bash-completion/completions/trt-embed
  trt-embed completions zsh > ~/.zfunc/_trt-embed
  trt-embed completions fish > ~/.config/fish/completions/trt-embed.fish")]
pub struct Args {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs the verb for the command line that `command` describes.
pub fn run(args: Args, command: &mut clap::Command) -> Result<()> {
    // Into memory first: clap_complete panics where the writer fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "trt-embed", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}
