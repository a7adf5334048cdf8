//! What an engine file says of its plan, and the checks against the machine, the model and the call it is loaded for.

use super::builder::Arithmetic;
use super::engine::ProfileRange;
use super::products::Products;
use super::profile::Profile;
use crate::graph::Precision;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a plan was built for. A plan runs only where all of it is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Version of TensorRT.
    pub tensorrt: String,
    /// Compute capability, e.g. `9.0`.
    pub compute_capability: String,
    /// The GPU's name.
    pub gpu: String,
}

/// Where a plan's graph came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Exported by this crate from the model folder, with weights of this type. [`Model::graph`] is
    /// [`Graph::digest`](crate::graph::Graph::digest).
    Exported(Precision),
    /// As `Exported`, with linears in INT8.
    Quantised {
        /// Type of the weights that are not quantised.
        precision: Precision,
        /// [`Graph::digest`](crate::graph::Graph::digest) of the graph without Q/DQ pairs.
        base: String,
    },
    /// An ONNX file of this name. [`Model::graph`] is its SHA-256, or that of `SHA-256  NAME` lines for it and its data files.
    Onnx(String),
}

/// The model that a plan computes. Vectors of different models are not comparable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Where the graph came from.
    pub source: Source,
    /// Hash of the graph with its weights, as [`Source`] says.
    pub graph: String,
    /// SHA-256 of tokenizer.json, or of what all tokenizer files make of it together, where that differs.
    pub tokenizer: String,
    /// The model's own pooling and what follows it, in words. The plan ends before it, so that other pooling is no other plan.
    pub pooling: String,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Longest row.
    pub positions: usize,
    /// Whether an exported graph has GELU's tanh approximation where the model has GELU itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tanh_gelu: bool,
}

/// How near the engine's vectors are to the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    /// Texts compared.
    pub texts: usize,
    /// What they were compared with.
    pub reference: String,
    /// Smallest cosine.
    pub min_cosine: f64,
    /// Largest difference of a component.
    pub max_abs_difference: f64,
    /// Vectors with a NaN or an infinity.
    pub not_finite: usize,
    /// The profile that gave the smallest cosine.
    pub worst_profile: Profile,
    /// Tokens of the text that gave it.
    pub worst_tokens: usize,
}

/// How a plan was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// `trt-embed` and its version.
    pub by: String,
    /// CUDA version of the driver. A plan also runs under other drivers.
    pub cuda_driver: String,
    /// Seconds that it took.
    pub seconds: u64,
    /// Most bytes of workspace, if limited.
    pub workspace_bytes: Option<usize>,
    /// TensorRT's optimisation level, if set.
    pub optimization_level: Option<u8>,
    /// Layers that compute in fp32, by parts of their names.
    #[serde(default)]
    pub fp32_layers: Vec<String>,
    /// Linears of an int8 engine that are not quantised.
    #[serde(default)]
    pub float_linears: Vec<String>,
    /// Tensors of an int8 engine that feed quantised linears: as many matrix products or more run in int8, for linears that one tensor
    /// feeds may be one product. 0 where the graph came from an ONNX file.
    #[serde(default)]
    pub int8_inputs: usize,
}

/// The GPU's time of the encoder at a profile's largest shape, beside engines of the same model in other arithmetic, timed in the same
/// run whether or not they were true enough to be used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// The profile.
    pub profile: Profile,
    /// Microseconds of this engine.
    pub micros: f64,
    /// Microseconds of the fp16 engine; none where this is one or there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fp16_micros: Option<f64>,
    /// Microseconds of the int8 engine; none where this is one or there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub int8_micros: Option<f64>,
}

/// The first part of an engine file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What it runs on.
    pub machine: Machine,
    /// What it computes.
    pub model: Model,
    /// In which arithmetic.
    pub arithmetic: Arithmetic,
    /// For which shapes, in the plans' order.
    pub profiles: Vec<Profile>,
    /// Bytes of each plan: one for all profiles (as where this is empty), or one for each.
    #[serde(default)]
    pub plan_bytes: Vec<u64>,
    /// How it was made.
    pub build: Build,
    /// How good it is, where that was measured.
    pub fidelity: Option<Fidelity>,
    /// How fast it is beside other arithmetic, in the order of `profiles`; empty where that was not measured.
    #[serde(default)]
    pub speed: Vec<Speed>,
    /// What it multiplies in, of the profiles whose kernels are known: those of one shape, in engines that were timed.
    #[serde(default)]
    pub products: Vec<Products>,
}

fn mismatch(field: &'static str, expected: impl fmt::Display, found: impl fmt::Display) -> Result<()> {
    let (expected, found) = (expected.to_string(), found.to_string());
    if expected == found {
        return Ok(());
    }
    Err(Error::EngineMismatch { field, expected, found })
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { profile, micros, fp16_micros, int8_micros } = self;
        write!(f, "{profile}: {micros} us")?;
        for (name, other) in [("fp16", fp16_micros), ("int8", int8_micros)] {
            if let Some(other) = other {
                write!(f, ", {name} {other} us ({:.2})", micros / other)?;
            }
        }
        Ok(())
    }
}

/// Few enough digits that JSON gives the very same number back.
pub(super) fn rounded(digits: String) -> f64 {
    digits.parse().unwrap_or(f64::NAN)
}

