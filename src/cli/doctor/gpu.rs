//! The doctor's look at what every GPU backend needs, driver, GPUs and NVRTC, and at the native engine's kernels.

use super::{Check, State};
use indicatif::HumanBytes;
use std::fs;
use std::io;
use std::path::Path;
use trt_embed::backend::native::check_device;
use trt_embed::cuda::{CubinCache, CudaError, Device, OLDEST_CUDA, find_nvrtc};

/// `device` is the GPU that would run a model.
pub fn checks(device: usize) -> Vec<Check> {
    let mut checks = Vec::new();
    let driver_cuda = driver_and_gpus(&mut checks);
    let nvrtc = nvrtc(driver_cuda);
    let compiles = nvrtc.state == State::Ok;
    checks.push(nvrtc);
    checks.push(native_engine(device, compiles).for_cuda());
    checks.push(kernel_cache());
    checks
}

/// Whether this program's own kernels run on GPU `device`; what else they need has lines of its own.
fn native_engine(device: usize, compiles: bool) -> Check {
    let what = format!("kernels for GPU {device}");
    let (device, compute) = match Device::open(device) {
        Ok(device) => {
            let (major, minor) = device.properties().compute_capability;
            (device, format!("{major}.{minor}"))
        }
        Err(CudaError::NoDriver { .. } | CudaError::DriverTooOld { .. }) => return Check::not_checked(what, "the driver"),
        Err(CudaError::NoDevice { .. }) => return Check::not_checked(what, "a GPU"),
        Err(error) => return Check::of_error(State::Missing, what, &error),
    };
    match check_device(&device) {
        Ok(()) => Check::ok(what, format!("compute capability {compute} is served")),
        Err(CudaError::NvrtcMissing { .. }) if !compiles => {
            Check::ok(what, format!("compute capability {compute} is served, once NVRTC is there"))
        }
        Err(error) => Check::of_error(State::Missing, what, &error),
    }
}

/// The driver's line and one for each GPU. Gives the newest CUDA version that the driver supports, where a GPU could be asked.
fn driver_and_gpus(checks: &mut Vec<Check>) -> Option<(u32, u32)> {
    const DRIVER: &str = "NVIDIA driver";
    let (oldest_major, oldest_minor) = OLDEST_CUDA;
    let count = match Device::count() {
        Ok(0) => Err(CudaError::NoDevice { reason: "0 devices".into(), visible: None }),
        other => other,
    };
    match count {
        Ok(count) => {
            let gpus: Vec<_> = (0..count).map(|ordinal| (format!("GPU {ordinal}"), Device::open(ordinal))).collect();
            let cuda = gpus.iter().find_map(|(_, gpu)| Some(gpu.as_ref().ok()?.properties().driver_cuda));
            checks.push(match cuda {
                Some((major, minor)) => {
                    Check::ok(DRIVER, format!("supports CUDA {major}.{minor} ({oldest_major}.{oldest_minor} or newer is needed)"))
                }
                None => Check::new(State::Warn, DRIVER, "there, but it opens no GPU"),
            });
            // One GPU is enough.
            let state = if cuda.is_some() { State::Warn } else { State::Missing };
            checks.extend(gpus.into_iter().map(|(what, opened)| match opened {
                Ok(device) => gpu(what, &device),
                Err(error) => Check::of_error(state, what, &error),
            }));
            cuda
        }
        Err(error @ CudaError::NoDevice { .. }) => {
            checks.push(Check::ok(DRIVER, "there"));
            let mut check = Check::of_error(State::Missing, "GPU", &error);
            check.next.get_or_insert_with(|| "`nvidia-smi` lists the GPUs; a container needs `docker run --gpus all`".into());
            checks.push(check);
            None
        }
        Err(error) => {
            checks.push(Check::of_error(State::Missing, DRIVER, &error));
            checks.push(Check::not_checked("GPU", "the driver"));
            None
        }
    }
}

fn gpu(what: String, device: &Device) -> Check {
    let about = device.properties();
    let (major, minor) = about.compute_capability;
    let fixed = format!(
        "{}, compute capability {major}.{minor}, {} SMs, {} of memory",
        about.name,
        about.multiprocessors,
        HumanBytes(about.total_memory as u64)
    );
    match device.memory() {
        Ok(memory) => Check::ok(what, format!("{fixed}, {} free", HumanBytes(memory.free as u64))),
        Err(error) => Check::new(State::Warn, what, fixed).next(error.to_string()),
    }
}

fn nvrtc(driver_cuda: Option<(u32, u32)>) -> Check {
    // Without a driver any version shows that there is one.
    match find_nvrtc(driver_cuda.map_or(u32::MAX, |(major, _)| major)) {
        Ok(found) => Check::ok("NVRTC", format!("{}.{} from {}", found.version.0, found.version.1, found.path.display())),
        Err(error) => Check::of_error(State::Missing, "NVRTC", &error),
    }
}

fn kernel_cache() -> Check {
    const WHAT: &str = "kernel cache";
    const NEXT: &str = "set TRT_EMBED_CACHE to a folder that can be written";
    let cache = CubinCache::of_user();
    let Some(folder) = cache.folder() else {
        return Check::new(State::Warn, WHAT, "none: kernels are compiled at every start").next(NEXT);
    };
    let holds = format!("{}: {} kernels", folder.display(), files(folder, "cubin").0);
    match can_write(folder) {
        Ok(()) => Check::ok(WHAT, holds),
        Err(error) => {
            let value = format!("{holds}; cannot be written: {error}; others are compiled at every start");
            Check::new(State::Warn, WHAT, value).next(NEXT)
        }
    }
}

/// Number and bytes of the files `*.extension` in `folder`; none where it does not exist.
pub fn files(folder: &Path, extension: &str) -> (usize, u64) {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|found| found == extension))
        .filter_map(|entry| entry.metadata().ok())
        .fold((0, 0), |(count, bytes), about| (count + 1, bytes + about.len()))
}

/// Whether `folder`, or the folder that it would be made in, takes new files.
pub fn can_write(folder: &Path) -> io::Result<()> {
    let there = folder.ancestors().find(|folder| folder.exists()).filter(|folder| !folder.as_os_str().is_empty());
    let there = there.unwrap_or(Path::new("."));
    if !there.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, format!("{} is a file", there.display())));
    }
    tempfile::tempfile_in(there).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_folder_is_counted_and_tried() {
        let place = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a.engine", 3), ("b.engine", 4), ("c.timing", 5), ("engine", 6)] {
            fs::write(place.path().join(name), vec![0; bytes]).unwrap();
        }
        assert_eq!(files(place.path(), "engine"), (2, 7));
        assert_eq!(files(&place.path().join("none"), "engine"), (0, 0));

        can_write(place.path()).unwrap();
        can_write(&place.path().join("to/be/made")).unwrap();
        assert!(can_write(&place.path().join("a.engine")).unwrap_err().to_string().contains("a.engine is a file"));
        assert!(can_write(&place.path().join("a.engine/below")).is_err());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 4, "a file is left");
    }
}
