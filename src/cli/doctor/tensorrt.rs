//! The doctor's look at TensorRT's libraries and the engine cache.

use super::gpu::{can_write, files};
use super::{Check, State};
use indicatif::HumanBytes;
use trt_embed::backend::tensorrt::{Cache, Library, header_version};

pub fn feature() -> Check {
    Check::ok("feature tensorrt", format!("compiled with the headers of TensorRT {}", header_version()))
}

pub fn checks() -> Vec<Check> {
    let [library, parser] = tensorrt();
    [library, parser, engine_cache()].map(Check::for_tensorrt).into()
}

/// The libraries are loaded and asked for their version, no more: TensorRT 8.6 crashes where it starts without a driver.
fn tensorrt() -> [Check; 2] {
    const PARSER: &str = "libnvonnxparser";
    match Library::load() {
        Ok(library) => {
            let found = Check::ok("libnvinfer", format!("TensorRT {} from {}", library.version(), library.path().display()));
            let parser = match library.load_parser() {
                Ok(()) => Check::ok(PARSER, "loads: engines can be built"),
                Err(error) => {
                    let mut check = Check::of_error(State::Missing, PARSER, &error);
                    let next =
                        "\nWithout it an engine that was built elsewhere, for this TensorRT and GPU, still runs with --engine.";
                    check.next.get_or_insert_default().push_str(next);
                    check
                }
            };
            [found, parser]
        }
        Err(error) => [Check::of_error(State::Missing, "libnvinfer", &error), Check::not_checked(PARSER, "libnvinfer")],
    }
}

fn engine_cache() -> Check {
    const WHAT: &str = "engine cache";
    let cache = match Cache::from_env() {
        Ok(cache) => cache,
        Err(error) => return Check::of_error(State::Missing, WHAT, &error),
    };
    let folder = cache.folder();
    let (engines, bytes) = files(folder, "engine");
    let plural = if engines == 1 { "" } else { "s" };
    let holds = format!("{}: {engines} engine{plural}, {}", folder.display(), HumanBytes(bytes));
    match can_write(folder) {
        Ok(()) => Check::ok(WHAT, holds),
        Err(error) => {
            // What lies there already can still be used.
            let state = if engines == 0 { State::Missing } else { State::Warn };
            let next = "set TRT_EMBED_CACHE to a folder that can be written";
            Check::new(state, WHAT, format!("{holds}; cannot be written: {error}")).next(next)
        }
    }
}
