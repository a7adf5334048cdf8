//! What can go wrong between this crate and a GPU.

/// Everything that can go wrong with the driver, NVRTC, a device or its memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library cannot be opened.
    #[error(
        "no NVIDIA driver: {looked_for} cannot be opened; install the driver, \
         or start the container with the GPU (docker run --gpus all)"
    )]
    NoDriver {
        /// Names given to the loader.
        looked_for: String,
    },
    /// The driver is older than this crate needs.
    #[error("the NVIDIA driver supports CUDA {found}, {needed} or newer is needed; update the driver")]
    DriverTooOld {
        /// As `12.4`.
        found: String,
        /// As `12.0`.
        needed: String,
    },
    /// The GPU is older than this crate's own encoder kernels need.
    #[error(
        "GPU {name} has compute capability {found}, {needed} (A100) or newer is needed; choose another backend or another GPU"
    )]
    GpuTooOld {
        /// As `Tesla T4`.
        name: String,
        /// As `7.5`.
        found: String,
        /// As `8.0`.
        needed: String,
    },
    /// There is a driver but no device that it may use.
    #[error("the NVIDIA driver sees no GPU ({}){}", reason, visible_hint(visible))]
    NoDevice {
        /// The driver's code.
        reason: String,
        /// `CUDA_VISIBLE_DEVICES`, where set.
        visible: Option<String>,
    },
    /// A device number beyond the devices there are.
    #[error("GPU {ordinal} does not exist: there are {count}, numbered from 0{}", visible_hint(visible))]
    NoSuchDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
        /// `CUDA_VISIBLE_DEVICES`, where set.
        visible: Option<String>,
    },
    /// An allocation does not fit.
    #[error("out of {what}: {asked} bytes asked, {free} free of {total}; use smaller batches or free the GPU")]
    OutOfMemory {
        /// `GPU memory` or `pinned host memory`.
        what: &'static str,
        /// Bytes asked for.
        asked: usize,
        /// Bytes free on the device.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// The device or its context is broken for good; nothing of this process runs on it again.
    #[error("the GPU is lost to this process ({reason}) while trying to {during}; restart the process")]
    DeviceLost {
        /// What was being done.
        during: &'static str,
        /// The driver's code and words.
        reason: String,
    },
    /// The driver refused something.
    #[error("CUDA driver: {reason} while trying to {during}")]
    Driver {
        /// What was being done.
        during: &'static str,
        /// The driver's code and words.
        reason: String,
    },
    /// NVRTC cannot be opened.
    #[error(
        "NVRTC (CUDA's run-time compiler) is not found; looked for {looked_for}; \
         install the CUDA toolkit or `pip install nvidia-cuda-nvrtc-cu12`, and set CUDA_HOME or VIRTUAL_ENV to where it is"
    )]
    NvrtcMissing {
        /// Paths and names tried.
        looked_for: String,
    },
    /// NVRTC refused a kernel source.
    #[error("NVRTC cannot compile {name} for {arch}: {log}")]
    Compile {
        /// File of the source.
        name: String,
        /// As `sm_90`.
        arch: String,
        /// NVRTC's code and its log.
        log: String,
    },
    /// A size, an alignment or a state that a call does not allow.
    #[error("{call}: {reason}")]
    Argument {
        /// The function.
        call: &'static str,
        /// The values and what is allowed.
        reason: String,
    },
}

impl CudaError {
    /// Whether the device is gone for this process.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::DeviceLost { .. })
    }
}

fn visible_hint(visible: &Option<String>) -> String {
    match visible {
        Some(value) => format!("; CUDA_VISIBLE_DEVICES is \"{value}\""),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_device_is_told_from_a_missing_driver() {
        assert!(CudaError::DeviceLost { during: "launch", reason: String::new() }.is_lost());
        assert!(!CudaError::NoDriver { looked_for: String::new() }.is_lost());
    }
}