impl Manifest {
    /// Where an int8 engine does not run in int8 what was quantised, in words; `None` where it does, for other engines, and where nothing
    /// is known of its products.
    pub fn missing_int8(&self) -> Option<String> {
        let expected = self.build.int8_inputs.max(1);
        let short = |products: &&Products| products.all() > 0 && products.int8 < expected;
        if self.arithmetic != Arithmetic::Int8 {
            return None;
        }
        let said: Vec<String> = self.products.iter().filter(short).map(ToString::to_string).collect();
        let of = match self.build.int8_inputs {
            0 => "a quantised graph".to_owned(),
            inputs => format!("linears that {inputs} quantised tensors feed"),
        };
        (!said.is_empty())
            .then(|| format!("by their kernels' names, matrix products of {of} do not all run in int8: {}", said.join("; ")))
    }

    /// Checks that the plan runs on `machine`.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_machine(&self, machine: &Machine) -> Result<()> {
        mismatch("the version of TensorRT", &machine.tensorrt, &self.machine.tensorrt)?;
        mismatch("the compute capability", &machine.compute_capability, &self.machine.compute_capability)?;
        mismatch("the GPU", &machine.gpu, &self.machine.gpu)
    }

    /// Checks that the plan computes `model`, by its numbers first. Pooling may differ: it is not part of the plan.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_model(&self, model: &Model) -> Result<()> {
        mismatch("the hidden size", model.hidden_size, self.model.hidden_size)?;
        mismatch("the longest row", model.positions, self.model.positions)?;
        mismatch("the hash of the tokenizer", &model.tokenizer, &self.model.tokenizer)?;
        mismatch("the hash of the graph", &model.graph, &self.model.graph)
    }

    /// Checks that what was quantised is the graph with the hash `expected`.
    pub(super) fn check_base(&self, base: &str, expected: &str) -> Result<()> {
        mismatch("the hash of the graph before quantisation", expected, base)
    }

    /// Checks that the plan was built in this arithmetic for these profiles.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_build(&self, arithmetic: Arithmetic, profiles: &[Profile]) -> Result<()> {
        mismatch("the precision", arithmetic, self.arithmetic)?;
        mismatch("the list of profiles", list(profiles), list(&self.profiles))
    }

    /// Checks that the plan has the profiles and the hidden size that this manifest says. `profiles` are those of
    /// [`Engine::profiles`](super::Engine::profiles), one plan's after the other's.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_plan<'a>(&self, profiles: impl IntoIterator<Item = &'a Vec<ProfileRange>>, hidden_size: usize) -> Result<()> {
        let written = |shape: &[i64]| shape.iter().map(i64::to_string).collect::<Vec<_>>().join("x");
        let found: Vec<String> = profiles
            .into_iter()
            .map(|inputs| match inputs.first() {
                Some(range) if range.min == range.max => written(&range.max),
                Some(range) => [&range.min, &range.opt, &range.max].map(|shape| written(shape)).join(":"),
                None => "no input".into(),
            })
            .collect();
        mismatch("the plan's list of profiles", list(&self.profiles), found.join(", "))?;
        mismatch("the plan's hidden size", self.model.hidden_size, hidden_size)
    }

    /// Cuts `plan`, all plans one after the other, into each.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] where the lengths do not add up, or there is neither one plan nor one for each profile.
    pub fn split<'a>(&self, plan: &'a [u8]) -> Result<Vec<&'a [u8]>> {
        if self.plan_bytes.is_empty() {
            return Ok(vec![plan]);
        }
        if self.plan_bytes.len() > 1 {
            mismatch("the number of plans", self.profiles.len(), self.plan_bytes.len())?;
        }
        let mut rest = plan;
        let mut plans = Vec::with_capacity(self.plan_bytes.len());
        for &bytes in &self.plan_bytes {
            let cut = usize::try_from(bytes).ok().and_then(|bytes| rest.split_at_checked(bytes));
            let Some((first, after)) = cut else { break };
            plans.push(first);
            rest = after;
        }
        let said = self.plan_bytes.iter().fold(0_u64, |sum, &bytes| sum.saturating_add(bytes));
        mismatch("the length of the plans", said, plan.len())?;
        Ok(plans)
    }

    /// Checks that the measured fidelity reaches `min_cosine`.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`], also where nothing was measured.
    pub fn check_fidelity(&self, min_cosine: f64) -> Result<()> {
        let measured = self.fidelity.as_ref().filter(|fidelity| fidelity.not_finite == 0).map(|fidelity| fidelity.min_cosine);
        if measured.is_some_and(|cosine| cosine >= min_cosine) {
            return Ok(());
        }
        let found = measured.map_or_else(|| "not measured".to_owned(), |cosine| cosine.to_string());
        Err(Error::EngineMismatch { field: "the smallest cosine", expected: format!("at least {min_cosine}"), found })
    }
}

fn list(profiles: &[Profile]) -> String {
    profiles.iter().map(Profile::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

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
    fn int8_that_does_not_run_is_told() {
        let products = |int8| {
            let names: Vec<String> =
                (0..int8).map(|_| "gemm_i8i8_i8i32".to_owned()).chain(["gemm_f32f32_f32f32".into()]).collect();
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
}
