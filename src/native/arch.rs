//! For which GPU kernels are compiled, and of what texts.

use super::shape::Precision;
use crate::cuda::{CudaError, Device, Result};

const PRELUDE: &str = include_str!("../../kernels/prelude.cuh");

/// For which GPU kernels are compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arch {
    /// As NVRTC takes it: `sm_90a`, or `compute_80` for PTX.
    pub target: String,
    /// Whether Hopper's own instructions are there.
    pub hopper: bool,
    /// Whether kernels may start before the one in front has ended.
    pub dependent: bool,
}

impl Arch {
    /// That of `device`; with `forced` (80, of `TRT_EMBED_CUDA_ARCH`) the older one that it stands in for.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for a device before 8.0, and for a forced architecture that is unknown or newer than the device.
    pub fn of(device: &Device, forced: Option<&str>) -> Result<Self> {
        let (major, minor) = device.properties().compute_capability;
        Self::choose(major * 10 + minor, forced)
    }

    fn choose(own: u32, forced: Option<&str>) -> Result<Self> {
        const OLDEST: u32 = 80;
        let refused = |reason: String| Err(CudaError::Argument { call: "choose kernels", reason });
        if own < OLDEST {
            let reason = format!("the GPU has compute capability {}.{}; 8.0 (A100) or newer is needed", own / 10, own % 10);
            return refused(reason);
        }
        match forced {
            None if own == 90 => Ok(Self { target: "sm_90a".to_owned(), hopper: true, dependent: true }),
            None => Ok(Self { target: format!("sm_{own}"), hopper: false, dependent: own >= 90 }),
            Some(text) => match text.parse::<u32>() {
                Ok(arch) if (OLDEST..=own).contains(&arch) => {
                    Ok(Self { target: format!("compute_{arch}"), hopper: false, dependent: arch >= 90 })
                }
                _ => refused(format!("TRT_EMBED_CUDA_ARCH is \"{text}\"; {OLDEST} to {own} can run on this GPU")),
            },
        }
    }
}

/// The engine's kernel files.
const SOURCES: [(&str, &str); 6] = [
    ("load.cu", include_str!("../../kernels/load.cu")),
    ("stream.cu", include_str!("../../kernels/stream.cu")),
    ("linear.cu", include_str!("../../kernels/linear.cu")),
    ("linear_sm90.cu", include_str!("../../kernels/linear_sm90.cu")),
    ("attention.cu", include_str!("../../kernels/attention.cu")),
    ("exact.cu", include_str!("../../kernels/exact.cu")),
];

/// The text of the kernel file `name`, with the prelude in front; the prelude alone where there is no such file.
pub(super) fn native_source(name: &str) -> String {
    let text = SOURCES.iter().find_map(|(file, text)| (*file == name).then_some(*text)).unwrap_or_default();
    format!("{PRELUDE}\n{text}")
}

/// NVRTC's options for kernels of this precision and activation (as the prelude numbers it).
pub(super) fn options(precision: Precision, activation: i32) -> Vec<String> {
    let bf16 = i32::from(precision == Precision::Bf16);
    ["--std=c++17".to_owned(), "-lineinfo".to_owned(), format!("-DBF16={bf16}"), format!("-DACTIVATION={activation}")].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compiled_for_the_device_or_for_what_it_stands_in_for() {
        let arch = |own, forced| Arch::choose(own, forced);
        let made = |target: &str, dependent| Ok(Arch { target: target.to_owned(), hopper: target == "sm_90a", dependent });
        assert_eq!(arch(80, None), made("sm_80", false));
        assert_eq!(arch(90, None), made("sm_90a", true));
        assert_eq!(arch(120, None), made("sm_120", true));
        assert_eq!(arch(90, Some("80")), made("compute_80", false));
        for (own, forced, part) in
            [(75, None, "7.5"), (90, Some("100"), "80 to 90"), (90, Some("75"), "75"), (90, Some("sm_80"), "sm_80")]
        {
            let error = arch(own, forced).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
