//! AVX2, FMA and F16C: eight pairs at a time, in the scalar definition's order of operations.
//!
//! Every function needs `avx2`, `fma` and `f16c`; [`super::Isa`] checks for them.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::run::HeadRun;
use super::scalar;
use crate::angle::phase;
use crate::element::Element;
use crate::rope::{Pairing, Pairings};

/// Pairs in a vector.
const LANES: usize = 8;

/// Vector loads and stores of one element type: exact to f32, and rounded back as
/// [`Element::narrow`] does.
#[doc(hidden)]
pub trait Lanes: Sized {
    /// 8 consecutive elements.
    ///
    /// # Safety
    /// Readable for 8 elements; the processor has AVX2, FMA and F16C. The same holds below.
    unsafe fn load(from: *const Self) -> __m256;
    /// 8 consecutive elements.
    ///
    /// # Safety
    /// See [`load`](Self::load).
    unsafe fn store(to: *mut Self, x: __m256);
    /// 16 consecutive elements, those of even and those of odd index.
    ///
    /// # Safety
    /// See [`load`](Self::load).
    unsafe fn load_pairs(from: *const Self) -> (__m256, __m256);
    /// The reverse of [`load_pairs`](Self::load_pairs).
    ///
    /// # Safety
    /// See [`load`](Self::load).
    unsafe fn store_pairs(to: *mut Self, a: __m256, b: __m256);
}

/// Rotates all heads of a run.
///
/// # Safety
/// The run's pointers are valid for its heads; the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn rotate_heads<T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    cos: &[f32],
    sin: &[f32],
) {
    for h in 0..run.heads {
        // SAFETY: the caller vouches for every head of the run.
        unsafe {
            let source = run.source.add(h * run.source_stride);
            let destination = run.destination.add(h * run.destination_stride);
            rotate_rest(pairings, run, (source, destination), 0, cos, sin);
        }
    }
}

/// Pairs `from..` of the run's block, in one head.
///
/// # Safety
/// `source` and `destination` start the rotated window of a head of the run; the processor has
/// AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn rotate_rest<T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    (source, destination): (*const T, *mut T),
    mut from: usize,
    cos: &[f32],
    sin: &[f32],
) {
    // SAFETY: whole vectors of pairs are read and written inside the rotated window; cos and sin
    // are as long as the block.
    unsafe {
        while from + LANES <= cos.len() {
            let cos = _mm256_loadu_ps(cos.as_ptr().add(from));
            let sin = _mm256_loadu_ps(sin.as_ptr().add(from));
            let pair = run.first + from;
            let (a, b) = scalar::members(pairings.source, pair, run.pairs);
            let (x, y) = match pairings.source {
                Pairing::HalfSplit => (
                    <T as Lanes>::load(source.add(a)),
                    <T as Lanes>::load(source.add(b)),
                ),
                Pairing::Interleaved => <T as Lanes>::load_pairs(source.add(a)),
            };
            let (x, y) = rotate(x, y, cos, sin);
            let (a, b) = scalar::members(pairings.destination, pair, run.pairs);
            match pairings.destination {
                Pairing::HalfSplit => {
                    <T as Lanes>::store(destination.add(a), x);
                    <T as Lanes>::store(destination.add(b), y);
                }
                Pairing::Interleaved => <T as Lanes>::store_pairs(destination.add(a), x, y),
            }
            from += LANES;
        }
        scalar::rotate_rest(pairings, run, (source, destination), from, cos, sin);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rotate(a: __m256, b: __m256, cos: __m256, sin: __m256) -> (__m256, __m256) {
    (
        _mm256_fmsub_ps(a, cos, _mm256_mul_ps(b, sin)),
        _mm256_fmadd_ps(a, sin, _mm256_mul_ps(b, cos)),
    )
}

/// cos and sin at one position, each times its scale.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn form_exact(
    steps: &[u64],
    position: i64,
    scales: (f32, f32),
    cos: &mut [f32],
    sin: &mut [f32],
) {
    let whole = steps.len() / LANES * LANES;
    let (cos_scale, sin_scale) = (_mm256_set1_ps(scales.0), _mm256_set1_ps(scales.1));
    let position_vector = _mm256_set1_epi64x(position);
    for at in (0..whole).step_by(LANES) {
        // SAFETY: `at + 8` is within steps, and cos and sin are as long.
        unsafe {
            let low = _mm256_loadu_si256(steps.as_ptr().add(at).cast());
            let high = _mm256_loadu_si256(steps.as_ptr().add(at + 4).cast());
            let (c, s) = cos_sin(mul_lo(low, position_vector), mul_lo(high, position_vector));
            _mm256_storeu_ps(cos.as_mut_ptr().add(at), _mm256_mul_ps(c, cos_scale));
            _mm256_storeu_ps(sin.as_mut_ptr().add(at), _mm256_mul_ps(s, sin_scale));
        }
    }
    scalar::form_exact(
        &steps[whole..],
        position,
        scales,
        &mut cos[whole..],
        &mut sin[whole..],
    );
}

/// The low 64 bits of each product.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mul_lo(a: __m256i, b: __m256i) -> __m256i {
    let cross = _mm256_add_epi64(
        _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), b),
        _mm256_mul_epu32(a, _mm256_srli_epi64::<32>(b)),
    );
    _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64::<32>(cross))
}

