//! What an engine file says of its plan, and the checks against the machine, the model and the call it is loaded for.

use crate::graph::Precision;
use crate::tensorrt::library::{
    Arithmetic, ComputeCapability, Products, Profile, ProfileRange, Shape, Version, check_longest, list_capabilities,
};
use crate::tokens::{ShapeCost, ShapeCosts, SizeRange};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a plan was built for. A plan runs only where all of it is the same; one that was built ahead of time, on every GPU of its compute
/// capabilities.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Flavour and version of TensorRT, e.g. `8.6.0` or `RTX 1.7.1`.
    pub tensorrt: String,
    /// Compute capability, e.g. `9.0`; of a plan that was built ahead of time one or more, e.g. `8.6, 8.9`.
    pub compute_capability: String,
    /// The GPU's name; `any` of a plan that was built ahead of time.
    pub gpu: String,
}

/// [`Machine::gpu`] of plans that were built ahead of time. No GPU has this name.
const ANY_GPU: &str = "any";

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
    /// Where it has that in some profiles alone: those whose largest shape holds at least so many tokens. 0 where it has it in all or none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tanh_gelu_from: u64,
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

/// What an engine must still show, on a GPU that can run it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unproven {
    /// The smallest cosine that passes.
    pub min_cosine: f64,
}

/// What an engine that was built ahead of time showed on a GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::tensorrt) struct Proof {
    pub fidelity: Fidelity,
    pub costs: Vec<Cost>,
}

/// How a plan was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// `trt-embed` and its version.
    pub by: String,
    /// CUDA version of the driver; `none` of a plan that was built ahead of time. A plan also runs under other drivers.
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

/// The GPU's time of a whole call at a profile, by which shapes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// The profile.
    pub profile: Profile,
    /// Microseconds at its smallest shape.
    pub min_micros: f64,
    /// Microseconds at its largest shape.
    pub max_micros: f64,
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
    /// What it must show when it is first loaded, where it was built without a GPU that could have run it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unproven: Option<Unproven>,
    /// How fast it is beside other arithmetic, in the order of `profiles`; empty where that was not measured.
    #[serde(default)]
    pub speed: Vec<Speed>,
    /// What it multiplies in, of the profiles whose kernels are known: those of one shape, in engines that were timed.
    #[serde(default)]
    pub products: Vec<Products>,
    /// What its shapes cost, in the order of `profiles`, so that every load chooses the same ones. Empty where that was not measured: it is then
    /// measured at every load.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub costs: Vec<Cost>,
}

/// What is not written, so that files and cache keys of earlier versions stay what they were.
pub(super) fn is_zero(number: &u64) -> bool {
    *number == 0
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

impl Machine {
    /// GPUs that need not be here: all of these compute capabilities.
    pub(in crate::tensorrt) fn ahead_of_time(version: Version, capabilities: &[ComputeCapability]) -> Self {
        Self { tensorrt: version.to_string(), compute_capability: list_capabilities(capabilities), gpu: ANY_GPU.into() }
    }

    /// Whether plans for it were built ahead of time, for every GPU of its compute capabilities.
    pub fn is_ahead_of_time(&self) -> bool {
        self.gpu == ANY_GPU
    }

    /// The machine in words, e.g. `NVIDIA L4, compute capability 8.9`.
    pub fn gpu_words(&self) -> String {
        let capability = &self.compute_capability;
        if self.is_ahead_of_time() {
            format!("any GPU of compute capability {capability}")
        } else {
            format!("{}, compute capability {capability}", self.gpu)
        }
    }
}

/// Few enough digits that JSON gives the very same number back.
pub(in crate::tensorrt) fn rounded(digits: String) -> f64 {
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

    /// What shapes cost, as [`Manifest::costs`] says.
    pub fn shape_costs(&self) -> Option<ShapeCosts> {
        let sides = |shape: Shape| (shape.batch as usize, shape.seq as usize);
        let cost = |&Cost { profile, min_micros, max_micros }: &Cost| ShapeCost {
            range: SizeRange::padded(sides(profile.min()), sides(profile.max())),
            min_micros,
            max_micros,
        };
        (!self.costs.is_empty()).then(|| ShapeCosts::new(self.costs.iter().map(cost).collect()))
    }

    /// Notes `costs`, measured with shapes in the order of `profiles`.
    pub(in crate::tensorrt) fn note_costs(&mut self, costs: &ShapeCosts) {
        let micros = |micros: f64| rounded(format!("{micros:.1}"));
        let cost = |(&profile, cost): (&Profile, &ShapeCost)| Cost {
            profile,
            min_micros: micros(cost.min_micros),
            max_micros: micros(cost.max_micros),
        };
        self.costs = self.profiles.iter().zip(costs.shapes()).map(cost).collect();
    }

    /// Checks that the plan holds texts of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Setting`], with what it holds.
    pub fn check_max_tokens(&self, tokens: usize) -> Result<()> {
        check_longest(&self.profiles, tokens)
    }

    /// Checks that the plan runs on `machine`.
    ///
    /// # Errors
    /// [`Error::EngineMismatch`] for the first field that differs.
    pub fn check_machine(&self, machine: &Machine) -> Result<()> {
        mismatch("the version of TensorRT", &machine.tensorrt, &self.machine.tensorrt)?;
        let built = &self.machine;
        if built.is_ahead_of_time() {
            let holds = built.compute_capability.split(", ").any(|one| one == machine.compute_capability);
            return if holds {
                Ok(())
            } else {
                mismatch("the compute capability", &machine.compute_capability, &built.compute_capability)
            };
        }
        mismatch("the compute capability", &machine.compute_capability, &built.compute_capability)?;
        mismatch("the GPU", &machine.gpu, &built.gpu)
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
    pub(in crate::tensorrt) fn check_base(&self, base: &str, expected: &str) -> Result<()> {
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
    /// [`Engine::profiles`](crate::backend::tensorrt::Engine::profiles), one plan's after the other's.
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

    /// Takes what was measured on this machine in the place of what was still to be shown.
    pub(in crate::tensorrt) fn take_proof(&mut self, proof: Proof) {
        let Proof { fidelity, costs } = proof;
        self.fidelity = Some(fidelity);
        self.costs = costs;
        self.unproven = None;
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
#[path = "manifest_tests.rs"]
pub(in crate::tensorrt) mod tests;
