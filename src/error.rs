//! The one error type: every message carries the offending value and the next step.

#[cfg(feature = "cuda")]
mod cuda;

use crate::Setting;
#[cfg(feature = "cuda")]
pub use cuda::CudaError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the values that matter and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that must be there is not.
    #[error("{what} not found at {}; {next}", path.display())]
    NotFound {
        /// What was looked for, e.g. `config.json`.
        what: String,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do about it.
        next: String,
    },
    /// Reading or writing a file failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, `create`, …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file was written to while it was read.
    #[error("{} changed while it was read; run it again when nothing writes to it", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// A configuration file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, its value and what was expected.
        reason: String,
    },
    /// `model_type` names no family that this crate exports.
    #[error("{}: model_type \"{found}\" is not supported; known: {known}", path.display())]
    UnknownFamily {
        /// The `config.json`.
        path: PathBuf,
        /// What it says.
        found: String,
        /// The known ones, comma-separated.
        known: String,
    },
    /// A weight file is damaged or not safetensors.
    #[error("{}: not a readable safetensors file: {reason}; fetch it again", path.display())]
    WeightFile {
        /// The file.
        path: PathBuf,
        /// What the header or the size says.
        reason: String,
    },
    /// A Git LFS pointer lies where a file should be: the folder was cloned without git-lfs.
    #[error(
        "{} is a Git LFS pointer{}, not the file itself; run `git lfs pull` in its folder, or give the hub id org/name, \
         which is downloaded",
        path.display(), pointed_to(*size)
    )]
    LfsPointer {
        /// The file.
        path: PathBuf,
        /// Bytes of the file that it stands for, where the pointer says so.
        size: Option<u64>,
    },
    /// A symbolic link lies where a file should be, and what it points to is gone.
    #[error(
        "{} is a link to {}, which does not exist (was a cache cleaned?); fetch the model again, or remove the link",
        path.display(), target.display()
    )]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// Where it points.
        target: PathBuf,
    },
    /// A tensor that the configuration asks for is not in the weights.
    #[error("tensor \"{name}\" {expected:?} is missing from {}; do config.json and the weights belong together?", path.display())]
    MissingTensor {
        /// Its name, without the family's prefix.
        name: String,
        /// The shape that config.json asks for.
        expected: Vec<usize>,
        /// The folder or file searched.
        path: PathBuf,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor \"{name}\" in {} has shape {found:?}, config.json says {expected:?}; do they belong together?", path.display())]
    TensorShape {
        /// Its name as stored.
        name: String,
        /// The shape that config.json asks for.
        expected: Vec<usize>,
        /// The shape stored.
        found: Vec<usize>,
        /// The file.
        path: PathBuf,
    },
    /// A tensor is stored in a type that this crate does not read.
    #[error("tensor \"{name}\" in {} is stored as {found}; F32, F16, BF16 and F64 are read", path.display())]
    TensorType {
        /// Its name as stored.
        name: String,
        /// The stored type.
        found: String,
        /// The file.
        path: PathBuf,
    },
    /// A tensor that the encoder does not have and that its result would depend on: the weights are another model's.
    #[error("tensor \"{name}\" in {} is a sign of {sign}; only plain {known} are supported", path.display())]
    OtherModel {
        /// Its name as stored.
        name: String,
        /// What it is a part of.
        sign: &'static str,
        /// The folder.
        path: PathBuf,
        /// The families that are supported.
        known: String,
    },
    /// The model computes what no ONNX graph of this crate can have; it is refused rather than approximated.
    #[error("{model} has {part}, which ONNX graphs of this crate cannot have yet; take a newer trt-embed, or another model")]
    NotInGraph {
        /// The model's name in graphs.
        model: &'static str,
        /// The part, with its numbers.
        part: String,
    },
    /// The model has a part or a size that an executor does not serve; it is refused rather than approximated.
    #[error("the {backend} backend cannot run {part}; it serves {served}. Choose another backend, or another model")]
    NotServed {
        /// `cuda`.
        backend: &'static str,
        /// The part, with its numbers.
        part: String,
        /// What is served in its place.
        served: String,
    },
    /// A weight has values that cannot be computed with.
    #[error("tensor \"{name}\" {reason}; {next}")]
    WeightValue {
        /// Its name.
        name: String,
        /// What they are.
        reason: String,
        /// What to do about it.
        next: &'static str,
    },
    /// A weight has values that are too large for the precision.
    #[error("tensor \"{name}\" has values that {precision} cannot hold; choose the precision {}", wider(precision))]
    WeightOverflow {
        /// Its name.
        name: String,
        /// As `fp16`.
        precision: &'static str,
    },
    /// Values within the encoder became too large for the precision.
    #[error("values overflow {precision} in {place}; choose the precision {}", wider(precision))]
    Overflow {
        /// Where, in words.
        place: String,
        /// As `fp16`.
        precision: &'static str,
    },
    /// A tokenizer's file is damaged, or asks for what cannot be done here.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What `tokenizers` said, with the file.
        reason: String,
    },
    /// A text that the tokenizer cannot take.
    #[error("text index {text} (from 0) cannot be tokenised: {reason}")]
    Text {
        /// Index of the text in the caller's order, from 0.
        text: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A token id lies outside the embedding table.
    #[error(
        "token id {id} (of text index {text}, from 0) is outside the embedding table of {vocab_size} rows; \
         do tokenizer.json and the weights belong together?"
    )]
    TokenId {
        /// The id.
        id: u32,
        /// Index of the text in the caller's order, from 0.
        text: usize,
        /// Rows of the table.
        vocab_size: usize,
    },
    /// A setting asks for something that the model cannot give.
    #[error("{setting}: {reason}")]
    Setting {
        /// The setting.
        setting: Setting,
        /// The value and the accepted range.
        reason: String,
    },
    /// A result is not finite.
    #[error(
        "text index {text} gave {value} at component index {component} (both from 0); \
         the weights are damaged or overflow in this precision"
    )]
    NotFinite {
        /// Index of the text in the caller's order, from 0.
        text: usize,
        /// Index in its vector, from 0.
        component: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// A caller's buffer has the wrong length.
    #[error("the output buffer holds {found} values, {expected} are needed ({texts} texts x {dim})")]
    OutputLength {
        /// `texts * dim`.
        expected: usize,
        /// The buffer's length.
        found: usize,
        /// Number of texts.
        texts: usize,
        /// Values of one vector.
        dim: usize,
    },
    /// A batch of token ids whose parts do not belong together, or that is longer than an executor takes.
    #[error("batch of token ids: {reason}")]
    TokenBatch {
        /// What does not fit, with its values.
        reason: String,
    },
    /// Values that are handed in have not the shape that they must have.
    #[error("{what}: {found} values, {expected} are needed ({shape})")]
    InputLength {
        /// What they are, e.g. `hidden states`.
        what: &'static str,
        /// The product of `shape`.
        expected: usize,
        /// How many there are.
        found: usize,
        /// The dimensions, in words.
        shape: String,
    },
    /// An ONNX file cannot be read, written or represented.
    #[error("onnx: {reason}")]
    Onnx {
        /// What and where.
        reason: String,
    },
    /// The hub could not give a file.
    #[error("{repo}: {reason}; {next}")]
    Hub {
        /// `org/name@revision`.
        repo: String,
        /// What the hub or the network said.
        reason: String,
        /// What to do about it.
        next: String,
    },
    /// The CUDA driver, NVRTC or a GPU failed or is not there.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// An executor failed or is not part of this build.
    #[error("{backend} backend: {reason}")]
    Backend {
        /// `cpu`, `cuda` or `tensorrt`.
        backend: &'static str,
        /// What it said, and what to do about it.
        reason: String,
    },
    /// TensorRT's libraries could not be loaded.
    #[error("{library} could not be loaded:{}\n{next}", list_tried(tried))]
    TensorRtLibrary {
        /// The file's name, e.g. `libnvinfer.so.8`.
        library: String,
        /// Every file tried, and the loader's reason.
        tried: Vec<(PathBuf, String)>,
        /// What to do about it.
        next: String,
    },
    /// The library found does not fit the headers that this program was compiled with.
    #[error(
        "{} is TensorRT {found}, this program was built with the headers of {headers}; \
         set TENSORRT_LIB_DIR to a matching library, or build again with TENSORRT_INCLUDE_DIR at the headers of {found}",
        path.display()
    )]
    TensorRtVersion {
        /// The library.
        path: PathBuf,
        /// Its version.
        found: String,
        /// The headers' version.
        headers: String,
    },
    /// TensorRT refused or failed.
    #[error("TensorRT could not {action}: {reason}\n{next}")]
    TensorRt {
        /// What was asked, e.g. `build the engine`.
        action: &'static str,
        /// What TensorRT logged.
        reason: String,
        /// What to do about it.
        next: &'static str,
    },
    /// This TensorRT, or an engine of it, does not run on the GPU.
    #[error("{what} does not run on {gpu}, compute capability {capability}; it serves {served}. {next}")]
    GpuNotServed {
        /// E.g. `TensorRT RTX 1.7.1`, or `the engine`.
        what: String,
        /// The GPU's name.
        gpu: String,
        /// Its compute capability.
        capability: String,
        /// Compute capabilities that are served.
        served: String,
        /// What to do about it.
        next: &'static str,
    },
    /// An engine that was never compared with its model is asked for with a proof.
    #[error("the engine {}: {reason}; open it once without asking for proof, which compares it, or build it on its GPU", path.display())]
    Unproven {
        /// The engine file.
        path: PathBuf,
        /// Why it has none.
        reason: String,
    },
    /// An engine was built for another GPU, library, model or setting.
    #[error("the engine does not fit: {field} is {found}, expected {expected}; build it again")]
    EngineMismatch {
        /// The field of the engine's manifest.
        field: &'static str,
        /// What this machine or call needs.
        expected: String,
        /// What the engine holds.
        found: String,
    },
    /// An engine file is damaged or not one.
    #[error("{}: not a readable engine file: {reason}; build it again", path.display())]
    EngineFile {
        /// The file.
        path: PathBuf,
        /// What and where.
        reason: String,
    },
    /// A batch fits no optimisation profile of the engine.
    #[error(
        "shape {shape} fits no profile of the engine ({profiles}); send smaller batches, or build it with a profile that holds {shape}"
    )]
    OutsideProfile {
        /// `BxS`, or the tensor's dimensions.
        shape: String,
        /// The profiles as `MIN:OPT:MAX`, comma-separated.
        profiles: String,
    },
    /// A built engine's vectors are too far from the reference's.
    #[error(
        "the engine is not true to the model: {measured}, at least {bar} is asked for; \
         worst are texts of {tokens} tokens at profile {profile}. {next}"
    )]
    Fidelity {
        /// What was found, in words.
        measured: String,
        /// The smallest cosine; none where a vector has a NaN or an infinity, which no bar accepts.
        min_cosine: Option<f64>,
        /// The smallest cosine that passes.
        bar: f64,
        /// The worst profile.
        profile: String,
        /// The length of the worst text.
        tokens: usize,
        /// What to do about it.
        next: &'static str,
    },
    /// There is nothing to compare a built engine with.
    #[error(
        "the engine cannot be compared with the model on the CPU: {reason}; give reference vectors, or build it without the comparison"
    )]
    NoReference {
        /// What is missing.
        reason: String,
    },
    /// A model's ranges for INT8 cannot be measured or used.
    #[error("calibration: {reason}")]
    Calibration {
        /// What is wrong, where, and what to do about it.
        reason: String,
    },
    /// Token ids to calibrate with are not what they must be.
    #[error("{}: {reason}", path.display())]
    CalibrationData {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        reason: String,
    },
    /// A file of reference vectors cannot be used.
    #[error("{}: no vectors to compare with: {reason}; scripts/gpu_references.py makes such a file", path.display())]
    ReferenceFile {
        /// The file.
        path: PathBuf,
        /// What and where.
        reason: String,
    },
    /// A calibration file is damaged or not one.
    #[error("{}: not a readable calibration file: {reason}; calibrate the model again", path.display())]
    CalibrationFile {
        /// The file.
        path: PathBuf,
        /// What and where.
        reason: String,
    },
    /// A calibration was made for another model or with another method.
    #[error("the calibration does not fit: {field} is {found}, expected {expected}; calibrate the model again")]
    CalibrationMismatch {
        /// The field of the calibration file.
        field: &'static str,
        /// What this model or call needs.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// No INT8 graph of the model is true enough to it.
    #[error(
        "INT8 is not true to the model: the smallest cosine is {cosine:.5} with {tried}, at least {bar} is asked for; {next}"
    )]
    QuantizedFidelity {
        /// The smallest cosine reached.
        cosine: f64,
        /// The smallest cosine that passes.
        bar: f64,
        /// What was quantised then.
        tried: String,
        /// What to do about it.
        next: &'static str,
    },
    /// In no precision is an engine true enough to the model.
    #[error("no precision gives an engine that is true enough to the model:{}\n{next}", list_refused(refused))]
    NoPrecision {
        /// Each precision, e.g. `fp16`, and why it cannot be taken.
        refused: Vec<(String, Error)>,
        /// What to do about it.
        next: &'static str,
    },
    /// An executor failed on a batch of several texts, none of which needs to be at fault.
    #[error("its batch of {texts} texts failed: {source}")]
    Batch {
        /// Texts of the batch.
        texts: usize,
        /// What the executor said, shared by the texts of the batch.
        source: Arc<Error>,
    },
    /// A text's turn did not come before the deadline; it was not begun.
    #[error("the deadline passed after {patience:?}, before the text's turn came; give it more time, or submit less at once")]
    DeadlineExceeded {
        /// From submitting the text to its deadline.
        patience: Duration,
    },
    /// More tokens wait for the executor than may; nothing of what was submitted was taken.
    #[error(
        "{waiting} tokens wait for the executor and {texts} texts of {tokens} tokens came; at most {limit} tokens may wait. Submit again \
         when fewer wait{}, or raise queue_tokens", too_much(*tokens, *limit)
    )]
    Overloaded {
        /// Tokens that wait.
        waiting: usize,
        /// Most tokens that may wait.
        limit: usize,
        /// Texts that were submitted.
        texts: usize,
        /// Their tokens.
        tokens: usize,
    },
    /// The caller asked to stop.
    #[error("{what} was cancelled")]
    Cancelled {
        /// E.g. `building the engine`.
        what: &'static str,
    },
}

fn pointed_to(size: Option<u64>) -> String {
    size.map_or_else(String::new, |size| format!(" to a file of {size} bytes"))
}

/// What is added where nothing of that size can ever be taken.
fn too_much(tokens: usize, limit: usize) -> &'static str {
    if tokens > limit { ", fewer texts at a time" } else { "" }
}

/// The precisions that hold more than `precision`, which is too narrow.
fn wider(precision: &str) -> &'static str {
    if precision == "fp16" { "bf16 or fp32" } else { "fp32, or another model" }
}

fn list_tried(tried: &[(PathBuf, String)]) -> String {
    tried.iter().map(|(path, reason)| format!("\n  {}: {reason}", path.display())).collect()
}

fn list_refused(refused: &[(String, Error)]) -> String {
    refused.iter().map(|(precision, reason)| format!("\n  {precision}: {reason}")).collect()
}

impl Error {
    /// An [`Error::Io`] constructor for `map_err`.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
