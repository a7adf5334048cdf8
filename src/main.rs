//! The `trt-embed` command.
fn main() {}
