//! What TensorRT for RTX says where there is no driver, below the doors that ask for a GPU first.

use super::builder::failure;
use super::*;
use crate::NoProgress;

const TINY: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tensorrt/tiny.onnx"));

#[test]
#[ignore = "needs TensorRT for RTX and its headers, and no NVIDIA driver"]
fn without_a_driver_no_plan_is_loaded_and_the_reason_is_told() {
    let library = Library::load().unwrap();
    let settings =
        BuildSettings { arithmetic: Arithmetic::Fp32, profiles: vec!["1x8".parse().unwrap()], ..BuildSettings::default() };
    let plan = build_plan(&library, Target::Capabilities(&[(8, 6).into()]), TINY, &settings, &NoProgress).unwrap().bytes;
    let runtime = library.handle().create_runtime().unwrap();
    let damaged = [&plan[..64], &[0; 64]].concat();
    for (bytes, part) in [
        (plan.as_slice(), "CUDA driver version is insufficient"),
        (&plan[..plan.len() / 2], "deserializeCudaEngine"),
        (&damaged, "deserializeCudaEngine"),
        (b"a plan of another TensorRT, or none, but one of more than 64 bytes", "deserializeCudaEngine"),
        (b"short", "deserializeCudaEngine"),
        (b"", "deserializeCudaEngine"),
    ] {
        let exception = runtime.deserialize(bytes).err().unwrap();
        assert!(!runtime.is_for_another_gpu(bytes), "no GPU was asked");
        let error = failure("load the engine", &exception);
        assert!(matches!(error, Error::TensorRt { action: "load the engine", .. }), "{error}");
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
}
