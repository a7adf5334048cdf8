//! Manifests: what differs is named, and what earlier versions wrote is read.

use super::*;
use crate::tokens::SizeRange;

pub(crate) fn manifest() -> Manifest {
    Manifest {
        machine: Machine { tensorrt: "8.6.0".into(), compute_capability: "9.0".into(), gpu: "NVIDIA H200".into() },
        model: Model {
            source: Source::Exported(Precision::Fp32),
            graph: "a".repeat(64),
            tokenizer: "b".repeat(64),
            pooling: "mean, normalize".into(),
            hidden_size: 384,
            positions: 512,
            tanh_gelu: false,
            tanh_gelu_from: 0,
        },
        arithmetic: Arithmetic::Fp16,
        profiles: vec!["1x1:1x128:8x512".parse().unwrap(), "1x16".parse().unwrap()],
        plan_bytes: Vec::new(),
        build: Build {
            by: "trt-embed 0.1.0".into(),
            cuda_driver: "13.0".into(),
            seconds: 45,
            workspace_bytes: None,
            optimization_level: Some(3),
            fp32_layers: Vec::new(),
            float_linears: Vec::new(),
            int8_inputs: 0,
        },
        speed: Vec::new(),
        products: Vec::new(),
        costs: Vec::new(),
        unproven: None,
        fidelity: Some(Fidelity {
            texts: 60,
            reference: "cpu".into(),
            min_cosine: 0.99995,
            max_abs_difference: 3.1e-4,
            not_finite: 0,
            worst_profile: "1x16".parse().unwrap(),
            worst_tokens: 9,
        }),
    }
}

fn check(built: &Manifest, here: &Manifest) -> Result<()> {
    built.check_machine(&here.machine)?;
    built.check_model(&here.model)?;
    built.check_build(here.arithmetic, &here.profiles)
}

#[test]
fn each_field_that_differs_is_named() {
    check(&manifest(), &manifest()).unwrap();
    type Change = (fn(&mut Manifest), &'static str);
    let changes: [Change; 10] = [
        (|here| here.machine.tensorrt = "8.6.1".into(), "the version of TensorRT"),
        (|here| here.machine.compute_capability = "8.9".into(), "the compute capability"),
        (|here| here.machine.gpu = "NVIDIA L4".into(), "the GPU"),
        (|here| here.model.graph = "c".repeat(64), "the hash of the graph"),
        (|here| here.model.tokenizer = "c".repeat(64), "the hash of the tokenizer"),
        (|here| here.model.hidden_size = 768, "the hidden size"),
        (|here| here.model.positions = 256, "the longest row"),
        (|here| here.arithmetic = Arithmetic::Fp32, "the precision"),
        (|here| here.profiles.swap(0, 1), "the list of profiles"),
        (|here| here.profiles.truncate(1), "the list of profiles"),
    ];
    for (change, name) in changes {
        let mut here = manifest();
        change(&mut here);
        let error = check(&manifest(), &here).unwrap_err();
        assert!(matches!(error, Error::EngineMismatch { field, .. } if field == name), "{name}: {error}");
    }
}

#[test]
fn a_plan_that_was_built_ahead_of_time_is_for_every_gpu_of_its_capabilities() {
    let rtx = Version { flavour: crate::tensorrt::library::Flavour::Rtx, major: 1, minor: 7, patch: 1 };
    let mut built = manifest();
    built.machine = Machine::ahead_of_time(rtx, &[(8, 6).into(), (12, 0).into()]);
    built.unproven = Some(Unproven { min_cosine: 0.9999 });
    let read: Manifest = serde_json::from_str(&serde_json::to_string(&built).unwrap()).unwrap();
    assert_eq!(read, built);
    assert_eq!(read.machine.gpu_words(), "any GPU of compute capability 8.6, 12.0");
    let machine = |tensorrt: &str, capability: &str| Machine {
        tensorrt: tensorrt.into(),
        compute_capability: capability.into(),
        gpu: "NVIDIA A10G".into(),
    };
    for capability in ["8.6", "12.0"] {
        read.check_machine(&machine("RTX 1.7.1", capability)).unwrap();
    }
    for (tensorrt, capability, name, expected) in [
        ("RTX 1.7.1", "9.0", "the compute capability", "9.0"),
        ("RTX 1.7.1", "2.0", "the compute capability", "2.0"),
        ("RTX 1.7.0", "8.6", "the version of TensorRT", "RTX 1.7.0"),
        ("11.4.0", "8.6", "the version of TensorRT", "11.4.0"),
    ] {
        let error = read.check_machine(&machine(tensorrt, capability)).unwrap_err();
        let named = matches!(&error, Error::EngineMismatch { field, expected: here, .. } if *field == name && here == expected);
        assert!(named, "{error}");
    }
    // A plan that was built on a GPU is that GPU's.
    let error = manifest().check_machine(&Machine { gpu: "any".into(), ..manifest().machine }).unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { field: "the GPU", .. }), "{error}");
}

