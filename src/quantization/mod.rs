//! INT8: measuring the ranges of activations over sample texts, and the file that keeps them.
//!
//! [`calibrate`] runs the fp32 graph over [`Samples`] and turns what it sees into a [`Calibration`];
//! [`Graph::quantized`](crate::graph::Graph::quantized) builds the INT8 graph from its [`Quantization`](crate::graph::Quantization).

mod calibration;
#[cfg(feature = "cpu")]
mod fidelity;
mod histogram;
mod observe;
mod samples;

pub use calibration::{Calibration, CalibrationSettings, Method, ModelIdentity};
#[cfg(feature = "cpu")]
pub use fidelity::{Cosines, Fitted, Group, GroupReport, QuantizationReport, choose_float, fit, sensitivity};
#[cfg(feature = "cpu")]
pub use observe::{CpuObserver, calibrate};
pub use observe::{Observer, Visit, calibrate_with, check_calibration};
pub use samples::{MIN_SAMPLES, Samples};