/// The upper 32 bits of 8 phases, in the order 0 1 4 5 2 3 6 7.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn high_words(a: __m256i, b: __m256i) -> __m256i {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b))
}

/// The lower 32 bits of 8 values, in the same order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn low_words(a: __m256i, b: __m256i) -> __m256i {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b))
}

/// Puts the order 0 1 4 5 2 3 6 7 right.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn in_order(x: __m256) -> __m256 {
    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(x)))
}

/// [`phase::cos_sin`] of phases 0 to 3 and 4 to 7.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn cos_sin(low: __m256i, high: __m256i) -> (__m256, __m256) {
    let rest = [_mm256_slli_epi64::<2>(low), _mm256_slli_epi64::<2>(high)];
    let magnitude = rest.map(|rest| {
        let sign = _mm256_cmpgt_epi64(_mm256_setzero_si256(), rest);
        _mm256_sub_epi64(_mm256_xor_si256(rest, sign), sign)
    });
    let top = low_words(
        _mm256_srli_epi64::<40>(magnitude[0]),
        _mm256_srli_epi64::<40>(magnitude[1]),
    );
    let bottom = _mm256_and_si256(
        low_words(
            _mm256_srli_epi64::<9>(magnitude[0]),
            _mm256_srli_epi64::<9>(magnitude[1]),
        ),
        _mm256_set1_epi32(0x7fff_ffff),
    );
    let set = _mm256_set1_ps;
    let s = _mm256_fmadd_ps(
        _mm256_cvtepi32_ps(bottom),
        set(phase::LOW_UNIT),
        _mm256_mul_ps(_mm256_cvtepi32_ps(top), set(phase::HIGH_UNIT)),
    );
    let z = _mm256_mul_ps(s, s);

    let p = _mm256_fmadd_ps(z, set(phase::SIN[3]), set(phase::SIN[2]));
    let p = _mm256_fmadd_ps(z, p, set(phase::SIN[1]));
    let p = _mm256_fmadd_ps(z, p, set(phase::SIN[0]));
    let sine = _mm256_fmadd_ps(s, set(phase::SIN_1), _mm256_mul_ps(s, p));

    let c = _mm256_fmadd_ps(z, set(phase::COS[3]), set(phase::COS[2]));
    let c = _mm256_fmadd_ps(z, c, set(phase::COS[1]));
    let c = _mm256_fmadd_ps(z, c, set(phase::COS[0]));
    let cosine = _mm256_fmadd_ps(z, c, set(1.0));

    let sign_bit = _mm256_set1_epi32(i32::MIN);
    let rest_sign = _mm256_and_si256(high_words(rest[0], rest[1]), sign_bit);
    let sine = _mm256_xor_ps(sine, _mm256_castsi256_ps(rest_sign));
    let quarter = _mm256_srli_epi32::<30>(_mm256_add_epi32(
        high_words(low, high),
        _mm256_set1_epi32(0x2000_0000),
    ));
    let odd = _mm256_castsi256_ps(_mm256_slli_epi32::<31>(quarter));
    let sign =
        |quarter| _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32::<30>(quarter), sign_bit));
    let cos_sign = sign(_mm256_add_epi32(quarter, _mm256_set1_epi32(1)));
    let sin_sign = sign(quarter);
    (
        in_order(_mm256_xor_ps(_mm256_blendv_ps(cosine, sine, odd), cos_sign)),
        in_order(_mm256_xor_ps(_mm256_blendv_ps(sine, cosine, odd), sin_sign)),
    )
}

