//! The CUDA side on a machine without it: exact errors, no panic; and the names of cubins, which need no GPU.

use trt_embed::Error;
use trt_embed::backend::gpu::kernel_sources;
use trt_embed::cuda::{CudaError, Device, Source, find_nvrtc};

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
