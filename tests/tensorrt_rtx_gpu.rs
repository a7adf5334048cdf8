//! TensorRT for RTX on a GPU that it does not serve, as those of data centres with compute capability 9.0: refused by name, by this crate before
//! anything is loaded and by TensorRT itself.
#![cfg(all(feature = "tensorrt", feature = "cpu"))]

use trt_embed::backend::tensorrt::{
    Arithmetic, BuildSettings, Cache, Engine, EngineFile, EngineRequest, Library, Runtime, Target, build_engine, build_plan,
};
use trt_embed::cuda::Device;
use trt_embed::model::ModelFolder;
use trt_embed::{BackendChoice, Embedder, Error, NoProgress};

const TINY: &[u8] = include_bytes!("fixtures/tensorrt/tiny.onnx");

/// Asserts that `error` names the GPU, its capability, those that are served and what to do.
fn is_refusal(error: &Error, device: &Device) {
    println!("{error}");
    let Error::GpuNotServed { gpu, capability, served, .. } = error else { panic!("another error: {error}") };
    assert_eq!((gpu, capability.as_str()), (&device.properties().name, "9.0"));
    assert!(served.contains("8.6"), "{served}");
    for part in ["backend cuda", "TensorRT 8.6"] {
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0, and TensorRT for RTX with its headers"]
fn a_gpu_that_is_not_served_is_refused_by_name() {
    let (device, library) = (Device::open(0).unwrap(), Library::load().unwrap());
    assert_eq!(device.properties().compute_capability, (9, 0), "{}", device.properties().name);
    is_refusal(&library.check_device(&device).unwrap_err(), &device);

    let mut settings = BuildSettings::default();
    settings.arithmetic = Arithmetic::Fp32;
    settings.profiles = vec!["1x8".parse().unwrap()];
    is_refusal(&build_plan(&library, &device, TINY, &settings, &NoProgress).unwrap_err(), &device);

    // For a GPU that is not here it builds all the same, and TensorRT itself refuses to load that.
    let wanted = ["8.6".parse().unwrap()];
    let plan = build_plan(&library, Target::Capabilities(&wanted), TINY, &settings, &NoProgress).unwrap();
    let runtime = Runtime::new(&library, &device).unwrap();
    // SAFETY: the plan is as the builder gave it.
    is_refusal(&unsafe { Engine::deserialize(&runtime, &plan.bytes) }.unwrap_err(), &device);
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0, and TensorRT for RTX with its headers"]
fn an_embedder_refuses_and_auto_goes_on() {
    let (device, library) = (Device::open(0).unwrap(), Library::load().unwrap());
    let model = "tests/fixtures/mpnet";
    let folder = ModelFolder::open(model).unwrap();
    let disk = tempfile::tempdir().unwrap();
    let mut request = EngineRequest::new(&folder);
    request.settings.profiles = vec!["1x16".parse().unwrap()];
    let (cache, wanted) = (Cache::at(disk.path()), ["8.6".parse().unwrap()]);
    let engine = build_engine(&library, Target::Capabilities(&wanted), &cache, &request, &NoProgress).unwrap();
    let path = disk.path().join("a.engine");
    EngineFile::write(&path, &engine.manifest, engine.plan()).unwrap();

    let open = |choice| Embedder::builder(model).backend(choice);
    is_refusal(&open(BackendChoice::TensorRt).engine(&path).build().unwrap_err(), &device);
    is_refusal(&open(BackendChoice::TensorRt).build().unwrap_err(), &device);
    // Settings of an engine let `auto` try TensorRT before the kernels.
    let passed = open(BackendChoice::Auto).build_settings(BuildSettings::default()).build().unwrap();
    let info = passed.info();
    assert_ne!(info.backend, "tensorrt");
    assert!(info.backend_reason.as_ref().is_some_and(|reason| reason.contains("9.0")), "{:?}", info.backend_reason);
}
