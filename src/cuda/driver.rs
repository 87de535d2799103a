//! Opening the driver without the panics of a machine that has none, and errors as values.

use cudarc::driver::{CudaContext, DriverError};
use std::sync::Arc;

use crate::Error;

#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Whether the driver library can be opened. cudarc panics at its first call if it cannot.
pub(super) fn probe() -> Result<(), Error> {
    let found = LIBRARIES.iter().any(|name| {
        // SAFETY: the driver library's initialisers are those that cudarc would run as well.
        unsafe { libloading::Library::new(*name) }.is_ok()
    });
    if found {
        Ok(())
    } else {
        Err(Error::NoDriver {
            library: LIBRARIES[0],
        })
    }
}

/// Devices that the driver lists. A driver without any device says so by an error.
pub(super) fn device_count() -> Result<usize, Error> {
    use cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE;
    probe()?;
    match cudarc::driver::result::init() {
        Err(DriverError(CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        result => result.during("initialising the driver")?,
    }
    let count = CudaContext::device_count().during("counting devices")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

pub(super) fn open(ordinal: usize) -> Result<Arc<CudaContext>, Error> {
    let count = device_count()?;
    if ordinal >= count {
        return Err(Error::NoDevice { ordinal, count });
    }
    CudaContext::new(ordinal).during("opening the device")
}

/// Turns cudarc's error into ours, which is safe to format wherever the driver is missing.
pub(super) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, operation: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Driver {
            operation,
            code: code(&error),
        })
    }
}

/// The driver's name for an error. `DriverError` itself must not be formatted: that calls into
/// the driver.
pub(super) fn code(error: &DriverError) -> String {
    format!("{:?}", error.0)
}
