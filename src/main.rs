//! The `trt-embed` command: nothing but the door to [`cli`].
#![deny(unsafe_code)]

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
