//! AVX-512 with the converts of its BF16 extension, for bf16 elements.
//!
//! The converts round to nearest even, but take subnormals for zero and keep a NaN's payload; vectors
//! that hold either are rounded on integers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx512::{self, Avx512, NarrowBf16};
use super::run::{AngleBlock, HeadRun};
use super::stages::{Room, Rows, TokenWork};
use super::vector::{self, Float, PairVectors, loops};
use super::vector_stages::{self};
use crate::element::Element;
use crate::rope::Pairings;

struct Avx512Bf16;

/// An element type that this variant has its own way with, or leaves to AVX-512's.
pub trait Converts: Sized {
    /// Rotates all heads of a run by the first `pairs` angles.
    ///
    /// # Safety
    /// The run's pointers are valid for its heads and these pairs; the processor has what this variant needs.
    unsafe fn rotate_converting(
        pairings: Pairings,
        run: &HeadRun<Self>,
        angles: &AngleBlock,
        pairs: usize,
    ) where
        Self: Element,
        Avx512: PairVectors<Self>,
    {
        // SAFETY: the caller's.
        unsafe { vector::rotate_heads::<Avx512, Avx512, _>(pairings, run, angles, pairs) }
    }

    /// All stages of the heads of a token.
    ///
    /// # Safety
    /// That of [`TokenWork::perform`]; the processor has what this variant needs.
    unsafe fn stages_converting(work: &TokenWork<'_>, room: &mut Room<Self>)
    where
        Self: Rows,
        Avx512: PairVectors<Self>,
    {
        // SAFETY: the caller's.
        unsafe { vector_stages::perform::<Avx512, Avx512, Self>(work, room) }
    }
}

impl Converts for f32 {}
impl Converts for f16 {}
impl Converts for bf16 {
    unsafe fn rotate_converting(
        pairings: Pairings,
        run: &HeadRun<Self>,
        angles: &AngleBlock,
        pairs: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { vector::rotate_heads::<Avx512Bf16, Avx512Bf16, _>(pairings, run, angles, pairs) }
    }

    unsafe fn stages_converting(work: &TokenWork<'_>, room: &mut Room<Self>) {
        // SAFETY: the caller's.
        unsafe { vector_stages::perform::<Avx512Bf16, Avx512Bf16, Self>(work, room) }
    }
}

loops!(
    Avx512Bf16,
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);

impl NarrowBf16 for Avx512Bf16 {
    const CONVERTS: bool = true;

    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn narrow(low: __m512, high: __m512) -> __m512i {
        /// Quiet NaN, subnormal, signalling NaN.
        const SPECIAL: i32 = 0x01 | 0x20 | 0x80;
        let special =
            _mm512_fpclass_ps_mask::<SPECIAL>(low) | _mm512_fpclass_ps_mask::<SPECIAL>(high);
        if special != 0 {
            return avx512::narrow_any(low, high);
        }
        converted(low, high)
    }

    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn merged(even: __m512, odd: __m512) -> __m512i {
        avx512::permuted(converted(even, odd), &avx512::MERGED)
    }

    // The first 16, then the last, as the converts leave them.
    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn split(x: __m512i) -> [__m512; 2] {
        avx512::widened(avx512::permuted(x, &avx512::MERGED))
    }

    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn joined([low, high]: [__m512; 2]) -> __m512i {
        converted(low, high)
    }

    // Of two elements each, exact but for the sum, which is rounded once, as the definition's is.
    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn squares(from: *const bf16) -> [__m512; 2] {
        // SAFETY: the caller's.
        unsafe { [squares(from), squares(from.add(32))] }
    }

    // Squares below 2^-126 are zeros here. Where that changes nothing: let a sum of two be at least 2^-75. The
    // larger of the two is at least 2^-76, and the larger square in it at least 2^-77: a number of 16 bits, from
    // which less than 2^-126 more is rounded away. The other of the two is right for the same reason from 2^-101
    // on, and else less than half of the last place of the larger one, whether it is right or not.
    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn may_lack(sums: &[[__m512; 2]]) -> bool {
        // Of positive numbers the bits are in their order; NaN is above all.
        let mut least = _mm512_set1_epi32(-1);
        for [a, b] in sums {
            least = _mm512_min_epu32(least, _mm512_castps_si512(*a));
            least = _mm512_min_epu32(least, _mm512_castps_si512(*b));
        }
        let enough = f32::from_bits((127 - 75) << 23).to_bits() as i32;
        _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(enough)) != 0
    }

    #[inline]
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn split_factors(from: *const f32) -> [__m512; 2] {
        // SAFETY: the caller's.
        unsafe { Float::load(from) }
    }
}

/// # Safety
/// Readable for 32 elements.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f")]
unsafe fn squares(from: *const bf16) -> __m512 {
    // SAFETY: the caller's; both types are 64 bytes of plain data.
    unsafe {
        let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast()));
        _mm512_dpbf16_ps(_mm512_setzero_ps(), x, x)
    }
}

#[inline]
#[target_feature(enable = "avx512bf16")]
fn converted(low: __m512, high: __m512) -> __m512i {
    let rounded = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(rounded) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Isa;

    /// Sums of two neighbours among squares of 64 elements, by the instruction and as defined; and whether they
    /// may differ.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn sums(x: &[bf16; 64]) -> ([[u32; 16]; 2], [[u32; 16]; 2], bool) {
        // SAFETY: the processor has these features, and there are as many elements.
        unsafe {
            let squares = <Avx512Bf16 as NarrowBf16>::squares(x.as_ptr());
            let exact = vector::squares::<Avx512Bf16, bf16>(x.as_ptr());
            let (sums, exact) = (squares.add_neighbours(squares), exact.add_neighbours(exact));
            let bits = |x: [__m512; 2]| std::mem::transmute::<[__m512; 2], [[u32; 16]; 2]>(x);
            let may_lack = <Avx512Bf16 as NarrowBf16>::may_lack(&[sums]);
            (bits(sums), bits(exact), may_lack)
        }
    }

    #[test]
    fn squares_that_may_lack_something_are_told() {
        if !Isa::Avx512Bf16.is_available() {
            return;
        }
        let mut state = 1u64;
        let (mut told, mut differ) = (0, 0);
        for round in 0..20_000 {
            // Every fourth element makes sums larger than they have to be, about as large, or smaller.
            let least = [20, 38, 58][round % 3];
            let x = std::array::from_fn(|i| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let bits = (state >> 40) as u32;
                let exponent = match i % 4 {
                    0 => 127 - least,
                    _ => (127 - 80) + (bits >> 16) % 50,
                };
                bf16::from_bits((bits & 0x807f | exponent << 7) as u16)
            });
            // SAFETY: the processor has it.
            let (sums, exact, may_lack) = unsafe { sums(&x) };
            assert!(may_lack || sums == exact, "{x:?}");
            told += u32::from(may_lack);
            differ += u32::from(sums != exact);
        }
        assert!(0 < differ && differ <= told && told < 20_000);
    }
}
