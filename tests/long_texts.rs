//! Texts of 8192 tokens on the CPU against PyTorch.
#![cfg(all(feature = "cpu", feature = "internals"))]

mod long_text;

use long_text::{Long, MAX_HIDDEN_DIFFERENCE, TOKENS};
use trt_embed::backend::{Backend, CpuBackend};
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};

fn check(name: &'static str) {
    let long = Long::open(name);
    let folder = &long.folder;
    let pooling = Pooling::new([PoolingMode::Mean], true).unwrap();
    let head = Head::new(pooling, Vec::new(), folder.config.hidden_size, None, Scaling::AfterCut).unwrap();
    let backend = CpuBackend::new(folder.architecture().unwrap(), head, TOKENS, 1).unwrap();
    let mut states = vec![f32::NAN; TOKENS * folder.config.hidden_size];
    backend.hidden(&long.batch, &mut states).unwrap();
    let (furthest, of_mean) = long.differences(&states);
    assert!(furthest <= MAX_HIDDEN_DIFFERENCE && of_mean <= 1e-5, "{name}: {furthest:e} {of_mean:e}");
}

#[test]
fn positions_of_a_table() {
    check("absolute");
}

#[test]
fn rotary_positions_and_windows() {
    check("window");
}

#[test]
fn rotary_positions() {
    check("rotary");
}

#[test]
fn frequencies_by_the_length_of_the_text() {
    check("dynamic");
}

#[test]
fn frequencies_by_a_fixed_factor() {
    check("ntk");
}

#[test]
fn slopes_by_distance() {
    check("slopes");
}

/// What a text of 8192 tokens takes beyond the weights grows with its length: scores of all pairs would be 1 GB in each of these models.
#[test]
#[cfg(target_os = "linux")]
fn memory_is_not_of_all_pairs_of_tokens() {
    let peak = || -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    };
    check("window");
    check("slopes");
    // Of all tests of this file, which may run at the same time.
    assert!(peak() < 3 << 29, "{} MB at most", peak() >> 20);
}
