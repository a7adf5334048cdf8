//! Requests for engines: what cannot work is said before anything is built.

use super::*;
use crate::NoProgress;

fn settings(arithmetic: Arithmetic) -> BuildSettings {
    let profiles = ["1x16", "1x1:2x32:4x64"].map(|text| text.parse().unwrap()).into();
    BuildSettings { arithmetic, profiles, ..BuildSettings::default() }
}

#[test]
fn the_bars_follow_from_the_precision() {
    assert_eq!(Gate::Standard.bar(Arithmetic::Fp16), Some(0.9999));
    assert_eq!(Gate::Standard.bar(Arithmetic::Fp32), Some(0.99999));
    assert_eq!(Gate::MinCosine(0.5).bar(Arithmetic::Fp16), Some(0.5));
    assert_eq!(Gate::Off.bar(Arithmetic::Fp32), None);
}

#[test]
fn ranges_go_with_int8_of_the_model_s_own_graph() {
    let folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
    let (ranges, onnx) = (Quantization::default(), Path::new("q.onnx"));
    for (arithmetic, onnx, quantization, right) in [
        (Arithmetic::Int8, None, Some(&ranges), true),
        (Arithmetic::Int8, Some(onnx), None, true),
        (Arithmetic::Fp16, Some(onnx), None, true),
        (Arithmetic::Int8, None, None, false),
        (Arithmetic::Int8, Some(onnx), Some(&ranges), false),
        (Arithmetic::Fp16, None, Some(&ranges), false),
    ] {
        let settings = settings(arithmetic);
        let request = EngineRequest { onnx, settings, quantization, gate: Gate::Off, ..EngineRequest::new(&folder) };
        match request.check() {
            Ok(()) => assert!(right, "{request:?}"),
            Err(Error::Setting { setting, .. }) => assert!(!right && setting == Setting::Calibration, "{request:?}"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn only_the_exact_gelu_of_the_model_s_own_graph_is_approximated() {
    let mut folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
    let check = |folder: &ModelFolder, onnx: Option<&Path>| {
        EngineRequest { onnx, tanh_gelu: Some(0), gate: Gate::Off, ..EngineRequest::new(folder) }.check()
    };
    check(&folder, None).unwrap();
    let error = check(&folder, Some(Path::new("model.onnx"))).unwrap_err();
    assert!(matches!(error, Error::Setting { setting: Setting::TanhGelu, .. }), "{error}");
    for activation in [Activation::GeluTanh, Activation::Relu] {
        folder.config.activation = activation;
        let error = check(&folder, None).unwrap_err();
        assert!(error.to_string().contains("hidden_act"), "{error}");
    }
}

#[test]
fn gelu_by_tanh_begins_at_a_shape_that_there_is() {
    let folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
    let settings = settings(Arithmetic::Fp16); // 16 and 256 tokens
    for (least, passes, divided) in
        [(0, true, None), (16, true, None), (17, true, Some(17)), (256, true, Some(256)), (257, false, Some(257))]
    {
        let request =
            EngineRequest { tanh_gelu: Some(least), gate: Gate::Off, settings: settings.clone(), ..EngineRequest::new(&folder) };
        assert_eq!(request.divided_gelu(), divided);
        match request.check() {
            Ok(()) => assert!(passes, "{least}"),
            Err(Error::Setting { setting: Setting::TanhGelu, reason }) => {
                assert!(!passes && reason.contains("257") && reason.contains("256"), "{reason}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_limit_above_the_model_s_own_reaches_the_profiles_and_no_other_does() {
    let mut folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
    folder.max_seq_length = Some(64);
    let request = |max_tokens, profiles: &[&str]| {
        let mut request = EngineRequest { max_tokens, gate: Gate::Off, ..EngineRequest::new(&folder) };
        request.settings.profiles = profiles.iter().map(|text| text.parse().unwrap()).collect();
        request
    };
    let own = request(None, &[]).profiles();
    assert_eq!(own, default_profiles(64));
    // Engines that are cached for the model's own limit stay what is asked for.
    for at_most in [1, 63, 64] {
        assert_eq!(request(Some(at_most), &[]).profiles(), own);
    }
    assert_eq!(request(Some(200), &[]).profiles(), default_profiles(200));
    request(Some(200), &[]).check().unwrap();
    request(Some(30), &["1x16", "1x1:2x16:4x30"]).check().unwrap();
    for (max_tokens, profiles, parts) in [(31, &["1x16", "4x30"][..], ["31", "30"]), (209, &[], ["209", "208"])] {
        let request = request(Some(max_tokens), profiles);
        let error = request.check().unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn what_cannot_work_is_said_before_the_build() {
    let folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
    let mut request = EngineRequest::new(&folder);
    request.gate = Gate::Off;
    request.check().unwrap();
    request.settings.profiles = vec!["1x209".parse().unwrap()];
    let error = request.check().unwrap_err().to_string();
    assert!(error.contains("209") && error.contains("208"), "{error}");

    // A folder with configuration and tokenizer alone.
    let bare = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(folder.root.join(name), bare.path().join(name)).unwrap();
    }
    let bare = ModelFolder::open(bare.path()).unwrap();
    let mut request = EngineRequest::new(&bare);
    let error = request.check().unwrap_err();
    assert!(matches!(error, Error::NoReference { .. }) && error.to_string().contains("without the comparison"), "{error}");
    request.gate = Gate::Off;
    request.check().unwrap();
}

#[test]
fn what_is_timed_is_timed_while_no_other_build_can_begin() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    // As another process that wants to build: it does not get the lock, and is told to wait.
    struct Impatient;
    impl Progress for Impatient {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let other_builds = || match Cache::at(folder.path()).lock(&Impatient) {
        Ok(_) => true,
        Err(Error::Cancelled { .. }) => false,
        Err(other) => panic!("{other}"),
    };
    assert!(other_builds());
    let during = phase_alone(&NoProgress, &cache, "measuring", || Ok(other_builds())).unwrap();
    assert!(!during, "another build began while this one measured");
    assert!(other_builds(), "the lock outlives what it was taken for");
    // Also after a failure.
    phase_alone(&NoProgress, &cache, "measuring", || Err::<(), _>(misplaced_calibration())).unwrap_err();
    assert!(other_builds());
}
