//! Handing launches to the driver. The dependent ones need `cuLaunchKernelEx`, which cudarc has only
//! where it is built for CUDA 11.8 or later; the driver at hand is asked for it instead.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction, CUresult, CUstream};

use super::driver::{self, During};
use crate::Error;
use crate::launch::{Launch, LaunchMode};

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: CUstream,
    attributes: *mut LaunchAttribute,
    attribute_count: c_uint,
}

/// `CUlaunchAttribute`, whose value is a union of 64 bytes.
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    padding: [u8; 4],
    value: LaunchAttributeValue,
}

#[repr(C, align(8))]
struct LaunchAttributeValue {
    allowed: c_int,
    unused: [u8; 60],
}

const _: () = {
    // As cuda.h has them on 64-bit systems.
    assert!(size_of::<LaunchAttribute>() == 72);
    assert!(size_of::<LaunchConfig>() == 56);
};

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`
const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;
/// From CUDA 12.3 on, drivers keep the dependence of a captured launch.
const CAPTURES_DEPENDENCE: i32 = 12_030;

type LaunchKernelEx = unsafe extern "C" fn(
    *const LaunchConfig,
    CUfunction,
    *mut *mut c_void,
    *mut *mut c_void,
) -> CUresult;

/// What the driver at hand can do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Driver {
    launch_kernel_ex: Option<LaunchKernelEx>,
    captures_dependence: bool,
}

impl Driver {
    pub(super) fn new() -> Result<Self, Error> {
        // SAFETY: the signature is that of cuda.h.
        let launch_kernel_ex = unsafe { driver::symbol::<LaunchKernelEx>(b"cuLaunchKernelEx\0") };
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .during("asking for the driver's version")?;
        Ok(Self {
            launch_kernel_ex,
            captures_dependence: version >= CAPTURES_DEPENDENCE,
        })
    }

    pub(super) fn can_launch_dependently(&self) -> bool {
        self.launch_kernel_ex.is_some()
    }

    /// The mode in which a launch that is wanted in `mode` is enqueued on a stream now, of kernels that
    /// can depend or not.
    ///
    /// # Safety
    /// The stream is one of the current context.
    pub(super) unsafe fn mode_on(
        &self,
        stream: CUstream,
        mode: LaunchMode,
        kernels_can_depend: bool,
    ) -> Result<LaunchMode, Error> {
        self.mode_where(mode, kernels_can_depend, || {
            let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            // SAFETY: the caller's; writes one status.
            unsafe { sys::cuStreamIsCapturing(stream, &mut status) }
                .result()
                .during("asking whether the stream is captured")?;
            Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
        })
    }

    fn mode_where(
        &self,
        mode: LaunchMode,
        kernels_can_depend: bool,
        is_capturing: impl FnOnce() -> Result<bool, Error>,
    ) -> Result<LaunchMode, Error> {
        let possible = kernels_can_depend && self.launch_kernel_ex.is_some();
        if mode == LaunchMode::Ordinary || !possible {
            return Ok(LaunchMode::Ordinary);
        }
        if !self.captures_dependence && is_capturing()? {
            return Ok(LaunchMode::Ordinary);
        }
        Ok(mode)
    }

    /// # Safety
    /// The function takes the launch's parameters by value; it and the stream are of the current
    /// context; what it does to memory is the caller's promise. If the launch is dependent, so is the
    /// function's code.
    pub(super) unsafe fn enqueue(
        &self,
        function: CUfunction,
        launch: &Launch,
        stream: CUstream,
    ) -> Result<(), Error> {
        let mut params = launch.params;
        // A kernel without stages has but the first.
        let mut fusion = launch.fusion.unwrap_or_default();
        let mut parameters: [*mut c_void; 2] = [(&raw mut params).cast(), (&raw mut fusion).cast()];
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        let enqueued = match self.launch_kernel_ex {
            Some(launch_kernel_ex) if launch.dependent => {
                let mut attribute = LaunchAttribute {
                    id: PROGRAMMATIC_STREAM_SERIALIZATION,
                    padding: [0; 4],
                    value: LaunchAttributeValue {
                        allowed: 1,
                        unused: [0; 60],
                    },
                };
                let config = LaunchConfig {
                    grid: launch.grid,
                    block: launch.block,
                    shared_bytes: launch.shared_bytes,
                    stream,
                    attributes: &mut attribute,
                    attribute_count: 1,
                };
                // SAFETY: the driver copies all of this before it returns; the rest is the caller's.
                unsafe {
                    launch_kernel_ex(&config, function, parameters.as_mut_ptr(), ptr::null_mut())
                }
                .result()
            }
            // SAFETY: the caller's.
            _ => unsafe {
                result::launch_kernel(
                    function,
                    (gx, gy, gz),
                    (bx, by, bz),
                    launch.shared_bytes,
                    stream,
                    &mut parameters,
                )
            },
        };
        enqueued.during("launching the kernel")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn never(
        _: *const LaunchConfig,
        _: CUfunction,
        _: *mut *mut c_void,
        _: *mut *mut c_void,
    ) -> CUresult {
        CUresult::CUDA_ERROR_NOT_SUPPORTED
    }

    #[test]
    fn launches_are_ordinary_where_they_cannot_depend() {
        use LaunchMode::{Dependent, DependentPositionsSettled, Ordinary};
        let driver = |launches, captures_dependence| Driver {
            launch_kernel_ex: launches,
            captures_dependence,
        };
        let (new, old, oldest) = (
            driver(Some(never as LaunchKernelEx), true),
            driver(Some(never as LaunchKernelEx), false),
            driver(None, false),
        );
        for mode in [Dependent, DependentPositionsSettled] {
            for (driver, kernels, capturing, expected) in [
                (new, true, true, mode),
                (new, true, false, mode),
                // Kernels for 7.5 to 8.9 do not wait by themselves.
                (new, false, false, Ordinary),
                (old, true, false, mode),
                (old, true, true, Ordinary),
                (old, false, true, Ordinary),
                (oldest, true, false, Ordinary),
            ] {
                let got = driver.mode_where(mode, kernels, || Ok(capturing));
                assert_eq!(got, Ok(expected), "{driver:?}, {kernels}, {capturing}");
                let plain = driver.mode_where(Ordinary, kernels, || Ok(capturing));
                assert_eq!(plain, Ok(Ordinary));
            }
        }
    }
}
