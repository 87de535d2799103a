//! Libraries that are looked up when they are first used.
//!
//! cudarc's own loaders panic where a library is absent, and their enums take no status that they do not
//! know: so functions are looked up here, and statuses are numbers.

use std::ffi::OsStr;

/// A struct of pointers to functions, which are looked up by their symbols.
macro_rules! functions {
    ($($name:ident: $symbol:literal ($($arg:ty),*) -> $result:ty),* $(,)?) => {
        /// Pointers into the library, which stays loaded.
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> $result,)*
        }

        impl Functions {
            /// # Safety
            /// The library's functions have these signatures.
            unsafe fn of(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the caller's promise.
                unsafe {
                    Ok(Self {
                        $($name: *library.get(concat!($symbol, "\0").as_bytes())?,)*
                    })
                }
            }
        }
    };
}
pub(super) use functions;

/// The functions of the first of some libraries that has them all, or what was wrong with each.
///
/// # Safety
/// What has one of these names is the library that `of` looks up its functions in.
pub(super) unsafe fn load<F, S: AsRef<OsStr>>(
    names: &[S],
    of: impl Fn(&libloading::Library) -> Result<F, libloading::Error>,
) -> Result<F, String> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: the initialisers of NVIDIA's libraries have no conditions; that it is one is the caller's
        // promise.
        let functions = unsafe { libloading::Library::new(name.as_ref()) }.and_then(|library| {
            let functions = of(&library)?;
            // It must not be closed: pointers lead into it.
            std::mem::forget(library);
            Ok(functions)
        });
        match functions {
            Ok(functions) => return Ok(functions),
            Err(error) => {
                // Which file or symbol is only in what the loader said.
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let name = name.as_ref().display();
                reasons.push(format!("{name}: {}", cause.unwrap_or(error.to_string())));
            }
        }
    }
    Err(reasons.join("; "))
}
