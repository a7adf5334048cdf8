//! The `trt-embed` command: nothing but the door to [`cli`].
#![deny(unsafe_code)]

mod cli;

/// glibc keeps what each of its many heaps took at its busiest: under load from many clients memory grew for as long as it lasted.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    cli::run()
}
