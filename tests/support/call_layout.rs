//! Sizes and offsets of the structs of a call, as the bindings have them.

const BINDINGS: &str = include_str!("../../src/call/bindings.rs");

/// Of each struct its size, then the offsets of its fields, in the order of cuda/phasor_call.h. The
/// bindings assert each of these numbers of the Rust structs when they are compiled.
pub fn host_layout() -> Vec<u64> {
    // Each is written `["Offset of field: PhasorIds::type_"][offset_of!(PhasorIds, type_) - 24usize];`,
    // on one line or two.
    let assertions = BINDINGS.split("[\"").skip(1);
    assertions
        .filter(|text| text.starts_with("Size of ") || text.starts_with("Offset of field: "))
        .map(|text| {
            let (before, _) = text.split_once("usize]").expect("a number of bytes");
            let (_, number) = before.rsplit_once("- ").expect("a number of bytes");
            number.parse().expect("a number of bytes")
        })
        .collect()
}
