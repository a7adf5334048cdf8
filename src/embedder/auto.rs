//! What `auto` comes to: which executors are tried in which order, which failures make it go on to the next one, and what is told of that.

use super::BackendChoice;
use crate::{Error, Result, Setting};

/// An executor that `auto` may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Candidate {
    Cuda,
    TensorRt,
    Cpu,
}

/// What this build has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Built {
    pub cuda: bool,
    pub tensorrt: bool,
    pub cpu: bool,
}

/// What a caller asked for that is one executor's alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wishes {
    /// How an engine is to be built, which is TensorRT's.
    pub engine_settings: bool,
    /// How values are to be stored, which is the native engine's.
    pub cuda_precision: bool,
}

/// Why a candidate was not taken.
#[derive(Debug)]
pub(super) enum Refusal {
    /// This machine or this executor lacks what it takes: the next one is tried, and the reason told.
    Lacking(Error),
    /// Something is wrong, whoever runs the model: nothing else is tried.
    Failed(Error),
}

/// How far a candidate had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Driver, GPU and libraries were looked for.
    Finding,
    /// The model was brought to it.
    Opening,
}

impl Candidate {
    /// As messages and [`Info::backend`](crate::Info::backend) name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
            Self::Cpu => "cpu",
        }
    }

    /// The choice that asks for it alone.
    pub fn choice(self) -> BackendChoice {
        match self {
            Self::Cuda => BackendChoice::Cuda,
            Self::TensorRt => BackendChoice::TensorRt,
            Self::Cpu => BackendChoice::Cpu,
        }
    }
}

impl Built {
    /// This build.
    pub const THIS: Self =
        Self { cuda: cfg!(feature = "cuda"), tensorrt: cfg!(feature = "tensorrt"), cpu: cfg!(feature = "cpu") };
}

/// The executors that `auto` tries, best first. Settings of an engine are a wish for TensorRT, which the native engine could not fulfil; a precision of
/// the native engine weighs more.
pub(super) fn candidates(built: Built, wishes: Wishes) -> Vec<Candidate> {
    let cuda = built.cuda && (wishes.cuda_precision || !wishes.engine_settings || !built.tensorrt);
    let all = [(cuda, Candidate::Cuda), (built.tensorrt, Candidate::TensorRt), (built.cpu, Candidate::Cpu)];
    all.into_iter().filter_map(|(is, candidate)| is.then_some(candidate)).collect()
}

/// The one executor whose vectors are the same bits in every batch.
///
/// # Errors
/// [`Error::Setting`] where another one, or an engine, was asked for.
pub(super) fn invariant(asked: BackendChoice, engine: bool) -> Result<BackendChoice> {
    match asked {
        BackendChoice::Auto | BackendChoice::Cuda if !engine => Ok(BackendChoice::Cuda),
        _ => Err(Error::Setting {
            setting: Setting::Invariant,
            reason: "only the backend `cuda` gives a text's vector the same bits in every batch; choose it, or leave this out"
                .to_owned(),
        }),
    }
}

/// What an error of a candidate means for `auto`. A damaged file, a GPU that is full or lost, and every fault of an executor at work are errors:
/// another executor would hide them.
pub(super) fn refusal(stage: Stage, error: Error) -> Refusal {
    let lacking = match stage {
        Stage::Finding => is_absent(&error),
        Stage::Opening => matches!(error, Error::NotServed { .. }),
    };
    if lacking { Refusal::Lacking(error) } else { Refusal::Failed(error) }
}

/// Whether the error says that something is not there, or is too old.
fn is_absent(error: &Error) -> bool {
    #[cfg(feature = "cuda")]
    if let Error::Cuda(error) = error {
        use crate::cuda::CudaError as Cuda;
        return matches!(
            error,
            Cuda::NoDriver { .. }
                | Cuda::DriverTooOld { .. }
                | Cuda::NoDevice { .. }
                | Cuda::NoSuchDevice { .. }
                | Cuda::GpuTooOld { .. }
                | Cuda::NvrtcMissing { .. }
                // Any later failure of the driver, at the making of a context say, is that of a GPU which is there: full, or held by another process.
                | Cuda::Driver { during: "start the driver", .. }
        );
    }
    matches!(
        error,
        Error::Backend { .. } | Error::TensorRtLibrary { .. } | Error::TensorRtVersion { .. } | Error::GpuNotServed { .. }
    )
}

/// The first of `candidates` that `open` opens, and why those in front of it were not taken.
///
/// # Errors
/// A failure; [`Error::Backend`] where each of them lacks something, or there are none.
pub(super) fn first<T>(
    candidates: &[Candidate],
    mut open: impl FnMut(Candidate) -> Result<T, Refusal>,
) -> Result<(T, Option<String>)> {
    let mut passed = Vec::new();
    for &candidate in candidates {
        match open(candidate) {
            Ok(opened) => return Ok((opened, reason(&passed))),
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Lacking(error)) => {
                log::info!("auto passes over {}: {error}", candidate.name());
                passed.push((candidate, error.to_string()));
            }
        }
    }
    Err(no_executor(reason(&passed)))
}