#[test]
fn what_was_to_be_shown_gives_way_to_what_was() {
    let mut unproven = manifest();
    let fidelity = unproven.fidelity.take().unwrap();
    unproven.unproven = Some(Unproven { min_cosine: 0.9999 });
    let costs = vec![Cost { profile: "1x16".parse().unwrap(), min_micros: 100.0, max_micros: 100.0 }];
    unproven.take_proof(Proof { fidelity: fidelity.clone(), costs: costs.clone() });
    assert_eq!(unproven, Manifest { fidelity: Some(fidelity), costs, ..manifest() });
}

#[test]
fn what_is_not_part_of_the_plan_may_differ() {
    let mut here = manifest();
    here.model.pooling = "cls".into();
    here.build.cuda_driver = "12.4".into();
    here.fidelity = None;
    check(&manifest(), &here).unwrap();
}

#[test]
fn engines_of_earlier_versions_have_the_model_s_own_gelu() {
    let mut model = manifest().model;
    let json = serde_json::to_string(&model).unwrap();
    assert!(!json.contains("tanh_gelu"), "{json}");
    assert_eq!(serde_json::from_str::<Model>(&json).unwrap(), model);
    model.tanh_gelu = true;
    model.tanh_gelu_from = 512;
    assert_eq!(serde_json::from_str::<Model>(&serde_json::to_string(&model).unwrap()).unwrap(), model);
}

