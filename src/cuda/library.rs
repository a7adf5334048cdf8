//! The CUDA driver's library: whether it is there, and how new it is.
#![allow(unsafe_code)]

use super::error::{CudaError, Result, describe, driver, visible_devices};
use cudarc::driver::{DriverError, result, sys};

/// Oldest driver, as the driver numbers itself: CUDA 12.0, what TensorRT 8.6's CUDA 12 build needs.
const OLDEST_DRIVER: i32 = 12_000;

/// The oldest CUDA that a driver must support, major and minor.
pub const OLDEST_CUDA: (u32, u32) = ((OLDEST_DRIVER / 1000) as u32, (OLDEST_DRIVER % 1000 / 10) as u32);

/// A driver that is there, new enough and started: `(major, minor)` of the CUDA that it supports.
///
/// Must be the first thing asked: cudarc panics where the library cannot be opened.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::NoDevice`].
pub(super) fn start_driver() -> Result<(u32, u32)> {
    // SAFETY: opening a shared library runs its initialisers; libcuda's are made to be run at any time, from any thread.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver { looked_for: "libcuda.so.1 (or libcuda.so) on the loader's path".to_owned() });
    }
    let mut version = 0;
    // SAFETY: the library is there; the call needs no initialised driver and writes one int.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(driver("read the driver's version"))?;
    if version < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { found: dotted(version), needed: dotted(OLDEST_DRIVER) });
    }
    match result::init() {
        Ok(()) => {}
        Err(error @ DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Err(CudaError::NoDevice { reason: describe(&error), visible: visible_devices() });
        }
        // Not told apart further: a driver that does not start has not lost a device yet.
        Err(error) => {
            let reason = format!("{}; does nvidia-smi work?", describe(&error));
            return Err(CudaError::Driver { during: "start the driver", reason });
        }
    }
    Ok(((version / 1000) as u32, (version % 1000 / 10) as u32))
}

/// `12080` as `12.8`.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(super::dotted(12_080), "12.8");
        assert_eq!(super::dotted(13_000), "13.0");
        assert_eq!(super::dotted(super::OLDEST_DRIVER), "12.0");
    }
}