/// Why the executors in `passed` were passed over: one after the other, those with the same words together.
fn reason(passed: &[(Candidate, String)]) -> Option<String> {
    let mut groups: Vec<(String, &str)> = Vec::new();
    for (candidate, why) in passed {
        match groups.last_mut().filter(|(_, words)| words == why) {
            Some((names, _)) => *names = format!("{names} and {}", candidate.name()),
            None => groups.push((candidate.name().to_owned(), why)),
        }
    }
    let told: Vec<String> = groups.into_iter().map(|(names, why)| format!("{names}: {why}")).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

/// Where a build without the CPU executor has nothing left.
pub(super) fn no_executor(passed: Option<String>) -> Error {
    let lacks = "this build lacks the feature `cpu`; build it with that feature";
    let reason = passed.map_or_else(|| lacks.to_owned(), |why| format!("{lacks} ({why})"));
    Error::Backend { backend: "cpu", reason }
}

/// The precision in which `auto` opens or runs a model whose weights or values were too large for fp16; `None` where the caller `chose` one, which is never
/// changed, and for every other error.
#[cfg(feature = "cuda")]
pub(super) fn wider(error: &Error, chose: Option<crate::native::Precision>) -> Option<crate::native::Precision> {
    use crate::native::Precision;
    match error {
        Error::WeightOverflow { precision, .. } | Error::Overflow { precision, .. }
            if chose.is_none() && *precision == Precision::Fp16.name() =>
        {
            Some(Precision::Bf16)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend_error(backend: &'static str) -> Error {
        Error::Backend { backend, reason: "not in this build".into() }
    }

    fn not_served() -> Error {
        Error::NotServed { backend: "cuda", part: "rotary positions".into(), served: "absolute ones".into() }
    }

    #[test]
    fn every_build_tries_the_best_that_it_has_first() {
        use Candidate::*;
        for bits in 0..32_u32 {
            let [cuda, tensorrt, cpu, engine_settings, cuda_precision] = [0, 1, 2, 3, 4].map(|bit| bits >> bit & 1 == 1);
            let found = candidates(Built { cuda, tensorrt, cpu }, Wishes { engine_settings, cuda_precision });
            // The order, whichever are there.
            let place = |candidate| [Cuda, TensorRt, Cpu].iter().position(|&of| of == candidate);
            assert!(found.is_sorted_by_key(|&candidate| place(candidate)), "{found:?}");
            assert_eq!((found.contains(&TensorRt), found.contains(&Cpu)), (tensorrt, cpu), "{bits:b}");
            let for_tensorrt = tensorrt && engine_settings && !cuda_precision;
            assert_eq!(found.contains(&Cuda), cuda && !for_tensorrt, "{bits:b}");
        }
    }

    #[test]
    fn invariance_is_the_native_engines_alone() {
        for asked in [BackendChoice::Auto, BackendChoice::Cuda, BackendChoice::TensorRt, BackendChoice::Cpu] {
            for engine in [false, true] {
                let can = !engine && matches!(asked, BackendChoice::Auto | BackendChoice::Cuda);
                match invariant(asked, engine) {
                    Ok(choice) => assert!(can && choice == BackendChoice::Cuda, "{asked:?}"),
                    Err(error) => assert!(!can && error.to_string().contains("invariant"), "{asked:?}: {error}"),
                }
            }
        }
    }

    #[test]
    fn what_is_lacking_is_passed_over_and_what_is_wrong_is_not() {
        let lacking = |stage, error| matches!(refusal(stage, error), Refusal::Lacking(_));
        for stage in [Stage::Finding, Stage::Opening] {
            for wrong in [
                Error::FileChanged { path: "model.safetensors".into() },
                Error::WeightValue { name: "a".into(), reason: "has NaN".into(), next: "fetch it again" },
                Error::WeightOverflow { name: "a".into(), precision: "fp16" },
                Error::Overflow { place: "layer 0".into(), precision: "fp16" },
                Error::WeightFile { path: "model.safetensors".into(), reason: "too short".into() },
            ] {
                let text = wrong.to_string();
                assert!(!lacking(stage, wrong), "{text}");
            }
        }
        assert!(lacking(Stage::Opening, not_served()) && !lacking(Stage::Opening, backend_error("tensorrt")));
        assert!(lacking(Stage::Finding, backend_error("tensorrt")));
        let library = Error::TensorRtLibrary { library: "libnvinfer.so.8".into(), tried: Vec::new(), next: "install it".into() };
        assert!(lacking(Stage::Finding, library));
        let not_on_this_gpu = || Error::GpuNotServed {
            what: "TensorRT RTX 1.7.1".into(),
            gpu: "NVIDIA H100".into(),
            capability: "9.0".into(),
            served: "8.6".into(),
            next: "choose another",
        };
        assert!(lacking(Stage::Finding, not_on_this_gpu()) && !lacking(Stage::Opening, not_on_this_gpu()));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_that_is_absent_or_too_old_is_passed_over_and_one_that_is_full_or_lost_is_not() {
        use crate::cuda::CudaError as Cuda;
        let out_of_memory = Cuda::OutOfMemory { what: "GPU memory", asked: 2, free: 1, total: 3 };
        for (error, absent) in [
            (Cuda::NoDriver { looked_for: "libcuda.so.1".into() }, true),
            (Cuda::DriverTooOld { found: "11.8".into(), needed: "12.0".into() }, true),
            (Cuda::NoDevice { reason: "none".into(), visible: None }, true),
            (Cuda::NoSuchDevice { ordinal: 3, count: 1, visible: None }, true),
            (Cuda::GpuTooOld { name: "Tesla T4".into(), found: "7.5".into(), needed: "8.0".into() }, true),
            (Cuda::NvrtcMissing { looked_for: "libnvrtc.so.12".into() }, true),
            (Cuda::Driver { during: "start the driver", reason: "unknown".into() }, true),
            (Cuda::Driver { during: "make the device's context", reason: "out of memory".into() }, false),
            (out_of_memory, false),
            (Cuda::DeviceLost { during: "launch", reason: "illegal address".into() }, false),
            (Cuda::Compile { name: "a.cu".into(), arch: "sm_90".into(), log: "line 3".into() }, false),
            (Cuda::Argument { call: "choose kernels", reason: "TRT_EMBED_CUDA_ARCH is \"7\"".into() }, false),
        ] {
            let found = matches!(refusal(Stage::Finding, error.clone().into()), Refusal::Lacking(_));
            assert_eq!(found, absent, "{error}");
            // While a model is loaded each of them is an error.
            assert!(matches!(refusal(Stage::Opening, error.clone().into()), Refusal::Failed(_)), "{error}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn only_what_overflows_fp16_is_widened_and_only_where_nobody_chose() {
        use crate::native::Precision;
        let weight = |precision| Error::WeightOverflow { name: "a.weight".into(), precision };
        let value = |precision| Error::Overflow { place: "layer 0".into(), precision };
        assert_eq!([wider(&weight("fp16"), None), wider(&value("fp16"), None)], [Some(Precision::Bf16); 2]);
        for chosen in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
            assert_eq!([wider(&weight("fp16"), Some(chosen)), wider(&value("fp16"), Some(chosen))], [None; 2]);
        }
        // The wider one overflowed too, or nothing did.
        assert_eq!([wider(&weight("bf16"), None), wider(&value("bf16"), None), wider(&not_served(), None)], [None; 3]);
    }

    #[test]
    fn the_first_that_opens_is_taken_and_the_others_are_told() {
        use Candidate::*;
        let all = [Cuda, TensorRt, Cpu];
        let (taken, reason) = first(&all, Ok).unwrap();
        assert_eq!((taken, reason), (Cuda, None));

        let served_by =
            |good: Candidate| {
                first(&all, |candidate| {
                    if candidate == good { Ok(candidate) } else { Err(Refusal::Lacking(backend_error(candidate.name()))) }
                })
                .unwrap()
            };
        let (taken, reason) = served_by(TensorRt);
        assert_eq!((taken, reason.as_deref()), (TensorRt, Some("cuda: cuda backend: not in this build")));
        let (taken, reason) = served_by(Cpu);
        let told = "cuda: cuda backend: not in this build; tensorrt: tensorrt backend: not in this build";
        assert_eq!((taken, reason.as_deref()), (Cpu, Some(told)));
        // Both for want of the same.
        let (_, reason) = first(&all, |candidate| match candidate {
            Cpu => Ok(()),
            _ => Err(Refusal::Lacking(backend_error("gpu"))),
        })
        .unwrap();
        assert_eq!(reason.as_deref(), Some("cuda and tensorrt: gpu backend: not in this build"));
    }

    #[test]
    fn a_failure_ends_the_search_and_so_does_the_last_lack() {
        use Candidate::*;
        let mut tried = Vec::new();
        let failed = first::<()>(&[Cuda, TensorRt, Cpu], |candidate| {
            tried.push(candidate);
            Err(Refusal::Failed(Error::FileChanged { path: "w".into() }))
        });
        assert!(matches!(failed, Err(Error::FileChanged { .. })));
        assert_eq!(tried, [Cuda]);

        let lacking = first::<()>(&[Cuda], |_| Err(Refusal::Lacking(not_served()))).unwrap_err().to_string();
        assert!(
            lacking.contains("lacks the feature `cpu`") && lacking.contains("cuda: the cuda backend cannot run"),
            "{lacking}"
        );
        let none = first::<()>(&[], |_| Ok(())).unwrap_err().to_string();
        assert!(none.ends_with("build it with that feature"), "{none}");
    }
}
