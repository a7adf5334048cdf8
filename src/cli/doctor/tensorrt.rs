//! The doctor's look at TensorRT's libraries and the engine cache.

use super::gpu::{can_write, files};
use super::{Check, State};
use indicatif::HumanBytes;
use std::sync::Arc;
use trt_embed::backend::tensorrt::{Cache, Flavour, Library, header_version};
use trt_embed::cuda::Device;

pub fn feature() -> Check {
    Check::ok("feature tensorrt", format!("compiled with the headers of TensorRT {}", header_version()))
}

pub fn checks(device: usize) -> Vec<Check> {
    let library = Library::load();
    let gpu = library.as_ref().ok().and_then(|library| gpu(library, device));
    let [library, parser] = tensorrt(library);
    [Some(library), Some(parser), gpu, Some(engine_cache())].into_iter().flatten().map(Check::for_tensorrt).collect()
}

/// Whether this TensorRT runs on GPU `device`: said of TensorRT for RTX, which leaves GPUs of data centres out. None without a GPU, which has a line
/// of its own.
fn gpu(library: &Library, device: usize) -> Option<Check> {
    const WHAT: &str = "GPU for TensorRT";
    let opened = (library.version().flavour == Flavour::Rtx).then(|| Device::open(device)).and_then(Result::ok)?;
    Some(match library.check_device(&opened) {
        Ok(()) => Check::ok(WHAT, format!("TensorRT {} runs on {}", library.version(), opened.properties().name)),
        Err(error) => Check::of_error(State::Missing, WHAT, &error),
    })
}

/// The libraries are loaded and asked for their version, no more: TensorRT 8.6 crashes where it starts without a driver.
fn tensorrt(library: trt_embed::Result<Arc<Library>>) -> [Check; 2] {
    let headers = header_version();
    let (name, parser_name) = (headers.flavour.library_stem(), headers.flavour.parser_stem());
    match library {
        Ok(library) => {
            let found = Check::ok(name, format!("TensorRT {} from {}", library.version(), library.path().display()));
            let parser = match library.load_parser() {
                Ok(()) if library.version().builds_ahead_of_time() => Check::ok(
                    parser_name,
                    "loads: engines can be built, with --compute-capability also for GPUs that are not here",
                ),
                Ok(()) => Check::ok(parser_name, "loads: engines can be built"),
                Err(error) => {
                    let mut check = Check::of_error(State::Missing, parser_name, &error);
                    let next =
                        "\nWithout it an engine that was built elsewhere, for this TensorRT and GPU, still runs with --engine.";
                    check.next.get_or_insert_default().push_str(next);
                    check
                }
            };
            [found, parser]
        }
        Err(error) => [Check::of_error(State::Missing, name, &error), Check::not_checked(parser_name, name)],
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
