//! Calls over gRPC: answered or refused with the status that the format says.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| trt_embed::server::fuzzed::check_call(input));
