//! Opening the driver without the panics of a machine that has none, and errors as values.

use cudarc::driver::{CudaContext, DriverError};
use std::sync::Arc;

use crate::Error;

#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Some of what cudarc calls: it panics where a symbol is missing, as in a stub or a driver older
/// than 11.2.
const SYMBOLS: [&[u8]; 6] = [
    b"cuDeviceGetCount\0",
    b"cuDevicePrimaryCtxRetain\0",
    b"cuModuleLoadData\0",
    b"cuLaunchKernel\0",
    b"cuMemAllocAsync\0",
    b"cuGetErrorString\0",
];
const CUDA_ERROR_NO_DEVICE: i32 = 100;

/// Devices that the driver lists. A driver without any device says so by an error.
///
/// The driver is opened and initialised here, not through cudarc: it panics at its first call if
/// there is none, and takes a code that it does not know for one of its own.
pub(super) fn device_count() -> Result<usize, Error> {
    let missing = Error::NoDriver {
        library: LIBRARIES[0],
    };
    // SAFETY: the driver library's initialisers are those that cudarc would run as well.
    let open = |name: &&str| unsafe { libloading::Library::new(*name) }.ok();
    let library = LIBRARIES.iter().find_map(open).ok_or(missing.clone())?;
    for symbol in SYMBOLS {
        // SAFETY: only asked for, never called.
        if unsafe { library.get::<unsafe extern "C" fn()>(symbol) }.is_err() {
            return Err(missing);
        }
    }
    // SAFETY: cuInit takes flags, which must be 0, and returns an enum of C.
    let code = unsafe {
        let initialise = library.get::<unsafe extern "C" fn(u32) -> i32>(b"cuInit\0");
        initialise.map_err(|_| missing)?(0)
    };
    // An initialised driver must stay: it has threads of its own.
    std::mem::forget(library);
    match code {
        0 => {}
        CUDA_ERROR_NO_DEVICE => return Ok(0),
        _ => {
            return Err(Error::Driver {
                operation: "initialising the driver",
                code: format!("error {code}"),
            });
        }
    }
    let count = CudaContext::device_count().during("counting devices")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A function of the driver, if it has that.
///
/// # Safety
/// `F` is the type of a pointer to a function with the symbol's signature.
pub(super) unsafe fn symbol<F: Copy>(name: &[u8]) -> Option<F> {
    // SAFETY: cudarc has loaded the same library, so that no initialiser runs.
    let open = |name: &&str| unsafe { libloading::Library::new(*name) }.ok();
    let library = LIBRARIES.iter().find_map(open)?;
    // SAFETY: the caller's.
    let symbol = unsafe { library.get::<F>(name) }.ok().map(|symbol| *symbol);
    // The pointer must not outlive it.
    std::mem::forget(library);
    symbol
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
