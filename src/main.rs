//! The `trt-embed` command: the door to [`cli`], and its allocator.
#![deny(unsafe_code)]

mod cli;

/// glibc keeps what each of its many heaps took at its busiest: beside many clients the server's memory grew for as long as they came.
#[cfg(unix)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    cli::run()
}
