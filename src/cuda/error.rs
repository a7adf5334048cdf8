//! The driver's codes told apart.

pub use crate::error::CudaError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// What the functions of [`crate::cuda`] return.
pub type Result<T, E = CudaError> = std::result::Result<T, E>;

/// `CUDA_VISIBLE_DEVICES`, which hides devices from the driver.
pub(super) fn visible_devices() -> Option<String> {
    std::env::var_os("CUDA_VISIBLE_DEVICES").map(|v| v.to_string_lossy().into_owned())
}

/// Tells a driver's code apart, for `map_err`.
pub(crate) fn driver(during: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |error| {
        let reason = describe(&error);
        if is_sticky(error.0) { CudaError::DeviceLost { during, reason } } else { CudaError::Driver { during, reason } }
    }
}

/// `CUDA_ERROR_… (the driver's words)`.
pub(super) fn describe(error: &DriverError) -> String {
    let words = error.error_string().ok().and_then(|w| w.to_str().ok()).unwrap_or("no description");
    format!("{:?}: {words}", error.0)
}

/// Codes after which the context answers every call with the same code (CUDA driver API, `CUresult`: "leaves the process in an
/// inconsistent state", "the context cannot be used").
fn is_sticky(code: CUresult) -> bool {
    use CUresult as C;
    matches!(
        code,
        C::CUDA_ERROR_DEINITIALIZED
            | C::CUDA_ERROR_ECC_UNCORRECTABLE
            | C::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_LAUNCH_FAILED
            | C::CUDA_ERROR_EXTERNAL_DEVICE
            | C::CUDA_ERROR_UNKNOWN
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_breaks_the_context_is_a_lost_device() {
        use CUresult as C;
        for code in [C::CUDA_ERROR_ILLEGAL_ADDRESS, C::CUDA_ERROR_LAUNCH_FAILED, C::CUDA_ERROR_ECC_UNCORRECTABLE] {
            assert!(is_sticky(code), "{code:?}");
        }
        // Refused, and the context goes on.
        for code in [C::CUDA_ERROR_OUT_OF_MEMORY, C::CUDA_ERROR_INVALID_VALUE, C::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED] {
            assert!(!is_sticky(code), "{code:?}");
        }
    }
}
