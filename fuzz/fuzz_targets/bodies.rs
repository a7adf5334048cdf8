//! Bodies of requests: read as the format says or refused, and vectors as they are written.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| trt_embed::server::fuzzed::check(input));
