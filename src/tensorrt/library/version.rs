//! Versions of TensorRT and its two flavours: which library may be called with which headers, and what follows from a version.

use super::ffi::bridge;
use std::fmt;

/// Which of NVIDIA's TensorRTs. One's plans and libraries are nothing to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Flavour {
    /// TensorRT, for GPUs of every kind: builds on the GPU that it builds for.
    Standard,
    /// TensorRT for RTX: builds without a GPU, and compiles its kernels on the GPU when an engine is loaded.
    Rtx,
}

/// A version of TensorRT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Each counts its versions by itself.
    pub flavour: Flavour,
    /// Libraries and headers must agree in it.
    pub major: u32,
    /// Features within a major version.
    pub minor: u32,
    /// Corrections.
    pub patch: u32,
}

/// The version of the headers that this crate was compiled with.
pub fn header_version() -> Version {
    let bridge::Version { rtx, major, minor, patch } = bridge::header_version();
    Version { flavour: if rtx { Flavour::Rtx } else { Flavour::Standard }, major, minor, patch }
}

impl Flavour {
    /// The library's name, without `.so` and version.
    pub fn library_stem(self) -> &'static str {
        match self {
            Self::Standard => "libnvinfer",
            Self::Rtx => "libtensorrt_rtx",
        }
    }

    /// The same of the parser of ONNX.
    pub fn parser_stem(self) -> &'static str {
        match self {
            Self::Standard => "libnvonnxparser",
            Self::Rtx => "libtensorrt_onnxparser_rtx",
        }
    }

    /// How the folders of its Python packages begin: `tensorrt` in the wheels of 8.6, `tensorrt_libs` in those of 10 and 11.
    pub(super) fn package(self) -> &'static str {
        match self {
            Self::Standard => "tensorrt",
            Self::Rtx => "onnxruntime_ep_nv_tensorrt_rtx",
        }
    }
}

impl Version {
    /// What `getInferLibVersion` says: 1000 major + 100 minor + patch up to TensorRT 9, then 10000 major + 100 minor + patch; as the latter
    /// TensorRT for RTX, whose major version is below 10.
    pub(super) fn decode(raw: i32) -> Self {
        let raw = u32::try_from(raw).unwrap_or(0);
        match raw {
            ..10_000 => Self { flavour: Flavour::Standard, major: raw / 1000, minor: raw / 100 % 10, patch: raw % 100 },
            _ => Self {
                flavour: if raw < 100_000 { Flavour::Rtx } else { Flavour::Standard },
                major: raw / 10_000,
                minor: raw / 100 % 100,
                patch: raw % 100,
            },
        }
    }

    /// Whether a program compiled with `headers` may call this library.
    pub(super) fn serves(self, headers: Self) -> bool {
        let fits = match self.flavour {
            // The shim calls nothing that a major version's first release lacks, but for what 10.1 put in the place of 10.0's
            // functions for device memory.
            Flavour::Standard => self.major != 10 || self.minor > 0 || headers.minor == 0,
            // Its classes grew with every minor version so far.
            Flavour::Rtx => self.minor == headers.minor,
        };
        self.flavour == headers.flavour && self.major == headers.major && fits
    }

    /// Whether the graph's types decide in what an engine computes (TensorRT 10 and later). Before, a flag lets an fp32 graph run in fp16.
    pub fn is_strongly_typed(self) -> bool {
        self.flavour == Flavour::Rtx || self.major >= 10
    }

    /// Whether builds report their phases and can be stopped (TensorRT 10 and later).
    pub fn reports_progress(self) -> bool {
        self.is_strongly_typed()
    }

    /// Whether engines can be built for GPUs that are not there.
    pub fn builds_ahead_of_time(self) -> bool {
        self.flavour == Flavour::Rtx
    }
}

impl fmt::Display for Version {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flavour = match self.flavour {
            Flavour::Standard => "",
            Flavour::Rtx => "RTX ",
        };
        write!(out, "{flavour}{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_library_tell_version_and_flavour() {
        for (raw, said) in [
            (8600, "8.6.0"),
            (8601, "8.6.1"),
            (7203, "7.2.3"),
            (100_000, "10.0.0"),
            (101_303, "10.13.3"),
            (110_400, "11.4.0"),
            (10_701, "RTX 1.7.1"),
            (10_300, "RTX 1.3.0"),
            (0, "0.0.0"),
            (-1, "0.0.0"),
        ] {
            assert_eq!(Version::decode(raw).to_string(), said, "{raw}");
        }
    }

    #[test]
    fn a_library_serves_headers_of_its_flavour_and_major_version() {
        let version = |major, minor| Version { flavour: Flavour::Standard, major, minor, patch: 0 };
        let rtx = |major, minor| Version { flavour: Flavour::Rtx, ..version(major, minor) };
        for (library, headers, expected) in [
            (version(8, 6), version(8, 6), true),
            (version(8, 6), version(10, 0), false),
            (version(11, 0), version(11, 4), true),
            (version(11, 4), version(11, 0), true),
            (version(10, 0), version(10, 0), true),
            (version(10, 0), version(10, 16), false),
            (version(10, 1), version(10, 16), true),
            (version(11, 4), version(10, 4), false),
            (rtx(1, 7), rtx(1, 7), true),
            (Version { patch: 3, ..rtx(1, 7) }, rtx(1, 7), true),
            (rtx(1, 6), rtx(1, 7), false),
            (rtx(1, 8), rtx(1, 7), false),
            (rtx(2, 7), rtx(1, 7), false),
            (rtx(1, 7), version(1, 7), false),
            (version(11, 4), rtx(1, 7), false),
        ] {
            assert_eq!(library.serves(headers), expected, "{library} for headers {headers}");
        }
    }
}
