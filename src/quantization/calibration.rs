//! What a calibration found, as a file.

use crate::files::AtomicFile;
use crate::graph::{Graph, Precision, Quantization, Range};
use crate::model::ModelFolder;
use crate::{Error, Result, Setting};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Read, Write};
use std::path::Path;

/// Version of the file's format.
const FORMAT: u32 = 1;
/// The largest file that is read: 12 layers of 768 channels with smoothing take some 0.3 MB.
const MAX_BYTES: u64 = 64 << 20;

/// How a range is found from the magnitudes of a tensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Method {
    /// The largest magnitude.
    MinMax,
    /// The magnitude below which this percentage of the values lies, above 0 and at most 100.
    Percentile(f64),
    /// The cut that loses the least information (Kullback-Leibler).
    Entropy,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MinMax => f.write_str("minmax"),
            Self::Percentile(percentile) => write!(f, "percentile {percentile}"),
            Self::Entropy => f.write_str("entropy"),
        }
    }
}

/// Settings of a calibration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationSettings {
    /// How ranges are found.
    pub method: Method,
    /// SmoothQuant's alpha, 0 to 1: how much of a channel's reach goes into the weights. None smooths nothing.
    pub smoothing: Option<f32>,
}

impl Default for CalibrationSettings {
    fn default() -> Self {
        Self { method: Method::MinMax, smoothing: None }
    }
}

impl CalibrationSettings {
    /// # Errors
    /// [`Error::Setting`] for a percentile or an alpha out of bounds.
    pub(super) fn check(&self) -> Result<()> {
        if let Method::Percentile(percentile) = self.method
            && !(percentile > 0.0 && percentile <= 100.0)
        {
            let reason = format!("{percentile} is not above 0 and at most 100");
            return Err(Error::Setting { setting: Setting::Percentile, reason });
        }
        match self.smoothing {
            Some(alpha) if !(0.0..=1.0).contains(&alpha) => {
                Err(Error::Setting { setting: Setting::Smoothing, reason: format!("{alpha} is not between 0 and 1") })
            }
            _ => Ok(()),
        }
    }
}

/// Which model a calibration belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// The folder's name.
    pub name: String,
    /// `bert` or `mpnet`.
    pub family: String,
    /// [`Graph::digest_hex`] of the fp32 graph.
    pub digest: String,
}

/// Ranges of a model's activations, and how they were found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    format: u32,
    /// The model.
    pub model: ModelIdentity,
    /// How ranges were found.
    pub method: Method,
    /// SmoothQuant's alpha, where channels were smoothed.
    pub smoothing: Option<f32>,
    /// Number of samples.
    pub samples: usize,
    /// Their tokens together, padding not counted.
    pub tokens: u64,
    /// The range of each tensor that feeds a linear.
    pub ranges: BTreeMap<String, Range>,
}

impl ModelIdentity {
    /// Of an opened folder. Hashes its weights.
    ///
    /// # Errors
    /// As [`Graph::new`].
    pub fn of(model: &ModelFolder) -> Result<Self> {
        let graph = Graph::new(&model.architecture()?, Precision::Fp32)?;
        // `.` has no name of its own.
        let root = model.root.canonicalize().unwrap_or_else(|_| model.root.clone());
        let name = root.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { name, family: model.config.family.name().into(), digest: graph.digest_hex() })
    }
}

impl Calibration {
    pub(super) fn new(
        model: ModelIdentity,
        settings: &CalibrationSettings,
        samples: usize,
        tokens: u64,
        ranges: BTreeMap<String, Range>,
    ) -> Self {
        Self { format: FORMAT, model, method: settings.method, smoothing: settings.smoothing, samples, tokens, ranges }
    }

    /// Writes the file, whole or not at all; one that is there is replaced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut file = AtomicFile::create(path)?;
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| Error::CalibrationFile { path: path.to_path_buf(), reason: error.to_string() })?;
        writeln!(file, "{json}").map_err(Error::io("write", path))?;
        file.commit()
    }

    /// Reads a file that [`Calibration::write`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::CalibrationFile`] for one that is damaged or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let fault = |reason: String| Error::CalibrationFile { path: path.to_path_buf(), reason };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(Error::io("read", path))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(fault(format!("it is larger than {MAX_BYTES} bytes, which no calibration file is")));
        }
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        // Before the rest, whose fields another version may have changed.
        let version: Version = serde_json::from_slice(&bytes).map_err(|error| fault(error.to_string()))?;
        if version.format != FORMAT {
            return Err(fault(format!("its format is {}, this version reads {FORMAT}", version.format)));
        }
        let calibration: Self = serde_json::from_slice(&bytes).map_err(|error| fault(error.to_string()))?;
        for (tensor, range) in &calibration.ranges {
            if !(range.amax.is_normal() && range.amax > 0.0) {
                return Err(fault(format!("tensor \"{tensor}\" reaches to {}", range.amax)));
            }
        }
        Ok(calibration)
    }

    /// Whether this is the calibration of `model`, and found by `method` where one is asked for.
    ///
    /// # Errors
    /// [`Error::CalibrationMismatch`]; as [`ModelIdentity::of`].
    pub fn check(&self, model: &ModelFolder, method: Option<Method>) -> Result<()> {
        let expected = ModelIdentity::of(model)?;
        if self.model.digest != expected.digest {
            let told = |model: &ModelIdentity| format!("{} ({}, {:.16})", model.name, model.family, model.digest);
            let (expected, found) = (told(&expected), told(&self.model));
            return Err(Error::CalibrationMismatch { field: "model", expected, found });
        }
        match method {
            Some(method) if method != self.method => {
                Err(Error::CalibrationMismatch { field: "method", expected: method.to_string(), found: self.method.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// For [`Graph::quantized`], with `float` linears not quantised.
    pub fn quantization(&self, float: impl IntoIterator<Item = String>) -> Quantization {
        Quantization { ranges: self.ranges.clone(), float: float.into_iter().collect::<BTreeSet<_>>() }
    }
}
