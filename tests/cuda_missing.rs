//! The CUDA side on a machine without it: exact errors, no panic; and the cubin cache, which needs no GPU.

use std::cell::Cell;
use std::fs;
use trt_embed::Error;
use trt_embed::cuda::{CubinCache, CudaError, Device, Source, find_nvrtc, kernel_sources};

/// Whether this machine has a driver, asked without the code under test.
fn has_driver() -> bool {
    // SAFETY: libcuda's initialisers may run at any time.
    ["libcuda.so.1", "libcuda.so"].iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok())
}

#[test]
fn no_driver_is_an_error_that_says_what_was_looked_for() {
    for asked in [Device::open(0).map(drop), Device::open(7).map(drop), Device::count().map(drop)] {
        match asked {
            Err(error @ CudaError::NoDriver { .. }) if !has_driver() => assert_eq!(
                error.to_string(),
                "no NVIDIA driver: libcuda.so.1 (or libcuda.so) on the loader's path cannot be opened; \
                 install the driver, or start the container with the GPU (docker run --gpus all)"
            ),
            other => assert!(has_driver(), "without a driver: {other:?}"),
        }
    }
}

#[test]
fn device_numbers_and_hidden_devices_are_named() {
    let visible = Some("3".to_owned());
    assert_eq!(
        CudaError::NoSuchDevice { ordinal: 4, count: 1, visible: visible.clone() }.to_string(),
        "GPU 4 does not exist: there are 1, numbered from 0; CUDA_VISIBLE_DEVICES is \"3\""
    );
    assert_eq!(
        CudaError::NoDevice { reason: "CUDA_ERROR_NO_DEVICE".to_owned(), visible: None }.to_string(),
        "the NVIDIA driver sees no GPU (CUDA_ERROR_NO_DEVICE)"
    );
    let error = Error::from(CudaError::NoSuchDevice { ordinal: 4, count: 1, visible });
    assert!(matches!(error, Error::Cuda(CudaError::NoSuchDevice { ordinal: 4, .. })), "{error:?}");
}

#[test]
fn an_nvrtc_newer_than_the_driver_counts_as_missing() {
    // No NVRTC has major version 0 or less, so whatever is installed here is refused.
    let error = find_nvrtc(0).expect_err("an NVRTC of CUDA 0");
    let text = error.to_string();
    assert!(matches!(&error, CudaError::NvrtcMissing { looked_for } if looked_for.contains("libnvrtc.so")), "{error:?}");
    assert!(text.starts_with("NVRTC (CUDA's run-time compiler) is not found; looked for "), "{text}");
    assert!(text.contains("pip install nvidia-cuda-nvrtc-cu12"), "{text}");
}

#[test]
fn a_key_depends_on_all_that_decides_the_cubin() {
    let source = Source::new("a.cu", "text", &["-x", "-y"]);
    let key = source.key("sm_90", (12, 9));
    assert_eq!(key.len(), 64);
    assert_eq!(key, Source::new("b.cu", "text", &["-x", "-y"]).key("sm_90", (12, 9)), "the name is for messages only");
    let others = [
        Source::new("a.cu", "text ", &["-x", "-y"]).key("sm_90", (12, 9)),
        Source::new("a.cu", "text", &["-x"]).key("sm_90", (12, 9)),
        Source::new("a.cu", "text", &["-x-y"]).key("sm_90", (12, 9)),
        Source::new("a.cu", "text", &["-y", "-x"]).key("sm_90", (12, 9)),
        source.key("sm_80", (12, 9)),
        source.key("sm_90", (12, 8)),
        source.key("sm_90", (13, 9)),
    ];
    for (i, other) in others.iter().enumerate() {
        assert_ne!(key, *other, "variant {i}");
        assert!(!others[..i].contains(other), "variant {i} repeats");
    }
    let [pooling, mask] = kernel_sources();
    assert_ne!(pooling.key("sm_90", (12, 9)), mask.key("sm_90", (12, 9)));
}

/// A cache in a fresh folder, and a compiler that counts its calls.
struct Fixture {
    folder: tempfile::TempDir,
    compiled: Cell<u32>,
}

impl Fixture {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), compiled: Cell::new(0) }
    }

    fn get(&self, key: &str) -> Vec<u8> {
        let compile = || {
            self.compiled.set(self.compiled.get() + 1);
            Ok(format!("cubin of {key}").into_bytes())
        };
        CubinCache::at(self.folder.path()).get_or_compile(key, compile).unwrap()
    }

    fn file(&self, key: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("{key}.cubin"))
    }
}

#[test]
fn a_cubin_is_compiled_once_for_each_key() {
    let cache = Fixture::new();
    for _ in 0..3 {
        assert_eq!(cache.get("one"), b"cubin of one");
    }
    assert_eq!(cache.compiled.get(), 1);
    assert_eq!(cache.get("two"), b"cubin of two");
    assert_eq!(cache.compiled.get(), 2);
    let left = fs::read_dir(cache.folder.path()).unwrap().count();
    assert_eq!(left, 2, "two cubins and no temporary file");
}

#[test]
fn damaged_entries_are_compiled_anew_and_replaced() {
    let cache = Fixture::new();
    cache.get("key");
    let whole = fs::read(cache.file("key")).unwrap();
    let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|cut| whole[..cut].to_vec()).collect();
    damaged.extend((0..whole.len()).map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    }));
    damaged.push([whole.as_slice(), b"x"].concat());
    for (i, bytes) in damaged.iter().enumerate() {
        let before = cache.compiled.get();
        fs::write(cache.file("key"), bytes).unwrap();
        assert_eq!(cache.get("key"), b"cubin of key", "damage {i}");
        assert_eq!(cache.compiled.get(), before + 1, "damage {i} was believed");
        assert_eq!(fs::read(cache.file("key")).unwrap(), whole, "damage {i} was not replaced");
    }
}

#[test]
fn a_cache_that_cannot_be_written_costs_only_time() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("a-file");
    fs::write(&blocked, b"").unwrap();
    for cache in [CubinCache::at(blocked.join("kernels")), CubinCache::none()] {
        assert_eq!(cache.get_or_compile("key", || Ok(vec![1, 2])), Ok(vec![1, 2]));
    }
}

#[test]
fn a_failed_compilation_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let error = CudaError::Compile { name: "a.cu".to_owned(), arch: "sm_90".to_owned(), log: "line 3".to_owned() };
    let cache = CubinCache::at(folder.path());
    assert_eq!(cache.get_or_compile("key", || Err(error.clone())), Err(error));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn threads_that_race_for_a_key_all_get_the_whole_cubin() {
    let folder = tempfile::tempdir().unwrap();
    let cubin: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let got = CubinCache::at(folder.path()).get_or_compile("key", || Ok(cubin.clone())).unwrap();
                    assert!(got == cubin);
                }
            });
        }
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