#[test]
fn speeds_are_read_as_earlier_versions_wrote_them_and_say_what_was_measured() {
    let read = |json: &str| serde_json::from_str::<Speed>(json).unwrap();
    for (json, said) in [
        (r#"{"profile":"1x16","micros":230.6,"fp16_micros":141.2}"#, "1x16: 230.6 us, fp16 141.2 us (1.63)"),
        (r#"{"profile":"1x16","micros":141.2,"int8_micros":230.6}"#, "1x16: 141.2 us, int8 230.6 us (0.61)"),
        (r#"{"profile":"1x16","micros":141.2}"#, "1x16: 141.2 us"),
    ] {
        assert_eq!(read(json).to_string(), said);
        assert_eq!(serde_json::to_string(&read(json)).unwrap(), json);
    }
}

#[test]
fn costs_are_kept_as_they_were_measured_and_earlier_files_have_none() {
    let mut manifest = manifest();
    let json = serde_json::to_string(&manifest).unwrap();
    assert!(!json.contains("costs"), "{json}");
    assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap().shape_costs(), None);
    let cost = |min, max, min_micros, max_micros| ShapeCost { range: SizeRange::padded(min, max), min_micros, max_micros };
    let measured = ShapeCosts::new(vec![
        cost((1, 1), (8, 512), 410.249_97, 5000.0),
        // Two times that only the digits beyond those kept tell apart.
        cost((1, 16), (1, 16), 96.1, 96.1),
    ]);
    manifest.note_costs(&measured);
    let read: Manifest = serde_json::from_str(&serde_json::to_string(&manifest).unwrap()).unwrap();
    assert_eq!(read, manifest);
    let kept = read.shape_costs().unwrap();
    assert_eq!(kept.shapes()[0], cost((1, 1), (8, 512), 410.2, 5000.0));
    assert_eq!(kept.shapes()[1], measured.shapes()[1]);
}

#[test]
fn a_limit_above_every_profile_is_refused_with_both_numbers() {
    let manifest = manifest();
    for tokens in [1, 16, 17, 512] {
        manifest.check_max_tokens(tokens).unwrap();
    }
    let error = manifest.check_max_tokens(513).unwrap_err();
    assert!(matches!(error, Error::Setting { setting: crate::Setting::MaxTokens, .. }), "{error}");
    for part in ["513", "512", "1x513", "profile"] {
        assert!(error.to_string().contains(part), "no {part} in: {error}");
    }
}

#[test]
fn int8_that_does_not_run_is_told() {
    let products = |int8| {
        let names: Vec<String> = (0..int8).map(|_| "gemm_i8i8_i8i32".to_owned()).chain(["gemm_f32f32_f32f32".into()]).collect();
        vec![Products::count("1x16".parse().unwrap(), &names)]
    };
    let mut manifest = manifest();
    manifest.products = products(0);
    assert_eq!(manifest.missing_int8(), None);
    manifest.arithmetic = Arithmetic::Int8;
    let said = manifest.missing_int8().unwrap();
    assert!(said.contains("a quantised graph") && said.contains("1x16: 1 fp32"), "{said}");
    manifest.products = products(1);
    assert_eq!(manifest.missing_int8(), None);
    manifest.build.int8_inputs = 4;
    let said = manifest.missing_int8().unwrap();
    assert!(said.contains("4 quantised tensors") && said.contains("1x16: 1 int8, 1 fp32"), "{said}");
    manifest.products = products(4);
    assert_eq!(manifest.missing_int8(), None);
    // Kernels whose names tell nothing, and none at all.
    manifest.products = vec![Products::count("1x16".parse().unwrap(), &["__myl_FcMulAdd"])];
    assert_eq!(manifest.missing_int8(), None);
    manifest.products.clear();
    assert_eq!(manifest.missing_int8(), None);
}

#[test]
fn a_plan_with_other_profiles_than_its_manifest_is_refused() {
    let range = |min: [i64; 2], opt: [i64; 2], max: [i64; 2]| {
        vec![ProfileRange { tensor: 0, min: min.into(), opt: opt.into(), max: max.into() }]
    };
    let mut profiles = vec![range([1, 1], [1, 128], [8, 512]), range([1, 16], [1, 16], [1, 16])];
    manifest().check_plan(&profiles, 384).unwrap();
    let error = manifest().check_plan(&profiles, 768).unwrap_err();
    assert!(matches!(error, Error::EngineMismatch { field: "the plan's hidden size", .. }), "{error}");
    profiles[0][0].max[1] = 256;
    let error = manifest().check_plan(&profiles, 384).unwrap_err().to_string();
    assert!(error.contains("1x1:1x128:8x256, 1x16, expected 1x1:1x128:8x512, 1x16"), "{error}");
}

#[test]
fn plans_are_cut_as_the_manifest_says_or_refused() {
    let mut manifest = manifest();
    let plan = [1_u8, 2, 3, 4, 5];
    assert_eq!(manifest.split(&plan).unwrap(), [&plan]);
    manifest.plan_bytes = vec![5];
    assert_eq!(manifest.split(&plan).unwrap(), [&plan]);
    manifest.plan_bytes = vec![2, 3];
    assert_eq!(manifest.split(&plan).unwrap(), [&plan[..2], &plan[2..]]);
    for wrong in [vec![2, 2], vec![2, 4], vec![6], vec![1, 1, 3], vec![u64::MAX, 6], vec![u64::MAX, u64::MAX]] {
        manifest.plan_bytes = wrong;
        assert!(matches!(manifest.split(&plan), Err(Error::EngineMismatch { .. })), "{:?}", manifest.plan_bytes);
    }
}

#[test]
fn fidelity_below_the_bar_or_not_measured_is_refused() {
    let mut manifest = manifest();
    manifest.check_fidelity(0.9999).unwrap();
    assert!(matches!(manifest.check_fidelity(0.99999), Err(Error::EngineMismatch { .. })));
    assert!(matches!(manifest.check_fidelity(f64::NAN), Err(Error::EngineMismatch { .. })));
    manifest.fidelity.as_mut().unwrap().not_finite = 1;
    assert!(matches!(manifest.check_fidelity(0.9), Err(Error::EngineMismatch { .. })));
    manifest.fidelity = None;
    let error = manifest.check_fidelity(0.9).unwrap_err().to_string();
    assert!(error.contains("not measured"), "{error}");
}