/// Every NaN becomes 0x7fffffff.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn canonical(x: __m256) -> __m256 {
    let nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
    _mm256_blendv_ps(x, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

impl Lanes for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(to: *mut Self, x: __m256) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(to, canonical(x)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_pairs(from: *const Self) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let (x, y) = unsafe { (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) };
        (
            in_order(_mm256_shuffle_ps::<0b10_00_10_00>(x, y)),
            in_order(_mm256_shuffle_ps::<0b11_01_11_01>(x, y)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_pairs(to: *mut Self, a: __m256, b: __m256) {
        let (a, b) = (in_order(canonical(a)), in_order(canonical(b)));
        // SAFETY: the caller's.
        unsafe {
            _mm256_storeu_ps(to, _mm256_unpacklo_ps(a, b));
            _mm256_storeu_ps(to.add(8), _mm256_unpackhi_ps(a, b));
        }
    }
}

/// 8 halves, rounded to nearest even; NaN becomes 0x7fff.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn to_f16(x: __m256) -> __m128i {
    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(canonical(x))
}

impl Lanes for f16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(to: *mut Self, x: __m256) {
        // SAFETY: the caller's.
        unsafe { _mm_storeu_si128(to.cast(), to_f16(x)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_pairs(from: *const Self) -> (__m256, __m256) {
        // Even elements to the lower half of each 128-bit lane, odd ones to the upper, then lanes
        // to halves.
        #[rustfmt::skip]
        let split = _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
        ));
        // SAFETY: the caller's.
        let x = unsafe { _mm256_loadu_si256(from.cast()) };
        let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(x, split));
        (
            _mm256_cvtph_ps(_mm256_castsi256_si128(x)),
            _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_pairs(to: *mut Self, a: __m256, b: __m256) {
        let (a, b) = (to_f16(a), to_f16(b));
        // SAFETY: the caller's.
        unsafe {
            _mm_storeu_si128(to.cast(), _mm_unpacklo_epi16(a, b));
            _mm_storeu_si128(to.add(8).cast(), _mm_unpackhi_epi16(a, b));
        }
    }
}

/// The rounded value in the upper half of each 32-bit lane; the lower half is anything.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round_to_upper(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let nan = _mm256_set1_epi32(0x7fff_0000);
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_blendv_epi8(rounded, nan, is_nan)
}

impl Lanes for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        let x = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(to: *mut Self, x: __m256) {
        let x = _mm256_srli_epi32::<16>(round_to_upper(x));
        let x = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        // SAFETY: the caller's.
        unsafe { _mm_storeu_si128(to.cast(), x) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_pairs(from: *const Self) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let x = unsafe { _mm256_loadu_si256(from.cast()) };
        let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        (
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)),
            _mm256_castsi256_ps(_mm256_and_si256(x, upper)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_pairs(to: *mut Self, a: __m256, b: __m256) {
        let a = _mm256_srli_epi32::<16>(round_to_upper(a));
        let x = _mm256_blend_epi16::<0b1010_1010>(a, round_to_upper(b));
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(to.cast(), x) }
    }
}
