//! Ids of any text against those of the `tokenizers` crate.
#![no_main]

#[path = "../../tests/common/token_differential.rs"]
mod token_differential;

use std::sync::LazyLock;
use token_differential::{Pair, check, pairs};

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(pairs);

libfuzzer_sys::fuzz_target!(|input: &[u8]| check(&PAIRS, input));
