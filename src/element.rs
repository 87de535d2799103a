//! Element types of q and k.

use half::{bf16, f16};

/// The type of the elements of q and k. Angles and arithmetic are f32 in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// All element types.
    pub const ALL: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// The name that kernels carry: `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element of q and k: [`f32`], [`half::f16`] or [`half::bf16`].
///
/// Conversion to f32 is exact. Conversion from f32 rounds to nearest even, keeps infinities,
/// signed zeros and subnormals, and turns every NaN into the canonical one that NVIDIA GPUs
/// produce: `0x7fffffff` (f32) or `0x7fff` (f16, bf16).
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The [`Dtype`] of this type.
    const DTYPE: Dtype;
    /// The value, exactly.
    fn widen(self) -> f32;
    /// The nearest value of this type.
    fn narrow(x: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        if x.is_nan() {
            f32::from_bits(0x7fff_ffff)
        } else {
            x
        }
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        if x.is_nan() {
            f16::from_bits(0x7fff)
        } else {
            f16::from_f32(x)
        }
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        if x.is_nan() {
            return bf16::from_bits(0x7fff);
        }
        bf16::from_bits(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }
}
