//! The kernels' parameter structs, generated from `cuda/phasor_params.h`.
//!
//! The fields are documented in the header. The checked-in bindings are used unless the `bindgen`
//! feature regenerates them at build time.

#![allow(missing_docs)]

#[cfg(not(feature = "bindgen"))]
mod bindings;
#[cfg(feature = "bindgen")]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

pub use bindings::*;

impl PhasorRopeParams {
    /// The bytes that a kernel takes by value.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the struct is repr(C) without padding (checked below), so all of its bytes are
        // initialised, and the slice borrows it.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }
}

// No padding: each struct is as large as the sum of its fields.
const _: () = {
    assert!(size_of::<PhasorStrides>() == 3 * 8);
    assert!(size_of::<PhasorTensor>() == 2 * 8 + 2 * size_of::<PhasorStrides>() + 4 * 4);
    assert!(size_of::<PhasorAngles>() == 5 * 8 + 6 * 4);
    assert!(size_of::<PhasorPositions>() == 6 * 8 + 2 * 4);
    assert!(size_of::<PhasorRows>() == 4 * 8 + 2 * 4);
    assert!(size_of::<PhasorPairing>() == 4 * 4);
    assert!(
        size_of::<PhasorRopeParams>()
            == 2 * size_of::<PhasorTensor>()
                + size_of::<PhasorAngles>()
                + size_of::<PhasorPositions>()
                + size_of::<PhasorRows>()
                + size_of::<PhasorPairing>()
                + 2 * 8
    );
};

#[cfg(all(test, feature = "bindgen"))]
mod tests {
    #[test]
    fn checked_in_bindings_are_fresh() {
        assert_eq!(
            include_str!("params/bindings.rs"),
            include_str!(concat!(env!("OUT_DIR"), "/bindings.rs")),
            "copy the generated bindings.rs to src/params/bindings.rs"
        );
    }
}
